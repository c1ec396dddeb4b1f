//! The encoder of Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", post-norm, with its heads:
//! written once, with named dimensions, and nothing in it about devices.

use super::architecture::Architecture;
use mesh::dim::{DType, Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Attention, Dense, Mode, Routing, init};
use mesh::program::Init;

/// What the encoder sees of its text.
#[derive(Clone)]
pub struct Text {
    /// Ids of the vocabulary, `i32[batch, seq]`.
    pub tokens: Tensor,
    /// First or second sentence, `i32[batch, seq]`.
    pub segments: Tensor,
    /// Added to the scores of each position: 0, or a large negative number for padding, `f32[batch, seq]`.
    pub mask: Tensor,
}

impl Text {
    /// The feeds `tokens`, `segments`, and `lengths` (`i32[batch]`, what is behind is padding).
    pub fn feeds(g: &Graph, batch: &Dim, seq: usize) -> Text {
        let seq = dim("seq", seq);
        let both = [batch.clone(), seq.clone()];
        let tokens = g.input("tokens", DType::I32, &both);
        let segments = g.input("segments", DType::I32, &both);
        let lengths = g.input("lengths", DType::I32, std::slice::from_ref(batch));
        Text { tokens, segments, mask: nn::attention_mask(&lengths, &seq) }
    }
}

/// A BERT of some architecture, as functions of tensors.
pub struct Model<'a> {
    /// Its sizes.
    pub architecture: &'a Architecture,
    /// Whether drop-out is on.
    pub mode: Mode,
    /// What it computes in; variables, statistics, softmax and losses are `f32`.
    pub dtype: DType,
}

