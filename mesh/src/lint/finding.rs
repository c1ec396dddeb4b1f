//! What a lint found: where, what it costs and what to do about it.

use super::change::Change;
use super::lowered::Lowered;
use super::prices::Prices;
use crate::dim::Name;
use crate::error::Place;
use crate::graph::NodeId;
use crate::plan::describe::{bytes, flops, seconds, thousands};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing runs.
    Error,
    /// It costs, and something can be done about it.
    Warning,
    /// It costs, and there may be a reason for it.
    Advice,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Advice => "advice",
        })
    }
}

/// What is lost, a run of the function and on the device that loses most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes sent to other devices.
    pub sent_bytes: f64,
    /// Messages to other devices.
    pub messages: f64,
    /// Bytes of memory.
    pub held_bytes: f64,
    /// Seconds on a machine, as estimated: what the change that is suggested saves, or else what operations, bytes and
    /// messages take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

impl Lost {
    fn add(&mut self, other: &Lost) {
        self.flops += other.flops;
        self.sent_bytes += other.sent_bytes;
        self.messages += other.messages;
        self.held_bytes += other.held_bytes;
    }
}

/// What a plan takes that was made with a change.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// The most memory that a device needs.
    pub peak_bytes: usize,
    /// Seconds of a run, on a machine, as estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// Something that a lint found; of several with the same remedy, the one that costs most, with what all of them lose.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// The lint's code.
    pub code: Name,
    /// Its name.
    pub name: Name,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What to do.
    pub help: String,
    /// What to do, as something that can be applied.
    pub change: Option<Change>,
    /// What that would take, if it was planned.
    pub tried: Option<Tried>,
    /// The function it is in; none: the whole program.
    pub function: Option<Name>,
    /// Place in the user's source: file, line and column.
    pub place: Option<String>,
    /// Scope in the program.
    pub scope: Option<Name>,
    /// Op and type of the tensor.
    pub tensor: Option<String>,
    /// The dimension.
    pub dim: Option<Name>,
    /// The mesh axis.
    pub axis: Option<Name>,
    /// What it costs.
    pub lost: Lost,
    /// How many were found with this remedy.
    pub count: usize,
}

impl Finding {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Finding {
        Finding {
            code: "".into(),
            name: "".into(),
            severity: Severity::Warning,
            message: message.into(),
            help: help.into(),
            change: None,
            tried: None,
            function: None,
            place: None,
            scope: None,
            tensor: None,
            dim: None,
            axis: None,
            lost: Lost::default(),
            count: 1,
        }
    }
    /// At a node.
    pub(super) fn at(mut self, l: &Lowered, node: NodeId) -> Finding {
        let n = l.function.node(node);
        self.function = Some(l.function.name.clone());
        self.scope = Some(n.scope.clone());
        self.tensor = Some(format!("{} {}", n.op.op().name(), n.ty));
        self.place(n.place)
    }
    pub(super) fn place(self, place: Place) -> Finding {
        Finding { place: Some(place.to_string()), ..self }
    }
    pub(super) fn dim(self, dim: &Name) -> Finding {
        Finding { dim: Some(dim.clone()), ..self }
    }
    pub(super) fn axis(self, axis: &Name) -> Finding {
        Finding { axis: Some(axis.clone()), ..self }
    }
    pub(super) fn change(self, change: Option<Change>) -> Finding {
        Finding { change, ..self }
    }
    pub(super) fn flops(mut self, flops: f64) -> Finding {
        self.lost.flops = flops;
        self
    }
    pub(super) fn sent(mut self, bytes: f64) -> Finding {
        self.lost.sent_bytes = bytes;
        self
    }
    pub(super) fn messages(mut self, messages: f64) -> Finding {
        self.lost.messages = messages;
        self
    }
    pub(super) fn held(mut self, bytes: f64) -> Finding {
        self.lost.held_bytes = bytes;
        self
    }
    pub(super) fn counted(self, count: usize) -> Finding {
        Finding { count, ..self }
    }

    /// Whether what is to be done is the same.
    fn same_remedy(&self, other: &Finding) -> bool {
        let about = |f: &Finding| (f.code.clone(), f.help.clone(), f.dim.clone(), f.axis.clone());
        about(self) == about(other) && self.change == other.change
    }
}

/// Findings of one remedy together, those that cost most first. What they lose is added up within a function; of several
/// functions, which run at other times, the one that loses most counts.
pub(super) fn merged(list: Vec<Finding>, prices: &Prices) -> Vec<Finding> {
    let mut by_function: Vec<(f64, Finding)> = vec![];
    for f in list {
        let weight = prices.of(&f.lost);
        match by_function.iter_mut().find(|(_, g)| g.same_remedy(&f) && g.function == f.function) {
            None => by_function.push((weight, f)),
            Some((most, g)) => {
                let (mut lost, count) = (g.lost, g.count + f.count);
                lost.add(&f.lost);
                if weight > *most {
                    (*most, *g) = (weight, f);
                }
                (g.lost, g.count) = (lost, count);
            }
        }
    }
    let mut out: Vec<Finding> = vec![];
    for (_, f) in by_function {
        match out.iter_mut().find(|g| g.same_remedy(&f)) {
            None => out.push(f),
            Some(g) => {
                let count = g.count + f.count;
                if prices.of(&f.lost) > prices.of(&g.lost) {
                    *g = f;
                }
                g.count = count;
            }
        }
    }
    let key = |f: &Finding| (f.severity, -prices.of(&f.lost), -f.lost.held_bytes);
    let order = |a: &Finding, b: &Finding| {
        let (a, b) = (key(a), key(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.total_cmp(&b.2))
    };
    out.sort_by(order);
    out
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![];
        if self.flops >= 1.0 {
            parts.push(flops(self.flops as u64));
        }
        if self.sent_bytes >= 1.0 {
            parts.push(format!("{} sent", bytes(self.sent_bytes as usize)));
        }
        if self.messages >= 1.0 {
            parts.push(format!("{} messages", thousands(self.messages as u64)));
        }
        if self.held_bytes >= 1.0 {
            parts.push(format!("{} of memory", bytes(self.held_bytes as usize)));
        }
        if let Some(s) = self.seconds.filter(|s| *s > 0.0) {
            parts.push(format!("{} as estimated", seconds(s)));
        }
        f.write_str(&parts.join(", "))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]: {}", self.severity, self.code, self.message)?;
        if let Some(place) = &self.place {
            let more = if self.count > 1 { format!(", and {} more", self.count - 1) } else { String::new() };
            write!(f, "\n  --> {place}{more}")?;
        }
        let lost = self.lost.to_string();
        if !lost.is_empty() {
            let of = self.function.as_ref().map(|n| format!(" of `{n}`")).unwrap_or_default();
            write!(f, "\n  = it costs a device {lost}, a run{of}")?;
        }
        write!(f, "\n  help: {}", self.help)?;
        if let Some(change) = &self.change {
            write!(f, ": {change}")?;
        }
        match self.tried {
            Some(Tried { peak_bytes, seconds: Some(s) }) => {
                write!(f, "\n  = planned so, a run takes {}, and a device {} at most", seconds(s), bytes(peak_bytes))
            }
            Some(Tried { peak_bytes, seconds: None }) => {
                write!(f, "\n  = planned so, a device takes {} at most", bytes(peak_bytes))
            }
            None => Ok(()),
        }
    }
}
