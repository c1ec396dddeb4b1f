//! `binary`: a function of two values, dimensions matched by name; a dimension that only one of them has is broadcast.
//!
//! C1. Both have the same dtype.
//! C2. A dimension that both have is of the same size in both.
//! C3. `and` and `or` take `bool`; the others take floats or `i32` (`pow` floats alone).

use crate::dim::{DType, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use ndarray::Zip;

/// The functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum BinaryFn {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a * b
    Mul,
    /// a / b
    Div,
    /// the larger one
    Max,
    /// the smaller one
    Min,
    /// a^b
    Pow,
    /// a - b * floor(a / b)
    Rem,
    /// logical and
    And,
    /// logical or
    Or,
}

impl BinaryFn {
    /// Every function.
    pub const ALL: [BinaryFn; 10] = {
        use BinaryFn::*;
        [Add, Sub, Mul, Div, Max, Min, Pow, Rem, And, Or]
    };

    /// Its value in double precision.
    pub fn eval(self, a: f64, b: f64) -> f64 {
        match self {
            BinaryFn::Add => a + b,
            BinaryFn::Sub => a - b,
            BinaryFn::Mul => a * b,
            BinaryFn::Div => a / b,
            BinaryFn::Max => a.max(b),
            BinaryFn::Min => a.min(b),
            BinaryFn::Pow => a.powf(b),
            BinaryFn::Rem => a - b * (a / b).floor(),
            BinaryFn::And => f64::from(a != 0.0 && b != 0.0),
            BinaryFn::Or => f64::from(a != 0.0 || b != 0.0),
        }
    }
}

/// A function of two values.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Binary {
    /// The function.
    pub f: BinaryFn,
}

/// The dimensions of elementwise results: those of the input that has all of them, else the first input's, then what
/// the next ones add. None with the name of a dimension whose sizes differ.
pub(crate) fn broadcast_dims(inputs: &[&Type]) -> Result<Vec<crate::dim::Dim>, String> {
    let mut union = Vec::new();
    for d in inputs.iter().flat_map(|t| &t.dims) {
        match union.iter().find(|u: &&crate::dim::Dim| u.name == d.name) {
            None => union.push(d.clone()),
            Some(u) if u.size != d.size => {
                return Err(format!("dimension `{}` is {} in one and {} in the other", d.name, u.size, d.size));
            }
            Some(_) => {}
        }
    }
    let largest = inputs.iter().find(|t| t.dims.len() == union.len());
    Ok(largest.map_or(union, |t| t.dims.clone()))
}

