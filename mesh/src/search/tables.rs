//! The problem that [`super::solve`] solves, for one mesh: the options of each segment with what they take, and what goes
//! between segments.

use super::bytes::{Bytes, bytes};
use super::looks::{Known, KnownLooks, Looks, Seen};
use super::price::Prices;
use super::segments::{Choices, Content, Segments, Uses};
use super::solve::{Label, Pair, Problem, insert};
use super::split::{AXES, Axes, Sees, Site, Splits, Way, Zero};
use crate::hash::Quick;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

/// The tables of one mesh and one stage of ZeRO.
pub struct Tables {
    /// What is to be minimised.
    pub problem: Problem,
    /// By segment: how its options split it.
    pub options: Vec<Arc<Vec<Way>>>,
}

/// Ways to split a segment up to which parts of sets of dimensions are tried as well.
const WAYS: usize = 300;
/// By which factor the fastest step of a mesh may be slower than that of others to be looked for all the same.
pub const NEAR: f64 = 1.0002;

/// Segments that are alike.
struct Class<'a> {
    content: &'a Content,
    count: usize,
    /// Which of the views has the ways to split them.
    view: usize,
    /// Whether their blocks may be made again.
    again: bool,
    /// Seconds that one takes at the least.
    least: f64,
}

/// Ways to split segments, of which what sees the same takes the same.
struct View<'a> {
    /// The ways, and over which axes ZeRO splits variables in each.
    ways: Vec<Way>,
    /// Seconds that are known by stages of ZeRO.
    known: Known<'a>,
    /// And how the ways look.
    looks: KnownLooks,
}

/// The segments of a function on a mesh.
pub struct Classes<'a> {
    list: Vec<Class<'a>>,
    views: Vec<View<'a>>,
    /// By kind of step: seconds that it takes at the least.
    least: Vec<f64>,
    /// By segment: which it is.
    pub of: Vec<usize>,
    /// Kinds of pairs of segments.
    pub kinds: Vec<([usize; 2], &'a Vec<Uses>)>,
    /// Pairs of segments: which, and their kind.
    pub pairs: Vec<([usize; 2], usize)>,
}

