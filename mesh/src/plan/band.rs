//! Bands: steps whose large intermediate values nobody else needs, done slice by slice, so that these never are whole.
//!
//! A product that spreads ([`Contract::spreads`]), such as attention's scores, begins a band; what reads and makes values
//! of its dimensions belongs to it, and maps that only take what it gives. Dimensions that all of the steps keep are cut:
//! a thread takes a slice, does all steps on it in memory of its own, and copies the results to where they belong. No sum
//! is cut, and an element's arithmetic does not depend on the region that it is computed with, so no bit changes.

use super::exchange::box_copy;
use super::function::Planner;
use super::fuse::{Cut, Fused, Group, Kind};
use super::memory::{self, Tenant};
use super::step::{At, Band, CopyWork, IDLE, SliceStep, Slices, Work};
use crate::body::Loop;
use crate::dim::Name;
use crate::ops::Prim;
use crate::ops::contract::Contract;
use crate::region::Region;
use crate::spmd::{SpmdOp, ValueId};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::ops::Range;

/// Bytes of a slice's values that stay in a core's second-level cache.
const CACHE: usize = 512 << 10;
/// Rows of a slice at least, where a product has more: what it packs of its other factor is to pay.
const ROWS: usize = 128;
/// Slices for each thread at least, so that threads end at about the same time.
const SHARE: usize = 4;
/// Loops that a step of a band may have at most.
const LOOPS: usize = 16;

/// A part of what a device computes in a band.
pub(super) struct Slice {
    /// The values that the band computes.
    inside: HashSet<ValueId>,
    /// The dimensions that are cut, and what is there of them.
    ranges: Vec<(Name, Range<usize>)>,
}

/// What there is of values: a device's regions, or of what a band computes a slice.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub fused: &'a Fused<'a>,
    pub device: usize,
    pub slice: Option<&'a Slice>,
}

impl View<'_> {
    /// What there is of a value.
    pub fn region(&self, v: ValueId) -> Cow<'_, Region> {
        let all = &self.fused.spmd.values[v.index()].regions[self.device];
        let Some(slice) = self.slice.filter(|s| s.inside.contains(&v)) else { return Cow::Borrowed(all) };
        let mut region = all.clone();
        for (name, range) in &mut region.0 {
            if let Some((_, r)) = slice.ranges.iter().find(|(n, _)| n == name) {
                *range = r.clone();
            }
        }
        Cow::Owned(region)
    }
}

/// Makes bands of a program's steps where every device has a slice for each of its `threads` (0 for none at all). Steps are
/// in the same order whatever the threads, so that hosts with more of them can go along.
pub(super) fn gather(fused: &mut Fused, threads: usize) {
    let seeds: Vec<ValueId> = fused.groups.iter().filter_map(|g| seed(fused, g)).collect();
    let mut search = Search::new(fused);
    let mut bands: Vec<(Vec<usize>, Group)> = vec![];
    for seed in seeds {
        let Some((members, cuts)) = search.band(seed).filter(|(members, _)| search.is_closed(members)) else {
            continue;
        };
        let band = search.joined(&members, cuts);
        if !band.outputs.is_empty() {
            members.iter().for_each(|g| search.node[*g] = Some(members[0]));
            bands.push((members, band));
        }
    }
    let order = loop {
        if let Some(order) = search.order() {
            break order;
        }
        // Bands that wait for each other: the last one is none.
        let (members, _) = bands.pop().expect("steps without bands are in order");
        members.iter().for_each(|g| search.node[*g] = None);
    };
    let mut bands: HashMap<usize, Group> = bands.into_iter().map(|(members, band)| (members[0], band)).collect();
    let mut groups: Vec<Option<Group>> = std::mem::take(&mut fused.groups).into_iter().map(Some).collect();
    for group in order.into_iter().filter_map(|g| bands.remove(&g).or_else(|| groups[g].take())) {
        match group.kind {
            Kind::Band(members, cuts) if threads == 0 || most_slices(fused, &group.outputs, &cuts) < threads => {
                fused.groups.extend(members);
            }
            _ => fused.groups.push(group),
        }
    }
}

