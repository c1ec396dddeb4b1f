//! What a function does, as far as time and memory depend on a layout: each kind of node and of step once, however many
//! layers have it.

use super::split::{DIMS, Dims, Sees, Shape};
use crate::dim::{Dim, Name, Type};
use crate::error::{Cause, Error};
use crate::graph::{Node, NodeId, Role};
use crate::hash::Quick;
use crate::layout::{Layout, Mesh};
use crate::ops::Prim;
use crate::pipeline;
use crate::placement::Placement;
use crate::plan::fuse::{self, Fused};
use crate::program::{Chunking, Function, Program};
use crate::spmd::{SpmdOp, ValueId, lower};
use std::collections::{BTreeMap, HashMap};
use std::thread;

/// A tensor as what reads it finds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The tensor.
    pub shape: Shape,
    /// Where it is a variable, or a cast of one: how that lies.
    pub stored: Option<Shape>,
    /// Whether it is cast where it lies.
    pub cast: bool,
    /// What of a way to split it it depends on.
    pub sees: Sees,
    /// Its number: sources alike have the same.
    pub number: usize,
}

/// The numbers of sources.
#[derive(Default)]
struct Sources(HashMap<(Shape, Option<Shape>, bool), usize, Quick>);

impl Sources {
    fn source(&mut self, shape: Shape, stored: Option<Shape>, cast: bool) -> Source {
        let sees = stored.iter().fold(shape.sees(), |sees, s| sees.or(s.sees()));
        let next = self.0.len();
        let number = *self.0.entry((shape.clone(), stored.clone(), cast)).or_insert(next);
        Source { shape, stored, cast, sees, number }
    }
}

/// A kind of node: those of one kind take the same time on any layout.
#[derive(Clone, Debug)]
pub struct Kind {
    /// The op.
    pub op: Prim,
    /// Whether it belongs to the forward or backward pass.
    pub passes: bool,
    /// What it gives.
    pub own: Source,
    /// What it takes.
    pub inputs: Vec<Source>,
    /// Types of what it takes.
    pub types: Vec<Type>,
    /// Type of what it gives.
    pub ty: Type,
    /// The dimensions it sums over.
    pub reduced: Vec<Dim>,
    /// By such a dimension: which inputs have it, and as which of their own.
    pub reduced_at: Vec<Vec<(usize, usize)>>,
    /// Operations that kernels do for all of it.
    pub flops: f64,
    /// What of a way to split it it depends on.
    pub sees: Sees,
}

impl Kind {
    /// Counts its operations.
    fn count(&mut self, chunking: &Chunking) {
        let (op, types, tree) = (self.op.op(), self.types.iter().collect::<Vec<_>>(), chunking.tree(&self.reduced));
        self.flops = op.kernel_share(&types, &self.ty, Some(&tree)) * op.flops(&types, &self.ty) as f64;
    }
    /// Whether what it takes of an input may lie otherwise than it needs that, where both are of a segment that is split in
    /// one way: what is as large and computed element by element lies where it is taken.
    pub fn may_move(&self, input: usize) -> bool {
        let taken = &self.inputs[input];
        let stays = self.op.op().elementwise() && taken.shape == self.own.shape;
        !stays || taken.stored.is_some() || self.own.stored.is_some()
    }
}

/// How a step goes, as [`fuse::Kind`] has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// A loop.
    Map,
    /// A loop whose results are sums.
    Reduce,
    /// An op.
    Op,
    /// An op with a loop behind it, which reduces some of its results or not.
    Epilogue(bool),
    /// Steps of these kinds, slice by slice.
    Band(Vec<usize>),
}

/// A kind of step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Work {
    /// How it goes.
    pub form: Form,
    /// The kind of node that says how far it goes.
    pub kind: usize,
    /// Of a product with an epilogue or of an op, what the loop behind it gives, by kind of node.
    pub then: Option<usize>,
    /// Operations at each point of its loop.
    pub arithmetic: usize,
    /// What its loop loads.
    pub loads: Vec<Shape>,
    /// What it stores.
    pub stores: Vec<Shape>,
    /// What of a way to split it it depends on.
    pub sees: Sees,
}

/// A step of the function on one device.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its kind.
    pub work: usize,
    /// Its first node.
    pub node: usize,
}

/// A value that lies in memory of the function's own.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its node.
    pub node: usize,
    /// The step that makes it.
    pub from: usize,
    /// What reads it: the step, and the node and which of its inputs, where that may be moved first.
    pub readers: Vec<(usize, Option<(usize, usize)>)>,
}