impl<'a> Classes<'a> {
    /// The segments on that mesh, where blocks may be made `again` or not; `alone` is what each kind of step takes on one
    /// device beside its launch, of which every device has its part to do.
    pub fn new(segments: &'a Segments, site: &Site, again: bool, alone: &[f64]) -> Classes<'a> {
        let each = site.pipeline.seconds() / site.mesh.size() as f64;
        let least_of: Vec<f64> = alone.iter().map(|seconds| seconds * each).collect();
        let (mut known, mut split): (HashMap<usize, usize, Quick>, HashMap<_, usize, Quick>) = Default::default();
        let (mut list, mut views, mut of): (Vec<Class>, Vec<View>, Vec<usize>) = Default::default();
        for s in &segments.list {
            let class = *known.entry(s.alike).or_insert_with(|| {
                // All that the ways depend on.
                let view = *split.entry((&s.choices, &s.content.chunks, &s.content.variables)).or_insert_with(|| {
                    let ways = ways(site, &s.content, &s.choices);
                    views.iter().position(|v| v.ways == ways).unwrap_or_else(|| {
                        views.push(View { ways, known: Known::default(), looks: KnownLooks::default() });
                        views.len() - 1
                    })
                });
                let again = again && s.block.is_some();
                let least = s.content.steps.iter().map(|(work, n)| least_of[*work] * *n as f64).sum();
                list.push(Class { content: &s.content, count: 0, view, again, least });
                list.len() - 1
            });
            list[class].count += 1;
            of.push(class);
        }
        let mut numbers: HashMap<([usize; 2], &Vec<Uses>), usize> = HashMap::new();
        let (mut kinds, mut pairs) = (vec![], vec![]);
        for (&(from, to), uses) in &segments.between {
            let kind = ([of[from], of[to]], uses);
            let number = *numbers.entry(kind).or_insert_with(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            pairs.push(([from, to], number));
        }
        Classes { list, views, least: least_of, of, kinds, pairs }
    }

    /// How many layouts there are with each stage of ZeRO; as a number that may be huge.
    pub fn layouts(&self) -> f64 {
        let ways = |c: &Class| self.views[c.view].ways.len() * if c.again { 2 } else { 1 };
        self.of.iter().map(|c| ways(&self.list[*c]) as f64).product()
    }

    /// The segments at a stage of ZeRO, and the seconds that a step takes at the least; None if those are more than `fastest`.
    pub fn staged(&mut self, prices: &mut Prices, stage: u8, fastest: f64) -> Option<(Vec<Staged<'a>>, f64)> {
        let of_step = |work: usize| self.least[work];
        let with = |way: &Way| Way { zero: Zero { stage, ..way.zero }, ..*way };
        let ways: Vec<Rc<Vec<Way>>> = self.views.iter().map(|v| Rc::new(v.ways.iter().map(with).collect())).collect();
        let seen = ways.iter().zip(&self.views).map(|(ways, v)| Seen::new(ways.clone(), stage, v.looks.clone()));
        let seen: Vec<_> = seen.map(|seen| Rc::new(RefCell::new(seen))).collect();
        let all = |c: &Class| c.least * c.count as f64;
        let mut floor: f64 = self.list.iter().map(all).sum();
        // What takes longest is soonest too slow.
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        order.sort_by(|a, b| all(&self.list[*b]).total_cmp(&all(&self.list[*a])));
        let mut staged: Vec<Option<Staged>> = self.list.iter().map(|_| None).collect();
        for at in order {
            let class = &self.list[at];
            let (content, count, again, least) = (class.content, class.count, class.again, class.least);
            let (ways, seen, known) =
                (ways[class.view].clone(), seen[class.view].clone(), &mut self.views[class.view].known);
            // Those like it take no less than it does, all others what they take at the least.
            let others = floor - all(class);
            let most = |fewest: f64| fastest * NEAR - (others + fewest * (count - 1) as f64) * (1.0 - 1e-9);
            let seconds = seen.borrow_mut().all(prices, content, stage, known, &of_step, &most);
            let labels = vec![None; seconds.len()];
            let class = Staged { content, count, again, ways, seen, seconds, labels };
            floor += (class.fastest() - least) * class.count as f64;
            staged[at] = Some(class);
            if floor > fastest * NEAR {
                return None;
            }
        }
        Some((staged.into_iter().flatten().collect(), floor))
    }
}

/// A class at a stage of ZeRO.
pub struct Staged<'a> {
    content: &'a Content,
    /// How many there are.
    pub count: usize,
    again: bool,
    /// The ways to split it.
    pub ways: Rc<Vec<Way>>,
    /// What it is in each, as far as that is worked out: those that are split in the same ways share it.
    seen: Rc<RefCell<Seen>>,
    /// By way, its seconds.
    pub seconds: Vec<f64>,
    labels: Vec<Option<Vec<Label>>>,
}

impl Staged<'_> {
    fn fastest(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// What a way to split it takes, with its block made again or not.
    pub fn labels(&mut self, prices: &mut Prices, way: usize) -> Vec<Label> {
        if let Some(known) = &self.labels[way] {
            return known.clone();
        }
        let mut labels = vec![];
        let seconds = self.seconds[way];
        let [as_it_is, made_again] = bytes(prices, &mut self.seen.borrow_mut(), self.content, way);
        let pipeline = prices.site.pipeline;
        let mut add = |seconds, bytes: Bytes, again| {
            let (kept, flight, transient) = (bytes.kept(pipeline), bytes.flight, bytes.transient);
            insert(&mut labels, Label { seconds, kept, flight, transient, again });
        };
        add(seconds, as_it_is, false);
        if self.again {
            let more = self.seen.borrow_mut().again(prices, self.content, way);
            add(seconds + more, made_again, true);
        }
        self.labels[way] = Some(labels.clone());
        labels
    }

    /// The way that is like another segment's, as far as this one has its dimensions.
    pub fn like(&self, splits: Splits) -> Option<usize> {
        let dims = self.content.chunks.keys().fold(Splits::default(), |s, d| s.with(*d, Axes::MAX));
        self.ways.binary_search_by_key(&splits.only(dims), |w| w.splits).ok()
    }
}

impl Tables {
    /// The tables of segments with which a step takes `most` seconds, where it takes `floor` with the fastest option of each.
    pub fn new(classes: &Classes, prices: &mut Prices, staged: &mut [Staged], floor: f64, most: f64) -> Tables {
        let mut options = vec![];
        for class in staged {
            let slack = most * (1.0 + 1e-9) - floor + class.fastest();
            let live: Vec<usize> = (0..class.seconds.len()).filter(|w| class.seconds[*w] <= slack).collect();
            let labels: Vec<Vec<Label>> = live.iter().map(|w| class.labels(prices, *w)).collect();
            let ways: Vec<Way> = live.iter().map(|w| class.ways[*w]).collect();
            options.push((Arc::new(ways), Arc::new(labels)));
        }
        let kinds = classes.kinds.iter().map(|([from, to], uses)| {
            let seconds = between(prices, uses, &options[*from].0, &options[*to].0);
            seconds.iter().any(|s| *s > 0.0).then(|| Arc::new(seconds))
        });
        let kinds: Vec<Option<Arc<Vec<f64>>>> = kinds.collect();
        let pair = |(of, kind): &([usize; 2], usize)| Some(Pair { of: *of, seconds: kinds[*kind].clone()? });
        let pairs = classes.pairs.iter().filter_map(pair).collect();
        let segments = classes.of.iter().map(|c| options[*c].1.clone()).collect();
        let options = classes.of.iter().map(|c| options[*c].0.clone()).collect();
        Tables { problem: Problem { segments, pairs }, options }
    }
}

/// The ways to split a segment: each axis splits one of the sets of dimensions, or nothing.
fn ways(site: &Site, content: &Content, choices: &Choices) -> Vec<Way> {
    let axes = site.mesh.axes().len();
    let few = |sets: usize| (sets + 1).pow(axes as u32) <= WAYS;
    let sets = (choices.largest..=choices.sets.len()).rev().find(|n| few(*n)).unwrap_or(choices.largest);
    let choices = &choices.sets[..sets];
    let mut all = vec![Splits::default()];
    for axis in 0..axes {
        let with = |s: &Splits, set: &Vec<usize>| set.iter().fold(*s, |s, d| s.with(*d, 1 << axis));
        let more = |s: &Splits| choices.iter().map(|set| with(s, set)).collect::<Vec<_>>();
        all = all.iter().flat_map(|s| [vec![*s], more(s)].concat()).collect();
    }
    // No more shards than some tensor of the segment has chunks, or the same is said without.
    let fits = |s: &Splits| content.chunks.iter().all(|(d, n)| site.shards(s.of(*d)) <= *n);
    let mut possible: Vec<Splits> = all.into_iter().filter(fits).collect();
    possible.sort_unstable();
    possible.dedup();
    possible
        .into_iter()
        .map(|splits| Way { splits, zero: Zero { stage: 0, axes: zero(site, content, splits) } })
        .collect()
}

/// The axes that ZeRO splits the variables of a segment over: of those that do not split them anyway, as many devices as
/// the largest variable has chunks for, the innermost of equals.
fn zero(site: &Site, content: &Content, splits: Splits) -> Axes {
    let taken = content.variables.iter().map(|(shape, _)| site.split(shape, Way { splits, zero: Zero::default() }));
    let taken = taken.fold(0, |all, split| all | split.axes());
    let elements = |shape: &super::split::Shape| shape.extents.iter().map(|e| e.dim.size).product::<usize>();
    let Some((largest, _)) = content.variables.iter().max_by_key(|(shape, _)| elements(shape)) else {
        return 0;
    };
    let chunks = largest.extents.iter().map(|e| e.chunks).max().unwrap_or(1);
    let free = (1u32 << site.mesh.axes().len().min(AXES)) - 1;
    let sets = (1..=free as Axes).filter(|set| set & taken == 0 && site.shards(*set) <= chunks);
    let best = sets.max_by_key(|set| (site.shards(*set), *set));
    best.unwrap_or(0)
}

/// Seconds of what the second segment takes from the first one, by the options of both.
pub fn between(prices: &mut Prices, uses: &[Uses], from: &[Way], to: &[Way]) -> Vec<f64> {
    let mut table = vec![0.0; from.len() * to.len()];
    for (kind, by) in uses {
        // Options that differ elsewhere have the same held and needed parts here.
        let mut needs: Vec<Vec<usize>> = vec![];
        let sees = by.iter().map(|(consumer, _)| prices.node_sees(*consumer)).fold(Sees::default(), Sees::or);
        let looks = Looks::new(sees, to);
        let unlike = looks.unlike.iter().map(|i| {
            let way = &to[*i];
            let mut all: Vec<usize> = vec![];
            for (consumer, input) in by {
                let node = prices.node(*consumer, *way);
                let need = prices.inputs(*consumer, &node, *way)[*input].needs;
                if !all.contains(&need) {
                    all.push(need);
                }
            }
            index(&mut needs, all, |a, b| a == b)
        });
        let unlike: Vec<usize> = unlike.collect();
        let of_to: Vec<usize> = looks.of.iter().map(|i| unlike[*i]).collect();
        let mut held = vec![];
        let looks = Looks::new(prices.node_sees(*kind), from);
        let unlike = looks.unlike.iter().map(|i| {
            let node = prices.node(*kind, from[*i]);
            index(&mut held, node, |a, b| a.held.split == b.held.split)
        });
        let unlike: Vec<usize> = unlike.collect();
        let of_from: Vec<usize> = looks.of.iter().map(|i| unlike[*i]).collect();
        let mut costs = vec![0.0; held.len() * needs.len()];
        for (h, node) in held.iter().enumerate() {
            for (n, need) in needs.iter().enumerate() {
                costs[h * needs.len() + n] = need.iter().map(|r| prices.moved(*kind, &node.held, *r)).sum();
            }
        }
        for (a, h) in of_from.iter().enumerate() {
            let (row, costs) = (&mut table[a * to.len()..][..to.len()], &costs[h * needs.len()..]);
            row.iter_mut().zip(&of_to).for_each(|(cell, n)| *cell += costs[*n]);
        }
    }
    table
}

fn index<T>(list: &mut Vec<T>, item: T, same: impl Fn(&T, &T) -> bool) -> usize {
    list.iter().position(|i| same(i, &item)).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}
