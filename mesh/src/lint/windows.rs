//! Windows along split dimensions: halos of convolutions, pooling and resampling.

use super::lowered::{Lowered, Moved};
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, Name, dim};
use crate::graph::Graph;
use crate::nn::{self, Kernel};
use crate::ops::Prim;
use crate::ops::window::Window;
use crate::plan::ExchangeKind;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0301",
        name: "wide-halo",
        severity: Severity::Warning,
        about: "Blocks of a split dimension are so thin that devices fetch more than half as much from others as they have: \
                the deep levels of a network, or too many devices along one axis. Split along several axes (blocks of one \
                volume have the least surface as cubes), the batch, or channels.",
        failing: example(thin, THIN, "x=8", "x:x"),
        fixed: example(thin, THIN, "x=8", "batch:x"),
        check: Check::Plan(wide_halo),
    },
    Lint {
        code: "L0302",
        name: "halo-beyond-neighbour",
        severity: Severity::Warning,
        about: "A window reaches over a whole block, so that a device fetches from others than its neighbours. Every message \
                then waits for more of them, and bytes are sent several times. Use fewer devices along the axis.",
        failing: example(far, FAR, "x=8", "x:x"),
        fixed: example(far, FAR, "x=2", "x:x"),
        check: Check::Plan(beyond_neighbour),
    },
    Lint {
        code: "L0303",
        name: "misaligned-windows",
        severity: Severity::Warning,
        about: "Windows that do not overlap (pooling by 2, a convolution as wide as its stride) read across the borders of \
                blocks, since the blocks of input and result do not begin at the same places: the extent is no multiple of \
                chunks times strides. Resample or pad the input to such a multiple, 8 times the product of all strides.",
        failing: example(odd, "max-pooling by 2 of x:60", "x=4", "x:x"),
        fixed: example(even, "max-pooling by 2 of x:64", "x=4", "x:x"),
        check: Check::Plan(misaligned),
    },
];

const THIN: &str = "a convolution of width 5 along x:16 of a batch of 8";
fn thin(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("x", 16), dim("channel", 16)]);
    let kernel = Kernel::new(&["x"], 5).unbiased().from_channel("channel");
    g.output("y", &nn::conv(&x.tanh(), "conv", &kernel, &dim("channel", 16))); // L0301
}

const FAR: &str = "a convolution of width 9 along x:16";
fn far(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 1), dim("x", 16), dim("channel", 16)]);
    let kernel = Kernel::new(&["x"], 9).unbiased().from_channel("channel");
    g.output("y", &nn::conv(&x.tanh(), "conv", &kernel, &dim("channel", 16))); // L0302
}

fn odd(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("x", 60), dim("y", 60)]);
    g.output("y", &x.tanh().max_pool(&[Window::valid("x", 2, 2)])); // L0303
}
fn even(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("x", 64), dim("y", 60)]);
    g.output("y", &x.tanh().max_pool(&[Window::valid("x", 2, 2)]));
}

/// The windows of an op.
pub(super) fn of(op: &Prim) -> Vec<&Window> {
    match op {
        Prim::Conv(c) => c.windows.iter().collect(),
        Prim::ConvTranspose(c) => c.conv.windows.iter().collect(),
        Prim::ConvWeightGrad(c) => c.conv.windows.iter().collect(),
        Prim::MaxPool(m) => m.windows.iter().collect(),
        Prim::MaxPoolGrad(m) => m.windows.iter().collect(),
        Prim::WindowSum(w) => vec![&w.window],
        _ => vec![],
    }
}

/// What a device has, in bytes: the least of all.
fn block(l: &Lowered, m: &Moved) -> f64 {
    let value = l.value(m.from);
    (0..l.mesh.size()).map(|d| value.bytes(d)).min().unwrap_or(0) as f64
}

/// The axes whose dimensions grow by a halo.
fn halo_axes(l: &Lowered, m: &Moved) -> Vec<(Name, usize)> {
    let (from, to) = (l.value(m.from), l.value(m.to));
    let axes = (0..l.mesh.axes().len()).filter(|a| l.mesh.axes()[*a].1 > 1);
    let grown = |d: &Name| from.regions.iter().zip(&*to.regions).any(|(f, t)| f.get(d) != t.get(d));
    axes.flat_map(|a| l.split(&from.regions, a).into_iter().filter(grown).map(move |d| (d, a)).collect::<Vec<_>>())
        .collect()
}

