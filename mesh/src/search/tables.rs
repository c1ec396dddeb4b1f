//! The problem that [`super::solve`] solves, for one mesh: the options of each segment with what they take, and what goes
//! between segments.

use super::price::Prices;
use super::segments::{Choices, Content, Segments, Uses};
use super::solve::{Label, Pair, Problem, insert};
use super::split::{AXES, Axes, Sees, Site, Splits, Way, Zero};
use std::collections::HashMap;
use std::rc::Rc;

/// The tables of one mesh and one stage of ZeRO.
pub struct Tables {
    /// What is to be minimised.
    pub problem: Problem,
    /// By segment: how its options split it.
    pub options: Vec<Rc<Vec<Way>>>,
}

/// Ways to split a segment up to which parts of sets of dimensions are tried as well.
const WAYS: usize = 300;
/// Uniform ways that are worked out for an upper bound.
const UNIFORM: usize = 12;

/// The segments that are alike.
struct Class<'a> {
    content: &'a Content,
    count: usize,
    ways: Vec<Way>,
    /// By way, its seconds.
    seconds: Vec<f64>,
    labels: Vec<Option<Vec<Label>>>,
    again: bool,
}

impl Class<'_> {
    fn fastest(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn labels(&mut self, prices: &mut Prices, way: usize) -> Vec<Label> {
        let (content, again) = (self.content, self.again);
        let found = &mut self.labels[way];
        found.get_or_insert_with(|| labels(prices, content, self.ways[way], self.seconds[way], again)).clone()
    }

    /// The way that is like another segment's, as far as this one has its dimensions.
    fn like(&self, splits: Splits) -> Option<usize> {
        let dims = self.content.chunks.keys().fold(Splits::default(), |s, d| s.with(*d, Axes::MAX));
        self.ways.binary_search_by_key(&splits.only(dims), |w| w.splits).ok()
    }
}

impl Tables {
    /// The tables of a function at those prices and that stage of ZeRO, where blocks may be made `again` or not, with which
    /// a step within a budget of memory takes less than `fastest` seconds, which is lowered to what one takes where all
    /// segments are split alike; None if there are none. Options that are too slow for that, whatever the others are, are
    /// left out.
    pub fn new(
        segments: &Segments,
        prices: &mut Prices,
        stage: u8,
        again: bool,
        budget: f64,
        fastest: &mut f64,
    ) -> Option<Tables> {
        let mut known: HashMap<usize, usize> = HashMap::new();
        let mut classes: Vec<Class> = vec![];
        let mut of = vec![];
        for s in &segments.list {
            let class = *known.entry(s.alike).or_insert_with(|| {
                let ways = ways(&prices.site, &s.content, &s.choices, stage);
                let seconds = sums(prices, &s.content.nodes, &s.content.steps, &s.content.uses, &ways);
                let (labels, again) = (vec![None; ways.len()], again && s.block.is_some());
                classes.push(Class { content: &s.content, count: 0, ways, seconds, labels, again });
                classes.len() - 1
            });
            classes[class].count += 1;
            of.push(class);
        }
        let floor: f64 = classes.iter().map(|c| c.fastest() * c.count as f64).sum();
        if floor > *fastest * (1.0 + 1e-9) {
            return None;
        }
        *fastest = fastest.min(uniform(prices, segments, &mut classes, &of, budget));
        let mut options = vec![];
        for class in &mut classes {
            let slack = *fastest * (1.0 + 1e-9) - floor + class.fastest();
            let live: Vec<usize> = (0..class.ways.len()).filter(|w| class.seconds[*w] <= slack).collect();
            let labels: Vec<Vec<Label>> = live.iter().map(|w| class.labels(prices, *w)).collect();
            let ways: Vec<Way> = live.iter().map(|w| class.ways[*w]).collect();
            options.push((Rc::new(ways), Rc::new(labels)));
        }
        let mut pairs: Vec<Pair> = vec![];
        let mut tables: HashMap<(usize, usize, &Vec<Uses>), Rc<Vec<f64>>> = HashMap::new();
        for (&(from, to), uses) in &segments.between {
            let seconds = tables
                .entry((of[from], of[to], uses))
                .or_insert_with(|| Rc::new(between(prices, uses, &options[of[from]].0, &options[of[to]].0)));
            if seconds.iter().any(|s| *s > 0.0) {
                pairs.push(Pair { of: [from, to], seconds: seconds.clone() });
            }
        }
        let segments = of.iter().map(|c| options[*c].1.clone()).collect();
        let options = of.iter().map(|c| options[*c].0.clone()).collect();
        Some(Tables { problem: Problem { segments, pairs }, options })
    }
}

