//! The leaves that a device sums, and the stack machine that combines their sums along the summation tree.

use super::lanes::Lanes;
use crate::dispatch;
use crate::kernels::isa::Isa;
use mesh::chunk::{Event, Tree};
use std::ops::Range;

/// One instruction of the stack machine over leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    /// Sum leaf `0` and push it.
    Leaf(usize),
    /// Add the two on top.
    Add,
}

/// The leaves that a device sums and how they are combined.
#[derive(Clone, Debug, Default)]
pub struct Leaves {
    /// Boxes of elements, global indices.
    pub boxes: Vec<Vec<Range<usize>>>,
    /// The stack machine of each node.
    pub nodes: Vec<Vec<Combine>>,
    /// Most sums on a stack at a time.
    pub depth: usize,
}

impl Leaves {
    /// The leaves of the nodes of `tree` inside `owned`.
    pub fn new(tree: &Tree, owned: &[Range<usize>]) -> Leaves {
        let mut out = Leaves { depth: 1, ..Leaves::default() };
        for node in tree.nodes(owned) {
            let mut program = Vec::new();
            let mut stack = 0usize;
            for event in tree.events(&node) {
                match event {
                    Event::Leaf(b) => {
                        program.push(Combine::Leaf(out.boxes.len()));
                        out.boxes.push(b);
                        stack += 1;
                        out.depth = out.depth.max(stack);
                    }
                    Event::Combine => {
                        program.push(Combine::Add);
                        stack -= 1;
                    }
                }
            }
            out.nodes.push(program);
        }
        out
    }
}

/// A register tile's sums.
pub(in crate::kernels) type Sums<V, const MR: usize, const NV: usize> = [[V; NV]; MR];

/// What the sums of leaves are made of.
pub(in crate::kernels) trait LeafSums<V: Lanes, const MR: usize, const NV: usize> {
    /// A leaf's products, added to sums.
    unsafe fn leaf(&self, leaf: usize, sums: Sums<V, MR, NV>) -> Sums<V, MR, NV>;
    /// Whether two leaves are added up without a stack: if registers hold the sums of both.
    fn in_pairs(&self) -> bool {
        holds_two::<V>(MR, NV)
    }
}

/// Whether registers hold so many rows of sums twice, with a row of vectors.
pub(in crate::kernels) const fn holds_two<V: Lanes>(rows: usize, vectors: usize) -> bool {
    2 * rows * vectors + vectors < V::REGISTERS
}

/// a + b.
#[inline(always)]
pub(in crate::kernels) unsafe fn added<V: Lanes, const MR: usize, const NV: usize>(
    mut a: Sums<V, MR, NV>,
    b: Sums<V, MR, NV>,
) -> Sums<V, MR, NV> {
    for m in 0..MR {
        for v in 0..NV {
            // SAFETY: by the caller's contract.
            a[m][v] = unsafe { a[m][v].add(b[m][v]) };
        }
    }
    a
}

/// a = a + b.
///
/// # Safety
/// So many floats lie at both, which do not overlap.
pub(in crate::kernels) unsafe fn add(isa: Isa, a: *mut f32, b: *const f32, n: usize) {
    // SAFETY: by this function's contract.
    let (a, b) = unsafe { (std::slice::from_raw_parts_mut(a, n), std::slice::from_raw_parts(b, n)) };
    dispatch!(isa, fn(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += *b);
    });
}

/// Runs a stack machine over leaves, of which the first goes on from sums, on a stack of so many blocks.
///
/// # Safety
/// As for its leaves; the stack is deep enough.
#[inline(always)]
pub(in crate::kernels) unsafe fn combined<
    V: Lanes,
    S: LeafSums<V, MR, NV>,
    const MR: usize,
    const NV: usize,
    const DEPTH: usize,
>(
    of: &S,
    program: &[Combine],
    first: Sums<V, MR, NV>,
) -> Sums<V, MR, NV> {
    // SAFETY: by this function's contract.
    unsafe {
        let mut stack = [[[std::mem::MaybeUninit::<V>::uninit(); NV]; MR]; DEPTH];
        // The sum on top of the stack stays in registers.
        let (mut below, mut sum, mut rest) = (0, first, program);
        while let Some((c, behind)) = rest.split_first() {
            rest = behind;
            match *c {
                Combine::Leaf(l) => {
                    if behind.len() + 1 < program.len() {
                        for m in 0..MR {
                            for v in 0..NV {
                                stack[below][m][v].write(sum[m][v]);
                            }
                        }
                        below += 1;
                        sum = [[V::zero(); NV]; MR];
                    }
                    sum = of.leaf(l, sum);
                    if let [Combine::Leaf(l), Combine::Add, behind @ ..] = behind
                        && of.in_pairs()
                    {
                        rest = behind;
                        sum = added(sum, of.leaf(*l, [[V::zero(); NV]; MR]));
                    }
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
        sum
    }
}
