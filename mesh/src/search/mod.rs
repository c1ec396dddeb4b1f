//! The search for a layout: which mesh, which dimension over which axis in each part of a model, which stage of ZeRO, and
//! what the backward pass makes again, so that a step takes the least time within the memory that there is.
//!
//! [`outline`] is what a function does, each kind of step once; [`segments`] are the parts of it that are split in one way
//! each; [`split`] says what a device that stands for all has of a tensor, and [`price`] what steps take there, `regions`
//! being what they have and need, [`looks`] how long a segment takes in all ways to split it, and [`mod@bytes`] how much
//! memory; [`meshes`] lists the meshes; [`tables`] makes of a mesh the problem that [`solve`] solves; [`stages`] shares
//! segments out to the stages of a pipeline, each on such a mesh; [`answers`] are the fastest of a mesh; `running` goes
//! through all meshes and has the best planned; [`spell`] writes what was found as a layout.

pub mod answers;
pub mod bytes;
pub mod looks;
pub mod meshes;
pub mod outline;
pub mod price;
mod regions;
mod running;
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
use crate::plan::device::on_threads;
use crate::plan::{ProgramPlan, time};
use crate::program::Program;
use answers::Form;
use outline::Outline;
use running::{Cut, Running};
use segments::Segments;
use split::Pipeline;
use std::time::{Duration, Instant};

/// Devices up to which what is found is planned: larger meshes are judged by the prices alone.
pub const PLANNED: usize = 64;
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
    /// How many chunks a dimension has at the most: all of these are tried; none of them, what the program says.
    pub chunks: Vec<usize>,
    /// Whether blocks may be made again.
    pub may_recompute: bool,
    /// The function whose time counts.
    pub function: &'a str,
    /// Threads of each device that plans are made for: with 0, nothing is done in bands.
    pub threads: usize,
    /// Whether plans are of devices that wait in every collective ([`crate::plan::PlanOptions::waiting`]).
    pub waiting: bool,
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
    /// How many chunks a dimension has at the most.
    pub chunks: usize,
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
    /// How long was searched, plans not counted.
    pub searching: Duration,
    /// How long was planned.
    pub planning: Duration,
}

impl Search<'_> {
    /// The fastest mesh, layout and choice of blocks that are made again.
    ///
    /// # Errors
    /// What is wrong with the program; `M0001` if nothing that was tried fits into the memory.
    pub fn find(&self) -> Result<Found, Error> {
        let begun = Instant::now();
        let program = (self.build)(&[])?;
        let programs: Vec<Program> = match &self.chunks[..] {
            [] => vec![program],
            [others @ .., last] => {
                let others: Vec<Program> = others.iter().map(|n| program.clone().in_chunks(*n)).collect();
                others.into_iter().chain([program.in_chunks(*last)]).collect()
            }
        };
        let Search { function, threads, machine, .. } = *self;
        let outline = Outline::new(&programs[0], programs[0].function(function)?, threads)?;
        let outlines = programs.iter().map(|program| outline.in_chunks_of(program)).collect::<Result<_, Error>>()?;
        let cuts = on_threads(outlines, |outline| Cut::new(outline, machine));
        let mut forms = vec![];
        for (i, cut) in cuts.iter().enumerate() {
            forms.extend(self.forms(&cut.outline, &cut.segments)?.into_iter().map(|form| (i, form)));
        }
        let mut search = Running {
            search: self,
            cuts: &cuts,
            forms,
            answers: vec![],
            layouts: 0.0,
            plans: 0,
            begun,
            planning: Duration::ZERO,
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

    /// What a layout takes by its plan, where dimensions have so many chunks.
    ///
    /// # Errors
    /// A layout that cannot be.
    pub fn takes(&self, chunks: usize, recompute: &[Name], mesh: &Mesh, layout: &Layout) -> Result<Takes, Error> {
        self.planned(&(self.build)(recompute)?.in_chunks(chunks), mesh, layout)
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