/// A function in kinds.
#[derive(Clone)]
pub struct Outline<'a> {
    /// The function.
    pub function: &'a Function,
    /// The program.
    pub program: &'a Program,
    /// The dimensions that may be split.
    pub dims: Dims<'a>,
    /// Kinds of nodes.
    pub kinds: Vec<Kind>,
    /// By node: its kind.
    pub kind_of: Vec<usize>,
    /// Kinds of steps.
    pub works: Vec<Work>,
    /// The steps.
    pub groups: Vec<Group>,
    /// What lies in memory.
    pub stored: Vec<Stored>,
    /// By node: the micro-batch that it is for; None where it is for none, or for all.
    pub parts: Vec<Option<usize>>,
    /// The first step of the backward pass, the first one behind that of the first micro-batch, and the first one behind
    /// those of all.
    pub turns: [usize; 3],
}

/// What tells kinds of nodes from one another.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    op: String,
    passes: bool,
    own: Source,
    inputs: Vec<Source>,
}

/// The dimensions that are worth splitting, in however many chunks: of the forward pass, those of the most elements.
fn worth_splitting(program: &Program, function: &Function) -> Vec<Name> {
    let mut any = program.chunking.clone();
    any.chunks = usize::MAX;
    let mut weight: BTreeMap<&Name, f64> = BTreeMap::new();
    for node in &function.nodes {
        let types = function.input_types(node);
        let flops = node.op.op().flops(&types, &node.ty) as f64;
        for d in types.iter().flat_map(|t| &t.dims).chain(&node.ty.dims) {
            if any.count(&d.name, d.size) > 1 {
                *weight.entry(&d.name).or_default() += flops + node.ty.elements() as f64;
            }
        }
    }
    let mut names: Vec<(&Name, f64)> = weight.into_iter().collect();
    names.sort_by(|a, b| b.1.total_cmp(&a.1));
    names.into_iter().take(DIMS).map(|(n, _)| n.clone()).collect()
}

