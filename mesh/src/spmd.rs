//! SPMD lowering: one list of instructions that every device runs, each on its own regions.
//!
//! A node of the function becomes a computation of the part of its result that each device owns. What that part reads
//! is the op's sharding rule ([`crate::op::Op::needs`]); where a device does not hold it, a move fetches it (a halo, a
//! gather, an all-to-all, whatever the regions say: a move is defined by who holds which global indices, so it cannot
//! bring the wrong data). Where a dimension that is summed over is split, devices compute the subtrees of the canonical
//! summation tree that they own, and an all-reduce finishes the tree.

use crate::chunk::{ChunkBox, Tree};
use crate::dim::{Name, Type};
use crate::error::Error;
use crate::graph::NodeId;
use crate::layout::{Placement, Spec};
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::program::{Function, VarId};
use crate::region::Region;
use std::collections::HashMap;
use std::fmt;

/// Index of a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ValueId(pub u32);

impl ValueId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A tensor on the mesh.
#[derive(Clone, Debug)]
pub struct Value {
    /// Type of the whole tensor.
    pub ty: Type,
    /// What each device holds.
    pub regions: Vec<Region>,
    /// How many nodes of a summation tree each device holds in place of the sum; 1 everywhere for a finished value.
    pub nodes: Vec<usize>,
    /// The function's node it belongs to.
    pub node: NodeId,
}

impl Value {
    /// Bytes that a device holds.
    pub fn bytes(&self, device: usize) -> usize {
        self.nodes[device] * self.regions[device].elements() * self.ty.dtype.bytes()
    }
}

/// A sum: its tree and the chunks that each device sums up.
#[derive(Clone, Debug, PartialEq)]
pub struct Sum {
    /// The tree.
    pub tree: Tree,
    /// By device.
    pub owned: Vec<ChunkBox>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum SpmdOp {
    /// A primitive op on what each device holds.
    Compute {
        /// The op.
        prim: Prim,
        /// If it sums over dimensions.
        sum: Option<Sum>,
    },
    /// The same tensor, held otherwise.
    Move,
    /// Finishes sums that several devices hold in parts.
    AllReduce {
        /// How parts are combined.
        f: ReduceFn,
        /// The sum.
        sum: Sum,
        /// The group of devices that each device finishes it with.
        groups: Vec<Vec<usize>>,
    },
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Instr {
    /// What it does.
    pub op: SpmdOp,
    /// Inputs.
    pub inputs: Vec<ValueId>,
    /// Result.
    pub output: ValueId,
}

/// A lowered function.
#[derive(Clone, Debug, Default)]
pub struct SpmdProgram {
    /// Values.
    pub values: Vec<Value>,
    /// Instructions, inputs before users.
    pub instrs: Vec<Instr>,
    /// Feeds.
    pub inputs: Vec<(Name, ValueId)>,
    /// Variables read.
    pub reads: Vec<(VarId, ValueId)>,
    /// Fetches.
    pub outputs: Vec<(Name, ValueId)>,
    /// Variables set.
    pub assigns: Vec<(VarId, ValueId)>,
}

/// Lowers a function.
///
/// # Errors
/// A layout that cannot be applied to one of its tensors, with the tensor's place in the user's source.
pub fn lower(function: &Function, placement: &Placement) -> Result<SpmdProgram, Error> {
    let mut l = Lowering { function, placement, out: SpmdProgram::default(), moved: HashMap::new() };
    let mut values: Vec<(ValueId, Spec)> = Vec::with_capacity(function.nodes.len());
    for (i, _) in function.nodes.iter().enumerate() {
        let value = l.node(NodeId(i as u32), &values)?;
        values.push(value);
    }
    l.out.outputs = function.outputs.iter().map(|(n, id)| (n.clone(), values[id.index()].0)).collect();
    Ok(l.out)
}

struct Lowering<'a> {
    function: &'a Function,
    placement: &'a Placement<'a>,
    out: SpmdProgram,
    moved: HashMap<(ValueId, Vec<Region>), ValueId>,
}

impl Lowering<'_> {
    fn devices(&self) -> usize {
        self.placement.mesh.size()
    }

    fn value(&mut self, ty: Type, regions: Vec<Region>, nodes: Vec<usize>, node: NodeId) -> ValueId {
        self.out.values.push(Value { ty, regions, nodes, node });
        ValueId(self.out.values.len() as u32 - 1)
    }

    fn finished(&mut self, ty: &Type, regions: Vec<Region>, node: NodeId) -> ValueId {
        let nodes = vec![1; self.devices()];
        self.value(ty.clone(), regions, nodes, node)
    }

    /// The value such that every device holds at least `needed` of it.
    fn moved(&mut self, value: ValueId, needed: Vec<Region>, node: NodeId) -> ValueId {
        let held = &self.out.values[value.index()];
        if held.regions.iter().zip(&needed).all(|(h, n)| h.contains(n)) {
            return value;
        }
        if let Some(&m) = self.moved.get(&(value, needed.clone())) {
            return m;
        }
        let ty = held.ty.clone();
        let output = self.finished(&ty, needed.clone(), node);
        self.out.instrs.push(Instr { op: SpmdOp::Move, inputs: vec![value], output });
        self.moved.insert((value, needed), output);
        output
    }

