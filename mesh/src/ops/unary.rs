//! `unary`: a function of each element.
//!
//! C1. The input is a float; `identity`, `neg` and `abs` take `i32` as well, `not` takes `bool` alone.

use crate::dim::{DType, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// The functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum UnaryFn {
    /// x
    Identity,
    /// -x
    Neg,
    /// |x|
    Abs,
    /// -1, 0 or 1
    Sign,
    /// e^x
    Exp,
    /// natural logarithm
    Log,
    /// square root
    Sqrt,
    /// 1 / sqrt(x)
    Rsqrt,
    /// 1 / x
    Recip,
    /// hyperbolic tangent
    Tanh,
    /// 1 / (1 + e^-x)
    Sigmoid,
    /// error function
    Erf,
    /// max(x, 0); the derivative at 0 is 0
    Relu,
    /// the largest integer not above x
    Floor,
    /// sine
    Sin,
    /// cosine
    Cos,
    /// logical not
    Not,
}

impl UnaryFn {
    /// Every function.
    pub const ALL: [UnaryFn; 17] = {
        use UnaryFn::*;
        [Identity, Neg, Abs, Sign, Exp, Log, Sqrt, Rsqrt, Recip, Tanh, Sigmoid, Erf, Relu, Floor, Sin, Cos, Not]
    };

    /// Its value in double precision.
    pub fn eval(self, x: f64) -> f64 {
        match self {
            UnaryFn::Identity => x,
            UnaryFn::Neg => -x,
            UnaryFn::Abs => x.abs(),
            UnaryFn::Sign => {
                if x == 0.0 {
                    0.0
                } else {
                    x.signum()
                }
            }
            UnaryFn::Exp => x.exp(),
            UnaryFn::Log => x.ln(),
            UnaryFn::Sqrt => x.sqrt(),
            UnaryFn::Rsqrt => 1.0 / x.sqrt(),
            UnaryFn::Recip => 1.0 / x,
            UnaryFn::Tanh => x.tanh(),
            UnaryFn::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            UnaryFn::Erf => erf(x),
            UnaryFn::Relu => x.max(0.0),
            UnaryFn::Floor => x.floor(),
            UnaryFn::Sin => x.sin(),
            UnaryFn::Cos => x.cos(),
            UnaryFn::Not => f64::from(x == 0.0),
        }
    }
}

/// The error function by its Maclaurin series (|x| < 3) or continued fraction, to about 1e-15.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..60).rev().fold(0.0, |f, k| f64::from(k) / 2.0 / (a + f));
        1.0 - (-a * a).exp() / ((a + fraction) * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

/// A function of each element.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Unary {
    /// The function.
    pub f: UnaryFn,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        match self.f {
            UnaryFn::Identity => "identity",
            UnaryFn::Neg => "neg",
            UnaryFn::Abs => "abs",
            UnaryFn::Sign => "sign",
            UnaryFn::Exp => "exp",
            UnaryFn::Log => "log",
            UnaryFn::Sqrt => "sqrt",
            UnaryFn::Rsqrt => "rsqrt",
            UnaryFn::Recip => "recip",
            UnaryFn::Tanh => "tanh",
            UnaryFn::Sigmoid => "sigmoid",
            UnaryFn::Erf => "erf",
            UnaryFn::Relu => "relu",
            UnaryFn::Floor => "floor",
            UnaryFn::Sin => "sin",
            UnaryFn::Cos => "cos",
            UnaryFn::Not => "not",
        }
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let ok = match (self.f, x[0].dtype) {
            (UnaryFn::Identity, _) => true,
            (UnaryFn::Not, t) => t == DType::Bool,
            (UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Relu | UnaryFn::Sign, DType::I32) => true,
            (_, t) => t.is_float(),
        };
        if ok { Ok(x[0].clone()) } else { refuse("C1", format!("cannot take {}", x[0]), "cast it first") }
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (x, y, dy) = (&cx.inputs[0], &cx.output, &cx.dy);
        let dx = match self.f {
            UnaryFn::Identity => dy.clone(),
            UnaryFn::Neg => dy.neg(),
            UnaryFn::Abs => dy.mul(&x.sign()),
            UnaryFn::Sign | UnaryFn::Floor | UnaryFn::Not => return vec![None],
            UnaryFn::Exp => dy.mul(y),
            UnaryFn::Log => dy.div(x),
            UnaryFn::Sqrt => dy.div(y).mul_scalar(0.5),
            UnaryFn::Rsqrt => dy.mul(&y.mul(y).mul(y)).mul_scalar(-0.5),
            UnaryFn::Recip => dy.mul(&y.mul(y)).neg(),
            UnaryFn::Tanh => dy.mul(&y.mul(y).neg().add_scalar(1.0)),
            UnaryFn::Sigmoid => dy.mul(&y.mul(&y.neg().add_scalar(1.0))),
            UnaryFn::Erf => dy.mul(&x.mul(x).neg().exp()).mul_scalar(std::f32::consts::FRAC_2_SQRT_PI),
            UnaryFn::Relu => x.greater(&x.number(0.0)).select(dy, &dy.number(0.0)),
            UnaryFn::Sin => dy.mul(&x.cos()),
            UnaryFn::Cos => dy.mul(&x.sin()).neg(),
        };
        vec![Some(dx)]
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        out.elements() as u64
    }
    fn elementwise(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], _: &Type) -> Reference {
        x[0].mapv(|v| self.f.eval(v))
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $method:ident = $f:ident),* $(,)?) => {
        impl Tensor {
            $($(#[$doc])*
            #[track_caller]
            pub fn $method(&self) -> Tensor {
                self.apply(Unary { f: UnaryFn::$f })
            })*
        }
    };
}
methods! {
    /// -x
    neg = Neg,
    /// |x|
    abs = Abs,
    /// -1, 0 or 1
    sign = Sign,
    /// e^x
    exp = Exp,
    /// Natural logarithm.
    log = Log,
    /// Square root.
    sqrt = Sqrt,
    /// 1 / sqrt(x)
    rsqrt = Rsqrt,
    /// 1 / x
    recip = Recip,
    /// Hyperbolic tangent.
    tanh = Tanh,
    /// 1 / (1 + e^-x)
    sigmoid = Sigmoid,
    /// Error function.
    erf = Erf,
    /// max(x, 0)
    relu = Relu,
    /// The largest integer not above x; no gradient.
    floor = Floor,
    /// Sine.
    sin = Sin,
    /// Cosine.
    cos = Cos,
    /// Logical not of a `bool`.
    not = Not,
}
