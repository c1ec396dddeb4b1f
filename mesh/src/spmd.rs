//! SPMD lowering: one list of instructions that every device runs, each on its own regions.
//!
//! A node of the function becomes a computation of the part of its result that each device owns. What that part reads
//! is the op's sharding rule ([`crate::op::Op::needs`]); where a device does not hold it, a move fetches it (a halo, a
//! gather, an all-to-all, whatever the regions say: a move is defined by who holds which global indices, so it cannot
//! bring the wrong data). Where a dimension that is summed over is split, devices compute the subtrees of the canonical
//! summation tree that they own, and an all-reduce finishes the tree. If the result is to be split over the very axes that
//! split the sum, either the inputs are gathered, or a reduce-scatter finishes on each device its part of the result;
//! or the result is made where an input lies and moves then: whatever moves fewer bytes, and of equals the one that needs
//! less memory. What was moved before for another reader is there.
//!
//! Then [`once`] and [`share`] take out what is made or sent twice, [`updates`] puts updates where gradients come, and
//! [`narrow`] makes of a sum no more than is needed of it; where a rule says so, [`ring`] lets blocks go round in place of
//! gathering them.
//!
//! What a rule gives to one place along an axis, a stage of a pipeline, lies and is computed on the devices there; the others
//! hold nothing of it, and [`crate::pipeline`] puts the stages' instructions in an order in which they work side by side.
//!
//! A variable lies as the rules for variables say; each use takes of it what it needs. What the forward pass has gathered
//! is not kept for the backward pass, which gathers again.

use crate::chunk::{ChunkBox, Finish, Tree};
use crate::dim::{Dim, Name, Type};
use crate::error::Error;
use crate::graph::{Node, NodeId, Role};
use crate::op::Op;
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::placement::{Axes, Placement, Spec, Subject};
use crate::program::{Function, VarId};
use crate::region::Region;
use alike::{Alike, Case, Lies};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

mod alike;
mod narrow;
mod once;
mod ring;
mod share;
mod sources;
mod updates;
pub(crate) use ring::check_rings;
pub use sources::sources;

/// Index of a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ValueId(pub u32);

impl ValueId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A tensor on the mesh.
#[derive(Clone, Debug)]
pub struct Value {
    /// Type of the whole tensor.
    pub ty: Arc<Type>,
    /// What each device holds.
    pub regions: Arc<[Region]>,
    /// How many nodes of a summation tree each device holds in place of the sum; 1 everywhere for a finished value.
    pub nodes: Arc<[usize]>,
    /// The function's node it belongs to.
    pub node: NodeId,
}

impl Value {
    /// Bytes that a device holds.
    pub fn bytes(&self, device: usize) -> usize {
        self.nodes[device] * self.regions[device].elements() * self.ty.dtype.bytes()
    }

    /// Bytes that the device with the most holds.
    fn most_bytes(&self) -> usize {
        (0..self.regions.len()).map(|d| self.bytes(d)).max().unwrap_or(0)
    }
}