    fn node(&mut self, id: NodeId, values: &[(ValueId, Spec)]) -> Result<(ValueId, Spec), Error> {
        let node = self.function.node(id);
        let (op, types) = (node.op.op(), self.function.input_types(node));
        let own = node.layout.as_deref();
        let spec = self.placement.spec(op.name(), &node.ty, own, &op.whole(&types, &node.ty), node.place)?;
        let regions = self.placement.regions(&node.ty, &spec);
        match &node.op {
            Prim::Input(input) => {
                let v = self.finished(&node.ty, regions, id);
                self.out.inputs.push((input.name.clone(), v));
                return Ok((v, spec));
            }
            Prim::Read(read) => {
                // A variable lies as the layout's rules say; its own rules say how this function uses it.
                let stored = self.placement.spec("variable", &node.ty, None, &[], node.place)?;
                let stored = self.placement.regions(&node.ty, &stored);
                let v = self.finished(&node.ty, stored, id);
                self.out.reads.push((read.var, v));
                return Ok((self.moved(v, regions, id), spec));
            }
            Prim::Assign(assign) => {
                let value = values[node.inputs[0].index()].0;
                let held = &self.out.values[value.index()];
                let v = if held.regions == regions { value } else { self.exactly(value, regions, id) };
                self.out.assigns.push((assign.var, v));
                return Ok((v, spec));
            }
            _ => {}
        }
        let (at, sum) = self.iteration(id, &spec, regions.clone(), values);
        let mut inputs = Vec::new();
        for (i, input) in node.inputs.iter().enumerate() {
            let needed = at.iter().map(|at| op.needs(i, &types, &node.ty, at)).collect();
            inputs.push(self.moved(values[input.index()].0, needed, id));
        }
        let nodes: Vec<usize> = match &sum {
            Some(s) => s.owned.iter().map(|o| s.tree.nodes(o).len()).collect(),
            None => vec![1; self.devices()],
        };
        let split: Vec<usize> = sum.as_ref().map(|_| self.reduced_axes(id, &spec, values)).unwrap_or_default();
        let output = self.value(node.ty.clone(), regions.clone(), nodes, id);
        self.out.instrs.push(Instr { op: SpmdOp::Compute { prim: node.op.clone(), sum: sum.clone() }, inputs, output });
        if split.is_empty() {
            return Ok((output, spec));
        }
        let f = match &node.op {
            Prim::Reduce(r) => r.f,
            _ => ReduceFn::Sum,
        };
        let coordinates: Vec<Vec<usize>> = (0..self.devices()).map(|d| self.placement.mesh.coordinates(d)).collect();
        let together = |a: usize, b: usize| {
            (0..coordinates[a].len()).all(|axis| split.contains(&axis) || coordinates[a][axis] == coordinates[b][axis])
        };
        let groups = (0..self.devices()).map(|d| (0..self.devices()).filter(|&e| together(d, e)).collect()).collect();
        let done = self.finished(&node.ty, regions, id);
        let sum = sum.unwrap_or(Sum { tree: Tree { dims: vec![] }, owned: vec![] });
        self.out.instrs.push(Instr { op: SpmdOp::AllReduce { f, sum, groups }, inputs: vec![output], output: done });
        Ok((done, spec))
    }

    /// The value held in just these regions (a variable's): a move if they differ.
    fn exactly(&mut self, value: ValueId, regions: Vec<Region>, node: NodeId) -> ValueId {
        let ty = self.out.values[value.index()].ty.clone();
        let output = self.finished(&ty, regions, node);
        self.out.instrs.push(Instr { op: SpmdOp::Move, inputs: vec![value], output });
        output
    }

    /// The axis of each reduced dimension: that by which the inputs which have it are split, unless the result needs
    /// the axis for a dimension of its own.
    fn reduced_spec(&self, id: NodeId, spec: &Spec, values: &[(ValueId, Spec)]) -> Spec {
        let node = self.function.node(id);
        let types = self.function.input_types(node);
        let mut used: Vec<usize> = spec.iter().flatten().copied().collect();
        node.op
            .op()
            .reduced(&types)
            .iter()
            .map(|d| {
                let axes = node.inputs.iter().zip(&types).filter_map(|(i, t)| {
                    let p = t.dims.iter().position(|e| e == d)?;
                    values[i.index()].1[p]
                });
                let axis = axes.into_iter().find(|a| !used.contains(a))?;
                let shards = self.placement.mesh.axes()[axis].1;
                let enough = self.placement.chunking.count(&d.name, d.size) >= shards;
                enough.then(|| {
                    used.push(axis);
                    axis
                })
            })
            .collect()
    }

    fn reduced_axes(&self, id: NodeId, spec: &Spec, values: &[(ValueId, Spec)]) -> Vec<usize> {
        self.reduced_spec(id, spec, values).into_iter().flatten().collect()
    }

