//! Work that is not shared out: axes that split nothing, and what each device along an axis computes whole.

use super::lowered::Lowered;
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Lost, Severity, example};
use crate::dim::{DType, Name, dim};
use crate::graph::{Graph, NodeId};
use crate::nn::{self, init::normal};
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::spmd::Instr;
use std::collections::BTreeMap;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0101",
        name: "unused-axis",
        severity: Severity::Warning,
        about: "An axis of the mesh over which no tensor is split. Devices along it hold the same and compute the same: \
                they cost what they cost and save nothing. Split a dimension over the axis, the batch as a rule, or make \
                the mesh smaller.",
        failing: example(two_layers, TWO_LAYERS, "data=2,model=2", "batch:data"),
        fixed: example(two_layers, TWO_LAYERS, "data=2,model=2", "batch:data,d_ff:model"),
        check: Check::Plan(unused_axis),
    },
    Lint {
        code: "L0102",
        name: "replicated-product",
        severity: Severity::Warning,
        about: "A product (a matrix product, a convolution) that every device along an axis computes whole, although the \
                axis splits other things. Most of a network's time is in products, so that devices along the axis save \
                little. Split a dimension of the product over the axis.",
        failing: example(two_stacks, TWO_STACKS, "data=2,model=2", "batch:data,d_ff:model"),
        fixed: example(two_stacks, TWO_STACKS, "data=2,model=2", "batch:data,d_ff:model,d_wide:model"),
        check: Check::Plan(replicated_product),
    },
    Lint {
        code: "L0103",
        name: "replicated-logits",
        severity: Severity::Warning,
        about: "A product that every device along an axis computes whole, and whose softmax goes over a dimension of it \
                that could be split: logits over a vocabulary are the largest product and the largest activation of many \
                models, attention scores of others. Split the vocabulary over the axis (maximum and sum of the softmax are \
                small, and combined at the end), or the heads.",
        failing: example(classifier, CLASSIFIER, "data=2,model=2", "batch:data,d_ff:model"),
        fixed: example(classifier, CLASSIFIER, "data=2,model=2", "batch:data,d_ff:model,vocab:model"),
        check: Check::Plan(replicated_logits),
    },
    Lint {
        code: "L0104",
        name: "replicated-map",
        severity: Severity::Warning,
        about: "Elementwise functions, reductions and pooling of activations that every device along an axis computes \
                whole, although a dimension of them can be split there without sending more than that saves.",
        failing: example(chain, CHAIN, "data=2,model=2", "batch:data,d_ff:model"),
        fixed: example(chain, CHAIN, "data=2,model=2", "batch:data,d_ff:model,wide:model"),
        check: Check::Plan(replicated_map),
    },
    Lint {
        code: "L0105",
        name: "replicated-random",
        severity: Severity::Warning,
        about: "Random numbers, of drop-out as a rule, that every device along an axis draws for a whole tensor. A draw \
                costs some 25 operations. Split a dimension of the tensor over the axis: numbers depend on an element's \
                index alone, so that they are the same on every layout.",
        failing: example(noise, NOISE, "data=2,model=2", "batch:data,d_ff:model"),
        fixed: example(noise, NOISE, "data=2,model=2", "batch:data,d_ff:model,wide:model"),
        check: Check::Plan(replicated_random),
    },
    Lint {
        code: "L0106",
        name: "ignored-rule",
        severity: Severity::Warning,
        about: "A rule that splits nothing, since every op that makes a tensor with the dimension needs it whole: channels \
                of a grouped convolution, the places of a top-k. Take the rule out, or split another dimension.",
        failing: example(best, BEST, "data=2,model=2", "batch:data,place:model"),
        fixed: example(best, BEST, "data=2", "batch:data"),
        check: Check::Plan(ignored_rule),
    },
];

const TWO_LAYERS: &str = "two dense layers, d_model -> d_ff -> d_model";
fn two_layers(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_model", 64)]);
    let w = g.variable("w", &[dim("d_model", 64), dim("d_ff", 256)], normal(0.1));
    let v = g.variable("v", &[dim("d_ff", 256), dim("d_model", 64)], normal(0.1));
    let hidden = x.contract(&w, &["d_model"]).tanh(); // L0101
    g.output("y", &hidden.contract(&v, &["d_ff"]).sum_all()); // L0101
}

