//! Data that move between devices: gathers, all-to-alls, and what moves although it need not.

use super::lowered::{Lowered, Moved};
use super::planned::Planned;
use super::{Change, Check, Finding, Lint, Severity, example};
use crate::dim::{DType, Dim, Name, dim};
use crate::graph::{Graph, NodeId, Tensor};
use crate::layout::Section;
use crate::nn::{self, init::normal};
use crate::ops::Prim;
use crate::plan::ExchangeKind;
use std::collections::BTreeMap;

pub(super) const LINTS: &[Lint] = &[
    Lint {
        code: "L0201",
        name: "own-rules-gather",
        severity: Severity::Warning,
        about: "A tensor has rules of its own (`with_layout`), which leave a dimension whole that the layout splits, so \
                that it is gathered. Rules of a tensor's own stand in place of the layout's: one that leaves out the batch \
                has the batch whole. Add the layout's rules to it, or take `with_layout` out.",
        failing: example(own_rules, OWN_RULES, "data=2,model=2", "batch:data,d_ff:model"),
        fixed: example(no_own_rules, "the same without `with_layout`", "data=2,model=2", "batch:data,d_ff:model"),
        check: Check::Plan(own_rules_gather),
    },
    Lint {
        code: "L0202",
        name: "gather-then-slice",
        severity: Severity::Warning,
        about: "A tensor is gathered whole on every device, and all that is done with it needs a part. Only that part had to \
                come. Take out the `with_layout` that makes it whole.",
        failing: example(gather_then_slice, GATHER_THEN_SLICE, "data=4", "batch:data"),
        fixed: example(no_gather, "the same without `with_layout`", "data=4", "batch:data"),
        check: Check::Plan(gather_then_slice_lint),
    },
    Lint {
        code: "L0203",
        name: "contested-axis",
        severity: Severity::Warning,
        about: "A dimension that is summed over and one of the result lie on the same axis. The result needs the axis, so \
                that the input is gathered. Split only one of them, or each over an axis of its own.",
        failing: example(contested, CONTESTED, "model=4", "d_in:model,d_out:model"),
        fixed: example(contested, CONTESTED, "model=4", "d_out:model"),
        check: Check::Plan(|p| by_cause(p, Cause::Contested)),
    },
    Lint {
        code: "L0204",
        name: "needed-whole",
        severity: Severity::Warning,
        about: "A tensor is gathered since an op needs a dimension whole that is split: attention the keys of the whole \
                sequence, a top-k all scores. Split another dimension, such as the batch or the heads.",
        failing: example(attention, ATTENTION, "seq=4", "query:seq,key:seq"),
        fixed: example(attention, ATTENTION, "seq=4", "heads:seq"),
        check: Check::Plan(|p| by_cause(p, Cause::NeededWhole)),
    },
    Lint {
        code: "L0205",
        name: "split-scatter",
        severity: Severity::Warning,
        about: "Sums by index into rows that are split: a summand may be of any row, so that every device gathers all of \
                them. Split another dimension.",
        failing: example(scatter, SCATTER, "model=4", "token:model,vocab:model"),
        fixed: example(scatter, SCATTER, "model=4", "d_model:model"),
        check: Check::Plan(|p| by_cause(p, Cause::Scatter)),
    },
    Lint {
        code: "L0206",
        name: "variable-moved",
        severity: Severity::Warning,
        about: "A variable is stored in one layout and used in another, so that it moves in every run of the function. That \
                is worth it where memory is short (it then is not reported). Store it as it is used: give its dimensions the \
                layout's rules rather than rules of its own.",
        failing: example(variable_moved, VARIABLE_MOVED, "model=4", "d_out:model"),
        fixed: example(variable_still, "the same without rules of its own", "model=4", "d_out:model"),
        check: Check::Plan(variable_moved_lint),
    },
    Lint {
        code: "L0207",
        name: "repeated-gather",
        severity: Severity::Warning,
        about: "Values that are elementwise functions of one tensor are gathered, each by itself. Gather that tensor once \
                and compute the functions from it: elementwise functions cost less than sending.",
        failing: example(twice_gathered, TWICE, "data=4", "token:data"),
        fixed: example(once_gathered, "gathers x, then takes both functions of it", "data=4", "token:data"),
        check: Check::Plan(repeated_gather),
    },
    Lint {
        code: "L0208",
        name: "moved-after-cast",
        severity: Severity::Warning,
        about: "A tensor moves after it was cast to a wider type: twice the bytes for the same values. Cast where it is \
                used, after it has moved.",
        failing: example(wide_move, WIDE, "data=4", "token:data"),
        fixed: example(narrow_move, "moves x, then casts it", "data=4", "token:data"),
        check: Check::Plan(moved_after_cast),
    },
    Lint {
        code: "L0209",
        name: "all-to-all",
        severity: Severity::Warning,
        about: "A tensor's split goes from one dimension to another, and nearly all of it moves in every run. Where another \
                dimension can be split before and after, nothing moves.",
        failing: example(transposed, TRANSPOSED, "m=4", "row:m"),
        fixed: example(transposed, TRANSPOSED, "m=4", "col:m"),
        check: Check::Plan(|p| by_cause(p, Cause::AllToAll)),
    },
    Lint {
        code: "L0210",
        name: "shifted-blocks",
        severity: Severity::Warning,
        about: "A dimension is split before and after, but its blocks begin elsewhere: a slice, a padding, a concatenation \
                along a split dimension moves what lies on the wrong side of the new borders. Split another dimension, or do \
                it where the dimension is whole.",
        failing: example(cut, CUT, "x=4", "x:x"),
        fixed: example(cut, CUT, "x=4", "y:x"),
        check: Check::Plan(|p| by_cause(p, Cause::Shifted)),
    },
];

