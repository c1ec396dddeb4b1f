//! `contract`: sums of products of two tensors of any order of dimensions, as packed and blocked matrix products.
//!
//! Along the contracted dimensions it counts in units: elements of `f32`, pairs of `bf16` (the last one of a leaf may have
//! a zero for its second half). Factors of `f16` are packed as the `f32` that they are.
//!
//! All of b is packed once, by panels of as many columns as a tile has. A task has a block of rows and columns of the
//! result; it goes through the contracted elements piece by piece, packs a's part of a piece where the second-level
//! cache holds it, and runs tiles over it. A piece is a subtree of the summation tree, or a part of a single long leaf
//! whose sums go on from where the part before it left them: the order of no sum depends on how it is cut. An epilogue
//! takes the finished block from the workspace.
//!
//! Roofline: 2 * m * n * k flops; the multiply-add units bind once m and n reach a few tiles. Packing reads and writes
//! b once, and a once for each block of columns.

use super::conv::strides;
use super::epilogue::{self, Epilogue};
use super::isa::Isa;
use super::kernel::Operands;
use super::pack::{self, NOTHING, Side};
use super::tile::{self, Combine, Leaves, Tile, panel_width};
use super::vm::StepContext;
use crate::dispatch;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::dim::{DType, Name};
use mesh::ops::Prim;
use mesh::plan::{OpWork, Part};
use std::ops::Range;

/// Contracted units of a piece at most: a tile's rows of them stay in the first-level cache.
const PIECE: usize = 512;
/// Rows of a block at most: of eight register tiles, or of seven matrix tiles.
const BLOCK_ROWS: usize = 112;
/// Columns of a block at most, and of one whose result lies in the cache first.
const BLOCK_COLUMNS: [usize; 2] = [1024, 512];
/// Elements between rows of a result at most that tiles store themselves: rows farther apart fall on the same places of the
/// caches, or on pages of their own, so that stores hold up what comes behind them.
const DIRECT: usize = 256;
/// Blocks that a product is cut into at least, so that threads end at about the same time, and one whose rows are packed anew
/// for each block of columns.
const BLOCKS: [usize; 2] = [16, 12];
/// Units between the rows of a packed piece that lie in neighbouring sets of the cache.
const PITCH: usize = PIECE + 16;
/// Bytes after which memory falls on the same places of the nearest cache.
const CACHE_WAY: usize = 4096;
/// Contracted units that matrix tiles sum at a time.
const STEP: usize = 16;
/// Contracted units and panels that a task packs of b.
const PACKED: [usize; 2] = [128, 8];

/// One instruction of the stack machine over pieces; sums are blocks of rows and columns.
#[derive(Debug)]
enum Step {
    /// Sum a piece and push it, or go on with the sums on top.
    Sum { depth: Range<usize>, channels: Vec<Range<usize>>, program: [Vec<Combine>; 1], goes_on: bool },
    /// Add the two on top.
    Add,
}

/// A contraction, prepared.
pub struct ContractPlan {
    isa: Isa,
    /// Of the factors.
    dtype: DType,
    /// By batch: offsets in a, b and the result.
    batches: Vec<[usize; 3]>,
    a_rows: Side,
    a_depth: Side,
    b_columns: Side,
    b_depth: Side,
    out_rows: Side,
    out_columns: Side,
    /// The stack machine of each node.
    nodes: Vec<Vec<Step>>,
    /// Most sums on a stack at a time.
    slots: usize,
    /// Units between a's rows, if tiles may read them where they lie.
    a_pitch: Option<usize>,
    /// Elements between the result's rows, where that is the same everywhere.
    row_stride: Option<usize>,
    /// Whether tiles may store there themselves.
    direct: bool,
    epilogue: Option<Epilogue>,
    elements: usize,
    width: usize,
    /// Rows and panels of a block.
    block: [usize; 2],
}

