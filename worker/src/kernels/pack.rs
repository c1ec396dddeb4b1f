//! Packing: elements that lie anywhere, copied to where a tile reads them, as they lie or transposed.
//!
//! `bf16` is packed by pairs of neighbours along the contracted dimensions, the first one in the lower half; `f16` as the
//! floats that they are.
//!
//! Roofline: the bytes of what is packed, read and written once.

use super::half;
use super::isa::Isa;
use crate::dispatch;
use mesh::dim::DType;

/// The offset of a point that is not there: a zero.
pub const NOTHING: usize = usize::MAX;

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
            let next = offsets[i - 1] != NOTHING && offsets[i] == offsets[i - 1] + 1;
            ends[i - 1] = if next { ends[i] } else { i as u32 };
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

    /// The runs of neighbours in a range: the offset of each one's first point, and how many.
    pub fn runs(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        let mut i = range.start;
        std::iter::from_fn(move || {
            let n = (*self.ends.get(i)? as usize).min(range.end).checked_sub(i).filter(|n| *n > 0)?;
            let run = (self.offsets[i], n);
            i += n;
            Some(run)
        })
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

/// Packs a part of a panel: `to[(k - depth.start) * width + (n - columns.start)]` is unit `k` of column `n`, one of `width` at
/// the most; those that are not there are zeros.
///
/// # Safety
/// `from` holds all elements of the block, of that dtype; `to` has room for the panel's units.
pub unsafe fn panel(
    isa: Isa,
    dtype: DType,
    from: *const u8,
    [k, n]: [&Side; 2],
    [depth, columns]: [std::ops::Range<usize>; 2],
    to: *mut f32,
    width: usize,
) {
    let (floats, halves, by_units) = (from.cast::<f32>(), from.cast::<u16>(), n.run() >= k.run());
    // SAFETY: by this function's contract.
    unsafe {
        if columns.len() < width {
            std::ptr::write_bytes(to, 0, depth.len() * width);
        }
        match (dtype, by_units) {
            (DType::Bf16, true) => copy_pairs(isa, halves, [k, n], [depth, columns], to.cast(), width),
            (DType::Bf16, false) => transpose_pairs(isa, halves, [n, k], [columns, depth], to.cast(), width),
            (DType::F16, true) => copy_wide(isa, halves, [k, n], [depth, columns], to, width),
            (DType::F16, false) => transpose_wide(isa, halves, [n, k], [columns, depth], to, width),
            (_, true) => copy(floats, [k, n], [depth, columns], to, width),
            (_, false) => transpose(isa, floats, [n, k], [columns, depth], to, width),
        }
    }
}

/// Copies a block of a matrix of `f16` as [`copy`] does, as floats.
///
/// # Safety
/// As for [`copy`].
pub unsafe fn copy_wide(
    isa: Isa,
    from: *const u16,
    [lines, points]: [&Side; 2],
    [rows, columns]: [std::ops::Range<usize>; 2],
    to: *mut f32,
    pitch: usize,
) {
    for (l, i) in rows.enumerate() {
        let mut at = l * pitch;
        for (offset, n) in points.runs(columns.clone()) {
            // SAFETY: by this function's contract.
            unsafe { half::widen_to(isa, from.add(lines.offsets[i] + offset), n, to.add(at)) };
            at += n;
        }
    }
}

/// Pairs of lines that are asked for before they are copied.
const AHEAD: usize = 6;

/// Asks for a cache line, which need not be there.
#[inline(always)]
fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it reads nothing, and no address is wrong.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
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

/// Copies a block of a matrix of `f16` transposed, as [`transpose`] does, as floats.
///
/// # Safety
/// As for [`transpose`].
pub unsafe fn transpose_wide(
    isa: Isa,
    from: *const u16,
    sides: [&Side; 2],
    [rows, columns]: [std::ops::Range<usize>; 2],
    to: *mut f32,
    pitch: usize,
) {
    let mut some = [[0.0f32; BLOCK]; BLOCK];
    for j in columns.clone().step_by(BLOCK) {
        for i in rows.clone().step_by(BLOCK) {
            let block = [i..(i + BLOCK).min(rows.end), j..(j + BLOCK).min(columns.end)];
            let (height, width) = (block[0].len(), block[1].len());
            // SAFETY: by this function's contract; a block has room for its elements.
            unsafe {
                copy_wide(isa, from, sides, block, some.as_mut_ptr().cast(), BLOCK);
                let to = to.add((j - columns.start) * pitch + i - rows.start);
                if height == BLOCK && width == BLOCK {
                    transpose_block(isa, std::array::from_fn(|l| some[l].as_ptr()), to, pitch);
                } else {
                    for (l, row) in some[..height].iter().enumerate() {
                        row[..width].iter().enumerate().for_each(|(p, v)| *to.add(p * pitch + l) = *v);
                    }
                }
            }
        }
    }
}

/// Copies a block of a matrix of pairs: `to[l * pitch + (j - points.start)]` is the pair of lines `2 i` and `2 i + 1` at
/// point `j`, `i` the `l`-th of the range.
///
/// # Safety
/// As for [`copy`]; every pair has its first line.
pub unsafe fn copy_pairs(
    isa: Isa,
    from: *const u16,
    sides: [&Side; 2],
    ranges: [std::ops::Range<usize>; 2],
    to: *mut u32,
    pitch: usize,
) {
    dispatch!(isa, fn(
        from: *const u16,
        sides: [&Side; 2],
        ranges: [std::ops::Range<usize>; 2],
        to: *mut u32,
        pitch: usize,
    ) {
        let ([lines, points], [pairs, columns]) = (sides, ranges);
        for (l, i) in pairs.enumerate() {
            let halves = [lines.offsets[2 * i], lines.offsets[2 * i + 1]];
            // Lines that lie apart are not foreseen by the processor.
            for line in (2 * (i + AHEAD)..2 * (i + AHEAD + 1)).filter(|l| *l < lines.len()) {
                let at = from.wrapping_add(lines.offsets[line].wrapping_add(points.offsets[columns.start]));
                (0..columns.len()).step_by(32).for_each(|j| prefetch(at.wrapping_add(j)));
            }
            let mut j = columns.start;
            while j < columns.end {
                let n = (points.ends[j] as usize).min(columns.end) - j;
                // SAFETY: by this function's contract.
                unsafe {
                    let (mut start, mut to) = (from.add(points.offsets[j]), to.add(l * pitch + j - columns.start));
                    let mut left = n;
                    while left > 0 {
                        // A panel's row, without a loop.
                        let done = match left {
                            32.. => interleave::<32>(start, halves, to),
                            16.. => interleave::<16>(start, halves, to),
                            _ => interleave::<1>(start, halves, to),
                        };
                        (start, to, left) = (start.add(done), to.add(done), left - done);
                    }
                }
                j += n;
            }
        }
    });
}

/// Copies a block of a matrix of pairs as [`copy_pairs`] does, but turned: `to[(j - points.start) * pitch + l]` is the pair of
/// lines at point `j`. Up to fifteen elements behind each row are written as well.
///
/// # Safety
/// As for [`copy_pairs`], with room for as many lines as there are points, and fifteen more.
pub unsafe fn turn_pairs(
    isa: Isa,
    from: *const u16,
    sides: [&Side; 2],
    [pairs, columns]: [std::ops::Range<usize>; 2],
    to: *mut u32,
    pitch: usize,
) {
    const WIDTH: usize = 8 * BLOCK;
    let mut some = [[0u32; WIDTH]; BLOCK];
    for (l, first) in pairs.clone().step_by(BLOCK).enumerate() {
        for j in columns.clone().step_by(WIDTH) {
            let ranges = [first..(first + BLOCK).min(pairs.end), j..(j + WIDTH).min(columns.end)];
            let width = ranges[1].len();
            // SAFETY: by this function's contract.
            unsafe {
                copy_pairs(isa, from, sides, ranges, some.as_mut_ptr().cast(), WIDTH);
                for b in (0..width).step_by(BLOCK) {
                    let starts = std::array::from_fn(|i| some[i][b..].as_ptr().cast());
                    transpose_block(isa, starts, to.add((j + b - columns.start) * pitch + l * BLOCK).cast(), pitch);
                }
            }
        }
    }
}

/// `N` neighbouring elements of two lines at these offsets, pair by pair; gives their number.
///
/// # Safety
/// As many elements lie in each line that is there, and as many pairs fit behind `to`.
#[inline(always)]
unsafe fn interleave<const N: usize>(from: *const u16, halves: [usize; 2], to: *mut u32) -> usize {
    // SAFETY: by the contract of this function.
    unsafe {
        let first = from.add(halves[0]).cast::<[u16; N]>().read_unaligned();
        let to = to.cast::<[u32; N]>();
        // Each stores what it has made: from one place, compiled code would take it through the stack.
        match halves[1] {
            NOTHING => to.write_unaligned(first.map(u32::from)),
            at => {
                let second = from.add(at).cast::<[u16; N]>().read_unaligned();
                to.write_unaligned(std::array::from_fn(|j| u32::from(first[j]) | u32::from(second[j]) << 16));
            }
        }
    }
    N
}

/// Copies a block of a matrix of pairs that lie along its lines: `to[(i - lines.start) * pitch + l]` is the pair of points
/// `2 j` and `2 j + 1` of line `i`, `j` the `l`-th of the range.
///
/// # Safety
/// As for [`copy`]; every pair has its first point.
pub unsafe fn copy_paired(
    from: *const u16,
    [lines, points]: [&Side; 2],
    [rows, pairs]: [std::ops::Range<usize>; 2],
    to: *mut u32,
    pitch: usize,
) {
    for (l, i) in rows.enumerate() {
        // SAFETY: by this function's contract.
        unsafe {
            let from = from.add(lines.offsets[i]);
            let mut to = to.add(l * pitch).cast::<u16>();
            let mut j = 2 * pairs.start;
            while j < 2 * pairs.end {
                let n = (points.ends[j] as usize).min(2 * pairs.end) - j;
                match points.offsets[j] {
                    NOTHING => *to = 0,
                    at => std::ptr::copy_nonoverlapping(from.add(at), to, n),
                }
                to = to.add(n);
                j += n;
            }
        }
    }
}

/// Copies a block of a matrix of pairs that lie along its lines, transposed: `to[(j - pairs.start) * pitch + (i -
/// lines.start)]` is the pair of points `2 j` and `2 j + 1` of line `i`.
///
/// # Safety
/// As for [`copy_paired`], with as many lines as there are pairs.
pub unsafe fn transpose_pairs(
    isa: Isa,
    from: *const u16,
    [lines, points]: [&Side; 2],
    [rows, pairs]: [std::ops::Range<usize>; 2],
    to: *mut u32,
    pitch: usize,
) {
    for j in pairs.clone().step_by(BLOCK) {
        let width = BLOCK.min(pairs.end - j);
        let whole = width == BLOCK && points.ends[2 * j] as usize >= 2 * (j + BLOCK);
        for i in rows.clone().step_by(BLOCK) {
            let height = BLOCK.min(rows.end - i);
            // SAFETY: by this function's contract.
            unsafe {
                let to = to.add((j - pairs.start) * pitch + i - rows.start);
                if whole && height == BLOCK {
                    let at = points.offsets[2 * j];
                    let starts: [*const f32; BLOCK] =
                        std::array::from_fn(|l| from.wrapping_add(lines.offsets[i + l] + at).cast());
                    transpose_block(isa, starts, to.cast(), pitch);
                    continue;
                }
                let half = |l: usize, p: usize| match points.offsets[p] {
                    NOTHING => 0,
                    at => u32::from(*from.add(lines.offsets[i + l] + at)),
                };
                for p in 0..width {
                    for l in 0..height {
                        *to.add(p * pitch + l) = half(l, 2 * (j + p)) | half(l, 2 * (j + p) + 1) << 16;
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
        let halves: Vec<u16> = from.iter().map(|v| ::half::f16::from_f32(*v).to_bits()).collect();
        let lines = Side::new((0..40).map(|i| i * 131).collect());
        for points in [(0..50).collect(), (0..50).map(|j| j + j / 20 * 7).collect(), (0..50).map(|j| j * 3).collect()] {
            let points = Side::new(points);
            let (rows, columns) = (3..38, 1..49);
            let (h, w) = (rows.len(), columns.len());
            let [mut straight, mut turned, mut wide, mut wide_turned] = [(); 4].map(|()| vec![0.0f32; h * w]);
            for isa in Isa::available() {
                let ranges = || [rows.clone(), columns.clone()];
                // SAFETY: all offsets lie inside `from`, and both results have room for the block.
                unsafe {
                    copy(from.as_ptr(), [&lines, &points], ranges(), straight.as_mut_ptr(), w);
                    transpose(isa, from.as_ptr(), [&lines, &points], ranges(), turned.as_mut_ptr(), h);
                    copy_wide(isa, halves.as_ptr(), [&lines, &points], ranges(), wide.as_mut_ptr(), w);
                    transpose_wide(isa, halves.as_ptr(), [&lines, &points], ranges(), wide_turned.as_mut_ptr(), h);
                }
                for i in 0..h {
                    for j in 0..w {
                        let element = from[lines.offsets[rows.start + i] + points.offsets[columns.start + j]];
                        assert_eq!((straight[i * w + j], turned[j * h + i]), (element, element), "{i}, {j} on {isa:?}");
                        let half = ::half::f16::from_f32(element).to_f32();
                        assert_eq!((wide[i * w + j], wide_turned[j * h + i]), (half, half), "{i}, {j} on {isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_are_packed_from_wherever_their_halves_lie() {
        let from: Vec<u16> = (0..20_000).collect();
        let lines = Side::new((0..40).map(|i| i * 131).collect());
        let ending = (0..50).map(|j| if j == 49 { NOTHING } else { j }).collect();
        for points in [ending, (0..50).map(|j| j + j / 20 * 7).collect(), (0..50).map(|j| j * 3).collect()] {
            let points = Side::new(points);
            let (rows, pairs) = (3..38, 1..25);
            let (h, w) = (rows.len(), pairs.len());
            let [mut straight, mut turned, mut across] = [vec![0; h * w], vec![0; h * w], vec![0; h * w]];
            let half = |line: usize, point: usize| match points.offsets[point] {
                NOTHING => 0,
                at => u32::from(from[lines.offsets[line] + at]),
            };
            for isa in Isa::available() {
                let ranges = || [rows.clone(), pairs.clone()];
                // SAFETY: all offsets lie inside `from`, and the results have room for the block.
                unsafe {
                    copy_paired(from.as_ptr(), [&lines, &points], ranges(), straight.as_mut_ptr(), w);
                    transpose_pairs(isa, from.as_ptr(), [&lines, &points], ranges(), turned.as_mut_ptr(), h);
                    let ranges = [pairs.clone(), rows.clone()];
                    copy_pairs(isa, from.as_ptr(), [&points, &lines], ranges, across.as_mut_ptr(), h);
                }
                for i in 0..h {
                    for j in 0..w {
                        let [low, high] = [0, 1].map(|k| half(rows.start + i, 2 * (pairs.start + j) + k));
                        let pair = low | high << 16;
                        let found = (straight[i * w + j], turned[j * h + i], across[j * h + i]);
                        assert_eq!(found, (pair, pair, pair), "{i}, {j} on {isa:?}");
                    }
                }
            }
        }
    }
}
