//! The language of layouts: training gives the same bits whatever it says, and ZeRO communicates what its papers count.

mod common;

use common::run::{options, text};
use common::{assert_bits_eq, f32s, i32s, stepping, steps};
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::layout::Layout;
use mesh::nn::{self, BatchNorm, Dense, Kernel, Mode};
use mesh::ops::source::Distribution;
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Init, Program};
use std::collections::BTreeMap;

/// Trains on one device and on meshes with layouts, and compares everything bit for bit.
fn hold(what: &str, p: &Program, feeds: &[(&str, &Array)], cases: &[(&str, &[&str])]) {
    let whole = steps(p, "1", "", 3, feeds);
    for (mesh, layouts) in cases {
        for layout in *layouts {
            assert_bits_eq(what, &whole, &steps(p, mesh, layout, 3, feeds), &format!("{mesh} with {layout}"));
        }
    }
}

/// Two blocks of attention and feed-forward layers, with one table for words and logits.
fn transformer(optimizer: &Optimizer) -> Program {
    stepping(|g| {
        let both = [dim("batch", 8), dim("seq", 6)];
        let (tokens, labels) = (g.input("tokens", DType::I32, &both), g.input("labels", DType::I32, &both));
        let init = Init::Random { distribution: Distribution::Normal, scale: 0.1, offset: 0.0 };
        let table = g.variable("table", &[dim("vocab", 70), dim("model", 64)], init);
        let embedded = table.gather(&tokens, "vocab");
        let block = |x: &Tensor| {
            let heads = [dim("head", 4), dim("d", 16)];
            let of = |name: &str| nn::dense(x, name, &["model"], &heads, &Dense::default());
            let (q, k, v) = (of("q"), of("k").rename("seq", "keys"), of("v").rename("seq", "keys"));
            let weights = nn::softmax(&q.contract(&k, &["d"]).mul_scalar(0.25), &["keys"]);
            let seen = weights.contract(&v, &["keys"]);
            let y = nn::dense(&seen, "o", &["head", "d"], &[dim("model", 64)], &Dense::default()).add(x);
            let y = nn::layer_norm(&nn::dropout(&y, 0.9, Mode::Train), "norm", &["model"], 1e-3);
            let wide = nn::gelu(&nn::dense(&y, "up", &["model"], &[dim("ff", 128)], &Dense::default()));
            nn::dense(&wide, "down", &["ff"], &[dim("model", 64)], &Dense::default()).add(&y)
        };
        let x = g.scoped("block.0", || block(&embedded));
        let x = g.scoped("block.1", || block(&x));
        let loss = nn::cross_entropy(&x.contract(&table, &["model"]), &labels, "vocab").mean_all();
        let update = optimizer.apply(g, &loss);
        g.output("loss", &loss);
        g.output("norm", &update.grad_norm);
    })
}

const ZERO: [&str; 3] = [
    "batch:data, slots{ *:data }",
    "batch:data, slots{ *:data }, gradients{ *:data }",
    "batch:data, slots{ *:data }, gradients{ *:data }, variables{ *:data }",
];

#[test]
fn a_transformer_is_the_same_on_every_layout_of_the_language() {
    let both = [dim("batch", 8), dim("seq", 6)];
    let (tokens, labels) = (i32s(&both, 1, 70).1, i32s(&both, 2, 70).1);
    let cases: [(&str, &[&str]); 2] = [
        ("data=3", &ZERO),
        (
            "data=2,model=2",
            &[
                "batch:data+model",
                "batch:model+data, seq:data?",
                "batch:data, ff:model, head:model, vocab:model",
                "batch:data, ff:model, head:model, slots{ *:data }, gradients{ *:data }, variables{ *:data }",
                "batch:data, slots{ *:data+model }, gradients{ *:model }, variables{ *:data+model }",
                "batch:data, seq:model, block.1/**{ seq:none, ff:model }",
                "batch:data, **{ seq:model? }, /block.0{ seq:none, model:model }, variables{ block.0/*{ *:model } }",
                "activations{ batch:data, seq:model }, variables{ model:data?, *:model, block.*/up{ *:none, ff:data } }",
                "seq:data, keys:model, gradients{ ff:model?, *:data }",
            ],
        ),
    ];
    for (name, optimizer) in [
        ("adamw", Optimizer::adamw(0.01, 0.1).clipped(1.0)),
        ("lamb", Optimizer::lamb(0.01, 0.1)),
        ("adafactor", Optimizer::adafactor(0.01)),
    ] {
        hold(name, &transformer(&optimizer), &[("tokens", &tokens), ("labels", &labels)], &cases);
    }
}

fn image() -> Vec<Dim> {
    vec![dim("batch", 2), dim("x", 11), dim("y", 14), dim("channel", 3)]
}

