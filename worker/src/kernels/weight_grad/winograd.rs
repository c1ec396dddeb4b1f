//! Gradients of windows of three by three along the last two dimensions by minimal filtering ([`crate::kernels::minimal`]): four
//! products for each gradient of an output and tap along the first dimension, where a window has nine.
//!
//! A leaf is cut into patches from its own first element on, so that it sums up the same wherever it is; the sixteen products of
//! patches are added up over a leaf, and its gradients made of those. A task keeps the sums of a block's inputs and gradients,
//! and goes through it once for each tile of sixteen by sixteen channels and tap along the first dimension, with the gradients
//! of leaves on a stack.
//!
//! Roofline: 2 * 4 * taps * cin * cout flops a voxel, for leaves of an even number of voxels along both dimensions.

use super::blocks::Box4;
use super::{Axis, Pointers, WeightGradPlan};
use crate::kernels::minimal::{APART, CHANNELS, PRODUCTS, Patches, Places, gradient_sums, gradients, input_sums};
use crate::kernels::tile::{Combine, Lanes, add};
use crate::over_lanes;
use std::ops::Range;

/// Channels of a tile along either side.
const TILE: usize = CHANNELS;
/// Windows' elements along the last two dimensions.
const WINDOW: usize = 9;
/// Gradients of a leaf, for a tile.
const GRADIENTS: usize = WINDOW * TILE * TILE;
/// Leaves on the stack of a block at most.
const DEPTH: usize = 16;
/// Floats of sums that a block has: what about half of a second-level cache holds.
pub(super) const SUMS: usize = 192 << 10;
/// Leaves of a block at most.
pub(super) const LEAVES: usize = 64;

/// How the sums of a leaf's patches lie: sixteen of each unit, which is of sixteen channels.
#[derive(Clone, Copy)]
struct Sums {
    /// Patches along the last two dimensions.
    counts: [usize; 2],
    /// Planes of a batch.
    planes: usize,
    batches: usize,
    /// Tiles of channels.
    tiles: usize,
}

impl Sums {
    fn plane(&self) -> usize {
        self.counts[0] * self.counts[1] * TILE
    }
    fn batch(&self) -> usize {
        self.planes * self.plane()
    }
    fn tile(&self) -> usize {
        self.batches * self.batch()
    }
    /// From one of the sixteen to the next one.
    fn pitch(&self) -> usize {
        self.tiles * self.tile() + APART
    }
    fn all(&self) -> usize {
        PRODUCTS * self.pitch()
    }
    /// Where the sums of a row of patches in a plane of all go.
    fn places(&self, to: *mut f32, plane: usize, row: usize) -> Places {
        let to = to.wrapping_add(plane * self.plane() + row * self.counts[1] * TILE);
        Places { to, product: self.pitch(), channels: self.tile(), patch: TILE, count: self.counts[1] }
    }
}

impl WeightGradPlan {
    /// How the sums of a leaf lie, of x for so many taps along the first dimension, and of dy.
    fn sums(&self, at: &Box4, taps: usize) -> [Sums; 2] {
        let counts = [2, 3].map(|d| at[d].len().div_ceil(2));
        let of = |planes: usize, channels: usize| Sums {
            counts,
            planes,
            batches: at[0].len(),
            tiles: channels.div_ceil(TILE),
        };
        [of(at[1].len() + taps - 1, self.cin), of(at[1].len(), self.cout)]
    }

    /// Floats of those, for all taps.
    pub(super) fn floats_of_sums(&self, at: &Box4) -> usize {
        self.sums(at, self.axes[0].taps).iter().map(Sums::all).sum()
    }

