//! Blocks that go round in place of being gathered (Liu et al. 2023, ring attention).
//!
//! Where a rule `memory_seq:ring(sp)` splits what a product would gather whole, such as attention's keys and values, each
//! device works on one block after the other: first on its own, then on what its neighbour has had, so that no device ever
//! holds all of them. What is made of blocks (scores, weights) is made block by block, and not kept. A sum over the dimension
//! (the largest score, the sum of weights, what is seen) is made in parts that a device joins along the summation tree itself;
//! since a block is a run of whole chunks its part is complete nodes of the tree, and it makes no difference to the bits
//! in which order blocks come. What is complete is joined at once, so that few nodes wait. What needs a sum goes through the
//! blocks again, and what is made of blocks is made again for that: attention goes round three times forward (for the largest
//! score, for the sum, for the weights) and twice backward. A sum whose result has the dimension, which a
//! reduce-scatter would finish (gradients of keys and values), is made for the block that is there and sent to its owner
//! at once, who joins what comes.
//!
//! Here it is found what goes round; [`turn`] makes the instructions of each turn.

use super::{Instr, SpmdOp, SpmdProgram, Value, ValueId, needs};
use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::layout::{Layout, Scoped};
use crate::ops::Prim;
use crate::placement::{Placement, Subject};
use crate::program::Function;
use crate::region::Region;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

mod turn;

/// The blocks of a dimension, and who holds which at first.
#[derive(Clone, Debug, PartialEq)]
struct Ring {
    dim: Name,
    size: usize,
    /// In order.
    blocks: Vec<Range<usize>>,
    /// By device; none where it holds nothing.
    own: Vec<Option<usize>>,
    /// The rule that says so.
    rule: String,
}

impl Ring {
    /// The ring in which a gather of all blocks may go; None if it gathers something else.
    fn new(dim: &Name, size: usize, rule: String, from: &[Region], to: &[Region]) -> Option<Ring> {
        let range = |r: &Region| r.get(dim).cloned().filter(|_| !r.is_empty());
        let mut blocks: Vec<Range<usize>> = from.iter().filter_map(range).collect();
        blocks.sort_by_key(|r| r.start);
        blocks.dedup();
        let own = from.iter().map(|r| blocks.iter().position(|b| Some(b) == range(r).as_ref())).collect();
        let gathers = |(held, all): (&Region, &Region)| match held.is_empty() {
            true => all.is_empty(),
            false => *all == held.clone().with(dim, 0..size),
        };
        let tiles =
            blocks.iter().scan(0, |end, b| Some(b.start == std::mem::replace(end, b.end))).all(|follows| follows);
        let ring = Ring { dim: dim.clone(), size, blocks, own, rule };
        (tiles && ring.blocks.len() > 1 && from.iter().zip(to).all(gathers)).then_some(ring)
    }

    /// The block that a device works on in a turn.
    fn block(&self, device: usize, turn: usize) -> Option<Range<usize>> {
        self.own[device].map(|own| self.blocks[(own + turn) % self.blocks.len()].clone())
    }

    /// The part that devices have of a value in a turn.
    fn at(&self, regions: &[Region], turn: usize) -> Vec<Region> {
        let part = |(device, region): (usize, &Region)| match self.block(device, turn) {
            Some(block) if !region.is_empty() => region.clone().with(&self.dim, block),
            _ => region.clone(),
        };
        regions.iter().enumerate().map(part).collect()
    }

    /// Whether all of the dimension is there wherever something of a value is.
    fn is_whole(&self, value: &Value) -> bool {
        let whole = |r: &Region| r.is_empty() || r.get(&self.dim) == Some(&(0..self.size));
        value.ty.has(&self.dim) && value.regions.iter().all(whole)
    }
}

/// What an instruction has to do with blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    /// It gathers them.
    Gather,
    /// What it gives is made of them, block by block.
    Blocks,
    /// It sums over them.
    Sum,
    /// A reduce-scatter of sums that are made for each block.
    Scatter,
}

/// What goes round.
struct Found {
    /// By instruction.
    part: Vec<Option<Part>>,
    rings: Vec<Ring>,
    /// By value that is made of blocks: its ring.
    of: Vec<Option<usize>>,
    /// By sum and reduce-scatter: which pass through the blocks of its ring makes it.
    passes: BTreeMap<(usize, usize), Vec<usize>>,
}

