//! Stages of a program: layers that share variables first and have their own later, without a trip through the host.

mod common;

use common::f32s;
use common::run::{options, text};
use common::staged::{LAYERS, batch, program, shared};
use common::workers::Workers;
use coordinator::checkpoint::{Checkpoints, Position};
use coordinator::{Failure, Options, Session};
use mesh::array::Array;
use mesh::program::ProgramBuilder;
use std::path::Path;
use std::time::{Duration, Instant};

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

/// What the way from the first stage to the second takes of each device: the most of what is there at once.
fn needed(mesh: &str, layout: &str) -> Vec<usize> {
    let whole = program();
    let parts = [whole.stage("shared"), whole.only(&["unshare".into()]), whole.stage("own")].map(Result::unwrap);
    let plans = parts.map(|part| options(mesh, layout).of(&part, &whole).plan(&part).unwrap());
    let [shared, between, own] = &plans;
    let of = |d: usize| (shared.peak_bytes(d) + between.peak_bytes(d)).max(between.peak_bytes(d) + own.peak_bytes(d));
    (0..shared.mesh.size()).map(of).collect()
}

fn predicted(s: &Session) -> Vec<usize> {
    s.peaks().unwrap().iter().map(|p| p.peak_bytes_predicted).collect()
}

/// Tries to go to the second stage with too little memory: it is refused, and the first one goes on as if nothing were.
fn refused(s: &mut Session) {
    let losses = train(s, 0, 1);
    let (hash, peaks, plan) = (s.variables_hash().unwrap(), s.peaks().unwrap(), s.plan().variables.clone());
    let e = s.enter("own", Some("unshare")).unwrap_err();
    assert!(matches!(&e, Failure::Program(_)), "{e:?}");
    let text = e.to_string();
    assert!(text.contains("M0001") && text.contains("going to another stage holds"), "{text}");
    assert_eq!((s.stage(), s.lost()), ("shared", None));
    assert_eq!((s.variables_hash().unwrap(), s.peaks().unwrap(), &s.plan().variables), (hash, peaks, &plan));
    let mut other = Session::embedded(program(), &options("1", "")).unwrap();
    assert_eq!([losses, train(s, 1, 2)].concat(), train(&mut other, 0, 2));
}

#[test]
fn a_change_that_takes_more_memory_than_allowed_is_refused_before_anything_happens() {
    for (mesh, layout) in LAYOUTS {
        let most = *needed(mesh, layout).iter().max().unwrap();
        let with = |memory: usize| Options { memory: Some(memory), ..options(mesh, layout) };
        refused(&mut Session::embedded(program(), &with(most - 1)).unwrap());
        Session::embedded(program(), &with(most)).unwrap().enter("own", Some("unshare")).unwrap();
    }
}

#[test]
fn the_peak_of_a_session_counts_its_change_of_stage() {
    for (mesh, layout) in LAYOUTS {
        let mut s = Session::embedded(program(), &options(mesh, layout)).unwrap();
        train(&mut s, 0, 5);
        assert_eq!(predicted(&s), needed(mesh, layout), "{mesh} {layout}");
        let peaks = s.peaks().unwrap();
        assert!(peaks.iter().all(|p| p.peak_bytes_predicted == p.peak_bytes_measured), "{mesh} {layout}: {peaks:?}");
    }
}

#[test]
fn a_session_that_is_set_to_a_checkpoint_of_another_stage_has_never_held_both() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session_in(dir.path(), "a=2", "batch:a");
    train(&mut s, 0, 4);
    save(&mut s, 4);
    let own = |d| s.plan().peak_bytes(d);
    let (memory, alone) = (Some(own(0).max(own(1))), vec![own(0), own(1)]);
    let mut second = session_in(dir.path(), "a=2", "batch:a");
    second.restore().unwrap().unwrap();
    assert_eq!((second.stage(), predicted(&second)), ("own", alone));
    // Where the change could not be made its result still fits.
    let checkpoints = Some(Checkpoints { location: dir.path().to_str().unwrap().into(), keep: 9 });
    let options = Options { memory, checkpoints, ..options("a=2", "batch:a") };
    let mut third = Session::embedded(program(), &options).unwrap();
    assert!(text(third.enter("own", Some("unshare"))).contains("M0001"));
    assert_eq!(third.restore().unwrap().unwrap().position.step, 4);
    assert_eq!(train(&mut third, 4, 6), train(&mut s, 4, 6));
}