fn tokens() -> [Dim; 2] {
    [dim("batch", 64), dim("d_model", 64)]
}
fn input(g: &Graph, dims: &[Dim]) -> Tensor {
    g.input("x", DType::F32, dims)
}

const OWN_RULES: &str = "a hidden layer with `with_layout(\"d_ff:model\")`, which leaves out the batch";
fn own_rules(g: &Graph) {
    let w = g.variable("w", &[dim("d_model", 64), dim("d_ff", 256)], normal(0.1));
    let y = input(g, &tokens()).contract(&w, &["d_model"]).with_layout("d_ff:model"); // L0201
    g.output("y", &y);
}
fn no_own_rules(g: &Graph) {
    let w = g.variable("w", &[dim("d_model", 64), dim("d_ff", 256)], normal(0.1));
    g.output("y", &input(g, &tokens()).contract(&w, &["d_model"]));
}

const GATHER_THEN_SLICE: &str = "`x.tanh().with_layout(\"\")`, of which split tensors are computed";
fn gather_then_slice(g: &Graph) {
    let x = input(g, &tokens()).tanh().with_layout(""); // L0202
    g.output("y", &x.add_scalar(1.0).exp());
}
fn no_gather(g: &Graph) {
    g.output("y", &input(g, &tokens()).tanh().add_scalar(1.0).exp());
}

const CONTESTED: &str = "a product of x [batch, d_in] and w [batch, d_in, d_out]'s mean over the batch";
fn contested(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 32)]);
    let w = g.variable("w", &[dim("d_in", 32), dim("d_hidden", 16)], normal(0.1));
    let v = g.variable("v", &[dim("d_hidden", 16), dim("d_out", 512)], normal(0.1));
    let both = w.with_layout("").contract(&v, &["d_hidden"]).with_layout("");
    g.output("y", &x.tanh().contract(&both, &["d_in"])); // L0203
}

const ATTENTION: &str = "scores of queries and keys by head";
fn attention(g: &Graph) {
    let q = g.input("q", DType::F32, &[dim("heads", 8), dim("query", 64), dim("d_head", 16)]);
    let k = g.input("k", DType::F32, &[dim("heads", 8), dim("key", 64), dim("d_head", 16)]);
    let scores = q.contract(&k.rename("key", "other"), &["d_head"]); // L0204
    g.output("y", &nn::softmax(&scores, &["other"]).sum(&["other"]));
}

const SCATTER: &str = "rows [token, d_model] added up by index into [vocab, d_model]";
fn scatter(g: &Graph) {
    let words = g.input("words", DType::I32, &[dim("token", 64)]);
    let x = g.input("x", DType::F32, &[dim("token", 64), dim("d_model", 64)]);
    g.output("y", &x.tanh().scatter_add(&words, &dim("vocab", 512))); // L0205
}

const VARIABLE_MOVED: &str = "a product with a weight [d_in, d_out] that is read with `with_layout(\"\")`";
fn variable_moved(g: &Graph) {
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1)).with_layout(""); // L0206
    g.output("y", &g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 64)]).contract(&w, &["d_in"]));
}
fn variable_still(g: &Graph) {
    let w = g.variable("w", &[dim("d_in", 64), dim("d_out", 64)], normal(0.1));
    g.output("y", &g.input("x", DType::F32, &[dim("batch", 64), dim("d_in", 64)]).contract(&w, &["d_in"]));
}