/// Factors are of either dtype.
#[derive(Clone, Copy)]
struct Pointers<'a> {
    a: *const u8,
    b: *const u8,
    /// What an epilogue reads besides.
    operands: &'a [*const u8],
    results: &'a [*mut u8],
    scratch: *mut f32,
    cx: StepContext,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers<'_> {}
// SAFETY: as above.
unsafe impl Send for Pointers<'_> {}

/// The offsets of all points of some loops, row-major: each loop a range and, by tensor, (first held index, stride).
fn offsets<const N: usize>(loops: &[(Range<usize>, [(usize, usize); N])]) -> Vec<[usize; N]> {
    let mut out = vec![[0; N]];
    for (range, at) in loops {
        out = out
            .iter()
            .flat_map(|o| {
                range.clone().map(|i| {
                    let mut o = *o;
                    for t in 0..N {
                        o[t] += (i - at[t].0.min(i)) * at[t].1;
                    }
                    o
                })
            })
            .collect();
    }
    out
}

fn sides(offsets: &[[usize; 2]]) -> [Side; 2] {
    [0, 1].map(|t| Side::new(offsets.iter().map(|o| o[t]).collect()))
}

/// What a subtree of the summation tree is summed by.
enum Subtree {
    /// One piece, or one leaf.
    Small { program: Vec<Combine>, leaves: Vec<Range<usize>> },
    /// Several pieces.
    Large(Vec<Step>),
}

impl Subtree {
    fn steps(self) -> Vec<Step> {
        let (program, leaves) = match self {
            Subtree::Large(steps) => return steps,
            Subtree::Small { program, leaves } => (program, leaves),
        };
        let depth = leaves[0].start..leaves[leaves.len() - 1].end;
        let pieces = if depth.len() <= PIECE { 1 } else { depth.len().div_ceil(PIECE - STEP) };
        let mut steps = Vec::new();
        for i in 0..pieces {
            // Between the steps of whatever sums them.
            let cut = |i: usize| match i == pieces {
                true => depth.end,
                false => depth.start + (i * depth.len() / pieces).next_multiple_of(STEP),
            };
            let piece = cut(i)..cut(i + 1);
            let inside = |l: &Range<usize>| l.start.max(piece.start) - piece.start..l.end.min(piece.end) - piece.start;
            let channels = leaves.iter().map(inside).collect();
            steps.push(Step::Sum { depth: piece, channels, program: [program.clone()], goes_on: i > 0 });
        }
        steps
    }
}

/// Cuts a stack machine over leaves into pieces: subtrees as large as a piece may be, and parts of longer leaves.
fn cut(program: &[Combine], leaves: &[Range<usize>]) -> Vec<Step> {
    let mut stack: Vec<Subtree> = Vec::new();
    for c in program {
        let subtree = match c {
            Combine::Leaf(l) => Subtree::Small { program: vec![Combine::Leaf(0)], leaves: vec![leaves[*l].clone()] },
            Combine::Add => match (stack.pop(), stack.pop()) {
                (
                    Some(Subtree::Small { program: right, leaves: more }),
                    Some(Subtree::Small { mut program, mut leaves }),
                ) if more[more.len() - 1].end - leaves[0].start <= PIECE => {
                    let n = leaves.len();
                    leaves.extend(more);
                    program.extend(right.into_iter().map(|c| match c {
                        Combine::Leaf(l) => Combine::Leaf(n + l),
                        Combine::Add => Combine::Add,
                    }));
                    program.push(Combine::Add);
                    Subtree::Small { program, leaves }
                }
                (Some(right), Some(left)) => {
                    let mut steps = left.steps();
                    steps.extend(right.steps());
                    steps.push(Step::Add);
                    Subtree::Large(steps)
                }
                _ => unreachable!("a stack machine adds what it pushed"),
            },
        };
        stack.push(subtree);
    }
    stack.pop().map_or(vec![], Subtree::steps)
}

