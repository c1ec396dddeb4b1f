//! How the sum of a weight gradient is cut: tasks of blocks, blocks of pieces, pieces of leaves.

use super::WeightGradPlan;
use super::pack::Packing;
use super::span::{PRODUCT, SPAN, Walk};
use super::tile;
use super::winograd;
use crate::kernels::conv::in_units;
use crate::kernels::pack::NOTHING;
use crate::kernels::tile::Combine;
use crate::pool::WORKSPACE_BYTES;
use mesh::chunk::{Event, Node, Tree};
use std::ops::Range;

/// Leaves along a dimension at most.
const LEAVES: usize = 8;
/// Leaves of a block at most.
const BLOCK_LEAVES: usize = 4096;
/// Tasks that all blocks are shared out to, about.
const TASKS: usize = 48;
/// A block's voxels fill at most so many bytes of both inputs together.
const BLOCK_BYTES: usize = 384 << 10;
/// Voxels of a block of several leaves at most, and of a piece of a leaf where panels are packed: those of a tile lie in the
/// first-level cache.
const VOXELS: usize = 256;

/// Products of a leaf at most for its piece to be summed from a list of all.
const SHORT: usize = 16;
/// Products of a leaf from which on it does not count what adding it to others costs.
const LONG: usize = 64;
/// Pairs of channels from which on tiles read a list often enough.
const CHANNELS: usize = 32 * 32;
/// So many are of 64 channels at least, and of a block's voxels, which are no fewer than its leaves and its products, spans and
/// lists take no more of the workspace than is kept for spans.
const _: () = assert!(BLOCK_BYTES / (64 * 4) * (SPAN + PRODUCT) <= BLOCK_LEAVES * SPAN);

/// Local indices of dy: (batch, s1, s2, s3).
pub type Box4 = [Range<usize>; 4];

/// A subtree of leaves that are worked on together.
pub struct Block {
    /// Its pieces.
    pub pieces: Vec<Piece>,
    /// How the leaves are combined.
    pub program: Vec<Combine>,
}

/// What of a block is summed at a time: all of it, or a part of its only leaf.
pub struct Piece {
    /// What of it is packed.
    pub packing: Packing,
    /// The leaves, and where units are packed those of each along the innermost dimension.
    pub leaves: Vec<(Box4, Range<usize>)>,
    /// How tiles go through their products.
    pub walk: Walk,
    /// Whether there are several leaves that are that short that two are added up in registers.
    pub in_twos: bool,
    /// Where leaves are single products: the first leaf of each group, and how many.
    pub groups: Vec<[usize; 2]>,
    /// The box around them.
    pub around: Box4,
    /// Of 16-bit floats: where the halves of each unit lie along a row of dy; [`NOTHING`] for zeros.
    pub dy: Vec<[usize; 2]>,
    /// As well, of x, by tap.
    pub x: Vec<Vec<[usize; 2]>>,
}

/// Products of a leaf, if a tap leaves none out.
fn products(([b, r1, r2, run], units): &(Box4, Range<usize>)) -> usize {
    b.len() * r1.len() * r2.len() * if units.is_empty() { run.len() } else { units.len() }
}

impl Piece {
    /// How many products it has, if a tap leaves none out.
    pub fn products(&self) -> usize {
        self.leaves.iter().map(products).sum()
    }
}

