//! Pipelines: stages by scope train as one device does, bit for bit, on every schedule, and their memory is as planned.

mod common;

use common::run::{options, text};
use common::workers::Workers;
use common::{assert_bits_eq, i32s, stepping, steps};
use coordinator::checkpoint::{Checkpoints, Position};
use coordinator::session::Peak;
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, Dense, Mode};
use mesh::ops::source::Distribution;
use mesh::optim::Optimizer;
use mesh::plan::{ProgramPlan, Step, Work};
use mesh::program::{Init, Program};
use std::time::Duration;

/// Four layers, with one table for words and logits, that go through a batch in parts.
fn layers(parts: usize, optimizer: &Optimizer) -> Program {
    stepping(|g| {
        let both = [dim("batch", 8), dim("seq", 6)];
        let tokens = g.scoped("words", || g.input("tokens", DType::I32, &both));
        let labels = g.input("labels", DType::I32, &both);
        let init = Init::Random { distribution: Distribution::Normal, scale: 0.1, offset: 0.0 };
        let of = |part: usize| {
            let tokens = g.scoped("words", || tokens.micro_batch("batch", part, parts));
            let labels = labels.micro_batch("batch", part, parts);
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
        if optimizer.clip_norm.is_some() {
            g.output("norm", &update.grad_norm);
        }
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
            ("pipe=2", INTERLEAVED.into()),
            ("pipe=2", format!("{INTERLEAVED}, schedule:zero-bubble")),
            ("pipe=4", format!("{FOUR}, schedule:zero-bubble")),
            ("data=2,pipe=2", format!("batch:data, {TWO}, slots{{ *:data }}, schedule:zero-bubble")),
            ("pipe=2", "layer.2/**{ @pipe:1 }".into()),
            ("pipe=4", FOUR.into()),
            ("data=2,pipe=2", format!("batch:data, {TWO}, slots{{ *:data }}, gradients{{ *:data }}")),
            ("pipe=2,model=2", format!("ff:model, vocab:model, {TWO}")),
            ("data=2,pipe=4", format!("batch:data, {FOUR}, schedule:gpipe")),
        ] {
            assert_bits_eq("layers", &whole, &steps(&p, mesh, &layout, 3, &feeds), &format!("{mesh} with {layout}"));
        }
    }
}

/// The steps of a device of that name, and what it plans to take.
fn planned(p: &Program, mesh: &str, layout: &str) -> ProgramPlan {
    options(mesh, layout).plan(p).unwrap_or_else(|e| panic!("{mesh} with {layout}: {e}"))
}

fn count(plan: &ProgramPlan, device: usize, op: &str) -> usize {
    plan.functions[&"step".into()][device].steps.iter().filter(|s| *s.label.op == *op).count()
}

#[test]
fn a_stage_hands_each_micro_batch_on_once_and_back_once() {
    let parts = 4;
    let p = layers(parts, &Optimizer::adam(0.01));
    for schedule in ["gpipe", "1f1b", "zero-bubble"] {
        let two = planned(&p, "pipe=2", &format!("{TWO}, schedule:{schedule}"));
        // Besides activations and their gradients: the table goes to the last stage and comes back as its gradients, and the
        // learning rate goes to the first one.
        assert_eq!(count(&two, 0, "send"), 2 * parts + 1 + parts + 1, "{schedule}");
        assert_eq!(count(&two, 0, "send"), count(&two, 1, "send"), "{schedule}");
        let four = planned(&p, "pipe=4", &format!("{FOUR}, schedule:{schedule}"));
        assert_eq!(count(&four, 1, "send"), 4 * parts + 1, "{schedule}: both neighbours, both ways");
    }
    // With clipping the norm of each gradient goes to where the sum of them is, and the sum to the first stage; a gradient
    // stays where its variable is.
    let bytes = |p: &Program| -> usize {
        let plan = planned(p, "pipe=2", TWO);
        let sent = |s: &Step| match &s.work {
            Work::Exchange(e) => e.sends.iter().map(|m| m.bytes).sum(),
            _ => 0,
        };
        plan.functions[&"step".into()].iter().flat_map(|d| &d.steps).map(sent).sum()
    };
    let clipped = layers(parts, &Optimizer::adam(0.01).clipped(1.0));
    assert!(bytes(&clipped) <= bytes(&p) + 1024, "{} {}", bytes(&clipped), bytes(&p));
}

/// No test, but what this binary does where it was started as a worker.
#[test]
fn worker_process() {
    common::workers::serve();
}

#[test]
fn the_peak_of_each_stage_is_the_planned_one() {
    let p = layers(4, &Optimizer::adam(0.01));
    let feeds = feeds();
    let feeds = feeds.each_ref().map(|(n, a)| (*n, a));
    let waiting = format!("{FOUR}, schedule:zero-bubble");
    for (mesh, layout) in [("pipe=2", TWO), ("pipe=4", FOUR), ("pipe=4", &waiting), ("pipe=2", INTERLEAVED)] {
        let mut s = Session::embedded(p.clone(), &options(mesh, layout)).unwrap();
        s.run("step", 0, &feeds).unwrap();
        let peaks = s.peaks().unwrap();
        let near = |p: &Peak| p.peak_bytes_measured == p.peak_bytes_predicted;
        assert!(peaks.iter().all(near), "{mesh} with {layout}: {peaks:?}");
        let whole = planned(&p, "1", "").peak_bytes(0);
        assert!(peaks.iter().all(|p| p.peak_bytes_predicted < whole), "{mesh} with {layout}: {peaks:?} of {whole}");
    }
}

#[test]
fn a_run_goes_on_from_a_checkpoint_with_other_stages_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let p = layers(2, &Optimizer::adam(0.01));
    let checkpoints = Checkpoints { location: dir.path().to_str().unwrap().into(), keep: 3 };
    let session = |mesh: &str, layout: &str| {
        let options = Options { checkpoints: Some(checkpoints.clone()), ..options(mesh, layout) };
        Session::embedded(p.clone(), &options).unwrap()
    };
    let feeds = feeds();
    let feeds = feeds.each_ref().map(|(n, a)| (*n, a));
    let mut first = session("pipe=2", TWO);
    first.run("step", 0, &feeds).unwrap();
    first.checkpoint(&Position { step: 1, ..Position::default() }).unwrap();
    first.settle().unwrap();
    let loss = first.run("step", 1, &feeds).unwrap();
    for (mesh, layout) in [("1", ""), ("pipe=4", FOUR), ("data=2", "batch:data"), ("pipe=2", INTERLEAVED)] {
        let mut s = session(mesh, layout);
        s.restore().unwrap();
        assert_bits_eq("resumed", &loss, &s.run("step", 1, &feeds).unwrap(), mesh);
    }
}

