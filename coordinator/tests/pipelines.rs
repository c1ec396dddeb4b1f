//! Pipelines: stages by scope train as one device does, bit for bit, on every schedule, and their memory is as planned.

mod common;

use common::run::{options, text};
use common::{assert_bits_eq, f32s, i32s, stepping, steps};
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Dense, Mode};
use mesh::ops::source::Distribution;
use mesh::optim::Optimizer;
use mesh::plan::Work;
use mesh::program::{Init, Program};

/// Four layers, with one table for words and logits, that go through a batch in parts.
fn layers(parts: usize, optimizer: &Optimizer) -> Program {
    stepping(|g| {
        let both = [dim("batch", 8), dim("seq", 6)];
        let (tokens, labels) = (g.input("tokens", DType::I32, &both), g.input("labels", DType::I32, &both));
        let init = Init::Random { distribution: Distribution::Normal, scale: 0.1, offset: 0.0 };
        let of = |part: usize| {
            let [tokens, labels] = [&tokens, &labels].map(|t| t.micro_batch("batch", part, parts));
            let table = g.scoped("words", || g.variable("table", &[dim("vocab", 70), dim("model", 64)], init.clone()));
            let embedded = g.scoped("words", || table.gather(&tokens, "vocab"));
            let layer = |x: Tensor, i: usize| {
                g.scoped(format!("layer.{i}"), || {
                    let wide = nn::gelu(&nn::dense(&x, "up", &["model"], &[dim("ff", 128)], &Dense::default()));
                    let y = nn::dense(&wide, "down", &["ff"], &[dim("model", 64)], &Dense::default());
                    nn::layer_norm(&nn::dropout(&y, 0.9, Mode::Train).add(&x), "norm", &["model"], 1e-3)
                })
            };
            let x = (0..4).fold(embedded, layer);
            g.scoped("head", || nn::cross_entropy(&x.contract(&table, &["model"]), &labels, "vocab").mean_all())
        };
        let (loss, update) = optimizer.apply_in_parts(g, parts, of);
        g.output("loss", &loss);
        g.output("norm", &update.grad_norm);
    })
}

fn feeds() -> [(&'static str, Array); 2] {
    let both = [dim("batch", 8), dim("seq", 6)];
    [("tokens", i32s(&both, 1, 70).1), ("labels", i32s(&both, 2, 70).1)]
}

const TWO: &str = "@pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, layer.1/**{ @pipe:0 }";
const FOUR: &str = "@pipe:3, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, layer.1/**{ @pipe:1 }, layer.2/**{ @pipe:2 }";
const INTERLEAVED: &str = "@pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, layer.2/**{ @pipe:0 }";

#[test]
fn stages_train_as_one_device_does() {
    for optimizer in [Optimizer::adamw(0.01, 0.1).clipped(1.0), Optimizer::lamb(0.01, 0.1)] {
        let p = layers(4, &optimizer);
        let feeds = feeds();
        let feeds = feeds.each_ref().map(|(n, a)| (*n, a));
        let whole = steps(&p, "1", "", 3, &feeds);
        for (mesh, layout) in [
            ("pipe=2", TWO.to_string()),
            ("pipe=2", format!("{TWO}, schedule:gpipe")),
            ("pipe=2", format!("{TWO}, schedule:zero-bubble")),
            ("pipe=2", INTERLEAVED.into()),
            ("pipe=2", "layer.2/**{ @pipe:1 }".into()),
            ("pipe=4", FOUR.into()),
            ("data=2,pipe=2", format!("batch:data, {TWO}, slots{{ *:data }}, gradients{{ *:data }}")),
            ("pipe=2,model=2", format!("ff:model, vocab:model, {TWO}")),
            ("data=2,pipe=4", format!("batch:data, {FOUR}, schedule:zero-bubble")),
        ] {
            assert_bits_eq("layers", &whole, &steps(&p, mesh, &layout, 3, &feeds), &format!("{mesh} with {layout}"));
        }
    }
}
