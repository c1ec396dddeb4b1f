//! Who owns what: what a layout's rules mean for the tensors of a program on a mesh.
//!
//! For each dimension of a tensor one rule decides: the tensor's own rules, if it has any, and no others; else the rules
//! of a scope before those of a section before those for every tensor, and of equals the last one.

mod why;

use crate::chunk::shard_chunks;
use crate::dim::{Dim, Name, Type};
use crate::error::{Cause, Error, Place, nearest};
use crate::graph::{Node, Role};
use crate::layout::{ANY, AT, Layout, Mesh, Pattern, Rule, Scoped, Section};
use crate::program::{Function, Program, Variable};
use crate::region::Region;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

/// The mesh axes of each of some dimensions, the outermost first; none where it is not split.
pub type Axes = Vec<Vec<usize>>;

/// How a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Spec {
    /// The axes of each of its dimensions.
    pub dims: Axes,
    /// Axes along which it lies at one place only, in order, each with the place.
    pub stage: Vec<(usize, usize)>,
}

/// A tensor as rules see it.
pub struct Subject<'a> {
    what: &'a str,
    pub(crate) ty: &'a Type,
    section: Section,
    /// Where it is: a scope matches it that matches one of these.
    paths: Vec<&'a str>,
    /// Rules of its own.
    pub(crate) own: Option<&'a str>,
    /// Dimensions that must not be split, with the reason.
    pub(crate) whole: Vec<(Name, &'static str)>,
    place: Place,
}

/// The path around a path.
pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl<'a> Subject<'a> {
    /// A variable, as it lies between steps. It is found by its own path, by that of the variable whose slot it is, and
    /// by the module's.
    pub fn variable(v: &'a Variable) -> Subject<'a> {
        let mut paths = vec![&*v.name, parent(&v.name)];
        if v.role != Role::Variable {
            paths.push(parent(paths[1]));
        }
        let (section, own, whole) = (v.role.section(), None, vec![]);
        Subject { what: "variable", ty: &v.ty, section, paths, own, whole, place: v.place }
    }

    /// A node's result.
    pub fn node(function: &Function, node: &'a Node) -> Subject<'a> {
        let op = node.op.op();
        let mut paths = vec![&*node.scope];
        // What belongs to a variable is made in the variable's scope.
        if matches!(node.role, Role::Update | Role::Variable) {
            paths.push(parent(&node.scope));
        }
        Subject {
            what: op.name(),
            ty: &node.ty,
            section: node.role.section(),
            paths,
            own: node.layout.as_deref(),
            whole: op.whole(&function.input_types(node), &node.ty),
            place: node.place,
        }
    }

    fn is_in(&self, scope: Option<&Pattern>) -> bool {
        scope.is_none_or(|pattern| self.paths.iter().any(|path| pattern.matches(path)))
    }

    fn is_of(&self, section: Option<Section>) -> bool {
        section.is_none_or(|s| s == self.section)
    }
}

/// The tensors of a program; those of the functions that the user wrote come first, for the places. Of those that are alike
/// to rules, the first one stands for all.
pub(crate) fn subjects(program: &Program) -> Vec<Subject<'_>> {
    let functions = program.functions.values().filter(|f| f.name != "init");
    let nodes = functions.flat_map(|f| f.nodes.iter().map(|n| Subject::node(f, n)));
    let mut seen = HashSet::new();
    let all = nodes.chain(program.variables.iter().map(Subject::variable));
    all.filter(|s| seen.insert((&s.ty.dims, s.section, s.paths.clone(), s.own, s.whole.clone()))).collect()
}

/// The tensors that a rule is for. A program without any of its section has none to be wrong about: all in its scope.
fn among<'s, 'a>(subjects: &'s [Subject<'a>], s: Scoped) -> Vec<&'s Subject<'a>> {
    let inside = || subjects.iter().filter(|t| t.is_in(s.scope));
    let exact: Vec<_> = inside().filter(|t| t.is_of(s.section)).collect();
    if exact.is_empty() { inside().collect() } else { exact }
}

/// Whether a rule says something of one of these tensors.
fn says(subjects: &[Subject], s: Scoped) -> bool {
    among(subjects, s).iter().any(|t| s.rule.is_for_all() || t.ty.has(&s.rule.dim))
}

impl Layout {
    /// The rules that concern a part of a program. One that names nothing in the whole of it stays, to be refused.
    pub fn of(&self, part: &Program, whole: &Program) -> Layout {
        let (part, whole) = (subjects(part), subjects(whole));
        self.mapped(&|s| (says(&part, s) || !says(&whole, s)).then(|| s.rule.clone()))
    }

