//! Sums over split dimensions: all-reduces that another split would not need, and those that are too small or too many.

use super::lowered::Lowered;
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, dim};
use crate::graph::{Graph, Tensor};
use crate::nn::{self, init::normal};
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::optim::Optimizer;
use crate::program::Init;
use crate::spmd::Instr;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0401",
        name: "split-contraction",
        severity: Severity::Warning,
        about: "A product sums over a split dimension, so that devices all-reduce a result of the size of an activation, \
                although another dimension could be split for less. Split one that the result keeps.",
        failing: example(product, PRODUCT, "model=4", "d_in:model"),
        fixed: example(product, PRODUCT, "model=4", "batch:model"),
        check: Check::Plan(|p| split_sums(p, Kind::Product)),
    },
    Lint {
        code: "L0402",
        name: "split-softmax",
        severity: Severity::Warning,
        about: "A softmax goes over a split dimension: maximum and sum are all-reduced, forwards and again backwards. Split \
                another dimension, such as the batch or the heads, where that sends less.",
        failing: example(softmax, SOFTMAX, "model=4", "class:model"),
        fixed: example(softmax, SOFTMAX, "model=4", "row:model"),
        check: Check::Plan(|p| split_sums(p, Kind::Softmax)),
    },
    Lint {
        code: "L0403",
        name: "split-norm",
        severity: Severity::Warning,
        about: "Mean and variance of a norm go over a split dimension and are all-reduced at every norm, forwards and \
                backwards. Split a dimension that the norm keeps, where that sends less.",
        failing: example(norm, NORM, "model=4", "d_model:model"),
        fixed: example(norm, NORM, "model=4", "row:model"),
        check: Check::Plan(|p| split_sums(p, Kind::Norm)),
    },
    Lint {
        code: "L0404",
        name: "small-all-reduces",
        severity: Severity::Advice,
        about: "Most messages of a run are of all-reduces of less than 4 KiB: statistics of norms, gradients of biases and \
                scales. Each takes the time of a message, however small it is. Split over fewer devices, take norms over \
                what is not split, leave out biases before norms, or do more in a step.",
        failing: example(many_biases, MANY, "data=4", "batch:data"),
        fixed: example(no_biases, "the same without biases", "data=4", "batch:data"),
        check: Check::Plan(small_all_reduces),
    },
    Lint {
        code: "L0405",
        name: "several-partial-sums",
        severity: Severity::Warning,
        about: "Devices send several partial sums each, since what they own is no complete part of the summation tree: \
                three devices own 3 + 3 + 2 of 8 chunks. The tree is the same on every layout, which is what makes results \
                the same bits; of one dimension, or of examples, a power of two of devices owns one part each.",
        failing: example(product, PRODUCT, "model=3", "d_in:model"),
        fixed: example(product, PRODUCT, "model=4", "d_in:model"),
        check: Check::Plan(several_partials),
    },
    Lint {
        code: "L0406",
        name: "all-reduce-each-part",
        severity: Severity::Advice,
        about: "Gradients are added up over micro-batches, and all-reduced in each of them rather than once. Use fewer and \
                larger micro-batches, and make room for them by recomputing blocks.",
        failing: example(accumulated, "gradients added up in a slot, then applied", "data=4", "batch:data"),
        fixed: example(applied, "gradients applied at once", "data=4", "batch:data"),
        check: Check::Plan(each_part),
    },
    Lint {
        code: "L0407",
        name: "split-table",
        severity: Severity::Warning,
        about: "A lookup by index in a table whose rows are split: each device looks up its own rows, and all-reduces what \
                was found. Split the table's other dimension, where that sends less.",
        failing: example(lookup, LOOKUP, "model=4", "vocab:model"),
        fixed: example(lookup, LOOKUP, "model=4", "d_model:model"),
        check: Check::Plan(|p| split_sums(p, Kind::Lookup)),
    },
];

