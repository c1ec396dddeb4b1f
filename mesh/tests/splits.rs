//! Every op of the table along every dimension: split, summed in parts, or whole for a reason that the op states. What is
//! found is the table of docs/layouts.md; `MESH_WRITE_DOCS=1` writes it anew.

use mesh::dim::{DType, Dim, Name, Type, dim};
use mesh::graph::Tensor;
use mesh::layout::Layout;
use mesh::ops::binary::{Binary, BinaryFn};
use mesh::ops::compare::{Compare, CompareFn};
use mesh::ops::conv::{Conv, ConvTranspose, ConvWeightGrad};
use mesh::ops::max_pool::{MaxPool, MaxPoolGrad};
use mesh::ops::movement::{Concat, Pad, Rename, Shift, Slice};
use mesh::ops::reduce::{Reduce, ReduceFn};
use mesh::ops::resize::{Resize, ResizeDim};
use mesh::ops::source::{Constant, Distribution, Input, Iota, Random, Step};
use mesh::ops::split::{MergeDims, SplitDim};
use mesh::ops::unary::{Unary, UnaryFn};
use mesh::ops::window::Window;
use mesh::ops::window_sum::WindowSum;
use mesh::ops::{self, Prim};
use mesh::placement::Placement;
use mesh::program::{Function, Init, Program, ProgramBuilder};
use mesh::region::Region;
use mesh::spmd::{self, SpmdOp, SpmdProgram};
use std::collections::{BTreeMap, BTreeSet};

fn dims(list: &[(&str, usize)]) -> Vec<Dim> {
    list.iter().map(|(n, s)| dim(*n, *s)).collect()
}

fn f32s(list: &[(&str, usize)]) -> Type {
    Type::new(DType::F32, dims(list))
}

fn i32s(list: &[(&str, usize)]) -> Type {
    Type::new(DType::I32, dims(list))
}

/// An op in a program by itself.
struct Case {
    label: String,
    kind: &'static str,
    program: Program,
}

impl Case {
    /// An op on feeds of those types.
    fn new(label: &str, op: impl Into<Prim>, inputs: &[Type]) -> Case {
        let op = op.into();
        let mut p = ProgramBuilder::new();
        p.function("f", |g| {
            let feeds = inputs.iter().enumerate().map(|(i, t)| g.input(format!("x{i}"), t.dtype, &t.dims));
            let feeds: Vec<Tensor> = feeds.collect();
            g.output("y", &g.apply(op.clone(), &feeds.iter().collect::<Vec<_>>()));
        })
        .unwrap();
        Case { label: label.into(), kind: op.kind(), program: p.finish().unwrap() }
    }

    fn function(&self) -> &Function {
        self.program.function("f").unwrap()
    }
}

