//! `top_k`: the indices of the largest elements along a dimension, in descending order.
//!
//! A NaN counts as larger than every number, -0.0 as equal to +0.0; of equal elements the one with the lower index comes
//! first.
//!
//! C1. The dimension is one of the input's.
//! C2. The input is `f32` or `i32`.
//! C3. `k` is at least 1, and at most the dimension's size and 65536.
//! C4. The result's dimension is none of the input's.
//!
//! Sharding: the dimension itself is gathered where it is split, nothing else; the result's dimension is never split.

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use std::cmp::Ordering;

/// The `i32` indices of the `k.size` largest elements along a dimension; `k` is the result's last dimension.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TopK {
    /// The dimension.
    pub dim: Name,
    /// What it becomes.
    pub k: Dim,
}

/// The most elements that one `top_k` gives: what a kernel keeps at hand.
pub const MOST: usize = 1 << 16;

/// Numbers in their order, above them NaN.
fn order(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

impl Op for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let Some(n) = x[0].size_of(&self.dim) else {
            let help = nearest(&self.dim, x[0].dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
            return refuse("C1", format!("cannot choose along `{}` of {}", self.dim, x[0]), help.unwrap_or_default());
        };
        if !matches!(x[0].dtype, DType::F32 | DType::I32) {
            return refuse("C2", format!("cannot order {}", x[0].dtype), "cast it to f32 or i32");
        }
        if self.k.size == 0 || self.k.size > n.min(MOST) {
            let m = format!("cannot choose {} of the {n} elements along `{}`", self.k.size, self.dim);
            return refuse("C3", m, format!("choose 1 to {}", n.min(MOST)));
        }
        if x[0].has(&self.k.name) {
            let m = format!("cannot call the result's dimension `{}`, which {} has", self.k.name, x[0]);
            return refuse("C4", m, "choose another name");
        }
        let mut out = x[0].without(std::slice::from_ref(&self.dim)).with_dtype(DType::I32);
        out.dims.push(self.k.clone());
        Ok(out)
    }
    fn grad(&self, _: &GradContext) -> Vec<Option<Tensor>> {
        vec![None]
    }
    fn whole(&self, _: &[&Type], _: &Type) -> Vec<(Name, &'static str)> {
        vec![
            (self.dim.clone(), "which elements are the largest is known when all have been seen"),
            (self.k.name.clone(), "the elements of one order are found together"),
        ]
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        x[0].elements() as u64
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let at = t[0].position(&self.dim).unwrap_or(0);
        let mut y = Reference::zeros(out.shape());
        let lanes = x[0].lanes(ndarray::Axis(at)).into_iter();
        for (lane, mut y) in lanes.zip(y.lanes_mut(ndarray::Axis(out.dims.len() - 1))) {
            let mut indices: Vec<usize> = (0..lane.len()).collect();
            // A stable sort: of equal ones the first comes first.
            indices.sort_by(|&a, &b| order(lane[b], lane[a]));
            y.iter_mut().zip(indices).for_each(|(y, i)| *y = i as f64);
        }
        y
    }
}

impl Tensor {
    /// The `k.size` largest elements along a dimension, in descending order, and their `i32` indices:
    /// `x.top_k("class", &dim("k", 3))`. Of equal elements the one with the lower index comes first; NaN counts as the
    /// largest. Gradients flow through the values.
    #[track_caller]
    pub fn top_k(&self, dim: &str, k: &Dim) -> (Tensor, Tensor) {
        let indices = self.apply(TopK { dim: dim.into(), k: k.clone() });
        (self.gather(&indices, dim), indices)
    }
}
