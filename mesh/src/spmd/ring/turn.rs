//! The instructions of each turn of a ring.

use super::{Found, Part, Ring, refused};
use crate::chunk::{ChunkBox, Finish, Tree};
use crate::error::Error;
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::program::Function;
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, SpmdProgram, Sum, Value, ValueId};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The program with what has been found done turn by turn.
pub(super) fn turned(program: &SpmdProgram, function: &Function, found: &Found) -> Result<SpmdProgram, Error> {
    let mut producer = vec![None; program.values.len()];
    program.instrs.iter().enumerate().for_each(|(i, instr)| producer[instr.output.index()] = Some(i));
    let mut turning = Turning {
        function,
        found,
        old: program,
        producer,
        done: vec![false; program.instrs.len()],
        out: SpmdProgram { instrs: vec![], ..program.clone() },
        lists: HashSet::new(),
        joins: HashMap::new(),
    };
    (0..program.instrs.len()).try_for_each(|i| turning.emit(i))?;
    let mut out = turning.out;
    out.rings = found.rings.iter().map(|r| r.rule.clone()).collect();
    Ok(without_idle(out))
}

/// The program without what nobody needs.
fn without_idle(mut program: SpmdProgram) -> SpmdProgram {
    let results = program.outputs.iter().map(|(_, v)| *v).chain(program.assigns.iter().map(|(_, v)| *v));
    let mut needed: HashSet<ValueId> = results.collect();
    for instr in program.instrs.iter().rev() {
        if needed.contains(&instr.output) {
            needed.extend(&instr.inputs);
        }
    }
    program.instrs.retain(|i| needed.contains(&i.output));
    program.sums.retain(|v| needed.contains(v));
    program.kept.retain(|v| needed.contains(v));
    program
}

/// How the parts of a sum are joined on a device, turn after turn.
struct Joins {
    /// By turn from the second one on.
    orders: Vec<Arc<[Finish]>>,
    /// The most nodes that wait between turns.
    most: usize,
    /// Those that there are in the end.
    last: usize,
}

impl Joins {
    /// Joins of the nodes in boxes of chunks, which come one after the other.
    fn new(tree: &Tree, boxes: &[ChunkBox]) -> Joins {
        let mut nodes = tree.nodes(&boxes[0]);
        let (mut orders, mut most) = (vec![], 0);
        for (turn, part) in boxes.iter().enumerate().skip(1) {
            let (joined, order) = tree.join(&[&nodes, &tree.nodes(part)]);
            nodes = joined;
            orders.push(order.into());
            most = if turn + 1 < boxes.len() { most.max(nodes.len()) } else { most };
        }
        Joins { orders, most, last: nodes.len() }
    }
}

/// A sum over the blocks of a ring, or of a block over those who work on it, as far as it is made.
struct Parts {
    /// The instruction that makes, or finishes, all of it.
    instr: usize,
    f: ReduceFn,
    tree: Tree,
    /// By turn and device: the chunks whose sum comes.
    boxes: Vec<Vec<ChunkBox>>,
    joins: Vec<Arc<Joins>>,
    so_far: Option<ValueId>,
}

/// What there is in a turn.
struct Turn<'a> {
    ring: &'a Ring,
    number: usize,
    /// The blocks of what is gathered, and of what is made of them.
    there: HashMap<ValueId, ValueId>,
}

struct Turning<'a> {
    function: &'a Function,
    found: &'a Found,
    old: &'a SpmdProgram,
    /// By value of the old program: the instruction that makes it.
    producer: Vec<Option<usize>>,
    /// By instruction of the old program: whether what it makes is there.
    done: Vec<bool>,
    out: SpmdProgram,
    /// Lists of regions: equal ones are one.
    lists: HashSet<Arc<[Region]>>,
    /// By tree and boxes of chunks.
    joins: HashMap<(Tree, Vec<ChunkBox>), Arc<Joins>>,
}

impl<'a> Turning<'a> {
    fn list(&mut self, regions: Vec<Region>) -> Arc<[Region]> {
        if let Some(known) = self.lists.get(regions.as_slice()) {
            return known.clone();
        }
        let list: Arc<[Region]> = regions.into();
        self.lists.insert(list.clone());
        list
    }

    fn push(&mut self, op: SpmdOp, inputs: Vec<ValueId>, value: Value) -> ValueId {
        self.out.values.push(value);
        let output = ValueId(self.out.values.len() as u32 - 1);
        self.out.instrs.push(Instr { op, inputs, output });
        output
    }

    /// The instruction that makes a value of the old program.
    fn producer(&self, v: ValueId) -> Option<(usize, &'a Instr)> {
        self.producer[v.index()].map(|i| (i, &self.old.instrs[i]))
    }

