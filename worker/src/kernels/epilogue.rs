//! Epilogues: loops that take the results of a product while they lie in the cache.
//!
//! Roofline: a loop over a product's result reads it again and writes its own results; as an epilogue it only writes them.
//!
//! What it reduces is what leaves have of a plane, the two loops before the innermost one, each in one task; what is left to
//! do then is a reduction of those sums ([`mesh::body::Reduction::rest`]).

use super::fold::{Fold, Rows};
use super::isa::Isa;
use super::lanes::store;
use super::reduce::{ReducePlan, collapses};
use super::vm::{BLOCK, Evaluation, Machine, StepContext, Use};
use crate::pool::Pool;
use mesh::dim::DType;
use mesh::plan;
use std::ops::Range;

/// An epilogue, prepared.
pub struct Epilogue {
    isa: Isa,
    machine: Machine,
    /// The dtypes of the results if all of them are just the product.
    narrows: Option<Vec<DType>>,
    sums: Option<Sums>,
}

/// Results that an epilogue reduces at most; fusion joins fewer.
const SUMS: usize = 16;

/// What an epilogue reduces.
struct Sums {
    fold: Fold,
    /// The chunks of the two loops before the innermost one.
    chunks: [Vec<Range<usize>>; 2],
    /// What is done with the sums of planes' parts.
    finish: ReducePlan,
    /// Those sums that a result has, and how many rows along the innermost two loops.
    size: usize,
    rows: usize,
}

/// Floats of workspace for an epilogue, if there is one.
pub fn registers(epilogue: &Option<Epilogue>) -> usize {
    epilogue.as_ref().map_or(0, |e| e.machine.workspace().next_multiple_of(16))
}

/// Bytes of scratch for an epilogue, if there is one.
pub fn scratch_bytes(epilogue: &Option<Epilogue>) -> usize {
    let sums = epilogue.as_ref().and_then(|e| Some((e, e.sums.as_ref()?)));
    sums.map_or(0, |(e, sums)| e.sum_bytes(sums).iter().sum::<usize>() + sums.finish.scratch_bytes())
}

impl Epilogue {
    /// Prepares a loop whose last operand is given, for one instruction set.
    pub fn new(of: &plan::Epilogue, isa: Isa) -> Epilogue {
        let given = |summed| Use { given: true, summed };
        let (machine, sums) = match of {
            plan::Epilogue::Map(nest) => (Machine::new(nest, isa, given(0), |_| true).0, None),
            plan::Epilogue::Reduce(r) => {
                assert!(r.sums() <= SUMS, "an epilogue of {} sums", r.sums());
                let machine = Machine::new(&r.nest, isa, given(r.sums()), collapses(&r.reduced)).0;
                let (fold, rest) = (Fold::new(isa, r.f, machine.summed()[0].1), r.rest(2));
                let chunks = r.chunks().last_chunk::<2>().cloned().expect("planes are reduced");
                let (size, d) = (rest.nest.extents.iter().product(), machine.extents.len());
                let rows = machine.extents[..d - 2].iter().product();
                (machine, Some(Sums { fold, chunks, finish: ReducePlan::with_isa(&rest, isa), size, rows }))
            }
        };
        let narrows = machine.only_given().then(|| machine.results.iter().map(|r| r.1).collect());
        Epilogue { isa, machine, narrows, sums }
    }

    /// Bytes of the sums of planes' parts, and of the sums of runs that have begun, one for each row.
    fn sum_bytes(&self, sums: &Sums) -> [usize; 2] {
        let (width, count) = (self.machine.extents.last().unwrap_or(&1), self.machine.summed().len());
        [sums.size, sums.rows * width].map(|n| (count * n * 4).next_multiple_of(plan::ALIGN))
    }

    /// If it reduces, the chunks of the loop of rows: one task has to give it all that those have of a plane, in order.
    pub fn chunks(&self) -> Option<&[Range<usize>]> {
        self.sums.as_ref().map(|s| &s.chunks[0][..])
    }

