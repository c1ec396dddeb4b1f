//! What was sent once is not sent again where there is room to keep it.
//!
//! The backward pass makes cheap forward values again, and what is inside of recompute regions; layers make the same of one
//! value (a mask, say) each by itself. Where such a value moves, or a sum of it is finished by several devices, all of them
//! would send the same again. Here they take what was sent first, and what was made for the sending alone is not made. That
//! is for the bytes to decide: what is kept takes memory from its first use to its last, and where a function takes much, that may
//! be a [`SHARE`]th of its peak at the most. So a mask is gathered once, a value whose moved form takes the place of
//! the unmoved one as well, and large gathers again where they are used again.

use super::{Instr, SpmdOp, SpmdProgram, Value, ValueId};
use crate::plan::fuse::Fused;
use std::collections::{HashMap, HashSet};

/// So large a part of the estimated peak may what is kept take in addition where a function takes much.
const SHARE: usize = 64;
/// From this part of its peak on a function takes much: bytes are estimated before steps are fused and ordered.
const MUCH: f64 = 0.75;

/// The program with each value moved, or summed up, once only where that takes hardly more memory.
pub(super) fn share(mut program: SpmdProgram) -> SpmdProgram {
    let mut same = repeated(&program);
    if same.is_empty() {
        return program;
    }
    let memory = Memory::of(&program);
    // By value: the one that it is.
    let own: Vec<ValueId> = (0..program.values.len() as u32).map(ValueId).collect();
    let (before, _) = memory.alive(&program, &own);
    let peak = before.iter().copied().max().unwrap_or(0);
    let much = (peak as f64 * MUCH) as usize;
    let room = |kept: &[ValueId]| {
        let (alive, _) = memory.alive(&program, kept);
        alive.iter().zip(&before).all(|(now, before)| *now <= (before + peak / SHARE).max(much))
    };
    // All at once, if there is room; else one after the other, the smallest first.
    let mut kept = own.clone();
    same.iter().for_each(|(again, first)| kept[again.index()] = *first);
    if !room(&kept) {
        kept.clone_from(&own);
        same.sort_by_key(|(again, _)| memory.bytes[again.index()]);
        for (again, first) in same {
            kept[again.index()] = first;
            if !room(&kept) {
                kept[again.index()] = again;
            }
        }
    }
    let (_, made) = memory.alive(&program, &kept);
    for instr in &mut program.instrs {
        instr.inputs.iter_mut().for_each(|v| *v = kept[v.index()]);
    }
    let results = program.outputs.iter_mut().map(|(_, v)| v).chain(program.assigns.iter_mut().map(|(_, v)| v));
    results.chain(&mut program.sums).for_each(|v| *v = kept[v.index()]);
    program.instrs.retain(|i| made[i.output.index()]);
    program.kept =
        kept.into_iter().enumerate().filter(|(v, first)| first.index() != *v).map(|(_, first)| first).collect();
    program
}

/// Whether an instruction sends.
fn sends(program: &SpmdProgram, instr: &Instr) -> bool {
    let held = &program.values[instr.inputs.first().map_or(0, |v| v.index())].regions;
    let comes = &program.values[instr.output.index()].regions;
    let mut both = held.iter().zip(&**comes);
    match &instr.op {
        SpmdOp::Compute { .. } | SpmdOp::Join { .. } => false,
        SpmdOp::Move => !both.all(|(held, comes)| held.contains(comes)),
        SpmdOp::AllReduce { .. } => true,
    }
}

/// What is sent although the same was sent before: the value, and the first one that is it.
fn repeated(program: &SpmdProgram) -> Vec<(ValueId, ValueId)> {
    // The first value that is the same.
    let mut first: Vec<ValueId> = (0..program.values.len() as u32).map(ValueId).collect();
    let mut known: HashMap<(&str, Vec<ValueId>), Vec<usize>> = HashMap::new();
    let mut found = vec![];
    for (i, instr) in program.instrs.iter().enumerate() {
        let inputs = instr.inputs.iter().map(|v| first[v.index()]).collect();
        let name = match &instr.op {
            SpmdOp::Compute { prim, .. } => prim.op().name(),
            SpmdOp::Move => "move",
            SpmdOp::AllReduce { .. } => "all-reduce",
            SpmdOp::Join { .. } => "join",
        };
        let alike = known.entry((name, inputs)).or_default();
        match alike.iter().find(|j| same(program, &program.instrs[**j], instr)) {
            Some(&j) => {
                let earlier = program.instrs[j].output;
                first[instr.output.index()] = earlier;
                if sends(program, instr) {
                    found.push((instr.output, earlier));
                }
            }
            None => alike.push(i),
        }
    }
    found
}