    /// Sees to it that what an instruction makes is there, unless that is made block by block.
    fn emit(&mut self, i: usize) -> Result<(), Error> {
        let (part, instr) = (self.found.part[i], &self.old.instrs[i]);
        if matches!(part, Some(Part::Gather | Part::Blocks)) || std::mem::replace(&mut self.done[i], true) {
            return Ok(());
        }
        if part.is_some() {
            let mut passes = self.found.passes.iter();
            let (key, sums) = passes.find(|(_, sums)| sums.contains(&i)).expect("each sum has a pass");
            sums.iter().for_each(|i| self.done[*i] = true);
            return self.pass(&self.found.rings[key.0], sums);
        }
        instr.inputs.iter().try_for_each(|v| self.made(*v))?;
        self.out.instrs.push(instr.clone());
        Ok(())
    }

    fn made(&mut self, v: ValueId) -> Result<(), Error> {
        self.producer[v.index()].map_or(Ok(()), |i| self.emit(i))
    }

    /// The instruction of a value that is made block by block: of blocks, or at each of its points by itself.
    fn by_blocks(&self, v: ValueId, ring: &Ring) -> Option<(usize, &'a Instr)> {
        let (i, instr) = self.producer(v)?;
        let alone = || matches!(&instr.op, SpmdOp::Compute { prim, sum: None } if prim.op().elementwise());
        let cut = self.found.of[v.index()].is_some() || alone() && ring.is_whole(&self.old.values[v.index()]);
        cut.then_some((i, instr))
    }

    /// Sees to it that all is there that the blocks of a value need, and notes what is gathered for it.
    fn needed(
        &mut self,
        v: ValueId,
        ring: &Ring,
        seen: &mut HashSet<ValueId>,
        gathered: &mut Vec<ValueId>,
    ) -> Result<(), Error> {
        if !seen.insert(v) {
            return Ok(());
        }
        match self.by_blocks(v, ring) {
            None => self.made(v),
            Some((i, instr)) if self.found.part[i] == Some(Part::Gather) => {
                gathered.push(v);
                self.made(instr.inputs[0])
            }
            Some((_, instr)) => instr.inputs.iter().try_for_each(|v| self.needed(*v, ring, seen, gathered)),
        }
    }

    /// Lets the blocks of a ring go round once, for some sums.
    fn pass(&mut self, ring: &Ring, sums: &[usize]) -> Result<(), Error> {
        let (mut seen, mut gathered) = (HashSet::new(), vec![]);
        for v in sums.iter().flat_map(|i| &self.old.instrs[*i].inputs) {
            self.needed(*v, ring, &mut seen, &mut gathered)?;
        }
        let mut sums = sums.iter().map(|i| self.parts(*i, ring)).collect::<Result<Vec<_>, _>>()?;
        let own = |v: &ValueId| Some((*v, self.producer(*v)?.1.inputs[0]));
        let mut round: Vec<(ValueId, ValueId)> = gathered.iter().filter_map(own).collect();
        for number in 0..ring.blocks.len() {
            for (all, block) in round.iter_mut().filter(|_| number > 0) {
                let value = self.old.values[all.index()].clone();
                let regions = self.list(ring.at(&value.regions, number));
                *block = self.push(SpmdOp::Move, vec![*block], Value { regions, ..value });
            }
            let mut turn = Turn { ring, number, there: round.iter().copied().collect() };
            for sum in &mut sums {
                let part = self.part(sum, &mut turn);
                self.join(sum, part, &turn);
            }
        }
        Ok(())
    }

