//! Pipelines: the order in which stages go through micro-batches.
//!
//! A layout gives parts of a model to places along an axis (`@pipe:0`), and the program goes through its batch in parts
//! ([`crate::optim::Optimizer::apply_in_parts`]). What one stage does for one micro-batch in one direction without
//! hearing from another stage is a task here; tasks are put in an order by going through them with a clock for each stage.
//! All devices keep to one list, each to its own part of it, so nobody can wait for one who waits for him; bits do
//! not depend on the order, memory does.

use crate::error::{Cause, Error};
use crate::graph::{NodeId, Role};
use crate::ops::Prim;
use crate::program::Function;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, ValueId};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::str::FromStr;

/// The dimension by which a batch is cut into micro-batches.
pub const MICRO: &str = "micro";

/// The order of a pipeline's tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// All micro-batches forward, then all backward (Huang et al. 2019): every stage keeps the activations of all of them.
    GPipe,
    /// Backward as soon as it can be, and forward only as far ahead as keeps the last stage busy (Narayanan et al. 2019):
    /// as fast as GPipe, and a stage keeps the activations of as many micro-batches as there are stages from it on.
    #[default]
    OneForwardOneBackward,
    /// As the last, with gradients of weights apart, for when there is nothing else to do (ZB-H1 of Qi et al. 2023): a stage
    /// hands gradients on sooner, and waits for others less. All stages keep as much as the first one.
    ZeroBubble,
}

impl Schedule {
    /// All of them.
    pub const ALL: [Schedule; 3] = [Schedule::GPipe, Schedule::OneForwardOneBackward, Schedule::ZeroBubble];
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::GPipe => "gpipe",
            Schedule::OneForwardOneBackward => "1f1b",
            Schedule::ZeroBubble => "zero-bubble",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;
    fn from_str(text: &str) -> Result<Schedule, Error> {
        let found = Schedule::ALL.into_iter().find(|s| s.to_string() == text.trim());
        let expected = "the order of a pipeline, gpipe, 1f1b or zero-bubble";
        found.ok_or_else(|| Cause::Syntax { text: text.into(), expected: expected.into() }.into())
    }
}

/// What a task is a part of, in the order of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Phase {
    Forward,
    /// The backward pass; in a zero-bubble schedule what gradients that are handed on are made of.
    Backward,
    /// What of it no other stage waits for, in a zero-bubble schedule.
    Weights,
    Update,
}

/// What tells tasks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    /// How often a value has come from another stage on the way here.
    hop: usize,
    /// None: all devices do it.
    stage: Option<usize>,
    micro: usize,
    phase: Phase,
    /// What hands a value on from one stage to another is a task of its own, of no length: both are there for it.
    hands_on: Option<usize>,
}

struct Task {
    key: Key,
    instrs: Vec<usize>,
    /// Tasks that come before it.
    after: BTreeSet<usize>,
    cost: f64,
}

/// Puts the instructions of a program with stages in an order in which the stages work side by side. A program without
/// stages stays as it is. `waiting`: what hands a value on holds both stages up until both are there for it.
pub fn order(spmd: &mut SpmdProgram, function: &Function, schedule: Schedule, waiting: bool) {
    let Some(tasks) = tasks(spmd, function, schedule) else { return };
    // Where gradients of weights are apart there is something else to do while a value is on its way.
    let order = simulate(&tasks, schedule, waiting || schedule != Schedule::ZeroBubble);
    // Tasks that wait for each other are none: then the order of the program is a good one.
    if order.len() < tasks.len() {
        return;
    }
    let mut instrs: Vec<Option<Instr>> = std::mem::take(&mut spmd.instrs).into_iter().map(Some).collect();
    let ordered = order.iter().flat_map(|t| &tasks[*t].instrs);
    spmd.instrs = ordered.filter_map(|i| instrs[*i].take()).collect();
}