const TWICE: &str = "sine and cosine of x, each a factor of a product that sums over the split `token`";
fn sides(g: &Graph) -> [Tensor; 3] {
    let x = g.input("x", DType::F32, &[dim("token", 64), dim("d", 64)]);
    let a = g.variable("a", &[dim("token", 64), dim("out", 64)], normal(0.1));
    let b = g.variable("b", &[dim("token", 64), dim("out", 64)], normal(0.1));
    [x, a, b]
}
fn twice_gathered(g: &Graph) {
    let [x, a, b] = sides(g);
    let left = x.exp().mul_scalar(0.5).rename("token", "t");
    let right = x.tanh().mul_scalar(0.5).rename("token", "t"); // L0207
    let [a, b] = [a, b].map(|w| w.rename("token", "t"));
    g.output("y", &left.contract(&a, &["t"]).add(&right.contract(&b, &["t"])));
}
fn once_gathered(g: &Graph) {
    let [x, a, b] = sides(g);
    let x = x.rename("token", "t").mul_scalar(0.5);
    let [a, b] = [a, b].map(|w| w.rename("token", "t"));
    g.output("y", &x.exp().contract(&a, &["t"]).add(&x.tanh().contract(&b, &["t"])));
}

const WIDE: &str = "x, `bf16`, cast to `f32` and then used whole";
fn wide_move(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("token", 64), dim("d", 64)]).cast(DType::Bf16);
    g.output("y", &x.cast(DType::F32).add_scalar(1.0).with_layout("").sum_all()); // L0208
}
fn narrow_move(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("token", 64), dim("d", 64)]).cast(DType::Bf16);
    g.output("y", &x.mul(&x).with_layout("").cast(DType::F32).sum_all());
}

const TRANSPOSED: &str = "a matrix [row, col], and exponentials of it with `with_layout(\"col:m\")`";
fn transposed(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("row", 64), dim("col", 64)]);
    g.output("y", &x.tanh().exp().with_layout("col:m").sum_all()); // L0209
}

const CUT: &str = "the middle of x, `x.slice(\"x\", 24, 56)`";
fn cut(g: &Graph) {
    let x = g.input("x", DType::F32, &[dim("x", 64), dim("y", 64)]);
    g.output("y", &x.tanh().slice("x", 24, 56).exp()); // L0210
}

/// Why something moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    /// Only a part of it is needed then.
    ThenSliced,
    /// Rules of the reader's own.
    OwnRules,
    /// Sums by index.
    Scatter,
    /// A variable, used otherwise than stored.
    Variable,
    /// The reader's result has the axis.
    Contested,
    /// The reader needs a dimension whole.
    NeededWhole,
    /// Another dimension is split.
    AllToAll,
    /// Blocks begin elsewhere.
    Shifted,
    /// A halo, or nothing that is sent.
    Fine,
}

fn cause(p: &Planned, l: &Lowered, m: &Moved) -> Cause {
    let by = l.function.node(m.by);
    if m.bytes == 0.0 || m.kind == ExchangeKind::Halo {
        return Cause::Fine;
    }
    let gathers = |what: Cause| if m.gathered.is_empty() { Cause::Fine } else { what };
    match &by.op {
        Prim::ScatterAdd(_) => return gathers(Cause::Scatter),
        _ if l.variable(m.from).is_some() && super::windows::of(&by.op).is_empty() => return Cause::Variable,
        _ => {}
    }
    if m.kind == ExchangeKind::AllToAll {
        return Cause::AllToAll;
    }
    if m.kind == ExchangeKind::Permute {
        // Blocks that go round are asked for; pooling and strides are the windows' own lints.
        let asked = !l.spmd.rings.is_empty() || !super::windows::of(&by.op).is_empty();
        return if asked { Cause::Fine } else { Cause::Shifted };
    }
    if by.layout.is_some() && m.gathered.iter().any(|(d, _)| p.has_rule(d)) {
        return if sliced_again(l, m) { Cause::ThenSliced } else { Cause::OwnRules };
    }
    let reduced = by.op.op().reduced(&l.function.input_types(by));
    let sums = |(d, axis): &(Name, usize)| {
        let made = l.spmd.instrs.iter().find(|i| l.value(i.output).node == m.by && i.inputs.contains(&m.to));
        let taken = made.is_some_and(|i| !l.split(&l.value(i.output).regions, *axis).is_empty());
        reduced.iter().any(|r| r.name == *d) && taken
    };
    if m.gathered.iter().any(sums) { Cause::Contested } else { gathers(Cause::NeededWhole) }
}

