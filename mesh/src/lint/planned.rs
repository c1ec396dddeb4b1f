//! A planned program as lints see it: what each instruction computes and moves, and what another layout would.

use super::finding::{Change, Lost};
use crate::dim::{Name, Type};
use crate::error::Error;
use crate::graph::{Node, NodeId};
use crate::layout::{Layout, Mesh, Placement};
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::plan::{self, ExchangeKind, ProgramPlan};
use crate::program::{Function, Program};
use crate::region::Region;
use crate::spmd::{self, Instr, SpmdOp, SpmdProgram, Sum, Value, ValueId};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// Layouts that are tried at the most in the search for better ones: each is a lowering of the whole program.
const TRIALS: usize = 40;
/// Operations that a random number takes; the op itself counts none.
const FLOPS_A_DRAW: f64 = 25.0;

/// What a run of every function takes on the device that it takes most of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    pub lost: Lost,
    /// Bytes of variables.
    pub variables: f64,
}

/// A planned program.
pub(super) struct Planned<'a> {
    pub program: &'a Program,
    pub plan: &'a ProgramPlan,
    /// Bytes that a device may use.
    pub memory: Option<usize>,
    /// All but `init`.
    pub functions: Vec<Lowered<'a>>,
    pub now: Total,
    tried: RefCell<HashMap<String, Option<Total>>>,
}

/// Data that move between devices: what a device receives.
pub(super) struct Moved {
    pub from: ValueId,
    pub kind: ExchangeKind,
    /// Who needs them.
    pub by: NodeId,
    /// Dimensions that are split before and not after it, each with its axis.
    pub gathered: Vec<(Name, usize)>,
    /// By device.
    pub received: Vec<f64>,
    /// Of those, the most.
    pub bytes: f64,
    pub to: ValueId,
}

/// A function on a mesh.
pub(super) struct Lowered<'a> {
    pub function: &'a Function,
    pub spmd: SpmdProgram,
    pub mesh: Mesh,
    /// By value: instructions that read it.
    pub readers: Vec<Vec<usize>>,
    /// By value: the instruction that makes it.
    pub producer: Vec<Option<usize>>,
    pub moves: Vec<Moved>,
    pub total: Lost,
}

/// The functions of a program, lowered; without the one that runs once.
fn lowered<'a>(program: &'a Program, mesh: &Mesh, layout: &Layout) -> Result<Vec<Lowered<'a>>, Error> {
    layout.check(mesh, program)?;
    let placement = Placement { mesh, layout, chunking: &program.chunking };
    let functions = program.functions.values().filter(|f| f.name != "init");
    functions.map(|f| Ok(Lowered::new(f, spmd::lower(f, &placement)?, mesh))).collect()
}

fn total(program: &Program, mesh: &Mesh, layout: &Layout, functions: &[Lowered]) -> Result<Total, Error> {
    let placement = Placement { mesh, layout, chunking: &program.chunking };
    let mut held = vec![0; mesh.size()];
    for v in &program.variables {
        let spec = placement.spec("variable", &v.ty, None, &[], v.place)?;
        for (d, r) in placement.regions(&v.ty, &spec).iter().enumerate() {
            held[d] += r.elements() * v.ty.dtype.bytes();
        }
    }
    let sum = |f: fn(&Lost) -> f64| functions.iter().map(|l| f(&l.total)).sum();
    let lost = Lost { flops: sum(|l| l.flops), sent_bytes: sum(|l| l.sent_bytes), messages: 0.0, held_bytes: 0.0 };
    Ok(Total { lost, variables: held.into_iter().max().unwrap_or(0) as f64 })
}

fn along(mesh: &Mesh, axis: usize) -> (usize, usize) {
    let axes = mesh.axes();
    (0, (axes[axis].1 - 1) * axes[axis + 1..].iter().map(|(_, s)| s).product::<usize>())
}

/// The dimensions of which devices along an axis hold unlike ranges.
pub(crate) fn split_along(mesh: &Mesh, regions: &[Region], axis: usize) -> Vec<Name> {
    let (a, b) = along(mesh, axis);
    let dims = regions[a].0.iter().zip(&regions[b].0);
    dims.filter(|((_, r), (_, s))| r != s).map(|((n, _), _)| n.clone()).collect()
}

