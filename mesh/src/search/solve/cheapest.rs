//! The cheapest solution where memory has a price and no limit: one number for each option, so that of partial solutions
//! one stays for each choice of neighbours; and what the cheapest solution costs that has some option.

use super::order::{Bucket, Order};
use super::{Problem, least};
use std::rc::Rc;
use std::sync::Arc;

/// What partial solutions of a problem cost at the least.
pub(super) struct Cheapest {
    /// The order in which segments are eliminated.
    order: Rc<Order>,
    /// By segment and option: what it costs by itself.
    pub own: Vec<Arc<Vec<f64>>>,
    /// By bucket and choice of neighbours' options: what all that is eliminated with it costs.
    pub least: Vec<Vec<f64>>,
    /// What the cheapest solution costs.
    pub all: f64,
}

/// What the cheapest solutions cost with some of the choices made.
pub(super) struct Through {
    /// By segment and option: with that.
    pub option: Vec<Vec<f64>>,
    /// By bucket and choice of neighbours' options: with those.
    pub state: Vec<Vec<f64>>,
}

impl Cheapest {
    /// What partial solutions cost at a price.
    pub fn new(problem: &Problem, order: Rc<Order>, price: f64) -> Cheapest {
        let own =
            problem.each_segment(|options| options.iter().map(|labels| least(labels, |l| l.cost(price))).collect());
        let mut cheapest = Cheapest { order, own, least: vec![], all: 0.0 };
        for at in 0..cheapest.order.buckets.len() {
            let mut table = Vec::with_capacity(cheapest.order.buckets[at].states);
            cheapest.sums(at, |_| true, |_, _, sums| table.push(sums.iter().copied().fold(f64::INFINITY, f64::min)));
            if cheapest.order.buckets[at].over.is_empty() {
                cheapest.all += table[0];
            }
            cheapest.least.push(table);
        }
        cheapest
    }

    /// Visits the choices of a bucket's neighbours' options that count: its number, where in the tables of pairs and then of
    /// buckets below the segment's options begin, and what all costs with each of those.
    fn sums(&self, at: usize, counts: impl Fn(usize) -> bool, mut visit: impl FnMut(usize, &[usize], &[f64])) {
        let bucket = &self.order.buckets[at];
        let own = &self.own[bucket.segment];
        let tables = self.tables(bucket);
        let mut sums = own.to_vec();
        bucket.each(|state, from| {
            if !counts(state) {
                return;
            }
            sums.copy_from_slice(own);
            for (table, from) in tables.iter().zip(from) {
                sums.iter_mut().zip(&table[*from..]).for_each(|(sum, more)| *sum += more);
            }
            visit(state, from, &sums);
        });
    }

    /// What a bucket's options cost beside its own: by pairs, and then by buckets below.
    fn tables(&self, bucket: &Bucket) -> Vec<&Vec<f64>> {
        let pairs = bucket.pairs.iter().map(|p| &*self.order.pairs[*p]);
        pairs.chain(bucket.below.iter().map(|b| &self.least[*b])).collect()
    }

    /// The options of the cheapest solution.
    pub fn options(&self, problem: &Problem) -> Vec<usize> {
        let mut chosen = vec![0; self.own.len()];
        for bucket in self.order.buckets.iter().rev() {
            let place = |over: &[usize]| {
                let rest = over.iter().filter(|s| **s != bucket.segment);
                rest.fold(0, |place, s| place * self.own[*s].len() + chosen[*s]) * self.own[bucket.segment].len()
            };
            let of_pairs = bucket.pairs.iter().map(|p| place(&problem.pairs[*p].of));
            let from: Vec<usize> =
                of_pairs.chain(bucket.below.iter().map(|b| place(&self.order.buckets[*b].over))).collect();
            let mut sums = self.own[bucket.segment].to_vec();
            for (table, from) in self.tables(bucket).iter().zip(from) {
                sums.iter_mut().zip(&table[from..]).for_each(|(sum, more)| *sum += more);
            }
            chosen[bucket.segment] = (0..sums.len()).min_by(|a, b| sums[*a].total_cmp(&sums[*b])).unwrap_or(0);
        }
        chosen
    }

    /// What the cheapest solutions with each option, and with each choice of a bucket's neighbours' options, cost; infinite
    /// where that is more than `most`.
    pub fn through(&self, most: f64) -> Through {
        let mut option: Vec<Vec<f64>> = self.own.iter().map(|o| vec![f64::INFINITY; o.len()]).collect();
        let mut states: Vec<Vec<f64>> = self.least.iter().map(|l| vec![f64::INFINITY; l.len()]).collect();
        for at in (0..self.order.buckets.len()).rev() {
            let bucket = &self.order.buckets[at];
            let mut own = std::mem::take(&mut states[at]);
            if bucket.over.is_empty() {
                own[0] = self.all;
            }
            let with = &mut option[bucket.segment];
            let pairs = bucket.pairs.len();
            self.sums(
                at,
                |state| own[state] <= most,
                |state, from, sums| {
                    let rest = own[state] - self.least[at][state];
                    with.iter_mut().zip(sums).for_each(|(with, sum)| *with = with.min(rest + sum));
                    for (below, from) in bucket.below.iter().zip(&from[pairs..]) {
                        let table = states[*below][*from..].iter_mut();
                        table.zip(sums).for_each(|(with, sum)| *with = with.min(rest + sum));
                    }
                },
            );
            states[at] = own;
        }
        Through { option, state: states }
    }
}
