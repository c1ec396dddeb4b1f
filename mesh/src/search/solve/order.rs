//! In which order segments are eliminated, and where in tables what each of them adds up begins.

use super::Problem;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The order in which the segments of a problem are eliminated.
pub(super) struct Order {
    /// One after the other.
    pub buckets: Vec<Bucket>,
    /// By pair: its table, the options of the segment that is eliminated first side by side.
    pub pairs: Vec<Arc<Vec<f64>>>,
}

/// A segment that is eliminated, after all those in front of it.
pub(super) struct Bucket {
    /// The segment.
    pub segment: usize,
    /// Its neighbours then, whose options its table is by, row after row; that which is eliminated first is last.
    pub over: Vec<usize>,
    /// Pairs of it and a neighbour.
    pub pairs: Vec<usize>,
    /// Buckets whose tables are by its options, beside those of neighbours.
    pub below: Vec<usize>,
    /// How many choices of the neighbours' options there are.
    pub states: usize,
    /// By neighbour: how many options it has, and how far apart they are in the tables of pairs and then of buckets; the
    /// segment's own options lie side by side in all of them.
    steps: Vec<(usize, Vec<usize>)>,
}

impl Bucket {
    /// Visits all choices of the neighbours' options, in order: its number, and where in the tables of pairs and then of
    /// buckets the segment's options begin.
    pub fn each(&self, mut visit: impl FnMut(usize, &[usize])) {
        let mut at = vec![0; self.steps.len()];
        let mut from = vec![0; self.pairs.len() + self.below.len()];
        for state in 0..self.states {
            visit(state, &from);
            for (at, (size, steps)) in at.iter_mut().zip(&self.steps).rev() {
                *at += 1;
                from.iter_mut().zip(steps).for_each(|(from, step)| *from += step);
                if *at < *size {
                    break;
                }
                from.iter_mut().zip(steps).for_each(|(from, step)| *from -= step * size);
                *at = 0;
            }
        }
    }
}

impl Order {
    /// First that with the fewest choices of its neighbours' options.
    pub fn new(problem: &Problem) -> Order {
        let buckets = buckets(problem);
        let pairs = turned(problem, &buckets);
        Order { buckets, pairs }
    }
}

fn turned(problem: &Problem, buckets: &[Bucket]) -> Vec<Arc<Vec<f64>>> {
    let mut all = vec![Arc::default(); problem.pairs.len()];
    let mut turned: Vec<(&Arc<Vec<f64>>, Arc<Vec<f64>>)> = vec![];
    for bucket in buckets {
        for &p in &bucket.pairs {
            let pair = &problem.pairs[p];
            let columns = problem.segments[pair.of[1]].len();
            all[p] = if pair.of[1] == bucket.segment {
                pair.seconds.clone()
            } else if let Some((_, known)) = turned.iter().find(|(of, _)| Arc::ptr_eq(of, &pair.seconds)) {
                known.clone()
            } else {
                let column = |c: usize| pair.seconds.iter().skip(c).step_by(columns).copied();
                let table: Arc<Vec<f64>> = Arc::new((0..columns).flat_map(column).collect());
                turned.push((&pair.seconds, table.clone()));
                table
            };
        }
    }
    all
}

fn buckets(problem: &Problem) -> Vec<Bucket> {
    let sizes: Vec<usize> = problem.segments.iter().map(|s| s.len()).collect();
    let mut beside: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); sizes.len()];
    for pair in &problem.pairs {
        let [a, b] = pair.of;
        beside[a].insert(b);
        beside[b].insert(a);
    }
    let count = |over: &BTreeSet<usize>| over.iter().fold(1usize, |n, s| n.saturating_mul(sizes[*s]));
    let mut states: Vec<usize> = beside.iter().map(count).collect();
    let mut left: Vec<usize> = (0..sizes.len()).collect();
    let mut rank = vec![0; sizes.len()];
    let mut buckets: Vec<Bucket> = vec![];
    while let Some(at) = (0..left.len()).min_by_key(|i| (states[left[*i]], *i)) {
        let segment = left.remove(at);
        rank[segment] = buckets.len();
        let over = std::mem::take(&mut beside[segment]);
        for s in &over {
            beside[*s].extend(over.iter().filter(|o| *o != s));
            beside[*s].remove(&segment);
            // No others have other neighbours than before.
            states[*s] = count(&beside[*s]);
        }
        let over = over.into_iter().collect();
        let states = states[segment];
        buckets.push(Bucket { segment, over, pairs: vec![], below: vec![], states, steps: vec![] });
    }
    for (i, pair) in problem.pairs.iter().enumerate() {
        let [a, b] = pair.of.map(|s| rank[s]);
        buckets[a.min(b)].pairs.push(i);
    }
    for at in 0..buckets.len() {
        buckets[at].over.sort_by_key(|s| std::cmp::Reverse(rank[*s]));
        if let Some(&next) = buckets[at].over.last() {
            buckets[rank[next]].below.push(at);
        }
        let Bucket { segment, over, pairs, below, .. } = &buckets[at];
        let steps = |s: &usize| {
            let by_pair = pairs.iter().map(|p| if problem.pairs[*p].of.contains(s) { sizes[*segment] } else { 0 });
            let by_bucket = below.iter().map(|b| {
                let mut behind = buckets[*b].over.iter().skip_while(|o| *o != s);
                behind.next().map_or(0, |_| behind.map(|o| sizes[*o]).product())
            });
            (sizes[*s], by_pair.chain(by_bucket).collect())
        };
        buckets[at].steps = over.iter().map(steps).collect();
    }
    buckets
}
