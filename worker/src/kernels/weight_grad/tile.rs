//! The register tile of weight gradients: some input channels times 16 or 32 output channels at one tap, summed over the
//! leaves of a piece.

use super::WeightGradPlan;
use super::blocks::Box4;
use super::span::{Product, Span, View, Walk};
use crate::kernels::isa::Isa;
use crate::kernels::tile::{
    COUNTED, Combine, Lanes, LeafSums, Portable, PortablePairs, Sums, added, combined, multiply, store_row, tiling,
};
use std::ops::Range;

/// A register tile's job within a block.
pub struct Job<'a> {
    /// The plan.
    pub plan: &'a WeightGradPlan,
    /// What is summed: leaves, with their units.
    pub leaves: &'a [(Box4, Range<usize>)],
    /// What the tap reads of each; where products are listed, the first of each leaf and how many.
    pub spans: &'a [Span],
    /// Products, where they are listed.
    pub products: &'a [Product],
    /// Groups of leaves: the first leaf and how many, 1, 2 or 4.
    pub groups: &'a [[usize; 2]],
    /// How they are gone through.
    pub walk: Walk,
    /// The stack machine over them.
    pub program: &'a [Combine],
    /// Where x and dy are.
    pub view: View,
    /// Its first elements of x and of dy.
    pub first: [usize; 2],
    /// Elements of a unit of x and of dy; 1 where nothing is packed.
    pub unit: [usize; 2],
    /// Columns of dy that lie there, at least as many as count.
    pub loaded: usize,
    /// Where the sums go.
    pub out: *mut f32,
    /// Elements between channels of x there.
    pub out_pitch: usize,
    /// Channels of dy.
    pub columns: usize,
    /// Whether the sums of the only leaf go on from those at `out`.
    pub goes_on: bool,
}

/// Rows of the next tile of so many columns when so many input channels are left: as many sums at a time as the latency of
/// a multiply-add wants, and of `several` leaves no more than registers hold twice.
pub fn tile_rows(isa: Isa, pairs: bool, several: bool, left: usize, width: usize) -> usize {
    const WIDE: [u8; COUNTED] = tiling([14, 12, 8, 4, 2, 1], 2);
    const SEVERAL: [u8; COUNTED] = tiling([7, 6, 4, 2, 1], 2);
    const SEVERAL_NARROW: [u8; COUNTED] = tiling([14, 12, 8, 4, 2, 1], 1);
    const AVX2: [u8; COUNTED] = tiling([6, 4, 2, 1], 2);
    let next = |sizes: [u8; COUNTED]| usize::from(sizes[left.min(COUNTED - 1)]);
    if several && isa >= Isa::Avx512 && (!pairs || isa.pairs()) {
        return next(if width == 32 { SEVERAL } else { SEVERAL_NARROW });
    }
    if pairs && isa.pairs() && width == 32 {
        return next(WIDE);
    }
    if !pairs && isa == Isa::Avx2 {
        return next(AVX2);
    }
    let sizes: &[usize] = match isa {
        Isa::Avx512 | Isa::Amx if width == 16 => &[16, 12, 8, 4, 2, 1],
        Isa::Avx512 | Isa::Amx => &[12, 8, 4, 2, 1],
        Isa::Avx2 => &[4, 2, 1],
        Isa::Portable => &[4, 1],
    };
    // Sixteen channels go as 8 + 8, not as 12 + 4.
    if isa >= Isa::Avx512 && width > 16 && !left.is_multiple_of(12) && left.is_multiple_of(8) && left < 24 {
        return 8;
    }
    sizes.iter().copied().find(|s| *s <= left).unwrap_or(1)
}

#[inline(always)]
unsafe fn leaf<V: Lanes, const MR: usize, const NV: usize>(
    job: &Job,
    leaf: usize,
    mut acc: Sums<V, MR, NV>,
) -> Sums<V, MR, NV> {
    let (view, span) = (&job.view, &job.spans[leaf]);
    let at = |i: [usize; 2]| [i[0] * job.unit[0], i[1] * job.unit[1]];
    let [next1, next2, step] = view.next.map(at);
    // SAFETY: by the plan every index lies inside the buffers; lanes beyond those that lie there are loaded by `load_row`.
    unsafe {
        for b in 0..span.batches as usize {
            let [x, dy] = match span.batches {
                1 => [0, 0],
                _ => view.batch(job.plan, job.leaves[leaf].0[0].start + b),
            };
            let [x, dy] = at([x + span.x, dy + span.dy]);
            let mut x1 = view.x.wrapping_add(job.first[0] + x);
            let mut dy1 = view.dy.wrapping_add(job.first[1] + dy);
            for _ in 0..span.rows[0] {
                let (mut x2, mut dy2) = (x1, dy1);
                for _ in 0..span.rows[1] {
                    let (mut x, mut dy) = (x2, dy2);
                    for _ in 0..span.count {
                        let row = load_row::<V, NV>(dy, job.loaded);
                        for (m, acc) in acc.iter_mut().enumerate() {
                            multiply(acc, x.add(m), row);
                        }
                        (x, dy) = (x.wrapping_add(step[0]), dy.wrapping_add(step[1]));
                    }
                    (x2, dy2) = (x2.wrapping_add(next2[0]), dy2.wrapping_add(next2[1]));
                }
                (x1, dy1) = (x1.wrapping_add(next1[0]), dy1.wrapping_add(next1[1]));
            }
        }
        acc
    }
}

