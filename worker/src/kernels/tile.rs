//! The register tile that every product runs on: a few outputs times 16 or 32 channels, summed over taps and channels.
//!
//! `out[m, n] = sum over leaves, taps, c of x[m * pitch + tap.0 + c * step] * w[tap.1 + c * N + n]`, one fused multiply-add
//! after the other within a leaf, leaves combined along the summation tree.
//!
//! Of `bf16`, a channel is a pair of neighbours ([`super::pack`]): first the products of their second halves are added,
//! then those of the first ones, each a fused multiply-add that takes subnormal factors for zeros and gives zeros for
//! subnormal results, as the instruction for it does. Where there is no such instruction, usual ones sum a tile, and again one by
//! one with those zeros where the processor has seen a subnormal number.
//!
//! Roofline: 2 * M * N flops for M broadcasts and N loads from the cache; with M x N = 14 x 32 the multiply-add units
//! bind (16 lanes a cycle on the machine at hand).

pub(super) mod lanes;
mod leaves;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use super::isa::Isa;
pub(super) use lanes::{Lanes, Portable, PortablePairs, multiply, store_row};
pub use leaves::{Combine, Leaves};
pub(super) use leaves::{LeafSums, Sums, add, added, combined};
use std::ops::Range;

/// A tile's operands.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// First output's first input element.
    pub x: *const f32,
    /// Whether inputs and weights are pairs of `bf16`.
    pub pairs: bool,
    /// Elements (pairs) from one output's inputs to the next one's.
    pub pitch: usize,
    /// Elements from one channel to the next one.
    pub step: usize,
    /// By tap: offset into `x`, offset into `w`.
    pub taps: &'a [[u32; 2]],
    /// By leaf: the channels.
    pub channels: &'a [Range<usize>],
    /// Packed weights: channel-major, N columns each.
    pub w: *const f32,
    /// The stack machine of each node.
    pub nodes: &'a [Vec<Combine>],
    /// Whether the sum of a single leaf goes on from what the outputs hold; all columns are stored then.
    pub goes_on: bool,
    /// First output.
    pub out: *mut f32,
    /// Elements between outputs.
    pub out_pitch: usize,
    /// Elements between nodes.
    pub node_pitch: usize,
    /// Columns to store, at most N.
    pub columns: usize,
}

/// Deepest stack of a channel tree: chunks of one dimension, by halves.
pub(super) const DEPTH: usize = 16;

impl<V: Lanes, const MR: usize, const NV: usize> LeafSums<V, MR, NV> for Tile<'_> {
    #[inline(always)]
    unsafe fn leaf(&self, leaf: usize, mut sums: Sums<V, MR, NV>) -> Sums<V, MR, NV> {
        let channels = &self.channels[leaf];
        // SAFETY: by the contract of `run`.
        unsafe {
            for tap in self.taps {
                let mut x = self.x.add(tap[0] as usize + channels.start * self.step);
                let mut w = self.w.add(tap[1] as usize + channels.start * NV * 16);
                for _ in 0..channels.len() {
                    let row: [V; NV] = std::array::from_fn(|v| V::load(w.add(v * 16)));
                    for (m, sums) in sums.iter_mut().enumerate() {
                        multiply(sums, x.add(m * self.pitch), row);
                    }
                    x = x.add(self.step);
                    w = w.add(NV * 16);
                }
            }
            sums
        }
    }
}

#[inline(always)]
unsafe fn tile<V: Lanes, const MR: usize, const NV: usize>(t: &Tile) {
    // SAFETY: by the contract of `run`.
    unsafe {
        for (n, program) in t.nodes.iter().enumerate() {
            let out = t.out.add(n * t.node_pitch);
            if !node::<V, MR, NV>(t, program, out) {
                node::<V::Careful, MR, NV>(t, program, out);
            }
        }
    }
}

