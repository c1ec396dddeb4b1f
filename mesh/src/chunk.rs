//! The chunk: the unit of splitting and the unit of summation.
//!
//! Every dimension is cut into canonical chunks that depend on its name and size alone, never on a
//! layout. A shard is a run of whole chunks. A sum over one or more dimensions adds up each box of
//! chunks ("leaf") in index order and combines the leaves by one fixed binary [`Tree`], so that a
//! device which owns some of the leaves computes the complete subtrees it owns ("nodes"), a
//! collective exchanges those, and everybody finishes the same tree: the same bits on every layout.

use std::ops::Range;

/// How many chunks a dimension of size `n` has: `min(n / grain, chunks)`, at least 1.
pub fn chunk_count(n: usize, grain: usize, chunks: usize) -> usize {
    (n / grain.max(1)).min(chunks).max(1)
}

/// The elements of chunk `i` of `count` in a dimension of size `n`: `[floor(i n / C), floor((i+1) n / C))`.
pub fn chunk_range(n: usize, count: usize, i: usize) -> Range<usize> {
    i * n / count..(i + 1) * n / count
}

/// The chunks that shard `i` of `shards` holds: runs whose lengths differ by one at most, longer ones first.
pub fn shard_chunks(count: usize, shards: usize, i: usize) -> Range<usize> {
    (i * count).div_ceil(shards)..((i + 1) * count).div_ceil(shards)
}

/// One reduced dimension of a tree: its size and the number of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TreeDim {
    /// Elements.
    pub size: usize,
    /// Chunks.
    pub chunks: usize,
}

/// A box of chunks: one range of chunk indices a reduced dimension.
pub type ChunkBox = Vec<Range<usize>>;

/// The summation tree over one or more reduced dimensions.
///
/// The root holds all chunks. A box is halved along one dimension at a time: first the one of the
/// program's examples, if it is among them, down to single chunks; then the others take turns in their
/// order (one with a single chunk left passes). The left half of L chunks is the largest power of two
/// below L. So each device owns one node where examples are shared out, over however many devices, and
/// few where 1 to 3 other dimensions are split: one with `x=2,y=2,z=2`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Tree {
    /// The reduced dimensions, in the program's order.
    pub dims: Vec<TreeDim>,
    /// Which of them is halved before the others.
    pub first: Option<usize>,
}

/// A node: a box of chunks and the dimension whose turn it is to be halved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Chunk ranges, one a dimension.
    pub chunks: ChunkBox,
    turn: usize,
}

/// One instruction of the stack machine that evaluates a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Sum this box of *elements* (global indices, one range a reduced dimension), in the order of the op, and push it.
    Leaf(Vec<Range<usize>>),
    /// Pop right, then left; push left + right.
    Combine,
}

impl Tree {
    /// The node that holds everything.
    pub fn root(&self) -> Node {
        Node { chunks: self.dims.iter().map(|d| 0..d.chunks).collect(), turn: 0 }
    }

    /// The two halves of a node, or None for a leaf.
    pub fn halves(&self, node: &Node) -> Option<(Node, Node)> {
        let (at, [left, right], turn) = self.cut(node)?;
        let half = |range| {
            let mut half = Node { turn, ..node.clone() };
            half.chunks[at] = range;
            half
        };
        Some((half(left), half(right)))
    }

    /// Where a node is halved: along which dimension, into which ranges of it, and whose turn is next.
    fn cut(&self, node: &Node) -> Option<(usize, [Range<usize>; 2], usize)> {
        let n = self.dims.len();
        let turns = (0..n).map(|i| (node.turn + i) % n);
        let at = self.first.into_iter().chain(turns).find(|&d| node.chunks[d].len() > 1)?;
        let r = &node.chunks[at];
        let middle = r.start + (r.len().next_power_of_two() / 2).max(1);
        Some((at, [r.start..middle, middle..r.end], (at + 1) % n))
    }

    /// The largest complete subtrees inside `owned`, in the tree's order. Empty if `owned` is empty.
    pub fn nodes(&self, owned: &[Range<usize>]) -> Vec<Node> {
        let mut found = Vec::new();
        self.inside(&mut self.root(), owned, &mut |node| found.push(node.clone()));
        found
    }

    /// How many those are.
    pub fn count(&self, owned: &[Range<usize>]) -> usize {
        let mut found = 0;
        self.inside(&mut self.root(), owned, &mut |_| found += 1);
        found
    }

