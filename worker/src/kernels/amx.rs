//! Products of `bf16` by matrix tiles (AMX): 32 outputs times 32 channels, sixteen pairs of contracted ones at a time.
//!
//! The instruction adds in an order of its own: of sixteen pairs (fewer at the end of a leaf, or of a tap's channels) the products
//! of the first halves one after the other, as well those of the second halves, then both sums, and that to what
//! was there; each step rounded, subnormal numbers taken for and given as zeros. So a mesh computes either all products of
//! `bf16` in this order or none: the session decides that, by what all its devices have.
//!
//! Roofline: a tile instruction takes 16 cycles for 16 x 16 x 16 pairs, and its sum is there after 52; with four sums at a
//! time neither that nor the loads of four tiles, 8 cycles each from the nearest cache, bind. Leaves of sixteen pairs as in
//! exact mode store and add what they sum, which takes longer than the products.

use super::tile::{Combine, DEPTH, Tile};
use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, _mm512_add_ps, _mm512_loadu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::sync::OnceLock;

/// Pairs, outputs and channels of a matrix tile at most.
const SIDE: usize = 16;
/// Outputs that are summed at a time, and channels of a panel at most.
const OUTPUTS: usize = 2 * SIDE;
const COLUMNS: usize = 2 * SIDE;

/// Whether the machine has the instructions and the system lets this process use them.
pub fn available() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| {
        let (bf16, tiles) = (1 << 22, 1 << 24);
        let has = |bits: u32| __cpuid_count(7, 0).edx & bits == bits;
        cfg!(target_os = "linux") && has(bf16 | tiles) && permitted()
    })
}

