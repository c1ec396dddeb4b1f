//! Minimal filtering of windows of three by three: the sums that inputs, windows and gradients are multiplied as, and those of
//! the products.
//!
//! Four neighbouring outputs, two by two, are made of sixteen products of sums, F(2 x 2, 3 x 3): `A'[(G g G') * (B' d B)] A` of
//! a patch `d` of four by four inputs and a window `g`, where they have 36 (Winograd, "Arithmetic complexity of computations",
//! 1980; Lavin and Gray, arXiv:1509.09308). What four gradients of outputs add to that of a window is made of as many, F(3 x 3,
//! 2 x 2), of the same sums of inputs. Transforms are sums and halves, and sums of products are shorter than those of windows, so
//! that results are as near to the exact ones as those, or nearer (0.6 of the error for normally distributed inputs of 16 to 256
//! channels).
//!
//! No output depends on inputs of its patch that its window does not read: they are in none of the sums that it is made of, in
//! place of being multiplied by zeros, as they would be of larger patches. So it has the same bits where those are not held.
//!
//! Roofline: the bytes that are read and written; sums of inputs are four times as many as inputs.

use super::half::F16;
use super::tile::{Lanes, store_row};
use crate::over_lanes;
use mesh::dim::DType;
use std::ops::Range;

/// Products of a patch.
pub const PRODUCTS: usize = 16;

/// Channels that are summed at a time.
pub const CHANNELS: usize = 16;

/// Floats between one product's sums and the next one's, beside their own: without them all would lie in the same places of a
/// cache.
pub const APART: usize = 16;

/// The most channels of inputs.
const MOST: usize = 4096;

/// A row of zeros.
static ZEROS: [f32; MOST] = [0.0; MOST];

/// Patches along rows of a channel-last tensor of `f32`, or of `f16`: four rows of inputs, or two of gradients.
pub struct Patches<const ROWS: usize> {
    dtype: DType,
    rows: [*const u8; ROWS],
    /// Bytes between neighbours.
    strides: [usize; ROWS],
    inside: Range<usize>,
    channels: usize,
}

impl<const ROWS: usize> Patches<ROWS> {
    /// Patches along rows whose first elements would be at `rows`, null for one of zeros, and neighbours `stride` elements apart;
    /// only those inside are read.
    pub fn new(
        dtype: DType,
        rows: [*const u8; ROWS],
        stride: usize,
        inside: Range<usize>,
        channels: usize,
    ) -> Patches<ROWS> {
        debug_assert!(channels <= MOST);
        let strides = rows.map(|r| if r.is_null() { 0 } else { stride * dtype.bytes() });
        let rows = rows.map(|r| if r.is_null() { ZEROS.as_ptr().cast() } else { r });
        Patches { dtype, rows, strides, inside, channels }
    }

    /// Sixteen channels of a column of elements from one of them on; zeros where there are fewer.
    #[inline(always)]
    unsafe fn column<V: Lanes, const WHOLE: bool, const WIDENS: bool>(
        &self,
        column: usize,
        channel: usize,
    ) -> [V; ROWS] {
        // SAFETY: by the contract of those that ask.
        unsafe {
            let mut all = [V::zero(); ROWS];
            if column >= self.inside.start && column < self.inside.end {
                for r in 0..ROWS {
                    let (at, left) = (self.rows[r].wrapping_add(column * self.strides[r]), self.channels - channel);
                    let (float, half) =
                        (at.cast::<f32>().wrapping_add(channel), at.cast::<F16>().wrapping_add(channel));
                    all[r] = match (WIDENS, WHOLE) {
                        (false, true) => V::load(float),
                        (false, false) => V::load_first(float, left),
                        (true, true) => V::load_wide(half),
                        (true, false) => V::load_wide_first(half, left),
                    };
                }
            }
            all
        }
    }
}

/// Where the sums of patches go.
#[derive(Clone, Copy)]
pub struct Places {
    /// Those of the first patch.
    pub to: *mut f32,
    /// Floats from one product's sum to the next one's.
    pub product: usize,
    /// From sixteen channels to the next ones.
    pub channels: usize,
    /// From a patch to the next one.
    pub patch: usize,
    /// How many patches.
    pub count: usize,
}

impl Places {
    /// Stores a row of sums of a patch.
    #[inline(always)]
    unsafe fn store<V: Lanes>(&self, first: *mut f32, row: usize, sums: [V; 4]) {
        // SAFETY: by the contract of those that ask.
        unsafe {
            for j in 0..4 {
                sums[j].store(first.add((4 * row + j) * self.product));
            }
        }
    }
}

/// The sums of a row of four inputs by `B'`.
#[inline(always)]
unsafe fn of_inputs<V: Lanes>(d: [V; 4]) -> [V; 4] {
    // SAFETY: by the caller's contract.
    unsafe { [d[0].sub(d[2]), d[1].add(d[2]), d[2].sub(d[1]), d[1].sub(d[3])] }
}