    fn inside(&self, node: &mut Node, owned: &[Range<usize>], found: &mut impl FnMut(&Node)) {
        let overlaps = node.chunks.iter().zip(owned).all(|(c, o)| c.start < o.end && o.start < c.end);
        if !overlaps {
            return;
        }
        if node.chunks.iter().zip(owned).all(|(c, o)| o.start <= c.start && c.end <= o.end) {
            return found(node);
        }
        if let Some((at, halves, next)) = self.cut(node) {
            let (whole, turn) = (node.chunks[at].clone(), node.turn);
            node.turn = next;
            for half in halves {
                node.chunks[at] = half;
                self.inside(node, owned, found);
            }
            (node.chunks[at], node.turn) = (whole, turn);
        }
    }

    /// The program of the stack machine for one node: leaves and combinations in post-order.
    pub fn events(&self, node: &Node) -> Vec<Event> {
        let mut out = Vec::new();
        self.visit(node, &mut out);
        out
    }

    fn visit(&self, node: &Node, out: &mut Vec<Event>) {
        match self.halves(node) {
            None => out.push(Event::Leaf(self.elements(&node.chunks))),
            Some((a, b)) => {
                self.visit(&a, out);
                self.visit(&b, out);
                out.push(Event::Combine);
            }
        }
    }

    /// The elements of a box of chunks.
    pub fn elements(&self, chunks: &[Range<usize>]) -> Vec<Range<usize>> {
        chunks.iter().zip(&self.dims).map(|(c, d)| c.start * d.size / d.chunks..c.end * d.size / d.chunks).collect()
    }

    /// The chunks of a box of elements whose ends are ends of chunks; None if they are not.
    pub fn chunks_of(&self, elements: &[Range<usize>]) -> Option<ChunkBox> {
        elements
            .iter()
            .zip(&self.dims)
            .map(|(e, d)| {
                let edge = |x: usize| (0..=d.chunks).find(|i| i * d.size / d.chunks == x);
                if e.is_empty() { Some(0..0) } else { Some(edge(e.start)?..edge(e.end)?) }
            })
            .collect()
    }

    /// The stack machine that finishes the tree from nodes that several owners computed.
    ///
    /// `owned` is the box of chunks of each owner; a leaf is (owner, index among that owner's [`Tree::nodes`]).
    pub fn finish(&self, owned: &[ChunkBox]) -> Vec<Finish> {
        let mut next = vec![0; owned.len()];
        let mut out = Vec::new();
        self.finish_node(&self.root(), owned, &mut next, &mut out);
        out
    }

    fn finish_node(&self, node: &Node, owned: &[ChunkBox], next: &mut [usize], out: &mut Vec<Finish>) {
        let inside = |o: &ChunkBox| node.chunks.iter().zip(o).all(|(c, o)| o.start <= c.start && c.end <= o.end);
        if let Some(owner) = owned.iter().position(inside) {
            out.push(Finish::Take { owner, node: next[owner] });
            next[owner] += 1;
        } else {
            let (a, b) = self.halves(node).expect("owners cover every leaf");
            self.finish_node(&a, owned, next, out);
            self.finish_node(&b, owned, next, out);
            out.push(Finish::Combine);
        }
    }

    /// The complete subtrees that the nodes of several parts make together, in the tree's order, and the stack machine that
    /// makes them: they lie on the stack at its end. A leaf is (part, index among that part's nodes).
    pub fn join(&self, parts: &[&[Node]]) -> (Vec<Node>, Vec<Finish>) {
        let (mut found, mut out) = (Vec::new(), Vec::new());
        if self.join_node(&self.root(), parts, &mut found, &mut out) {
            found.push(self.root());
        }
        (found, out)
    }

    /// Whether a node is complete, and on top of the stack; if it is not, what is below it has been found.
    fn join_node(&self, node: &Node, parts: &[&[Node]], found: &mut Vec<Node>, out: &mut Vec<Finish>) -> bool {
        let place = |(owner, part): (usize, &&[Node])| Some((owner, part.iter().position(|n| n == node)?));
        if let Some((owner, node)) = parts.iter().enumerate().find_map(place) {
            out.push(Finish::Take { owner, node });
            return true;
        }
        let Some((a, b)) = self.halves(node) else { return false };
        let left = self.join_node(&a, parts, found, out);
        let at = found.len();
        let right = self.join_node(&b, parts, found, out);
        match (left, right) {
            (true, true) => out.push(Finish::Combine),
            (true, false) => found.insert(at, a),
            (false, true) => found.push(b),
            (false, false) => {}
        }
        left && right
    }
}

