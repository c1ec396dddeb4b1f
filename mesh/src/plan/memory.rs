//! Static memory: every buffer gets its place in the arena from when it is alive.

use super::step::{ALIGN, Buffer};
use std::cmp::Reverse;

/// Something that needs a place in the arena while it is alive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tenant {
    /// Bytes.
    pub bytes: usize,
    /// First step that uses it.
    pub from: usize,
    /// Last step that uses it.
    pub to: usize,
}

/// Places tenants above `base`, so that no two that are alive together overlap; tries the largest first, the
/// earliest first and the longest first, and takes the best. Returns their buffers and the end of the arena.
pub fn place(tenants: &[Tenant], base: usize) -> (Vec<Buffer>, usize) {
    place_within(tenants, base, usize::MAX)
}

/// How often what is beyond the limit is placed before all else.
const ROUNDS: usize = 16;

/// The same, trying again where the arena ends beyond a limit.
pub(super) fn place_within(tenants: &[Tenant], base: usize, limit: usize) -> (Vec<Buffer>, usize) {
    let mut by_size: Vec<usize> = (0..tenants.len()).collect();
    by_size.sort_by_key(|&i| (Reverse(tenants[i].bytes), tenants[i].from, i));
    let mut by_time: Vec<usize> = (0..tenants.len()).collect();
    by_time.sort_by_key(|&i| (tenants[i].from, Reverse(tenants[i].to), i));
    let mut by_life: Vec<usize> = (0..tenants.len()).collect();
    by_life.sort_by_key(|&i| (Reverse(tenants[i].to - tenants[i].from), Reverse(tenants[i].bytes), i));
    let placed = [by_size, by_time, by_life].map(|order| (place_in_order(tenants, base, &order), order));
    let first_best = |best: Placement, p: Placement| if p.0.1 < best.0.1 { p } else { best };
    let Some(mut best) = placed.into_iter().reduce(first_best) else { return (vec![], base) };
    let (mut last, mut order) = (best.0.0.clone(), best.1.clone());
    for _ in 0..ROUNDS {
        if best.0.1 <= limit {
            break;
        }
        let beyond = |i: usize| last[i].bytes > 0 && last[i].offset + last[i].bytes.next_multiple_of(ALIGN) > limit;
        order.sort_by_key(|i| !beyond(*i));
        let again = place_in_order(tenants, base, &order);
        last.clone_from(&again.0);
        if again.1 < best.0.1 {
            best.0 = again;
        }
    }
    best.0
}

/// Places with their end, and the order in which they were looked for.
type Placement = ((Vec<Buffer>, usize), Vec<usize>);

fn place_in_order(tenants: &[Tenant], base: usize, order: &[usize]) -> (Vec<Buffer>, usize) {
    // What is empty lies at the start.
    let mut buffers = vec![Buffer { offset: base, bytes: 0 }; tenants.len()];
    let mut placed = Placed::default();
    let mut beside = vec![];
    let mut end = base;
    for &i in order.iter().filter(|i| tenants[**i].bytes > 0) {
        let t = &tenants[i];
        let bytes = t.bytes.next_multiple_of(ALIGN);
        placed.beside(t, &mut beside);
        let (mut best, mut at): (Option<(usize, usize)>, usize) = (None, base);
        for &(start, end) in &beside {
            // The tightest gap that is large enough.
            if start >= at + bytes && best.is_none_or(|(_, gap)| start - at < gap) {
                best = Some((at, start - at));
            }
            at = at.max(end);
        }
        let offset = best.map_or(at, |(offset, _)| offset);
        buffers[i] = Buffer { offset, bytes: t.bytes };
        end = end.max(offset + bytes);
        placed.insert(Spot { start: offset, end: offset + bytes, from: t.from, to: t.to });
    }
    (buffers, end)
}

/// The place of a tenant.
#[derive(Clone, Copy)]
struct Spot {
    start: usize,
    end: usize,
    from: usize,
    to: usize,
}

/// Steps of a stretch of time.
const STRETCH: usize = 64;

/// What is placed so far, to be found by when it is alive: most tenants are alive for a few steps only, beside few others.
/// All lists are in the order of places.
#[derive(Default)]
struct Placed {
    spots: Vec<Spot>,
    /// All of them, by number.
    all: Vec<u32>,
    /// By stretch: what is alive in it.
    stretches: Vec<Vec<Spot>>,
}

impl Placed {
    fn insert(&mut self, spot: Spot) {
        let last = spot.to / STRETCH;
        self.stretches.resize_with(self.stretches.len().max(last + 1), Vec::new);
        for list in &mut self.stretches[spot.from / STRETCH..=last] {
            list.insert(list.partition_point(|s| s.start <= spot.start), spot);
        }
        let at = self.all.partition_point(|i| self.spots[*i as usize].start <= spot.start);
        self.all.insert(at, self.spots.len() as u32);
        self.spots.push(spot);
    }