/// Most sums on the stack of a program at a time.
fn deepest(steps: &[Step]) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for s in steps {
        match s {
            Step::Sum { goes_on: true, .. } => {}
            Step::Sum { .. } => now += 1,
            Step::Add => now -= 1,
        }
        most = most.max(now);
    }
    most
}

impl ContractPlan {
    /// Prepares a `contract` for the best instruction set; None for another op.
    pub fn new(work: &OpWork) -> Option<ContractPlan> {
        ContractPlan::with_isa(work, Isa::detect())
    }

    /// Prepares it for one instruction set.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<ContractPlan> {
        let Prim::Contract(op) = &work.op else { return None };
        let (a, b, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        // First held index and stride of a dimension in a tensor; stride 0 where the tensor lacks it.
        let place = |p: &Part, n: &Name| match p.ty.position(n) {
            Some(i) => (p.region.0[i].1.start, strides(p)[i]),
            None => (0, 0),
        };
        let (mut batch, mut rows, mut columns) = (vec![], vec![], vec![]);
        for (n, range) in &out.region.0 {
            match (a.ty.has(n), b.ty.has(n)) {
                (true, true) => batch.push((range.clone(), [place(a, n), place(b, n), place(out, n)])),
                (true, false) => rows.push((range.clone(), [place(a, n), place(out, n)])),
                _ => columns.push((range.clone(), [place(b, n), place(out, n)])),
            }
        }
        let (tree, owned) = work.sum.clone().unwrap_or_default();
        let leaves = Leaves::new(&tree, &owned);
        let names: Vec<&Name> =
            a.ty.dims
                .iter()
                .chain(b.ty.dims.iter().filter(|d| !a.ty.has(&d.name)))
                .map(|d| &d.name)
                .filter(|n| op.over.contains(n))
                .collect();
        let (dtype, pairs, widens) = (a.ty.dtype, a.ty.dtype == DType::Bf16, a.ty.dtype == DType::F16);
        let unit = 1 + usize::from(pairs);
        let (mut depth, mut channels) = (Vec::new(), Vec::new());
        for leaf in &leaves.boxes {
            let loops: Vec<_> = leaf.iter().zip(&names).map(|(r, n)| (r.clone(), [place(a, n), place(b, n)])).collect();
            let start = depth.len();
            depth.extend(offsets(&loops));
            depth.resize(depth.len().next_multiple_of(unit), [NOTHING; 2]);
            channels.push(start / unit..depth.len() / unit);
        }
        let [a_rows, out_rows] = sides(&offsets(&rows));
        let [b_columns, out_columns] = sides(&offsets(&columns));
        let [a_depth, b_depth] = sides(&depth);
        let nodes: Vec<Vec<Step>> = leaves.nodes.iter().map(|program| cut(program, &channels)).collect();
        let slots = nodes.iter().map(|n| deepest(n)).max().unwrap_or(0).max(1);
        let at_once = nodes.iter().all(|n| n.len() == 1) && out_columns.run() == out_columns.len().max(1);
        let row_stride = out_rows.stride();
        let epilogue = work.epilogue.as_ref().map(|of| Epilogue::new(of, isa));
        let direct = at_once && row_stride.is_some_and(|n| n <= DIRECT) && epilogue.is_none();
        let width = panel_width(isa, b_columns.len());
        let batches = offsets(&batch);
        let tile = if pairs && isa == Isa::Amx { 16 } else { 14 };
        let (rows, panels) = (a_rows.len().max(1), b_columns.len().div_ceil(width).max(1));
        let block_rows = rows.div_ceil(rows.div_ceil(BLOCK_ROWS)).next_multiple_of(tile).min(rows);
        let room = WORKSPACE_BYTES / 4 - BLOCK_ROWS * PITCH - epilogue::registers(&epilogue);
        let most = BLOCK_COLUMNS[usize::from(!direct)];
        let most = if direct { most } else { most.min(room / (slots * block_rows)) } / width;
        assert!(most > 0, "the stack of a sum with {slots} levels does not fit into the workspace");
        // A row's units lie side by side, and rows not where the nearest cache can hold few of them.
        let whole = |at: usize| at.is_multiple_of(unit);
        let side_by_side = a_depth.run() == a_depth.len() && a_depth.len() > 0 && whole(a_depth.at(0));
        let apart = a_rows.stride().filter(|n| whole(*n) && !(n * a.ty.dtype.bytes()).is_multiple_of(CACHE_WAY));
        let whole = a_rows.len() > 0 && whole(a_rows.at(0)) && batches.iter().all(|b| whole(b[0]));
        let a_pitch = apart.filter(|_| side_by_side && whole && !widens).map(|n| n / unit);
        let wanted = BLOCKS[usize::from(a_pitch.is_none())].div_ceil(batches.len().max(1) * rows.div_ceil(block_rows));
        let column_blocks = panels.div_ceil(most).max(wanted.min(panels.div_ceil(2)));
        let block = [block_rows, panels.div_ceil(column_blocks)];
        let elements = out.region.elements();
        Some(ContractPlan {
            isa,
            dtype,
            batches,
            a_rows,
            a_depth,
            b_columns,
            b_depth,
            out_rows,
            out_columns,
            nodes,
            slots,
            a_pitch,
            row_stride,
            direct,
            epilogue,
            elements,
            width,
            block,
        })
    }