/// The fewest seconds within a budget where all segments are split alike, of the ways that promise most.
fn uniform(prices: &mut Prices, segments: &Segments, classes: &mut [Class], of: &[usize], budget: f64) -> f64 {
    let mut all: Vec<Splits> = classes.iter().flat_map(|c| c.ways.iter().map(|w| w.splits)).collect();
    all.sort_unstable();
    all.dedup();
    let alone = |splits: &Splits, classes: &[Class]| -> Option<f64> {
        classes.iter().map(|c| Some(c.seconds[c.like(*splits)?] * c.count as f64)).sum()
    };
    let mut promising: Vec<(f64, Splits)> = all.iter().filter_map(|s| Some((alone(s, classes)?, *s))).collect();
    promising.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best = f64::INFINITY;
    for (_, splits) in promising.into_iter().take(UNIFORM) {
        let mut problem = Problem::default();
        let mut ways = vec![];
        for class in &mut *classes {
            let Some(at) = class.like(splits) else { break };
            ways.push((class.ways[at], Rc::new(vec![class.labels(prices, at)])));
        }
        problem.segments = of.iter().map(|c| ways[*c].1.clone()).collect();
        for (&(from, to), uses) in &segments.between {
            let seconds = between(prices, uses, &[ways[of[from]].0], &[ways[of[to]].0]);
            problem.pairs.push(Pair { of: [from, to], seconds: Rc::new(seconds) });
        }
        best = problem.solve(budget, best).map_or(best, |s| best.min(s.seconds));
    }
    best
}

/// The ways to split a segment: each axis splits one of the sets of dimensions, or nothing.
fn ways(site: &Site, content: &Content, choices: &Choices, stage: u8) -> Vec<Way> {
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
    possible.into_iter().map(|splits| Way { splits, zero: Zero { stage, axes: zero(site, content, splits) } }).collect()
}

