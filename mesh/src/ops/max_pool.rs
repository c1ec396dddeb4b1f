//! `max_pool`: the largest value of each window, and its gradient, which goes to the first maximum of a window in
//! row-major order, so that it sums to one a window.
//!
//! C1. The windows' dimensions are dimensions of the input, each named once; sizes, strides and dilations at least 1,
//!     padding smaller than the window's span. Padding never wins.
//! C2. The input is a float.
//! C3. Every window dimension gives at least one output.
//! C4. The gradient where windows overlap is a sum: of `f32`.

use super::window::Window;
use crate::dim::{DType, Type, dim};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::region::Region;

/// The largest value of each window; dimensions in the input's order.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MaxPool {
    /// The windows.
    pub windows: Vec<Window>,
}

/// The gradient of [`MaxPool`], from its input and the gradient of its result.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MaxPoolGrad {
    /// The windows.
    pub windows: Vec<Window>,
}

/// The type of a pooled tensor.
fn pooled(windows: &[Window], x: &Type) -> Result<Type, Refusal> {
    let mut out = x.clone();
    for (i, w) in windows.iter().enumerate() {
        w.check("C1")?;
        let at = x.position(&w.dim).filter(|_| !windows[..i].iter().any(|v| v.dim == w.dim));
        let Some(at) = at else {
            let help = nearest(&w.dim, x.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
            return refuse("C1", format!("cannot slide along `{}` of {x}", w.dim), help.unwrap_or_default());
        };
        let m = w.outputs(x.dims[at].size);
        if m == 0 {
            return refuse(
                "C3",
                format!("has no output along {}, window span {}", x.dims[at], w.span()),
                "use a smaller window",
            );
        }
        out.dims[at] = dim(&w.dim, m);
    }
    if !x.dtype.is_float() {
        return refuse("C2", format!("cannot take {}", x.dtype), "cast it to a float");
    }
    Ok(out)
}

/// Whether an element may lie in several windows.
fn overlap(windows: &[Window]) -> bool {
    windows.iter().any(|w| w.span() > w.stride)
}

/// For each output index the flat input indices of its window's elements, in row-major order of the window.
fn window_indices(windows: &[Window], x: &Type, at: &[usize]) -> Vec<Vec<usize>> {
    let mut found = vec![at.to_vec()];
    for w in windows {
        let Some(p) = x.position(&w.dim) else { continue };
        found = found
            .into_iter()
            .flat_map(|i| {
                (0..w.size)
                    .filter_map(move |j| {
                        let mut i = i.clone();
                        i[p] = w.tap(i[p], j, x.dims[p].size)?;
                        Some(i)
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    found
}

impl Op for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        pooled(&self.windows, x[0])
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (x, dy) = (&cx.inputs[0], &cx.dy);
        let own = x.ty().dtype;
        let dtype = if overlap(&self.windows) { DType::F32 } else { own };
        let op = MaxPoolGrad { windows: self.windows.clone() };
        vec![Some(dy.graph().apply(op, &[&x.cast(dtype), &dy.cast(dtype)]).cast(own))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        self.windows.iter().fold(at.of(inputs[0]), |r, w| {
            let n = inputs[0].size_of(&w.dim).unwrap_or(0);
            let range = at.get(&w.dim).map(|o| w.reads(o, n)).unwrap_or(0..n);
            r.with(&w.dim, range)
        })
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        (out.elements() * self.windows.iter().map(|w| w.size).product::<usize>()) as u64
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        Reference::from_shape_fn(out.shape(), |i| {
            let at: Vec<usize> = (0..out.dims.len()).map(|d| i[d]).collect();
            let window = window_indices(&self.windows, t[0], &at);
            window.iter().map(|i| x[0][i.as_slice()]).fold(f64::NEG_INFINITY, f64::max)
        })
    }
}

impl Op for MaxPoolGrad {
    fn name(&self) -> &'static str {
        "max_pool_grad"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let y = pooled(&self.windows, x[0])?;
        if y != *x[1] {
            return refuse(
                "C3",
                format!("cannot pair {} with the gradient {}", x[0], x[1]),
                format!("the gradient should be {y}"),
            );
        }
        if overlap(&self.windows) && x[0].dtype != DType::F32 {
            return refuse("C4", format!("cannot add up {}", x[0].dtype), "cast it to f32");
        }
        Ok(x[0].clone())
    }
    fn grad(&self, _: &GradContext) -> Vec<Option<Tensor>> {
        // Which element is the largest does not change with its value, almost everywhere; the gradient of the gradient
        // by `dy` is not offered.
        vec![None, None]
    }
    fn needs(&self, i: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        // An element's gradient comes from the windows that hold it, and what they choose depends on all they hold.
        self.windows.iter().fold(at.of(inputs[i]), |r, w| {
            let (n, m) = (inputs[0].size_of(&w.dim).unwrap_or(0), inputs[1].size_of(&w.dim).unwrap_or(0));
            let own = at.get(&w.dim).cloned().unwrap_or(0..n);
            let outputs = w.read_by(&own, m);
            let range = if i == 1 { outputs } else { w.reads(&outputs, n) };
            // The op reads its own elements too where no window does, only to have a place for them.
            r.with(&w.dim, range)
        })
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        (x[1].elements() * self.windows.iter().map(|w| w.size).product::<usize>()) as u64
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut dx = Reference::zeros(out.shape());
        for (i, &dy) in x[1].indexed_iter() {
            let at: Vec<usize> = (0..t[1].dims.len()).map(|d| i[d]).collect();
            let mut best: Option<(f64, Vec<usize>)> = None;
            for i in window_indices(&self.windows, t[0], &at) {
                let v = x[0][i.as_slice()];
                if best.as_ref().is_none_or(|(b, _)| v > *b || v.is_nan() && !b.is_nan()) {
                    best = Some((v, i));
                }
            }
            if let Some((_, i)) = best {
                dx[i.as_slice()] += dy;
            }
        }
        dx
    }
}

impl Tensor {
    /// The largest value of each window.
    #[track_caller]
    pub fn max_pool(&self, windows: &[Window]) -> Tensor {
        self.apply(MaxPool { windows: windows.to_vec() })
    }
}
