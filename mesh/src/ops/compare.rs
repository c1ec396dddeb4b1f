//! `compare`: a comparison of two values, dimensions matched by name; `bool`.
//!
//! C1. Both have the same dtype.
//! C2. A dimension that both have is of the same size in both.

use super::binary::{broadcast_dims, broadcast_reference};
use crate::dim::{DType, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use ndarray::Zip;

/// The comparisons. With a NaN all but `Ne` are false.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum CompareFn {
    /// a = b
    Eq,
    /// a ≠ b
    Ne,
    /// a < b
    Lt,
    /// a ≤ b
    Le,
    /// a > b
    Gt,
    /// a ≥ b
    Ge,
}

impl CompareFn {
    /// Whether it holds.
    pub fn eval<T: PartialOrd>(self, a: T, b: T) -> bool {
        match self {
            CompareFn::Eq => a == b,
            CompareFn::Ne => a != b,
            CompareFn::Lt => a < b,
            CompareFn::Le => a <= b,
            CompareFn::Gt => a > b,
            CompareFn::Ge => a >= b,
        }
    }
}

/// A comparison of two values.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Compare {
    /// Which one.
    pub f: CompareFn,
}

impl Op for Compare {
    fn name(&self) -> &'static str {
        match self.f {
            CompareFn::Eq => "equal",
            CompareFn::Ne => "not_equal",
            CompareFn::Lt => "less",
            CompareFn::Le => "less_equal",
            CompareFn::Gt => "greater",
            CompareFn::Ge => "greater_equal",
        }
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        if x[0].dtype != x[1].dtype {
            return refuse("C1", format!("cannot compare {} and {}", x[0].dtype, x[1].dtype), "cast one of them");
        }
        match broadcast_dims(x) {
            Ok(dims) => Ok(Type::new(DType::Bool, dims)),
            Err(m) => refuse("C2", format!("cannot compare {} and {}: {m}", x[0], x[1]), "rename or slice one of them"),
        }
    }
    fn grad(&self, _: &GradContext) -> Vec<Option<Tensor>> {
        vec![None, None]
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        out.elements() as u64
    }
    fn elementwise(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut a = broadcast_reference(x[0], t[0], out);
        let b = broadcast_reference(x[1], t[1], out);
        Zip::from(&mut a).and(&b).for_each(|a, b| *a = f64::from(self.f.eval(*a, *b)));
        a
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $method:ident = $f:ident),* $(,)?) => {
        impl Tensor {
            $($(#[$doc])*
            #[track_caller]
            pub fn $method(&self, other: &Tensor) -> Tensor {
                self.graph().apply(Compare { f: CompareFn::$f }, &[self, other])
            })*
        }
    };
}
methods! {
    /// a = b, `bool`.
    equal = Eq,
    /// a ≠ b, `bool`.
    not_equal = Ne,
    /// a < b, `bool`.
    less = Lt,
    /// a ≤ b, `bool`.
    less_equal = Le,
    /// a > b, `bool`.
    greater = Gt,
    /// a ≥ b, `bool`.
    greater_equal = Ge,
}

impl Tensor {
    /// 1 where the `i32` value equals the index along the new, last dimension `dim`, else 0; `f32`.
    #[track_caller]
    pub fn one_hot(&self, dim: &crate::dim::Dim) -> Tensor {
        self.equal(&self.graph().iota(dim)).cast(DType::F32)
    }
}
