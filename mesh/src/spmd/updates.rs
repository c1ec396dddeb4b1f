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

/// The program in that order.
pub(super) fn as_gradients_come(mut program: SpmdProgram, function: &Function) -> SpmdProgram {
    let mut keys = keys(&program, function);
    wait_for_updates(&mut keys, &program, function);
    // First the one that is there, and inputs before users.
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by_key(|i| (keys[*i], keys[*i] != *i, *i));
    let mut instrs: Vec<Option<Instr>> = program.instrs.into_iter().map(Some).collect();
    program.instrs = order.into_iter().filter_map(|i| instrs[i].take()).collect();
    program
}

/// By instruction: the one that it comes right behind, or itself.
fn keys(program: &SpmdProgram, function: &Function) -> Vec<usize> {
    let sums: HashSet<ValueId> = program.sums.iter().copied().collect();
    let read = last_read(program, function);
    let mut place: Vec<Option<usize>> = vec![None; program.values.len()];
    let mut waits = vec![false; program.values.len()];
    let mut keys = Vec::with_capacity(program.instrs.len());
    for (i, instr) in program.instrs.iter().enumerate() {
        let updates = role(program, function, instr) == Role::Update;
        let behind = |v: &ValueId| place[v.index()].or(updates.then_some(read[v.index()]));
        let last = instr.inputs.iter().filter_map(behind).max();
        let sends = !matches!(instr.op, SpmdOp::Compute { .. });
        let output = instr.output.index();
        waits[output] = sends || updates && instr.inputs.iter().any(|v| waits[v.index()]);
        let at_once = sums.contains(&instr.output) || updates && !waits[output];
        // What is made of nothing is the first.
        let at = if at_once { last.unwrap_or(0) } else { i };
        place[output] = Some(at);
        keys.push(at);
    }
    keys
}

/// Has gradients that are larger than what they are made of wait for the updates that they are for, and what is made of
/// them on the way as well.
fn wait_for_updates(keys: &mut [usize], program: &SpmdProgram, function: &Function) {
    // By value: the first of its readers, if all of them are updates.
    let mut first: Vec<Option<usize>> = vec![Some(usize::MAX); program.values.len()];
    program.outputs.iter().for_each(|(_, v)| first[v.index()] = None);
    for (i, instr) in program.instrs.iter().enumerate().rev() {
        let bytes = |v: &ValueId| program.values[v.index()].bytes(0);
        let waits = match role(program, function, instr) {
            Role::Update => program.values[instr.output.index()].ty.elements() > 1,
            Role::Gradient => bytes(&instr.output) > instr.inputs.iter().map(bytes).sum(),
            Role::Forward | Role::Backward | Role::Variable => false,
        };
        let computes = matches!(instr.op, SpmdOp::Compute { .. });
        if let Some(at) = first[instr.output.index()].filter(|at| waits && computes && *at < usize::MAX) {
            keys[i] = keys[i].max(at);
        }
        let updates = role(program, function, instr) == Role::Update;
        for v in &instr.inputs {
            first[v.index()] = first[v.index()].filter(|_| updates).map(|at| at.min(keys[i]));
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
