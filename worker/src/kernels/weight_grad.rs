//! The gradient of a convolution by its filter: `[k.., cin, cout]`, summed over batch and space.
//!
//! The sum is cut into blocks, subtrees of the summation tree whose voxels fit into the second-level cache. A block goes
//! through all taps and channel tiles; for each register tile the leaves inside are walked innermost, their sums on a
//! small stack of tiles, so that even leaves of single voxels do not touch weight-sized memory. Blocks' results are
//! combined along the rest of the tree. Blocks and tiles depend on the program alone in what they sum, so no bit
//! depends on them.
//!
//! Roofline: 2 * taps * cin * cout flops a voxel; the multiply-add units bind from 16 channels on.

use super::conv::{axis_of, batch_offsets};
use super::isa::Isa;
use super::tile::{Combine, Lanes, Portable, store_row};
use crate::pool::Pool;
use mesh::chunk::{Event, Node, Tree};
use mesh::ops::Prim;
use mesh::plan::OpWork;
use std::ops::Range;

/// A block's voxels fill at most so many bytes of both inputs together.
const BLOCK_BYTES: usize = 384 << 10;

struct Block {
    /// Local leaf boxes: (batch, s1, s2, s3).
    leaves: Vec<[Range<usize>; 4]>,
    program: Vec<Combine>,
}

/// One spatial dimension.
struct Axis {
    stride: usize,
    dilation: usize,
    lo: usize,
    /// Global size of x.
    whole: usize,
    /// First global index of dy held and summed.
    first: usize,
    x_start: usize,
    x_stride: usize,
    dy_stride: usize,
    taps: usize,
}

impl Axis {
    /// The held-local x index that tap `j` reads at local dy index `o`.
    #[inline(always)]
    fn x(&self, o: usize, j: usize) -> Option<usize> {
        let i = ((self.first + o) * self.stride + j * self.dilation).checked_sub(self.lo)?;
        (i < self.whole).then(|| i - self.x_start)
    }
    /// The local dy indices of a range at which tap `j` reads inside x.
    #[inline(always)]
    fn valid(&self, r: &Range<usize>, j: usize) -> Range<usize> {
        let shift = j * self.dilation;
        let low = self.lo.saturating_sub(shift).div_ceil(self.stride).saturating_sub(self.first);
        let high = (self.whole + self.lo).saturating_sub(shift).div_ceil(self.stride).saturating_sub(self.first);
        let start = r.start.max(low);
        start..r.end.min(high).max(start)
    }
}

/// A weight gradient, prepared.
pub struct WeightGradPlan {
    isa: Isa,
    blocks: Vec<Block>,
    /// By node: how blocks are combined.
    nodes: Vec<Vec<Combine>>,
    /// Element offsets of batches in x and dy.
    batches: Vec<[usize; 2]>,
    axes: [Axis; 3],
    cin: usize,
    cout: usize,
    groups: usize,
    x_channel: usize,
    dy_channel: usize,
}

#[derive(Clone, Copy)]
struct Pointers {
    x: *const f32,
    dy: *const f32,
    out: *mut f32,
    scratch: *mut f32,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// A register tile's job within a block.
struct Job<'a> {
    plan: &'a WeightGradPlan,
    block: &'a Block,
    tap: [usize; 3],
    x: *const f32,
    dy: *const f32,
    out: *mut f32,
    out_pitch: usize,
    columns: usize,
}

impl WeightGradPlan {
    /// Prepares a `conv_weight_grad` for the best instruction set; None for another op.
    pub fn new(work: &OpWork) -> Option<WeightGradPlan> {
        WeightGradPlan::with_isa(work, Isa::detect())
    }

