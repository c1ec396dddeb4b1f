//! How tasks of a weight gradient pack what they read: units of 16-bit floats row by row with all channels, or panels of
//! the channels of a register tile.

use super::blocks::{Box4, Piece};
use super::{Axis, WeightGradPlan};
use crate::dispatch;
use crate::kernels::half;
use crate::kernels::isa::Isa;
use crate::kernels::pack::NOTHING;
use mesh::dim::DType;
use std::ops::Range;

/// Columns of a panel of dy.
pub const PANEL: usize = 16;
/// How often what is packed is to be read at the least, for panels.
const OFTEN: usize = 8;

/// What a task packs of a piece.
#[derive(Clone, Copy, PartialEq)]
pub enum Packing {
    /// Nothing.
    Nothing,
    /// Rows of units of all channels, of x anew for each tap along the innermost dimension.
    Units,
    /// Of x the channels of one tile after those of another, each with all elements that some tap reads; of dy 16 columns
    /// each, with zeros where there are fewer.
    Panels,
}

/// How a packed piece lies: a row of units of dy along the innermost dimension after the other, and as well of x.
#[derive(Clone, Copy)]
pub struct Packed {
    /// First indices of dy.
    pub first: [usize; 4],
    /// First indices of x along the axes.
    pub x_first: [usize; 3],
    /// Units of dy along the axes.
    pub rows: [usize; 3],
    /// Units of x.
    pub x_rows: [usize; 3],
}

impl Packed {
    /// The first unit of a row of x, by indices along s1 and s2.
    pub fn x(&self, [i1, i2]: [usize; 2]) -> usize {
        ((i1 - self.x_first[0]) * self.x_rows[1] + i2 - self.x_first[1]) * self.x_rows[2]
    }
    /// As well, of dy.
    pub fn dy(&self, [o1, o2]: [usize; 2]) -> usize {
        ((o1 - self.first[1]) * self.rows[1] + o2 - self.first[2]) * self.rows[2]
    }
    /// Units of a batch, of x and of dy.
    pub fn batch(&self) -> [usize; 2] {
        [self.x_rows.iter().product(), self.rows.iter().product()]
    }
}

impl WeightGradPlan {
    /// What is packed of elements of that type: 16-bit floats always, `f32` where tiles are narrow and read it often.
    pub(super) fn packing(isa: Isa, dtype: DType, axes: &[Axis; 3], groups: usize, cout: usize) -> Packing {
        let all = |f: fn(&Axis) -> usize| axes.iter().map(f).product::<usize>();
        let often = all(|a| a.taps) * cout.div_ceil(PANEL) / all(|a| a.stride) >= OFTEN;
        let is_dense = groups == 1 && axes.iter().all(|a| a.dilation == 1);
        match dtype.is_half() {
            true => Packing::Units,
            false if isa < Isa::Avx512 && often && is_dense => Packing::Panels,
            false => Packing::Nothing,
        }
    }

    /// How a box's units lie if a row has so many, with what a range of taps along s1 reads of x, and how many elements
    /// that are of x and of dy.
    pub fn packed(&self, at: &Box4, units: usize, taps: Range<usize>) -> (Packed, [usize; 2]) {
        let reads = |a: &Axis, r: &Range<usize>, taps: Range<usize>| {
            let all = || r.clone().flat_map(|o| taps.clone().filter_map(move |j| a.x(o, j)));
            let first = all().min().unwrap_or(0);
            (first, all().max().map_or(0, |last| last + 1 - first))
        };
        let [a1, a2, a3] = &self.axes;
        let (x1, rows1) = reads(a1, &at[1], taps);
        let (x2, rows2) = reads(a2, &at[2], 0..a2.taps);
        let panels = self.packing == Packing::Panels;
        let (x3, x_units) = if panels { reads(a3, &at[3], 0..a3.taps) } else { (0, units) };
        let packed = Packed {
            first: [at[0].start, at[1].start, at[2].start, if panels { at[3].start } else { 0 }],
            x_first: [x1, x2, x3],
            rows: [at[1].len(), at[2].len(), if panels { at[3].len() } else { units }],
            x_rows: [rows1, rows2, x_units],
        };
        let columns = if panels { self.cout.next_multiple_of(PANEL) } else { self.cout * self.groups };
        let [x, dy] = packed.batch().map(|units| at[0].len() * units);
        (packed, [x * self.cin * self.groups, dy * columns])
    }

