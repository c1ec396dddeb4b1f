//! Shards that are unequal or too small.

use super::lowered::Lowered;
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, Dim, Name, dim};
use crate::graph::{Graph, NodeId};
use crate::nn::init::normal;
use crate::spmd::Instr;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0501",
        name: "uneven-shards",
        severity: Severity::Warning,
        about: "The chunks of a dimension do not divide by the devices of its axis: 8 chunks over 3 devices are 3 + 3 + 2, \
                and over 5 they are 2 + 2 + 2 + 1 + 1. Devices with fewer wait for those with more, so that 4 devices are as \
                fast as 5. Use a divisor of the number of chunks, or split another dimension.",
        failing: example(layer, LAYER, "data=5", "batch:data"),
        fixed: example(layer, LAYER, "data=4", "batch:data"),
        check: Check::Plan(uneven_shards),
    },
    Lint {
        code: "L0502",
        name: "odd-extent",
        severity: Severity::Warning,
        about: "Shards of as many chunks each are unequal, since chunks are: 9 elements in 8 chunks are seven of 1 and one of \
                2. Devices with less wait. Make the extent a multiple of the shards, by padding or resampling.",
        failing: example(nine, "a layer over a batch of 9", "data=8", "batch:data"),
        fixed: example(sixteen, "a layer over a batch of 16", "data=8", "batch:data"),
        check: Check::Plan(odd_extent),
    },
    Lint {
        code: "L0503",
        name: "narrow-shards",
        severity: Severity::Warning,
        about: "The innermost dimension of a product's result is split so far that a device has less of it than a vector \
                register (16 `f32`) holds. Kernels then use a part of each vector and of each cache line. Split another \
                dimension over the axis.",
        failing: example(narrow, NARROW, "model=8", "d_out:model"),
        fixed: example(narrow, NARROW, "model=8", "batch:model"),
        check: Check::Plan(narrow_shards),
    },
    Lint {
        code: "L0504",
        name: "short-sums",
        severity: Severity::Warning,
        about: "A product sums over a dimension that is split so far that a device adds up less than a matrix tile (32) for \
                each result, which it then has to exchange. Split another dimension, or fix the dimension's grain \
                (`g.grain`) such that it is not split further.",
        failing: example(short, SHORT, "model=8", "d_in:model"),
        fixed: example(short, SHORT, "model=8", "batch:model"),
        check: Check::Plan(short_sums),
    },
];

const LAYER: &str = "a layer over a batch of 80";
fn of_batch(g: &Graph, batch: usize) {
    let x = g.input("x", DType::F32, &[dim("batch", batch), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_in"])); // L0501 L0502
}
fn layer(g: &Graph) {
    of_batch(g, 80);
}
fn nine(g: &Graph) {
    of_batch(g, 9);
}
fn sixteen(g: &Graph) {
    of_batch(g, 16);
}

const NARROW: &str = "a layer [batch:256, d_in:64] -> [batch, d_out:64]";
fn narrow(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 256), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_in"])); // L0503
}

const SHORT: &str = "a layer [batch:256, d_in:64] -> [batch, d_out:64]";
fn short(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 256), dim("d_in", 64)]);
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    g.output("y", &x.contract(&w, &["d_in"])); // L0504
}

/// The part of the work that waits for the fullest device, and the instruction and dimension where most of it is.
struct Waiting {
    function: usize,
    node: NodeId,
    dim: Dim,
    flops: f64,
    most: usize,
    least: usize,
}

/// How unequal the shards of the dimensions split over an axis are: the worst by operations that wait.
fn waiting(p: &Planned, axis: usize, wanted: impl Fn(&Dim) -> bool) -> Option<Waiting> {
    let mut worst: Option<Waiting> = None;
    for (f, l) in p.functions.iter().enumerate() {
        let mut sums: Vec<Waiting> = vec![];
        for (i, _) in l.computes() {
            for d in l.dims(i).into_iter().filter(|d| wanted(d)) {
                let lens = shares(l, i, &d.name, axis);
                let (most, least) = (lens.iter().max().copied().unwrap_or(0), lens.iter().min().copied().unwrap_or(0));
                let mean = lens.iter().sum::<usize>() as f64 / lens.len().max(1) as f64;
                if most == least || most as f64 <= 1.1 * mean {
                    continue;
                }
                let lost = l.most_flops(i) * (1.0 - mean / most as f64);
                match sums.iter_mut().find(|w| w.dim.name == d.name) {
                    Some(w) => w.flops += lost,
                    None => sums.push(Waiting { function: f, node: l.node_of(i).0, dim: d, flops: lost, most, least }),
                }
            }
        }
        worst = sums.into_iter().chain(worst).max_by(|a, b| a.flops.total_cmp(&b.flops));
    }
    worst
}

