//! Epilogues: loops that take the results of a product while they lie in the cache.
//!
//! Roofline: a map over a product's result reads it again and writes its own results; as an epilogue it only writes them.

use super::isa::Isa;
use super::lanes::store;
use super::vm::{BLOCK, Evaluation, Machine, StepContext, Use};
use mesh::body::Loop;
use mesh::dim::DType;

/// An epilogue, prepared.
pub struct Epilogue {
    isa: Isa,
    machine: Machine,
    /// The dtypes of the results if all of them are just the product.
    narrows: Option<Vec<DType>>,
}

/// Floats of workspace for an epilogue, if there is one.
pub fn registers(epilogue: &Option<Epilogue>) -> usize {
    epilogue.as_ref().map_or(0, |e| e.machine.workspace().next_multiple_of(16))
}

impl Epilogue {
    /// Prepares a loop whose last operand is given, for one instruction set.
    pub fn new(nest: &Loop, isa: Isa) -> Epilogue {
        let machine = Machine::new(nest, isa, Use::Epilogue, |_| true).0;
        let narrows = machine.only_given().then(|| machine.results.iter().map(|r| r.1).collect());
        Epilogue { isa, machine, narrows }
    }

    /// Begins with as many registers as [`registers`] says.
    ///
    /// # Safety
    /// As for [`Machine::evaluation`], with the operands that lie in memory.
    pub unsafe fn begin<'a>(&'a self, cx: StepContext, o: &'a [*const u8], registers: &'a mut [f32]) -> Evaluation<'a> {
        // SAFETY: by this function's contract.
        unsafe { self.machine.evaluation(cx, o, registers) }
    }

    /// Takes `n` neighbouring elements of the product's result, from `first` on, and stores what becomes of them.
    ///
    /// # Safety
    /// They lie at `from`; `to` are the results' buffers, of which no one else uses these elements.
    pub unsafe fn take(
        &self,
        e: &mut Evaluation,
        mut first: usize,
        mut from: *const f32,
        mut n: usize,
        to: &[*mut u8],
    ) {
        if let Some(dtypes) = &self.narrows {
            for (to, dtype) in to.iter().zip(dtypes) {
                // SAFETY: by this function's contract.
                unsafe { store(self.isa, *dtype, from.cast(), to.add(first * dtype.bytes()), n) };
            }
            return;
        }
        let m = &self.machine;
        let d = m.extents.len();
        let columns = m.extents[d - 1];
        while n > 0 {
            let mut at = [0usize; 16];
            let mut outer = first;
            for l in (0..d).rev() {
                at[l] = outer % m.extents[l];
                outer /= m.extents[l];
            }
            let (rows, columns) = if at[d - 1] == 0 && n >= columns && columns <= BLOCK {
                ((n / columns).min(m.rows_per_block()).min(m.extents[d - 2] - at[d - 2]), columns)
            } else {
                (1, n.min(columns - at[d - 1]).min(BLOCK))
            };
            e.give(from.cast());
            // SAFETY: by this function's contract; an operand that shares memory with a result is read just where that
            // is written, before it is.
            unsafe {
                e.store(&at[..d], rows, columns, first, to);
                from = from.add(rows * columns);
            }
            (first, n) = (first + rows * columns, n - rows * columns);
        }
    }
}