/// Whether all that is done with what the reader makes needs a part of it on each device, by the axis it was gathered along.
fn sliced_again(l: &Lowered, m: &Moved) -> bool {
    let made = l.spmd.instrs.iter().filter(|i| l.value(i.output).node == m.by && i.inputs.contains(&m.to));
    let mut readers = made.flat_map(|i| l.readers[i.output.index()].iter().map(move |r| (i.output, *r))).peekable();
    readers.peek().is_some()
        && readers.all(|(value, r)| {
            let reader = &l.spmd.instrs[r];
            let (_, node) = l.node_of(reader);
            let types = l.function.input_types(node);
            let needs = |i: usize, d: usize| node.op.op().needs(i, &types, &node.ty, &l.iteration(reader, d));
            let slots = reader.inputs.iter().enumerate().filter(|(_, v)| **v == value);
            slots.into_iter().all(|(i, _)| {
                m.gathered.iter().any(|(dim, axis)| {
                    let (a, b) = l.along(*axis);
                    i < types.len() && needs(i, a).get(dim) != needs(i, b).get(dim)
                })
            })
        })
}

/// Whether rules for variables, gradients or slots alone say how one side lies: they take memory for time on purpose.
fn meant(p: &Planned, l: &Lowered, m: &Moved) -> bool {
    let sides = [m.by, l.root(l.origin(m.from))].map(|node| l.function.node(node).role.section());
    // What a variable is read as has the role of its reader.
    let read = l.variable(m.from).map(|v| p.program.variables[v.index()].role.section());
    // What another stage has is handed on.
    let staged = l.value(m.from).regions.iter().any(|r| r.is_empty());
    staged || sides.into_iter().chain(read).any(|s| s != Section::Activations && p.has_section(s))
}

/// A finding for each move of that cause.
fn each(p: &Planned, what: Cause, say: impl Fn(&Lowered, &Moved) -> Option<Finding>) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        let moves = l.moves.iter().filter(|m| m.bytes >= 0.1 * super::WORTHWHILE * l.total.sent_bytes);
        let moves = moves.filter(|m| !meant(p, l, m) && cause(p, l, m) == what);
        out.extend(moves.filter_map(|m| say(l, m)));
    }
    out
}

/// The dimension and the axis that a move is about.
fn about(l: &Lowered, m: &Moved) -> Option<(Name, usize)> {
    m.gathered.first().cloned().or_else(|| {
        let axes = (0..l.mesh.axes().len()).filter(|a| l.mesh.axes()[*a].1 > 1);
        let mut split = axes.filter_map(|a| Some((l.split(&l.value(m.from).regions, a).into_iter().next()?, a)));
        split.next()
    })
}

/// Other rules than the one that a move comes from: other dimensions of the reader and of what is read, or none.
fn otherwise(p: &Planned, l: &Lowered, m: &Moved, dim: &Name, axis: usize) -> Option<Change> {
    let axis_name = p.axis_name(axis);
    let node = l.function.node(m.by);
    let dims: Vec<Dim> = node.ty.dims.iter().chain(&l.value(m.from).ty.dims).cloned().collect();
    let mut changes = p.instead(dim, axis_name, &dims);
    // Another name of a renamed dimension has a rule of its own.
    for d in dims.iter().filter(|d| p.has_room(d, axis_name)) {
        changes.push(Change::only(&p.plan.layout, &d.name, axis_name));
    }
    changes.extend(p.rules_of(axis_name).iter().map(|d| Change::without(&p.plan.layout, d, axis_name)));
    p.better(changes)
}

fn by_cause(p: &Planned, what: Cause) -> Vec<Finding> {
    each(p, what, |l, m| {
        let (dim, axis) = about(l, m)?;
        let name = p.axis_name(axis);
        let change = otherwise(p, l, m, &dim, axis);
        let op = l.function.node(m.by).op.op().name();
        let (message, help) = match what {
            Cause::Contested => (
                format!("`{dim}`, which this `{op}` sums over, is gathered: its result has the axis `{name}`"),
                format!("split only one of them over `{name}`"),
            ),
            Cause::Scatter => (
                format!("what is added up by index is gathered along `{dim}`, split over `{name}`"),
                "split another dimension".into(),
            ),
            Cause::AllToAll => (
                format!("the split over `{name}` goes from `{dim}` to another dimension"),
                "split a dimension that both have".into(),
            ),
            Cause::Shifted => (
                format!("`{dim}`, split over `{name}`, has other blocks after this `{op}`"),
                format!("do not split `{dim}` here"),
            ),
            _ => (
                format!("`{dim}`, split over `{name}`, is gathered: this `{op}` needs it whole"),
                format!("split another dimension over `{name}`"),
            ),
        };
        // What has to be so is no finding.
        if change.is_none() && what != Cause::Contested {
            return None;
        }
        Some(Finding::new(message, help).at(l, m.by).dim(&dim).axis(name).sent(m.bytes).change(change))
    })
}

