//! What a lint found: where, what it costs and what to do about it.

use super::planned::Lowered;
use crate::dim::Name;
use crate::error::Place;
use crate::graph::NodeId;
use crate::layout::{Layout, Mesh};
use crate::plan::describe::{bytes, flops, thousands};
use serde::Serialize;
use std::fmt;

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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

/// Operations that a device makes in the time of sending a byte, where nothing is known of the machine: what findings of
/// unlike kinds are compared by.
pub const FLOPS_A_BYTE: f64 = 100.0;
/// Bytes that a device sends in the time that a message takes, however short it is.
pub const BYTES_A_MESSAGE: f64 = 4096.0;

/// What is lost, a run of the function and on the device that loses most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes sent to other devices.
    pub sent_bytes: f64,
    /// Messages to other devices.
    pub messages: f64,
    /// Bytes of memory.
    pub held_bytes: f64,
}

impl Lost {
    /// Time, in operations: what sorts findings.
    pub fn weight(&self) -> f64 {
        self.flops + FLOPS_A_BYTE * (self.sent_bytes + BYTES_A_MESSAGE * self.messages)
    }
    /// Seconds on a device that computes and sends so fast.
    pub fn seconds(&self, flops_per_second: f64, bytes_per_second: f64) -> f64 {
        self.flops / flops_per_second + self.sent_bytes / bytes_per_second
    }
    fn add(&mut self, other: &Lost) {
        self.flops += other.flops;
        self.sent_bytes += other.sent_bytes;
        self.messages += other.messages;
        self.held_bytes += other.held_bytes;
    }
}

/// Another mesh, another layout, or both: what can be applied as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The whole mesh in place of the one there is.
    pub mesh: Option<String>,
    /// The whole layout in place of the one there is.
    pub layout: Option<String>,
}

impl Change {
    /// Another layout, of these rules.
    pub(super) fn rules(rules: &[(Name, Name)]) -> Change {
        let text: Vec<String> = rules.iter().map(|(d, a)| format!("{d}:{a}")).collect();
        Change { mesh: None, layout: Some(text.join(",")) }
    }
    /// `dim` split over `axis`, and no dimension of `not` over anything.
    pub(super) fn split(layout: &Layout, dim: &Name, axis: &Name, not: &[&Name]) -> Change {
        let others = layout.rules().iter().filter(|(d, _)| d != dim && !not.contains(&d));
        Change::rules(&others.cloned().chain([(dim.clone(), axis.clone())]).collect::<Vec<_>>())
    }
    /// No rule for `dim`.
    pub(super) fn without(layout: &Layout, dim: &Name) -> Change {
        Change::rules(&layout.rules().iter().filter(|(d, _)| d != dim).cloned().collect::<Vec<_>>())
    }
    /// An axis of `size` devices; of one: none.
    pub(super) fn resized(mesh: &Mesh, layout: &Layout, axis: &Name, size: usize) -> Change {
        let axes = mesh
            .axes()
            .iter()
            .map(|(n, s)| (n, if n == axis { size } else { *s }))
            .filter(|(n, s)| *n != axis || *s > 1);
        let text: Vec<String> = axes.map(|(n, s)| format!("{n}={s}")).collect();
        let text = if text.is_empty() { "1".into() } else { text.join(",") };
        let rules: Vec<_> = layout.rules().iter().filter(|(_, a)| size > 1 || a != axis).cloned().collect();
        let fewer = rules.len() < layout.rules().len();
        Change { mesh: Some(text), layout: fewer.then(|| Change::rules(&rules).layout).flatten() }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mesh = self.mesh.as_ref().map(|m| format!("--mesh {m}"));
        let layout = self.layout.as_ref().map(|l| format!("--layout {}", if l.is_empty() { "''" } else { l }));
        f.write_str(&[mesh, layout].into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

/// Something that a lint found; of several with the same remedy, the one that costs most, with what all of them lose.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The lint's code.
    pub code: &'static str,
    /// Its name.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What to do.
    pub help: String,
    /// What to do, as something that can be applied.
    pub change: Option<Change>,
    /// The function it is in; none: the whole program.
    pub function: Option<Name>,
    /// Place in the user's source.
    #[serde(serialize_with = "place")]
    pub place: Option<Place>,
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

fn place<S: serde::Serializer>(place: &Option<Place>, s: S) -> Result<S::Ok, S::Error> {
    place.map(|p| p.to_string()).serialize(s)
}

impl Finding {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Finding {
        Finding {
            code: "",
            name: "",
            severity: Severity::Warning,
            message: message.into(),
            help: help.into(),
            change: None,
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
        Finding { place: Some(n.place), ..self }
    }
    pub(super) fn place(self, place: Place) -> Finding {
        Finding { place: Some(place), ..self }
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
        let key = |f: &Finding| (f.code, f.help.clone(), f.change.clone(), f.dim.clone(), f.axis.clone());
        key(self) == key(other)
    }
}

/// Findings of one remedy together, those that cost most first. What they lose is added up within a function; of several
/// functions, which run at other times, the one that loses most counts.
pub(super) fn merged(list: Vec<Finding>) -> Vec<Finding> {
    let mut by_function: Vec<(f64, Finding)> = vec![];
    for f in list {
        let weight = f.lost.weight();
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
                if f.lost.weight() > g.lost.weight() {
                    *g = f;
                }
                g.count = count;
            }
        }
    }
    let key = |f: &Finding| (f.severity, -f.lost.weight(), -f.lost.held_bytes);
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
        match &self.change {
            Some(change) => write!(f, ": {change}"),
            None => Ok(()),
        }
    }
}