#[test]
fn worker_processes_hold_a_stage_each() {
    let p = layers(2, &Optimizer::adam(0.01));
    let feeds = feeds();
    let feeds = feeds.each_ref().map(|(n, a)| (*n, a));
    let whole = Session::embedded(p.clone(), &options("1", "")).unwrap().run("step", 0, &feeds).unwrap();
    let workers = Workers::start(&["--devices cpu:1".into(), "--devices cpu:1".into()], Duration::from_secs(10));
    let mut s = workers.session(p, &options("pipe=2", TWO));
    assert_bits_eq("workers", &whole, &s.run("step", 0, &feeds).unwrap(), "two workers");
}

#[test]
fn a_stage_that_cannot_be_is_refused_before_anything_runs() {
    let p = layers(2, &Optimizer::adam(0.01));
    let error = |layout: &str| match layout.parse() {
        Ok(layout) => text(Session::embedded(p.clone(), &Options { layout, ..options("pipe=2", "") })),
        Err(e) => e.to_string(),
    };
    for (layout, parts) in [
        ("@pipe:2", ["error[L0009]", "`@pipe:2`", "has 2, from 0 on"]),
        ("@pip:1", ["error[L0002]", "`@pip:1`", "did you mean `pipe`?"]),
        ("layer.7/**{ @pipe:1 }", ["error[L0008]", "`layer.7/**{@pipe:1}`", "did you mean"]),
        ("@pipe:1, ff:pipe", ["error[L0005]", "the stage `@pipe` and dimension `ff`", "`ff:none`"]),
        ("@pipe:one", ["error[L0001]", "`@pipe:one`", "such as `@pipe:0`"]),
        ("@pipe:0?", ["error[L0001]", "`@pipe:0?`", "such as `@pipe:0`"]),
        ("schedule:zero", ["error[L0001]", "`zero`", "gpipe, 1f1b or zero-bubble"]),
    ] {
        let error = error(layout);
        assert!(parts.iter().all(|p| error.contains(p)), "{layout}: {error}");
    }
}
