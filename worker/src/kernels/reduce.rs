//! Fused reductions along the canonical summation tree.
//!
//! Roofline: the bytes of the operands, read once; additions are a fraction of that. What is summed is computed block
//! by block in the cache ([`super::vm`]).
//!
//! Leaves are summed one after another into rows of partial sums; where the innermost loop is kept a row is the kept
//! points along it, and there is one for each reduced loop, since a leaf is summed up loop by loop; where it is reduced a
//! row is 16 lanes (see [`mesh::body::Reduction`]).

use super::fold::{Fold, Rows};
use super::isa::Isa;
use super::lanes::store;
use super::row_sums::LANES;
use super::tile::Combine;
use super::vm::{BLOCK, Evaluation, Machine, StepContext, Use};
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::body::Reduction;
use mesh::chunk::Event;
use mesh::dim::DType;

/// A fused reduction, prepared.
pub struct ReducePlan {
    isa: Isa,
    machine: Machine,
    fold: Fold,
    /// By loop of the machine: whether it is reduced.
    reduced: Vec<bool>,
    /// Leaves: by reduced loop the local range.
    leaves: Vec<Vec<std::ops::Range<usize>>>,
    /// By leaf its range of the last reduced loop, along which it has runs.
    along: Vec<std::ops::Range<usize>>,
    /// Reduced loops between the first and the last one, if the innermost loop is kept: their sums last for some blocks.
    between: Vec<usize>,
    /// Runs of leaves that differ only in where they lie along the innermost reduced loop, one behind the other: they
    /// share blocks.
    runs: Vec<std::ops::Range<usize>>,
    /// Nodes: the stack machine over leaves, in order.
    nodes: Vec<Vec<Combine>>,
    /// Extents of the kept loops but the innermost one (all of them, if the innermost loop is reduced).
    kept: Vec<usize>,
    /// Kept points along the innermost loop; 1 if it is reduced.
    inner: usize,
    /// Whether leaves are summed in parallel, for all kept points, into scratch; otherwise kept points are shared out
    /// and each walks all leaves.
    by_leaf: bool,
    depth: usize,
}

#[derive(Clone, Copy)]
struct Pointers<'a> {
    operands: &'a [*const u8],
    results: &'a [*mut u8],
    stored: &'a [*mut u8],
    scratch: *mut f32,
}

// SAFETY: tasks write disjoint parts of results and scratch and only read operands.
unsafe impl Sync for Pointers<'_> {}
// SAFETY: as above.
unsafe impl Send for Pointers<'_> {}

/// Kept points that a leaf's partial sums may have, so that leaves are done in parallel.
const FEW: usize = 8192;
/// Strips that there are to be for each thread, and kept points of the widest one.
const STRIPS: usize = 8;
const WIDEST: usize = 8 * BLOCK;
/// Rows to sum that are shared out to threads as they are, several to a block.
const MANY: usize = 64;

impl ReducePlan {
    /// Prepares a reduction for the best instruction set.
    pub fn new(r: &Reduction) -> ReducePlan {
        ReducePlan::with_isa(r, Isa::detect())
    }

