//! Gathers that nobody asked for are errors.
//!
//! A layout splits a tensor so that no device has to hold it. Where an op, or the layout of its result, needs it whole after
//! all, it would be gathered, and memory and time be lost without a word. So a gather of all of a tensor, [`LARGE`] or more
//! that a device receives, is refused, unless
//!
//! - it is of a variable, of a gradient or for an update: rules for those trade memory for messages on purpose;
//! - the rule by which a gathered dimension is split gives way where it must (`seq:model?`), or the reader's says that it is
//!   whole there (`seq:none` in a scope), or one of both has rules of its own (`with_layout`);
//! - the layout says `gathers:allow`.

use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::graph::{NodeId, Role};
use crate::ops::Prim;
use crate::placement::{Placement, Subject};
use crate::plan::{ExchangeKind, kind};
use crate::program::Function;
use crate::region::Region;
use crate::spmd::{SpmdOp, SpmdProgram};
use std::fmt;
use std::str::FromStr;

/// Bytes that a device receives in a gather that has to be asked for, or more.
pub const LARGE: usize = 1 << 20;

/// Whether what is split may be gathered whole although no rule asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gathers {
    /// It is an error.
    #[default]
    Refuse,
    /// It may.
    Allow,
}

impl fmt::Display for Gathers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Gathers::Refuse => "refuse",
            Gathers::Allow => "allow",
        })
    }
}

impl FromStr for Gathers {
    type Err = Error;
    fn from_str(text: &str) -> Result<Gathers, Error> {
        let found = [Gathers::Refuse, Gathers::Allow].into_iter().find(|g| g.to_string() == text.trim());
        let expected = || Cause::Syntax { text: text.into(), expected: "what gathers may do, allow or refuse".into() };
        found.ok_or_else(|| expected().into())
    }
}

/// Holds that no tensor is gathered whole without being asked for.
///
/// # Errors
/// The first gather that is, at the place of the op that needs the tensor.
pub(crate) fn check(function: &Function, spmd: &SpmdProgram, placement: &Placement) -> Result<(), Error> {
    for instr in spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::Move)) {
        let (from, to) = (&spmd.values[instr.inputs[0].index()], &spmd.values[instr.output.index()]);
        let received = |(held, needed): (&Region, &Region)| needed.elements() - needed.intersect(held).elements();
        let most = from.regions.iter().zip(&*to.regions).map(received).max().unwrap_or(0) * to.ty.dtype.bytes();
        let whole = Region::full(&to.ty);
        let all = to.regions.iter().all(|r| r.is_empty() || *r == whole);
        let passes = |id: NodeId| matches!(function.node(id).role, Role::Forward | Role::Backward);
        if most < LARGE
            || !all
            || from.node == to.node
            || kind(&from.regions, &to.regions) != ExchangeKind::AllGather
            || !passes(from.node)
            || !passes(to.node)
            || is_variable(function, from.node)
        {
            continue;
        }
        let (tensor, reader) = (function.node(from.node), function.node(to.node));
        let subjects = [tensor, reader].map(|node| Subject::node(function, node));
        let spec = placement.spec(&subjects[0])?;
        let silent = from.ty.dims.iter().zip(&spec.dims).find(|(dim, axes)| {
            !axes.is_empty() && !subjects.iter().any(|subject| placement.may_be_whole(subject, &dim.name))
        });
        if let Some((dim, axes)) = silent {
            let axes: Vec<&str> = axes.iter().map(|a| &*placement.mesh.axes()[*a].0).collect();
            let cause = Cause::SilentGather {
                tensor: format!("{} {}", tensor.op.op().name(), tensor.ty),
                reader: reader.op.op().name(),
                dim: dim.name.clone(),
                axis: Name::from(axes.join("+")),
                bytes: most,
            };
            let e = Error::from(cause).at(reader.place);
            return Err(if reader.scope.is_empty() { e } else { e.note(format!("in scope `{}`", reader.scope)) });
        }
    }
    Ok(())
}

/// Whether a node is variables, side by side, in another dtype or under another name at the most.
fn is_variable(function: &Function, id: NodeId) -> bool {
    let node = function.node(id);
    match &node.op {
        Prim::Read(_) => true,
        Prim::Cast(_) | Prim::Rename(_) | Prim::SplitDim(_) | Prim::Concat(_) => {
            node.inputs.iter().all(|input| is_variable(function, *input))
        }
        _ => false,
    }
}
