//! A function on a mesh as lints see it: what each instruction computes and moves.

use super::finding::Lost;
use crate::dim::{Dim, Name};
use crate::graph::{Node, NodeId};
use crate::layout::Mesh;
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::plan::{self, ExchangeKind};
use crate::program::{Function, Program, VarId};
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, Sum, Value, ValueId};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Operations that a random number takes; the op itself counts none.
const FLOPS_A_DRAW: f64 = 25.0;

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

fn along(mesh: &Mesh, axis: usize) -> (usize, usize) {
    let axes = mesh.axes();
    (0, (axes[axis].1 - 1) * axes[axis + 1..].iter().map(|(_, s)| s).product::<usize>())
}

/// The dimensions of which devices along an axis hold unlike ranges.
pub(super) fn split_along(mesh: &Mesh, regions: &[Region], axis: usize) -> Vec<Name> {
    let (a, b) = along(mesh, axis);
    let dims = regions[a].0.iter().zip(&regions[b].0);
    dims.filter(|((_, r), (_, s))| r != s).map(|((n, _), _)| n.clone()).collect()
}

impl<'a> Lowered<'a> {
    pub fn new(function: &'a Function, spmd: SpmdProgram, mesh: &Mesh) -> Lowered<'a> {
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
            let add = |all: &mut Vec<f64>, own: Vec<f64>| all.iter_mut().zip(own).for_each(|(all, own)| *all += own);
            match &i.op {
                SpmdOp::Compute { .. } => add(&mut flops, l.flops_on(i, 0..mesh.size())),
                SpmdOp::AllReduce { .. } => add(&mut sent, l.all_reduced(i)),
                SpmdOp::Move | SpmdOp::Join { .. } => {}
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
            SpmdOp::Move | SpmdOp::AllReduce { .. } | SpmdOp::Join { .. } => None,
        })
    }
    /// Sums that devices finish together, with the axes that they do along, and what combines them.
    pub fn all_reduces(&self) -> impl Iterator<Item = (&Instr, Vec<usize>, ReduceFn)> {
        self.spmd.instrs.iter().filter_map(|i| match &i.op {
            SpmdOp::AllReduce { f, sum, .. } => {
                Some((i, (0..self.mesh.axes().len()).filter(|a| self.sums(sum, *a)).collect(), *f))
            }
            SpmdOp::Move | SpmdOp::Compute { .. } | SpmdOp::Join { .. } => None,
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
        self.spmd.iteration(self.function, i, device)
    }
    /// Its dimensions, whole.
    pub fn dims(&self, i: &Instr) -> Vec<Dim> {
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
    /// Operations of an instruction on each of some devices.
    fn flops_on(&self, i: &Instr, devices: Range<usize>) -> Vec<f64> {
        let SpmdOp::Compute { prim, .. } = &i.op else { return vec![0.0; devices.len()] };
        let (_, node) = self.node_of(i);
        let all = match prim {
            Prim::Random(_) => FLOPS_A_DRAW * node.ty.elements() as f64,
            _ => prim.op().flops(&self.function.input_types(node), &node.ty) as f64,
        };
        let dims = self.dims(i);
        let share = |own: Region| {
            dims.iter().fold(all, |f, d| f * own.get(&d.name).map_or(d.size, |r| r.len()) as f64 / d.size.max(1) as f64)
        };
        devices.map(|device| share(self.iteration(i, device))).collect()
    }
    /// Operations of an instruction on a device.
    pub fn flops(&self, i: &Instr, device: usize) -> f64 {
        self.flops_on(i, device..device + 1)[0]
    }
    /// The most of a device.
    pub fn most_flops(&self, i: &Instr) -> f64 {
        self.flops_on(i, 0..self.mesh.size()).into_iter().fold(0.0, f64::max)
    }
    /// Bytes that each device sends to finish a sum.
    fn all_reduced(&self, i: &Instr) -> Vec<f64> {
        let SpmdOp::AllReduce { f, sum, groups } = &i.op else { return vec![0.0; self.mesh.size()] };
        let value = self.value(i.output);
        let held = &self.value(i.inputs[0]).regions;
        let mut known: HashMap<&[usize], plan::Together> = HashMap::new();
        let mut sent = |(device, group)| {
            let together = known.entry(group).or_insert_with(|| plan::Together::new(sum, group));
            plan::all_reduce(*f, value.ty.dtype, together, held, &value.regions, device).sent_bytes() as f64
        };
        groups.iter().map(|g| &**g).enumerate().map(&mut sent).collect()
    }
    /// The most of a device.
    pub fn most_all_reduced(&self, i: &Instr) -> f64 {
        self.all_reduced(i).into_iter().fold(0.0, f64::max)
    }

    fn moved(&self, i: &Instr) -> Moved {
        let (from, to) = (self.value(i.inputs[0]), self.value(i.output));
        let element = to.ty.dtype.bytes();
        let received: Vec<f64> = from
            .regions
            .iter()
            .zip(&*to.regions)
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
    pub fn variable(&self, v: ValueId) -> Option<VarId> {
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