    /// Prepares a reduction for one instruction set.
    pub fn with_isa(r: &Reduction, isa: Isa) -> ReducePlan {
        let (machine, merged) =
            Machine::new(&r.nest, isa, Use { given: false, summed: r.sums() }, collapses(&r.reduced));
        // A collapsed loop is reduced as its parts are; loops of one point that the machine added in front are kept.
        let mut reduced = Vec::new();
        let mut original = 0;
        for &count in &merged {
            reduced.push(count > 0 && r.reduced[original]);
            original += count;
        }
        let origins: Vec<usize> = r.nest.origin.iter().zip(&r.reduced).filter(|(_, r)| **r).map(|(o, _)| *o).collect();
        let mut leaves = Vec::new();
        let mut nodes = Vec::new();
        let mut depth = 1;
        for node in r.tree.nodes(&r.owned) {
            let (mut program, mut stack) = (Vec::new(), 0usize);
            for event in r.tree.events(&node) {
                match event {
                    Event::Leaf(b) => {
                        let local = b.iter().zip(&origins).map(|(r, o)| r.start - o..r.end - o).collect();
                        leaves.push(local);
                        program.push(Combine::Leaf(leaves.len() - 1));
                        stack += 1;
                        depth = depth.max(stack);
                    }
                    Event::Combine => {
                        program.push(Combine::Add);
                        stack -= 1;
                    }
                }
            }
            nodes.push(program);
        }
        let d = machine.extents.len();
        let inner = if reduced[d - 1] { 1 } else { machine.extents[d - 1] };
        let loops: Vec<usize> = (0..d).filter(|l| reduced[*l]).collect();
        let between = match &loops[..] {
            [_, between @ .., last] if *last < d - 1 => between.to_vec(),
            _ => vec![],
        };
        let row = (between.len() + 1) * machine.summed().len() * if reduced[d - 1] { LANES } else { inner };
        // The points of a block, or sums that fill half of the workspace.
        let most =
            if reduced[d - 1] { [BLOCK, usize::MAX] } else { [usize::MAX, WORKSPACE_BYTES / 4 / 2 / row.max(1)] };
        let runs = if reduced[d - 1] || reduced[d - 2] {
            gather_runs(&mut leaves, &mut nodes, most)
        } else {
            (0..leaves.len()).map(|l| l..l + 1).collect()
        };
        let kept: Vec<usize> =
            (0..d - usize::from(!reduced[d - 1])).filter(|&l| !reduced[l]).map(|l| machine.extents[l]).collect();
        let points = kept.iter().product::<usize>() * inner;
        let few =
            points * machine.summed().len() <= FEW && points * machine.summed().len() * 4 * 2 <= WORKSPACE_BYTES / 4;
        let rows = reduced[d - 1] && !reduced[d - 2] && points >= MANY;
        let along = leaves.iter().map(|l| l.last().cloned().unwrap_or(0..1)).collect();
        let fold = Fold::new(isa, r.f, machine.summed()[0].1);
        ReducePlan {
            isa,
            machine,
            fold,
            reduced,
            leaves,
            along,
            between,
            runs,
            nodes,
            kept,
            inner,
            by_leaf: few && !rows,
            depth,
        }
    }

    /// How many results are reduced.
    fn sums(&self) -> usize {
        self.machine.summed().len()
    }

    fn kept_points(&self) -> usize {
        self.kept.iter().product::<usize>() * self.inner
    }

    /// Bytes of scratch.
    pub fn scratch_bytes(&self) -> usize {
        if self.by_leaf { self.leaves.len() * self.sums() * self.kept_points() * 4 } else { 0 }
    }

