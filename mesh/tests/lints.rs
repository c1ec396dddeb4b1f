//! Every lint finds its failing example, at the place that is marked there, and not its fixed one; what it suggests helps.

use mesh::error::Error;
use mesh::layout::{Layout, Mesh};
use mesh::lint::{self, Change, Example, Finding, Given, Lint};
use mesh::machine::Machine;
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::Program;
use std::collections::BTreeSet;
use std::path::Path;

/// A backend without scratch or workspaces.
struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

fn plan(p: &Program, mesh: &Mesh, layout: &Layout, memory: Option<usize>) -> Result<ProgramPlan, Error> {
    plan_program(p, mesh, layout, &PlanOptions { memory, ..PlanOptions::default() }, &Plain)
}

/// What planning refuses an example for, if it does.
fn refused(e: &Example) -> Option<Error> {
    let planned = |p: Program| {
        let options = PlanOptions { memory: e.memory, devices: e.devices, ..PlanOptions::default() };
        plan_program(&p, &e.mesh.parse()?, &e.layout.parse()?, &options, &Plain)
    };
    e.program().and_then(planned).err()
}

/// What is found in an example, with its mesh and layout or others.
fn found(e: &Example, change: &Change) -> Result<Vec<Finding>, Error> {
    let p = e.program()?;
    let mesh = change.mesh.clone().map_or_else(|| e.mesh.parse(), Ok)?;
    let layout = change.layout.clone().map_or_else(|| e.layout.parse(), Ok)?;
    let given = Given { memory: e.memory, machine: None, plan: &|mesh, layout| plan(&p, mesh, layout, None) };
    lint::check(&p, &plan(&p, &mesh, &layout, None)?, &given)
}

/// Codes that the source marks at a place.
fn marked(place: &str) -> String {
    let (file, line) = place.split_once(':').expect("places are file, line and column");
    let line: usize = line.split(':').next().and_then(|n| n.parse().ok()).expect("lines are numbers");
    let source = std::fs::read_to_string(format!("../{file}")).expect("places are in files of this project");
    let line = source.lines().nth(line - 1).expect("places are lines of them");
    line.split_once("// ").map_or(String::new(), |(_, codes)| codes.into())
}

/// What is wrong with a lint that planning itself reports.
fn refusal(l: &Lint) -> Result<(), String> {
    match refused(&l.failing) {
        None => return Err("its failing example is accepted".into()),
        Some(e) if e.cause.code() != l.code => return Err(format!("its failing example gives {e}")),
        Some(e) => {
            if let Some(place) = e.place.filter(|p| p.file.contains("lint") && !marked(&p.to_string()).contains(l.code))
            {
                return Err(format!("its failing example is reported at {place}"));
            }
        }
    }
    refused(&l.fixed).map_or(Ok(()), |e| Err(format!("its fixed example gives {e}")))
}

/// What is wrong with a lint of plans.
fn finding(l: &Lint) -> Result<(), String> {
    let all = |e: &Example, change: &Change| -> Result<Vec<Finding>, String> {
        let list = found(e, change).map_err(|e| format!("an example gives {e}"))?;
        Ok(list.into_iter().filter(|f| *f.code == *l.code).collect())
    };
    let failing = all(&l.failing, &Change::default())?;
    let Some(first) = failing.first() else {
        let others: Vec<String> =
            found(&l.failing, &Change::default()).unwrap().iter().map(Finding::to_string).collect();
        return Err(format!("it does not find its failing example; others do: {}", others.join("\n")));
    };
    let place = first.place.as_ref().ok_or("it has no place")?;
    if !marked(place).contains(l.code) {
        return Err(format!("it finds {first}"));
    }
    if let Some(f) = all(&l.fixed, &Change::default())?.first() {
        return Err(format!("it finds something in its fixed example: {f}"));
    }
    for f in &failing {
        let Some(change) = &f.change else { continue };
        if let Some(f) = all(&l.failing, change)?.first() {
            return Err(format!("what it suggests, {change}, leaves {f}"));
        }
    }
    Ok(())
}

#[test]
fn every_lint_finds_its_failing_example_and_not_its_fixed_one() {
    let wrong = |l: &Lint| (if l.is_refusal() { refusal(l) } else { finding(l) }).err();
    let wrong: Vec<String> =
        lint::all().filter_map(|l| Some(format!("{} {}: {}", l.code, l.name, wrong(l)?))).collect();
    assert!(wrong.is_empty(), "{} lints are wrong:\n{}", wrong.len(), wrong.join("\n\n"));
}

