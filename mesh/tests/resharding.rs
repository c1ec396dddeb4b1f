//! Moves between any two layouts: no byte more than is needed, each from one of the nearest that hold it, and the device that
//! sends most sends no more than one and a half times what no choice of them could spare it, in nine of ten cases just that.

use mesh::dim::{DType, Type, dim};
use mesh::layout::{Layout, Mesh};
use mesh::placement::{Axes, Placement, Spec};
use mesh::program::ProgramBuilder;
use mesh::region::Region;
use mesh::spmd::sources;

/// Elements of a dimension: eight chunks, not all of one size.
const SIZE: usize = 12;

/// All meshes of two devices to sixteen: every list of axes whose product is the number of devices.
fn meshes() -> Vec<Mesh> {
    fn factors(n: usize) -> Vec<Vec<usize>> {
        let further = (2..=n).filter(|f| n.is_multiple_of(*f)).flat_map(|f| {
            let rest = if n == f { vec![vec![]] } else { factors(n / f) };
            rest.into_iter().map(move |rest| [vec![f], rest].concat())
        });
        further.collect()
    }
    let mesh = |sizes: Vec<usize>| {
        let axes: Vec<String> = sizes.iter().enumerate().map(|(i, n)| format!("m{i}={n}")).collect();
        axes.join(",").parse().unwrap()
    };
    (2..=16).flat_map(factors).map(mesh).collect()
}

/// Every way to split three dimensions over some of the axes, each in every order.
fn layouts(mesh: &Mesh) -> Vec<Axes> {
    let mut all: Vec<Axes> = vec![vec![vec![]; 3]];
    let mut done = 0;
    while done < all.len() {
        let layout = all[done].clone();
        done += 1;
        for axis in (0..mesh.axes().len()).filter(|a| !layout.iter().flatten().any(|b| b == a)) {
            for d in 0..3 {
                let mut more = layout.clone();
                more[d].push(axis);
                let shards: usize = more[d].iter().map(|a| mesh.axes()[*a].1).product();
                if shards <= 8 && !all.contains(&more) {
                    all.push(more);
                }
            }
        }
    }
    all
}

fn ty() -> Type {
    Type::new(DType::I32, ["x", "y", "z"].map(|n| dim(n, SIZE)).to_vec())
}

/// What each device holds.
fn regions(mesh: &Mesh, layout: &Axes) -> Vec<Region> {
    let (rules, program) = (Layout::default(), ProgramBuilder::new().finish().unwrap());
    Placement::new(mesh, &rules, &program).regions(&ty(), &Spec { dims: layout.clone(), stage: vec![] })
}

/// A box with its receiver and those that may send it, none of them farther away than another one that could.
struct Job {
    elements: usize,
    nearest: Vec<usize>,
}

/// No device can be spared less than this: the largest box, and all boxes that must come from some devices, shared out.
fn bound(jobs: &[Job]) -> usize {
    let shared = |among: &[usize]| {
        let theirs = jobs.iter().filter(|j| j.nearest.iter().all(|s| among.contains(s)));
        theirs.map(|j| j.elements).sum::<usize>().div_ceil(among.len())
    };
    let mut sets: Vec<&[usize]> = jobs.iter().map(|j| &*j.nearest).collect();
    sets.sort();
    sets.dedup();
    sets.into_iter().map(shared).chain(jobs.iter().map(|j| j.elements)).max().unwrap_or(0)
}

#[test]
fn a_move_between_any_two_layouts_sends_what_is_needed_from_the_nearest_and_shares_it_out() {
    let (mut pairs, mut least) = (0, 0);
    for mesh in meshes() {
        let layouts = layouts(&mesh);
        let held: Vec<Vec<Region>> = layouts.iter().map(|l| regions(&mesh, l)).collect();
        // Other names of the dimensions make no other move.
        for a in (0..layouts.len()).filter(|a| layouts[*a].is_sorted()) {
            for b in 0..layouts.len() {
                pairs += 1;
                let (from, to) = (&held[a], &held[b]);
                let near = |d: usize, s: usize| {
                    let (d, s) = (mesh.coordinates(d), mesh.coordinates(s));
                    d.iter().zip(&s).take_while(|(a, b)| a == b).count()
                };
                let (mut sent, mut jobs): (Vec<usize>, Vec<Job>) = (vec![0; mesh.size()], vec![]);
                for (d, pieces) in sources(&mesh, from, to).iter().enumerate() {
                    let (mut all, mut received) = (0, 0);
                    for (i, (s, piece)) in pieces.iter().enumerate() {
                        assert!(from[*s].contains(piece) && to[d].contains(piece));
                        assert!(pieces[..i].iter().all(|(_, other)| !other.overlaps(piece)));
                        all += piece.elements();
                        if *s == d {
                            continue;
                        }
                        received += piece.elements();
                        sent[*s] += piece.elements();
                        let holders: Vec<usize> = (0..mesh.size()).filter(|s| from[*s].contains(piece)).collect();
                        let most = holders.iter().map(|s| near(d, *s)).max().unwrap();
                        let nearest: Vec<usize> = holders.into_iter().filter(|s| near(d, *s) == most).collect();
                        assert!(nearest.contains(s));
                        jobs.push(Job { elements: piece.elements(), nearest });
                    }
                    assert_eq!(all, to[d].elements());
                    assert_eq!(received, to[d].elements() - to[d].intersect(&from[d]).elements());
                }
                let most = sent.iter().copied().max().unwrap();
                let bound = bound(&jobs);
                assert!(2 * most <= 3 * bound, "{mesh}: {:?} to {:?}: {most}, {bound}", layouts[a], layouts[b]);
                least += usize::from(most == bound);
            }
        }
    }
    assert!(pairs > 90_000 && 10 * least > 9 * pairs, "{least} of {pairs} are the least");
}
