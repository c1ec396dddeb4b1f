//! The moments of a function, whatever their order: which have to come before which, what memory each needs, and what it
//! takes.

use super::super::ALIGN;
use super::super::cost::{Cost, cost};
use super::super::device::Worked;
use super::super::function::Planner;
use super::super::fuse::Kind;
use super::super::step::{ExchangeKind, Work};
use super::super::time::messages;
use super::{Moment, Phase};
use crate::spmd::ValueId;
use std::collections::{HashMap, HashSet};

/// FLOPs that take as long as a byte to and from memory, as a byte between devices, and as a message.
const MEMORY: f64 = 32.0;
const LINK: f64 = 256.0;
const MESSAGE: f64 = 1e6;
/// What is shorter is there for its latency, and stays under way as long as it can.
const SHORT: usize = 16 << 10;

/// What does not depend on the order. Memory that a moment needs is numbered: first the lives, then the groups' scratch.
pub(super) struct Graph {
    /// All of them; None for the beginning and the end of the function.
    pub moments: Vec<Option<Moment>>,
    /// By moment: those that have to come before it, and behind it.
    pub before: Vec<Vec<usize>>,
    pub behind: Vec<Vec<usize>>,
    /// By moment: what of the memory it needs to be there.
    pub needs: Vec<Vec<usize>>,
    /// By what of the memory: the moments that need it.
    pub users: Vec<Vec<usize>>,
    /// By class of devices and what of the memory: bytes.
    pub bytes: Vec<Vec<isize>>,
    /// By class: the most bytes that are there at a time.
    pub peak: Vec<isize>,
    /// By class and moment: what it takes, None if there is nothing to do.
    pub costs: Vec<Vec<Option<f64>>>,
    /// By moment: whether it is a product.
    pub product: Vec<bool>,
    pub collectives: Vec<Collective>,
}

/// A collective that is taken apart.
#[derive(Clone, Copy)]
pub(super) struct Collective {
    pub begin: usize,
    pub combine: Option<usize>,
    pub finish: Option<usize>,
    /// What its messages take.
    pub cost: f64,
    /// Whether it stays under way as long as it can: its messages are short, or go to another stage.
    pub short: bool,
}

impl Collective {
    /// The moment at which it ends.
    pub fn last(&self) -> usize {
        self.finish.or(self.combine).unwrap_or(self.begin)
    }
}

/// What a step takes that reads and writes so many bytes; if it is a collective, what its messages take, and their bytes.
fn costs(work: &Work, inputs: usize, outputs: usize) -> (f64, f64, usize) {
    let Cost { flops, bytes } = cost(work, inputs, outputs);
    let (mut sent, mut received, mut count) = (0, 0, 0);
    for (_, out, into, n) in messages(work) {
        (sent, received, count) = (sent + out, received + into, count.max(n));
    }
    let most = sent.max(received);
    (flops + MEMORY * bytes, LINK * most as f64 + MESSAGE * count as f64, most)
}

/// Devices with as many bytes of everything, and as much to do: the first of each, and its bytes.
fn classes(p: &Planner, works: &[Vec<Worked>]) -> (Vec<usize>, Vec<Vec<isize>>) {
    let bytes = |d: usize| -> Vec<isize> {
        let lives = p.lives.iter().map(|l| l.bytes[d]);
        let scratch = works[d].iter().map(|w| w.as_ref().map_or(0, |(_, scratch)| *scratch));
        lives.chain(scratch).map(|b| b.next_multiple_of(ALIGN) as isize).collect()
    };
    let mut known: HashSet<(Vec<isize>, Vec<bool>)> = HashSet::new();
    let fresh = |d: &usize| known.insert((bytes(*d), works[*d].iter().map(Option::is_some).collect()));
    let devices: Vec<usize> = (0..works.len()).filter(fresh).collect();
    let all = devices.iter().map(|d| bytes(*d)).collect();
    (devices, all)
}