/// A sum: its tree and the chunks that each device sums up.
#[derive(Clone, Debug, PartialEq)]
pub struct Sum {
    /// The tree.
    pub tree: Tree,
    /// By device.
    pub owned: Vec<ChunkBox>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum SpmdOp {
    /// A primitive op on what each device holds.
    Compute {
        /// The op.
        prim: Prim,
        /// If it sums over dimensions.
        sum: Option<Arc<Sum>>,
    },
    /// The same tensor, held otherwise.
    Move,
    /// Finishes sums that several devices hold in parts: of all that they hold, or (a reduce-scatter) of a part for each.
    AllReduce {
        /// How parts are combined.
        f: ReduceFn,
        /// The sum.
        sum: Arc<Sum>,
        /// The group of devices that each device finishes it with.
        groups: Arc<[Arc<[usize]>]>,
    },
    /// Joins nodes of a sum that a device made one after the other: two inputs, parts of one sum that it holds itself.
    Join {
        /// How nodes are combined.
        f: ReduceFn,
        /// By device: the stack machine ([`Tree::join`]), whose stack at the end is the result's nodes.
        order: Arc<[Arc<[Finish]>]>,
    },
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Instr {
    /// What it does.
    pub op: SpmdOp,
    /// Inputs.
    pub inputs: Vec<ValueId>,
    /// Result.
    pub output: ValueId,
}

/// A lowered function.
#[derive(Clone, Debug, Default)]
pub struct SpmdProgram {
    /// Values.
    pub values: Vec<Value>,
    /// Instructions, inputs before users.
    pub instrs: Vec<Instr>,
    /// Feeds.
    pub inputs: Vec<(Name, ValueId)>,
    /// Variables read.
    pub reads: Vec<(VarId, ValueId)>,
    /// Fetches.
    pub outputs: Vec<(Name, ValueId)>,
    /// Variables set.
    pub assigns: Vec<(VarId, ValueId)>,
    /// Sums of a variable's gradients, of its uses or of micro-batches: each is stored where it is added up, so that what it
    /// is made of can go.
    pub sums: Vec<ValueId>,
    /// Values that are kept to be used again although they could be sent again.
    pub kept: HashSet<ValueId>,
    /// Rules by which blocks go round.
    pub rings: BTreeSet<String>,
}

/// Lowers a function.
///
/// # Errors
/// A layout that cannot be applied to one of its tensors, with the tensor's place in the user's source.
pub fn lower(function: &Function, placement: &Placement) -> Result<SpmdProgram, Error> {
    lower_with(&mut Alike::default(), function, placement)
}

fn lower_with(alike: &mut Alike, function: &Function, placement: &Placement) -> Result<SpmdProgram, Error> {
    let (out, moved) = (SpmdProgram::default(), HashMap::new());
    let mut l = Lowering { function, placement, out, moved, alike };
    let mut values: Vec<Held> = Vec::with_capacity(function.nodes.len());
    for (i, _) in function.nodes.iter().enumerate() {
        let value = l.node(NodeId(i as u32), &values)?;
        values.push(value);
    }
    l.out.outputs = function.outputs.iter().map(|(n, id)| (n.clone(), values[id.index()].value)).collect();
    let adds = |id: &NodeId| {
        let node = function.node(*id);
        node.role == Role::Gradient && matches!(node.op, Prim::Binary(_))
    };
    let all = (0..function.nodes.len() as u32).map(NodeId);
    l.out.sums = all.filter(adds).map(|id| values[id.index()].value).collect();
    // What may be kept is judged with all updates at the end, where they are if gradients are clipped.
    let shared = share::share(updates::add_up_at_once(once::once(l.out)));
    let ordered = updates::as_gradients_come(shared, function);
    ring::ring(narrow::narrow(ordered, function), function, placement)
}

impl SpmdProgram {
    /// What a device goes over in an instruction: its part of the result and of what is summed.
    pub fn iteration(&self, function: &Function, instr: &Instr, device: usize) -> Region {
        let output = &self.values[instr.output.index()];
        let mut at = output.regions[device].clone();
        if let SpmdOp::Compute { prim, sum: Some(sum) } = &instr.op {
            let reduced = prim.op().reduced(&function.input_types(function.node(output.node)));
            for (d, range) in reduced.iter().zip(sum.tree.elements(&sum.owned[device])) {
                at = at.with(&d.name, range);
            }
        }
        at
    }
}

/// A node's result.
struct Held {
    value: ValueId,
    /// How it is split, for ops that sum over its dimensions.
    spec: Rc<Spec>,
    /// How it lies, if it is a variable that lies otherwise than the forward and backward pass use it.
    stored: Option<Rc<Spec>>,
}

struct Lowering<'a> {
    function: &'a Function,
    placement: &'a Placement<'a>,
    out: SpmdProgram,
    /// What was moved of a value, and for a variable in which pass.
    moved: HashMap<(ValueId, bool), Vec<ValueId>>,
    alike: &'a mut Alike,
}

/// One way to compute a node's result.
struct Way {
    /// How what each device computes of it is split: the result, or more of it.
    spec: Spec,
    /// The axes over which each reduced dimension is split.
    reduced: Axes,
    /// What each device iterates over.
    at: Vec<Region>,
    sum: Option<Arc<Sum>>,
}

/// How a node's result is computed, and the lists of regions that this comes to.
struct Computed {
    /// By input: what is read of it.
    needed: Vec<Arc<[Region]>>,
    /// What is computed, and how many nodes of its sum.
    regions: Arc<[Region]>,
    nodes: Arc<[usize]>,
    sum: Option<Arc<Sum>>,
    groups: Arc<[Arc<[usize]>]>,
    /// What devices that compute parts of sums finish.
    done: Arc<[Region]>,
}

impl Lowering<'_> {
    fn devices(&self) -> usize {
        self.placement.mesh.size()
    }

