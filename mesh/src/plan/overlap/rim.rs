//! Convolutions in two steps: their interior, which needs nothing of a halo, while that is on its way, and then their rim.

use super::super::function::Planner;
use super::super::fuse::{Group, Kind};
use super::super::step::{ExchangeKind, OpWork, Share, Work};
use super::Phase;
use crate::dim::Type;
use crate::ops::Prim;
use crate::region::Region;
use crate::spmd::{Instr, SpmdOp, ValueId};

/// How much of a block is to be interior: elements of a rim take longer, since each reads rows that only few others share.
/// Rims along the innermost dimension, where a register tile has few elements to compute, take longer than a halo does.
const ENOUGH: f64 = 0.75;

impl Planner<'_> {
    /// The exchange of a halo whose result a group convolves, if it is such a convolution.
    pub(in crate::plan) fn halo(&self, group: &Group) -> Option<&Instr> {
        let first = group.instrs[0];
        let instr = &self.cx.spmd.instrs[first];
        let SpmdOp::Compute { prim: Prim::Conv(_) | Prim::ConvTranspose(_), .. } = &instr.op else { return None };
        if !matches!(group.kind, Kind::Instr | Kind::Epilogue) {
            return None;
        }
        let made = self.cx.spmd.instrs[..first].iter().rev().find(|i| i.output == instr.inputs[0])?;
        let sends = matches!(made.op, SpmdOp::Move) && self.sends_halo(made);
        sends.then_some(made)
    }

    /// Whether a move is the exchange of a halo with other devices.
    fn sends_halo(&self, instr: &Instr) -> bool {
        let moves = self.moves(instr);
        moves.kind == ExchangeKind::Halo && moves.sends()
    }

    /// Whether some device has an interior of such a convolution.
    pub(in crate::plan) fn has_interior(&self, group: &Group) -> bool {
        (0..self.devices()).any(|d| self.interior(group, d).is_some_and(|r| !r.is_empty()))
    }

    /// The elements that a device computes of such a convolution from what it has without the exchange; nothing, if those are
    /// too few, or a part of the rows along the innermost dimension.
    fn interior(&self, group: &Group, device: usize) -> Option<Region> {
        let (halo, instr) = (self.halo(group)?, self.first(group));
        let SpmdOp::Compute { prim, .. } = &instr.op else { return None };
        let windows = match prim {
            Prim::Conv(conv) => &conv.windows,
            Prim::ConvTranspose(transposed) => &transposed.conv.windows,
            _ => return None,
        };
        let value = |v: ValueId| &self.cx.spmd.values[v.index()];
        let held = &value(halo.inputs[0]).regions[device];
        let types: Vec<&Type> = instr.inputs.iter().map(|v| &*value(*v).ty).collect();
        let out = value(instr.output);
        let needs = |at: &Region| prim.op().needs(0, &types, &out.ty, at);
        let all = &out.regions[device];
        let mut at = all.clone();
        let (_, outer) = windows.split_last()?;
        for name in outer.iter().map(|w| &w.dim) {
            let (own, mut range) = (held.get(name)?, at.get(name)?.clone());
            // One by one from both ends: rims are thin.
            let is_inside = |i: usize| {
                let needed = needs(&at.clone().with(name, i..i + 1));
                needed.get(name).is_some_and(|n| own.start <= n.start && n.end <= own.end)
            };
            while !range.is_empty() && !is_inside(range.start) {
                range.start += 1;
            }
            while !range.is_empty() && !is_inside(range.end - 1) {
                range.end -= 1;
            }
            at = at.with(name, range);
        }
        let enough = at.elements() as f64 >= ENOUGH * all.elements() as f64;
        Some(if !at.is_empty() && enough && held.contains(&needs(&at)) { at } else { Region::nothing(&out.ty) })
    }

    /// What of a group's work a device does at a moment of such a convolution; None if there is nothing to do.
    pub(in crate::plan) fn in_two(&self, group: &Group, device: usize, work: &OpWork, phase: Phase) -> Option<Work> {
        let inside = self.interior(group, device)?;
        let (none, all) = (inside.is_empty(), inside == work.output.region);
        let share = match phase {
            Phase::Interior if none => return None,
            // A rim of nothing is no step, and looks through nothing.
            Phase::Interior if all => Share::Whole,
            Phase::Interior => Share::Interior(inside),
            _ if all => return None,
            _ if none => Share::Whole,
            _ => Share::Rim(inside),
        };
        Some(Work::Op(Box::new(OpWork { share, ..work.clone() })))
    }
}
