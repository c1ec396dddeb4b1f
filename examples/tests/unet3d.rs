//! The program `unet3d` as people use it: started as a process, judged by what it prints, writes and exits with.

mod common;

use common::{Place, Ran, bits, ran};
use ndarray::{Array2, Array3};
use nifti::{NiftiHeader, NiftiObject, ReaderOptions, writer::WriterOptions};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Writes an array as a NIfTI file.
macro_rules! put {
    ($path:expr, $array:expr) => {
        WriterOptions::new($path).reference_header(&geometry()).write_nifti(&$array).unwrap()
    };
}

/// An image and labels of 3 classes: boxes of their own brightness.
fn volumes(place: &Place, shape: [usize; 3]) {
    let class = |i: usize, n: usize| (3 * i / n) as u8;
    let labels = Array3::from_shape_fn(shape, |(x, y, _)| class(x, shape[0]).min(class(y, shape[1])));
    let noise = |x: usize, y: usize, z: usize| ((x * 7 + y * 13 + z * 29) % 11) as i16;
    let image = Array3::from_shape_fn(shape, |(x, y, z)| 100 * (1 + i16::from(labels[[x, y, z]])) + noise(x, y, z));
    put!(place.path("image.nii.gz"), image);
    put!(place.path("labels.nii.gz"), labels);
}

/// A header with spacing and an oblique affine.
fn geometry() -> NiftiHeader {
    NiftiHeader {
        pixdim: [1.0, 1.5, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0],
        sform_code: 1,
        srow_x: [-1.5, 0.25, 0.0, 90.0],
        srow_y: [0.25, 2.0, 0.0, -126.0],
        srow_z: [0.0, 0.0, 3.0, -72.5],
        xyzt_units: 2,
        ..NiftiHeader::default()
    }
}

fn assert_peaks_as_predicted(rows: &[Value], mesh: &str, devices: usize) {
    let peaks = rows.last().unwrap()["devices"].as_array().unwrap();
    assert_eq!(peaks.len(), devices, "mesh {mesh}");
    for (d, p) in peaks.iter().enumerate() {
        assert!(p["peak_bytes_predicted"].as_u64().unwrap() > 0);
        assert_eq!(p["peak_bytes_predicted"], p["peak_bytes_measured"], "device {d} of mesh {mesh}");
    }
}

#[test]
fn training_gives_the_same_bits_on_every_mesh_and_the_memory_that_the_plan_says() {
    let place = Place::new();
    let train_in = |dtype: &str, name: &str, mesh: &str, batch: usize, devices: usize| {
        place.ok(&format!(
            "train --data phantom --crop 40x37x33 --base 4 --steps 20 --dropout 0.2 --augment --batch {batch} \
             --mesh {mesh} --dtype {dtype} --out {name}"
        ));
        let rows = place.rows(name);
        assert_eq!(rows.len(), 20);
        let hash = rows[19]["variables_hash"].as_str().unwrap();
        assert_eq!(hash.len(), 64);
        assert!(rows.iter().all(|r| r["loss_bits"].as_str().unwrap().len() == 8));
        assert_peaks_as_predicted(&rows, mesh, devices);
        rows
    };
    let train = |name: &str, mesh: &str, batch, devices| train_in("f32", name, mesh, batch, devices);
    let single = train("single", "1", 1, 1);
    let losses: BTreeSet<&str> = single.iter().map(|r| r["loss_bits"].as_str().unwrap()).collect();
    assert_eq!(losses.len(), 20, "every step is another one");
    let meshes = [("x=2", 2), ("y=2", 2), ("z=2", 2), ("x=3", 3), ("x=2,y=2", 4), ("x=2,y=2,z=2", 8)];
    for (i, (mesh, devices)) in meshes.into_iter().enumerate() {
        let rows = train(&format!("split{i}"), mesh, 1, devices);
        assert_eq!(bits(&rows), bits(&single), "mesh {mesh}");
    }
    let (pair, split) = (train("pair", "1", 2, 1), train("split-pair", "data=2,x=2", 2, 4));
    assert_eq!(bits(&split), bits(&pair), "two views on the mesh data=2,x=2");
    assert_ne!(pair[19]["loss_bits"], single[19]["loss_bits"]);
    for dtype in ["bf16", "f16"] {
        let half = train_in(dtype, &format!("half-{dtype}"), "1", 1, 1);
        for (i, (mesh, devices)) in [("z=3", 3), ("x=2,y=2,z=2", 8)].into_iter().enumerate() {
            let rows = train_in(dtype, &format!("split-{dtype}{i}"), mesh, 1, devices);
            assert_eq!(bits(&rows), bits(&half), "{dtype} on the mesh {mesh}");
        }
        let [first, loss, wide] = [&half[0], &half[19], &single[19]].map(|row| row["loss"].as_f64().unwrap());
        assert!((loss / wide - 1.0).abs() < 0.05 && loss != wide, "{dtype} {loss}, f32 {wide}");
        assert!(loss < 0.8 * first, "{dtype} {loss} after {first}");
        assert_eq!(half[19]["loss_scale"].as_f64(), (dtype == "f16").then_some(65_536.0), "{dtype}");
    }
}

