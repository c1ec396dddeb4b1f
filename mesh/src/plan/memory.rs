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
    let mut by_size: Vec<usize> = (0..tenants.len()).collect();
    by_size.sort_by_key(|&i| (Reverse(tenants[i].bytes), tenants[i].from, i));
    let mut by_time: Vec<usize> = (0..tenants.len()).collect();
    by_time.sort_by_key(|&i| (tenants[i].from, Reverse(tenants[i].to), i));
    let mut by_life: Vec<usize> = (0..tenants.len()).collect();
    by_life.sort_by_key(|&i| (Reverse(tenants[i].to - tenants[i].from), Reverse(tenants[i].bytes), i));
    let (size, time) = (place_in_order(tenants, base, &by_size), place_in_order(tenants, base, &by_time));
    [time, place_in_order(tenants, base, &by_life)]
        .into_iter()
        .fold(size, |best, p| if p.1 < best.1 { p } else { best })
}

fn place_in_order(tenants: &[Tenant], base: usize, order: &[usize]) -> (Vec<Buffer>, usize) {
    let mut buffers = vec![Buffer::default(); tenants.len()];
    // Placed so far, by offset.
    let mut placed: Vec<usize> = Vec::new();
    let mut end = base;
    for &i in order {
        let t = &tenants[i];
        let bytes = t.bytes.next_multiple_of(ALIGN);
        let (mut best, mut at): (Option<(usize, usize)>, usize) = (None, base);
        for &p in placed.iter().filter(|&&p| tenants[p].from <= t.to && t.from <= tenants[p].to) {
            let b = buffers[p];
            // The tightest gap that is large enough.
            if b.offset >= at + bytes && best.is_none_or(|(_, gap)| b.offset - at < gap) {
                best = Some((at, b.offset - at));
            }
            at = at.max(b.offset + b.bytes.next_multiple_of(ALIGN));
        }
        let offset = best.map_or(at, |(offset, _)| offset);
        buffers[i] = Buffer { offset, bytes: t.bytes };
        end = end.max(offset + bytes);
        if bytes > 0 {
            let slot = placed.partition_point(|&p| buffers[p].offset <= offset);
            placed.insert(slot, i);
        }
    }
    (buffers, end)
}

/// Bytes alive at each of `steps` steps.
pub fn timeline(tenants: &[Tenant], base: usize, steps: usize) -> Vec<usize> {
    let mut change = vec![0isize; steps + 1];
    for t in tenants {
        let bytes = t.bytes.next_multiple_of(ALIGN) as isize;
        change[t.from.min(steps)] += bytes;
        change[(t.to + 1).min(steps)] -= bytes;
    }
    let mut now = base as isize;
    change[..steps]
        .iter()
        .map(|c| {
            now += c;
            now as usize
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_two_that_are_alive_together_overlap(list in prop::collection::vec((0usize..500, 0usize..20, 0usize..20), 1..60)) {
            let tenants: Vec<Tenant> = list.iter().map(|&(bytes, a, b)| Tenant {
                bytes, from: a.min(b), to: a.max(b),
            }).collect();
            let (buffers, end) = place(&tenants, 128);
            for (i, (t, b)) in tenants.iter().zip(&buffers).enumerate() {
                prop_assert!(b.offset >= 128 && b.offset % ALIGN == 0 && b.offset + b.bytes <= end);
                for (u, c) in tenants.iter().zip(&buffers).skip(i + 1) {
                    let together = t.from <= u.to && u.from <= t.to && t.bytes > 0 && u.bytes > 0;
                    prop_assert!(!together || b.offset + b.bytes <= c.offset || c.offset + c.bytes <= b.offset);
                }
            }
            prop_assert!(end >= timeline(&tenants, 128, 20).into_iter().max().unwrap_or(0));
        }
    }
}
