//! A plan as data: what [`describe`](super::describe) writes for people, and each step, for programs and for pages.
//!
//! The schema is that of these structs, in JSON; `docs/plan.md` has it in words. [`VERSION`] is raised with every change
//! that a reader has to know of.

use super::describe::{largest, split, stage};
use super::step::{Step, Work};
use super::time::{self, Estimate, axes_between, messages};
use super::{Buffer, DevicePlan, ExchangeKind, Part, ProgramPlan};
use crate::dim::{Name, Type};
use crate::error::{Cause, Error};
use crate::lint::Finding;
use crate::machine::Machine;
use crate::placement::{Placement, Subject};
use crate::program::{Function, Program};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of the schema.
pub const VERSION: u32 = 1;
/// The longest report that is read.
pub const JSON_BYTES: usize = 256 << 20;
/// Of what is alive only that of at least this part of the peak is listed.
const PART: usize = 1000;

/// Plans of one program on one mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The mesh, as `--mesh` takes it.
    pub mesh: String,
    /// Its axes: name, size. The last one is the fastest in the numbers of devices.
    pub axes: Vec<(String, usize)>,
    /// The layout, as `--layout` takes it.
    pub layout: String,
    /// Number of devices.
    pub devices: usize,
    /// The machine that times are for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// A plan for each function that was asked for.
    pub plans: Vec<FunctionPlan>,
}

/// The plan of one function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionPlan {
    /// The function.
    pub function: String,
    /// FLOPs of a run, counted on whole tensors.
    pub flops: u64,
    /// The most bytes that a device uses.
    pub peak_bytes: usize,
    /// The largest feed, if there is any.
    pub feed: Option<Feed>,
    /// The program's variables.
    pub variables: Vec<Tensor>,
    /// By group of layers: its largest activation, and what it sends.
    pub levels: Vec<Level>,
    /// Devices, those with equal plans together.
    pub groups: Vec<Group>,
    /// What is sent, by axes and kind.
    pub communication: Vec<Traffic>,
    /// How long it takes, for a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// What the layout costs that it need not, in all functions of the program; who makes the report looks for it
    /// ([`crate::lint::check`]).
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// Who owns what of a feed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feed {
    /// Its name.
    pub name: String,
    /// Its dimensions: name, size.
    pub dims: Vec<(String, usize)>,
    /// By device, for each dimension: first element, and the one after the last.
    pub blocks: Vec<Vec<(usize, usize)>>,
    /// Why it is split so, a line a dimension.
    #[serde(default)]
    pub why: Vec<String>,
}

/// A tensor and its layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// Its name; of an activation, its group of layers.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub ty: String,
    /// How it is split: `x:x,y:y`, or `whole`.
    pub layout: String,
    /// The least and the most bytes that a device has of it.
    pub bytes: (usize, usize),
    /// Why it is split so, a line a dimension.
    #[serde(default)]
    pub why: Vec<String>,
}

/// A group of layers: what has the first part of its scope in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// Its largest activation.
    #[serde(flatten)]
    pub tensor: Tensor,
    /// Bytes that all devices send for it.
    pub sent_bytes: usize,
    /// Of these, for halos.
    pub halo_bytes: usize,
    /// Share of what its halo exchanges give that comes from other devices.
    pub halo_share: f64,
}

/// Devices with equal plans.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Their numbers.
    pub devices: Vec<usize>,
    /// Bytes that each uses: arena and workspaces.
    pub peak_bytes: usize,
    /// Bytes of variables.
    pub variables_bytes: usize,
    /// Bytes of the workspaces of threads.
    pub workspace_bytes: usize,
    /// Bytes alive at each step, and at last where variables are set.
    pub alive: Vec<usize>,
    /// The step at which most are.
    pub fullest: usize,
    /// What is alive at that one, largest first, without variables.
    pub at_fullest: Vec<Alive>,
    /// What steps make and how long it is there: that of at least a thousandth of the peak.
    pub values: Vec<Life>,
    /// Steps in order.
    pub steps: Vec<StepLine>,
}

/// Something alive at the fullest step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alive {
    /// What.
    pub name: String,
    /// Bytes.
    pub bytes: usize,
    /// Where it comes from.
    pub place: String,
}

/// A value in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Life {
    /// What makes it: scope and op, or a feed.
    pub name: String,
    /// Bytes.
    pub bytes: usize,
    /// The step that makes it.
    pub from: usize,
    /// The last step that uses it, or the one before what takes its place as it reads it.
    pub to: usize,
}