const SMALL: &str = "--data phantom --crop 16x12x10 --base 4 --dropout 0.2 --augment";

#[test]
fn a_resumed_run_is_the_run_that_was_never_stopped() {
    let place = Place::new();
    let keys = "--set checkpoint_every=3";
    place.ok(&format!("train {SMALL} {keys} --steps 6 --mesh x=2 --out whole"));
    let first = place.ok(&format!("train {SMALL} {keys} --steps 3 --mesh 1 --out parts"));
    assert!(first.err.contains("step     3/3"), "plain lines where there is no terminal:\n{}", first.err);

    let before = fs::read(place.path("parts/metrics.jsonl")).unwrap();
    place.fails(&format!("train {SMALL} --out parts"), 2, &["error[U0005]: parts holds a run already", "--resume"]);
    assert_eq!(fs::read(place.path("parts/metrics.jsonl")).unwrap(), before, "the run is left as it was");

    // The run's own configuration holds, but for what is said anew.
    let resumed = place.ok("train --resume --steps 6 --mesh y=2,z=2 --out parts");
    assert!(resumed.err.contains("resumed from step-00000003-epoch-1 with 3 steps done"), "{}", resumed.err);
    assert!(resumed.err.contains(r#"mesh "1" -> "y=2,z=2", steps 3 -> 6"#), "{}", resumed.err);
    let (whole, parts) = (place.rows("whole"), place.rows("parts"));
    let steps: Vec<u64> = parts.iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 1, 2, 3, 4, 5], "each step once");
    assert_eq!(bits(&parts)[3..], bits(&whole)[3..]);
    assert_eq!(bits(&parts)[..2], bits(&whole)[..2]);
    // Step 2 was the last one of its part, and so has a hash there.
    assert_eq!(bits(&parts)[2][..4], bits(&whole)[2][..4]);
    assert_eq!(
        fs::read(place.path("parts/prediction.nii.gz")).unwrap(),
        fs::read(place.path("whole/prediction.nii.gz")).unwrap()
    );

    // A damaged checkpoint is passed over, and the one before it leads to the same end.
    let newest = place.path("parts/checkpoints/step-00000006-epoch-2/shard-00003.safetensors");
    let mut bytes = fs::read(&newest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&newest, &bytes).unwrap();
    let again = place.ok("train --resume --mesh x=2 --out parts");
    assert!(again.err.contains("passed over: W0050") && again.err.contains("step-00000006"), "{}", again.err);
    assert!(again.err.contains("with 3 steps done"), "{}", again.err);
    assert_eq!(bits(&place.rows("parts"))[3..], bits(&whole)[3..]);

    // Of another program, or with none left, it is an error.
    place.fails("train --resume --base 8 --out parts", 4, &["error[W0051]", "encoder.0/conv.0/filter"]);
    for folder in fs::read_dir(place.path("parts/checkpoints")).unwrap() {
        fs::write(folder.unwrap().path().join("manifest.json"), "{").unwrap();
    }
    place.fails("train --resume --out parts", 4, &["passed over", "error[C0004]: there is no good checkpoint"]);
    place.fails("train --resume --out nowhere", 4, &["error[C0004]"]);
}

