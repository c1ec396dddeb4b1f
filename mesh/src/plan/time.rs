//! How long a step of a plan takes on a machine, before it runs.
//!
//! Every device goes through its list of steps with a clock of its own. A step takes what the machine's rates say for its
//! operations and bytes; one that communicates begins when the last of those it hears from is there, and takes the time of
//! its messages as well: within a host and between hosts side by side, each at its link's speed. So devices with less to do
//! wait for those with more, as they do when it runs. What was begun and is finished in a later step goes over the links while
//! the device does what is in between, one transfer after the other, the latency of one beside all others; the later step waits
//! for what is left of it.

use super::cost::Cost;
use super::describe::{self, Table};
use super::step::{AllReduce, Segments, Step, Work};
use super::{DevicePlan, ProgramPlan};
use crate::dim::{DType, Name};
use crate::layout::Mesh;
use crate::machine::Machine;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// How long a run of a function takes.
#[derive(Clone, Debug, Default)]
pub struct Estimate {
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds by kind of work, the mean of all devices.
    pub classes: BTreeMap<Name, f64>,
    /// Of each device.
    pub devices: Vec<DeviceTime>,
    /// By the axes of the mesh that it goes along (`x`, `x+y`; `data`), what is sent.
    pub axes: BTreeMap<Name, AxisTime>,
    /// How many devices of the mesh share one of the machine's.
    pub share: f64,
    /// By device, of each of its steps; waiting is none of it.
    pub steps: Vec<Vec<f64>>,
}

/// Seconds of a run on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceTime {
    /// In steps that do not communicate.
    pub computing: f64,
    /// Moving and combining.
    pub moving: f64,
    /// Waiting for others.
    pub waiting: f64,
    /// What the links do while it computes, which is none of the above.
    pub hidden: f64,
}

impl DeviceTime {
    /// What it does itself.
    pub fn busy(&self) -> f64 {
        self.computing + self.moving
    }
}

/// What goes along some axes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AxisTime {
    /// Bytes that all devices send.
    pub bytes: f64,
    /// Seconds that the links take for them, the mean of all devices.
    pub seconds: f64,
}

/// What work sends and hears: peer, bytes out, bytes in, messages. Of a sum that was begun the results are sent where the
/// parts are combined.
pub(super) fn messages(work: &Work) -> Vec<(usize, usize, usize, usize)> {
    match work {
        Work::Exchange(e) => {
            let mut peers: BTreeMap<usize, (usize, usize, usize)> = BTreeMap::new();
            for m in &e.sends {
                let to = peers.entry(m.peer).or_default();
                (to.0, to.2) = (to.0 + m.bytes, to.2 + 1);
            }
            e.recvs.iter().for_each(|m| peers.entry(m.peer).or_default().1 += m.bytes);
            peers.into_iter().map(|(peer, (sent, received, n))| (peer, sent, received, n)).collect()
        }
        Work::AllReduce(a) => of_sum(a, true, a.under_way.is_none()),
        Work::Combine(a) => of_sum(a, false, true),
        Work::Map(_)
        | Work::Reduce(_)
        | Work::Op(_)
        | Work::Copy(_)
        | Work::Band(_)
        | Work::Join(_)
        | Work::Finish(_) => vec![],
    }
}

/// The messages of a sum: its parts, and if they are shared, its results.
fn of_sum(a: &AllReduce, parts: bool, results: bool) -> Vec<(usize, usize, usize, usize)> {
    let results = results && a.segments == Segments::Shared;
    if !parts && !results {
        return vec![];
    }
    let others = a.devices.iter().enumerate().filter(|(p, _)| *p != a.me);
    let element = a.dtype.bytes();
    let part = |nodes: usize, segment: usize| if parts { nodes * a.segment_elements(segment) * element } else { 0 };
    let result = |p: usize| if results { a.segment_elements(p) * element } else { 0 };
    others
        .map(|(p, device)| {
            let sent = part(a.nodes[a.me], p) + result(a.me);
            let received = part(a.nodes[p], a.me) + result(p);
            let count = if parts { a.nodes[a.me].max(1) } else { 0 };
            (*device, sent, received, count + usize::from(results))
        })
        .collect()
}