    /// Packs a piece's units of dy.
    ///
    /// # Safety
    /// `dy` is what the plan is for; there is room for all units.
    pub(super) unsafe fn pack_dy(&self, piece: &Piece, dy: *const u16, to: &mut [f32]) {
        let [a1, a2, _] = &self.axes;
        let channels = self.cout * self.groups;
        let mut rows = to.chunks_exact_mut((piece.dy.len() * channels).max(1));
        let [b, r1, r2, _] = &piece.around;
        for b in b.clone() {
            for o1 in r1.clone() {
                for (o2, row) in r2.clone().zip(&mut rows) {
                    let at = self.batches[b][1] + self.dy_channel + o1 * a1.dy_stride + o2 * a2.dy_stride;
                    // SAFETY: by this function's contract.
                    unsafe { self.pack_row(dy.add(at), &piece.dy, channels, row) };
                }
            }
        }
    }

    /// Packs the units that a tap along the innermost dimension reads of x for a piece.
    ///
    /// # Safety
    /// As for [`WeightGradPlan::pack_dy`].
    pub(super) unsafe fn pack_x(
        &self,
        piece: &Piece,
        packed: &Packed,
        j3: usize,
        inputs: &[*const u8],
        to: &mut [f32],
    ) {
        let channels = self.cin * self.groups;
        let mut rows = to.chunks_exact_mut((piece.dy.len() * channels).max(1));
        for b in piece.around[0].clone() {
            for i1 in 0..packed.x_rows[0] {
                for (i2, row) in (0..packed.x_rows[1]).zip(&mut rows) {
                    let (i1, i2) = (packed.x_first[0] + i1, packed.x_first[1] + i2);
                    let x = self.x.row(inputs, b, [i1, i2]).cast::<u16>();
                    // SAFETY: by this function's contract.
                    unsafe { self.pack_row(x.add(self.x_channel), &piece.x[j3], channels, row) };
                }
            }
        }
    }

    /// Packs a row of units: `to[u * channels + c]` is channel `c` at the places of unit `u`, zeros where there is none.
    ///
    /// # Safety
    /// So many channels lie at each place behind `from`; there is room for all units.
    unsafe fn pack_row(&self, from: *const u16, units: &[[usize; 2]], channels: usize, to: &mut [f32]) {
        if self.pairs() {
            // SAFETY: by this function's contract.
            return unsafe { pack_pairs(self.isa, from, units, channels, to) };
        }
        let mut u = 0;
        while u < units.len() {
            let first = units[u][0];
            // Elements that follow one another are made wide at once.
            let follows = |n: usize| first != NOTHING && units[u + n][0] == first + n * channels;
            let n = (1..units.len() - u).find(|n| !follows(*n)).unwrap_or(units.len() - u);
            let to = &mut to[u * channels..][..n * channels];
            match first {
                NOTHING => to.fill(0.0),
                // SAFETY: as above.
                first => unsafe { half::widen_to(self.isa, from.add(first), to.len(), to.as_mut_ptr()) },
            }
            u += n;
        }
    }

    /// Packs a piece's dy, and what taps read of x, as panels.
    ///
    /// # Safety
    /// As for [`WeightGradPlan::pack_dy`], for both.
    pub(super) unsafe fn pack_panels(
        &self,
        piece: &Piece,
        packed: &Packed,
        from: [*const f32; 2],
        to: [&mut [f32]; 2],
    ) {
        let ([x, dy], [x_to, dy_to]) = (from, to);
        let [x_batch, dy_batch] = packed.batch();
        let batches = piece.around[0].clone();
        let strides = |of: fn(&Axis) -> usize| [0, 1, 2].map(|d| of(&self.axes[d]));
        let (x_strides, dy_strides) = (strides(|a| a.x_stride), strides(|a| a.dy_stride));
        for (i, b) in batches.clone().enumerate() {
            let [x_at, dy_at] = self.batches[b];
            let first: usize = (0..3).map(|d| packed.x_first[d] * x_strides[d]).sum();
            let x = Rows {
                from: x.wrapping_add(x_at + self.x_channel + first),
                rows: packed.x_rows,
                strides: x_strides,
                channels: self.cin,
            };
            let first: usize = (0..3).map(|d| packed.first[d + 1] * dy_strides[d]).sum();
            let dy = Rows {
                from: dy.wrapping_add(dy_at + self.dy_channel + first),
                rows: packed.rows,
                strides: dy_strides,
                channels: self.cout,
            };
            // SAFETY: by this function's contract; a tile's part begins behind those of the tiles before it.
            unsafe {
                x.pack(self.isa, self.tiles(piece, PANEL), x_to, batches.len() * x_batch, i * x_batch);
                dy.pack(self.isa, &self.panels, dy_to, batches.len() * dy_batch, i * dy_batch);
            }
        }
    }
}