/// The slices that there may be at the most, on the device with the fewest.
fn most_slices(fused: &Fused, outputs: &[ValueId], cuts: &[Cut]) -> usize {
    let regions = fused.spmd.values[outputs[0].index()].regions.iter().filter(|r| !r.is_empty());
    let blocks = |r: &Region| cuts.iter().filter_map(|c| Some(r.get(&c.name)?.len().div_ceil(c.least))).product();
    regions.map(blocks).min().unwrap_or(0)
}

/// The product that a step makes, if it spreads.
fn seed(fused: &Fused, group: &Group) -> Option<ValueId> {
    let c = contract(fused, group)?;
    let instr = &fused.spmd.instrs[group.instrs[0]];
    let [a, b] = [0, 1].map(|i| fused.ty(instr.inputs[i]));
    c.spreads(a, b, fused.ty(instr.output)).then_some(instr.output)
}

/// The contraction of a step that is one.
fn contract<'a>(fused: &'a Fused, group: &Group) -> Option<&'a Contract> {
    match (&group.kind, &fused.spmd.instrs[group.instrs[0]].op) {
        (Kind::Instr, SpmdOp::Compute { prim: Prim::Contract(c), .. }) => Some(c),
        _ => None,
    }
}

/// The steps as a graph, in which bands are looked for.
struct Search<'a> {
    fused: &'a Fused<'a>,
    /// The step that makes each value, and those that read it.
    made: HashMap<ValueId, usize>,
    readers: HashMap<ValueId, Vec<usize>>,
    /// Values that are needed after all steps.
    results: HashSet<ValueId>,
    /// By step: the first step of the band that it belongs to.
    node: Vec<Option<usize>>,
}

