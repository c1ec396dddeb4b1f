//! The exact minimum over segments: what each is split by, and what goes between any two, under a limit of memory.
//!
//! Segments are variables, the ways to split one are its options, and what moves between two is a table of their options.
//! Segments are eliminated one after the other, that with the fewest choices of its neighbours first (`order`). A chain is the
//! usual dynamic programming so; a skip connection keeps its producer's option as a state until its consumer is eliminated.
//!
//! Where memory has a price and no limit, that is one number for each choice of neighbours (`cheapest`). Prices give
//! bounds on what is within the limit (`bound`), and tell which options and partial solutions lead to nothing that is as
//! fast as what is known: few are left. Of these `eliminate` finds the fastest solution within the limit. `reduced` leaves
//! out options.

mod bound;
mod cheapest;
mod eliminate;
mod order;
mod reduced;

use bound::Bounds;
use std::sync::Arc;

/// Partial solutions that stay, at the most, for one choice of neighbours: few at first, for a solution that others have to be
/// faster than; with the last number the answer may have a gap.
const PARTIALS: [usize; 3] = [16, 64, 256];
/// Sums that a round may take for the next one to be tried.
const SUMS: u64 = 1_000_000;

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
    /// What it costs in seconds, at a price of a byte that is kept.
    fn cost(&self, price: f64) -> f64 {
        self.seconds + price * self.kept
    }

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

impl Problem {
    fn seconds(&self, pair: &Pair, at: [usize; 2]) -> f64 {
        pair.seconds[at[0] * self.segments[pair.of[1]].len() + at[1]]
    }

    /// The fastest solution within a budget of memory that takes `most` seconds or less; None if there is none, as far as
    /// partial solutions were kept.
    pub fn solve(&self, budget: f64, most: f64) -> Option<Solution> {
        // What takes forever is no solution.
        let most = most.min(f64::MAX);
        let Bounds { bound, price, mut best } = self.bounds(budget, most)?;
        let mut near = None;
        for partials in PARTIALS {
            if best.as_ref().is_some_and(|b| b.seconds <= hardly_more(bound)) {
                break;
            }
            if near.is_none() {
                near = self.near(budget, best.as_ref().map_or(most, |b| b.seconds), price);
            }
            let Some(all) = &near else { return best };
            let found = all.fastest(partials);
            if found.solution.is_some() {
                // What is not as fast as that is no longer of interest.
                (best, near) = (found.solution, None);
            }
            if !found.cut {
                return best;
            }
            if found.sums > SUMS {
                break;
            }
        }
        best.map(|b| Solution { bound: bound.min(b.seconds), ..b })
    }

    /// The least memory that a solution needs.
    pub fn least_memory(&self) -> f64 {
        self.smallest().map_or(f64::INFINITY, |s| s.solution.memory)
    }
}

/// The least of something of some labels.
fn least<'a>(labels: impl IntoIterator<Item = &'a Label>, of: impl Fn(&Label) -> f64) -> f64 {
    labels.into_iter().map(of).fold(f64::INFINITY, f64::min)
}

/// A number, and what may be lost by adding its parts up in another order.
fn hardly_more(x: f64) -> f64 {
    x + x.abs() * 1e-9
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

#[cfg(test)]
mod tests;