#[test]
fn mistakes_on_the_command_line_name_their_place_and_what_to_do() {
    let place = Place::new();
    let plan = |rest: &str| format!("plan --data phantom --crop 16 --base 4 {rest}");
    place.fails(
        &plan("--set optimiser=adam"),
        2,
        &["error[U0001]: there is no key `optimiser`", "--> --set optimiser=adam", "help: did you mean `optimizer`?"],
    );
    place.fails(&plan("--set base=wide"), 2, &["error[U0002]: `base` cannot be \"wide\"", "--> --set base=wide"]);
    place.fails(&plan("--set base"), 2, &["error[U0004]", "key=value"]);
    place.fails(&plan("--layout x:w --mesh x=2"), 2, &["error[L0002]", "`w`", "did you mean `x`?"]);
    place.fails(&plan("--layout depth:x --mesh x=2"), 2, &["error[L0003]", "`depth`", "the dimensions are batch,"]);
    place.fails(&plan("--layout x=x"), 2, &["error[L0001]", "dimension:axis"]);
    place.fails(&plan("--layout x:x,x:y"), 2, &["error[L0004]", "two rules"]);
    place.fails(&plan("--mesh x=2,y=2 --devices 3"), 2, &["error[L0006]", "4 places", "3 devices"]);
    place.fails(&plan("--mesh x2"), 2, &["error[L0001]", "`x=2`"]);
    place.fails(&plan("--devices 0"), 2, &["--devices 0"]);
    place.fails(
        &plan("--mesh x=4"),
        2,
        &["error[L0007]: dimension `x` (size 2, 2 chunks)", "--> examples/src/unet3d/model.rs:", "x=2 or less"],
    );
    place.fails(&plan("--mesh data=2"), 2, &["error[L0007]: dimension `batch` (size 1", "do not split `batch`"]);
    place.fails(&plan("--dtype f8"), 2, &["f8", "f32, bf16, f16"]);
    place.fails(&plan("--dropout 1"), 2, &["--dropout 1", "help:"]);
    place.fails(&plan("--rate nan"), 2, &["--rate NaN"]);
    place.fails("plan --data phantom --norm group --base 6", 2, &["4 groups", "--base 6"]);
    place.fails(&plan("--size 10x10"), 2, &["--size 10x10 is no size"]);
    place.fails(&plan("--memory lots"), 2, &["--memory lots", "2GiB"]);
    place.fails(&plan("--seed 18446744073709551615"), 2, &["--seed"]);
    place.fails("plan --data phantom --levels 0", 2, &["--levels 0", "from 1 to 10"]);
    place.fails("plan --data phantom --crop 16 --levels 8", 2, &["--levels 8", "16x16x16", "fewer levels"]);
    place.fails("plan --data phantom --crop 500", 2, &["--crop 500x500x500 is larger than the volume, 122x101x112"]);
    place.fails("plan --labels l.nii", 2, &["--labels l.nii has no image", "--data"]);
    place.fails("plan --data scan.nii", 2, &["--data scan.nii has no labels", "--labels"]);
    place.fails("eval --out nothing", 2, &["error[U0005]: nothing holds no run"]);

    fs::write(place.path("a.toml"), "base = 4\n\nstepz = 3\n").unwrap();
    place.fails("plan --config a.toml", 2, &["no key `stepz`", "--> a.toml:3", "did you mean `steps`?"]);
    fs::write(place.path("b.toml"), "base = 4\nnorm = batch\n").unwrap();
    place.fails("plan --config b.toml", 2, &["error[U0003]", "b.toml:2", "no TOML"]);
    fs::write(place.path("c.toml"), "mesh = \"x=2\"\n").unwrap();
    place.fails("plan --config c.toml --devices 4", 2, &["error[L0006]"]);
    place.fails("plan --config missing.toml", 2, &["error[U0003]", "missing.toml"]);
}

#[test]
fn a_plan_over_the_memory_allowed_names_the_largest_tensors() {
    let place = Place::new();
    let budget = "--memory 8MiB --recompute none";
    let r = place.run(&format!("train --data phantom --crop 32 --base 8 --mesh x=2 {budget} --out run"));
    assert_eq!(r.code, 2, "{}", r.err);
    assert!(
        r.err.contains("error[M0001]: device ") && r.err.contains("but may use 8.0 MiB (8,388,608 bytes)"),
        "{}",
        r.err
    );
    let largest: Vec<&str> = r.err.lines().filter(|l| l.contains(" bytes): ")).collect();
    assert_eq!(largest.len(), 3, "{}", r.err);
    assert!(largest.iter().all(|l| l.contains("(examples/src/unet3d/model.rs:")), "{}", r.err);
    assert!(r.err.contains("in function `train`") && r.err.contains("help: split more dimensions"), "{}", r.err);
    assert!(!place.path("run").exists(), "nothing is written for a run that cannot be");
    place.ok("plan --data phantom --crop 32 --base 8 --mesh x=2 --memory 1GiB");
}

