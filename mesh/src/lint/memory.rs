//! Memory: what could be made again, peaks that one step makes, and copies.

use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, Name, dim};
use crate::graph::{Graph, Tensor};
use crate::nn::init::normal;
use crate::ops::Prim;
use crate::optim::Optimizer;
use crate::plan::ExchangeKind;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0603",
        name: "recompute",
        severity: Severity::Warning,
        about: "Memory is short, and values that a backward pass could make again take a good part of the peak. Have blocks \
                recomputed: `--recompute auto` chooses those that cost least, and not one bit changes.",
        failing: example(deep_kept, "six layers in blocks (`g.block`), training", "1", "").within(160 << 10),
        fixed: example(deep_again, "the same in regions that are made again (`g.recompute`)", "1", "")
            .within(160 << 10),
        check: Check::Plan(recompute),
    },
    Lint {
        code: "L0604",
        name: "memory-cliff",
        severity: Severity::Advice,
        about: "One short stretch of a run needs half as much memory again as all the rest, so that most memory is idle most \
                of the time. What is alive there is listed under `memory`: split that tensor, compute it in parts, or recompute \
                what is kept across it.",
        failing: example(cliff, CLIFF, "1", ""),
        fixed: example(no_cliff, "the same with 4 columns", "1", ""),
        check: Check::Plan(cliff_lint),
    },
    Lint {
        code: "L0605",
        name: "replicated-activation",
        severity: Severity::Warning,
        about: "Memory is short, and every device along an axis holds the whole of a large activation, of which a dimension \
                could be split there.",
        failing: example(activation, ACTIVATION, "model=4", "d_ff:model").within(100 << 10),
        fixed: example(activation, ACTIVATION, "model=4", "row:model").within(100 << 10),
        check: Check::Plan(replicated_activation),
    },
    Lint {
        code: "L0606",
        name: "gathered-copy",
        severity: Severity::Warning,
        about: "A copy that is gathered from other devices takes more than a quarter of the peak. Split what needs it, so that \
                a part is enough, or gather it in parts.",
        failing: example(gathered, GATHERED, "data=4", "row:data"),
        fixed: example(not_gathered, "the same without `with_layout`", "data=4", "row:data"),
        check: Check::Plan(gathered_copy),
    },
    Lint {
        code: "L0607",
        name: "uneven-memory",
        severity: Severity::Warning,
        about: "One device needs a fifth more memory than the mean of all: shards are unequal, and the fullest device decides \
                what fits. Use a divisor of the number of chunks for the axis.",
        failing: example(rows, ROWS, "data=5", "row:data"),
        fixed: example(rows, ROWS, "data=4", "row:data"),
        check: Check::Plan(uneven_memory),
    },
    Lint {
        code: "L0608",
        name: "stored-broadcast",
        severity: Severity::Warning,
        about: "A product reads a broadcast tensor that is stored in full. Products match dimensions by name: what lacks one \
                is the same all along it, so that the broadcast is not needed.",
        failing: example(broadcast, BROADCAST, "1", ""),
        fixed: example(no_broadcast, "the same without `broadcast`", "1", ""),
        check: Check::Plan(stored_broadcast),
    },
    Lint {
        code: "L0609",
        name: "wide-type",
        severity: Severity::Advice,
        about: "Memory is short, and all products are of `f32`. In `bf16` activations take half of the memory, and of what \
                is sent; variables stay `f32`. Cast the input of the network (`--dtype bf16`).",
        failing: example(f32_layer, F32, "1", "").within(200 << 10),
        fixed: example(bf16_layer, "the same of `bf16`", "1", "").within(200 << 10),
        check: Check::Plan(wide_type),
    },
];

