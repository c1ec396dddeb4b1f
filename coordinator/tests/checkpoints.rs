//! Checkpoints: what they bring back, on any mesh, and that nothing damaged is ever loaded.

mod common;

use common::run::{LAYOUTS, SIZES, network, options, session, session_in, text, train};
use coordinator::checkpoint::{Checkpoints, Entry, Position, Restored};
use coordinator::{Failure, Options, Session};
use mesh::dim::dim;
use mesh::program::ProgramBuilder;
use std::fs;
use std::path::{Path, PathBuf};

fn save(s: &mut Session, step: u32) -> Result<(), Failure> {
    let config = serde_json::json!({"hidden": SIZES.1});
    s.checkpoint(&Position { step, samples: u64::from(step) * 10, config })?;
    s.settle()
}

/// What is restored: the step, and what is passed over.
fn restore(s: &mut Session) -> (Result<Option<Restored>, Failure>, Vec<String>) {
    let restored = s.restore();
    (restored, s.notes())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn files(dir: &Path) -> Vec<PathBuf> {
    names(dir).into_iter().map(|n| dir.join(n)).collect()
}

/// The folder of the checkpoint of a step, the latest of them.
fn folder(dir: &Path, step: u32) -> PathBuf {
    let found = names(dir).iter().filter_map(|n| n.parse::<Entry>().ok()).filter(|e| e.step == step).max();
    dir.join(found.unwrap_or_else(|| panic!("no checkpoint of step {step} in {:?}", names(dir))).to_string())
}

#[test]
fn training_goes_on_from_a_checkpoint_on_any_other_mesh_as_if_it_had_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = session("1", "");
    let losses = train(&mut whole, 0, 6);
    for (i, (mesh, layout)) in LAYOUTS.iter().enumerate() {
        let dir = dir.path().join(i.to_string());
        let mut first = session_in(&dir, 3, mesh, layout);
        assert_eq!(train(&mut first, 0, 3), losses[..3], "{mesh}");
        save(&mut first, 3).unwrap();
        let (mesh, layout) = LAYOUTS[(i + 1) % 4];
        let mut second = session_in(&dir, 3, mesh, layout);
        let restored = restore(&mut second).0.unwrap().unwrap();
        assert_eq!((restored.position.step, restored.position.samples), (3, 30));
        assert_eq!(restored.position.config["hidden"], 70);
        for v in &first.program().variables {
            assert_eq!(first.variable(&v.name).unwrap(), second.variable(&v.name).unwrap(), "{}", v.name);
        }
        assert_eq!(train(&mut second, 3, 6), losses[3..], "{mesh}");
        assert_eq!(second.variables_hash().unwrap(), whole.variables_hash().unwrap());
    }
}

#[test]
fn a_run_that_shrinks_and_grows_is_the_run_that_did_not() {
    let mut whole = session("1", "");
    let losses = train(&mut whole, 0, 6);
    let hash = whole.variables_hash().unwrap();
    let elastic = [
        [("a=2,b=2", "hidden:a,batch:b"), ("b=2", "batch:b"), ("a=4", "batch:a")],
        [("1", ""), ("a=2,b=4", "hidden:a,batch:b"), ("1", "")],
        [("a=8", "batch:a"), ("a=2", "hidden:a"), ("a=2,b=5", "hidden:a,batch:b")],
    ];
    for meshes in elastic {
        let dir = tempfile::tempdir().unwrap();
        for (i, (mesh, layout)) in meshes.into_iter().enumerate() {
            let mut s = session_in(dir.path(), 2, mesh, layout);
            let step = restore(&mut s).0.unwrap().map_or(0, |r| r.position.step);
            assert_eq!(step, 2 * i as u32, "{mesh}");
            assert_eq!(train(&mut s, step, step + 2), losses[2 * i..2 * i + 2], "{mesh}");
            save(&mut s, step + 2).unwrap();
            if i == 2 {
                assert_eq!(s.variables_hash().unwrap(), hash);
            }
        }
    }
}

