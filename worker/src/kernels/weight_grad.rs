//! The gradient of a convolution by its filter: `[k.., cin, cout]`, summed over batch and space.
//!
//! The sum is cut into blocks, subtrees of the summation tree whose voxels fit into the second-level cache. A block goes
//! through all taps and channel tiles; for each register tile the leaves inside are walked innermost, their sums on a
//! small stack of tiles, so that even leaves of single voxels do not touch weight-sized memory. A task is a subtree of
//! blocks, whose results its thread combines on a stack as they come; tasks' results are combined along the rest of the
//! tree. So there are as many weight-sized results in memory as tasks and threads' stacks, however many blocks. Blocks,
//! tasks and tiles depend on the program alone in what they sum, so no bit depends on them.
//!
//! Of `bf16`, the products of neighbours along the innermost dimension of a leaf are added in pairs, zeros where a tap
//! leaves x or a leaf has no second one. Pairs do not lie in memory as such: a task packs those of a piece of its block,
//! of x anew for each tap along that dimension. A block is one piece, but a leaf too large for the workspace is several,
//! whose sums go on from where the one before left them. `f16` is packed likewise, each element for itself as the `f32` that
//! it is.
//!
//! Roofline: 2 * taps * cin * cout flops a voxel; the multiply-add units bind from 16 channels on. Packing reads x
//! once a tap along the innermost dimension, and dy once.

mod tile;

use super::conv::{axis_of, batch_offsets, in_units};
use super::half;
use super::isa::Isa;
use super::kernel::Operands;
use super::pack::NOTHING;
use super::tile::Combine;
use crate::dispatch;
use crate::pool::{Pool, WORKSPACE_BYTES, Workspace};
use mesh::chunk::{Event, Node, Tree};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::OpWork;
use std::ops::Range;
use tile::{Job, Packed, SPAN, Span, View, run_tile, tile_rows};

/// Leaves along a dimension at most.
const LEAVES: usize = 8;
/// Leaves of a block at most.
const BLOCK_LEAVES: usize = 4096;
/// Tasks that all blocks are shared out to, about.
const TASKS: usize = 48;
/// A block's voxels fill at most so many bytes of both inputs together.
const BLOCK_BYTES: usize = 384 << 10;

/// Local indices of dy: (batch, s1, s2, s3).
type Box4 = [Range<usize>; 4];

struct Block {
    pieces: Vec<Piece>,
    program: Vec<Combine>,
}

/// What of a block is summed at a time: all of it, or a part of its only leaf.
struct Piece {
    /// The leaves, and the units of each along the innermost dimension.
    leaves: Vec<(Box4, Range<usize>)>,
    /// The box around them.
    around: Box4,
    /// Of 16-bit floats: where the halves of each unit lie along a row of dy, and of x by tap; [`NOTHING`] for zeros.
    dy: Vec<[usize; 2]>,
    x: Vec<Vec<[usize; 2]>>,
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
    blocks: Vec<Block>,
    /// By task: how its blocks are combined.
    tasks: Vec<Vec<Combine>>,
    /// By node: how tasks are combined.
    nodes: Vec<Vec<Combine>>,
    /// The most results of blocks that a task has at a time.
    depth: usize,
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
struct Pointers {
    x: *const u8,
    dy: *const u8,
    out: *mut f32,
    stacks: *mut f32,
    results: *mut f32,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

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
            dtype: x.ty.dtype,
            blocks: vec![],
            tasks: vec![],
            nodes: vec![],
            depth: 1,
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
        let mut nodes = vec![];
        for node in tree.nodes(owned) {
            let mut program = vec![];
            plan.cut(tree, &node, &reduced, spatial, &mut program);
            nodes.push(program);
        }
        plan.share_out(&nodes);
        Some(plan)
    }

