//! The program's edges: feeds, fetches, variables and checkpoints; and work that is done twice.

use super::lowered::Lowered;
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, dim};
use crate::graph::{Graph, NodeId};
use crate::nn::init::normal;
use crate::ops::Prim;
use crate::optim::Optimizer;
use crate::program::VarId;
use crate::region::Region;
use crate::spmd::{SpmdOp, ValueId};
use std::collections::BTreeSet;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0701",
        name: "large-fetch",
        severity: Severity::Warning,
        about: "A training step gives out a whole tensor. It is kept until the step has ended, and fetching it brings all \
                of it to one place. Give out sums, means and counts, and the tensor itself by a function of its own that \
                runs when it is wanted.",
        failing: example(fetches_all, "a training step that gives out its activations", "data=2", "batch:data"),
        fixed: example(fetches_mean, "the same, giving out their mean", "data=2", "batch:data"),
        check: Check::Plan(large_fetch),
    },
    Lint {
        code: "L0702",
        name: "feed-larger-than-used",
        severity: Severity::Warning,
        about: "Less than half of a feed is used. It is read, sent and kept whole. Feed the part that is used.",
        failing: example(feeds_all, "the first 16 of 128 positions of a feed", "data=2", "batch:data"),
        fixed: example(feeds_part, "a feed of 16 positions", "data=2", "batch:data"),
        check: Check::Plan(feed_larger),
    },
    Lint {
        code: "L0703",
        name: "unused-feed",
        severity: Severity::Warning,
        about: "A feed of a function that nothing is computed of. It has to be fed in every run. Take the input out.",
        failing: example(unused_feed, "a mask that is not used", "1", ""),
        fixed: example(used_feed, "a mask that is used", "1", ""),
        check: Check::Plan(unused_feed_lint),
    },
    Lint {
        code: "L0704",
        name: "unused-variable",
        severity: Severity::Warning,
        about: "A variable that no function reads or sets. It takes memory, and space in every checkpoint. Take it out; a \
                program of several stages only holds those of its stage.",
        failing: example(unused_variable, "a bias that is not used", "1", ""),
        fixed: example(used_variable, "a bias that is used", "1", ""),
        check: Check::Plan(unused_variable_lint),
    },
    Lint {
        code: "L0705",
        name: "untrained-variable",
        severity: Severity::Warning,
        about: "A variable that is declared to be trained, and that no function sets although others are trained. Make it a \
                `state` if it is meant to stay as it is, or read it in the function that trains.",
        failing: example(untrained, "a step that reads two weights and trains one", "1", ""),
        fixed: example(trained, "a step that trains both", "1", ""),
        check: Check::Plan(untrained_lint),
    },
    Lint {
        code: "L0706",
        name: "computed-twice",
        severity: Severity::Warning,
        about: "A product is computed twice of the same factors. The engine computes what it is asked for: keep the first \
                tensor and use it again.",
        failing: example(twice, "the same product at two places", "1", ""),
        fixed: example(once, "the product, used twice", "1", ""),
        check: Check::Plan(computed_twice),
    },
    Lint {
        code: "L0707",
        name: "narrowed-feed",
        severity: Severity::Advice,
        about: "A feed of `f32` of which only a `bf16` cast is used. Fed as `bf16` it takes half of the memory; the caller \
                still gives `f32`, which is rounded on its way.",
        failing: example(wide_feed, "a feed of `f32`, cast to `bf16`", "1", ""),
        fixed: example(narrow_feed, "a feed of `bf16`", "1", ""),
        check: Check::Plan(narrowed_feed),
    },
    Lint {
        code: "L0708",
        name: "lone-writer",
        severity: Severity::Advice,
        about: "One device writes most of a checkpoint: devices that hold the same take turns variable by variable, and one \
                variable is larger than all others together. Split a dimension of it, so that each device writes its part.",
        failing: example(one_table, TABLE, "data=4", "batch:data"),
        fixed: example(one_table, TABLE, "data=4", "vocab:data"),
        check: Check::Plan(lone_writer),
    },
];