/// A case or more for each line of the table.
fn cases() -> Vec<Case> {
    let xy = || f32s(&[("batch", 16), ("x", 16)]);
    let image = || f32s(&[("batch", 16), ("x", 16), ("input", 16)]);
    let result = || f32s(&[("batch", 16), ("x", 16), ("output", 16)]);
    let conv = |groups| {
        let windows = vec![Window::same("x", 16, 3, 1, 1)];
        Conv { windows, input: "input".into(), output: "output".into(), groups }
    };
    let filter = |groups: usize| f32s(&[("k.x", 3), ("input", 16 / groups), ("output", 16)]);
    let transposed = |groups| ConvTranspose { conv: conv(groups), sizes: vec![16] };
    let pool = || vec![Window::same("x", 16, 3, 2, 1)];
    let variable = |assigned: bool| {
        let mut p = ProgramBuilder::new();
        p.function("f", |g| {
            let v = g.variable("v", &dims(&[("row", 16), ("column", 16)]), Init::zeros());
            if assigned {
                g.assign(&v, &g.input("x0", DType::F32, &v.ty().dims));
            }
            g.output("v", &v);
        })
        .unwrap();
        let (label, kind) = if assigned { ("assign", "Assign") } else { ("read", "Read") };
        Case { label: label.into(), kind, program: p.finish().unwrap() }
    };
    let mut all = vec![
        Case::new("input", Input { name: "x".into(), ty: xy() }, &[]),
        variable(false),
        variable(true),
        Case::new("constant", Constant { value: 1.0, dtype: DType::F32 }, &[]),
        Case::new("step", Step, &[]),
        Case::new("iota", Iota { dim: dim("x", 16) }, &[]),
        Case::new("random", Random { distribution: Distribution::Normal, key: 1, dims: xy().dims }, &[]),
        Case::new("unary", Unary { f: UnaryFn::Neg }, &[xy()]),
        Case::new("binary", Binary { f: BinaryFn::Add }, &[xy(), f32s(&[("x", 16), ("channel", 16)])]),
        Case::new("compare", Compare { f: CompareFn::Lt }, &[xy(), xy()]),
        Case::new("select", ops::select::Select, &[Type::new(DType::Bool, xy().dims), xy(), xy()]),
        Case::new("cast", ops::cast::Cast { to: DType::I32 }, &[xy()]),
        Case::new("broadcast", ops::broadcast::Broadcast { dims: result().dims }, &[xy()]),
        Case::new(
            "contract",
            ops::contract::Contract { over: vec!["input".into()] },
            &[image(), f32s(&[("batch", 16), ("input", 16), ("output", 16)])],
        ),
        Case::new("conv", conv(1), &[image(), filter(1)]),
        Case::new("conv, groups", conv(2), &[image(), filter(2)]),
        Case::new("conv_transpose", transposed(1), &[result(), filter(1)]),
        Case::new("conv_transpose, groups", transposed(2), &[result(), filter(2)]),
        Case::new("conv_weight_grad", ConvWeightGrad { conv: conv(1) }, &[image(), result()]),
        Case::new("conv_weight_grad, groups", ConvWeightGrad { conv: conv(2) }, &[image(), result()]),
        Case::new("max_pool", MaxPool { windows: pool() }, &[xy()]),
        Case::new("max_pool_grad", MaxPoolGrad { windows: pool() }, &[xy(), f32s(&[("batch", 16), ("x", 8)])]),
        Case::new(
            "gather",
            ops::gather::Gather { dim: "row".into() },
            &[f32s(&[("batch", 16), ("row", 16), ("column", 16)]), i32s(&[("batch", 16), ("place", 16)])],
        ),
        Case::new(
            "scatter_add",
            ops::scatter_add::ScatterAdd { dim: dim("row", 16), over: vec!["place".into()] },
            &[f32s(&[("batch", 16), ("place", 16), ("column", 16)]), i32s(&[("batch", 16), ("place", 16)])],
        ),
        Case::new("top_k", ops::top_k::TopK { dim: "x".into(), k: dim("k", 8) }, &[xy()]),
        Case::new("rename", Rename { from: "x".into(), to: "z".into() }, &[xy()]),
        Case::new("split_dim", SplitDim { dim: "x".into(), into: dims(&[("outer", 8), ("inner", 2)]) }, &[xy()]),
        Case::new(
            "merge_dims",
            MergeDims { dims: vec!["outer".into(), "inner".into()], into: "x".into() },
            &[f32s(&[("batch", 16), ("outer", 8), ("inner", 2)])],
        ),
        Case::new("slice", Slice { dim: "x".into(), start: 4, stop: 14, stride: 1 }, &[xy()]),
        Case::new("pad", Pad { dim: "x".into(), lo: 2, hi: 1, value: 0.0 }, &[xy()]),
        Case::new("concat", Concat { dim: "x".into() }, &[xy(), f32s(&[("batch", 16), ("x", 8)])]),
        Case::new("shift", Shift { dim: "x".into(), by: 2, wrap: true }, &[xy()]),
    ];
    for f in [ReduceFn::Sum, ReduceFn::Max, ReduceFn::Min] {
        let op = Prim::from(Reduce { f, over: vec!["x".into()] });
        all.push(Case::new(op.op().name(), op.clone(), &[xy()]));
    }
    for adjoint in [false, true] {
        let sum = Prim::from(WindowSum { window: Window::same("x", 16, 3, 1, 1), size: 16, adjoint });
        all.push(Case::new(sum.op().name(), sum.clone(), &[xy()]));
        let resize = ResizeDim { dim: "x".into(), method: Resize::Linear, from: 16, to: 32, adjoint };
        let resize = Prim::from(resize);
        let size = if adjoint { 32 } else { 16 };
        all.push(Case::new(resize.op().name(), resize.clone(), &[f32s(&[("batch", 16), ("x", size)])]));
    }
    all
}

/// What becomes of a dimension that a layout splits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// Each device computes its part of what it has.
    Split,
    /// Each device computes its part, and fetches what of others it reads.
    Fetched,
    /// Each device sums up its part, and a collective finishes the sum.
    Summed,
    /// It is not split, or gathered.
    Whole(&'static str),
}

/// The case lowered with that layout on two devices.
fn lowered(case: &Case, layout: &str) -> SpmdProgram {
    let (mesh, layout): (_, Layout) = ("m=2".parse().unwrap(), layout.parse().unwrap());
    layout.check(&mesh, &case.program).unwrap();
    spmd::lower(case.function(), &Placement::new(&mesh, &layout, &case.program)).unwrap()
}

/// Whether every device has a part of the dimension, and no two the same.
fn is_split(regions: &[Region], dim: &str) -> bool {
    let ranges: Vec<_> = regions.iter().map(|r| r.get(dim).unwrap().clone()).collect();
    ranges.iter().all(|r| !r.is_empty()) && ranges[0].end <= ranges[1].start
}

