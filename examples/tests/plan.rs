//! The `plan` command of `unet3d` and `bert`, as a process: machines and formats.

mod common;

use common::Place;
use std::fs;

const UNET: &str = "plan --data phantom --crop 32 --base 4";
const BERT: &str = "plan --size 2x64x2 --seq 32 --batch 16";

fn bert() -> Place {
    Place::of(env!("CARGO_BIN_EXE_bert"))
}

#[test]
fn a_plan_for_a_machine_says_how_long_a_step_takes_and_keeps_to_its_memory() {
    let place = Place::new();
    let plan = place.ok(&format!("{UNET} --machine h100x16")).out;
    for text in ["mesh    x=4,y=2,z=2", "s a step on h100", "slowest, ", "kind of work", "along the axis", "conv"] {
        assert!(plan.contains(text), "no `{text}` in\n{plan}");
    }
    assert!(!plan.contains("share one"), "{plan}");
    // A mesh that is given has to have the machine's devices.
    place.fails(&format!("{UNET} --machine h100x16 --mesh x=2"), 2, &["error[L0006]", "16 devices"]);
    assert!(place.ok(&format!("{UNET} --machine h100x16 --devices 2")).out.contains("mesh    x=2\n"));
    // Without a machine nothing is said of time.
    assert!(!place.ok(UNET).out.contains("\ntime: "));
    let bert = bert();
    let plan = bert.ok(&format!("{BERT} --machine a100x4 --method share-unshare")).out;
    assert_eq!(plan.matches("s a step on a100, as estimated").count(), 2, "{plan}");
}

#[test]
fn a_machine_from_a_file_has_its_own_memory_and_shares_its_devices() {
    let place = Place::new();
    let h100 = mesh::machine::Machine::named("h100").unwrap().0;
    let write = |name: &str, text: &str| fs::write(place.path(name), text).unwrap();
    let mine = mesh::machine::Machine { name: "mine".into(), devices: 2, hosts: Some(1), ..h100 };
    write("mine.toml", &mine.to_toml());
    let plan = place.ok(&format!("{UNET} --machine mine.toml --mesh x=2,y=2")).out;
    assert!(plan.contains("a step on mine") && plan.contains("2.0 share one, and its memory"), "{plan}");
    // Four devices of one with 16 MiB have 8 MiB each.
    write("small.toml", &mesh::machine::Machine { memory: 16 << 20, ..mine }.to_toml());
    let refused = ["error[M0001]", "but may use 8.0 MiB"];
    place.fails(&format!("{UNET} --batch 8 --machine small.toml --mesh x=2,y=2"), 2, &refused);
    place.ok(&format!("{UNET} --batch 8 --machine small.toml --mesh x=2,y=2 --memory 1GiB"));
}

#[test]
fn what_is_no_machine_is_refused() {
    let place = Place::new();
    fs::write(place.path("empty.toml"), "").unwrap();
    fs::write(place.path("long.toml"), "#".repeat(1 << 21)).unwrap();
    fs::write(place.path("bytes.toml"), [0xff, 0xfe]).unwrap();
    for (machine, texts) in [
        ("h10x4", ["error[L0001]", "did you mean `h100`?"]),
        ("h100x0", ["error[L0001]", "with a number of devices"]),
        ("h100x5000", ["error[U0004]", "--devices 5000"]),
        ("empty.toml", ["error[L0001]", "in the file `empty.toml`"]),
        ("long.toml", ["error[L0001]", "at most 65536 bytes"]),
        ("bytes.toml", ["error[U0004]", "--machine bytes.toml cannot be read"]),
        ("absent.toml", ["error[U0004]", "coordinator calibrate"]),
    ] {
        place.fails(&format!("{UNET} --machine {machine}"), 2, &texts);
    }
    bert().fails(&format!("{BERT} --machine v100x8"), 2, &["error[L0001]", "h100x16"]);
}

#[test]
fn a_plan_is_json_and_a_page_too() {
    let place = Place::new();
    let json = place.ok(&format!("{UNET} --machine h100x4 --format json")).out;
    let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&plan["version"], &plan["mesh"], &plan["devices"]), (&1.into(), &"x=2,y=2".into(), &4.into()));
    assert!(plan["plans"][0]["groups"][0]["steps"][0]["seconds"].as_f64().unwrap() > 0.0);
    assert!(plan["plans"][0]["levels"].as_array().unwrap().iter().any(|l| l["name"] == "encoder.0"));
    let page = place.ok(&format!("{UNET} --mesh x=2,y=2,z=2 --format html")).out;
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    assert!(!page.contains("Time on"));
    let json = bert().ok(&format!("{BERT} --method share-unshare --format json")).out;
    let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(plan["plans"].as_array().unwrap().len(), 2);
    place.fails(&format!("{UNET} --format xml"), 2, &["xml", "json"]);
}

