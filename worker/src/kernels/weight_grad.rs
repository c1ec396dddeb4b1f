//! The gradient of a convolution by its filter: `[k.., cin, cout]`, summed over batch and space.
//!
//! The sum is cut into blocks, subtrees of the summation tree whose few voxels lie in the caches. A block goes
//! through all taps and channel tiles; for each register tile the leaves inside are walked innermost, their sums on a
//! small stack of tiles, so that even leaves of single voxels do not touch weight-sized memory. A task is a subtree of
//! blocks, whose results its thread combines on a stack as they come; tasks' results are combined along the rest of the
//! tree. So there are as many weight-sized results in memory as tasks and threads' stacks, however many blocks. Blocks,
//! tasks and tiles depend on the program alone in what they sum, so no bit depends on them.
//!
//! A block is one piece, but a leaf of which not everything lies in the first-level cache, or in the workspace, is several,
//! whose sums go on from where the one before left them.
//!
//! Of `bf16`, the products of neighbours along the innermost dimension of a leaf are added in pairs, zeros where a tap
//! leaves x or a leaf has no second one. Pairs do not lie in memory as such: a task packs those of a piece ([`pack`]). `f16`
//! is packed likewise, each element for itself as the `f32` that it is; and `f32` where register tiles are narrow, so that
//! each reads a part of every cache line, from rows that lie powers of two apart.
//!
//! Roofline: 2 * taps * cin * cout flops a voxel; the multiply-add units bind from 16 channels on. Packing reads of 16-bit
//! floats x once a tap along the innermost dimension, of `f32` once with the rim that taps reach into, and dy once.

mod blocks;
mod pack;
mod span;
mod tile;
mod winograd;

use super::conv::{Input, axis_of, batch_offsets};
use super::copy::CopyPlan;
use super::isa::Isa;
use super::kernel::Operands;
use super::tile::{Combine, add};
use crate::pool::{Pool, Workspace};
use blocks::{Block, Piece};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::{ALIGN, OpWork};
use pack::{PANEL, Packing};
use span::{PRODUCT, Product, SPAN, Span, View, Walk};
use std::ops::Range;
use tile::{Job, run_tile, tile_rows};

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
        // Leaves may be single voxels, so that a division counts.
        let steps = |n: usize| if self.stride == 1 { n } else { n.div_ceil(self.stride) };
        let low = steps(self.lo.saturating_sub(shift)).saturating_sub(self.first);
        let high = steps((self.whole + self.lo).saturating_sub(shift)).saturating_sub(self.first);
        let start = r.start.max(low);
        start..r.end.min(high).max(start)
    }
}

/// A weight gradient, prepared.
pub struct WeightGradPlan {
    isa: Isa,
    /// That of x and dy.
    dtype: DType,
    packing: Packing,
    /// Whether windows' gradients are made by fewer multiplications.
    is_minimal: bool,
    /// The first channel of x of each tile, and its rows: where leaves are summed one by one and where they are in twos, each
    /// for tiles of 16 columns and of 32.
    tiles: [[Vec<[usize; 2]>; 2]; 2],
    /// The first column of each panel of dy, and its width.
    panels: Vec<[usize; 2]>,
    blocks: Vec<Block>,
    /// By task: how its blocks are combined.
    tasks: Vec<Vec<Combine>>,
    /// By node: how tasks are combined.
    nodes: Vec<Vec<Combine>>,
    /// The most results of blocks that a task has at a time.
    depth: usize,
    /// Where the rows of x lie.
    x: Input,
    /// What x is put together of in the scratch first, if it is in pieces and read by other than rows: which input it lies in,
    /// its first byte, and the copy. And the bytes of all.
    together: (Vec<(usize, usize, CopyPlan)>, usize),
    /// Element offsets of batches in x and dy.
    batches: Vec<[usize; 2]>,
    axes: [Axis; 3],
    cin: usize,
    cout: usize,
    groups: usize,
    x_channel: usize,
    dy_channel: usize,
}

/// Inputs are of either dtype.
#[derive(Clone, Copy)]
struct Pointers<'a> {
    /// Those in which x lies.
    inputs: &'a [*const u8],
    dy: *const u8,
    out: *mut f32,
    stacks: *mut f32,
    results: *mut f32,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers<'_> {}
