//! Who sends what to whom in a move.
//!
//! What a device has it takes from itself, and everything else once: so it receives what it needs and does not have, and no
//! byte more. Of several that hold the same it takes it from one that is near: devices that share more of the outer axes of
//! the mesh are nearer, since devices of a host are numbered one after the other. Of those that are as near it is the one
//! that has least to send so far, what has the least choice first and large pieces before small ones: so replicas share the
//! work (`mesh/tests/resharding.rs` says how well).

use crate::layout::Mesh;
use crate::region::Region;
use std::cmp::Reverse;
use std::collections::HashMap;

/// A box that a receiver does not have, and those that hold it.
struct Piece<'a> {
    receiver: usize,
    /// Where it stands among the receiver's boxes.
    at: usize,
    elements: usize,
    /// How near the nearest of them are.
    near: usize,
    holders: &'a [usize],
}

/// Which device sends what to whom so that everyone who holds `from` comes to hold `to`: for each receiver the boxes
/// it gets and their senders (itself for what it has).
///
/// Boxes that nobody holds are left out; lowering never asks for such.
pub fn sources(mesh: &Mesh, from: &[Region], to: &[Region]) -> Vec<Vec<(usize, Region)>> {
    let at: Vec<Vec<usize>> = (0..from.len()).map(|d| mesh.coordinates(d)).collect();
    // How many axes from the outermost one on two devices share.
    let near = |a: usize, b: usize| at[a].iter().zip(&at[b]).take_while(|(a, b)| a == b).count();
    let parts = replicas(from);
    let mut out: Vec<Vec<(usize, Region)>> = vec![vec![]; to.len()];
    let mut pieces: Vec<Piece> = vec![];
    for (d, wanted) in to.iter().enumerate() {
        let mut missing = if wanted.is_empty() { vec![] } else { vec![wanted.clone()] };
        missing = taken(missing, &from[d], |own| out[d].push((d, own)));
        // Where parts overlap, the nearest one goes first.
        let mut others: Vec<&(&Region, Vec<usize>)> = parts.iter().filter(|(r, _)| r.overlaps(wanted)).collect();
        let nearest = |holders: &[usize]| holders.iter().map(|s| near(d, *s)).max().unwrap_or(0);
        others.sort_by_key(|(_, holders)| Reverse(nearest(holders)));
        for (region, holders) in others {
            if missing.is_empty() {
                break;
            }
            missing = taken(missing, region, |piece| {
                let (at, elements, near) = (out[d].len(), piece.elements(), nearest(holders));
                pieces.push(Piece { receiver: d, at, elements, near, holders });
                out[d].push((d, piece));
            });
        }
    }
    let mut sent = vec![0; from.len()];
    pieces.sort_by_key(|p| Reverse((p.near, p.elements)));
    for p in pieces {
        let nearest = p.holders.iter().copied().filter(|s| near(p.receiver, *s) == p.near);
        // Of equals the next one in number, round and round.
        let next = |s: usize| (s + from.len() - p.receiver) % from.len();
        let Some(sender) = nearest.min_by_key(|s| (sent[*s], next(*s))) else { continue };
        sent[sender] += p.elements;
        out[p.receiver][p.at].0 = sender;
    }
    out
}

/// What is held, and who holds it.
fn replicas(from: &[Region]) -> Vec<(&Region, Vec<usize>)> {
    let mut parts: Vec<(&Region, Vec<usize>)> = vec![];
    let mut at: HashMap<&Region, usize> = HashMap::new();
    for (s, region) in from.iter().enumerate().filter(|(_, r)| !r.is_empty()) {
        let i = *at.entry(region).or_insert_with(|| {
            parts.push((region, vec![]));
            parts.len() - 1
        });
        parts[i].1.push(s);
    }
    parts
}

/// What is still missing when all that `held` has of it is taken.
fn taken(missing: Vec<Region>, held: &Region, mut take: impl FnMut(Region)) -> Vec<Region> {
    let mut rest = vec![];
    for piece in missing {
        if piece.overlaps(held) {
            let common = piece.intersect(held);
            rest.extend(without(&piece, &common));
            take(common);
        } else {
            rest.push(piece);
        }
    }
    rest
}

/// The boxes that make up `whole` without `part`, a box inside it.
fn without(whole: &Region, part: &Region) -> Vec<Region> {
    let mut rest = whole.clone();
    let mut out = Vec::new();
    for i in 0..whole.0.len() {
        let (w, p) = (rest.0[i].1.clone(), part.0[i].1.clone());
        for side in [w.start..p.start, p.end..w.end] {
            if !side.is_empty() {
                let mut piece = rest.clone();
                piece.0[i].1 = side;
                out.push(piece);
            }
        }
        rest.0[i].1 = p;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boxes(max: usize) -> impl Strategy<Value = Region> {
        prop::collection::vec((0..max, 0..max), 2).prop_map(|v| {
            Region(
                v.iter()
                    .enumerate()
                    .map(|(i, &(a, b))| (format!("d{i}").as_str().into(), a.min(b)..a.max(b) + 1))
                    .collect(),
            )
        })
    }

    proptest! {
        #[test]
        fn every_wanted_element_comes_from_just_one_device_that_holds_it(
            cut in (1usize..8, 1usize..8), to in prop::collection::vec(boxes(8), 4)
        ) {
            let r = |a: std::ops::Range<usize>, b: std::ops::Range<usize>| Region(vec![("d0".into(), a), ("d1".into(), b)]);
            let from = [r(0..cut.0, 0..cut.1), r(0..cut.0, cut.1..9), r(cut.0..9, 0..cut.1), r(cut.0..9, cut.1..9)];
            for (wanted, pieces) in to.iter().zip(sources(&"a=2,b=2".parse().unwrap(), &from, &to)) {
                let mut count = [[0; 9]; 9];
                for (s, piece) in pieces {
                    prop_assert!(from[s].contains(&piece));
                    for x in piece.0[0].1.clone() {
                        for y in piece.0[1].1.clone() {
                            count[x][y] += 1;
                        }
                    }
                }
                for (x, row) in count.iter().enumerate() {
                    for (y, &n) in row.iter().enumerate() {
                        let inside = wanted.0[0].1.contains(&x) && wanted.0[1].1.contains(&y);
                        prop_assert_eq!(n, usize::from(inside));
                    }
                }
            }
        }
    }
}
