//! Steps in an order, and the moves of some of them to other places.

use super::super::device::Worked;
use super::super::function::Planner;
use super::graph::{Collective, Graph};
use super::{Moment, Phase};
use std::collections::HashMap;
use std::sync::Arc;

/// How often what a collective takes is to be between its beginning and its end at the most.
const ENOUGH: f64 = 4.0;
/// How far steps are moved to be beside a collective.
const FAR: usize = 64;

/// Steps in an order, and what is in memory at each.
#[derive(Clone)]
pub(super) struct List {
    graph: Arc<Graph>,
    /// By place: the moment there.
    order: Vec<usize>,
    /// By moment: its place.
    at: Vec<usize>,
    /// By class of devices and moment: the bytes that are there.
    alive: Vec<Vec<isize>>,
}

impl List {
    /// All moments of a function in the order of its list.
    pub(super) fn new(p: &Planner, works: &[Vec<Worked>]) -> List {
        let (graph, alive) = Graph::new(p, works);
        let order: Vec<usize> = (0..graph.moments.len()).collect();
        List { graph: Arc::new(graph), at: order.clone(), order, alive }
    }

    /// The moments in their order, after all moves that leave that share of the peak free, or as free as it is.
    pub(super) fn moved(mut self, margin: f64) -> Vec<Moment> {
        let graph = self.graph.clone();
        let limits: Vec<Vec<isize>> = self
            .alive
            .iter()
            .zip(&graph.peak)
            .map(|(alive, peak)| alive.iter().map(|b| (*b).max((*peak as f64 * (1.0 - margin)) as isize)).collect())
            .collect();
        for of in &graph.collectives {
            self.sink(of, &limits);
        }
        for of in &graph.collectives {
            self.fill(of, &limits);
        }
        self.together()
    }

    /// Moves the end of a collective down to its first reader, and its combination half of the way.
    fn sink(&mut self, of: &Collective, limits: &[Vec<isize>]) {
        let last = of.last();
        let end = self.order.len() - 1;
        let reader = self.graph.behind[last].iter().map(|m| self.at[*m]).min().unwrap_or(end);
        let enough = if of.short { f64::INFINITY } else { ENOUGH * of.cost };
        let far = |list: &List, from: usize, enough: f64| {
            let (mut to, mut done) = (from, 0.0);
            while to + 1 < reader && done < enough {
                to += 1;
                done += list.hides(of, list.order[to]);
            }
            (to, done)
        };
        if let (Some(combine), Some(finish)) = (of.combine, of.finish) {
            // The results are as long as the parts.
            let (to, all) = far(&*self, self.at[finish], 2.0 * enough);
            self.down(finish, to, limits);
            let (to, _) = far(&*self, self.at[combine], all / 2.0);
            self.down(combine, to.min(self.at[finish] - 1), limits);
        } else {
            let (to, _) = far(&*self, self.at[last], enough);
            self.down(last, to, limits);
        }
    }

    /// Moves a moment down, as far as there is room.
    fn down(&mut self, m: usize, mut to: usize, limits: &[Vec<isize>]) {
        let from = self.at[m];
        while to > from && !self.shift(m, to, limits) {
            to = from + (to - from) / 2;
        }
    }

    /// Where there is too little between the beginning and the end of a collective: begins it earlier, and has independent
    /// products done in between.
    fn fill(&mut self, of: &Collective, limits: &[Vec<isize>]) {
        if of.short && self.hidden(of) > 0.0 {
            return;
        }
        let missing = of.cost - self.hidden(of);
        if missing <= 0.0 {
            return;
        }
        self.raise(of, missing, limits);
        // Products behind it, and products before it.
        let last = of.last();
        for way in [true, false] {
            for distance in 1..FAR {
                if self.hidden(of) >= of.cost {
                    return;
                }
                let place =
                    if way { self.at[last].checked_add(distance) } else { self.at[of.begin].checked_sub(distance) };
                let Some(&m) = place.and_then(|place| self.order.get(place)) else { break };
                if !self.graph.product[m] || self.hides(of, m) <= 0.0 {
                    continue;
                }
                if way {
                    self.up(m, self.at[last], limits, 1);
                } else if self.graph.behind[m].iter().all(|b| self.at[*b] > self.at[of.begin]) {
                    self.shift(m, self.at[of.begin], limits);
                }
            }
        }
    }

    /// Begins a collective so much earlier, or as early as can be.
    fn raise(&mut self, of: &Collective, mut missing: f64, limits: &[Vec<isize>]) {
        let from = self.at[of.begin];
        let mut to = from;
        while to > 1 && missing > 0.0 && from - to < FAR {
            to -= 1;
            missing -= self.hides(of, self.order[to]);
        }
        while to < from && !self.up(of.begin, to, limits, 2) {
            to = from - (from - to) / 2;
        }
    }