impl<'a> Search<'a> {
    fn new(fused: &'a Fused<'a>) -> Search<'a> {
        let (mut made, mut readers): (HashMap<_, _>, HashMap<ValueId, Vec<usize>>) = Default::default();
        for (g, group) in fused.groups.iter().enumerate() {
            made.extend(group.outputs.iter().map(|v| (*v, g)));
            group.inputs.iter().for_each(|v| readers.entry(*v).or_default().push(g));
        }
        let results = fused.spmd.outputs.iter().map(|(_, v)| v).chain(fused.spmd.assigns.iter().map(|(_, v)| v));
        let results = results.map(|v| fused.root(*v)).collect();
        Search { fused, made, readers, results, node: vec![None; fused.groups.len()] }
    }

    fn group(&self, g: usize) -> &'a Group {
        &self.fused.groups[g]
    }

    /// Whether two values have the same dimensions, in whatever order.
    fn alike(&self, a: ValueId, b: ValueId) -> bool {
        let (a, b) = (self.fused.ty(a), self.fused.ty(b));
        a.dims.len() == b.dims.len() && a.dims.iter().all(|d| b.has(&d.name))
    }

    /// Whether a step can be done on a slice, and is in no band yet.
    fn may_be_cut(&self, g: usize) -> bool {
        let group = self.group(g);
        let loops = |v: &ValueId| self.fused.ty(*v).dims.len() <= LOOPS;
        let values = group.instrs.iter().map(|i| &self.fused.spmd.instrs[*i]);
        let fits = values.clone().all(|i| i.inputs.iter().chain([&i.output]).all(loops));
        let fits = fits && self.node[g].is_none();
        fits && match group.kind {
            Kind::Map | Kind::Reduce => true,
            Kind::Instr => contract(self.fused, group).is_some(),
            // Epilogues are made later, of the steps of a band by themselves.
            Kind::Epilogue | Kind::Band(..) => false,
        }
    }

    /// Whether all that needs a value is among those steps.
    fn stays_inside(&self, v: ValueId, members: &[usize]) -> bool {
        !self.results.contains(&v) && self.readers.get(&v).is_none_or(|r| r.iter().all(|g| members.contains(g)))
    }

    /// The steps of the band around a product, in order, and the dimensions that it is cut along: first those that every
    /// product has in both factors.
    fn band(&self, seed: ValueId) -> Option<(Vec<usize>, Vec<Cut>)> {
        let mut members: Vec<usize> = Vec::new();
        let mut open = vec![*self.made.get(&seed)?];
        while let Some(g) = open.pop() {
            if members.contains(&g) || !self.may_be_cut(g) {
                continue;
            }
            members.push(g);
            let group = self.group(g);
            for v in group.outputs.iter().chain(&group.inputs).filter(|v| self.alike(**v, seed)) {
                open.extend(
                    self.made.get(v).copied().into_iter().chain(self.readers.get(v).into_iter().flatten().copied()),
                );
            }
        }
        members.sort_unstable();
        if !members.iter().any(|g| self.group(*g).outputs.contains(&seed)) || !self.stays_inside(seed, &members) {
            return None;
        }
        let kept = self.fused.ty(seed).dims.iter().map(|d| &d.name).filter(|n| self.is_kept(n, &members));
        let least = |name: &Name| if self.is_in_both(name, &members) { 1 } else { ROWS };
        let mut cuts: Vec<Cut> = kept.map(|name| Cut { name: name.clone(), least: least(name) }).collect();
        self.tails(&mut members, &cuts);
        let inside = self.computed(&members);
        if cuts.is_empty() || !members.iter().all(|g| self.reads_plainly(*g, &inside)) {
            return None;
        }
        cuts.sort_by_key(|c| c.least);
        Some((members, cuts))
    }

    /// Adds maps that are all that takes a value of the band and that keep what it is cut along: they only reorder it, or
    /// store it in fewer bits.
    fn tails(&self, members: &mut Vec<usize>, cuts: &[Cut]) {
        let mut open = members.clone();
        while let Some(g) = open.pop() {
            for v in &self.group(g).outputs {
                let Some(&[tail]) = self.readers.get(v).map(Vec::as_slice) else { continue };
                let map = self.group(tail);
                let keeps = || map.outputs.iter().all(|u| cuts.iter().all(|c| self.fused.ty(*u).has(&c.name)));
                let alone = || map.inputs == [*v] && !self.results.contains(v);
                if map.kind == Kind::Map && !members.contains(&tail) && alone() && self.may_be_cut(tail) && keeps() {
                    members.push(tail);
                    open.push(tail);
                }
            }
        }
        members.sort_unstable();
    }

    /// Whether a dimension is one of all that the steps give, and lies in the same way on each device.
    fn is_kept(&self, name: &Name, members: &[usize]) -> bool {
        let mut values = members.iter().flat_map(|g| self.computed(&[*g]));
        let Some(first) = values.next() else { return false };
        let ranges = |v: ValueId| self.fused.spmd.values[v.index()].regions.iter().map(|r| r.get(name));
        self.fused.ty(first).has(name) && values.all(|v| self.fused.ty(v).has(name) && ranges(v).eq(ranges(first)))
    }

    /// Whether every product among the steps has a dimension in both factors.
    fn is_in_both(&self, name: &Name, members: &[usize]) -> bool {
        let mut products = members.iter().map(|g| self.group(*g)).filter(|g| contract(self.fused, g).is_some());
        products.all(|g| self.fused.spmd.instrs[g.instrs[0]].inputs.iter().all(|v| self.fused.ty(*v).has(name)))
    }

    /// What steps compute, in memory or not.
    fn computed(&self, members: &[usize]) -> HashSet<ValueId> {
        let instrs = members.iter().flat_map(|g| &self.group(*g).instrs);
        instrs.map(|i| self.fused.spmd.instrs[*i].output).collect()
    }

    /// Whether a step reads values of the band only under their own names.
    fn reads_plainly(&self, g: usize, inside: &HashSet<ValueId>) -> bool {
        let instrs = self.group(g).instrs.iter().map(|i| &self.fused.spmd.instrs[*i]);
        let mut open: Vec<(ValueId, bool)> = instrs.flat_map(|i| i.inputs.iter().map(|v| (*v, false))).collect();
        while let Some((v, renamed)) = open.pop() {
            let root = self.fused.root(v);
            if inside.contains(&root) && (renamed || root != v) {
                return false;
            }
            let producer = self.fused.producer[v.index()].map(|i| &self.fused.spmd.instrs[i]);
            if let Some(instr) = producer.filter(|_| !self.fused.stored.contains(&root)) {
                let renames = matches!(self.fused.elementwise(v), Some(Prim::Rename(_)));
                open.extend(instr.inputs.iter().map(|i| (*i, renamed || renames)));
            }
        }
        true
    }

    /// Whether nothing else comes between steps: needs one of them, and is needed by another.
    fn is_closed(&self, members: &[usize]) -> bool {
        let last = members[members.len() - 1];
        let mut seen: HashSet<usize> = HashSet::new();
        let mut open = members.to_vec();
        while let Some(g) = open.pop() {
            for next in self.group(g).outputs.iter().filter_map(|v| self.readers.get(v)).flatten() {
                let inside = members.binary_search(next).is_ok();
                let outside = members.binary_search(&g).is_err();
                if inside && outside {
                    return false;
                }
                // Steps are in order: from behind the last one no way leads back.
                if !inside && *next < last && seen.insert(*next) {
                    open.push(*next);
                }
            }
        }
        true
    }

    /// The steps in an order in which each band is done at once, at its first step's place; None if bands wait for each
    /// other.
    fn order(&self) -> Option<Vec<usize>> {
        let groups = self.fused.groups.len();
        let node = |g: usize| self.node[g].unwrap_or(g);
        let mut after: Vec<Vec<usize>> = vec![vec![]; groups];
        let mut missing = vec![0usize; groups];
        for (g, group) in self.fused.groups.iter().enumerate() {
            for from in group.inputs.iter().filter_map(|v| self.made.get(v)).map(|m| node(*m)) {
                if from != node(g) {
                    after[from].push(node(g));
                    missing[node(g)] += 1;
                }
            }
        }
        let nodes: Vec<usize> = (0..groups).filter(|g| node(*g) == *g).collect();
        let mut ready: BinaryHeap<Reverse<usize>> =
            nodes.iter().filter(|g| missing[**g] == 0).map(|g| Reverse(*g)).collect();
        let mut order = Vec::with_capacity(nodes.len());
        while let Some(Reverse(g)) = ready.pop() {
            order.push(g);
            for &next in &after[g] {
                missing[next] -= 1;
                if missing[next] == 0 {
                    ready.push(Reverse(next));
                }
            }
        }
        (order.len() == nodes.len()).then_some(order)
    }

    fn joined(&self, members: &[usize], cuts: Vec<Cut>) -> Group {
        let groups: Vec<Group> = members.iter().map(|g| self.group(*g).clone()).collect();
        let inside = self.computed(members);
        let mut inputs: Vec<ValueId> = Vec::new();
        for v in groups.iter().flat_map(|g| &g.inputs).filter(|v| !inside.contains(v)) {
            if !inputs.contains(v) {
                inputs.push(*v);
            }
        }
        let outputs = groups.iter().flat_map(|g| &g.outputs).filter(|v| !self.stays_inside(**v, members));
        Group {
            instrs: groups.iter().flat_map(|g| &g.instrs).copied().collect(),
            inputs,
            outputs: outputs.copied().collect(),
            kind: Kind::Band(groups, cuts),
        }
    }
}

