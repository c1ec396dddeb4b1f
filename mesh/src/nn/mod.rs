//! Layers: compositions of primitive ops, with names for their variables.
//!
//! [`dense`] and [`conv`] multiply, [`attention`] mixes positions, [`embedding`] looks up, [`norm`] normalises,
//! [`activation`] and [`dropout`] bend and thin out, [`routing`] lets some positions pass by, [`mixture`] sends each to
//! the experts that it needs, [`loss`] and [`metrics`] judge; [`init`] says how their variables start. A layer's
//! variables lie in the scope that is its name: `dense(&x, "ffn", ..)` has `ffn/kernel` and `ffn/bias`. Layers compute in
//! the dtype of their input; statistics, softmax and losses in f32.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod dense;
pub mod dropout;
pub mod embedding;
pub mod init;
pub mod loss;
pub mod metrics;
pub mod mixture;
pub mod norm;
pub mod routing;

pub use activation::{gelu, gelu_tanh, leaky_relu, log_softmax, log_sum_exp, silu, softmax, softplus};
pub use attention::{Attention, attention, attention_mask};
pub use conv::{Kernel, Padding, conv, conv_transpose};
pub use dense::{Dense, dense};
pub use dropout::dropout;
pub use embedding::embedding;
pub use loss::{cross_entropy, dice_loss, overlap, soft_dice_loss, weighted_mean};
pub use metrics::{accuracy, arg_max};
pub use mixture::{Mixed, Mixture, mixture};
pub use norm::{BatchNorm, batch_norm, group_norm, instance_norm, layer_norm};
pub use routing::Routing;

use crate::dim::Dim;
use crate::graph::Tensor;

/// What a function is built for: some layers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Drop-out is on; batch norm takes the batch's statistics and follows them.
    Train,
    /// Drop-out is off; batch norm takes the running statistics.
    Eval,
}

/// Names as slices of text, the way ops take them.
pub(crate) fn names(dims: &[Dim]) -> Vec<&str> {
    dims.iter().map(|d| &*d.name).collect()
}

/// The dimensions of `x` of those names; a missing one is noted as a mistake at the caller's place.
#[track_caller]
pub(crate) fn dims_of(x: &Tensor, names: &[&str]) -> Vec<Dim> {
    let mut dims = Vec::with_capacity(names.len());
    for n in names {
        dims.push(x.dim(n));
    }
    dims
}