    /// Checks the rules against mesh and program.
    ///
    /// # Errors
    /// A rule that names an axis the mesh does not have, a scope in which there is nothing or a dimension that no tensor
    /// there has; at the place of the first tensor with the rule's dimension (or the one that is nearest).
    pub fn check(&self, mesh: &Mesh, program: &Program) -> Result<(), Error> {
        let all = subjects(program);
        for s in self.scoped() {
            let rule = s.to_string();
            let tensors = among(&all, s);
            let mut dims: BTreeMap<&str, Place> = BTreeMap::new();
            for t in &tensors {
                t.ty.dims.iter().for_each(|d| {
                    dims.entry(&*d.name).or_insert(t.place);
                });
            }
            let dim = &s.rule.dim;
            let here = |dim: Option<&str>, e: Error| match dim.and_then(|d| dims.get(d)) {
                Some(place) => e.at(*place),
                None => e,
            };
            check_axes(s.rule, &rule, mesh).map_err(|e| here(Some(&**dim), e))?;
            if let Some(pattern) = s.scope.filter(|_| tensors.is_empty()) {
                let paths = all
                    .iter()
                    .flat_map(|t| &t.paths)
                    .flat_map(|p| std::iter::successors(Some(*p), |p| Some(parent(p)).filter(|p| !p.is_empty())));
                let sections = Section::ALL.map(|s| s.to_string());
                let near = nearest(pattern.core(), paths.chain(sections.iter().map(String::as_str)));
                let (scope, nearest) = (pattern.to_string().into(), near.map(Name::from));
                return Err(Cause::UnknownScope { rule, scope, nearest }.into());
            }
            if !s.rule.is_for_all() && !dims.contains_key(&**dim) {
                let lacking = match (s.section, s.scope) {
                    (None, None) => "no tensor of the program has".into(),
                    (Some(section), None) => format!("none of the {section} has"),
                    (None, Some(scope)) => format!("no tensor in `{scope}` has"),
                    (Some(section), Some(scope)) => format!("none of the {section} in `{scope}` has"),
                };
                let near = nearest(dim, dims.keys().copied());
                let cause = Cause::UnknownDimension { rule, dim: dim.clone(), lacking, nearest: near.map(Name::from) };
                let mut e = here(near, cause.into());
                if dims.len() <= 40 {
                    e = e.note(format!("the dimensions are {}", dims.into_keys().collect::<Vec<_>>().join(", ")));
                }
                return Err(e);
            }
        }
        Ok(())
    }
}

fn check_axes(rule: &Rule, text: &str, mesh: &Mesh) -> Result<(), Error> {
    if let (Some(at), Some(axis)) = (rule.at, rule.axes.first().and_then(|a| mesh.axis(a))) {
        let (axis, size) = mesh.axes()[axis].clone();
        if at >= size {
            return Err(Cause::NoSuchStage { rule: text.into(), axis, size }.into());
        }
    }
    match rule.axes.iter().find(|a| mesh.axis(a).is_none()) {
        Some(axis) => {
            let near = nearest(axis, mesh.axes().iter().map(|(n, _)| &**n)).map(Name::from);
            let (rule, mesh) = (text.to_string(), mesh.to_string());
            Err(Cause::UnknownAxis { rule, axis: axis.clone(), mesh, nearest: near }.into())
        }
        None => Ok(()),
    }
}

/// A mesh with the rules that apply to a program: answers who owns what.
pub struct Placement<'a> {
    /// The mesh.
    pub mesh: &'a Mesh,
    /// The program.
    pub program: &'a Program,
    rules: Vec<Scoped<'a>>,
}

impl<'a> Placement<'a> {
    /// The rules of a layout that [`Layout::check`] has found nothing wrong with.
    pub fn new(mesh: &'a Mesh, layout: &'a Layout, program: &'a Program) -> Placement<'a> {
        Placement { mesh, program, rules: layout.scoped().collect() }
    }

    /// The rule that decides on a dimension of a tensor.
    pub(crate) fn deciding<'s>(&'s self, own: Option<&'s Layout>, t: &Subject, dim: &str) -> Option<Scoped<'s>> {
        if let Some(own) = own {
            let rule = own.rules.iter().find(|r| r.dim == *dim)?;
            return Some(Scoped { section: None, scope: None, rule });
        }
        let rules = self.rules.iter().enumerate();
        let hold = rules.filter(|(_, s)| s.rule.dim == *dim && t.is_of(s.section) && t.is_in(s.scope));
        hold.max_by_key(|(i, s)| (s.scope.is_some(), s.section.is_some(), *i)).map(|(_, s)| *s)
    }

    /// Whether a rule says that a dimension may be whole where a tensor is made or used: one that gives way, or splits nothing,
    /// or rules of the tensor's own.
    pub(crate) fn may_be_whole(&self, t: &Subject, dim: &str) -> bool {
        t.own.is_some() || self.deciding(None, t, dim).is_some_and(|s| s.rule.optional || s.rule.axes.is_empty())
    }

    /// Whether there are rules by which blocks go round.
    pub(crate) fn has_rings(&self) -> bool {
        self.rules.iter().any(|s| s.rule.ring)
    }

    /// The rule by which blocks of a tensor along a dimension go round where all of it would be gathered.
    pub(crate) fn ring(&self, t: &Subject, dim: &str) -> Option<Scoped<'_>> {
        if t.own.is_some() {
            return None;
        }
        self.deciding(None, t, dim).filter(|s| s.rule.ring && !self.axes(s.rule).is_empty())
    }

