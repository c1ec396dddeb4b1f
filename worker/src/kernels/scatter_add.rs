//! `scatter_add`: sums by index, along the summation tree.
//!
//! Roofline: the bytes of indices, updates and result. First the updates of each row are linked into a list, in the
//! order of the tree's leaves; then each row walks its list. There is no dense sum a leaf: the tree is walked from one
//! leaf that has an update for the row to the next, which gives the same bits, since -0.0 adds nothing.

use super::conv::axis_of;
use super::nest::Nest;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::chunk::{Node, Tree};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::OpWork;
use std::ops::Range;

/// A leaf of the summation tree.
struct Leaf {
    /// End of its updates' numbers; they are counted leaf after leaf.
    end: u32,
    /// First update's number.
    start: u32,
    /// Offsets of the first update in updates and indices.
    first: [usize; 2],
    /// By dimension summed over: how many updates.
    extents: Vec<usize>,
    /// The way from the node to it: a bit for each turn, from the highest one on. Two leaves part where their ways do.
    way: u64,
}

/// A scatter-add, prepared.
pub struct ScatterAddPlan {
    float: bool,
    /// Batch points: offsets in updates, indices and result.
    batch: Nest<3>,
    /// Points of a row outside the lanes: offsets in updates and result.
    inside: Nest<2>,
    lanes: usize,
    /// The rows of the result held here, and from one to the next.
    rows: Range<usize>,
    pitch: usize,
    /// By dimension summed over: elements between neighbours in updates and indices.
    strides: Vec<[usize; 2]>,
    leaves: Vec<Leaf>,
    /// By node: its leaves, and whether the tree's first leaf is one of them.
    nodes: Vec<(Range<usize>, bool)>,
    /// Sums that are open at a time, at most.
    depth: usize,
    /// Elements of the result.
    elements: usize,
}

/// End of a list.
const END: u32 = u32::MAX;
/// Elements of a row summed at a time.
const BLOCK: usize = 512;
/// Turns on the way to a leaf, at most.
const TURNS: u32 = 64;

#[derive(Clone, Copy)]
struct Pointers {
    updates: *const u8,
    indices: *const i32,
    out: *mut u8,
    heads: *mut u32,
    next: *mut u32,
}
// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// What can be added up.
trait Number: Copy {
    /// What adds nothing.
    const NEUTRAL: Self;
    /// What the tree's first leaf starts from.
    const ZERO: Self;
    fn plus(self, other: Self) -> Self;
}

impl Number for f32 {
    const NEUTRAL: f32 = -0.0;
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn plus(self, other: f32) -> f32 {
        self + other
    }
}

impl Number for i32 {
    const NEUTRAL: i32 = 0;
    const ZERO: i32 = 0;
    #[inline(always)]
    fn plus(self, other: i32) -> i32 {
        self.wrapping_add(other)
    }
}

/// The leaves of a node with the ways to them, in order; returns the longest way's turns.
fn ways(tree: &Tree, node: &Node, way: u64, turns: u32, found: &mut Vec<(Vec<Range<usize>>, u64)>) -> u32 {
    match tree.halves(node) {
        None => {
            found.push((tree.elements(&node.chunks), way));
            turns
        }
        Some((a, b)) => {
            assert!(turns < TURNS, "a summation tree of more than {TURNS} levels");
            let left = ways(tree, &a, way, turns + 1, found);
            left.max(ways(tree, &b, way | 1 << (63 - turns), turns + 1, found))
        }
    }
}

