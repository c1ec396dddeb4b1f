//! What the cores of this machine can do at the most: what speeds are a share of.

use super::isa::Isa;
use super::tile::{self, Combine, Tile, panel_width};
use mesh::dim::DType;
use std::time::{Duration, Instant};

/// Rows, and contracted elements or pairs, of products whose factors stay in the first-level cache.
const SIZES: [usize; 2] = [56, 64];
/// How often the speed is measured, and for how long at a time; the best one counts.
const TRIES: usize = 5;
const TIME: Duration = Duration::from_millis(2);

/// Bytes that are copied to measure the memory, by all threads together: more than most caches hold. Each piece is timed by
/// itself, so that a thread that has to wait for its core meanwhile spoils one of them only.
const COPIED: usize = 64 << 20;
const PIECE: usize = 2 << 20;

/// What a device can do at the most.
#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// Floating-point operations a second in products of `f32`, and of `bf16`.
    pub product_flops: [f64; 2],
    /// Bytes a second to and from memory.
    pub memory_bytes: f64,
}

impl Roofline {
    /// That of each of `devices` devices with `threads` threads, all at work at once: measured, in a tenth of a second.
    pub fn measure(devices: usize, threads: usize) -> Roofline {
        let (all, each) = (devices * threads, 1.0 / devices.max(1) as f64);
        Roofline {
            product_flops: [DType::F32, DType::Bf16].map(|dtype| product_flops(dtype, all) * each),
            memory_bytes: memory_bytes(all) * each,
        }
    }
}

/// What `one` measures on each of `threads` threads, as far as there are cores for them, added up.
fn on_all(threads: usize, one: impl Fn(usize) -> f64 + Sync) -> f64 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = threads.clamp(1, cores);
    std::thread::scope(|s| {
        let all: Vec<_> = (0..threads).map(|_| s.spawn(|| one(threads))).collect();
        all.into_iter().map(|t| t.join().unwrap_or(0.0)).sum()
    })
}

/// Bytes a second that `threads` threads read from memory and write to it at the most: those of copying more than the
/// caches hold, measured. What stays in a cache is faster.
pub fn memory_bytes(threads: usize) -> f64 {
    on_all(threads, |threads| {
        let from = vec![1u8; (COPIED / threads).max(PIECE)];
        let (mut to, mut best) = (vec![0u8; from.len()], 0.0f64);
        for _ in 0..TRIES {
            for (to, from) in to.chunks_exact_mut(PIECE).zip(from.chunks_exact(PIECE)) {
                let begun = Instant::now();
                std::hint::black_box(to).copy_from_slice(std::hint::black_box(from));
                best = best.max(2.0 * PIECE as f64 / begun.elapsed().as_secs_f64());
            }
        }
        best
    })
}

/// Floating-point operations a second that `threads` threads do at the most in products of a dtype, as far as there are
/// cores for them: that of the register tile on what lies in the nearest cache, measured.
pub fn product_flops(dtype: DType, threads: usize) -> f64 {
    on_all(threads, |_| one(dtype))
}

fn one(dtype: DType) -> f64 {
    let (isa, pairs, [rows, units]) = (Isa::detect(), dtype == DType::Bf16, SIZES);
    let width = panel_width(isa, usize::MAX);
    let (x, w, mut out) = (vec![0.0f32; rows * units], vec![0.0f32; units * width], vec![0.0f32; rows * width]);
    let flops = (2 * rows * width * units * (1 + usize::from(pairs))) as f64;
    let (mut best, channels) = (0.0f64, 0..units);
    for _ in 0..TRIES {
        let (begun, mut done) = (Instant::now(), 0.0);
        while begun.elapsed() < TIME {
            let tile = Tile {
                x: x.as_ptr(),
                pairs,
                pitch: units,
                step: 1,
                taps: &[[0, 0]],
                channels: std::slice::from_ref(&channels),
                w: w.as_ptr(),
                nodes: &[vec![Combine::Leaf(0)]],
                goes_on: false,
                out: out.as_mut_ptr(),
                out_pitch: width,
                node_pitch: 0,
                columns: width,
            };
            // SAFETY: all rows of x, the panel w and the results are as large as the tile says.
            unsafe { tile::run(isa, width, tile, rows) };
            done += flops;
        }
        best = best.max(done / begun.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_product_is_faster_than_what_is_measured() {
        let n = 192;
        let (a, b) = (vec![1.0f32; n * n], vec![1.0f32; n * n]);
        let begun = Instant::now();
        let mut c = vec![0.0f32; n * n];
        for i in 0..n {
            for k in 0..n {
                (0..n).for_each(|j| c[i * n + j] += a[i * n + k] * b[k * n + j]);
            }
        }
        assert_eq!(c[n * n - 1], n as f32);
        let naive = 2.0 * (n * n * n) as f64 / begun.elapsed().as_secs_f64();
        let most = product_flops(DType::F32, 1);
        assert!(most > naive, "{most}, {naive}");
        // Without an instruction for pairs, bf16 is imitated.
        let most = product_flops(DType::Bf16, 1);
        assert!(most > naive || !Isa::detect().pairs() && most > 0.0, "bf16: {most}, {naive}");
    }

    #[test]
    fn memory_is_slower_than_a_cache() {
        // A loop, since what copies bytes may be an instruction that is slow on short ones.
        let (mut a, mut b) = (vec![1u64; 2 << 10], vec![0u64; 2 << 10]);
        let mut cached = 0.0f64;
        for _ in 0..100 {
            let begun = Instant::now();
            for _ in 0..100 {
                std::hint::black_box(&mut b).iter_mut().zip(std::hint::black_box(&a)).for_each(|(b, a)| *b = a ^ 1);
                std::mem::swap(&mut a, &mut b);
            }
            cached = cached.max((100 * 2 * 8 * a.len()) as f64 / begun.elapsed().as_secs_f64());
        }
        let memory = memory_bytes(1);
        assert!(memory > 1e8 && memory < cached, "{memory} and {cached} bytes a second");
    }
}
