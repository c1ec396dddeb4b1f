//! `plan` in its formats, `plan --diff` and `explain`, as people and programs use them.

mod common;

use common::Place;
use serde_json::Value;
use std::fs;

const SMALL: &str = "plan --data phantom --crop 32 --base 4";

#[test]
fn a_plan_is_text_json_or_a_page_and_two_have_a_difference() {
    let place = Place::new();
    let text = place.ok(&format!("{SMALL} --mesh x=2,w=2 --layout x:x")).out;
    for part in
        ["findings: ", "warning[L0101]: nothing is split over the axis `w`", "--> examples/src/unet3d/model.rs:"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }

    let json = |mesh: &str, file: &str| -> Value {
        let out = place.ok(&format!("{SMALL} --mesh {mesh} --format json")).out;
        fs::write(place.path(file), &out).unwrap();
        serde_json::from_str(&out).unwrap()
    };
    let (a, _) = (json("x=2,y=2", "a.json"), json("x=2", "b.json"));
    assert_eq!(a["version"], 1);
    let plan = &a["plans"][0];
    assert_eq!((plan["mesh"].as_str(), plan["devices"].as_array().unwrap().len()), (Some("x=2,y=2"), 4));
    let image = plan["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "image").unwrap();
    let x = image["dims"].as_array().unwrap().iter().find(|d| d["name"] == "x").unwrap();
    assert_eq!((&x["axes"], &x["why"]), (&Value::from("x"), &Value::from("the layout's rule `x:x`")));
    assert!(plan["communication"].as_array().unwrap().iter().any(|t| t["pattern"] == "halo" && t["axes"] == "y"));

    let diff = place.ok("plan --diff a.json b.json").out;
    assert!(diff.contains("x=2,y=2 -> x=2") && diff.contains("halo along y") && diff.contains("image"), "{diff}");
    let same = place.ok("plan --diff a.json a.json").out;
    assert!(same.contains("changed: 0 of"), "{same}");

    let page = place.ok(&format!("{SMALL} --format html")).out;
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("decoder.0") && !page.contains("http"));
}

#[test]
fn what_is_no_plan_has_no_difference() {
    let place = Place::new();
    fs::write(place.path("a.json"), "{}").unwrap();
    fs::write(place.path("old.json"), "{\"version\": 0, \"plans\": []}").unwrap();
    place.fails("plan --diff a.json a.json", 2, &["error[U0004]", "a.json is no plan", "--format json"]);
    place.fails("plan --diff old.json old.json", 2, &["is of version 0", "reads 1"]);
    place.fails("plan --diff missing.json a.json", 2, &["cannot read missing.json", "help: "]);
}

#[test]
fn codes_are_explained() {
    for program in [env!("CARGO_BIN_EXE_unet3d"), env!("CARGO_BIN_EXE_bert")] {
        let place = Place::of(program);
        let text = place.ok("explain L0301").out;
        assert!(text.starts_with("warning[L0301]: wide-halo\n") && text.contains("mesh    x=8"), "{text}");
        assert!(place.ok("explain").out.lines().count() >= 40);
        place.fails("explain wide-hale", 2, &["error[U0004]", "did you mean wide-halo?"]);
    }
}

#[test]
fn the_layouts_of_the_documentation_have_few_findings() {
    let place = Place::new();
    for mesh in ["x=2,y=2", "x=2,y=2,z=2", "data=2,x=2 --batch 2"] {
        let text = place.ok(&format!("plan --data phantom --mesh {mesh}")).out;
        let found = text.matches("\nwarning[").count() + text.matches("\nadvice[").count();
        assert!(found <= 1, "--mesh {mesh} has {found}:\n{text}");
    }
    let bert = Place::of(env!("CARGO_BIN_EXE_bert"));
    for mesh in ["data=2,model=2", "data=2"] {
        assert!(bert.ok(&format!("plan --mesh {mesh}")).out.contains("findings: none"), "--mesh {mesh}");
    }
}
