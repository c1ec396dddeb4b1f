//! The parts of a function that are split in one way each: the blocks of the model, or where it has none the first parts
//! of its scopes. Whatever belongs to no such part follows the rules for every tensor.

use super::outline::{Kind, Outline, Stored};
use super::split::{Shape, Splits};
use crate::dim::Name;
use crate::hash::Quick;
use crate::layout::Section;
use crate::ops::Prim;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Dimensions of a segment that are tried, at the most.
const TRIED: usize = 6;

/// A value that a segment's nodes take, by kind of the node that makes it, with those that take it: kind and which input.
pub type Uses = (usize, Vec<(usize, usize)>);

/// What lies in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kept {
    /// Its kind of node.
    pub kind: usize,
    /// From which of the segment's steps on it is there.
    pub from: usize,
    /// What reads it: at which of the segment's steps, in which phase, and by which kind and input where it may be moved.
    pub readers: Vec<(usize, u8, Option<(usize, usize)>)>,
    /// The phase in which it is made: 0 and 1, forward and backward of the first micro-batch, which stands for all; 2, those
    /// of the others; 3, the update.
    pub phase: u8,
    /// Whether making the block again makes it again.
    pub inside: bool,
}

/// A segment, as far as time and memory depend on it: those that are alike share their tables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Content {
    /// Kinds of its nodes that sum or take from others, and how many there are.
    pub nodes: Vec<(usize, usize)>,
    /// Kinds of its steps.
    pub steps: Vec<(usize, usize)>,
    /// What its nodes take of one another, as far as that may move.
    pub uses: Vec<(Uses, usize)>,
    /// The same of what its block would make again.
    pub again: (Vec<(usize, usize)>, Vec<(usize, usize)>, Vec<(Uses, usize)>),
    /// Its variables.
    pub variables: Vec<(Shape, usize)>,
    /// What lies in memory.
    pub kept: Vec<Kept>,
    /// How many steps it has.
    pub length: usize,
    /// The dimensions of its tensors, with the most chunks that one has.
    pub chunks: BTreeMap<usize, usize>,
}

/// Sets of dimensions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Choices {
    /// The sets.
    pub sets: Vec<Vec<usize>>,
    /// How many of them are the largest ones.
    pub largest: usize,
}

/// A segment.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    /// The first parts of the scopes in it; none: what belongs to no other segment.
    pub scopes: Vec<Name>,
    /// The block that it is.
    pub block: Option<Name>,
    /// What is in it.
    pub content: Content,
    /// Sets of dimensions that may lie on one axis, no two of which any tensor of the segment has: first the largest ones,
    /// then parts of them.
    pub choices: Choices,
    /// The first segment with that content and those choices.
    pub alike: usize,
}

/// A function in segments.
pub struct Segments {
    /// The segments; the first one has what belongs to no other one.
    pub list: Vec<Segment>,
    /// By two segments: what nodes of the second one take from the first one.
    pub between: BTreeMap<(usize, usize), Vec<Uses>>,
}

/// The scope that decides on a path's segment: a block's name, or the path's first part.
fn head<'p>(path: &'p str, blocks: &BTreeSet<&str>) -> &'p str {
    let ends = path.match_indices('/').map(|(i, _)| i).chain([path.len()]);
    let own = ends.map(|end| &path[..end]).find(|p| blocks.contains(p));
    own.unwrap_or_else(|| path.split('/').next().unwrap_or_default())
}

fn counted<T: std::hash::Hash + Eq + Clone>(list: impl IntoIterator<Item = T>) -> Vec<(T, usize)> {
    let (mut at, mut out): (HashMap<T, usize, Quick>, Vec<(T, usize)>) = Default::default();
    for item in list {
        let next = out.len();
        match at.entry(item.clone()) {
            std::collections::hash_map::Entry::Occupied(o) => out[*o.get()].1 += 1,
            std::collections::hash_map::Entry::Vacant(v) => {
                v.insert(next);
                out.push((item, 1));
            }
        }
    }
    out
}