    /// Whether the factors are multiplied by pairs.
    fn pairs(&self) -> bool {
        self.dtype == DType::Bf16
    }

    fn panels(&self) -> usize {
        self.b_columns.len().div_ceil(self.width)
    }

    /// Contracted units.
    fn units(&self) -> usize {
        self.b_depth.len() / (1 + usize::from(self.pairs()))
    }

    /// Bytes of scratch: b, packed, of all batches.
    pub fn scratch_bytes(&self) -> usize {
        self.batches.len() * self.panels() * self.width * self.units() * 4
    }

    /// The same of a `contract` that is not prepared; None for another op.
    pub fn scratch_of(work: &OpWork, isa: Isa) -> Option<usize> {
        let Prim::Contract(_) = &work.op else { return None };
        let [a, b] = [0, 1].map(|i| &work.inputs[i].ty);
        let (mut batches, mut columns) = (1, 1);
        for (name, range) in &work.output.region.0 {
            match (a.has(name), b.has(name)) {
                (true, true) => batches *= range.len(),
                (true, false) => {}
                (false, _) => columns *= range.len(),
            }
        }
        let (tree, owned) = work.sum.clone().unwrap_or_default();
        let unit = 1 + usize::from(a.dtype == DType::Bf16);
        let points = |leaf: &Vec<Range<usize>>| leaf.iter().map(Range::len).product::<usize>();
        let units: usize = Leaves::new(&tree, &owned).boxes.iter().map(|leaf| points(leaf).div_ceil(unit)).sum();
        Some(batches * columns.next_multiple_of(panel_width(isa, columns)) * units * 4)
    }

