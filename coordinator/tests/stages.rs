//! Stages of a program: layers that share variables first and have their own later, without a trip through the host.

mod common;

use common::f32s;
use common::run::{options, text};
use coordinator::checkpoint::{Checkpoints, Position};
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::nn::{self, Dense, Mode};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use std::path::Path;
use std::time::Instant;

const LAYERS: usize = 3;

fn batch() -> [Dim; 2] {
    [dim("batch", 8), dim("width", 64)]
}

/// The path of a shared variable, for that of a layer's.
fn shared(path: &str) -> String {
    (0..LAYERS).fold(path.into(), |p, i| p.replace(&format!("layer.{i}/"), "shared/"))
}

/// Three layers with drop-out that share variables in the first stage, and have their own in the second.
fn program() -> Program {
    let mut p = ProgramBuilder::new();
    for (name, sharing) in [("train.shared", true), ("train", false)] {
        p.function(name, |g| {
            let x = g.input("x", DType::F32, &batch());
            let build = || {
                (0..LAYERS).fold(x.clone(), |x, i| {
                    g.scoped(format!("layer.{i}"), || {
                        let wide = nn::dense(&x, "up", &["width"], &[dim("hidden", 96)], &Dense::default());
                        let y =
                            nn::dense(&nn::gelu(&wide), "down", &["hidden"], &[dim("width", 64)], &Dense::default());
                        nn::dropout(&y, 0.8, Mode::Train).add(&x)
                    })
                })
            };
            let y = if sharing { g.renamed(shared, build) } else { build() };
            let loss = y.square().mean_all();
            Optimizer::adamw(0.01, 0.01).clipped(1.0).apply(g, &loss);
            g.output("loss", &loss);
        })
        .unwrap();
    }
    p.stage("shared", &["train.shared"]).unwrap();
    p.stage("own", &["train"]).unwrap();
    p.copies("unshare", "train", |path| Some(shared(path))).unwrap();
    p.finish().unwrap()
}

/// Where the layers get their own variables.
const TAU: u32 = 3;

/// Runs steps `from .. to`, and changes the stage before step [`TAU`]; the losses.
fn train(s: &mut Session, from: u32, to: u32) -> Vec<Vec<u8>> {
    let one = |step: u32| {
        if step >= TAU && s.stage() == "shared" {
            s.enter("own", Some("unshare")).unwrap();
        }
        let function = if s.stage() == "own" { "train" } else { "train.shared" };
        s.run(function, step, &[("x", &f32s(&batch(), step).1)]).unwrap()[0].1.to_bytes()
    };
    (from..to).map(one).collect()
}

const LAYOUTS: [(&str, &str); 5] = [
    ("1", ""),
    ("a=2", "batch:a"),
    ("a=2", "hidden:a"),
    ("a=2,b=2", "hidden:a,batch:b"),
    ("a=4,b=2", "batch:a,width:b"),
];

fn session_in(dir: &Path, mesh: &str, layout: &str) -> Session {
    let checkpoints = Some(Checkpoints { location: dir.to_str().unwrap().into(), keep: 9 });
    Session::embedded(program(), &Options { checkpoints, ..options(mesh, layout) }).unwrap()
}

fn save(s: &mut Session, step: u32) {
    s.checkpoint(&Position { step, ..Position::default() }).unwrap();
    s.settle().unwrap();
}

#[test]
fn a_session_has_the_variables_of_its_stage_and_no_others() {
    let mut s = Session::embedded(program(), &options("1", "")).unwrap();
    let trained = |s: &Session| s.program().parameters();
    let layer = 2 * 64 * 96 + 64 + 96;
    assert_eq!((s.stage(), trained(&s)), ("shared", layer));
    let held = |s: &Session| s.plan().variables[0].iter().map(|(_, b)| b.bytes).sum::<usize>();
    let before = held(&s);
    s.enter("own", Some("unshare")).unwrap();
    assert_eq!((s.stage(), trained(&s)), ("own", LAYERS * layer));
    assert_eq!(held(&s), LAYERS * before, "variables and slots");
    assert!(text(s.run("train.shared", 0, &[])).contains("has no function `train.shared`"));
    assert!(text(s.enter("later", None)).contains("has no stage `later`"));
    for peak in s.peaks().unwrap() {
        train(&mut s, TAU, TAU + 1);
        assert!(peak.peak_bytes_measured <= peak.peak_bytes_predicted);
    }
    let peak = s.peaks().unwrap()[0];
    assert_eq!(peak.peak_bytes_predicted, peak.peak_bytes_measured);
}

#[test]
fn unsharing_copies_variables_and_slots_and_changes_no_bit_of_the_loss() {
    let mut kept = Session::embedded(program(), &options("1", "")).unwrap();
    let mut s = Session::embedded(program(), &options("1", "")).unwrap();
    train(&mut kept, 0, TAU);
    train(&mut s, 0, TAU);
    s.enter("own", Some("unshare")).unwrap();
    let variables = s.program().variables.clone();
    assert!(variables.iter().any(|v| v.name.ends_with("adam.v")));
    for v in variables {
        let from = kept.variable(&shared(&v.name)).unwrap();
        assert_eq!(s.variable(&v.name).unwrap(), from, "{}", v.name);
        assert!(matches!(&from, Array::F32(a) if a.iter().any(|x| *x != 0.0)), "{}", v.name);
    }
    let x = f32s(&batch(), 77).1;
    let before = kept.run("train.shared", TAU, &[("x", &x)]).unwrap();
    let after = s.run("train", TAU, &[("x", &x)]).unwrap();
    assert_eq!(before[0].1.to_bytes(), after[0].1.to_bytes());
}

