//! A plan as data says what the plan does; as a page it is well-formed, needs nothing from elsewhere, and lets no text through.

use mesh::dim::{DType, dim};
use mesh::graph::Graph;
use mesh::lint;
use mesh::nn::{self, Kernel};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};
use mesh::report::{self, Report, diff::diff, html::page};

struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        1024
    }
}

/// A scope that would be a page's undoing.
const NASTY: &str = "decoder<script>\"&'0";

/// Two levels of convolutions, and what trains them.
fn network(g: &Graph) {
    let volume = [dim("batch", 1), dim("x", 32), dim("y", 32), dim("z", 16), dim("channel", 4)];
    let mut x = g.input("image", DType::F32, &volume);
    let kernel = || Kernel::new(&["x", "y", "z"], 3).unbiased().from_channel("channel");
    for (scope, channels) in [("encoder.0", 8), (NASTY, 16)] {
        x = g.scoped(scope, || {
            let pooled = x.max_pool(&["x", "y", "z"].map(|d| Window::valid(d, 2, 2)));
            nn::leaky_relu(&nn::conv(&pooled, "conv", &kernel(), &dim("channel", channels)), 0.1)
        });
    }
    let head = g.variable("head", &[dim("channel", 16), dim("class", 8)], nn::init::normal(0.1)).with_layout("");
    let loss = x.contract(&head, &["channel"]).square().mean_all();
    g.output("loss", &loss);
    Optimizer::adam(0.1).apply(g, &loss);
}

fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", network).unwrap();
    p.finish().unwrap()
}