    /// How a tensor is split: by its own rules if it has any, else by the layout's; never along dimensions that its op
    /// needs whole.
    ///
    /// # Errors
    /// Two dimensions on one axis, more shards than chunks, a mistyped rule of the tensor's own.
    pub fn spec(&self, t: &Subject) -> Result<Spec, Error> {
        let own: Option<Layout> = t.own.map(str::parse).transpose().map_err(|e: Error| e.at(t.place))?;
        if let Some(own) = &own {
            self.check_own(own, t).map_err(|e| e.at(t.place))?;
        }
        let dims = &t.ty.dims;
        let whole = |d: &Dim| t.whole.iter().any(|(dim, _)| *dim == d.name);
        let rule = |d: &Dim| Some(self.deciding(own.as_ref(), t, &d.name).filter(|_| !whole(d))?.rule);
        let rules: Vec<Option<&Rule>> = dims.iter().map(rule).collect();
        let mut spec = Spec { dims: vec![vec![]; dims.len()], stage: self.stage(own.as_ref(), t) };
        // Rules that may be passed over come after those that may not, and a dimension that is chosen comes last.
        for optional in [false, true] {
            for (i, rule) in rules.iter().enumerate() {
                let Some(rule) = rule.filter(|r| r.optional == optional) else { continue };
                let axes = self.axes(rule);
                match self.fits(t, &spec, i, &axes) {
                    Ok(()) => spec.dims[i] = axes,
                    Err(_) if optional => {}
                    Err(e) => return Err(e.at(t.place)),
                }
            }
        }
        if let Some(any) = self.deciding(own.as_ref(), t, ANY) {
            let axes = self.axes(any.rule);
            let free = |i: &usize| {
                let switched_off = rules[*i].is_some_and(|r| r.axes.is_empty()) || whole(&dims[*i]);
                spec.dims[*i].is_empty() && !switched_off && self.fits(t, &spec, *i, &axes).is_ok()
            };
            // Of equals the first by name, so that a tensor with its dimensions in another order is split alike.
            let chosen = (0..dims.len()).filter(free).max_by_key(|i| (dims[*i].size, Reverse(&dims[*i].name)));
            if let Some(i) = chosen {
                spec.dims[i] = axes;
            }
        }
        Ok(spec)
    }

    /// The axes along which a tensor lies at one place.
    fn stage(&self, own: Option<&Layout>, t: &Subject) -> Vec<(usize, usize)> {
        let axes = self.mesh.axes().iter().enumerate().filter(|(_, (_, size))| *size > 1);
        let at = |name: &Name| self.deciding(own, t, &format!("{AT}{name}"))?.rule.at;
        axes.filter_map(|(i, (name, _))| Some((i, at(name)?))).collect()
    }

    /// The mesh axes of a rule; those of size 1 split nothing.
    pub(crate) fn axes(&self, rule: &Rule) -> Vec<usize> {
        let axes = rule.axes.iter().filter_map(|a| self.mesh.axis(a));
        axes.filter(|a| self.mesh.axes()[*a].1 > 1).collect()
    }

    /// Whether dimension `i` can be split over axes beside what is split already.
    fn fits(&self, t: &Subject, spec: &Spec, i: usize, axes: &[usize]) -> Result<(), Error> {
        let d = &t.ty.dims[i];
        let name = |a: usize| &*self.mesh.axes()[a].0;
        let tensor = || format!("{} {}", t.what, t.ty);
        if let Some(&axis) = axes.iter().find(|a| spec.stage.iter().any(|(b, _)| b == *a)) {
            let (first, second) = (format!("{AT}{}", name(axis)).into(), d.name.clone());
            return Err(Cause::AxisTwice { tensor: tensor(), axis: name(axis).into(), first, second }.into());
        }
        for (first, taken) in spec.dims.iter().enumerate() {
            if let Some(&axis) = taken.iter().find(|a| axes.contains(a)) {
                let (first, second) = (t.ty.dims[first].name.clone(), d.name.clone());
                return Err(Cause::AxisTwice { tensor: tensor(), axis: name(axis).into(), first, second }.into());
            }
        }
        let (chunks, shards) = (self.chunks(d), self.shards(axes));
        if chunks < shards {
            let axis = axes.iter().map(|a| name(*a)).collect::<Vec<_>>().join("+").into();
            let (dim, size) = (d.name.clone(), d.size);
            return Err(Cause::MoreShardsThanChunks { tensor: tensor(), dim, size, chunks, axis, shards }.into());
        }
        Ok(())
    }