impl Step {
    /// The family of its kind of work, as machines know it: `product`, `collective` or `default`.
    pub fn family(&self) -> &'static str {
        match &self.work {
            Work::Op(op) if op.op.is_product() => "product",
            Work::Exchange(_) | Work::AllReduce(_) | Work::Combine(_) | Work::Finish(_) => "collective",
            // A band is there for its products.
            Work::Band(_) => "product",
            Work::Op(_) | Work::Map(_) | Work::Reduce(_) | Work::Copy(_) | Work::Join(_) => "default",
        }
    }

    /// What it takes where matrix tiles have so many columns, which are all computed, and where to begin and to finish a
    /// sum in one takes as long as so many more elements of `f32`.
    pub fn tiled(&self, columns: usize, depth: usize) -> Cost {
        let mut cost = self.cost();
        if let Work::Op(op) = &self.work
            && op.op.is_product()
        {
            let leaves = op.sum.as_ref().map_or(1, |(_, owned)| owned.iter().map(|r| r.len()).product());
            // Factors of `bf16` are twice as fast, the beginning and the end are not.
            let depth = if self.dtype() == DType::Bf16 { 2 * depth } else { depth };
            cost.flops += 2.0 * op.computed() * (op.output.region.elements() * leaves * depth) as f64;
            let inner = op.output.region.0.last().map_or(1, |(_, r)| r.len()).max(1);
            cost.flops *= inner.next_multiple_of(columns) as f64 / inner as f64;
        }
        cost
    }

    fn seconds(&self, machine: &Machine, share: f64) -> f64 {
        if self.is_idle() {
            return 0.0;
        }
        let Cost { flops, bytes } = self.tiled(machine.columns, machine.depth);
        let shared = Cost { flops: flops * share, bytes: bytes * share };
        let rate = machine.rate(self.class(), self.family());
        // A collective is launched where it begins.
        let launched = matches!(self.work, Work::Combine(_) | Work::Finish(_));
        rate.seconds(shared, self.dtype()) - if launched { rate.launch } else { 0.0 }
    }
}

/// The axes along which two devices differ: `x`, `x+y`.
pub(super) fn axes_between(mesh: &Mesh, a: usize, b: usize) -> Name {
    let (a, b) = (mesh.coordinates(a), mesh.coordinates(b));
    let axes = mesh.axes().iter().zip(a.iter().zip(&b)).filter(|(_, (a, b))| a != b);
    axes.map(|((name, _), _)| &**name).collect::<Vec<_>>().join("+").into()
}

/// What goes over a device's links in a step.
struct Transfer {
    /// When the last of those that have to do with it is there.
    ready: f64,
    latency: f64,
    /// Seconds that the links are in use.
    busy: f64,
}

/// Devices with their clocks.
struct Clocks<'a> {
    plan: &'a ProgramPlan,
    machine: &'a Machine,
    per_host: usize,
    now: Vec<f64>,
    /// By device: when its links are free.
    free: Vec<f64>,
    /// By device: what is under way, when it is there, when others had begun it, and how long it takes.
    under_way: Vec<HashMap<usize, [f64; 3]>>,
    axes: Vec<(Name, AxisTime)>,
    along: HashMap<(usize, usize), usize>,
}

impl Clocks<'_> {
    /// The messages of a device, where all others stood at `begun`.
    fn transfer(&mut self, d: usize, work: &Work, begun: &[f64]) -> Transfer {
        // By link: latency, and bytes of the fuller direction.
        let (mut latency, mut bytes) = ([0.0f64; 2], [[0.0f64; 2]; 2]);
        let links = [self.machine.within, self.machine.between];
        let mut ready = begun[d];
        for (peer, sent, received, n) in messages(work) {
            let far = usize::from(peer / self.per_host != d / self.per_host);
            ready = ready.max(begun[peer]);
            latency[far] = latency[far].max(links[far].latency * n as f64);
            bytes[far] = [bytes[far][0] + sent as f64, bytes[far][1] + received as f64];
            let (plan, axes) = (self.plan, &mut self.axes);
            let axis = *self.along.entry((d, peer)).or_insert_with(|| {
                let name = axes_between(&plan.mesh, d, peer);
                axes.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                    axes.push((name, AxisTime::default()));
                    axes.len() - 1
                })
            });
            let axis = &mut axes[axis].1;
            axis.bytes += sent as f64;
            axis.seconds += sent as f64 / links[far].bytes / begun.len() as f64;
        }
        let busy = |i: usize| bytes[i][0].max(bytes[i][1]) / links[i].bytes;
        let slower = usize::from(latency[1] + busy(1) > latency[0] + busy(0));
        Transfer { ready, latency: latency[slower], busy: busy(slower) }
    }

    /// Lets what a device has posted go on its way.
    fn begin(&mut self, d: usize, number: usize, work: &Work, begun: &[f64]) {
        let Transfer { ready, latency, busy } = self.transfer(d, work, begun);
        self.free[d] = self.free[d].max(ready) + busy;
        self.under_way[d].insert(number, [self.free[d] + latency, ready, latency + busy]);
    }
}

