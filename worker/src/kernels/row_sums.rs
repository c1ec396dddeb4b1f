//! Sums (maxima, minima) of rows that lie in a block: a leaf of a row goes to 16 lanes, which are added as a binary tree.
//!
//! Roofline: the block's values, once, from the first-level cache; what binds are the trees, of 15 additions a leaf. With
//! AVX-512 sixteen of them are one over vectors, each step of which halves two of them into one. The compiler itself
//! gathers and scatters lanes there, which takes several times as long, and more where its arrays cross lines of the cache.

use super::isa::Isa;
use super::tile::Combine;
use mesh::ops::reduce::ReduceFn;
use std::ops::Range;

/// Lanes of a leaf.
pub(super) const LANES: usize = 16;
/// Values of a row at most for it to be summed without lanes.
pub(super) const SHORT: usize = 8;
/// Sums on a stack at most: leaves of a row, by halves.
const DEPTH: usize = 16;

/// Adds a run of values to the lanes; value `i` goes to lane `i % 16`.
#[inline(always)]
pub(super) fn into_lanes(lanes: &mut [f32; LANES], v: &[f32], f: impl Fn(f32, f32) -> f32) {
    let mut local = *lanes;
    let (whole, rest) = v.as_chunks::<LANES>();
    for v in whole {
        for l in 0..LANES {
            local[l] = f(local[l], v[l]);
        }
    }
    local.iter_mut().zip(rest).for_each(|(l, v)| *l = f(*l, *v));
    *lanes = local;
}

/// The lanes, added as a binary tree.
#[inline(always)]
pub(super) fn from_lanes(mut l: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            l[i] = f(l[i], l[i + half]);
        }
    }
    l[0]
}

/// The sums of rows of `n` values each, by the stack machine of a node over leaves inside a row; `identity` is the sum of
/// nothing.
#[inline(always)]
pub(super) fn rows(
    program: &[Combine],
    leaves: &[Vec<Range<usize>>],
    v: &[f32],
    n: usize,
    sums: &mut [f32],
    identity: f32,
    f: impl Fn(f32, f32) -> f32,
) {
    let whole = |c: &Combine| matches!(c, Combine::Leaf(l) if leaves[*l][0] == (0..n));
    if n <= SHORT && program.iter().all(whole) {
        return match n {
            1 => short::<1>(v, sums, identity, f),
            2 => short::<2>(v, sums, identity, f),
            3 => short::<3>(v, sums, identity, f),
            4 => short::<4>(v, sums, identity, f),
            5 => short::<5>(v, sums, identity, f),
            6 => short::<6>(v, sums, identity, f),
            7 => short::<7>(v, sums, identity, f),
            8 => short::<8>(v, sums, identity, f),
            _ => sums.fill(identity),
        };
    }
    for (sum, v) in sums.iter_mut().zip(v.chunks_exact(n.max(1))) {
        let (mut stack, mut top) = ([0.0f32; DEPTH], 0);
        for c in program {
            match *c {
                Combine::Leaf(l) => {
                    let mut lanes = [identity; LANES];
                    into_lanes(&mut lanes, &v[leaves[l][0].clone()], &f);
                    stack[top] = from_lanes(lanes, &f);
                    top += 1;
                }
                Combine::Add => {
                    top -= 1;
                    stack[top - 1] = f(stack[top - 1], stack[top]);
                }
            }
        }
        *sum = stack[0];
    }
}

/// The sums of rows of at most [`SHORT`] values that are one leaf: the same tree, without the lanes that have none, since
/// adding the sum of nothing to a sum does not change it.
#[inline(always)]
fn short<const N: usize>(v: &[f32], sums: &mut [f32], identity: f32, f: impl Fn(f32, f32) -> f32) {
    for (sum, v) in sums.iter_mut().zip(v.as_chunks::<N>().0) {
        let mut lanes = v.map(|v| f(identity, v));
        for half in [4, 2, 1] {
            for l in half..N.min(2 * half) {
                lanes[l - half] = f(lanes[l - half], lanes[l]);
            }
        }
        *sum = lanes[0];
    }
}