impl<'a> Planned<'a> {
    pub fn new(program: &'a Program, plan: &'a ProgramPlan, memory: Option<usize>) -> Result<Planned<'a>, Error> {
        let functions = lowered(program, &plan.mesh, &plan.layout)?;
        let now = total(program, &plan.mesh, &plan.layout, &functions)?;
        Ok(Planned { program, plan, memory, functions, now, tried: RefCell::default() })
    }

    /// The axes that have more than one device: index, name, devices.
    pub fn axes(&self) -> impl Iterator<Item = (usize, &Name, usize)> {
        let axes = self.plan.mesh.axes().iter().enumerate();
        axes.filter(|(_, (_, size))| *size > 1).map(|(i, (name, size))| (i, name, *size))
    }
    pub fn axis_name(&self, axis: usize) -> &Name {
        &self.plan.mesh.axes()[axis].0
    }
    pub fn axis_size(&self, axis: usize) -> usize {
        self.plan.mesh.axes()[axis].1
    }
    /// Whether anything is split over an axis.
    pub fn uses(&self, axis: usize) -> bool {
        self.functions.iter().any(|l| {
            l.spmd.values.iter().any(|v| !l.split(&v.regions, axis).is_empty())
                || l.spmd
                    .instrs
                    .iter()
                    .any(|i| matches!(&i.op, SpmdOp::Compute { sum: Some(s), .. } if l.sums(s, axis)))
        })
    }
    /// Whether a tensor has the dimensions of a variable: it is one, or a gradient, or a slot.
    pub fn like_a_variable(&self, ty: &Type) -> bool {
        self.program.variables.iter().any(|v| v.ty.dims == ty.dims)
    }
    /// The most memory that a device needs.
    pub fn peak(&self) -> usize {
        (0..self.plan.mesh.size()).map(|d| self.plan.peak_bytes(d)).max().unwrap_or(0)
    }
    /// Whether memory is short: more than 7 of 10 parts of it are needed.
    pub fn is_short(&self) -> bool {
        self.memory.is_some_and(|m| self.peak() * 10 > m * 7)
    }
    /// A dimension that a rule is for.
    pub fn has_rule(&self, dim: &Name) -> bool {
        self.plan.layout.axis_of(dim).is_some()
    }
    /// The dimensions split over an axis by a rule.
    pub fn rules_of(&self, axis: &Name) -> Vec<&Name> {
        self.plan.layout.rules().iter().filter(|(_, a)| a == axis).map(|(d, _)| d).collect()
    }
    /// Chunks of a dimension.
    pub fn chunks(&self, dim: &Name, size: usize) -> usize {
        self.program.chunking.count(dim, size)
    }

    /// What a change would make of the program; None where it cannot be.
    pub fn trial(&self, change: &Change) -> Option<Total> {
        let key = change.to_string();
        if let Some(known) = self.tried.borrow().get(&key) {
            return *known;
        }
        if self.tried.borrow().len() >= TRIALS {
            return None;
        }
        let outcome = || {
            let mesh: Mesh = change.mesh.as_ref().map_or(Ok(self.plan.mesh.clone()), |m| m.parse()).ok()?;
            let layout: Layout = change.layout.as_ref().map_or(Ok(self.plan.layout.clone()), |l| l.parse()).ok()?;
            total(self.program, &mesh, &layout, &lowered(self.program, &mesh, &layout).ok()?).ok()
        };
        let outcome = outcome();
        self.tried.borrow_mut().insert(key, outcome);
        outcome
    }
    /// The change that saves most, of some, if one does: time, and no memory of variables where that is short.
    pub fn better(&self, changes: impl IntoIterator<Item = Change>) -> Option<Change> {
        let tried = changes.into_iter().filter_map(|c| Some((self.trial(&c)?, c)));
        let fits = |t: &Total| !self.is_short() || t.variables <= self.now.variables;
        let saves = |t: &Total| t.lost.weight() < 0.995 * self.now.lost.weight();
        let best =
            tried.filter(|(t, _)| fits(t) && saves(t)).min_by(|a, b| a.0.lost.weight().total_cmp(&b.0.lost.weight()));
        best.map(|(_, c)| c)
    }
    /// Some dimensions split over an axis, each by itself.
    pub fn rules(&self, axis: &Name, dims: &[Name]) -> Vec<Change> {
        dims.iter().take(5).map(|d| Change::split(&self.plan.layout, d, axis, &[])).collect()
    }
    /// Some dimensions split over an axis in place of `dim`.
    pub fn instead(&self, dim: &Name, axis: &Name, dims: &[Name]) -> Vec<Change> {
        let others = dims.iter().filter(|d| *d != dim && !self.has_rule(d)).take(5);
        others.map(|d| Change::split(&self.plan.layout, d, axis, &[dim])).collect()
    }
}

