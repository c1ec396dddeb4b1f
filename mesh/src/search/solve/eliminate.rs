//! The fastest solution within a budget, by elimination: for each choice of the neighbours' options stay the partial
//! solutions that no other one dominates, as far as they can be part of a solution that is fast enough.

use super::cheapest::{Cheapest, Through};
use super::order::Order;
use super::reduced::Reduced;
use super::{Label, Problem, Solution, hardly_more, join};
use std::cmp::Ordering;
use std::rc::Rc;

/// What tells that a partial solution leads to none that is looked for: prices of a byte, as parts of the best one. Those are
/// cut off at a high price that need too much memory, at a low one those that take too long, and between them both.
const PARTS: [f64; 5] = [0.0, 0.25, 1.0, 4.0, 1000.0];

/// What can be part of solutions that are looked for.
pub(super) struct Near {
    budget: f64,
    /// Seconds that they take at the most.
    most: f64,
    /// What comes and goes at the least.
    transient: f64,
    reduced: Reduced,
    order: Rc<Order>,
    views: Vec<View>,
}

/// What solutions cost at a price.
struct View {
    price: f64,
    cheapest: Cheapest,
    through: Through,
    /// What one that is looked for costs at the most.
    most: f64,
}

/// What was found, and how.
pub(super) struct Found {
    /// The fastest.
    pub solution: Option<Solution>,
    /// Whether partial solutions were left out that might have led to a faster one.
    pub cut: bool,
    /// Sums of partial solutions that were looked at.
    pub sums: u64,
}

/// What is chosen for a segment, and the decisions before it.
#[derive(Clone, Default)]
struct Choice {
    option: usize,
    again: bool,
    before: Vec<usize>,
}

/// Sums, and the decision that led to them.
type Partial = (Label, usize);

struct Elimination<'a> {
    near: &'a Near,
    /// Decisions: of which segment, and what.
    trace: Vec<(usize, Choice)>,
    /// Partial solutions that stay for one choice of neighbours.
    partials: usize,
    cut: bool,
    sums: u64,
}

impl Problem {
    /// What can be part of solutions of `most` seconds or less within a budget, as far as prices of about that tell it; None
    /// if there is no such solution. At any price, one of them costs no more than `most` seconds and all of the budget.
    pub(super) fn near(&self, budget: f64, most: f64, price: f64) -> Option<Near> {
        let prices = PARTS.map(|part| part * price);
        let mut reduced = self.whole();
        loop {
            let transient = reduced.problem.transient();
            let most_at = |price: f64| hardly_more(most + price * (budget - transient));
            let slack = |price: f64| {
                let floors = reduced.problem.floors(|l| l.cost(price));
                let slack = most_at(price) - floors.iter().sum::<f64>();
                (price, floors, slack)
            };
            let slack = prices.map(slack);
            let fits = |s: usize, l: &Label| {
                slack.iter().all(|(price, floors, slack)| cost(l, transient, *price) <= floors[s] + slack)
            };
            reduced = reduced.only(|s, _, l| fits(s, l))?.live()?;
            let order = Rc::new(Order::new(&reduced.problem));
            let view = |price: f64| {
                let most = most_at(price);
                let cheapest = Cheapest::new(&reduced.problem, order.clone(), price);
                let through = cheapest.through(most);
                (cheapest.all <= most).then_some(View { price, cheapest, through, most })
            };
            let views: Vec<View> = prices.into_iter().map(view).collect::<Option<_>>()?;
            let fits = |v: &View, s: usize, o: usize, l: &Label| {
                v.through.option[s][o] - v.cheapest.own[s][o] + cost(l, transient, v.price) <= v.most
            };
            let less = reduced.only(|s, o, l| views.iter().all(|v| fits(v, s, o, l)))?;
            if less.problem.labels() == reduced.problem.labels() {
                return Some(Near { budget, most, transient, reduced, order, views });
            }
            reduced = less;
        }
    }
}

/// What a label costs at a price of a byte. Of what comes and goes some is there whatever is chosen: the more counts.
fn cost(label: &Label, transient: f64, price: f64) -> f64 {
    label.cost(price) + price * (label.transient - transient).max(0.0)
}

impl Near {
    /// The fastest solution, of which so many partial ones stay for each choice of neighbours.
    pub fn fastest(&self, partials: usize) -> Found {
        let mut e = Elimination { near: self, trace: vec![], partials, cut: false, sums: 0 };
        let all = e.run().into_iter().filter(|(label, _)| label.seconds <= self.most);
        let best = all.min_by(|(a, _), (b, _)| a.seconds.total_cmp(&b.seconds));
        let solution = best.map(|(Label { seconds, kept, transient, .. }, last)| {
            let mut chosen = vec![(0, false); self.reduced.of.len()];
            let mut open = last.before;
            while let Some(at) = open.pop() {
                let (segment, choice) = &e.trace[at];
                chosen[*segment] = (self.reduced.of[*segment][choice.option], choice.again);
                open.extend(&choice.before);
            }
            Solution { chosen, seconds, memory: kept + transient, bound: seconds }
        });
        Found { solution, cut: e.cut, sums: e.sums }
    }

    /// Whether a label costs `most` or less at each price.
    fn within(&self, label: &Label, most: &[f64]) -> bool {
        self.views.iter().zip(most).all(|(v, most)| cost(label, self.transient, v.price) <= *most)
    }
}