/// A step of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Kind of work, as profiles call it.
    pub kind: String,
    /// The op, or the collective.
    pub op: String,
    /// Scope in the program.
    pub scope: String,
    /// Place in the source.
    pub place: String,
    /// What it goes over.
    pub extent: String,
    /// FLOPs.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Bytes sent, by axes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sent: BTreeMap<Name, usize>,
    /// Seconds, without waiting, on a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// What is sent along some axes for one kind of exchange.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// The axes: `x`, `x+y`.
    pub axis: String,
    /// The kind.
    pub kind: String,
    /// Messages of all devices.
    pub messages: usize,
    /// Bytes that all devices send.
    pub bytes: usize,
}

/// How long a run takes: [`Estimate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// Seconds in all.
    pub seconds: f64,
    /// How many devices of the mesh share one of the machine's.
    pub share: f64,
    /// The device that has most to do.
    pub slowest: usize,
    /// Seconds by kind of work, the mean of all devices.
    pub classes: BTreeMap<Name, f64>,
    /// By device: seconds of computing, moving and waiting.
    pub devices: Vec<[f64; 3]>,
    /// Seconds that the links take while devices compute, which is none of these, the mean of all devices.
    #[serde(default)]
    pub hidden: f64,
    /// By axes: bytes that all devices send, and seconds of the links, the mean of all devices.
    pub axes: BTreeMap<Name, (f64, f64)>,
}

impl Report {
    /// The report as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads what [`Report::to_json`] has written.
    ///
    /// # Errors
    /// A text that is too long, no JSON, of another version, or no report.
    pub fn from_json(text: &str) -> Result<Report, Error> {
        let wrong = |what: &str, why: String| {
            let expected = format!("a plan that `plan --format json` has written: {why}");
            Error::from(Cause::Syntax { text: what.into(), expected })
        };
        if text.len() > JSON_BYTES {
            return Err(wrong("..", format!("at most {JSON_BYTES} bytes")));
        }
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let beginning = || text.chars().take(40).collect::<String>();
        let head: Head = serde_json::from_str(text).map_err(|e| wrong(&beginning(), e.to_string()))?;
        if head.version != VERSION {
            let why = format!("it has to be version {VERSION}; make it again with this program");
            return Err(wrong(&format!("version {}", head.version), why));
        }
        serde_json::from_str(text).map_err(|e| wrong(&beginning(), e.to_string()))
    }
}

impl From<&Estimate> for Time {
    fn from(e: &Estimate) -> Time {
        Time {
            seconds: e.seconds,
            share: e.share,
            slowest: e.slowest(),
            classes: e.classes.clone(),
            devices: e.devices.iter().map(|d| [d.computing, d.moving, d.waiting]).collect(),
            hidden: e.mean().hidden,
            axes: e.axes.iter().map(|(n, a)| (n.clone(), (a.bytes, a.seconds))).collect(),
        }
    }
}

/// The report of functions, each with its program and plan; all plans are of one mesh and layout. None without a plan, or
/// for a function that one does not have.
pub fn report(plans: &[(&Program, &ProgramPlan, &str)], machine: Option<&Machine>) -> Option<Report> {
    let (_, first, _) = plans.first()?;
    Some(Report {
        version: VERSION,
        mesh: first.mesh.to_string(),
        axes: first.mesh.axes().iter().map(|(n, s)| (n.to_string(), *s)).collect(),
        layout: first.layout.to_string(),
        devices: first.mesh.size(),
        machine: machine.map(|m| m.name.clone()),
        plans: plans.iter().map(|(program, plan, f)| of_function(program, plan, f, machine)).collect::<Option<_>>()?,
    })
}

fn of_function(program: &Program, plan: &ProgramPlan, name: &str, machine: Option<&Machine>) -> Option<FunctionPlan> {
    let key = Name::from(name);
    let (f, devices) = (program.functions.get(&key)?, plan.functions.get(&key)?);
    let estimate = machine.and_then(|m| time::estimate(plan, name, m));
    let placement = Placement::new(&plan.mesh, &plan.layout, program);
    let tensor = |name: String, subject: Subject, ty: &Type| -> Option<Tensor> {
        let (spec, why) = (placement.spec(&subject).ok()?, placement.why(&subject));
        let held = placement.regions(ty, &spec).into_iter().map(|r| r.elements() * ty.dtype.bytes());
        let bytes = held.fold((usize::MAX, 0), |(least, most), n| (least.min(n), most.max(n)));
        Some(Tensor { name, ty: ty.to_string(), layout: split(&plan.mesh, ty, &spec), bytes, why })
    };
    let variables = program.variables.iter();
    let variables = variables.filter_map(|v| tensor(v.name.to_string(), Subject::variable(v), &v.ty));
    let levels = largest(program, f).into_iter();
    let levels = levels.filter_map(|(name, n)| Some(level(tensor(name, Subject::node(f, n), &n.ty)?, devices)));
    let why = |name: &Name| {
        let input = f.inputs.iter().find(|(n, _)| n == name)?;
        Some(placement.why(&Subject::node(f, f.node(input.1))))
    };
    Some(FunctionPlan {
        function: name.into(),
        flops: f.flops(),
        peak_bytes: (0..devices.len()).map(|d| plan.peak_bytes(d)).max().unwrap_or(0),
        feed: feed(devices, |name| why(name).unwrap_or_default()),
        variables: variables.collect(),
        levels: levels.collect(),
        groups: groups(f, plan, &key, devices, estimate.as_ref()),
        communication: communication(plan, devices),
        time: estimate.as_ref().map(Time::from),
        findings: vec![],
    })
}