    fn value(&mut self, ty: Arc<Type>, regions: Arc<[Region]>, nodes: Arc<[usize]>, node: NodeId) -> ValueId {
        self.out.values.push(Value { ty, regions, nodes, node });
        ValueId(self.out.values.len() as u32 - 1)
    }

    fn finished(&mut self, ty: &Arc<Type>, regions: Arc<[Region]>, node: NodeId) -> ValueId {
        let nodes = self.alike.ones(self.devices());
        self.value(ty.clone(), regions, nodes, node)
    }

    /// The value such that every device holds at least `needed` of it.
    fn moved(&mut self, held: &Held, needed: Arc<[Region]>, node: NodeId) -> ValueId {
        let value = held.value;
        if self.alike.inside(&self.out.values[value.index()].regions, &needed) {
            return value;
        }
        let again = self.again(held, node);
        if let Some(there) = self.there(value, &needed, again) {
            return there;
        }
        let output = self.exactly(value, needed, node);
        self.moved.entry((value, again)).or_default().push(output);
        output
    }

    /// Whether what is moved of a variable for the forward pass is no longer there for a node: it would be there all the time.
    fn again(&self, held: &Held, node: NodeId) -> bool {
        held.stored.is_some() && self.function.node(node).role != Role::Forward
    }

    /// What was moved of a value before such that every device holds at least `needed` of it; of some, the least.
    fn there(&self, value: ValueId, needed: &Arc<[Region]>, again: bool) -> Option<ValueId> {
        let regions = |v: &ValueId| &self.out.values[v.index()].regions;
        let enough = |v: &&ValueId| self.alike.inside(regions(v), needed);
        let moved = self.moved.get(&(value, again)).into_iter().flatten().filter(enough);
        moved.copied().min_by_key(|v| regions(v).iter().map(Region::elements).sum::<usize>())
    }

    /// The value held in just these regions: a move.
    fn exactly(&mut self, value: ValueId, regions: Arc<[Region]>, node: NodeId) -> ValueId {
        let ty = self.out.values[value.index()].ty.clone();
        let output = self.finished(&ty, regions, node);
        self.out.instrs.push(Instr { op: SpmdOp::Move, inputs: vec![value], output });
        output
    }