    /// The iteration region of each device (its part of the result and of the reduced dimensions), and the sum.
    fn iteration(
        &self,
        id: NodeId,
        spec: &Spec,
        regions: Vec<Region>,
        values: &[(ValueId, Spec)],
    ) -> (Vec<Region>, Option<Sum>) {
        let node = self.function.node(id);
        let reduced = node.op.op().reduced(&self.function.input_types(node));
        if reduced.is_empty() {
            return (regions, None);
        }
        let axes = self.reduced_spec(id, spec, values);
        let tree = self.placement.chunking.tree(&reduced);
        let mut owned = Vec::new();
        let mut at = Vec::new();
        for (device, mut region) in regions.into_iter().enumerate() {
            let mut chunks = Vec::new();
            for ((d, axis), t) in reduced.iter().zip(&axes).zip(&tree.dims) {
                let own = match axis {
                    Some(a) => {
                        let (shards, i) =
                            (self.placement.mesh.axes()[*a].1, self.placement.mesh.coordinates(device)[*a]);
                        crate::chunk::shard_chunks(t.chunks, shards, i)
                    }
                    None => 0..t.chunks,
                };
                region = region.with(&d.name, self.placement.owned(d, *axis, device));
                chunks.push(own);
            }
            owned.push(chunks);
            at.push(region);
        }
        (at, Some(Sum { tree, owned }))
    }
}

impl fmt::Display for SpmdProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for i in &self.instrs {
            let out = &self.values[i.output.index()];
            let name = match &i.op {
                SpmdOp::Compute { prim, .. } => prim.op().name(),
                SpmdOp::Move => "move",
                SpmdOp::AllReduce { .. } => "all-reduce",
            };
            let inputs: Vec<String> = i.inputs.iter().map(|v| format!("%{}", v.0)).collect();
            writeln!(f, "%{} = {name}({}) : {} {}", i.output.0, inputs.join(", "), out.ty, out.regions[0])?;
        }
        Ok(())
    }
}

/// Which device sends what to whom so that everyone who holds `from` comes to hold `to`: for each receiver the boxes
/// it gets and their senders (itself for what it has). Prefers what a device has, then its neighbours in number.
///
/// Boxes that nobody holds are left out; lowering never asks for such.
pub fn sources(from: &[Region], to: &[Region]) -> Vec<Vec<(usize, Region)>> {
    let devices = from.len();
    to.iter()
        .enumerate()
        .map(|(d, wanted)| {
            let mut missing = if wanted.is_empty() { vec![] } else { vec![wanted.clone()] };
            let mut found = Vec::new();
            for s in (0..devices).map(|k| (d + k) % devices) {
                let mut rest = Vec::new();
                for piece in missing {
                    if piece.overlaps(&from[s]) {
                        let common = piece.intersect(&from[s]);
                        rest.extend(without(&piece, &common));
                        found.push((s, common));
                    } else {
                        rest.push(piece);
                    }
                }
                missing = rest;
                if missing.is_empty() {
                    break;
                }
            }
            found
        })
        .collect()
}

/// The boxes that make up `whole` without `part`, a box inside it.
fn without(whole: &Region, part: &Region) -> Vec<Region> {
    let mut rest = whole.clone();
    let mut out = Vec::new();
    for i in 0..whole.0.len() {
        let (w, p) = (rest.0[i].1.clone(), part.0[i].1.clone());
        for side in [w.start..p.start, p.end..w.end] {
            if !side.is_empty() {
                let mut piece = rest.clone();
                piece.0[i].1 = side;
                out.push(piece);
            }
        }
        rest.0[i].1 = p;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boxes(max: usize) -> impl Strategy<Value = Region> {
        prop::collection::vec((0..max, 0..max), 2).prop_map(|v| {
            Region(
                v.iter()
                    .enumerate()
                    .map(|(i, &(a, b))| (format!("d{i}").as_str().into(), a.min(b)..a.max(b) + 1))
                    .collect(),
            )
        })
    }

    proptest! {
        #[test]
        fn every_wanted_element_comes_from_just_one_device_that_holds_it(
            cut in (1usize..8, 1usize..8), to in prop::collection::vec(boxes(8), 4)
        ) {
            let r = |a: std::ops::Range<usize>, b: std::ops::Range<usize>| Region(vec![("d0".into(), a), ("d1".into(), b)]);
            let from = [r(0..cut.0, 0..cut.1), r(0..cut.0, cut.1..9), r(cut.0..9, 0..cut.1), r(cut.0..9, cut.1..9)];
            for (wanted, pieces) in to.iter().zip(sources(&from, &to)) {
                let mut count = [[0; 9]; 9];
                for (s, piece) in pieces {
                    prop_assert!(from[s].contains(&piece));
                    for x in piece.0[0].1.clone() {
                        for y in piece.0[1].1.clone() {
                            count[x][y] += 1;
                        }
                    }
                }
                for (x, row) in count.iter().enumerate() {
                    for (y, &n) in row.iter().enumerate() {
                        let inside = wanted.0[0].1.contains(&x) && wanted.0[1].1.contains(&y);
                        prop_assert_eq!(n, usize::from(inside));
                    }
                }
            }
        }
    }
}