/// No test, but what this binary does where it was started as a worker.
#[test]
fn worker_process() {
    common::workers::serve();
}

const SOON: Duration = Duration::from_secs(30);

#[test]
fn the_peak_of_worker_processes_is_that_of_devices_in_one_process() {
    let (mesh, layout) = ("a=2,b=2", "hidden:a,batch:b");
    let mut here = Session::embedded(program(), &options(mesh, layout)).unwrap();
    let workers = Workers::start(&["--devices cpu:1".into(), "--devices cpu:3".into()], SOON);
    let mut there = workers.session(program(), &options(mesh, layout));
    for (from, to) in [(0, 1), (1, TAU + 1), (TAU + 1, TAU + 2)] {
        assert_eq!(train(&mut there, from, to), train(&mut here, from, to));
        assert_eq!(there.peaks().unwrap(), here.peaks().unwrap(), "after step {to}");
    }
    assert_eq!(predicted(&there), needed(mesh, layout));
    assert_eq!(there.variables_hash().unwrap(), here.variables_hash().unwrap());
}

#[test]
fn a_change_that_goes_over_what_one_worker_allows_leaves_all_of_them_in_the_old_stage() {
    let (mesh, layout) = ("a=2", "batch:a");
    let need = needed(mesh, layout)[1];
    let limited = |n: usize| ["--devices cpu:1".to_string(), format!("--devices cpu:1 --memory {n}B")];
    let workers = Workers::start(&limited(need - 1), SOON);
    // Which worker has which device is not known: both need as much.
    assert_eq!(needed(mesh, layout)[0], need);
    let mut s = workers.session(program(), &options(mesh, layout));
    refused(&mut s);
    drop(s);
    let workers = Workers::start(&limited(need), SOON);
    let mut s = workers.session(program(), &options(mesh, layout));
    s.enter("own", Some("unshare")).unwrap();
    assert_eq!(predicted(&s), needed(mesh, layout));
    // The run's own limit holds for workers that have none.
    let workers = Workers::start(&["--devices cpu:2".into()], SOON);
    let mut s = workers.session(program(), &Options { memory: Some(need - 1), ..options(mesh, layout) });
    refused(&mut s);
}

#[test]
fn a_session_that_has_shrunk_changes_its_stage_on_the_mesh_that_it_has() {
    let need = needed("1", "")[0];
    // Each of two devices would need less.
    assert!(needed("a=2", "hidden:a")[0] < need);
    let workers = Workers::start(&["--devices cpu:1".into()], Duration::from_secs(2));
    let asked = |memory| Options { memory: Some(memory), shrink: true, ..options("a=2", "hidden:a") };
    {
        let mut s = workers.session(program(), &asked(need - 1));
        assert_eq!(s.plan().mesh.size(), 1);
        refused(&mut s);
    }
    let mut s = loop {
        // The session before may still be about to end.
        match Session::connect(&workers.url, program(), &asked(need)) {
            Ok(s) => break s,
            Err(e) => assert!(e.to_string().contains("C0012"), "{e}"),
        }
    };
    let mut whole = Session::embedded(program(), &options("1", "")).unwrap();
    assert_eq!(train(&mut s, 0, 5), train(&mut whole, 0, 5));
    assert_eq!((s.plan().mesh.size(), s.peaks().unwrap()), (1, whole.peaks().unwrap()));
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
