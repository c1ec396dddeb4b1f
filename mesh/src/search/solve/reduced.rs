//! Problems with fewer options: those that can be part of no solution that is looked for are left out.

use super::{Label, Pair, Problem, least};
use std::sync::Arc;

/// A problem with some of the options of another one, and some of their labels.
#[derive(Clone)]
pub(super) struct Reduced {
    /// The problem.
    pub problem: Problem,
    /// By segment: which of the other one's its options are.
    pub of: Vec<Arc<Vec<usize>>>,
}

/// What is made of something once, and what of; found by comparing.
struct Once<K, V>(Vec<(K, V)>);

impl<K: PartialEq, V: Clone> Once<K, V> {
    fn get(&mut self, key: K, make: impl FnOnce(&K) -> V) -> V {
        if let Some((_, known)) = self.0.iter().find(|(k, _)| *k == key) {
            return known.clone();
        }
        let made = make(&key);
        self.0.push((key, made.clone()));
        made
    }
}

impl Problem {
    /// Something of each segment, made once of those that are the same.
    pub(super) fn each_segment<T>(&self, make: impl Fn(&Vec<Vec<Label>>) -> T) -> Vec<Arc<T>> {
        let mut known = Once(vec![]);
        self.segments.iter().map(|s| known.get(Arc::as_ptr(s), |_| Arc::new(make(s)))).collect()
    }

    /// All of it.
    pub(super) fn whole(&self) -> Reduced {
        Reduced { problem: self.clone(), of: self.each_segment(|options| (0..options.len()).collect()) }
    }

    /// By segment, the least of something of its labels.
    pub(super) fn floors(&self, of: impl Fn(&Label) -> f64) -> Vec<f64> {
        self.each_segment(|options| least(options.iter().flatten(), &of)).iter().map(|f| **f).collect()
    }

    /// What comes and goes at the least, whatever is chosen.
    pub(super) fn transient(&self) -> f64 {
        self.floors(|l| l.transient).into_iter().fold(0.0, f64::max)
    }

    /// How many labels there are.
    pub(super) fn labels(&self) -> usize {
        self.segments.iter().flat_map(|s| s.iter()).map(Vec::len).sum()
    }

    /// By segment, the options that no other one replaces.
    fn live(&self) -> Vec<Arc<Vec<bool>>> {
        let mut pairs = vec![vec![]; self.segments.len()];
        for pair in &self.pairs {
            pairs[pair.of[0]].push((Arc::as_ptr(&pair.seconds), true));
            pairs[pair.of[1]].push((Arc::as_ptr(&pair.seconds), false));
        }
        // Segments with the same options, and the same pairs with others, have the same answer.
        let mut known = Once(vec![]);
        let all = self.segments.iter().zip(pairs).enumerate();
        all.map(|(s, (options, pairs))| known.get((Arc::as_ptr(options), pairs), |_| Arc::new(self.live_of(s))))
            .collect()
    }

    /// By option of a segment, whether no other one replaces it: as good in itself by more than what its neighbours may lose.
    fn live_of(&self, segment: usize) -> Vec<bool> {
        let options = &self.segments[segment];
        let pairs: Vec<&Pair> = self.pairs.iter().filter(|p| p.of.contains(&segment)).collect();
        let fastest: Vec<f64> = options.iter().map(|labels| least(labels, |l| l.seconds)).collect();
        let mut order: Vec<usize> = (0..options.len()).collect();
        order.sort_by(|a, b| fastest[*a].total_cmp(&fastest[*b]));
        // By how much more the new one may take, and be as good as the old one.
        let as_good = |new: usize, old: usize, loss: f64| {
            let replaced = |l: &Label, n: &Label| Label { seconds: n.seconds + loss, ..*n }.dominates(l);
            options[old].iter().all(|l| options[new].iter().any(|n| replaced(l, n)))
        };
        let replaces = |new: usize, old: usize| {
            if !as_good(new, old, 0.0) {
                return false;
            }
            let mut loss = 0.0;
            for pair in &pairs {
                let first = pair.of[0] == segment;
                let other = self.segments[pair.of[usize::from(first)]].len();
                let at = |option, x| self.seconds(pair, if first { [option, x] } else { [x, option] });
                loss += (0..other).map(|x| at(new, x) - at(old, x)).fold(f64::NEG_INFINITY, f64::max);
            }
            as_good(new, old, loss.max(0.0))
        };
        let mut live: Vec<usize> = vec![];
        for option in order {
            if !live.iter().any(|&l| replaces(l, option)) {
                live.push(option);
            }
        }
        (0..options.len()).map(|o| live.contains(&o)).collect()
    }
}

impl Reduced {
    /// Without the options of which no label is kept, and without those labels; None if a segment has no others.
    pub fn only(&self, keep: impl Fn(usize, usize, &Label) -> bool) -> Option<Reduced> {
        let (mut segments, mut pairs) = (Once(vec![]), Once(vec![]));
        // By segment: which options stay, with which labels, and which ones these were at first.
        let mut all = vec![];
        for (s, options) in self.problem.segments.iter().enumerate() {
            let kept = |(o, labels): (usize, &Vec<Label>)| labels.iter().map(|l| keep(s, o, l)).collect();
            let kept: Vec<Vec<bool>> = options.iter().enumerate().map(kept).collect();
            let made = segments.get((Arc::as_ptr(options), kept), |(_, kept)| {
                let some: Vec<usize> = (0..options.len()).filter(|o| kept[*o].contains(&true)).collect();
                let labels = |o: &usize| {
                    let all = options[*o].iter().zip(&kept[*o]);
                    all.filter(|(_, kept)| **kept).map(|(l, _)| *l).collect::<Vec<_>>()
                };
                let labels: Vec<Vec<Label>> = some.iter().map(labels).collect();
                let of: Vec<usize> = some.iter().map(|o| self.of[s][*o]).collect();
                (Arc::new(some), Arc::new(labels), Arc::new(of))
            });
            if made.0.is_empty() {
                return None;
            }
            all.push(made);
        }
        let pair = |pair: &Pair| {
            let [a, b] = pair.of;
            let key = (Arc::as_ptr(&pair.seconds), Arc::as_ptr(&all[a].0), Arc::as_ptr(&all[b].0));
            let seconds = pairs.get(key, |_| {
                let columns = self.problem.segments[b].len();
                if all[a].0.len() * all[b].0.len() == pair.seconds.len() {
                    return pair.seconds.clone();
                }
                let row = |o: usize| all[b].0.iter().map(move |p| pair.seconds[o * columns + p]);
                Arc::new(all[a].0.iter().flat_map(|o| row(*o)).collect())
            });
            Pair { of: pair.of, seconds }
        };
        let pairs = self.problem.pairs.iter().map(pair).collect();
        let segments = all.iter().map(|(_, labels, _)| labels.clone()).collect();
        Some(Reduced { problem: Problem { segments, pairs }, of: all.into_iter().map(|(_, _, of)| of).collect() })
    }

    /// Without the options that others replace.
    pub fn live(&self) -> Option<Reduced> {
        let live = self.problem.live();
        self.only(|s, o, _| live[s][o])
    }
}