/// A folder with the good checkpoints of steps 1 and 2 of a mesh of four, and the variables' hash at each.
fn two_checkpoints(dir: &Path) -> (Session, [String; 2]) {
    let mut s = session_in(dir, 9, "a=2,b=2", "hidden:a,batch:b");
    let mut hash = |step| {
        train(&mut s, step - 1, step);
        save(&mut s, step).unwrap();
        s.variables_hash().unwrap()
    };
    let hashes = [hash(1), hash(2)];
    (s, hashes)
}

/// Restores, which must pass step 2 over for a reason that names `file`, and, where it is not the manifest, a tensor.
fn falls_back(s: &mut Session, first: &str, file: &str, what: &str) {
    let (restored, notes) = restore(s);
    let restored = restored.unwrap_or_else(|e| panic!("{what}: {e}")).unwrap_or_else(|| panic!("{what}: nothing"));
    assert_eq!(restored.position.step, 1, "{what}: a damaged checkpoint is loaded");
    assert_eq!(s.variables_hash().unwrap(), first, "{what}");
    assert_eq!(notes.len(), 1, "{what}: {notes:?}");
    assert!(notes[0].starts_with("passed over: W00") && notes[0].contains(file), "{what}: {}", notes[0]);
    let cut_short = notes[0].contains("bytes and was written with");
    assert!(file == "manifest.json" || cut_short || notes[0].contains("tensor `"), "{what}: {}", notes[0]);
}

#[test]
fn no_flipped_bit_is_ever_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (mut s, [first, second]) = two_checkpoints(dir.path());
    let last = folder(dir.path(), 2);
    let files = files(&last);
    assert_eq!(files.len(), 5, "four shards and a manifest");
    let mut state = 7u64;
    let mut draw = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (((state >> 33) * n as u64) >> 31) as usize
    };
    for flip in 0..500 {
        let path = &files[draw(files.len())];
        let good = fs::read(path).unwrap();
        let (byte, bit) = (draw(good.len()), draw(8));
        let mut bad = good.clone();
        bad[byte] ^= 1 << bit;
        fs::write(path, &bad).unwrap();
        let file = path.file_name().unwrap().to_str().unwrap();
        falls_back(&mut s, &first, file, &format!("flip {flip}: bit {bit} of byte {byte} of {file}"));
        fs::write(path, &good).unwrap();
    }
    assert_eq!(restore(&mut s).0.unwrap().unwrap().position.step, 2);
    assert_eq!(s.variables_hash().unwrap(), second);
}

#[test]
fn what_is_cut_short_gone_swapped_or_replayed_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut s, [first, second]) = two_checkpoints(dir.path());
    let last = folder(dir.path(), 2);
    let name = |p: &Path| p.file_name().unwrap().to_str().unwrap().to_string();
    for path in files(&last) {
        let good = fs::read(&path).unwrap();
        for length in (0..good.len()).step_by(4096) {
            fs::write(&path, &good[..length]).unwrap();
            falls_back(&mut s, &first, &name(&path), &format!("{} cut to {length} bytes", name(&path)));
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        falls_back(&mut s, &first, &name(&path), "a byte too many");
        fs::remove_file(&path).unwrap();
        falls_back(&mut s, &first, &name(&path), "a file that is gone");
        fs::write(&path, &good).unwrap();
    }
    // Two shards of one size that changed places.
    let shards: Vec<PathBuf> = files(&last).into_iter().filter(|f| name(f).starts_with("shard")).collect();
    let bytes: Vec<Vec<u8>> = shards.iter().map(|f| fs::read(f).unwrap()).collect();
    for (a, b) in [(0, 1), (0, 2), (1, 3)] {
        fs::write(&shards[a], &bytes[b]).unwrap();
        fs::write(&shards[b], &bytes[a]).unwrap();
        falls_back(&mut s, &first, "shard-", &format!("shards {a} and {b} swapped"));
        fs::write(&shards[a], &bytes[a]).unwrap();
        fs::write(&shards[b], &bytes[b]).unwrap();
    }
    // The manifest of the checkpoint before, and the shards of it.
    let manifest = fs::read(last.join("manifest.json")).unwrap();
    fs::copy(folder(dir.path(), 1).join("manifest.json"), last.join("manifest.json")).unwrap();
    falls_back(&mut s, &first, "manifest.json", "an older manifest");
    fs::write(last.join("manifest.json"), &manifest).unwrap();
    fs::copy(files(&folder(dir.path(), 1))[1].clone(), &shards[0]).unwrap();
    falls_back(&mut s, &first, "shard-", "an older shard");
    fs::write(&shards[0], &bytes[0]).unwrap();

    assert_eq!(restore(&mut s).0.unwrap().unwrap().position.step, 2);
    assert_eq!(s.variables_hash().unwrap(), second);
    // With both damaged there is none, and the variables stay as they are.
    for step in [1, 2] {
        fs::remove_file(folder(dir.path(), step).join("shard-00000.safetensors")).unwrap();
    }
    let (restored, notes) = restore(&mut s);
    assert!(text(restored).starts_with("C0004: there is no good checkpoint in "));
    assert_eq!((notes.len(), s.variables_hash().unwrap()), (2, second));
}