#[test]
fn recomputing_changes_no_bit_and_takes_the_memory_that_the_plan_says() {
    let place = Place::new();
    let train = |name: &str, mesh: &str, devices: usize, blocks: &str| {
        place.ok(&format!(
            "train --data phantom --crop 20x18x16 --base 4 --steps 3 --dropout 0.2 --mesh {mesh} --recompute {blocks} \
             --out {name}"
        ));
        let rows = place.rows(name);
        assert_peaks_as_predicted(&rows, mesh, devices);
        rows
    };
    let all = "encoder.0,encoder.1,encoder.2,encoder.3,decoder.2,decoder.1,decoder.0";
    let kept = train("kept", "1", 1, "none");
    let peak = |rows: &[Value]| rows[2]["devices"][0]["peak_bytes_predicted"].as_u64().unwrap();
    assert!(peak(&train("all", "1", 1, all)) < peak(&kept));
    for (i, blocks) in all.split(',').chain([all, "encoder.0,decoder.1,decoder.0"]).enumerate() {
        let rows = train(&format!("split{i}"), "x=2,y=2", 4, blocks);
        assert_eq!(bits(&rows), bits(&kept), "{blocks} recomputed");
    }
}

#[test]
fn a_budget_that_only_fits_with_recomputation_trains_and_says_so() {
    let place = Place::new();
    let run = "--data phantom --crop 32 --base 8 --mesh x=2 --steps 2";
    place.ok(&format!("train {run} --out kept"));
    let kept = place.rows("kept");
    let peak = |rows: &[Value]| rows[1]["devices"][0]["peak_bytes_measured"].as_u64().unwrap();
    let budget = peak(&kept) * 97 / 100;

    let r = place.ok(&format!("train {run} --memory {budget} --out fits"));
    let says = r.err.lines().find(|l| l.starts_with("memory   recomputes ")).unwrap_or_else(|| panic!("{}", r.err));
    assert!(says.contains(" % more FLOPs a step, at most ") && says.contains(" on a device instead of "), "{says}");
    let fits = place.rows("fits");
    assert_eq!(bits(&fits), bits(&kept));
    assert!(peak(&fits) <= budget, "{} of {budget}", peak(&fits));
    assert_peaks_as_predicted(&fits, "x=2", 2);

    // A plan says the same, and what is decided by hand holds.
    let plan = place.ok(&format!("plan {run} --memory {budget}")).out;
    assert!(plan.contains(says), "{plan}");
    place.fails(&format!("plan {run} --memory {budget} --recompute none"), 2, &["error[M0001]"]);
    place.fails(&format!("plan {run} --recompute encoder.9"), 2, &["no", "`encoder.9`", "did you mean `encoder."]);
    place.ok(&format!("plan {run} --memory {}", peak(&kept)));

    // A run goes on with another choice.
    let resumed = place.ok("train --resume --steps 4 --recompute decoder.0 --memory 1GiB --out fits");
    assert!(resumed.err.contains("memory   recomputes decoder.0: ") && !resumed.err.contains("recompute \""));
    place.ok(&format!("train {run} --steps 4 --out whole").replacen("--steps 2 ", "", 1));
    assert_eq!(bits(&place.rows("fits"))[2..], bits(&place.rows("whole"))[2..]);

    let texts = ["error[M0001]: device ", "no choice of blocks to recompute needs less; this is with "];
    place.fails(&format!("train {run} --memory 4MiB --out never"), 2, &texts);
    assert!(!place.path("never").exists(), "nothing is written for a run that cannot be");
}