#[test]
fn a_unet_is_the_same_on_every_layout_of_the_language() {
    let p = stepping(|g| {
        let (x, labels) = (g.input("image", DType::F32, &image()), g.input("labels", DType::I32, &image()[..3]));
        let block = |x: &Tensor, name: &str, channels: usize| {
            g.scoped(name, || {
                let y = nn::conv(x, "c", &Kernel::new(&["x", "y"], 3), &dim("channel", channels));
                nn::leaky_relu(&nn::batch_norm(&y, "n", "channel", &BatchNorm::default(), Mode::Train), 0.1)
            })
        };
        let fine = block(&x, "fine", 8);
        let coarse =
            block(&fine.max_pool(&[Window::same("x", 11, 2, 2, 1), Window::same("y", 14, 2, 2, 1)]), "coarse", 64);
        let up = Kernel::new(&["x", "y"], 2).stride(2).to(&[11, 14]);
        let up = nn::conv_transpose(&coarse, "up", &up, &dim("channel", 8));
        let joined = Tensor::concat(&[&fine, &up], "channel");
        let logits = nn::dense(&joined, "head", &["channel"], &[dim("class", 4)], &Dense::default());
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        g.output("loss", &loss);
        g.output("d x", &g.gradients(&loss, &[&x])[0]);
        Optimizer::momentum(0.1, 0.9).apply(g, &loss);
    });
    let (x, labels) = (f32s(&image(), 1).1, i32s(&image()[..3], 2, 4).1);
    let cases: [(&str, &[&str]); 2] = [
        (
            "a=2,b=2",
            &[
                "x:a+b",
                "x:a, y:b, variables{ *:b }, slots{ *:a+b }, gradients{ *:a }",
                "x:a, y:b, coarse/**{ x:none, y:none, channel:a? }",
                "batch:a, y:b, slots{ *:a }, gradients{ *:a }, variables{ *:a }",
                "y:b+a, coarse/**{ y:b }, /up{ y:none, x:b }",
            ],
        ),
        ("a=3,b=2", &["x:b, y:a?, slots{ *:a }", "y:a+b?, gradients{ k.x:a, *:b }, variables{ coarse/**{ *:a+b } }"]),
    ];
    hold("unet", &p, &[("image", &x), ("labels", &labels)], &cases);
}

fn rows() -> [Dim; 2] {
    [dim("batch", 192), dim("width", 128)]
}

const LAYERS: [&str; 6] = ["first", "second", "third", "fourth", "fifth", "sixth"];

/// Layers without biases, whose operands are larger than their weights.
fn layers() -> Program {
    stepping(|g: &Graph| {
        let x = g.input("x", DType::F32, &rows());
        let y = LAYERS.iter().enumerate().fold(x, |x, (i, name)| {
            let (from, to) = if i % 2 == 0 { ("width", dim("hidden", 256)) } else { ("hidden", dim("width", 128)) };
            nn::dense(&x, name, &[from], &[to], &Dense::unbiased()).tanh()
        });
        let loss = y.square().mean_all();
        g.output("loss", &loss);
        Optimizer::adam(0.01).clipped(1.0).apply(g, &loss);
    })
}

#[test]
fn zero_communicates_what_it_should_and_takes_less_memory_each_time() {
    let p = layers();
    let x = f32s(&rows(), 1).1;
    let whole = steps(&p, "1", "", 3, &[("x", &x)]);
    let (n, mut peaks) = (LAYERS.len(), vec![]);
    for (layout, [reduced, scattered, gathered]) in [
        // The loss is one sum that is split, and if the update is, so are the norms of the gradients, for clipping.
        ("batch:data", [1 + n, 0, 0]),
        // Each device updates a part, and so gets the part of the gradient alone.
        (ZERO[0], [1 + n, n, n]),
        (ZERO[1], [1 + n, n, n]),
        // Forward and backward pass; the first layer's input has no gradient.
        (ZERO[2], [1 + n, n, n + n - 1]),
    ] {
        let mut s = Session::embedded(p.clone(), &options("data=2", layout)).unwrap();
        for device in &s.plan().functions[&"step".into()] {
            let mut count: BTreeMap<&str, usize> = BTreeMap::new();
            for step in &device.steps {
                let sends = matches!(
                    &*step.label.op,
                    "all-reduce" | "reduce-scatter" | "all-gather" | "all-to-all" | "halo" | "permute"
                );
                *count.entry(&step.label.op).or_default() += usize::from(sends);
            }
            count.retain(|_, n| *n > 0);
            let expected = [("all-reduce", reduced), ("reduce-scatter", scattered), ("all-gather", gathered)];
            let expected: BTreeMap<&str, usize> = expected.into_iter().filter(|(_, n)| *n > 0).collect();
            assert_eq!(count, expected, "{layout}");
        }
        s.run("step", 0, &[("x", &x)]).unwrap();
        let taken = s.peaks().unwrap();
        assert!(taken.iter().all(|p| p.peak_bytes_measured == p.peak_bytes_predicted), "{layout}: {taken:?}");
        peaks.push(taken[0].peak_bytes_predicted);
        assert_bits_eq("layers", &whole, &steps(&p, "data=2", layout, 3, &[("x", &x)]), layout);
    }
    assert!(peaks[1] < peaks[0] && peaks[2] <= peaks[1] && peaks[3] < peaks[2], "{peaks:?}");
}