/// One instruction of the stack machine that finishes a distributed sum.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// Push node `node` of owner `owner`.
    Take {
        /// Index of the owner, or of the part.
        owner: usize,
        /// Index among its nodes.
        node: usize,
    },
    /// Pop right, then left; push left + right.
    Combine,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn eight_chunks_over_three_devices_are_3_3_2() {
        let lens: Vec<_> = (0..3).map(|i| shard_chunks(8, 3, i).len()).collect();
        assert_eq!(lens, [3, 3, 2]);
    }

    #[test]
    fn a_split_on_three_axes_owns_one_node_a_device() {
        let tree = Tree { dims: vec![TreeDim { size: 64, chunks: 8 }; 3], first: None };
        for d in 0..8 {
            let half = |bit: usize| if d >> bit & 1 == 0 { 0..4 } else { 4..8 };
            assert_eq!(tree.nodes(&[half(2), half(1), half(0)]).len(), 1);
        }
    }

    #[test]
    fn devices_that_share_examples_out_own_one_node_each() {
        let tree = Tree { dims: vec![TreeDim { size: 64, chunks: 8 }; 2], first: Some(0) };
        for shards in [1, 2, 4, 8] {
            for i in 0..shards {
                assert_eq!(tree.nodes(&[shard_chunks(8, shards, i), 0..8]).len(), 1);
            }
        }
        // Where the other one is split, there is a node for each chunk of examples.
        assert_eq!(tree.nodes(&[0..8, 0..4]).len(), 8);
        assert_eq!(tree.nodes(&[0..4, 0..4]).len(), 4);
    }

    /// A sum as text, so that its order shows.
    fn text(tree: &Tree, node: &Node) -> String {
        let mut stack: Vec<String> = Vec::new();
        for e in tree.events(node) {
            match e {
                Event::Leaf(b) => stack.push(format!("{b:?}")),
                Event::Combine => {
                    let (r, l) = (stack.pop().unwrap(), stack.pop().unwrap());
                    stack.push(format!("({l}+{r})"));
                }
            }
        }
        stack.pop().unwrap()
    }

    proptest! {
        #[test]
        fn every_split_finishes_the_same_sum(
            sizes in prop::collection::vec((1usize..20, 1usize..5), 1..4),
            first in prop::option::of(0usize..4),
        ) {
            let first = first.filter(|f| *f < sizes.len());
            let dims = sizes.iter().map(|&(n, _)| TreeDim { size: n, chunks: chunk_count(n, 1, 8) }).collect();
            let tree = Tree { dims, first };
            let shards: Vec<usize> = sizes.iter().zip(&tree.dims).map(|(&(_, p), d)| p.min(d.chunks)).collect();
            let owners: usize = shards.iter().product();
            let owned: Vec<ChunkBox> = (0..owners).map(|mut o| {
                let mut b: ChunkBox = shards.iter().zip(&tree.dims).rev().map(|(&p, d)| { let i = o % p; o /= p; shard_chunks(d.chunks, p, i) }).collect();
                b.reverse();
                b
            }).collect();
            let mut stack: Vec<String> = Vec::new();
            for f in tree.finish(&owned) {
                match f {
                    Finish::Take { owner, node } => stack.push(text(&tree, &tree.nodes(&owned[owner])[node])),
                    Finish::Combine => { let (r, l) = (stack.pop().unwrap(), stack.pop().unwrap()); stack.push(format!("({l}+{r})")); }
                }
            }
            prop_assert_eq!(stack.pop().unwrap(), text(&tree, &tree.root()));
        }

        #[test]
        fn parts_that_come_in_any_order_join_to_the_same_sum(
            chunks in prop::collection::vec(1usize..9, 1..3), shards in 1usize..9, order in Just((0..8usize).collect::<Vec<_>>()).prop_shuffle()
        ) {
            let tree = Tree { dims: chunks.iter().map(|&c| TreeDim { size: 2 * c, chunks: c }).collect(), first: None };
            let shards = shards.min(chunks[0]);
            let mut owned = tree.root().chunks;
            let (mut nodes, mut texts): (Vec<Node>, Vec<String>) = (vec![], vec![]);
            for shard in order.into_iter().filter(|i| *i < shards) {
                owned[0] = shard_chunks(chunks[0], shards, shard);
                let piece = tree.nodes(&owned);
                let parts = [texts, piece.iter().map(|n| text(&tree, n)).collect()];
                let (joined, machine) = tree.join(&[&nodes, &piece]);
                let mut stack: Vec<String> = Vec::new();
                for f in machine {
                    match f {
                        Finish::Take { owner, node } => stack.push(parts[owner][node].clone()),
                        Finish::Combine => { let (r, l) = (stack.pop().unwrap(), stack.pop().unwrap()); stack.push(format!("({l}+{r})")); }
                    }
                }
                (nodes, texts) = (joined, stack);
                prop_assert_eq!(nodes.iter().map(|n| text(&tree, n)).collect::<Vec<_>>(), texts.clone());
            }
            prop_assert_eq!(texts, [text(&tree, &tree.root())]);
        }
    }
}