    /// Prepares it for one instruction set.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<WeightGradPlan> {
        let Prim::ConvWeightGrad(op) = &work.op else { return None };
        let (conv, (tree, owned)) = (&op.conv, work.sum.as_ref()?);
        let (x, dy, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        let k = conv.windows.len();
        let reduced = tree.elements(owned);
        let spatial = tree.dims.len() - k;
        let axes = std::array::from_fn(|i| match (i + k).checked_sub(3) {
            None => Axis {
                stride: 1,
                dilation: 1,
                lo: 0,
                whole: 1,
                first: 0,
                x_start: 0,
                x_stride: 0,
                dy_stride: 0,
                taps: 1,
            },
            Some(d) => {
                let w = &conv.windows[d];
                let ((xr, x_stride), (_, dy_stride)) = (axis_of(x, &w.dim), axis_of(dy, &w.dim));
                let whole = x.ty.size_of(&w.dim).unwrap_or(1);
                let first = reduced[spatial + d].start;
                Axis {
                    stride: w.stride,
                    dilation: w.dilation,
                    lo: w.lo,
                    whole,
                    first,
                    x_start: xr.start,
                    x_stride,
                    dy_stride,
                    taps: w.size,
                }
            }
        });
        // What of dy is summed here, as a part: offsets of its batches in x and in dy itself.
        let mut at = dy.clone();
        for (d, range) in reduced.iter().enumerate() {
            at.region.0[d].1 = range.clone();
        }
        let of_x = batch_offsets(conv, x, &at, &conv.output);
        let of_dy = batch_offsets(conv, dy, &at, &conv.output);
        let groups = conv.groups.max(1);
        let ((xc, _), (yc, _)) = (axis_of(x, &conv.input), axis_of(dy, &conv.output));
        let ((wi, _), (wo, _)) = (axis_of(out, &conv.input), axis_of(out, &conv.output));
        let mut plan = WeightGradPlan {
            isa,
            blocks: vec![],
            nodes: vec![],
            batches: of_x.into_iter().zip(of_dy).map(|(a, b)| [a, b]).collect(),
            axes,
            cin: wi.len(),
            cout: wo.len() / groups,
            groups,
            x_channel: if groups > 1 { 0 } else { wi.start - xc.start },
            dy_channel: wo.start - yc.start,
        };
        // dy's own offset where more of it is held than is summed here.
        let dy_first: usize = (0..k)
            .map(|d| {
                let (held, stride) = axis_of(dy, &conv.windows[d].dim);
                (reduced[spatial + d].start - held.start.min(reduced[spatial + d].start)) * stride
            })
            .sum();
        plan.dy_channel += dy_first;
        // Elements of x and dy that a voxel stands for.
        let voxel = (plan.cin + plan.cout) * groups * 4;
        for node in tree.nodes(owned) {
            let mut program = vec![];
            plan.cut(tree, &node, &reduced, spatial, voxel, &mut program);
            plan.nodes.push(program);
        }
        Some(plan)
    }

    fn cut(
        &mut self,
        tree: &Tree,
        node: &Node,
        origin: &[Range<usize>],
        batch_dims: usize,
        voxel: usize,
        program: &mut Vec<Combine>,
    ) {
        let voxels: usize = tree.elements(&node.chunks).iter().map(Range::len).product();
        let halves = if voxels * voxel > BLOCK_BYTES { tree.halves(node) } else { None };
        if let Some((a, b)) = halves {
            self.cut(tree, &a, origin, batch_dims, voxel, program);
            self.cut(tree, &b, origin, batch_dims, voxel, program);
            program.push(Combine::Add);
            return;
        }
        let mut block = Block { leaves: vec![], program: vec![] };
        for event in tree.events(node) {
            match event {
                Event::Leaf(b) => {
                    let local: Vec<Range<usize>> =
                        b.iter().zip(origin).map(|(r, o)| r.start - o.start..r.end - o.start).collect();
                    let mut leaf = [0..1, 0..1, 0..1, 0..1];
                    // Batch dimensions flatten to runs of offsets only if at most one of them is cut into chunks; a
                    // leaf is a box of them, listed by `batch_runs`.
                    leaf[0] = batch_run(&local[..batch_dims], &origin[..batch_dims]);
                    let k = local.len() - batch_dims;
                    for d in 0..k {
                        leaf[4 - k + d] = local[batch_dims + d].clone();
                    }
                    block.program.push(Combine::Leaf(block.leaves.len()));
                    block.leaves.push(leaf);
                }
                Event::Combine => block.program.push(Combine::Add),
            }
        }
        program.push(Combine::Leaf(self.blocks.len()));
        self.blocks.push(block);
    }

    fn weights(&self) -> usize {
        self.axes.iter().map(|a| a.taps).product::<usize>() * self.cin * self.cout * self.groups
    }

    /// Bytes of scratch: the results of the blocks.
    pub fn scratch_bytes(&self) -> usize {
        self.blocks.len() * self.weights() * 4
    }