fn wide_halo(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for m in l.moves.iter().filter(|m| m.kind == ExchangeKind::Halo && m.bytes > 0.5 * block(l, m)) {
            let node = l.function.node(m.by);
            for (dim, axis) in halo_axes(l, m) {
                let name = p.axis_name(axis);
                let change = p.better(p.instead(&dim, name, &node.ty.dims));
                let share = 100.0 * m.bytes / block(l, m).max(1.0);
                let message =
                    format!("the halo of this `{}` along `{dim}` is {share:.0} % of a block", node.op.op().name());
                let help = match change {
                    Some(_) => format!("split another dimension over `{name}`"),
                    None => format!("use fewer devices along `{name}`, and more along other axes"),
                };
                out.push(Finding::new(message, help).at(l, m.by).dim(&dim).axis(name).sent(m.bytes).change(change));
            }
        }
    }
    out
}

/// How many devices along an axis a device fetches from on one side.
fn reach(l: &Lowered, m: &Moved, dim: &Name, axis: usize) -> usize {
    let (from, to) = (&l.value(m.from).regions, &l.value(m.to).regions);
    let (first, last) = l.along(axis);
    let stride = (last - first) / (l.mesh.axes()[axis].1 - 1).max(1);
    let line: Vec<usize> = (0..l.mesh.axes()[axis].1).map(|i| first + i * stride).collect();
    let meets = |a: usize, b: usize| match (from[a].get(dim), to[b].get(dim)) {
        (Some(f), Some(t)) => f.start.max(t.start) < f.end.min(t.end),
        _ => false,
    };
    let pairs =
        line.iter().enumerate().flat_map(|(i, b)| line.iter().enumerate().map(move |(j, a)| (i.abs_diff(j), *a, *b)));
    pairs.filter(|(_, a, b)| meets(*a, *b)).map(|(distance, ..)| distance).max().unwrap_or(0)
}

fn beyond_neighbour(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for m in l.moves.iter().filter(|m| m.kind == ExchangeKind::Halo && m.bytes > 0.0) {
            for (dim, axis) in halo_axes(l, m) {
                let far = reach(l, m, &dim, axis);
                if far < 2 {
                    continue;
                }
                let (name, size) = (p.axis_name(axis), p.axis_size(axis));
                let fewer = (size / far).max(1);
                let message = format!(
                    "this `{}` fetches from devices up to {far} away along `{name}`",
                    l.function.node(m.by).op.op().name()
                );
                let change = Change::resized(&p.plan.mesh, &p.plan.layout, name, fewer);
                let change = p.trial(&change).map(|_| change);
                let finding = Finding::new(message, format!("use fewer devices along `{name}`")).at(l, m.by);
                out.push(finding.dim(&dim).axis(name).sent(m.bytes).change(change));
            }
        }
    }
    out
}

fn misaligned(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for m in l.moves.iter().filter(|m| m.bytes > 0.0) {
            let node = l.function.node(m.by);
            let value = l.value(m.from);
            let moves = |w: &&Window| {
                let d = &w.dim;
                let outside =
                    value.regions.iter().zip(&*l.value(m.to).regions).any(|(f, t)| match (f.get(d), t.get(d)) {
                        (Some(f), Some(t)) => t.start < f.start || t.end > f.end,
                        _ => false,
                    });
                w.span() <= w.stride && w.stride > 1 && outside
            };
            let Some(window) = of(&node.op).into_iter().find(moves) else { continue };
            let size = value.ty.size_of(&window.dim).unwrap_or(0);
            let message = format!(
                "`{}:{size}` is split where this `{}` has no borders between its windows of {}",
                window.dim,
                node.op.op().name(),
                window.stride
            );
            let help = format!("resample or pad the input to a multiple of 8 along `{}` for each halving", window.dim);
            out.push(Finding::new(message, help).at(l, m.by).dim(&window.dim).sent(m.bytes));
        }
    }
    out
}
