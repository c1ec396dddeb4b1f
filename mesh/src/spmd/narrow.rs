//! A sum of which each device needs a part is finished as that part: a reduce-scatter in place of an all-reduce.
//!
//! So it is where a gradient lies whole and the update of the variable is split. What is made of gradients element by
//! element in between is then made of the part as well.

use super::{SpmdOp, SpmdProgram, Value, ValueId, needs};
use crate::graph::Role;
use crate::plan::{Together, all_reduce};
use crate::program::Function;
use crate::region::Region;
use std::sync::Arc;

/// The program with finished sums in parts where that sends fewer bytes.
pub(super) fn narrow(mut program: SpmdProgram, function: &Function) -> SpmdProgram {
    let candidates = candidates(&program, function);
    // By value: what its readers need on each device. None while there are no readers.
    let mut needed: Vec<Option<Arc<[Region]>>> = vec![None; program.values.len()];
    let results = program.outputs.iter().map(|(_, v)| *v).chain(program.assigns.iter().map(|(_, v)| *v));
    for v in results.collect::<Vec<ValueId>>() {
        needed[v.index()] = Some(program.values[v.index()].regions.clone());
    }
    for i in (0..program.instrs.len()).rev() {
        let output = program.instrs[i].output.index();
        if let Some(part) = needed[output].take().filter(|part| may_shrink(function, &program.values[output], part))
            && candidates[output]
        {
            let less = match &program.instrs[i].op {
                SpmdOp::Move | SpmdOp::Join { .. } => false,
                SpmdOp::Compute { .. } => true,
                SpmdOp::AllReduce { .. } => {
                    sent(&program, i, &part) < sent(&program, i, &program.values[output].regions)
                }
            };
            if less {
                program.values[output].regions = part;
            }
        }
        for (at, input) in program.instrs[i].inputs.iter().enumerate().filter(|(_, v)| candidates[v.index()]) {
            let read = reads(&program, function, i, at);
            let hull = match needed[input.index()].take() {
                Some(before) if before == read => before,
                Some(before) => before.iter().zip(&*read).map(|(a, b)| a.hull(b)).collect(),
                None => read,
            };
            needed[input.index()] = Some(hull);
        }
    }
    program
}

/// By value: whether it is a finished sum, or made of gradients element by element. No other one is ever less.
fn candidates(program: &SpmdProgram, function: &Function) -> Vec<bool> {
    let mut candidates = vec![false; program.values.len()];
    for instr in &program.instrs {
        let output = instr.output.index();
        candidates[output] = match &instr.op {
            SpmdOp::Move | SpmdOp::Join { .. } => false,
            SpmdOp::Compute { prim, sum } => {
                let role = function.node(program.values[output].node).role;
                sum.is_none() && role == Role::Gradient && prim.op().elementwise()
            }
            SpmdOp::AllReduce { .. } => true,
        };
    }
    candidates
}

/// Whether a value may be these parts of it alone: no rule of its own says otherwise, and nobody is left with nothing.
fn may_shrink(function: &Function, value: &Value, part: &[Region]) -> bool {
    let mut both = value.regions.iter().zip(part);
    *value.regions != *part
        && function.node(value.node).layout.is_none()
        && both.all(|(held, part)| held.contains(part) && held.is_empty() == part.is_empty())
}

/// What an instruction reads of an input on each device.
fn reads(program: &SpmdProgram, function: &Function, i: usize, input: usize) -> Arc<[Region]> {
    let instr = &program.instrs[i];
    let held = &program.values[instr.inputs[input].index()];
    let output = &program.values[instr.output.index()];
    match &instr.op {
        // Element by element, of just those dimensions.
        SpmdOp::Compute { prim, sum: None }
            if prim.op().elementwise()
                && held.ty.dims == output.ty.dims
                && !output.regions.iter().any(|r| r.is_empty()) =>
        {
            output.regions.clone()
        }
        SpmdOp::Compute { prim, .. } => {
            let types = function.input_types(function.node(output.node));
            let read = |d| needs(prim.op(), input, &types, &output.ty, &program.iteration(function, instr, d));
            (0..held.regions.len()).map(read).collect()
        }
        // What the device does not have comes from one that sends it.
        SpmdOp::Move => {
            let both = held.regions.iter().zip(&*output.regions);
            both.map(|(held, comes)| if held.contains(comes) { comes } else { held }.clone()).collect()
        }
        SpmdOp::AllReduce { .. } | SpmdOp::Join { .. } => held.regions.clone(),
    }
}

/// Bytes that all devices send to finish a sum as `done`.
fn sent(program: &SpmdProgram, i: usize, done: &[Region]) -> usize {
    let instr = &program.instrs[i];
    let SpmdOp::AllReduce { f, sum, groups } = &instr.op else { return 0 };
    let parts = &program.values[instr.inputs[0].index()];
    let send = |d: usize| {
        let together = Together::new(sum, &groups[d]);
        all_reduce(*f, parts.ty.dtype, &together, &parts.regions, done, d).sent_bytes()
    };
    (0..done.len()).map(send).sum()
}