/// The largest feed of a function.
fn feed(devices: &[DevicePlan], why: impl Fn(&Name) -> Vec<String>) -> Option<Feed> {
    let by_size = |(_, (_, part, _)): &(usize, &(Name, Part, Buffer))| part.ty.bytes();
    let (at, (name, part, _)) = devices.first()?.inputs.iter().enumerate().max_by_key(by_size)?;
    let block = |d: &DevicePlan| d.inputs[at].1.region.0.iter().map(|(_, r)| (r.start, r.end)).collect();
    Some(Feed {
        name: name.to_string(),
        dims: part.ty.dims.iter().map(|d| (d.name.to_string(), d.size)).collect(),
        blocks: devices.iter().map(block).collect(),
        why: why(name),
    })
}

fn sent(step: &Step) -> usize {
    messages(&step.work).iter().map(|(_, sent, ..)| sent).sum()
}

fn level(tensor: Tensor, devices: &[DevicePlan]) -> Level {
    let (mut sent_bytes, mut halo_bytes, mut given) = (0, 0, 0);
    for step in devices.iter().flat_map(|d| &d.steps).filter(|s| stage(&s.label.scope) == tensor.name) {
        sent_bytes += sent(step);
        if let Work::Exchange(e) = &step.work
            && e.kind == ExchangeKind::Halo
        {
            halo_bytes += sent(step);
            // A device's own part, and what comes.
            given += step.inputs.iter().map(|b| b.bytes).sum::<usize>();
            given += e.recvs.iter().map(|m| m.bytes).sum::<usize>();
        }
    }
    Level { tensor, sent_bytes, halo_bytes, halo_share: halo_bytes as f64 / given.max(1) as f64 }
}

fn groups(
    f: &Function,
    plan: &ProgramPlan,
    key: &Name,
    devices: &[DevicePlan],
    estimate: Option<&Estimate>,
) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (d, of) in devices.iter().enumerate() {
        let timeline = &plan.timelines[key][d];
        let seconds = |i: usize| estimate.and_then(|e| e.steps[d].get(i).copied());
        let line = |(i, s): (usize, &Step)| step_line(plan, d, s, seconds(i));
        let alive = |a: &super::Alive| Alive { name: a.name.clone(), bytes: a.bytes, place: a.place.to_string() };
        let least = plan.peak_bytes(d) / PART;
        let variables = plan.variables[d].iter().map(|(_, b)| b.offset + b.bytes).max().unwrap_or(0);
        let mut group = Group {
            devices: vec![],
            peak_bytes: plan.peak_bytes(d),
            variables_bytes: plan.variables[d].iter().map(|(_, b)| b.bytes).sum(),
            workspace_bytes: plan.workspace_bytes,
            alive: timeline.alive.to_vec(),
            fullest: timeline.fullest,
            at_fullest: timeline.largest.iter().filter(|a| !a.variable && a.bytes >= least).map(alive).collect(),
            values: lives(f, of, variables).into_iter().filter(|l| l.bytes >= least.max(1)).collect(),
            steps: of.steps.iter().enumerate().map(line).collect(),
        };
        // All but their numbers is compared.
        let same = groups.iter().position(|g| {
            group.devices.clone_from(&g.devices);
            *g == group
        });
        match same {
            Some(g) => groups[g].devices.push(d),
            None => groups.push(Group { devices: vec![d], ..group }),
        }
    }
    groups
}

