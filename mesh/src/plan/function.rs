//! Plans one function: steps in order, and what lives where from when to when. All of that is the same for all devices;
//! [`super::device`] makes each one's plan of it.

use super::band::View;
use super::body::Nest;
use super::copies::copies;
use super::exchange::{Moves, SEGMENTED, Together, all_reduce};
use super::fuse::{Fused, Group, Kind};
use super::overlap::{Moment, Phase};
use super::pieces::in_pieces;
use super::step::{Backend, Buffer, DevicePlan, Epilogue, Join, OpWork, Part, Share, Work};
use super::timeline::Timeline;
use crate::body::{Loop, Reduction};
use crate::layout::Mesh;
use crate::ops::Prim;
use crate::program::{Function, VarId, Variable};
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, ValueId};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// Where a stored value lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Home {
    /// In a variable's buffer.
    Variable(VarId),
    /// In a buffer of the function's.
    Own(usize),
}

/// When a buffer of the function's is in use; its bytes by device.
pub(super) struct Life {
    pub bytes: Vec<usize>,
    pub from: usize,
    pub to: usize,
    pub value: ValueId,
    /// Values that lay there before, each with the step from which on another one did.
    pub before: Vec<(usize, ValueId)>,
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
    /// Whether collectives are to be one step each.
    pub waiting: bool,
}

/// Plans the function for some devices.
pub(super) fn plan(cx: &Context, devices: Range<usize>) -> Vec<(DevicePlan, Timeline)> {
    let mut fused = Fused::new(cx.spmd, if cx.apart { 0 } else { cx.backend.threads() });
    let moves = moves(cx);
    let in_pieces = in_pieces(&mut fused, &moves);
    let mut p = Planner {
        cx,
        fused: &fused,
        in_pieces,
        moments: vec![],
        root: (0..cx.spmd.values.len() as u32).map(|v| fused.root(ValueId(v))).collect(),
        nests: HashMap::new(),
        moves,
        sums: HashMap::new(),
        homes: vec![None; cx.spmd.values.len()],
        lives: vec![],
        last: vec![None; cx.spmd.values.len()],
        copies: vec![],
        kept: vec![],
    };
    p.alike();
    p.schedule((0..p.groups().len()).map(|group| Moment { group, phase: Phase::Whole }).collect());
    p.devices_plans(devices)
}

/// By what devices hold before and after a move: who sends what to whom.
pub(super) type AllMoves = HashMap<[usize; 2], Moves>;

/// The moves of a function.
fn moves(cx: &Context) -> AllMoves {
    let mut all = HashMap::new();
    for instr in cx.spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move)) {
        let [from, to] = held(cx.spmd, instr);
        all.entry([number(from), number(to)]).or_insert_with(|| Moves::new(cx.mesh, from, to));
    }
    all
}

/// What devices hold before and after a move.
pub(super) fn held<'a>(spmd: &'a SpmdProgram, instr: &Instr) -> [&'a [Region]; 2] {
    [instr.inputs[0], instr.output].map(|v| &*spmd.values[v.index()].regions)
}

/// A function as it is planned: all that devices have in common.
pub(super) struct Planner<'a> {
    pub cx: &'a Context<'a>,
    pub fused: &'a Fused<'a>,
    /// What is done at each step: groups in order, or collectives in several steps.
    pub moments: Vec<Moment>,
    /// By value: the stored value that it is.
    root: Vec<ValueId>,
    /// By the first instruction of loops: their nest.
    nests: HashMap<usize, Nest>,
    moves: AllMoves,
    /// Results of moves of which each box is an array of its own.
    pub(super) in_pieces: HashSet<ValueId>,
    /// By sum and group of devices: what they have in common to finish it.
    sums: HashMap<[usize; 2], Together>,
    homes: Vec<Option<Home>>,
    pub(super) lives: Vec<Life>,
    /// Last moment that reads a value.
    last: Vec<Option<usize>>,
    /// Assignments that need a copy at the end: value and variable.
    pub(super) copies: Vec<(ValueId, VarId)>,
    /// Results that are the old value of a variable which is set: they are copied out before that. Value and life.
    pub(super) kept: Vec<(ValueId, usize)>,
}

/// What tells a list from others that are there.
pub(super) fn number<T>(list: &[T]) -> usize {
    list.as_ptr() as usize
}