    /// Runs it: `out` is `[nodes, k.., cin, cout]`.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, x: *const f32, dy: *const f32, out: *mut f32, scratch: *mut f32) {
        let p = Pointers { x, dy, out, scratch };
        let taps: usize = self.axes.iter().map(|a| a.taps).product();
        // Few blocks are shared out by tap as well.
        let per_block = if self.blocks.len() >= pool.threads() * 3 || pool.threads() == 1 { 1 } else { taps };
        pool.run(self.blocks.len() * per_block, &|t, _| {
            let p = p;
            let (block, part) = (t / per_block, t % per_block);
            for tap in taps * part / per_block..taps * (part + 1) / per_block {
                // SAFETY: every block and tap has a part of the scratch of its own.
                unsafe { self.tap(block, tap, p) };
            }
        });
        let size = self.weights();
        let parts = (size / 4096).clamp(1, pool.threads() * 4);
        pool.run(parts, &|t, _| {
            let p = p;
            let range = size * t / parts..size * (t + 1) / parts;
            for (n, program) in self.nodes.iter().enumerate() {
                // SAFETY: parts are disjoint.
                unsafe { self.combine(program, n * size, &range, p) };
            }
        });
    }

    unsafe fn combine(&self, program: &[Combine], out: usize, range: &Range<usize>, p: Pointers) {
        let size = self.weights();
        let mut stack = [0usize; 64];
        let mut top = 0;
        // SAFETY: each block's results are a row of the scratch.
        let row =
            |b: usize| unsafe { std::slice::from_raw_parts_mut(p.scratch.add(b * size + range.start), range.len()) };
        for c in program {
            match *c {
                Combine::Leaf(b) => {
                    stack[top] = b;
                    top += 1;
                }
                Combine::Add => {
                    row(stack[top - 2]).iter_mut().zip(row(stack[top - 1])).for_each(|(a, b)| *a += *b);
                    top -= 1;
                }
            }
        }
        // SAFETY: the result has room for every node.
        unsafe { std::ptr::copy_nonoverlapping(row(stack[0]).as_ptr(), p.out.add(out + range.start), range.len()) };
    }

    unsafe fn tap(&self, block: usize, tap: usize, p: Pointers) {
        let [_, t2, t3] = [self.axes[0].taps, self.axes[1].taps, self.axes[2].taps];
        let row = self.cout * self.groups;
        for group in 0..self.groups {
            let mut ci = 0;
            while ci < self.cin {
                let left = self.cin - ci;
                let mut co = 0;
                let mr = tile_rows(self.isa, left);
                while co < self.cout {
                    let width = if self.isa == Isa::Avx512 && self.cout - co > 16 { 32 } else { 16 };
                    let at = (tap * self.cin + ci) * row + group * self.cout + co;
                    // SAFETY: indices inside the buffers, by the plan.
                    let job = unsafe {
                        Job {
                            plan: self,
                            block: &self.blocks[block],
                            tap: [tap / (t2 * t3), tap / t3 % t2, tap % t3],
                            x: p.x.add(self.x_channel + group * if self.groups > 1 { self.cin } else { 0 } + ci),
                            dy: p.dy.add(self.dy_channel + group * self.cout + co),
                            out: p.scratch.add(block * self.weights() + at),
                            out_pitch: row,
                            columns: width.min(self.cout - co),
                        }
                    };
                    // SAFETY: as above; the instruction set is the machine's.
                    unsafe { run_tile(self.isa, mr, width, &job) };
                    co += width;
                }
                ci += mr;
            }
        }
    }
}

/// The run of flattened batch indices of a box over the batch dimensions.
fn batch_run(local: &[Range<usize>], origin: &[Range<usize>]) -> Range<usize> {
    let mut run = 0..1;
    for (l, o) in local.iter().zip(origin) {
        run = run.start * o.len() + l.start..(run.end - 1) * o.len() + l.end;
    }
    run
}

/// Rows of the next tile when so many input channels are left.
fn tile_rows(isa: Isa, left: usize) -> usize {
    let sizes: &[usize] = match isa {
        Isa::Avx512 => &[12, 8, 4, 2, 1],
        Isa::Avx2 => &[4, 2, 1],
        Isa::Portable => &[4, 1],
    };
    // Sixteen channels go as 8 + 8, not as 12 + 4.
    if isa == Isa::Avx512 && !left.is_multiple_of(12) && left.is_multiple_of(8) && left < 24 {
        return 8;
    }
    sizes.iter().copied().find(|s| *s <= left).unwrap_or(1)
}

