//! Drop-out.

use super::Mode;
use crate::dim::DType;
use crate::graph::Tensor;
use crate::ops::source::Distribution;

/// In training each element is kept with probability `keep` and divided by it, else 0; x itself otherwise. The mask is
/// a function of (seed, step, place in the program, element's index): the same on every layout, and made again in the
/// backward pass instead of kept.
#[track_caller]
pub fn dropout(x: &Tensor, keep: f32, mode: Mode) -> Tensor {
    if mode == Mode::Eval || keep >= 1.0 {
        return x.clone();
    }
    let ty = x.ty();
    let mask = x.graph().random(Distribution::Bernoulli(keep), &ty.dims).mul_scalar(1.0 / keep);
    x.cast(DType::F32).mul(&mask).cast(ty.dtype)
}