    /// Makes tasks of the blocks that the nodes combine.
    fn share_out(&mut self, nodes: &[Vec<Combine>]) {
        let most = self.blocks.len().div_ceil(TASKS);
        for program in nodes {
            // By instruction: where its subtree begins, how many blocks it has, and how many results at a time.
            let mut trees: Vec<[usize; 3]> = vec![];
            for (i, c) in program.iter().enumerate() {
                trees.push(match c {
                    Combine::Leaf(_) => [i, 1, 1],
                    Combine::Add => {
                        let [middle, right, deep] = trees[i - 1];
                        let [start, left, first] = trees[middle - 1];
                        [start, left + right, first.max(deep + 1)]
                    }
                });
            }
            // Down from the root, the left half first.
            let (mut order, mut open) = (vec![], vec![(program.len() - 1, false)]);
            while let Some((i, halves)) = open.pop() {
                let [start, blocks, deep] = trees[i];
                if halves {
                    order.push(Combine::Add);
                } else if blocks <= most {
                    order.push(Combine::Leaf(self.tasks.len()));
                    self.tasks.push(program[start..=i].to_vec());
                    self.depth = self.depth.max(deep);
                } else {
                    open.extend([(i, true), (i - 1, false), (trees[i - 1][0] - 1, false)]);
                }
            }
            self.nodes.push(order);
        }
    }

    /// Whether a task packs what it reads.
    fn packs(&self) -> bool {
        self.dtype.is_half()
    }

    /// Elements of a unit of what is packed.
    fn unit(&self) -> usize {
        1 + usize::from(self.pairs())
    }

    /// Whether products are those of pairs.
    fn pairs(&self) -> bool {
        self.dtype == DType::Bf16
    }

    /// A box of elements as local indices.
    fn local(elements: &[Range<usize>], origin: &[Range<usize>], batch_dims: usize) -> Box4 {
        let local: Vec<Range<usize>> =
            elements.iter().zip(origin).map(|(r, o)| r.start - o.start..r.end - o.start).collect();
        // Batch dimensions flatten to runs of offsets only if at most one of them is cut into chunks; a leaf is a box
        // of them, listed by `batch_run`.
        let mut out = [0..1, 0..1, 0..1, 0..1];
        out[0] = batch_run(&local[..batch_dims], &origin[..batch_dims]);
        let k = local.len() - batch_dims;
        for d in 0..k {
            out[4 - k + d] = local[batch_dims + d].clone();
        }
        out
    }

    /// Whether a box of dy and what its taps read of x are worked on at a time.
    fn fits(&self, at: &Box4) -> bool {
        let voxels: usize = at.iter().map(Range::len).product();
        let in_cache = voxels * (self.cin + self.cout) * self.groups * 4 <= BLOCK_BYTES;
        in_cache && (!self.packs() || self.has_room(at, at[3].len() / self.unit() + LEAVES))
    }

    /// How a box's units lie if a row has so many, with what a range of taps along s1 reads of x, and how many there are.
    fn packed(&self, at: &Box4, units: usize, taps: Range<usize>) -> (Packed, usize) {
        let reads = |a: &Axis, r: &Range<usize>, taps: Range<usize>| {
            let all = || r.clone().flat_map(|o| taps.clone().filter_map(move |j| a.x(o, j)));
            let first = all().min().unwrap_or(0);
            (first, all().max().map_or(0, |last| last + 1 - first))
        };
        let (x1, rows1) = reads(&self.axes[0], &at[1], taps);
        let (x2, rows2) = reads(&self.axes[1], &at[2], 0..self.axes[1].taps);
        let packed = Packed {
            first: [at[0].start, at[1].start, at[2].start],
            x_first: [x1, x2],
            rows: [at[1].len(), at[2].len()],
            x_rows: [rows1, rows2],
            units,
            x_channels: self.cin * self.groups,
            channels: self.cout * self.groups,
        };
        let (x, dy) = (rows1 * rows2 * packed.x_channels, packed.rows.iter().product::<usize>() * packed.channels);
        (packed, at[0].len() * (x + dy) * units)
    }

    fn has_room(&self, at: &Box4, units: usize) -> bool {
        self.packed(at, units, 0..self.axes[0].taps).1 + BLOCK_LEAVES * SPAN <= WORKSPACE_BYTES / 4
    }

    /// A leaf as pieces, in the order in which it is summed.
    fn pieces(&self, at: Box4, pieces: &mut Vec<Piece>) {
        let unit = |d: usize| if d == 3 { self.unit() } else { 1 };
        let along = (0..4).find(|&d| at[d].len() > unit(d));
        let Some(d) = along.filter(|_| self.packs() && !self.fits(&at)) else {
            let room = !self.packs() || self.has_room(&at, at[3].len().div_ceil(unit(3)));
            assert!(room, "what a unit's gradient is made of does not fit into the workspace");
            pieces.push(self.piece(vec![at]));
            return;
        };
        // Between units, along the innermost one.
        let middle = at[d].start + (at[d].len() / 2).next_multiple_of(unit(d));
        let (mut first, mut second) = (at.clone(), at);
        first[d].end = middle;
        second[d].start = middle;
        self.pieces(first, pieces);
        self.pieces(second, pieces);
    }