const PRODUCT: &str = "a product [batch:512, d_in:256] x [d_in, d_out:64]";
fn product(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 512), dim("d_in", 256)]);
    let w = g.variable("w", &[dim("d_in", 256), dim("d_out", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_in"])); // L0401 L0405
}

const SOFTMAX: &str = "softmax of [row:512, class:64]";
fn softmax(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 512), dim("class", 64)]);
    g.output("y", &nn::softmax(&x, &["class"])); // L0402
}

const NORM: &str = "a layer norm over d_model of [row:512, d_model:64]";
fn norm(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 512), dim("d_model", 64)]);
    g.output("y", &nn::layer_norm(&x, "norm", &["d_model"], 1e-5)); // L0403
}

const LOOKUP: &str = "rows of a table [vocab, d_model] by index";
fn lookup(g: &Graph) {
    let words = g.input("words", DType::I32, &[dim("token", 64)]);
    let table = g.variable("table", &[dim("vocab", 512), dim("d_model", 64)], normal(0.1));
    g.output("y", &table.gather(&words, "vocab").tanh()); // L0407
}

const MANY: &str = "forty layers with a bias each";
fn many(g: &Graph, bias: bool) -> Tensor {
    let mut x = g.input("x", DType::F32, &[dim("batch", 64), dim("d", 16)]);
    for i in 0..40 {
        let w = g.variable(&format!("b.{i}"), &[dim("d", 16)], Init::zeros());
        x = if bias { x.add(&w).tanh() } else { x.tanh() }; // L0404
    }
    x.sum_all()
}
fn many_biases(g: &Graph) {
    let loss = many(g, true);
    Optimizer::sgd(0.1).apply(g, &loss);
}
fn no_biases(g: &Graph) {
    let loss = many(g, false);
    Optimizer::sgd(0.1).apply(g, &loss);
}

fn layer(g: &Graph) -> Tensor {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    x.contract(&w, &["d_in"]).tanh().sum_all() // L0406
}
fn accumulated(g: &Graph) {
    let loss = layer(g);
    Optimizer::sgd(0.1).accumulate(g, &loss, 4);
}
fn applied(g: &Graph) {
    let loss = layer(g);
    Optimizer::sgd(0.1).apply(g, &loss);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Product,
    Softmax,
    Norm,
    Lookup,
}

/// What a sum over split dimensions is for, if one may want it otherwise.
fn kind(p: &Planned, l: &Lowered, i: &Instr, f: ReduceFn) -> Option<Kind> {
    let (id, node) = l.node_of(i);
    match &node.op {
        op if op.is_product() => (!p.like_a_variable(&node.ty)).then_some(Kind::Product),
        Prim::Gather(_) => Some(Kind::Lookup),
        Prim::Reduce(_) if f == ReduceFn::Max => Some(Kind::Softmax),
        Prim::Reduce(_) if !p.like_a_variable(&node.ty) && !node.ty.dims.is_empty() => {
            // The result is used together with what it was made from.
            let source = l.root(node.inputs[0]);
            let takers = l.takers();
            let mut open = vec![(id, 0)];
            while let Some((at, depth)) = open.pop() {
                for taker in takers.get(&at).into_iter().flatten() {
                    let n = l.function.node(*taker);
                    let of_both = n.inputs.iter().any(|x| *x != at && (*x == node.inputs[0] || l.root(*x) == source));
                    if matches!(n.op, Prim::Binary(_)) && of_both {
                        return Some(Kind::Norm);
                    }
                    if depth < 3 && n.op.op().elementwise() && n.ty.elements() <= node.ty.elements() {
                        open.push((*taker, depth + 1));
                    }
                }
            }
            None
        }
        _ => None,
    }
}

