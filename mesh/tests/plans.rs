//! Plans as data, as pages, and what changed between two.

use mesh::body::MAX_INSTRS;
use mesh::dim::{DType, dim};
use mesh::layout::{Layout, Mesh};
use mesh::lint::{self, Given};
use mesh::machine::Machine;
use mesh::nn::{self, Kernel};
use mesh::optim::Optimizer;
use mesh::plan::describe::{bytes, seconds, thousands};
use mesh::plan::report::{JSON_BYTES, Report, report};
use mesh::plan::{ALIGN, Backend, PlanOptions, ProgramPlan, Work, diff, html, plan_program, time};
use mesh::program::{Program, ProgramBuilder};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        100
    }
    fn workspace_bytes(&self) -> usize {
        1000
    }
}

/// Two convolutions, to be trained.
fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("image", DType::F32, &[dim("batch", 2), dim("x", 16), dim("y", 24), dim("channel", 1)]);
        let kernel = Kernel::new(&["x", "y"], 3).from_channel("channel");
        let x = nn::conv(&x, "first", &kernel, &dim("channel", 4)).relu();
        let loss = nn::conv(&x, "second", &kernel, &dim("channel", 2)).sum_all();
        Optimizer::sgd(0.1).apply(g, &loss);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

fn planned(program: &Program, mesh: &str, layout: &str) -> ProgramPlan {
    let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    plan_program(program, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap()
}

fn reported(mesh: &str, layout: &str, machine: Option<&Machine>) -> (ProgramPlan, Report) {
    let program = program();
    let plan = planned(&program, mesh, layout);
    let report = report(&[(&program, &plan, "train")], machine).unwrap();
    (plan, report)
}

#[test]
fn a_report_has_every_step_of_every_device_and_reads_back_as_it_was_written() {
    let machine = Machine::named("h100").unwrap().0;
    let (plan, report) = reported("x=3,y=2", "x:x,y:y", Some(&machine));
    let untimed = reported("x=3,y=2", "x:x,y:y", None).1;
    assert_eq!(Report::from_json(&untimed.to_json()).unwrap(), untimed);
    // Fractions are read to the last bit but one.
    let read = Report::from_json(&report.to_json()).unwrap().plans[0].time.clone().unwrap().seconds;
    assert!((read / report.plans[0].time.as_ref().unwrap().seconds - 1.0).abs() < 1e-15);
    let of = &report.plans[0];
    let mut devices: Vec<usize> = of.groups.iter().flat_map(|g| g.devices.clone()).collect();
    devices.sort_unstable();
    assert_eq!(devices, [0, 1, 2, 3, 4, 5]);
    assert!(of.groups.len() > 1, "devices with other halos have other plans");
    let estimate = time::estimate(&plan, "train", &machine).unwrap();
    for g in &of.groups {
        for &d in &g.devices {
            let steps = &plan.functions[&"train".into()][d].steps;
            assert_eq!(g.steps.len(), steps.len());
            for (line, step) in g.steps.iter().zip(steps) {
                assert_eq!((line.kind.as_str(), &line.extent), (step.class(), &step.extent()));
                assert_eq!((line.flops, line.bytes), (step.cost().flops, step.cost().bytes));
            }
            let t = estimate.devices[d];
            let sum: f64 = g.steps.iter().filter_map(|s| s.seconds).sum();
            assert!((sum - t.busy()).abs() < 1e-9, "{sum} is not {t:?}");
            assert_eq!(g.peak_bytes, plan.peak_bytes(d));
            assert_eq!(*g.alive, *plan.timelines[&"train".into()][d].alive);
        }
    }
    // What steps send and what axes carry is the same.
    let by_steps: usize =
        of.groups.iter().map(|g| g.devices.len() * g.steps.iter().flat_map(|s| s.sent.values()).sum::<usize>()).sum();
    assert_eq!(by_steps, of.communication.iter().map(|t| t.bytes).sum::<usize>());
    assert_eq!(by_steps as f64, of.time.as_ref().unwrap().axes.values().map(|(b, _)| b).sum::<f64>());
    let level = |name: &str| of.levels.iter().find(|l| l.tensor.name == name).unwrap();
    assert_eq!(level("second").tensor.layout, "x:x,y:y");
    assert!(level("second").halo_bytes > 0 && level("second").halo_share < 0.5);
    assert_eq!(of.feed.as_ref().unwrap().blocks[5], [(0, 2), (12, 16), (12, 24), (0, 1)]);
}

#[test]
fn what_is_said_to_be_in_memory_at_a_step_is_no_more_than_what_is() {
    for (mesh, layout) in [("1", ""), ("x=2,y=2", "x:x,y:y"), ("data=2", "batch:data")] {
        for g in &reported(mesh, layout, None).1.plans[0].groups {
            for (s, alive) in g.alive.iter().enumerate().take(g.alive.len() - 1) {
                let held = g.values.iter().filter(|v| v.from <= s && s <= v.to);
                let held: usize = held.map(|v| v.bytes.next_multiple_of(ALIGN)).sum();
                let variables = g.variables_bytes;
                assert!(
                    held + variables <= alive + ALIGN,
                    "{mesh}, step {s}: {held} and {variables} are not in {alive}"
                );
            }
            let all: usize = g.values.iter().map(|v| v.bytes).sum();
            assert!(all > g.peak_bytes / 2, "{all}");
        }
    }
}

#[test]
fn loops_that_share_a_pass_have_no_more_instructions_than_a_body_may_have() {
    let mut p = ProgramBuilder::new();
    p.function("sum", |g| {
        let all: Vec<_> = (0..400).map(|i| g.input(format!("x.{i}"), DType::F32, &[])).collect();
        let sum = all.into_iter().reduce(|a, b| a.mul_scalar(0.5).add(&b)).unwrap();
        g.output("sum", &sum);
    })
    .unwrap();
    let plan = planned(&p.finish().unwrap(), "1", "");
    let steps = &plan.functions[&"sum".into()][0].steps;
    let lengths: Vec<usize> = steps
        .iter()
        .filter_map(|s| match &s.work {
            Work::Map(nest) => Some(nest.body.instrs.len()),
            _ => None,
        })
        .collect();
    assert!(lengths.len() > 1 && lengths.iter().all(|n| *n <= MAX_INSTRS), "{lengths:?}");
}

#[test]
fn what_is_no_report_is_refused() {
    let (_, report) = reported("1", "", None);
    let good = report.to_json();
    for (text, says) in [
        (String::new(), "EOF"),
        ("{".into(), "EOF"),
        ("[1]".into(), "plan --format json"),
        ("{\"version\": 1}".into(), "missing field"),
        (good.replace("\"version\":1", "\"version\":2"), "version 2"),
        (good.replace("\"plans\":[", "\"plans\":[7,"), "invalid type"),
        (format!("{{\"version\": {}", "[".repeat(100_000)), "invalid type"),
        (format!("{{\"version\": 1, \"more\": {}", "[".repeat(100_000)), "EOF"),
    ] {
        let e = Report::from_json(&text).unwrap_err().to_string();
        assert!(e.contains("error[L0001]") && e.contains(says), "{e}");
    }
    let e = Report::from_json(&" ".repeat(JSON_BYTES + 1)).unwrap_err().to_string();
    assert!(e.contains("at most"), "{e}");
}

#[test]
fn a_difference_names_what_changed_and_nothing_else() {
    let machine = Machine::named("a100").unwrap().0;
    let (_, one) = reported("1", "", Some(&machine));
    let (_, four) = reported("x=2,y=2", "x:x,y:y", Some(&machine));
    assert_eq!(diff::diff(&four, &four), "no difference\n");
    let text = diff::diff(&one, &four);
    for says in [
        "mesh    1                 x=2,y=2",
        "layout  everything whole  x:x,y:y",
        "peak of a device",
        "time of a step",
        "sent along x ",
        "largest of second",
        "f32[batch:2, x:16, y:24, channel_in:4] x:x,y:y",
    ] {
        assert!(text.contains(says), "no `{says}` in\n{text}");
    }
    assert!(!text.contains("FLOPs") && !text.contains("machine") && !text.contains("variable "), "{text}");
    let mut other = four.clone();
    other.plans[0].function = "eval".into();
    let text = diff::diff(&four, &other);
    assert!(text.contains("`train` is only in the first") && text.contains("`eval` is only in the second"), "{text}");
}

/// Text between tags and values of attributes; panics where tags do not match. What is in scripts and styles is neither.
fn parts(page: &str) -> (Vec<String>, Vec<String>) {
    let (mut texts, mut attributes, mut open) = (vec![], vec![], vec![]);
    let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>'), "{text}");
        texts.push(text.to_string());
        let (tag, after) = after.split_once('>').unwrap();
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap();
        let quoted: Vec<&str> = tag.split('"').collect();
        assert!(quoted.len() % 2 == 1, "{tag}");
        attributes.extend(quoted.iter().skip(1).step_by(2).map(|a| a.to_string()));
        if tag.ends_with('/') {
            continue;
        }
        open.push(name);
        if ["script", "style"].contains(&name) {
            rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    texts.retain(|t| !t.trim().is_empty());
    (texts, attributes)
}

/// Every number and text of a JSON value, as a page may write it.
fn leaves(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Number(n) => {
            let v = n.as_f64().unwrap();
            out.extend([
                n.to_string(),
                bytes(v as usize),
                thousands(v as u64),
                seconds(v),
                format!("{:.1} %", 100.0 * v),
            ]);
        }
        Value::String(s) => _ = out.insert(s.clone()),
        Value::Array(list) => list.iter().for_each(|v| leaves(v, out)),
        Value::Object(map) => map.values().for_each(|v| leaves(v, out)),
        Value::Null | Value::Bool(_) => {}
    }
}

#[test]
fn a_page_is_well_formed_alone_and_has_no_number_that_the_report_does_not() {
    let machine = Machine::named("h100").unwrap().0;
    for (mesh, layout) in [("1", ""), ("x=4", "x:x"), ("x=2,y=3", "x:x,y:y"), ("data=2,x=2,y=2", "batch:data,x:x,y:y")]
    {
        let (_, report) = reported(mesh, layout, Some(&machine));
        let page = html::page("unet", &report);
        let (texts, attributes) = parts(&page);
        for outside in ["http:", "https:", "//", "url(", "@import", "src=", "href="] {
            assert!(!attributes.iter().any(|a| a.contains(outside)), "{outside}");
            assert!(!page.contains(outside), "{outside}");
        }
        let mut known = BTreeSet::new();
        leaves(&serde_json::from_str(&report.to_json()).unwrap(), &mut known);
        let feed = report.plans[0].feed.as_ref().unwrap();
        known.extend(feed.dims.iter().map(|(n, s)| format!("{n}:{s}")));
        known.extend(report.plans[0].levels.iter().flat_map(|l| l.tensor.ty.split(", ").map(String::from)));
        known.extend(report.plans[0].variables.iter().flat_map(|v| v.ty.split(", ").map(String::from)));
        // Bars are what their parts are together.
        let mut along: BTreeMap<&str, usize> = BTreeMap::new();
        report.plans[0].communication.iter().for_each(|t| *along.entry(&t.axis).or_default() += t.bytes);
        known.extend(along.into_values().map(bytes));
        let time = report.plans[0].time.as_ref().unwrap();
        known.extend(time.devices.iter().map(|d| seconds(d.iter().sum())));
        known.insert(format!("Beside computation devices move for {} more, the mean of all.", seconds(time.hidden)));
        known.extend((0..report.devices).map(|d| format!("device {d}")));
        known.insert(format!("device {}, the slowest", time.slowest));
        for text in texts.iter().filter(|t| t.contains(|c: char| c.is_ascii_digit())) {
            let text = text.strip_prefix("devices ").unwrap_or(text);
            let found = known.contains(text) || text.split(", ").all(|part| known.contains(part));
            let named = text.starts_with("Time on h100");
            assert!(found || named, "`{text}` is not in the report of {mesh}");
        }
        assert!(page.contains("class=\"mesh\"") == (mesh != "1") && page.contains("class=\"memory\""));
        assert!(page.contains("class=\"levels\"") && page.contains("<summary>Variables"));
    }
}

#[test]
fn findings_are_read_back_and_stand_on_the_page() {
    let program = program();
    let plan_on = |mesh: &Mesh, layout: &Layout| plan_program(&program, mesh, layout, &PlanOptions::default(), &Plain);
    let plan = planned(&program, "x=2,w=2", "x:x");
    let given = Given { memory: None, machine: None, plan: &plan_on };
    let mut report = reported("x=2,w=2", "x:x", None).1;
    report.plans[0].findings = lint::check(&program, &plan, &given).unwrap();
    let unused = &report.plans[0].findings[0];
    assert!(*unused.code == *"L0101" && unused.tried.is_some(), "{unused}");
    assert_eq!(Report::from_json(&report.to_json()).unwrap(), report);
    report.plans[0].findings[0].message = "<b>".into();
    let page = html::page("unet", &report);
    assert!(page.contains("<td>L0101</td>") && page.contains("<td>&lt;b&gt;</td>") && !page.contains("<b>&"));
    parts(&page);
}

#[test]
fn hostile_names_stay_text() {
    let (_, mut report) = reported("x=2", "x:x", None);
    let hostile = "</script><img src=x onerror=alert(1)>\"'&\u{2028}\u{2029}\u{0}";
    report.mesh = hostile.into();
    report.layout = hostile.into();
    report.machine = Some(hostile.into());
    let of = &mut report.plans[0];
    of.function = hostile.into();
    let feed = of.feed.as_mut().unwrap();
    feed.name = hostile.into();
    feed.dims.iter_mut().for_each(|d| d.0 = hostile.into());
    of.levels.iter_mut().for_each(|l| (l.tensor.name, l.tensor.ty) = (hostile.into(), hostile.into()));
    of.communication.iter_mut().for_each(|t| t.axis = hostile.into());
    of.groups.iter_mut().flat_map(|g| &mut g.steps).for_each(|s| s.scope = hostile.into());
    let page = html::page(hostile, &report);
    let (texts, _) = parts(&page);
    assert!(!page.contains("<img") && !page.contains("onerror=alert(1)>"));
    assert!(texts.iter().any(|t| t.contains("&lt;/script&gt;&lt;img")));
    assert_eq!(page.matches("</script>").count(), 2);
    // The data are what they were.
    let (_, after) = page.split_once("id=\"report\">").unwrap();
    let (json, _) = after.split_once("</script>").unwrap();
    assert!(!json.contains('\u{2028}') && !json.contains('\u{2029}'));
    assert_eq!(Report::from_json(json).unwrap(), report);
}