fn training(g: &Graph, fetch: impl Fn(&crate::graph::Tensor)) {
    let x = g.input("x", DType::F32, &[dim("batch", 128), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    let y = x.contract(&w, &["d_in"]).tanh(); // L0701
    fetch(&y);
    Optimizer::sgd(0.1).apply(g, &y.mean_all());
}
fn fetches_all(g: &Graph) {
    training(g, |y| g.output("y", y));
}
fn fetches_mean(g: &Graph) {
    training(g, |y| g.output("y", &y.mean_all()));
}

fn feeds(g: &Graph, positions: usize) {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("position", positions), dim("d", 64)]); // L0702
    g.output("y", &x.slice("position", 0, 16).exp().sum_all());
}
fn feeds_all(g: &Graph) {
    feeds(g, 128);
}
fn feeds_part(g: &Graph) {
    feeds(g, 16);
}

fn masked(g: &Graph, used: bool) {
    let x = g.input("x", DType::F32, &[dim("d", 64)]);
    let mask = g.input("mask", DType::F32, &[dim("d", 64)]); // L0703
    g.output("y", &(if used { x.mul(&mask) } else { x }).sum_all());
}
fn unused_feed(g: &Graph) {
    masked(g, false);
}
fn used_feed(g: &Graph) {
    masked(g, true);
}

fn biased(g: &Graph, used: bool) {
    let x = g.input("x", DType::F32, &[dim("d", 64)]);
    let bias = g.variable("bias", &[dim("d", 64)], normal(0.1)); // L0704
    g.output("y", &(if used { x.add(&bias) } else { x }).sum_all());
}
fn unused_variable(g: &Graph) {
    biased(g, false);
}
fn used_variable(g: &Graph) {
    biased(g, true);
}

fn trains(g: &Graph, both: bool) {
    let x = g.input("x", DType::F32, &[dim("d", 64)]);
    let v = g.variable("v", &[dim("d", 64)], normal(0.1)); // L0705
    let w = g.variable("w", &[dim("d", 64)], normal(0.1));
    let loss = x.mul(&v).mul(&w).sum_all();
    let wrt = if both { vec![v, w] } else { vec![w] };
    let grads = g.gradients(&loss, &wrt.iter().collect::<Vec<_>>());
    wrt.iter().zip(grads).for_each(|(w, grad)| g.assign(w, &w.sub(&grad)));
}
fn untrained(g: &Graph) {
    trains(g, false);
}
fn trained(g: &Graph) {
    trains(g, true);
}

fn product(g: &Graph, again: bool) {
    let x = g.input("x", DType::F32, &[dim("row", 64), dim("d", 64)]);
    let w = g.variable("w", &[dim("d", 64), dim("e", 64)], normal(0.1));
    let first = x.contract(&w, &["d"]);
    let second = if again { x.contract(&w, &["d"]) } else { first.clone() }; // L0706
    g.output("y", &first.exp().add(&second.tanh()).sum_all());
}
fn twice(g: &Graph) {
    product(g, true);
}
fn once(g: &Graph) {
    product(g, false);
}

fn fed(g: &Graph, dtype: DType) {
    let x = g.input("x", dtype, &[dim("row", 256), dim("d", 64)]); // L0707
    let w = g.variable("w", &[dim("d", 64), dim("e", 16)], normal(0.1)).cast(DType::Bf16);
    g.output("y", &x.cast(DType::Bf16).contract(&w, &["d"]).cast(DType::F32).sum_all());
}
fn wide_feed(g: &Graph) {
    fed(g, DType::F32);
}
fn narrow_feed(g: &Graph) {
    fed(g, DType::Bf16);
}

