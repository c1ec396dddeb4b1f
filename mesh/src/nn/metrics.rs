//! Figures to watch. No gradient flows through them.

use crate::dim::DType;
use crate::graph::Tensor;

/// Index along the dimension `over` of the largest element, the first one of ties; `i32`, without that dimension.
#[track_caller]
pub fn arg_max(x: &Tensor, over: &str) -> Tensor {
    let d = x.dim(over);
    let g = x.graph();
    x.equal(&x.max(&[over])).select(&g.iota(&d), &g.scalar_i32(d.size as i32)).min(&[over])
}

/// The share of elements whose largest logit is that of their label (`i32`); a scalar.
#[track_caller]
pub fn accuracy(logits: &Tensor, labels: &Tensor, class: &str) -> Tensor {
    arg_max(logits, class).equal(labels).cast(DType::F32).mean_all()
}
