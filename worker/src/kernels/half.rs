//! Floats of 16 bits, and `f16` from and to `f32`: round to nearest, ties to even, subnormal numbers kept, infinities for
//! what is too large. Instructions where there are some (F16C, AVX-512), and the same bits without.
//!
//! Roofline: the bytes, read and written once.

use super::isa::Isa;

/// An element that is computed with as the `f32` that it is.
pub trait Element: Copy {
    /// As `f32`.
    fn wide(self) -> f32;
    /// Of a float that is one.
    fn of(x: f32) -> Self;
    /// The sum; of 16-bit floats, if one of them is 0.
    fn plus(self, other: Self) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn plus(self, other: f32) -> f32 {
        self + other
    }
}

/// The bits of a `bf16`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for Bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn of(x: f32) -> Bf16 {
        Bf16((x.to_bits() >> 16) as u16)
    }
    #[inline(always)]
    fn plus(self, other: Bf16) -> Bf16 {
        Bf16(self.0 | other.0)
    }
}

/// The bits of an `f16`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(pub u16);

/// Bits that a mantissa of `f32` has more.
const MORE: u32 = 13;
/// The sign of an `f32`.
const SIGN: u32 = 1 << 31;
/// What makes a NaN a quiet one.
const QUIET: u32 = 1 << 22;

impl Element for F16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        let bits = u32::from(self.0);
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << MORE);
        // The exponent counts from another number; there is none of a subnormal number, which is a multiple of 2^-24.
        let normal = magnitude + (112 << 23);
        let subnormal = (f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let odd = magnitude | 0x7f80_0000 | if magnitude > 0x7c00 << MORE { QUIET } else { 0 };
        let wide = if magnitude < 0x400 << MORE { subnormal } else { normal };
        f32::from_bits(sign | if magnitude >= 0x7c00 << MORE { odd } else { wide })
    }
    #[inline(always)]
    fn of(x: f32) -> F16 {
        let (sign, magnitude) = (x.to_bits() & SIGN, x.to_bits() & !SIGN);
        // Of normal numbers the mantissa is cut; a carry goes to the exponent, up to that of an infinity.
        let nearest = (magnitude + 0xfff + (magnitude >> MORE & 1)) >> MORE;
        let normal = nearest.wrapping_sub(112 << 10).min(0x7c00);
        // Half has the last place that subnormal numbers have.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let nan = 0x7e00 | magnitude >> MORE & 0x3ff;
        let half = if magnitude < 113 << 23 { subnormal } else { normal };
        let half = if magnitude > 0x7f80_0000 { nan } else { half };
        F16((sign >> 16 | half) as u16)
    }
    #[inline(always)]
    fn plus(self, other: F16) -> F16 {
        F16(self.0 | other.0)
    }
}