fn planned(mesh: &str, layout: &str) -> (ProgramPlan, Report) {
    let p = program();
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let plan = plan_program(&p, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
    let found = lint::check(&p, &plan, None).unwrap();
    let report = report::report(&p, &plan, "train", found).unwrap().unwrap();
    (plan, report)
}

fn example() -> (ProgramPlan, Report) {
    planned("x=2,y=2,w=2", "x:x,y:y")
}

#[test]
fn a_report_has_the_numbers_of_its_plan() {
    let (plan, r) = example();
    let plans = &plan.functions[&"train".into()];
    assert_eq!(r.devices.len(), 8);
    for (d, (of, p)) in r.devices.iter().zip(plans).enumerate() {
        assert_eq!(of.peak_bytes, plan.peak_bytes(d));
        let sent = |w: &Work| match w {
            Work::Exchange(e) => e.sends.iter().map(|m| m.bytes).sum(),
            Work::AllReduce(a) => a.sent_bytes(),
            _ => 0,
        };
        assert_eq!(of.sent_bytes, p.steps.iter().map(|s| sent(&s.work)).sum::<usize>());
    }
    let by_axis: usize = r.communication.iter().map(|t| t.sent_bytes).sum();
    assert_eq!(by_axis, r.devices.iter().map(|d| d.sent_bytes).sum::<usize>());
    assert!(r.communication.iter().any(|t| t.pattern == "halo" && t.axes == "x"));
    // Along `w` all is the same: whoever sends there sends along another axis as well.
    assert!(r.communication.iter().all(|t| t.axes != "w" && !t.axes.is_empty()), "{:?}", r.communication);
    assert_eq!(r.steps.len(), plans[0].steps.len());
}

#[test]
fn what_is_alive_at_a_step_is_no_more_than_the_plan_says_and_nearly_all_of_it() {
    let (plan, r) = example();
    for m in &r.memory {
        let timeline = &plan.timelines[&"train".into()][m.devices[0]];
        assert_eq!((&m.alive_bytes, m.fullest), (&timeline.alive, timeline.fullest));
        let variables = r.devices[m.devices[0]].variable_bytes;
        let at =
            |step: usize| m.spans.iter().filter(|s| s.from <= step && step <= s.to).map(|s| s.bytes).sum::<usize>();
        for (step, alive) in m.alive_bytes.iter().enumerate() {
            assert!(at(step) + variables <= *alive, "step {step}: {} of {alive}", at(step) + variables);
        }
        let (own, all) = (at(m.fullest) + variables, m.alive_bytes[m.fullest]);
        assert!(own * 10 >= all * 9, "{own} of {all}");
    }
}

#[test]
fn every_dimension_says_why_it_lies_so() {
    let (_, r) = example();
    let tensor = |kind: &str, name: &str| r.tensors.iter().find(|t| t.kind == kind && t.name == name).unwrap();
    let why = |kind: &str, name: &str, dim: &str| {
        let d = tensor(kind, name).dims.iter().find(|d| d.name == dim).unwrap().clone();
        (d.axes, d.why)
    };
    assert_eq!(why("feed", "image", "x"), (Some("x".into()), "the layout's rule `x:x`".into()));
    assert_eq!(why("feed", "image", "z"), (None, "no rule: whole on every device".into()));
    let whole = r.tensors.iter().flat_map(|t| &t.dims).find(|d| d.why.contains("needs it whole"));
    assert!(whole.is_none_or(|d| d.axes.is_none()));
    let image = tensor("feed", "image");
    assert_eq!((image.bytes, image.most_bytes), (4 * 32 * 32 * 16 * 4, 4 * 16 * 16 * 16 * 4));
    assert_eq!(image.blocks[7], [(0, 1), (16, 32), (16, 32), (0, 16), (0, 4)]);
}

#[test]
fn a_difference_names_what_changed_and_nothing_else() {
    let (_, a) = example();
    let (_, b) = planned("x=8", "x:x");
    let same = diff(&a, &a);
    assert!(same.contains("mesh and layout are the same") && same.contains("changed: 0 of"), "{same}");
    let text = diff(&a, &b);
    for part in ["mesh    x=2,y=2,w=2 -> x=8", "layout  x:x,y:y -> x:x", "halo along y", "-100.0 %", "image"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

/// The names of a page's elements, or what is not well-formed about it.
fn elements(page: &str) -> Result<Vec<String>, String> {
    let mut rest = page.strip_prefix("<!DOCTYPE html>\n").ok_or("it has no doctype")?;
    let (mut open, mut all): (Vec<String>, Vec<String>) = (vec![], vec![]);
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        if let Some(bad) = text
            .split('&')
            .skip(1)
            .find(|t| !["amp;", "lt;", "gt;", "quot;", "#39;", "#10;"].iter().any(|e| t.starts_with(e)))
        {
            return Err(format!("a bare & before {bad}"));
        }
        let end = rest[at..].find('>').ok_or("a tag that does not end")? + at;
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            if open.pop().as_deref() != Some(name) {
                return Err(format!("</{name}> ends nothing, inside of {open:?}"));
            }
            continue;
        }
        let (body, empty) = tag.strip_suffix('/').map_or((tag, false), |b| (b, true));
        let name = body.split_whitespace().next().ok_or("an empty tag")?.to_string();
        if body.matches('"').count() % 2 != 0 {
            return Err(format!("quotes do not match in <{tag}>"));
        }
        all.push(name.clone());
        if !empty {
            open.push(name);
        }
    }
    if open.is_empty() { Ok(all) } else { Err(format!("{open:?} do not end")) }
}

#[test]
fn a_page_is_well_formed_and_asks_for_nothing_from_elsewhere() {
    let (_, r) = example();
    let page = page(&[r]);
    let elements = elements(&page).unwrap();
    let count = |name: &str| elements.iter().filter(|e| *e == name).count();
    // One drawing a tensor and one a timeline, and no script but its own.
    assert!(count("svg") >= 4 && count("polygon") > 20, "{} drawings", count("svg"));
    assert_eq!((count("script"), count("main"), count("link"), count("img"), count("iframe")), (1, 1, 0, 0, 0));
    for outside in ["http:", "https:", "//", "@import", "url(", "src="] {
        assert!(!page.contains(outside), "{outside}");
    }
    // Nothing is drawn outside of its drawing.
    for points in page.split("points=\"").skip(1).filter_map(|p| p.split('"').next()) {
        for (x, y) in points.split(' ').filter_map(|p| p.split_once(',')) {
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=300.0).contains(&x) && (0.0..=220.0).contains(&y), "{points}");
        }
    }
    assert!(page.contains("decoder&lt;script&gt;&quot;&amp;&#39;0") && !page.contains(NASTY));
    assert!(page.contains("L0101") && page.contains("the layout&#39;s rule `x:x`"));
}