const TABLE: &str = "a table [vocab:512, d:64] and a bias";
fn one_table(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("d", 64)]);
    let table = g.variable("table", &[dim("vocab", 512), dim("d", 64)], normal(0.1)); // L0708
    let bias = g.variable("bias", &[dim("d", 64)], normal(0.1));
    g.output("y", &x.add(&bias).contract(&table, &["d"]).sum_all());
}

fn bytes_of(l: &Lowered, v: ValueId) -> f64 {
    (0..l.mesh.size()).map(|d| l.value(v).bytes(d)).max().unwrap_or(0) as f64
}

fn large_fetch(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in p.functions.iter().filter(|l| l.trains(p.program)) {
        for (name, v) in l.spmd.outputs.iter().filter(|(_, v)| l.value(*v).ty.elements() >= 4096) {
            let message = format!("a training step gives out all of `{name}`, {}", l.value(*v).ty);
            let finding = Finding::new(message, "give out a mean or a count, and the tensor by a function of its own");
            out.push(finding.at(l, l.origin(*v)).held(bytes_of(l, *v)));
        }
    }
    out
}

/// What all readers together need of a value on a device: the box around it.
fn needed(l: &Lowered, v: ValueId, device: usize) -> Option<Region> {
    let mut all: Option<Region> = None;
    for r in &l.readers[v.index()] {
        let reader = &l.spmd.instrs[*r];
        let SpmdOp::Compute { prim, .. } = &reader.op else { return None };
        let (_, node) = l.node_of(reader);
        let types = l.function.input_types(node);
        for (i, _) in reader.inputs.iter().enumerate().filter(|(_, x)| **x == v) {
            let needs = prim.op().needs(i, &types, &node.ty, &l.iteration(reader, device));
            all = Some(match all {
                None => needs,
                Some(all) => Region(
                    all.0
                        .into_iter()
                        .zip(needs.0)
                        .map(|((n, a), (_, b))| (n, a.start.min(b.start)..a.end.max(b.end)))
                        .collect(),
                ),
            });
        }
    }
    all
}

fn feed_larger(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (name, v) in &l.spmd.inputs {
            let value = l.value(*v);
            let used = |d: usize| needed(l, *v, d).map(|r| r.elements());
            let Some(used) = (0..l.mesh.size()).map(used).try_fold(0, |most, u| Some(most.max(u?))) else { continue };
            let held = value.regions.iter().map(|r| r.elements()).max().unwrap_or(0);
            if used == 0 || 2 * used >= held {
                continue;
            }
            let lost = ((held - used) * value.ty.dtype.bytes()) as f64;
            let message = format!("of the feed `{name}`, {}, {} % is used", value.ty, 100 * used / held.max(1));
            out.push(Finding::new(message, "feed the part that is used").at(l, value.node).held(lost));
        }
    }
    out
}

fn unused_feed_lint(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        let unused = l.spmd.inputs.iter().filter(|(_, v)| l.readers[v.index()].is_empty());
        let unused = unused
            .filter(|(_, v)| l.spmd.outputs.iter().all(|(_, o)| o != v) && l.spmd.assigns.iter().all(|(_, a)| a != v));
        for (name, v) in unused {
            let message = format!("nothing is computed of the feed `{name}`");
            out.push(Finding::new(message, "take the input out").at(l, l.value(*v).node).held(bytes_of(l, *v)));
        }
    }
    // However small it is, somebody feeds it.
    out.iter_mut().for_each(|f| f.lost = super::Lost::default());
    out
}

fn unused_variable_lint(p: &Planned) -> Vec<Finding> {
    let used: BTreeSet<VarId> = p.functions.iter().flat_map(|l| l.function.variables()).collect();
    let list = p.program.variables.iter().zip(0..).filter(|(_, i)| !used.contains(&VarId(*i)));
    let say = |v: &crate::program::Variable| {
        let message = format!("no function reads or sets the variable `{}`", v.name);
        Finding::new(message, "take it out").place(v.place)
    };
    list.map(|(v, _)| say(v)).collect()
}