/// Whether two instructions on the same inputs give the same.
fn same(program: &SpmdProgram, a: &Instr, b: &Instr) -> bool {
    let [x, y] = [a, b].map(|i| &program.values[i.output.index()]);
    let op = match (&a.op, &b.op) {
        (SpmdOp::Compute { prim: p, sum: s }, SpmdOp::Compute { prim: q, sum: t }) => p == q && s == t,
        (SpmdOp::Move, SpmdOp::Move) => true,
        (SpmdOp::AllReduce { f, sum, .. }, SpmdOp::AllReduce { f: g, sum: other, .. }) => f == g && sum == other,
        _ => false,
    };
    op && x.ty == y.ty && x.nodes == y.nodes && x.regions == y.regions
}

/// What values take while they are there, as far as that is known before they are fused and ordered.
struct Memory {
    /// By value: the most that a device holds of it.
    bytes: Vec<usize>,
    /// By value: whether it is computed inside of what uses it, and never stored.
    inside: Vec<bool>,
    /// By instruction: what a device receives of others' parts, to finish sums of them.
    received: Vec<usize>,
    /// What is there until the end.
    results: HashSet<ValueId>,
}

impl Memory {
    fn of(program: &SpmdProgram) -> Memory {
        let results = program.outputs.iter().map(|(_, v)| *v).chain(program.assigns.iter().map(|(_, v)| *v));
        let stored: HashSet<ValueId> = Fused::new(program, 1).groups.into_iter().flat_map(|g| g.outputs).collect();
        let mut bytes: Vec<usize> = program.values.iter().map(Value::most_bytes).collect();
        // What a variable is set to lies in the variable's place.
        program.assigns.iter().for_each(|(_, v)| bytes[v.index()] = 0);
        Memory {
            inside: (0..program.values.len() as u32).map(|v| !stored.contains(&ValueId(v))).collect(),
            bytes,
            received: program.instrs.iter().map(|i| received(program, i)).collect(),
            results: results.collect(),
        }
    }

    /// The bytes that are there at each instruction, and by value whether it is made at all, if values are others instead.
    fn alive(&self, program: &SpmdProgram, instead: &[ValueId]) -> (Vec<usize>, Vec<bool>) {
        // By value: the last instruction for which it is there. What is computed inside is computed where it is used.
        let mut last: Vec<Option<usize>> = vec![None; self.bytes.len()];
        let end = program.instrs.len();
        self.results.iter().for_each(|v| last[instead[v.index()].index()] = Some(end));
        let mut changes = vec![0isize; end + 2];
        let mut made = vec![false; self.bytes.len()];
        for (i, instr) in program.instrs.iter().enumerate().rev() {
            let Some(until) = last[instr.output.index()] else { continue };
            made[instr.output.index()] = true;
            let received = self.received[i] as isize;
            changes[i] += received;
            changes[i + 1] -= received;
            if !self.inside[instr.output.index()] {
                let bytes = self.bytes[instr.output.index()] as isize;
                changes[i] += bytes;
                changes[until + 1] -= bytes;
            }
            let used = if self.inside[instr.output.index()] { until } else { i };
            for input in &instr.inputs {
                let input = instead[input.index()].index();
                last[input] = last[input].max(Some(used));
            }
        }
        for (_, v) in &program.inputs {
            let bytes = self.bytes[v.index()] as isize;
            changes[0] += bytes;
            changes[last[v.index()].unwrap_or(0) + 1] -= bytes;
        }
        let alive = changes.iter().scan(0isize, |alive, change| {
            *alive += change;
            Some(alive.unsigned_abs())
        });
        (alive.collect(), made)
    }
}

/// The most bytes of others' parts that a device receives in an instruction, to finish sums of them.
fn received(program: &SpmdProgram, instr: &Instr) -> usize {
    let SpmdOp::AllReduce { groups, .. } = &instr.op else { return 0 };
    let parts = &program.values[instr.inputs[0].index()];
    let of = |d: usize| {
        let others: usize = groups[d].iter().filter(|e| **e != d).map(|e| parts.nodes[*e]).sum();
        others * parts.regions[d].elements() * parts.ty.dtype.bytes() / groups[d].len()
    };
    (0..groups.len()).map(of).max().unwrap_or(0)
}