/// Asks the system to keep the tiles' contents when it changes threads.
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this call only sets what the process may use.
    unsafe {
        asm!("syscall", inout("rax") result, in("rdi") REQUEST, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

/// How the tiles are configured: palette, first row, bytes of a row and rows of each.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles: 0 to 3 for sums, 4 and 5 for outputs, 6 and 7 for channels; of so many outputs and pairs.
///
/// # Safety
/// The machine has the instructions.
unsafe fn configure(outputs: usize, pairs: usize) {
    let [first, second] = [outputs.min(SIDE), outputs.saturating_sub(SIDE).max(1)].map(|n| n as u8);
    let mut shape = Shape { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
    let (row, depth) = (4 * pairs as u16, pairs as u8);
    shape.bytes[..8].copy_from_slice(&[64, 64, 64, 64, row, row, 64, 64]);
    shape.rows[..8].copy_from_slice(&[first, first, second, second, first, second, depth, depth]);
    // SAFETY: by this function's contract; the shape is a valid one.
    unsafe { asm!("ldtilecfg [{shape}]", shape = in(reg) &shape, options(nostack, readonly)) };
}

/// A tile's outputs by a panel's columns.
#[repr(C, align(64))]
struct Sums([[f32; COLUMNS]; OUTPUTS]);

/// Pairs of a step that is not a whole one, zeros behind them.
#[repr(C, align(64))]
struct Padded {
    x: [[f32; SIDE]; OUTPUTS],
    w: [[f32; COLUMNS]; SIDE],
}

/// Computes `count` outputs of a panel of `width` columns.
///
/// # Safety
/// As for [`super::tile::run`]; the machine has the instructions, and channels follow each other in `x`.
pub unsafe fn run(width: usize, mut t: Tile, mut count: usize) {
    debug_assert!(t.step == 1 && (width == SIDE || width == COLUMNS));
    // Not cleared: everything is stored before it is read.
    let mut stack = [const { std::mem::MaybeUninit::<Sums>::uninit() }; DEPTH];
    // Leaves are one step or of whole steps but for the end.
    let pairs = t.channels.iter().map(|c| c.len()).max().unwrap_or(0).clamp(1, SIDE);
    let mut configured = 0;
    // SAFETY: by this function's contract.
    unsafe {
        while count > 0 {
            let outputs = count.min(OUTPUTS);
            if configured != outputs {
                configure(outputs, pairs);
                configured = outputs;
            }
            for (n, program) in t.nodes.iter().enumerate() {
                let out = t.out.add(n * t.node_pitch);
                let mut top = 0;
                for c in program {
                    match *c {
                        Combine::Leaf(l) => {
                            let sums = stack[top].as_mut_ptr();
                            if t.goes_on {
                                for r in 0..outputs {
                                    let row = sums.cast::<f32>().add(r * COLUMNS);
                                    std::ptr::copy_nonoverlapping(out.add(r * t.out_pitch), row, width);
                                }
                            }
                            leaf(&t, [outputs, width, pairs], l, sums);
                            top += 1;
                        }
                        Combine::Add => {
                            top -= 1;
                            let right = stack[top].as_ptr().cast();
                            add(stack[top - 1].as_mut_ptr().cast(), right, outputs);
                        }
                    }
                }
                let sums = stack[0].as_ptr().cast::<f32>();
                for r in 0..outputs {
                    std::ptr::copy_nonoverlapping(sums.add(r * COLUMNS), out.add(r * t.out_pitch), t.columns);
                }
            }
            t.x = t.x.wrapping_add(outputs * t.pitch);
            t.out = t.out.wrapping_add(outputs * t.out_pitch);
            count -= outputs;
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Sums a leaf; goes on from what is there if the tile says so.
#[inline(always)]
unsafe fn leaf(t: &Tile, [outputs, width, pairs]: [usize; 3], l: usize, sums: *mut Sums) {
    let (channels, row) = (&t.channels[l], 4 * COLUMNS);
    let below = sums.cast::<u8>().wrapping_add(SIDE * row);
    // SAFETY: by the contract of `run`.
    unsafe {
        if t.goes_on {
            asm!(
                "tileloadd tmm0, [{sums} + {row}*1]",
                "tileloadd tmm1, [{sums} + {row}*1 + 64]",
                "tileloadd tmm2, [{below} + {row}*1]",
                "tileloadd tmm3, [{below} + {row}*1 + 64]",
                sums = in(reg) sums, below = in(reg) below, row = in(reg) row, options(nostack, readonly)
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        for tap in t.taps {
            let mut x = t.x.add(tap[0] as usize + channels.start);
            let mut w = t.w.add(tap[1] as usize + channels.start * width);
            let mut left = channels.len();
            while left >= pairs {
                step([x, w], [t.pitch, width], outputs);
                (x, w, left) = (x.wrapping_add(pairs), w.wrapping_add(pairs * width), left - pairs);
            }
            if left > 0 {
                let mut padded = std::mem::MaybeUninit::<Padded>::uninit();
                let to = padded.as_mut_ptr();
                pad(x, t.pitch, left, &raw mut (*to).x, outputs);
                pad_rows(w, width, left, &raw mut (*to).w);
                step([(&raw const (*to).x).cast(), (&raw const (*to).w).cast()], [SIDE, COLUMNS], outputs);
            }
        }
        asm!(
            "tilestored [{sums} + {row}*1], tmm0",
            "tilestored [{sums} + {row}*1 + 64], tmm1",
            sums = in(reg) sums, row = in(reg) row, options(nostack)
        );
        if outputs > SIDE {
            asm!(
                "tilestored [{below} + {row}*1], tmm2",
                "tilestored [{below} + {row}*1 + 64], tmm3",
                below = in(reg) below, row = in(reg) row, options(nostack)
            );
        }
    }
}

/// Adds the products of a step to the sums: outputs that lie `pitch` elements apart, and channels in rows of `width`.
#[inline(always)]
unsafe fn step([x, w]: [*const f32; 2], [pitch, width]: [usize; 2], outputs: usize) {
    let (pitch, row, wide) = (4 * pitch, 4 * width, width == COLUMNS);
    let below = x.cast::<u8>().wrapping_add(SIDE * pitch);
    macro_rules! multiply {
        ($($line:literal)*) => {
            asm!($($line,)* x = in(reg) x, below = in(reg) below, pitch = in(reg) pitch, w = in(reg) w, row = in(reg) row,
                options(nostack, readonly))
        };
    }
    // SAFETY: by the contract of `run`. Not every case reads all registers.
    unsafe {
        match (outputs > SIDE, wide) {
            (true, true) => multiply!(
                "tileloadd tmm6, [{w} + {row}*1]"
                "tileloadd tmm4, [{x} + {pitch}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{w} + {row}*1 + 64]"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tileloadd tmm5, [{below} + {pitch}*1]"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
            (false, true) => multiply!(
                "# {below}"
                "tileloadd tmm6, [{w} + {row}*1]"
                "tileloadd tmm4, [{x} + {pitch}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{w} + {row}*1 + 64]"
                "tdpbf16ps tmm1, tmm4, tmm7"
            ),
            (true, false) => multiply!(
                "tileloadd tmm6, [{w} + {row}*1]"
                "tileloadd tmm4, [{x} + {pitch}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm5, [{below} + {pitch}*1]"
                "tdpbf16ps tmm2, tmm5, tmm6"
            ),
            (false, false) => multiply!(
                "# {below}"
                "tileloadd tmm6, [{w} + {row}*1]"
                "tileloadd tmm4, [{x} + {pitch}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
            ),
        }
    }
}

/// Copies `n` pairs of each output, and zeros behind them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
unsafe fn pad(x: *const f32, pitch: usize, n: usize, to: *mut [[f32; SIDE]; OUTPUTS], outputs: usize) {
    let mask = (1u16 << n).wrapping_sub(1);
    for r in 0..outputs {
        // SAFETY: by the contract of `run`; lanes that are masked out are not touched.
        unsafe { _mm512_storeu_ps((&raw mut (*to)[r]).cast(), _mm512_maskz_loadu_ps(mask, x.add(r * pitch))) };
    }
}

/// Copies `n` rows of channels, and zeros behind them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
unsafe fn pad_rows(w: *const f32, width: usize, n: usize, to: *mut [[f32; COLUMNS]; SIDE]) {
    for r in 0..SIDE {
        for v in 0..2 {
            let there = r < n && v * SIDE < width;
            // SAFETY: by the contract of `run`.
            unsafe {
                let lanes = if there { _mm512_loadu_ps(w.add(r * width + v * SIDE)) } else { _mm512_setzero_ps() };
                _mm512_storeu_ps((&raw mut (*to)[r]).cast::<f32>().add(v * SIDE), lanes);
            }
        }
    }
}

/// left = left + right, of so many outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
unsafe fn add(left: *mut f32, right: *const f32, outputs: usize) {
    // A compiler that sees rows of rows gathers and scatters.
    for i in (0..outputs * COLUMNS).step_by(SIDE) {
        // SAFETY: both have so many outputs.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(left.add(i)), _mm512_loadu_ps(right.add(i)));
            _mm512_storeu_ps(left.add(i), sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;
    use crate::kernels::tile::{self, lanes::normal};
    use proptest::prelude::*;
    use std::ops::Range;

    /// The sum of a leaf as the instruction's description has it.
    fn sum(x: &[f32], w: &[f32], t: &Tile, channels: &Range<usize>, [m, n, width]: [usize; 3], mut sum: f32) -> f32 {
        let half = |pair: f32, upper: bool| {
            normal(f32::from_bits(if upper { pair.to_bits() & 0xffff_0000 } else { pair.to_bits() << 16 }))
        };
        for tap in t.taps {
            for first in channels.clone().step_by(SIDE) {
                let mut halves = [0.0f32; 2];
                for c in first..(first + SIDE).min(channels.end) {
                    let x = x[m * t.pitch + tap[0] as usize + c];
                    let w = w[tap[1] as usize + c * width + n];
                    for (upper, s) in [false, true].into_iter().zip(&mut halves) {
                        *s = normal(half(x, upper).mul_add(half(w, upper), *s));
                    }
                }
                sum = normal(normal(halves[0] + halves[1]) + sum);
            }
        }
        sum
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn tiles_add_in_the_order_of_their_description(
            (count, wide, columns, taps) in (1usize..80, any::<bool>(), 1usize..33, 1usize..4),
            lengths in prop::collection::vec(1usize..40, 1..9),
            (seed, goes_on) in (any::<u32>(), any::<bool>()),
        ) {
            if !available() {
                return Ok(());
            }
            let width = if wide { 32 } else { 16 };
            let goes_on = goes_on && lengths.len() == 1;
            let columns = if goes_on { width } else { columns.min(width) };
            let units: usize = lengths.iter().sum();
            let mut at = 0;
            let channels: Vec<Range<usize>> = lengths.iter().map(|n| { at += n; at - n..at }).collect();
            let mut state = seed;
            let mut random = |n: usize| -> Vec<f32> {
                let mut next = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Now and then a subnormal number or one with no digits.
                    match state >> 24 {
                        0..4 => u32::from(state as u16 >> 9),
                        4..8 => 0,
                        _ => ((f32::from((state >> 16) as u16) / 65536.0 - 0.5).to_bits()) >> 16,
                    }
                };
                (0..n).map(|_| f32::from_bits(next() | next() << 16)).collect()
            };
            let x = random((count + taps) * units + OUTPUTS);
            let w = random(taps * units * width);
            let list: Vec<[u32; 2]> = (0..taps).map(|t| [(t * units) as u32, (t * units * width) as u32]).collect();
            // Leaves from the left, one added after the other.
            let mut program = vec![Combine::Leaf(0)];
            (1..channels.len()).for_each(|l| program.extend([Combine::Leaf(l), Combine::Add]));
            let start: Vec<f32> = (0..count * width).map(|i| i as f32 * 0.25).collect();
            let mut out = start.clone();
            let nodes = [program];
            let t = Tile {
                x: x.as_ptr(), pairs: true, pitch: units, step: 1, taps: &list, channels: &channels, w: w.as_ptr(), nodes: &nodes,
                goes_on, out: out.as_mut_ptr(), out_pitch: width, node_pitch: 0, columns,
            };
            // SAFETY: the buffers are as large as the tile reads and writes.
            unsafe { tile::run(Isa::Amx, width, t, count) };
            for m in 0..count {
                for n in 0..columns {
                    let begin = if goes_on { start[m * width + n] } else { 0.0 };
                    let mut leaves = channels.iter().map(|c| sum(&x, &w, &t, c, [m, n, width], begin));
                    let first = leaves.next().unwrap_or(0.0);
                    let wanted = leaves.fold(first, |a, b| a + b);
                    prop_assert_eq!(out[m * width + n].to_bits(), wanted.to_bits(), "{} and {}", out[m * width + n], wanted);
                }
            }
        }
    }
}
