//! A planned program as lints see it, and what it would be with a change.

use super::Given;
use super::change::{Change, about_time};
use super::finding::{Lost, Tried};
use super::lowered::{Lowered, split_along};
use super::prices::Prices;
use crate::dim::{Dim, Name, Type};
use crate::error::Error;
use crate::graph::NodeId;
use crate::layout::{ANY, Layout, Mesh, Section};
use crate::placement::{Placement, Subject};
use crate::plan::{ProgramPlan, Timeline, time};
use crate::program::Program;
use crate::region::Region;
use crate::spmd::{self, SpmdOp};
use std::cell::RefCell;
use std::collections::HashMap;

/// Changes that are lowered at the most in the search for better ones: each is a lowering of the whole program.
const TRIALS: usize = 40;
/// Steps of devices that are lowered for that at the most, beside one change.
const STEPS: usize = 1_600_000;

/// What a run of every function takes on the device that it takes most of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    pub lost: Lost,
    /// Bytes of variables.
    pub variables: f64,
}

/// A planned program.
pub(super) struct Planned<'a> {
    pub program: &'a Program,
    pub plan: &'a ProgramPlan,
    pub given: &'a Given<'a>,
    pub prices: Prices,
    /// All but `init`.
    pub functions: Vec<Lowered<'a>>,
    pub now: Total,
    tried: RefCell<HashMap<String, Option<Total>>>,
    planned: RefCell<HashMap<String, Option<(usize, HashMap<Name, f64>)>>>,
}

/// The functions of a program, lowered; without the one that runs once.
fn lowered<'a>(program: &'a Program, mesh: &Mesh, layout: &Layout) -> Result<Vec<Lowered<'a>>, Error> {
    layout.check(mesh, program)?;
    let placement = Placement::new(mesh, layout, program);
    let functions = program.functions.values().filter(|f| f.name != "init");
    functions.map(|f| Ok(Lowered::new(f, spmd::lower(f, &placement)?, mesh))).collect()
}

fn total(program: &Program, mesh: &Mesh, layout: &Layout, functions: &[Lowered]) -> Result<Total, Error> {
    let placement = Placement::new(mesh, layout, program);
    let mut held = vec![0; mesh.size()];
    for v in &program.variables {
        let spec = placement.spec(&Subject::variable(v))?;
        for (d, r) in placement.regions(&v.ty, &spec).iter().enumerate() {
            held[d] += r.elements() * v.ty.dtype.bytes();
        }
    }
    let sum = |f: fn(&Lost) -> f64| functions.iter().map(|l| f(&l.total)).sum();
    let lost = Lost { flops: sum(|l| l.flops), sent_bytes: sum(|l| l.sent_bytes), ..Lost::default() };
    Ok(Total { lost, variables: held.into_iter().max().unwrap_or(0) as f64 })
}

/// The most memory that a device needs.
fn peak(plan: &ProgramPlan) -> usize {
    (0..plan.mesh.size()).map(|d| plan.peak_bytes(d)).max().unwrap_or(0)
}