    /// The sum that an instruction makes or finishes, in parts.
    fn parts(&mut self, i: usize, ring: &Ring) -> Result<Parts, Error> {
        let (old, instr) = (self.old, &self.old.instrs[i]);
        let refuse = || refused(self.function, old, instr, &ring.rule, "is no sum of whole blocks");
        let value = &old.values[instr.output.index()];
        let devices = || 0..ring.own.len();
        let (f, sum, boxes) = match &instr.op {
            SpmdOp::Compute { prim, sum: Some(sum) } => {
                let f = if let Prim::Reduce(r) = prim { r.f } else { ReduceFn::Sum };
                let reduced = prim.op().reduced(&self.function.input_types(self.function.node(value.node)));
                let at = reduced.iter().position(|d| d.name == ring.dim).ok_or_else(refuse)?;
                let chunks = |turn: usize, device: usize| {
                    let mut elements = sum.tree.elements(&sum.owned[device]);
                    elements[at] = ring.block(device, turn).unwrap_or(0..0);
                    sum.tree.chunks_of(&elements)
                };
                (f, sum, by_turn(ring, |turn| devices().map(|d| chunks(turn, d)).collect()))
            }
            SpmdOp::AllReduce { f, sum, .. } => {
                let made = &old.values[instr.inputs[0].index()].regions;
                let of_senders = |turn: usize| {
                    // Whoever has a block has the same of its sum, or it is not known which one comes.
                    let mut owned: HashMap<Region, Option<&ChunkBox>> = HashMap::new();
                    for (region, own) in ring.at(made, turn).into_iter().zip(&sum.owned) {
                        let known = owned.entry(region).or_insert(Some(own));
                        *known = known.filter(|known| *known == own);
                    }
                    let sent = |d: usize| owned.get(&value.regions[d]).copied().flatten().cloned();
                    let nothing = || Some(sum.tree.dims.iter().map(|_| 0..0).collect());
                    devices().map(|d| if ring.own[d].is_some() { sent(d) } else { nothing() }).collect()
                };
                (*f, sum, by_turn(ring, of_senders))
            }
            _ => return Err(refuse()),
        };
        let boxes = boxes.ok_or_else(refuse)?;
        let mut joins = vec![];
        for device in devices() {
            let of: Vec<ChunkBox> = boxes.iter().map(|turn| turn[device].clone()).collect();
            let new = || Arc::new(Joins::new(&sum.tree, &of));
            joins.push(self.joins.entry((sum.tree.clone(), of.clone())).or_insert_with(new).clone());
        }
        let complete =
            |(device, joins): (usize, &Arc<Joins>)| ring.own[device].is_none() || joins.last == value.nodes[device];
        if !joins.iter().enumerate().all(complete) {
            return Err(refuse());
        }
        Ok(Parts { instr: i, f, tree: sum.tree.clone(), boxes, joins, so_far: None })
    }

    /// A turn's part of a sum.
    fn part(&mut self, sum: &Parts, turn: &mut Turn) -> ValueId {
        let (instr, owned) = (&self.old.instrs[sum.instr], &sum.boxes[turn.number]);
        let nodes: Arc<[usize]> = owned.iter().map(|o| sum.tree.nodes(o).len()).collect();
        let value = Value { nodes, ..self.old.values[instr.output.index()].clone() };
        match &instr.op {
            SpmdOp::Compute { prim, .. } => {
                let inputs = instr.inputs.iter().map(|v| self.block(*v, turn)).collect();
                let sum = Some(Arc::new(Sum { tree: sum.tree.clone(), owned: owned.clone() }));
                self.push(SpmdOp::Compute { prim: prim.clone(), sum }, inputs, value)
            }
            _ => {
                let made = self.block(instr.inputs[0], turn);
                if turn.number == 0 { made } else { self.push(SpmdOp::Move, vec![made], value) }
            }
        }
    }

    /// A turn's block of a value that is made block by block; any other one itself.
    fn block(&mut self, v: ValueId, turn: &mut Turn) -> ValueId {
        if let Some(there) = turn.there.get(&v) {
            return *there;
        }
        let Some((_, instr)) = self.by_blocks(v, turn.ring) else { return v };
        let inputs = instr.inputs.iter().map(|v| self.block(*v, turn)).collect();
        let value = self.old.values[v.index()].clone();
        let regions = self.list(turn.ring.at(&value.regions, turn.number));
        let block = self.push(instr.op.clone(), inputs, Value { regions, ..value });
        turn.there.insert(v, block);
        block
    }

    /// Joins a part with those before it; the last one makes what the old instruction makes.
    fn join(&mut self, sum: &mut Parts, part: ValueId, turn: &Turn) {
        let Some(so_far) = sum.so_far.replace(part) else { return };
        let output = self.old.instrs[sum.instr].output;
        let order = sum.joins.iter().map(|j| j.orders[turn.number - 1].clone()).collect();
        let (op, inputs) = (SpmdOp::Join { f: sum.f, order }, vec![so_far, part]);
        if turn.number + 1 == turn.ring.blocks.len() {
            self.out.instrs.push(Instr { op, inputs, output });
        } else {
            let nodes = sum.joins.iter().map(|j| j.most).collect();
            let value = Value { nodes, ..self.old.values[output.index()].clone() };
            sum.so_far = Some(self.push(op, inputs, value));
        }
    }
}

/// By turn and device, if there is something everywhere.
fn by_turn(ring: &Ring, of: impl Fn(usize) -> Option<Vec<ChunkBox>>) -> Option<Vec<Vec<ChunkBox>>> {
    (0..ring.blocks.len()).map(of).collect()
}