impl Graph {
    /// That of a function, and by class and moment the bytes that are there in the order of its list.
    pub fn new(p: &Planner, works: &[Vec<Worked>]) -> (Graph, Vec<Vec<isize>>) {
        let mut moments = vec![None];
        for group in 0..p.groups().len() {
            let phases = p.phases(group).unwrap_or(&[Phase::Whole]);
            moments.extend(phases.iter().map(|phase| Some(Moment { group, phase: *phase })));
        }
        moments.push(None);
        let count = moments.len();
        let (devices, bytes) = classes(p, works);
        let mut graph = Graph {
            before: vec![vec![]; count],
            behind: vec![vec![]; count],
            needs: vec![vec![]; count],
            users: vec![vec![]; p.lives.len() + p.groups().len()],
            peak: vec![],
            costs: vec![vec![None; count]; devices.len()],
            product: vec![false; count],
            collectives: vec![],
            moments,
            bytes,
        };
        graph.order(p);
        graph.memory(p);
        graph.times(p, works, &devices);
        let alive: Vec<Vec<isize>> = graph.bytes.iter().map(|b| added_up(b, &graph.users, count)).collect();
        graph.peak = alive.iter().map(|a| a.iter().copied().max().unwrap_or(0)).collect();
        (graph, alive)
    }

    /// The moments of steps.
    fn steps(&self) -> impl Iterator<Item = (usize, Moment)> {
        self.moments.iter().enumerate().filter_map(|(m, moment)| moment.map(|moment| (m, moment)))
    }

    /// What has to come before what.
    fn order(&mut self, p: &Planner) {
        // Of each value: the moment that makes it, the one from which on it has its place, and those that read it.
        let (mut made, mut opened): (HashMap<ValueId, usize>, HashMap<ValueId, usize>) = Default::default();
        let mut readers: HashMap<ValueId, Vec<usize>> = HashMap::new();
        let mut pairs: Vec<(usize, usize)> = vec![];
        let mut previous: Option<(usize, usize)> = None;
        for (m, moment) in self.steps() {
            pairs.extend(previous.filter(|(group, _)| *group == moment.group).map(|(_, before)| (before, m)));
            previous = Some((moment.group, m));
            for v in p.looks_at(moment) {
                pairs.extend(made.get(v).map(|maker| (*maker, m)));
                readers.entry(*v).or_default().push(m);
            }
            if moment.phase == Phase::Interior {
                // Of a halo it reads what the device has itself, which is there from the beginning on.
                let group = &p.groups()[moment.group];
                let halo = p.halo(group).map(|i| p.root(i.output));
                let there = |v: &ValueId| if Some(*v) == halo { opened.get(v) } else { made.get(v) };
                pairs.extend(group.inputs.iter().filter_map(there).map(|maker| (*maker, m)));
            }
            made.extend(p.makes(moment).iter().map(|v| (*v, m)));
            opened.extend(p.opens(moment).iter().map(|v| (*v, m)));
        }
        // What lies in one place: who reads what lay there before is done when another value comes.
        let group = |m: usize| self.moments[m].map(|moment| moment.group);
        let mut replaced = |old: ValueId, m: usize| {
            let others = readers.get(&old).into_iter().flatten().filter(|r| group(**r) != group(m));
            pairs.extend(others.map(|r| (*r, m)));
        };
        for life in &p.lives {
            let values: Vec<ValueId> = life.before.iter().map(|(_, v)| *v).chain([life.value]).collect();
            for pair in values.windows(2) {
                opened.get(&pair[1]).into_iter().for_each(|m| replaced(pair[0], *m));
            }
        }
        let reads: HashMap<_, _> = p.cx.spmd.reads.iter().copied().collect();
        for (value, m) in &opened {
            let old = p.variable(*value).and_then(|var| reads.get(&var));
            old.into_iter().for_each(|old| replaced(*old, *m));
        }
        for (a, b) in pairs {
            self.before[b].push(a);
            self.behind[a].push(b);
        }
    }