    /// Leaves that are worked on together.
    fn piece(&self, leaves: Vec<Box4>) -> Piece {
        let around = std::array::from_fn(|d| {
            let of = |f: fn(&Range<usize>) -> usize| leaves.iter().map(move |l| f(&l[d]));
            of(|r| r.start).min().unwrap_or(0)..of(|r| r.end).max().unwrap_or(0)
        });
        let mut inner: Vec<Range<usize>> = leaves.iter().map(|l| l[3].clone()).collect();
        inner.sort_by_key(|r| r.start);
        inner.dedup();
        let (of, units) = in_units(self.unit(), inner.iter().cloned());
        let units = if self.packs() { units } else { vec![] };
        let of = |l: &Box4| inner.iter().position(|r| *r == l[3]).map_or(0..0, |i| of[i].clone());
        let axis = &self.axes[2];
        let places = |at: &dyn Fn(usize) -> Option<usize>| -> Vec<[usize; 2]> {
            let place = |o: usize| if o == NOTHING { NOTHING } else { at(o).unwrap_or(NOTHING) };
            units.iter().map(|halves| halves.map(place)).collect()
        };
        Piece {
            leaves: leaves.iter().map(|l| (l.clone(), of(l))).collect(),
            around,
            dy: places(&|o| Some(o * axis.dy_stride)),
            x: (0..axis.taps).map(|j| places(&|o| Some(axis.x(o, j)? * axis.x_stride))).collect(),
        }
    }

    fn cut(
        &mut self,
        tree: &Tree,
        node: &Node,
        origin: &[Range<usize>],
        batch_dims: usize,
        program: &mut Vec<Combine>,
    ) {
        let at = WeightGradPlan::local(&tree.elements(&node.chunks), origin, batch_dims);
        let few = node.chunks.iter().map(Range::len).product::<usize>() <= BLOCK_LEAVES;
        let halves = if few && self.fits(&at) { None } else { tree.halves(node) };
        if let Some((a, b)) = halves {
            self.cut(tree, &a, origin, batch_dims, program);
            self.cut(tree, &b, origin, batch_dims, program);
            program.push(Combine::Add);
            return;
        }
        let (mut leaves, mut order) = (vec![], vec![]);
        for event in tree.events(node) {
            order.push(match event {
                Event::Leaf(b) => {
                    leaves.push(WeightGradPlan::local(&b, origin, batch_dims));
                    Combine::Leaf(leaves.len() - 1)
                }
                Event::Combine => Combine::Add,
            });
        }
        let mut pieces = Vec::new();
        match leaves.pop() {
            Some(only) if leaves.is_empty() => self.pieces(only, &mut pieces),
            last => {
                leaves.extend(last);
                pieces.push(self.piece(leaves));
            }
        }
        program.push(Combine::Leaf(self.blocks.len()));
        self.blocks.push(Block { pieces, program: order });
    }

    fn weights(&self) -> usize {
        self.axes.iter().map(|a| a.taps).product::<usize>() * self.cin * self.cout * self.groups
    }

    /// Bytes of scratch: the stacks of the threads but for their first rows, and the results of the tasks, which are those.
    pub fn scratch_bytes(&self, threads: usize) -> usize {
        (threads * (self.depth - 1) + self.tasks.len()) * self.weights() * 4
    }

