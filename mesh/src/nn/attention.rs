//! Multi-head attention (Vaswani et al. 2017).

use super::{Dense, Mode, dense, dropout, softmax};
use crate::dim::Dim;
use crate::graph::Tensor;
use crate::program::Init;

/// What the sum of scores takes instead of a position that is not to be seen: its weight is 0, and a row of nothing else
/// stays finite.
const UNSEEN: f32 = -1e9;

/// Options of an attention layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// The heads.
    pub heads: Dim,
    /// The dimension of a head's queries, keys and values.
    pub head: Dim,
    /// How the kernels start.
    pub init: Init,
    /// Probability to keep a weight in training.
    pub keep: f32,
}

/// What is added to the scores of positions: 0 for the first `lengths` ones of each case, a large negative number for the
/// padding after them; `f32` of the dimensions of `lengths` (`i32`) and `positions`.
#[track_caller]
pub fn attention_mask(lengths: &Tensor, positions: &Dim) -> Tensor {
    let g = lengths.graph();
    lengths.greater(&g.iota(positions)).select(&g.scalar(0.0), &g.scalar(UNSEEN))
}

/// Each position of `x` looks at all positions of `memory`: `softmax(q · k / sqrt(head) + mask) · v` for each head, and
/// from the heads back to the dimension `model`.
///
/// `x` and `memory` have the dimensions `positions` and `model`; `mask` is `memory`'s, `f32`, without `model`
/// ([`attention_mask`]). The result is `x`'s type. Variables `query`, `key`, `value` and `output`, each with `kernel` and
/// `bias`.
///
/// The positions of keys and values are called `memory_<positions>`. So a layout that splits `positions` splits queries,
/// and keys and values are made where `memory` lies and gathered then (docs/layouts.md: context, Ulysses).
#[track_caller]
pub fn attention(
    x: &Tensor,
    memory: &Tensor,
    mask: &Tensor,
    name: &str,
    [positions, model]: [&str; 2],
    options: &Attention,
    mode: Mode,
) -> Tensor {
    let g = x.graph();
    let of_memory = format!("memory_{positions}");
    g.layer(name, || {
        let dense_options = Dense::default().starting(options.init.clone());
        let into = [options.heads.clone(), options.head.clone()];
        let side = |of: &Tensor, name: &str| dense(of, name, &[model], &into, &dense_options);
        let of = |name: &str| side(memory, name).rename(positions, &of_memory);
        let (q, k, v) = (side(x, "query"), of("key"), of("value"));
        super::dense::raise_grains(g, &[k.dim(&of_memory)]);
        let dtype = q.ty().dtype;
        let scores = q.contract_wide(&k, &[&options.head.name]);
        let scaled = scores.mul_scalar(1.0 / (options.head.size as f32).sqrt());
        let weights = softmax(&scaled.add(&mask.rename(positions, &of_memory)), &[&of_memory]);
        let mixed = dropout(&weights, options.keep, mode).cast(dtype).contract(&v, &[&of_memory]);
        dense(&mixed, "output", &[&options.heads.name, &options.head.name], &[x.dim(model)], &dense_options)
    })
}