    /// Starts and ends of the places of all that is alive together with a tenant, in order.
    fn beside(&self, t: &Tenant, found: &mut Vec<(usize, usize)>) {
        found.clear();
        let stretches = self.stretches.len();
        let range = (t.from / STRETCH).min(stretches)..(t.to / STRETCH + 1).min(stretches);
        let together = |s: &&Spot| s.from <= t.to && t.from <= s.to;
        if self.stretches[range.clone()].iter().map(Vec::len).sum::<usize>() >= self.all.len() {
            found.extend(self.all.iter().map(|i| &self.spots[*i as usize]).filter(together).map(|s| (s.start, s.end)));
            return;
        }
        for i in range.clone() {
            // What is in several stretches counts in the first of them.
            let first = |s: &&Spot| (s.from / STRETCH).max(range.start) == i;
            found.extend(self.stretches[i].iter().filter(|s| together(s) && first(s)).map(|s| (s.start, s.end)));
        }
        if range.len() > 1 {
            found.sort();
        }
    }
}

/// Bytes alive at each of `steps` steps.
pub fn timeline(tenants: &[Tenant], base: usize, steps: usize) -> Vec<usize> {
    let mut change = vec![0isize; steps + 1];
    for t in tenants {
        let bytes = t.bytes.next_multiple_of(ALIGN) as isize;
        change[t.from.min(steps)] += bytes;
        change[(t.to + 1).min(steps)] -= bytes;
    }
    added_up(base, &change[..steps])
}

/// Bytes at each step, by what comes and goes there.
pub(super) fn added_up(base: usize, changes: &[isize]) -> Vec<usize> {
    let mut now = base as isize;
    let after = |change: &isize| {
        now += change;
        now as usize
    };
    changes.iter().map(after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The places of tenants in an order, each looked for beside all that are placed.
    fn plainly(tenants: &[Tenant], base: usize, order: &[usize]) -> (Vec<Buffer>, usize) {
        let (mut buffers, mut end) = (vec![Buffer { offset: base, bytes: 0 }; tenants.len()], base);
        let mut placed: Vec<usize> = vec![];
        for &i in order.iter().filter(|i| tenants[**i].bytes > 0) {
            let t = &tenants[i];
            let bytes = t.bytes.next_multiple_of(ALIGN);
            placed.sort_by_key(|p| buffers[*p].offset);
            let together = placed.iter().filter(|p| tenants[**p].from <= t.to && t.from <= tenants[**p].to);
            let (mut gaps, mut at) = (vec![], base);
            for b in together.map(|p| buffers[*p]) {
                gaps.extend((b.offset >= at + bytes).then(|| (b.offset - at, at)));
                at = at.max(b.offset + b.bytes.next_multiple_of(ALIGN));
            }
            let offset = gaps.into_iter().min().map_or(at, |(_, at)| at);
            buffers[i] = Buffer { offset, bytes: t.bytes };
            end = end.max(offset + bytes);
            placed.push(i);
        }
        (buffers, end)
    }

    /// Tenants of so many steps: most of them for a few, some for many.
    fn tenants(steps: usize) -> impl Strategy<Value = Vec<Tenant>> {
        let length = prop_oneof![4 => 0..9usize, 1 => 0..steps];
        let tenant = (prop_oneof![1 => Just(0), 4 => 1..900usize], 0..steps, length);
        let tenant = tenant.prop_map(move |(bytes, from, n)| Tenant { bytes, from, to: (from + n).min(steps - 1) });
        prop::collection::vec(tenant, 1..200)
    }

    proptest! {
        #[test]
        fn places_are_those_of_a_search_beside_all_that_is_placed(list in tenants(5 * STRETCH)) {
            let order: Vec<usize> = (0..list.len()).collect();
            prop_assert_eq!(place_in_order(&list, 128, &order), plainly(&list, 128, &order));
        }

        #[test]
        fn no_two_that_are_alive_together_overlap(list in prop::collection::vec((0usize..500, 0usize..20, 0usize..20), 1..60)) {
            let tenants: Vec<Tenant> = list.iter().map(|&(bytes, a, b)| Tenant {
                bytes, from: a.min(b), to: a.max(b),
            }).collect();
            let least = timeline(&tenants, 128, 20).into_iter().max().unwrap_or(0);
            let first = place(&tenants, 128).1;
            for limit in [usize::MAX, least] {
                let (buffers, end) = place_within(&tenants, 128, limit);
                for (i, (t, b)) in tenants.iter().zip(&buffers).enumerate() {
                    prop_assert!(b.offset >= 128 && b.offset % ALIGN == 0 && b.offset + b.bytes <= end);
                    for (u, c) in tenants.iter().zip(&buffers).skip(i + 1) {
                        let together = t.from <= u.to && u.from <= t.to && t.bytes > 0 && u.bytes > 0;
                        prop_assert!(!together || b.offset + b.bytes <= c.offset || c.offset + c.bytes <= b.offset);
                    }
                }
                prop_assert!(end >= least && end <= first);
            }
        }
    }
}
