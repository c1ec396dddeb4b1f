//! A plan as data: what `plan --format json` gives, what [`diff`] compares and what [`html`] draws.
//!
//! `docs/plan.md` is the schema. A number of bytes, operations or messages is of one run of the function and, where nothing
//! else is said, of the device that has most.

pub mod diff;
pub mod html;
mod lives;
mod tensors;

use crate::dim::Name;
use crate::error::Error;
use crate::lint::Finding;
use crate::plan::{DevicePlan, ProgramPlan, Step, Work};
use crate::program::Program;
pub use lives::Span;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
pub use tensors::{DimLayout, TensorReport};

/// The version of the schema.
pub const VERSION: u32 = 1;

/// A plan of one function.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The function.
    pub function: String,
    /// The mesh, as text.
    pub mesh: String,
    /// Its axes in order, each with its devices.
    pub axes: Vec<(String, usize)>,
    /// The layout, as text.
    pub layout: String,
    /// Devices in order.
    pub devices: Vec<DeviceReport>,
    /// Variables, feeds, results and activations.
    pub tensors: Vec<TensorReport>,
    /// Steps in order; those of one number are of all devices at once.
    pub steps: Vec<StepReport>,
    /// By pattern and by axes: what is sent.
    pub communication: Vec<TrafficReport>,
    /// Memory over time, once for devices that are alike.
    pub memory: Vec<MemoryReport>,
    /// What lints found, the most expensive first; not read back.
    #[serde(skip_deserializing)]
    pub findings: Vec<Finding>,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Where it lies along each axis.
    pub at: Vec<usize>,
    /// Bytes of memory that it needs, for all functions.
    pub peak_bytes: usize,
    /// Of those, bytes of variables.
    pub variable_bytes: usize,
    /// Operations.
    pub flops: f64,
    /// Bytes sent.
    pub sent_bytes: usize,
    /// Messages sent.
    pub messages: usize,
}

/// A step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepReport {
    /// Its op, or its collective.
    pub op: String,
    /// Kind of work: the op, `map`, `reduce`, `copy`, or the collective.
    pub class: String,
    /// Scope in the program.
    pub scope: String,
    /// Place in the user's source.
    pub place: String,
    /// Operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Bytes sent.
    pub sent_bytes: usize,
    /// Axes along which they are, joined by `+`; empty where nothing is sent.
    pub axes: String,
}

/// What is sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TrafficReport {
    /// `halo`, `all-gather`, `all-to-all`, `permute` or `all-reduce`.
    pub pattern: String,
    /// Axes along which sender and receiver differ, joined by `+`.
    pub axes: String,
    /// Steps that have such messages.
    pub steps: usize,
    /// Messages of all devices.
    pub messages: usize,
    /// Bytes of all devices.
    pub sent_bytes: usize,
    /// Bytes of the device that sends most.
    pub most_bytes: usize,
}

/// Memory over time of some devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryReport {
    /// The devices.
    pub devices: Vec<usize>,
    /// Bytes alive at each step, variables included; the last one is when variables are set.
    pub alive_bytes: Vec<usize>,
    /// The step at which most are.
    pub fullest: usize,
    /// The largest values, each with the steps during which it is there.
    pub spans: Vec<Span>,
}

/// Everything about one function of what is planned; None if there is no such function.
///
/// # Errors
/// A plan of another program.
pub fn report(
    program: &Program,
    plan: &ProgramPlan,
    function: &str,
    findings: Vec<Finding>,
) -> Result<Option<Report>, Error> {
    let key = Name::from(function);
    let (Some(f), Some(plans)) = (program.functions.get(&key), plan.functions.get(&key)) else { return Ok(None) };
    let of_device = |(d, p): (usize, &DevicePlan)| {
        let sent = p.steps.iter().flat_map(|s| messages(d, s));
        let (count, bytes) = sent.fold((0, 0), |(n, b), m| (n + m.count, b + m.bytes));
        DeviceReport {
            at: plan.mesh.coordinates(d),
            peak_bytes: plan.peak_bytes(d),
            variable_bytes: plan.variables[d].iter().map(|(_, b)| b.bytes).sum(),
            flops: p.steps.iter().map(|s| s.cost().flops).sum(),
            sent_bytes: bytes,
            messages: count,
        }
    };
    Ok(Some(Report {
        function: function.into(),
        mesh: plan.mesh.to_string(),
        axes: plan.mesh.axes().iter().map(|(n, s)| (n.to_string(), *s)).collect(),
        layout: plan.layout.to_string(),
        devices: plans.iter().enumerate().map(of_device).collect(),
        tensors: tensors::tensors(program, plan, f)?,
        steps: steps(plan, plans),
        communication: communication(plan, plans),
        memory: memory(plan, &key, plans),
        findings,
    }))
}