    /// Runs it; the result is `[nodes, k.., cin, cout]`.
    ///
    /// # Safety
    /// The operands are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands) {
        let size = self.weights();
        let stacks: *mut f32 = o.scratch.cast();
        let results = stacks.wrapping_add(pool.threads() * (self.depth - 1) * size);
        let p = Pointers { x: o.inputs[0], dy: o.inputs[1], out: o.outputs[0].cast(), stacks, results };
        let taps: usize = self.axes.iter().map(|a| a.taps).product();
        // Few tasks are shared out by tap as well: what is packed by the outermost one, so that tasks pack different ones of x.
        let by_tap = if self.packs() { self.axes[0].taps } else { taps };
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
        for (i, piece) in self.blocks[block].pieces.iter().enumerate() {
            let (spans, work) = work.split_at_mut((piece.leaves.len() * SPAN).next_multiple_of(16));
            // SAFETY: a span is so many words, of which any bits are fine; the workspace begins at a cache line.
            let spans =
                unsafe { std::slice::from_raw_parts_mut(spans.as_mut_ptr().cast::<Span>(), piece.leaves.len()) };
            let (packed, _) = self.packed(&piece.around, piece.dy.len(), outer.clone());
            let packed_dy = packed.dy([piece.around[0].end, packed.first[1], packed.first[2]]);
            let (dy, x) = work.split_at_mut(if self.packs() { packed_dy } else { 0 });
            let [a1, a2, a3] = &self.axes;
            let next = [a1, a2, a3].map(|a| [a.stride * a.x_stride, a.dy_stride]);
            let mut view = View { x: p.x.cast(), dy: p.dy.cast(), packed: None, next };
            if self.packs() {
                let unit = [packed.x_channels, packed.channels];
                let row = unit.map(|channels| packed.units * channels);
                let rows = [a1.stride * packed.x_rows[1] * row[0], packed.rows[1] * row[1]];
                let next = [rows, [a2.stride * row[0], row[1]], unit];
                view = View { x: x.as_ptr(), dy: dy.as_ptr(), packed: Some(packed), next };
                // SAFETY: by the contract of `run`.
                unsafe { self.pack_dy(piece, p.dy.cast(), dy) };
            }
            for j3 in 0..t3 {
                if self.packs() {
                    // SAFETY: as above.
                    unsafe { self.pack_x(piece, &packed, j3, p.x.cast(), x) };
                }
                for tap in range.clone().filter(|tap| tap % t3 == j3) {
                    let at = [tap / (t2 * t3), tap / t3 % t2, j3];
                    spans.iter_mut().zip(&piece.leaves).for_each(|(s, leaf)| *s = Span::new(self, &view, at, leaf));
                    // SAFETY: as above.
                    unsafe { self.tap(block, piece, tap, spans, view, i > 0, to) };
                }
            }
        }
    }

    /// Packs a piece's units of dy.
    unsafe fn pack_dy(&self, piece: &Piece, dy: *const u16, to: &mut [f32]) {
        let [a1, a2, _] = &self.axes;
        let channels = self.cout * self.groups;
        let mut rows = to.chunks_exact_mut((piece.dy.len() * channels).max(1));
        let [b, r1, r2, _] = &piece.around;
        for b in b.clone() {
            for o1 in r1.clone() {
                for (o2, row) in r2.clone().zip(&mut rows) {
                    let at = self.batches[b][1] + self.dy_channel + o1 * a1.dy_stride + o2 * a2.dy_stride;
                    // SAFETY: by the contract of `run`.
                    unsafe { self.pack_row(dy.add(at), &piece.dy, channels, row) };
                }
            }
        }
    }

    /// Packs the units that a tap along the innermost dimension reads of x for a piece.
    unsafe fn pack_x(&self, piece: &Piece, packed: &Packed, j3: usize, x: *const u16, to: &mut [f32]) {
        let [a1, a2, _] = &self.axes;
        let channels = self.cin * self.groups;
        let mut rows = to.chunks_exact_mut((piece.dy.len() * channels).max(1));
        for b in piece.around[0].clone() {
            for i1 in 0..packed.x_rows[0] {
                for (i2, row) in (0..packed.x_rows[1]).zip(&mut rows) {
                    let (i1, i2) = (packed.x_first[0] + i1, packed.x_first[1] + i2);
                    let at = self.batches[b][0] + self.x_channel + i1 * a1.x_stride + i2 * a2.x_stride;
                    // SAFETY: by the contract of `run`.
                    unsafe { self.pack_row(x.add(at), &piece.x[j3], channels, row) };
                }
            }
        }
    }

    /// Packs a row of units: `to[u * channels + c]` is channel `c` at the places of unit `u`, zeros where there is none.
    ///
    /// # Safety
    /// So many channels lie at each place behind `from`; there is room for all units.
    unsafe fn pack_row(&self, from: *const u16, units: &[[usize; 2]], channels: usize, to: &mut [f32]) {
        if self.pairs() {
            // SAFETY: by this function's contract.
            return unsafe { pack_pairs(self.isa, from, units, channels, to) };
        }
        let mut u = 0;
        while u < units.len() {
            let first = units[u][0];
            // Elements that follow one another are made wide at once.
            let follows = |n: usize| first != NOTHING && units[u + n][0] == first + n * channels;
            let n = (1..units.len() - u).find(|n| !follows(*n)).unwrap_or(units.len() - u);
            let to = &mut to[u * channels..][..n * channels];
            match first {
                NOTHING => to.fill(0.0),
                // SAFETY: as above.
                first => unsafe { half::widen_to(self.isa, from.add(first), to.len(), to.as_mut_ptr()) },
            }
            u += n;
        }
    }

    unsafe fn tap(
        &self,
        block: usize,
        piece: &Piece,
        tap: usize,
        spans: &[Span],
        view: View,
        goes_on: bool,
        to: *mut f32,
    ) {
        let row = self.cout * self.groups;
        // What is packed begins with the first channel.
        let [x_channel, dy_channel] = if self.packs() { [0, 0] } else { [self.x_channel, self.dy_channel] };
        for group in 0..self.groups {
            let mut co = 0;
            while co < self.cout {
                let width = if self.isa >= Isa::Avx512 && self.cout - co > 16 { 32 } else { 16 };
                let mut ci = 0;
                while ci < self.cin {
                    let mr = tile_rows(self.isa, self.pairs(), self.cin - ci, width);
                    let at = (tap * self.cin + ci) * row + group * self.cout + co;
                    let job = Job {
                        plan: self,
                        leaves: &piece.leaves,
                        spans,
                        program: &self.blocks[block].program,
                        view,
                        x: x_channel + group * if self.groups > 1 { self.cin } else { 0 } + ci,
                        dy: dy_channel + group * self.cout + co,
                        // SAFETY: there is room for every weight.
                        out: unsafe { to.add(at) },
                        out_pitch: row,
                        columns: width.min(self.cout - co),
                        goes_on,
                    };
                    // SAFETY: indices inside the buffers, by the plan; the instruction set is the machine's.
                    unsafe { run_tile(self.isa, mr, width, &job) };
                    ci += mr;
                }
                co += width;
            }
        }
    }
}