/// The axes that ZeRO splits the variables of a segment over: of those that do not split them anyway, as many devices as
/// the largest variable has chunks for, the innermost of equals.
fn zero(site: &Site, content: &Content, splits: Splits) -> Axes {
    let taken =
        content.variables.iter().flat_map(|(shape, _)| site.split(shape, Way { splits, zero: Zero::default() }));
    let taken = taken.fold(0, |all, a| all | a);
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

/// Ways, as far as something sees of them: those that look unlike, and by way which of them it looks like.
struct Looks {
    unlike: Vec<Way>,
    of: Vec<usize>,
}

impl Looks {
    fn new(sees: Sees, ways: &[Way]) -> Looks {
        let (mut known, mut unlike): (HashMap<Way, usize>, Vec<Way>) = Default::default();
        let mut look = |way: &Way| {
            *known.entry(sees.of(*way)).or_insert_with(|| {
                unlike.push(*way);
                unlike.len() - 1
            })
        };
        let of = ways.iter().map(&mut look).collect();
        Looks { unlike, of }
    }
}

/// Seconds of each of some ways to split nodes, steps and what they take of one another.
fn sums(
    prices: &mut Prices,
    nodes: &[(usize, usize)],
    steps: &[(usize, usize)],
    uses: &[(Uses, usize)],
    ways: &[Way],
) -> Vec<f64> {
    let mut looks: HashMap<Sees, Looks> = HashMap::new();
    let mut seconds = vec![0.0; ways.len()];
    let mut add = |sees: Sees, n: usize, price: &mut dyn FnMut(Way) -> f64| {
        let looks = looks.entry(sees).or_insert_with(|| Looks::new(sees, ways));
        let unlike: Vec<f64> = looks.unlike.iter().map(|way| price(*way) * n as f64).collect();
        seconds.iter_mut().zip(&looks.of).for_each(|(all, i)| *all += unlike[*i]);
    };
    for (kind, n) in nodes {
        add(prices.node_sees(*kind), *n, &mut |way| prices.node(*kind, way).sum);
    }
    for (work, n) in steps {
        add(prices.step_sees(*work), *n, &mut |way| prices.step(*work, way));
    }
    for ((from, by), n) in uses {
        let sees = by.iter().map(|(kind, _)| prices.node_sees(*kind)).fold(prices.node_sees(*from), Sees::or);
        add(sees, *n, &mut |way| {
            let mut moved: Vec<usize> = vec![];
            for (kind, input) in by {
                let node = prices.node(*kind, way);
                if node.moved[*input] && !moved.contains(&node.needs[*input]) {
                    moved.push(node.needs[*input]);
                }
            }
            let held = prices.node(*from, way);
            moved.iter().map(|m| prices.moved(*from, &held.held, *m)).sum()
        });
    }
    seconds
}

/// What a way to split a segment takes, with its block made again or not.
fn labels(prices: &mut Prices, content: &Content, way: Way, seconds: f64, again: bool) -> Vec<Label> {
    let mut labels = vec![];
    let memory = memory(prices, content, way);
    let [kept, transient] = memory.kept;
    insert(&mut labels, Label { seconds, kept, transient, again: false });
    if again {
        let (nodes, steps, uses) = &content.again;
        let seconds = seconds + sums(prices, nodes, steps, uses, &[way])[0];
        let [kept, transient] = memory.again;
        insert(&mut labels, Label { seconds, kept, transient, again: true });
    }
    labels
}

/// Bytes kept and transient: as it is, and with the block made again.
struct Memory {
    kept: [f64; 2],
    again: [f64; 2],
}

fn memory(prices: &mut Prices, content: &Content, way: Way) -> Memory {
    let mut variables = 0.0;
    for (shape, n) in &content.variables {
        let region = prices.site.region(shape, &prices.site.split(shape, way));
        variables += (region.elements() * shape.element * n) as f64;
    }
    // A stage has its part of the variables. Of activations it keeps its part too, but of as many micro-batches as there are
    // stages.
    variables /= prices.site.pipeline.depth as f64;
    // Bytes at the turn to the backward pass and behind it, of that what is made again, and by step.
    let (mut turn, mut behind, mut inside) = (0.0, 0.0, 0.0);
    let mut change = vec![0.0; content.length + 2];
    let mut alive = |from: (usize, u8), to: (usize, u8), bytes: f64, remade: bool| {
        turn += if from.1 < 1 && to.1 >= 1 { bytes } else { 0.0 };
        behind += if from.1 < 2 && to.1 >= 2 { bytes } else { 0.0 };
        inside += if from.1 < 1 && to.1 >= 1 && remade { bytes } else { 0.0 };
        change[from.0] += bytes;
        change[to.0 + 1] -= bytes;
    };
    for value in &content.kept {
        let own = prices.node(value.kind, way);
        let element = prices.element(value.kind);
        let mut last = (value.from, value.phase);
        let mut copies: Vec<(usize, (usize, u8), (usize, u8))> = vec![];
        for (step, phase, by) in &value.readers {
            let mut copied = false;
            if let Some((kind, input)) = by {
                let reader = prices.node(*kind, way);
                if reader.moved[*input] {
                    let need = reader.needs[*input];
                    match copies.iter_mut().find(|(r, ..)| *r == need) {
                        Some((_, _, to)) => {
                            *to = (*to).max((*step, *phase));
                            copied = true;
                        }
                        None => copies.push((need, (*step, *phase), (*step, *phase))),
                    }
                }
            }
            if !copied {
                last = last.max((*step, *phase));
            }
        }
        let bytes = |elements: usize| (elements * element) as f64;
        alive((value.from, value.phase), last, bytes(own.held.region.elements()), value.inside);
        copies.iter().for_each(|(r, from, to)| alive(*from, *to, bytes(prices.elements(*r)), value.inside));
    }
    let (mut now, mut most) = (0.0, 0.0f64);
    for c in change {
        now += c;
        most = most.max(now);
    }
    let of = |kept: f64, most: f64| [variables + kept, (most - kept).max(0.0)];
    Memory { kept: of(turn.max(behind), most), again: of((turn - inside).max(behind), most) }
}

/// Seconds of what the second segment takes from the first one, by the options of both.
fn between(prices: &mut Prices, uses: &[Uses], from: &[Way], to: &[Way]) -> Vec<f64> {
    let mut table = vec![0.0; from.len() * to.len()];
    for (kind, by) in uses {
        // Options that differ elsewhere have the same held and needed parts here.
        let mut needs: Vec<Vec<usize>> = vec![];
        let sees = by.iter().map(|(consumer, _)| prices.node_sees(*consumer)).fold(Sees::default(), Sees::or);
        let looks = Looks::new(sees, to);
        let unlike = looks.unlike.iter().map(|way| {
            let mut all: Vec<usize> = vec![];
            for (consumer, input) in by {
                let need = prices.node(*consumer, *way).needs[*input];
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
        let unlike = looks.unlike.iter().map(|way| {
            let node = prices.node(*kind, *way);
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
