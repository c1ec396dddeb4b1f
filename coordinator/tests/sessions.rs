//! Sessions and checkpoints: what they keep, what they refuse, and how they say so.

mod common;

use common::{f32s, i32s};
use coordinator::checkpoint::{self, Position};
use coordinator::{Failure, Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::nn::{self, BatchNorm, Dense, Mode};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use std::fs;
use std::path::Path;

const SIZES: (usize, usize) = (10, 70);

fn batch() -> [Dim; 2] {
    [dim("batch", 10), dim("in", SIZES.0)]
}

/// Two layers with a norm between, trained by Adam; `hidden` units.
fn network(hidden: usize) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("image", DType::F32, &batch());
        let labels = g.input("labels", DType::I32, &batch()[..1]);
        let y = nn::dense(&x, "first", &["in"], &[dim("hidden", hidden)], &Dense::default());
        let y = nn::dropout(
            &nn::gelu(&nn::batch_norm(&y, "n", "hidden", &BatchNorm::default(), Mode::Train)),
            0.9,
            Mode::Train,
        );
        let logits = nn::dense(&y, "second", &["hidden"], &[dim("class", 5)], &Dense::default());
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        Optimizer::adam(0.01).apply(g, &loss);
        g.output("loss", &loss);
        g.output("accuracy", &nn::accuracy(&logits, &labels, "class"));
    })
    .unwrap();
    p.finish().unwrap()
}

fn session_of(p: Program, mesh: &str, layout: &str) -> Session {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    Session::embedded(p, &Options { mesh, layout, threads: Some(1), seed: 3, ..Options::default() }).unwrap()
}

fn session(mesh: &str, layout: &str) -> Session {
    session_of(network(SIZES.1), mesh, layout)
}

/// Runs steps `from .. to`; the losses.
fn train(s: &mut Session, from: u32, to: u32) -> Vec<Vec<u8>> {
    (from..to)
        .map(|step| {
            let (image, labels) = (f32s(&batch(), step).1, i32s(&batch()[..1], 100 + step, 5).1);
            let out = s.run("train", step, &[("image", &image), ("labels", &labels)]).unwrap();
            out[0].1.to_bytes()
        })
        .collect()
}

fn save(s: &Session, dir: &Path, step: u32, keep: usize) -> std::path::PathBuf {
    let position = Position { step, samples: u64::from(step) * 10, config: serde_json::json!({"hidden": SIZES.1}) };
    checkpoint::save(s, dir, &position, keep).unwrap()
}

/// What `load_newest` finds, and what it warns of.
fn newest(dir: &Path) -> (Result<checkpoint::Loaded, Failure>, Vec<String>) {
    let mut warnings = vec![];
    let found = checkpoint::load_newest(dir, |w| warnings.push(w.to_string()));
    (found, warnings)
}

fn names(dir: &Path) -> Vec<String> {
    let name = |p: &std::path::PathBuf| p.file_name().unwrap().to_str().unwrap().to_string();
    checkpoint::list(dir).iter().map(name).collect()
}

fn text<T>(result: Result<T, Failure>) -> String {
    match result {
        Ok(_) => panic!("it is accepted"),
        Err(e) => e.to_string(),
    }
}

const LAYOUTS: [(&str, &str); 4] = [("1", ""), ("a=3", "batch:a"), ("a=5", "batch:a"), ("a=2,b=5", "hidden:a,batch:b")];

#[test]
fn training_goes_on_from_a_checkpoint_on_any_other_mesh_as_if_it_had_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = session("1", "");
    let losses = train(&mut whole, 0, 6);
    for (i, (mesh, layout)) in LAYOUTS.iter().enumerate() {
        let dir = dir.path().join(i.to_string());
        let mut first = session(mesh, layout);
        assert_eq!(train(&mut first, 0, 3), losses[..3], "{mesh}");
        save(&first, &dir, 3, 3);
        let (mesh, layout) = LAYOUTS[(i + 1) % 4];
        let mut second = session(mesh, layout);
        let loaded = newest(&dir).0.unwrap();
        assert_eq!((loaded.manifest.step, loaded.manifest.samples, loaded.manifest.seed), (3, 30, 3));
        assert_eq!(loaded.manifest.config["hidden"], 70);
        loaded.restore(&mut second).unwrap();
        for v in &first.program().variables {
            assert_eq!(first.variable(&v.name).unwrap(), second.variable(&v.name).unwrap(), "{}", v.name);
        }
        assert_eq!(train(&mut second, 3, 6), losses[3..], "{mesh}");
        assert_eq!(second.variables_hash().unwrap(), whole.variables_hash().unwrap());
    }
}

