//! The search for a layout: which mesh, which dimension over which axis in each part of a model, which stage of ZeRO, and
//! what the backward pass makes again, so that a step takes the least time within the memory that there is.
//!
//! [`outline`] is what a function does, each kind of step once; [`segments`] are the parts of it that are split in one way
//! each; [`split`] says what a device that stands for all has of a tensor, and [`price`] what steps take there, [`looks`]
//! how long a segment takes in all ways to split it, and [`mod@bytes`] how much memory; [`meshes`] lists the meshes;
//! [`tables`] makes of a mesh the problem that [`solve`] solves; [`stages`] shares segments out to the stages of a
//! pipeline, each on such a mesh; [`spell`] writes the answer as a layout.

pub mod bytes;
pub mod looks;
pub mod meshes;
pub mod outline;
pub mod price;
pub mod segments;
pub mod solve;
pub mod spell;
pub mod split;
pub mod stages;
pub mod tables;

use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::layout::{Layout, Mesh};
use crate::machine::Machine;
use crate::pipeline;
use crate::plan::{ProgramPlan, time};
use crate::program::Program;
use outline::Outline;
use price::Prices;
use segments::Segments;
use solve::Solution;
use split::{Pipeline, Site, Way};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use tables::{Classes, Tables};

/// Devices up to which what is found is planned: larger meshes are judged by the prices alone.
pub const PLANNED: usize = 64;
/// By how much a candidate may be slower than the fastest one, by the prices, to be planned beside it.
const RUNNERS_UP: f64 = 1.05;
/// How much faster than by its price a runner-up may turn out to be: where that would not do it is not planned.
const MISPRICED: f64 = 0.98;
/// By which factor a mesh has to be faster than one with fewer axes, or another order of them, to be looked at.
const BETTER: f64 = 0.9999;
/// Candidates that are planned, at the most.
const CANDIDATES: usize = 4;
/// How often the limit of memory is set anew, by what plans need.
const ROUNDS: usize = 4;

/// Stages of ZeRO.
const ZERO: u8 = 3;
/// What the axis of a pipeline's stages is called.
const PIPE: &str = "pipe";

/// What the devices are to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Devices {
    /// So many: the mesh is searched for, too, and where the function goes in micro-batches the number of stages.
    Count(usize),
    /// Those of a mesh. An axis `pipe` is one of stages where the function goes in micro-batches.
    Mesh(Mesh),
}

/// A search.
pub struct Search<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// The devices.
    pub devices: Devices,
    /// Bytes that each device may use.
    pub memory: usize,
    /// Whether blocks may be made again.
    pub may_recompute: bool,
    /// The function whose time counts.
    pub function: &'a str,
    /// Threads of each device that plans are made for: with 0, nothing is done in bands.
    pub threads: usize,
    /// Builds the program with some blocks made again.
    pub build: &'a dyn Fn(&[Name]) -> Result<Program, Error>,
    /// Plans a program, without a limit of memory: a plan for each of its stages.
    pub plan: &'a dyn Fn(&Program, &Mesh, &Layout) -> Result<Vec<ProgramPlan>, Error>,
}

/// What a candidate takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Takes {
    /// Seconds of a step.
    pub seconds: f64,
    /// Bytes of the fullest device.
    pub bytes: usize,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The mesh.
    pub mesh: Mesh,
    /// The layout.
    pub layout: Layout,
    /// The blocks that the backward pass makes again.
    pub recompute: Vec<Name>,
    /// By the prices of the search.
    pub priced: Takes,
    /// By its plan; None for more devices than [`PLANNED`].
    pub planned: Option<Takes>,
    /// By the prices, no candidate takes fewer seconds than this; it is what was found unless the search was cut off.
    pub bound: f64,
    /// Meshes that were searched.
    pub meshes: usize,
    /// Layouts that they have, whatever memory they need; as a number that may be huge.
    pub layouts: f64,
    /// Candidates that were planned.
    pub plans: usize,
}

/// The mesh of a stage, and the stages.
#[derive(Clone)]
struct Form {
    mesh: Mesh,
    pipeline: Pipeline,
}

impl Form {
    fn devices(&self) -> usize {
        self.mesh.size() * self.pipeline.depth
    }
}

/// A solution on a mesh: of a stage, if there are several.
struct Candidate {
    form: Form,
    ways: Vec<Way>,
    /// By segment: its stage.
    stages: Vec<usize>,
    again: Vec<Name>,
    /// Whether it gathers tensors whole: what that takes is in its price.
    gathers: bool,
    solution: Solution,
}