/// What a step sends to another device.
struct Sent {
    peer: usize,
    bytes: usize,
    count: usize,
}

fn messages(device: usize, step: &Step) -> Vec<Sent> {
    match &step.work {
        Work::Exchange(e) => e.sends.iter().map(|m| Sent { peer: m.peer, bytes: m.bytes, count: 1 }).collect(),
        Work::AllReduce(a) => {
            let others = a.devices.iter().enumerate().filter(|(_, d)| **d != device);
            let count = a.nodes[a.me] + usize::from(a.segmented);
            others.map(|(p, d)| Sent { peer: *d, bytes: a.sent_to(p), count }).collect()
        }
        Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) => vec![],
    }
}

/// The axes along which two devices differ.
fn axes_between(plan: &ProgramPlan, a: usize, b: usize) -> String {
    let (a, b) = (plan.mesh.coordinates(a), plan.mesh.coordinates(b));
    let apart = plan.mesh.axes().iter().zip(a.iter().zip(&b)).filter(|(_, (a, b))| a != b);
    apart.map(|((name, _), _)| name.to_string()).collect::<Vec<_>>().join("+")
}

fn steps(plan: &ProgramPlan, plans: &[DevicePlan]) -> Vec<StepReport> {
    let count = plans.iter().map(|p| p.steps.len()).max().unwrap_or(0);
    let one = |i: usize| {
        let alike: Vec<(usize, &Step)> =
            plans.iter().enumerate().filter_map(|(d, p)| Some((d, p.steps.get(i)?))).collect();
        let (_, first) = alike.first()?;
        let mut axes: BTreeSet<String> = BTreeSet::new();
        let (mut flops, mut bytes, mut sent) = (0.0f64, 0.0f64, 0);
        for (d, s) in &alike {
            let (cost, to) = (s.cost(), messages(*d, s));
            (flops, bytes) = (flops.max(cost.flops), bytes.max(cost.bytes));
            sent = sent.max(to.iter().map(|m| m.bytes).sum());
            for m in &to {
                axes.extend(axes_between(plan, *d, m.peer).split('+').map(String::from));
            }
        }
        Some(StepReport {
            op: first.label.op.to_string(),
            class: first.class().into(),
            scope: first.label.scope.to_string(),
            place: first.label.place.to_string(),
            flops,
            bytes,
            sent_bytes: sent,
            axes: axes.into_iter().collect::<Vec<_>>().join("+"),
        })
    };
    (0..count).filter_map(one).collect()
}

fn communication(plan: &ProgramPlan, plans: &[DevicePlan]) -> Vec<TrafficReport> {
    let mut rows: BTreeMap<(String, String), (TrafficReport, Vec<usize>, Vec<usize>)> = BTreeMap::new();
    for (d, p) in plans.iter().enumerate() {
        for (i, s) in p.steps.iter().enumerate() {
            for m in messages(d, s) {
                let key = (s.label.op.to_string(), axes_between(plan, d, m.peer));
                let (row, sent, steps) = rows.entry(key).or_default();
                (row.messages, row.sent_bytes) = (row.messages + m.count, row.sent_bytes + m.bytes);
                sent.resize(plans.len(), 0);
                sent[d] += m.bytes;
                if !steps.contains(&i) {
                    steps.push(i);
                }
            }
        }
    }
    let row = |((pattern, axes), (row, sent, steps)): ((String, String), (TrafficReport, Vec<usize>, Vec<usize>))| {
        let most_bytes = sent.into_iter().max().unwrap_or(0);
        TrafficReport { pattern, axes, steps: steps.len(), most_bytes, ..row }
    };
    let mut rows: Vec<TrafficReport> = rows.into_iter().map(row).collect();
    rows.sort_by_key(|r| std::cmp::Reverse(r.sent_bytes));
    rows
}

fn memory(plan: &ProgramPlan, key: &Name, plans: &[DevicePlan]) -> Vec<MemoryReport> {
    let variables = |d: usize| plan.variables[d].iter().map(|(_, b)| b.offset + b.bytes).max().unwrap_or(0);
    let mut out: Vec<MemoryReport> = vec![];
    for (d, t) in plan.timelines.get(key).into_iter().flatten().enumerate() {
        match out.iter_mut().find(|m| m.alive_bytes == t.alive) {
            Some(m) => m.devices.push(d),
            None => out.push(MemoryReport {
                devices: vec![d],
                alive_bytes: t.alive.clone(),
                fullest: t.fullest,
                spans: lives::spans(&plans[d], variables(d)),
            }),
        }
    }
    out
}