/// The slices of a band: how many indices each has along each dimension.
struct Blocks<'a> {
    /// By dimension that is cut: all of it, and the indices of a slice.
    dims: Vec<(&'a Cut, Range<usize>, usize)>,
}

impl Blocks<'_> {
    fn count(&self) -> usize {
        self.dims.iter().map(|(_, all, block)| all.len().div_ceil((*block).max(1))).product()
    }

    /// Halves slices along the first dimension that allows it.
    fn halve(&mut self) -> bool {
        let larger = self.dims.iter_mut().find(|(cut, _, block)| *block > cut.least);
        larger.map(|(cut, _, block)| *block = block.div_ceil(2).max(cut.least)).is_some()
    }

    /// The slices by shape, which differ in nothing but where they lie: the ranges of the first one of a shape, and by slice
    /// how far it lies from that along each dimension.
    fn shapes(&self) -> Vec<(Vec<Range<usize>>, Vec<Vec<usize>>)> {
        let mut shapes = vec![(vec![], vec![vec![]])];
        for (_, all, block) in &self.dims {
            let block = (*block).max(1);
            let rest = all.len() / block * block;
            let whole = (all.start..all.start + block, (0..rest).step_by(block).collect::<Vec<usize>>());
            let last = (all.start + rest..all.end, vec![0]);
            let pieces: Vec<_> = [whole, last].into_iter().filter(|(r, at)| !r.is_empty() && !at.is_empty()).collect();
            let cut = |(first, at): &(Vec<Range<usize>>, Vec<Vec<usize>>)| {
                let with = |(range, further): &(Range<usize>, Vec<usize>)| {
                    let at = at.iter().flat_map(|a| further.iter().map(|f| a.iter().chain([f]).copied().collect()));
                    (first.iter().chain([range]).cloned().collect(), at.collect())
                };
                pieces.iter().map(with).collect::<Vec<_>>()
            };
            shapes = shapes.iter().flat_map(cut).collect();
        }
        shapes
    }
}

