//! Fused reductions along the canonical summation tree.
//!
//! Roofline: the bytes of the operands, read once; additions are a fraction of that. What is summed is computed block
//! by block in the cache ([`super::vm`]).
//!
//! Leaves are summed one after another into rows of partial sums; where the innermost loop is kept a row is the kept
//! points along it, where it is reduced a row is 16 lanes (see [`mesh::body::Reduction`]).

use super::isa::Isa;
use super::lanes::store;
use super::math;
use super::row_sums::{self, LANES, from_lanes, into_lanes};
use super::tile::Combine;
use super::vm::{BLOCK, Evaluation, Machine, StepContext, Use};
use crate::dispatch;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::body::Reduction;
use mesh::chunk::Event;
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;

/// Evaluates an expression with the function that combines two elements, known when it is compiled.
macro_rules! with_function {
    ($by:expr, |$f:ident| $body:expr) => {
        match $by {
            (ReduceFn::Sum, true) => with_function!(@ $f, $body, |a: f32, b: f32| a + b),
            (ReduceFn::Max, true) => with_function!(@ $f, $body, |a: f32, b: f32| math::max(a, b)),
            (ReduceFn::Min, true) => with_function!(@ $f, $body, |a: f32, b: f32| math::min(a, b)),
            (by, false) => with_function!(@ $f, $body, |a: f32, b: f32| {
                f32::from_bits(integer(by, a.to_bits() as i32, b.to_bits() as i32) as u32)
            }),
        }
    };
    (@ $f:ident, $body:expr, $function:expr) => {{
        let $f = $function;
        $body
    }};
}

