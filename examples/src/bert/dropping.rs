//! Hou et al. 2022, token dropping: which tokens the middle of the encoder computes.
//!
//! A token is as important as predicting its word is hard: the running mean of the masked-word loss of its id.

use mesh::dim::{DType, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::Routing;
use mesh::ops::source::Distribution;
use mesh::program::Init;
use serde::{Deserialize, Serialize};

/// What tokens are kept by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KeepBy {
    /// Importance.
    #[default]
    Importance,
    /// Chance, for comparison.
    Chance,
}

/// Ids with a place of their own in the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Specials {
    /// `[PAD]`: dropped first.
    pub pad: u32,
    /// `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`: never dropped, if enough are kept.
    pub kept: [u32; 4],
}

impl Default for Specials {
    /// BERT's: 0, and 100 to 103.
    fn default() -> Self {
        Specials { pad: 0, kept: [100, 101, 102, 103] }
    }
}

/// The importance that every id starts with.
const START: f32 = 10.0;
/// More than any importance: what is added for the ids that are never dropped, and taken off for the padding.
const FIRST: f32 = 1e4;
/// Share of the old importance that a step keeps.
const KEPT: f32 = 0.995;

/// Token dropping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropping {
    /// Positions of each sequence that are kept.
    pub keep: usize,
    /// What they are chosen by.
    pub by: KeepBy,
    /// The vocabulary's special ids.
    pub specials: Specials,
}

impl Dropping {
    /// The importance of each id, `f32[vocab]`: a state, that of special ids is as it starts.
    fn importance(&self, g: &Graph, vocab: usize) -> Tensor {
        g.state("importance", &[dim("vocab", vocab)], Init::Constant(START))
    }

    /// Whether ids (`i32`) are never dropped.
    fn never(&self, ids: &Tensor) -> Tensor {
        let is = |id: u32| ids.equal(&ids.graph().scalar_i32(id as i32));
        let [a, b, c, d] = self.specials.kept.map(is);
        a.or(&b).or(&c).or(&d)
    }

    /// Whether ids are padding.
    fn padding(&self, ids: &Tensor) -> Tensor {
        ids.equal(&ids.graph().scalar_i32(self.specials.pad as i32))
    }

    /// Which of `tokens` (`i32[batch, seq]`) are kept.
    pub fn routing(&self, tokens: &Tensor, vocab: usize) -> Routing {
        let g = tokens.graph();
        let score = match self.by {
            KeepBy::Importance => self.importance(g, vocab).gather(tokens, "vocab"),
            KeepBy::Chance => g.random(Distribution::Uniform, &tokens.ty().dims),
        };
        let zero = g.scalar(0.0);
        let up = self.never(tokens).select(&g.scalar(FIRST), &zero);
        let down = self.padding(tokens).select(&g.scalar(FIRST), &zero);
        Routing::by_score(&score.add(&up).sub(&down), "seq", self.keep)
    }

    /// Follows the loss of the masked words: each id that was predicted moves to the mean of its `losses`
    /// (`f32[batch, prediction]`, ids `targets`) in the batch; predictions of weight 0 do not count, special ids stay.
    pub fn follow(&self, losses: &Tensor, targets: &Tensor, weights: &Tensor, vocab: usize) {
        if self.by == KeepBy::Chance {
            return;
        }
        let g = losses.graph();
        let ids = dim("vocab", vocab);
        let importance = self.importance(g, vocab);
        let count = weights.scatter_add(targets, &ids);
        let sum = losses.stop_gradient().mul(weights).scatter_add(targets, &ids);
        let all = g.iota(&ids);
        let moves = count.greater(&g.scalar(0.0)).and(&self.never(&all).or(&self.padding(&all)).not());
        let one = g.scalar(1.0);
        let mean = sum.div(&moves.select(&count, &one));
        let next = importance.mul_scalar(KEPT).add(&mean.mul_scalar(1.0 - KEPT));
        debug_assert_eq!(next.ty().dtype, DType::F32);
        g.assign(&importance, &moves.select(&next, &importance));
    }
}
