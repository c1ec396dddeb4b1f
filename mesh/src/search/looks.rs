//! Ways to split a segment, as what is in it sees them: ways that look alike to something are priced once for it, and what
//! is the same in two stages of ZeRO is priced once for both.

use super::price::{Priced, Prices, Taken};
use super::segments::{Content, Uses};
use super::split::{Sees, Way};
use crate::hash::Quick;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Ways, as far as something sees of them.
pub struct Looks {
    /// The first of each that look alike.
    pub unlike: Vec<usize>,
    /// By way: which of them it looks like.
    pub of: Vec<usize>,
}

impl Looks {
    /// Ways as `sees` does.
    pub fn new(sees: Sees, ways: &[Way]) -> Looks {
        let mut known: HashMap<Way, usize, Quick> = HashMap::with_capacity_and_hasher(ways.len(), Quick::default());
        let mut unlike: Vec<usize> = vec![];
        let mut look = |(i, way): (usize, &Way)| {
            *known.entry(sees.of(*way)).or_insert_with(|| {
                unlike.push(i);
                unlike.len() - 1
            })
        };
        let of = ways.iter().enumerate().map(&mut look).collect();
        Looks { unlike, of }
    }
}

/// Something that takes time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Item<'a> {
    /// The end of a sum, by kind of node.
    Sum(usize),
    /// A step, by kind.
    Step(usize),
    /// What nodes take of one another.
    Uses(&'a Uses),
}

/// Something that takes time, and how often.
pub type Counted<'a> = (Item<'a>, usize);

fn items<'a>(
    (sums, steps, uses): (&[(usize, usize)], &[(usize, usize)], &'a [(Uses, usize)]),
) -> impl Iterator<Item = Counted<'a>> {
    let sums: Vec<Counted> = sums.iter().map(|(kind, n)| (Item::Sum(*kind), *n)).collect();
    let steps: Vec<Counted> = steps.iter().map(|(work, n)| (Item::Step(*work), *n)).collect();
    sums.into_iter().chain(steps).chain(uses.iter().map(|(uses, n)| (Item::Uses(uses), *n)))
}

/// Seconds that are known: of some items that see the same, and from which stage of ZeRO on, those of all unlike ways.
pub type Known<'a> = HashMap<(Vec<Counted<'a>>, u8), Vec<Option<f64>>, Quick>;

/// A kind of node in ways to split a segment.
struct Nodes {
    looks: Rc<Looks>,
    priced: Vec<Option<Rc<Priced>>>,
}

/// Looks that are known: of what sees the same, and from which stage of ZeRO on.
pub type KnownLooks = Rc<RefCell<HashMap<(Sees, u8), Rc<Looks>, Quick>>>;

fn looks(known: &KnownLooks, sees: Sees, stage: u8, ways: &[Way]) -> Rc<Looks> {
    let mut known = known.borrow_mut();
    known.entry((sees, sees.stage(stage))).or_insert_with(|| Rc::new(Looks::new(sees, ways))).clone()
}

/// Ways to split a segment, and what its nodes are in each.
pub struct Seen {
    /// The ways.
    pub ways: Rc<Vec<Way>>,
    stage: u8,
    known: KnownLooks,
    /// By kind of node.
    nodes: Vec<Option<Nodes>>,
}

impl Seen {
    /// Ways at a stage of ZeRO: nothing but looks is worked out yet.
    pub fn new(ways: Rc<Vec<Way>>, stage: u8, known: KnownLooks) -> Seen {
        Seen { ways, stage, known, nodes: vec![] }
    }

    fn looks(&self, sees: Sees) -> Rc<Looks> {
        looks(&self.known, sees, self.stage, &self.ways)
    }

    /// A kind of node in a way.
    pub fn node(&mut self, prices: &mut Prices, kind: usize, way: usize) -> &Priced {
        if self.nodes.len() <= kind {
            self.nodes.resize_with(kind + 1, || None);
        }
        let Seen { ways, stage, known, nodes } = self;
        let nodes = nodes[kind].get_or_insert_with(|| {
            let looks = looks(known, prices.node_sees(kind), *stage, ways);
            Nodes { priced: vec![None; looks.unlike.len()], looks }
        });
        nodes.priced[nodes.looks.of[way]].get_or_insert_with(|| prices.node(kind, ways[way]))
    }

    /// What a kind of node takes of an input in a way.
    pub fn taken(&mut self, prices: &mut Prices, kind: usize, way: usize, input: usize) -> &Taken {
        let as_it_is = self.ways[way];
        let node = self.node(prices, kind, way);
        &prices.inputs(kind, node, as_it_is)[input]
    }

