//! Fusion: which values are stored, and which are computed on the way inside the loops that use them.
//!
//! An elementwise value is inlined into its users unless something needs it in memory (a kernel, a collective, a fetch),
//! it would be broadcast there (and so computed again for every repetition), or computing it several times costs
//! more than storing it. Chains end in maps or in reductions; reductions over the same loops share one pass, and so does a map
//! with the reductions of what it stores. A map of what a product gives is the product's epilogue, and so are, behind a
//! convolution, reductions over planes and maybe more.
//! None of this changes a bit: an element's arithmetic is the same wherever it is done.

mod share;

use super::band;
use super::body::Nest;
use crate::dim::{DType, Name, Type};
use crate::ops::Prim;
use crate::ops::source::Distribution;
use crate::ops::unary::UnaryFn;
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, ValueId};
use std::collections::{HashMap, HashSet};

/// A step to be: what it is made of, before offsets.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// A loop that stores these values.
    Map,
    /// A loop whose body is reduced to these values. Behind the reductions there may be maps, whose values it stores: they are
    /// its first outputs.
    Reduce,
    /// One instruction of the SPMD program.
    Instr,
    /// One instruction, the first one, and a loop as one of these that takes its result.
    Epilogue,
    /// Steps that are done slice by slice along some dimensions.
    Band(Vec<Group>, Vec<Cut>),
}

/// A dimension that a band is cut along.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// Its name.
    pub name: Name,
    /// Indices that a slice has at least, where there are as many.
    pub least: usize,
}

/// A step to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// What it is.
    pub kind: Kind,
    /// Its instructions in the SPMD program.
    pub instrs: Vec<usize>,
    /// Values it reads from memory.
    pub inputs: Vec<ValueId>,
    /// Values it writes to memory.
    pub outputs: Vec<ValueId>,
}

/// A fused program.
pub struct Fused<'a> {
    /// What it is made of.
    pub spmd: &'a SpmdProgram,
    /// Steps in order.
    pub groups: Vec<Group>,
    /// Which values lie in memory.
    pub stored: HashSet<ValueId>,
    /// Values that are another value under another name.
    pub alias: HashMap<ValueId, ValueId>,
    /// The instruction that computes each value; None for feeds and variables.
    pub producer: Vec<Option<usize>>,
}

/// A chain gets no longer than this, so that a loop's registers stay in the first-level cache.
const LONGEST: usize = 40;
/// Computing a value in one more place may cost this many simple operations an element, before storing it is better.
const AGAIN: usize = 24;

impl<'a> Fused<'a> {
    /// Decides what is stored and groups the rest around it; for a backend with so many threads, 0 for no bands.
    pub fn new(spmd: &'a SpmdProgram, threads: usize) -> Fused<'a> {
        let mut producer = vec![None; spmd.values.len()];
        spmd.instrs.iter().enumerate().for_each(|(i, instr)| producer[instr.output.index()] = Some(i));
        let mut fused = Fused { spmd, groups: vec![], stored: HashSet::new(), alias: HashMap::new(), producer };
        fused.decide();
        fused.group();
        fused.merge();
        band::gather(&mut fused, threads);
        let results = spmd.outputs.iter().map(|(_, v)| v).chain(spmd.assigns.iter().map(|(_, v)| v));
        let results: HashSet<ValueId> = results.map(|v| fused.root(*v)).collect();
        let mut groups = std::mem::take(&mut fused.groups);
        for group in &mut groups {
            if let Kind::Band(members, _) = &mut group.kind {
                *members = fused.epilogues(std::mem::take(members), &group.outputs.iter().copied().collect());
            }
        }
        let groups = fused.epilogues(groups, &results);
        let groups = fused.sums_in_epilogues(groups, &results);
        fused.groups = fused.sums_with_maps(groups, &results);
        fused
    }

    /// The instructions that a group's loop computes: those that reduce, and maps whose values it stores.
    pub fn sums_of<'g>(&self, group: &'g Group) -> (&'g [usize], &'g [usize]) {
        let of_loop = &group.instrs[usize::from(group.kind == Kind::Epilogue)..];
        let reduces = |i: &usize| matches!(self.spmd.instrs[*i].op, SpmdOp::Compute { prim: Prim::Reduce(_), .. });
        of_loop.split_at(of_loop.iter().take_while(|i| reduces(i)).count())
    }

