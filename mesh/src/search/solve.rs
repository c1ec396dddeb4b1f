//! The exact minimum over segments: what each is split by, and what goes between any two, under a limit of memory.
//!
//! Segments are variables, the ways to split one are its options, and what moves between two is a table of their options.
//! Segments are eliminated one after the other, that with the fewest neighbours first: for each choice of its neighbours'
//! options stay the partial solutions that no other one dominates, in seconds, in memory that is kept and in memory that
//! comes and goes. A chain is the usual dynamic programming so; a skip connection keeps its producer's option as a state
//! until its consumer is eliminated.

use std::sync::Arc;

/// Partial solutions that stay, at the most, for one choice of neighbours: few at first, for a bound on the time; with the
/// last number the answer may have a gap.
const PARTIALS: [usize; 3] = [4, 16, 64];
/// Sums that a round may take for the next one to be tried.
const SUMS: u64 = 1_000_000;
/// How often all segments take turns, at the most, until a solution is as good as that makes it.
const SWEEPS: usize = 16;
/// Rounds of the search for the multiplier that gives the best lower bound.
const ROUNDS: usize = 10;

/// One way to run a segment that is split in some way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Label {
    /// Seconds.
    pub seconds: f64,
    /// Bytes that stay while other segments run: these add up.
    pub kept: f64,
    /// How many of them there are for each micro-batch in flight, where a step goes in several.
    pub flight: f64,
    /// Bytes more while it runs itself: of these the most counts.
    pub transient: f64,
    /// Whether its block is made again.
    pub again: bool,
}

impl Label {
    fn dominates(&self, other: &Label) -> bool {
        self.seconds <= other.seconds && self.kept <= other.kept && self.transient <= other.transient
    }
}

/// Adds a label to those that no other one dominates.
pub fn insert(list: &mut Vec<Label>, new: Label) {
    if !list.iter().any(|l| l.dominates(&new)) {
        list.retain(|l| !new.dominates(l));
        list.push(new);
    }
}

/// Seconds between two segments, by the option of the first and of the second one, row after row.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The segments.
    pub of: [usize; 2],
    /// Seconds.
    pub seconds: Arc<Vec<f64>>,
}

/// What is to be minimised.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    /// By segment and option.
    pub segments: Vec<Arc<Vec<Vec<Label>>>>,
    /// What goes between segments, each two once.
    pub pairs: Vec<Pair>,
}

/// A minimum.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// By segment: option, and whether its block is made again.
    pub chosen: Vec<(usize, bool)>,
    /// Seconds.
    pub seconds: f64,
    /// Bytes.
    pub memory: f64,
    /// No solution is faster than this: the same seconds, if nothing was cut off.
    pub bound: f64,
}

/// A partial solution: sums, and the decisions that led to it.
#[derive(Clone, Copy)]
struct Partial {
    label: Label,
    trace: usize,
}

/// A sum of partial solutions, before it is one: the option and the label that it adds, and what it was made of.
#[derive(Clone, Default)]
struct Sum {
    label: Label,
    option: usize,
    again: bool,
    before: Vec<usize>,
}

/// A decision, with those that it was made after.
struct Step {
    segment: usize,
    option: usize,
    again: bool,
    before: Vec<usize>,
}

/// Partial solutions by the options of some segments.
struct Factor {
    over: Vec<usize>,
    lists: Vec<Vec<Partial>>,
    /// The fewest seconds that the segments of its partial solutions take by themselves.
    floor: f64,
}

struct Elimination<'a> {
    problem: &'a Problem,
    /// The options of a segment that may be part of the best solution.
    live: Vec<Vec<usize>>,
    budget: f64,
    /// Seconds beyond which a solution is of no interest.
    most: f64,
    /// The fewest seconds that each segment takes by itself.
    floors: Vec<f64>,
    factors: Vec<Factor>,
    trace: Vec<Step>,
    /// Partial solutions that stay.
    partials: usize,
    cut: bool,
    sums: u64,
}

impl Problem {
    fn seconds(&self, pair: &Pair, at: [usize; 2]) -> f64 {
        pair.seconds[at[0] * self.segments[pair.of[1]].len() + at[1]]
    }

