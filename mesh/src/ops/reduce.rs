//! `reduce`: the sum, maximum or minimum over dimensions.
//!
//! C1. Every reduced dimension is a dimension of the input, named once.
//! C2. Sums take `f32` and `i32`, maxima and minima `bool` as well. 16-bit floats are reduced in `f32`, so that parts
//!     of a sum that devices exchange are not rounded: the methods cast.

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// How elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum ReduceFn {
    /// Sum, along the program's summation tree.
    Sum,
    /// Largest.
    Max,
    /// Smallest.
    Min,
}

impl ReduceFn {
    /// What an empty reduction gives.
    pub fn identity(self) -> f32 {
        match self {
            ReduceFn::Sum => 0.0,
            ReduceFn::Max => f32::NEG_INFINITY,
            ReduceFn::Min => f32::INFINITY,
        }
    }
}

/// A reduction over dimensions.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Reduce {
    /// How.
    pub f: ReduceFn,
    /// Over which dimensions.
    pub over: Vec<Name>,
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        match self.f {
            ReduceFn::Sum => "reduce_sum",
            ReduceFn::Max => "reduce_max",
            ReduceFn::Min => "reduce_min",
        }
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        for (i, n) in self.over.iter().enumerate() {
            if !x[0].has(n) {
                let help = nearest(n, x[0].dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
                return refuse("C1", format!("cannot reduce {} over `{n}`", x[0]), help.unwrap_or_default());
            }
            if self.over[..i].contains(n) {
                return refuse("C1", format!("names `{n}` twice"), "name it once");
            }
        }
        if self.f == ReduceFn::Sum && x[0].dtype == DType::Bool {
            return refuse("C2", "cannot add up bools", "cast to f32 or i32 first");
        }
        if x[0].dtype.is_half() {
            return refuse("C2", format!("cannot reduce {}", x[0].dtype), "cast to f32 first");
        }
        Ok(x[0].without(&self.over))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let x = &cx.inputs[0];
        let dims = x.ty().dims;
        vec![Some(match self.f {
            ReduceFn::Sum => cx.dy.broadcast(&dims),
            // Ties share the gradient, so that it sums to one.
            ReduceFn::Max | ReduceFn::Min => {
                let hit = x.equal(&cx.output).cast(cx.dy.ty().dtype);
                let over: Vec<&str> = self.over.iter().map(|n| &**n).collect();
                hit.mul(&cx.dy.div(&hit.sum(&over)))
            }
        })]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        x[0].dims.iter().filter(|d| self.over.contains(&d.name)).cloned().collect()
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        x[0].elements() as u64
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let start = match self.f {
            ReduceFn::Sum => 0.0,
            ReduceFn::Max => f64::NEG_INFINITY,
            ReduceFn::Min => f64::INFINITY,
        };
        let kept: Vec<usize> = out.dims.iter().filter_map(|d| t[0].position(&d.name)).collect();
        let mut y = Reference::from_elem(out.shape(), start);
        for (i, &v) in x[0].indexed_iter() {
            let at: Vec<usize> = kept.iter().map(|&k| i[k]).collect();
            let y = &mut y[at.as_slice()];
            *y = match self.f {
                ReduceFn::Sum => *y + v,
                ReduceFn::Max => y.max(v),
                ReduceFn::Min => y.min(v),
            };
        }
        y
    }
}

impl Tensor {
    #[track_caller]
    fn reduce(&self, f: ReduceFn, over: &[&str]) -> Tensor {
        let dtype = self.ty().dtype;
        self.wide().apply(Reduce { f, over: over.iter().map(|&n| n.into()).collect() }).cast(dtype)
    }
    /// The sum over the dimensions named.
    #[track_caller]
    pub fn sum(&self, over: &[&str]) -> Tensor {
        self.reduce(ReduceFn::Sum, over)
    }
    /// The largest over the dimensions named; ties share the gradient.
    #[track_caller]
    pub fn max(&self, over: &[&str]) -> Tensor {
        self.reduce(ReduceFn::Max, over)
    }
    /// The smallest over the dimensions named; ties share the gradient.
    #[track_caller]
    pub fn min(&self, over: &[&str]) -> Tensor {
        self.reduce(ReduceFn::Min, over)
    }
    /// Whether any element along the dimensions named is true.
    #[track_caller]
    pub fn any(&self, over: &[&str]) -> Tensor {
        self.reduce(ReduceFn::Max, over)
    }
    /// The mean over the dimensions named.
    #[track_caller]
    pub fn mean(&self, over: &[&str]) -> Tensor {
        let mut count = 1;
        for n in over {
            count *= self.dim(n).size;
        }
        // The sum itself may be more than 16 bits hold.
        let wide = self.wide();
        wide.sum(over).div(&wide.number(count.max(1) as f32)).cast(self.ty().dtype)
    }
    /// The sum over all dimensions.
    #[track_caller]
    pub fn sum_all(&self) -> Tensor {
        let ty = self.ty();
        self.sum(&ty.dims.iter().map(|d| &*d.name).collect::<Vec<_>>())
    }
    /// The mean over all dimensions.
    #[track_caller]
    pub fn mean_all(&self) -> Tensor {
        let ty = self.ty();
        self.mean(&ty.dims.iter().map(|d| &*d.name).collect::<Vec<_>>())
    }
}
