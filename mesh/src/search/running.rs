//! A search that runs: it looks for the fastest layout of every mesh, and has plans decide between the best.

use super::answers::{Answer, Answers, Form, Looking};
use super::outline::Outline;
use super::price;
use super::segments::Segments;
use super::solve::Solution;
use super::split::Way;
use super::{Devices, Found, PIPE, PLANNED, Search, Takes, spell};
use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::layout::{Layout, Mesh};
use crate::machine::Machine;
use crate::program::Program;
use std::collections::HashSet;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// By how much a candidate may be slower than the fastest one, by the prices, to be planned beside it.
const RUNNERS_UP: f64 = 1.05;
/// How exact prices are: of two candidates on a mesh that are so near each other the one with less memory is taken.
const EXACT: f64 = 1.01;
/// What is less memory.
const LESS: f64 = 0.95;
/// By which factor a mesh has to be faster than one with fewer axes, or another order of them, to be preferred.
const BETTER: f64 = 0.9999;
/// How often the limit of memory is set anew, by what plans need.
const ROUNDS: usize = 4;

/// A program whose dimensions have so many chunks at the most, as a search sees it.
pub(super) struct Cut<'a> {
    program: &'a Program,
    pub(super) outline: Outline<'a>,
    pub(super) segments: Segments,
    /// By kind of step: seconds that it takes on one device, beside its launch.
    alone: Vec<f64>,
}

impl<'a> Cut<'a> {
    pub(super) fn new(outline: Outline<'a>, machine: &Machine) -> Cut<'a> {
        let (segments, alone) = (Segments::new(&outline), price::alone(&outline, machine));
        Cut { program: outline.program, outline, segments, alone }
    }
}

/// A solution on a mesh: of a stage, if there are several.
struct Candidate<'a> {
    cut: &'a Cut<'a>,
    form: Form,
    ways: Vec<Way>,
    /// By segment: its stage.
    stages: Vec<usize>,
    again: Vec<Name>,
    solution: Solution,
}

/// A search that runs.
pub(super) struct Running<'a> {
    pub(super) search: &'a Search<'a>,
    /// The program in which nothing is made again, in so many ways to cut it.
    pub(super) cuts: &'a [Cut<'a>],
    /// What it may lie on, each with the number of its cut.
    pub(super) forms: Vec<(usize, Form)>,
    /// What was found, by form.
    pub(super) answers: Vec<(usize, Answers)>,
    pub(super) layouts: f64,
    pub(super) plans: usize,
    pub(super) begun: Instant,
    pub(super) planning: Duration,
}

impl<'a> Running<'a> {
    /// The fastest mesh, layout and choice of blocks that are made again.
    pub(super) fn run(&mut self) -> Result<Found, Error> {
        let budget = self.search.memory as f64;
        let mut limit = budget;
        // What needs least of all that was planned.
        let mut least = None;
        for _ in 0..ROUNDS {
            self.look(limit);
            let mut candidates = self.candidates(limit)?;
            let Some(first) = candidates.first() else {
                // Prices of memory are estimates from above.
                limit *= 1.25;
                continue;
            };
            let bound = candidates.iter().map(|c| c.solution.bound).fold(f64::INFINITY, f64::min);
            if first.form.devices() > PLANNED {
                let first = candidates.swap_remove(0);
                let layout = self.layout(&first)?.allowing_gathers();
                return Ok(self.found(first, layout, None, bound));
            }
            let (mut best, mut over): (Option<(usize, Takes, Layout)>, f64) = (None, 1.0);
            for (i, c) in candidates.iter().enumerate() {
                let begun = Instant::now();
                let (takes, layout) = self.planned(c)?;
                self.planning += begun.elapsed();
                least = least.into_iter().chain([takes.bytes]).min();
                if takes.bytes > self.search.memory {
                    over = over.max(takes.bytes as f64 / c.solution.memory.max(1.0));
                } else if best.as_ref().is_none_or(|(_, t, _)| takes.seconds < t.seconds) {
                    best = Some((i, takes, layout));
                }
            }
            if let Some((i, takes, layout)) = best {
                return Ok(self.found(candidates.swap_remove(i), layout, Some(takes), bound));
            }
            limit = budget / over.max(1.02);
        }
        let free = self.answers.iter().map(|(_, a)| a.least_memory).fold(f64::INFINITY, f64::min);
        let needed = least.unwrap_or(free as usize).max(self.search.memory + 1);
        let over = Cause::OverMemory { device: 0, needed, budget: self.search.memory, largest: vec![] };
        Err(Error::from(over).note("this is the least of the layouts that were searched"))
    }