impl<'a> Lowered<'a> {
    fn new(function: &'a Function, spmd: SpmdProgram, mesh: &Mesh) -> Lowered<'a> {
        let mut readers = vec![vec![]; spmd.values.len()];
        let mut producer = vec![None; spmd.values.len()];
        for (i, instr) in spmd.instrs.iter().enumerate() {
            instr.inputs.iter().for_each(|v| readers[v.index()].push(i));
            producer[instr.output.index()] = Some(i);
        }
        let total = Lost::default();
        let mut l = Lowered { function, spmd, mesh: mesh.clone(), readers, producer, moves: vec![], total };
        l.moves = l.spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move)).map(|i| l.moved(i)).collect();
        let mut flops = vec![0.0; mesh.size()];
        let mut sent = vec![0.0; mesh.size()];
        for i in &l.spmd.instrs {
            for d in 0..mesh.size() {
                flops[d] += l.flops(i, d);
                sent[d] += l.all_reduced(i, d);
            }
        }
        for m in l.moves.iter() {
            m.received.iter().zip(&mut sent).for_each(|(r, s)| *s += r);
        }
        let most = |list: Vec<f64>| list.into_iter().fold(0.0, f64::max);
        l.total = Lost { flops: most(flops), sent_bytes: most(sent), ..Lost::default() };
        l
    }

    pub fn value(&self, v: ValueId) -> &Value {
        &self.spmd.values[v.index()]
    }
    /// The node that an instruction is of.
    pub fn node_of(&self, i: &Instr) -> (NodeId, &Node) {
        let id = self.value(i.output).node;
        (id, self.function.node(id))
    }
    /// Computations, with their op.
    pub fn computes(&self) -> impl Iterator<Item = (&Instr, &Prim)> {
        self.spmd.instrs.iter().filter_map(|i| match &i.op {
            SpmdOp::Compute { prim, .. } => Some((i, prim)),
            SpmdOp::Move | SpmdOp::AllReduce { .. } => None,
        })
    }
    /// Sums that devices finish together, with the axes that they do along, and what combines them.
    pub fn all_reduces(&self) -> impl Iterator<Item = (&Instr, Vec<usize>, ReduceFn)> {
        self.spmd.instrs.iter().filter_map(|i| match &i.op {
            SpmdOp::AllReduce { f, sum, .. } => {
                Some((i, (0..self.mesh.axes().len()).filter(|a| self.sums(sum, *a)).collect(), *f))
            }
            SpmdOp::Move | SpmdOp::Compute { .. } => None,
        })
    }
    /// Devices that differ in an axis alone: its first and its last one.
    pub fn along(&self, axis: usize) -> (usize, usize) {
        along(&self.mesh, axis)
    }
    /// The dimensions that lie otherwise along an axis.
    pub fn split(&self, regions: &[Region], axis: usize) -> Vec<Name> {
        split_along(&self.mesh, regions, axis)
    }
    /// Whether devices along an axis sum up unlike parts.
    pub fn sums(&self, sum: &Sum, axis: usize) -> bool {
        let (a, b) = self.along(axis);
        sum.owned[a] != sum.owned[b]
    }
    /// What a device goes over: its part of the result and of what is summed.
    pub fn iteration(&self, i: &Instr, device: usize) -> Region {
        let mut at = self.value(i.output).regions[device].clone();
        if let SpmdOp::Compute { prim, sum: Some(sum) } = &i.op {
            let node = self.function.node(self.value(i.output).node);
            let reduced = prim.op().reduced(&self.function.input_types(node));
            for (d, range) in reduced.iter().zip(sum.tree.elements(&sum.owned[device])) {
                at = at.with(&d.name, range);
            }
        }
        at
    }
    /// Its dimensions, whole.
    pub fn dims(&self, i: &Instr) -> Vec<crate::dim::Dim> {
        let (_, node) = self.node_of(i);
        let mut dims = node.ty.dims.clone();
        dims.extend(node.op.op().reduced(&self.function.input_types(node)));
        dims
    }
    /// Whether devices along an axis compute the same.
    pub fn replicated(&self, i: &Instr, axis: usize) -> bool {
        let (a, b) = self.along(axis);
        self.iteration(i, a) == self.iteration(i, b)
    }
    /// Operations of an instruction on a device.
    pub fn flops(&self, i: &Instr, device: usize) -> f64 {
        let SpmdOp::Compute { prim, .. } = &i.op else { return 0.0 };
        let (_, node) = self.node_of(i);
        let all = match prim {
            Prim::Random(_) => FLOPS_A_DRAW * node.ty.elements() as f64,
            _ => prim.op().flops(&self.function.input_types(node), &node.ty) as f64,
        };
        let own = self.iteration(i, device);
        let dims = self.dims(i);
        dims.iter().fold(all, |f, d| f * own.get(&d.name).map_or(d.size, |r| r.len()) as f64 / d.size.max(1) as f64)
    }
    /// The most of a device.
    pub fn most_flops(&self, i: &Instr) -> f64 {
        (0..self.mesh.size()).map(|d| self.flops(i, d)).fold(0.0, f64::max)
    }
    /// Bytes that a device sends to finish a sum.
    pub fn all_reduced(&self, i: &Instr, device: usize) -> f64 {
        let SpmdOp::AllReduce { f, sum, groups } = &i.op else { return 0.0 };
        let value = self.value(i.output);
        let together = plan::Together::new(sum, &groups[device]);
        let elements = value.regions[device].elements();
        plan::all_reduce(*f, value.ty.dtype, &together, elements, device).sent_bytes() as f64
    }
    /// The most of a device.
    pub fn most_all_reduced(&self, i: &Instr) -> f64 {
        (0..self.mesh.size()).map(|d| self.all_reduced(i, d)).fold(0.0, f64::max)
    }

    fn moved(&self, i: &Instr) -> Moved {
        let (from, to) = (self.value(i.inputs[0]), self.value(i.output));
        let element = to.ty.dtype.bytes();
        let received: Vec<f64> = from
            .regions
            .iter()
            .zip(&to.regions)
            .map(|(f, t)| (t.elements() - t.intersect(f).elements()) as f64 * element as f64)
            .collect();
        let mut gathered = vec![];
        for axis in (0..self.mesh.axes().len()).filter(|a| self.mesh.axes()[*a].1 > 1) {
            let after = self.split(&to.regions, axis);
            let before = self.split(&from.regions, axis);
            gathered.extend(before.into_iter().filter(|d| !after.contains(d)).map(|d| (d, axis)));
        }
        let bytes = received.iter().copied().fold(0.0, f64::max);
        let kind = plan::kind(&from.regions, &to.regions);
        Moved { from: i.inputs[0], kind, by: to.node, gathered, received, bytes, to: i.output }
    }
    /// The node that made a value, wherever it was moved for.
    pub fn origin(&self, v: ValueId) -> NodeId {
        match self.producer[v.index()].map(|i| &self.spmd.instrs[i]) {
            Some(Instr { op: SpmdOp::Move, inputs, .. }) => self.origin(inputs[0]),
            _ => self.value(v).node,
        }
    }
    /// The node at the start of a chain of elementwise functions of one value (and of scalars), casts and renames.
    pub fn root(&self, mut node: NodeId) -> NodeId {
        loop {
            let n = self.function.node(node);
            match &n.op {
                Prim::Unary(_) | Prim::Cast(_) | Prim::Rename(_) => node = n.inputs[0],
                Prim::Binary(_) => {
                    let scalar = |i: &NodeId| self.function.node(*i).ty.dims.is_empty();
                    match n.inputs[..] {
                        [a, b] if scalar(&b) && !scalar(&a) => node = a,
                        [a, b] if scalar(&a) && !scalar(&b) => node = b,
                        _ => return node,
                    }
                }
                _ => return node,
            }
        }
    }
    /// The variable that a value is, cast or renamed at the most.
    pub fn variable(&self, v: ValueId) -> Option<crate::program::VarId> {
        match &self.function.node(self.root(self.origin(v))).op {
            Prim::Read(r) => Some(r.var),
            _ => None,
        }
    }
    /// By node: the nodes that take it.
    pub fn takers(&self) -> BTreeMap<NodeId, Vec<NodeId>> {
        let mut takers: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
        for (i, n) in self.function.nodes.iter().enumerate() {
            n.inputs.iter().for_each(|input| takers.entry(*input).or_default().push(NodeId(i as u32)));
        }
        takers
    }
    /// Whether a function trains: it sets variables from their gradients.
    pub fn trains(&self, program: &Program) -> bool {
        self.function.assigns.iter().any(|(v, _)| program.variables[v.index()].trainable)
    }
}
