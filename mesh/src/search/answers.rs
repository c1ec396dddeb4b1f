//! The fastest layouts of a mesh, one for each stage of ZeRO.
//!
//! A step takes no less than what the fastest option of each segment takes; so few options are looked at first, those of a step
//! that is nearly as fast as that, and more where there is none.

use super::outline::Outline;
use super::price::Prices;
use super::segments::Segments;
use super::solve::{Pair, Problem, Solution};
use super::split::{Pipeline, Site, Splits, Way};
use super::stages;
use super::tables::{Classes, NEAR, Staged, Tables, between};
use crate::layout::Mesh;
use crate::machine::Machine;
use std::sync::Arc;

/// Stages of ZeRO.
const ZERO: u8 = 3;
/// Uniform ways that are worked out for an upper bound.
const UNIFORM: usize = 12;
/// The part of what lies between the bounds on the time that is looked at first; then twice as much, and so on.
const FIRST: f64 = 0.125;

/// The mesh of a stage, and the stages.
#[derive(Clone)]
pub struct Form {
    /// The mesh.
    pub mesh: Mesh,
    /// The stages.
    pub pipeline: Pipeline,
}

impl Form {
    /// How many devices that are.
    pub fn devices(&self) -> usize {
        self.mesh.size() * self.pipeline.depth
    }
}

/// What is the same on all forms.
pub struct Looking<'a> {
    /// The function.
    pub outline: &'a Outline<'a>,
    /// Its segments.
    pub segments: &'a Segments,
    /// The machine.
    pub machine: &'a Machine,
    /// Whether blocks may be made again.
    pub may_recompute: bool,
    /// Whether devices wait in every collective.
    pub waiting: bool,
    /// By kind of step: seconds that it takes on one device, beside its launch.
    pub alone: &'a [f64],
}

impl Looking<'_> {
    /// What is found on a form, by stages of ZeRO, and how many layouts there are. `known` takes and gives the fewest seconds
    /// that are known.
    pub fn of(&self, form: &Form, limit: f64, known: &dyn Fn(&mut f64)) -> (Vec<Answers>, f64) {
        let site = Site::new(&form.mesh, form.pipeline, self.machine, self.outline.most_chunks());
        let mut classes = Classes::new(self.segments, &site, self.may_recompute, self.alone);
        let mut prices = Prices::new(self.outline, site, self.waiting);
        let (mut found, mut best) = (vec![], f64::INFINITY);
        for stage in 0..=ZERO {
            known(&mut best);
            found.extend(Answers::new(&mut classes, &mut prices, stage, limit, &mut best));
            known(&mut best);
        }
        (found, f64::from(ZERO + 1) * classes.layouts())
    }
}

/// A layout on a mesh.
#[derive(Clone)]
pub struct Answer {
    /// What it takes, and what is made again.
    pub solution: Solution,
    /// By segment: its stage.
    pub stages: Vec<usize>,
    /// By segment: how it is split.
    pub ways: Vec<Way>,
}

/// What was found on one mesh and one stage of ZeRO.
pub struct Answers {
    /// The fastest.
    pub fastest: Option<Answer>,
    /// The fastest where all segments are split alike, of those that promise most.
    pub uniform: Option<Answer>,
    /// The least memory that any is known to need.
    pub least_memory: f64,
}

impl Answers {
    /// The fastest layout within a budget of memory at those prices and that stage of ZeRO, if it takes `fastest` seconds or
    /// hardly more; `fastest` is lowered to what it takes. None if there is none.
    /// Options that are too slow for that, whatever the others are, are left out. So few are looked at first, and more where
    /// nothing is as fast as that supposes.
    pub fn new(
        classes: &mut Classes,
        prices: &mut Prices,
        stage: u8,
        budget: f64,
        fastest: &mut f64,
    ) -> Option<Answers> {
        let (mut staged, floor) = classes.staged(prices, stage, *fastest)?;
        let uniform = uniform(classes, prices, &mut staged, budget);
        // Where another mesh is faster than that, it is hardly reached, and all that is as fast is looked at.
        let top = uniform.as_ref().map_or(f64::INFINITY, |u| u.solution.seconds);
        let mut part = if top.is_finite() && top <= *fastest { FIRST } else { 1.0 };
        *fastest = fastest.min(top);
        loop {
            // In the end as fast as what is known, which sums in another order are not to miss by their last digit.
            let guess = if part < 1.0 { floor + part * (top - floor) } else { f64::INFINITY };
            let most = guess.min(*fastest * NEAR);
            let Tables { problem, options } = Tables::new(classes, prices, &mut staged, floor, most);
            let found = stages::solve(&problem, prices.site.pipeline, budget, most);
            // Stages that are not alike may take longer than their problem says.
            let enough = most < guess || part >= 1.0 || found.as_ref().is_some_and(|(s, _)| s.seconds <= most);
            part *= 2.0;
            if !enough {
                continue;
            }
            let answer = |(solution, stages): (Solution, Vec<usize>)| {
                let ways = options.iter().zip(&solution.chosen).map(|(ways, (option, _))| ways[*option]).collect();
                Answer { solution, stages, ways }
            };
            let found = found.map(answer);
            *fastest = found.iter().map(|f| f.solution.seconds).fold(*fastest, f64::min);
            return Some(Answers { fastest: found, uniform, least_memory: problem.least_memory() });
        }
    }
}

/// The fastest within a budget where all segments are split alike, of the ways that promise most.
fn uniform(classes: &Classes, prices: &mut Prices, staged: &mut [Staged], budget: f64) -> Option<Answer> {
    let mut all: Vec<Splits> = staged.iter().flat_map(|c| c.ways.iter().map(|w| w.splits)).collect();
    all.sort_unstable();
    all.dedup();
    let alone = |splits: &Splits, staged: &[Staged]| -> Option<f64> {
        staged.iter().map(|c| Some(c.seconds[c.like(*splits)?] * c.count as f64)).sum()
    };
    let mut promising: Vec<(f64, Splits)> = all.iter().filter_map(|s| Some((alone(s, staged)?, *s))).collect();
    promising.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<Answer> = None;
    for (least, splits) in promising.into_iter().take(UNIFORM) {
        let most = best.as_ref().map_or(f64::INFINITY, |b| b.solution.seconds);
        if least >= most {
            break;
        }
        let mut ways = vec![];
        for class in &mut *staged {
            let Some(at) = class.like(splits) else { break };
            ways.push((class.ways[at], Arc::new(vec![class.labels(prices, at)])));
        }
        let between = classes
            .kinds
            .iter()
            .map(|([from, to], uses)| Arc::new(between(prices, uses, &[ways[*from].0], &[ways[*to].0])));
        let kinds: Vec<Arc<Vec<f64>>> = between.collect();
        let pair = |(of, kind): &([usize; 2], usize)| Pair { of: *of, seconds: kinds[*kind].clone() };
        let pairs = classes.pairs.iter().map(pair).collect();
        let problem = Problem { segments: classes.of.iter().map(|c| ways[*c].1.clone()).collect(), pairs };
        let found = stages::solve(&problem, prices.site.pipeline, budget, most);
        if let Some((solution, stages)) = found.filter(|(s, _)| s.seconds < most) {
            let ways = classes.of.iter().map(|c| ways[*c].0).collect();
            best = Some(Answer { solution, stages, ways });
        }
    }
    best
}