impl ScatterAddPlan {
    /// Prepares a `scatter_add`; None for another op.
    pub fn new(work: &OpWork) -> Option<ScatterAddPlan> {
        let Prim::ScatterAdd(op) = &work.op else { return None };
        let (updates, indices, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        let (over, kept): (Vec<_>, Vec<_>) = indices.ty.dims.iter().partition(|d| op.over.contains(&d.name));
        let batch = Nest::new(kept.iter().map(|d| &*d.name), out, [updates, indices, out]);
        let others = updates.ty.dims.iter().map(|d| &*d.name).filter(|n| !indices.ty.has(n));
        let mut inside = Nest::new(others, out, [updates, out]);
        let lanes = inside.take_lanes([true, true], out.ty.dims.len());
        let axes: Vec<_> = over.iter().map(|d| (axis_of(updates, &d.name), axis_of(indices, &d.name))).collect();
        let (rows, pitch) = axis_of(out, &op.dim.name);
        let (mut leaves, mut nodes, mut depth) = (Vec::new(), Vec::new(), 0);
        let mut next = 0;
        let (tree, owned) = work.sum.clone().unwrap_or_default();
        for node in tree.nodes(&owned) {
            let mut found = Vec::new();
            depth = depth.max(ways(&tree, &node, 0, 0, &mut found));
            let first = node.chunks.iter().all(|c| c.start == 0);
            nodes.push((leaves.len()..leaves.len() + found.len(), first));
            for (ranges, way) in found {
                let place = |(held, stride): &(Range<usize>, usize), r: &Range<usize>| (r.start - held.start) * stride;
                let offset = |i: usize| {
                    let own = ranges.iter().zip(&axes).map(|(r, (u, x))| place(if i == 0 { u } else { x }, r));
                    own.sum::<usize>()
                };
                let extents: Vec<usize> = ranges.iter().map(|r| r.len()).collect();
                let count: usize = extents.iter().product();
                let end = u32::try_from(next as usize + count).ok().filter(|end| *end < END);
                let end = end.expect("fewer updates a device than 2^32");
                leaves.push(Leaf { start: next, end, first: [offset(0), offset(1)], extents, way });
                next = end;
            }
        }
        Some(ScatterAddPlan {
            float: out.ty.dtype == DType::F32,
            batch,
            inside,
            lanes,
            rows,
            pitch,
            strides: axes.iter().map(|((_, u), (_, i))| [*u, *i]).collect(),
            leaves,
            nodes,
            depth: depth as usize + 1,
            elements: out.region.elements(),
        })
    }

    fn updates(&self) -> usize {
        self.leaves.last().map_or(0, |l| l.end as usize)
    }

    fn heads(&self) -> usize {
        self.batch.points() * self.nodes.len() * self.rows.len()
    }

    /// Bytes of scratch: the head of each row's list, and the update after each update.
    pub fn scratch_bytes(&self) -> usize {
        (self.heads() + self.batch.points() * self.updates()) * 4
    }

    /// Runs it: `out` is `[nodes, ..]`.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, updates: *const u8, indices: *const i32, out: *mut u8, scratch: *mut u32) {
        // SAFETY: the scratch has room for the heads and the updates.
        let p = Pointers { updates, indices, out, heads: scratch, next: unsafe { scratch.add(self.heads()) } };
        let lists = self.batch.points() * self.nodes.len();
        pool.run(lists, &|t, _| {
            // SAFETY: by this function's contract; each batch point and node has lists of its own.
            unsafe { self.link(t / self.nodes.len(), t % self.nodes.len(), p) };
        });
        let all = lists * self.rows.len();
        let tasks = all.min(pool.threads() * 8);
        const { assert!((TURNS as usize + 1) * BLOCK * 4 <= WORKSPACE_BYTES) };
        pool.run(tasks, &|t, w| {
            let sums: *mut f32 = w.floats().as_mut_ptr();
            for row in all * t / tasks..all * (t + 1) / tasks {
                // SAFETY: by this function's contract; rows are disjoint. The workspace holds a block for every open
                // sum, and any bits are a number.
                unsafe {
                    if self.float {
                        let sums = std::slice::from_raw_parts_mut(sums, self.depth * BLOCK);
                        self.row::<f32>(row, p, sums);
                    } else {
                        let sums = std::slice::from_raw_parts_mut(sums.cast::<i32>(), self.depth * BLOCK);
                        self.row::<i32>(row, p, sums);
                    }
                }
            }
        });
    }

    /// The offset of update `i` of a leaf in updates (0) or indices (1).
    fn offset(&self, leaf: &Leaf, mut i: usize, array: usize) -> usize {
        let mut at = leaf.first[array];
        for (n, stride) in leaf.extents.iter().zip(&self.strides).rev() {
            at += i % n * stride[array];
            i /= n;
        }
        at
    }

