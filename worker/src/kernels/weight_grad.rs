//! The gradient of a convolution by its filter: `[k.., cin, cout]`, summed over batch and space.
//!
//! The sum is cut into blocks, subtrees of the summation tree whose voxels fit into the second-level cache. A block goes
//! through all taps and channel tiles; for each register tile the leaves inside are walked innermost, their sums on a
//! small stack of tiles, so that even leaves of single voxels do not touch weight-sized memory. Blocks' results are
//! combined along the rest of the tree. Blocks and tiles depend on the program alone in what they sum, so no bit
//! depends on them.
//!
//! Of `bf16`, the products of neighbours along the innermost dimension of a leaf are added in pairs, zeros where a tap
//! leaves x or a leaf has no second one. Pairs do not lie in memory as such: a task packs those of a piece of its block,
//! of x anew for each tap along that dimension. A block is one piece, but a leaf too large for the workspace is several,
//! whose sums go on from where the one before left them.
//!
//! Roofline: 2 * taps * cin * cout flops a voxel; the multiply-add units bind from 16 channels on. Packing reads x
//! once a tap along the innermost dimension, and dy once.

use super::conv::{axis_of, batch_offsets, in_pairs};
use super::isa::Isa;
use super::kernel::Operands;
use super::pack::NOTHING;
use super::tile::{Combine, Lanes, Portable, PortablePairs, store_row};
use crate::dispatch;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::chunk::{Event, Node, Tree};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::OpWork;
use std::ops::Range;

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
    /// The leaves, and the pairs of each along the innermost dimension.
    leaves: Vec<(Box4, Range<usize>)>,
    /// The box around them.
    around: Box4,
    /// Of `bf16`: where the halves of each pair lie along a row of dy, and of x by tap; [`NOTHING`] for zeros.
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
    /// Whether x and dy are `bf16`.
    pairs: bool,
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