/// The first columns of a row, and zeros. A loop, since closures in closures are compiled without the instruction set of the
/// function that they are in.
#[inline(always)]
unsafe fn load_row<V: Lanes, const NV: usize>(p: *const f32, columns: usize) -> [V; NV] {
    // SAFETY: `columns` floats lie at `p`.
    unsafe {
        let mut row = [V::zero(); NV];
        for (v, lanes) in row.iter_mut().enumerate() {
            let n = columns.saturating_sub(v * 16).min(16);
            *lanes = if n == 16 { V::load(p.add(v * 16)) } else { V::load_first(p.add(v * 16), n) };
        }
        row
    }
}

/// A block's stack is no deeper: eight chunks in each of four dimensions or more.
const DEPTH: usize = 24;

/// Leaves whose products are listed.
struct Listed<'a>(&'a Job<'a>);

impl<V: Lanes, const MR: usize, const NV: usize> LeafSums<V, MR, NV> for Listed<'_> {
    #[inline(always)]
    unsafe fn leaf(&self, leaf: usize, mut sums: Sums<V, MR, NV>) -> Sums<V, MR, NV> {
        let job = self.0;
        let span = &job.spans[leaf];
        let (x, dy) = (job.view.x.wrapping_add(job.first[0]), job.view.dy.wrapping_add(job.first[1]));
        for at in &job.products[span.x..span.x + span.count as usize] {
            // SAFETY: as in `leaf`.
            unsafe {
                let x = x.add(at[0] * job.unit[0]);
                let row = load_row::<V, NV>(dy.add(at[1] * job.unit[1]), job.loaded);
                for (m, sums) in sums.iter_mut().enumerate() {
                    multiply(sums, x.add(m), row);
                }
            }
        }
        sums
    }
}

/// Leaves, row by row.
struct Rows<'a>(&'a Job<'a>);

impl<V: Lanes, const MR: usize, const NV: usize> LeafSums<V, MR, NV> for Rows<'_> {
    #[inline(always)]
    unsafe fn leaf(&self, l: usize, sums: Sums<V, MR, NV>) -> Sums<V, MR, NV> {
        // SAFETY: as in `leaf`.
        unsafe { leaf(self.0, l, sums) }
    }
}

/// Groups of single products.
struct Groups<'a>(&'a Job<'a>);

impl<V: Lanes, const MR: usize, const NV: usize> LeafSums<V, MR, NV> for Groups<'_> {
    #[inline(always)]
    unsafe fn leaf(&self, group: usize, _: Sums<V, MR, NV>) -> Sums<V, MR, NV> {
        let [first, n] = self.0.groups[group];
        // SAFETY: as in `leaf`.
        unsafe {
            match n {
                4 => Products::<V, NV, 4>::new(self.0, first).sums::<MR>(),
                2 => Products::<V, NV, 2>::new(self.0, first).sums::<MR>(),
                _ => Products::<V, NV, 1>::new(self.0, first).sums::<MR>(),
            }
        }
    }
    /// They are subtrees already.
    #[inline(always)]
    fn in_pairs(&self) -> bool {
        false
    }
}

/// Leaves of a group at most: a power of two, and registers hold their rows of dy beside a tile's sums.
pub fn group(isa: Isa) -> usize {
    if isa >= Isa::Avx512 { 4 } else { 2 }
}

/// What a tap leaves out of x: as many channels as a tile has rows.
static NOTHING: [f32; 16] = [0.0; 16];

/// The factors of single products that follow one another.
struct Products<V, const NV: usize, const N: usize> {
    x: [*const f32; N],
    dy: [[V; NV]; N],
}

impl<V: Lanes, const NV: usize, const N: usize> Products<V, NV, N> {
    #[inline(always)]
    unsafe fn new(job: &Job, first: usize) -> Self {
        // SAFETY: as in `leaf`.
        unsafe {
            let mut all = Products { x: [NOTHING.as_ptr(); N], dy: [[V::zero(); NV]; N] };
            for i in 0..N {
                let span = &job.spans[first + i];
                if span.count > 0 && !span.rows.contains(&0) {
                    all.x[i] = job.view.x.wrapping_add(job.first[0] + span.x * job.unit[0]);
                    let dy = job.view.dy.wrapping_add(job.first[1] + span.dy * job.unit[1]);
                    all.dy[i] = load_row::<V, NV>(dy, job.loaded);
                }
            }
            all
        }
    }