    /// Begins with as many registers as [`registers`] says.
    ///
    /// # Safety
    /// As for [`Machine::evaluation`], with the operands that lie in memory.
    pub unsafe fn begin<'a>(&'a self, cx: StepContext, o: &'a [*const u8], registers: &'a mut [f32]) -> Evaluation<'a> {
        // SAFETY: by this function's contract.
        unsafe { self.machine.evaluation(cx, o, registers) }
    }

    /// Takes `n` neighbouring elements of the product's result, from `first` on: stores what becomes of them, and adds what is
    /// reduced to sums in the scratch.
    ///
    /// # Safety
    /// They lie at `from`; `to` are the results' buffers and `scratch` has as much room as asked for, and no one else uses
    /// there what belongs to these elements or to what their leaf has of their plane.
    pub unsafe fn take(
        &self,
        e: &mut Evaluation,
        first: usize,
        mut from: *const f32,
        mut n: usize,
        to: &[*mut u8],
        scratch: *mut f32,
    ) {
        if let Some(dtypes) = &self.narrows {
            for (to, dtype) in to.iter().zip(dtypes) {
                // SAFETY: by this function's contract.
                unsafe { store(self.isa, *dtype, from.cast(), to.add(first * dtype.bytes()), n) };
            }
            return;
        }
        if n == 0 {
            return;
        }
        let m = &self.machine;
        let d = m.extents.len();
        let to = &to[..to.len() - m.summed().len()];
        let mut at = [0usize; 16];
        let mut outer = first;
        for l in (0..d).rev() {
            at[l] = outer % m.extents[l];
            outer /= m.extents[l];
        }
        while n > 0 {
            let columns = m.extents[d - 1];
            let (rows, columns) = if at[d - 1] == 0 && n >= columns && columns <= BLOCK {
                ((n / columns).min(m.rows_per_block()).min(m.extents[d - 2] - at[d - 2]), columns)
            } else {
                (1, n.min(columns - at[d - 1]).min(BLOCK))
            };
            e.give(from.cast());
            // SAFETY: by this function's contract; an operand that shares memory with a result is read just where that
            // is written, before it is.
            unsafe {
                e.block(&at[..d], rows, columns, to);
                if let Some(sums) = &self.sums {
                    self.sum(sums, e, &at[..d], [rows, columns], scratch);
                }
                from = from.add(rows * columns);
            }
            n -= rows * columns;
            at[d - 1] += columns;
            if at[d - 1] < m.extents[d - 1] {
                continue;
            }
            (at[d - 1], at[d - 2]) = (0, at[d - 2] + rows);
            for l in (0..d - 1).rev() {
                if at[l] < m.extents[l] || l == 0 {
                    break;
                }
                at[l] = 0;
                at[l - 1] += 1;
            }
        }
    }

    /// Adds what is reduced of a block, from a point of the nest on, to the sums.
    ///
    /// # Safety
    /// As for [`Epilogue::take`].
    unsafe fn sum(&self, sums: &Sums, e: &Evaluation, at: &[usize], [rows, columns]: [usize; 2], scratch: *mut f32) {
        let (extents, [lines, chunks]) = (&self.machine.extents, &sums.chunks);
        let &[ref outer @ .., line, row, column] = at else { return };
        let &[.., height, _, width] = &extents[..] else { return };
        let plane = outer.iter().zip(extents).fold(0, |i, (a, e)| i * e + a);
        let part = lines.partition_point(|l| l.end <= line);
        let place = (plane * lines.len() + part) * chunks.len() * width + column;
        let begins = line == lines[part].start && row == 0;
        let all = (chunks.len() - 1) * width + columns;
        // SAFETY: by this function's contract.
        let open = unsafe { scratch.cast::<u8>().add(self.sum_bytes(sums)[0]) }.cast::<f32>();
        for (r, (slot, _)) in self.machine.summed().iter().enumerate() {
            // SAFETY: the block has that many points, and the scratch room for the sums of each part and row.
            let (v, own, open) = unsafe {
                let own = scratch.add(r * sums.size + place);
                let open = open.add((r * sums.rows + plane * height + line) * width + column);
                (
                    std::slice::from_raw_parts(e.pointer(*slot).cast(), rows * columns),
                    std::slice::from_raw_parts_mut(own, all),
                    std::slice::from_raw_parts_mut(open, columns),
                )
            };
            if begins {
                own.chunks_mut(width).for_each(|own| own[..columns].fill(sums.fold.identity()));
            }
            sums.fold.runs(Rows { v, columns, at: row..row + rows }, chunks, own, width, open);
        }
    }

    /// Reduces the sums of planes' parts when all of them are there.
    ///
    /// # Safety
    /// As for [`Epilogue::take`].
    pub unsafe fn finish(&self, pool: &Pool, to: &[*mut u8], scratch: *mut f32, cx: StepContext) {
        let Some(sums) = &self.sums else { return };
        let count = self.machine.summed().len();
        let bytes = self.sum_bytes(sums).iter().sum();
        // SAFETY: by this function's contract; the sums lie in the scratch's first part.
        unsafe {
            let part = |r: usize| scratch.wrapping_add(r * sums.size).cast_const().cast();
            let parts: [*const u8; SUMS] = std::array::from_fn(part);
            let rest = scratch.cast::<u8>().add(bytes);
            sums.finish.run(pool, &parts[..count], &to[to.len() - count..], rest, cx);
        }
    }
}