    /// Runs the reduction: result `r` goes to `results[r]` as `[nodes, kept..]`, and one that is stored as it lies in the nest.
    ///
    /// # Safety
    /// Operands, results and scratch are buffers large enough for the nest and do not overlap, but for results that are
    /// stored: those as [`super::map::MapPlan::run`] allows.
    pub unsafe fn run(
        &self,
        pool: &Pool,
        operands: &[*const u8],
        results: &[*mut u8],
        scratch: *mut u8,
        cx: StepContext,
    ) {
        let (stored, results) = results.split_at(results.len() - self.sums());
        let p = Pointers { operands, results, stored, scratch: scratch.cast() };
        let (points, count) = (self.kept_points(), self.sums());
        if self.by_leaf {
            let row = count * self.row(self.inner);
            let most = self.runs.iter().map(|r| r.len()).max().unwrap_or(1);
            pool.run(self.runs.len(), &|run, w| {
                let (p, run) = (p, self.runs[run].clone());
                let (sums, registers) = w.floats().split_at_mut((self.room(most) * row).next_multiple_of(LANES));
                // SAFETY: by this function's contract; each leaf has its own part of the scratch.
                let (mut e, out) = unsafe {
                    let out = p.scratch.add(run.start * count * points);
                    (
                        self.machine.evaluation(cx, p.operands, registers),
                        std::slice::from_raw_parts_mut(out, run.len() * count * points),
                    )
                };
                for k in 0..self.kept.iter().product() {
                    self.leaves(run.clone(), k, 0, self.inner, p, &mut e, sums);
                    for (leaf, out) in out.chunks_exact_mut(count * points).enumerate() {
                        for r in 0..count {
                            let from = &sums[leaf * row + r * self.inner..][..self.inner];
                            out[r * points + k * self.inner..][..self.inner].copy_from_slice(from);
                        }
                    }
                }
            });
            for (n, program) in self.nodes.iter().enumerate() {
                // SAFETY: all leaves are done; the scratch holds one row of sums for each.
                unsafe { self.combine_leaves(program, n, p) };
            }
            return;
        }
        // Kept points are shared out in strips along the innermost kept loop: wide ones, since their rows lie apart.
        let strips = (pool.threads() * STRIPS).div_ceil(self.kept.iter().product::<usize>().max(1));
        // Their stack takes half of the workspace at most.
        let room = WORKSPACE_BYTES / 4 / 2 / self.stack(1).div_ceil(LANES) / BLOCK * BLOCK;
        let widest = room.clamp(BLOCK, WIDEST).min(self.inner.max(1));
        let width = self.inner.div_ceil(strips).next_multiple_of(BLOCK).min(widest);
        let per_row = self.inner.div_ceil(width.max(1));
        let blocks = self.kept.iter().product::<usize>() * per_row;
        if self.rows_are_kept() {
            let last = *self.kept.last().unwrap_or(&1);
            let rows =
                (BLOCK / self.machine.extents[self.machine.extents.len() - 1].max(1)).clamp(1, 128).min(last.max(1));
            let groups = blocks / last.max(1) * last.div_ceil(rows);
            let tasks = groups.min(pool.threads() * 8);
            pool.run(tasks, &|t, w| {
                let p = p;
                let (stack, registers) = w.floats().split_at_mut(self.stack(1));
                // SAFETY: by this function's contract; each kept point is done by one task.
                unsafe {
                    let mut e = self.machine.evaluation(cx, p.operands, registers);
                    for g in groups * t / tasks..groups * (t + 1) / tasks {
                        let (outer, first) = (g / last.div_ceil(rows), g % last.div_ceil(rows) * rows);
                        self.rows(outer * last + first, rows.min(last - first), p, &mut e, stack);
                    }
                }
            });
            return;
        }
        let tasks = blocks.min(pool.threads() * 8);
        pool.run(tasks, &|t, w| {
            let p = p;
            let (stack, registers) = w.floats().split_at_mut(self.stack(width));
            // SAFETY: by this function's contract; each kept point is done by one task.
            unsafe {
                let mut e = self.machine.evaluation(cx, p.operands, registers);
                for b in blocks * t / tasks..blocks * (t + 1) / tasks {
                    let (k, start) = (b / per_row, b % per_row * width);
                    self.points(k, start, width.min(self.inner - start), p, &mut e, stack);
                }
            }
        });
    }

    /// Sums of a leaf for so many kept points along the innermost loop: lanes, if that is reduced.
    fn row(&self, width: usize) -> usize {
        if self.reduced[self.reduced.len() - 1] { LANES } else { width }
    }

    /// Leaves whose sums there has to be room for, where so many are summed up.
    fn room(&self, leaves: usize) -> usize {
        (self.between.len() + 1) * leaves + 1
    }

    /// Whether the innermost loop is reduced and the one before it kept: then a block's rows are kept points.
    fn rows_are_kept(&self) -> bool {
        let d = self.reduced.len();
        self.reduced[d - 1] && !self.reduced[d - 2]
    }