/// By the instructions that there are for it.
macro_rules! by_instruction {
    ($isa:expr, $from:expr, $to:expr, $one:expr, $avx2:ident, $avx512:ident) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` is only made after the machine was seen to have it.
            Isa::Avx512 | Isa::Amx => unsafe { x86::$avx512($from, $to) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::$avx2($from, $to) },
            _ => $to.iter_mut().zip($from).for_each(|(to, from)| *to = $one(*from)),
        }
    };
}

#[inline(always)]
fn widened(half: u16) -> u32 {
    F16(half).wide().to_bits()
}

#[inline(always)]
fn narrowed(float: u32) -> u16 {
    F16::of(f32::from_bits(float)).0
}

#[inline(always)]
fn rounded(float: u32) -> u32 {
    widened(narrowed(float))
}

/// Makes `f16` wide: the bits of the floats that they are.
pub fn widen(isa: Isa, from: &[u16], to: &mut [u32]) {
    by_instruction!(isa, from, to, widened, widen_avx2, widen_avx512);
}

/// Makes `n` `f16` wide.
///
/// # Safety
/// So many lie at `from`, and there is room for as many floats at `to`.
pub unsafe fn widen_to(isa: Isa, from: *const u16, n: usize, to: *mut f32) {
    // SAFETY: by this function's contract; floats are taken for their bits.
    let (from, to) = unsafe { (std::slice::from_raw_parts(from, n), std::slice::from_raw_parts_mut(to.cast(), n)) };
    widen(isa, from, to);
}

/// The nearest `f16` of floats, given by their bits.
pub fn narrow(isa: Isa, from: &[u32], to: &mut [u16]) {
    by_instruction!(isa, from, to, narrowed, narrow_avx2, narrow_avx512);
}

/// The nearest `f16` of floats, as floats.
pub fn round(isa: Isa, from: &[u32], to: &mut [u32]) {
    by_instruction!(isa, from, to, rounded, round_avx2, round_avx512);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{narrowed, rounded, widened};
    use std::arch::x86_64::*;

    /// Functions over slices: whole vectors of so many elements by the body, what is left over by another function.
    macro_rules! slices {
        ($($features:literal: $name:ident($from:ty, $to:ty), $n:literal, $rest:ident, |$p:ident, $q:ident| $body:expr;)*) => {
            $(
                #[target_feature(enable = $features)]
                pub fn $name(from: &[$from], to: &mut [$to]) {
                    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<$n>(), to.as_chunks_mut::<$n>());
                    for (from, to) in from.iter().zip(to) {
                        let ($p, $q) = (from.as_ptr(), to.as_mut_ptr());
                        // SAFETY: both hold as many elements as a vector.
                        unsafe { $body };
                    }
                    to_rest.iter_mut().zip(from_rest).for_each(|(to, from)| *to = $rest(*from));
                }
            )*
        };
    }

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
    // The instruction of 512 bits always takes care that nothing is raised.
    const QUIETLY: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    slices! {
        "avx,f16c": widen_avx2(u16, u32), 8, widened,
            |p, q| _mm256_storeu_ps(q.cast(), _mm256_cvtph_ps(_mm_loadu_si128(p.cast())));
        "avx,f16c": narrow_avx2(u32, u16), 8, narrowed,
            |p, q| _mm_storeu_si128(q.cast(), _mm256_cvtps_ph::<NEAREST>(_mm256_loadu_ps(p.cast())));
        "avx,f16c": round_avx2(u32, u32), 8, rounded,
            |p, q| _mm256_storeu_ps(q.cast(), _mm256_cvtph_ps(_mm256_cvtps_ph::<NEAREST>(_mm256_loadu_ps(p.cast()))));
        "avx512f": widen_avx512(u16, u32), 16, widened,
            |p, q| _mm512_storeu_ps(q.cast(), _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())));
        "avx512f": narrow_avx512(u32, u16), 16, narrowed,
            |p, q| _mm256_storeu_si256(q.cast(), _mm512_cvtps_ph::<QUIETLY>(_mm512_loadu_ps(p.cast())));
        "avx512f": round_avx512(u32, u32), 16, rounded,
            |p, q| _mm512_storeu_ps(q.cast(), _mm512_cvtph_ps(_mm512_cvtps_ph::<QUIETLY>(_mm512_loadu_ps(p.cast()))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Floats near every boundary between two `f16`, at the edges, and at random.
    fn floats() -> Vec<u32> {
        let halves = (0..=u16::MAX).map(|h| half::f16::from_bits(h).to_f32());
        let middles = halves.clone().zip(halves.clone().skip(1)).map(|(a, b)| (a + b) / 2.0);
        let near = |x: f32| [x.to_bits().wrapping_sub(1), x.to_bits(), x.to_bits().wrapping_add(1)];
        let mut state = 1u32;
        let random = (0..1 << 20).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.swap_bytes()
        });
        let edges = [65_504.0, 65_519.996, 65_520.0, 65_536.0, f32::MAX, f32::INFINITY, f32::MIN_POSITIVE, 1e-45, 0.0];
        let edges = edges.into_iter().flat_map(|x| [x, -x]).chain([f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)]);
        halves.chain(middles).flat_map(near).chain(edges.map(f32::to_bits)).chain(random).collect()
    }

    #[test]
    fn every_f16_is_the_float_that_it_is_on_every_instruction_set() {
        let halves: Vec<u16> = (0..=u16::MAX).collect();
        for isa in Isa::available() {
            // Some are left over after whole vectors.
            for from in [&halves[..], &halves[1..], &halves[..7]] {
                let mut wide = vec![0u32; from.len()];
                widen(isa, from, &mut wide);
                for (h, w) in from.iter().zip(wide) {
                    assert_eq!(
                        f32::from_bits(w).to_bits(),
                        half::f16::from_bits(*h).to_f32().to_bits(),
                        "{h:x}, {isa:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn floats_round_to_the_nearest_f16_on_every_instruction_set() {
        let floats = floats();
        for isa in Isa::available() {
            let (mut halves, mut round_trip) = (vec![0u16; floats.len()], vec![0u32; floats.len()]);
            narrow(isa, &floats, &mut halves);
            round(isa, &floats, &mut round_trip);
            for ((x, h), r) in floats.iter().zip(halves).zip(round_trip) {
                let nearest = half::f16::from_f32_const(f32::from_bits(*x));
                assert_eq!(h, nearest.to_bits(), "{x:x}, {isa:?}");
                assert_eq!(r, nearest.to_f32_const().to_bits(), "{x:x}, {isa:?}");
            }
        }
    }

    #[test]
    fn subnormal_numbers_are_kept_and_large_ones_infinite() {
        let of = |x: f32| F16::of(x).0;
        assert_eq!([of(5.960_464_5e-8), of(-2.98e-8), of(6.097e-5), of(2.9e-8)], [1, 0x8000, 0x3ff, 0]);
        assert_eq!([of(65_504.0), of(65_519.0), of(65_520.0), of(-1e9)], [0x7bff, 0x7bff, 0x7c00, 0xfc00]);
        assert_eq!(F16(1).wide(), 2f32.powi(-24));
    }
}
