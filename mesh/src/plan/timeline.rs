//! What is in memory at each step of a function.

use super::device::{Class, Parts};
use super::function::Planner;
use super::memory::{self, Tenant};
use super::step::ALIGN;
use crate::error::Place;
use crate::graph::NodeId;
use crate::spmd::{Instr, SpmdOp, ValueId};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A device's memory over a function's steps.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Bytes alive at each step, variables included.
    pub alive: Arc<[usize]>,
    /// The step (the first one) at which most are.
    pub fullest: usize,
    /// What is alive there, largest first.
    pub largest: Arc<[Alive]>,
    /// By block of the function: bytes of it at each step that would not be there if it were made again.
    pub inside: Arc<[Vec<usize>]>,
    /// Bytes at each step that are kept in place of being sent again, where there is room.
    pub kept: Arc<[usize]>,
    /// The same with every collective in one step, if some are taken apart.
    pub waiting: Option<Arc<Timeline>>,
}

impl Timeline {
    /// That with every collective in one step: what is under way for longer is so only where there is room.
    pub fn waiting(&self) -> &Timeline {
        self.waiting.as_deref().unwrap_or(self)
    }
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

/// What a value counts for while it is there.
enum Counts {
    /// For what is kept in place of being sent again.
    Kept,
    /// For these blocks.
    Blocks(Vec<usize>),
}

/// Values that count for something: the life, its steps, and for what.
pub(super) struct Blocks(Vec<(usize, std::ops::Range<usize>, Counts)>);

impl Planner<'_> {
    /// The node that made a value, wherever it was moved for.
    fn origin(&self, v: ValueId) -> NodeId {
        match self.fused.producer[v.index()].map(|i| &self.cx.spmd.instrs[i]) {
            Some(Instr { op: SpmdOp::Move, inputs, .. }) => self.origin(inputs[0]),
            _ => self.cx.spmd.values[v.index()].node,
        }
    }

    /// Which values are inside of blocks, or kept in place of being sent again.
    pub(super) fn blocks(&self) -> Blocks {
        let mut found = vec![];
        let beside = self.beside_kept();
        for (i, life) in self.lives.iter().enumerate() {
            let mut from = life.from;
            for (to, value) in life.before.iter().copied().chain([(life.to + 1, life.value)]) {
                let node = self.origin(value);
                let blocks = self.cx.function.blocks.iter().enumerate();
                let inside = blocks.filter(|(_, b)| b.inside.binary_search(&node).is_ok()).map(|(b, _)| b);
                let until = match beside.get(&value) {
                    _ if self.cx.spmd.kept.contains(&value) => from,
                    Some(last) => (last + 1).clamp(from, to),
                    None => to,
                };
                let inside: Vec<usize> = inside.collect();
                found.extend((from < until && !inside.is_empty()).then_some((i, from..until, Counts::Blocks(inside))));
                found.extend((until < to).then_some((i, until..to, Counts::Kept)));
                from = to;
            }
        }
        Blocks(found)
    }

    /// What lies beside a halo that is kept in place of being sent again, and the last moment that reads it for anything else.
    fn beside_kept(&self) -> HashMap<ValueId, usize> {
        let (mut last, mut beside) = (HashMap::new(), HashSet::new());
        for (m, moment) in self.moments.iter().enumerate() {
            let inputs = &self.first(&self.groups()[moment.group]).inputs;
            let kept = inputs.first().is_some_and(|v| self.cx.spmd.kept.contains(v));
            let own = self.own_piece(inputs).filter(|_| kept).map(|v| self.root(v));
            beside.extend(own);
            last.extend(self.looks_at(*moment).iter().filter(|v| Some(**v) != own).map(|v| (*v, m)));
        }
        last.extend(self.cx.spmd.outputs.iter().map(|(_, v)| (self.root(*v), self.end())));
        beside.into_iter().map(|v| (v, last.get(&v).copied().unwrap_or(0))).collect()
    }

