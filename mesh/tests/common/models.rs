//! A UNet and a BERT, as the examples have them, to search layouts for.

use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Attention, BatchNorm, Dense, Kernel, Mode, init};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Init, Program, ProgramBuilder};

const SPACE: [&str; 3] = ["x", "y", "z"];

/// A 3-D UNet of so many levels on one image of `size` voxels a side, with `base` channels at the top.
pub fn unet(size: usize, base: usize, levels: usize, recompute: &[Name]) -> Program {
    let mut p = ProgramBuilder::recomputing(recompute);
    p.function("train", |g| {
        g.grain("class", 3);
        let space: Vec<Dim> = [dim("batch", 1)].into_iter().chain(SPACE.map(|d| dim(d, size))).collect();
        let labels = g.input("labels", DType::I32, &space);
        let image = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat());
        let block = |x: &Tensor, name: &str, channels: usize| {
            g.scoped(name, || {
                let mut x = x.clone();
                for i in 0..2 {
                    let kernel = Kernel::new(&SPACE, 3).unbiased().from_channel("channel");
                    x = nn::conv(&x, &format!("conv.{i}"), &kernel, &dim("channel", channels));
                    x = nn::batch_norm(&x, &format!("norm.{i}"), "channel", &BatchNorm::default(), Mode::Train);
                    x = nn::leaky_relu(&x, 0.1);
                }
                x
            })
        };
        let (mut x, mut skips) = (image.cast(DType::Bf16), vec![]);
        for level in 0..levels {
            let name = format!("encoder.{level}");
            x = g.block(&name, || {
                if level > 0 {
                    x = x.max_pool(&SPACE.map(|d| Window::same(d, x.dim(d).size, 2, 2, 1)));
                }
                block(&x, &name, base << level)
            });
            skips.push(x.clone());
        }
        for (level, skip) in skips[..levels - 1].iter().enumerate().rev() {
            let name = format!("decoder.{level}");
            x = g.block(&name, || {
                let double = Kernel::new(&SPACE, 2).stride(2).unbiased().to(&SPACE.map(|d| skip.dim(d).size));
                let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &dim("channel", base << level));
                block(&Tensor::concat(&[&up, skip], "channel"), &name, base << level)
            });
        }
        let head = Kernel::new(&SPACE, 1).unbiased().from_channel("channel");
        let logits = nn::conv(&x, "head", &head, &dim("class", 3)).cast(DType::F32);
        let loss = nn::cross_entropy(&logits, &labels, "class").mean(&["batch", "x", "y", "z"]);
        g.output("loss", &loss);
        Optimizer::adam(0.001).apply(g, &loss).output(g);
    })
    .unwrap();
    p.finish().unwrap()
}

/// The sizes of a BERT.
#[derive(Clone, Copy)]
pub struct Bert {
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub vocab: usize,
    pub batch: usize,
    pub seq: usize,
    /// Micro-batches that a step goes in.
    pub micro: usize,
}

/// BERT-large on sequences of 128 tokens.
pub const LARGE: Bert = Bert { layers: 24, width: 1024, heads: 16, vocab: 30522, batch: 4096, seq: 128, micro: 1 };

/// A BERT that learns masked words, in bf16 by AdamW with clipping.
pub fn bert(b: Bert, recompute: &[Name]) -> Program {
    let mut p = ProgramBuilder::recomputing(recompute);
    p.function("train", |g| {
        let [batch, seq] = [dim("batch", b.batch), dim("seq", b.seq)];
        let places = [batch.clone(), dim("prediction", b.seq * 15 / 100 + 1)];
        let feeds = [
            g.input("tokens", DType::I32, &[batch.clone(), seq]),
            g.input("lengths", DType::I32, std::slice::from_ref(&batch)),
            g.input("positions", DType::I32, &places),
            g.input("targets", DType::I32, &places),
        ];
        let optimizer = Optimizer::adamw(1e-3, 0.01).clipped(1.0);
        let part = |part| masked_words(g, b, feeds.each_ref().map(|t| t.micro_batch("batch", part, b.micro)));
        let (loss, update) = optimizer.apply_in_parts(g, b.micro, part);
        g.output("loss", &loss);
        update.output(g);
    })
    .unwrap();
    p.finish().unwrap()
}

/// The loss of a micro-batch.
fn masked_words(g: &Graph, b: Bert, [tokens, lengths, positions, targets]: [Tensor; 4]) -> Tensor {
    let [seq, model] = [dim("seq", b.seq), dim("d_model", b.width)];
    let start = init::truncated_normal(0.02);
    let dense = Dense::default().starting(start.clone());
    let norm = |x: &Tensor, name: &str| nn::layer_norm(x, name, &["d_model"], 1e-12);
    let vocab = dim("vocab", b.vocab);
    let table =
        |g: &Graph, name: &str, rows: &Dim| nn::embedding(g, name, rows, std::slice::from_ref(&model), start.clone());
    let words = || g.scoped("embeddings", || table(g, "word", &vocab));
    let mask = nn::attention_mask(&lengths, &seq);
    let table_of_words = words();
    let mut x = g.scoped("embeddings", || {
        let word = table_of_words.gather(&tokens, "vocab");
        let places = table(g, "position", &dim("position", 512)).slice("position", 0, b.seq);
        norm(&word.add(&places.rename("position", "seq")), "norm").cast(DType::Bf16)
    });
    let options = Attention {
        heads: dim("heads", b.heads),
        head: dim("d_head", b.width / b.heads),
        init: start.clone(),
        keep: 0.9,
    };
    g.scoped("encoder", || {
        for i in 0..b.layers {
            let name = format!("layer.{i}");
            let layer = || {
                let seen = nn::attention(&x, &x, &mask, "attention", ["seq", "d_model"], &options, Mode::Train);
                let y = norm(&x.add(&nn::dropout(&seen, 0.9, Mode::Train)), "attention_norm");
                let wide = nn::dense(&y, "up", &["d_model"], &[dim("d_ff", 4 * b.width)], &dense);
                let z = nn::dense(&nn::gelu(&wide), "down", &["d_ff"], std::slice::from_ref(&model), &dense);
                norm(&y.add(&nn::dropout(&z, 0.9, Mode::Train)), "norm")
            };
            x = g.block(&name, || g.scoped(name.clone(), layer));
        }
    });
    let words = words().cast(DType::Bf16);
    let logits = g.scoped("masked_words", || {
        let x =
            nn::dense(&x.gather(&positions, "seq"), "transform", &["d_model"], std::slice::from_ref(&model), &dense);
        let x = norm(&nn::gelu(&x), "norm");
        x.contract_wide(&words, &["d_model"]).add(&g.variable("bias", std::slice::from_ref(&vocab), Init::zeros()))
    });
    nn::cross_entropy(&logits, &targets, "vocab").mean(&["batch", "prediction"])
}
