//! Communication beside computation: collectives that begin and finish in steps of their own.
//!
//! A collective may begin right behind what it sends and finish right before what reads it, and what stands between is done
//! while its messages are on their way. The list stays one for all devices: what one of them waits for, others have begun
//! earlier in it, so nobody can wait for one who waits for him, and messages between a pair keep one order.
//!
//! All collectives are taken apart first, and then moments are moved: the end of each down to its first reader, the combination
//! of a sum half of that way; a beginning up, with what is cheap and only made for it, where there is not enough in between (so
//! weights are gathered while the layer before is computed); and independent products in between. A move is made only if no
//! device then holds more than its peak was before, and where the places found for it all take more than before in spite
//! of that, less is taken apart. What stays in one piece is one step.
//!
//! There is no machine here: costs are in FLOPs of a usual one, and decide only how far is far enough.

use super::cost::{Cost, cost};
use super::device::{Place, Worked};
use super::function::Planner;
use super::fuse::Kind;
use super::step::{ExchangeKind, Work};
use super::time::messages;
use super::timeline::Timeline;
use crate::spmd::ValueId;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// What is done of a group at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// All of it.
    Whole,
    /// Posts what is sent and received.
    Begin,
    /// Waits for the parts of a sum, combines them, and sends the results on.
    Combine,
    /// Waits for the rest.
    Finish,
}

/// A step of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// The group.
    pub group: usize,
    /// What is done of it.
    pub phase: Phase,
}

/// FLOPs that take as long as a byte to and from memory, as a byte between devices, and as a message.
const MEMORY: f64 = 32.0;
const LINK: f64 = 256.0;
const MESSAGE: f64 = 1e6;
/// What is shorter is there for its latency, and stays under way as long as it can.
const SHORT: usize = 16 << 10;
/// How often what a collective takes is to be between its beginning and its end at the most.
const ENOUGH: f64 = 4.0;
/// How far steps are moved to be beside a collective.
const FAR: usize = 64;
/// Shares of what is free below the peak that are tried, in turn.
const SHARES: [f64; 3] = [1.0, 0.5, 0.0];

/// By group that is taken apart: which of those under way at a time it is.
pub(super) fn numbers(moments: &[Moment]) -> HashMap<usize, usize> {
    let mut last = HashMap::new();
    moments.iter().enumerate().for_each(|(m, moment)| {
        last.insert(moment.group, m);
    });
    let (mut out, mut free, mut next) = (HashMap::new(), BTreeSet::new(), 0);
    for (m, moment) in moments.iter().enumerate().filter(|(_, m)| m.phase != Phase::Whole) {
        let number = *out.entry(moment.group).or_insert_with(|| {
            free.pop_first().unwrap_or_else(|| {
                next += 1;
                next - 1
            })
        });
        if last[&moment.group] == m {
            free.insert(number);
        }
    }
    out
}

impl Planner<'_> {
    /// Takes collectives apart where that takes no memory beyond what there is without, and says where everything lies
    /// then ([`Planner::places`]), and by device its timeline without.
    pub(super) fn overlap(&mut self, works: &[Vec<Worked>]) -> (Vec<usize>, Vec<Place>, Vec<Option<Arc<Timeline>>>) {
        let whole = self.places(works);
        let none = vec![None; self.devices()];
        let apart = (0..self.groups().len()).any(|g| self.phases(g).is_some());
        if self.cx.waiting || !apart {
            return (whole.0, whole.1, none);
        }
        let first = self.moments.clone();
        let ends = |(of, places): &(Vec<usize>, Vec<Place>)| of.iter().map(|c| places[*c].end).collect::<Vec<_>>();
        let before = ends(&whole);
        let blocks = self.blocks();
        let timelines: Vec<_> = whole.1.iter().map(|place| Arc::new(self.timeline_of(place, &blocks))).collect();
        let mut tried: Option<Vec<Moment>> = None;
        let list = List::new(self, works);
        for share in SHARES {
            let moments = list.clone().moved(share);
            if moments == first || tried.as_ref() == Some(&moments) {
                continue;
            }
            self.schedule(moments.clone());
            let places = self.places(works);
            if ends(&places).iter().zip(&before).all(|(now, before)| now <= before) {
                let waiting = whole.0.iter().map(|c| Some(timelines[*c].clone())).collect();
                return (places.0, places.1, waiting);
            }
            tried = Some(moments);
        }
        self.schedule(first);
        (whole.0, whole.1, none)
    }
}

