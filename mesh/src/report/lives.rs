//! What lies in an arena and for how long, read off the steps that write and read it.

use crate::plan::{Buffer, DevicePlan};
use serde::{Deserialize, Serialize};

/// Something that is in memory for some steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What it is: scope and op of the step that makes it, or the feed.
    pub name: String,
    /// Bytes.
    pub bytes: usize,
    /// The step that makes it.
    pub from: usize,
    /// The last step that uses it.
    pub to: usize,
}

/// Spans that are kept of a device: the largest.
const KEPT: usize = 400;

/// The largest values of a device's steps, in the order in which they are made; `variables` is where those end, which are
/// not among them.
pub(super) fn spans(plan: &DevicePlan, variables: usize) -> Vec<Span> {
    let overlaps = |a: Buffer, b: Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
    let end = plan.steps.len();
    let mut done: Vec<Span> = vec![];
    // What lies where now.
    let mut here: Vec<(Buffer, Span)> = vec![];
    for (name, _, buffer) in plan.inputs.iter().filter(|(_, _, b)| b.bytes > 0) {
        done.push(Span { name: format!("feed {name}"), bytes: buffer.bytes, from: 0, to: end });
    }
    for (i, s) in plan.steps.iter().enumerate() {
        for (_, span) in here.iter_mut().filter(|(at, _)| s.inputs.iter().any(|b| overlaps(*at, *b))) {
            span.to = i;
        }
        let name = if s.label.scope.is_empty() {
            s.label.op.to_string()
        } else {
            format!("{}: {}", s.label.scope, s.label.op)
        };
        for written in s.outputs.iter().chain([&s.scratch]).filter(|b| b.bytes > 0 && b.offset >= variables) {
            let (over, rest) = here.into_iter().partition(|(at, _)| overlaps(*at, *written));
            here = rest;
            let over: Vec<(Buffer, Span)> = over;
            // What is computed in place of an operand takes no room beside it.
            done.extend(over.into_iter().map(|(_, s)| Span { to: s.to.min(i.saturating_sub(1)).max(s.from), ..s }));
            here.push((*written, Span { name: name.clone(), bytes: written.bytes, from: i, to: i }));
        }
    }
    done.extend(here.into_iter().map(|(at, span)| match plan.outputs.iter().any(|(_, _, b)| *b == at) {
        true => Span { to: end, ..span },
        false => span,
    }));
    done.sort_by_key(|s| std::cmp::Reverse(s.bytes * (s.to - s.from + 1)));
    done.truncate(KEPT);
    done.sort_by_key(|s| (s.from, s.to));
    done
}