/// Rows of elements with all their channels.
struct Rows {
    from: *const f32,
    rows: [usize; 3],
    strides: [usize; 3],
    channels: usize,
}

impl Rows {
    /// Packs them as panels of `units` elements, of which these begin with the `first` one: each tile's first channel and
    /// width.
    ///
    /// # Safety
    /// The channels lie at each element; there is room for them.
    unsafe fn pack(&self, isa: Isa, tiles: &[[usize; 2]], to: &mut [f32], units: usize, first: usize) {
        let Rows { from, rows: [n1, n2, n], strides: [s1, s2, step], channels } = *self;
        for i1 in 0..n1 {
            for i2 in 0..n2 {
                let row = from.wrapping_add(i1 * s1 + i2 * s2);
                let at = first + (i1 * n2 + i2) * n;
                for &[c, width] in tiles {
                    let to = &mut to[c * units + at * width..][..n * width];
                    let there = width.min(channels - c);
                    // SAFETY: by this function's contract.
                    unsafe { pack_panel(isa, row.wrapping_add(c), step, there, width, to) };
                }
            }
        }
    }
}

/// Packs the first `there` of `width` channels of elements that lie `step` apart, zeros behind them.
///
/// # Safety
/// So many channels lie at each element.
unsafe fn pack_panel(isa: Isa, from: *const f32, step: usize, there: usize, width: usize, to: &mut [f32]) {
    dispatch!(isa, fn(from: *const f32, step: usize, there: usize, width: usize, to: &mut [f32]) {
        // SAFETY: by the contract of this function.
        unsafe {
            match (there, width) {
                (16, 16) => copy_lines::<16>(from, step, to),
                (6, 6) => copy_lines::<6>(from, step, to),
                (4, 4) => copy_lines::<4>(from, step, to),
                (2, 2) => copy_lines::<2>(from, step, to),
                (1, 1) => copy_lines::<1>(from, step, to),
                _ => {
                    for (i, line) in to.chunks_exact_mut(width).enumerate() {
                        let there = std::slice::from_raw_parts(from.wrapping_add(i * step), there);
                        line[..there.len()].copy_from_slice(there);
                        line[there.len()..].fill(0.0);
                    }
                }
            }
        }
    });
}

/// Copies `N` channels of each element.
///
/// # Safety
/// So many lie there.
#[inline(always)]
unsafe fn copy_lines<const N: usize>(from: *const f32, step: usize, to: &mut [f32]) {
    let (to, _) = to.as_chunks_mut::<N>();
    for (i, line) in to.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        *line = unsafe { from.wrapping_add(i * step).cast::<[f32; N]>().read_unaligned() };
    }
}

/// Packs a row of pairs: `to[p * channels + c]` is channel `c` at both places of pair `p`, zeros where there is none.
///
/// # Safety
/// So many channels lie at each place behind `from`; there is room for all pairs.
unsafe fn pack_pairs(isa: Isa, from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
    dispatch!(isa, fn(from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
        let mut to = to.as_mut_ptr().cast::<u32>();
        for pair in pairs {
            let mut c = 0;
            // Vectors, also where there is just one of them.
            while c < channels {
                // SAFETY: by the contract of this function.
                c += unsafe {
                    match channels - c {
                        32.. => pack_channels::<32>(from.wrapping_add(c), *pair, to.add(c)),
                        16.. => pack_channels::<16>(from.wrapping_add(c), *pair, to.add(c)),
                        8.. => pack_channels::<8>(from.wrapping_add(c), *pair, to.add(c)),
                        _ => pack_channels::<1>(from.wrapping_add(c), *pair, to.add(c)),
                    }
                };
            }
            to = to.wrapping_add(channels);
        }
    });
}

/// Packs `N` channels of a pair; gives their number.
///
/// # Safety
/// So many channels lie at each place, and there is room for them at `to`.
#[inline(always)]
unsafe fn pack_channels<const N: usize>(from: *const u16, [a, b]: [usize; 2], to: *mut u32) -> usize {
    let line = |at: usize| match at {
        NOTHING => [0; N],
        // SAFETY: by this function's contract.
        at => unsafe { from.add(at).cast::<[u16; N]>().read_unaligned() },
    };
    let (low, high) = (line(a), line(b));
    let both: [u32; N] = std::array::from_fn(|c| u32::from(low[c]) | u32::from(high[c]) << 16);
    // SAFETY: as above.
    unsafe { to.cast::<[u32; N]>().write_unaligned(both) };
    N
}