/// The program in which blocks go round where rules say so.
///
/// # Errors
/// What would have to hold all blocks at once.
pub(super) fn ring(program: SpmdProgram, function: &Function, placement: &Placement) -> Result<SpmdProgram, Error> {
    if !placement.has_rings() {
        return Ok(program);
    }
    let found = Search::new(&program, function).found(placement)?;
    if found.rings.is_empty() { Ok(program) } else { turn::turned(&program, function, &found) }
}

/// Holds that each rule by which blocks go round lets some go round, in one of a program's functions.
///
/// # Errors
/// A rule that does not.
pub(crate) fn check_rings(layout: &Layout, placement: &Placement, rings: &BTreeSet<String>) -> Result<(), Error> {
    let splits = |s: &Scoped| s.rule.ring && !placement.axes(s.rule).is_empty();
    let idle = layout.scoped().filter(splits).map(|s| (s, s.to_string())).find(|(_, rule)| !rings.contains(rule));
    let Some((s, rule)) = idle else { return Ok(()) };
    let why = format!("no product gathers what is split along `{}`", s.rule.dim);
    Err(Cause::NoRing { rule, why }.into())
}

/// An error that a rule cannot be kept to, at an instruction.
fn refused(function: &Function, program: &SpmdProgram, instr: &Instr, rule: &str, why: &str) -> Error {
    let node = function.node(program.values[instr.output.index()].node);
    let why = format!("`{}` {why}", node.op.op().name());
    Error::from(Cause::NoRing { rule: rule.into(), why }).at(node.place)
}

struct Search<'a> {
    program: &'a SpmdProgram,
    function: &'a Function,
    /// By value: the instructions that read it.
    readers: Vec<Vec<usize>>,
    found: Found,
    /// By ring: another one with which it has a sum in common, or itself.
    same: Vec<usize>,
}