    fn node(&mut self, id: NodeId, values: &[Held]) -> Result<Held, Error> {
        let function = self.function;
        let node = function.node(id);
        let ty = Arc::new(node.ty.clone());
        let mut spec = self.alike.spec(self.placement, function, node)?;
        let split = |(axis, _): &(usize, usize)| spec.dims.iter().flatten().any(|a| a == axis);
        if let Some(stage) = self.summed_at(node, values).filter(|stage| !stage.iter().any(split)) {
            spec = Rc::new(Spec { dims: spec.dims.clone(), stage });
        }
        let regions = self.regions(&node.ty, &spec);
        match &node.op {
            Prim::Input(input) => {
                let value = self.finished(&ty, regions, id);
                self.out.inputs.push((input.name.clone(), value));
                return Ok(Held { value, spec, stored: None });
            }
            Prim::Read(read) => {
                let stored = self.stored(read.var)?;
                let lies = self.regions(&node.ty, &stored);
                let value = self.finished(&ty, lies, id);
                self.out.reads.push((read.var, value));
                let held = Held { value, stored: (stored != spec).then_some(stored), spec };
                // Rules of its own say how this function uses it.
                return Ok(match node.layout {
                    Some(_) => Held { value: self.moved(&held, regions, id), stored: None, ..held },
                    None => held,
                });
            }
            Prim::Assign(assign) => {
                let spec = self.stored(assign.var)?;
                let regions = self.regions(&node.ty, &spec);
                let value = values[node.inputs[0].index()].value;
                let there = self.out.values[value.index()].regions == regions;
                let value = if there { value } else { self.exactly(value, regions, id) };
                self.out.assigns.push((assign.var, value));
                return Ok(Held { value, spec, stored: None });
            }
            _ => {}
        }
        if let Some(stored) = self.cast_where_it_lies(id, &regions, values) {
            let regions = self.regions(&node.ty, &stored);
            let value = self.finished(&ty, regions, id);
            let op = SpmdOp::Compute { prim: node.op.clone(), sum: None };
            self.out.instrs.push(Instr { op, inputs: vec![values[node.inputs[0].index()].value], output: value });
            return Ok(Held { value, spec, stored: Some(stored) });
        }
        let computed = self.computed(id, &spec, &regions, values);
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (input, needed) in node.inputs.iter().zip(&computed.needed) {
            inputs.push(self.moved(&values[input.index()], needed.clone(), id));
        }
        let output = self.value(ty.clone(), computed.regions.clone(), computed.nodes.clone(), id);
        let op = SpmdOp::Compute { prim: node.op.clone(), sum: computed.sum.clone() };
        self.out.instrs.push(Instr { op, inputs, output });
        let mut value = output;
        if let Some(sum) = computed.sum.clone().filter(|_| computed.groups[0].len() > 1) {
            let f = match &node.op {
                Prim::Reduce(r) => r.f,
                _ => ReduceFn::Sum,
            };
            value = self.finished(&ty, computed.done.clone(), id);
            let op = SpmdOp::AllReduce { f, sum, groups: computed.groups.clone() };
            self.out.instrs.push(Instr { op, inputs: vec![output], output: value });
        }
        if self.out.values[value.index()].regions != regions {
            value = self.exactly(value, regions, id);
        }
        Ok(Held { value, spec, stored: None })
    }

    /// The part of a tensor that each device owns.
    fn regions(&mut self, ty: &Type, spec: &Rc<Spec>) -> Arc<[Region]> {
        self.alike.regions(self.placement, ty, spec)
    }

    /// How a node's result, of which each device is to have `regions`, is computed: as it was for one that is alike.
    fn computed(&mut self, id: NodeId, spec: &Rc<Spec>, regions: &Arc<[Region]>, values: &[Held]) -> Rc<Computed> {
        let (function, node) = (self.function, self.function.node(id));
        let lies = |input: &NodeId| {
            let held = &values[input.index()];
            let moved = self.moved.get(&(held.value, self.again(held, id))).into_iter().flatten();
            let lists = std::iter::once(&held.value).chain(moved);
            let lists = lists.map(|v| self.alike.number(&self.out.values[v.index()].regions)).collect();
            let (spec, stored) = (held.spec.clone(), held.stored.clone());
            Lies { ty: function.node(*input).ty.clone(), spec, stored, lists }
        };
        let case = Case {
            op: node.op.op().name(),
            ty: node.ty.clone(),
            passes: passes(node),
            spec: spec.clone(),
            inputs: node.inputs.iter().map(lies).collect(),
        };
        if let Some(known) = self.alike.known(&case, &node.op) {
            return known;
        }
        let way = self.way(id, spec, regions, values);
        let (op, types) = (node.op.op(), function.input_types(node));
        let needed = |i: usize| way.at.iter().map(|at| needs(op, i, &types, &node.ty, at)).collect::<Vec<_>>();
        let needed: Vec<Vec<Region>> = (0..node.inputs.len()).map(needed).collect();
        let computed = self.placement.regions(&node.ty, &way.spec);
        let computed = Computed {
            needed: needed.into_iter().map(|list| self.alike.list(list)).collect(),
            done: self.alike.list(self.done(&computed, regions).to_vec()),
            regions: self.alike.list(computed),
            nodes: self.nodes(&way).into(),
            groups: self.groups(&way),
            sum: way.sum,
        };
        self.alike.learn(case, node.op.clone(), computed)
    }

