//! Plans one function: steps in order, what lives where from when to when, and each device's offsets.

use super::band::View;
use super::body;
use super::copies::copies;
use super::exchange::{Sources, Together, all_reduce, exchange};
use super::fuse::{Fused, Group, Kind};
use super::memory::{self, Tenant};
use super::step::{ALIGN, Backend, BoxCopy, Buffer, CopyWork, DevicePlan, IDLE, Label, OpWork, Part, Step, Work};
use crate::body::{Loop, Reduction};
use crate::dim::{Dim, Name};
use crate::error::Place;
use crate::graph::NodeId;
use crate::layout::Mesh;
use crate::ops::Prim;
use crate::program::{Function, VarId, Variable};
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, ValueId, sources};
use std::collections::HashMap;

/// Where a stored value lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Home {
    /// In a variable's buffer.
    Variable(VarId),
    /// In a buffer of the function's.
    Own(usize),
}

/// When a buffer of the function's is in use; its bytes by device.
struct Life {
    bytes: Vec<usize>,
    from: usize,
    to: usize,
    value: ValueId,
    /// Values that lay there before, each with the step from which on another one did.
    before: Vec<(usize, ValueId)>,
}

/// A device's memory over a function's steps.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Bytes alive at each step, variables included.
    pub alive: Vec<usize>,
    /// The step (the first one) at which most are.
    pub fullest: usize,
    /// What is alive there, largest first.
    pub largest: Vec<Alive>,
    /// By block of the function: bytes of it at each step that would not be there if it were made again.
    pub inside: Vec<Vec<usize>>,
    /// Bytes at each step that are kept in place of being sent again, where there is room.
    pub kept: Vec<usize>,
}

/// Something that is alive at a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Alive {
    /// What it is.
    pub name: String,
    /// Bytes.
    pub bytes: usize,
    /// Where it comes from.
    pub place: Place,
    /// Whether it is a variable, alive at every step.
    pub variable: bool,
}

/// What planning needs to know besides the function.
pub(super) struct Context<'a> {
    /// The function.
    pub function: &'a Function,
    /// The mesh.
    pub mesh: &'a Mesh,
    /// Its lowered form.
    pub spmd: &'a SpmdProgram,
    /// By device: buffers of the variables.
    pub variables: &'a [Vec<(Part, Buffer)>],
    /// The program's variables.
    pub declared: &'a [Variable],
    /// End of the variables' buffers, by device.
    pub base: &'a [usize],
    /// The backend.
    pub backend: &'a dyn Backend,
    /// Whether there are to be no bands.
    pub apart: bool,
}

/// Plans the function for every device.
pub(super) fn plan(cx: &Context) -> Vec<(DevicePlan, Timeline)> {
    let fused = Fused::new(cx.spmd, if cx.apart { 0 } else { cx.backend.threads() });
    let (mut moves, mut sums) = (HashMap::new(), HashMap::new());
    for (i, instr) in cx.spmd.instrs.iter().enumerate() {
        let value = |v: ValueId| &cx.spmd.values[v.index()].regions;
        match &instr.op {
            SpmdOp::Move => {
                moves.insert(i, sources(cx.mesh, value(instr.inputs[0]), value(instr.output)));
            }
            SpmdOp::AllReduce { sum, groups, .. } => {
                for group in groups.iter() {
                    sums.entry((i, group[0])).or_insert_with(|| Together::new(sum, group));
                }
            }
            SpmdOp::Compute { .. } => {}
        }
    }
    let mut p = Planner {
        cx,
        fused: &fused,
        moves,
        sums,
        homes: HashMap::new(),
        lives: vec![],
        last: HashMap::new(),
        copies: vec![],
        kept: vec![],
    };
    p.uses();
    p.homes();
    let mut placed = vec![];
    (0..cx.variables.len()).map(|d| p.device(d, &mut placed)).collect()
}

/// Tenants with their places.
struct Placed {
    tenants: Vec<Tenant>,
    base: usize,
    buffers: Vec<Buffer>,
    end: usize,
}

pub(super) struct Planner<'a> {
    pub cx: &'a Context<'a>,
    pub fused: &'a Fused<'a>,
    /// By instruction: who sends what to whom.
    moves: HashMap<usize, Sources>,
    /// By instruction and first device: the groups that finish a sum together.
    sums: HashMap<(usize, usize), Together>,
    homes: HashMap<ValueId, Home>,
    lives: Vec<Life>,
    /// Last group that reads a value.
    last: HashMap<ValueId, usize>,
    /// Assignments that need a copy at the end: value and variable.
    copies: Vec<(ValueId, VarId)>,
    /// Results that are the old value of a variable which is set: they are copied out before that. Value and life.
    kept: Vec<(ValueId, usize)>,
}

