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

use super::half::{Element, F16};
use super::isa::Isa;
use crate::dispatch;
use mesh::chunk::{Event, Tree};
use std::ops::Range;

/// One instruction of the stack machine over leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    /// Sum leaf `0` and push it.
    Leaf(usize),
    /// Add the two on top.
    Add,
}

/// The leaves that a device sums and how they are combined.
#[derive(Clone, Debug, Default)]
pub struct Leaves {
    /// Boxes of elements, global indices.
    pub boxes: Vec<Vec<Range<usize>>>,
    /// The stack machine of each node.
    pub nodes: Vec<Vec<Combine>>,
    /// Most sums on a stack at a time.
    pub depth: usize,
}

impl Leaves {
    /// The leaves of the nodes of `tree` inside `owned`.
    pub fn new(tree: &Tree, owned: &[Range<usize>]) -> Leaves {
        let mut out = Leaves { depth: 1, ..Leaves::default() };
        for node in tree.nodes(owned) {
            let mut program = Vec::new();
            let mut stack = 0usize;
            for event in tree.events(&node) {
                match event {
                    Event::Leaf(b) => {
                        program.push(Combine::Leaf(out.boxes.len()));
                        out.boxes.push(b);
                        stack += 1;
                        out.depth = out.depth.max(stack);
                    }
                    Event::Combine => {
                        program.push(Combine::Add);
                        stack -= 1;
                    }
                }
            }
            out.nodes.push(program);
        }
        out
    }
}

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

/// Sixteen lanes.
pub(super) trait Lanes: Copy {
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
pub(super) struct Portable([f32; 16]);

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
pub(super) struct PortablePairs(Portable);

/// A float as the instruction for pairs takes and gives it: a zero of its sign in place of a subnormal one.
#[inline(always)]
pub(super) fn normal(x: f32) -> f32 {
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

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::{F16, Lanes, PortablePairs, Sums};
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
}

/// Stores the first `columns` of a row of vectors.
#[inline(always)]
pub(super) unsafe fn store_row<V: Lanes, const NV: usize>(row: [V; NV], out: *mut f32, columns: usize) {
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
pub(super) unsafe fn multiply<V: Lanes, const NV: usize>(sums: &mut [V; NV], x: *const f32, row: [V; NV]) {
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

/// A register tile's sums.
pub(super) type Sums<V, const MR: usize, const NV: usize> = [[V; NV]; MR];

/// What the sums of leaves are made of.
pub(super) trait LeafSums<V: Lanes, const MR: usize, const NV: usize> {
    /// A leaf's products, added to sums.
    unsafe fn leaf(&self, leaf: usize, sums: Sums<V, MR, NV>) -> Sums<V, MR, NV>;
    /// Whether two leaves are added up without a stack: if registers hold the sums of both.
    fn in_pairs(&self) -> bool {
        holds_two::<V>(MR, NV)
    }
}

/// Whether registers hold so many rows of sums twice, with a row of vectors.
pub(super) const fn holds_two<V: Lanes>(rows: usize, vectors: usize) -> bool {
    2 * rows * vectors + vectors < V::REGISTERS
}

/// a + b.
#[inline(always)]
pub(super) unsafe fn added<V: Lanes, const MR: usize, const NV: usize>(
    mut a: Sums<V, MR, NV>,
    b: Sums<V, MR, NV>,
) -> Sums<V, MR, NV> {
    for m in 0..MR {
        for v in 0..NV {
            // SAFETY: by the caller's contract.
            a[m][v] = unsafe { a[m][v].add(b[m][v]) };
        }
    }
    a
}

/// a = a + b.
///
/// # Safety
/// So many floats lie at both, which do not overlap.
pub(super) unsafe fn add(isa: Isa, a: *mut f32, b: *const f32, n: usize) {
    // SAFETY: by this function's contract.
    let (a, b) = unsafe { (std::slice::from_raw_parts_mut(a, n), std::slice::from_raw_parts(b, n)) };
    dispatch!(isa, fn(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += *b);
    });
}

/// Runs a stack machine over leaves, of which the first goes on from sums, on a stack of so many blocks.
///
/// # Safety
/// As for its leaves; the stack is deep enough.
#[inline(always)]
pub(super) unsafe fn combined<
    V: Lanes,
    S: LeafSums<V, MR, NV>,
    const MR: usize,
    const NV: usize,
    const DEPTH: usize,
>(
    of: &S,
    program: &[Combine],
    first: Sums<V, MR, NV>,
) -> Sums<V, MR, NV> {
    // SAFETY: by this function's contract.
    unsafe {
        let mut stack = [[[std::mem::MaybeUninit::<V>::uninit(); NV]; MR]; DEPTH];
        // The sum on top of the stack stays in registers.
        let (mut below, mut sum, mut rest) = (0, first, program);
        while let Some((c, behind)) = rest.split_first() {
            rest = behind;
            match *c {
                Combine::Leaf(l) => {
                    if behind.len() + 1 < program.len() {
                        for m in 0..MR {
                            for v in 0..NV {
                                stack[below][m][v].write(sum[m][v]);
                            }
                        }
                        below += 1;
                        sum = [[V::zero(); NV]; MR];
                    }
                    sum = of.leaf(l, sum);
                    if let [Combine::Leaf(l), Combine::Add, behind @ ..] = behind
                        && of.in_pairs()
                    {
                        rest = behind;
                        sum = added(sum, of.leaf(*l, [[V::zero(); NV]; MR]));
                    }
                }
                Combine::Add => {
                    below -= 1;
                    for m in 0..MR {
                        for v in 0..NV {
                            sum[m][v] = stack[below][m][v].assume_init().add(sum[m][v]);
                        }
                    }
                }
            }
        }
        sum
    }
}

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