impl Search<'_> {
    /// The fastest mesh, layout and choice of blocks that are made again.
    ///
    /// # Errors
    /// What is wrong with the program; `M0001` if nothing that was tried fits into the memory.
    pub fn find(&self) -> Result<Found, Error> {
        let program = (self.build)(&[])?;
        let outline = Outline::new(&program, program.function(self.function)?, self.threads)?;
        let segments = Segments::new(&outline);
        let forms = self.forms(&outline, &segments)?;
        let mut search = Running {
            search: self,
            program: &program,
            outline: &outline,
            segments: &segments,
            forms,
            tables: vec![],
            fastest: f64::INFINITY,
            layouts: 0.0,
            plans: 0,
        };
        search.run()
    }

    /// The meshes that may be, and the stages on each.
    fn forms(&self, outline: &Outline, segments: &Segments) -> Result<Vec<Form>, Error> {
        let (micro, parts) = (pipeline::count(outline.function), segments.list.len() - 1);
        let form = |mesh: Mesh, depth: usize| Form { mesh, pipeline: Pipeline { depth, micro } };
        match &self.devices {
            Devices::Mesh(mesh) => {
                let stages = mesh.axis(PIPE).filter(|_| micro > 1).map(|a| mesh.axes()[a].1);
                let rest = if stages.is_some() { mesh.resized(PIPE, None) } else { mesh.clone() };
                if rest.axes().len() > split::AXES {
                    let what = format!("a search on the mesh `{mesh}`, of more than {} axes,", split::AXES);
                    return Err(Cause::NotYet { what, help: "merge some of its axes".into() }.into());
                }
                Ok(vec![form(rest, stages.unwrap_or(1))])
            }
            Devices::Count(n) => {
                let depths = (1..=micro.min(parts).min(*n)).filter(|d| n.is_multiple_of(*d));
                let mut forms = vec![];
                for depth in depths {
                    let meshes = meshes::meshes(n / depth, outline.most_chunks())?;
                    forms.extend(meshes.into_iter().map(|mesh| form(mesh, depth)));
                }
                Ok(forms)
            }
        }
    }

    /// What a layout takes by its plan.
    ///
    /// # Errors
    /// A layout that cannot be.
    pub fn takes(&self, recompute: &[Name], mesh: &Mesh, layout: &Layout) -> Result<Takes, Error> {
        self.planned(&(self.build)(recompute)?, mesh, layout)
    }

    /// What a program takes by its plan.
    fn planned(&self, program: &Program, mesh: &Mesh, layout: &Layout) -> Result<Takes, Error> {
        let plans = (self.plan)(program, mesh, layout)?;
        let times = plans.iter().filter_map(|p| time::estimate(p, self.function, self.machine));
        let seconds = times.map(|t| t.seconds).fold(0.0, f64::max);
        let peaks = plans.iter().flat_map(|p| (0..p.mesh.size()).map(|d| p.peak_bytes(d)));
        Ok(Takes { seconds, bytes: peaks.max().unwrap_or(0) })
    }
}

/// A search that runs.
struct Running<'a> {
    search: &'a Search<'a>,
    /// The program in which nothing is made again.
    program: &'a Program,
    outline: &'a Outline<'a>,
    segments: &'a Segments,
    forms: Vec<Form>,
    /// By form, those of them that may be part of the fastest step.
    tables: Vec<(usize, Tables)>,
    /// Seconds of the fastest step that is known to fit, by the prices.
    fastest: f64,
    layouts: f64,
    plans: usize,
}