/// A fused reduction, prepared.
pub struct ReducePlan {
    isa: Isa,
    machine: Machine,
    f: ReduceFn,
    /// By loop of the machine: whether it is reduced.
    reduced: Vec<bool>,
    /// Leaves: by reduced loop the local range.
    leaves: Vec<Vec<std::ops::Range<usize>>>,
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
        let of = Use::Reduce { stored: r.stored };
        let (machine, merged) = Machine::new(&r.nest, isa, of, |i| !r.reduced[i] && !r.reduced[i + 1]);
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
        let most = if reduced[d - 1] { BLOCK } else { usize::MAX };
        let runs = if reduced[d - 1] || reduced[d - 2] {
            gather_runs(&mut leaves, &mut nodes, most)
        } else {
            (0..leaves.len()).map(|l| l..l + 1).collect()
        };
        let inner = if reduced[d - 1] { 1 } else { machine.extents[d - 1] };
        let kept: Vec<usize> =
            (0..d - usize::from(!reduced[d - 1])).filter(|&l| !reduced[l]).map(|l| machine.extents[l]).collect();
        let points = kept.iter().product::<usize>() * inner;
        let few =
            points * machine.summed().len() <= FEW && points * machine.summed().len() * 4 * 2 <= WORKSPACE_BYTES / 4;
        let rows = reduced[d - 1] && !reduced[d - 2] && points >= MANY;
        ReducePlan { isa, machine, f: r.f, reduced, leaves, runs, nodes, kept, inner, by_leaf: few && !rows, depth }
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
            let row = count * if self.reduced[self.reduced.len() - 1] { LANES } else { self.inner };
            let most = self.runs.iter().map(|r| r.len()).max().unwrap_or(1);
            pool.run(self.runs.len(), &|run, w| {
                let (p, run) = (p, self.runs[run].clone());
                let (sums, registers) = w.floats().split_at_mut((most * row).next_multiple_of(LANES));
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
                    self.add(a, b);
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

    /// How elements are combined.
    fn combine(&self) -> (ReduceFn, bool) {
        (self.f, self.machine.summed()[0].1.is_float())
    }

    /// a = a + b, each in its dtype (the bits of an `i32` or `bool` lie in the float's).
    fn add(&self, a: &mut [f32], b: &[f32]) {
        let by = self.combine();
        dispatch!(self.isa, fn(by: (ReduceFn, bool), a: &mut [f32], b: &[f32]) {
            with_function!(by, |f| a.iter_mut().zip(b).for_each(|(a, b)| *a = f(*a, *b)));
        });
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

    fn identity(&self) -> f32 {
        let float = self.machine.summed()[0].1.is_float();
        match (self.f, float) {
            (f, true) => f.identity(),
            (ReduceFn::Sum, false) => 0.0,
            (ReduceFn::Max, false) => f32::from_bits(i32::MIN as u32),
            (ReduceFn::Min, false) => f32::from_bits(i32::MAX as u32),
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

    /// Sums a run of leaves, and stores what is stored of them, for the kept points `start .. start + width` along the innermost loop (or for the one kept
    /// point, if that loop is reduced), at kept point `k` of the others: leaf after leaf a row of sums a result.
    fn leaves(
        &self,
        run: std::ops::Range<usize>,
        k: usize,
        start: usize,
        width: usize,
        p: Pointers,
        evaluation: &mut Evaluation,
        sums: &mut [f32],
    ) {
        let d = self.reduced.len();
        let inner_reduced = self.reduced[d - 1];
        let row = if inner_reduced { LANES } else { width };
        let count = self.sums();
        sums[..run.len() * count * row].fill(self.identity());
        let leaves = &self.leaves[run];
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
        let last_of = |leaf: &Vec<std::ops::Range<usize>>| leaf[leaf.len() - 1].clone();
        if leaves.len() > 1 {
            let along = if inner_reduced { d - 1 } else { d - 2 };
            ranges[along] = last_of(box_).start..last_of(&leaves[leaves.len() - 1]).end;
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
                        for (l, leaf) in leaves.iter().enumerate() {
                            if inner_reduced {
                                // Of several leaves all lie in this block.
                                let own = last_of(leaf);
                                let (part, first) = match leaves.len() {
                                    1 => (0..columns, lane),
                                    _ => (own.start - c..own.end - c, 0),
                                };
                                let acc = &mut sums[(l * count + r) * row..][..row];
                                self.fold_lanes(acc, v, columns, part, first);
                                continue;
                            }
                            let part = if leaves.len() > 1 { last_of(leaf) } else { m..m + rows };
                            let (first, end) = (part.start.max(m), part.end.min(m + rows));
                            if first < end {
                                let acc = &mut sums[(l * count + r) * row..][..row];
                                self.fold(
                                    &mut acc[lane..lane + columns],
                                    &v[(first - m) * columns..(end - m) * columns],
                                );
                            }
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
                        for sums in sums[..leaves.len() * count * row].chunks_exact_mut(count * row) {
                            (0..count).for_each(|r| sums[r] = self.finish_lanes(&sums[r * LANES..][..LANES]));
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
            }
        }
    }

    /// Adds rows of values to a row of sums, one after the other.
    fn fold(&self, acc: &mut [f32], v: &[f32]) {
        let float = self.machine.summed()[0].1.is_float();
        if self.f != ReduceFn::Sum || !float {
            v.chunks_exact(acc.len()).for_each(|v| self.add(acc, v));
            return;
        }
        dispatch!(self.isa, fn(acc: &mut [f32], v: &[f32]) {
            match acc.len() {
                1 => add_rows::<1>(acc, v),
                2 => add_rows::<2>(acc, v),
                3 => add_rows::<3>(acc, v),
                4 => add_rows::<4>(acc, v),
                5 => add_rows::<5>(acc, v),
                6 => add_rows::<6>(acc, v),
                7 => add_rows::<7>(acc, v),
                8 => add_rows::<8>(acc, v),
                16 => add_rows::<16>(acc, v),
                32 => add_rows::<32>(acc, v),
                64 => add_rows::<64>(acc, v),
                n => v.chunks_exact(n).for_each(|v| acc.iter_mut().zip(v).for_each(|(a, b)| *a += *b)),
            }
        });
    }

    /// Adds a part of each row of `columns` values to lanes, row after row; value `i` of a part goes to lane
    /// `(first + i) % 16`, and `first` is a multiple of 16.
    fn fold_lanes(&self, lanes: &mut [f32], v: &[f32], columns: usize, part: std::ops::Range<usize>, first: usize) {
        debug_assert_eq!(first % LANES, 0);
        let by = self.combine();
        dispatch!(self.isa, fn(
            by: (ReduceFn, bool),
            lanes: &mut [f32],
            v: &[f32],
            columns: usize,
            part: std::ops::Range<usize>,
        ) {
            let Ok(lanes) = <&mut [f32; LANES]>::try_from(lanes) else { return };
            with_function!(by, |f| v.chunks_exact(columns).for_each(|v| into_lanes(lanes, &v[part.clone()], f)));
        });
    }

    fn finish_lanes(&self, lanes: &[f32]) -> f32 {
        let mut l = [0.0f32; LANES];
        l.copy_from_slice(lanes);
        with_function!(self.combine(), |f| from_lanes(l, f))
    }

    /// The sums of rows of `n` values each, by the stack machine of a node over leaves inside a row.
    fn row_sums(&self, program: &[Combine], v: &[f32], n: usize, sums: &mut [f32]) {
        let (by, leaves) = (self.combine(), self.leaves.as_slice());
        if by.1 && n > row_sums::SHORT && row_sums::wide(self.isa, by.0, program, leaves, v, n, sums) {
            return;
        }
        let identity = self.identity();
        dispatch!(self.isa, fn(
            by: (ReduceFn, bool),
            program: &[Combine],
            leaves: &[Vec<std::ops::Range<usize>>],
            v: &[f32],
            n: usize,
            sums: &mut [f32],
            identity: f32,
        ) {
            with_function!(by, |f| row_sums::rows(program, leaves, v, n, sums, identity, f));
        });
    }

    /// Floats of the stack of sums of `width` kept points.
    fn stack(&self, width: usize) -> usize {
        (self.depth + 1) * self.sums() * width.max(LANES)
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
                        self.add(&mut a[(top - 2) * row..][..used], &b[..used]);
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
                self.row_sums(program, v, n, &mut sums[..rows]);
                // SAFETY: by the contract of `run`.
                unsafe { self.store(r, node * self.kept_points() + k, &sums[..rows], p) };
            }
        }
    }
}

/// Brings leaves that differ only in the last loop, one behind the other, next to each other; gives their runs, of `most`
/// points along that loop.
fn gather_runs(
    leaves: &mut Vec<Vec<std::ops::Range<usize>>>,
    nodes: &mut [Vec<Combine>],
    most: usize,
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
                    && leaf[last].end - leaves[r.start][last].start <= most =>
            {
                r.end = at + 1;
            }
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// Adds rows of N values to N sums, which stay in registers.
#[inline(always)]
fn add_rows<const N: usize>(acc: &mut [f32], v: &[f32]) {
    let Ok(sums) = <&mut [f32; N]>::try_from(acc) else { return };
    let mut local = *sums;
    for row in v.as_chunks::<N>().0 {
        for l in 0..N {
            local[l] += row[l];
        }
    }
    *sums = local;
}

fn integer(f: ReduceFn, x: i32, y: i32) -> i32 {
    match f {
        ReduceFn::Sum => x.wrapping_add(y),
        ReduceFn::Max => x.max(y),
        ReduceFn::Min => x.min(y),
    }
}