    /// The fastest solution within a budget of memory that takes `most` seconds or less; None if there is none, as far as
    /// partial solutions were kept.
    pub fn solve(&self, budget: f64, most: f64) -> Option<Solution> {
        let free = self.eliminate(f64::INFINITY, most.min(self.descent()), 1).0?;
        if free.memory <= budget {
            return Some(free);
        }
        let bound = self.bound(budget, most).max(free.seconds);
        if bound > most {
            return None;
        }
        let mut best: Option<Solution> = None;
        for partials in PARTIALS {
            let most = best.as_ref().map_or(most, |b| b.seconds);
            let (found, cut, sums) = self.eliminate(budget, most, partials);
            best = found.or(best);
            if !cut {
                return best;
            }
            if sums > SUMS {
                break;
            }
        }
        best.map(|b| Solution { bound: bound.min(b.seconds), ..b })
    }

    /// The least memory that a solution is known to need.
    pub fn least_memory(&self) -> f64 {
        let least = |of: fn(&Label) -> f64, options: &Vec<Vec<Label>>| {
            options.iter().flatten().map(of).fold(f64::INFINITY, f64::min)
        };
        let kept: f64 = self.segments.iter().map(|s| least(|l| l.kept, s)).sum();
        kept + self.segments.iter().map(|s| least(|l| l.transient, s)).fold(0.0, f64::max)
    }

    /// A lower bound within a budget: memory beyond it costs time, at the price for which the bound is highest; the search
    /// for that ends with one that is `enough`.
    fn bound(&self, budget: f64, enough: f64) -> f64 {
        let at = |price: f64| {
            let priced = |l: &Label| Label { seconds: l.seconds + price * l.kept, kept: 0.0, transient: 0.0, ..*l };
            let options = |s: &Arc<Vec<Vec<Label>>>| s.iter().map(|o| o.iter().map(priced).collect()).collect();
            let problem = Problem {
                segments: self.segments.iter().map(|s| Arc::new(options(s))).collect(),
                pairs: self.pairs.clone(),
            };
            let enough = (enough + price * budget).min(problem.descent());
            let free = problem.eliminate(f64::INFINITY, enough, 1).0;
            free.map_or(f64::INFINITY, |s| s.seconds - price * budget)
        };
        let mut best = at(0.0);
        // The bound is concave in the price: thirds close in on the best one.
        let (mut low, mut high) = (0.0, 4.0 * best.max(1e-9) / budget.max(1.0));
        for _ in 0..ROUNDS {
            let (a, b) = (low + (high - low) / 3.0, high - (high - low) / 3.0);
            let [of_a, of_b] = [at(a), at(b)];
            best = best.max(of_a).max(of_b);
            if best > enough {
                break;
            }
            if of_a < of_b { low = a } else { high = b }
        }
        best
    }

    /// Seconds that some solution takes, whatever memory it needs, and hardly more: segments take turns to have the option that
    /// is best beside those of the others, until none changes. So what is slower need not be looked at.
    fn descent(&self) -> f64 {
        let fastest = |labels: &Vec<Label>| labels.iter().map(|l| l.seconds).fold(f64::INFINITY, f64::min);
        let alone: Vec<Vec<f64>> = self.segments.iter().map(|s| s.iter().map(fastest).collect()).collect();
        let of: Vec<Vec<&Pair>> =
            (0..alone.len()).map(|s| self.pairs.iter().filter(|p| p.of.contains(&s)).collect()).collect();
        // At first each beside those in front of it.
        let mut chosen: Vec<Option<usize>> = vec![None; alone.len()];
        for _ in 0..SWEEPS {
            let before = chosen.clone();
            for (s, options) in alone.iter().enumerate() {
                let beside = |option: usize| {
                    let at = |i: usize| if i == s { Some(option) } else { chosen[i] };
                    let all = of[s].iter().filter_map(|p| Some(self.seconds(p, [at(p.of[0])?, at(p.of[1])?])));
                    options[option] + all.sum::<f64>()
                };
                let all: Vec<f64> = (0..options.len()).map(beside).collect();
                let best = (0..all.len()).min_by(|a, b| all[*a].total_cmp(&all[*b]));
                chosen[s] = best;
            }
            if chosen == before {
                break;
            }
        }
        let own: Option<f64> = alone.iter().zip(&chosen).map(|(options, c)| Some(options[(*c)?])).sum();
        let between: Option<f64> =
            self.pairs.iter().map(|p| Some(self.seconds(p, [chosen[p.of[0]]?, chosen[p.of[1]]?]))).sum();
        own.zip(between).map_or(f64::INFINITY, |(own, between)| (own + between) * (1.0 + 1e-9))
    }

