//! `cast`: the same values in another dtype. Floats to `i32` are cut towards zero; `bool` is 0 or 1, and true is
//! whatever is not 0.

use crate::dim::{DType, Type};
use crate::error::Refusal;
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// Another dtype.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Cast {
    /// The dtype.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        Ok(x[0].with_dtype(self.to))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let from = cx.inputs[0].ty().dtype;
        vec![(from.is_float() && self.to.is_float()).then(|| cx.dy.cast(from))]
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn elementwise(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], _: &Type) -> Reference {
        x[0].mapv(|v| match self.to {
            DType::F32 | DType::Bf16 | DType::F16 => v,
            DType::I32 => v.trunc(),
            DType::Bool => f64::from(v != 0.0),
        })
    }
}

impl Tensor {
    /// The same values in another dtype; itself if it has that one, and what it was before if it was a 16-bit float made wide.
    #[track_caller]
    pub fn cast(&self, to: DType) -> Tensor {
        if self.ty().dtype == to {
            return self.clone();
        }
        let before = if to.is_half() { self.cast_from() } else { None };
        before.filter(|t| t.ty().dtype == to).unwrap_or_else(|| self.apply(Cast { to }))
    }
    /// The same values in `f32`, of 16-bit floats; itself otherwise.
    #[track_caller]
    pub(crate) fn wide(&self) -> Tensor {
        if self.ty().dtype.is_half() { self.cast(DType::F32) } else { self.clone() }
    }
}
