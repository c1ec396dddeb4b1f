//! How tensors are split, in numbers small enough to go through all of them: what [`crate::placement`] says of a layout
//! whose rules all give way, of one device that stands for all.

use crate::chunk::shard_chunks;
use crate::dim::{Dim, Name, Type};
use crate::layout::{Mesh, Section};
use crate::machine::Machine;
use crate::program::Chunking;
use crate::region::Region;
use std::ops::Range;

/// Dimensions that may be split, at the most; of a tensor as well, the first ones.
pub const DIMS: usize = 16;
/// Axes of a mesh, at the most.
pub const AXES: usize = 8;

/// Some axes of a mesh, a bit each.
pub type Axes = u8;

/// Which axes split which dimensions, eight bits each: of those that may be split, or of a tensor's own, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Splits(pub u128);

impl Splits {
    /// The axes of a dimension.
    pub fn of(self, dim: usize) -> Axes {
        if dim < DIMS { (self.0 >> (AXES * dim)) as Axes } else { 0 }
    }
    /// The axes of all dimensions.
    pub fn axes(self) -> Axes {
        self.0.to_le_bytes().iter().fold(0, |all, axes| all | axes)
    }
    /// With axes of a dimension in addition.
    pub fn with(self, dim: usize, axes: Axes) -> Splits {
        if dim < DIMS { Splits(self.0 | u128::from(axes) << (AXES * dim)) } else { self }
    }
    /// Of some dimensions only; `dims` has all bits of those.
    pub fn only(self, dims: Splits) -> Splits {
        Splits(self.0 & dims.0)
    }
}

/// The stage of ZeRO: what is split over axes that do not split a variable anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Zero {
    /// 0: nothing; 1: slots; 2: gradients too; 3: variables too.
    pub stage: u8,
    /// Over which axes.
    pub axes: Axes,
}

/// The first stage of ZeRO that splits tensors of a section.
fn first_stage(section: Section) -> Option<u8> {
    match section {
        Section::Slots => Some(1),
        Section::Gradients => Some(2),
        Section::Variables => Some(3),
        Section::Activations => None,
    }
}

impl Zero {
    /// Over which axes tensors of a section are split by it.
    pub fn of(self, section: Section) -> Axes {
        if first_stage(section).is_some_and(|first| self.stage >= first) { self.axes } else { 0 }
    }
}

/// How a segment is split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    /// Which axes split which dimensions.
    pub splits: Splits,
    /// And of variables.
    pub zero: Zero,
}

/// What of a way something depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sees {
    /// All bits of the dimensions that it has.
    pub dims: Splits,
    /// By stage of ZeRO, a bit each: whether it has tensors which that one begins to split.
    pub zero: u8,
}

impl Sees {
    /// What one of both depends on.
    pub fn or(self, other: Sees) -> Sees {
        Sees { dims: Splits(self.dims.0 | other.dims.0), zero: self.zero | other.zero }
    }
    /// What it sees of a way.
    pub fn of(self, way: Way) -> Way {
        let zero = match self.stage(way.zero.stage) {
            0 => Zero::default(),
            stage => Zero { stage, ..way.zero },
        };
        Way { splits: way.splits.only(self.dims), zero }
    }
    /// The first stage of ZeRO that is the same to it as this one.
    pub fn stage(self, stage: u8) -> u8 {
        (1..=stage).rev().find(|s| self.zero >> s & 1 == 1).unwrap_or(0)
    }
}

/// A dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The dimension.
    pub dim: Dim,
    /// Which of those that may be split.
    pub at: Option<usize>,
    /// Its chunks.
    pub chunks: usize,
    /// Whether the op needs it whole.
    pub whole: bool,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Its dimensions.
    pub extents: Vec<Extent>,
    /// Bytes of an element.
    pub element: usize,
    /// Whose rules are for it.
    pub section: Section,
}

/// The dimensions of a program that may be split.
#[derive(Clone)]
pub struct Dims<'a> {
    /// Their names.
    pub names: Vec<Name>,
    /// The program's chunks.
    pub chunking: &'a Chunking,
}

