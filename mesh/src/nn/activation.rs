//! Activations, and the functions of a whole distribution.

use crate::dim::DType;
use crate::graph::Tensor;

/// x where it is positive, else `slope` x; the derivative at 0 is `slope`. Computed in f32, of x' dtype.
#[track_caller]
pub fn leaky_relu(x: &Tensor, slope: f32) -> Tensor {
    let (dtype, x) = (x.ty().dtype, x.cast(DType::F32));
    x.greater(&x.number(0.0)).select(&x, &x.mul(&x.number(slope))).cast(dtype)
}

/// Gaussian error linear unit, exactly: x Φ(x) with the normal distribution function Φ; computed in f32, of x' dtype.
#[track_caller]
pub fn gelu(x: &Tensor) -> Tensor {
    let (dtype, x) = (x.ty().dtype, x.cast(DType::F32));
    let phi = x.mul(&x.number(std::f32::consts::FRAC_1_SQRT_2)).erf().add(&x.number(1.0)).mul(&x.number(0.5));
    x.mul(&phi).cast(dtype)
}

/// The approximation of [`gelu`] by a hyperbolic tangent (Hendrycks and Gimpel 2016).
#[track_caller]
pub fn gelu_tanh(x: &Tensor) -> Tensor {
    let (dtype, x) = (x.ty().dtype, x.cast(DType::F32));
    let c = (2.0 / std::f32::consts::PI).sqrt();
    let cubic = x.add(&x.mul(&x).mul(&x).mul(&x.number(0.044715)));
    let phi = cubic.mul(&x.number(c)).tanh().add(&x.number(1.0)).mul(&x.number(0.5));
    x.mul(&phi).cast(dtype)
}

/// x / (1 + e^-x), also called swish; computed in f32, of x' dtype.
#[track_caller]
pub fn silu(x: &Tensor) -> Tensor {
    let wide = x.cast(DType::F32);
    wide.mul(&wide.sigmoid()).cast(x.ty().dtype)
}

/// log(1 + e^x), as max(x, 0) + log(1 + e^-|x|): no overflow.
#[track_caller]
pub fn softplus(x: &Tensor) -> Tensor {
    let y = x.relu().add(&x.abs().neg().exp().add(&x.number(1.0)).log());
    // The derivative of the stable form is not defined at 0; that of the function is.
    let inner = x.clone();
    x.graph().with_grad(&[x], &y, move |dy| vec![Some(dy.mul(&inner.sigmoid()))]);
    y
}

/// The logarithm of the sum of e^x over the dimensions named, without overflow; f32.
#[track_caller]
pub fn log_sum_exp(x: &Tensor, over: &[&str]) -> Tensor {
    let x = x.cast(DType::F32);
    // The shift cancels, so no gradient has to flow through it.
    let top = x.max(over).stop_gradient();
    x.sub(&top).exp().sum(over).log().add(&top)
}

/// e^x over its sum along the dimensions named; computed in f32, of x' dtype.
#[track_caller]
pub fn softmax(x: &Tensor, over: &[&str]) -> Tensor {
    let dtype = x.ty().dtype;
    let wide = x.cast(DType::F32);
    let e = wide.sub(&wide.max(over)).exp();
    let p = e.div(&e.sum(over));
    let y = p.cast(dtype);
    let over: Vec<String> = over.iter().map(|n| n.to_string()).collect();
    x.graph().with_grad(&[x], &y, move |dy| {
        let over: Vec<&str> = over.iter().map(|n| &**n).collect();
        let dy = dy.cast(DType::F32);
        let dx = p.mul(&dy.sub(&dy.mul(&p).sum(&over)));
        vec![Some(dx.cast(dtype))]
    });
    y
}

/// The logarithm of [`softmax`], without overflow; f32.
#[track_caller]
pub fn log_softmax(x: &Tensor, over: &[&str]) -> Tensor {
    let dtype = x.ty().dtype;
    let y = x.cast(DType::F32).sub(&log_sum_exp(x, over));
    let (over, out): (Vec<String>, Tensor) = (over.iter().map(|n| n.to_string()).collect(), y.clone());
    x.graph().with_grad(&[x], &y, move |dy| {
        let over: Vec<&str> = over.iter().map(|n| &**n).collect();
        let dx = dy.sub(&out.exp().mul(&dy.sum(&over)));
        vec![Some(dx.cast(dtype))]
    });
    y
}