/// The tasks of a program; None if it has no stages.
fn tasks(spmd: &SpmdProgram, function: &Function, schedule: Schedule) -> Option<Vec<Task>> {
    let mut stages: Vec<Vec<bool>> = vec![];
    let stage_of: Vec<Option<usize>> = spmd.instrs.iter().map(|i| stage(spmd, i.output, &mut stages)).collect();
    if stages.is_empty() {
        return None;
    }
    let mut producer = vec![None; spmd.values.len()];
    spmd.instrs.iter().enumerate().for_each(|(i, instr)| producer[instr.output.index()] = Some(i));
    let inputs = |i: usize| spmd.instrs[i].inputs.iter().filter_map(|v: &ValueId| producer[v.index()]);
    let mut hop = vec![0; spmd.instrs.len()];
    for i in 0..spmd.instrs.len() {
        let from = |p: usize| hop[p] + usize::from(stage_of[p].is_some() && stage_of[p] != stage_of[i]);
        hop[i] = inputs(i).map(from).max().unwrap_or(0);
    }
    let parts = parts(function);
    let micro = micro_batches(spmd, &parts, &inputs);
    let role = |i: usize| function.node(spmd.values[spmd.instrs[i].output.index()].node).role;
    let hands_on = |i: usize| {
        let moves = matches!(spmd.instrs[i].op, SpmdOp::Move);
        moves && inputs(i).any(|p| stage_of[p] != stage_of[i])
    };
    // Whether another stage waits for what is made of a value.
    let mut awaited = vec![schedule != Schedule::ZeroBubble; spmd.instrs.len()];
    for i in (0..spmd.instrs.len()).rev().filter(|i| matches!(role(*i), Role::Backward | Role::Gradient)) {
        awaited[i] |= hands_on(i);
        inputs(i).for_each(|p| awaited[p] |= awaited[i]);
    }
    let phase = |i: usize| match role(i) {
        Role::Forward => Phase::Forward,
        Role::Update | Role::Variable => Phase::Update,
        Role::Backward | Role::Gradient if awaited[i] => Phase::Backward,
        Role::Backward | Role::Gradient => Phase::Weights,
    };
    let mut turns: Vec<(Phase, usize)> = (0..spmd.instrs.len()).map(|i| (phase(i), hop[i])).collect();
    put_off(spmd, &parts, &stage_of, &mut turns);
    let mut tasks: Vec<Task> = vec![];
    let (mut at, mut of): (HashMap<Key, usize>, Vec<usize>) = (HashMap::new(), vec![]);
    for i in 0..spmd.instrs.len() {
        let hands_on = hands_on(i).then_some(i);
        let (phase, hop) = turns[i];
        let key = Key { hop, stage: stage_of[i], micro: micro[i], phase, hands_on };
        let t = *at.entry(key).or_insert_with(|| {
            tasks.push(Task { key, instrs: vec![], after: BTreeSet::new(), cost: 0.0 });
            tasks.len() - 1
        });
        of.push(t);
        let before: Vec<usize> = inputs(i).map(|p| of[p]).filter(|p| *p != t).collect();
        tasks[t].after.extend(before);
        tasks[t].instrs.push(i);
        tasks[t].cost += if hands_on.is_some() { 0.0 } else { cost(spmd, function, i) };
    }
    Some(tasks)
}

/// Which devices hold something of a value, if not all do: the number of that set among those that have been met.
fn stage(spmd: &SpmdProgram, value: ValueId, stages: &mut Vec<Vec<bool>>) -> Option<usize> {
    let regions = &spmd.values[value.index()].regions;
    if !regions.iter().any(|r| r.is_empty()) {
        return None;
    }
    let there: Vec<bool> = regions.iter().map(|r| !r.is_empty()).collect();
    Some(stages.iter().position(|s| *s == there).unwrap_or_else(|| {
        stages.push(there);
        stages.len() - 1
    }))
}

/// By instruction: the micro-batch that it is for. What is for several is for the last of them, and what is for none (a
/// drop-out mask, a cast of a variable) for the first one that takes it.
fn micro_batches<I: Iterator<Item = usize>>(
    spmd: &SpmdProgram,
    of: &[Option<usize>],
    inputs: &dyn Fn(usize) -> I,
) -> Vec<usize> {
    let last = of.iter().flatten().max().copied().unwrap_or(0);
    let node = |i: usize| spmd.values[spmd.instrs[i].output.index()].node;
    let mut micro: Vec<Option<usize>> = (0..spmd.instrs.len()).map(|i| of[node(i).index()]).collect();
    for i in (0..micro.len()).rev() {
        let own = micro[i];
        for p in inputs(i).filter(|p| of[node(*p).index()].is_none()) {
            micro[p] = micro[p].into_iter().chain(own).min();
        }
    }
    micro.into_iter().map(|m| m.unwrap_or(last)).collect()
}