    /// A solution, whether partial ones were left out, and how many sums that took.
    fn eliminate(&self, budget: f64, most: f64, partials: usize) -> (Option<Solution>, bool, u64) {
        let fastest = |s: &Arc<Vec<Vec<Label>>>| s.iter().flatten().map(|l| l.seconds).fold(f64::INFINITY, f64::min);
        let floors: Vec<f64> = self.segments.iter().map(fastest).collect();
        let slack = most - floors.iter().sum::<f64>() * (1.0 - 1e-12);
        let live = (0..self.segments.len()).map(|s| self.live(s, floors[s] + slack)).collect();
        let (factors, trace, cut, sums) = (vec![], vec![], false, 0);
        let mut e = Elimination { problem: self, live, budget, most, partials, floors, factors, trace, cut, sums };
        let mut left: Vec<usize> = (0..self.segments.len()).collect();
        let mut states: Vec<u64> = left.iter().map(|s| e.states(*s, &left)).collect();
        while let Some(at) = (0..left.len()).min_by_key(|i| (states[left[*i]], *i)) {
            let segment = left.remove(at);
            e.remove(segment, &left);
            // No others have other neighbours than before.
            let over = e.factors.last().map_or(&[][..], |f| &f.over);
            over.iter().for_each(|s| states[*s] = e.states(*s, &left));
        }
        // Factors of no segment are parts that nothing connects.
        let mut all = vec![Sum::default()];
        for factor in std::mem::take(&mut e.factors) {
            all = e.joined(all, &factor.lists[0], most);
        }
        let Some(best) = all.into_iter().min_by(|a, b| a.label.seconds.total_cmp(&b.label.seconds)) else {
            return (None, e.cut, e.sums);
        };
        let mut chosen = vec![(0, false); self.segments.len()];
        let mut open = best.before;
        while let Some(at) = open.pop() {
            let step = &e.trace[at];
            chosen[step.segment] = (step.option, step.again);
            open.extend(&step.before);
        }
        let label = best.label;
        let (seconds, memory) = (label.seconds, label.kept + label.transient);
        (Some(Solution { chosen, seconds, memory, bound: seconds }), e.cut, e.sums)
    }

    /// The options of a segment of `most` seconds or less that no other one replaces: as good in itself by more than what its
    /// neighbours may lose.
    fn live(&self, segment: usize, most: f64) -> Vec<usize> {
        let options = &self.segments[segment];
        let pairs: Vec<&Pair> = self.pairs.iter().filter(|p| p.of.contains(&segment)).collect();
        let fastest = |o: usize| options[o].iter().map(|l| l.seconds).fold(f64::INFINITY, f64::min);
        let mut order: Vec<usize> = (0..options.len()).filter(|o| fastest(*o) <= most).collect();
        order.sort_by(|a, b| fastest(*a).total_cmp(&fastest(*b)));
        let replaces = |new: usize, old: usize| {
            // By how much the old one's slowest way may be beaten.
            let margin = |loss: f64| {
                options[old]
                    .iter()
                    .all(|l| options[new].iter().any(|n| Label { seconds: n.seconds + loss, ..*n }.dominates(l)))
            };
            if !margin(0.0) {
                return false;
            }
            let mut loss = 0.0;
            for pair in &pairs {
                let first = pair.of[0] == segment;
                let other = self.segments[pair.of[usize::from(first)]].len();
                let at = |option, x| self.seconds(pair, if first { [option, x] } else { [x, option] });
                loss += (0..other).map(|x| at(new, x) - at(old, x)).fold(f64::NEG_INFINITY, f64::max);
            }
            margin(loss.max(0.0))
        };
        let mut live: Vec<usize> = vec![];
        for option in order {
            if !live.iter().any(|&l| replaces(l, option)) {
                live.push(option);
            }
        }
        live
    }
}

/// Both one after the other.
fn join(a: &Label, b: &Label) -> Label {
    Label {
        seconds: a.seconds + b.seconds,
        kept: a.kept + b.kept,
        flight: a.flight + b.flight,
        transient: a.transient.max(b.transient),
        again: false,
    }
}