over_lanes! {
    /// `B' d B` of patches that follow each other along four rows of inputs.
    ///
    /// # Safety
    /// The inputs inside lie there, and there is room for the sums of all channels, sixteen at a time.
    pub input_sums = inputs[](from: Patches<4>, to: Places)
}

#[inline(always)]
unsafe fn inputs<V: Lanes>(from: Patches<4>, to: Places) {
    // SAFETY: by the contract of `input_sums`.
    unsafe {
        match from.dtype {
            DType::F16 => inputs_of::<V, true>(from, to),
            _ => inputs_of::<V, false>(from, to),
        }
    }
}

#[inline(always)]
unsafe fn inputs_of<V: Lanes, const WIDENS: bool>(from: Patches<4>, to: Places) {
    // SAFETY: by the contract of `input_sums`.
    unsafe {
        for c in 0..from.channels / CHANNELS {
            some_inputs::<V, true, WIDENS>(&from, &to, c);
        }
        if !from.channels.is_multiple_of(CHANNELS) {
            some_inputs::<V, false, WIDENS>(&from, &to, from.channels / CHANNELS);
        }
    }
}

#[inline(always)]
unsafe fn some_inputs<V: Lanes, const WHOLE: bool, const WIDENS: bool>(from: &Patches<4>, to: &Places, c: usize) {
    // SAFETY: by the contract of `input_sums`.
    unsafe {
        let (channel, mut first) = (c * CHANNELS, to.to.add(c * to.channels));
        let mut left = of_inputs(from.column::<V, WHOLE, WIDENS>(0, channel));
        let mut right = of_inputs(from.column::<V, WHOLE, WIDENS>(1, channel));
        for patch in 0..to.count {
            let third = of_inputs(from.column::<V, WHOLE, WIDENS>(2 * patch + 2, channel));
            let last = of_inputs(from.column::<V, WHOLE, WIDENS>(2 * patch + 3, channel));
            for i in 0..4 {
                to.store(first, i, of_inputs([left[i], right[i], third[i], last[i]]));
            }
            (left, right, first) = (third, last, first.add(to.patch));
        }
    }
}

/// The sums of a row of three weights by `G`.
#[inline(always)]
unsafe fn of_weights<V: Lanes>(g: [V; 3]) -> [V; 4] {
    // SAFETY: by the caller's contract.
    unsafe {
        let ends = g[0].add(g[2]);
        let (sum, difference) = (ends.add(g[1]), ends.sub(g[1]));
        [g[0], V::zero().fma(0.5, sum), V::zero().fma(0.5, difference), g[2]]
    }
}

over_lanes! {
    /// `G g G'` of windows, of sixteen channels: nine vectors, `apart` floats from one to the next one.
    ///
    /// # Safety
    /// They lie at `from`, and there is room for the sums of a patch.
    pub window_sums = windows[](from: *const f32, apart: usize, to: Places)
}

#[inline(always)]
unsafe fn windows<V: Lanes>(from: *const f32, apart: usize, to: Places) {
    // SAFETY: by the contract of `window_sums`.
    unsafe {
        let mut down = [[V::zero(); 3]; 4];
        for j in 0..3 {
            let at = |i: usize| from.wrapping_add((3 * i + j) * apart);
            let sums = of_weights([V::load(at(0)), V::load(at(1)), V::load(at(2))]);
            for i in 0..4 {
                down[i][j] = sums[i];
            }
        }
        for i in 0..4 {
            to.store(to.to, i, of_weights(down[i]));
        }
    }
}

/// The sums of two gradients by `G`.
#[inline(always)]
unsafe fn of_gradients<V: Lanes>(g: [V; 2]) -> [V; 4] {
    // SAFETY: by the caller's contract.
    unsafe {
        let (sum, difference) = (g[0].add(g[1]), g[0].sub(g[1]));
        [g[0], V::zero().fma(0.5, sum), V::zero().fma(0.5, difference), g[1]]
    }
}

over_lanes! {
    /// `G dy G'` of patches that follow each other along two rows of gradients.
    ///
    /// # Safety
    /// As for [`input_sums`].
    pub gradient_sums = gradients_of_outputs[](from: Patches<2>, to: Places)
}

#[inline(always)]
unsafe fn gradients_of_outputs<V: Lanes>(from: Patches<2>, to: Places) {
    // SAFETY: by the contract of `gradient_sums`.
    unsafe {
        match from.dtype {
            DType::F16 => gradients_of_outputs_of::<V, true>(from, to),
            _ => gradients_of_outputs_of::<V, false>(from, to),
        }
    }
}

#[inline(always)]
unsafe fn gradients_of_outputs_of<V: Lanes, const WIDENS: bool>(from: Patches<2>, to: Places) {
    // SAFETY: by the contract of `gradient_sums`.
    unsafe {
        for c in 0..from.channels / CHANNELS {
            some_gradients::<V, true, WIDENS>(&from, &to, c);
        }
        if !from.channels.is_multiple_of(CHANNELS) {
            some_gradients::<V, false, WIDENS>(&from, &to, from.channels / CHANNELS);
        }
    }
}