/// How long a run of a function of a plan takes on a machine; None if the plan has no such function.
pub fn estimate(plan: &ProgramPlan, function: &str, machine: &Machine) -> Option<Estimate> {
    let plans: &Vec<DevicePlan> = plan.functions.get(&Name::from(function))?;
    let devices = plans.len();
    let (per_host, share) = machine.share(devices);
    let mut clocks = Clocks {
        plan,
        machine,
        per_host,
        now: vec![0.0; devices],
        free: vec![0.0; devices],
        under_way: vec![HashMap::new(); devices],
        axes: vec![],
        along: HashMap::new(),
    };
    // By kind of work.
    let mut classes: HashMap<&str, f64> = HashMap::new();
    let mut out = Estimate {
        devices: vec![DeviceTime::default(); devices],
        steps: vec![vec![]; devices],
        share,
        ..Estimate::default()
    };
    // All devices have the same list, so that what one hears in a step another sends in the same step.
    let steps = plans.iter().map(|p| p.steps.len()).max().unwrap_or(0);
    for s in 0..steps {
        let begun = clocks.now.clone();
        let mut posted = vec![];
        for (d, plan_of) in plans.iter().enumerate() {
            let Some(step) = plan_of.steps.get(s) else { continue };
            let own = step.seconds(machine, share);
            let mut seconds = own;
            let of = &mut out.devices[d];
            match step.work.under_way() {
                _ if step.family() != "collective" => of.computing += own,
                None => {
                    let Transfer { ready, latency, busy } = clocks.transfer(d, &step.work, &begun);
                    let ready = ready.max(if busy > 0.0 { clocks.free[d] } else { 0.0 });
                    seconds += latency + busy;
                    of.waiting += ready - begun[d];
                    of.moving += seconds;
                    clocks.now[d] = ready;
                    clocks.free[d] = clocks.free[d].max(ready + latency + busy);
                }
                Some(number) => {
                    if let Some([there, ready, takes]) = clocks.under_way[d].remove(&number) {
                        let left = (there - begun[d]).max(0.0);
                        let moving = left.min((there - ready.max(begun[d])).max(0.0)).min(takes);
                        of.waiting += left - moving;
                        of.hidden += takes - moving;
                        clocks.now[d] += left - moving;
                        seconds += moving;
                    }
                    of.moving += seconds;
                    if !step.work.ends() {
                        posted.push((d, number, &step.work));
                    }
                }
            }
            clocks.now[d] += seconds;
            out.steps[d].push(seconds);
            if !step.is_idle() {
                *classes.entry(step.class()).or_default() += seconds / devices as f64;
            }
        }
        let posting = if posted.is_empty() { vec![] } else { clocks.now.clone() };
        posted.into_iter().for_each(|(d, number, work)| clocks.begin(d, number, work, &posting));
    }
    out.classes = classes.into_iter().map(|(class, seconds)| (class.into(), seconds)).collect();
    out.axes = clocks.axes.into_iter().collect();
    out.seconds = clocks.now.iter().copied().fold(0.0, f64::max) + machine.step;
    Some(out)
}

impl Estimate {
    /// The device that others wait for, the first of equals: the one that has most to do.
    pub fn slowest(&self) -> usize {
        let busy = |d: &usize| self.devices[*d].busy();
        (0..self.devices.len()).rev().max_by(|a, b| busy(a).total_cmp(&busy(b))).unwrap_or(0)
    }

    /// The mean of all devices.
    pub fn mean(&self) -> DeviceTime {
        let mean =
            |part: fn(&DeviceTime) -> f64| self.devices.iter().map(part).sum::<f64>() / self.devices.len() as f64;
        DeviceTime {
            computing: mean(|d| d.computing),
            moving: mean(|d| d.moving),
            waiting: mean(|d| d.waiting),
            hidden: mean(|d| d.hidden),
        }
    }

    /// The section of a plan's text.
    pub fn describe(&self, machine: &Machine) -> String {
        let mut out = String::new();
        let seconds = describe::seconds;
        let _ = writeln!(out, "\ntime: {} a step on {}, as estimated", seconds(self.seconds), machine.name);
        if self.share > 1.0 {
            let _ = writeln!(
                out,
                "  note: there are more devices in the mesh than in the machine: {:.1} share one, and its memory",
                self.share
            );
        }
        let hidden = self.mean().hidden;
        if hidden > 0.0 {
            let _ = writeln!(out, "  and {} more of a device's messages, while it computes", seconds(hidden));
        }
        let mut table = Table::default();
        table.row([&"device", &"computing", &"moving", &"waiting"]);
        let slowest = self.slowest();
        for (name, t) in [(format!("slowest, {slowest}"), self.devices[slowest]), ("mean".into(), self.mean())] {
            table.row([&name, &seconds(t.computing), &seconds(t.moving), &seconds(t.waiting)]);
        }
        table.row([&"", &"", &"", &""]);
        table.row([&"kind of work", &"a device", &"share", &""]);
        let all: f64 = self.classes.values().sum();
        let mut classes: Vec<_> = self.classes.iter().collect();
        classes.sort_by(|a, b| b.1.total_cmp(a.1));
        for (class, t) in classes {
            table.row([class, &seconds(*t), &format!("{:.1} %", 100.0 * t / all), &""]);
        }
        if !self.axes.is_empty() {
            table.row([&"", &"", &"", &""]);
            table.row([&"along the axis", &"sent by all", &"a device", &""]);
        }
        for (axis, t) in &self.axes {
            table.row([axis, &describe::bytes(t.bytes as usize), &seconds(t.seconds), &""]);
        }
        table.write(&mut out);
        out
    }
}