#[test]
fn unusable_files_are_refused_with_the_reason() {
    let place = Place::new();
    volumes(&place, [20, 18, 16]);
    let train = "train --base 4 --mesh 1 --steps 1 --out run";
    let with = |image: &str, labels: &str| format!("{train} --data {image} --labels {labels}");
    place.fails(&with("none.nii.gz", "labels.nii.gz"), 3, &["error[D0001]: cannot read none.nii.gz"]);
    place.fails(&with("image.nii.gz", "none.nii"), 3, &["error[D0001]: cannot read none.nii"]);

    let bytes = fs::read(place.path("image.nii.gz")).unwrap();
    fs::write(place.path("cut.nii.gz"), &bytes[..bytes.len() / 2]).unwrap();
    place.fails(&with("cut.nii.gz", "labels.nii.gz"), 3, &["error[D0002]: cut.nii.gz", "damaged or cut short"]);
    fs::write(place.path("text.nii.gz"), "no volume").unwrap();
    place.fails(&with("text.nii.gz", "labels.nii.gz"), 3, &["error[D0002]: text.nii.gz"]);

    put!(place.path("flat.nii"), Array2::<i16>::ones((20, 18)));
    place.fails(&with("flat.nii", "labels.nii.gz"), 3, &["[20, 18]", "3-D"]);
    put!(place.path("other.nii"), Array3::<u8>::zeros((20, 18, 15)));
    place.fails(
        &with("image.nii.gz", "other.nii"),
        3,
        &["image.nii.gz is 20x18x16 voxels", "other.nii are 20x18x15", "help:"],
    );
    place.fails("plan --data image.nii.gz --labels other.nii", 3, &["20x18x15"]);
    let mut half = Array3::<f32>::zeros((20, 18, 16));
    half[[1, 2, 3]] = 0.5;
    put!(place.path("half.nii"), half);
    place.fails(&with("image.nii.gz", "half.nii"), 3, &["label at (1, 2, 3) is 0.5", "whole numbers"]);
    put!(place.path("many.nii"), Array3::<i16>::from_elem((20, 18, 16), 300));
    place.fails(&with("image.nii.gz", "many.nii"), 3, &["many.nii", "labels up to 300"]);
    half[[1, 2, 3]] = f32::NAN;
    put!(place.path("nan.nii"), half);
    place.fails(&with("nan.nii", "labels.nii.gz"), 3, &["nan.nii", "such as NaN at (1, 2, 3)"]);
    assert!(!place.path("run").exists());
}

#[test]
fn volumes_too_small_to_pool_three_times_are_trained_whole_and_cannot_be_split() {
    let place = Place::new();
    let r = place.ok("train --data phantom --crop 4 --base 4 --mesh 1 --steps 2 --out tiny");
    assert!(r.err.contains("levels   4x4x4, 2x2x2, 1x1x1, 1x1x1"), "{}", r.err);
    place.fails(
        "train --data phantom --crop 4 --base 4 --mesh x=2 --out split",
        2,
        &["error[L0007]", "do not split `x`"],
    );
    let r = place.ok("train --data phantom --crop 9x7x5 --base 4 --mesh 1 --steps 2 --out odd");
    assert!(r.err.contains("9x7x5, 5x4x3, 3x2x2, 2x1x1; odd extents stay as they are"), "{}", r.err);
}

#[test]
fn without_pip_the_phantom_stands_in_unless_the_ct_was_asked_for() {
    let place = Place::new();
    fs::create_dir(place.path("bin")).unwrap();
    let run = |args: &str| {
        ran(place.command(args).env("PATH", place.path("bin")).env("HOME", place.path("home")).output().unwrap())
    };
    let r = run("train --crop 12 --base 4 --mesh 1 --steps 1 --out run");
    assert_eq!(r.code, 0, "{}", r.err);
    let told: Vec<&str> = r.err.lines().filter(|l| l.contains("phantom") && l.contains("pip")).collect();
    assert_eq!(told.len(), 1, "{}", r.err);
    assert!(r.err.contains("data     phantom, 122x101x112 voxels, cut to the 12x12x12"), "{}", r.err);
    let r = run("train --data ct --crop 12 --base 4 --mesh 1 --steps 1 --out ct");
    assert_eq!(r.code, 3, "{}", r.err);
    assert!(r.err.contains("error[D0003]") && r.err.contains("install Python with pip"), "{}", r.err);
    // A plan needs the CT's extents only.
    assert_eq!(run("plan --data ct --base 4").code, 0);
    assert!(!place.path("ct").exists());
}

fn header_of(path: &Path) -> (NiftiHeader, Vec<u16>) {
    let object = ReaderOptions::new().read_file(path).unwrap();
    let header = object.header().clone();
    let dims = header.dim[1..=usize::from(header.dim[0])].to_vec();
    (header, dims)
}