/// Steps in an order, and what is in memory at each.
#[derive(Clone)]
struct List {
    fixed: Arc<Fixed>,
    /// By place: the moment there.
    order: Vec<usize>,
    /// By moment: its place.
    at: Vec<usize>,
    /// By class of devices and moment: the bytes that are there.
    alive: Vec<Vec<isize>>,
}

/// What does not depend on the order.
struct Fixed {
    /// All of them; None for the beginning and the end of the function.
    moments: Vec<Option<Moment>>,
    /// By moment: those that have to come before it, and behind it.
    before: Vec<Vec<usize>>,
    behind: Vec<Vec<usize>>,
    /// By moment: what of the memory it needs to be there, by number.
    needs: Vec<Vec<usize>>,
    /// By such a number: the moments that need it.
    users: Vec<Vec<usize>>,
    /// By class of devices and such a number: bytes.
    bytes: Vec<Vec<isize>>,
    /// By class: the most bytes that are there at a time.
    peak: Vec<isize>,
    /// By class and moment: what it takes, None if there is nothing to do.
    costs: Vec<Vec<Option<f64>>>,
    /// By moment: whether it is a product.
    product: Vec<bool>,
    collectives: Vec<Collective>,
}

/// A collective that is taken apart.
struct Collective {
    begin: usize,
    combine: Option<usize>,
    finish: Option<usize>,
    /// What its messages take, and whether it stays under way as long as it can: they are short, or go to another stage.
    cost: f64,
    short: bool,
}