impl<'a> Search<'a> {
    fn new(program: &'a SpmdProgram, function: &'a Function) -> Search<'a> {
        let mut readers = vec![vec![]; program.values.len()];
        for (i, instr) in program.instrs.iter().enumerate() {
            instr.inputs.iter().for_each(|v| readers[v.index()].push(i));
        }
        let found = Found {
            part: vec![None; program.instrs.len()],
            rings: vec![],
            of: vec![None; program.values.len()],
            passes: BTreeMap::new(),
        };
        Search { program, function, readers, found, same: vec![] }
    }

    fn found(mut self, placement: &Placement) -> Result<Found, Error> {
        // How many sums over blocks come before a value, one of them needing the other: what they need goes round before.
        let mut level = vec![0; self.program.values.len()];
        let mut sums = vec![];
        for (i, instr) in self.program.instrs.iter().enumerate() {
            let before = instr.inputs.iter().map(|v| level[v.index()]).max().unwrap_or(0);
            let mut rings = instr.inputs.iter().filter_map(|v| self.found.of[v.index()]);
            let part = match rings.next() {
                None => match self.gather(instr, placement)? {
                    Some(ring) => {
                        self.found.rings.push(ring);
                        self.same.push(self.same.len());
                        self.found.of[instr.output.index()] = Some(self.same.len() - 1);
                        Some(Part::Gather)
                    }
                    None => None,
                },
                Some(ring) => {
                    let others: Vec<usize> = rings.collect();
                    Some(self.takes(instr, ring, &others)?)
                }
            };
            let sum = matches!(part, Some(Part::Sum | Part::Scatter));
            level[instr.output.index()] = before + usize::from(sum);
            sums.extend(sum.then_some((i, before)));
            self.found.part[i] = part;
        }
        let results = self.program.outputs.iter().map(|(_, v)| v).chain(self.program.assigns.iter().map(|(_, v)| v));
        let round = |v: &ValueId| Some((*v, self.found.of[v.index()]?));
        if let Some((v, ring)) = results.chain(&self.program.sums).find_map(round)
            && let Some(instr) = self.program.instrs.iter().find(|i| i.output == v)
        {
            return Err(self.refused(instr, ring, "is a result, and needed whole"));
        }
        for (i, before) in sums {
            let rings = self.program.instrs[i].inputs.iter().filter_map(|v| self.found.of[v.index()]);
            let first = self.first(rings.min().expect("it sums blocks"));
            self.found.passes.entry((first, before)).or_default().push(i);
        }
        Ok(self.found)
    }

    /// The first of the rings that have sums in common.
    fn first(&self, mut ring: usize) -> usize {
        while self.same[ring] != ring {
            ring = self.same[ring];
        }
        ring
    }

    /// The ring in which an instruction's blocks go, if it gathers them for a product.
    fn gather(&self, instr: &Instr, placement: &Placement) -> Result<Option<Ring>, Error> {
        let product = |i: &usize| matches!(self.program.instrs[*i].op, SpmdOp::Compute { prim: Prim::Contract(_), .. });
        if !matches!(instr.op, SpmdOp::Move) || !self.readers[instr.output.index()].iter().any(product) {
            return Ok(None);
        }
        let [from, to] = [instr.inputs[0], instr.output].map(|v| &self.program.values[v.index()]);
        let node = self.function.node(from.node);
        let subject = Subject::node(self.function, node);
        for dim in &from.ty.dims {
            let Some(rule) = placement.ring(&subject, &dim.name) else { continue };
            if let Some(ring) = Ring::new(&dim.name, dim.size, rule.to_string(), &from.regions, &to.regions) {
                return Ok(Some(ring));
            }
        }
        Ok(None)
    }

    /// What an instruction makes of blocks that go in a ring.
    fn takes(&mut self, instr: &Instr, ring: usize, others: &[usize]) -> Result<Part, Error> {
        let output = &self.program.values[instr.output.index()];
        for other in others {
            let (first, other) = (self.first(ring), self.first(*other));
            let [a, b] = [first, other].map(|r| &self.found.rings[r]);
            if (&a.dim, &a.own, &a.blocks) != (&b.dim, &b.own, &b.blocks) {
                return Err(self.refused(instr, ring, "takes blocks that lie otherwise as well"));
            }
            self.same[first.max(other)] = first.min(other);
        }
        let of = &self.found.rings[ring];
        match &instr.op {
            SpmdOp::Compute { prim, sum } if self.by_blocks(instr, prim, of) => {
                let types = self.function.input_types(self.function.node(output.node));
                if of.is_whole(output) {
                    self.found.of[instr.output.index()] = Some(ring);
                    return Ok(Part::Blocks);
                }
                if sum.is_some() && prim.op().reduced(&types).iter().any(|d| d.name == of.dim) {
                    return Ok(Part::Sum);
                }
            }
            SpmdOp::AllReduce { .. } => {
                let parts = &self.program.values[instr.inputs[0].index()];
                let alone = self.readers[instr.inputs[0].index()].len() == 1;
                if alone && *output.regions == of.at(&parts.regions, 0) {
                    return Ok(Part::Scatter);
                }
            }
            SpmdOp::Compute { .. } | SpmdOp::Move | SpmdOp::Join { .. } => {}
        }
        Err(self.refused(instr, ring, "needs all of them at once"))
    }

    /// Whether an op makes each block of its result of the same block of what it reads.
    fn by_blocks(&self, instr: &Instr, prim: &Prim, ring: &Ring) -> bool {
        let output = &self.program.values[instr.output.index()];
        let types = self.function.input_types(self.function.node(output.node));
        let Some(device) = (0..output.regions.len()).find(|d| !output.regions[*d].is_empty()) else { return true };
        let at = self.program.iteration(self.function, instr, device);
        let plain = |(input, block): (usize, &Range<usize>)| {
            let at = at.clone().with(&ring.dim, block.clone());
            !types[input].has(&ring.dim)
                || needs(prim.op(), input, &types, &output.ty, &at).get(&ring.dim) == Some(block)
        };
        (0..types.len()).all(|input| ring.blocks.iter().all(|block| plain((input, block))))
    }

    fn refused(&self, instr: &Instr, ring: usize, why: &str) -> Error {
        refused(self.function, self.program, instr, &self.found.rings[ring].rule, why)
    }
}