impl Segments {
    /// The segments of a function.
    pub fn new(outline: &Outline) -> Segments {
        let function = outline.function;
        let blocks: BTreeSet<&str> = function.blocks.iter().map(|b| &*b.name).collect();
        // Scopes beside a block's own that are in it all the same belong to it.
        let mut adopted: BTreeMap<&str, &str> = BTreeMap::new();
        for b in &function.blocks {
            for n in &b.inside {
                let head = head(&function.node(*n).scope, &blocks);
                if !head.is_empty() {
                    adopted.entry(head).or_insert(&b.name);
                }
            }
        }
        let owns: BTreeSet<&str> = outline.program.variables.iter().map(|v| head(&v.name, &blocks)).collect();
        let name = |path: &'_ str| -> Option<String> {
            let head = head(path, &blocks);
            let segment = adopted.get(head).copied().unwrap_or(head);
            (!segment.is_empty() && (owns.contains(head) || adopted.contains_key(head))).then(|| segment.to_string())
        };
        let mut list = vec![Segment::default()];
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut of_path: HashMap<Name, usize, Quick> = HashMap::default();
        let mut of = |path: &Name, list: &mut Vec<Segment>| {
            *of_path.entry(path.clone()).or_insert_with(|| match name(path) {
                None => 0,
                Some(segment) => {
                    let at = *known.entry(segment.clone()).or_insert_with(|| {
                        let block = function.blocks.iter().find(|b| *b.name == *segment).map(|b| b.name.clone());
                        list.push(Segment { block, ..Segment::default() });
                        list.len() - 1
                    });
                    let head = Name::from(head(path, &blocks));
                    if !list[at].scopes.contains(&head) {
                        list[at].scopes.push(head);
                    }
                    at
                }
            })
        };
        let segment_of: Vec<usize> = function.nodes.iter().map(|n| of(&n.scope, &mut list)).collect();
        let reads: BTreeSet<_> = function.variables().into_iter().collect();
        let mut variables: Vec<Vec<Shape>> = vec![vec![]; list.len()];
        for (i, v) in outline.program.variables.iter().enumerate() {
            let segment = of(&v.name, &mut list);
            variables.resize(list.len(), vec![]);
            if reads.contains(&crate::program::VarId(i as u32)) {
                variables[segment].push(outline.dims.shape(&v.ty, v.role.section(), &[]));
            }
        }
        let mut segments = Segments { list, between: BTreeMap::new() };
        segments.fill(outline, &segment_of, variables);
        let mut first: HashMap<(&Content, &Choices), usize, Quick> = HashMap::default();
        let alike = segments.list.iter().enumerate().map(|(i, s)| *first.entry((&s.content, &s.choices)).or_insert(i));
        let alike: Vec<usize> = alike.collect();
        segments.list.iter_mut().zip(alike).for_each(|(s, alike)| s.alike = alike);
        segments
    }

    fn fill(&mut self, outline: &Outline, segment_of: &[usize], variables: Vec<Vec<Shape>>) {
        let function = outline.function;
        let count = self.list.len();
        let mut inside = vec![false; function.nodes.len()];
        for b in &function.blocks {
            b.inside.iter().for_each(|n| inside[n.index()] = true);
        }
        let has_dims = |n: usize| outline.kinds[outline.kind_of[n]].own.shape.dims() != Splits::default();
        // By value: who takes it, segment by segment.
        let mut takers: BTreeMap<(usize, usize), Vec<(usize, usize, usize)>> = BTreeMap::new();
        for (i, node) in function.nodes.iter().enumerate() {
            for (input, from) in node.inputs.iter().enumerate().filter(|(_, n)| has_dims(n.index())) {
                takers.entry((from.index(), segment_of[i])).or_default().push((i, outline.kind_of[i], input));
            }
        }
        let (mut uses, mut again): (Vec<Vec<Uses>>, Vec<Vec<Uses>>) = (vec![vec![]; count], vec![vec![]; count]);
        for ((from, to), by) in &takers {
            let kind = outline.kind_of[*from];
            let uses_of = |only: &dyn Fn(usize, usize, usize) -> bool| {
                let of = by.iter().filter(|(i, kind, input)| only(*i, *kind, *input));
                let mut all: Vec<(usize, usize)> = of.map(|(_, kind, input)| (*kind, *input)).collect();
                all.sort_unstable();
                all.dedup();
                (!all.is_empty()).then_some((kind, all))
            };
            if segment_of[*from] != *to {
                self.between.entry((segment_of[*from], *to)).or_default().extend(uses_of(&|_, _, _| true));
                continue;
            }
            let may_move = |kind: usize, input: usize| outline.kinds[kind].may_move(input);
            again[*to].extend(uses_of(&|i, kind, input| inside[i] && may_move(kind, input)));
            uses[*to].extend(uses_of(&|_, kind, input| may_move(kind, input)));
        }
        let nodes_of = |s: usize, only: &dyn Fn(usize) -> bool| {
            let own = (0..function.nodes.len()).filter(|i| segment_of[*i] == s && only(*i));
            let sums = own.map(|i| outline.kind_of[i]).filter(|k| !outline.kinds[*k].reduced.is_empty());
            counted(sums)
        };
        // By segment, its steps.
        let mut steps: Vec<Vec<usize>> = vec![vec![]; count];
        outline.groups.iter().enumerate().for_each(|(g, group)| steps[segment_of[group.node]].push(g));
        let phase = |g: usize| outline.turns.map(|turn| u8::from(g >= turn)).iter().sum();
        for (s, segment) in self.list.iter_mut().enumerate() {
            let works = |only: &dyn Fn(usize) -> bool| {
                counted(steps[s].iter().map(|g| &outline.groups[*g]).filter(|g| only(g.node)).map(|g| g.work))
            };
            let place = |g: usize| steps[s].partition_point(|own| *own < g);
            // Other micro-batches have what the first one has.
            let is_other = |v: &&Stored| phase(v.from) == 2 && v.readers.iter().all(|(g, _)| phase(*g) == 2);
            let own = outline.stored.iter().filter(|v| segment_of[v.node] == s && !is_other(v));
            let kept = own.map(|v| Kept {
                kind: outline.kind_of[v.node],
                from: place(v.from),
                phase: phase(v.from),
                inside: inside[v.node],
                readers: v
                    .readers
                    .iter()
                    .map(|(g, by)| (place(*g), phase(*g), by.map(|(n, input)| (outline.kind_of[n], input))))
                    .collect(),
            });
            segment.content = Content {
                nodes: nodes_of(s, &|_| true),
                steps: works(&|_| true),
                uses: counted(std::mem::take(&mut uses[s])),
                again: (nodes_of(s, &|i| inside[i]), works(&|i| inside[i]), counted(std::mem::take(&mut again[s]))),
                variables: counted(variables[s].iter().cloned()),
                kept: kept.collect(),
                length: steps[s].len(),
                chunks: BTreeMap::new(),
            };
            let own = (0..function.nodes.len()).filter(|i| segment_of[*i] == s);
            for i in own.clone() {
                for e in &outline.kinds[outline.kind_of[i]].own.shape.extents {
                    let most = e.at.map(|at| segment.content.chunks.entry(at).or_insert(1));
                    most.into_iter().for_each(|n| *n = e.chunks.max(*n));
                }
            }
            segment.choices = choices(outline, own);
        }
    }
}