    fn looking(&self, cut: &'a Cut<'a>) -> Looking<'a> {
        let Search { machine, may_recompute, waiting, .. } = *self.search;
        let Cut { outline, segments, alone, .. } = cut;
        Looking { outline, segments, machine, may_recompute, waiting, alone }
    }

    /// Looks for the fastest layout of each form within a limit of memory. Forms are shared out to as many threads as there
    /// are cores; what is found does not depend on which is first, since all that is left out is slower than what is known
    /// in the end.
    fn look(&mut self, limit: f64) {
        let looking: Vec<Looking> = self.cuts.iter().map(|cut| self.looking(cut)).collect();
        let forms = &self.forms;
        let (next, fastest) = (AtomicUsize::new(0), Mutex::new(f64::INFINITY));
        let known = || fastest.lock().unwrap_or_else(PoisonError::into_inner);
        // Few axes are soon looked at, and even ones are often the best: so others need not be looked at long.
        let mut order: Vec<usize> = (0..forms.len()).collect();
        let sizes = |i: usize| forms[i].1.mesh.axes().iter().map(|(_, n)| *n);
        order.sort_by_key(|i| (sizes(*i).len(), sizes(*i).max(), *i));
        let of = |i: usize| {
            let take = |best: &mut f64| {
                let mut least = known();
                *least = least.min(*best);
                *best = *least;
            };
            let (cut, form) = &forms[i];
            looking[*cut].of(form, limit, &take)
        };
        let run = || {
            let mine = || order.get(next.fetch_add(1, Ordering::Relaxed)).copied();
            std::iter::from_fn(mine).map(|i| (i, of(i))).collect::<Vec<_>>()
        };
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(order.len()).max(1);
        let mut all: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            let done = running.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            done.flatten().collect()
        });
        all.sort_by_key(|(i, _)| *i);
        self.layouts = all.iter().map(|(_, (_, n))| n).sum();
        self.answers = all.into_iter().flat_map(|(i, (found, _))| found.into_iter().map(move |a| (i, a))).collect();
    }

    /// What is to be planned: the fastest, and on its mesh the fastest of other stages of ZeRO and those with all segments
    /// split alike, which prices are more exact for; the fastest first. Where prices tell none of two apart it is the one
    /// with less memory.
    fn candidates(&self, limit: f64) -> Result<Vec<Candidate<'a>>, Error> {
        let all = || self.answers.iter().filter_map(|(form, a)| Some((*form, a.fastest.as_ref()?)));
        let seconds = all().map(|(_, a)| a.solution.seconds).fold(f64::INFINITY, f64::min);
        let Some((at, first)) = all().find(|(_, a)| a.solution.seconds * BETTER <= seconds) else {
            return Ok(vec![]);
        };
        let (cut, form) = (&self.cuts[self.forms[at].0], &self.forms[at].1);
        let mut near = vec![first.clone()];
        if form.devices() <= PLANNED {
            let slowest = RUNNERS_UP * first.solution.seconds;
            let (beside, _) = self.looking(cut).of(form, limit, &|best| *best = slowest);
            let others = beside.into_iter().flat_map(|a| [a.fastest, a.uniform]).flatten();
            near.extend(others.filter(|a| a.solution.seconds <= slowest));
        }
        near.sort_by(|a, b| a.solution.seconds.total_cmp(&b.solution.seconds));
        let mut kept: Vec<Answer> = vec![];
        for answer in near {
            let tells = |other: &Answer| {
                let is_less = answer.solution.memory < LESS * other.solution.memory;
                answer.solution.seconds > EXACT * other.solution.seconds || is_less
            };
            if kept.iter().all(tells) {
                kept.push(answer);
            }
        }
        kept.into_iter().map(|answer| self.candidate(cut, form, answer)).collect()
    }

    fn candidate(
        &self,
        cut: &'a Cut<'a>,
        form: &Form,
        Answer { solution, stages, ways }: Answer,
    ) -> Result<Candidate<'a>, Error> {
        let remade = cut.segments.list.iter().zip(&solution.chosen).filter(|(_, (_, again))| *again);
        let again = remade.filter_map(|(segment, _)| segment.block.clone()).collect();
        let mesh = match self.search.devices {
            Devices::Count(_) => spell::named(&form.mesh, &cut.outline, &ways)?,
            Devices::Mesh(_) => form.mesh.clone(),
        };
        Ok(Candidate { cut, form: Form { mesh, ..form.clone() }, ways, stages, again, solution })
    }

    /// The whole mesh of a candidate.
    fn mesh(&self, c: &Candidate<'a>) -> Mesh {
        match &self.search.devices {
            Devices::Mesh(mesh) => mesh.clone(),
            Devices::Count(_) if c.form.pipeline.depth == 1 => c.form.mesh.clone(),
            Devices::Count(_) => c.form.mesh.along(PIPE, c.form.pipeline.depth),
        }
    }

    fn layout(&self, c: &Candidate<'a>) -> Result<Layout, Error> {
        let Cut { outline, segments, program, .. } = c.cut;
        let layout = spell::layout(&c.form.mesh, outline, segments, &c.ways)?;
        let layout = match c.form.pipeline.depth {
            1 => layout,
            depth => spell::staged(layout, PIPE, depth, segments, &c.stages)?,
        };
        Ok(spell::firm(layout, &self.mesh(c), program))
    }

    /// What a candidate takes by its plan, and its layout, which gathers tensors whole if it has to: what that takes is in
    /// its price.
    fn planned(&mut self, c: &Candidate<'a>) -> Result<(Takes, Layout), Error> {
        self.plans += 1;
        let remade = || Ok::<_, Error>((self.search.build)(&c.again)?.in_chunks(c.cut.program.chunking.chunks));
        let built = if c.again.is_empty() { None } else { Some(remade()?) };
        let (program, mesh, mut layout) = (built.as_ref().unwrap_or(c.cut.program), self.mesh(c), self.layout(c)?);
        let takes = match self.search.planned(program, &mesh, &layout) {
            Err(e) if matches!(e.cause, Cause::SilentGather { .. }) => {
                layout = layout.allowing_gathers();
                self.search.planned(program, &mesh, &layout)
            }
            takes => takes,
        };
        Ok((takes?, layout))
    }

    /// How many meshes were searched.
    fn meshes(&self) -> usize {
        let all = self.forms.iter().map(|(_, f)| (f.mesh.to_string(), f.pipeline.depth));
        all.collect::<HashSet<_>>().len()
    }

    fn found(&self, c: Candidate<'a>, layout: Layout, planned: Option<Takes>, bound: f64) -> Found {
        Found {
            layout,
            mesh: self.mesh(&c),
            chunks: c.cut.program.chunking.chunks,
            recompute: c.again,
            priced: Takes { seconds: c.solution.seconds + self.search.machine.step, bytes: c.solution.memory as usize },
            planned,
            bound: bound + self.search.machine.step,
            meshes: self.meshes(),
            layouts: self.layouts,
            plans: self.plans,
            searching: self.begun.elapsed().saturating_sub(self.planning),
            planning: self.planning,
        }
    }
}