impl Dims<'_> {
    /// A tensor of that type.
    pub fn shape(&self, ty: &Type, section: Section, whole: &[Name]) -> Shape {
        let extent = |d: &Dim| Extent {
            dim: d.clone(),
            at: self.names.iter().position(|n| *n == d.name),
            chunks: self.chunking.count(&d.name, d.size),
            whole: whole.contains(&d.name),
        };
        Shape { extents: ty.dims.iter().map(extent).collect(), element: ty.dtype.bytes(), section }
    }
}

impl Shape {
    /// What of a way it depends on.
    pub fn sees(&self) -> Sees {
        Sees { dims: self.dims(), zero: first_stage(self.section).map_or(0, |stage| 1 << stage) }
    }

    /// All bits of its dimensions.
    pub fn dims(&self) -> Splits {
        let all = self.extents.iter().filter_map(|e| e.at);
        all.fold(Splits::default(), |s, at| s.with(at, Axes::MAX))
    }
}

/// A pipeline of stages that are as long as each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pipeline {
    /// Stages; 1: none.
    pub depth: usize,
    /// Micro-batches that go through them.
    pub micro: usize,
}

impl Pipeline {
    /// Seconds of a run for each second that all of it takes on one stage: each stage does its part of it, and waits while
    /// the first micro-batch comes to it and the last one leaves it (Narayanan et al. 2019).
    pub fn seconds(&self) -> f64 {
        (self.micro + self.depth - 1) as f64 / (self.micro * self.depth) as f64
    }

    /// Micro-batches whose activations a stage keeps: it goes so far ahead that the last one is busy.
    pub fn in_flight(&self, stage: usize) -> usize {
        (self.depth - stage).min(self.micro)
    }
}

/// A mesh on a machine, and the device that stands for all: one with neighbours on both sides, and the largest shards.
pub struct Site<'a> {
    /// The mesh of a stage.
    pub mesh: &'a Mesh,
    /// The stages.
    pub pipeline: Pipeline,
    /// The machine.
    pub machine: &'a Machine,
    /// How many devices of the mesh share one of the machine's.
    pub share: f64,
    per_host: usize,
    at: Vec<usize>,
}