/// The sets of dimensions that may lie on one axis: the largest sets of those that never meet, and single ones.
fn choices(outline: &Outline, nodes: impl Iterator<Item = usize>) -> Choices {
    let mut weight: BTreeMap<usize, f64> = BTreeMap::new();
    // Only dimensions of activations: of variables ZeRO splits any.
    let is_given = |k: &Kind| matches!(k.op, Prim::Read(_) | Prim::Cast(_));
    let mut meet: BTreeSet<(usize, usize)> = BTreeSet::new();
    for (kind, n) in counted(nodes.map(|i| outline.kind_of[i])) {
        let k = &outline.kinds[kind];
        let work = (k.flops + k.ty.elements() as f64) * n as f64;
        for shape in k.inputs.iter().map(|s| &s.shape).chain([&k.own.shape]) {
            let dims: Vec<usize> = shape.extents.iter().filter_map(|e| e.at).collect();
            for d in &dims {
                meet.extend(dims.iter().filter(|e| *e != d).map(|e| (*d, *e)));
            }
        }
        let own = k.own.shape.extents.iter().filter_map(|e| e.at);
        if k.own.shape.section == Section::Activations && !is_given(k) {
            own.for_each(|d| *weight.entry(d).or_default() += work);
        }
    }
    let mut dims: Vec<(usize, f64)> = weight.into_iter().collect();
    dims.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let dims: Vec<usize> = dims.into_iter().take(TRIED).map(|(d, _)| d).collect();
    let mut sets: Vec<Vec<usize>> = vec![];
    for bits in 1u32..1 << dims.len() {
        let set: Vec<usize> = (0..dims.len()).filter(|i| bits >> i & 1 == 1).map(|i| dims[i]).collect();
        let apart = |d: &usize| set.iter().all(|e| e == d || !meet.contains(&(*d, *e)));
        let could_grow = dims.iter().any(|d| !set.contains(d) && set.iter().all(|e| !meet.contains(&(*d, *e))));
        if set.iter().all(apart) && !could_grow {
            sets.push(set);
        }
    }
    let largest = sets.len();
    let single: Vec<Vec<usize>> = dims.iter().map(|d| vec![*d]).filter(|s| !sets.contains(s)).collect();
    sets.extend(single);
    Choices { sets, largest }
}