#[test]
fn a_full_disk_costs_a_checkpoint_and_neither_training_nor_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let mounted =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(dir.path()).output();
    if !mounted.is_ok_and(|m| m.status.success()) {
        eprintln!("skipped: a small tmpfs cannot be mounted here");
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            std::process::Command::new("umount").arg("-l").arg(self.0).status().unwrap();
        }
    }
    let _mounted = Mounted(dir.path());
    let mut s = session_in(&dir.path().join("c"), 9, "a=2", "hidden:a");
    let mut whole = session("1", "");
    train(&mut s, 0, 1);
    save(&mut s, 1).unwrap();
    let full = (1..).take_while(|i| fs::write(dir.path().join(format!("f{i}")), [1; 4096]).is_ok()).count();
    assert!(full > 3);
    let mut losses = train(&mut s, 1, 2);
    let position = Position { step: 2, ..Position::default() };
    s.checkpoint(&position).unwrap();
    // Training goes on, and says so within one interval.
    losses.extend(train(&mut s, 2, 3));
    let told = text(s.settle());
    assert!(told.starts_with("C0007: the checkpoint of step 2 could not be written"), "{told}");
    assert!(told.contains("no room is left"), "{told}");
    s.checkpoint(&Position { step: 3, ..position.clone() }).unwrap();
    losses.extend(train(&mut s, 3, 4));
    s.checkpoint(&Position { step: 4, ..position }).unwrap();
    let notes = s.notes();
    assert!(notes.iter().any(|n| n.starts_with("C0007: the checkpoint of step 3")), "{notes:?}");
    assert_eq!(losses, train(&mut whole, 0, 4)[1..]);
    // What is left of it was told or is not: the disk is full.
    let _ = s.settle();
    assert_eq!(restore(&mut session_in(&dir.path().join("c"), 9, "1", "")).0.unwrap().unwrap().position.step, 1);
    // With room again it is written again.
    (1..=full).for_each(|i| fs::remove_file(dir.path().join(format!("f{i}"))).unwrap());
    save(&mut s, 4).unwrap();
    assert_eq!(restore(&mut session_in(&dir.path().join("c"), 9, "1", "")).0.unwrap().unwrap().position.step, 4);
}