impl WeightGradPlan {
    /// A box of elements as local indices.
    pub(super) fn local(elements: &[Range<usize>], origin: &[Range<usize>], batch_dims: usize) -> Box4 {
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

    /// Whether a box of dy and what its taps read of x may be a block of several leaves. That does not depend on the
    /// instruction set, since the bytes of scratch, which a plan says for every device, depend on it.
    fn is_block(&self, at: &Box4) -> bool {
        let voxels: usize = at.iter().map(Range::len).product();
        let in_cache = voxels * (self.cin + self.cout) * self.groups * 4 <= BLOCK_BYTES;
        in_cache && if self.dtype.is_half() { self.units_fit(at) } else { voxels <= VOXELS }
    }

    /// Whether a box of a leaf is summed at a time.
    fn is_piece(&self, at: &Box4) -> bool {
        match self.packing {
            Packing::Nothing => true,
            Packing::Units => self.is_block(at),
            Packing::Panels => at.iter().map(Range::len).product::<usize>() <= VOXELS,
        }
    }

    fn units_fit(&self, at: &Box4) -> bool {
        self.has_room(at, at[3].len() / self.unit() + LEAVES)
    }

    fn has_room(&self, at: &Box4, units: usize) -> bool {
        let [x, dy] = self.packed(at, units, 0..self.axes[0].taps).1;
        x + dy + BLOCK_LEAVES * SPAN <= WORKSPACE_BYTES / 4
    }

    /// A leaf as pieces, in the order in which it is summed.
    fn pieces(&self, at: Box4, pieces: &mut Vec<Piece>) {
        let unit = |d: usize| if d == 3 { self.unit() } else { 1 };
        let along = (0..4).find(|&d| at[d].len() > unit(d));
        let Some(d) = along.filter(|_| !self.is_piece(&at)) else {
            let room = self.packing != Packing::Units || self.has_room(&at, at[3].len().div_ceil(unit(3)));
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
        let packing = match self.packing {
            Packing::Panels if !self.has_room(&around, 0) => Packing::Nothing,
            packing => packing,
        };
        let mut inner: Vec<Range<usize>> = leaves.iter().map(|l| l[3].clone()).collect();
        inner.retain(|_| packing == Packing::Units);
        inner.sort_by_key(|r| r.start);
        inner.dedup();
        let (of, units) = in_units(self.unit(), inner.iter().cloned());
        let of = |l: &Box4| inner.iter().position(|r| *r == l[3]).map_or(0..0, |i| of[i].clone());
        let axis = &self.axes[2];
        let places = |at: &dyn Fn(usize) -> Option<usize>| -> Vec<[usize; 2]> {
            let place = |o: usize| if o == NOTHING { NOTHING } else { at(o).unwrap_or(NOTHING) };
            units.iter().map(|halves| halves.map(place)).collect()
        };
        let leaves: Vec<(Box4, Range<usize>)> = leaves.into_iter().map(|l| (l.clone(), of(&l))).collect();
        let (several, longest) = (leaves.len() > 1, leaves.iter().map(products).max().unwrap_or(0));
        let walk = match longest {
            1 if several => Walk::Groups,
            ..=SHORT if several && self.cin * self.cout >= CHANNELS => Walk::Listed,
            _ => Walk::Rows,
        };
        Piece {
            packing,
            leaves,
            walk,
            in_twos: several && longest < LONG,
            groups: vec![],
            around,
            dy: places(&|o| Some(o * axis.dy_stride)),
            x: (0..axis.taps).map(|j| places(&|o| Some(axis.x(o, j)? * axis.x_stride))).collect(),
        }
    }

    pub(super) fn cut(
        &mut self,
        tree: &Tree,
        node: &Node,
        origin: &[Range<usize>],
        batch_dims: usize,
        program: &mut Vec<Combine>,
    ) {
        let at = WeightGradPlan::local(&tree.elements(&node.chunks), origin, batch_dims);
        let leaves = node.chunks.iter().map(Range::len).product::<usize>();
        let is_block = match self.is_minimal {
            true => leaves <= winograd::LEAVES && leaves * self.floats_of_sums(&largest(tree)) <= winograd::SUMS,
            false => leaves <= BLOCK_LEAVES && self.is_block(&at),
        };
        let halves = if is_block { None } else { tree.halves(node) };
        if let Some((a, b)) = halves {
            self.cut(tree, &a, origin, batch_dims, program);
            self.cut(tree, &b, origin, batch_dims, program);
            program.push(Combine::Add);
            return;
        }
        if self.is_minimal && leaves == 1 {
            return self.halve(at, program);
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
                let mut piece = self.piece(leaves);
                if piece.walk == Walk::Groups {
                    (order, piece.groups) = grouped(&order, tile::group(self.isa));
                }
                pieces.push(piece);
            }
        }
        program.push(Combine::Leaf(self.blocks.len()));
        self.blocks.push(Block { pieces, program: order });
    }

    /// A leaf whose patches are summed, in blocks: its longest dimension is halved, between patches, as long as it is too large.
    fn halve(&mut self, at: Box4, program: &mut Vec<Combine>) {
        let unit = |d: usize| if d < 2 { 1 } else { 2 };
        let longest = (0..4).filter(|&d| at[d].len() > unit(d)).max_by_key(|&d| (at[d].len(), 4 - d));
        let Some(d) = longest.filter(|_| self.floats_of_sums(&at) > winograd::SUMS) else {
            let block = Block { pieces: vec![self.piece(vec![at])], program: vec![Combine::Leaf(0)] };
            program.push(Combine::Leaf(self.blocks.len()));
            return self.blocks.push(block);
        };
        let middle = at[d].start + (at[d].len() / 2).next_multiple_of(unit(d));
        let (mut first, mut second) = (at.clone(), at);
        first[d].end = middle;
        second[d].start = middle;
        self.halve(first, program);
        self.halve(second, program);
        program.push(Combine::Add);
    }

    /// Makes tasks of the blocks that the nodes combine.
    pub(super) fn share_out(&mut self, nodes: &[Vec<Combine>]) {
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
}

/// A box of the size of the largest leaf, or larger.
fn largest(tree: &Tree) -> Box4 {
    let sizes: Vec<usize> = tree.dims.iter().map(|d| d.size.div_ceil(d.chunks)).collect();
    let (batch, space) = sizes.split_at(sizes.len().saturating_sub(3));
    let mut all = [batch.iter().product(), 1, 1, 1];
    let first = 4 - space.len();
    all[first..].copy_from_slice(space);
    all.map(|n| 0..n)
}

/// The run of flattened batch indices of a box over the batch dimensions.
fn batch_run(local: &[Range<usize>], origin: &[Range<usize>]) -> Range<usize> {
    let mut run = 0..1;
    for (l, o) in local.iter().zip(origin) {
        run = run.start * o.len() + l.start..(run.end - 1) * o.len() + l.end;
    }
    run
}

/// A stack machine over groups of leaves in place of leaves: subtrees of as many leaves on one side as on the other, at most
/// `most`, which is a power of two. By group its first leaf, and how many.
fn grouped(order: &[Combine], most: usize) -> (Vec<Combine>, Vec<[usize; 2]>) {
    let (mut out, mut groups, mut stack) = (vec![], vec![], vec![]);
    for c in order {
        match *c {
            Combine::Leaf(l) => {
                out.push(Combine::Leaf(groups.len()));
                groups.push([l, 1]);
                stack.push(Some(1));
            }
            Combine::Add => {
                let sizes = (stack.pop().flatten(), stack.pop().flatten());
                // Groups on top of the stack are the last ones.
                let both = match sizes {
                    (Some(right), Some(left)) if left == right && left + right <= most => Some(left + right),
                    _ => None,
                };
                match both {
                    Some(n) => {
                        out.pop();
                        groups.pop();
                        groups.last_mut().expect("there are two")[1] = n;
                    }
                    None => out.push(Combine::Add),
                }
                stack.push(both);
            }
        }
    }
    (out, groups)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Combine::{Add, Leaf};

    #[test]
    fn single_products_are_grouped_where_the_tree_is_balanced() {
        let four = [Leaf(0), Leaf(1), Add, Leaf(2), Leaf(3), Add, Add];
        assert_eq!(grouped(&four, 8), (vec![Leaf(0)], vec![[0, 4]]));
        assert_eq!(grouped(&four, 2), (vec![Leaf(0), Leaf(1), Add], vec![[0, 2], [2, 2]]));
        let three_and_two = [Leaf(0), Leaf(1), Leaf(2), Add, Add, Leaf(3), Leaf(4), Add, Add];
        let program = vec![Leaf(0), Leaf(1), Add, Leaf(2), Add];
        assert_eq!(grouped(&three_and_two, 8), (program, vec![[0, 1], [1, 2], [3, 2]]));
    }
}
