//! Ops without inputs (feeds, variables, constants, the step, iota, random numbers) and `assign`.
//!
//! C1. The value assigned to a variable has the variable's dtype and its dimensions (in any order).

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::program::VarId;

/// A feed of the function.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Input {
    /// Its name.
    pub name: Name,
    /// Its type.
    pub ty: Type,
}

/// The value of a variable when the function starts.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Read {
    /// The variable.
    pub var: VarId,
    /// Its type.
    pub ty: Type,
}

/// The value of a variable when the function has ended.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Assign {
    /// The variable.
    pub var: VarId,
}

/// A scalar.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Constant {
    /// Its value.
    #[serde(with = "crate::dim::bits")]
    pub value: f64,
    /// Its dtype.
    pub dtype: DType,
}

/// The number of the running step, an `i32` scalar.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Step;

/// `i32[dim]`: 0, 1, 2, ..
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Iota {
    /// The dimension.
    pub dim: Dim,
}

/// What random numbers are drawn.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Distribution {
    /// Uniform in [0, 1).
    Uniform,
    /// Standard normal, by the Box-Muller transform.
    Normal,
    /// Standard normal given that it lies in [-2, 2], by the inverse of its distribution function.
    TruncatedNormal,
    /// 1 with that probability, else 0.
    Bernoulli(f32),
}

/// `f32[dims]` of random numbers; element `i` (row-major in the whole tensor) is a function of
/// (seed, step, key, i) alone, see [`crate::rng::Stream`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Random {
    /// What is drawn.
    pub distribution: Distribution,
    /// The op's own key.
    pub key: u32,
    /// Dimensions.
    pub dims: Vec<Dim>,
}

macro_rules! source {
    ($ty:ty, $name:literal, |$op:ident| $infer:expr, |$out_op:ident, $out:ident| $reference:expr) => {
        impl Op for $ty {
            fn name(&self) -> &'static str {
                $name
            }
            fn takes(&self, inputs: usize) -> bool {
                inputs == 0
            }
            fn infer(&self, _: &[&Type]) -> Result<Type, Refusal> {
                let $op = self;
                Ok($infer)
            }
            fn grad(&self, _: &GradContext) -> Vec<Option<Tensor>> {
                vec![]
            }
            fn flops(&self, _: &[&Type], _: &Type) -> u64 {
                0
            }
            fn elementwise(&self) -> bool {
                matches!($name, "constant" | "step" | "iota" | "random")
            }
            fn reference(&self, _: &[&Reference], _: &[&Type], $out: &Type) -> Reference {
                let $out_op = self;
                $reference
            }
        }
    };
}

// What a feed, a variable, the step and random numbers are comes from outside the graph:
// `crate::reference` puts it in and never asks the op.
source!(Input, "input", |op| op.ty.clone(), |_op, out| Reference::zeros(out.shape()));
source!(Read, "read", |op| op.ty.clone(), |_op, out| Reference::zeros(out.shape()));
source!(Constant, "constant", |op| Type::scalar(op.dtype), |op, out| Reference::from_elem(out.shape(), op.value));
source!(Step, "step", |_op| Type::scalar(DType::I32), |_op, out| Reference::zeros(out.shape()));
source!(Iota, "iota", |op| Type::new(DType::I32, [op.dim.clone()]), |_op, out| {
    Reference::from_shape_fn(out.shape(), |i| i[0] as f64)
});
source!(Random, "random", |op| Type::new(DType::F32, op.dims.clone()), |_op, out| Reference::zeros(out.shape()));

impl Op for Assign {
    fn name(&self) -> &'static str {
        "assign"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        Ok(x[0].clone())
    }
    fn grad(&self, _: &GradContext) -> Vec<Option<Tensor>> {
        vec![None]
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], _: &Type) -> Reference {
        x[0].clone()
    }
}

impl Assign {
    /// C1, checked by the builder, which knows the variable's type.
    pub fn check(variable: &Type, value: &Type) -> Result<(), Refusal> {
        let same = variable.dtype == value.dtype
            && variable.dims.len() == value.dims.len()
            && variable.dims.iter().all(|d| value.dims.contains(d));
        if same {
            Ok(())
        } else {
            refuse("C1", format!("cannot set a variable {variable} to {value}"), "make the types equal")
        }
    }
}