fn step_line(plan: &ProgramPlan, device: usize, step: &Step, seconds: Option<f64>) -> StepLine {
    let mut by_axis: BTreeMap<Name, usize> = BTreeMap::new();
    for (peer, sent, ..) in messages(&step.work).into_iter().filter(|(_, sent, ..)| *sent > 0) {
        *by_axis.entry(axes_between(&plan.mesh, device, peer)).or_default() += sent;
    }
    let cost = step.cost();
    StepLine {
        kind: step.class().into(),
        op: step.label.op.to_string(),
        scope: step.label.scope.to_string(),
        place: step.label.place.to_string(),
        extent: step.extent(),
        flops: cost.flops,
        bytes: cost.bytes,
        sent: by_axis,
        seconds,
    }
}

/// How long feeds and what steps make lie in memory, behind the variables: until the last step that reads them, or another
/// one writes there.
fn lives(f: &Function, plan: &DevicePlan, variables: usize) -> Vec<Life> {
    let overlap = |a: Buffer, b: Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
    let mut done: Vec<Life> = Vec::new();
    let feed = |(name, _, buffer): &(Name, Part, Buffer)| (*buffer, life(format!("feed {name}"), *buffer, 0));
    let mut open: Vec<(Buffer, Life)> = plan.inputs.iter().map(feed).collect();
    // Of what is under way: the last step.
    let mut last: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let mut number: BTreeMap<usize, usize> = BTreeMap::new();
    for (s, step) in plan.steps.iter().enumerate() {
        let Some(n) = step.work.under_way() else { continue };
        let count = number.entry(n).or_default();
        *count += usize::from(step.work.begins());
        last.insert((n, *count), s);
    }
    let mut begun: BTreeMap<usize, usize> = BTreeMap::new();
    for (s, step) in plan.steps.iter().enumerate() {
        let mut until = s;
        if let Some(n) = step.work.under_way() {
            let count = begun.entry(n).or_default();
            *count += usize::from(step.work.begins());
            until = last[&(n, *count)];
        }
        for (buffer, life) in &mut open {
            if step.inputs.iter().any(|b| overlap(*b, *buffer)) {
                life.to = s;
            }
        }
        // What was begun to be written goes on being so.
        let outputs = if matches!(step.work, Work::Finish(_)) { &[][..] } else { &step.outputs };
        let scratch =
            if step.work.begins() || step.work.under_way().is_none() { step.scratch } else { Buffer::default() };
        let written = [outputs, &[scratch]].concat();
        let over = |b: &Buffer| written.iter().any(|w| overlap(*w, *b));
        // What is overwritten as it is read is no longer there beside its successor.
        let ended = |(_, life): (Buffer, Life)| Life { to: life.to.min(s.saturating_sub(1)).max(life.from), ..life };
        done.extend(open.extract_if(.., |(b, _)| over(b)).map(ended));
        let node = f.node(step.label.node);
        let scope = if node.scope.is_empty() { String::new() } else { format!("{}: ", node.scope) };
        let name = |what: &str| format!("{scope}{what}{}", node.op.op().name());
        open.extend(outputs.iter().filter(|b| b.offset >= variables).map(|b| (*b, life(name(""), *b, s))));
        if scratch.bytes > 0 {
            done.push(Life { to: until, ..life(name("scratch of "), scratch, s) });
        }
    }
    // What is fetched is there to the end.
    for (_, _, fetched) in &plan.outputs {
        for (_, life) in open.iter_mut().filter(|(b, _)| overlap(*b, *fetched)) {
            life.to = plan.steps.len();
        }
    }
    done.extend(open.into_iter().map(|(_, life)| life));
    done.sort_by_key(|l| (l.from, std::cmp::Reverse(l.bytes)));
    done
}

fn life(name: String, buffer: Buffer, at: usize) -> Life {
    Life { name, bytes: buffer.bytes, from: at, to: at }
}

fn communication(plan: &ProgramPlan, devices: &[DevicePlan]) -> Vec<Traffic> {
    let mut by: BTreeMap<(Name, Name), (usize, usize)> = BTreeMap::new();
    for (d, step) in devices.iter().enumerate().flat_map(|(d, p)| p.steps.iter().map(move |s| (d, s))) {
        for (peer, sent, _, n) in messages(&step.work).into_iter().filter(|(_, sent, ..)| *sent > 0) {
            let to = by.entry((axes_between(&plan.mesh, d, peer), step.class().into())).or_default();
            (to.0, to.1) = (to.0 + n, to.1 + sent);
        }
    }
    let line = |((axis, kind), (messages, bytes)): ((Name, Name), (usize, usize))| Traffic {
        axis: axis.to_string(),
        kind: kind.to_string(),
        messages,
        bytes,
    };
    by.into_iter().map(line).collect()
}