impl<'a> Planned<'a> {
    pub fn new(program: &'a Program, plan: &'a ProgramPlan, given: &'a Given<'a>) -> Result<Planned<'a>, Error> {
        let functions = lowered(program, &plan.mesh, &plan.layout)?;
        let now = total(program, &plan.mesh, &plan.layout, &functions)?;
        let prices = given.machine.map_or(Prices::default(), |m| Prices::on(m, plan.mesh.size()));
        let (tried, planned) = (RefCell::default(), RefCell::default());
        Ok(Planned { program, plan, given, prices, functions, now, tried, planned })
    }

    /// The axes that have more than one device: index, name, devices.
    /// Whether an axis is one of stages, over which nothing is split.
    pub fn has_stages(&self, axis: &Name) -> bool {
        self.plan.layout.scoped().any(|s| s.rule.at.is_some() && s.rule.axes.contains(axis))
    }
    pub fn axes(&self) -> impl Iterator<Item = (usize, &Name, usize)> {
        let axes = self.plan.mesh.axes().iter().enumerate();
        axes.filter(|(_, (name, size))| *size > 1 && !self.has_stages(name)).map(|(i, (name, size))| (i, name, *size))
    }
    pub fn axis_name(&self, axis: usize) -> &Name {
        &self.plan.mesh.axes()[axis].0
    }
    pub fn axis_size(&self, axis: usize) -> usize {
        self.plan.mesh.axes()[axis].1
    }
    /// Whether anything is split over an axis.
    pub fn uses(&self, axis: usize) -> bool {
        self.functions.iter().any(|l| {
            l.spmd.values.iter().any(|v| !l.split(&v.regions, axis).is_empty())
                || l.spmd
                    .instrs
                    .iter()
                    .any(|i| matches!(&i.op, SpmdOp::Compute { sum: Some(s), .. } if l.sums(s, axis)))
        })
    }
    /// Whether a variable lies whole on every device along an axis.
    pub fn is_whole(&self, variable: usize, axis: usize) -> bool {
        let parts: Vec<Region> = self.plan.variables.iter().map(|d| d[variable].0.region.clone()).collect();
        split_along(&self.plan.mesh, &parts, axis).is_empty()
    }
    /// Whether a tensor has the dimensions of a variable: it is one, or a gradient, or a slot.
    pub fn like_a_variable(&self, ty: &Type) -> bool {
        self.program.variables.iter().any(|v| v.ty.dims == ty.dims)
    }
    /// The most memory that a device needs.
    pub fn peak(&self) -> usize {
        peak(self.plan)
    }
    /// Whether memory is short: more than 7 of 10 parts of it are needed.
    pub fn is_short(&self) -> bool {
        self.given.memory.is_some_and(|m| self.peak() as f64 > 0.7 * m as f64)
    }
    /// What a device may use, if the plan needs more.
    pub fn over(&self) -> Option<usize> {
        self.given.memory.filter(|m| self.peak() > *m)
    }
    /// The function and device that need most memory, and that over time.
    pub fn fullest(&self) -> Option<(&Lowered<'a>, usize, &'a Timeline)> {
        let all = self.functions.iter().flat_map(|l| {
            let timelines = self.plan.timelines.get(&l.function.name).into_iter().flatten();
            timelines.enumerate().map(move |(d, t)| (l, d, t))
        });
        all.max_by_key(|(l, d, _)| self.plan.functions[&l.function.name][*d].arena_bytes)
    }
    /// The node that a step is of.
    pub fn node_of_step(&self, l: &Lowered, device: usize, step: usize) -> Option<NodeId> {
        self.plan.functions[&l.function.name][device].steps.get(step).map(|s| s.label.node)
    }
    /// The node of the step at which most memory is needed, or a result where that is the end.
    pub fn fullest_node(&self) -> Option<(&Lowered<'a>, NodeId)> {
        let (l, device, t) = self.fullest()?;
        let node = self.node_of_step(l, device, t.fullest).or(l.function.outputs.first().map(|(_, n)| *n));
        Some((l, node.or(l.function.assigns.first().map(|(_, n)| *n))?))
    }
    /// Whether there are rules for a kind of tensors alone: they are so for a reason.
    pub fn has_section(&self, section: Section) -> bool {
        self.plan.layout.scoped().any(|s| s.section == Some(section))
    }
    /// Whether a rule splits a dimension.
    pub fn has_rule(&self, dim: &Name) -> bool {
        self.rules().any(|(d, _)| d == dim)
    }
    /// Whether a rule splits a dimension over an axis.
    pub fn splits(&self, dim: &Name, axis: &Name) -> bool {
        self.rules().any(|(d, axes)| d == dim && axes.contains(axis))
    }
    /// The dimensions that rules split over an axis.
    pub fn rules_of(&self, axis: &Name) -> Vec<&Name> {
        let mut dims: Vec<&Name> = self.rules().filter(|(_, axes)| axes.contains(axis)).map(|(d, _)| d).collect();
        dims.sort();
        dims.dedup();
        dims
    }
    /// The dimensions that rules split, with the axes.
    fn rules(&self) -> impl Iterator<Item = (&Name, &Vec<Name>)> {
        let split =
            self.plan.layout.scoped().filter(|s| about_time(s) && *s.rule.dim != *ANY && !s.rule.axes.is_empty());
        split.map(|s| (&s.rule.dim, &s.rule.axes))
    }
    /// Into how many shards rules split a dimension, at the most.
    pub fn shards(&self, dim: &Name) -> usize {
        let sizes =
            |axes: &Vec<Name>| axes.iter().filter_map(|a| Some(self.axis_size(self.plan.mesh.axis(a)?))).product();
        self.rules().filter(|(d, _)| *d == dim).map(|(_, axes)| sizes(axes)).max().unwrap_or(1)
    }
    /// Chunks of a dimension.
    pub fn chunks(&self, dim: &Dim) -> usize {
        self.program.chunking.count(&dim.name, dim.size)
    }
    /// Whether a dimension has chunks enough to be split over an axis too.
    pub fn has_room(&self, dim: &Dim, axis: &Name) -> bool {
        let devices = self.plan.mesh.axis(axis).map_or(1, |a| self.axis_size(a));
        !self.splits(&dim.name, axis) && self.chunks(dim) >= devices.saturating_mul(self.shards(&dim.name))
    }

    fn mesh_and_layout<'c>(&'c self, change: &'c Change) -> (&'c Mesh, &'c Layout) {
        (change.mesh.as_ref().unwrap_or(&self.plan.mesh), change.layout.as_ref().unwrap_or(&self.plan.layout))
    }
    /// What a change would make of the program, lowered; None where it cannot be.
    pub fn trial(&self, change: &Change) -> Option<Total> {
        let key = change.to_string();
        if let Some(known) = self.tried.borrow().get(&key) {
            return *known;
        }
        if self.tried.borrow().len() >= self.affordable(STEPS, TRIALS) {
            return None;
        }
        let (mesh, layout) = self.mesh_and_layout(change);
        let outcome = lowered(self.program, mesh, layout).and_then(|l| total(self.program, mesh, layout, &l)).ok();
        self.tried.borrow_mut().insert(key, outcome);
        outcome
    }
    /// How many plans like this one have so many steps of devices together: one at the least, and `most` at the most.
    pub fn affordable(&self, steps: usize, most: usize) -> usize {
        let own: usize = self.plan.functions.values().flatten().map(|d| d.steps.len()).sum();
        (steps / own.max(1)).clamp(1, most)
    }
    /// The change that saves most time, of some, if one does, and takes no more memory for variables where that is short.
    pub fn better(&self, changes: impl IntoIterator<Item = Change>) -> Option<Change> {
        let tried = changes.into_iter().filter_map(|c| Some((self.trial(&c)?, c)));
        let fits = |t: &Total| !self.is_short() || t.variables <= self.now.variables;
        let time = |t: &Total| self.prices.of(&t.lost);
        let saves = |t: &Total| time(t) < 0.995 * time(&self.now);
        let best = tried.filter(|(t, _)| fits(t) && saves(t)).min_by(|a, b| time(&a.0).total_cmp(&time(&b.0)));
        best.map(|(_, c)| c)
    }
    /// Some dimensions split over an axis, each by itself.
    pub fn splitting(&self, axis: &Name, dims: &[Name]) -> Vec<Change> {
        dims.iter().take(5).map(|d| Change::split(&self.plan.layout, d, axis)).collect()
    }
    /// Some dimensions split over an axis in place of `dim`.
    pub fn instead(&self, dim: &Name, axis: &Name, dims: &[Dim]) -> Vec<Change> {
        let others = dims.iter().filter(|d| d.name != *dim && self.has_room(d, axis)).take(5);
        others.map(|d| Change::instead(&self.plan.layout, dim, axis, &d.name)).collect()
    }

    /// What a plan with a change takes, whole: its peak, and on a machine the seconds of a run of `function`, or of the
    /// one that takes longest; None where there is no such plan.
    pub fn planned(&self, change: &Change, function: Option<&Name>) -> Option<Tried> {
        let key = change.to_string();
        let make = || {
            let (mesh, layout) = self.mesh_and_layout(change);
            let plan = (self.given.plan)(mesh, layout).ok()?;
            Some((peak(&plan), self.seconds(&plan)))
        };
        let mut planned = self.planned.borrow_mut();
        let (peak_bytes, seconds) = planned.entry(key).or_insert_with(make).as_ref()?;
        Some(Tried { peak_bytes: *peak_bytes, seconds: longest(seconds, function) })
    }
    /// What the plan takes that there is.
    pub fn as_it_is(&self, function: Option<&Name>) -> Tried {
        Tried { peak_bytes: self.peak(), seconds: longest(&self.seconds(self.plan), function) }
    }
    fn seconds(&self, plan: &ProgramPlan) -> HashMap<Name, f64> {
        let names = self.functions.iter().map(|l| &l.function.name);
        let estimate = |n: &Name| Some((n.clone(), time::estimate(plan, n, self.given.machine?)?.seconds));
        names.filter_map(estimate).collect()
    }
}

/// The seconds of a function, or the most of one.
fn longest(seconds: &HashMap<Name, f64>, function: Option<&Name>) -> Option<f64> {
    match function {
        Some(function) => seconds.get(function).copied(),
        None => seconds.values().copied().max_by(f64::total_cmp),
    }
}
