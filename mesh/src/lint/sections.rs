//! Variables, gradients and optimizer slots that every device holds, where memory is short: rules for their sections split
//! them, which is ZeRO.

use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, Name, dim};
use crate::graph::{Graph, Tensor};
use crate::layout::Section;
use crate::nn::init::normal;
use crate::optim::Optimizer;
use crate::plan::describe::bytes;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0600",
        name: "does-not-fit",
        severity: Severity::Warning,
        about: "A device would need more memory than it may use (M0001), and rules for optimizer slots, then gradients, then \
                variables alone would help: each device along an axis then holds a part, and what is needed whole is \
                gathered (ZeRO 1, 2 and 3). Suggested are the first of these that fit, or else those with the least peak.",
        failing: example(wide_adam, WIDE_ADAM, "data=4", "batch:data").within(300 << 10),
        fixed: example(wide_adam, WIDE_ADAM, "data=4", "batch:data,slots{*:data}").within(300 << 10),
        check: Check::Plan(does_not_fit),
    },
    Lint {
        code: "L0601",
        name: "replicated-variables",
        severity: Severity::Warning,
        about: "Memory is short (more than 7 of 10 parts of it are needed), and every device along an axis holds all of some \
                variables. Rules for variables alone split them where they live between steps, `variables{ *:data }`; \
                each use then gathers what it needs.",
        failing: example(wide_sgd, WIDE, "data=4", "batch:data").within(300 << 10),
        fixed: example(wide_sgd, WIDE, "data=4", "batch:data,variables{*:data}").within(300 << 10),
        check: Check::Plan(|p| replicated(p, Section::Variables)),
    },
    Lint {
        code: "L0602",
        name: "replicated-slots",
        severity: Severity::Warning,
        about: "Memory is short, and every device along an axis holds all of some optimizer slots, Adam's two of each \
                variable for instance. Rules for slots alone split them, and the update with them: `slots{ *:data }`. Or take \
                an optimizer with smaller slots (Adafactor).",
        failing: example(wide_adam, WIDE_ADAM, "data=4", "batch:data").within(450 << 10),
        fixed: example(wide_adam, WIDE_ADAM, "data=4", "batch:data,slots{*:data}").within(450 << 10),
        check: Check::Plan(|p| replicated(p, Section::Slots)),
    },
];

fn dense(g: &Graph) -> Tensor {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 256)], normal(0.1)); // L0601
    x.contract(&w, &["d_in"]).tanh().sum_all() // L0600
}
const WIDE: &str = "a layer [d_in:64] -> [d_out:256], trained by SGD";
fn wide_sgd(g: &Graph) {
    let loss = dense(g);
    Optimizer::sgd(0.1).apply(g, &loss);
}
const WIDE_ADAM: &str = "a layer [d_in:64] -> [d_out:256], trained by Adam";
fn wide_adam(g: &Graph) {
    let loss = dense(g);
    Optimizer::adam(0.1).apply(g, &loss); // L0600 L0602
}

fn does_not_fit(p: &Planned) -> Vec<Finding> {
    let Some(budget) = p.over() else { return vec![] };
    let axes: Vec<&Name> = p.axes().map(|(_, name, _)| name).collect();
    let each = axes.iter().map(|a| vec![*a]);
    let all = (axes.len() > 1).then(|| axes.clone());
    let sections = [Section::Slots, Section::Gradients, Section::Variables];
    let lists = each.chain(all).flat_map(|over| (1..=sections.len()).map(move |n| (over.clone(), n)));
    let changes = lists.map(|(over, n)| Change::sections(&p.plan.layout, &sections[..n], &over));
    let mut least: Option<(usize, Change)> = None;
    for change in changes.filter(|c| c.layout.as_ref() != Some(&p.plan.layout)) {
        let Some(tried) = p.planned(&change, None) else { continue };
        if least.as_ref().is_none_or(|(peak, _)| tried.peak_bytes < *peak) {
            least = Some((tried.peak_bytes, change));
        }
        if tried.peak_bytes <= budget {
            break;
        }
    }
    let Some((peak, change)) = least.filter(|(peak, _)| *peak < p.peak()) else { return vec![] };
    let message = format!("a device needs {}, and may use {}", bytes(p.peak()), bytes(budget));
    let help = match peak <= budget {
        true => "split what devices hold alike",
        false => "that is not enough alone, but splitting what devices hold alike helps",
    };
    let finding = Finding::new(message, help).held((p.peak() - peak) as f64).change(Some(change));
    vec![match p.fullest_node() {
        Some((l, node)) => finding.at(l, node),
        None => finding,
    }]
}

/// What is of a section and lies whole along an axis, where memory is short and yet enough: beyond it, several sections
/// are looked at together.
fn replicated(p: &Planned, section: Section) -> Vec<Finding> {
    let mut out = vec![];
    if !p.is_short() || p.over().is_some() {
        return out;
    }
    for (axis, name, size) in p.axes() {
        let list = p.program.variables.iter().enumerate();
        let list = list.filter(|(i, v)| v.role.section() == section && p.is_whole(*i, axis));
        let list: Vec<_> = list.map(|(i, v)| (p.plan.variables[0][i].1.bytes, v)).collect();
        let held: usize = list.iter().map(|(b, _)| b).sum();
        let lost = held as f64 * (1.0 - 1.0 / size as f64);
        if lost < 0.05 * p.peak() as f64 {
            continue;
        }
        let Some((_, largest)) = list.iter().max_by_key(|(b, _)| *b) else { continue };
        let change = Change::sections(&p.plan.layout, &[section], &[name]);
        if p.trial(&change).is_none_or(|t| t.variables > 0.9 * p.now.variables) {
            continue;
        }
        let message = format!("memory is short, and each device along `{name}` holds all of {} {section}", list.len());
        let finding = Finding::new(message, format!("split {section} over `{name}`")).place(largest.place).axis(name);
        out.push(finding.held(lost).change(Some(change)).counted(list.len()));
    }
    out
}