    /// Links the updates of each row, last one first, so that the list runs in order.
    unsafe fn link(&self, batch: usize, node: usize, p: Pointers) {
        let from = self.batch.at(batch)[1];
        // SAFETY: by the contract of `run`.
        unsafe {
            let heads = p.heads.add((batch * self.nodes.len() + node) * self.rows.len());
            let next = p.next.add(batch * self.updates());
            let heads = std::slice::from_raw_parts_mut(heads, self.rows.len());
            heads.fill(END);
            for leaf in self.leaves[self.nodes[node].0.clone()].iter().rev() {
                for i in (0..leaf.end - leaf.start).rev() {
                    let row = *p.indices.add(from + self.offset(leaf, i as usize, 1));
                    if let Some(row) = usize::try_from(row).ok().filter(|r| self.rows.contains(r)) {
                        let head = &mut heads[row - self.rows.start];
                        *next.add((leaf.start + i) as usize) = *head;
                        *head = leaf.start + i;
                    }
                }
            }
        }
    }

    /// One row of a node of a batch point.
    unsafe fn row<T: Number>(&self, row: usize, p: Pointers, sums: &mut [T]) {
        let (list, r) = (row / self.rows.len(), row % self.rows.len());
        let (batch, node) = (list / self.nodes.len(), list % self.nodes.len());
        let [from, _, to] = self.batch.at(batch);
        // SAFETY: by the contract of `run`.
        unsafe {
            let head = *p.heads.add(row);
            let next = p.next.add(batch * self.updates());
            for point in 0..self.inside.points() {
                let at = self.inside.at(point);
                let updates = p.updates.cast::<T>().add(from + at[0]);
                let out = p.out.cast::<T>().add(node * self.elements + to + r * self.pitch + at[1]);
                for first in (0..self.lanes).step_by(BLOCK) {
                    let out = std::slice::from_raw_parts_mut(out.add(first), BLOCK.min(self.lanes - first));
                    self.sum(node, head, next, updates.add(first), out, sums);
                }
            }
        }
    }

    /// Sums up a row's list: a stack machine that only knows the leaves with updates. An open sum is closed, that is
    /// added to the one before it, once a leaf comes that lies further up the tree.
    unsafe fn sum<T: Number>(
        &self,
        node: usize,
        head: u32,
        next: *const u32,
        updates: *const T,
        out: &mut [T],
        sums: &mut [T],
    ) {
        let width = out.len();
        let (leaves, first) = &self.nodes[node];
        let mut ways = [0u64; TURNS as usize + 1];
        let mut open = 0;
        let mut leaf = leaves.start;
        let mut i = head;
        let close = |sums: &mut [T], open: &mut usize| {
            let (a, b) = sums.split_at_mut((*open - 1) * BLOCK);
            let a = &mut a[(*open - 2) * BLOCK..][..width];
            a.iter_mut().zip(&b[..width]).for_each(|(a, b)| *a = a.plus(*b));
            *open -= 1;
        };
        while i != END {
            while i >= self.leaves[leaf].end {
                leaf += 1;
            }
            let l = &self.leaves[leaf];
            // SAFETY: by the contract of `run`.
            let update =
                unsafe { std::slice::from_raw_parts(updates.add(self.offset(l, (i - l.start) as usize, 0)), width) };
            if open > 0 && ways[open - 1] == l.way {
                let sum = &mut sums[(open - 1) * BLOCK..][..width];
                sum.iter_mut().zip(update).for_each(|(s, u)| *s = s.plus(*u));
            } else {
                let apart = |a: u64, b: u64| (a ^ b).leading_zeros();
                while open > 1 && apart(ways[open - 2], ways[open - 1]) > apart(ways[open - 1], l.way) {
                    close(sums, &mut open);
                }
                ways[open] = l.way;
                sums[open * BLOCK..][..width].copy_from_slice(update);
                open += 1;
            }
            // SAFETY: as above.
            i = unsafe { *next.add(i as usize) };
        }
        while open > 1 {
            close(sums, &mut open);
        }
        // From +0.0 instead of -0.0 makes a difference to sums of -0.0 alone, so it may as well come last.
        let start = if *first { T::ZERO } else { T::NEUTRAL };
        match open {
            0 => out.fill(start),
            _ => out.iter_mut().zip(&*sums).for_each(|(o, s)| *o = start.plus(*s)),
        }
    }
}