/// How much of a dimension each device along an axis goes over.
fn shares(l: &Lowered, i: &Instr, dim: &Name, axis: usize) -> Vec<usize> {
    let (first, last) = l.along(axis);
    let size = l.mesh.axes()[axis].1;
    let stride = (last - first) / (size - 1).max(1);
    let of = |k: usize| l.iteration(i, first + k * stride).get(dim).map_or(0, |r| r.len());
    let lens: Vec<usize> = (0..size).map(of).collect();
    // One that is not split along it is the same everywhere.
    lens
}

fn uneven_shards(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for (axis, name, size) in p.axes() {
        let uneven = |d: &Dim| !p.chunks(d).is_multiple_of(p.shards(&d.name));
        let Some(w) = waiting(p, axis, uneven) else { continue };
        let l = &p.functions[w.function];
        let chunks = p.chunks(&w.dim);
        // The devices of other axes that the dimension is split over.
        let others = (p.shards(&w.dim.name) / size).max(1);
        let divisor = (1..=size).rev().find(|n| chunks.is_multiple_of(n * others)).unwrap_or(1);
        let change = Change::resized(&p.plan.mesh, &p.plan.layout, name, divisor);
        let change = p.trial(&change).map(|_| change);
        let message = format!(
            "the {chunks} chunks of `{}` over {size} devices are {} elements on one and {} on another",
            w.dim, w.most, w.least
        );
        let help = format!("use a divisor of {chunks} for `{name}`, or split another dimension");
        let finding = Finding::new(message, help).at(l, w.node).dim(&w.dim.name).axis(name);
        out.push(finding.flops(w.flops).change(change));
    }
    out
}

fn odd_extent(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for (axis, name, size) in p.axes() {
        let even = |d: &Dim| p.chunks(d).is_multiple_of(p.shards(&d.name));
        let Some(w) = waiting(p, axis, even) else { continue };
        let message =
            format!("`{}` over {size} devices is {} elements on one and {} on another", w.dim, w.most, w.least);
        let help = format!("make `{}` a multiple of {size}: {}", w.dim.name, w.dim.size.next_multiple_of(size));
        let finding = Finding::new(message, help).at(&p.functions[w.function], w.node).dim(&w.dim.name);
        out.push(finding.axis(name).flops(w.flops));
    }
    out
}

/// Products of which a device has less than `least` of a dimension that is split.
fn small(
    p: &Planned,
    least: usize,
    dim_of: impl Fn(&Lowered, &Instr) -> Option<Dim>,
    say: impl Fn(&Dim, usize) -> String,
) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for (i, _) in l.computes().filter(|(_, op)| op.is_product()) {
            let Some(d) = dim_of(l, i).filter(|d| d.size >= least) else { continue };
            for (axis, name, size) in p.axes() {
                let shares = shares(l, i, &d.name, axis);
                let own = shares.iter().max().copied().unwrap_or(d.size);
                if own >= least || own == d.size || !p.splits(&d.name, name) {
                    continue;
                }
                let others: Vec<Dim> = l.dims(i).into_iter().filter(|e| e.size / size >= least).collect();
                // Time in kernels is not in operations: any split that is not worse will do.
                let possible = p.instead(&d.name, name, &others).into_iter().filter_map(|c| Some((p.trial(&c)?, c)));
                let fine = possible.filter(|(t, _)| p.prices.of(&t.lost) <= 1.01 * p.prices.of(&p.now.lost));
                let change = fine.map(|(_, c)| c).next();
                let flops = l.most_flops(i) * (least as f64 / own.max(1) as f64 - 1.0);
                let finding = Finding::new(say(&d, own), format!("split another dimension over `{name}`"));
                out.push(finding.at(l, l.node_of(i).0).dim(&d.name).axis(name).flops(flops).change(change));
            }
        }
    }
    out
}

fn narrow_shards(p: &Planned) -> Vec<Finding> {
    small(
        p,
        16,
        |l, i| l.node_of(i).1.ty.dims.last().cloned(),
        |d, own| {
            format!("a device has {own} of `{d}`, the innermost dimension of this product's result: less than a vector")
        },
    )
}

fn short_sums(p: &Planned) -> Vec<Finding> {
    let summed = |l: &Lowered, i: &Instr| {
        let (_, node) = l.node_of(i);
        let reduced = node.op.op().reduced(&l.function.input_types(node));
        if let [one] = &reduced[..] { Some(one.clone()) } else { None }
    };
    small(p, 32, summed, |d, own| {
        format!("a device sums {own} of `{d}` for each result of this product: less than a tile")
    })
}