#[test]
fn the_difference_of_two_plans_is_told_and_bad_files_are_refused() {
    for (place, plan) in [(Place::new(), UNET), (bert(), BERT)] {
        for (file, more) in [("a.json", ""), ("b.json", "--devices 2 --machine h100x2"), ("c.json", "--dtype bf16")] {
            fs::write(place.path(file), place.ok(&format!("{plan} {more} --format json")).out).unwrap();
        }
        assert_eq!(place.ok("plan --diff a.json a.json").out, "no difference\n");
        let text = place.ok("plan --diff a.json b.json").out;
        assert!(text.contains("mesh") && text.contains("h100") && text.contains("peak of a device"), "{text}");
        let text = place.ok("plan --diff a.json c.json").out;
        assert!(!text.contains("mesh") && text.contains("peak of a device") && text.contains(" %)"), "{text}");
        let json = fs::read_to_string(place.path("a.json")).unwrap();
        fs::write(place.path("next.json"), json.replace("{\"version\":1,", "{\"version\":2,")).unwrap();
        fs::write(place.path("cut.json"), &json[..json.len() / 2]).unwrap();
        fs::write(place.path("bytes.json"), [0xff]).unwrap();
        for (file, texts) in [
            ("next.json", ["error[L0001]", "`version 2` is not"]),
            ("cut.json", ["error[L0001]", "in the file `cut.json`"]),
            ("bytes.json", ["error[U0004]", "--diff bytes.json cannot be read"]),
            ("absent.json", ["error[U0004]", "plan --format json"]),
        ] {
            place.fails(&format!("plan --diff a.json {file}"), 2, &texts);
        }
        place.fails("plan --diff a.json", 2, &["--diff"]);
        place.fails("plan --diff a.json b.json --machine h100", 2, &["cannot be used with"]);
    }
}

#[test]
fn findings_are_in_the_text_the_json_and_the_page() {
    let place = Place::new();
    let odd = format!("{UNET} --mesh x=2,w=2 --layout x:x");
    let text = place.ok(&odd).out;
    for says in [
        "findings: ",
        "warning[L0101]: nothing is split over the axis `w`",
        "--> examples/src/unet3d/",
        "--layout x:x,",
    ] {
        assert!(text.contains(says), "no `{says}` in\n{text}");
    }
    let json = place.ok(&format!("{odd} --machine h100x4 --format json")).out;
    let report = mesh::plan::report::Report::from_json(&json).unwrap();
    let unused = report.plans[0].findings.iter().find(|f| *f.code == *"L0101").unwrap();
    assert!(unused.lost.seconds.unwrap() > 0.0 && unused.tried.unwrap().seconds.unwrap() > 0.0, "{unused}");
    assert!(place.ok(&format!("{odd} --format html")).out.contains("nothing is split over the axis `w`"));
}

#[test]
fn the_layouts_of_the_documentation_have_few_findings() {
    let place = Place::new();
    for mesh in ["x=2,y=2", "x=2,y=2,z=2", "data=2,x=2 --batch 2"] {
        let text = place.ok(&format!("plan --data phantom --mesh {mesh}")).out;
        let found = text.matches("\nwarning[").count() + text.matches("\nadvice[").count();
        assert!(found <= 1, "--mesh {mesh} has {found}:\n{text}");
    }
    let zero = "batch:data,slots{*:data},gradients{*:data},variables{*:data}";
    for mesh in ["data=2,model=2", "data=2", &format!("data=2 --layout {zero}")] {
        assert!(bert().ok(&format!("plan --mesh {mesh}")).out.contains("findings: none"), "--mesh {mesh}");
    }
}

#[test]
fn a_plan_that_is_refused_for_memory_is_told_what_makes_it_fit() {
    let bert = bert();
    // Between what it takes with slots and gradients split, and what it takes without.
    let plan = "plan --size 2x64x2 --seq 32 --batch 8 --mesh data=4 --memory 32MiB";
    bert.fails(plan, 2, &["error[M0001]", "warning[L0600]", "help: split"]);
    let refused = bert.run(plan).err;
    let (_, layout) = refused.split_once("--layout '").unwrap();
    let (layout, _) = layout.split_once('\'').unwrap();
    assert!(layout.contains("slots{*:data}"), "{refused}");
    let fits = bert.ok(&format!("{plan} --layout {layout}")).out;
    assert!(!fits.contains("L0600"), "{fits}");
}

#[test]
fn every_code_is_explained_and_others_are_refused_with_those_that_are_near() {
    for program in [env!("CARGO_BIN_EXE_unet3d"), env!("CARGO_BIN_EXE_bert")] {
        let place = Place::of(program);
        let text = place.ok("explain L0301").out;
        assert!(text.starts_with("warning[L0301]: wide-halo\n") && text.contains("mesh    x=8"), "{text}");
        let list = place.ok("explain").out;
        for (code, _) in mesh::lint::codes() {
            assert!(
                list.lines().any(|l| l.starts_with(code)) && place.ok(&format!("explain {code}")).out.contains(code)
            );
        }
        place.fails("explain L0309", 2, &["error[U0004]", "`L0309`", "did you mean L0009 or L0209 or L0301?"]);
        place.fails("explain wide-hale", 2, &["did you mean wide-halo"]);
    }
}

#[test]
fn a_layout_that_is_searched_for_is_printed_and_planned() {
    let place = Place::new();
    let plan = place.ok(&format!("{UNET} --machine h100x4 --layout auto --memory 12MiB")).out;
    let found = plan.lines().find(|l| l.starts_with("search ")).unwrap_or_else(|| panic!("{plan}"));
    let options = found.trim_start_matches("search").trim().replace('\'', "");
    // The options read back as they were printed, and are within the memory.
    place.ok(&format!("{UNET} --memory 12MiB {options}"));
    place.fails(&format!("{UNET} --layout auto"), 2, &["error[U0004]", "coordinator calibrate"]);
    place.fails(&format!("{UNET} --machine h100 --mesh auto --layout auto"), 2, &["error[U0004]", "--devices"]);
}
