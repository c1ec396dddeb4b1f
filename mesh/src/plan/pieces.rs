//! Halos that are read where they come. A convolution reads rows, positions along its innermost dimension with their channels,
//! and each of them lies either in what the device has or in what comes from another one. So these stay arrays of their own,
//! and nothing of the device's own part is copied to have it beside its halo.
//!
//! That is so where all that read such a value read it by rows, and no row is cut.

use super::exchange::Moves;
use super::function::{AllMoves, Planner, held, number};
use super::fuse::{Fused, Group, Kind};
use super::step::{ExchangeKind, Piece};
use crate::dim::{Name, Type};
use crate::ops::Prim;
use crate::ops::conv::Conv;
use crate::spmd::{Instr, SpmdOp, ValueId};
use std::collections::{HashMap, HashSet};

/// The op that reads its first input by rows.
fn by_rows(prim: &Prim) -> Option<(&Conv, &Name)> {
    match prim {
        Prim::Conv(conv) => Some((conv, &conv.input)),
        Prim::ConvTranspose(transposed) => Some((&transposed.conv, &transposed.conv.output)),
        Prim::ConvWeightGrad(grad) => Some((&grad.conv, &grad.conv.input)),
        _ => None,
    }
}

/// The convolution that a group is of a value, which it reads by rows; None if it does anything else with it.
fn reader<'a>(fused: &'a Fused, group: &Group, v: ValueId) -> Option<&'a Prim> {
    let instr = &fused.spmd.instrs[group.instrs[0]];
    let SpmdOp::Compute { prim, .. } = &instr.op else { return None };
    let (first, others) = instr.inputs.split_first()?;
    let alone = *first == v && others.iter().all(|other| fused.root(*other) != v);
    let is_product = matches!(group.kind, Kind::Instr | Kind::Epilogue);
    (is_product && alone && !fused.loads(&group.instrs[1..]).contains(&v)).then_some(prim)
}

/// Whether rows of a convolution's input are whole, and lie alike, in boxes that are cut along some dimensions.
pub(crate) fn rows_are_whole<'a>(ty: &Type, prim: &Prim, mut cut: impl Iterator<Item = &'a Name>) -> bool {
    let Some((conv, channel)) = by_rows(prim) else { return false };
    let Some((last, outer)) = conv.windows.split_last() else { return false };
    let row = [&last.dim, channel].map(|name| ty.position(name));
    cut.all(|name| {
        let before = ty.position(name).is_some_and(|at| row.iter().all(|p| p.is_some_and(|p| at < p)));
        before && outer.iter().any(|w| w.dim == *name)
    })
}

/// The results of moves of which each box is to be an array of its own. Groups that read one come to read the value that
/// was moved as well.
pub(super) fn in_pieces(fused: &mut Fused, moves: &AllMoves) -> HashSet<ValueId> {
    let spmd = fused.spmd;
    let results = spmd.outputs.iter().map(|(_, v)| v).chain(spmd.assigns.iter().map(|(_, v)| v));
    let results: HashSet<ValueId> = results.map(|v| fused.root(*v)).collect();
    let mut readers: HashMap<ValueId, Vec<usize>> = HashMap::new();
    for (g, group) in fused.groups.iter().enumerate() {
        group.inputs.iter().for_each(|v| readers.entry(*v).or_default().push(g));
    }
    let mut found = HashSet::new();
    for instr in spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move) && !results.contains(&i.output)) {
        let regions = held(spmd, instr);
        let moves: &Moves = &moves[&regions.map(number)];
        if moves.kind != ExchangeKind::Halo || !moves.sends() {
            continue;
        }
        let (cut, ty) = (moves.cut(regions[1]), &spmd.values[instr.output.index()].ty);
        let Some(of) = readers.get(&instr.output) else { continue };
        let by_rows = |g: &usize| {
            let prim = reader(fused, &fused.groups[*g], instr.output);
            prim.is_some_and(|prim| rows_are_whole(ty, prim, cut.iter()))
        };
        if of.iter().all(by_rows) {
            found.insert(instr.output);
            let own = fused.root(instr.inputs[0]);
            for g in of {
                let inputs = &mut fused.groups[*g].inputs;
                inputs.extend((!inputs.contains(&own)).then_some(own));
            }
        }
    }
    found
}

impl Planner<'_> {
    /// The move that an op's first input comes from, if that is in pieces.
    fn moved(&self, inputs: &[ValueId]) -> Option<&Instr> {
        let v = inputs.first().filter(|v| self.in_pieces.contains(v))?;
        self.fused.producer[v.index()].map(|i| &self.cx.spmd.instrs[i])
    }

    /// What was moved of an op's first input, if that is in pieces.
    pub(super) fn own_piece(&self, inputs: &[ValueId]) -> Option<ValueId> {
        self.moved(inputs).map(|instr| instr.inputs[0])
    }

    /// The pieces of an op's first input on a device: its own part, and what came.
    pub(super) fn pieces(&self, instr: &Instr, device: usize) -> Vec<Piece> {
        let Some(moved) = self.moved(&instr.inputs) else { return vec![] };
        let value = &self.cx.spmd.values[moved.inputs[0].index()];
        let own = Piece { region: value.regions[device].clone(), input: instr.inputs.len(), first: 0 };
        let others = self.moves(moved).apart(device, value.ty.dtype.bytes()).0;
        [own].into_iter().chain(others).collect()
    }

    /// Bytes of a value on a device.
    pub(super) fn bytes(&self, v: ValueId, device: usize) -> usize {
        let value = &self.cx.spmd.values[v.index()];
        match self.moved(&[v]) {
            Some(moved) => self.moves(moved).apart(device, value.ty.dtype.bytes()).1,
            None => value.bytes(device),
        }
    }
}
