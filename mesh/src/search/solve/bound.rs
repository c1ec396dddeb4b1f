//! A lower bound on what solutions within a budget take: memory beyond it costs time, at the price for which the bound is
//! highest. At each price the cheapest solution is a real one; the fastest of them that is within the budget is an upper
//! bound.

use super::cheapest::Cheapest;
use super::order::Order;
use super::{Label, Pair, Problem, Solution, hardly_more, join, least};
use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::Arc;

/// How often all segments take turns, at the most, until a solution is as good as that makes it.
const SWEEPS: usize = 16;
/// Prices that are tried at the most.
const PRICES: usize = 40;
/// The part of a bound that is not worth another price.
const ENOUGH: f64 = 1e-7;

/// What prices tell of a problem within a budget.
pub(super) struct Bounds {
    /// No solution takes fewer seconds.
    pub bound: f64,
    /// The price of a byte that says so, or some price where it is for nothing.
    pub price: f64,
    /// The fastest solution that was met within the budget.
    pub best: Option<Solution>,
}

/// A solution, and what it keeps of its memory.
pub(super) struct Point {
    pub solution: Solution,
    kept: f64,
}

impl Point {
    /// What it costs at a price, where so much of what it keeps is for nothing.
    fn cost(&self, price: f64, free: f64) -> f64 {
        self.solution.seconds + price * (self.kept - free)
    }
}

impl Problem {
    /// Bounds within a budget, as far as they are not beyond `most` seconds; None if no solution takes so few.
    pub(super) fn bounds(&self, budget: f64, most: f64) -> Option<Bounds> {
        let mut fast = self.cheapest(0.0, most)?;
        let seconds = fast.solution.seconds;
        let mut known = Bounds { bound: seconds, price: seconds / budget.max(1.0), best: None };
        let met = |known: &mut Bounds, solution: &Solution| {
            let most = known.best.as_ref().map_or(most, |b| b.seconds);
            if solution.memory <= budget && solution.seconds <= most {
                known.best = Some(solution.clone());
            }
        };
        met(&mut known, &fast.solution);
        if known.best.is_some() {
            return Some(known);
        }
        let mut small = self.smallest().filter(|s| s.solution.memory <= budget)?;
        met(&mut known, &small.solution);
        // Whatever is chosen, some memory comes and goes.
        let room = (budget - self.transient()).max(small.kept);
        for _ in 0..PRICES {
            if fast.kept <= room {
                break;
            }
            // What both cost at a price are tangents of the bound, which is concave: it is highest where they meet.
            let price = (small.solution.seconds - fast.solution.seconds) / (fast.kept - small.kept);
            if !price.is_finite() || fast.cost(price, room) <= known.bound * (1.0 + ENOUGH) {
                break;
            }
            let most = known.best.as_ref().map_or(most, |b| b.seconds);
            let Some(point) = self.cheapest(price, most + price * room) else {
                // All others take longer than that.
                return known.best.map(|b| Bounds { bound: b.seconds, price, best: Some(b) });
            };
            let bound = point.cost(price, room);
            if bound > known.bound {
                (known.bound, known.price) = (bound, price);
            }
            met(&mut known, &point.solution);
            if point.kept > room { fast = point } else { small = point }
        }
        Some(known)
    }

    /// The solution that costs least at a price, if that is not more than `most`.
    fn cheapest(&self, price: f64, most: f64) -> Option<Point> {
        let label = |labels: &Vec<Label>| vec![Label { seconds: least(labels, |l| l.cost(price)), ..Label::default() }];
        let segments = self.each_segment(|options| options.iter().map(label).collect::<Vec<_>>());
        let priced = Problem { segments, pairs: self.pairs.clone() };
        let most = hardly_more(most.min(priced.descent()));
        let floors = priced.floors(|l| l.seconds);
        let slack = most - floors.iter().sum::<f64>();
        let near = priced.whole().only(|s, _, l| l.seconds <= floors[s] + slack)?.live()?;
        let cheapest = Cheapest::new(&near.problem, Rc::new(Order::new(&near.problem)), 0.0);
        if cheapest.all > most || cheapest.all == f64::INFINITY {
            return None;
        }
        let options: Vec<usize> = cheapest.options(&near.problem).iter().zip(&near.of).map(|(o, of)| of[*o]).collect();
        let label = |(s, o): (usize, &usize)| {
            let labels = &self.segments[s][*o];
            let of = (0..labels.len()).min_by(|a, b| labels[*a].cost(price).total_cmp(&labels[*b].cost(price)));
            (*o, of.unwrap_or(0))
        };
        Some(self.point(options.iter().enumerate().map(label).collect()))
    }