/// Puts off what is for no micro-batch, and could be made for all of them at the start (a cast of a variable, a drop-out mask),
/// to the phase and the hop in which its stage first takes it: until then it would only be in memory. What another stage takes
/// stays where it is.
fn put_off(spmd: &SpmdProgram, parts: &[Option<usize>], stage_of: &[Option<usize>], turns: &mut [(Phase, usize)]) {
    if parts.iter().all(Option::is_none) {
        return;
    }
    let made: HashMap<ValueId, usize> = spmd.instrs.iter().enumerate().map(|(i, instr)| (instr.output, i)).collect();
    // By instruction: when its stage first takes the result, and whether another one does.
    let mut taken: Vec<(Option<(Phase, usize)>, bool)> = vec![(None, false); turns.len()];
    for (i, instr) in spmd.instrs.iter().enumerate().rev() {
        let is_for_none = parts[spmd.values[instr.output.index()].node.index()].is_none();
        if let (Some(first), false) = taken[i]
            && is_for_none
        {
            turns[i] = turns[i].max(first);
        }
        for p in instr.inputs.iter().filter_map(|v| made.get(v)) {
            let (first, elsewhere) = &mut taken[*p];
            *elsewhere |= stage_of[*p] != stage_of[i];
            *first = Some(first.map_or(turns[i], |f| f.min(turns[i])));
        }
    }
}

/// By node: the micro-batch that it is for, the last one of several; None where it is for none, or for all.
pub(crate) fn parts(function: &Function) -> Vec<Option<usize>> {
    let mut of: Vec<Option<usize>> = Vec::with_capacity(function.nodes.len());
    for node in &function.nodes {
        let given = node.inputs.iter().filter_map(|n: &NodeId| of[n.index()]).max();
        let own = match &node.op {
            Prim::Slice(s) if *s.dim == *MICRO => Some(s.start),
            _ => None,
        };
        of.push(given.or(own));
    }
    of
}

/// Micro-batches that a run of a function goes in: 1 where it does not go through its batch in parts.
pub(crate) fn count(function: &Function) -> usize {
    let parts = function.nodes.iter().filter_map(|n| match &n.op {
        Prim::Slice(s) if *s.dim == *MICRO => Some(s.start + 1),
        _ => None,
    });
    parts.max().unwrap_or(1)
}

/// How long an instruction takes a device, roughly: what a pass over memory takes is worth some FLOPs.
fn cost(spmd: &SpmdProgram, function: &Function, i: usize) -> f64 {
    let value = &spmd.values[spmd.instrs[i].output.index()];
    let node = function.node(value.node);
    let held = value.regions.iter().map(|r| r.elements()).max().unwrap_or(0) as f64;
    let flops = node.op.op().flops(&function.input_types(node), &node.ty) as f64;
    flops * held / value.ty.elements().max(1) as f64 + 10.0 * held
}

fn latest(clocks: &[f64]) -> f64 {
    clocks.iter().copied().fold(0.0, f64::max)
}

/// The stages that are there when a task begins: its own, and those that hand something on to it.
fn together(tasks: &[Task], t: usize) -> impl Iterator<Item = usize> {
    let givers = tasks[t].key.hands_on.map(|_| tasks[t].after.iter().filter_map(|p| tasks[*p].key.stage));
    tasks[t].key.stage.into_iter().chain(givers.into_iter().flatten())
}