    /// Sums a block for a range of taps along the first dimension, into `to`.
    pub(super) unsafe fn filter(&self, block: usize, taps: Range<usize>, p: Pointers, to: *mut f32, work: &mut [f32]) {
        let (products, work) = work.split_at_mut(PRODUCTS * TILE * TILE);
        let (stack, work) = work.split_at_mut(DEPTH * GRADIENTS);
        let block = &self.blocks[block];
        let [piece] = &block.pieces[..] else { unreachable!("leaves that are too large are several blocks") };
        let sums = |at: &Box4| self.sums(at, taps.len());
        let of_x = piece.leaves.iter().map(|l| sums(&l.0)[0].all()).sum();
        let (x, dy) = work.split_at_mut(of_x);
        let (mut to_x, mut to_dy) = (&mut x[..], &mut dy[..]);
        for (at, _) in &piece.leaves {
            let [of_x, of_dy] = sums(at);
            // SAFETY: by the contract of `run`.
            unsafe {
                self.sum_inputs(at, &taps, &of_x, p.inputs, to_x.as_mut_ptr());
                self.sum_gradients(at, &of_dy, p.dy, to_dy.as_mut_ptr());
            }
            (to_x, to_dy) = (&mut to_x[of_x.all()..], &mut to_dy[of_dy.all()..]);
        }
        let tiles = [self.cin, self.cout].map(|n| n.div_ceil(TILE));
        for t in 0..taps.len() * tiles[0] * tiles[1] {
            let (tap, ci, co) = (t / (tiles[0] * tiles[1]), t / tiles[1] % tiles[0], t % tiles[1]);
            let (mut top, mut at, mut events) = (0, [0, 0], block.program.iter().peekable());
            while let Some(event) = events.next() {
                // SAFETY: sums of the leaves lie one after the other, and each is as `Sums` says; so does the stack.
                unsafe {
                    match *event {
                        Combine::Leaf(l) => {
                            let [of_x, of_dy] = sums(&piece.leaves[l].0);
                            let factors = Factors {
                                x: x[at[0] + ci * of_x.tile() + tap * of_x.plane()..].as_ptr(),
                                dy: dy[at[1] + co * of_dy.tile()..].as_ptr(),
                                pitch: [of_x.pitch(), of_dy.pitch()],
                                batch: [of_x.batch(), of_dy.batch()],
                                batches: of_x.batches,
                                count: of_dy.batch() / TILE,
                            };
                            multiply(self.isa, factors, products.as_mut_ptr());
                            // Two neighbours are added up as the second one is made.
                            let adds = top > 0 && events.next_if(|e| **e == Combine::Add).is_some();
                            let place = stack[(top - usize::from(adds)) * GRADIENTS..].as_mut_ptr();
                            gradients(self.isa, products.as_ptr(), TILE, place, adds);
                            top += usize::from(!adds);
                            at = [at[0] + of_x.all(), at[1] + of_dy.all()];
                        }
                        Combine::Add => {
                            top -= 1;
                            let (a, b) = stack.split_at_mut(top * GRADIENTS);
                            add(self.isa, a[(top - 1) * GRADIENTS..].as_mut_ptr(), b.as_ptr(), GRADIENTS);
                        }
                    }
                }
            }
            let first = ((taps.start + tap) * WINDOW * self.cin + ci * TILE) * self.cout + co * TILE;
            let [rows, columns] = [self.cin - ci * TILE, self.cout - co * TILE].map(|n| n.min(TILE));
            // SAFETY: there is room for every weight.
            unsafe {
                for k in 0..WINDOW {
                    for row in 0..rows {
                        let from = stack[(k * TILE + row) * TILE..].as_ptr();
                        let to = to.add(first + (k * self.cin + row) * self.cout);
                        std::ptr::copy_nonoverlapping(from, to, columns);
                    }
                }
            }
        }
    }

