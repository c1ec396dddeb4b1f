//! Collectives over every transport.

use super::*;
use mesh::chunk::{Tree, TreeDim, shard_chunks};
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;
use mesh::plan::{AllReduce, BoxCopy, Exchange, ExchangeKind, Message, Segments, Wire};
use std::sync::mpsc;
use worker::collective::{AllReducePlan, ExchangePlan};
use worker::pool::Pool;

#[test]
fn collectives_give_the_same_bits_over_every_transport() {
    for (devices, under_way) in [(3, false), (4, false), (3, true)] {
        let mut whole = vec![];
        for segments in [Segments::All, Segments::Shared] {
            let reduced = KINDS.map(|kind| all_reduce(kind, devices, segments.clone(), under_way));
            assert!(reduced[0].iter().all(|r| *r == reduced[0][0]), "all devices have the same");
            assert!(reduced.iter().all(|r| *r == reduced[0]), "all transports give the same");
            whole = reduced[0][0].clone();
        }
        // By columns, which are no stretches, and by rows, which are; unevenly.
        let cut = |n: usize, d: usize| shard_chunks(n, devices, d);
        for columns in [true, false] {
            let part = |d: usize| if columns { (0..ROWS, cut(COLUMNS, d)) } else { (cut(ROWS, d), 0..COLUMNS) };
            let boxes = (0..devices).map(part).map(|(r, c)| BoxCopy {
                extents: vec![r.len(), c.len()],
                from: r.start * COLUMNS + c.start,
                from_strides: vec![COLUMNS, 1],
                to: 0,
                to_strides: vec![c.len(), 1],
            });
            let boxes = Segments::Boxes(boxes.collect());
            let expected: Vec<Vec<u32>> = (0..devices)
                .map(part)
                .map(|(r, c)| r.flat_map(|r| whole[r * COLUMNS..][c.clone()].to_vec()).collect())
                .collect();
            for kind in KINDS {
                assert!(
                    all_reduce(kind, devices, boxes.clone(), under_way) == expected,
                    "a reduce-scatter is a part of it"
                );
            }
        }
        let exchanged = KINDS.map(|kind| exchange(kind, devices, under_way));
        assert!(exchanged.iter().all(|r| *r == exchanged[0]));
    }
}

const ROWS: usize = 7;
const COLUMNS: usize = 10_003;

/// Every device's result of an all-reduce of values of very different sizes, as bits.
fn all_reduce(kind: Kind, devices: usize, segments: Segments, under_way: bool) -> Vec<Vec<u32>> {
    let elements = ROWS * COLUMNS;
    let tree = Tree { dims: vec![TreeDim { size: 8, chunks: 8 }], first: None };
    let owned: Vec<_> = (0..devices).map(|d| vec![shard_chunks(8, devices, d)]).collect();
    let nodes: Vec<usize> = owned.iter().map(|o| tree.nodes(o).len()).collect();
    let order = tree.finish(&owned);
    let (ends, _listeners) = ends(kind, devices);
    let (results, collected) = mpsc::channel();
    on_all(ends, |me, end| {
        let work = AllReduce {
            f: ReduceFn::Sum,
            dtype: DType::F32,
            elements,
            devices: (0..devices).collect(),
            nodes: nodes.clone().into(),
            me,
            order: order.clone().into(),
            segments: segments.clone(),
            under_way: under_way.then_some(2),
        };
        let value = |i: usize| ((i * 2654435761 + me * 97) % 1009) as f32 * 10f32.powi((i % 13) as i32 - 6);
        let input: Vec<f32> = (0..nodes[me] * elements).map(value).collect();
        let scattered = matches!(segments, Segments::Boxes(_));
        let mut output = vec![0f32; if scattered { work.segment_elements(me) } else { elements }];
        let mut scratch = vec![0u8; work.scratch_bytes()];
        let plan = AllReducePlan::new(&work);
        let pool = Pool::new(1, None);
        for _ in 0..3 {
            // SAFETY: the buffers are as large as the work says.
            unsafe {
                let [input, scratch] = [input.as_ptr().cast_mut().cast(), scratch.as_mut_ptr()];
                plan.run(&pool, end, input, output.as_mut_ptr().cast(), scratch).unwrap();
                if under_way {
                    end.progress().unwrap();
                    plan.combine(&pool, end, input, output.as_mut_ptr().cast(), scratch).unwrap();
                    plan.finish(end).unwrap();
                }
            }
        }
        results.send((me, output.iter().map(|v| v.to_bits()).collect())).unwrap();
    });
    drop(results);
    sorted(collected)
}

/// Every device's result of an all-to-all from rows to columns.
fn exchange(kind: Kind, devices: usize, under_way: bool) -> Vec<Vec<u32>> {
    let (rows, columns) = (40, 300 * devices);
    let part = columns / devices;
    let (ends, _listeners) = ends(kind, devices);
    let (results, collected) = mpsc::channel();
    on_all(ends, |me, end| {
        let bytes = rows * part * 4;
        let take = |peer: usize, to: usize| BoxCopy {
            extents: vec![rows, part],
            from: peer * part,
            from_strides: vec![columns, 1],
            to,
            to_strides: vec![part, 1],
        };
        let others = || (0..devices).filter(|p| *p != me);
        let work = Exchange {
            kind: ExchangeKind::AllToAll,
            element: 4,
            local: vec![take(me, me * rows * part)],
            sends: others()
                .map(|peer| {
                    let at = Wire::Staged { scratch: peer * bytes, copy: take(peer, 0) };
                    Message { peer, bytes, at }
                })
                .collect(),
            recvs: others().map(|peer| Message { peer, bytes, at: Wire::InPlace(peer * bytes) }).collect(),
            under_way: under_way.then_some(0),
        };
        let input: Vec<u32> = (0..rows * columns).map(|i| (i * 8 + me) as u32).collect();
        let mut output = vec![0u32; rows * columns];
        let mut scratch = vec![0u8; devices * bytes];
        let plan = ExchangePlan::new(&work);
        // SAFETY: the buffers are as large as the work says.
        unsafe {
            let (pool, output) = (Pool::new(1, None), output.as_mut_ptr().cast());
            plan.run(&pool, end, input.as_ptr().cast(), output, scratch.as_mut_ptr()).unwrap();
            if under_way {
                plan.finish(&pool, end, output).unwrap();
            }
        }
        results.send((me, output)).unwrap();
    });
    drop(results);
    sorted(collected)
}

fn sorted<T>(collected: mpsc::Receiver<(usize, T)>) -> Vec<T> {
    let mut all: Vec<_> = collected.into_iter().collect();
    all.sort_by_key(|(d, _)| *d);
    all.into_iter().map(|(_, r)| r).collect()
}