fn deep(g: &Graph, part: impl Fn(usize, &dyn Fn() -> Tensor) -> Tensor) {
    let mut x = g.input("x", DType::F32, &[dim("row", 64), dim("d", 32)]); // L0603
    for i in 0..6 {
        x = part(i, &|| {
            let mut y = x.clone();
            for j in 0..2 {
                let w = g.variable(&format!("w.{i}.{j}"), &[dim("d", 32), dim("e", 32)], normal(0.1));
                y = y.contract(&w, &["d"]).tanh().rename("e", "d"); // L0603
            }
            y
        });
    }
    Optimizer::sgd(0.1).apply(g, &x.square().sum_all());
}
fn deep_kept(g: &Graph) {
    deep(g, |i, build| g.block(&format!("layer.{i}"), build));
}
fn deep_again(g: &Graph) {
    deep(g, |_, build| g.recompute(build));
}

const CLIFF: &str = "a long chain, and in the middle a product with 256 columns";
fn widened(g: &Graph, columns: usize) {
    let mut x = g.input("x", DType::F32, &[dim("row", 64), dim("d", 32)]);
    for i in 0..30 {
        if i == 15 {
            let w = g.variable("w", &[dim("d", 32), dim("columns", columns)], normal(0.1));
            x = x.mul(&x.contract(&w, &["d"]).max(&["columns"])); // L0604
        }
        let v = g.variable(&format!("v.{i}"), &[dim("d", 32), dim("e", 32)], normal(0.1));
        x = x.contract(&v, &["d"]).tanh().rename("e", "d");
    }
    g.output("y", &x.sum_all());
}
fn cliff(g: &Graph) {
    widened(g, 4096);
}
fn no_cliff(g: &Graph) {
    widened(g, 4);
}

const ACTIVATION: &str = "a layer [row:64, d_in:16] -> [row, d_ff:16] and one -> [row, wide:256]";
fn activation(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 64), dim("d_in", 16)]);
    let w = g.variable("w", &[dim("d_in", 16), dim("d_ff", 16)], normal(0.1));
    let v = g.variable("v", &[dim("d_in", 16), dim("wide", 256)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_in"]).sum_all());
    let wide = x.contract(&v, &["d_in"]); // L0605
    g.output("z", &wide.max(&["row"]));
}

const GATHERED: &str = "a product with `y.with_layout(\"\")`, all of [row:512, d:64] on each device";
fn product(g: &Graph, own: bool) {
    let x = g.input("x", DType::F32, &[dim("row", 512), dim("d", 64)]);
    let w = g.variable("w", &[dim("d", 64), dim("e", 64)], normal(0.1));
    let y = x.tanh().contract(&w, &["d"]);
    let y = if own { y.exp().with_layout("") } else { y.exp() }; // L0606
    g.output("y", &y.max(&["row"]));
}
fn gathered(g: &Graph) {
    product(g, true);
}
fn not_gathered(g: &Graph) {
    product(g, false);
}

const ROWS: &str = "exponentials of [row:80, d:64]";
fn rows(g: &Graph) {
    g.output("y", &g.input("x", DType::F32, &[dim("row", 80), dim("d", 64)]).exp()); // L0607
}

const BROADCAST: &str = "a product with a vector [d:64] that is broadcast to [row:256, d]";
fn broadcast(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 256), dim("d", 64)]);
    let scale = g.variable("scale", &[dim("d", 64)], normal(0.1));
    g.output("y", &x.contract(&scale.broadcast(&[dim("row", 256), dim("d", 64)]), &["d"])); // L0608
}
fn no_broadcast(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 256), dim("d", 64)]);
    let scale = g.variable("scale", &[dim("d", 64)], normal(0.1));
    g.output("y", &x.contract(&scale, &["d"]));
}

const F32: &str = "two layers [row:256, d:64]";
fn layers(g: &Graph, dtype: DType) {
    let mut x = g.input("x", DType::F32, &[dim("row", 256), dim("d", 64)]).cast(dtype);
    for name in ["v", "w"] {
        let w = g.variable(name, &[dim("d", 64), dim("e", 16)], normal(0.1)).cast(dtype);
        x = x.contract(&w, &["d"]).contract(&w, &["e"]); // L0609
    }
    g.output("y", &x.cast(DType::F32).sum_all());
}
fn f32_layer(g: &Graph) {
    layers(g, DType::F32);
}
fn bf16_layer(g: &Graph) {
    layers(g, DType::Bf16);
}