#[test]
fn sessions_on_three_and_five_devices_hold_uneven_parts() {
    for ((mesh, layout), parts) in LAYOUTS[1..3].iter().zip([vec![3, 4, 3], vec![2, 3, 1, 2, 2]]) {
        let mut s = session(mesh, layout);
        train(&mut s, 0, 2);
        let devices = &s.plan().functions[&Name::from("train")];
        let held: Vec<usize> = devices.iter().map(|d| d.inputs[0].1.region.shape()[0]).collect();
        assert_eq!(held, parts, "rows of the batch by device");
        assert_eq!(s.peaks().unwrap().len(), parts.len());
    }
}

/// Flips a byte of a tensor in a checkpoint.
fn damage(checkpoint: &Path, tensor: &str) {
    let path = checkpoint.join("variables.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let at = file.tensor(tensor).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at + 2] ^= 0x10;
    fs::write(&path, bytes).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_reported_by_tensor_and_the_one_before_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session("a=3", "batch:a");
    train(&mut s, 0, 1);
    save(&s, dir.path(), 1, 3);
    let good = s.variables_hash().unwrap();
    train(&mut s, 1, 2);
    let last = save(&s, dir.path(), 2, 3);
    damage(&last, "first/kernel/adam.m");
    let (found, warnings) = newest(dir.path());
    found.as_ref().unwrap().restore(&mut s).unwrap();
    assert_eq!((found.unwrap().manifest.step, s.variables_hash().unwrap()), (1, good));
    let expected = format!(
        "C0003: the checkpoint {} is damaged: tensor `first/kernel/adam.m` does not have its hash",
        last.display()
    );
    assert_eq!(warnings, [expected]);
    // With both damaged there is none, and both are named.
    damage(&dir.path().join("step-00000001"), "second/bias");
    let (found, warnings) = newest(dir.path());
    assert!(text(found).starts_with("C0004: there is no good checkpoint in "));
    assert_eq!(warnings.len(), 2);
}

#[test]
fn checkpoints_that_are_cut_short_or_of_another_format_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let s = session("1", "");
    save(&s, dir.path(), 1, 9);
    let spoil = |step: u32, spoil: &dyn Fn(&Path)| spoil(&save(&s, dir.path(), step, 9));
    spoil(2, &|c| {
        let manifest = c.join("manifest.json");
        let bytes = fs::read(&manifest).unwrap();
        fs::write(manifest, &bytes[..bytes.len() / 2]).unwrap();
    });
    spoil(3, &|c| {
        let manifest = c.join("manifest.json");
        let newer = fs::read_to_string(&manifest).unwrap().replace("\"version\": 1", "\"version\": 2");
        fs::write(manifest, newer).unwrap();
    });
    spoil(4, &|c| {
        let tensors = c.join("variables.safetensors");
        let bytes = fs::read(&tensors).unwrap();
        fs::write(tensors, &bytes[..bytes.len() - 100]).unwrap();
    });
    spoil(5, &|c| fs::remove_file(c.join("variables.safetensors")).unwrap());
    spoil(6, &|c| fs::remove_file(c.join("manifest.json")).unwrap());
    spoil(7, &|c| fs::write(c.join("variables.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap());
    let (found, warnings) = newest(dir.path());
    assert_eq!(found.unwrap().manifest.step, 1);
    let codes: Vec<&str> = warnings.iter().map(|w| &w[..5]).collect();
    assert_eq!(codes, ["C0003", "C0002", "C0002", "C0003", "C0002", "C0003"], "{warnings:#?}");
    assert!(warnings[4].contains("it is of format 2, and this program reads format 1"), "{}", warnings[4]);
    assert!(warnings[5].contains("manifest: EOF"), "{}", warnings[5]);
}

#[test]
fn a_checkpoint_of_another_program_leaves_the_session_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = session("1", "");
    train(&mut s, 0, 2);
    save(&s, dir.path(), 2, 3);
    let loaded = newest(dir.path()).0.unwrap();
    let mut other = session_of(network(80), "a=2", "hidden:a");
    let before = other.variables_hash().unwrap();
    let error = text(loaded.restore(&mut other));
    assert!(
        error.starts_with("C0005: the program's variable `first/kernel` is f32[in:10, hidden:80], and the checkpoint ")
    );
    assert!(error.contains("has f32 [10, 70]; resume with the configuration that it was written with"), "{error}");
    assert_eq!(other.variables_hash().unwrap(), before);
    // A program with one variable more.
    let mut p = ProgramBuilder::new();
    p.function("f", |g| g.output("y", &g.variable("extra", &[dim("in", 3)], mesh::program::Init::ones()))).unwrap();
    let error = text(loaded.restore(&mut session_of(p.finish().unwrap(), "1", "")));
    assert!(
        error.contains("variable `extra` is f32[in:3], and the checkpoint") && error.contains("lacks it"),
        "{error}"
    );
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let s = session("1", "");
    for step in [1, 2, 3, 4] {
        save(&s, dir.path(), step, 2);
    }
    assert_eq!(names(dir.path()), ["step-00000003", "step-00000004"]);
    // The same step again takes the old one's place.
    save(&s, dir.path(), 4, 2);
    assert_eq!(names(dir.path()), ["step-00000003", "step-00000004"]);
    // Back at an earlier step, the one just written stays, whatever later ones there are.
    save(&s, dir.path(), 2, 1);
    assert_eq!(names(dir.path()), ["step-00000002"]);
    // More digits are more steps, and what is no checkpoint is neither counted nor deleted.
    fs::create_dir(dir.path().join("step-notes")).unwrap();
    fs::create_dir(dir.path().join("best")).unwrap();
    save(&s, dir.path(), 99_999_999, 2);
    save(&s, dir.path(), 100_000_000, 2);
    assert_eq!(names(dir.path()), ["step-99999999", "step-100000000"]);
    assert!(dir.path().join("step-notes").exists() && dir.path().join("best").exists());
    assert_eq!(newest(dir.path()).0.unwrap().manifest.step, 100_000_000);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn a_writer_that_died_leaves_nothing_that_counts() {
    let dir = tempfile::tempdir().unwrap();
    let s = session("1", "");
    save(&s, dir.path(), 1, 3);
    fs::create_dir(dir.path().join(".writing-00000002-1")).unwrap();
    assert_eq!(names(dir.path()), ["step-00000001"]);
    assert_eq!(newest(dir.path()).1.len(), 0);
    assert!(text(newest(&dir.path().join("nowhere")).0).starts_with("C0004"));
}

#[test]
fn feeds_and_names_that_are_wrong_are_errors_with_the_nearest_name() {
    let mut s = session("a=2", "batch:a");
    let (image, labels) = (f32s(&batch(), 1).1, i32s(&batch()[..1], 2, 5).1);
    let mut run = |feeds: &[(&str, &Array)]| text(s.run("train", 0, feeds));
    assert_eq!(
        run(&[("imgae", &image), ("image", &image), ("labels", &labels)]),
        "error[P0004]: the function takes no feed `imgae`\n  help: did you mean `image`?"
    );
    assert_eq!(
        run(&[("image", &image)]),
        "error[P0004]: `train` is not fed `labels`\n  help: feed an array for each input"
    );
    let turned = f32s(&[dim("in", SIZES.0 + 1), dim("batch", 10)], 1).1;
    assert_eq!(
        run(&[("image", &turned), ("labels", &labels)]),
        "error[P0004]: feed `image` is f32[batch:10, in:10], and was given f32 of shape [11, 10]\n  help: give an array \
         of that type, its dimensions in that order"
    );
    assert!(
        run(&[("image", &image), ("labels", &image)]).contains("feed `labels` is i32[batch:10], and was given f32")
    );
    assert!(
        text(s.run("tarin", 0, &[])).contains("the program has no function `tarin`\n  help: did you mean `train`?")
    );
    let f = s.function("train").unwrap();
    assert!(text(s.fetch(f, "los")).ends_with("the function has no result `los`\n  help: did you mean `loss`?"));
    assert!(text(s.variable("first/kernal")).ends_with("help: did you mean `first/kernel`?"));
    let error = text(s.set_variable("first/kernel", &image));
    assert!(error.contains("variable `first/kernel` is f32[in:10, hidden:70], and was given f32 [10, 10]"), "{error}");
    // And it still runs.
    train(&mut s, 0, 1);
}

#[test]
fn a_variable_that_is_set_is_the_same_on_every_device() {
    let mut s = session("a=2,b=5", "hidden:a,batch:b");
    let value = f32s(&[dim("in", SIZES.0), dim("hidden", SIZES.1)], 9).1;
    s.set_variable("first/kernel", &value).unwrap();
    assert_eq!(s.variable("first/kernel").unwrap(), value);
    let mut whole = session("1", "");
    whole.set_variable("first/kernel", &value).unwrap();
    assert_eq!(train(&mut s, 0, 2), train(&mut whole, 0, 2));
}

/// The hash is that of names, types and bytes: any change of one element changes it.
#[test]
fn the_hash_of_the_variables_tells_them_apart() {
    let mut s = session("a=3", "batch:a");
    let before = s.variables_hash().unwrap();
    let name = Name::from("second/bias");
    let Array::F32(mut bias) = s.variable(&name).unwrap() else { unreachable!() };
    bias[[3]] += 1e-6;
    s.set_variable(&name, &Array::F32(bias)).unwrap();
    assert_ne!(s.variables_hash().unwrap(), before);
}