    /// Moves a moment up, with what it needs and is no product, if there is room and nothing else is in the way.
    fn up(&mut self, m: usize, to: usize, limits: &[Vec<isize>], depth: usize) -> bool {
        let graph = self.graph.clone();
        let mut way: Vec<usize> = graph.before[m].iter().copied().filter(|b| self.at[*b] >= to).collect();
        way.sort_unstable_by_key(|b| self.at[*b]);
        way.dedup();
        let cheap = |b: &usize| {
            depth > 0 && !graph.product[*b] && matches!(graph.moments[*b], Some(Moment { phase: Phase::Whole, .. }))
        };
        if way.len() > 2 || !way.iter().all(cheap) {
            return false;
        }
        let mut place = to;
        for b in way {
            if !self.up(b, place, limits, depth - 1) {
                return false;
            }
            place = self.at[b] + 1;
        }
        self.at[m] <= place || self.shift(m, place, limits)
    }

    /// What a step takes of the devices that a collective is for, the least of all classes.
    fn hides(&self, of: &Collective, m: usize) -> f64 {
        let own = self.graph.costs.iter().filter(|c| c[of.begin].is_some());
        own.map(|c| c[m].unwrap_or(0.0)).fold(f64::INFINITY, f64::min)
    }

    /// What is between the beginning of a collective and its end.
    fn hidden(&self, of: &Collective) -> f64 {
        let (from, to) = (self.at[of.begin] + 1, self.at[of.last()]);
        let own = self.graph.costs.iter().filter(|c| c[of.begin].is_some());
        let between = |c: &Vec<Option<f64>>| (from..to).filter_map(|place| c[self.order[place]]).sum::<f64>();
        own.map(between).fold(f64::INFINITY, f64::min)
    }

    /// Moves a moment to another place, if nobody then has more at a time than the limits, or than before.
    fn shift(&mut self, m: usize, to: usize, limits: &[Vec<isize>]) -> bool {
        let (graph, from) = (self.graph.clone(), self.at[m]);
        if from == to {
            return true;
        }
        let down = to > from;
        let (low, high) = (from.min(to), from.max(to));
        let window = if down { from + 1..to + 1 } else { to..from };
        // Where others are then.
        let then = |place: usize| match window.contains(&place) {
            true if down => place - 1,
            true => place + 1,
            false => place,
        };
        // By what it needs: the first and the last place where others do, before and then.
        let spans: Vec<(usize, Option<[usize; 2]>, Option<[usize; 2]>)> = graph.needs[m]
            .iter()
            .map(|r| {
                let others = graph.users[*r].iter().filter(|u| **u != m).map(|u| self.at[*u]);
                let (mut first, mut last) = (usize::MAX, 0);
                others.for_each(|place| (first, last) = (first.min(place), last.max(place)));
                let before = if first > last { None } else { Some([first, last]) };
                (*r, before, before.map(|b| b.map(then)))
            })
            .collect();
        let spans_at = |others: Option<[usize; 2]>, own: usize, place: usize| {
            let [first, last] = others.unwrap_or([own, own]);
            (first.min(own)..=last.max(own)).contains(&place)
        };
        // The neighbour behind which it comes.
        let neighbour = self.order[if down { to } else { to - 1 }];
        let mut changed: Vec<(usize, usize, isize)> = vec![];
        for (c, alive) in self.alive.iter().enumerate() {
            let bytes = &graph.bytes[c];
            for place in window.clone() {
                let x = self.order[place];
                let mut now = alive[x];
                for &(r, before, later) in &spans {
                    now += bytes[r] * isize::from(spans_at(later, to, then(place)));
                    now -= bytes[r] * isize::from(spans_at(before, from, place));
                }
                if now != alive[x] {
                    if now > alive[x] && now > limits[c][x] {
                        return false;
                    }
                    changed.push((c, x, now));
                }
            }
            let mut own = alive[neighbour];
            for &(r, before, _) in &spans {
                own -= bytes[r] * isize::from(spans_at(before, from, self.at[neighbour]));
                own += bytes[r];
            }
            let needed = |r: &usize| graph.needs[m].contains(r);
            let ends = |r: &usize| graph.users[*r].iter().all(|u| self.at[*u] <= self.at[neighbour]);
            own -= graph.needs[neighbour].iter().filter(|r| !needed(r) && ends(r)).map(|r| bytes[*r]).sum::<isize>();
            if own > graph.peak[c] && own > alive[m] {
                return false;
            }
            changed.push((c, m, own));
        }
        for (c, x, now) in changed {
            self.alive[c][x] = now;
        }
        if down {
            self.order[low..=high].rotate_left(1);
        } else {
            self.order[low..=high].rotate_right(1);
        }
        for place in low..=high {
            self.at[self.order[place]] = place;
        }
        true
    }

    /// The moments in their order. What nothing came between is in one piece.
    fn together(&self) -> Vec<Moment> {
        let moments: Vec<Moment> = self.order.iter().filter_map(|m| self.graph.moments[*m]).collect();
        let mut out: Vec<Moment> = vec![];
        let mut steps: HashMap<usize, usize> = HashMap::new();
        moments.iter().for_each(|m| *steps.entry(m.group).or_default() += 1);
        let mut place = 0;
        while place < moments.len() {
            let Moment { group, phase } = moments[place];
            let count = steps[&group];
            let piece = &moments[place..moments.len().min(place + count)];
            if matches!(phase, Phase::Begin | Phase::Interior) && piece.iter().all(|m| m.group == group) {
                out.push(Moment { group, phase: Phase::Whole });
                place += count;
            } else {
                out.push(moments[place]);
                place += 1;
            }
        }
        out
    }
}
