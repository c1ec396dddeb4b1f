//! Which loops share a pass, and which are the epilogue of a product.

use super::{Fused, Group, Kind};
use crate::body::MAX_INSTRS;
use crate::dim::Dim;
use crate::ops::Prim;
use crate::ops::conv::{Conv, ConvTranspose};
use crate::plan::band::View;
use crate::plan::body::Nest;
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, ValueId};
use std::collections::{HashMap, HashSet};

/// How far apart loops may be that share a pass; farther ones would keep their inputs alive for too long.
const WINDOW: usize = 12;

impl Fused<'_> {
    /// Lets loops over the same points share a pass: reductions with one another, and maps with the maps whose
    /// results they read (an optimizer's slots and variable).
    pub(super) fn merge(&mut self) {
        let mut groups: Vec<Option<Group>> = std::mem::take(&mut self.groups).into_iter().map(Some).collect();
        let mut made: HashMap<ValueId, usize> = HashMap::new();
        let set: HashSet<ValueId> = self.spmd.assigns.iter().map(|(_, v)| self.root(*v)).collect();
        for j in 0..groups.len() {
            let Some(group) = groups[j].take() else { continue };
            let mut target = None;
            if group.kind != Kind::Instr {
                for i in (j.saturating_sub(WINDOW)..j).rev() {
                    if groups[i].as_ref().is_some_and(|g| self.may_share(g, &group, i, &made, &set)) {
                        target = Some(i);
                        break;
                    }
                }
            }
            let at = target.unwrap_or(j);
            group.outputs.iter().for_each(|v| {
                made.insert(*v, at);
            });
            match groups[at].as_mut() {
                Some(earlier) => {
                    earlier.instrs.extend(&group.instrs);
                    earlier.outputs.extend(&group.outputs);
                    let merged = earlier.clone();
                    let inputs = self.loads(&merged.instrs);
                    if let Some(g) = groups[at].as_mut() {
                        g.inputs = inputs;
                    }
                }
                None => groups[j] = Some(group),
            }
        }
        self.groups = groups.into_iter().flatten().collect();
    }

    fn may_share(
        &self,
        earlier: &Group,
        later: &Group,
        at: usize,
        made: &HashMap<ValueId, usize>,
        set: &HashSet<ValueId>,
    ) -> bool {
        let (a, b) = (&self.spmd.instrs[earlier.instrs[0]], &self.spmd.instrs[later.instrs[0]]);
        let reads_earlier = later.inputs.iter().any(|v| earlier.outputs.contains(v));
        let ready = later.inputs.iter().all(|v| earlier.outputs.contains(v) || made.get(v).is_none_or(|&m| m < at));
        // Within one pass a value is at hand point by point, in its own dimensions only.
        let reshaped = || b.inputs.iter().any(|&v| self.reads_reshaped(v, &earlier.outputs));
        if earlier.kind != later.kind || !ready || earlier.outputs.len() >= 4 || reads_earlier && reshaped() {
            return false;
        }
        let alike = match (&a.op, &b.op) {
            (SpmdOp::Compute { prim: Prim::Reduce(f), sum: s }, SpmdOp::Compute { prim: Prim::Reduce(g), sum: t }) => {
                let space = |i: &Instr| {
                    // Of one dtype too: a pass has one way to combine.
                    (self.ty(i.inputs[0]).clone(), self.spmd.values[i.output.index()].regions.clone())
                };
                !reads_earlier && f.f == g.f && f.over == g.over && s == t && space(a) == space(b)
            }
            _ if earlier.kind == Kind::Map => {
                let (x, y) = (&self.spmd.values[a.output.index()], &self.spmd.values[b.output.index()]);
                // What an optimizer sets lies in memory anyway, so it costs none to set it sooner.
                let sets = |g: &Group| g.outputs.iter().all(|v| set.contains(v));
                let reads_same = || later.inputs.iter().any(|v| earlier.inputs.contains(v) && *self.ty(*v) == *x.ty);
                let gains = reads_earlier || sets(earlier) && sets(later) && reads_same();
                gains && x.ty.dims == y.ty.dims && x.regions == y.regions
            }
            _ => false,
        };
        alike && self.instructions(earlier) + self.instructions(later) <= MAX_INSTRS
    }

    /// Makes the first map of what a product gives its epilogue: it is taken from the cache then, and is stored itself only
    /// if others read it, or if it is one of the `results` of these steps.
    pub(super) fn epilogues(&self, groups: Vec<Group>, results: &HashSet<ValueId>) -> Vec<Group> {
        let (mut made, readers) = made_and_read(&groups);
        let mut groups: Vec<Option<Group>> = groups.into_iter().map(Some).collect();
        for k in 0..groups.len() {
            let Some(product) = groups[k].clone().filter(|g| g.kind == Kind::Instr) else { continue };
            let v = product.outputs[0];
            let Some(&[m, ref others @ ..]) = readers.get(&v).map(Vec::as_slice) else { continue };
            let ready = |u: &ValueId| *u == v || made.get(u).is_none_or(|g| *g < k);
            let Some(map) = groups[m].clone().filter(|g| g.kind == Kind::Map && g.inputs.iter().all(ready)) else {
                continue;
            };
            let keeps = !others.is_empty() || results.contains(&v);
            if !self.is_whole_product(v) || !self.takes(&map, v, keeps) {
                continue;
            }
            let mut group = Group {
                kind: Kind::Epilogue,
                instrs: product.instrs.iter().chain(&map.instrs).copied().collect(),
                inputs: vec![],
                outputs: map.outputs.clone(),
            };
            let read_on =
                |u: &ValueId| results.contains(u) || readers.get(u).is_some_and(|r| r.iter().any(|g| *g != m));
            group.outputs.retain(read_on);
            group.outputs.extend(keeps.then_some(v));
            group.inputs = self.loads(&group.instrs);
            group.outputs.iter().for_each(|u| {
                made.insert(*u, k);
            });
            groups[k] = Some(group);
            groups[m] = None;
        }
        groups.into_iter().flatten().collect()
    }

    /// Whether a map reads `v` once, at each of its points just the element that lies there, and, if `v` is to be stored
    /// as well, in its own dimensions.
    fn takes(&self, map: &Group, v: ValueId, keeps: bool) -> bool {
        let (value, out) = (&self.spmd.values[v.index()], &self.spmd.values[map.outputs[0].index()]);
        let has_its_dims = value.ty.dims == out.ty.dims;
        (has_its_dims || !keeps) && self.nest(map).is_some_and(|nest| self.reads_as_it_lies(&nest, v, &out.regions))
    }

    /// Whether a nest over the points that each device has reads `v` once, at each point just the element that lies there.
    fn reads_as_it_lies(&self, nest: &Nest, v: ValueId, points: &[Region]) -> bool {
        let regions = &self.spmd.values[v.index()].regions;
        let mut own = (0..nest.loaded.len()).filter(|o| nest.loaded[*o] == v);
        let (Some(own), None) = (own.next(), own.next()) else { return false };
        points.iter().zip(&**regions).enumerate().all(|(device, (at, held))| {
            if at.is_empty() {
                return held.is_empty();
            }
            let view = View { fused: self, device, slice: None };
            nest.access(own, view, at).is_whole(&at.shape()) && at.elements() == held.elements()
        })
    }

    /// Lets the epilogue of a convolution sum up what it stores, or what it takes: statistics for the norm behind it, and in
    /// the backward pass the sums of that norm's gradient. One task does all that a leaf has of a plane. Not behind a halo,
    /// where a plane's interior is done before its rim.
    pub(super) fn sums_in_epilogues(&self, groups: Vec<Group>, results: &HashSet<ValueId>) -> Vec<Group> {
        let (made, readers) = made_and_read(&groups);
        let mut groups: Vec<Option<Group>> = groups.into_iter().map(Some).collect();
        for j in 0..groups.len() {
            let Some(sums) = groups[j].clone().filter(|g| g.kind == Kind::Reduce) else { continue };
            // All that it reads was there before, or comes of this step.
            let last = sums.inputs.iter().filter_map(|v| made.get(v)).max();
            let Some((k, product)) = last.and_then(|k| Some((*k, groups[*k].clone()?))) else { continue };
            let read_on =
                |v: &ValueId| results.contains(v) || readers.get(v).is_some_and(|r| r.iter().any(|g| *g != j));
            let stored: Vec<ValueId> = product.outputs.iter().copied().filter(read_on).collect();
            let [first, maps @ ..] = &product.instrs[..] else { continue };
            let mut group = Group {
                kind: Kind::Epilogue,
                instrs: [&[*first], &sums.instrs[..], maps].concat(),
                inputs: vec![],
                outputs: [&stored[..], &sums.outputs].concat(),
            };
            if stored.is_empty() || !self.may_sum(&product, &sums, &group) {
                continue;
            }
            group.inputs = self.loads(&group.instrs);
            groups[k] = Some(group);
            groups[j] = None;
        }
        groups.into_iter().flatten().collect()
    }

    /// Whether a convolution's step, with an epilogue or not, may become `together`, which reduces besides.
    fn may_sum(&self, product: &Group, sums: &Group, together: &Group) -> bool {
        let is_one = matches!(product.kind, Kind::Instr | Kind::Epilogue) && self.sums_of(product).0.is_empty();
        let conv = &self.spmd.instrs[product.instrs[0]];
        let SpmdOp::Compute {
            prim:
                Prim::Conv(Conv { windows, .. }) | Prim::ConvTranspose(ConvTranspose { conv: Conv { windows, .. }, .. }),
            ..
        } = &conv.op
        else {
            return false;
        };
        let made = self.producer[self.root(conv.inputs[0]).index()].map(|i| &self.spmd.instrs[i].op);
        let (instr, v) = (&self.spmd.instrs[sums.instrs[0]], conv.output);
        let SpmdOp::Compute { prim: Prim::Reduce(r), .. } = &instr.op else { return false };
        let over = |d: &Dim| r.over.contains(&d.name);
        let planes = |dims: &[Dim]| matches!(dims, [.., a, b, kept] if over(a) && over(b) && !over(kept));
        is_one
            && windows.len() >= 2
            && planes(&self.ty(instr.inputs[0]).dims)
            && !matches!(made, Some(SpmdOp::Move))
            && self.is_whole_product(v)
            && self.ty(sums.outputs[0]).dtype.is_float()
            && self.may_store(sums, product)
            && self
                .nest(together)
                .is_some_and(|nest| self.reads_as_it_lies(&nest, v, &self.spmd.values[v.index()].regions))
    }

    /// Lets a map share its pass with the reductions of what it stores, which others may need or not.
    pub(super) fn sums_with_maps(&self, groups: Vec<Group>, results: &HashSet<ValueId>) -> Vec<Group> {
        let (mut made, readers) = made_and_read(&groups);
        let mut groups: Vec<Option<Group>> = groups.into_iter().map(Some).collect();
        for j in 0..groups.len() {
            let Some(sums) = groups[j].clone().filter(|g| g.kind == Kind::Reduce) else { continue };
            let from = |g: &usize| sums.inputs.iter().any(|v| made.get(v) == Some(g));
            let Some(m) = (j.saturating_sub(WINDOW)..j).rev().find(from) else { continue };
            let Some(map) = groups[m].clone().filter(|g| g.kind == Kind::Map) else { continue };
            // What it reads besides was there before the map.
            let ready = sums.inputs.iter().all(|v| made.get(v).is_none_or(|g| *g <= m));
            if !ready || !self.may_store(&sums, &map) {
                continue;
            }
            let read_on =
                |v: &ValueId| results.contains(v) || readers.get(v).is_some_and(|r| r.iter().any(|g| *g != j));
            let stored = map.outputs.iter().copied().filter(read_on);
            let mut group = Group {
                kind: Kind::Reduce,
                instrs: [&sums.instrs[..], &map.instrs].concat(),
                inputs: vec![],
                outputs: stored.chain(sums.outputs.iter().copied()).collect(),
            };
            group.inputs = self.loads(&group.instrs);
            sums.outputs.iter().for_each(|v| {
                made.insert(*v, m);
            });
            groups[m] = Some(group);
            groups[j] = None;
        }
        groups.into_iter().flatten().collect()
    }

    /// Whether a pass of reductions may store what a step of its points gives: on every device it goes through each of them
    /// once, in order.
    fn may_store(&self, sums: &Group, map: &Group) -> bool {
        let instr = &self.spmd.instrs[sums.instrs[0]];
        let given = &self.spmd.values[instr.output.index()].regions;
        let out = &self.spmd.values[map.outputs[0].index()];
        let summed = || sums.instrs.iter().map(|i| self.spmd.instrs[*i].inputs[0]);
        let points = |device: usize| self.points_of(instr, given[device].clone(), device);
        let whole = |device: usize| points(device).same_ranges(&out.regions[device]);
        summed().all(|v| self.ty(v).shape() == out.ty.shape() && !self.reads_reshaped(v, &map.outputs))
            && self.instructions(sums) + self.instructions(map) <= MAX_INSTRS
            && (0..out.regions.len()).all(whole)
    }

    /// Instructions at each point of a loop, at the most: loads, operations, and roundings.
    fn instructions(&self, group: &Group) -> usize {
        let rounded = |v: ValueId| if self.ty(v).dtype.is_half() { 2 } else { 1 };
        let loads: usize = group.inputs.iter().map(|v| rounded(*v)).sum();
        let mut inside: HashSet<usize> = HashSet::new();
        let mut open = group.instrs.clone();
        while let Some(i) = open.pop() {
            if inside.insert(i) {
                let inputs = self.spmd.instrs[i].inputs.iter();
                open.extend(
                    inputs.filter(|v| !self.stored.contains(&self.root(**v))).filter_map(|v| self.producer[v.index()]),
                );
            }
        }
        loads + inside.iter().map(|i| rounded(self.spmd.instrs[*i].output)).sum::<usize>()
    }

    /// Whether the loops that compute `v` read one of `outputs` with its dimensions split or merged.
    fn reads_reshaped(&self, v: ValueId, outputs: &[ValueId]) -> bool {
        let Some(instr) = self.producer[v.index()].map(|i| &self.spmd.instrs[i]) else { return false };
        match self.alias.contains_key(&v) && self.elementwise(v).is_none() {
            true => outputs.contains(&self.root(v)),
            false if self.stored.contains(&v) => false,
            false => instr.inputs.iter().any(|&v| self.reads_reshaped(v, outputs)),
        }
    }
}

/// By value: the step that makes it, and those that read it.
fn made_and_read(groups: &[Group]) -> (HashMap<ValueId, usize>, HashMap<ValueId, Vec<usize>>) {
    let (mut made, mut readers): (HashMap<ValueId, usize>, HashMap<ValueId, Vec<usize>>) = Default::default();
    for (g, group) in groups.iter().enumerate() {
        made.extend(group.outputs.iter().map(|v| (*v, g)));
        group.inputs.iter().for_each(|v| readers.entry(*v).or_default().push(g));
    }
    (made, readers)
}