/// A reference array broadcast by name to the dimensions of `out`.
pub(crate) fn broadcast_reference(x: &Reference, ty: &Type, out: &Type) -> Reference {
    let at: Vec<Option<usize>> = out.dims.iter().map(|d| ty.position(&d.name)).collect();
    Reference::from_shape_fn(out.shape(), |i| {
        let mut index = vec![0; ty.dims.len()];
        at.iter().enumerate().for_each(|(o, p)| {
            if let Some(p) = p {
                index[*p] = i[o];
            }
        });
        x[index.as_slice()]
    })
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self.f {
            BinaryFn::Add => "add",
            BinaryFn::Sub => "sub",
            BinaryFn::Mul => "mul",
            BinaryFn::Div => "div",
            BinaryFn::Max => "maximum",
            BinaryFn::Min => "minimum",
            BinaryFn::Pow => "pow",
            BinaryFn::Rem => "rem",
            BinaryFn::And => "and",
            BinaryFn::Or => "or",
        }
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        if x[0].dtype != x[1].dtype {
            return refuse("C1", format!("cannot take {} and {}", x[0].dtype, x[1].dtype), "cast one of them");
        }
        let ok = match self.f {
            BinaryFn::And | BinaryFn::Or => x[0].dtype == DType::Bool,
            BinaryFn::Pow => x[0].dtype.is_float(),
            _ => x[0].dtype != DType::Bool,
        };
        if !ok {
            return refuse("C3", format!("cannot take {}", x[0].dtype), "cast first");
        }
        match broadcast_dims(x) {
            Ok(dims) => Ok(Type::new(x[0].dtype, dims)),
            Err(m) => refuse("C2", format!("cannot take {} and {}: {m}", x[0], x[1]), "rename or slice one of them"),
        }
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (a, b, y, dy) = (&cx.inputs[0], &cx.inputs[1], &cx.output, &cx.dy);
        // Ties share the gradient, so that it sums to one.
        let share = |x: &Tensor| {
            let tie = a.equal(b).select(&dy.number(0.5), &dy.number(1.0));
            dy.mul(&x.equal(y).select(&tie, &dy.number(0.0)))
        };
        let (da, db) = match self.f {
            BinaryFn::Add => (dy.clone(), dy.clone()),
            BinaryFn::Sub => (dy.clone(), dy.neg()),
            BinaryFn::Mul => (dy.mul(b), dy.mul(a)),
            BinaryFn::Div => (dy.div(b), dy.mul(y).div(b).neg()),
            BinaryFn::Max | BinaryFn::Min => (share(a), share(b)),
            BinaryFn::Pow => (dy.mul(b).mul(&a.pow(&b.add_scalar(-1.0))), dy.mul(y).mul(&a.log())),
            BinaryFn::Rem => (dy.clone(), dy.mul(&a.div(b).floor()).neg()),
            BinaryFn::And | BinaryFn::Or => return vec![None, None],
        };
        vec![Some(da.sum_to(&a.ty())), Some(db.sum_to(&b.ty()))]
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
        Zip::from(&mut a).and(&b).for_each(|a, b| *a = self.f.eval(*a, *b));
        a
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $method:ident = $f:ident),* $(,)?) => {
        impl Tensor {
            $($(#[$doc])*
            #[track_caller]
            pub fn $method(&self, other: &Tensor) -> Tensor {
                self.graph().apply(Binary { f: BinaryFn::$f }, &[self, other])
            })*
        }
    };
}
methods! {
    /// a + b
    add = Add,
    /// a - b
    sub = Sub,
    /// a * b
    mul = Mul,
    /// a / b
    div = Div,
    /// The larger one of each pair; ties share the gradient.
    maximum = Max,
    /// The smaller one of each pair; ties share the gradient.
    minimum = Min,
    /// a^b
    pow = Pow,
    /// a - b * floor(a / b)
    rem = Rem,
    /// Logical and of two `bool`s.
    and = And,
    /// Logical or of two `bool`s.
    or = Or,
}

impl Tensor {
    /// A scalar of this value's dtype if that is a float, else an `f32` one.
    #[track_caller]
    pub fn number(&self, c: f32) -> Tensor {
        let dtype = Some(self.ty().dtype).filter(|t| t.is_float()).unwrap_or(DType::F32);
        self.graph().apply(super::source::Constant { value: f64::from(c), dtype }, &[])
    }
    /// x + c
    #[track_caller]
    pub fn add_scalar(&self, c: f32) -> Tensor {
        self.add(&self.number(c))
    }
    /// x * c
    #[track_caller]
    pub fn mul_scalar(&self, c: f32) -> Tensor {
        self.mul(&self.number(c))
    }
    /// x^2
    #[track_caller]
    pub fn square(&self) -> Tensor {
        self.mul(self)
    }
    /// This value summed over the dimensions that `ty` lacks, in the order of `ty`: the gradient of a broadcast.
    #[track_caller]
    pub fn sum_to(&self, ty: &Type) -> Tensor {
        let own = self.ty();
        let over: Vec<&str> = own.dims.iter().filter(|d| !ty.has(&d.name)).map(|d| &*d.name).collect();
        let summed = if over.is_empty() { self.clone() } else { self.sum(&over) };
        summed.reorder(&ty.dims.iter().map(|d| &*d.name).collect::<Vec<_>>())
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident),*) => {$(
        impl std::ops::$trait<&Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: &Tensor) -> Tensor {
                Tensor::$method(self, other)
            }
        }
        impl std::ops::$trait<Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: Tensor) -> Tensor {
                Tensor::$method(&self, &other)
            }
        }
        impl std::ops::$trait<&Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: &Tensor) -> Tensor {
                Tensor::$method(&self, other)
            }
        }
        impl std::ops::$trait<Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: Tensor) -> Tensor {
                Tensor::$method(self, &other)
            }
        }
        impl std::ops::$trait<f32> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: f32) -> Tensor {
                Tensor::$method(self, &self.number(other))
            }
        }
        impl std::ops::$trait<f32> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: f32) -> Tensor {
                Tensor::$method(&self, &self.number(other))
            }
        }
    )*};
}
operators!(Add add, Sub sub, Mul mul, Div div);