/// All-reduces that another split would not need: only where one was found that is better for the whole program.
fn split_sums(p: &Planned, which: Kind) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (i, axes, f) in l.all_reduces() {
            let bytes = l.most_all_reduced(i);
            if bytes < super::WORTHWHILE * l.total.sent_bytes || kind(p, l, i, f) != Some(which) {
                continue;
            }
            let (id, node) = l.node_of(i);
            let reduced = node.op.op().reduced(&l.function.input_types(node));
            for axis in axes {
                let name = p.axis_name(axis);
                let Some(dim) = reduced.iter().find(|d| p.splits(&d.name, name)) else { continue };
                let Some(change) = p.better(p.instead(&dim.name, name, &node.ty.dims)) else { continue };
                let what = match which {
                    Kind::Product => format!("this `{}` sums over", node.op.op().name()),
                    Kind::Softmax => "this softmax goes over".into(),
                    Kind::Norm => "this norm goes over".into(),
                    Kind::Lookup => "this looks up rows of".into(),
                };
                let message = format!("{what} `{}`, which is split over `{name}`", dim.name);
                let finding = Finding::new(message, "split a dimension that is kept").at(l, id).dim(&dim.name);
                out.push(finding.axis(name).sent(bytes).change(Some(change)));
            }
        }
    }
    out
}

fn small_all_reduces(p: &Planned) -> Vec<Finding> {
    const SMALL: usize = 4096;
    let mut out = vec![];
    for l in &p.functions {
        let size = |i: &Instr| l.value(i.output).bytes(0);
        let all: Vec<&Instr> = l.all_reduces().map(|(i, ..)| i).collect();
        let small: Vec<&Instr> = all.iter().copied().filter(|i| size(i) > 0 && size(i) < SMALL).collect();
        let moves = l.moves.iter().filter(|m| m.bytes > 0.0).count();
        if small.len() < 32 || 2 * small.len() < all.len() + moves {
            continue;
        }
        let message = format!(
            "{} of {} steps that communicate are all-reduces of less than 4 KiB",
            small.len(),
            all.len() + moves
        );
        let help = "leave out biases before norms, take norms over what is not split, or do more in a step";
        let finding = Finding::new(message, help).at(l, l.node_of(small[0]).0);
        let others = l.mesh.size().saturating_sub(1);
        out.push(finding.messages((small.len() * others) as f64).counted(small.len()));
    }
    out
}

fn several_partials(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (i, axes, _) in l.all_reduces() {
            let Some(axis) = axes.iter().copied().find(|a| !p.axis_size(*a).is_power_of_two()) else { continue };
            let parts = i.inputs.iter().flat_map(|v| &*l.value(*v).nodes).copied().max().unwrap_or(1);
            if parts < 2 {
                continue;
            }
            let (name, size) = (p.axis_name(axis), p.axis_size(axis));
            let change = Change::resized(&p.plan.mesh, &p.plan.layout, name, size.next_power_of_two());
            let smaller = Change::resized(&p.plan.mesh, &p.plan.layout, name, size.next_power_of_two() / 2);
            let change = [change, smaller].into_iter().find(|c| p.trial(c).is_some());
            let bytes = l.most_all_reduced(i);
            let message = format!("devices along `{name}` ({size}) send up to {parts} partial sums of this");
            let help = format!("use a power of two of devices along `{name}`");
            let finding = Finding::new(message, help).at(l, l.node_of(i).0).axis(name);
            out.push(finding.sent(bytes * (1.0 - 1.0 / parts as f64)).change(change));
        }
    }
    out
}

fn each_part(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in p.functions.iter().filter(|l| !l.trains(p.program)) {
        // Slots to which something is added that was all-reduced, of the shape of a trained variable.
        let slots =
            l.function.assigns.iter().filter(|(v, _)| p.program.variables[v.index()].name.ends_with("/gradient"));
        let types: Vec<_> = slots.map(|(v, _)| &p.program.variables[v.index()].ty.dims).collect();
        let summed = l.all_reduces().filter(|(i, ..)| types.contains(&&l.value(i.output).ty.dims));
        let summed: Vec<(&Instr, f64)> = summed.map(|(i, ..)| (i, l.most_all_reduced(i))).collect();
        let bytes: f64 = summed.iter().map(|(_, b)| b).sum();
        let Some((most, _)) = summed.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
        let message = format!("{} gradients are all-reduced in each micro-batch", summed.len());
        let help = "use fewer and larger micro-batches, with blocks that are recomputed where memory is short";
        // In two parts, half of them would do.
        let finding = Finding::new(message, help).at(l, l.node_of(most).0).sent(0.5 * bytes);
        out.push(finding.counted(summed.len()));
    }
    out
}