/// The order in which tasks begin; less than all of them where some wait for each other.
fn simulate(tasks: &[Task], schedule: Schedule, waiting: bool) -> Vec<usize> {
    let stages = tasks.iter().filter_map(|t| t.key.stage).max().map_or(0, |s| s + 1);
    let forward = || tasks.iter().filter(|t| t.key.phase == Phase::Forward);
    let farthest = forward().map(|t| t.key.hop).max().unwrap_or(0);
    // By stage and micro-batch: the hops at which there is still something to do backward. By stage: whether others wait for
    // some of it.
    let mut backward: HashMap<(usize, usize), Vec<(usize, Phase)>> = HashMap::new();
    let mut is_awaited = vec![false; stages];
    for Key { hop, stage, micro, phase, hands_on } in tasks.iter().map(|t| t.key) {
        if let (Some(stage), Phase::Backward | Phase::Weights, None) = (stage, phase, hands_on) {
            backward.entry((stage, micro)).or_default().push((hop, phase));
            is_awaited[stage] |= phase == Phase::Backward;
        }
    }
    // By stage and hop: the micro-batches that have been begun forward. As many hops as there are to the farthest one may a
    // stage go ahead of what has come back, by as many hops.
    let mut begun: HashMap<(usize, usize), Vec<usize>> = HashMap::new();
    let mut clocks = vec![0.0f64; stages];
    let mut done: Vec<Option<f64>> = vec![None; tasks.len()];
    let mut order = vec![];
    let mut missing: Vec<usize> = tasks.iter().map(|t| t.after.len()).collect();
    let mut ready: Vec<usize> = (0..tasks.len()).filter(|t| missing[*t] == 0).collect();
    let mut next: Vec<Vec<usize>> = vec![vec![]; tasks.len()];
    tasks.iter().enumerate().for_each(|(t, task)| task.after.iter().for_each(|p| next[*p].push(t)));
    // Who is there for a task: nobody for what is on its way while all do other work.
    let there = |t: usize| {
        let held_up = waiting || tasks[t].key.hands_on.is_none();
        together(tasks, t).filter(move |_| held_up)
    };
    while order.len() < tasks.len() {
        let begin = |t: usize| {
            let clocks = there(t).map(|s| clocks[s]).chain(tasks[t].key.stage.is_none().then_some(latest(&clocks)));
            clocks.chain(tasks[t].after.iter().filter_map(|p| done[*p])).fold(0.0, f64::max)
        };
        let candidates = &ready;
        // What all devices do holds all of them up, so it waits for what is each one's own.
        let own = |t: &usize| tasks[*t].key.stage.is_some() || tasks[*t].key.hop == 0;
        let may = |t: &usize| match tasks[*t].key {
            Key { stage: Some(s), phase: Phase::Forward, hands_on: None, hop, .. } if schedule != Schedule::GPipe => {
                let left = |m: &usize, with_weights: bool| {
                    let waits = |(back, phase): &(usize, Phase)| {
                        *back <= 2 * farthest - hop && (with_weights || *phase == Phase::Backward)
                    };
                    backward.get(&(s, *m)).is_some_and(|left| left.iter().any(waits))
                };
                let begun = begun.get(&(s, hop)).map_or(&[][..], Vec::as_slice);
                let count = |with_weights| begun.iter().filter(|m| left(m, with_weights)).count();
                count(!is_awaited[s]) <= farthest - hop && count(true) <= farthest
            }
            _ => true,
        };
        let priority = |t: usize| {
            let Key { hop, stage, micro, phase, hands_on } = tasks[t].key;
            // Backward before forward, but for GPipe.
            let turn = match (phase, schedule) {
                (Phase::Forward, Schedule::GPipe) => 0,
                (Phase::Backward, _) => 1,
                (Phase::Forward, Schedule::OneForwardOneBackward | Schedule::ZeroBubble) => 2,
                (Phase::Weights, _) => 3,
                (Phase::Update, _) => 4,
            };
            (stage.is_some(), hands_on.is_none(), turn, micro, std::cmp::Reverse(hop), t)
        };
        let first = |list: Vec<usize>| {
            let earliest = list.iter().map(|t| begin(*t)).fold(f64::INFINITY, f64::min);
            list.into_iter().filter(|t| begin(*t) <= earliest).min_by_key(|t| priority(*t))
        };
        let of = |keep: &dyn Fn(&usize) -> bool| first(candidates.iter().copied().filter(keep).collect());
        let Some(t) = of(&|t| own(t) && may(t)).or_else(|| of(&own)).or_else(|| of(&|_| true)) else { return order };
        let start = begin(t);
        let end = start + tasks[t].cost;
        there(t).for_each(|s| clocks[s] = end);
        if tasks[t].key.stage.is_none() {
            clocks.fill(end);
        }
        match tasks[t].key {
            Key { stage: Some(s), phase: Phase::Forward, hands_on: None, hop, micro } => {
                begun.entry((s, hop)).or_default().push(micro);
            }
            Key { stage: Some(s), phase: phase @ (Phase::Backward | Phase::Weights), hands_on: None, micro, hop } => {
                backward.entry((s, micro)).and_modify(|left| left.retain(|back| *back != (hop, phase)));
            }
            _ => {}
        }
        done[t] = Some(end);
        ready.retain(|r| *r != t);
        for n in &next[t] {
            missing[*n] -= 1;
            ready.extend((missing[*n] == 0).then_some(*n));
        }
        order.push(t);
    }
    order
}