fn untrained_lint(p: &Planned) -> Vec<Finding> {
    let set: BTreeSet<VarId> = p.functions.iter().flat_map(|l| l.function.assigns.iter().map(|(v, _)| *v)).collect();
    let trained = |v: &VarId| p.program.variables[v.index()].trainable;
    // Functions that add up gradients train as well, if another one sets.
    let training: Vec<&Lowered> = p.functions.iter().filter(|l| l.trains(p.program)).collect();
    let read: BTreeSet<VarId> = training.iter().flat_map(|l| l.function.variables()).filter(trained).collect();
    let left = read.iter().filter(|v| !set.contains(v));
    let say = |v: &VarId| {
        let v = &p.program.variables[v.index()];
        let message = format!("the variable `{}` is declared to be trained, and no function sets it", v.name);
        Finding::new(message, "make it a `state`, or train it").place(v.place)
    };
    left.map(say).collect()
}

fn computed_twice(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        let products: Vec<NodeId> =
            l.computes().filter(|(_, op)| op.is_product()).map(|(i, _)| l.node_of(i).0).collect();
        for (k, id) in products.iter().enumerate() {
            let node = l.function.node(*id);
            // What a backward pass makes again has the place of what it is a copy of.
            let same = products[..k].iter().map(|j| l.function.node(*j)).find(|other| {
                other.op == node.op
                    && other.inputs == node.inputs
                    && other.layout == node.layout
                    && other.place != node.place
            });
            let Some(first) = same else { continue };
            let made = l.computes().find(|(i, _)| l.node_of(i).0 == *id);
            let flops = made.map_or(0.0, |(i, _)| l.most_flops(i));
            let message = format!("this product was computed before, at {}", first.place);
            out.push(Finding::new(message, "keep the first tensor").at(l, *id).flops(flops));
        }
    }
    out
}

fn narrowed_feed(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (name, v) in l.spmd.inputs.iter().filter(|(_, v)| l.value(*v).ty.dtype == DType::F32) {
            let mut readers = l.readers[v.index()].iter().map(|r| &l.spmd.instrs[*r]).peekable();
            let narrows = |i: &crate::spmd::Instr| {
                matches!(&i.op, SpmdOp::Compute { prim: Prim::Cast(_), .. })
                    && l.value(i.output).ty.dtype == DType::Bf16
            };
            if readers.peek().is_some() && readers.all(narrows) {
                let message = format!("only a `bf16` cast of the feed `{name}` is used");
                let finding = Finding::new(message, "make it an input of `bf16`").at(l, l.value(*v).node);
                out.push(finding.held(0.5 * bytes_of(l, *v)));
            }
        }
    }
    out
}

fn lone_writer(p: &Planned) -> Vec<Finding> {
    let devices = p.plan.mesh.size();
    let sizes = p.program.variables.iter().enumerate().map(|(i, v)| (p.plan.variables[0][i].1.bytes, v.ty.bytes(), v));
    let all: usize = p.program.variables.iter().map(|v| v.ty.bytes()).sum();
    let Some((held, bytes, largest)) = sizes.max_by_key(|(held, ..)| *held) else { return vec![] };
    if devices < 2 || held != bytes || 2 * bytes < all {
        return vec![];
    }
    let message = format!("one device writes `{}`, {} % of every checkpoint", largest.name, 100 * bytes / all.max(1));
    let help = "split a dimension of it, so that each device writes its part";
    let pairs = largest.ty.dims.iter().flat_map(|d| p.axes().map(move |(_, axis, _)| (d, axis)));
    let pairs = pairs.filter(|(d, axis)| p.has_room(d, axis));
    let change = p.better(pairs.map(|(d, axis)| Change::only(&p.plan.layout, &d.name, axis)));
    vec![Finding::new(message, help).place(largest.place).change(change)]
}
