//! The register tile of weight gradients: some input channels times 16 or 32 output channels at one tap, summed over the
//! leaves of a piece.

use super::{Box4, WeightGradPlan};
use crate::kernels::isa::Isa;
use crate::kernels::tile::{COUNTED, Combine, Lanes, Portable, PortablePairs, store_row, tiling};
use std::ops::Range;

/// Where a task finds its block's x and dy: in the inputs, or packed.
#[derive(Clone, Copy)]
pub struct View {
    /// Of x.
    pub x: *const f32,
    /// Of dy.
    pub dy: *const f32,
    /// If packed.
    pub packed: Option<Packed>,
    /// Elements from a product to the next one along s1, s2 and the innermost dimension, in x and in dy.
    pub next: [[usize; 2]; 3],
}

/// How a piece's units lie: rows of units of all channels, of x those that its taps read.
#[derive(Clone, Copy)]
pub struct Packed {
    /// First index of dy: batch, s1 and s2.
    pub first: [usize; 3],
    /// First index of x along s1 and s2.
    pub x_first: [usize; 2],
    /// Rows of dy along s1 and s2.
    pub rows: [usize; 2],
    /// Rows of x.
    pub x_rows: [usize; 2],
    /// Units of a row.
    pub units: usize,
    /// Channels of x.
    pub x_channels: usize,
    /// Channels of dy.
    pub channels: usize,
}

impl Packed {
    /// The first element of a row of x, by batch and indices along s1 and s2.
    pub fn x(&self, [b, i1, i2]: [usize; 3]) -> usize {
        let row = (b - self.first[0]) * self.x_rows[0] + i1 - self.x_first[0];
        (row * self.x_rows[1] + i2 - self.x_first[1]) * self.units * self.x_channels
    }
    /// The first elements of a batch in x and in dy.
    pub fn batch(&self, b: usize) -> [usize; 2] {
        let rows = |rows: [usize; 2]| rows[0] * rows[1] * self.units * (b - self.first[0]);
        [rows(self.x_rows) * self.x_channels, rows(self.rows) * self.channels]
    }
    /// As well, of dy.
    pub fn dy(&self, [b, o1, o2]: [usize; 3]) -> usize {
        let row = (b - self.first[0]) * self.rows[0] + o1 - self.first[1];
        (row * self.rows[1] + o2 - self.first[2]) * self.units * self.channels
    }
}

/// What of a leaf a tap reads: where its first products lie, from a batch's first element on, and how many there are.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Span {
    x: usize,
    dy: usize,
    rows: [u32; 2],
    count: u32,
}

/// Floats of workspace that a span takes.
pub const SPAN: usize = size_of::<Span>() / 4;

impl Span {
    /// That of a leaf, with its units.
    pub fn new(
        plan: &WeightGradPlan,
        view: &View,
        [j1, j2, j3]: [usize; 3],
        (at, units): &(Box4, Range<usize>),
    ) -> Span {
        let [a1, a2, a3] = &plan.axes;
        let (rows1, rows2) = (a1.valid(&at[1], j1), a2.valid(&at[2], j2));
        let run = if view.packed.is_some() { at[3].clone() } else { a3.valid(&at[3], j3) };
        let reads = |a: &super::Axis, r: &Range<usize>, j| if r.is_empty() { None } else { a.x(r.start, j) };
        let (Some(x1), Some(x2)) = (reads(a1, &rows1, j1), reads(a2, &rows2, j2)) else { return Span::default() };
        let (x, dy, count) = match &view.packed {
            Some(p) => {
                let [x, dy] = [p.x([p.first[0], x1, x2]), p.dy([p.first[0], rows1.start, rows2.start])];
                (x + units.start * p.x_channels, dy + units.start * p.channels, units.len())
            }
            None => {
                let Some(x3) = reads(a3, &run, j3) else { return Span::default() };
                let x = x1 * a1.x_stride + x2 * a2.x_stride + x3 * a3.x_stride;
                let dy = rows1.start * a1.dy_stride + rows2.start * a2.dy_stride + run.start * a3.dy_stride;
                (x, dy, run.len())
            }
        };
        let rows = [rows1.len() as u32, rows2.len() as u32];
        Span { x, dy, rows, count: count as u32 }
    }
}