impl Model<'_> {
    fn start(&self) -> Init {
        init::truncated_normal(self.architecture.initializer_range)
    }

    fn dense(&self) -> Dense {
        Dense::default().starting(self.start())
    }

    fn d_model(&self) -> Dim {
        dim("d_model", self.architecture.hidden_size)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Tensor {
        nn::layer_norm(x, name, &["d_model"], self.architecture.layer_norm_eps)
    }

    fn drop(&self, x: &Tensor) -> Tensor {
        nn::dropout(x, 1.0 - self.architecture.hidden_dropout_prob, self.mode)
    }

    /// The table `[vocab, d_model]` of the word embeddings, to which the decoder is tied.
    fn words(&self, g: &Graph) -> Tensor {
        let vocab = dim("vocab", self.architecture.vocab_size);
        g.scoped("embeddings", || nn::embedding(g, "word", &vocab, &[self.d_model()], self.start()))
    }

    /// `[batch, seq, d_model]` of words, positions and segments.
    fn embeddings(&self, text: &Text) -> Tensor {
        let g = text.tokens.graph();
        let words = self.words(g);
        g.scoped("embeddings", || {
            let words = words.gather(&text.tokens, "vocab");
            let table =
                |name: &str, rows: usize| nn::embedding(g, name, &dim(name, rows), &[self.d_model()], self.start());
            let seq = text.tokens.dim("seq");
            let positions = table("position", self.architecture.max_position_embeddings);
            let positions = positions.slice("position", 0, seq.size).rename("position", "seq");
            let segments = table("segment", self.architecture.type_vocab_size).gather(&text.segments, "segment");
            let sum = words.add(&positions).add(&segments);
            self.drop(&self.norm(&sum, "norm")).cast(self.dtype)
        })
    }

    /// One layer, which may be recomputed: `x` looks at `memory`, position by position; both `[batch, seq, d_model]`, each with its own `seq`.
    fn layer(&self, x: &Tensor, memory: &Tensor, mask: &Tensor, name: &str) -> Tensor {
        let a = self.architecture;
        let options = Attention {
            heads: dim("heads", a.num_attention_heads),
            head: dim("d_head", a.hidden_size / a.num_attention_heads),
            init: self.start(),
            keep: 1.0 - a.attention_probs_dropout_prob,
        };
        let g = x.graph();
        let layer = || {
            let seen = nn::attention(x, memory, mask, "attention", ["seq", "d_model"], &options, self.mode);
            let x = self.norm(&x.add(&self.drop(&seen)), "attention_norm");
            let wide = nn::dense(&x, "up", &["d_model"], &[dim("d_ff", a.intermediate_size)], &self.dense());
            let y = nn::dense(&a.hidden_act.apply(&wide), "down", &["d_ff"], &[self.d_model()], &self.dense());
            self.norm(&x.add(&self.drop(&y)), "norm")
        };
        g.block(name, || g.scoped(name, layer))
    }

    /// Sequence output `[batch, seq, d_model]`.
    ///
    /// With a routing (Hou et al. 2022, token dropping), the layers below the middle see all positions; that before the
    /// middle computes the selected ones alone, looking at all; those after it see the selected ones alone; the last one
    /// sees all again, where the rest is as it came out of the lower half.
    pub fn encoder(&self, text: &Text, routing: Option<&Routing>) -> Tensor {
        let g = text.tokens.graph();
        let layers = self.architecture.num_hidden_layers;
        let mut x = self.embeddings(text);
        g.scoped("encoder", || {
            let mut mask = text.mask.clone();
            let mut rest = None;
            for i in 0..layers {
                let name = format!("layer.{i}");
                match routing {
                    Some(routing) if i + 1 == layers / 2 => {
                        let (selected, passing) = routing.split(&x);
                        let (selected_mask, passing_mask) = routing.split(&mask);
                        let join = |a: &Tensor, b: &Option<Tensor>| match b {
                            Some(b) => Tensor::concat(&[a, b], "seq"),
                            None => a.clone(),
                        };
                        let memory = join(&selected, &passing);
                        x = self.layer(&selected, &memory, &join(&selected_mask, &passing_mask), &name);
                        (mask, rest) = (selected_mask, passing);
                    }
                    Some(routing) if i + 1 == layers => {
                        x = routing.merge(&x, rest.as_ref());
                        x = self.layer(&x, &x, &text.mask, &name);
                    }
                    _ => x = self.layer(&x, &x, &mask, &name),
                }
            }
            x
        })
    }

    /// The first position through a dense layer and tanh, `[batch, d_model]`.
    pub fn pooled(&self, x: &Tensor) -> Tensor {
        // A lookup, and no slice: the first position lies where it lies.
        let first = x.graph().scalar_i32(0).broadcast(&[x.dim("batch")]);
        let first = x.gather(&first, "seq");
        nn::dense(&first, "pooler", &["d_model"], &[self.d_model()], &self.dense()).tanh()
    }

    /// Logits `[batch, prediction, vocab]` of the words at `positions` (`i32[batch, prediction]`).
    pub fn words_at(&self, x: &Tensor, positions: &Tensor) -> Tensor {
        let g = x.graph();
        let words = self.words(g).cast(self.dtype);
        g.scoped("masked_words", || {
            let x = nn::dense(&x.gather(positions, "seq"), "transform", &["d_model"], &[self.d_model()], &self.dense());
            let x = self.norm(&self.architecture.hidden_act.apply(&x), "norm");
            let bias = g.variable("bias", &[words.dim("vocab")], Init::zeros());
            x.contract_wide(&words, &["d_model"]).add(&bias)
        })
    }

    /// Logits `[batch, class]` of some classes by the pooled output: next sentence, sentiment; or one value, a regression.
    pub fn classes(&self, pooled: &Tensor, name: &str, classes: usize) -> Tensor {
        nn::dense(pooled, name, &["d_model"], &[dim("class", classes)], &self.dense()).cast(DType::F32)
    }

    /// The mean of the positions that are no padding, `[batch, d_model]`.
    pub fn mean_pooled(&self, x: &Tensor, text: &Text) -> Tensor {
        let seen = text.mask.greater_equal(&text.mask.number(0.0)).cast(DType::F32);
        x.cast(DType::F32).mul(&seen).sum(&["seq"]).div(&seen.sum(&["seq"]))
    }
}
