//! Sums of gradients and updates of variables where their gradients come, so that a gradient goes at once.
//!
//! The update of a variable is put right behind its gradient, or behind the last that the passes read of the variable,
//! since it is set in place. A gradient that is larger than what it is made of waits for that too: a product whose
//! epilogue is the update need not be stored at all. An update that waits for other devices stays at the end, so that the
//! backward pass need not wait for them.

use super::{Instr, SpmdOp, SpmdProgram, ValueId};
use crate::graph::Role;
use crate::program::Function;
use std::collections::HashSet;

/// Where an instruction comes: at the place that one has, before it, or behind it.
type Place = (usize, Side);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Before,
    There,
    Behind,
}

/// The program with each sum of gradients right behind the last of what it adds.
pub(super) fn add_up_at_once(program: SpmdProgram) -> SpmdProgram {
    let sums: HashSet<ValueId> = program.sums.iter().copied().collect();
    let mut made: Vec<Option<usize>> = vec![None; program.values.len()];
    let mut places = Vec::with_capacity(program.instrs.len());
    for (i, instr) in program.instrs.iter().enumerate() {
        let last = instr.inputs.iter().filter_map(|v| made[v.index()]).max();
        let at = last.filter(|_| sums.contains(&instr.output)).unwrap_or(i);
        made[instr.output.index()] = Some(at);
        places.push(place(at, i));
    }
    in_places(program, &places)
}

/// The program with each update where its gradient comes.
pub(super) fn as_gradients_come(program: SpmdProgram, function: &Function) -> SpmdProgram {
    let mut places = places(&program, function);
    wait_for_updates(&mut places, &program, function);
    in_places(program, &places)
}

/// The place of an instruction that comes behind the one at `at`, or stays.
fn place(at: usize, own: usize) -> Place {
    (at, if at == own { Side::There } else { Side::Behind })
}

/// The program with its instructions in their places; of those that come to one place, inputs before users.
fn in_places(mut program: SpmdProgram, places: &[Place]) -> SpmdProgram {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by_key(|i| (places[*i], *i));
    debug_assert!(in_order(&program, &order), "inputs come before users");
    let mut instrs: Vec<Option<Instr>> = program.instrs.into_iter().map(Some).collect();
    program.instrs = order.into_iter().filter_map(|i| instrs[i].take()).collect();
    program
}

/// Whether instructions in an order have their inputs before them.
fn in_order(program: &SpmdProgram, order: &[usize]) -> bool {
    let mut at = vec![0; program.values.len()];
    order.iter().enumerate().for_each(|(n, i)| at[program.instrs[*i].output.index()] = n);
    let mut all = order.iter().enumerate();
    all.all(|(n, i)| program.instrs[*i].inputs.iter().all(|v| at[v.index()] <= n))
}

/// By instruction: the last of what it takes, if it is to come right behind that; else its own place.
fn places(program: &SpmdProgram, function: &Function) -> Vec<Place> {
    let read = last_read(program, function);
    let mut made: Vec<Option<usize>> = vec![None; program.values.len()];
    let mut waits = vec![false; program.values.len()];
    let mut places = Vec::with_capacity(program.instrs.len());
    for (i, instr) in program.instrs.iter().enumerate() {
        let updates = role(program, function, instr) == Role::Update;
        let behind = |v: &ValueId| made[v.index()].or(updates.then_some(read[v.index()]));
        let last = instr.inputs.iter().filter_map(behind).max();
        let sends = !matches!(instr.op, SpmdOp::Compute { .. });
        let output = instr.output.index();
        waits[output] = sends || updates && instr.inputs.iter().any(|v| waits[v.index()]);
        // What is made of nothing is the first; nothing comes later than it was.
        let at = if updates && !waits[output] { last.unwrap_or(0).min(i) } else { i };
        made[output] = Some(at);
        places.push(place(at, i));
    }
    places
}

/// Has gradients that are larger than what they are made of wait for the updates that they are for, and what is made of
/// them on the way as well.
fn wait_for_updates(places: &mut [Place], program: &SpmdProgram, function: &Function) {
    // By value: where it is there in time for the first of its readers, if all of them are updates.
    let none = (usize::MAX, Side::There);
    let mut first: Vec<Option<Place>> = vec![Some(none); program.values.len()];
    program.outputs.iter().for_each(|(_, v)| first[v.index()] = None);
    for (i, instr) in program.instrs.iter().enumerate().rev() {
        let bytes = |v: &ValueId| program.values[v.index()].most_bytes();
        let waits = match role(program, function, instr) {
            Role::Update => program.values[instr.output.index()].ty.elements() > 1,
            Role::Gradient => bytes(&instr.output) > instr.inputs.iter().map(bytes).sum(),
            Role::Forward | Role::Backward | Role::Variable => false,
        };
        let computes = matches!(instr.op, SpmdOp::Compute { .. });
        if let Some(at) = first[instr.output.index()].filter(|at| waits && computes && *at < none) {
            places[i] = places[i].max(at);
        }
        let updates = role(program, function, instr) == Role::Update;
        let own = if places[i] == (i, Side::There) { (i, Side::Before) } else { places[i] };
        for v in &instr.inputs {
            first[v.index()] = first[v.index()].filter(|_| updates).map(|at| at.min(own));
        }
    }
}

/// By value: the last instruction of the passes that reads it, or what is made of it element by element, which may be done
/// only where that is read.
fn last_read(program: &SpmdProgram, function: &Function) -> Vec<usize> {
    let mut read: Vec<usize> = vec![0; program.values.len()];
    for (i, instr) in program.instrs.iter().enumerate().rev() {
        let node = function.node(program.values[instr.output.index()].node);
        if node.role != Role::Update {
            let op = node.op.op();
            let later = if op.elementwise() || op.copies() { read[instr.output.index()] } else { 0 };
            instr.inputs.iter().for_each(|v| read[v.index()] = read[v.index()].max(i).max(later));
        }
    }
    read
}

fn role(program: &SpmdProgram, function: &Function, instr: &Instr) -> Role {
    function.node(program.values[instr.output.index()].node).role
}