    /// `B' d B` of the patches of a leaf, for taps along the first dimension.
    unsafe fn sum_inputs(&self, at: &Box4, taps: &Range<usize>, sums: &Sums, inputs: &[*const u8], to: *mut f32) {
        let [a1, a2, a3] = &self.axes;
        // The inputs along the innermost dimension that are read, counted from the first patch's first one.
        let origin = a3.first + at[3].start;
        let end = (a3.whole + a3.lo).saturating_sub(origin).min(at[3].len() + 2);
        let columns = a3.lo.saturating_sub(origin).min(end)..end;
        let before = (origin as isize - (a3.lo + a3.x_start) as isize) * a3.x_stride as isize;
        let before = (before + self.x_channel as isize) * self.dtype.bytes() as isize;
        for plane in 0..sums.batches * sums.planes {
            let (b, i1) = (plane / sums.planes, at[1].start + taps.start + plane % sums.planes);
            let is_inside = |a: &Axis, i: usize| (a.first + i).checked_sub(a.lo).filter(|i| *i < a.whole);
            let first = is_inside(a1, i1).map(|i| i - a1.x_start);
            for row in 0..sums.counts[0] {
                let mut rows = [std::ptr::null(); 4];
                for (r, to) in rows.iter_mut().enumerate() {
                    let i2 = at[2].start + 2 * row + r;
                    let Some((first, i)) = first.zip(is_inside(a2, i2)) else { continue };
                    if i2 < at[2].end + 2 {
                        let row = self.x.row(inputs, at[0].start + b, [first, i - a2.x_start]);
                        *to = row.wrapping_offset(before);
                    }
                }
                let from = Patches::new(self.dtype, rows, a3.x_stride, columns.clone(), self.cin);
                // SAFETY: rows inside of x, and of those the columns inside, are held if a tap reads them.
                unsafe { input_sums(self.isa, from, sums.places(to, plane, row)) };
            }
        }
    }

    /// `G dy G'` of the patches of a leaf.
    unsafe fn sum_gradients(&self, at: &Box4, sums: &Sums, dy: *const u8, to: *mut f32) {
        let [a1, a2, a3] = &self.axes;
        for plane in 0..sums.batches * sums.planes {
            let (b, i1) = (plane / sums.planes, at[1].start + plane % sums.planes);
            let of_batch = self.batches[at[0].start + b][1] + self.dy_channel;
            for row in 0..sums.counts[0] {
                let rows = [2 * row, 2 * row + 1].map(|i2| match i2 < at[2].len() {
                    true => {
                        let row = of_batch + i1 * a1.dy_stride + (at[2].start + i2) * a2.dy_stride;
                        dy.wrapping_add((row + at[3].start * a3.dy_stride) * self.dtype.bytes())
                    }
                    false => std::ptr::null(),
                });
                let from = Patches::new(self.dtype, rows, a3.dy_stride, 0..at[3].len(), self.cout);
                // SAFETY: the leaf's elements are held.
                unsafe { gradient_sums(self.isa, from, sums.places(to, plane, row)) };
            }
        }
    }
}

/// The sums of a leaf that are multiplied: of x and of dy, sixteen channels of each.
struct Factors {
    x: *const f32,
    dy: *const f32,
    /// Floats between one of the sixteen and the next one, in both.
    pitch: [usize; 2],
    /// Floats between batches, in both.
    batch: [usize; 2],
    batches: usize,
    /// Patches of a batch.
    count: usize,
}

over_lanes! {
    /// The sixteen products of a leaf, each of sixteen channels of x by sixteen of dy.
    ///
    /// # Safety
    /// The factors lie there, and there is room for the products.
    multiply = products[16, 4, 2](factors: Factors, to: *mut f32)
}

#[inline(always)]
unsafe fn products<V: Lanes, const MR: usize>(f: Factors, to: *mut f32) {
    // SAFETY: by the contract of `multiply`.
    unsafe {
        for i in 0..PRODUCTS {
            for rows in (0..TILE).step_by(MR) {
                let mut sums = [V::zero(); MR];
                for b in 0..f.batches {
                    let mut x = f.x.add(i * f.pitch[0] + b * f.batch[0] + rows);
                    let mut dy = f.dy.add(i * f.pitch[1] + b * f.batch[1]);
                    for _ in 0..f.count {
                        let row = V::load(dy);
                        for (m, sum) in sums.iter_mut().enumerate() {
                            *sum = sum.fma_from(x.add(m), row);
                        }
                        (x, dy) = (x.add(TILE), dy.add(TILE));
                    }
                }
                for (m, sum) in sums.into_iter().enumerate() {
                    sum.store(to.add((i * TILE + rows + m) * TILE));
                }
            }
        }
    }
}