    /// Runs it; the result is `[nodes, ..]`.
    ///
    /// # Safety
    /// The operands are buffers of the plan's parts and of the scratch asked for; they overlap only where the plan lets the
    /// epilogue write in place.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands, cx: StepContext) {
        let (factors, operands) = o.inputs.split_at(2);
        let [a, b] = [factors[0], factors[1]];
        let p = Pointers { a, b, operands, results: o.outputs, scratch: o.scratch.cast(), cx };
        let (panels, k) = (self.panels(), self.units());
        let packs = [k.div_ceil(PACKED[0]), panels.div_ceil(PACKED[1])];
        pool.run(self.batches.len() * packs[0] * packs[1], &|t, _| {
            let (batch, t) = (t / (packs[0] * packs[1]), t % (packs[0] * packs[1]));
            let (depth, panel) = (t % packs[0] * PACKED[0], t / packs[0] * PACKED[1]);
            let end = (depth + PACKED[0]).min(k);
            // A few lines of b at a time, so that panels side by side find them in the nearest cache.
            for depth in (depth..end).step_by(STEP) {
                for panel in panel..(panel + PACKED[1]).min(panels) {
                    // SAFETY: every part of a panel is packed by one task.
                    unsafe { self.pack_b(p, batch, panel, depth..(depth + STEP).min(end)) };
                }
            }
        });
        let rows = self.a_rows.len().div_ceil(self.block[0]);
        let columns = panels.div_ceil(self.block[1]);
        pool.run(self.batches.len() * rows * columns, &|t, w| {
            let (batch, t) = (t / (rows * columns), t % (rows * columns));
            let (row, panel) = (t % rows * self.block[0], t / rows * self.block[1]);
            let rows = row..(row + self.block[0]).min(self.a_rows.len());
            let panels = panel..(panel + self.block[1]).min(panels);
            // SAFETY: b is packed; blocks of the result are disjoint.
            unsafe { self.block(p, batch, rows, panels, w.floats()) };
        });
    }

    /// Packs a part of a panel of b; columns that are not there are zeros.
    unsafe fn pack_b(&self, p: Pointers, batch: usize, panel: usize, depth: Range<usize>) {
        let first = panel * self.width;
        let columns = first..(first + self.width).min(self.b_columns.len());
        let sides = [&self.b_depth, &self.b_columns];
        // SAFETY: offsets lie inside b; the panel is a part of the scratch.
        unsafe {
            let from = p.b.add(self.batches[batch][1] * self.dtype.bytes());
            let to = p.scratch.add((batch * self.panels() + panel) * self.width * self.units());
            let to = to.add(depth.start * self.width);
            pack::panel(self.isa, self.dtype, from, sides, [depth, columns], to, self.width);
        }
    }

    /// A piece of rows of a, packed unless tiles may read it where it lies: its first unit, and units from one row and from one
    /// unit to the next.
    unsafe fn rows(
        &self,
        packed: &mut [f32],
        a: *const u8,
        batch: usize,
        rows: Range<usize>,
        depth: Range<usize>,
    ) -> (*const f32, [usize; 2]) {
        let (floats, halves, at) = (a.cast::<f32>(), a.cast::<u16>(), self.batches[batch][0]);
        if let Some(pitch) = self.a_pitch {
            let unit = 1 + usize::from(self.pairs());
            let first = (at + self.a_rows.at(rows.start) + self.a_depth.at(0)) / unit + depth.start;
            // SAFETY: as below.
            return (unsafe { floats.add(first) }, [pitch, 1]);
        }
        let (x, m, k) = (packed.as_mut_ptr(), &self.a_rows, &self.a_depth);
        let (by_rows, widens) = (k.run() >= m.run(), self.dtype == DType::F16);
        // Matrix tiles want a row's units behind each other.
        let turned = self.pairs() && self.isa == Isa::Amx;
        // SAFETY: by the callers' contract the offsets lie inside a, and `packed` has room for a piece of a block's rows.
        unsafe {
            match (self.pairs(), by_rows) {
                (false, true) if widens => pack::copy_wide(self.isa, halves.add(at), [m, k], [rows, depth], x, PITCH),
                (false, false) if widens => {
                    pack::copy_wide(self.isa, halves.add(at), [k, m], [depth, rows], x, BLOCK_ROWS)
                }
                (false, true) => pack::copy(floats.add(at), [m, k], [rows, depth], x, PITCH),
                (false, false) => pack::copy(floats.add(at), [k, m], [depth, rows], x, BLOCK_ROWS),
                (true, true) => pack::copy_paired(halves.add(at), [m, k], [rows, depth], x.cast(), PITCH),
                (true, false) if turned => {
                    pack::turn_pairs(self.isa, halves.add(at), [k, m], [depth, rows], x.cast(), PITCH)
                }
                (true, false) => {
                    pack::copy_pairs(self.isa, halves.add(at), [k, m], [depth, rows], x.cast(), BLOCK_ROWS)
                }
            }
        }
        (x, if by_rows || turned { [PITCH, 1] } else { [1, BLOCK_ROWS] })
    }

    /// Computes a block of the result.
    unsafe fn block(&self, p: Pointers, batch: usize, rows: Range<usize>, panels: Range<usize>, work: &mut [f32]) {
        let (packed, rest) = work.split_at_mut(BLOCK_ROWS * PITCH);
        let (registers, slots) = rest.split_at_mut(epilogue::registers(&self.epilogue));
        let pitch = panels.len() * self.width;
        let slot = rows.len() * pitch;
        let columns = panels.start * self.width..(panels.end * self.width).min(self.b_columns.len());
        debug_assert!(self.direct || self.slots * slot <= slots.len());
        for (n, steps) in self.nodes.iter().enumerate() {
            // SAFETY: offsets lie inside a and the result, whose blocks are disjoint; the workspace has room for a
            // piece's rows and for the stack.
            unsafe {
                let start = n * self.elements + self.batches[batch][2];
                let mut top = 0;
                for step in steps {
                    let Step::Sum { depth, channels, program, goes_on } = step else {
                        top -= 1;
                        let (left, right) = slots[(top - 1) * slot..][..2 * slot].split_at_mut(slot);
                        add(self.isa, left, right);
                        continue;
                    };
                    let (x, [x_pitch, x_step]) = self.rows(packed, p.a, batch, rows.clone(), depth.clone());
                    if !goes_on {
                        top += 1;
                    }
                    for panel in panels.clone() {
                        let w = (batch * self.panels() + panel) * self.units() + depth.start;
                        let first = panel * self.width;
                        let (out, out_pitch, columns) = match self.row_stride {
                            Some(stride) if self.direct => {
                                let to = start + self.out_rows.at(rows.start) + self.out_columns.at(first);
                                (p.results[0].cast::<f32>().add(to), stride, self.width.min(columns.end - first))
                            }
                            _ => {
                                let to = slots[(top - 1) * slot + (panel - panels.start) * self.width..].as_mut_ptr();
                                (to, pitch, self.width)
                            }
                        };
                        let tile = Tile {
                            x,
                            pairs: self.pairs(),
                            pitch: x_pitch,
                            step: x_step,
                            taps: &[[0, 0]],
                            channels,
                            w: p.scratch.add(w * self.width),
                            nodes: program,
                            goes_on: *goes_on,
                            out,
                            out_pitch,
                            node_pitch: 0,
                            columns,
                        };
                        tile::run(self.isa, self.width, tile, rows.len());
                    }
                }
                if self.direct {
                    continue;
                }
                // Rows that follow one another are taken as one.
                let joined = self.row_stride == Some(pitch) && columns.len() == pitch;
                let at_once = if joined && self.epilogue.is_some() { rows.len() } else { 1 };
                let mut e = self.epilogue.as_ref().map(|e| (e, e.begin(p.cx, p.operands, registers)));
                for (r, row) in rows.clone().enumerate().step_by(at_once) {
                    let mut from = slots[r * pitch..].as_ptr();
                    for (offset, n) in self.out_columns.runs(columns.clone()) {
                        let (to, n) = (start + self.out_rows.at(row) + offset, n * at_once);
                        match &mut e {
                            Some((epilogue, evaluation)) => {
                                epilogue.take(evaluation, to, from, n, p.results, std::ptr::null_mut())
                            }
                            None => std::ptr::copy_nonoverlapping(from, p.results[0].cast::<f32>().add(to), n),
                        }
                        from = from.add(n);
                    }
                }
            }
        }
    }
}

fn add(isa: Isa, left: &mut [f32], right: &[f32]) {
    dispatch!(isa, fn(left: &mut [f32], right: &[f32]) {
        left.iter_mut().zip(right).for_each(|(l, r)| *l += r);
    });
}
