//! Packing: elements that lie anywhere, copied to where a tile reads them, as they lie or transposed.
//!
//! Roofline: the bytes of what is packed, read and written once.

use super::isa::Isa;
use crate::dispatch;

/// Offsets of the points along one side of a matrix, and where they are neighbours.
pub struct Side {
    offsets: Vec<usize>,
    /// By point: the end of the run of neighbours that it lies in.
    ends: Vec<u32>,
    run: usize,
}

impl Side {
    /// Points at these offsets.
    pub fn new(offsets: Vec<usize>) -> Side {
        let n = offsets.len();
        let mut ends = vec![n as u32; n];
        for i in (1..n).rev() {
            ends[i - 1] = if offsets[i] == offsets[i - 1] + 1 { ends[i] } else { i as u32 };
        }
        let runs = (0..n).filter(|&i| ends[i] as usize == i + 1).count();
        Side { offsets, ends, run: n / runs.max(1) }
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Points that are neighbours, on average.
    pub fn run(&self) -> usize {
        self.run
    }

    /// The offset of a point.
    pub fn at(&self, i: usize) -> usize {
        self.offsets[i]
    }

    /// The distance of each point from the one before it, if that is the same everywhere.
    pub fn stride(&self) -> Option<usize> {
        let stride = |w: &[usize]| w[1].checked_sub(w[0]);
        let first = self.offsets.windows(2).next().map_or(Some(1), stride)?;
        self.offsets.windows(2).all(|w| stride(w) == Some(first)).then_some(first)
    }

    /// Copies neighbouring elements to the points of a range.
    ///
    /// # Safety
    /// `from` holds as many elements, and the points lie inside `to`.
    pub unsafe fn spread(&self, mut from: *const f32, range: std::ops::Range<usize>, to: *mut f32) {
        let mut i = range.start;
        while i < range.end {
            let n = (self.ends[i] as usize).min(range.end) - i;
            // SAFETY: by this function's contract.
            unsafe {
                std::ptr::copy_nonoverlapping(from, to.add(self.offsets[i]), n);
                from = from.add(n);
            }
            i += n;
        }
    }

    /// Copies the points of a range to neighbouring places.
    #[inline(always)]
    unsafe fn copy(&self, from: *const f32, range: std::ops::Range<usize>, mut to: *mut f32) {
        let mut i = range.start;
        while i < range.end {
            let n = (self.ends[i] as usize).min(range.end) - i;
            // SAFETY: by the callers' contract the points lie inside `from`, and `to` has room for all of them.
            unsafe {
                let from = from.add(self.offsets[i]);
                // A panel's row, without a call.
                match n {
                    32 => to.cast::<[f32; 32]>().write_unaligned(from.cast::<[f32; 32]>().read_unaligned()),
                    16 => to.cast::<[f32; 16]>().write_unaligned(from.cast::<[f32; 16]>().read_unaligned()),
                    _ => std::ptr::copy_nonoverlapping(from, to, n),
                }
                to = to.add(n);
            }
            i += n;
        }
    }
}

/// Copies a block of a matrix line by line: `to[(i - lines.start) * pitch + (j - points.start)]` is the element of line
/// `i` and point `j`.
///
/// # Safety
/// `from` holds all elements of the block; `to` has room for as many lines.
pub unsafe fn copy(
    from: *const f32,
    [lines, points]: [&Side; 2],
    [rows, columns]: [std::ops::Range<usize>; 2],
    to: *mut f32,
    pitch: usize,
) {
    for (l, i) in rows.enumerate() {
        // SAFETY: by this function's contract.
        unsafe { points.copy(from.add(lines.offsets[i]), columns.clone(), to.add(l * pitch)) };
    }
}

/// Side of the blocks that are transposed at a time: a cache line of floats.
const BLOCK: usize = 16;

/// Copies a block of a matrix transposed: `to[(j - points.start) * pitch + (i - lines.start)]` is the element of line
/// `i` and point `j`.
///
/// # Safety
/// As for [`copy`], with as many lines as there are points.
pub unsafe fn transpose(
    isa: Isa,
    from: *const f32,
    [lines, points]: [&Side; 2],
    [rows, columns]: [std::ops::Range<usize>; 2],
    to: *mut f32,
    pitch: usize,
) {
    for j in columns.clone().step_by(BLOCK) {
        let width = BLOCK.min(columns.end - j);
        let whole = width == BLOCK && points.ends[j] as usize >= j + BLOCK;
        for i in rows.clone().step_by(BLOCK) {
            let height = BLOCK.min(rows.end - i);
            // SAFETY: by this function's contract.
            unsafe {
                let to = to.add((j - columns.start) * pitch + i - rows.start);
                if whole && height == BLOCK {
                    let at = points.offsets[j];
                    let starts: [*const f32; BLOCK] =
                        std::array::from_fn(|l| from.wrapping_add(lines.offsets[i + l] + at));
                    transpose_block(isa, starts, to, pitch);
                } else {
                    for p in 0..width {
                        for l in 0..height {
                            *to.add(p * pitch + l) = *from.add(lines.offsets[i + l] + points.offsets[j + p]);
                        }
                    }
                }
            }
        }
    }
}

/// Transposes sixteen lines of sixteen floats.
///
/// # Safety
/// Sixteen floats lie at each start, and sixteen fit at each multiple of `pitch` behind `to`.
unsafe fn transpose_block(isa: Isa, starts: [*const f32; BLOCK], to: *mut f32, pitch: usize) {
    dispatch!(isa, fn(starts: [*const f32; BLOCK], to: *mut f32, pitch: usize) {
        // SAFETY: by the contract of this function.
        unsafe {
            let mut rows: [[f32; BLOCK]; BLOCK] =
                std::array::from_fn(|l| starts[l].cast::<[f32; BLOCK]>().read_unaligned());
            exchange::<1>(&mut rows);
            exchange::<2>(&mut rows);
            exchange::<4>(&mut rows);
            exchange::<8>(&mut rows);
            for (l, row) in rows.into_iter().enumerate() {
                to.add(l * pitch).cast::<[f32; BLOCK]>().write_unaligned(row);
            }
        }
    });
}

/// For every pair of rows that are `HALF` apart, exchanges the odd runs of `HALF` elements of the first one with the even
/// ones of the second.
#[inline(always)]
fn exchange<const HALF: usize>(rows: &mut [[f32; BLOCK]; BLOCK]) {
    for i in 0..BLOCK {
        if i & HALF == 0 {
            let (a, b) = (rows[i], rows[i + HALF]);
            rows[i] = std::array::from_fn(|j| if j & HALF == 0 { a[j] } else { b[j - HALF] });
            rows[i + HALF] = std::array::from_fn(|j| if j & HALF == 0 { a[j + HALF] } else { b[j] });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_copied_and_transposed_from_wherever_its_elements_lie() {
        let from: Vec<f32> = (0..20_000).map(|i| i as f32).collect();
        let lines = Side::new((0..40).map(|i| i * 131).collect());
        for points in [(0..50).collect(), (0..50).map(|j| j + j / 20 * 7).collect(), (0..50).map(|j| j * 3).collect()] {
            let points = Side::new(points);
            let (rows, columns) = (3..38, 1..49);
            let (h, w) = (rows.len(), columns.len());
            let (mut straight, mut turned) = (vec![0.0; h * w], vec![0.0; h * w]);
            for isa in Isa::available() {
                let ranges = || [rows.clone(), columns.clone()];
                // SAFETY: all offsets lie inside `from`, and both results have room for the block.
                unsafe {
                    copy(from.as_ptr(), [&lines, &points], ranges(), straight.as_mut_ptr(), w);
                    transpose(isa, from.as_ptr(), [&lines, &points], ranges(), turned.as_mut_ptr(), h);
                }
                for i in 0..h {
                    for j in 0..w {
                        let element = from[lines.offsets[rows.start + i] + points.offsets[columns.start + j]];
                        assert_eq!((straight[i * w + j], turned[j * h + i]), (element, element), "{i}, {j} on {isa:?}");
                    }
                }
            }
        }
    }
}