    /// Their sums, by the tree: dy stays in registers, and channel after channel of x is gone through.
    #[inline(always)]
    unsafe fn sums<const MR: usize>(&self) -> Sums<V, MR, NV> {
        // SAFETY: as in `leaf`.
        unsafe {
            let mut sums = [[V::zero(); NV]; MR];
            for (m, sums) in sums.iter_mut().enumerate() {
                [*sums] = match N {
                    4 => added(self.two(m, 0), self.two(m, 2)),
                    2 => self.two(m, 0),
                    _ => self.one(m, 0),
                };
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn two(&self, m: usize, i: usize) -> Sums<V, 1, NV> {
        // SAFETY: as in `leaf`.
        unsafe { added(self.one(m, i), self.one(m, i + 1)) }
    }

    #[inline(always)]
    unsafe fn one(&self, m: usize, i: usize) -> Sums<V, 1, NV> {
        // SAFETY: as in `leaf`.
        unsafe {
            let mut product = [V::zero(); NV];
            multiply(&mut product, self.x[i].add(m), self.dy[i]);
            [product]
        }
    }
}

#[inline(always)]
unsafe fn tile<V: Lanes, const MR: usize, const NV: usize>(job: &Job) {
    // SAFETY: by the contract of `WeightGradPlan::run`.
    unsafe {
        if !all::<V, MR, NV>(job) {
            all::<V::Careful, MR, NV>(job);
        }
    }
}

/// Sums a job; gives whether it has, or the sums are odd.
#[inline(always)]
unsafe fn all<V: Lanes, const MR: usize, const NV: usize>(job: &Job) -> bool {
    // SAFETY: by the contract of `WeightGradPlan::run`.
    unsafe {
        let mut first = [[V::zero(); NV]; MR];
        if job.goes_on {
            for (m, row) in first.iter_mut().enumerate() {
                *row = load_row::<V, NV>(job.out.add(m * job.out_pitch), job.columns);
            }
        }
        let sums = match job.walk {
            Walk::Rows => combined::<V, _, MR, NV, DEPTH>(&Rows(job), job.program, first),
            Walk::Listed => combined::<V, _, MR, NV, DEPTH>(&Listed(job), job.program, first),
            Walk::Groups => combined::<V, _, MR, NV, DEPTH>(&Groups(job), job.program, first),
        };
        if V::is_odd(&sums) {
            return false;
        }
        for (m, row) in sums.into_iter().enumerate() {
            store_row(row, job.out.add(m * job.out_pitch), job.columns);
        }
        true
    }
}

macro_rules! tiles {
    ($($(#[$attribute:meta])* $name:ident: $lanes:ty;)*) => {
        $(
            $(#[$attribute])*
            unsafe fn $name<const MR: usize, const NV: usize>(job: &Job) {
                // SAFETY: by the contract of `run_tile`.
                unsafe { tile::<$lanes, MR, NV>(job) }
            }
        )*
    };
}

tiles! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
    tile_avx512: crate::kernels::tile::x86::Avx512;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    tile_avx2: crate::kernels::tile::x86::Avx2;
    tile_portable: Portable;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
    pairs_avx512: crate::kernels::tile::x86::Avx512Pairs;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    pairs_avx2: crate::kernels::tile::x86::Avx2Pairs;
    pairs_portable: PortablePairs;
}

/// Runs a tile of `rows` input channels and up to `width` output channels.
///
/// # Safety
/// The job's pointers are right for its plan, and the instruction set is the machine's.
pub unsafe fn run_tile(isa: Isa, rows: usize, width: usize, job: &Job) {
    macro_rules! tile {
        ($function:ident, $nv:literal, $($mr:literal),*) => {
            // SAFETY: by this function's contract.
            unsafe {
                match rows {
                    $($mr => $function::<$mr, $nv>(job),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            }
        };
    }
    match (isa, job.plan.pairs(), width) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, 32) => tile!(tile_avx512, 2, 12, 8, 7, 6, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, _) => tile!(tile_avx512, 1, 16, 14, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, false, _) => tile!(tile_avx2, 1, 6, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, 32) if isa.pairs() => tile!(pairs_avx512, 2, 14, 12, 8, 7, 6, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, _) if isa.pairs() => tile!(pairs_avx512, 1, 16, 14, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, true, 32) => tile!(pairs_avx2, 2, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, true, _) => tile!(pairs_avx2, 1, 16, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, true, _) => tile!(pairs_avx2, 1, 4, 2, 1),
        (_, true, _) => tile!(pairs_portable, 1, 4, 1),
        _ => tile!(tile_portable, 1, 4, 1),
    }
}