    unsafe fn combine_leaves(&self, program: &[Combine], node: usize, p: Pointers) {
        let (points, count) = (self.kept_points(), self.sums());
        let size = points * count;
        let mut stack = [0usize; 64];
        let mut top = 0;
        for c in program {
            match *c {
                Combine::Leaf(l) => {
                    stack[top] = l;
                    top += 1;
                }
                Combine::Add => {
                    // SAFETY: leaves' rows are disjoint parts of the scratch.
                    let (a, b) = unsafe {
                        (
                            std::slice::from_raw_parts_mut(p.scratch.add(stack[top - 2] * size), size),
                            std::slice::from_raw_parts(p.scratch.add(stack[top - 1] * size), size),
                        )
                    };
                    self.fold.add(a, b);
                    top -= 1;
                }
            }
        }
        for r in 0..count {
            // SAFETY: the finished sum lies in the last leaf's row on the stack; the result has room for every node.
            let sum = unsafe { std::slice::from_raw_parts(p.scratch.add(stack[0] * size + r * points), points) };
            // SAFETY: as above.
            unsafe { self.store(r, node * points, sum, p) };
        }
    }

    unsafe fn store(&self, r: usize, at: usize, sum: &[f32], p: Pointers) {
        match self.machine.summed()[r].1 {
            DType::Bool => {
                for (i, v) in sum.iter().enumerate() {
                    // SAFETY: the result has room for every kept point of every node.
                    unsafe { *p.results[r].add(at + i) = v.to_bits() as u8 };
                }
            }
            dtype @ (DType::Bf16 | DType::F16) => {
                // SAFETY: as above.
                unsafe { store(self.isa, dtype, sum.as_ptr().cast(), p.results[r].add(2 * at), sum.len()) };
            }
            DType::F32 | DType::I32 => {
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), p.results[r].cast::<f32>().add(at), sum.len()) };
            }
        }
    }

    /// The machine's loop indices of kept point `k` (without the innermost kept loop).
    fn kept_at(&self, mut k: usize) -> [usize; 16] {
        let d = self.reduced.len();
        let mut at = [0; 16];
        let mut i = self.kept.len();
        for l in (0..d - usize::from(!self.reduced[d - 1])).rev() {
            if !self.reduced[l] {
                i -= 1;
                at[l] = k % self.kept[i];
                k /= self.kept[i];
            }
        }
        at
    }

    /// Sums some leaves, and stores what is stored of them, for the kept points `start .. start + width` along the innermost
    /// loop (or for the one kept point, if that loop is reduced), at kept point `k` of the others: leaf after leaf a row of
    /// sums a result. There is room for more of them ([`ReducePlan::room`]): for those over the loops behind the first one.
    fn leaves(
        &self,
        leaves: std::ops::Range<usize>,
        k: usize,
        start: usize,
        width: usize,
        p: Pointers,
        evaluation: &mut Evaluation,
        sums: &mut [f32],
    ) {
        let d = self.reduced.len();
        let inner_reduced = self.reduced[d - 1];
        let row = self.row(width);
        let count = self.sums();
        let (runs, leaves) = (&self.along[leaves.clone()], &self.leaves[leaves]);
        let size = leaves.len() * count * row;
        let (sums, open) = sums.split_at_mut((self.between.len() + 1) * size);
        sums.fill(self.fold.identity());
        // Where those are to which runs are added, and the loop along which runs go.
        let inner = self.between.len() * size;
        let last = (0..d).rev().find(|l| self.reduced[*l]);
        let box_ = &leaves[0];
        let mut at = self.kept_at(k);
        // The ranges of the machine's loops: the leaf's for reduced ones, a single point for kept ones.
        let mut ranges: [std::ops::Range<usize>; 16] = std::array::from_fn(|_| 0..1);
        let mut i = 0;
        for l in 0..d {
            ranges[l] = if self.reduced[l] {
                i += 1;
                box_[i - 1].clone()
            } else {
                at[l]..at[l] + 1
            };
        }
        // Leaves that share blocks follow each other along the innermost reduced loop: that of rows, or of columns.
        if leaves.len() > 1 {
            let along = last.expect("several leaves have a dimension to lie along");
            ranges[along] = runs[0].start..runs[runs.len() - 1].end;
        }
        if !inner_reduced {
            ranges[d - 1] = start..start + width;
        }
        if ranges[..d].iter().any(|r| r.is_empty()) {
            return;
        }
        // Rows of a block run along the loop before the innermost one; more than one only of whole rows.
        let whole = ranges[d - 1] == (0..self.machine.extents[d - 1]);
        let rows_at_once = if whole { self.machine.rows_per_block() } else { 1 };
        for (l, a) in at.iter_mut().enumerate().take(d) {
            *a = ranges[l].start;
        }
        loop {
            let mut m = ranges[d - 2].start;
            while m < ranges[d - 2].end {
                let rows = rows_at_once.min(ranges[d - 2].end - m);
                let mut c = ranges[d - 1].start;
                while c < ranges[d - 1].end {
                    let columns = BLOCK.min(ranges[d - 1].end - c);
                    (at[d - 2], at[d - 1]) = (m, c);
                    let lane = c - ranges[d - 1].start;
                    // SAFETY: by the contract of `run`; every point is evaluated once.
                    unsafe { evaluation.block(&at[..d], rows, columns, p.stored) };
                    for (r, (slot, _)) in self.machine.summed().iter().enumerate() {
                        // SAFETY: the block has that many points.
                        let v: &[f32] =
                            unsafe { std::slice::from_raw_parts(evaluation.pointer(*slot).cast(), rows * columns) };
                        if !inner_reduced {
                            // The rows lie one after the other along a run, or are a point of one.
                            let at = match last {
                                Some(last) if last < d - 2 => at[last]..at[last] + 1,
                                Some(_) => m..m + rows,
                                None => 0..1,
                            };
                            let first = r * row + lane;
                            let open = &mut open[first..][..columns];
                            let rows = Rows { v, columns, at };
                            self.fold.runs(rows, runs, &mut sums[inner + first..inner + size], count * row, open);
                            continue;
                        }
                        for (l, own) in runs.iter().enumerate() {
                            // Of several leaves all lie in this block.
                            let (part, first) = match leaves.len() {
                                1 => (0..columns, lane),
                                _ => (own.start - c..own.end - c, 0),
                            };
                            let acc = &mut sums[(l * count + r) * row..][..row];
                            self.fold.lanes(acc, v, columns, part, first);
                        }
                    }
                    c += columns;
                }
                m += rows;
            }
            // The next point of the outer loops, row-major.
            let mut l = d - 2;
            loop {
                if l == 0 {
                    if inner_reduced {
                        for sums in sums[..size].chunks_exact_mut(count * row) {
                            (0..count).for_each(|r| sums[r] = self.fold.finish_lanes(&sums[r * LANES..][..LANES]));
                        }
                    }
                    return;
                }
                l -= 1;
                at[l] += 1;
                if at[l] < ranges[l].end {
                    break;
                }
                at[l] = ranges[l].start;
                if let Some(between) = self.between.iter().position(|b| *b == l) {
                    let (outer, own) = sums[between * size..].split_at_mut(size);
                    self.fold.add(outer, &own[..size]);
                    own[..size].fill(self.fold.identity());
                }
            }
        }
    }

    /// Floats of the stack of sums of `width` kept points.
    fn stack(&self, width: usize) -> usize {
        (self.depth - 1 + self.room(1)) * self.sums() * width.max(LANES)
    }

    /// All nodes of the kept points `start .. start + width` at kept point `k`, one leaf after another.
    unsafe fn points(&self, k: usize, start: usize, width: usize, p: Pointers, e: &mut Evaluation, stack: &mut [f32]) {
        let count = self.sums();
        let row = count * width.max(LANES);
        for (n, program) in self.nodes.iter().enumerate() {
            let mut top = 0;
            for c in program {
                match *c {
                    Combine::Leaf(l) => {
                        self.leaves(l..l + 1, k, start, width, p, e, &mut stack[top * row..]);
                        top += 1;
                    }
                    Combine::Add => {
                        let (a, b) = stack.split_at_mut((top - 1) * row);
                        let used = count * if self.inner == 1 { 1 } else { width };
                        self.fold.add(&mut a[(top - 2) * row..][..used], &b[..used]);
                        top -= 1;
                    }
                }
            }
            for r in 0..count {
                let at = n * self.kept_points() + k * self.inner + start;
                // SAFETY: as above.
                unsafe { self.store(r, at, &stack[r * width..][..width], p) };
            }
        }
    }

    /// All nodes of `rows` kept points from `k` on, neighbours along the loop before the innermost, reduced one: a
    /// block holds several of them.
    unsafe fn rows(&self, k: usize, rows: usize, p: Pointers, e: &mut Evaluation, room: &mut [f32]) {
        let d = self.reduced.len();
        let n = self.machine.extents[d - 1];
        // With further reduced loops, or rows longer than a block, points go one by one.
        if self.reduced[..d - 1].iter().any(|r| *r) || n > BLOCK {
            for i in 0..rows {
                // SAFETY: by the contract of `run`.
                unsafe { self.points(k + i, 0, 1, p, e, room) };
            }
            return;
        }
        let at = self.kept_at(k);
        let mut sums = [0.0f32; 128];
        // SAFETY: by the contract of `run`; every point is evaluated once.
        unsafe { e.block(&at[..d], rows, n, p.stored) };
        for (r, (slot, _)) in self.machine.summed().iter().enumerate() {
            // SAFETY: the block has that many points.
            let v = unsafe { std::slice::from_raw_parts(e.pointer(*slot).cast::<f32>(), rows * n) };
            for (node, program) in self.nodes.iter().enumerate() {
                self.fold.row_sums(program, &self.leaves, v, n, &mut sums[..rows]);
                // SAFETY: by the contract of `run`.
                unsafe { self.store(r, node * self.kept_points() + k, &sums[..rows], p) };
            }
        }
    }
}