impl Elimination<'_> {
    /// All segments one after the other; what is left are whole solutions.
    fn run(&mut self) -> Vec<(Label, Choice)> {
        let Near { order, views, .. } = self.near;
        let mut lists: Vec<Vec<Vec<Partial>>> = vec![];
        // Parts that nothing connects.
        let mut all = vec![(Label::default(), Choice::default())];
        let mut rest: Vec<f64> = views.iter().map(|v| v.most - v.cheapest.all).collect();
        let mut most = vec![0.0; views.len()];
        for (at, bucket) in order.buckets.iter().enumerate() {
            let mut table = Vec::with_capacity(bucket.states);
            bucket.each(|state, from| {
                // What a partial solution costs more than the cheapest one a whole one does as well.
                let slack = |v: &View| v.most - v.through.state[at][state];
                most.iter_mut().zip(views).for_each(|(most, v)| *most = v.cheapest.least[at][state] + slack(v));
                let open = views.iter().all(|v| slack(v) >= 0.0);
                table.push(if open { self.best(at, from, &most, &lists) } else { vec![] });
            });
            if bucket.over.is_empty() {
                rest.iter_mut().zip(views).for_each(|(rest, v)| *rest += v.cheapest.least[at][0]);
                all = self.joined(all, &table[0], &rest);
            }
            lists.push(table);
        }
        all
    }

    /// The partial solutions that cost `most` or less for one choice of the neighbours' options, where tables begin `from`
    /// there.
    fn best(&mut self, at: usize, from: &[usize], most: &[f64], lists: &[Vec<Vec<Partial>>]) -> Vec<Partial> {
        let Near { order, reduced, views, .. } = self.near;
        let bucket = &order.buckets[at];
        let segment = bucket.segment;
        let (of_pairs, of_buckets) = from.split_at(bucket.pairs.len());
        let below = || bucket.below.iter().zip(of_buckets);
        let mut found = vec![];
        let mut most_of = vec![0.0; views.len()];
        for (option, labels) in reduced.problem.segments[segment].iter().enumerate() {
            let between: f64 = bucket.pairs.iter().zip(of_pairs).map(|(p, from)| order.pairs[*p][from + option]).sum();
            for ((most_of, v), most) in most_of.iter_mut().zip(views).zip(most) {
                *most_of = most - below().map(|(b, from)| v.cheapest.least[*b][from + option]).sum::<f64>();
            }
            let mut sums = vec![];
            for label in labels {
                let choice = Choice { option, again: label.again, before: vec![] };
                let label = Label { seconds: label.seconds + between, ..*label };
                if self.near.within(&label, &most_of) {
                    sums.push((label, choice));
                }
            }
            for (b, from) in below() {
                if sums.is_empty() {
                    break;
                }
                for (most_of, v) in most_of.iter_mut().zip(views) {
                    *most_of += v.cheapest.least[*b][from + option];
                }
                sums = self.joined(sums, &lists[*b][from + option], &most_of);
            }
            found.extend(sums);
        }
        let mut list = vec![];
        for (label, choice) in self.thinned(found) {
            self.trace.push((segment, choice));
            list.push((label, self.trace.len() - 1));
        }
        list
    }

    /// Each sum with each of some partial solutions, as far as they cost `most` or less.
    fn joined(&mut self, sums: Vec<(Label, Choice)>, list: &[Partial], most: &[f64]) -> Vec<(Label, Choice)> {
        self.sums += (sums.len() * list.len()) as u64;
        let mut found = vec![];
        for (i, (sum, _)) in sums.iter().enumerate() {
            for (partial, trace) in list {
                let label = join(sum, partial);
                if self.near.within(&label, most) {
                    found.push((label, (i, *trace)));
                }
            }
        }
        let with = |(label, (i, trace)): (Label, (usize, usize))| {
            let mut choice = sums[i].1.clone();
            choice.before.push(trace);
            (label, choice)
        };
        self.thinned(found).into_iter().map(with).collect()
    }

    /// Of some sums within the budget those that no other one dominates, the fastest first; of these as many as stay: the
    /// smallest one, and others evenly from the fastest on.
    fn thinned<T>(&mut self, mut all: Vec<(Label, T)>) -> Vec<(Label, T)> {
        all.retain(|(l, _)| l.kept + l.transient <= self.near.budget);
        undominated(&mut all);
        let (n, most) = (all.len(), self.partials);
        if n <= most {
            return all;
        }
        self.cut = true;
        let memory = |i: &usize| all[*i].0.kept + all[*i].0.transient;
        let smallest = (0..n).min_by(|a, b| memory(a).total_cmp(&memory(b)));
        let mut stay = vec![false; n];
        (0..most - 1).map(|i| i * n / (most - 1)).chain(smallest).for_each(|i| stay[i] = true);
        all.into_iter().zip(stay).filter(|(_, stay)| *stay).map(|(sum, _)| sum).collect()
    }
}

/// Leaves those that no other one dominates, one of equals, the fastest first.
pub(super) fn undominated<T>(all: &mut Vec<(Label, T)>) {
    let by = |l: &Label| [l.seconds, l.kept, l.transient];
    all.sort_by(|(a, _), (b, _)| by(a).partial_cmp(&by(b)).unwrap_or(Ordering::Equal));
    // What is kept, and what comes and goes, of those so far that are not dominated in these: the more of the one, the less of
    // the other.
    let mut stairs: Vec<(f64, f64)> = vec![];
    all.retain(|(l, _)| {
        let behind = stairs.partition_point(|(kept, _)| *kept <= l.kept);
        let before = behind.checked_sub(1).map(|i| stairs[i]);
        if before.is_some_and(|(_, transient)| transient <= l.transient) {
            return false;
        }
        let from = if before.is_some_and(|(kept, _)| kept == l.kept) { behind - 1 } else { behind };
        let worse = stairs[from..].iter().take_while(|(_, transient)| *transient >= l.transient).count();
        stairs.splice(from..from + worse, [(l.kept, l.transient)]);
        true
    });
}