    /// The values that a group stores as they are and does not reduce.
    pub fn stored_of<'g>(&self, group: &'g Group) -> &'g [ValueId] {
        &group.outputs[..group.outputs.len() - self.sums_of(group).0.len()]
    }

    /// The loop nest of a group that has one: what it stores, then what it reduces. That of an epilogue has the product's
    /// result behind what it reads beside it.
    pub(super) fn nest(&self, group: &Group) -> Option<Nest> {
        let (sums, maps) = match group.kind {
            Kind::Map | Kind::Reduce | Kind::Epilogue => self.sums_of(group),
            Kind::Instr | Kind::Band(..) => return None,
        };
        let [made, summed] = [
            maps.iter().map(|i| self.spmd.instrs[*i].output).collect::<Vec<_>>(),
            sums.iter().map(|i| self.spmd.instrs[*i].inputs[0]).collect(),
        ];
        let roots = [self.stored_of(group), &summed].concat();
        let nest = Nest::new(self, &roots, &made);
        if group.kind != Kind::Epilogue {
            return Some(nest);
        }
        let product = self.spmd.instrs[group.instrs[0]].output;
        let result = nest.loaded.iter().position(|v| *v == product).expect("it takes the result");
        Some(nest.with_last(result))
    }

    /// The points that a device's reduction goes over, of which it gives the region `at`.
    pub fn points_of(&self, reduction: &Instr, at: Region, device: usize) -> Region {
        let [x, y] = [reduction.inputs[0], reduction.output].map(|v| self.ty(v));
        let reduced = x.dims.iter().filter(|d| !y.has(&d.name));
        let owned = match &reduction.op {
            SpmdOp::Compute { sum: Some(sum), .. } => sum.tree.elements(&sum.owned[device]),
            _ => Vec::new(),
        };
        reduced.zip(owned).fold(at, |at, (d, range)| at.with(&d.name, range)).of(x)
    }

    /// The stored value that a value is, following aliases.
    pub fn root(&self, mut v: ValueId) -> ValueId {
        while let Some(&a) = self.alias.get(&v) {
            v = a;
        }
        v
    }

    /// The elementwise op that computes a value, if one does.
    pub fn elementwise(&self, v: ValueId) -> Option<&Prim> {
        match &self.spmd.instrs[self.producer[v.index()]?].op {
            SpmdOp::Compute { prim, .. } if prim.op().elementwise() || matches!(prim, Prim::Rename(_)) => Some(prim),
            _ => None,
        }
    }

    pub(super) fn ty(&self, v: ValueId) -> &Type {
        &self.spmd.values[v.index()].ty
    }

    fn decide(&mut self) {
        let spmd = self.spmd;
        let uses = self.uses();
        let narrowed = self.narrowed(&uses);
        // Where chains are cut for their length: behind what is rounded next, and before what is made wide again, since
        // there it takes half of the memory.
        for instr in &spmd.instrs {
            let Some(prim) = self.elementwise(instr.output).filter(|_| !narrowed.contains(&instr.output)) else {
                continue;
            };
            let widens = matches!(prim, Prim::Cast(_)) && self.ty(instr.inputs[0]).dtype.is_half();
            if self.chain(instr.output) > LONGEST {
                self.stored.insert(if widens { instr.inputs[0] } else { instr.output });
            }
        }
        let sums: Vec<ValueId> = spmd.sums.iter().copied().filter(|v| self.elementwise(*v).is_some()).collect();
        self.stored.extend(sums);
        let ends = self.end_in_updates();
        let narrows = |i: &Instr| Some((i.output, self.narrows(i.output, &uses)?));
        let rounded = spmd.instrs.iter().filter_map(narrows).filter(|(v, product)| *product || !ends[v.index()]);
        let rounded: HashMap<ValueId, bool> = rounded.collect();
        // From the end: how a value is used decides whether it is stored.
        let mut uses = vec![Uses::default(); spmd.values.len()];
        spmd.outputs.iter().for_each(|(_, v)| uses[v.index()].hard = true);
        spmd.assigns.iter().for_each(|(_, v)| uses[v.index()].hard = true);
        for instr in spmd.instrs.iter().rev() {
            let (out, u) = (instr.output, uses[instr.output.index()].clone());
            let Some(prim) = self.elementwise(out).cloned() else {
                if self.lies_there(instr) {
                    self.alias.insert(out, instr.inputs[0]);
                    uses[instr.inputs[0].index()].hard = true;
                    continue;
                }
                self.stored.insert(out);
                let reduce = matches!(&instr.op, SpmdOp::Compute { prim: Prim::Reduce(_), .. });
                for &i in &instr.inputs {
                    if reduce {
                        uses[i.index()].soft(1, self.ty(i).elements());
                    } else {
                        uses[i.index()].hard = true;
                    }
                }
                continue;
            };
            if u.hard && matches!(prim, Prim::Rename(_)) && self.same_part(instr.inputs[0], out) {
                self.alias.insert(out, instr.inputs[0]);
                uses[instr.inputs[0].index()].hard = true;
                continue;
            }
            let elements = self.ty(out).elements();
            let store = self.stored.contains(&out)
                || u.hard
                || rounded.get(&out).is_some_and(|product| *product || u.count > 1)
                || !is_free(&prim) && (u.points > elements || u.count.saturating_sub(1) * cost(&prim) > AGAIN);
            if store {
                self.stored.insert(out);
            }
            for &i in &instr.inputs {
                let (count, points) = if store { (1, elements) } else { (u.count, u.points.max(elements)) };
                uses[i.index()].soft(count, points);
            }
        }
        spmd.inputs.iter().for_each(|(_, v)| {
            self.stored.insert(*v);
        });
        spmd.reads.iter().for_each(|(_, v)| {
            self.stored.insert(*v);
        });
    }

    /// How many instructions compute a value from what is stored, as far as more than [`LONGEST`].
    fn chain(&self, v: ValueId) -> usize {
        let (mut open, mut seen, mut length) = (vec![v], vec![], 0);
        while let Some(v) = open.pop() {
            if length > LONGEST || seen.contains(&v) || self.stored.contains(&v) {
                continue;
            }
            let Some(prim) = self.elementwise(v) else { continue };
            seen.push(v);
            // What is rounded takes another instruction for that.
            let own = if self.ty(v).dtype.is_half() { 2 } else { 1 };
            length += if is_free(prim) { 0 } else { own };
            open.extend(self.producer[v.index()].iter().flat_map(|i| &self.spmd.instrs[*i].inputs));
        }
        length
    }

    /// By value: how often it is read, or is a result.
    fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.spmd.values.len()];
        let results = self.spmd.outputs.iter().map(|(_, v)| v).chain(self.spmd.assigns.iter().map(|(_, v)| v));
        self.spmd.instrs.iter().flat_map(|i| &i.inputs).chain(results).for_each(|v| uses[v.index()] += 1);
        uses
    }

    /// By value: whether nothing but new values of variables, and scalars, are made of it, element by element. It is read for
    /// those at once and then no more.
    fn end_in_updates(&self) -> Vec<bool> {
        let mut ends = vec![true; self.spmd.values.len()];
        self.spmd.outputs.iter().for_each(|(_, v)| ends[v.index()] = false);
        for instr in self.spmd.instrs.iter().rev() {
            let goes_on = match &instr.op {
                SpmdOp::Compute { prim: Prim::Reduce(_), .. } => self.ty(instr.output).elements() == 1,
                SpmdOp::Compute { .. } => ends[instr.output.index()] && self.elementwise(instr.output).is_some(),
                SpmdOp::Move | SpmdOp::AllReduce { .. } | SpmdOp::Join { .. } => ends[instr.output.index()],
            };
            instr.inputs.iter().for_each(|v| ends[v.index()] &= goes_on);
        }
        ends
    }

    /// Values that are used once, to be rounded.
    fn narrowed(&self, uses: &[usize]) -> HashSet<ValueId> {
        let rounds = |v: ValueId| matches!(self.elementwise(v), Some(Prim::Cast(_))) && self.ty(v).dtype.is_half();
        let rounded = self.spmd.instrs.iter().filter(|i| rounds(i.output)).flat_map(|i| &i.inputs);
        rounded.filter(|v| uses[v.index()] == 1 && self.ty(**v).dtype == DType::F32).copied().collect()
    }

    /// Whether two values are the same bytes on every device.
    fn same_part(&self, a: ValueId, b: ValueId) -> bool {
        let (a, b) = (&self.spmd.values[a.index()], &self.spmd.values[b.index()]);
        a.nodes == b.nodes && a.regions.iter().zip(&*b.regions).all(|(r, s)| r.same_ranges(s))
    }

    /// Whether an instruction splits or merges dimensions whose bytes stay the same on every device.
    fn lies_there(&self, instr: &Instr) -> bool {
        let Some(input) = instr.inputs.first().map(|v| &self.spmd.values[v.index()]) else { return false };
        let mut regions = input.regions.iter().zip(&*self.spmd.values[instr.output.index()].regions);
        match &instr.op {
            SpmdOp::Compute { prim: Prim::SplitDim(s), .. } => regions.all(|(x, y)| s.same_bytes(x, y)),
            SpmdOp::Compute { prim: Prim::MergeDims(m), .. } => regions.all(|(x, y)| m.same_bytes(&input.ty, x, y)),
            _ => false,
        }
    }

    fn group(&mut self) {
        for (i, instr) in self.spmd.instrs.iter().enumerate() {
            if !self.stored.contains(&instr.output) {
                continue;
            }
            let kind = match &instr.op {
                _ if self.elementwise(instr.output).is_some() => Kind::Map,
                SpmdOp::Compute { prim: Prim::Reduce(_), .. } => Kind::Reduce,
                _ => Kind::Instr,
            };
            let mut group = Group { kind, instrs: vec![i], inputs: vec![], outputs: vec![instr.output] };
            group.inputs = self.loads(&group.instrs);
            self.groups.push(group);
        }
    }

    /// The stored values that instructions read.
    pub(super) fn loads(&self, instrs: &[usize]) -> Vec<ValueId> {
        let made: Vec<ValueId> = instrs.iter().map(|i| self.spmd.instrs[*i].output).collect();
        let mut found = Vec::new();
        for &i in instrs {
            for &v in &self.spmd.instrs[i].inputs {
                self.collect_loads(v, &made, &mut found);
            }
        }
        found
    }

    fn collect_loads(&self, v: ValueId, inside: &[ValueId], found: &mut Vec<ValueId>) {
        let root = self.root(v);
        if inside.contains(&root) {
            return;
        }
        if self.stored.contains(&root) {
            if !found.contains(&root) {
                found.push(root);
            }
            return;
        }
        if let Some(i) = self.producer[v.index()] {
            self.spmd.instrs[i].inputs.iter().for_each(|&v| self.collect_loads(v, inside, found));
        }
    }

    /// Whether a product's result is complete on every device, so that an epilogue may take it.
    fn is_whole_product(&self, v: ValueId) -> bool {
        let Some(i) = self.producer[v.index()] else { return false };
        let value = &self.spmd.values[v.index()];
        matches!(&self.spmd.instrs[i].op, SpmdOp::Compute { prim, .. } if takes_epilogue(prim))
            && value.ty.dtype == DType::F32
            && value.nodes.iter().all(|n| *n == 1)
    }

    /// Whether a value is one in fewer bits of what a product gives on a device alone (true), which its epilogue stores in place
    /// of the product, or of what devices have summed up together (false): as it is, or after something that nobody else needs,
    /// such as the addition of a bias.
    fn narrows(&self, v: ValueId, uses: &[usize]) -> Option<bool> {
        if !matches!(self.elementwise(v), Some(Prim::Cast(_))) || !self.ty(v).dtype.is_half() {
            return None;
        }
        let elements = self.ty(v).elements();
        let operand = |v: ValueId| {
            let inputs = &self.spmd.instrs[self.producer[v.index()]?].inputs;
            let mut whole = inputs.iter().filter(|u| self.ty(**u).elements() == elements);
            whole.next().copied().filter(|u| whole.next().is_none() && self.ty(*u).dtype == DType::F32)
        };
        let mut at = operand(v);
        while let Some(u) = at {
            if self.is_whole_product(u) {
                return Some(true);
            }
            let instr = self.producer[u.index()].map(|i| &self.spmd.instrs[i].op);
            if matches!(instr, Some(SpmdOp::AllReduce { .. })) {
                return (uses[u.index()] == 1).then_some(false);
            }
            let inside = uses[u.index()] == 1 && self.elementwise(u).is_some() && !self.stored.contains(&u);
            at = if inside { operand(u) } else { None };
        }
        None
    }
}