/// Which neighbouring loops, by number of the first one, may become one: kept ones.
pub(super) fn collapses(reduced: &[bool]) -> impl Fn(usize) -> bool {
    |i| !reduced[i] && !reduced[i + 1]
}

/// Brings leaves that differ only in the last loop, one behind the other, next to each other; gives their runs, of at most so
/// many points along that loop and so many leaves.
fn gather_runs(
    leaves: &mut Vec<Vec<std::ops::Range<usize>>>,
    nodes: &mut [Vec<Combine>],
    most: [usize; 2],
) -> Vec<std::ops::Range<usize>> {
    let key = |l: &[std::ops::Range<usize>]| l.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>();
    let mut order: Vec<usize> = (0..leaves.len()).collect();
    order.sort_by_key(|&l| key(&leaves[l]));
    let mut place = vec![0; leaves.len()];
    order.iter().enumerate().for_each(|(at, &l)| place[l] = at);
    *leaves = order.iter().map(|&l| leaves[l].clone()).collect();
    for c in nodes.iter_mut().flatten() {
        if let Combine::Leaf(l) = c {
            *l = place[*l];
        }
    }
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, leaf) in leaves.iter().enumerate() {
        let last = leaf.len() - 1;
        match runs.last_mut() {
            Some(r)
                if leaves[at - 1][..last] == leaf[..last]
                    && leaves[at - 1][last].end == leaf[last].start
                    && leaf[last].end - leaves[r.start][last].start <= most[0]
                    && at - r.start < most[1] =>
            {
                r.end = at + 1;
            }
            _ => runs.push(at..at + 1),
        }
    }
    runs
}