/// a = a + b.
///
/// # Safety
/// So many floats lie at both, which do not overlap.
unsafe fn add(isa: Isa, a: *mut f32, b: *const f32, n: usize) {
    // SAFETY: by this function's contract.
    let (a, b) = unsafe { (std::slice::from_raw_parts_mut(a, n), std::slice::from_raw_parts(b, n)) };
    dispatch!(isa, fn(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += *b);
    });
}

/// Packs a row of pairs: `to[p * channels + c]` is channel `c` at both places of pair `p`, zeros where there is none.
///
/// # Safety
/// So many channels lie at each place behind `from`; there is room for all pairs.
unsafe fn pack_pairs(isa: Isa, from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
    dispatch!(isa, fn(from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
        let mut to = to.as_mut_ptr().cast::<u32>();
        for pair in pairs {
            let mut c = 0;
            // Vectors, also where there is just one of them.
            while c < channels {
                // SAFETY: by the contract of this function.
                c += unsafe {
                    match channels - c {
                        32.. => pack_channels::<32>(from.wrapping_add(c), *pair, to.add(c)),
                        16.. => pack_channels::<16>(from.wrapping_add(c), *pair, to.add(c)),
                        8.. => pack_channels::<8>(from.wrapping_add(c), *pair, to.add(c)),
                        _ => pack_channels::<1>(from.wrapping_add(c), *pair, to.add(c)),
                    }
                };
            }
            to = to.wrapping_add(channels);
        }
    });
}

/// Packs `N` channels of a pair; gives their number.
///
/// # Safety
/// So many channels lie at each place, and there is room for them at `to`.
#[inline(always)]
unsafe fn pack_channels<const N: usize>(from: *const u16, [a, b]: [usize; 2], to: *mut u32) -> usize {
    let line = |at: usize| match at {
        NOTHING => [0; N],
        // SAFETY: by this function's contract.
        at => unsafe { from.add(at).cast::<[u16; N]>().read_unaligned() },
    };
    let (low, high) = (line(a), line(b));
    let both: [u32; N] = std::array::from_fn(|c| u32::from(low[c]) | u32::from(high[c]) << 16);
    // SAFETY: as above.
    unsafe { to.cast::<[u32; N]>().write_unaligned(both) };
    N
}

/// The run of flattened batch indices of a box over the batch dimensions.
fn batch_run(local: &[Range<usize>], origin: &[Range<usize>]) -> Range<usize> {
    let mut run = 0..1;
    for (l, o) in local.iter().zip(origin) {
        run = run.start * o.len() + l.start..(run.end - 1) * o.len() + l.end;
    }
    run
}