impl<'a> Outline<'a> {
    /// The outline of a function, on devices with so many threads: 0 for no bands.
    ///
    /// # Errors
    /// A tensor with rules of its own, which are for some mesh.
    pub fn new(program: &'a Program, function: &'a Function, threads: usize) -> Result<Outline<'a>, Error> {
        let split = |n: &&Node| n.layout.as_ref().is_some_and(|l| l.parse::<Layout>().is_ok_and(|l| !l.is_empty()));
        if let Some(node) = function.nodes.iter().find(split) {
            let what = "a search for a layout where a tensor has rules of its own".into();
            let help = "take its `with_layout` out, or give a layout yourself".into();
            return Err(Error::from(Cause::NotYet { what, help }).at(node.place));
        }
        let dims = Dims { names: worth_splitting(program, function), chunking: &program.chunking };
        let mut outline = Outline {
            function,
            program,
            dims,
            kinds: vec![],
            kind_of: vec![],
            works: vec![],
            groups: vec![],
            stored: vec![],
            parts: pipeline::parts(function),
            turns: [0; 3],
        };
        // Two things that do not need each other, and that a search waits for.
        let spmd = thread::scope(|scope| {
            let (mesh, layout) = (Mesh::single(), Layout::default());
            let lowering = scope.spawn(move || lower(function, &Placement::new(&mesh, &layout, program)));
            outline.nodes();
            lowering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        outline.steps(&Fused::new(&spmd, threads));
        Ok(outline)
    }

    /// The outline of a program that differs in how many chunks there are, which nothing but those of each tensor, and how sums
    /// are computed, depends on:
    /// one device has all of them, so that it has the same steps.
    ///
    /// # Errors
    /// A program without the function.
    pub fn in_chunks_of(&self, program: &'a Program) -> Result<Outline<'a>, Error> {
        let (function, chunking) = (program.function(&self.function.name)?, &program.chunking);
        let dims = Dims { names: self.dims.names.clone(), chunking };
        let mut outline = Outline { function, program, dims, ..self.clone() };
        let sources = outline.kinds.iter_mut().flat_map(|k| k.inputs.iter_mut().chain([&mut k.own]));
        let of_nodes = sources.flat_map(|s| s.stored.iter_mut().chain([&mut s.shape]));
        let of_steps = outline.works.iter_mut().flat_map(|w| w.loads.iter_mut().chain(&mut w.stores));
        let extents = of_nodes.chain(of_steps).flat_map(|shape| &mut shape.extents);
        extents.for_each(|e| e.chunks = chunking.count(&e.dim.name, e.dim.size));
        outline.kinds.iter_mut().for_each(|k| k.count(chunking));
        Ok(outline)
    }

    /// The most chunks that a dimension has.
    pub fn most_chunks(&self) -> usize {
        let all = self.kinds.iter().flat_map(|k| &k.own.shape.extents).filter(|e| e.at.is_some());
        all.map(|e| e.chunks).max().unwrap_or(1)
    }

    fn source(&self, id: NodeId, known: &mut Sources) -> Source {
        let node = self.function.node(id);
        let types = self.function.input_types(node);
        let whole: Vec<Name> = match node.layout {
            Some(_) => node.ty.dims.iter().map(|d| d.name.clone()).collect(),
            None => node.op.op().whole(&types, &node.ty).into_iter().map(|(name, _)| name).collect(),
        };
        let shape = self.dims.shape(&node.ty, node.role.section(), &whole);
        let mut from = node;
        while let (Prim::Cast(_), Some(input)) = (&from.op, from.inputs.first()) {
            from = self.function.node(*input);
        }
        let stored = match &from.op {
            Prim::Read(r) => {
                let section = self.program.variables[r.var.index()].role.section();
                Some(self.dims.shape(&node.ty, section, &[]))
            }
            _ => None,
        };
        known.source(shape, stored, matches!(node.op, Prim::Cast(_)))
    }

    fn nodes(&mut self) {
        let mut known: HashMap<Key, usize, Quick> = HashMap::default();
        let mut numbers = Sources::default();
        let source = |i| self.source(NodeId(i as u32), &mut numbers);
        let sources: Vec<Source> = (0..self.function.nodes.len()).map(source).collect();
        for (i, node) in self.function.nodes.iter().enumerate() {
            let op = node.op.op();
            let mut own = sources[i].clone();
            // What is set lies as its variable does; what only computes element by element is told by what it is called.
            let name = match &node.op {
                Prim::Assign(a) => {
                    let section = self.program.variables[a.var.index()].role.section();
                    own = numbers.source(self.dims.shape(&node.ty, section, &[]), own.stored, own.cast);
                    op.name().to_string()
                }
                Prim::Read(_) | Prim::Input(_) | Prim::Random(_) | Prim::Constant(_) => op.name().to_string(),
                _ if op.elementwise() && !matches!(node.op, Prim::Rename(_)) => op.name().to_string(),
                prim => format!("{prim:?}"),
            };
            let passes = matches!(node.role, Role::Forward | Role::Backward);
            let inputs: Vec<Source> = node.inputs.iter().map(|n| sources[n.index()].clone()).collect();
            let key = Key { op: name, passes, own, inputs };
            let next = self.kinds.len();
            let kind = *known.entry(key).or_insert_with_key(|key| {
                let types = self.function.input_types(node);
                let reduced = op.reduced(&types);
                let at = |d: &Dim| {
                    let inputs = types.iter().enumerate();
                    inputs.filter_map(|(i, t)| Some((i, t.dims.iter().position(|e| e == d)?))).collect()
                };
                let mut kind = Kind {
                    op: node.op.clone(),
                    passes,
                    own: key.own.clone(),
                    inputs: key.inputs.clone(),
                    reduced_at: reduced.iter().map(at).collect(),
                    reduced,
                    flops: 0.0,
                    types: types.into_iter().cloned().collect(),
                    ty: node.ty.clone(),
                    sees: key.inputs.iter().fold(key.own.sees, |sees, s| sees.or(s.sees)),
                };
                kind.count(&self.program.chunking);
                self.kinds.push(kind);
                next
            });
            self.kind_of.push(kind);
        }
    }

    /// The steps, as they are on a single device: what is fused there is fused on every mesh, as far as nothing moves.
    fn steps(&mut self, fused: &Fused) {
        let spmd = fused.spmd;
        let node_of = |v: ValueId| spmd.values[v.index()].node.index();
        let mut known: HashMap<Work, usize, Quick> = HashMap::default();
        let mut made: HashMap<ValueId, usize> = HashMap::new();
        let mut readers: HashMap<ValueId, Vec<(usize, Option<(usize, usize)>)>> = HashMap::new();
        for (g, group) in fused.groups.iter().enumerate() {
            let work = self.work(fused, group, &mut known);
            self.groups.push(Group { work, node: node_of(spmd.instrs[group.instrs[0]].output) });
            made.extend(group.outputs.iter().map(|v| (*v, g)));
            let members = match &group.kind {
                fuse::Kind::Band(members, _) => members,
                _ => std::slice::from_ref(group),
            };
            for member in members {
                let taken = taken(fused, member);
                for (i, v) in taken.iter().enumerate().filter(|(_, v)| group.inputs.contains(v)) {
                    let by = node_of(spmd.instrs[member.instrs[0]].output);
                    readers.entry(*v).or_default().push((g, Some((by, i))));
                }
                let loads = member.inputs.iter().filter(|v| group.inputs.contains(v) && !taken.contains(v));
                loads.for_each(|v| readers.entry(*v).or_default().push((g, None)));
            }
        }
        let end = fused.groups.len();
        for (_, v) in &spmd.outputs {
            readers.entry(fused.root(*v)).or_default().push((end, None));
        }
        for (_, v) in &spmd.inputs {
            made.insert(*v, 0);
            readers.entry(*v).or_default().push((end, None));
        }
        let set: Vec<ValueId> = spmd.assigns.iter().map(|(_, v)| fused.root(*v)).collect();
        let mut values: Vec<_> = made.into_iter().filter(|(v, _)| !set.contains(v)).collect();
        values.sort_unstable();
        let stored = values.into_iter().map(|(v, from)| Stored {
            node: node_of(v),
            from,
            readers: readers.remove(&v).unwrap_or_default(),
        });
        self.stored = stored.collect();
        let role = |g: &Group| self.function.nodes[g.node].role;
        let is_backward = |g: &Group| matches!(role(g), Role::Backward | Role::Gradient);
        let back = self.groups.iter().position(is_backward).unwrap_or(end);
        let behind = self.groups.iter().rposition(is_backward).map_or(end, |g| g + 1);
        let is_next = |g: &Group| self.parts[g.node].is_some_and(|part| part > 0);
        let next = self.groups[back..behind].iter().position(is_next).map_or(behind, |g| back + g);
        self.turns = [back, next, behind];
    }

    /// The kind of a step.
    fn work(&mut self, fused: &Fused, group: &fuse::Group, known: &mut HashMap<Work, usize, Quick>) -> usize {
        let instrs = &fused.spmd.instrs;
        let kind_of = |o: &Outline, v: ValueId| o.kind_of[fused.spmd.values[v.index()].node.index()];
        let shape_of = |v: &ValueId| self.kinds[kind_of(self, *v)].own.shape.clone();
        let kind = kind_of(self, instrs[group.instrs[0]].output);
        let taken = taken(fused, group);
        let loads: Vec<Shape> = group.inputs.iter().filter(|v| !taken.contains(v)).map(shape_of).collect();
        let stores: Vec<Shape> = group.outputs.iter().map(shape_of).collect();
        let (mut form, mut then, mut behind) = (Form::Op, None, &[][..]);
        match &group.kind {
            fuse::Kind::Instr => {}
            fuse::Kind::Map => (form, behind) = (Form::Map, &group.instrs[..]),
            fuse::Kind::Reduce => (form, behind) = (Form::Reduce, &group.instrs[..]),
            fuse::Kind::Epilogue => {
                let reduces = !fused.sums_of(group).0.is_empty();
                (form, then) = (Form::Epilogue(reduces), Some(kind_of(self, group.outputs[0])));
                behind = &group.instrs[1..];
            }
            fuse::Kind::Band(members, _) => {
                form = Form::Band(members.iter().map(|m| self.work(fused, m, known)).collect());
            }
        }
        let mut seen = vec![];
        let arithmetic = behind.iter().map(|i| inlined(fused, *i, &mut seen)).sum();
        let mut sees = loads.iter().chain(&stores).fold(self.kinds[kind].sees, |sees, s| sees.or(s.sees()));
        if let Form::Band(members) = &form {
            sees = members.iter().fold(sees, |sees, m| sees.or(self.works[*m].sees));
        }
        let work = Work { form, kind, then, arithmetic, loads, stores, sees };
        let next = self.works.len();
        *known.entry(work).or_insert_with_key(|work| {
            self.works.push(work.clone());
            next
        })
    }
}

/// What the op of a step takes from memory.
fn taken(fused: &Fused, group: &fuse::Group) -> Vec<ValueId> {
    match group.kind {
        fuse::Kind::Instr | fuse::Kind::Epilogue => {
            fused.spmd.instrs[group.instrs[0]].inputs.iter().map(|v| fused.root(*v)).collect()
        }
        fuse::Kind::Map | fuse::Kind::Reduce | fuse::Kind::Band(..) => vec![],
    }
}

/// Operations at each point of what an instruction computes, with what is computed on the way and not yet `seen`.
fn inlined(fused: &Fused, instr: usize, seen: &mut Vec<usize>) -> usize {
    if seen.contains(&instr) {
        return 0;
    }
    seen.push(instr);
    let instr = &fused.spmd.instrs[instr];
    let own = match &instr.op {
        SpmdOp::Compute { prim, .. } => usize::from(matches!(
            prim,
            Prim::Unary(_) | Prim::Binary(_) | Prim::Compare(_) | Prim::Select(_) | Prim::Reduce(_)
        )),
        SpmdOp::Move | SpmdOp::AllReduce { .. } | SpmdOp::Join { .. } => 0,
    };
    let inputs = instr.inputs.iter().filter(|v| !fused.stored.contains(&fused.root(**v)));
    own + inputs.filter_map(|v| fused.producer[v.index()]).map(|i| inlined(fused, i, seen)).sum::<usize>()
}
