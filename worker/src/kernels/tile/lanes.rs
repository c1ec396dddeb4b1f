//! Vectors of sixteen floats, or of pairs of `bf16`: what products need of each instruction set, and plain Rust for it.

use crate::kernels::half::{Element, F16};
use crate::kernels::tile::Sums;

/// Sixteen lanes.
pub(in crate::kernels) trait Lanes: Copy {
    /// Lanes that give what these are to give where they do not.
    type Careful: Lanes;
    /// Whether some sums may be other ones than they are to be.
    #[inline(always)]
    unsafe fn is_odd<const MR: usize, const NV: usize>(_: &Sums<Self, MR, NV>) -> bool {
        false
    }
    /// How many of them the registers hold; 0 where products are not held back by what a sum costs.
    const REGISTERS: usize;
    /// Zeros.
    unsafe fn zero() -> Self;
    /// Sixteen floats.
    unsafe fn load(p: *const f32) -> Self;
    /// Stores sixteen floats.
    unsafe fn store(self, p: *mut f32);
    /// The first `n` floats, fewer than sixteen; zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut buffer = [0.0f32; 16];
        // SAFETY: by the caller's contract `n` floats lie at `p`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load(buffer.as_ptr())
        }
    }
    /// Sixteen `f16`, as the floats that they are.
    #[inline(always)]
    unsafe fn load_wide(p: *const F16) -> Self {
        let mut buffer = [0.0f32; 16];
        // SAFETY: by the caller's contract sixteen elements lie at `p`.
        unsafe {
            for (i, float) in buffer.iter_mut().enumerate() {
                *float = (*p.add(i)).wide();
            }
            Self::load(buffer.as_ptr())
        }
    }
    /// The first `n` of them, fewer than sixteen; zeros in the other lanes.
    #[inline(always)]
    unsafe fn load_wide_first(p: *const F16, n: usize) -> Self {
        let mut buffer = [F16(0); 16];
        // SAFETY: by the caller's contract `n` elements lie at `p`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load_wide(buffer.as_ptr())
        }
    }
    /// Stores the first `n` floats, fewer than sixteen.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        let mut buffer = [0.0f32; 16];
        // SAFETY: by the caller's contract `n` floats fit at `p`.
        unsafe {
            self.store(buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
    /// self + x * w, rounded once; or, of pairs, the sums of both products.
    unsafe fn fma(self, x: f32, w: Self) -> Self;
    /// The same of a factor that is used once, and that an instruction may take from where it lies.
    #[inline(always)]
    unsafe fn fma_from(self, x: *const f32, w: Self) -> Self {
        // SAFETY: by the caller's contract a float lies at `x`.
        unsafe { self.fma(*x, w) }
    }
    /// self + other.
    unsafe fn add(self, other: Self) -> Self;
    /// self - other.
    unsafe fn sub(self, other: Self) -> Self;
}

#[derive(Clone, Copy)]
pub(in crate::kernels) struct Portable([f32; 16]);

impl Lanes for Portable {
    type Careful = Portable;
    const REGISTERS: usize = 0;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by the caller's contract sixteen floats lie at `p`.
        Portable(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        Portable(std::array::from_fn(|l| x.mul_add(w.0[l], self.0[l])))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Portable(std::array::from_fn(|l| self.0[l] + other.0[l]))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Portable(std::array::from_fn(|l| self.0[l] - other.0[l]))
    }
}

/// Pairs of `bf16` without an instruction for them.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct PortablePairs(Portable);

/// A float as the instruction for pairs takes and gives it: a zero of its sign in place of a subnormal one.
#[inline(always)]
pub(in crate::kernels) fn normal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { f32::from_bits(x.to_bits() & 1 << 31) } else { x }
}

impl Lanes for PortablePairs {
    type Careful = PortablePairs;
    const REGISTERS: usize = 0;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as all of this impl: what `Portable` asks for, by the callers' contracts.
        PortablePairs(unsafe { Portable::zero() })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        PortablePairs(unsafe { Portable::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.0.store(p) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: f32, w: Self) -> Self {
        let second = |pair: f32| normal(f32::from_bits(pair.to_bits() & 0xffff_0000));
        let first = |pair: f32| normal(f32::from_bits(pair.to_bits() << 16));
        let [low, high] = [first(x), second(x)];
        PortablePairs(Portable(std::array::from_fn(|l| {
            let w = w.0.0[l];
            let sum = normal(high.mul_add(second(w), self.0.0[l]));
            normal(low.mul_add(first(w), sum))
        })))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        PortablePairs(unsafe { self.0.add(other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        PortablePairs(unsafe { self.0.sub(other.0) })
    }
}

/// Stores the first `columns` of a row of vectors.
#[inline(always)]
pub(in crate::kernels) unsafe fn store_row<V: Lanes, const NV: usize>(row: [V; NV], out: *mut f32, columns: usize) {
    // SAFETY: by the caller's contract `columns` floats fit at `out`.
    unsafe {
        for (v, lanes) in row.into_iter().enumerate() {
            let n = columns.saturating_sub(v * 16).min(16);
            if n == 16 {
                lanes.store(out.add(v * 16));
            } else if n > 0 {
                lanes.store_first(out.add(v * 16), n);
            }
        }
    }
}

/// Adds the products of the factor at `x` and a row of vectors.
#[inline(always)]
pub(in crate::kernels) unsafe fn multiply<V: Lanes, const NV: usize>(sums: &mut [V; NV], x: *const f32, row: [V; NV]) {
    // SAFETY: by the caller's contract.
    unsafe {
        if NV == 1 {
            sums[0] = sums[0].fma_from(x, row[0]);
        } else {
            let x = *x;
            for v in 0..NV {
                sums[v] = sums[v].fma(x, row[v]);
            }
        }
    }
}
