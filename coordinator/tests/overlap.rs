//! Collectives that go on while other steps are done change no bit and no peak, and the profile says what is left of them.

mod common;

use common::{assert_bits_eq, f32s, i32s, stepping};
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Name, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, BatchNorm, Dense, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::Program;

/// Residual layers over positions, trained by an optimizer that asks for the norm of everything.
fn layers(optimizer: &Optimizer) -> Program {
    stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("batch", 8), dim("seq", 24), dim("model", 64)]);
        let layer = |x: Tensor, i: usize| {
            g.scoped(format!("layer.{i}"), || {
                let wide = nn::gelu(&nn::dense(&x, "up", &["model"], &[dim("ff", 256)], &Dense::default()));
                let y = nn::dense(&wide, "down", &["ff"], &[dim("model", 64)], &Dense::default());
                nn::layer_norm(&nn::dropout(&y, 0.9, Mode::Train).add(&x), "norm", &["model"], 1e-3)
            })
        };
        let loss = (0..3).fold(x, layer).square().mean_all();
        let update = optimizer.apply(g, &loss);
        g.output("loss", &loss);
        g.output("norm", &update.grad_norm);
    })
}

/// Two levels of convolutions.
fn convolutions() -> Program {
    stepping(|g| {
        let space = ["x", "y"];
        let x = g.input("x", DType::F32, &[dim("batch", 2), dim("x", 32), dim("y", 24), dim("channel", 3)]);
        let labels = g.input("labels", DType::I32, &[dim("batch", 2), dim("x", 32), dim("y", 24)]);
        let block = |x: &Tensor, name: &str, channels: usize| {
            let y = nn::conv(x, name, &Kernel::new(&space, 3), &dim("channel", channels));
            nn::batch_norm(&y, &format!("{name}.norm"), "channel", &BatchNorm::default(), Mode::Train).relu()
        };
        let top = block(&block(&x, "first", 8), "second", 8);
        let halves = [("x", 32), ("y", 24)].map(|(n, size)| Window::same(n, size, 2, 2, 1));
        let bottom = block(&top.max_pool(&halves), "bottom", 16);
        let up = nn::conv_transpose(&bottom, "up", &Kernel::new(&space, 2).stride(2), &dim("channel", 8));
        let joined = block(&Tensor::concat(&[&top, &up], "channel"), "joined", 8);
        let logits = nn::dense(&joined, "head", &["channel"], &[dim("class", 3)], &Dense::default());
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        g.output("loss", &loss);
        Optimizer::adam(0.01).clipped(1.0).apply(g, &loss);
    })
}

const ZERO: [&str; 2] = [
    "batch:data, slots{ *:data }, gradients{ *:data }",
    "batch:data, slots{ *:data }, gradients{ *:data }, variables{ *:data }",
];
const STAGES: &str = "@pipe:1, layer.0/**{ @pipe:0 }";

/// All results of some steps and the variables behind them, what each device took, and the steps of the first one that are
/// of collectives under way.
fn train(p: &Program, options: &Options, feeds: &[(&str, &Array)]) -> (Vec<(Name, Array)>, Vec<usize>, usize) {
    let mut session = Session::embedded(p.clone(), options).unwrap();
    let mut seen = vec![];
    for step in 0..3 {
        let results = session.run("step", step, feeds).unwrap();
        seen.extend(results.into_iter().map(|(n, a)| (Name::from(format!("{n} of step {step}")), a)));
    }
    for v in &p.variables {
        seen.push((v.name.clone(), session.variable(&v.name).unwrap()));
    }
    let peaks = session.peaks().unwrap();
    assert!(peaks.iter().all(|p| p.peak_bytes_measured == p.peak_bytes_predicted), "{peaks:?}");
    let steps = &session.plan().functions[&Name::from("step")][0].steps;
    let apart = steps.iter().filter(|s| s.work.under_way().is_some()).count();
    (seen, peaks.iter().map(|p| p.peak_bytes_predicted).collect(), apart)
}

#[test]
fn what_goes_on_beside_other_steps_has_the_same_bits_and_no_higher_peak() {
    let rows = f32s(&[dim("batch", 8), dim("seq", 24), dim("model", 64)], 1).1;
    let image = f32s(&[dim("batch", 2), dim("x", 32), dim("y", 24), dim("channel", 3)], 1).1;
    let labels = i32s(&[dim("batch", 2), dim("x", 32), dim("y", 24)], 2, 3).1;
    let dense = [("x", &rows)];
    let spatial = [("x", &image), ("labels", &labels)];
    let adam = layers(&Optimizer::adamw(0.01, 0.1).clipped(1.0));
    let lamb = layers(&Optimizer::lamb(0.01, 0.1));
    let layouts = [
        ("data=2", "batch:data"),
        ("data=2", ZERO[0]),
        ("data=3", ZERO[1]),
        ("model=2", "ff:model"),
        ("data=2,model=2", "batch:data, ff:model"),
        ("seq=2", "seq:seq"),
        ("pipe=2", STAGES),
    ];
    let mut cases: Vec<(&Program, &str, &str, &[(&str, &Array)])> = vec![];
    for p in [&adam, &lamb] {
        cases.extend(layouts.iter().map(|(mesh, layout)| (p, *mesh, *layout, &dense[..])));
    }
    let convolutions = convolutions();
    cases.extend([("x=2", "x:x"), ("x=2,y=2", "x:x, y:y")].map(|(m, l)| (&convolutions, m, l, &spatial[..])));
    for (p, mesh, layout, feeds) in cases {
        for threads in [1, 2] {
            let [(seen, peaks, apart), (expected, most, none)] = [false, true].map(|waiting| {
                let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
                let options = Options { mesh, layout, threads: Some(threads), seed: 1, waiting, ..Options::default() };
                train(p, &options, feeds)
            });
            let on = format!("{mesh} with {layout}");
            assert_bits_eq("waiting or not", &expected, &seen, &on);
            assert!(peaks.iter().zip(&most).all(|(peak, most)| peak <= most), "{on}: {peaks:?} {most:?}");
            assert!(apart > 0 && none == 0, "{on}: {apart} {none}");
        }
    }
}