impl Running<'_> {
    fn run(&mut self) -> Result<Found, Error> {
        let budget = self.search.memory as f64;
        let mut limit = budget;
        // What needs least of all that was planned.
        let mut least = None;
        for _ in 0..ROUNDS {
            self.tabulate(limit);
            let mut candidates = self.candidates(limit)?;
            let Some(first) = candidates.first() else {
                // Prices of memory are estimates from above.
                limit *= 1.25;
                continue;
            };
            let bound = candidates.iter().map(|c| c.solution.bound).fold(first.solution.seconds, f64::min);
            if first.form.devices() > PLANNED {
                let first = candidates.swap_remove(0);
                return self.found(Candidate { gathers: true, ..first }, None, bound);
            }
            let slowest = RUNNERS_UP * first.solution.seconds;
            candidates.retain(|c| c.solution.seconds <= slowest);
            candidates.truncate(CANDIDATES);
            let (mut best, mut over): (Option<(usize, Takes)>, f64) = (None, 1.0);
            for (i, c) in candidates.iter_mut().enumerate() {
                let least_seconds = MISPRICED * (c.solution.seconds + self.search.machine.step);
                if best.is_some_and(|(_, t)| t.seconds <= least_seconds) {
                    continue;
                }
                let takes = self.planned(c)?;
                least = least.into_iter().chain([takes.bytes]).min();
                if takes.bytes > self.search.memory {
                    over = over.max(takes.bytes as f64 / c.solution.memory.max(1.0));
                } else if best.is_none_or(|(_, t)| takes.seconds < t.seconds) {
                    best = Some((i, takes));
                }
            }
            if let Some((i, takes)) = best {
                return self.found(candidates.swap_remove(i), Some(takes), bound);
            }
            limit = budget / over.max(1.02);
        }
        let free = self.tables.iter().map(|(_, t)| t.problem.least_memory()).fold(f64::INFINITY, f64::min);
        let needed = least.unwrap_or(free as usize).max(self.search.memory + 1);
        let over = Cause::OverMemory { device: 0, needed, budget: self.search.memory, largest: vec![] };
        Err(Error::from(over).note("this is the least of the layouts that were searched"))
    }

    /// The tables of all forms for a limit of memory. Forms are shared out to as many threads as there are cores; what they
    /// find does not depend on which is first, since all that is left out is slower than what is known in the end.
    fn tabulate(&mut self, limit: f64) {
        let (next, fastest) = (AtomicUsize::new(0), Mutex::new(f64::INFINITY));
        let (forms, outline, segments) = (&self.forms, self.outline, self.segments);
        let (machine, may_recompute) = (self.search.machine, self.search.may_recompute);
        let known = || fastest.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |form: &Form| {
            let site = Site::new(&form.mesh, form.pipeline, machine, outline.most_chunks());
            let mut classes = Classes::new(segments, &site, may_recompute);
            let mut prices = Prices::new(outline, site);
            let mut found = vec![];
            for stage in 0..=ZERO {
                let mut best = *known();
                found.extend(Tables::new(&mut classes, &mut prices, stage, limit, &mut best));
                let mut least = known();
                *least = least.min(best);
            }
            (found, f64::from(ZERO + 1) * classes.layouts())
        };
        let run = || {
            let mine = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < forms.len());
            std::iter::from_fn(mine).map(|i| (i, of(&forms[i]))).collect::<Vec<_>>()
        };
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(forms.len()).max(1);
        let mut all: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            let done = running.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            done.flatten().collect()
        });
        all.sort_by_key(|(i, _)| *i);
        self.layouts = all.iter().map(|(_, (_, n))| n).sum();
        self.tables = all.into_iter().flat_map(|(i, (tables, _))| tables.into_iter().map(move |t| (i, t))).collect();
        let fastest = *known();
        self.fastest = fastest;
    }

    /// The best of each mesh, the fastest first.
    fn candidates(&self, limit: f64) -> Result<Vec<Candidate>, Error> {
        let mut all = vec![];
        let mut most = self.fastest * (1.0 + 1e-6) / BETTER;
        for (form, tables) in &self.tables {
            let form = &self.forms[*form];
            let Some((solution, stages)) = stages::solve(&tables.problem, form.pipeline, limit, most * BETTER) else {
                continue;
            };
            most = most.min(solution.seconds);
            let (mut ways, mut again) = (vec![], vec![]);
            let segments = tables.options.iter().zip(&self.segments.list);
            for ((option, remade), (options, segment)) in solution.chosen.iter().zip(segments) {
                ways.push(options[*option]);
                again.extend(segment.block.clone().filter(|_| *remade));
            }
            let mesh = match self.search.devices {
                Devices::Count(_) => spell::named(&form.mesh, self.outline, &ways)?,
                Devices::Mesh(_) => form.mesh.clone(),
            };
            all.push(Candidate { form: Form { mesh, ..form.clone() }, ways, stages, again, gathers: false, solution });
        }
        all.sort_by(|a, b| a.solution.seconds.total_cmp(&b.solution.seconds));
        Ok(all)
    }

    /// The whole mesh of a candidate.
    fn mesh(&self, c: &Candidate) -> Mesh {
        match &self.search.devices {
            Devices::Mesh(mesh) => mesh.clone(),
            Devices::Count(_) if c.form.pipeline.depth == 1 => c.form.mesh.clone(),
            Devices::Count(_) => c.form.mesh.along(PIPE, c.form.pipeline.depth),
        }
    }

    fn layout(&self, c: &Candidate) -> Result<Layout, Error> {
        let layout = spell::layout(&c.form.mesh, self.outline, self.segments, &c.ways)?;
        let layout = match c.form.pipeline.depth {
            1 => layout,
            depth => spell::staged(layout, PIPE, depth, self.segments, &c.stages)?,
        };
        let layout = spell::firm(layout, &self.mesh(c), self.outline.program);
        Ok(if c.gathers { layout.allowing_gathers() } else { layout })
    }

    /// What a candidate takes by its plan. It may gather what it has to: it was found by what that takes.
    fn planned(&mut self, c: &mut Candidate) -> Result<Takes, Error> {
        self.plans += 1;
        let built = if c.again.is_empty() { None } else { Some((self.search.build)(&c.again)?) };
        let program = built.as_ref().unwrap_or(self.program);
        let takes = self.search.planned(program, &self.mesh(c), &self.layout(c)?);
        if !matches!(&takes, Err(e) if matches!(e.cause, Cause::SilentGather { .. })) {
            return takes;
        }
        c.gathers = true;
        self.search.planned(program, &self.mesh(c), &self.layout(c)?)
    }

    fn found(&self, c: Candidate, planned: Option<Takes>, bound: f64) -> Result<Found, Error> {
        Ok(Found {
            layout: self.layout(&c)?,
            mesh: self.mesh(&c),
            recompute: c.again,
            priced: Takes { seconds: c.solution.seconds + self.search.machine.step, bytes: c.solution.memory as usize },
            planned,
            bound: bound + self.search.machine.step,
            meshes: self.forms.len(),
            layouts: self.layouts,
            plans: self.plans,
        })
    }
}
