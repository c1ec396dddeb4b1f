//! `broadcast`: the same values along more dimensions, in the order given.
//!
//! C1. Every dimension of the input is among the new ones, with its size.

use super::binary::broadcast_reference;
use crate::dim::{Dim, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// More dimensions.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Broadcast {
    /// All dimensions of the result.
    pub dims: Vec<Dim>,
}

impl Op for Broadcast {
    fn name(&self) -> &'static str {
        "broadcast"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        match x[0].dims.iter().find(|d| !self.dims.contains(d)) {
            None => Ok(Type::new(x[0].dtype, self.dims.clone())),
            Some(d) => {
                refuse("C1", format!("cannot broadcast {} to dimensions without {d}", x[0]), format!("add {d} to them"))
            }
        }
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        vec![Some(cx.dy.sum_to(&cx.inputs[0].ty()))]
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn elementwise(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        broadcast_reference(x[0], t[0], out)
    }
}

impl Tensor {
    /// The same values along more dimensions, in the order given.
    #[track_caller]
    pub fn broadcast(&self, dims: &[Dim]) -> Tensor {
        if self.ty().dims == dims { self.clone() } else { self.apply(Broadcast { dims: dims.to_vec() }) }
    }
    /// The same values with the dimensions in another order in memory. Named tensors hardly ever need it: ops match
    /// dimensions by name, and lay out their inputs as they want them.
    #[track_caller]
    pub fn reorder(&self, names: &[&str]) -> Tensor {
        let mut dims = Vec::with_capacity(names.len());
        for n in names {
            dims.push(self.dim(n));
        }
        self.broadcast(&dims)
    }
}