impl Collective {
    fn last(&self) -> usize {
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

impl List {
    fn new(p: &Planner, works: &[Vec<Worked>]) -> List {
        let groups = p.groups();
        let mut moments = vec![None];
        for group in 0..groups.len() {
            let phases = p.phases(group).unwrap_or(&[Phase::Whole]);
            moments.extend(phases.iter().map(|phase| Some(Moment { group, phase: *phase })));
        }
        moments.push(None);
        let (count, end) = (moments.len(), moments.len() - 1);
        // Devices with as many bytes of everything, and as much to do, are of one class.
        let scratch = p.lives.len();
        let bytes = |d: usize| -> Vec<isize> {
            let lives = p.lives.iter().map(|l| l.bytes[d]);
            let scratch = works[d].iter().map(|w| w.as_ref().map_or(0, |(_, scratch)| *scratch));
            lives.chain(scratch).map(|b| b.next_multiple_of(super::ALIGN) as isize).collect()
        };
        let mut classes: Vec<(usize, Vec<isize>)> = vec![];
        let mut known: HashSet<(Vec<isize>, Vec<bool>)> = HashSet::new();
        for (d, works) in works.iter().enumerate() {
            let (bytes, there) = (bytes(d), works.iter().map(Option::is_some).collect());
            if known.insert((bytes.clone(), there)) {
                classes.push((d, bytes));
            }
        }
        drop(known);
        let mut fixed = Fixed {
            before: vec![vec![]; count],
            behind: vec![vec![]; count],
            needs: vec![vec![]; count],
            users: vec![vec![]; scratch + groups.len()],
            peak: vec![],
            costs: vec![vec![None; count]; classes.len()],
            product: vec![false; count],
            collectives: vec![],
            moments,
            bytes: vec![],
        };
        let mut made = vec![None; p.cx.spmd.values.len()];
        // Of each value: the moments that need it to be there.
        let mut readers: HashMap<ValueId, Vec<usize>> = HashMap::new();
        let mut pairs: Vec<(usize, usize)> = vec![];
        let mut previous: Option<(usize, usize)> = None;
        for m in 1..end {
            let Some(moment) = fixed.moments[m] else { continue };
            pairs.extend(previous.filter(|(group, _)| *group == moment.group).map(|(_, before)| (before, m)));
            previous = Some((moment.group, m));
            for v in p.looks_at(moment) {
                pairs.extend(made[v.index()].map(|maker| (maker, m)));
                readers.entry(*v).or_default().push(m);
            }
            p.makes(moment).iter().for_each(|v| made[v.index()] = Some(m));
            let written = p.makes(moment).iter().chain(p.opens(moment));
            let mut needs: Vec<usize> = p.looks_at(moment).iter().chain(written).filter_map(|v| p.life(*v)).collect();
            needs.extend(p.has_scratch(moment).then_some(scratch + moment.group));
            needs.sort_unstable();
            needs.dedup();
            fixed.needs[m] = needs;
            let first = |d: usize| works[d][moment.group].as_ref();
            for (c, (d, _)) in classes.iter().enumerate() {
                let bytes = |list: &[ValueId]| list.iter().map(|v| p.cx.spmd.values[v.index()].bytes(*d)).sum();
                let [inputs, outputs] = [bytes(&groups[moment.group].inputs), bytes(&groups[moment.group].outputs)];
                let cost = first(*d).map(|(work, _)| costs(work, inputs, outputs));
                fixed.costs[c][m] = match moment.phase {
                    Phase::Whole => cost.map(|(own, ..)| own),
                    _ => cost.map(|_| 0.0),
                };
                // A stage that hands something on does not wait until the next one takes it.
                let hands_on = first(*d)
                    .is_some_and(|(work, _)| matches!(work, Work::Exchange(e) if e.kind == ExchangeKind::Send));
                if let (Some((_, link, bytes)), true) = (cost, moment.phase == Phase::Begin) {
                    let fresh = |of: &Collective| of.begin != m;
                    if fixed.collectives.last().is_none_or(fresh) {
                        let new = Collective { begin: m, combine: None, finish: None, cost: 0.0, short: true };
                        fixed.collectives.push(new);
                    }
                    let of = fixed.collectives.last_mut().expect("there is one");
                    (of.cost, of.short) = (of.cost.max(link), of.short && (bytes <= SHORT || hands_on));
                }
            }
            if let Some(of) = fixed.collectives.last_mut()
                && fixed.moments[of.begin].map(|b| b.group) == Some(moment.group)
            {
                match moment.phase {
                    Phase::Combine => of.combine = Some(m),
                    Phase::Finish => of.finish = Some(m),
                    Phase::Whole | Phase::Begin => {}
                }
            }
            fixed.product[m] = match groups[moment.group].kind {
                Kind::Band(..) => true,
                _ => classes.iter().any(|(d, _)| matches!(first(*d), Some((Work::Op(op), _)) if op.op.is_product())),
            };
        }
        for (l, life) in p.lives.iter().enumerate() {
            let first = life.before.first().map_or(life.value, |(_, v)| *v);
            // What was fed is there from the beginning.
            if made[first.index()].is_none() && life.from < p.end() {
                fixed.needs[0].push(l);
            }
            if life.to == p.end() {
                fixed.needs[end].push(l);
            }
        }
        // What lies in one place: who reads what lay there before is done when another value comes.
        let opened: HashMap<_, _> = (1..end)
            .flat_map(|m| {
                fixed.moments[m].into_iter().flat_map(move |moment| p.opens(moment).iter().map(move |v| (*v, m)))
            })
            .collect();
        for life in &p.lives {
            let mut last = None;
            for value in life.before.iter().map(|(_, v)| *v).chain([life.value]) {
                if let (Some(old), Some(m)) = (last, opened.get(&value)) {
                    pairs.extend(readers.get(&old).into_iter().flatten().filter(|r| *r != m).map(|r| (*r, *m)));
                }
                last = Some(value);
            }
        }
        let reads: HashMap<_, _> = p.cx.spmd.reads.iter().copied().collect();
        for (value, m) in &opened {
            let old = p.variable(*value).and_then(|var| reads.get(&var));
            let of = old.and_then(|old| readers.get(old));
            pairs.extend(of.into_iter().flatten().filter(|r| *r != m).map(|r| (*r, *m)));
        }
        for (a, b) in pairs {
            fixed.before[b].push(a);
            fixed.behind[a].push(b);
        }
        for (m, needs) in fixed.needs.iter().enumerate() {
            needs.iter().for_each(|r| fixed.users[*r].push(m));
        }
        let order: Vec<usize> = (0..count).collect();
        let alive: Vec<Vec<isize>> = classes.iter().map(|(_, bytes)| added_up(bytes, &fixed.users, count)).collect();
        fixed.peak = alive.iter().map(|a| a.iter().copied().max().unwrap_or(0)).collect();
        fixed.bytes = classes.into_iter().map(|(_, bytes)| bytes).collect();
        List { fixed: Arc::new(fixed), at: order.clone(), order, alive }
    }

    /// The moments in their order, after all moves that take no more than that share of what is free.
    fn moved(mut self, share: f64) -> Vec<Moment> {
        let fixed = self.fixed.clone();
        let limits: Vec<Vec<isize>> = self
            .alive
            .iter()
            .zip(&fixed.peak)
            .map(|(alive, peak)| alive.iter().map(|b| b + ((peak - b) as f64 * share) as isize).collect())
            .collect();
        for of in &fixed.collectives {
            self.sink(of, &limits);
        }
        for of in &fixed.collectives {
            self.fill(of, &limits);
        }
        self.together()
    }

    /// Moves the end of a collective down to its first reader, and its combination half of the way.
    fn sink(&mut self, of: &Collective, limits: &[Vec<isize>]) {
        let last = of.last();
        let end = self.order.len() - 1;
        let reader = self.fixed.behind[last].iter().map(|m| self.at[*m]).min().unwrap_or(end);
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
                if !self.fixed.product[m] || self.hides(of, m) <= 0.0 {
                    continue;
                }
                if way {
                    self.up(m, self.at[last], limits, 1);
                } else if self.fixed.behind[m].iter().all(|b| self.at[*b] > self.at[of.begin]) {
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
        let fixed = self.fixed.clone();
        let mut way: Vec<usize> = fixed.before[m].iter().copied().filter(|b| self.at[*b] >= to).collect();
        way.sort_unstable_by_key(|b| self.at[*b]);
        way.dedup();
        let cheap = |b: &usize| {
            depth > 0 && !fixed.product[*b] && matches!(fixed.moments[*b], Some(Moment { phase: Phase::Whole, .. }))
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
        let own = self.fixed.costs.iter().filter(|c| c[of.begin].is_some());
        own.map(|c| c[m].unwrap_or(0.0)).fold(f64::INFINITY, f64::min)
    }

    /// What is between the beginning of a collective and its end.
    fn hidden(&self, of: &Collective) -> f64 {
        let (from, to) = (self.at[of.begin] + 1, self.at[of.last()]);
        let own = self.fixed.costs.iter().filter(|c| c[of.begin].is_some());
        let between = |c: &Vec<Option<f64>>| (from..to).filter_map(|place| c[self.order[place]]).sum::<f64>();
        own.map(between).fold(f64::INFINITY, f64::min)
    }

    /// Moves a moment to another place, if nobody then has more at a time than the limits, or than before.
    fn shift(&mut self, m: usize, to: usize, limits: &[Vec<isize>]) -> bool {
        let (fixed, from) = (self.fixed.clone(), self.at[m]);
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
        let spans: Vec<(usize, Option<[usize; 2]>, Option<[usize; 2]>)> = fixed.needs[m]
            .iter()
            .map(|r| {
                let others = fixed.users[*r].iter().filter(|u| **u != m).map(|u| self.at[*u]);
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
            let bytes = &fixed.bytes[c];
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
            let needed = |r: &usize| fixed.needs[m].contains(r);
            let ends = |r: &usize| fixed.users[*r].iter().all(|u| self.at[*u] <= self.at[neighbour]);
            own -= fixed.needs[neighbour].iter().filter(|r| !needed(r) && ends(r)).map(|r| bytes[*r]).sum::<isize>();
            if own > fixed.peak[c] && own > alive[m] {
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
        let moments: Vec<Moment> = self.order.iter().filter_map(|m| self.fixed.moments[*m]).collect();
        let mut out: Vec<Moment> = vec![];
        let mut steps: HashMap<usize, usize> = HashMap::new();
        moments.iter().for_each(|m| *steps.entry(m.group).or_default() += 1);
        let mut place = 0;
        while place < moments.len() {
            let Moment { group, phase } = moments[place];
            let count = steps[&group];
            let piece = &moments[place..moments.len().min(place + count)];
            if phase == Phase::Begin && piece.iter().all(|m| m.group == group) {
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