#[test]
fn a_run_through_its_stages_has_the_same_bits_on_every_mesh() {
    let mut whole = Session::embedded(program(), &options("1", "")).unwrap();
    let losses = train(&mut whole, 0, 6);
    for (mesh, layout) in LAYOUTS {
        let mut s = Session::embedded(program(), &options(mesh, layout)).unwrap();
        assert_eq!(train(&mut s, 0, 6), losses, "{mesh} {layout}");
        assert_eq!(s.variables_hash().unwrap(), whole.variables_hash().unwrap(), "{mesh} {layout}");
    }
}

#[test]
fn a_run_goes_on_from_a_checkpoint_of_any_stage_on_another_mesh() {
    let mut whole = Session::embedded(program(), &options("1", "")).unwrap();
    let losses = train(&mut whole, 0, 6);
    // Before the change, at it before and after the layers have their own, and after it.
    for (i, (step, own)) in [(TAU - 1, false), (TAU, false), (TAU, true), (TAU + 1, true)].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (mesh, layout) = LAYOUTS[i];
        let mut first = session_in(dir.path(), mesh, layout);
        train(&mut first, 0, step);
        if own && first.stage() == "shared" {
            first.enter("own", Some("unshare")).unwrap();
        }
        save(&mut first, step);
        let (mesh, layout) = LAYOUTS[i + 1];
        let mut second = session_in(dir.path(), mesh, layout);
        assert_eq!(second.restore().unwrap().unwrap().position.step, step);
        assert_eq!(second.stage(), first.stage(), "step {step}");
        assert_eq!(train(&mut second, step, 6), losses[step as usize..], "step {step} on {mesh}");
        assert_eq!(second.variables_hash().unwrap(), whole.variables_hash().unwrap());
    }
}

#[test]
fn a_damaged_checkpoint_of_one_stage_is_passed_over_for_a_good_one_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session_in(dir.path(), "a=2", "batch:a");
    let losses = train(&mut s, 0, 2);
    save(&mut s, 2);
    let rest = train(&mut s, 2, 5);
    save(&mut s, 5);
    let shard = dir.path().join("step-00000005-epoch-1/shard-00000.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    for mut s in [s, session_in(dir.path(), "a=2", "hidden:a")] {
        assert_eq!(s.restore().unwrap().unwrap().position.step, 2);
        assert_eq!(s.stage(), "shared");
        let notes = s.notes();
        assert!(notes.len() == 1 && notes[0].starts_with("passed over: W0050"), "{notes:?}");
        assert_eq!(train(&mut s, 2, 5), rest);
    }
    assert_eq!(losses.len(), 2);
    std::fs::remove_file(dir.path().join("step-00000002-epoch-1/manifest.json")).unwrap();
    assert!(text(session_in(dir.path(), "1", "").restore()).starts_with("C0004: there is no good checkpoint in "));
}

#[test]
fn a_change_that_takes_more_memory_than_allowed_is_refused_before_anything_happens() {
    let mut s = Session::embedded(program(), &options("1", "")).unwrap();
    train(&mut s, 0, 1);
    let peak = |p: Program| options("1", "").plan(&p).unwrap().peak_bytes(0);
    let own = peak(program().stage("own").unwrap()).max(peak(program().only(&["unshare".into()]).unwrap()));
    let memory = Some(own);
    let mut s = Session::embedded(program(), &Options { memory, ..options("1", "") }).unwrap();
    train(&mut s, 0, 1);
    let hash = s.variables_hash().unwrap();
    let refused = text(s.enter("own", Some("unshare")));
    assert!(refused.contains("M0001") && refused.contains("going to another stage holds"), "{refused}");
    assert_eq!((s.stage(), s.variables_hash().unwrap()), ("shared", hash));
}

#[test]
fn planning_to_unshare_a_large_model_takes_milliseconds() {
    // As many variables as BERT-base has: 12 layers of 16, with two slots each.
    let mut p = ProgramBuilder::new();
    let path = |layer: usize, v: usize, slot: &str| format!("layer.{layer}/{v}{slot}");
    p.function("own", |g| {
        for (layer, v, slot) in (0..12).flat_map(|l| (0..16).flat_map(move |v| ["", "/m", "/v"].map(|s| (l, v, s)))) {
            let t = g.variable(&path(layer, v, slot), &batch(), mesh::program::Init::ones());
            g.assign(&t, &t.mul_scalar(2.0));
        }
    })
    .unwrap();
    p.function("shared", |g| {
        for (v, slot) in (0..16).flat_map(|v| ["", "/m", "/v"].map(|s| (v, s))) {
            let t = g.variable(&format!("shared/{v}{slot}"), &batch(), mesh::program::Init::ones());
            g.assign(&t, &t.mul_scalar(2.0));
        }
    })
    .unwrap();
    let origin = |path: &str| path.split_once('/').map(|(_, v)| format!("shared/{v}"));
    p.copies("unshare", "own", origin).unwrap();
    let program = p.finish().unwrap();
    let begun = Instant::now();
    let between = program.only(&["unshare".into()]).unwrap();
    options("a=4", "batch:a").plan(&between).unwrap();
    let took = begun.elapsed();
    eprintln!("planned {} variables on 4 devices in {:.1} ms", between.variables.len(), took.as_secs_f64() * 1e3);
    assert!(took.as_millis() < 500, "{took:?}");
}
