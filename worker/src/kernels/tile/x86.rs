//! Vectors of sixteen by the instructions of x86: AVX-512, its products of `bf16`, and AVX2.

use super::Sums;
use super::lanes::{Lanes, PortablePairs};
use crate::kernels::half::F16;
use std::arch::asm;
use std::arch::x86_64::*;

/// Exceptions that the processor has noted since they were forgotten: a subnormal factor or term, and a result that was
/// rounded to one or near one.
const ODD: u32 = 1 << 1 | 1 << 4;
/// All of the exceptions.
const NOTED: u32 = 0x3f;

#[derive(Clone, Copy)]
pub struct Avx512(__m512);

impl Lanes for Avx512 {
    type Careful = Avx512;
    const REGISTERS: usize = 32;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as all of this impl, only used by functions compiled for AVX-512; pointers by the callers' contracts.
        Avx512(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: as above; lanes that are masked out are not touched.
        Avx512(unsafe { _mm512_maskz_loadu_ps((1u16 << n).wrapping_sub(1), p) })
    }
    #[inline(always)]
    unsafe fn load_wide(p: *const F16) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_ps(p, (1u16 << n).wrapping_sub(1), self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), w.0, self.0) })
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
}

/// Pairs of `bf16` by the instruction for them.
#[derive(Clone, Copy)]
pub struct Avx512Pairs(Avx512);

impl Lanes for Avx512Pairs {
    type Careful = Avx512Pairs;
    const REGISTERS: usize = 32;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as all of this impl, only used by functions compiled for AVX-512 with BF16; pointers by the callers'
        // contracts.
        Avx512Pairs(unsafe { Avx512::zero() })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Avx512Pairs(unsafe { Avx512::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.0.store(p) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: as above.
        Avx512Pairs(unsafe { Avx512::load_first(p, n) })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: as above.
        unsafe { self.0.store_first(p, n) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: as above; vectors of pairs are vectors of 32 bits each.
        unsafe {
            let pairs = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
            Avx512Pairs(Avx512(_mm512_dpbf16_ps(self.0.0, pairs(_mm512_set1_ps(x)), pairs(w.0.0))))
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn fma_from(self, x: *const f32, w: Self) -> Self {
        let mut sum = self.0.0;
        // The intrinsic is not compiled with a factor from memory, and a broadcast of its own takes a third of the time of a
        // product (Zen 4).
        // SAFETY: as above; a pair lies at `x`.
        unsafe {
            std::arch::asm!(
                "vdpbf16ps {sum}, {w}, dword ptr [{x}]{{1to16}}",
                sum = inout(zmm_reg) sum, w = in(zmm_reg) w.0.0, x = in(reg) x,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        Avx512Pairs(Avx512(sum))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx512Pairs(unsafe { self.0.add(other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx512Pairs(unsafe { self.0.sub(other.0) })
    }
}

#[derive(Clone, Copy)]
pub struct Avx2(__m256, __m256);

impl Lanes for Avx2 {
    type Careful = Avx2;
    const REGISTERS: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as all of this impl, only used by functions compiled for AVX2 and FMA; pointers by the callers' contracts.
        unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let x = _mm256_set1_ps(x);
            Avx2(_mm256_fmadd_ps(x, w.0, self.0), _mm256_fmadd_ps(x, w.1, self.1))
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
}

/// Pairs of `bf16` by two multiply-adds each. Those keep subnormal numbers, which the instruction for pairs does not: where
/// the processor has noted one, the sums are odd.
#[derive(Clone, Copy)]
pub struct Avx2Pairs(Avx2);

impl Avx2Pairs {
    /// The first halves and the second ones, as floats.
    #[inline(always)]
    unsafe fn halves(pairs: __m256) -> [__m256; 2] {
        // SAFETY: only used by functions compiled for AVX2.
        unsafe {
            let pairs = _mm256_castps_si256(pairs);
            let second = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(second)]
        }
    }
}

impl Lanes for Avx2Pairs {
    type Careful = PortablePairs;
    const REGISTERS: usize = 0;
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn is_odd<const MR: usize, const NV: usize>(sums: &Sums<Self, MR, NV>) -> bool {
        let mut state = 0u32;
        // SAFETY: only used by functions compiled for AVX2; the state is that of before but for the exceptions.
        unsafe {
            for row in sums {
                for Avx2Pairs(Avx2(a, b)) in row {
                    // A sum that is subnormal itself is a term here.
                    asm!(
                        "vaddps {t}, {a}, {a}",
                        "vaddps {t}, {b}, {b}",
                        a = in(ymm_reg) *a, b = in(ymm_reg) *b, t = out(ymm_reg) _, options(nomem, nostack),
                    );
                }
            }
            asm!("stmxcsr dword ptr [{state}]", state = in(reg) &raw mut state, options(nostack));
            let odd = state & ODD != 0;
            if odd {
                state &= !NOTED;
                asm!("ldmxcsr dword ptr [{state}]", state = in(reg) &raw const state, options(nostack));
            }
            odd
        }
    }
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as all of this impl, only used by functions compiled for AVX2 and FMA; pointers by the callers' contracts.
        Avx2Pairs(unsafe { Avx2::zero() })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Avx2Pairs(unsafe { Avx2::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.0.store(p) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let [x0, x1] = Avx2Pairs::halves(_mm256_set1_ps(x));
            let ([a0, a1], [b0, b1]) = (Avx2Pairs::halves(w.0.0), Avx2Pairs::halves(w.0.1));
            Avx2Pairs(Avx2(
                _mm256_fmadd_ps(x0, a0, _mm256_fmadd_ps(x1, a1, self.0.0)),
                _mm256_fmadd_ps(x0, b0, _mm256_fmadd_ps(x1, b1, self.0.1)),
            ))
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx2Pairs(unsafe { self.0.add(other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Avx2Pairs(unsafe { self.0.sub(other.0) })
    }
}