/// Inputs are of either dtype.
#[derive(Clone, Copy)]
struct Pointers {
    x: *const u8,
    dy: *const u8,
    out: *mut f32,
    scratch: *mut f32,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// Where a task finds its block's x and dy: in the inputs, or packed.
#[derive(Clone, Copy)]
struct View {
    x: *const f32,
    dy: *const f32,
    /// If packed.
    packed: Option<Packed>,
}

/// How a piece's pairs lie: rows of pairs of all channels, of x those that its taps read.
#[derive(Clone, Copy)]
struct Packed {
    /// First index of dy, and of x along s1 and s2.
    first: [usize; 3],
    x_first: [usize; 2],
    /// Rows along s1 and s2.
    rows: [usize; 2],
    x_rows: [usize; 2],
    /// Pairs of a row, and channels of each.
    pairs: usize,
    x_channels: usize,
    channels: usize,
}

impl Packed {
    fn x(&self, [b, i1, i2]: [usize; 3]) -> usize {
        let row = (b - self.first[0]) * self.x_rows[0] + i1 - self.x_first[0];
        (row * self.x_rows[1] + i2 - self.x_first[1]) * self.pairs * self.x_channels
    }
    fn dy(&self, [b, o1, o2]: [usize; 3]) -> usize {
        let row = (b - self.first[0]) * self.rows[0] + o1 - self.first[1];
        (row * self.rows[1] + o2 - self.first[2]) * self.pairs * self.channels
    }
}

/// A register tile's job within a block.
struct Job<'a> {
    plan: &'a WeightGradPlan,
    leaves: &'a [(Box4, Range<usize>)],
    program: &'a [Combine],
    tap: [usize; 3],
    view: View,
    /// Channels of x and dy.
    x: usize,
    dy: usize,
    out: *mut f32,
    out_pitch: usize,
    columns: usize,
    /// Whether the sums of the only leaf go on from those at `out`.
    goes_on: bool,
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
            pairs: x.ty.dtype == DType::Bf16,
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
        for node in tree.nodes(owned) {
            let mut program = vec![];
            plan.cut(tree, &node, &reduced, spatial, &mut program);
            plan.nodes.push(program);
        }
        Some(plan)
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
        in_cache && (!self.pairs || self.has_room(at, at[3].len() / 2 + LEAVES))
    }

    /// How a box's pairs lie if a row has so many, with what a range of taps along s1 reads of x, and how many there are.
    fn packed(&self, at: &Box4, pairs: usize, taps: Range<usize>) -> (Packed, usize) {
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
            pairs,
            x_channels: self.cin * self.groups,
            channels: self.cout * self.groups,
        };
        let (x, dy) = (rows1 * rows2 * packed.x_channels, packed.rows.iter().product::<usize>() * packed.channels);
        (packed, at[0].len() * (x + dy) * pairs)
    }

    fn has_room(&self, at: &Box4, pairs: usize) -> bool {
        self.packed(at, pairs, 0..self.axes[0].taps).1 <= WORKSPACE_BYTES / 4
    }

    /// A leaf as pieces, in the order in which it is summed.
    fn pieces(&self, at: Box4, pieces: &mut Vec<Piece>) {
        let along = (0..4).find(|&d| at[d].len() > if d == 3 { 2 } else { 1 });
        let Some(d) = along.filter(|_| self.pairs && !self.fits(&at)) else {
            let room = !self.pairs || self.has_room(&at, at[3].len().div_ceil(2));
            assert!(room, "what a pair's gradient is made of does not fit into the workspace");
            pieces.push(self.piece(vec![at]));
            return;
        };
        // Between pairs, along the innermost one.
        let middle = at[d].start + (at[d].len() / 2).next_multiple_of(if d == 3 { 2 } else { 1 });
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
        let (of, pairs) = in_pairs(inner.iter().cloned());
        let pairs = if self.pairs { pairs } else { vec![] };
        let of = |l: &Box4| inner.iter().position(|r| *r == l[3]).map_or(0..0, |i| of[i].clone());
        let axis = &self.axes[2];
        let places = |at: &dyn Fn(usize) -> Option<usize>| -> Vec<[usize; 2]> {
            let place = |o: usize| if o == NOTHING { NOTHING } else { at(o).unwrap_or(NOTHING) };
            pairs.iter().map(|pair| pair.map(place)).collect()
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
        let halves = if self.fits(&at) { None } else { tree.halves(node) };
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

    /// Bytes of scratch: the results of the blocks.
    pub fn scratch_bytes(&self) -> usize {
        self.blocks.len() * self.weights() * 4
    }

    /// Runs it; the result is `[nodes, k.., cin, cout]`.
    ///
    /// # Safety
    /// The operands are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands) {
        let p = Pointers { x: o.inputs[0], dy: o.inputs[1], out: o.outputs[0].cast(), scratch: o.scratch.cast() };
        let taps: usize = self.axes.iter().map(|a| a.taps).product();
        // Few blocks are shared out by tap as well: pairs by the outermost one, so that tasks pack different ones of x.
        let by_tap = if self.pairs { self.axes[0].taps } else { taps };
        let per_block = if self.blocks.len() >= pool.threads() * 3 || pool.threads() == 1 { 1 } else { by_tap };
        pool.run(self.blocks.len() * per_block, &|t, w| {
            let p = p;
            let (block, part) = (t / per_block, t % per_block);
            let range = taps * part / per_block..taps * (part + 1) / per_block;
            // SAFETY: every block and tap has a part of the scratch of its own.
            unsafe { self.taps(block, range, p, w.floats()) };
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

    /// Sums a block for a range of taps.
    unsafe fn taps(&self, block: usize, range: Range<usize>, p: Pointers, work: &mut [f32]) {
        let [_, t2, t3] = [self.axes[0].taps, self.axes[1].taps, self.axes[2].taps];
        let outer = range.start / (t2 * t3)..range.end.div_ceil(t2 * t3);
        for (i, piece) in self.blocks[block].pieces.iter().enumerate() {
            let (packed, _) = self.packed(&piece.around, piece.dy.len(), outer.clone());
            let packed_dy = packed.dy([piece.around[0].end, packed.first[1], packed.first[2]]);
            let (dy, x) = work.split_at_mut(if self.pairs { packed_dy } else { 0 });
            let mut view = View { x: p.x.cast(), dy: p.dy.cast(), packed: None };
            if self.pairs {
                view = View { x: x.as_ptr(), dy: dy.as_ptr(), packed: Some(packed) };
                // SAFETY: by the contract of `run`.
                unsafe { self.pack_dy(piece, p.dy.cast(), dy) };
            }
            for j3 in 0..t3 {
                if self.pairs {
                    // SAFETY: as above.
                    unsafe { self.pack_x(piece, &packed, j3, p.x.cast(), x) };
                }
                for tap in range.clone().filter(|tap| tap % t3 == j3) {
                    // SAFETY: as above.
                    unsafe { self.tap(block, piece, tap, view, i > 0, p) };
                }
            }
        }
    }

    /// Packs a piece's pairs of dy.
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
                    unsafe { pack_row(self.isa, dy.add(at), &piece.dy, channels, row) };
                }
            }
        }
    }

    /// Packs the pairs that a tap along the innermost dimension reads of x for a piece.
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
                    unsafe { pack_row(self.isa, x.add(at), &piece.x[j3], channels, row) };
                }
            }
        }
    }

    unsafe fn tap(&self, block: usize, piece: &Piece, tap: usize, view: View, goes_on: bool, p: Pointers) {
        let [_, t2, t3] = [self.axes[0].taps, self.axes[1].taps, self.axes[2].taps];
        let row = self.cout * self.groups;
        // What is packed begins with the first channel.
        let [x_channel, dy_channel] = if self.pairs { [0, 0] } else { [self.x_channel, self.dy_channel] };
        for group in 0..self.groups {
            let mut co = 0;
            while co < self.cout {
                let width = if self.isa == Isa::Avx512 && self.cout - co > 16 { 32 } else { 16 };
                let mut ci = 0;
                while ci < self.cin {
                    let mr = tile_rows(self.isa, self.cin - ci, width);
                    let at = (tap * self.cin + ci) * row + group * self.cout + co;
                    let job = Job {
                        plan: self,
                        leaves: &piece.leaves,
                        program: &self.blocks[block].program,
                        tap: [tap / (t2 * t3), tap / t3 % t2, tap % t3],
                        view,
                        x: x_channel + group * if self.groups > 1 { self.cin } else { 0 } + ci,
                        dy: dy_channel + group * self.cout + co,
                        // SAFETY: inside the scratch, by the plan.
                        out: unsafe { p.scratch.add(block * self.weights() + at) },
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

/// Packs a row of pairs: `to[p * channels + c]` is channel `c` at both places of pair `p`, zeros where there is none.
///
/// # Safety
/// So many channels lie at each place behind `from`; there is room for all pairs.
unsafe fn pack_row(isa: Isa, from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
    dispatch!(isa, fn(from: *const u16, pairs: &[[usize; 2]], channels: usize, to: &mut [f32]) {
        // SAFETY: by the contract of this function.
        let line = |at: usize| unsafe { std::slice::from_raw_parts(from.add(at), channels) };
        let low = |a: u16| u32::from(a);
        let high = |b: u16| u32::from(b) << 16;
        for (pair, to) in pairs.iter().zip(to.chunks_exact_mut(channels.max(1))) {
            match *pair {
                [NOTHING, NOTHING] => to.fill(0.0),
                [a, NOTHING] => to.iter_mut().zip(line(a)).for_each(|(t, a)| *t = f32::from_bits(low(*a))),
                [NOTHING, b] => to.iter_mut().zip(line(b)).for_each(|(t, b)| *t = f32::from_bits(high(*b))),
                [a, b] => {
                    let both = line(a).iter().zip(line(b));
                    to.iter_mut().zip(both).for_each(|(t, (a, b))| *t = f32::from_bits(low(*a) | high(*b)));
                }
            }
        }
    });
}

/// The run of flattened batch indices of a box over the batch dimensions.
fn batch_run(local: &[Range<usize>], origin: &[Range<usize>]) -> Range<usize> {
    let mut run = 0..1;
    for (l, o) in local.iter().zip(origin) {
        run = run.start * o.len() + l.start..(run.end - 1) * o.len() + l.end;
    }
    run
}

/// Rows of the next tile of so many columns when so many input channels are left: as many sums at a time as the latency of
/// a multiply-add wants.
fn tile_rows(isa: Isa, left: usize, width: usize) -> usize {
    let sizes: &[usize] = match isa {
        Isa::Avx512 if width == 16 => &[16, 12, 8, 4, 2, 1],
        Isa::Avx512 => &[12, 8, 4, 2, 1],
        Isa::Avx2 => &[4, 2, 1],
        Isa::Portable => &[4, 1],
    };
    // Sixteen channels go as 8 + 8, not as 12 + 4.
    if isa == Isa::Avx512 && width > 16 && !left.is_multiple_of(12) && left.is_multiple_of(8) && left < 24 {
        return 8;
    }
    sizes.iter().copied().find(|s| *s <= left).unwrap_or(1)
}

#[inline(always)]
unsafe fn leaf<V: Lanes, const MR: usize, const NV: usize>(
    job: &Job,
    (at, pairs): &(Box4, Range<usize>),
    mut acc: [[V; NV]; MR],
) -> [[V; NV]; MR] {
    let (plan, view) = (job.plan, job.view);
    let [a1, a2, a3] = &plan.axes;
    let [j1, j2, j3] = job.tap;
    // The first element of a row in x and dy, elements between its neighbours, and how many.
    let (first, step, count) = match view.packed {
        Some(p) => ([pairs.start * p.x_channels, pairs.start * p.channels], [p.x_channels, p.channels], pairs.len()),
        None => {
            let run = a3.valid(&at[3], j3);
            let x3 = if run.is_empty() { None } else { a3.x(run.start, j3) };
            let Some(x3) = x3 else { return acc };
            ([x3 * a3.x_stride, run.start * a3.dy_stride], [a3.stride * a3.x_stride, a3.dy_stride], run.len())
        }
    };
    // Rows whose tap lies inside x, and the elements from one to the next along s2.
    let (rows1, rows2) = (a1.valid(&at[1], j1), a2.valid(&at[2], j2));
    let next = match view.packed {
        Some(p) => [a2.stride * p.pairs * p.x_channels, p.pairs * p.channels],
        None => [a2.stride * a2.x_stride, a2.dy_stride],
    };
    let Some(x2) = a2.x(rows2.start, j2).filter(|_| !rows2.is_empty()) else { return acc };
    // SAFETY: by the plan every index lies inside the buffers; lanes beyond `columns` are loaded by `load_row`.
    unsafe {
        for b in at[0].clone() {
            for o1 in rows1.clone() {
                let Some(x1) = a1.x(o1, j1) else { continue };
                let [bx, by] = match view.packed {
                    Some(p) => [p.x([b, x1, x2]), p.dy([b, o1, rows2.start])],
                    None => {
                        let [bx, by] = plan.batches[b];
                        let (x, dy) = (x1 * a1.x_stride + x2 * a2.x_stride, o1 * a1.dy_stride);
                        [bx + x, by + dy + rows2.start * a2.dy_stride]
                    }
                };
                let mut x_row = view.x.add(job.x + bx + first[0]);
                let mut dy_row = view.dy.add(job.dy + by + first[1]);
                for _ in 0..rows2.len() {
                    let (mut x, mut dy) = (x_row, dy_row);
                    for _ in 0..count {
                        let row = load_row::<V, NV>(dy, job.columns);
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let value = *x.add(m);
                            for v in 0..NV {
                                acc[v] = acc[v].fma(value, row[v]);
                            }
                        }
                        x = x.wrapping_add(step[0]);
                        dy = dy.wrapping_add(step[1]);
                    }
                    x_row = x_row.wrapping_add(next[0]);
                    dy_row = dy_row.wrapping_add(next[1]);
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
/// Leaves along a dimension at most.
const LEAVES: usize = 8;

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
                    sum = leaf::<V, MR, NV>(job, &job.leaves[l], sum);
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
    tile_avx512: super::tile::x86::Avx512;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    tile_avx2: super::tile::x86::Avx2;
    tile_portable: Portable;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
    pairs_avx512: super::tile::x86::Avx512Pairs;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi2")]
    pairs_avx2: PortablePairs;
    pairs_portable: PortablePairs;
}

/// Runs a tile of `rows` input channels and up to `width` output channels.
///
/// # Safety
/// The job's pointers are right for its plan, and the instruction set is the machine's.
unsafe fn run_tile(isa: Isa, rows: usize, width: usize, job: &Job) {
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
    match (isa, job.plan.pairs, width) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, false, 32) => tile!(tile_avx512, 2, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, false, _) => tile!(tile_avx512, 1, 16, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, false, _) => tile!(tile_avx2, 1, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, 32) if isa.pairs() => tile!(pairs_avx512, 2, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (_, true, _) if isa.pairs() => tile!(pairs_avx512, 1, 16, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, true, 32) => tile!(pairs_avx2, 2, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, true, _) => tile!(pairs_avx2, 1, 16, 12, 8, 4, 2, 1),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, true, _) => tile!(pairs_avx2, 1, 4, 2, 1),
        (_, true, _) => tile!(pairs_portable, 1, 4, 1),
        _ => tile!(tile_portable, 1, 4, 1),
    }
}