fn recompute(p: &Planned) -> Vec<Finding> {
    let Some((l, _, t)) = p.fullest().filter(|_| p.is_short()) else { return vec![] };
    let names = l.function.blocks.iter().map(|b| &*b.name);
    let inside = t.inside.iter().map(|by_step| by_step.get(t.fullest).copied().unwrap_or(0));
    let blocks: Vec<(&str, usize)> = names.zip(inside).filter(|(_, b)| *b > 0).collect();
    let bytes: usize = blocks.iter().map(|(_, b)| b).sum();
    if bytes * 10 < p.peak() {
        return vec![];
    }
    let message = format!("memory is short, and {} blocks are kept for the backward pass", blocks.len());
    let finding = Finding::new(message, "recompute blocks: `--recompute auto`, or `g.recompute`");
    let first = l.function.blocks.iter().flat_map(|b| b.inside.first()).next();
    vec![match first {
        Some(node) => finding.at(l, *node).held(bytes as f64).counted(blocks.len()),
        None => finding.held(bytes as f64),
    }]
}

fn cliff_lint(p: &Planned) -> Vec<Finding> {
    let Some((l, device, t)) = p.fullest() else { return vec![] };
    let near = (t.alive.len() / 20).max(1);
    let far = t.alive.iter().enumerate().filter(|(i, _)| i.abs_diff(t.fullest) > near).map(|(_, b)| *b).max();
    let (most, rest) = (t.alive.get(t.fullest).copied().unwrap_or(0), far.unwrap_or(usize::MAX));
    if rest == usize::MAX || 2 * most < 3 * rest || t.alive.len() < 20 {
        return vec![];
    }
    let Some(node) = p.node_of_step(l, device, t.fullest) else { return vec![] };
    let message = format!(
        "this step needs {}, and no step that is not near it more than {}",
        crate::plan::describe::bytes(most),
        crate::plan::describe::bytes(rest)
    );
    let largest = t.largest.iter().find(|a| !a.variable).map(|a| a.name.clone()).unwrap_or_default();
    let help = format!("split or shrink the largest tensor there, {largest}");
    vec![Finding::new(message, help).at(l, node).held((most - rest) as f64)]
}

fn replicated_activation(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    if !p.is_short() {
        return out;
    }
    for l in &p.functions {
        for (axis, name, size) in p.axes().filter(|(a, ..)| p.uses(*a)) {
            let products = l.computes().filter(|(_, op)| op.is_product()).map(|(i, _)| i);
            let whole = products.filter(|i| l.split(&l.value(i.output).regions, axis).is_empty());
            let whole = whole.filter(|i| !p.like_a_variable(&l.value(i.output).ty));
            let Some(i) = whole.max_by_key(|i| l.value(i.output).bytes(0)) else { continue };
            let held = l.value(i.output).bytes(0);
            if held * 5 < p.peak() {
                continue;
            }
            let (id, node) = l.node_of(i);
            let dims = node.ty.dims.iter().filter(|d| p.has_room(d, name));
            let with = dims.clone().map(|d| Change::split(&p.plan.layout, &d.name, name));
            let instead = dims.map(|d| Change::only(&p.plan.layout, &d.name, name));
            let Some(change) = with.chain(instead).find(|c| p.trial(c).is_some()) else { continue };
            let message = format!("memory is short, and each device along `{name}` holds all of this activation");
            let lost = held as f64 * (1.0 - 1.0 / size as f64);
            let finding = Finding::new(message, format!("split a dimension of it over `{name}`")).at(l, id);
            out.push(finding.axis(name).held(lost).change(Some(change)));
        }
    }
    out
}

