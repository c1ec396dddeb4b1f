//! The sizes of a BERT, as in Hugging Face's config.json.

use mesh::graph::Tensor;
use mesh::nn;
use serde::{Deserialize, Serialize};

/// The activation between the two dense layers of the feed-forward part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Gaussian error linear unit, exactly.
    #[default]
    Gelu,
    /// Its approximation by a hyperbolic tangent.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluNew,
    /// max(x, 0).
    Relu,
    /// x sigmoid(x).
    #[serde(alias = "swish")]
    Silu,
}

impl Activation {
    /// Applies it.
    #[track_caller]
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Gelu => nn::gelu(x),
            Activation::GeluNew => nn::gelu_tanh(x),
            Activation::Relu => x.relu(),
            Activation::Silu => nn::silu(x),
        }
    }
}

/// The sizes of a BERT. The names are those of Hugging Face's config.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Architecture {
    /// Words of the vocabulary.
    pub vocab_size: usize,
    /// `d_model`.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention; they divide `d_model` evenly.
    pub num_attention_heads: usize,
    /// `d_ff`.
    pub intermediate_size: usize,
    /// Activation.
    pub hidden_act: Activation,
    /// Share of activations that drop-out sets to 0.
    pub hidden_dropout_prob: f32,
    /// Share of attention weights that drop-out sets to 0.
    pub attention_probs_dropout_prob: f32,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Kinds of segments.
    pub type_vocab_size: usize,
    /// Added to the variance by layer norms.
    pub layer_norm_eps: f32,
    /// Standard deviation that kernels and tables start with, before they are cut off at two of them.
    pub initializer_range: f32,
    /// The padding's word.
    pub pad_token_id: usize,
    /// `bert`.
    pub model_type: String,
}

impl Default for Architecture {
    /// BERT-base, uncased.
    fn default() -> Self {
        Architecture {
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            pad_token_id: 0,
            model_type: "bert".into(),
        }
    }
}

impl Architecture {
    /// Layers of width `d_model` with that many heads; `d_ff` is 4 `d_model`.
    pub fn sized(layers: usize, d_model: usize, heads: usize) -> Architecture {
        Architecture {
            hidden_size: d_model,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            intermediate_size: 4 * d_model,
            ..Architecture::default()
        }
    }

    /// The architectures with a name: `mini`, `small`, `base`, `large`.
    pub fn named(name: &str) -> Option<Architecture> {
        match name {
            "mini" => Some(Architecture::sized(4, 256, 4)),
            "small" => Some(Architecture::sized(4, 512, 8)),
            "base" => Some(Architecture::sized(12, 768, 12)),
            "large" => Some(Architecture::sized(24, 1024, 16)),
            _ => None,
        }
    }

    /// Parameters of one layer: attention, feed-forward, and two norms.
    pub fn layer_parameters(&self) -> usize {
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        4 * (d * d + d) + (d * ff + ff) + (ff * d + d) + 4 * d
    }

    /// Parameters of the encoder with its pooler, with so many layers' variables.
    pub fn encoder_parameters(&self, layers: usize) -> usize {
        let d = self.hidden_size;
        let tables = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * d;
        tables + 2 * d + layers * self.layer_parameters() + d * d + d
    }

    /// Parameters of the masked-word head (tied to the word embeddings) and the next-sentence head.
    pub fn head_parameters(&self) -> usize {
        let d = self.hidden_size;
        d * d + d + 2 * d + self.vocab_size + 2 * d + 2
    }

    /// Floating-point operations of the products of a forward pass over `batch` sequences of `seq`, with the two
    /// pretraining heads and `predictions` masked words each: 2 for each weight and token, and `4 · seq · d_model` for
    /// each token and layer in attention. With `keep` selected tokens (token dropping) the layers of the upper half but
    /// the last run on those alone, and the one before them queries with those alone.
    pub fn forward_flops(&self, batch: usize, seq: usize, predictions: usize, keep: usize) -> u64 {
        let (d, ff, l) = (self.hidden_size as u64, self.intermediate_size as u64, self.num_hidden_layers);
        let (batch, seq, predictions, keep) = (batch as u64, seq as u64, predictions as u64, keep as u64);
        // A layer with q queries that look at m positions.
        let layer = |q: u64, m: u64| 2 * q * (2 * d * d + 2 * d * ff) + 2 * m * (2 * d * d) + 4 * q * m * d;
        let layers: u64 = (0..l)
            .map(|i| match (i + 1).cmp(&(l / 2)) {
                _ if i + 1 == l => layer(seq, seq),
                std::cmp::Ordering::Less => layer(seq, seq),
                std::cmp::Ordering::Equal => layer(keep, seq),
                std::cmp::Ordering::Greater => layer(keep, keep),
            })
            .sum();
        let heads = 2 * predictions * (d * d + d * self.vocab_size as u64) + 2 * (d * d) + 2 * d * 2;
        batch * (layers + heads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_forms_give_the_published_sizes() {
        let minilm = Architecture { num_attention_heads: 12, ..Architecture::sized(6, 384, 12) };
        let table = [
            (Architecture::named("mini").unwrap(), 11_170_560, 11_267_900),
            (minilm, 22_713_216, 22_893_116),
            (Architecture::named("base").unwrap(), 109_482_240, 110_106_428),
            (Architecture::named("large").unwrap(), 335_141_888, 336_226_108),
        ];
        for (a, encoder, all) in table {
            assert_eq!(a.encoder_parameters(a.num_hidden_layers), encoder);
            assert_eq!(encoder + a.head_parameters(), all);
        }
        let shared = |name: &str| Architecture::named(name).unwrap().encoder_parameters(1);
        assert_eq!((shared("base"), shared("large")), (31_515_648, 45_428_736));
    }
}