    /// What devices that compute parts of sums finish: what they are to have of the result, if it is inside of that.
    fn done<'r>(&self, computed: &'r [Region], regions: &'r [Region]) -> &'r [Region] {
        let inside = computed.iter().zip(regions).all(|(all, part)| all.contains(part));
        if inside { regions } else { computed }
    }

    /// The stage that makes both parts of a gradient: it adds them, and hands on one.
    fn summed_at(&self, node: &Node, values: &[Held]) -> Option<Vec<(usize, usize)>> {
        let sum = matches!(node.op, Prim::Binary(_)) && node.role == Role::Backward && node.layout.is_none();
        let mut stages = node.inputs.iter().map(|i| &values[i.index()].spec.stage);
        let first = stages.next().filter(|_| sum)?;
        stages.all(|s| s == first).then(|| first.clone())
    }

    /// How a variable lies.
    fn stored(&self, var: VarId) -> Result<Rc<Spec>, Error> {
        let subject = Subject::variable(&self.placement.program.variables[var.index()]);
        self.placement.spec(&subject).map(Rc::new)
    }

    /// Whether a variable is cast before it is gathered: how it lies, if that is less than `used` of it on every device.
    fn cast_where_it_lies(&self, id: NodeId, used: &Arc<[Region]>, values: &[Held]) -> Option<Rc<Spec>> {
        let node = self.function.node(id);
        let input = &values[node.inputs.first().filter(|_| matches!(node.op, Prim::Cast(_)))?.index()];
        let lies = &self.out.values[input.value.index()].regions;
        input.stored.clone().filter(|_| self.alike.inside(used, lies))
    }

    /// The devices that each device finishes a sum with: those that differ along the axes which split it only.
    fn groups(&self, way: &Way) -> Arc<[Arc<[usize]>]> {
        let outside = |d: usize| {
            let mut at = self.placement.mesh.coordinates(d);
            way.reduced.iter().flatten().for_each(|axis| at[*axis] = 0);
            at
        };
        let places: Vec<Vec<usize>> = (0..self.devices()).map(outside).collect();
        let mut together: HashMap<&[usize], Vec<usize>> = HashMap::new();
        places.iter().enumerate().for_each(|(d, at)| together.entry(at).or_default().push(d));
        let together: HashMap<&[usize], Arc<[usize]>> = together.into_iter().map(|(at, d)| (at, d.into())).collect();
        places.iter().map(|at| together[&**at].clone()).collect()
    }

    /// How many nodes of the summation tree each device computes.
    fn nodes(&self, way: &Way) -> Vec<usize> {
        match &way.sum {
            Some(s) => s.owned.iter().map(|o| s.tree.nodes(o).len()).collect(),
            None => vec![1; self.devices()],
        }
    }