    fn check_own(&self, own: &Layout, t: &Subject) -> Result<(), Error> {
        if let Some((head, _)) = own.blocks.first() {
            let expected = "a rule for one tensor, which lies in one scope and one section".into();
            return Err(Cause::Syntax { text: format!("{head}{{..}}"), expected }.into());
        }
        for rule in &own.rules {
            check_axes(rule, &rule.to_string(), self.mesh)?;
            if !rule.is_for_all() && !t.ty.has(&rule.dim) {
                let nearest = nearest(&rule.dim, t.ty.dims.iter().map(|d| &*d.name)).map(Name::from);
                let lacking = format!("{} {} does not have", t.what, t.ty);
                let (rule, dim) = (rule.to_string(), rule.dim.clone());
                return Err(Cause::UnknownDimension { rule, dim, lacking, nearest }.into());
            }
        }
        Ok(())
    }

    /// The chunks of a dimension.
    pub fn chunks(&self, dim: &Dim) -> usize {
        self.program.chunking.count(&dim.name, dim.size)
    }

    /// Into how many shards axes split a dimension.
    pub fn shards(&self, axes: &[usize]) -> usize {
        axes.iter().map(|a| self.mesh.axes()[*a].1).product()
    }

    /// The chunks of a dimension that a device owns when the dimension is split over axes. Those of more axes lie inside
    /// those of the first ones.
    pub fn owned_chunks(&self, dim: &Dim, axes: &[usize], device: usize) -> Range<usize> {
        let at = self.mesh.coordinates(device);
        let shard = axes.iter().fold(0, |shard, a| shard * self.mesh.axes()[*a].1 + at[*a]);
        shard_chunks(self.chunks(dim), self.shards(axes), shard)
    }

    /// The elements of a dimension that a device owns when the dimension is split over axes.
    pub fn owned(&self, dim: &Dim, axes: &[usize], device: usize) -> Range<usize> {
        let (chunks, own) = (self.chunks(dim), self.owned_chunks(dim, axes, device));
        own.start * dim.size / chunks..own.end * dim.size / chunks
    }

    /// The part of a tensor that each device owns; nothing where the tensor is at another place along an axis.
    pub fn regions(&self, ty: &Type, spec: &Spec) -> Vec<Region> {
        let own = |d| {
            let dims = ty.dims.iter().zip(&spec.dims);
            dims.map(|(dim, axes)| (dim.name.clone(), self.owned(dim, axes, d))).collect()
        };
        let there = |d: usize| {
            spec.stage.is_empty() || {
                let at = self.mesh.coordinates(d);
                spec.stage.iter().all(|(axis, place)| at[*axis] == *place)
            }
        };
        (0..self.mesh.size()).map(|d| if there(d) { Region(own(d)) } else { Region::nothing(ty) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::dim;
    use crate::program::ProgramBuilder;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_tile_every_dimension_and_lie_inside_those_of_fewer_axes(
            size in 1usize..100, sizes in prop::collection::vec(1usize..6, 1..4)
        ) {
            let mesh = sizes.iter().enumerate().map(|(i, n)| format!("m{i}={n}")).collect::<Vec<_>>().join(",");
            let mesh: Mesh = mesh.parse().unwrap();
            let (layout, program) = (Layout::default(), ProgramBuilder::new().finish().unwrap());
            let place = Placement::new(&mesh, &layout, &program);
            let d = dim("x", size);
            let axes: Vec<usize> = (0..sizes.len()).collect();
            let mut next = 0;
            // Devices are numbered as shards are, the last axis fastest.
            for device in 0..mesh.size() {
                let own = place.owned(&d, &axes, device);
                prop_assert_eq!(own.start, next);
                next = own.end;
                for fewer in 0..axes.len() {
                    let around = place.owned(&d, &axes[..fewer], device);
                    prop_assert!(around.start <= own.start && own.end <= around.end);
                }
            }
            prop_assert_eq!(next, size);
        }
    }
}
