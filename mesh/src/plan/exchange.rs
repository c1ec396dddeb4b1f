//! Makes the moves and all-reduces of one device: who sends which bytes to whom.

use super::step::{AllReduce, BoxCopy, Exchange, ExchangeKind, Message, Piece, Segments, Wire};
use crate::body::strides;
use crate::chunk;
use crate::dim::{DType, Name};
use crate::layout::Mesh;
use crate::ops::reduce::ReduceFn;
use crate::region::Region;
use crate::spmd::{Sum, Value, sources};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A box of one array copied into another: `piece` in global indices, `from` and `to` what the arrays hold.
pub(super) fn box_copy(piece: &Region, from: &Region, to: &Region) -> BoxCopy {
    let offset = |held: &Region| -> usize {
        held.0
            .iter()
            .zip(&piece.0)
            .zip(strides(&held.shape()))
            .map(|(((_, h), (_, p)), s)| (p.start - h.start) * s)
            .sum()
    };
    BoxCopy {
        extents: piece.shape(),
        from: offset(from),
        from_strides: strides(&from.shape()),
        to: offset(to),
        to_strides: strides(&to.shape()),
    }
}

/// Whether a box is one stretch of the array it lies in.
pub(crate) fn contiguous(piece: &Region, held: &Region) -> bool {
    let mut dims = piece.shape().into_iter().zip(held.shape()).rev().skip_while(|(p, h)| p == h);
    dims.next();
    dims.all(|(p, _)| p == 1)
}

fn held(regions: &[Region]) -> Vec<&Region> {
    regions.iter().filter(|r| !r.is_empty()).collect()
}

/// The pattern of a move.
pub(crate) fn kind(from: &[Region], to: &[Region]) -> ExchangeKind {
    if from.iter().zip(to).any(|(f, t)| f.is_empty() != t.is_empty()) {
        return ExchangeKind::Send;
    }
    let (from, to) = (held(from), held(to));
    let grows = from.iter().zip(&to).all(|(f, t)| t.contains(f));
    if from.iter().zip(&to).all(|(f, t)| f.contains(t)) {
        return ExchangeKind::Slice;
    }
    let dims = from.first().map_or(0, |r| r.0.len());
    let same = |side: &[&Region], d: usize| side.iter().all(|r| r.0[d].1 == side[0].0[d].1);
    if grows {
        let gathered = (0..dims).any(|d| !same(&from, d) && same(&to, d));
        return if gathered { ExchangeKind::AllGather } else { ExchangeKind::Halo };
    }
    if (0..dims).any(|d| same(&from, d) != same(&to, d)) { ExchangeKind::AllToAll } else { ExchangeKind::Permute }
}

/// A move: its pattern, and who sends what to whom.
pub(super) struct Moves {
    pub kind: ExchangeKind,
    /// For each receiver, the boxes that it gets and their senders.
    pieces: Vec<Vec<(usize, Region)>>,
    /// By device: what it sends, keeps and receives, in the order of receivers: the receiver and which of its boxes.
    of: Vec<Vec<(usize, usize)>>,
}

impl Moves {
    pub fn new(mesh: &Mesh, from: &[Region], to: &[Region]) -> Moves {
        let pieces = sources(mesh, from, to);
        let mut of = vec![vec![]; to.len()];
        for (receiver, pieces) in pieces.iter().enumerate() {
            for (i, (sender, _)) in pieces.iter().enumerate() {
                of[*sender].push((receiver, i));
                if *sender != receiver {
                    of[receiver].push((receiver, i));
                }
            }
        }
        Moves { kind: kind(from, to), pieces, of }
    }

    /// Whether anything is sent.
    pub fn sends(&self) -> bool {
        self.pieces.iter().enumerate().any(|(receiver, pieces)| pieces.iter().any(|(sender, _)| *sender != receiver))
    }

    /// Whether a device has nothing to do with it.
    pub fn is_idle(&self, device: usize) -> bool {
        self.of[device].is_empty()
    }

    /// The dimensions along which some device gets less in one box than it holds in the end.
    pub fn cut(&self, to: &[Region]) -> BTreeSet<Name> {
        let all = self.pieces.iter().zip(to).flat_map(|(pieces, to)| pieces.iter().map(move |(_, piece)| (piece, to)));
        let dims = all.flat_map(|(piece, to)| piece.0.iter().zip(&to.0));
        dims.filter(|((_, piece), (_, to))| piece != to).map(|((name, _), _)| name.clone()).collect()
    }