    /// How a node's result, of which each device is to have `regions`, is computed.
    fn way(&self, id: NodeId, spec: &Spec, regions: &[Region], values: &[Held]) -> Way {
        let node = self.function.node(id);
        let reduced = node.op.op().reduced(&self.function.input_types(node));
        let stage = || spec.stage.iter().map(|(axis, _)| *axis);
        let used: Vec<usize> = spec.dims.iter().flatten().copied().chain(stage()).collect();
        let ways_of = |first: usize| {
            let gathered = self.split(id, first, &reduced, used.clone(), values);
            let split = self.split(id, first, &reduced, stage().collect(), values);
            let mut ways = vec![];
            if split != gathered {
                // Of a dimension's axes those in front of one that splits the sum stay: their shards are around the result's.
                let free = |a: &&usize| !split.iter().flatten().any(|s| s == *a);
                let around = spec.dims.iter().map(|axes| axes.iter().take_while(free).copied().collect()).collect();
                ways.push(self.along(&reduced, Spec { dims: around, stage: spec.stage.clone() }, split, &node.ty));
            }
            ways.push(self.along(&reduced, spec.clone(), gathered, &node.ty));
            ways
        };
        let mut ways = ways_of(0);
        if !reduced.is_empty() {
            let work = |way: &Way| way.at.iter().map(Region::elements).max();
            let least = ways.iter().map(work).min();
            let there = (0..node.inputs.len()).map(|input| self.where_lies(id, input, spec, &reduced, values));
            // Inputs may be split over other axes than the first one is.
            let free = |first: &usize| self.split(id, *first, &reduced, stage().collect(), values);
            let others = (1..node.inputs.len()).filter(|i| free(i) != free(&0)).flat_map(ways_of);
            let more: Vec<Way> = there.chain(others).filter(|way| Some(work(way)) <= least).collect();
            ways.extend(more);
        }
        // Of equals the first.
        let traffic = |way: &Way| self.traffic(id, way, regions, values);
        let best = (0..ways.len()).min_by_key(|i| traffic(&ways[*i])).unwrap_or_default();
        ways.swap_remove(best)
    }

    /// The way that splits the result as an input is split, wherever it is to lie: a sum is smaller than what it is of.
    fn where_lies(&self, id: NodeId, input: usize, spec: &Spec, reduced: &[Dim], values: &[Held]) -> Way {
        let node = self.function.node(id);
        let (op, types) = (node.op.op(), self.function.input_types(node));
        let whole = op.whole(&types, &node.ty);
        let held = self.used(id, node.inputs[input], values);
        let mut dims: Axes = vec![vec![]; node.ty.dims.len()];
        let mut used: Vec<usize> = spec.stage.iter().map(|(axis, _)| *axis).collect();
        // Dimensions that the input does not have lie as they are to, where its own leave the axes for it.
        for own in [true, false] {
            for (i, d) in node.ty.dims.iter().enumerate() {
                let at = types[input].dims.iter().position(|e| e == d);
                let axes = match at {
                    Some(at) if own => &held.dims[at],
                    None if !own => &spec.dims[i],
                    _ => continue,
                };
                let fits = self.placement.chunks(d) >= self.placement.shards(axes)
                    && !axes.iter().any(|a| used.contains(a))
                    && !whole.iter().any(|(name, _)| *name == d.name);
                if fits {
                    used.extend(axes);
                    dims[i] = axes.clone();
                }
            }
        }
        let split = self.split(id, 0, reduced, used, values);
        self.along(reduced, Spec { dims, stage: spec.stage.clone() }, split, &node.ty)
    }