    /// The timeline of devices that have these tenants, without what is alive at the fullest step.
    pub(super) fn timeline(&self, device: usize, tenants: &[Tenant], base: usize, blocks: &Blocks) -> Timeline {
        let steps = self.end() + 1;
        let alive = memory::timeline(tenants, base, steps);
        let fullest = alive.iter().enumerate().max_by_key(|(i, b)| (**b, std::cmp::Reverse(*i))).map_or(0, |(i, _)| i);
        // What comes and goes at each step.
        let mut inside = vec![vec![0isize; steps + 1]; self.cx.function.blocks.len()];
        let mut kept = vec![0isize; steps + 1];
        for (life, range, counts) in &blocks.0 {
            let bytes = self.lives[*life].bytes[device].next_multiple_of(ALIGN) as isize;
            let add = |changes: &mut Vec<isize>| {
                changes[range.start] += bytes;
                changes[range.end] -= bytes;
            };
            match counts {
                Counts::Kept => add(&mut kept),
                Counts::Blocks(blocks) => blocks.iter().for_each(|b| add(&mut inside[*b])),
            }
        }
        let inside = inside.into_iter().map(|changes| memory::added_up(0, &changes[..steps])).collect();
        let kept = memory::added_up(0, &kept[..steps]).into();
        Timeline { alive: alive.into(), fullest, inside, kept, ..Timeline::default() }
    }

    /// The timeline of a device of a class.
    pub(super) fn told(&self, device: usize, class: &mut Class) -> Timeline {
        let (fullest, parts) = (class.timeline.fullest, self.parts());
        let here = class.tenants.iter().enumerate();
        let here = here.filter(|(_, t)| t.from <= fullest && fullest <= t.to && t.bytes > 0);
        let here: Vec<(usize, &Tenant)> = here.collect();
        if let Some((_, timeline)) = class.told.iter().find(|(other, _)| self.tells(device, *other, &here, parts)) {
            return timeline.clone();
        }
        let alive = |&(i, t): &(usize, &Tenant)| {
            let (name, place) = self.named(device, i, parts);
            Alive { name, bytes: t.bytes, place, variable: false }
        };
        let mut largest: Vec<Alive> = here.iter().map(alive).collect();
        for ((part, buffer), v) in self.cx.variables[device].iter().zip(self.cx.declared) {
            let name = format!("variable {} {}", v.name, part.region.local(&part.ty));
            largest.push(Alive { name, bytes: buffer.bytes, place: v.place, variable: true });
        }
        largest.sort_by_key(|a| std::cmp::Reverse(a.bytes));
        let timeline = Timeline { largest: largest.into(), ..class.timeline.clone() };
        class.told.push((device, timeline.clone()));
        timeline
    }

    /// Whether two devices of a class tell the same of what is there: parts of one shape.
    fn tells(&self, a: usize, b: usize, here: &[(usize, &Tenant)], parts: Parts) -> bool {
        let values = here.iter().filter(|(i, _)| *i < parts.staged).map(|(i, _)| self.lives[*i].value);
        let mut values = values.map(|v| &self.cx.spmd.values[v.index()]);
        let mut variables = self.cx.variables[a].iter().zip(&self.cx.variables[b]);
        values.all(|v| v.nodes[a] == v.nodes[b] && v.regions[a].has_shape_of(&v.regions[b]))
            && variables.all(|((p, _), (q, _))| p.region.has_shape_of(&q.region))
    }

    /// What a tenant is called, and where it comes from.
    fn named(&self, device: usize, i: usize, parts: Parts) -> (String, Place) {
        let spmd = self.cx.spmd;
        let (value, what) = if i < parts.staged {
            let v = self.lives[i].value;
            let value = &spmd.values[v.index()];
            let nodes = value.nodes[device];
            let sums = if nodes > 1 { format!(", {nodes} partial sums") } else { String::new() };
            let moved = self.fused.producer[v.index()].is_some_and(|p| matches!(spmd.instrs[p].op, SpmdOp::Move));
            let moved = match moved {
                true if self.in_pieces.contains(&v) => "halo for ",
                true => "block and halo for ",
                false => "",
            };
            let op = self.cx.function.node(value.node).op.op().name();
            (value, format!("{moved}{op} {}{sums}", value.regions[device].local(&value.ty)))
        } else if i < parts.scratch {
            (&spmd.values[self.copies[i - parts.staged].0.index()], "assigned value".into())
        } else {
            let group = &self.groups()[i - parts.scratch];
            (&spmd.values[group.outputs[0].index()], format!("scratch of {}", self.name(group)))
        };
        let node = self.cx.function.node(value.node);
        let scope = if node.scope.is_empty() { String::new() } else { format!("{}: ", node.scope) };
        (format!("{scope}{what}"), node.place)
    }
}