    /// What a device gets from others, each box an array of its own behind the one before, and the bytes of all.
    pub fn apart(&self, device: usize, element: usize) -> (Vec<Piece>, usize) {
        let (mut pieces, mut bytes) = (vec![], 0);
        for (_, region) in self.pieces[device].iter().filter(|(sender, _)| *sender != device) {
            pieces.push(Piece { region: region.clone(), input: 0, first: bytes });
            bytes += (region.elements() * element).next_multiple_of(super::ALIGN);
        }
        (pieces, bytes)
    }

    /// The move of a device, of a value's parts to `to`, and the scratch it needs. Of a sum that is not finished all nodes of a
    /// part move, to where there is nothing else of it. Messages between a pair are listed in
    /// the receiver's order of boxes. If boxes lie `apart` ([`Moves::apart`]), what the device has stays where it is.
    pub fn on(&self, value: &Value, to: &[Region], device: usize, apart: bool) -> (Exchange, usize) {
        let from = &value.regions;
        let element = value.ty.dtype.bytes();
        let mut scratch = 0;
        let mut out =
            Exchange { kind: self.kind, element, local: vec![], sends: vec![], recvs: vec![], under_way: None };
        let mut places = if apart { self.apart(device, element).0 } else { vec![] }.into_iter();
        let mut message = |peer: usize, piece: &Region, sending: bool| {
            let nodes = value.nodes[if sending { device } else { peer }];
            let bytes = nodes * piece.elements() * element;
            let held = if sending { &from[device] } else { &to[device] };
            debug_assert!(nodes == 1 || piece == held, "nodes of a sum move together");
            let copy = if sending { box_copy(piece, held, piece) } else { box_copy(piece, piece, held) };
            let place = if sending { None } else { places.next() };
            let at = if let Some(place) = place {
                Wire::InPlace(place.first)
            } else if contiguous(piece, held) {
                Wire::InPlace(element * if sending { copy.from } else { copy.to })
            } else {
                let at = scratch;
                scratch += bytes.next_multiple_of(super::ALIGN);
                Wire::Staged { scratch: at, copy }
            };
            Message { peer, bytes, at }
        };
        for &(receiver, i) in &self.of[device] {
            let (sender, piece) = &self.pieces[receiver][i];
            match (*sender == device, receiver == device) {
                (true, true) if apart => {}
                (true, true) => out.local.push(box_copy(piece, &from[device], &to[device])),
                (true, false) => out.sends.push(message(receiver, piece, true)),
                (false, _) => out.recvs.push(message(*sender, piece, false)),
            }
        }
        (out, scratch)
    }
}

/// From so many elements on, an all-reduce goes by segments.
pub(crate) const SEGMENTED: usize = 8192;

/// What the participants of an all-reduce have in common.
pub(crate) struct Together {
    devices: Arc<[usize]>,
    nodes: Arc<[usize]>,
    order: Arc<[chunk::Finish]>,
}

impl Together {
    pub(crate) fn new(sum: &Sum, group: &[usize]) -> Together {
        let owned: Vec<_> = group.iter().map(|&d| sum.owned[d].clone()).collect();
        Together {
            devices: group.into(),
            nodes: owned.iter().map(|o| sum.tree.nodes(o).len()).collect(),
            order: sum.tree.finish(&owned).into(),
        }
    }
}

/// The all-reduce of a device: each holds nodes of the region `held`, and comes to hold the result's region `done`, all
/// or a part of it.
pub(crate) fn all_reduce(
    f: ReduceFn,
    dtype: DType,
    together: &Together,
    held: &[Region],
    done: &[Region],
    device: usize,
) -> AllReduce {
    let held = &held[device];
    let scattered = together.devices.iter().any(|d| done[*d] != *held);
    let segments = match held.elements() {
        _ if scattered => {
            Segments::Boxes(together.devices.iter().map(|d| box_copy(&done[*d], held, &done[*d])).collect())
        }
        elements if elements >= SEGMENTED => Segments::Shared,
        _ => Segments::All,
    };
    AllReduce {
        f,
        dtype,
        elements: held.elements(),
        devices: together.devices.clone(),
        nodes: together.nodes.clone(),
        me: together.devices.iter().position(|&d| d == device).unwrap_or(0),
        order: together.order.clone(),
        segments,
        under_way: None,
    }
}