    /// The solution that needs least memory, whatever time it takes; None if a segment has no options.
    pub(super) fn smallest(&self) -> Option<Point> {
        let labels = |(s, options): (usize, &Arc<Vec<Vec<Label>>>)| {
            options.iter().flatten().map(|l| (s, *l)).collect::<Vec<_>>()
        };
        let mut all: Vec<(usize, Label)> = self.segments.iter().enumerate().flat_map(labels).collect();
        all.sort_by(|(_, a), (_, b)| a.transient.total_cmp(&b.transient));
        // What segments keep at the least, if no more may come and go than that, then than that, and so on.
        let mut kept: Vec<Option<f64>> = vec![None; self.segments.len()];
        let (mut sum, mut missing, mut best) = (0.0, kept.len(), (f64::INFINITY, 0.0));
        for (s, label) in all {
            let least = kept[s].map_or(label.kept, |k| k.min(label.kept));
            sum += least - kept[s].unwrap_or(0.0);
            missing -= usize::from(kept[s].is_none());
            kept[s] = Some(least);
            if missing == 0 && sum + label.transient < best.0 {
                best = (sum + label.transient, label.transient);
            }
        }
        let of = |options: &Vec<Vec<Label>>| {
            let all = options.iter().enumerate().flat_map(|(o, labels)| (0..labels.len()).map(move |l| (o, l)));
            let size = |(o, l): &(usize, usize)| [options[*o][*l].kept, options[*o][*l].seconds];
            let small = all.filter(|(o, l)| options[*o][*l].transient <= best.1);
            small.min_by(|a, b| size(a).partial_cmp(&size(b)).unwrap_or(Ordering::Equal))
        };
        let chosen: Option<Vec<(usize, usize)>> = self.each_segment(of).iter().map(|of| **of).collect();
        Some(self.point(chosen?))
    }

    /// A solution: by segment its option, and which of that option's labels.
    fn point(&self, chosen: Vec<(usize, usize)>) -> Point {
        let labels = || self.segments.iter().zip(&chosen).map(|(options, (o, l))| options[*o][*l]);
        let all = labels().fold(Label::default(), |all, label| join(&all, &label));
        let between: f64 = self.pairs.iter().map(|p| self.seconds(p, p.of.map(|s| chosen[s].0))).sum();
        let seconds = all.seconds + between;
        let chosen = chosen.iter().zip(labels()).map(|((o, _), label)| (*o, label.again)).collect();
        let solution = Solution { chosen, seconds, memory: all.kept + all.transient, bound: seconds };
        Point { solution, kept: all.kept }
    }

    /// Seconds that some solution takes, whatever memory it needs, and hardly more: segments take turns to have the option that
    /// is best beside those of the others, until none changes. So what is slower need not be looked at.
    fn descent(&self) -> f64 {
        let alone: Vec<Arc<Vec<f64>>> =
            self.each_segment(|options| options.iter().map(|labels| least(labels, |l| l.seconds)).collect());
        let mut of: Vec<Vec<&Pair>> = vec![vec![]; alone.len()];
        self.pairs.iter().for_each(|p| p.of.iter().for_each(|s| of[*s].push(p)));
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
        own.zip(between).map_or(f64::INFINITY, |(own, between)| own + between)
    }
}
