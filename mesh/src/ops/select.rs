//! `select`: `condition ? a : b` for each element, dimensions matched by name.
//!
//! C1. The condition is `bool`; a and b have one dtype.
//! C2. A dimension that two of them have is of the same size in both.

use super::binary::{broadcast_dims, broadcast_reference};
use crate::dim::{DType, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use ndarray::Zip;

/// One of two values by a condition. What is not chosen does not matter, NaN or not.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Select;

impl Op for Select {
    fn name(&self) -> &'static str {
        "select"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 3
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        if x[0].dtype != DType::Bool || x[1].dtype != x[2].dtype {
            let m = format!("cannot choose between {} and {} by {}", x[1].dtype, x[2].dtype, x[0].dtype);
            return refuse("C1", m, "compare to get a condition; cast one of the values");
        }
        // The values come first, so that a condition with few dimensions does not turn the order of theirs.
        match broadcast_dims(&[x[1], x[2], x[0]]) {
            Ok(dims) => Ok(Type::new(x[1].dtype, dims)),
            Err(m) => refuse(
                "C2",
                format!("cannot choose between {} and {} by {}: {m}", x[1], x[2], x[0]),
                "rename or slice one of them",
            ),
        }
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let zero = cx.dy.number(0.0);
        let da = cx.inputs[0].select(&cx.dy, &zero).sum_to(&cx.inputs[1].ty());
        let db = cx.inputs[0].select(&zero, &cx.dy).sum_to(&cx.inputs[2].ty());
        vec![None, Some(da), Some(db)]
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        out.elements() as u64
    }
    fn elementwise(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut c = broadcast_reference(x[0], t[0], out);
        let a = broadcast_reference(x[1], t[1], out);
        let b = broadcast_reference(x[2], t[2], out);
        Zip::from(&mut c).and(&a).and(&b).for_each(|c, a, b| *c = if *c != 0.0 { *a } else { *b });
        c
    }
}

impl Tensor {
    /// `a` where this `bool` is true, else `b`.
    #[track_caller]
    pub fn select(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.graph().apply(Select, &[self, a, b])
    }
}