const TWO_STACKS: &str = "a layer of width d_ff and one of width d_wide";
fn two_stacks(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_model", 64)]);
    let w = g.variable("w", &[dim("d_model", 64), dim("d_ff", 256)], normal(0.1));
    let v = g.variable("v", &[dim("d_model", 64), dim("d_wide", 512)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_model"]).sum_all());
    g.output("z", &x.contract(&v, &["d_model"]).sum_all()); // L0102
}

const CLASSIFIER: &str = "a layer of width d_ff, and the cross-entropy of logits over `vocab`";
fn classifier(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_model", 64)]);
    let w = g.variable("w", &[dim("d_model", 64), dim("d_ff", 256)], normal(0.1));
    let v = g.variable("v", &[dim("d_model", 64), dim("vocab", 1024)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_model"]).sum_all());
    let logits = x.contract(&v, &["d_model"]); // L0103
    g.output("loss", &nn::log_sum_exp(&logits, &["vocab"]).sum_all());
}

const CHAIN: &str = "a layer of width d_ff, and a long chain of elementwise functions along `wide`";
fn chain(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_model", 16)]);
    let w = g.variable("w", &[dim("d_model", 16), dim("d_ff", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_model"]).sum_all());
    let mut wide = g.input("wide", DType::F32, &[dim("batch", 64), dim("wide", 1024)]);
    for _ in 0..20 {
        wide = wide.tanh(); // L0104
    }
    g.output("z", &wide.sum_all()); // L0104
}

const NOISE: &str = "a layer of width d_ff, and drop-out of `[batch:64, wide:1024]`";
fn noise(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_model", 16)]);
    let w = g.variable("w", &[dim("d_model", 16), dim("d_ff", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_model"]).sum_all());
    let wide = g.input("wide", DType::F32, &[dim("batch", 64), dim("wide", 1024)]);
    g.output("z", &nn::dropout(&wide, 0.9, nn::Mode::Train).sum_all()); // L0105
}

const BEST: &str = "the indices of the eight largest scores of each row, along `place`";
fn best(g: &Graph) {
    let score = g.input("score", DType::F32, &[dim("batch", 8), dim("word", 64)]);
    let (_, index) = score.top_k("word", &dim("place", 8)); // L0106
    g.output("best", &index);
}

fn unused_axis(p: &Planned) -> Vec<Finding> {
    let unused = p.axes().filter(|(axis, ..)| !p.uses(*axis));
    let one = |(_, name, size): (usize, &Name, usize)| {
        let flops = p.now.lost.flops * (1.0 - 1.0 / size as f64);
        let (change, help) = match p.better(p.splitting(name, &splittable(p, name))) {
            Some(change) => (change, "split a dimension over it"),
            None => (Change::resized(&p.plan.mesh, &p.plan.layout, name, 1), "take the axis out of the mesh"),
        };
        let message = format!("nothing is split over the axis `{name}`: its {size} devices all do the same");
        let finding = Finding::new(message, help).axis(name).flops(flops).change(Some(change));
        match costliest(p) {
            Some((l, node)) => Finding { function: None, ..finding.at(l, node) },
            None => finding,
        }
    };
    unused.map(one).collect()
}

/// The node that most operations are in.
fn costliest<'p>(p: &'p Planned) -> Option<(&'p Lowered<'p>, NodeId)> {
    let all = p.functions.iter().flat_map(|l| l.computes().map(move |(i, _)| (l, i)));
    let (l, i) = all.max_by(|(l, i), (m, j)| l.flops(i, 0).total_cmp(&m.flops(j, 0)))?;
    Some((l, l.node_of(i).0))
}

/// Dimensions that have chunks enough to be split over an axis too, those of most operations first.
fn splittable(p: &Planned, axis: &Name) -> Vec<Name> {
    let mut flops: BTreeMap<Name, f64> = BTreeMap::new();
    for l in &p.functions {
        for (i, _) in l.computes() {
            for d in l.dims(i) {
                let most = if p.has_room(&d, axis) { l.flops(i, 0) } else { f64::NEG_INFINITY };
                *flops.entry(d.name).or_default() += most;
            }
        }
    }
    let mut dims: Vec<(Name, f64)> = flops.into_iter().filter(|(_, f)| *f > 0.0).collect();
    dims.sort_by(|a, b| b.1.total_cmp(&a.1));
    // A dimension of the axis' name is meant for it.
    dims.sort_by_key(|(d, _)| d != axis);
    dims.into_iter().map(|(d, _)| d).collect()
}

/// What devices along a used axis compute alike, of the kind that is asked for: a finding for each axis and function.
fn replicated(
    p: &Planned,
    which: impl Fn(&Lowered, NodeId, &Prim) -> bool,
    say: impl Fn(&Prim, &Name) -> String,
    only_if_better: bool,
) -> Vec<Finding> {
    let mut out = vec![];
    for (axis, name, size) in p.axes().filter(|(axis, ..)| p.uses(*axis)) {
        for l in &p.functions {
            let alike = l.computes().filter(|(i, op)| which(l, l.node_of(i).0, op) && l.replicated(i, axis));
            let alike: Vec<(&Instr, &Prim, f64)> = alike.map(|(i, op)| (i, op, l.most_flops(i))).collect();
            let flops: f64 = alike.iter().map(|(.., f)| f * (1.0 - 1.0 / size as f64)).sum();
            let Some((most, op, _)) = alike.iter().max_by(|a, b| a.2.total_cmp(&b.2)) else { continue };
            // Not worth a search.
            if p.prices.of(&Lost { flops, ..Lost::default() }) < super::WORTHWHILE * p.prices.of(&l.total) {
                continue;
            }
            let dims: Vec<Name> = l.dims(most).into_iter().filter(|d| p.has_room(d, name)).map(|d| d.name).collect();
            let change = p.better(p.splitting(name, &dims));
            if change.is_none() && only_if_better {
                continue;
            }
            let help = match &change {
                Some(_) => format!("split one of its dimensions over `{name}`"),
                None => format!(
                    "give it rules of its own (`with_layout`) that split a dimension over `{name}`, or use a mesh with a \
                     smaller `{name}`"
                ),
            };
            let finding = Finding::new(say(op, name), help).at(l, l.node_of(most).0);
            out.push(finding.axis(name).flops(flops).change(change).counted(alike.len()));
        }
    }
    out
}

/// The dimension over which a softmax or maximum of a node goes, elementwise functions between.
fn softmaxed(l: &Lowered, takers: &BTreeMap<NodeId, Vec<NodeId>>, node: NodeId) -> bool {
    let mut open = vec![(node, 0)];
    while let Some((id, depth)) = open.pop() {
        for taker in takers.get(&id).into_iter().flatten() {
            let n = l.function.node(*taker);
            match &n.op {
                Prim::Reduce(r) if r.f == ReduceFn::Max => {
                    return r.over.iter().any(|d| l.function.node(node).ty.has(d));
                }
                Prim::Cast(_) | Prim::Binary(_) | Prim::Unary(_) if depth < 3 => open.push((*taker, depth + 1)),
                _ => {}
            }
        }
    }
    false
}

fn logits(l: &Lowered) -> Vec<NodeId> {
    let takers = l.takers();
    let products = l.computes().filter(|(_, op)| op.is_product()).map(|(i, _)| l.node_of(i).0);
    products.filter(|n| softmaxed(l, &takers, *n)).collect()
}

fn replicated_product(p: &Planned) -> Vec<Finding> {
    let logits: BTreeMap<&Name, Vec<NodeId>> = p.functions.iter().map(|l| (&l.function.name, logits(l))).collect();
    let which = |l: &Lowered, n: NodeId, op: &Prim| op.is_product() && !logits[&l.function.name].contains(&n);
    replicated(
        p,
        which,
        |op, axis| format!("each device along `{axis}` computes this `{}` whole", op.op().name()),
        false,
    )
}

fn replicated_logits(p: &Planned) -> Vec<Finding> {
    let logits: BTreeMap<&Name, Vec<NodeId>> = p.functions.iter().map(|l| (&l.function.name, logits(l))).collect();
    let which = |l: &Lowered, n: NodeId, _: &Prim| logits[&l.function.name].contains(&n);
    replicated(
        p,
        which,
        |_, axis| format!("each device along `{axis}` computes this product, of which a softmax is taken, whole"),
        true,
    )
}

fn replicated_map(p: &Planned) -> Vec<Finding> {
    let which = |l: &Lowered, n: NodeId, op: &Prim| {
        !op.is_product() && !matches!(op, Prim::Random(_)) && !p.like_a_variable(&l.function.node(n).ty)
    };
    replicated(
        p,
        which,
        |op, axis| format!("each device along `{axis}` computes this `{}` whole", op.op().name()),
        true,
    )
}

fn replicated_random(p: &Planned) -> Vec<Finding> {
    let which = |_: &Lowered, _: NodeId, op: &Prim| matches!(op, Prim::Random(_));
    replicated(p, which, |_, axis| format!("each device along `{axis}` draws these random numbers whole"), true)
}

fn ignored_rule(p: &Planned) -> Vec<Finding> {
    let splits = |dim: &Name, axis: usize| {
        p.functions.iter().any(|l| {
            let made = l.spmd.values.iter().any(|v| l.split(&v.regions, axis).contains(dim));
            made || l.computes().any(|(i, _)| {
                let (a, b) = l.along(axis);
                l.iteration(i, a).get(dim) != l.iteration(i, b).get(dim)
            })
        })
    };
    let mut out = vec![];
    for (axis, name, _) in p.axes() {
        for dim in p.rules_of(name).into_iter().filter(|d| !splits(d, axis)) {
            let at = p.functions.iter().find_map(|l| {
                let node = l.function.nodes.iter().position(|n| n.ty.has(dim))?;
                Some((l, NodeId(node as u32)))
            });
            let message = format!("the rule `{dim}:{name}` splits nothing: the ops that make `{dim}` need it whole");
            let finding = Finding::new(message, "take the rule out").dim(dim).axis(name);
            let finding = finding.change(Some(Change::without(&p.plan.layout, dim, name)));
            out.extend(at.map(|(l, node)| finding.at(l, node)));
        }
    }
    out
}