#[inline(always)]
unsafe fn leaf<V: Lanes, const MR: usize, const NV: usize>(job: &Job, leaf: &[Range<usize>; 4]) -> [[V; NV]; MR] {
    let plan = job.plan;
    let [a1, a2, a3] = &plan.axes;
    let [j1, j2, j3] = job.tap;
    // SAFETY: by the plan every index lies inside the buffers; lanes beyond `columns` are loaded by `load_row`.
    unsafe {
        let mut acc = [[V::zero(); NV]; MR];
        let run = a3.valid(&leaf[3], j3);
        if run.is_empty() {
            return acc;
        }
        let Some(x3) = a3.x(run.start, j3) else { return acc };
        let step = a3.stride * a3.x_stride;
        for b in leaf[0].clone() {
            let [bx, by] = plan.batches[b];
            for o1 in leaf[1].clone() {
                let Some(x1) = a1.x(o1, j1) else { continue };
                for o2 in leaf[2].clone() {
                    let Some(x2) = a2.x(o2, j2) else { continue };
                    let mut x = job.x.add(bx + x1 * a1.x_stride + x2 * a2.x_stride + x3 * a3.x_stride);
                    let mut dy = job.dy.add(by + o1 * a1.dy_stride + o2 * a2.dy_stride + run.start * a3.dy_stride);
                    for _ in 0..run.len() {
                        let row = load_row::<V, NV>(dy, job.columns);
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let value = *x.add(m);
                            for v in 0..NV {
                                acc[v] = acc[v].fma(value, row[v]);
                            }
                        }
                        x = x.add(step);
                        dy = dy.add(a3.dy_stride);
                    }
                }
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
        let mut top = 0;
        for c in &job.block.program {
            match *c {
                Combine::Leaf(l) => {
                    let acc = leaf::<V, MR, NV>(job, &job.block.leaves[l]);
                    for m in 0..MR {
                        for v in 0..NV {
                            stack[top][m][v].write(acc[m][v]);
                        }
                    }
                    top += 1;
                }
                Combine::Add => {
                    for m in 0..MR {
                        for v in 0..NV {
                            let sum = stack[top - 2][m][v].assume_init().add(stack[top - 1][m][v].assume_init());
                            stack[top - 2][m][v].write(sum);
                        }
                    }
                    top -= 1;
                }
            }
        }
        for m in 0..MR {
            let row: [V; NV] = std::array::from_fn(|v| stack[0][m][v].assume_init());
            store_row(row, job.out.add(m * job.out_pitch), job.columns);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
unsafe fn tile_avx512<const MR: usize, const NV: usize>(job: &Job) {
    // SAFETY: by the contract of `run_tile`.
    unsafe { tile::<super::tile::x86::Avx512, MR, NV>(job) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
unsafe fn tile_avx2<const MR: usize, const NV: usize>(job: &Job) {
    // SAFETY: by the contract of `run_tile`.
    unsafe { tile::<super::tile::x86::Avx2, MR, NV>(job) }
}

/// Runs a tile of `rows` input channels and up to `width` output channels.
///
/// # Safety
/// The job's pointers are right for its plan, and the instruction set is the machine's.
unsafe fn run_tile(isa: Isa, rows: usize, width: usize, job: &Job) {
    // SAFETY: by this function's contract.
    unsafe {
        match (isa, rows, width) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 12, 32) => tile_avx512::<12, 2>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 8, 32) => tile_avx512::<8, 2>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 4, 32) => tile_avx512::<4, 2>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 2, 32) => tile_avx512::<2, 2>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 1, 32) => tile_avx512::<1, 2>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 12, _) => tile_avx512::<12, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 8, _) => tile_avx512::<8, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 4, _) => tile_avx512::<4, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, 2, _) => tile_avx512::<2, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, _, _) => tile_avx512::<1, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, 4, _) => tile_avx2::<4, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, 2, _) => tile_avx2::<2, 1>(job),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _, _) => tile_avx2::<1, 1>(job),
            (_, 4, _) => tile::<Portable, 4, 1>(job),
            _ => tile::<Portable, 1, 1>(job),
        }
    }
}