    /// What of the memory each moment needs to be there.
    fn memory(&mut self, p: &Planner) {
        let mut made: HashSet<ValueId> = HashSet::new();
        for (m, moment) in self.steps().collect::<Vec<_>>() {
            made.extend(p.makes(moment));
            let written = p.makes(moment).iter().chain(p.opens(moment));
            let lives = p.looks_at(moment).iter().chain(written).filter_map(|v| p.life(*v));
            let mut needs: Vec<usize> =
                lives.chain(p.has_scratch(moment).then_some(p.lives.len() + moment.group)).collect();
            needs.sort_unstable();
            needs.dedup();
            self.needs[m] = needs;
        }
        let end = self.moments.len() - 1;
        for (l, life) in p.lives.iter().enumerate() {
            let first = life.before.first().map_or(life.value, |(_, v)| *v);
            // What was fed is there from the beginning.
            if !made.contains(&first) && life.from < p.end() {
                self.needs[0].push(l);
            }
            if life.to == p.end() {
                self.needs[end].push(l);
            }
        }
        for (m, needs) in self.needs.iter().enumerate() {
            needs.iter().for_each(|r| self.users[*r].push(m));
        }
    }

    /// What each moment takes, and the collectives.
    fn times(&mut self, p: &Planner, works: &[Vec<Worked>], devices: &[usize]) {
        for (m, moment) in self.steps().collect::<Vec<_>>() {
            let group = &p.groups()[moment.group];
            let (mut product, mut link, mut short) = (matches!(group.kind, Kind::Band(..)), 0.0f64, true);
            for (c, d) in devices.iter().enumerate() {
                let Some((work, _)) = &works[*d][moment.group] else { continue };
                let bytes = |list: &[ValueId]| list.iter().map(|v| p.cx.spmd.values[v.index()].bytes(*d)).sum();
                let (own, messages, sent) = costs(work, bytes(&group.inputs), bytes(&group.outputs));
                self.costs[c][m] = match (moment.phase, work) {
                    (Phase::Whole, _) => Some(own),
                    (Phase::Interior | Phase::Rim, Work::Op(op)) => {
                        let share = p.in_two(group, *d, op, moment.phase);
                        share.map(|work| costs(&work, bytes(&group.inputs), bytes(&group.outputs)).0)
                    }
                    _ => Some(0.0),
                };
                // The interior stays beside its halo.
                let movable = moment.phase != Phase::Interior;
                product |= movable && matches!(work, Work::Op(op) if op.op.is_product());
                // A stage that hands something on does not wait until the next one takes it.
                let hands_on = matches!(work, Work::Exchange(e) if e.kind == ExchangeKind::Send);
                (link, short) = (link.max(messages), short && (sent <= SHORT || hands_on));
            }
            self.product[m] = product;
            match (moment.phase, self.collectives.last_mut()) {
                (Phase::Begin, _) => {
                    let (combine, finish) = (None, None);
                    self.collectives.push(Collective { begin: m, combine, finish, cost: link, short });
                }
                (Phase::Combine, Some(of)) => of.combine = Some(m),
                (Phase::Finish, Some(of)) => of.finish = Some(m),
                (Phase::Whole | Phase::Combine | Phase::Finish | Phase::Interior | Phase::Rim, _) => {}
            }
        }
    }
}

/// The bytes that are there at each moment, in the order of their numbers.
fn added_up(bytes: &[isize], users: &[Vec<usize>], count: usize) -> Vec<isize> {
    let mut changes = vec![0isize; count + 1];
    for (bytes, users) in bytes.iter().zip(users) {
        if let (Some(first), Some(last)) = (users.iter().min(), users.iter().max()) {
            changes[*first] += bytes;
            changes[last + 1] -= bytes;
        }
    }
    changes[..count]
        .iter()
        .scan(0, |alive, change| {
            *alive += change;
            Some(*alive)
        })
        .collect()
}