/// What of it devices fetch from each other, as a share of what all of them together would if it were gathered.
fn fetched(spmd: &SpmdProgram) -> f64 {
    let moves = spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move));
    let share = moves.map(|i| {
        let (from, to) = (&spmd.values[i.inputs[0].index()], &spmd.values[i.output.index()]);
        let got = from.regions.iter().zip(&*to.regions).map(|(from, to)| to.elements() - to.intersect(from).elements());
        got.sum::<usize>() as f64 / from.ty.elements() as f64
    });
    share.fold(0.0, f64::max)
}

fn fate(case: &Case, d: &Dim) -> Fate {
    let (function, what) = (case.function(), format!("{} along `{}`", case.label, d.name));
    let node = function.nodes.iter().find(|n| n.op.kind() == case.kind).unwrap();
    let types = function.input_types(node);
    let spmd = lowered(case, &format!("{}:m", d.name));
    let result = match spmd.assigns.first() {
        Some((_, value)) => &spmd.values[value.index()],
        None => spmd.values.iter().rev().find(|v| function.node(v.node).op.kind() == case.kind).unwrap(),
    };
    let whole = node.op.op().whole(&types, &node.ty).into_iter().find(|(n, _)| *n == d.name);
    if let Some((_, why)) = whole {
        assert!(!node.ty.has(&d.name) || !is_split(&result.regions, &d.name), "{what} is split in spite of: {why}");
        return Fate::Whole(why);
    }
    if node.op.op().reduced(&types).contains(d) {
        let finished = spmd.instrs.iter().any(|i| matches!(i.op, SpmdOp::AllReduce { .. }));
        assert!(finished && fetched(&spmd) < 1.0, "{what} is summed over and gathered");
        return Fate::Summed;
    }
    // What the op calls otherwise in its result is split there.
    let same = |e: &&Dim| types.iter().all(|t| !t.has(&e.name));
    let renamed = node.ty.dims.iter().filter(same).map(|e| format!("{0}:m, {1}:m", d.name, e.name));
    let layouts = if node.ty.has(&d.name) { vec![format!("{}:m", d.name)] } else { renamed.collect() };
    let split = layouts.iter().map(|layout| lowered(case, layout)).map(|s| fetched(&s)).fold(f64::INFINITY, f64::min);
    assert!(!node.ty.has(&d.name) || is_split(&result.regions, &d.name), "{what} is not split, and has no reason");
    assert!(split < 1.0, "{what} is gathered, and has no reason");
    if split == 0.0 { Fate::Split } else { Fate::Fetched }
}

/// By dimension of a case, those of its result first: what becomes of it.
fn fates(case: &Case) -> Vec<(Name, Fate)> {
    let function = case.function();
    let node = function.nodes.iter().find(|n| n.op.kind() == case.kind).unwrap();
    let types = function.input_types(node).into_iter();
    let all = std::iter::once(&node.ty).chain(types).flat_map(|t| &t.dims);
    let mut found: Vec<(Name, Fate)> = vec![];
    for d in all {
        if !found.iter().any(|(n, _)| *n == d.name) {
            found.push((d.name.clone(), fate(case, d)));
        }
    }
    found
}

/// A table of what becomes of the dimensions of all cases.
fn table(cases: &[Case]) -> String {
    let mut out = String::from(
        "| op | split | split, others' elements fetched | summed in parts | whole |\n|---|---|---|---|---|\n",
    );
    for case in cases {
        let fates = fates(case);
        let of = |wanted: Fate| {
            let names = fates.iter().filter(|(_, fate)| *fate == wanted).map(|(n, _)| format!("`{n}`"));
            names.collect::<Vec<_>>().join(", ")
        };
        let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (name, fate) in &fates {
            if let Fate::Whole(why) = fate {
                reasons.entry(*why).or_default().push(format!("`{name}`"));
            }
        }
        let whole = reasons.into_iter().map(|(why, names)| format!("{}: {why}", names.join(", ")));
        let whole = whole.collect::<Vec<_>>().join("; ");
        let columns = [case.label.clone(), of(Fate::Split), of(Fate::Fetched), of(Fate::Summed), whole];
        out += &format!("| {} |\n", columns.join(" | "));
    }
    out
}

#[test]
fn every_dimension_of_every_op_is_split_or_whole_for_a_reason_and_the_book_says_so() {
    let cases = cases();
    let covered: BTreeSet<&str> = cases.iter().map(|c| c.kind).collect();
    assert_eq!(covered, Prim::KINDS.iter().copied().collect(), "each line of the table of ops needs a case");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/layouts.md");
    let book = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- ops: written by mesh/tests/splits.rs -->\n", "<!-- ops: end -->\n");
    let (before, rest) = book.split_once(begin).expect("the book has a place for the table");
    let (found, after) = rest.split_once(end).expect("the table ends");
    let table = table(&cases);
    if std::env::var_os("MESH_WRITE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{begin}{table}{end}{after}")).unwrap();
    } else {
        assert_eq!(found, table, "set MESH_WRITE_DOCS=1 to write it anew");
    }
}
