//! `window_sum`: the sum of each window along one dimension, and its adjoint, which gives each element the sum over the
//! windows that hold it. Padding counts as 0.
//!
//! C1. The window's dimension is a dimension of the input, of the size that the op says; size, stride and dilation are
//!     at least 1, and the padding is smaller than the window's span.
//! C2. The input is `f32`.
//! C3. The dimension gives at least one output.
//!
//! Sharding: a halo as wide as the window.

use super::rows::Rows;
use super::window::Window;
use crate::dim::{DType, Type, dim};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::region::Region;

/// The sum of each window along one dimension, or its adjoint.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct WindowSum {
    /// The window.
    pub window: Window,
    /// Elements that the windows slide over.
    pub size: usize,
    /// From windows to elements instead.
    pub adjoint: bool,
}

impl WindowSum {
    /// The map as rows.
    pub fn rows(&self) -> Rows {
        let (w, n) = (&self.window, self.size);
        let row = |o| (0..w.size).filter_map(move |j| w.tap(o, j, n)).map(|i| (i, 1.0));
        let rows = Rows::new(n, (0..w.outputs(n)).map(row));
        if self.adjoint { rows.transposed() } else { rows }
    }
}

/// The type of `x` with `dim` of another size, where it has just the size `from`; `constraint` if not.
pub(super) fn resized(constraint: &'static str, x: &Type, name: &str, from: usize, to: usize) -> Result<Type, Refusal> {
    let Some(at) = x.position(name) else {
        let help = nearest(name, x.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
        return refuse(constraint, format!("cannot find `{name}` in {x}"), help.unwrap_or_default());
    };
    if x.dims[at].size != from {
        return refuse(constraint, format!("is for {} of size {from}, not {x}", name), "apply it to such an input");
    }
    let mut out = x.clone();
    out.dims[at] = dim(name, to);
    Ok(out)
}

impl Op for WindowSum {
    fn name(&self) -> &'static str {
        if self.adjoint { "window_sum_grad" } else { "window_sum" }
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        self.window.check("C1")?;
        let outputs = self.window.outputs(self.size);
        let (from, to) = if self.adjoint { (outputs, self.size) } else { (self.size, outputs) };
        let out = resized("C1", x[0], &self.window.dim, from, to)?;
        if x[0].dtype != DType::F32 {
            return refuse("C2", format!("cannot take {}", x[0].dtype), "cast it to f32");
        }
        if outputs == 0 {
            let m =
                format!("has no output along {}:{}, window span {}", self.window.dim, self.size, self.window.span());
            return refuse("C3", m, "use a smaller window");
        }
        Ok(out)
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        vec![Some(cx.dy.apply(WindowSum { adjoint: !self.adjoint, ..self.clone() }))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        self.rows().needs(&self.window.dim, inputs[0], at)
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        self.rows().flops(out)
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], _: &Type) -> Reference {
        self.rows().apply(x[0], t[0].position(&self.window.dim).unwrap_or(0))
    }
}

impl Tensor {
    /// The sum of each window; of several windows, one dimension after the other. Padding counts as 0.
    #[track_caller]
    pub fn window_sum(&self, windows: &[Window]) -> Tensor {
        let mut x = self.clone();
        for w in windows {
            x = x.apply(WindowSum { window: w.clone(), size: x.ty().size_of(&w.dim).unwrap_or(0), adjoint: false });
        }
        x
    }
    /// The mean of each window over those of its elements that lie inside the input; 0 where none does.
    #[track_caller]
    pub fn avg_pool(&self, windows: &[Window]) -> Tensor {
        let sum = self.window_sum(windows);
        // Windows that lie inside the input have one element count; padded ones are counted along each dimension.
        let (inside, padded): (Vec<&Window>, Vec<&Window>) = windows.iter().partition(|w| w.lo + w.hi == 0);
        let mut count = self.number(inside.iter().map(|w| w.size).product::<usize>() as f32);
        for w in padded {
            let ones = self.number(1.0).broadcast(&[self.dim(&w.dim)]);
            count = count.mul(&ones.window_sum(std::slice::from_ref(w)).maximum(&self.number(1.0)));
        }
        sum.div(&count)
    }
}
