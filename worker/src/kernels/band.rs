//! Bands: steps that a thread does one after the other on a slice of what they compute.
//!
//! Roofline: what goes in and what comes out, once; the values between the steps stay in the second-level cache where a
//! slice of them fits.

use super::isa::Isa;
use super::kernel::{Kernel, Operands};
use super::vm::{LOOPS, StepContext};
use crate::pool::Pool;
use mesh::plan::{self, At, Buffer};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Operands that a step of a band may have, and results.
const OPERANDS: usize = 64;

/// A band, prepared.
pub struct BandPlan {
    slices: Vec<Slices>,
    /// How many slices there are, and bytes that a thread needs.
    count: usize,
    room: usize,
}

/// Slices of one shape.
struct Slices {
    steps: Vec<Step>,
    buffers: Vec<Buffer>,
    at: Vec<Vec<usize>>,
}

struct Step {
    kernel: Kernel,
    inputs: Vec<At>,
    outputs: Vec<At>,
    output_bytes: usize,
    scratch: usize,
    loops: Vec<Option<usize>>,
}

#[derive(Clone, Copy)]
struct Pointers<'a> {
    inputs: &'a [*const u8],
    outputs: &'a [*mut u8],
    scratch: *mut u8,
}

// SAFETY: tasks write disjoint slices of the results and rooms of their own, and only read inputs.
unsafe impl Sync for Pointers<'_> {}

impl BandPlan {
    /// Prepares a band for one instruction set.
    pub fn with_isa(band: &plan::Band, isa: Isa) -> BandPlan {
        let slices = band.slices.iter().map(|s| Slices {
            steps: s.steps.iter().map(|step| prepare(step, &s.buffers, isa)).collect(),
            buffers: s.buffers.clone(),
            at: s.at.clone(),
        });
        BandPlan { slices: slices.collect(), count: band.count(), room: band.room() }
    }

    /// Bytes of scratch: each thread's room.
    pub fn scratch_bytes(&self, threads: usize) -> usize {
        threads.min(self.count) * self.room
    }

    /// Runs it.
    ///
    /// # Safety
    /// The operands are buffers as large as the work says, and the scratch is as large as it says for the pool's threads;
    /// they do not overlap.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands, cx: StepContext) {
        let p = Pointers { inputs: o.inputs, outputs: o.outputs, scratch: o.scratch };
        let next = AtomicUsize::new(0);
        // A task for each room: it takes slice after slice.
        pool.run(pool.threads().min(self.count), &|task, workspace| {
            let p = &p;
            Pool::alone(workspace, |pool| {
                // SAFETY: by this function's contract; the room is this task's.
                let room = unsafe { p.scratch.add(task * self.room) };
                loop {
                    let mut slice = next.fetch_add(1, Ordering::Relaxed);
                    let Some(slices) = self.slices.iter().find(|s| {
                        let here = slice < s.at.len();
                        slice -= if here { 0 } else { s.at.len() };
                        here
                    }) else {
                        return;
                    };
                    for step in &slices.steps {
                        // SAFETY: as above; slices are disjoint.
                        unsafe { step.run(pool, p, room, &slices.buffers, &slices.at[slice], cx) };
                    }
                }
            });
        });
    }
}

fn prepare(step: &plan::SliceStep, buffers: &[Buffer], isa: Isa) -> Step {
    assert!(step.inputs.len().max(step.outputs.len()) <= OPERANDS, "a step of a band with so many operands");
    let output_bytes = match step.outputs.first() {
        Some(At::Inside(b)) => buffers[*b].bytes,
        // What is copied to a result covers no more than its boxes.
        Some(At::Outside { .. }) | None => 0,
    };
    Step {
        kernel: Kernel::with_isa(&step.work, isa),
        inputs: step.inputs.clone(),
        outputs: step.outputs.clone(),
        output_bytes,
        scratch: step.scratch,
        loops: step.loops.clone(),
    }
}

impl Step {
    /// Runs it on a slice, which lies `at` further on than the first one.
    ///
    /// # Safety
    /// As for [`BandPlan::run`]; the room is the caller's alone.
    unsafe fn run(
        &self,
        pool: &Pool,
        p: &Pointers,
        room: *mut u8,
        buffers: &[Buffer],
        at: &[usize],
        mut cx: StepContext,
    ) {
        let further = |strides: &[usize]| strides.iter().zip(at).map(|(s, n)| s * n).sum::<usize>();
        let mut inputs = [std::ptr::null::<u8>(); OPERANDS];
        let mut outputs = [std::ptr::null_mut::<u8>(); OPERANDS];
        // SAFETY: by this function's contract the slice lies inside the operands, and its buffers inside the room.
        unsafe {
            for (to, place) in inputs.iter_mut().zip(&self.inputs) {
                *to = match place {
                    At::Inside(b) => room.add(buffers[*b].offset).cast_const(),
                    At::Outside { operand, strides } => p.inputs[*operand].add(further(strides)),
                };
            }
            for (to, place) in outputs.iter_mut().zip(&self.outputs) {
                *to = match place {
                    At::Inside(b) => room.add(buffers[*b].offset),
                    At::Outside { operand, strides } => p.outputs[*operand].add(further(strides)),
                };
            }
        }
        debug_assert!(self.loops.iter().flatten().all(|l| *l < LOOPS));
        for (n, l) in at.iter().zip(&self.loops) {
            if let Some(l) = l {
                cx.further[*l] = *n;
            }
        }
        let operands = Operands {
            inputs: &inputs[..self.inputs.len()],
            outputs: &outputs[..self.outputs.len()],
            output_bytes: self.output_bytes,
            // SAFETY: as above.
            scratch: unsafe { room.add(buffers[self.scratch].offset) },
        };
        // SAFETY: as above.
        unsafe { self.kernel.compute(pool, &operands, cx) };
    }
}