#[test]
fn a_run_folder_holds_what_its_help_says() {
    let place = Place::new();
    volumes(&place, [30, 26, 21]);
    let data = "--data image.nii.gz --labels labels.nii.gz";
    for (name, cut) in [("whole", ""), ("cut", "--size 24x24x20 --crop 16x20x16")] {
        let trained = place.ok(&format!("train {data} {cut} --base 4 --mesh x=2 --steps 12 --rate 0.01 --out {name}"));
        let run = place.path(name);
        // The prediction overlays the file.
        let (header, dims) = header_of(&run.join("prediction.nii.gz"));
        assert_eq!(dims, [30, 26, 21]);
        let like = geometry();
        assert_eq!((header.srow_x, header.srow_y, header.srow_z), (like.srow_x, like.srow_y, like.srow_z));
        assert_eq!((header.sform_code, header.xyzt_units), (1, 2));
        assert_eq!(header.pixdim[1..4], like.pixdim[1..4]);
        // The picture is one.
        let picture = image::open(run.join("prediction.png")).unwrap().to_rgb8();
        let colours: BTreeSet<[u8; 3]> = picture.pixels().map(|p| p.0).collect();
        assert!(picture.width() > 200 && picture.height() > 200 && colours.len() > 30, "{} colours", colours.len());
        assert!(image::open(run.join("loss.png")).is_ok());
        assert_eq!(fs::read_dir(run.join("tensorboard")).unwrap().count(), 1, "an event file");
        let row = place.rows(name).pop().unwrap();
        assert!(row["loss"].is_f64() && row["grad_norm"].is_f64() && row["step_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(row["sample_ids"], serde_json::json!([11]));

        // `eval` of the folder says the same, on any mesh, and makes the same prediction.
        let prediction = fs::read(run.join("prediction.nii.gz")).unwrap();
        fs::remove_file(run.join("prediction.nii.gz")).unwrap();
        let judged = place.ok(&format!("eval --mesh y=2,z=2 --out {name}"));
        let dice = |r: &Ran| r.out.lines().filter(|l| l.starts_with("dice")).map(String::from).collect::<Vec<_>>();
        assert_eq!(dice(&judged), dice(&trained));
        assert_eq!(dice(&judged).len(), 4, "a class each, and their mean:\n{}", judged.out);
        assert_eq!(fs::read(run.join("prediction.nii.gz")).unwrap(), prediction);
    }
    // The configuration reads back.
    place.ok("train --config cut/config.toml --steps 1 --out again");
    let config = |run: &str| fs::read_to_string(place.path(run).join("config.toml")).unwrap();
    assert_eq!(config("again"), config("cut").replace("steps = 12", "steps = 1"));
    place.ok("train --config cut/config.toml --set steps=12 --out same");
    assert_eq!(bits(&place.rows("same")), bits(&place.rows("cut")));
}

#[test]
fn a_plan_says_what_a_run_would_take() {
    let place = Place::new();
    volumes(&place, [30, 26, 21]);
    let r = place.ok("plan --data image.nii.gz --labels labels.nii.gz --size 64 --base 32 --mesh x=2");
    // Behind the findings, if there are any, stand lines of the model.
    let lines = r.out.lines().take_while(|l| !l.starts_with("findings:"));
    let headers: Vec<&str> = lines.filter_map(|l| l.split_once(':')).map(|(h, _)| h).collect();
    let headers: Vec<&str> = headers.into_iter().filter(|h| !h.starts_with(' ') && !h.contains("  ")).collect();
    assert_eq!(headers, ["devices", "variables", "activations", "communication", "memory", "FLOPs"], "{}", r.out);
    let says = |text: &str| assert!(r.out.contains(text), "no `{text}` in\n{}", r.out);
    says("5,600,960 parameters");
    says("resampled to 64x64x64");
    says("mesh     x=2 (2 devices, ");
    // Forward and both gradients of the published network, but for the image's own gradient.
    says("335,561,097,216");
    says("112,004,694,016");
    let line = |start: &str| {
        let found = r.out.lines().find(|l| l.trim_start().starts_with(start));
        found.unwrap_or_else(|| panic!("no `{start}` in\n{}", r.out)).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    // A plane of 64x64 voxels with 32 channels in each direction.
    assert_eq!(line("encoder.0/conv.1: halo for conv "), "encoder.0/conv.1: halo for conv 1 2 1.0 MiB 512.0 KiB");
    assert_eq!(line("encoder.0/conv.0: halo for conv "), "encoder.0/conv.0: halo for conv 1 2 32.0 KiB 16.0 KiB");
    says("halo of decoder.0");
    says("alive at its fullest step");
    assert!(line("0 ").contains("x=0"), "{}", r.out);
}

#[test]
fn planning_a_volume_of_512_cubed_takes_neither_its_memory_nor_long() {
    let place = Place::new();
    let begun = std::time::Instant::now();
    let r = place.ok("plan --size 512 --base 32 --mesh x=2,y=2,z=4");
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    assert!(r.out.contains("levels   512x512x512, 256x256x256, 128x128x128, 64x64x64\n"), "{}", r.out);
    assert!(r.out.contains("171,858,821,382,144"), "{}", r.out);
}

#[test]
fn every_norm_and_optimizer_trains() {
    let place = Place::new();
    let cases = [("batch", "adam"), ("instance", "adam"), ("group", "adam"), ("batch", "adafactor"), ("batch", "sgd")];
    for (norm, optimizer) in cases {
        let rate = if optimizer == "sgd" { "0.05" } else { "0.01" };
        let name = format!("{norm}-{optimizer}");
        place.ok(&format!(
            "train --data phantom --size 24 --base 4 --mesh x=2 --steps 15 --norm {norm} --optimizer {optimizer} \
             --rate {rate} --out {name}"
        ));
        let rows = place.rows(&name);
        let loss = |i: usize| rows[i]["loss"].as_f64().unwrap();
        assert!(loss(14) < 0.85 * loss(0), "{name}: {} to {}", loss(0), loss(14));
    }
}

#[test]
fn a_run_that_diverges_says_so_and_keeps_no_broken_checkpoint() {
    let place = Place::new();
    let args = "train --data phantom --crop 12 --base 4 --mesh 1 --steps 8 --rate 1e30 --out run";
    let texts = ["error[U0008]: training has diverged: at step ", "  --> step ", "help: try a smaller learning rate"];
    place.fails(args, 1, &texts);
    assert!(!place.path("run/checkpoints").exists());
}

#[test]
fn help_tells_options_examples_and_exit_codes() {
    let place = Place::new();
    let help = place.ok("--help").out;
    for text in ["Examples:", "Exit codes:", "unet3d train --resume", "  4  "] {
        assert!(help.contains(text), "{help}");
    }
    for command in ["train", "eval", "plan"] {
        let help = place.ok(&format!("{command} --help")).out;
        for option in
            "mesh layout devices threads memory recompute base norm dropout dtype steps optimizer rate batch augment seed \
                       data labels size crop config set out resume"
                .split_whitespace()
        {
            assert!(help.contains(&format!("--{option}")), "no --{option} in\n{help}");
        }
        for key in ["organ_weight", "checkpoint_every", "keep", "metrics.jsonl"] {
            assert!(help.contains(key), "no {key} in\n{help}");
        }
    }
}

#[test]
fn worker_processes_give_the_bits_of_one_process_by_either_transport() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["--data", "phantom", "--crop", "24x21x19", "--base", "4", "--steps", "20", "--dropout", "0.2"];
    let hash = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let mut args = vec!["train", "--mesh", "x=2,y=2", "--out", out.to_str().unwrap()];
        args.extend(small);
        args.extend(more);
        let done = Command::new(env!("CARGO_BIN_EXE_unet3d")).args(args).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let rows = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let rows: Vec<serde_json::Value> = rows.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let losses: Vec<String> = rows.iter().map(|r| r["loss_bits"].to_string()).collect();
        for device in rows[rows.len() - 1]["devices"].as_array().unwrap() {
            assert_eq!(device["peak_bytes_predicted"], device["peak_bytes_measured"]);
        }
        (losses, rows[rows.len() - 1]["variables_hash"].to_string())
    };
    let here = hash("here", &[]);
    assert_eq!(here.0.len(), 20);
    assert_eq!(hash("rings", &["--workers", "4"]), here);
    assert_eq!(hash("grpc", &["--workers", "4", "--transport", "grpc"]), here);
    assert_eq!(hash("pairs", &["--workers", "2"]), here);
    assert_eq!(hash("grpc-pairs", &["--workers", "2", "--transport", "grpc"]), here);
}

#[test]
fn workers_that_cannot_share_the_devices_out_are_refused_before_any_starts() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let run = |args: &[&str]| {
        let common =
            ["train", "--data", "phantom", "--crop", "16", "--mesh", "x=2,y=2", "--out", out.to_str().unwrap()];
        let done = Command::new(env!("CARGO_BIN_EXE_unet3d")).args(common).args(args).output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (code, text) = run(&["--workers", "3"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("cannot share out the 4 devices") && text.contains("divisor"), "{text}");
    let (code, text) = run(&["--coordinator", "http://127.0.0.1:9"]);
    assert_eq!(code, Some(75), "{text}");
    assert!(text.contains("the coordinator http://127.0.0.1:9 is not there"), "{text}");
    let (code, text) = run(&["--coordinator", "https://127.0.0.1:9"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("error[W0075]: ") && text.contains("name their folder with --tls"), "{text}");
    let (code, text) = run(&["--coordinator", "127.0.0.1:9", "--tls", dir.path().to_str().unwrap()]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("error[W0070]: cannot read ") && text.contains("ca.pem"), "{text}");
    assert!(!out.join("metrics.jsonl").exists());
}

#[test]
fn an_instruction_set_that_there_is_not_is_refused() {
    let place = Place::of(env!("CARGO_BIN_EXE_unet3d"));
    let mut command = place.command("train --data phantom --crop 16 --mesh 1 --steps 1");
    let r = ran(command.env("MESH_ISA", "avx3").output().unwrap());
    assert_ne!(r.code, 0, "{}", r.out);
    let says = |text: &str| assert!(r.err.contains(text), "it does not say `{text}`:\n{}", r.err);
    ["W0034", "MESH_ISA=avx3", "avx512 or amx"].into_iter().for_each(says);
}

/// A process that ends with the test.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_cluster_with_certificates_and_configuration_files_gives_the_bits_of_one_process() {
    use std::io::{BufRead, BufReader};
    let place = Place::new();
    place.ok("coordinator certs init certs");
    place.ok("coordinator certs init others");
    let write = |name: &str, text: &str| fs::write(place.path(name), text).unwrap();
    write("coordinator.toml", "listen = \"127.0.0.1:0\"\ntls = \"certs\"\nwait = 20\n");
    let mut command = place.command("coordinator --config coordinator.toml");
    command.env("MESH_LOG", "error");
    let mut coordinator = Running(command.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(coordinator.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.strip_prefix("listening on ").unwrap().trim().to_string();

    // The file says 1 device, the environment another folder, and the command line wins.
    write("worker.toml", &format!("join = \"{address}\"\ntls = \"certs\"\ndevices = \"cpu:1\"\nthreads = 1\n"));
    let r = ran(place.command("worker --config worker.toml").env("MESH_TLS", "others").output().unwrap());
    assert_eq!(r.code, 2, "{}", r.err);
    assert!(r.err.contains("error[W0030]: the coordinator ") && r.err.contains("certificate"), "{}", r.err);
    let mut command = place.command("worker --config worker.toml --devices cpu:2 --tls certs");
    let _worker = Running(command.env("MESH_TLS", "others").env("MESH_LOG", "warn").spawn().unwrap());

    let train = format!("train {SMALL} --steps 3 --mesh x=2 --threads 1");
    place.ok(&format!("{train} --out here"));
    place.ok(&format!("{train} --coordinator {address} --tls certs --out there"));
    assert_eq!(bits(&place.rows("there")), bits(&place.rows("here")));
    let there = format!("{train} --out not --coordinator");
    place.fails(&format!("{there} http://{address} --tls certs"), 2, &["error[W0075]", "means no encryption"]);
    place.fails(&format!("{there} {address} --tls others"), 2, &["error[C0035]", "certificate"]);
    place.fails(&format!("{there} {address}"), 75, &["error[C0002]", "is not there"]);
    place.fails("coordinator --listen 0.0.0.0:0", 2, &["error[W0033]", "--tls"]);
    place.fails("worker --join 127.0.0.1:9 --listen 0.0.0.0:0", 2, &["error[W0033]", "--insecure"]);
    place.fails("worker --help", 0, &[]);
}