fn own_rules_gather(p: &Planned) -> Vec<Finding> {
    each(p, Cause::OwnRules, |l, m| {
        let (dim, axis) = m.gathered.iter().find(|(d, _)| p.has_rule(d))?;
        let (node, axis) = (l.function.node(m.by), p.axis_name(*axis));
        let own = node.layout.as_deref().unwrap_or_default();
        let message = format!("`{dim}` is gathered: the rules of this tensor's own, `{own}`, leave it whole");
        let all = if own.is_empty() { format!("{dim}:{axis}") } else { format!("{dim}:{axis},{own}") };
        let help = format!("take its `with_layout` out, or make it `with_layout(\"{all}\")`");
        Some(Finding::new(message, help).at(l, m.by).dim(dim).axis(axis).sent(m.bytes))
    })
}

fn gather_then_slice_lint(p: &Planned) -> Vec<Finding> {
    each(p, Cause::ThenSliced, |l, m| {
        let (dim, axis) = about(l, m)?;
        let message = format!("`{dim}` is gathered here, and what is computed of it needs a part on each device");
        let help = "take its `with_layout` out";
        Some(Finding::new(message, help).at(l, m.by).dim(&dim).axis(p.axis_name(axis)).sent(m.bytes))
    })
}

fn variable_moved_lint(p: &Planned) -> Vec<Finding> {
    if p.is_short() {
        return vec![];
    }
    each(p, Cause::Variable, |l, m| {
        let (dim, axis) = about(l, m)?;
        let variable = &p.program.variables[l.variable(m.from)?.index()];
        let own = l.function.node(l.origin(m.from)).layout.is_some() || l.function.node(m.by).layout.is_some();
        let change = if own { None } else { Some(otherwise(p, l, m, &dim, axis)?) };
        let message = format!(
            "the variable `{}` is stored split over `{}` and moves in every run",
            variable.name,
            p.axis_name(axis)
        );
        let help = if own { "take the `with_layout` out" } else { "store it as it is used" };
        let finding = Finding::new(message, help).at(l, m.by).place(variable.place);
        Some(finding.dim(&dim).axis(p.axis_name(axis)).sent(m.bytes).change(change))
    })
}

fn repeated_gather(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        let mut by_root: BTreeMap<(NodeId, usize), Vec<&Moved>> = BTreeMap::new();
        for m in l.moves.iter().filter(|m| m.kind == ExchangeKind::AllGather && l.variable(m.from).is_none()) {
            let axis = m.gathered.first().map_or(0, |(_, a)| *a);
            by_root.entry((l.root(l.origin(m.from)), axis)).or_default().push(m);
        }
        for ((_, axis), moves) in by_root.iter().filter(|(_, moves)| moves.len() > 1) {
            let all: f64 = moves.iter().map(|m| m.bytes).sum();
            let most = moves.iter().map(|m| m.bytes).fold(0.0, f64::max);
            let last = moves[moves.len() - 1];
            let name = p.axis_name(*axis);
            let message =
                format!("{} functions of one tensor are gathered along `{name}`, each by itself", moves.len());
            let finding = Finding::new(message, "gather the tensor once, and compute them from it").at(l, last.by);
            out.push(finding.axis(name).sent(all - most));
        }
    }
    out
}

fn moved_after_cast(p: &Planned) -> Vec<Finding> {
    let mut out = vec![];
    for l in &p.functions {
        for m in l.moves.iter().filter(|m| m.bytes > 0.0) {
            let cast = l.function.node(l.origin(m.from));
            let [input] = l.function.input_types(cast)[..] else { continue };
            if matches!(cast.op, Prim::Cast(_)) && input.dtype.bytes() < cast.ty.dtype.bytes() {
                let lost = m.bytes * (1.0 - input.dtype.bytes() as f64 / cast.ty.dtype.bytes() as f64);
                let message = format!("this moves as {}, which {} was cast to before", cast.ty.dtype, input.dtype);
                out.push(Finding::new(message, "cast it after it has moved").at(l, m.by).sent(lost));
            }
        }
    }
    out
}