/// Sums a node; gives whether it has, or the sums are odd.
#[inline(always)]
unsafe fn node<V: Lanes, const MR: usize, const NV: usize>(t: &Tile, program: &[Combine], out: *mut f32) -> bool {
    // SAFETY: by the contract of `run`.
    unsafe {
        let mut first = [[V::zero(); NV]; MR];
        if t.goes_on {
            for (m, row) in first.iter_mut().enumerate() {
                *row = std::array::from_fn(|v| V::load(out.add(m * t.out_pitch + v * 16)));
            }
        }
        let sums = combined::<V, Tile, MR, NV, DEPTH>(t, program, first);
        if V::is_odd(&sums) {
            return false;
        }
        for (m, row) in sums.into_iter().enumerate() {
            store_row(row, out.add(m * t.out_pitch), t.columns);
        }
        true
    }
}

macro_rules! tiles {
    ($($(#[$attribute:meta])* $name:ident: $lanes:ty;)*) => {
        $(
            $(#[$attribute])*
            unsafe fn $name<const MR: usize, const NV: usize>(t: &Tile) {
                // SAFETY: by the contract of `run`.
                unsafe { tile::<$lanes, MR, NV>(t) }
            }
        )*
    };
}

tiles! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
    tile_avx512: x86::Avx512;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    tile_avx2: x86::Avx2;
    tile_portable: Portable;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
    pairs_avx512: x86::Avx512Pairs;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    pairs_avx2: x86::Avx2Pairs;
    pairs_portable: PortablePairs;
}

/// Columns of a panel for so many output channels.
pub fn panel_width(isa: Isa, columns: usize) -> usize {
    if isa >= Isa::Avx512 && columns > 16 { 32 } else { 16 }
}

/// Outputs up to which it is worked out by which tiles they are computed.
pub(super) const COUNTED: usize = 128;
/// Vectors of sums that a tile needs to keep the multiply-add units busy: two begin in a cycle, and take six.
const BUSY: usize = 12;

/// By number of outputs that are left: rows of the next tile, the largest of those with which all of them take the fewest cycles
/// when tiles have these sizes, times so many vectors. Small tiles take as long as `BUSY` sums: 16 rows are two tiles of 8
/// sooner than 14 and 2.
pub(super) const fn tiling<const N: usize>(sizes: [usize; N], vectors: usize) -> [u8; COUNTED] {
    let (mut cost, mut next, mut left) = ([0; COUNTED], [0; COUNTED], 1);
    while left < COUNTED {
        let mut i = 0;
        cost[left] = usize::MAX;
        while i < N {
            if sizes[i] <= left {
                let sums = sizes[i] * vectors;
                // A tile's beginning and end cost about a vector more.
                let all = cost[left - sizes[i]] + 1 + if sums < BUSY { BUSY } else { sums };
                if all < cost[left] {
                    (cost[left], next[left]) = (all, sizes[i] as u8);
                }
            }
            i += 1;
        }
        left += 1;
    }
    next
}

/// Computes `count` outputs of a panel of `width` columns, tile after tile.
///
/// # Safety
/// `x`, `w` and `out` reach as far as the tile says; `isa` is the machine's.
pub unsafe fn run(isa: Isa, width: usize, mut t: Tile, mut count: usize) {
    debug_assert!(t.nodes.iter().all(|n| n.len() < 1 << DEPTH));
    macro_rules! steps {
        ($function:ident, $nv:literal, $($mr:literal),*) => {{
            const NEXT: [u8; COUNTED] = tiling([$($mr),*], $nv);
            while count > 0 {
                let rows = usize::from(NEXT[count.min(COUNTED - 1)]);
                // SAFETY: by this function's contract.
                unsafe {
                    match rows {
                        $($mr => $function::<$mr, $nv>(&t),)*
                        _ => unreachable!("a tile of {rows} rows"),
                    }
                }
                t.x = t.x.wrapping_add(rows * t.pitch);
                t.out = t.out.wrapping_add(rows * t.out_pitch);
                count -= rows;
            }
        }};
    }
    // Of several leaves two are summed in registers, by tiles of half the rows.
    let several = t.nodes.iter().any(|n| n.len() > 1);
    match (isa, t.pairs, width) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, true, _) => {
            // SAFETY: by this function's contract.
            unsafe { super::amx::run(width, t, count) }
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, 32) if several => steps!(tile_avx512, 2, 7, 6, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, _) if several => steps!(tile_avx512, 1, 14, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, 32) => steps!(tile_avx512, 2, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, _) => steps!(tile_avx512, 1, 16, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, false, _) => steps!(tile_avx2, 1, 6, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, 32) if isa.pairs() && several => steps!(pairs_avx512, 2, 7, 6, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, _) if isa.pairs() && several => steps!(pairs_avx512, 1, 14, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, 32) if isa.pairs() => steps!(pairs_avx512, 2, 14, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, _) if isa.pairs() => steps!(pairs_avx512, 1, 24, 16, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, true, 32) => steps!(pairs_avx2, 2, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx2, true, _) => steps!(pairs_avx2, 1, 4, 1),
        (_, true, _) => steps!(pairs_portable, 1, 4, 1),
        _ => steps!(tile_portable, 1, 4, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Products that are subnormal, exactly or rounded, factors that are, and sums that become so.
    #[test]
    fn pairs_are_summed_alike_where_numbers_are_subnormal() {
        let some = [1.0f32, -1.0, 3.0, 0.0, 1.5e-30, -1.5e-30, 1e-38, -1.25e-38, 1e-39, 1e30, 7e-9, f32::MIN_POSITIVE];
        let stream = mesh::rng::Stream { seed: 5, step: 0, key: 0 };
        let half = |i: usize| some[stream.bits(i as u64) as usize % some.len()].to_bits() >> 16;
        let pair = |i: usize| f32::from_bits(half(2 * i) | half(2 * i + 1) << 16);
        for (case, units) in [1, 1, 1, 2, 3, 5].into_iter().cycle().take(120).enumerate() {
            let (count, width) = (6, if case % 2 == 0 { 16 } else { 32 });
            let x: Vec<f32> = (0..count * units).map(|i| pair(case * 10_000 + i)).collect();
            let w: Vec<f32> = (0..units * width).map(|i| pair(case * 10_000 + 5_000 + i)).collect();
            let (nodes, all) = ([vec![Combine::Leaf(0)]], 0..units);
            let sums = |isa: Isa| {
                let panels = width / panel_width(isa, width);
                let mut out = vec![0.0f32; count * width];
                for panel in 0..panels {
                    let columns = width / panels;
                    let w: Vec<f32> =
                        w.chunks(width).flat_map(|row| row[panel * columns..][..columns].to_vec()).collect();
                    let tile = Tile {
                        x: x.as_ptr(),
                        pairs: true,
                        pitch: units,
                        step: 1,
                        taps: &[[0, 0]],
                        channels: std::slice::from_ref(&all),
                        w: w.as_ptr(),
                        nodes: &nodes,
                        goes_on: false,
                        out: out[panel * columns..].as_mut_ptr(),
                        out_pitch: width,
                        node_pitch: 0,
                        columns,
                    };
                    // SAFETY: the factors are as long as the tile says, and so are the outputs.
                    unsafe { run(isa, columns, tile, count) };
                }
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let expected = sums(Isa::Portable);
            // Matrix tiles sum in another order.
            for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Amx) {
                assert!(sums(isa) == expected, "case {case} on {isa:?}");
            }
        }
    }

    #[test]
    fn outputs_are_computed_by_tiles_that_keep_the_units_busy() {
        let tiles = |mut left: usize| {
            let next = tiling([14, 8, 4, 2, 1], 2);
            let mut all = Vec::new();
            while left > 0 {
                all.push(usize::from(next[left.min(COUNTED - 1)]));
                left -= all[all.len() - 1];
            }
            all
        };
        assert_eq!(tiles(16), [8, 8]);
        assert_eq!(tiles(32), [8; 4]);
        assert_eq!(tiles(58), [14, 14, 14, 8, 8]);
        assert_eq!(tiles(112), [14; 8]);
        assert_eq!(tiles(1), [1]);
        assert!((0..1000).all(|n| tiles(n).iter().sum::<usize>() == n));
    }
}