fn gathered_copy(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for m in l.moves.iter().filter(|m| m.kind == ExchangeKind::AllGather) {
            let held = (0..l.mesh.size()).map(|d| l.value(m.to).bytes(d)).max().unwrap_or(0);
            let own = (0..l.mesh.size()).map(|d| l.value(m.from).bytes(d)).max().unwrap_or(0);
            if held * 4 < p.peak() {
                continue;
            }
            let dims: Vec<&str> = m.gathered.iter().map(|(d, _)| &**d).collect();
            let message = format!(
                "a copy gathered along `{}` for this takes {} of a peak of {}",
                dims.join("`, `"),
                crate::plan::describe::bytes(held),
                crate::plan::describe::bytes(p.peak())
            );
            let finding = Finding::new(message, "split what needs it, so that a part is enough").at(l, m.by);
            out.push(finding.held(held.saturating_sub(own) as f64));
        }
    }
    out
}

fn uneven_memory(p: &Planned) -> Vec<Finding> {
    let peaks: Vec<usize> = (0..p.plan.mesh.size()).map(|d| p.plan.arena_bytes(d)).collect();
    let most = peaks.iter().copied().max().unwrap_or(0);
    let mean = peaks.iter().sum::<usize>() as f64 / peaks.len() as f64;
    let Some((_, device, _)) = p.fullest().filter(|_| most as f64 > 1.2 * mean) else { return vec![] };
    let mut changes = p.axes().filter_map(|(_, name, size)| {
        let chunks = p.program.chunking.chunks;
        let divisor = (1..=size).rev().find(|n| chunks.is_multiple_of(*n))?;
        (divisor < size).then(|| Change::resized(&p.plan.mesh, &p.plan.layout, name, divisor))
    });
    let change = changes.find(|c| p.trial(c).is_some());
    let message = format!(
        "device {device} needs {} of memory, and the mean of all is {}",
        crate::plan::describe::bytes(most),
        crate::plan::describe::bytes(mean as usize)
    );
    let staged = p.plan.mesh.axes().iter().any(|(name, _)| p.has_stages(name));
    let help = match staged {
        true => "give a part of what lies there to another stage",
        false => "use an axis whose size divides the number of chunks",
    };
    let finding = Finding::new(message, help).held(most as f64 - mean).change(change);
    vec![match p.fullest_node() {
        Some((l, node)) => finding.at(l, node),
        None => finding,
    }]
}

fn stored_broadcast(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (i, _) in l.computes().filter(|(_, op)| matches!(op, Prim::Contract(_))) {
            for v in &i.inputs {
                let (id, node) = (l.origin(*v), l.function.node(l.origin(*v)));
                let [input] = l.function.input_types(node)[..] else { continue };
                let fewer = 2 * input.elements() <= node.ty.elements();
                // A gradient that is the same everywhere is the engine's own.
                let own =
                    node.place != l.node_of(i).1.place || matches!(l.function.node(node.inputs[0]).op, Prim::Read(_));
                if matches!(node.op, Prim::Broadcast(_)) && fewer && own {
                    let held = l.value(*v).bytes(0) as f64 - (input.elements() * input.dtype.bytes()) as f64;
                    let names: Vec<&Name> =
                        node.ty.dims.iter().filter(|d| !input.has(&d.name)).map(|d| &d.name).collect();
                    let message = format!("a factor of this product is stored broadcast along {names:?}");
                    out.push(Finding::new(message, "leave `broadcast` out").at(l, id).held(held.max(0.0)));
                }
            }
        }
    }
    out
}

fn wide_type(p: &Planned) -> Vec<Finding> {
    let Some((l, _, t)) = p.fullest().filter(|_| p.is_short()) else { return vec![] };
    let mut products = l.computes().filter(|(_, op)| op.is_product()).peekable();
    let Some((first, _)) = products.peek().copied() else { return vec![] };
    let wide = |(i, _): (&crate::spmd::Instr, &Prim)| i.inputs.iter().all(|v| l.value(*v).ty.dtype == DType::F32);
    if !products.all(wide) {
        return vec![];
    }
    let activations: usize = t.largest.iter().filter(|a| !a.variable).map(|a| a.bytes).sum();
    let message = "memory is short, and all products are of `f32`";
    let finding = Finding::new(message, "compute in `bf16`: `--dtype bf16`, or `cast` of the network's input");
    vec![finding.at(l, l.node_of(first).0).held(0.5 * activations as f64)]
}