// SAFETY: as above.
unsafe impl Send for Pointers<'_> {}

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
        let axes: [Axis; 3] = std::array::from_fn(|i| match (i + k).checked_sub(3) {
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
        let (dtype, cin, cout) = (x.ty.dtype, wi.len(), wo.len() / groups);
        let tiles = |several, width| {
            let mut next = 0;
            let tile = || {
                let first = next;
                let rows = |left| tile_rows(isa, dtype == DType::Bf16, several, left, width);
                next += if first < cin { rows(cin - first) } else { 0 };
                (next > first).then_some([first, next - first])
            };
            std::iter::from_fn(tile).collect()
        };
        let is_minimal = conv.is_gradient_minimal(&x.ty, &dy.ty, tree);
        let packing = match is_minimal {
            true => Packing::Nothing,
            false => WeightGradPlan::packing(isa, dtype, &axes, groups, cout),
        };
        // That does not depend on the instruction set, as bytes of scratch do not.
        let by_rows = is_minimal || dtype.is_half();
        let (rows, others) = if by_rows { (&work.pieces[..], &[][..]) } else { (&[][..], &work.pieces[..]) };
        let pieces = others.iter().filter(|p| !p.region.is_empty());
        let copies: Vec<_> =
            pieces.map(|p| (p.input, p.first, CopyPlan::new(&p.into_whole(&x.region), dtype.bytes()))).collect();
        let bytes = if copies.is_empty() { 0 } else { x.region.elements() * dtype.bytes() };
        let mut plan = WeightGradPlan {
            isa,
            x: Input::new(x, rows, conv, &at, &conv.output),
            together: (copies, bytes),
            dtype,
            packing,
            is_minimal,
            tiles: [false, true].map(|several| [16, 32].map(|width| tiles(several, width))),
            panels: (0..cout).step_by(PANEL).map(|first| [first, PANEL]).collect(),
            blocks: vec![],
            tasks: vec![],
            nodes: vec![],
            depth: 1,
            batches: of_x.into_iter().zip(of_dy).map(|(a, b)| [a, b]).collect(),
            axes,
            cin,
            cout,
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
        let mut nodes = vec![];
        for node in tree.nodes(owned) {
            let mut program = vec![];
            plan.cut(tree, &node, &reduced, spatial, &mut program);
            nodes.push(program);
        }
        plan.share_out(&nodes);
        Some(plan)
    }

    /// A piece's tiles of so many columns.
    fn tiles(&self, piece: &Piece, width: usize) -> &[[usize; 2]] {
        &self.tiles[usize::from(piece.in_twos)][width / 32]
    }

    /// Elements of a unit of what is packed.
    fn unit(&self) -> usize {
        1 + usize::from(self.pairs())
    }

    /// Whether products are those of pairs.
    fn pairs(&self) -> bool {
        self.dtype == DType::Bf16
    }

    fn weights(&self) -> usize {
        self.axes.iter().map(|a| a.taps).product::<usize>() * self.cin * self.cout * self.groups
    }

    /// Bytes of scratch: the stacks of the threads but for their first rows, and the results of the tasks, which are those;
    /// and x put together.
    pub fn scratch_bytes(&self, threads: usize) -> usize {
        self.results_bytes(threads) + self.together.1
    }

    fn results_bytes(&self, threads: usize) -> usize {
        ((threads * (self.depth - 1) + self.tasks.len()) * self.weights() * 4).next_multiple_of(ALIGN)
    }

    /// Runs it; the result is `[nodes, k.., cin, cout]`.
    ///
    /// # Safety
    /// The operands are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands) {
        let size = self.weights();
        let stacks: *mut f32 = o.scratch.cast();
        let results = stacks.wrapping_add(pool.threads() * (self.depth - 1) * size);
        let x = o.scratch.wrapping_add(self.results_bytes(pool.threads()));
        for (input, first, copy) in &self.together.0 {
            // SAFETY: by this function's contract.
            unsafe { copy.run(pool, o.inputs[*input].add(*first), x) };
        }
        let whole = [x.cast_const()];
        let inputs = if self.together.0.is_empty() { o.inputs } else { &whole };
        let p = Pointers { inputs, dy: o.inputs[1], out: o.outputs[0].cast(), stacks, results };
        let taps: usize = self.axes.iter().map(|a| a.taps).product();
        // Few tasks are shared out by tap as well: what is packed by the outermost one, so that tasks hardly pack the same of x.
        let outermost = || self.axes.iter().map(|a| a.taps).find(|n| *n > 1).unwrap_or(1);
        let by_tap = match (self.is_minimal, self.packing) {
            (true, _) => self.axes[0].taps,
            (false, Packing::Nothing) => taps,
            (false, _) => outermost(),
        };
        let parts = if self.tasks.len() >= pool.threads() * 3 || pool.threads() == 1 { 1 } else { by_tap };
        pool.run(self.tasks.len() * parts, &|t, w| {
            let p = p;
            let (task, part) = (t / parts, t % parts);
            let range = taps * part / parts..taps * (part + 1) / parts;
            // SAFETY: every task and tap has a part of the results, and every thread of the stacks, of its own.
            unsafe { self.task(task, range, p, w) };
        });
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

    /// Sums the blocks of a task for a range of taps.
    unsafe fn task(&self, task: usize, range: Range<usize>, p: Pointers, w: &mut Workspace) {
        let size = self.weights();
        let stack = w.thread() * (self.depth - 1);
        let row = |i: usize| match i {
            0 => p.results.wrapping_add(task * size),
            i => p.stacks.wrapping_add((stack + i - 1) * size),
        };
        let a_tap = self.cin * self.cout * self.groups;
        let mut top = 0;
        for c in &self.tasks[task] {
            match *c {
                Combine::Leaf(block) => {
                    // SAFETY: by the contract of `run`.
                    unsafe { self.taps(block, range.clone(), p, row(top), w.floats()) };
                    top += 1;
                }
                Combine::Add => {
                    top -= 1;
                    let (first, n) = (range.start * a_tap, range.len() * a_tap);
                    // SAFETY: rows are disjoint, and have a value for each weight.
                    unsafe { add(self.isa, row(top - 1).add(first), row(top).add(first), n) };
                }
            }
        }
    }

    unsafe fn combine(&self, program: &[Combine], out: usize, range: &Range<usize>, p: Pointers) {
        let size = self.weights();
        let mut stack = [0usize; 64];
        let mut top = 0;
        let row = |task: usize| p.results.wrapping_add(task * size + range.start);
        for c in program {
            match *c {
                Combine::Leaf(task) => {
                    stack[top] = task;
                    top += 1;
                }
                Combine::Add => {
                    top -= 1;
                    // SAFETY: each task's results are a row of their own.
                    unsafe { add(self.isa, row(stack[top - 1]), row(stack[top]), range.len()) };
                }
            }
        }
        // SAFETY: the result has room for every node.
        unsafe { std::ptr::copy_nonoverlapping(row(stack[0]), p.out.add(out + range.start), range.len()) };
    }

    /// Sums a block for a range of taps, into `to`.
    unsafe fn taps(&self, block: usize, range: Range<usize>, p: Pointers, to: *mut f32, work: &mut [f32]) {
        let [_, t2, t3] = [self.axes[0].taps, self.axes[1].taps, self.axes[2].taps];
        let outer = range.start / (t2 * t3)..range.end.div_ceil(t2 * t3);
        if self.is_minimal {
            // SAFETY: by the contract of `run`.
            return unsafe { self.filter(block, outer, p, to, work) };
        }
        for (i, piece) in self.blocks[block].pieces.iter().enumerate() {
            let (spans, work) = work.split_at_mut((piece.leaves.len() * SPAN).next_multiple_of(16));
            // SAFETY: a span is so many words, of which any bits are fine; the workspace begins at a cache line.
            let spans =
                unsafe { std::slice::from_raw_parts_mut(spans.as_mut_ptr().cast::<Span>(), piece.leaves.len()) };
            let listed = if piece.walk == Walk::Listed { piece.products() } else { 0 };
            let (products, work) = work.split_at_mut((listed * PRODUCT).next_multiple_of(16));
            // SAFETY: as above.
            let products = unsafe { std::slice::from_raw_parts_mut(products.as_mut_ptr().cast::<Product>(), listed) };
            let (packed, [_, of_dy]) = self.packed(&piece.around, piece.dy.len(), outer.clone());
            let is_packed = piece.packing != Packing::Nothing;
            let (dy, x) = work.split_at_mut(if is_packed { of_dy } else { 0 });
            let [a1, a2, a3] = &self.axes;
            let next = [a1, a2, a3].map(|a| [a.stride * a.x_stride, a.dy_stride]);
            let mut view = View { x: p.inputs[0].cast(), dy: p.dy.cast(), packed: None, next };
            if is_packed {
                let [[_, x2, x3], [_, dy2, dy3]] = [packed.x_rows, packed.rows];
                // Units along the innermost dimension are packed in the order in which they are multiplied.
                let step = if piece.packing == Packing::Units { 1 } else { a3.stride };
                let next = [[a1.stride * x2 * x3, dy2 * dy3], [a2.stride * x3, dy3], [step, 1]];
                view = View { x: x.as_ptr(), dy: dy.as_ptr(), packed: Some(packed), next };
            }
            // SAFETY: by the contract of `run`.
            unsafe {
                match piece.packing {
                    Packing::Nothing => {}
                    Packing::Units => self.pack_dy(piece, p.dy.cast(), dy),
                    Packing::Panels => self.pack_panels(piece, &packed, [p.inputs[0].cast(), p.dy.cast()], [x, dy]),
                }
            }
            // Units of x are packed for each tap along the innermost dimension.
            let turns = if piece.packing == Packing::Units { t3 } else { 1 };
            for turn in 0..turns {
                if piece.packing == Packing::Units {
                    // SAFETY: as above.
                    unsafe { self.pack_x(piece, &packed, turn, p.inputs, x) };
                }
                for tap in range.clone().filter(|tap| tap % turns == turn) {
                    let at = [tap / (t2 * t3), tap / t3 % t2, tap % t3];
                    let mut listed = 0;
                    for (span, leaf) in spans.iter_mut().zip(&piece.leaves) {
                        *span = Span::new(self, &view, at, leaf);
                        if piece.walk == Walk::Listed {
                            *span = span.listed(self, &view, leaf.0[0].start, products, &mut listed);
                        }
                    }
                    // SAFETY: as above.
                    unsafe { self.tap(block, piece, tap, (spans, products), view, i > 0, to) };
                }
            }
        }
    }

    unsafe fn tap(
        &self,
        block: usize,
        piece: &Piece,
        tap: usize,
        (spans, products): (&[Span], &[Product]),
        view: View,
        goes_on: bool,
        to: *mut f32,
    ) {
        let row = self.cout * self.groups;
        let batches = piece.around[0].len();
        for group in 0..self.groups {
            let mut co = 0;
            while co < self.cout {
                let width = if self.isa >= Isa::Avx512 && self.cout - co > 16 { 32 } else { 16 };
                for &[ci, mr] in self.tiles(piece, width) {
                    let at = (tap * self.cin + ci) * row + group * self.cout + co;
                    let columns = width.min(self.cout - co);
                    let x = ci + if self.groups > 1 { group * self.cin } else { 0 };
                    let dy = group * self.cout + co;
                    let (first, unit, loaded) = match (view.packed, piece.packing) {
                        (Some(packed), Packing::Panels) => {
                            let [of_x, of_dy] = packed.batch().map(|units| batches * units);
                            ([ci * of_x, co * of_dy], [mr, PANEL], PANEL)
                        }
                        (Some(_), _) => ([x, dy], [self.cin * self.groups, row], columns),
                        (None, _) => ([self.x_channel + x, self.dy_channel + dy], [1, 1], columns),
                    };
                    let job = Job {
                        plan: self,
                        leaves: &piece.leaves,
                        spans,
                        products,
                        groups: &piece.groups,
                        walk: piece.walk,
                        program: &self.blocks[block].program,
                        view,
                        first,
                        unit,
                        loaded,
                        // SAFETY: there is room for every weight.
                        out: unsafe { to.add(at) },
                        out_pitch: row,
                        columns,
                        goes_on,
                    };
                    // SAFETY: indices inside the buffers, by the plan; the instruction set is the machine's.
                    unsafe { run_tile(self.isa, mr, width, &job) };
                }
                co += width;
            }
        }
    }
}
