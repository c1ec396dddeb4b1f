//! Fused elementwise loops.

use super::isa::Isa;
use super::vm::{BLOCK, Evaluation, Machine, StepContext, Use};
use crate::pool::Pool;
use mesh::body::Loop;

/// A fused loop, prepared.
pub struct MapPlan {
    machine: Machine,
    /// Blocks: along the rows' loop and along the columns' loop.
    rows: usize,
    row_blocks: usize,
    column_blocks: usize,
    blocks: usize,
}

#[derive(Clone, Copy)]
struct Pointers<'a>(&'a [*const u8], &'a [*mut u8]);

// SAFETY: tasks write disjoint parts of the results and only read operands.
unsafe impl Sync for Pointers<'_> {}
// SAFETY: as above.
unsafe impl Send for Pointers<'_> {}

impl MapPlan {
    /// Prepares a loop for the best instruction set.
    pub fn new(nest: &Loop) -> MapPlan {
        MapPlan::with_isa(nest, Isa::detect())
    }

    /// Prepares a loop for one instruction set.
    pub fn with_isa(nest: &Loop, isa: Isa) -> MapPlan {
        let (machine, _) = Machine::new(nest, isa, Use::default(), |_| true);
        let d = machine.extents.len();
        let (m, n) = (machine.extents[d - 2], machine.extents[d - 1]);
        let rows = machine.rows_per_block().min(m.max(1));
        let (row_blocks, column_blocks) = (m.div_ceil(rows), n.div_ceil(BLOCK));
        let outer: usize = machine.extents[..d - 2].iter().product();
        MapPlan { machine, rows, row_blocks, column_blocks, blocks: outer * row_blocks * column_blocks }
    }

    /// Runs the loop: result `r` is stored contiguously in loop order at `results[r]`.
    ///
    /// # Safety
    /// Operands and results are buffers large enough for the loop nest. A result may be an operand's memory if that
    /// operand is read at just the points where the result is written and has elements of the same size; otherwise
    /// nothing overlaps.
    pub unsafe fn run(&self, pool: &Pool, operands: &[*const u8], results: &[*mut u8], cx: StepContext) {
        let pointers = Pointers(operands, results);
        let tasks = if pool.threads() == 1 || self.blocks < 16 { 1 } else { (pool.threads() * 4).min(self.blocks) };
        pool.run(tasks, &|t, workspace| {
            let pointers = pointers;
            let range = self.blocks * t / tasks..self.blocks * (t + 1) / tasks;
            // SAFETY: by this function's contract; each block is done by one task.
            unsafe {
                let mut evaluation = self.machine.evaluation(cx, pointers.0, workspace.floats());
                range.for_each(|b| self.block(b, &mut evaluation, pointers.1));
            }
        });
    }

    unsafe fn block(&self, b: usize, evaluation: &mut Evaluation, to: &[*mut u8]) {
        let m = &self.machine;
        let d = m.extents.len();
        let mut at = [0usize; 16];
        let (columns_at, rest) = (b % self.column_blocks * BLOCK, b / self.column_blocks);
        let (rows_at, mut outer) = (rest % self.row_blocks * self.rows, rest / self.row_blocks);
        at[d - 1] = columns_at;
        at[d - 2] = rows_at;
        for l in (0..d - 2).rev() {
            at[l] = outer % m.extents[l];
            outer /= m.extents[l];
        }
        let rows = self.rows.min(m.extents[d - 2] - rows_at);
        let columns = BLOCK.min(m.extents[d - 1] - columns_at);
        // SAFETY: by the contract of `run`.
        unsafe { evaluation.block(&at[..d], rows, columns, to) };
    }
}