/// As [`rows`], of floats and not of short rows, with instructions of AVX-512; false if that is not the instruction set.
pub(super) fn wide(
    isa: Isa,
    by: ReduceFn,
    program: &[Combine],
    leaves: &[Vec<Range<usize>>],
    v: &[f32],
    n: usize,
    sums: &mut [f32],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        assert!(sums.len() * n <= v.len() && leaves.iter().all(|l| l[0].end <= n), "rows behind the values");
        // SAFETY: an `Isa` is only made after the machine was seen to have it, and the rows lie in the values.
        unsafe { avx512::rows_by(by, program, leaves, v, n, sums) };
        return true;
    }
    let _ = (isa, by, program, leaves, v, n, sums);
    false
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::super::vm::BLOCK;
    use super::{Combine, DEPTH, LANES, ReduceFn};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;
    use std::ops::Range;

    /// As [`rows`], combined by that function.
    ///
    /// # Safety
    /// As for that.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub unsafe fn rows_by(
        by: ReduceFn,
        program: &[Combine],
        leaves: &[Vec<Range<usize>>],
        v: &[f32],
        n: usize,
        sums: &mut [f32],
    ) {
        let identity = by.identity();
        // SAFETY: by this function's contract.
        unsafe {
            match by {
                ReduceFn::Sum => rows(program, leaves, v, n, sums, identity, |a, b| _mm512_add_ps(a, b)),
                ReduceFn::Max => rows(program, leaves, v, n, sums, identity, |a, b| max(a, b)),
                ReduceFn::Min => rows(program, leaves, v, n, sums, identity, |a, b| min(a, b)),
            }
        }
    }

    /// As `math::max`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn max(a: __m512, b: __m512) -> __m512 {
        let y = _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(b, a), a);
        let y = _mm512_mask_and_ps(y, _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), a, b);
        _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b), _mm512_set1_ps(f32::NAN))
    }

    /// As `math::min`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn min(a: __m512, b: __m512) -> __m512 {
        let y = _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), a);
        let y = _mm512_mask_or_ps(y, _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), a, b);
        _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b), _mm512_set1_ps(f32::NAN))
    }

    /// The sums of rows: of sixteen leaves at a time, those that lie at one place of all rows first, and then of up to sixteen
    /// rows at a time.
    ///
    /// # Safety
    /// As many rows of `n` values as there are sums lie in `v`, and the leaves in a row.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn rows(
        program: &[Combine],
        leaves: &[Vec<Range<usize>>],
        v: &[f32],
        n: usize,
        sums: &mut [f32],
        identity: f32,
        f: impl Fn(__m512, __m512) -> __m512 + Copy,
    ) {
        let identity = _mm512_set1_ps(identity);
        // Not cleared, which would take a tenth of the time.
        let mut of_leaves = [const { MaybeUninit::<f32>::uninit() }; BLOCK + LANES];
        let (mut lanes, mut count) = ([identity; LANES], 0);
        for c in program {
            let Combine::Leaf(l) = *c else { continue };
            for row in 0..sums.len() {
                // SAFETY: by this function's contract.
                lanes[count % LANES] = unsafe { into(identity, v.as_ptr().add(row * n), &leaves[l][0], f) };
                count += 1;
                if count % LANES == 0 {
                    store(&mut of_leaves[count - LANES..], tree(&lanes, f));
                }
            }
        }
        if count % LANES > 0 {
            store(&mut of_leaves[count - count % LANES..], tree(&lanes, f));
        }
        let apart = sums.len();
        let mut stack = [identity; DEPTH];
        for (first, sums) in sums.chunks_mut(LANES).enumerate() {
            let (mut at, mut top, there) = (first * LANES, 0, some(sums.len()));
            for c in program {
                match *c {
                    Combine::Leaf(_) => {
                        stack[top] = load(&of_leaves[at..], there);
                        at += apart;
                        top += 1;
                    }
                    Combine::Add => {
                        top -= 1;
                        stack[top - 1] = f(stack[top - 1], stack[top]);
                    }
                }
            }
            // SAFETY: what is masked is not written.
            unsafe { _mm512_mask_storeu_ps(sums.as_mut_ptr(), there, stack[0]) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn load(from: &[MaybeUninit<f32>], there: u16) -> __m512 {
        // SAFETY: what is masked is not read, and trees have stored what is not.
        unsafe { _mm512_maskz_loadu_ps(there, from[..there.count_ones() as usize].as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn store(to: &mut [MaybeUninit<f32>], v: __m512) {
        // SAFETY: there are as many floats.
        unsafe { _mm512_storeu_ps(to[..LANES].as_mut_ptr().cast(), v) };
    }

    /// The first lanes, sixteen at most.
    fn some(n: usize) -> u16 {
        (0xffffu32 >> (LANES - n)) as u16
    }

    /// Adds a run of a row's values to its lanes.
    ///
    /// # Safety
    /// The run lies behind `row`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn into(
        mut lanes: __m512,
        row: *const f32,
        run: &Range<usize>,
        f: impl Fn(__m512, __m512) -> __m512,
    ) -> __m512 {
        let mut at = run.start;
        // SAFETY: by this function's contract; what is masked is not read.
        unsafe {
            while at + LANES <= run.end {
                lanes = f(lanes, _mm512_loadu_ps(row.add(at)));
                at += LANES;
            }
            if at < run.end {
                let rest = some(run.end - at);
                lanes = _mm512_mask_mov_ps(lanes, rest, f(lanes, _mm512_maskz_loadu_ps(rest, row.add(at))));
            }
        }
        lanes
    }

    /// The trees of sixteen vectors' lanes, one result a vector: a step halves two vectors into one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn tree(v: &[__m512; LANES], f: impl Fn(__m512, __m512) -> __m512) -> __m512 {
        let eights = |a, b| f(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        let fours = |a, b| f(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let twos = |a, b| f(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
        let ones = |a, b| f(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
        // Every fourth vector, so that the results come out in order.
        let of = |i: usize| fours(eights(v[i], v[i + 4]), eights(v[i + 8], v[i + 12]));
        ones(twos(of(0), of(1)), twos(of(2), of(3)))
    }
}