impl<'a> Site<'a> {
    /// A pipeline with stages of that mesh on that machine.
    pub fn new(mesh: &'a Mesh, pipeline: Pipeline, machine: &'a Machine, chunks: usize) -> Site<'a> {
        let (per_host, share) = machine.share(mesh.size() * pipeline.depth);
        let inner = |n: usize| {
            let inside = if n > 2 { 1..n - 1 } else { 0..1 };
            inside.max_by_key(|i| (shard_chunks(chunks, n, *i).len(), std::cmp::Reverse(*i))).unwrap_or(0)
        };
        let at = mesh.axes().iter().map(|(_, n)| inner(*n)).collect();
        Site { mesh, pipeline, machine, share, per_host, at }
    }

    /// The axes in a set, the outermost first.
    pub fn axes(&self, set: Axes) -> impl Iterator<Item = usize> + Clone {
        (0..self.mesh.axes().len()).filter(move |a| set >> a & 1 == 1)
    }

    /// Into how many shards axes split a dimension.
    pub fn shards(&self, set: Axes) -> usize {
        self.axes(set).map(|a| self.mesh.axes()[a].1).product()
    }

    /// Which shard is the device's.
    fn shard(&self, set: Axes) -> usize {
        self.axes(set).fold(0, |shard, a| shard * self.mesh.axes()[a].1 + self.at[a])
    }

    /// How a tensor is split.
    pub fn split(&self, shape: &Shape, way: Way) -> Splits {
        let mut split = Splits::default();
        let fits = |e: &Extent, axes: Axes, split: Splits| {
            !e.whole && axes & split.axes() == 0 && self.shards(axes) <= e.chunks
        };
        for (i, e) in shape.extents.iter().take(DIMS).enumerate() {
            let axes = e.at.map_or(0, |at| way.splits.of(at));
            if axes != 0 && fits(e, axes, split) {
                split = split.with(i, axes);
            }
        }
        let star = way.zero.of(shape.section);
        if star != 0 {
            let extents = shape.extents.iter().take(DIMS).enumerate();
            let free = extents.filter(|(i, e)| split.of(*i) == 0 && fits(e, star, split));
            let largest = free.max_by_key(|(_, e)| (e.dim.size, std::cmp::Reverse(&e.dim.name)));
            if let Some((i, _)) = largest {
                split = split.with(i, star);
            }
        }
        split
    }

    /// The chunks that the device owns.
    pub fn owned_chunks(&self, chunks: usize, axes: Axes) -> Range<usize> {
        shard_chunks(chunks, self.shards(axes), self.shard(axes))
    }

    /// The elements that the device owns.
    pub fn owned(&self, size: usize, chunks: usize, axes: Axes) -> Range<usize> {
        let own = self.owned_chunks(chunks, axes);
        own.start * size / chunks..own.end * size / chunks
    }

    /// What the device owns of a tensor.
    pub fn region(&self, shape: &Shape, split: Splits) -> Region {
        let own = |(i, e): (usize, &Extent)| (e.dim.name.clone(), self.owned(e.dim.size, e.chunks, split.of(i)));
        Region(shape.extents.iter().enumerate().map(own).collect())
    }

    /// How many others differ from the device along those axes only: on its host, and on others.
    pub fn peers(&self, set: Axes) -> [usize; 2] {
        let mut peers = [0, 0];
        for other in 1..self.shards(set) {
            let mut rest = other;
            let mut at = self.at.clone();
            for a in self.axes(set) {
                let n = self.mesh.axes()[a].1;
                at[a] = (at[a] + rest % n) % n;
                rest /= n;
            }
            peers[self.link(&at)] += 1;
        }
        peers
    }

    /// 0 if the device at that place is on this one's host, 1 if not.
    fn link(&self, at: &[usize]) -> usize {
        let number = |at: &[usize]| at.iter().zip(self.mesh.axes()).fold(0, |d, (i, (_, n))| d * n + i);
        usize::from(number(at) / self.per_host != number(&self.at) / self.per_host)
    }

    /// Seconds that messages take: by link, how many one after the other and how many bytes.
    pub fn links(&self, messages: [usize; 2], bytes: [f64; 2]) -> f64 {
        let links = [self.machine.within, self.machine.between];
        let of = |i: usize| messages[i] as f64 * links[i].latency + bytes[i] / links[i].bytes;
        of(0).max(of(1))
    }

    /// By link, the bytes that the device receives for it to hold `wanted` of a tensor that is split so.
    pub fn received(&self, shape: &Shape, split: Splits, wanted: &Region) -> [f64; 2] {
        // By dimension: whose shards overlap what is wanted, and in how much.
        let overlaps: Vec<Vec<(usize, usize)>> = shape
            .extents
            .iter()
            .enumerate()
            .zip(&wanted.0)
            .map(|((i, e), (_, w))| {
                let shards = self.shards(split.of(i));
                let of = |s: usize| {
                    let chunks = shard_chunks(e.chunks, shards, s);
                    let own = chunks.start * e.dim.size / e.chunks..chunks.end * e.dim.size / e.chunks;
                    own.end.min(w.end).saturating_sub(own.start.max(w.start))
                };
                (0..shards).map(|s| (s, of(s))).filter(|(_, n)| *n > 0).collect()
            })
            .collect();
        let mut bytes = [0.0; 2];
        let mut turn = vec![0; overlaps.len()];
        if overlaps.iter().any(Vec::is_empty) {
            return bytes;
        }
        loop {
            let mut at = self.at.clone();
            let mut elements = 1;
            for (i, (o, t)) in overlaps.iter().zip(&turn).enumerate() {
                let (mut shard, n) = o[*t];
                elements *= n;
                for a in self.axes(split.of(i)).collect::<Vec<_>>().into_iter().rev() {
                    let size = self.mesh.axes()[a].1;
                    at[a] = shard % size;
                    shard /= size;
                }
            }
            if at != self.at {
                bytes[self.link(&at)] += (elements * shape.element) as f64;
            }
            let Some(i) = (0..turn.len()).rev().find(|i| turn[*i] + 1 < overlaps[*i].len()) else { return bytes };
            turn[i] += 1;
            turn[i + 1..].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_beyond_those_that_may_be_split_are_whole() {
        let last = Splits::default().with(DIMS - 1, 3);
        assert_eq!((last.of(DIMS - 1), last.of(0), last.axes()), (3, 0, 3));
        assert_eq!(last.with(DIMS, 4), last);
        assert_eq!(last.of(DIMS), 0);
    }
}