/// Whether an op's kernel takes an epilogue.
fn takes_epilogue(prim: &Prim) -> bool {
    match prim {
        Prim::Contract(_) => true,
        Prim::Conv(c) => c.groups <= 1,
        Prim::ConvTranspose(t) => t.conv.groups <= 1,
        _ => false,
    }
}

/// How a value is used.
#[derive(Clone, Debug, Default)]
struct Uses {
    /// Something needs it in memory.
    hard: bool,
    /// In how many loops.
    count: usize,
    /// Points of the largest of them.
    points: usize,
}

impl Uses {
    fn soft(&mut self, count: usize, points: usize) {
        self.count += count;
        self.points = self.points.max(points);
    }
}

/// Ops that cost nothing inside a loop.
fn is_free(prim: &Prim) -> bool {
    match prim {
        Prim::Constant(_) | Prim::Broadcast(_) | Prim::Rename(_) | Prim::Step(_) | Prim::Iota(_) => true,
        Prim::Unary(u) => u.f == UnaryFn::Identity,
        _ => false,
    }
}

/// What an op costs an element, in simple operations.
fn cost(prim: &Prim) -> usize {
    match prim {
        Prim::Unary(u) => match u.f {
            UnaryFn::Exp
            | UnaryFn::Log
            | UnaryFn::Tanh
            | UnaryFn::Sigmoid
            | UnaryFn::Erf
            | UnaryFn::Sin
            | UnaryFn::Cos => 10,
            UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip => 4,
            _ => 1,
        },
        Prim::Binary(b) => match b.f {
            crate::ops::binary::BinaryFn::Pow => 20,
            crate::ops::binary::BinaryFn::Div | crate::ops::binary::BinaryFn::Rem => 4,
            _ => 1,
        },
        Prim::Random(r) => match r.distribution {
            Distribution::Uniform | Distribution::Bernoulli(_) => 6,
            Distribution::Normal | Distribution::TruncatedNormal => 30,
        },
        _ => 1,
    }
}