#[test]
fn no_example_on_any_mesh_and_layout_makes_a_lint_panic() {
    let machine = Machine::named("h100").unwrap().0;
    let meshes = ["1", "a=1", "a=1,b=2", "a=8", "a=5,b=1", "a=2,b=3", "a=64"];
    let layouts = ["", "*:a", "*:b?", "slots{*:a},gradients{*:a},variables{*:a}", "**{*:a?},activations{*:none}"];
    let grid: Vec<(&str, &str)> = meshes.iter().flat_map(|m| layouts.map(|l| (*m, l))).collect();
    for e in lint::all().flat_map(|l| [&l.failing, &l.fixed]) {
        for (mesh, layout) in &grid {
            let (Ok(p), mesh, layout) = (e.program(), mesh.parse().unwrap(), layout.parse().unwrap()) else { continue };
            let Ok(planned) = plan(&p, &mesh, &layout, None) else { continue };
            let again = |mesh: &Mesh, layout: &Layout| plan(&p, mesh, layout, None);
            let given = Given { memory: Some(1 << 10), machine: Some(&machine), plan: &again };
            for f in lint::check(&p, &planned, &given).unwrap() {
                assert!(f.lost.seconds.is_some_and(f64::is_finite) && !f.to_string().is_empty(), "{f}");
            }
        }
    }
}

#[test]
fn there_are_forty_lints_and_no_two_of_one_code_or_name() {
    let codes: BTreeSet<&str> = lint::all().map(|l| l.code).collect();
    let names: BTreeSet<&str> = lint::all().map(|l| l.name).collect();
    assert_eq!((codes.len(), names.len()), (lint::all().count(), lint::all().count()));
    assert!(codes.len() >= 40, "{} lints", codes.len());
    // Refusals first, then each kind's in order.
    assert!(lint::all().filter(|l| !l.is_refusal()).map(|l| l.code).is_sorted());
}

#[test]
fn a_code_is_explained_with_both_examples() {
    for l in lint::all() {
        let text = lint::explain(Some(l.code)).unwrap();
        for part in [l.about, l.failing.layout, l.fixed.layout, l.failing.mesh, l.fixed.mesh] {
            assert!(text.contains(part), "{} does not say {part}", l.code);
        }
        assert_eq!(lint::explain(Some(l.name)).unwrap(), text);
    }
    let help = |code: &str| lint::explain(Some(code)).unwrap_err().help;
    assert_eq!(help("Unused-Axes"), "did you mean unused-axis or unused-feed?");
    assert_eq!(help("l0309"), "did you mean L0009 or L0209 or L0301?");
    assert!(help("").contains("lists all") && help("nothing of the kind").contains("lists all"));
}

/// The codes in the files of a folder, and those below it: a letter, and four digits.
fn codes_in(folder: &Path, codes: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("lint") {
            codes_in(&path, codes);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(path).unwrap();
            let words = text.split(|c: char| !c.is_ascii_alphanumeric());
            let is_code = |w: &&str| w.len() == 5 && "CDHLMPUW".contains(&w[..1]) && w[1..].parse::<u32>().is_ok();
            codes.extend(words.filter(is_code).map(String::from));
        }
    }
}

#[test]
fn every_code_of_the_sources_is_explained_and_no_other() {
    let mut said = BTreeSet::new();
    for source in ["mesh/src", "worker/src", "coordinator/src", "examples/src"] {
        codes_in(&Path::new("..").join(source), &mut said);
    }
    let found = lint::all().filter(|l| !l.is_refusal()).map(|l| l.code.to_string());
    said.extend(found);
    let explained: BTreeSet<String> = lint::codes().into_iter().map(|(code, _)| code.to_string()).collect();
    assert_eq!(said, explained);
    let list = lint::explain(None).unwrap();
    assert_eq!(list.lines().count(), explained.len());
    assert!(explained.iter().all(|code| lint::explain(Some(code)).is_ok_and(|text| text.contains(code.as_str()))));
}

#[test]
fn the_page_of_all_codes_is_made_of_the_tables() {
    let page = Path::new("../docs/errors.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(page, lint::page()).unwrap();
    }
    let same = std::fs::read_to_string(page).is_ok_and(|text| text == lint::page());
    assert!(same, "docs/errors.md is out of date: run `UPDATE_DOCS=1 cargo test -p mesh --test lints`");
}