    fn seconds(&mut self, prices: &mut Prices, item: Item, way: usize) -> f64 {
        match item {
            Item::Sum(kind) => self.node(prices, kind, way).sum,
            Item::Step(work) => prices.step(work, self.ways[way]),
            Item::Uses((from, by)) => {
                let mut moved: Vec<usize> = vec![];
                for (kind, input) in by {
                    let taken = self.taken(prices, *kind, way, *input);
                    if taken.moved && !moved.contains(&taken.needs) {
                        moved.push(taken.needs);
                    }
                }
                if moved.is_empty() {
                    return 0.0;
                }
                let held = prices.node(*from, self.ways[way]);
                moved.iter().map(|m| prices.moved(*from, &held.held, *m)).sum()
            }
        }
    }

    /// Seconds of each way to split a segment with that content, with all that is known; infinite where they are too many,
    /// which ends the adding up. By kind of step, `least` is what it takes at the least; `most` are the seconds that are not
    /// too many if no way takes fewer than it is given.
    pub fn all<'a>(
        &mut self,
        prices: &mut Prices,
        content: &'a Content,
        stage: u8,
        known: &mut Known<'a>,
        least: &dyn Fn(usize) -> f64,
        most: &dyn Fn(f64) -> f64,
    ) -> Vec<f64> {
        let mut seeing: Vec<(Sees, Vec<Counted>)> = vec![];
        let mut at: HashMap<Sees, usize, Quick> = HashMap::default();
        for (item, n) in items((&content.nodes, &content.steps, &content.uses)) {
            let sees = match item {
                Item::Sum(kind) => prices.node_sees(kind),
                Item::Step(work) => prices.step_sees(work),
                Item::Uses((from, by)) => {
                    by.iter().map(|(kind, _)| prices.node_sees(*kind)).fold(prices.node_sees(*from), Sees::or)
                }
            };
            let at = *at.entry(sees).or_insert_with(|| {
                seeing.push((sees, vec![]));
                seeing.len() - 1
            });
            seeing[at].1.push((item, n));
        }
        // What is not added up yet takes what it takes at the least.
        let least_of = |(item, n): &Counted| if let Item::Step(work) = item { least(*work) * *n as f64 } else { 0.0 };
        let least = |items: &[Counted]| -> f64 { items.iter().map(least_of).sum() };
        // What takes long tells which ways are too slow for the rest to matter, the sooner the fewer of them it sees apart.
        let mut order: Vec<(f64, usize, f64)> = vec![];
        for (at, (sees, items)) in seeing.iter().enumerate() {
            let least = least(items);
            order.push((least / self.looks(*sees).unlike.len() as f64, at, least));
        }
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut left: f64 = order.iter().map(|(.., least)| least).sum();
        let mut seconds = vec![0.0; self.ways.len()];
        let mut live: Vec<usize> = (0..self.ways.len()).collect();
        let leave_out = |live: &mut Vec<usize>, seconds: &mut [f64], left: f64| {
            let fewest = live.iter().map(|way| seconds[*way]).fold(f64::INFINITY, f64::min);
            let so_far = most(fewest + left) - left;
            live.retain(|way| {
                let is_too_slow = seconds[*way] > so_far;
                seconds[*way] = if is_too_slow { f64::INFINITY } else { seconds[*way] };
                !is_too_slow
            });
        };
        for (_, at, least) in order {
            let (sees, items) = (seeing[at].0, std::mem::take(&mut seeing[at].1));
            leave_out(&mut live, &mut seconds, left);
            left = (left - least).max(0.0);
            let looks = self.looks(sees);
            let key = (items, sees.stage(stage));
            let mut of = known.remove(&key).unwrap_or_else(|| vec![None; looks.unlike.len()]);
            for way in &live {
                let look = looks.of[*way];
                let own = of[look].unwrap_or_else(|| {
                    let way = looks.unlike[look];
                    key.0.iter().map(|(item, n)| self.seconds(prices, *item, way) * *n as f64).sum()
                });
                of[look] = Some(own);
                seconds[*way] += own;
            }
            known.insert(key, of);
        }
        leave_out(&mut live, &mut seconds, 0.0);
        seconds
    }

    /// Seconds that it takes to make again what the segment's block makes again.
    pub fn again(&mut self, prices: &mut Prices, content: &Content, way: usize) -> f64 {
        let (sums, steps, uses) = &content.again;
        items((sums, steps, uses)).map(|(item, n)| self.seconds(prices, item, way) * n as f64).sum()
    }
}