impl Planner<'_> {
    fn groups(&self) -> &[Group] {
        &self.fused.groups
    }
    /// The step after the last group, where copies to variables and fetches happen.
    fn end(&self) -> usize {
        self.groups().len()
    }
    fn devices(&self) -> usize {
        self.cx.variables.len()
    }

    fn uses(&mut self) {
        for (g, group) in self.fused.groups.iter().enumerate() {
            for &v in &group.inputs {
                self.last.insert(v, g);
            }
            for &v in &group.outputs {
                self.last.entry(v).or_insert(g);
            }
        }
        let end = self.end();
        for (_, v) in &self.cx.spmd.outputs {
            self.last.insert(self.fused.root(*v), end);
        }
    }

    fn homes(&mut self) {
        let spmd = self.cx.spmd;
        let reads: HashMap<VarId, ValueId> = spmd.reads.iter().copied().collect();
        for (var, v) in &spmd.reads {
            self.homes.insert(*v, Home::Variable(*var));
        }
        // What was fed stays for the steps to come.
        for (_, v) in &spmd.inputs {
            self.last.insert(*v, self.end());
            self.own(*v, 0);
        }
        let mut made: HashMap<ValueId, usize> = HashMap::new();
        for (g, group) in self.fused.groups.iter().enumerate() {
            group.outputs.iter().for_each(|v| {
                made.insert(*v, g);
            });
        }
        // Results that go to a variable are computed in its buffer, where nobody reads the old value any more.
        let end = self.end();
        let assigns: Vec<(VarId, ValueId)> = spmd.assigns.iter().map(|(var, v)| (*var, self.fused.root(*v))).collect();
        for &(_, v) in &assigns {
            if self.homes.contains_key(&v) {
                self.last.insert(v, end);
            }
        }
        for (var, v) in assigns {
            let old = reads.get(&var).copied();
            let direct = made.get(&v).is_some_and(|&g| {
                !self.homes.contains_key(&v)
                    && old.is_none_or(|old| match self.last.get(&old) {
                        Some(&l) if l == g => self.reads_in_place(g, old, v),
                        Some(&l) => l < g,
                        None => true,
                    })
            });
            if direct {
                self.homes.insert(v, Home::Variable(var));
            } else {
                self.last.insert(v, end);
                self.copies.push((v, var));
            }
        }
        for (var, v) in &spmd.reads {
            let set = self.copies.iter().any(|(_, set)| set == var);
            if set && spmd.outputs.iter().any(|(_, out)| self.fused.root(*out) == *v) {
                let bytes = (0..self.devices()).map(|d| spmd.values[v.index()].bytes(d)).collect();
                self.kept.push((*v, self.lives.len()));
                self.lives.push(Life { bytes, from: end, to: end, value: *v, before: vec![] });
            }
        }
        for g in 0..self.end() {
            let group = &self.fused.groups[g];
            for &v in &group.outputs {
                if self.homes.contains_key(&v) {
                    continue;
                }
                let reused = group.inputs.iter().find_map(|i| match self.homes.get(i) {
                    Some(&Home::Own(life)) if self.lives[life].to == g && self.reads_in_place(g, *i, v) => Some(life),
                    _ => None,
                });
                match reused {
                    Some(life) => {
                        let reused = &mut self.lives[life];
                        reused.to = self.last[&v];
                        reused.before.push((g, reused.value));
                        reused.value = v;
                        self.homes.insert(v, Home::Own(life));
                    }
                    None => self.own(v, g),
                }
            }
        }
    }

    fn own(&mut self, v: ValueId, from: usize) {
        let value = &self.cx.spmd.values[v.index()];
        let bytes = (0..self.devices()).map(|d| value.bytes(d)).collect();
        let to = self.last.get(&v).copied().unwrap_or(from);
        self.homes.insert(v, Home::Own(self.lives.len()));
        self.lives.push(Life { bytes, from, to, value: v, before: vec![] });
    }

    /// Whether a group is a loop that reads `old` only at the very points that it writes of `new`, on every device, so
    /// that both may lie in one buffer.
    fn reads_in_place(&self, g: usize, old: ValueId, new: ValueId) -> bool {
        let group = &self.fused.groups[g];
        let values = &self.cx.spmd.values;
        let (a, b) = (&values[old.index()], &values[new.index()]);
        let by_op = match group.kind {
            Kind::Map => false,
            Kind::Epilogue => self.first(group).inputs.iter().any(|v| self.fused.root(*v) == old),
            Kind::Reduce | Kind::Instr | Kind::Band(..) => true,
        };
        if by_op || a.ty.dtype.bytes() != b.ty.dtype.bytes() {
            return false;
        }
        let in_place = |d: usize| {
            let (nest, loaded) = self.map(group, self.view(d));
            let mut own = nest.operands.iter().zip(&loaded).filter(|(_, v)| **v == old);
            own.all(|(access, _)| access.is_whole(&nest.extents))
        };
        (0..self.devices()).all(|d| a.bytes(d) == b.bytes(d) && (b.bytes(d) == 0 || in_place(d)))
    }

    /// A group's first instruction: if it has an epilogue, the product.
    fn first(&self, group: &Group) -> &Instr {
        &self.cx.spmd.instrs[group.instrs[0]]
    }

    /// All that a device holds.
    fn view(&self, device: usize) -> View<'_> {
        View { fused: self.fused, device, slice: None }
    }

    fn map(&self, group: &Group, view: View) -> (Loop, Vec<ValueId>) {
        body::build(view, &view.region(group.outputs[0]), &group.outputs, &self.fused.inside(group))
    }

    fn buffer(&self, v: ValueId, device: usize, placed: &[Buffer]) -> Buffer {
        match self.homes[&self.fused.root(v)] {
            Home::Variable(var) => self.cx.variables[device][var.index()].1,
            Home::Own(life) => placed[life],
        }
    }

    fn part(&self, v: ValueId, view: View) -> Part {
        Part { ty: self.fused.ty(v).clone(), region: view.region(v) }
    }

    fn label(&self, v: ValueId, op: &str) -> Label {
        let node = self.cx.spmd.values[v.index()].node;
        let n = self.cx.function.node(node);
        Label { op: op.into(), scope: n.scope.clone(), place: n.place, node }
    }

    /// Whether a device has nothing to do with a group: it is another stage's.
    fn is_idle(&self, group: &Group, device: usize) -> bool {
        let there = |v: &ValueId| !self.cx.spmd.values[v.index()].regions[device].is_empty();
        match &self.first(group).op {
            SpmdOp::Move => {
                let pieces = |to: usize, pieces: &[(usize, Region)]| match to == device {
                    true => !pieces.is_empty(),
                    false => pieces.iter().any(|(from, _)| *from == device),
                };
                !self.moves[&group.instrs[0]].iter().enumerate().any(|(to, p)| pieces(to, p))
            }
            SpmdOp::AllReduce { .. } => !group.outputs.iter().chain(&group.inputs).any(there),
            SpmdOp::Compute { .. } => !group.outputs.iter().any(there),
        }
    }

    /// The work of a group on a device or a slice, the values it reads in the work's order, its name and its scratch.
    pub(super) fn work(&self, group: &Group, view: View) -> (Work, Vec<ValueId>, Name, usize) {
        let (spmd, device) = (self.cx.spmd, view.device);
        let instr = self.first(group);
        let out = &spmd.values[instr.output.index()];
        if self.is_idle(group, device) {
            return (Work::Copy(CopyWork::default()), vec![], IDLE.into(), 0);
        }
        if group.kind == Kind::Map {
            let (nest, loaded) = self.map(group, view);
            let work = Work::Map(nest);
            let scratch = self.cx.backend.scratch_bytes(&work);
            return (work, loaded, "map".into(), scratch);
        }
        if let Kind::Band(members, cuts) = &group.kind {
            let work = self.band(group, members, cuts, device);
            let scratch = self.cx.backend.scratch_bytes(&work);
            return (work, group.inputs.clone(), "band".into(), scratch);
        }
        match &instr.op {
            SpmdOp::Move => {
                let (work, scratch) = exchange(
                    &spmd.values[instr.inputs[0].index()],
                    &out.regions,
                    &self.moves[&group.instrs[0]],
                    device,
                );
                let name = match work.kind {
                    super::ExchangeKind::Halo => "halo",
                    super::ExchangeKind::AllGather => "all-gather",
                    super::ExchangeKind::AllToAll => "all-to-all",
                    super::ExchangeKind::Permute => "permute",
                    super::ExchangeKind::Slice => "slice",
                    super::ExchangeKind::Send => "send",
                };
                (Work::Exchange(work), group.inputs.clone(), name.into(), scratch)
            }
            SpmdOp::AllReduce { f, groups, .. } => {
                let held = &spmd.values[instr.inputs[0].index()].regions;
                let together = &self.sums[&(group.instrs[0], groups[device][0])];
                let work = all_reduce(*f, out.ty.dtype, together, held, &out.regions, device);
                let scratch = work.scratch_bytes();
                let name = if held == &out.regions { "all-reduce" } else { "reduce-scatter" };
                (Work::AllReduce(work), group.inputs.clone(), name.into(), scratch)
            }
            SpmdOp::Compute { prim: Prim::Reduce(r), sum } => {
                let work = Work::Reduce(self.reduction(group, view, r, sum.as_deref()));
                let scratch = self.cx.backend.scratch_bytes(&work);
                let (_, loaded) = self.reduce_nest(group, view, sum.as_deref());
                (work, loaded, instr_name(&instr.op), scratch)
            }
            SpmdOp::Compute { prim, sum } => {
                let inputs: Vec<Part> = instr.inputs.iter().map(|v| self.part(*v, view)).collect();
                let output = self.part(instr.output, view);
                let mut read = instr.inputs.clone();
                let work = match copies(prim, &inputs, &output) {
                    Some(copy) => Work::Copy(copy),
                    None => {
                        let sum = sum.as_ref().map(|s| (s.tree.clone(), s.owned[device].clone()));
                        let epilogue = (group.kind == Kind::Epilogue).then(|| {
                            let (nest, loaded) = self.map(group, view);
                            let result = loaded.iter().position(|v| *v == instr.output).expect("it takes the result");
                            read.extend(loaded.iter().filter(|v| **v != instr.output));
                            nest.with_last(result)
                        });
                        Work::Op(OpWork { op: prim.clone(), inputs, output, sum, epilogue })
                    }
                };
                let scratch = self.cx.backend.scratch_bytes(&work);
                (work, read, instr_name(&instr.op), scratch)
            }
        }
    }

    fn reduce_nest(&self, group: &Group, view: View, sum: Option<&crate::spmd::Sum>) -> (Loop, Vec<ValueId>) {
        let spmd = self.cx.spmd;
        let instr = &spmd.instrs[group.instrs[0]];
        let (x, y) = (&spmd.values[instr.inputs[0].index()], &spmd.values[instr.output.index()]);
        let reduced: Vec<&Dim> = x.ty.dims.iter().filter(|d| !y.ty.has(&d.name)).collect();
        let owned = sum.map(|s| s.tree.elements(&s.owned[view.device])).unwrap_or_default();
        let mut at: Region = view.region(instr.output);
        for (d, range) in reduced.iter().zip(owned) {
            at = at.with(&d.name, range);
        }
        let roots: Vec<ValueId> = group.instrs.iter().map(|i| spmd.instrs[*i].inputs[0]).collect();
        body::build(view, &at.of(&x.ty), &roots, &[])
    }

    fn reduction(
        &self,
        group: &Group,
        view: View,
        r: &crate::ops::reduce::Reduce,
        sum: Option<&crate::spmd::Sum>,
    ) -> Reduction {
        let spmd = self.cx.spmd;
        let x = &spmd.values[spmd.instrs[group.instrs[0]].inputs[0].index()];
        let (nest, _) = self.reduce_nest(group, view, sum);
        Reduction {
            nest,
            reduced: x.ty.dims.iter().map(|d| r.over.contains(&d.name)).collect(),
            f: r.f,
            tree: sum.map(|s| s.tree.clone()).unwrap_or_default(),
            owned: sum.map(|s| s.owned[view.device].clone()).unwrap_or_default(),
        }
    }

    /// The plan of a device; one like another one has its places, of those in `placed`.
    fn device(&self, device: usize, placed: &mut Vec<Placed>) -> (DevicePlan, Timeline) {
        let works: Vec<_> = self.groups().iter().map(|g| self.work(g, self.view(device))).collect();
        let mut tenants: Vec<Tenant> =
            self.lives.iter().map(|l| Tenant { bytes: l.bytes[device], from: l.from, to: l.to }).collect();
        // Values that are copied to variables at the end, by way of a buffer each, since one may be the other's old value.
        let end = self.end();
        let staged = tenants.len();
        for (v, _) in &self.copies {
            tenants.push(Tenant { bytes: self.cx.spmd.values[v.index()].bytes(device), from: end, to: end });
        }
        let first_scratch = tenants.len();
        tenants.extend(works.iter().enumerate().map(|(g, w)| Tenant { bytes: w.3, from: g, to: g }));
        let base = self.cx.base[device];
        let alike = placed.iter().position(|p| p.base == base && p.tenants == tenants).unwrap_or_else(|| {
            let (buffers, end) = memory::place(&tenants, base);
            placed.push(Placed { tenants: tenants.clone(), base, buffers, end });
            placed.len() - 1
        });
        let (buffers, arena_bytes) = (placed[alike].buffers.clone(), placed[alike].end);
        let alive = memory::timeline(&tenants, base, end + 1);
        let name = |i: usize| {
            let node = if i < staged {
                self.cx.spmd.values[self.lives[i].value.index()].node
            } else if i < first_scratch {
                self.cx.spmd.values[self.copies[i - staged].0.index()].node
            } else {
                self.label(self.groups()[i - first_scratch].outputs[0], "").node
            };
            let node = self.cx.function.node(node);
            let scope = if node.scope.is_empty() { String::new() } else { format!("{}: ", node.scope) };
            let what = if i < staged {
                let value = &self.cx.spmd.values[self.lives[i].value.index()];
                let nodes = value.nodes[device];
                let parts = if nodes > 1 { format!(", {nodes} partial sums") } else { String::new() };
                let moved = self.fused.producer[self.lives[i].value.index()]
                    .is_some_and(|p| matches!(self.cx.spmd.instrs[p].op, SpmdOp::Move));
                let moved = if moved { "block and halo for " } else { "" };
                format!("{moved}{} {}{parts}", node.op.op().name(), value.regions[device].local(&value.ty))
            } else if i < first_scratch {
                "assigned value".into()
            } else {
                format!("scratch of {}", works[i - first_scratch].2)
            };
            (format!("{scope}{what}"), node.place)
        };
        let (inside, kept) = self.inside(device);
        let timeline = Timeline { inside, kept, ..self.timeline(device, &tenants, alive, name) };
        let mut steps: Vec<Step> = Vec::with_capacity(works.len());
        for (g, (work, inputs, name, _)) in works.into_iter().enumerate() {
            let group = &self.groups()[g];
            steps.push(Step {
                work,
                inputs: inputs.iter().map(|v| self.buffer(*v, device, &buffers)).collect(),
                outputs: group.outputs.iter().map(|v| self.buffer(*v, device, &buffers)).collect(),
                scratch: buffers[first_scratch + g],
                label: self.label(group.outputs[0], &name),
            });
        }
        if cfg!(debug_assertions) {
            self.verify(device, &buffers, first_scratch);
        }
        let copy = |v: ValueId, from: Buffer, to: Buffer| {
            let part = self.part(v, self.view(device));
            let n = part.region.elements();
            let line = BoxCopy { extents: vec![n], from: 0, from_strides: vec![1], to: 0, to_strides: vec![1] };
            let work = Work::Copy(CopyWork { element: part.ty.dtype.bytes(), fill: None, boxes: vec![(0, line)] });
            Step {
                work,
                inputs: vec![from],
                outputs: vec![to],
                scratch: Buffer::default(),
                label: self.label(v, "assign"),
            }
        };
        for (v, life) in &self.kept {
            steps.push(copy(*v, self.buffer(*v, device, &buffers), buffers[*life]));
        }
        for (i, (v, _)) in self.copies.iter().enumerate() {
            steps.push(copy(*v, self.buffer(*v, device, &buffers), buffers[staged + i]));
        }
        for (i, (v, var)) in self.copies.iter().enumerate() {
            steps.push(copy(*v, buffers[staged + i], self.cx.variables[device][var.index()].1));
        }
        let kept =
            |v: ValueId| self.kept.iter().find(|(k, _)| *k == self.fused.root(v)).map(|(_, life)| buffers[*life]);
        let edge = |list: &[(Name, ValueId)]| {
            let at = |v| kept(v).unwrap_or_else(|| self.buffer(v, device, &buffers));
            list.iter().map(|(n, v)| (n.clone(), self.part(*v, self.view(device)), at(*v))).collect()
        };
        let plan =
            DevicePlan { steps, arena_bytes, inputs: edge(&self.cx.spmd.inputs), outputs: edge(&self.cx.spmd.outputs) };
        (plan, timeline)
    }

    /// The node that made a value, wherever it was moved for.
    fn origin(&self, v: ValueId) -> NodeId {
        match self.fused.producer[v.index()].map(|i| &self.cx.spmd.instrs[i]) {
            Some(Instr { op: SpmdOp::Move, inputs, .. }) => self.origin(inputs[0]),
            _ => self.cx.spmd.values[v.index()].node,
        }
    }

    /// By block: bytes of its inside that are there at each step; and bytes that are kept in place of being sent again.
    fn inside(&self, device: usize) -> (Vec<Vec<usize>>, Vec<usize>) {
        let none = vec![0; self.end() + 1];
        let (mut sums, mut kept) = (vec![none.clone(); self.cx.function.blocks.len()], none);
        for life in &self.lives {
            let bytes = life.bytes[device].next_multiple_of(ALIGN);
            let mut from = life.from;
            for (to, value) in life.before.iter().copied().chain([(life.to + 1, life.value)]) {
                let add = |sum: &mut Vec<usize>| sum[from..to].iter_mut().for_each(|b| *b += bytes);
                let node = self.origin(value);
                if self.cx.spmd.kept.contains(&value) {
                    add(&mut kept);
                } else {
                    let blocks = sums.iter_mut().zip(&self.cx.function.blocks);
                    blocks.filter(|(_, b)| b.inside.binary_search(&node).is_ok()).for_each(|(sum, _)| add(sum));
                }
                from = to;
            }
        }
        (sums, kept)
    }

    /// Walks through the steps and holds that each finds in memory what it reads.
    fn verify(&self, device: usize, buffers: &[Buffer], first_scratch: usize) {
        let mut held: Vec<(Buffer, ValueId)> = Vec::new();
        let overlap = |a: Buffer, b: Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
        let given = self.cx.spmd.inputs.iter().map(|(_, v)| v).chain(self.cx.spmd.reads.iter().map(|(_, v)| v));
        for v in given {
            held.push((self.buffer(*v, device, buffers), *v));
        }
        for (g, group) in self.groups().iter().enumerate() {
            for &v in &group.inputs {
                let at = self.buffer(v, device, buffers);
                let found = at.bytes == 0 || held.contains(&(at, v));
                assert!(found, "{group:?} reads {v:?}, which is not at {at:?}: {held:?}");
            }
            let written = group.outputs.iter().map(|&v| (self.buffer(v, device, buffers), Some(v)));
            for (at, v) in written.chain([(buffers[first_scratch + g], None)]) {
                held.retain(|(b, _)| !overlap(*b, at));
                held.extend(v.map(|v| (at, v)));
            }
        }
        for (_, v) in &self.cx.spmd.outputs {
            let v = self.fused.root(*v);
            let at = self.buffer(v, device, buffers);
            assert!(at.bytes == 0 || held.contains(&(at, v)), "the result {v:?} is not at {at:?}");
        }
    }

    fn timeline(
        &self,
        device: usize,
        tenants: &[Tenant],
        alive: Vec<usize>,
        name: impl Fn(usize) -> (String, Place),
    ) -> Timeline {
        let fullest = alive.iter().enumerate().max_by_key(|(i, b)| (**b, std::cmp::Reverse(*i))).map_or(0, |(i, _)| i);
        let here = tenants.iter().enumerate().filter(|(_, t)| t.from <= fullest && fullest <= t.to && t.bytes > 0);
        let mut largest: Vec<Alive> = here
            .map(|(i, t)| {
                let (name, place) = name(i);
                Alive { name, bytes: t.bytes, place, variable: false }
            })
            .collect();
        for ((part, buffer), v) in self.cx.variables[device].iter().zip(self.cx.declared) {
            let name = format!("variable {} {}", v.name, part.region.local(&part.ty));
            largest.push(Alive { name, bytes: buffer.bytes, place: v.place, variable: true });
        }
        largest.sort_by_key(|a| std::cmp::Reverse(a.bytes));
        Timeline { alive, fullest, largest, ..Timeline::default() }
    }
}

fn instr_name(op: &SpmdOp) -> Name {
    match op {
        SpmdOp::Compute { prim, .. } => prim.op().name().into(),
        SpmdOp::Move => "move".into(),
        SpmdOp::AllReduce { .. } => "all-reduce".into(),
    }
}