impl Planner<'_> {
    /// The work of a band on a device.
    pub(super) fn band(&self, group: &Group, members: &[Group], cuts: &[Cut], device: usize) -> Work {
        let whole = View { fused: self.fused, device, slice: None };
        let instrs = members.iter().flat_map(|g| &g.instrs).map(|i| self.fused.spmd.instrs[*i].output);
        let inside: HashSet<ValueId> = instrs.collect();
        let space = whole.region(group.outputs[0]);
        let dims = cuts.iter().map(|cut| {
            let all = space.get(&cut.name).cloned().unwrap_or(0..0);
            (cut, all.clone(), all.len())
        });
        let mut blocks = Blocks { dims: dims.collect() };
        let bytes = |blocks: &Blocks| {
            let one = |v: &ValueId| {
                let value = &self.fused.spmd.values[v.index()];
                let cut = |(name, range): &(Name, Range<usize>)| {
                    blocks.dims.iter().find(|(c, ..)| c.name == *name).map_or(range.len(), |(_, _, block)| *block)
                };
                value.regions[device].0.iter().map(cut).product::<usize>() * value.ty.dtype.bytes()
            };
            members.iter().flat_map(|g| &g.outputs).map(one).sum::<usize>()
        };
        let shared = SHARE * self.cx.backend.threads();
        while (bytes(&blocks) > CACHE || blocks.count() < shared) && blocks.halve() {}
        let slices = |(ranges, at): (Vec<Range<usize>>, Vec<Vec<usize>>)| {
            let named = cuts.iter().map(|c| c.name.clone()).zip(ranges);
            let slice = Slice { inside: inside.clone(), ranges: named.collect() };
            Slices { at, ..self.slices(group, members, &slice, device) }
        };
        Work::Band(Band { slices: blocks.shapes().into_iter().map(slices).collect() })
    }

    /// The steps of slices that are like one, which is the first of them.
    fn slices(&self, group: &Group, members: &[Group], slice: &Slice, device: usize) -> Slices {
        let (whole, view) =
            (View { fused: self.fused, device, slice: None }, View { fused: self.fused, device, slice: Some(slice) });
        let cuts: Vec<&Name> = slice.ranges.iter().map(|(n, _)| n).collect();
        let mut steps: Vec<SliceStep> = Vec::new();
        let mut tenants: Vec<Tenant> = Vec::new();
        let mut homes: HashMap<ValueId, usize> = HashMap::new();
        let reads = members.iter().enumerate().flat_map(|(m, g)| g.inputs.iter().map(move |v| (*v, m)));
        let last: HashMap<ValueId, usize> = reads.collect();
        for (m, member) in members.iter().enumerate() {
            let work = self.work(member, view);
            let (name, read) = if work.is_some() { (self.name(member), self.reads(member)) } else { (IDLE, vec![]) };
            let (work, scratch) = work.unwrap_or_else(|| (Work::Copy(CopyWork::default()), 0));
            let step = steps.len();
            // The loops' names, which are those of the points that it goes over.
            let points: Vec<Name> = match &member.kind {
                Kind::Reduce => {
                    let x = self.fused.spmd.instrs[member.instrs[0]].inputs[0];
                    self.fused.ty(x).dims.iter().map(|d| d.name.clone()).collect()
                }
                _ => view.region(member.outputs[0]).0.iter().map(|(n, _)| n.clone()).collect(),
            };
            let loops: Vec<Option<usize>> = cuts.iter().map(|n| points.iter().position(|p| p == *n)).collect();
            let along = |nest: &Loop, o: usize| -> Vec<usize> {
                let access = &nest.operands[o];
                loops.iter().map(|l| l.map_or(0, |l| access.strides[l] * access.dtype.bytes())).collect()
            };
            let strides = |operand: usize| -> Vec<usize> {
                match &work {
                    Work::Map(nest) => along(nest, operand),
                    Work::Reduce(r) => along(&r.nest, operand),
                    Work::Op(op) => match (op.inputs.get(operand), &op.epilogue) {
                        (Some(part), _) => strides_of(&part.region, &cuts, part.ty.dtype.bytes()),
                        (None, Some(epilogue)) => along(epilogue.nest(), operand - op.inputs.len()),
                        (None, None) => unreachable!("an op without an epilogue reads its inputs"),
                    },
                    other => unreachable!("a band has no such step: {other:?}"),
                }
            };
            let inputs = read.iter().enumerate().map(|(o, v)| {
                let root = self.fused.root(*v);
                match homes.get(&root) {
                    Some(&home) => {
                        tenants[home].to = step;
                        At::Inside(home)
                    }
                    None => {
                        let operand = group.inputs.iter().position(|i| *i == root).expect("a band reads its inputs");
                        At::Outside { operand, strides: strides(o) }
                    }
                }
            });
            let inputs = inputs.collect();
            let mut outputs = Vec::new();
            let mut over = replaced(&work, &read, |v| homes.contains_key(&v) && last[&v] == m);
            for v in &member.outputs {
                let value = &self.fused.spmd.values[v.index()];
                let bytes = value.nodes[device] * view.region(*v).elements() * value.ty.dtype.bytes();
                let old = over.take().map(|old| homes[&old]);
                let home = old.filter(|home| tenants[*home].bytes == bytes).unwrap_or_else(|| {
                    tenants.push(Tenant { bytes, from: step, to: step });
                    tenants.len() - 1
                });
                homes.insert(*v, home);
                outputs.push(At::Inside(home));
            }
            tenants.push(Tenant { bytes: scratch, from: step, to: step });
            let scratch = tenants.len() - 1;
            steps.push(SliceStep { work, inputs, outputs, scratch, loops, name: name.into() });
            for v in &member.outputs {
                let Some(operand) = group.outputs.iter().position(|o| o == v) else { continue };
                let value = &self.fused.spmd.values[v.index()];
                let (own, held, element) = (view.region(*v), whole.region(*v), value.ty.dtype.bytes());
                let mut copy = box_copy(&own, &own, &held);
                if value.nodes[device] != 1 {
                    copy.extents.insert(0, value.nodes[device]);
                    copy.from_strides.insert(0, own.elements());
                    copy.to_strides.insert(0, held.elements());
                }
                let step = steps.len();
                tenants[homes[v]].to = step;
                steps.push(SliceStep {
                    work: Work::Copy(CopyWork { element, fill: None, boxes: vec![(0, copy)] }),
                    inputs: vec![At::Inside(homes[v])],
                    outputs: vec![At::Outside { operand, strides: strides_of(&held, &cuts, element) }],
                    scratch,
                    loops: vec![],
                    name: "copy".into(),
                });
            }
        }
        let (buffers, room) = memory::place(&tenants, 0);
        Slices { steps, buffers, room, at: vec![] }
    }
}

/// What a map reads just where it writes its first result, whose elements are as large, of what `ends` with it: the result
/// may lie there.
fn replaced(work: &Work, read: &[ValueId], ends: impl Fn(ValueId) -> bool) -> Option<ValueId> {
    let Work::Map(nest) = work else { return None };
    let element = nest.body.instrs[nest.body.results[0]].1.bytes();
    let fits = |v: ValueId| {
        let mut own = nest.operands.iter().zip(read).filter(|(_, u)| **u == v);
        own.all(|(access, _)| access.dtype.bytes() == element && access.is_whole(&nest.extents))
    };
    read.iter().copied().find(|v| ends(*v) && fits(*v))
}

/// Bytes between neighbours along each of the dimensions in an array that holds a region.
fn strides_of(held: &Region, dims: &[&Name], element: usize) -> Vec<usize> {
    let strides = crate::body::strides(&held.shape());
    let stride =
        |n: &&Name| held.0.iter().zip(&strides).find(|((name, _), _)| name == *n).map_or(0, |(_, s)| s * element);
    dims.iter().map(stride).collect()
}