#[inline(always)]
unsafe fn some_gradients<V: Lanes, const WHOLE: bool, const WIDENS: bool>(from: &Patches<2>, to: &Places, c: usize) {
    // SAFETY: by the contract of `gradient_sums`.
    unsafe {
        let (channel, mut first) = (c * CHANNELS, to.to.add(c * to.channels));
        for patch in 0..to.count {
            let left = of_gradients(from.column::<V, WHOLE, WIDENS>(2 * patch, channel));
            let right = of_gradients(from.column::<V, WHOLE, WIDENS>(2 * patch + 1, channel));
            for i in 0..4 {
                to.store(first, i, of_gradients([left[i], right[i]]));
            }
            first = first.add(to.patch);
        }
    }
}

/// Where two rows of outputs go.
pub struct Rows {
    /// Where each one's first output, of the first patch, would be; null for a row that is not wanted.
    pub to: [*mut f32; 2],
    /// Floats between outputs.
    pub pitch: usize,
    /// Those wanted.
    pub outputs: Range<usize>,
    /// Channels.
    pub columns: usize,
}

/// Two outputs of four products by `A'`.
#[inline(always)]
unsafe fn outputs_of<V: Lanes>(m: [V; 4]) -> [V; 2] {
    // SAFETY: by the caller's contract.
    unsafe { [m[0].add(m[1]).add(m[2]), m[1].sub(m[2]).sub(m[3])] }
}

over_lanes! {
    /// `A' m A` of the products of patches that follow each other, each of `width` floats: two rows of outputs.
    ///
    /// # Safety
    /// The products of as many patches lie at `from`, `product` floats from one to the next one; the outputs wanted have room.
    pub outputs = rows_of_outputs[](from: *const f32, width: usize, product: usize, to: Rows)
}

#[inline(always)]
unsafe fn rows_of_outputs<V: Lanes>(from: *const f32, width: usize, product: usize, to: Rows) {
    // SAFETY: by the contract of `outputs`.
    unsafe {
        for patch in to.outputs.start / 2..to.outputs.end.div_ceil(2) {
            for c in (0..to.columns).step_by(CHANNELS) {
                let from = from.add(patch * width + c);
                let mut down = [[V::zero(); 4]; 2];
                for j in 0..4 {
                    let at = |i: usize| from.wrapping_add((4 * i + j) * product);
                    let sums = outputs_of([V::load(at(0)), V::load(at(1)), V::load(at(2)), V::load(at(3))]);
                    down[0][j] = sums[0];
                    down[1][j] = sums[1];
                }
                for i in 0..2 {
                    let sums = outputs_of(down[i]);
                    for j in 0..2 {
                        let output = 2 * patch + j;
                        if !to.to[i].is_null() && output >= to.outputs.start && output < to.outputs.end {
                            store_row([sums[j]], to.to[i].wrapping_add(output * to.pitch + c), to.columns - c);
                        }
                    }
                }
            }
        }
    }
}

/// Three gradients of four products by `A'`.
#[inline(always)]
unsafe fn gradients_of<V: Lanes>(m: [V; 4]) -> [V; 3] {
    // SAFETY: by the caller's contract.
    unsafe {
        let sum = m[1].add(m[2]);
        [m[0].add(sum), m[1].sub(m[2]), sum.sub(m[3])]
    }
}

over_lanes! {
    /// `A' m A` of products, `rows` times sixteen of each: nine gradients, stored or added to what is there.
    ///
    /// # Safety
    /// The products lie there, one after the other, and there is room for the gradients.
    pub gradients = gradients_of_products[](from: *const f32, rows: usize, to: *mut f32, adds: bool)
}

#[inline(always)]
unsafe fn gradients_of_products<V: Lanes>(from: *const f32, rows: usize, to: *mut f32, adds: bool) {
    let size = rows * CHANNELS;
    // SAFETY: by the contract of `gradients`.
    unsafe {
        for row in 0..rows {
            let (from, to) = (from.add(row * CHANNELS), to.add(row * CHANNELS));
            let mut down = [[V::zero(); 4]; 3];
            for j in 0..4 {
                let at = |i: usize| from.wrapping_add((4 * i + j) * size);
                let sums = gradients_of([V::load(at(0)), V::load(at(1)), V::load(at(2)), V::load(at(3))]);
                for i in 0..3 {
                    down[i][j] = sums[i];
                }
            }
            for i in 0..3 {
                let sums = gradients_of(down[i]);
                for j in 0..3 {
                    let to = to.add((3 * i + j) * size);
                    let sum = if adds { V::load(to).add(sums[j]) } else { sums[j] };
                    sum.store(to);
                }
            }
        }
    }
}