/// All ways to split three dimensions over the axes of a mesh, each in every order.
fn splits(axes: &[&str]) -> Vec<[Vec<String>; 3]> {
    let mut all = vec![[vec![], vec![], vec![]]];
    let mut done = 0;
    while done < all.len() {
        let before: [Vec<String>; 3] = all[done].clone();
        done += 1;
        for axis in axes.iter().filter(|a| !before.iter().flatten().any(|b| b == *a)) {
            for d in 0..3 {
                let mut more = before.clone();
                more[d].push(axis.to_string());
                if !all.contains(&more) {
                    all.push(more);
                }
            }
        }
    }
    all
}

/// `mesh/tests/resharding.rs` says who sends what, for more devices; here it is sent.
#[test]
fn a_tensor_is_the_same_after_a_move_from_any_layout_to_any_other() {
    let dims = [dim("x", 7), dim("y", 8), dim("z", 9)];
    let p = stepping(|g| {
        let x = g.scoped("from", || g.input("x", DType::F32, &dims));
        g.scoped("to", || g.output("y", &x.mul_scalar(-1.0)));
    });
    let x = f32s(&dims, 1).1;
    let whole = steps(&p, "1", "", 1, &[("x", &x)]);
    for (mesh, axes) in [("a=4", &["a"][..]), ("a=2,b=2", &["a", "b"]), ("a=3,b=2", &["a", "b"])] {
        let rules = |split: &[Vec<String>; 3]| -> String {
            let each = dims.iter().zip(split).filter(|(_, axes)| !axes.is_empty());
            each.map(|(d, axes)| format!("{}:{}", d.name, axes.join("+"))).collect::<Vec<_>>().join(",")
        };
        let all: Vec<String> = splits(axes).iter().map(rules).collect();
        for (from, to) in all.iter().flat_map(|from| all.iter().map(move |to| (from, to))) {
            let layout = format!("from{{ {from} }}, to{{ {to} }}");
            assert_bits_eq("moved", &whole, &steps(&p, mesh, &layout, 1, &[("x", &x)]), &layout);
        }
    }
}

#[test]
fn with_more_chunks_more_devices_share_a_dimension_and_the_bits_are_the_same() {
    let p = stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("batch", 32), dim("d_in", 64)]);
        let y = nn::dense(&x, "a", &["d_in"], &[dim("d_out", 64)], &Dense::default());
        let loss = nn::gelu(&y).square().mean_all();
        Optimizer::adam(0.01).apply(g, &loss);
        g.output("loss", &loss);
    })
    .in_chunks(16);
    let (_, x) = f32s(&[dim("batch", 32), dim("d_in", 64)], 1);
    let layouts: &[&str] = &["batch:data", "batch:data, slots{ *:data }, gradients{ *:data }, variables{ *:data }"];
    hold("16 chunks", &p, &[("x", &x)], &[("data=16", layouts), ("data=11", layouts), ("a=2", &["d_out:a", "d_in:a"])]);
    // With fewer of them there are not so many shards.
    let refused = Session::embedded(p.in_chunks(8), &options("data=16", "batch:data")).err().unwrap();
    assert!(refused.to_string().contains("L0007"), "{refused}");
}

#[test]
fn a_layout_that_names_what_is_not_there_is_refused_before_anything_runs() {
    let error = |layout: &str| text(Session::embedded(layers(), &options("data=2", layout)));
    let twice = "hidden:data, first/**{ width:data }, first/**{ hidden:data }".parse::<Layout>().unwrap_err();
    assert!(
        twice.to_string().starts_with("error[P0003]: there are two blocks of the layout called `first/**`"),
        "{twice}"
    );
    for (layout, parts) in [
        ("frist/**{ hidden:data }", ["error[L0008]", "`frist/**{hidden:data}`", "did you mean `first`?"]),
        ("slot{ *:data }", ["error[L0008]", "the scope `/slot`", "did you mean `slots`?"]),
        ("slots{ hiden:data }", ["error[L0003]", "none of the slots has", "did you mean `hidden`?"]),
        (
            "first/**{ batch:data, hidden:data }",
            ["error[L0005]", "`batch` and `hidden`", "coordinator/tests/layouts.rs"],
        ),
        ("gradients{ batch:data }", ["error[L0003]", "the dimensions are hidden, width", "take the rule out"]),
        ("variables{ first/*{ *:dat } }", ["error[L0002]", "`variables{first/*{*:dat}}`", "did you mean `data`?"]),
    ] {
        let error = error(layout);
        assert!(parts.iter().all(|p| error.contains(p)), "{layout}: {error}");
    }
}