impl Planner<'_> {
    pub(super) fn groups(&self) -> &[Group] {
        &self.fused.groups
    }
    /// The step after the last moment, where copies to variables and fetches happen.
    pub(super) fn end(&self) -> usize {
        self.moments.len()
    }
    pub(super) fn devices(&self) -> usize {
        self.cx.variables.len()
    }

    /// The stored value that a value is.
    pub(super) fn root(&self, v: ValueId) -> ValueId {
        self.root[v.index()]
    }

    /// What devices have in common: loop nests and sums, each once.
    fn alike(&mut self) {
        let spmd = self.cx.spmd;
        for instr in &spmd.instrs {
            let SpmdOp::AllReduce { sum, groups, .. } = &instr.op else { continue };
            for group in groups.iter() {
                let together = || Together::new(sum, group);
                self.sums.entry([number(&sum.owned), number(group)]).or_insert_with(together);
            }
        }
        for group in &self.fused.groups {
            let members = match &group.kind {
                Kind::Band(members, _) => members,
                _ => std::slice::from_ref(group),
            };
            for member in members {
                self.nests.extend(self.fused.nest(member).map(|nest| (member.instrs[0], nest)));
            }
        }
    }

    /// Takes on an order: what lives where, and from when to when.
    pub(super) fn schedule(&mut self, moments: Vec<Moment>) {
        self.moments = moments;
        self.homes.fill(None);
        self.last.fill(None);
        (self.lives, self.copies, self.kept) = Default::default();
        self.uses();
        self.homes();
    }

    fn uses(&mut self) {
        let mut last = std::mem::take(&mut self.last);
        for (m, moment) in self.moments.iter().enumerate() {
            for v in self.looks_at(*moment) {
                last[v.index()] = Some(m);
            }
            for v in self.makes(*moment) {
                last[v.index()].get_or_insert(m);
            }
        }
        self.last = last;
        let end = self.end();
        for (_, v) in &self.cx.spmd.outputs {
            let v = self.root(*v);
            self.last[v.index()] = Some(end);
        }
    }

    /// Whether a group is a move, whose result is being written from the beginning to the end.
    fn is_move(&self, group: usize) -> bool {
        matches!(self.first(&self.groups()[group]).op, SpmdOp::Move)
    }

    /// The values that are read at a moment, or have to stay as they are for others to read.
    pub(super) fn looks_at(&self, Moment { group, phase }: Moment) -> &[ValueId] {
        match phase {
            Phase::Finish if !self.is_move(group) => &[],
            // The rim's step looks at the same.
            Phase::Interior => &[],
            Phase::Whole | Phase::Begin | Phase::Combine | Phase::Finish | Phase::Rim => &self.groups()[group].inputs,
        }
    }

    /// The values whose memory is written from a moment on.
    pub(super) fn opens(&self, Moment { group, phase }: Moment) -> &[ValueId] {
        match phase {
            Phase::Begin if !self.is_move(group) => &[],
            Phase::Whole | Phase::Begin | Phase::Combine | Phase::Interior => &self.groups()[group].outputs,
            Phase::Finish | Phase::Rim => &[],
        }
    }

    /// The values that are there from a moment on.
    pub(super) fn makes(&self, Moment { group, phase }: Moment) -> &[ValueId] {
        match phase {
            Phase::Combine if self.shares(group) => &[],
            Phase::Whole | Phase::Combine | Phase::Finish | Phase::Rim => &self.groups()[group].outputs,
            Phase::Begin | Phase::Interior => &[],
        }
    }

    /// Whether a moment has a group's scratch.
    pub(super) fn has_scratch(&self, Moment { group, phase }: Moment) -> bool {
        phase != Phase::Finish || self.is_move(group)
    }

    /// The steps of a group that is a collective and can go on while others are done, or a convolution of what that gives; None
    /// for all else.
    pub(super) fn phases(&self, group: usize) -> Option<&'static [Phase]> {
        let of = &self.groups()[group];
        match (&of.kind, &self.first(of).op) {
            (Kind::Instr, SpmdOp::Move) if self.moves(self.first(of)).sends() => Some(&[Phase::Begin, Phase::Finish]),
            (Kind::Instr, SpmdOp::AllReduce { .. }) if self.shares(group) => {
                Some(&[Phase::Begin, Phase::Combine, Phase::Finish])
            }
            (Kind::Instr, SpmdOp::AllReduce { .. }) => Some(&[Phase::Begin, Phase::Combine]),
            _ => self.has_interior(of).then_some(&[Phase::Interior, Phase::Rim]),
        }
    }

    /// Whether devices send each other what they have combined of a sum.
    fn shares(&self, group: usize) -> bool {
        let instr = self.first(&self.groups()[group]);
        let [held, done] = [instr.inputs[0], instr.output].map(|v| &self.cx.spmd.values[v.index()].regions);
        let shared = |(held, done): (&Region, &Region)| held == done && held.elements() >= SEGMENTED;
        matches!(instr.op, SpmdOp::AllReduce { .. }) && held.iter().zip(&**done).any(shared)
    }

    /// The buffer of the function's own that a value lies in.
    pub(super) fn life(&self, v: ValueId) -> Option<usize> {
        match self.homes[self.root(v).index()] {
            Some(Home::Own(life)) => Some(life),
            Some(Home::Variable(_)) | None => None,
        }
    }

    /// The variable that a value lies in.
    pub(super) fn variable(&self, v: ValueId) -> Option<VarId> {
        match self.homes[self.root(v).index()] {
            Some(Home::Variable(var)) => Some(var),
            Some(Home::Own(_)) | None => None,
        }
    }

    fn homes(&mut self) {
        let spmd = self.cx.spmd;
        let reads: HashMap<VarId, ValueId> = spmd.reads.iter().copied().collect();
        for (var, v) in &spmd.reads {
            self.homes[v.index()] = Some(Home::Variable(*var));
        }
        // What was fed stays for the steps to come.
        for (_, v) in &spmd.inputs {
            self.last[v.index()] = Some(self.end());
            self.own(*v, 0);
        }
        let mut made: HashMap<ValueId, usize> = HashMap::new();
        for (m, moment) in self.moments.iter().enumerate() {
            self.opens(*moment).iter().for_each(|v| {
                made.insert(*v, m);
            });
        }
        // Results that go to a variable are computed in its buffer, where nobody reads the old value any more.
        let end = self.end();
        let assigns: Vec<(VarId, ValueId)> = spmd.assigns.iter().map(|(var, v)| (*var, self.root(*v))).collect();
        for &(_, v) in &assigns {
            if self.homes[v.index()].is_some() {
                self.last[v.index()] = Some(end);
            }
        }
        for (var, v) in assigns {
            let old = reads.get(&var).copied();
            let direct = made.get(&v).is_some_and(|&m| {
                self.homes[v.index()].is_none()
                    && old.is_none_or(|old| match self.last[old.index()] {
                        Some(l) if self.is_of(l, m) => self.reads_in_place(self.moments[m].group, old, v),
                        Some(l) => l < m,
                        None => true,
                    })
            });
            if direct {
                self.homes[v.index()] = Some(Home::Variable(var));
            } else {
                self.last[v.index()] = Some(end);
                self.copies.push((v, var));
            }
        }
        for (var, v) in &spmd.reads {
            let set = self.copies.iter().any(|(_, set)| set == var);
            if set && spmd.outputs.iter().any(|(_, out)| self.root(*out) == *v) {
                let bytes = (0..self.devices()).map(|d| spmd.values[v.index()].bytes(d)).collect();
                self.kept.push((*v, self.lives.len()));
                self.lives.push(Life { bytes, from: end, to: end, value: *v, before: vec![] });
            }
        }
        for (m, moment) in self.moments.clone().into_iter().enumerate() {
            let group = &self.fused.groups[moment.group];
            for v in self.opens(moment).to_vec() {
                if self.homes[v.index()].is_some() {
                    continue;
                }
                let reused = group.inputs.iter().find_map(|i| match self.homes[i.index()] {
                    Some(Home::Own(life)) if self.is_of(self.lives[life].to, m) => {
                        self.reads_in_place(moment.group, *i, v).then_some(life)
                    }
                    _ => None,
                });
                match reused {
                    Some(life) => {
                        let reused = &mut self.lives[life];
                        reused.to = self.last[v.index()].expect("it is made");
                        reused.before.push((m, reused.value));
                        reused.value = v;
                        self.homes[v.index()] = Some(Home::Own(life));
                    }
                    None => self.own(v, m),
                }
            }
        }
    }

    /// Whether a moment is that one, or one of the same group.
    fn is_of(&self, other: usize, moment: usize) -> bool {
        let group = |m: usize| self.moments.get(m).map(|moment| moment.group);
        group(other).is_some() && group(other) == group(moment)
    }

    fn own(&mut self, v: ValueId, from: usize) {
        let bytes = (0..self.devices()).map(|d| self.bytes(v, d)).collect();
        let to = self.last[v.index()].unwrap_or(from);
        self.homes[v.index()] = Some(Home::Own(self.lives.len()));
        self.lives.push(Life { bytes, from, to, value: v, before: vec![] });
    }

    /// Whether a group is a loop that reads `old` only at the very points that it writes of `new`, on every device, so
    /// that both may lie in one buffer.
    fn reads_in_place(&self, g: usize, old: ValueId, new: ValueId) -> bool {
        let group = &self.fused.groups[g];
        let values = &self.cx.spmd.values;
        let (a, b) = (&values[old.index()], &values[new.index()]);
        // What a loop stores may, not what it reduces.
        let reduced = || !self.fused.stored_of(group).contains(&new);
        let by_op = match group.kind {
            Kind::Map | Kind::Reduce => reduced(),
            Kind::Epilogue => reduced() || self.product_reads(group).iter().any(|v| self.root(*v) == old),
            // Element by element, of all nodes.
            Kind::Instr if matches!(self.first(group).op, SpmdOp::Join { .. }) => {
                return (0..self.devices()).all(|d| a.bytes(d) == b.bytes(d));
            }
            Kind::Instr | Kind::Band(..) => true,
        };
        if by_op || a.ty.dtype.bytes() != b.ty.dtype.bytes() {
            return false;
        }
        let nest = &self.nests[&group.instrs[0]];
        let own: Vec<usize> = (0..nest.loaded.len()).filter(|o| nest.loaded[*o] == old).collect();
        let in_place = |d: usize| {
            let at = &b.regions[d];
            own.iter().all(|o| nest.access(*o, self.view(d), at).is_whole(&at.shape()))
        };
        (0..self.devices()).all(|d| a.bytes(d) == b.bytes(d) && (b.bytes(d) == 0 || in_place(d)))
    }

    /// A group's first instruction: if it has an epilogue, the product.
    pub(super) fn first(&self, group: &Group) -> &Instr {
        &self.cx.spmd.instrs[group.instrs[0]]
    }

    /// All that a device holds.
    pub(super) fn view(&self, device: usize) -> View<'_> {
        View { fused: self.fused, device, slice: None }
    }

    /// The loop of a map or an epilogue.
    fn map(&self, group: &Group, view: View) -> Loop {
        self.nests[&group.instrs[0]].on(view, &view.region(group.outputs[0]))
    }

    /// Where a value lies on a device, whose buffers of the function's own are `placed`.
    pub(super) fn buffer(&self, v: ValueId, device: usize, placed: &[Buffer]) -> Buffer {
        match self.homes[self.root(v).index()].expect("it is stored") {
            Home::Variable(var) => self.cx.variables[device][var.index()].1,
            Home::Own(life) => placed[life],
        }
    }

    pub(super) fn part(&self, v: ValueId, view: View) -> Part {
        Part { ty: self.cx.spmd.values[v.index()].ty.clone(), region: view.region(v).into_owned() }
    }

    /// Whether a device has nothing to do with a group: it is another stage's.
    pub(super) fn is_idle(&self, group: &Group, device: usize) -> bool {
        let there = |v: &ValueId| !self.cx.spmd.values[v.index()].regions[device].is_empty();
        match &self.first(group).op {
            SpmdOp::Move => self.moves(self.first(group)).is_idle(device),
            SpmdOp::AllReduce { .. } => !group.outputs.iter().chain(&group.inputs).any(there),
            SpmdOp::Compute { .. } | SpmdOp::Join { .. } => !group.outputs.iter().any(there),
        }
    }

    pub(super) fn moves(&self, instr: &Instr) -> &Moves {
        &self.moves[&held(self.cx.spmd, instr).map(number)]
    }

    /// What an op that is no loop reads, in its order; and the device's own part of an input that is in pieces.
    fn product_reads(&self, group: &Group) -> Vec<ValueId> {
        let inputs = &self.first(group).inputs;
        inputs.iter().copied().chain(self.own_piece(inputs)).collect()
    }

    /// The values that a group's work reads, in its order.
    pub(super) fn reads(&self, group: &Group) -> Vec<ValueId> {
        let instr = self.first(group);
        match (&group.kind, &instr.op) {
            (Kind::Map | Kind::Reduce, _) => self.nests[&group.instrs[0]].loaded.clone(),
            (Kind::Epilogue, _) => {
                let loaded = self.nests[&group.instrs[0]].loaded.iter().copied().filter(|v| *v != instr.output);
                self.product_reads(group).into_iter().chain(loaded).collect()
            }
            (Kind::Instr, SpmdOp::Compute { .. } | SpmdOp::Join { .. }) => self.product_reads(group),
            (Kind::Instr, SpmdOp::Move | SpmdOp::AllReduce { .. }) | (Kind::Band(..), _) => group.inputs.clone(),
        }
    }

    /// What a group's work is called.
    pub(super) fn name(&self, group: &Group) -> &'static str {
        let instr = self.first(group);
        match (&group.kind, &instr.op) {
            (Kind::Map, _) => "map",
            (Kind::Band(..), _) => "band",
            (_, SpmdOp::Compute { prim, .. }) => prim.op().name(),
            (_, SpmdOp::Join { .. }) => "join",
            (_, SpmdOp::Move) => self.moves(instr).kind.name(),
            (_, SpmdOp::AllReduce { .. }) => {
                let [held, done] = [instr.inputs[0], instr.output].map(|v| &self.cx.spmd.values[v.index()].regions);
                if held == done { "all-reduce" } else { "reduce-scatter" }
            }
        }
    }

    /// The work of a group on a device or a slice, and its scratch; None if there is nothing to do.
    pub(super) fn work(&self, group: &Group, view: View) -> Option<(Work, usize)> {
        let (spmd, device) = (self.cx.spmd, view.device);
        let instr = self.first(group);
        let out = &spmd.values[instr.output.index()];
        if self.is_idle(group, device) {
            return None;
        }
        let work = match (&group.kind, &instr.op) {
            (Kind::Map, _) => Work::Map(self.map(group, view)),
            (Kind::Band(members, cuts), _) => self.band(group, members, cuts, device),
            (_, SpmdOp::Move) => {
                let moves = self.moves(instr);
                let apart = self.in_pieces.contains(&instr.output);
                let (work, scratch) = moves.on(&spmd.values[instr.inputs[0].index()], &out.regions, device, apart);
                return Some((Work::Exchange(Arc::new(work)), scratch));
            }
            (_, SpmdOp::AllReduce { f, sum, groups }) => {
                let held = &spmd.values[instr.inputs[0].index()].regions;
                let together = &self.sums[&[number(&sum.owned), number(&groups[device])]];
                let work = all_reduce(*f, out.ty.dtype, together, held, &out.regions, device);
                let scratch = work.scratch_bytes();
                return Some((Work::AllReduce(Arc::new(work)), scratch));
            }
            (_, SpmdOp::Join { f, order }) => Work::Join(Join {
                f: *f,
                dtype: out.ty.dtype,
                elements: out.regions[device].elements(),
                order: order[device].clone(),
                places: out.nodes[device],
            }),
            (Kind::Reduce, _) => Work::Reduce(Box::new(self.reduction(group, view)?)),
            (_, SpmdOp::Compute { prim, sum }) => {
                let inputs: Vec<Part> = instr.inputs.iter().map(|v| self.part(*v, view)).collect();
                let output = self.part(instr.output, view);
                match copies(prim, &inputs, &output) {
                    Some(copy) => Work::Copy(copy),
                    None => {
                        let sum = sum.as_ref().map(|s| (s.tree.clone(), s.owned[device].clone()));
                        let sums = || self.reduction(group, view).map(|r| Epilogue::Reduce(Box::new(r)));
                        let map = || Epilogue::Map(self.map(group, view));
                        let epilogue = (group.kind == Kind::Epilogue).then(|| sums().unwrap_or_else(map));
                        Work::Op(Box::new(OpWork {
                            op: prim.clone(),
                            inputs,
                            output,
                            sum,
                            epilogue,
                            share: Share::Whole,
                            pieces: self.pieces(instr, device),
                        }))
                    }
                }
            }
        };
        let scratch = self.cx.backend.scratch_bytes(&work);
        Some((work, scratch))
    }

    /// The reduction of a group that reduces.
    fn reduction(&self, group: &Group, view: View) -> Option<Reduction> {
        let instr = &self.cx.spmd.instrs[*self.fused.sums_of(group).0.first()?];
        let SpmdOp::Compute { prim: Prim::Reduce(r), sum } = &instr.op else { return None };
        let x = self.fused.ty(instr.inputs[0]);
        let at = self.fused.points_of(instr, view.region(instr.output).into_owned(), view.device);
        Some(Reduction {
            nest: self.nests[&group.instrs[0]].on(view, &at),
            stored: self.fused.stored_of(group).len(),
            reduced: x.dims.iter().map(|d| r.over.contains(&d.name)).collect(),
            f: r.f,
            tree: sum.as_ref().map(|s| s.tree.clone()).unwrap_or_default(),
            owned: sum.as_ref().map(|s| s.owned[view.device].clone()).unwrap_or_default(),
        })
    }
}