/// A register tile's job within a block.
pub struct Job<'a> {
    /// The plan.
    pub plan: &'a WeightGradPlan,
    /// What is summed: leaves, with their units.
    pub leaves: &'a [(Box4, Range<usize>)],
    /// What the tap reads of each.
    pub spans: &'a [Span],
    /// The stack machine over them.
    pub program: &'a [Combine],
    /// Where x and dy are.
    pub view: View,
    /// First channel of x.
    pub x: usize,
    /// First channel of dy.
    pub dy: usize,
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
/// a multiply-add wants.
pub fn tile_rows(isa: Isa, pairs: bool, left: usize, width: usize) -> usize {
    const NEXT: [u8; COUNTED] = tiling([14, 12, 8, 4, 2, 1], 2);
    if pairs && isa.pairs() && width == 32 {
        return usize::from(NEXT[left.min(COUNTED - 1)]);
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
    mut acc: [[V; NV]; MR],
) -> [[V; NV]; MR] {
    let (plan, view, span) = (job.plan, &job.view, &job.spans[leaf]);
    let [next1, next2, step] = view.next;
    // SAFETY: by the plan every index lies inside the buffers; lanes beyond `columns` are loaded by `load_row`.
    unsafe {
        for b in job.leaves[leaf].0[0].clone() {
            let [x, dy] = match &view.packed {
                Some(p) => p.batch(b),
                None => plan.batches[b],
            };
            let mut x1 = view.x.wrapping_add(job.x + x + span.x);
            let mut dy1 = view.dy.wrapping_add(job.dy + dy + span.dy);
            for _ in 0..span.rows[0] {
                let (mut x2, mut dy2) = (x1, dy1);
                for _ in 0..span.rows[1] {
                    let (mut x, mut dy) = (x2, dy2);
                    for _ in 0..span.count {
                        let row = load_row::<V, NV>(dy, job.columns);
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let value = *x.add(m);
                            for v in 0..NV {
                                acc[v] = acc[v].fma(value, row[v]);
                            }
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

#[inline(always)]
unsafe fn load_row<V: Lanes, const NV: usize>(p: *const f32, columns: usize) -> [V; NV] {
    std::array::from_fn(|v| {
        let n = columns.saturating_sub(v * 16).min(16);
        // SAFETY: `columns` floats lie at `p`.
        unsafe { if n == 16 { V::load(p.add(v * 16)) } else { V::load_first(p.add(v * 16), n) } }
    })
}

/// A block's stack is no deeper: eight chunks in each of four dimensions or more.
const DEPTH: usize = 24;

#[inline(always)]
unsafe fn tile<V: Lanes, const MR: usize, const NV: usize>(job: &Job) {
    // SAFETY: by the contract of `WeightGradPlan::run`.
    unsafe {
        let mut stack = [[[std::mem::MaybeUninit::<V>::uninit(); NV]; MR]; DEPTH];
        // The sum on top of the stack stays in registers.
        let mut below = 0;
        let mut sum = [[V::zero(); NV]; MR];
        if job.goes_on {
            for (m, row) in sum.iter_mut().enumerate() {
                *row = load_row::<V, NV>(job.out.add(m * job.out_pitch), job.columns);
            }
        }
        for (i, c) in job.program.iter().enumerate() {
            match *c {
                Combine::Leaf(l) => {
                    if i > 0 {
                        for m in 0..MR {
                            for v in 0..NV {
                                stack[below][m][v].write(sum[m][v]);
                            }
                        }
                        below += 1;
                        sum = [[V::zero(); NV]; MR];
                    }
                    sum = leaf::<V, MR, NV>(job, l, sum);
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
        for (m, row) in sum.into_iter().enumerate() {
            store_row(row, job.out.add(m * job.out_pitch), job.columns);
        }
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
    pairs_avx2: PortablePairs;
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
        (Isa::Avx512 | Isa::Amx, false, 32) => tile!(tile_avx512, 2, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, false, _) => tile!(tile_avx512, 1, 16, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, false, _) => tile!(tile_avx2, 1, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, 32) if isa.pairs() => tile!(pairs_avx512, 2, 14, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, _) if isa.pairs() => tile!(pairs_avx512, 1, 16, 12, 8, 4, 2, 1),
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