    /// How an input of a node lies for it: what the passes use of a variable, all else the variable itself.
    fn used<'v>(&self, id: NodeId, input: NodeId, values: &'v [Held]) -> &'v Spec {
        let held = &values[input.index()];
        held.stored.as_ref().filter(|_| !passes(self.function.node(id))).unwrap_or(&held.spec)
    }

    /// The axes of each reduced dimension: those by which the inputs which have it are split, as far as they are free; of
    /// inputs that are split otherwise, those of the next one from the `first` on.
    fn split(&self, id: NodeId, first: usize, reduced: &[Dim], mut used: Vec<usize>, values: &[Held]) -> Axes {
        let node = self.function.node(id);
        let types = self.function.input_types(node);
        let axes_of = |input: NodeId, at: usize| self.used(id, input, values).dims[at].clone();
        let mut of = |d: &Dim| {
            let inputs = node.inputs.iter().zip(&types);
            let inputs = inputs.clone().skip(first).chain(inputs.take(first));
            let all = inputs.filter_map(|(i, t)| Some(axes_of(*i, t.dims.iter().position(|e| e == d)?)));
            let free = all.map(|axes| axes.into_iter().filter(|a| !used.contains(a)).collect::<Vec<_>>());
            let axes = free.into_iter().find(|axes| !axes.is_empty()).unwrap_or_default();
            let enough = self.placement.chunks(d) >= self.placement.shards(&axes);
            let axes = if enough { axes } else { vec![] };
            used.extend(&axes);
            axes
        };
        reduced.iter().map(&mut of).collect()
    }

    /// The way along reduced dimensions that are split so.
    fn along(&self, dims: &[Dim], spec: Spec, reduced: Axes, ty: &Type) -> Way {
        let at = self.placement.regions(ty, &spec);
        if dims.is_empty() {
            return Way { spec, reduced, at, sum: None };
        }
        let (mut iterated, mut owned) = (vec![], vec![]);
        for (device, mut region) in at.into_iter().enumerate() {
            let mut chunks = vec![];
            for (d, axes) in dims.iter().zip(&reduced) {
                region = region.with(&d.name, self.placement.owned(d, axes, device));
                chunks.push(self.placement.owned_chunks(d, axes, device));
            }
            owned.push(chunks);
            iterated.push(region);
        }
        let tree = self.placement.program.chunking.tree(dims);
        Way { spec, reduced, at: iterated, sum: Some(Arc::new(Sum { tree, owned })) }
    }

    /// Bytes that all devices together receive if a node is computed so: of its inputs, of parts of sums, of the result.
    fn traffic(&self, id: NodeId, way: &Way, regions: &[Region], values: &[Held]) -> usize {
        let node = self.function.node(id);
        let (op, types) = (node.op.op(), self.function.input_types(node));
        let mut bytes = 0;
        for (i, input) in node.inputs.iter().enumerate() {
            let from = &values[input.index()];
            let needed: Vec<Region> = way.at.iter().map(|at| needs(op, i, &types, &node.ty, at)).collect();
            let needed = self.alike.list(needed);
            // What was moved before is there.
            if self.there(from.value, &needed, self.again(from, id)).is_none() {
                bytes += missing(&self.out.values[from.value.index()].regions, &needed) * types[i].dtype.bytes();
            }
        }
        let (nodes, groups, computed) =
            (self.nodes(way), self.groups(way), self.placement.regions(&node.ty, &way.spec));
        let done = self.done(&computed, regions);
        for (d, group) in groups.iter().enumerate() {
            let others: usize = group.iter().filter(|e| **e != d).map(|e| nodes[*e]).sum();
            // An all-reduce goes by segments, and each device sends its own to the others.
            let elements = if computed[d] == done[d] {
                (others + group.len() - 1) * done[d].elements() / group.len()
            } else {
                others * done[d].elements()
            };
            bytes += elements * node.ty.dtype.bytes();
        }
        bytes += missing(done, regions) * node.ty.dtype.bytes();
        bytes
    }
}

/// Whether a node is of the forward or the backward pass.
fn passes(node: &Node) -> bool {
    matches!(node.role, Role::Forward | Role::Backward)
}

/// How many elements devices lack of what they need.
fn missing(held: &[Region], needed: &[Region]) -> usize {
    let both = held.iter().zip(needed);
    both.map(|(held, needed)| needed.elements() - needed.intersect(held).elements()).sum()
}

/// What an op reads of input `i` for `at`: nothing for nothing.
fn needs(op: &dyn Op, i: usize, types: &[&Type], output: &Type, at: &Region) -> Region {
    if at.is_empty() { Region::nothing(types[i]) } else { op.needs(i, types, output, at) }
}

impl fmt::Display for SpmdProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for i in &self.instrs {
            let out = &self.values[i.output.index()];
            let name = match &i.op {
                SpmdOp::Compute { prim, .. } => prim.op().name(),
                SpmdOp::Move => "move",
                SpmdOp::AllReduce { .. } if self.values[i.inputs[0].index()].regions != out.regions => "reduce-scatter",
                SpmdOp::AllReduce { .. } => "all-reduce",
                SpmdOp::Join { .. } => "join",
            };
            let inputs: Vec<String> = i.inputs.iter().map(|v| format!("%{}", v.0)).collect();
            writeln!(f, "%{} = {name}({}) : {} {}", i.output.0, inputs.join(", "), out.ty, out.regions[0])?;
        }
        Ok(())
    }
}