impl Elimination<'_> {
    fn neighbours(&self, segment: usize, left: &[usize]) -> Vec<usize> {
        let by_pair = self.problem.pairs.iter().filter(|p| p.of.contains(&segment)).flat_map(|p| p.of);
        let by_factor = self.factors.iter().filter(|f| f.over.contains(&segment)).flat_map(|f| f.over.iter().copied());
        let mut all: Vec<usize> = by_pair.chain(by_factor).filter(|s| *s != segment && left.contains(s)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// For how many choices of neighbours a segment's options are to be compared.
    fn states(&self, segment: usize, left: &[usize]) -> u64 {
        self.neighbours(segment, left).iter().fold(1u64, |n, s| n.saturating_mul(self.live[*s].len() as u64))
    }

    /// Position in a factor's lists.
    fn place(&self, over: &[usize], at: impl Fn(usize) -> usize) -> usize {
        over.iter().fold(0, |place, &s| place * self.live[s].len() + at(s))
    }

    fn remove(&mut self, segment: usize, left: &[usize]) {
        let over = self.neighbours(segment, left);
        let (mine, rest) = std::mem::take(&mut self.factors).into_iter().partition(|f| f.over.contains(&segment));
        self.factors = rest;
        let mine: Vec<Factor> = mine;
        let pairs: Vec<&Pair> = self
            .problem
            .pairs
            .iter()
            .filter(|p| p.of.contains(&segment) && p.of.iter().all(|s| *s == segment || over.contains(s)))
            .collect();
        let sizes: Vec<usize> = over.iter().map(|s| self.live[*s].len()).collect();
        let mut lists = Vec::with_capacity(sizes.iter().product());
        let mut at = vec![0; over.len()];
        let floor = self.floors[segment] + mine.iter().map(|f| f.floor).sum::<f64>();
        let most = self.most - (self.floors.iter().sum::<f64>() - floor) * (1.0 - 1e-12);
        // What the neighbours take by themselves beyond their fastest options leaves less for this segment.
        let alone = |s: usize, o: usize| {
            let labels = &self.problem.segments[s][self.live[s][o]];
            labels.iter().map(|l| l.seconds).fold(f64::INFINITY, f64::min) - self.floors[s]
        };
        let more: Vec<Vec<f64>> =
            over.iter().map(|s| (0..self.live[*s].len()).map(|o| alone(*s, o)).collect()).collect();
        for _ in 0..sizes.iter().product::<usize>() {
            let most = most - at.iter().zip(&more).map(|(o, more)| more[*o]).sum::<f64>() * (1.0 - 1e-12);
            let list = match most >= floor * (1.0 - 1e-12) {
                true if self.budget == f64::INFINITY => self.fastest(segment, &over, &at, &pairs, &mine, most),
                true => self.best(segment, &over, &at, &pairs, &mine, most),
                false => vec![],
            };
            lists.push(list);
            for i in (0..at.len()).rev() {
                at[i] += 1;
                if at[i] < sizes[i] {
                    break;
                }
                at[i] = 0;
            }
        }
        self.factors.push(Factor { over, lists, floor });
    }

    /// The fastest partial solution of `most` seconds or less, where memory is no matter.
    fn fastest(
        &mut self,
        segment: usize,
        over: &[usize],
        at: &[usize],
        pairs: &[&Pair],
        mine: &[Factor],
        most: f64,
    ) -> Vec<Partial> {
        let index = |s: usize| at[over.iter().position(|o| *o == s).unwrap_or(0)];
        let options = &self.problem.segments[segment];
        // Of each table, where the choice begins and how far apart the segment's options are.
        let tables: Vec<(&Pair, usize, usize)> = pairs
            .iter()
            .map(|p| {
                let columns = self.problem.segments[p.of[1]].len();
                let other = |i: usize| self.live[p.of[i]][index(p.of[i])];
                if p.of[0] == segment { (*p, other(1), columns) } else { (*p, other(0) * columns, 1) }
            })
            .collect();
        let of_factor = |f: &Factor| {
            let from = self.place(&f.over, |s| if s == segment { 0 } else { index(s) });
            let step = self.place(&f.over, |s| usize::from(s == segment));
            (from, step)
        };
        let factors: Vec<(usize, usize)> = mine.iter().map(of_factor).collect();
        let mut best: Option<(f64, usize)> = None;
        for (i, &option) in self.live[segment].iter().enumerate() {
            let alone = options[option].iter().map(|l| l.seconds).fold(f64::INFINITY, f64::min);
            let mut seconds = alone + tables.iter().map(|(t, from, step)| t.seconds[from + step * option]).sum::<f64>();
            for (f, (from, step)) in mine.iter().zip(&factors) {
                seconds += f.lists[from + step * i].first().map_or(f64::INFINITY, |p| p.label.seconds);
            }
            if seconds <= best.map_or(most, |(b, _)| b) && best.is_none_or(|(b, _)| seconds < b) {
                best = Some((seconds, i));
            }
        }
        let Some((seconds, i)) = best.filter(|(s, _)| s.is_finite()) else { return vec![] };
        let option = self.live[segment][i];
        let own = options[option].iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds)).copied().unwrap_or_default();
        let mut label = own;
        let mut before = vec![];
        for (f, (from, step)) in mine.iter().zip(&factors) {
            let partial = f.lists[from + step * i][0];
            label = join(&label, &partial.label);
            before.push(partial.trace);
        }
        self.trace.push(Step { segment, option, again: own.again, before });
        vec![Partial { label: Label { seconds, ..label }, trace: self.trace.len() - 1 }]
    }

    /// The partial solutions of `most` seconds or less for one choice of the neighbours' options, `at` of those that live.
    fn best(
        &mut self,
        segment: usize,
        over: &[usize],
        at: &[usize],
        pairs: &[&Pair],
        mine: &[Factor],
        most: f64,
    ) -> Vec<Partial> {
        let index = |s: usize| at[over.iter().position(|o| *o == s).unwrap_or(0)];
        let mut found: Vec<Sum> = vec![];
        for (i, &option) in self.live[segment].clone().iter().enumerate() {
            let live = |s: usize| if s == segment { option } else { self.live[s][index(s)] };
            let between: f64 = pairs.iter().map(|p| self.problem.seconds(p, p.of.map(live))).sum();
            let lists: Vec<&Vec<Partial>> = mine
                .iter()
                .map(|f| &f.lists[self.place(&f.over, |s| if s == segment { i } else { index(s) })])
                .collect();
            let least = |l: &&Vec<Partial>| l.iter().map(|p| p.label.seconds).fold(f64::INFINITY, f64::min);
            let mut behind = between + lists.iter().map(least).sum::<f64>();
            let mut own: Vec<Sum> = vec![];
            for label in self.problem.segments[segment][option].iter().filter(|l| behind + l.seconds <= most) {
                self.keep(&mut own, Sum { label: *label, option, again: label.again, before: vec![] });
            }
            own.iter_mut().for_each(|sum| sum.label.seconds += between);
            behind -= between;
            for list in &lists {
                behind -= least(list);
                own = self.joined(own, list, most - behind * (1.0 - 1e-12));
            }
            own.into_iter().for_each(|sum| self.keep(&mut found, sum));
        }
        let add = |e: &mut Self, Sum { label, option, again, before }| {
            e.trace.push(Step { segment, option, again, before });
            Partial { label, trace: e.trace.len() - 1 }
        };
        self.thinned(found).into_iter().map(|sum| add(self, sum)).collect()
    }

    /// Each sum with each of some partial solutions, as far as they take `most` seconds or less.
    fn joined(&mut self, sums: Vec<Sum>, list: &[Partial], most: f64) -> Vec<Sum> {
        let mut found = vec![];
        self.sums += (sums.len() * list.len()) as u64;
        for sum in &sums {
            for partial in list.iter().filter(|p| sum.label.seconds + p.label.seconds <= most) {
                let before = [sum.before.as_slice(), &[partial.trace]].concat();
                self.keep(&mut found, Sum { label: join(&sum.label, &partial.label), before, ..*sum });
            }
        }
        self.thinned(found)
    }

    /// Adds a sum to those that no other one dominates, if it is within the budget.
    fn keep(&self, found: &mut Vec<Sum>, new: Sum) {
        if new.label.kept + new.label.transient > self.budget || found.iter().any(|f| f.label.dominates(&new.label)) {
            return;
        }
        found.retain(|f| !new.label.dominates(&f.label));
        found.push(new);
    }

    /// As many of some sums as stay: the smallest one, and others evenly from the fastest on.
    fn thinned(&mut self, mut found: Vec<Sum>) -> Vec<Sum> {
        let (n, most) = (found.len(), self.partials);
        if n <= most {
            return found;
        }
        self.cut = true;
        found.sort_by(|a, b| a.label.seconds.total_cmp(&b.label.seconds));
        let memory = |i: &usize| found[*i].label.kept + found[*i].label.transient;
        let smallest = (0..n).min_by(|a, b| memory(a).total_cmp(&memory(b)));
        let mut stay: Vec<usize> = (0..most - 1).map(|i| i * n / (most - 1)).chain(smallest).collect();
        stay.sort_unstable();
        stay.dedup();
        stay.into_iter().map(|i| found[i].clone()).collect()
    }
}

#[cfg(test)]
mod tests;