#[test]
fn a_checkpoint_of_another_program_or_format_leaves_the_session_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session_in(dir.path(), 3, "1", "");
    train(&mut s, 0, 2);
    save(&mut s, 2).unwrap();
    let checkpoints = Some(Checkpoints { location: dir.path().to_str().unwrap().into(), keep: 3 });
    let with = |p, mesh: &str, layout: &str| {
        Session::embedded(p, &Options { checkpoints: checkpoints.clone(), ..options(mesh, layout) }).unwrap()
    };
    let mut other = with(network(80), "a=2", "hidden:a");
    let before = other.variables_hash().unwrap();
    let error = text(restore(&mut other).0);
    assert!(
        error.starts_with("W0051: the program's variable `first/kernel` is f32 [10, 80], and the checkpoint step-")
    );
    assert!(error.contains("has f32 [10, 70]; resume with the configuration that it was written with"), "{error}");
    assert_eq!(other.variables_hash().unwrap(), before);
    // A program with one variable more.
    let mut p = ProgramBuilder::new();
    p.function("f", |g| g.output("y", &g.variable("extra", &[dim("in", 3)], mesh::program::Init::ones()))).unwrap();
    let error = text(restore(&mut with(p.finish().unwrap(), "1", "")).0);
    assert!(error.contains("variable `extra` is f32 [3], and the checkpoint") && error.contains("lacks it"), "{error}");
    // Another format, by a later program, rightly sealed.
    let path = folder(dir.path(), 2).join("manifest.json");
    let sealed: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let later = serde_json::to_string(&sealed["manifest"]).unwrap().replace("\"version\":2", "\"version\":9");
    let sealed = format!("{{\"blake3\":\"{}\",\"manifest\":{later}}}", blake3::hash(later.as_bytes()).to_hex());
    fs::write(&path, sealed).unwrap();
    let (restored, notes) = restore(&mut s);
    assert!(text(restored).starts_with("C0004"));
    assert!(notes[0].contains("is of format 9, and this program reads format 2"), "{notes:?}");
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session_in(dir.path(), 2, "1", "");
    for step in [1, 2, 3, 4] {
        save(&mut s, step).unwrap();
    }
    assert_eq!(names(dir.path()), ["step-00000003-epoch-1", "step-00000004-epoch-1"]);
    // Another life is another epoch; the same step again takes the old one's place.
    let mut s = session_in(dir.path(), 2, "a=2", "hidden:a");
    save(&mut s, 4).unwrap();
    assert_eq!(names(dir.path()), ["step-00000003-epoch-1", "step-00000004-epoch-2"]);
    // Back at an earlier step, the one just written stays, whatever later ones there are.
    let mut s = session_in(dir.path(), 1, "1", "");
    save(&mut s, 2).unwrap();
    assert_eq!(names(dir.path()), ["step-00000002-epoch-3"]);
    // More digits are more steps; what is no checkpoint is neither counted nor deleted; what was not finished goes.
    let mut s = session_in(dir.path(), 2, "1", "");
    for other in ["step-notes", "best", "step-00000009-epoch-1"] {
        fs::create_dir(dir.path().join(other)).unwrap();
    }
    save(&mut s, 99_999_999).unwrap();
    save(&mut s, 100_000_000).unwrap();
    assert_eq!(names(dir.path()), ["best", "step-100000000-epoch-4", "step-99999999-epoch-4", "step-notes"]);
    assert_eq!(restore(&mut s).0.unwrap().unwrap().position.step, 100_000_000);
}

#[test]
fn where_nothing_was_written_there_is_nothing_to_restore() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session_in(&dir.path().join("nowhere"), 2, "1", "");
    assert_eq!(restore(&mut s).0.unwrap(), None);
    assert!(!dir.path().join("nowhere").exists());
    assert!(text(session("1", "").restore()).starts_with("C0005: this session has no place for checkpoints"));
}

#[test]
fn checkpoints_go_to_an_object_store_as_well() {
    let location = format!("memory://checkpoints-{}", std::process::id());
    let checkpoints = Some(Checkpoints { location, keep: 2 });
    let begin = |mesh: &str, layout: &str| {
        let options = Options { checkpoints: checkpoints.clone(), ..options(mesh, layout) };
        Session::embedded(network(SIZES.1), &options).unwrap()
    };
    let mut s = begin("a=2,b=5", "hidden:a,batch:b");
    train(&mut s, 0, 2);
    save(&mut s, 2).unwrap();
    let mut other = begin("a=3", "batch:a");
    assert_eq!(restore(&mut other).0.unwrap().unwrap().position.step, 2);
    assert_eq!(other.variables_hash().unwrap(), s.variables_hash().unwrap());
}
