//! A profile: where the time of a function's runs goes, made of what the devices measured and what the plan says.
//!
//! Numbers are of one run of the function on one device: the mean over all runs but the first, and over all devices.
//! The *roofline* of a step is the least time that its operations, at the speed of products, or its bytes, at that of the
//! memory, would take; a step's share of it is that time over the one that it took. What the caches hold is faster than
//! memory, so that the share of a small step may be above 1.

use crate::error::Failure;
use mesh::dim::{DType, Name};
use mesh::graph::NodeId;
use mesh::plan::cost::Cost;
use mesh::plan::describe::Table;
use mesh::plan::{DevicePlan, ProgramPlan, Step, Work};
use proto::control::{DeviceProfile, FunctionTimes};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Steps that the text lists.
const LISTED: usize = 15;

/// The time of a function's runs, as the session sees it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// Runs that have ended.
    runs: u64,
    /// Time of all but the first.
    time: Duration,
}

impl Clock {
    /// A run has ended.
    pub fn add(&mut self, time: Duration) {
        self.time += if self.runs > 0 { time } else { Duration::ZERO };
        self.runs += 1;
    }
}

/// Where the time of a session's functions went since their program was put on the devices.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// The mesh.
    pub mesh: String,
    /// Its devices.
    pub devices: usize,
    /// What a device can do at the most, the mean of all: GFLOP/s in products of `f32`.
    pub f32_gflops_per_second: f64,
    /// The same of `bf16`.
    pub bf16_gflops_per_second: f64,
    /// GB/s to and from memory.
    pub memory_gb_per_second: f64,
    /// Functions that ran more than once, the one that took longest first.
    pub functions: Vec<FunctionProfile>,
}

/// Where the time of a function's runs went.
#[derive(Clone, Debug, Serialize)]
pub struct FunctionProfile {
    /// The function.
    pub function: String,
    /// Runs that count: all but the first.
    pub runs: u64,
    /// Milliseconds of a run, as the model program sees it.
    pub ms: f64,
    /// Of that, outside of steps: calling the devices, and waiting for the last of them.
    pub outside_ms: f64,
    /// By kind of work, the one that took longest first.
    pub ops: Vec<Spent>,
    /// By step, the one that took longest first.
    pub steps: Vec<StepSpent>,
    /// Exchanges and all-reduces.
    pub communication: Communication,
    /// Devices side by side.
    pub by_device: Vec<DeviceSpent>,
}

/// What a kind of work, or a step, took in a run.
#[derive(Clone, Debug, Serialize)]
pub struct Spent {
    /// What it is: an op, `map` or `reduce` for what was fused, or a collective.
    pub op: String,
    /// Steps.
    pub calls: f64,
    /// Milliseconds.
    pub ms: f64,
    /// Share of the run in percent.
    pub percent: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Speed of these.
    pub gflops_per_second: f64,
    /// Speed of those.
    pub gb_per_second: f64,
    /// Share of the roofline, 1 being all of it.
    pub roofline: f64,
}

/// What a step took in a run.
#[derive(Clone, Debug, Serialize)]
pub struct StepSpent {
    /// What it took.
    #[serde(flatten)]
    pub spent: Spent,
    /// What it goes over.
    pub extent: String,
    /// Scope in the program.
    pub scope: String,
    /// Place in the user's source.
    pub place: String,
}

/// Milliseconds of a run in exchanges and all-reduces: in their steps, which is what is exposed of them. What goes on while
/// other steps are done is none of it.
#[derive(Clone, Debug, Serialize)]
pub struct Communication {
    /// In all.
    pub ms: f64,
    /// Moving and combining what has come.
    pub moving_ms: f64,
    /// Waiting for others.
    pub waiting_ms: f64,
    /// While nothing else was done: all of it.
    pub exposed_ms: f64,
    /// By collective, the one that took longest first.
    pub kinds: Vec<CollectiveSpent>,
}

/// Milliseconds of a run in a kind of collective.
#[derive(Clone, Debug, Serialize)]
pub struct CollectiveSpent {
    /// What it is.
    pub op: String,
    /// How many there are.
    pub calls: f64,
    /// Those that go on while other steps are done.
    pub under_way: f64,
    /// Moving and combining what has come.
    pub moving_ms: f64,
    /// Waiting for others.
    pub waiting_ms: f64,
}

/// Milliseconds of a run on a device.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DeviceSpent {
    /// The device.
    pub device: u32,
    /// In steps.
    pub ms: f64,
    /// In steps that do not communicate.
    pub computing_ms: f64,
    /// Moving and combining what has come.
    pub moving_ms: f64,
    /// Waiting for others.
    pub waiting_ms: f64,
}

/// What some steps took, added up: nanoseconds, and what they did.
#[derive(Clone, Copy, Default)]
struct Sum {
    calls: f64,
    ns: f64,
    cost: Cost,
    /// By the roofline.
    least_ns: f64,
}

impl Sum {
    fn add(&mut self, other: &Sum) {
        self.calls += other.calls;
        self.ns += other.ns;
        self.cost.flops += other.cost.flops;
        self.cost.bytes += other.cost.bytes;
        self.least_ns += other.least_ns;
    }

    /// As one of `devices` devices has it, in a run of `run_ms`.
    fn spent(&self, op: &str, devices: f64, run_ms: f64) -> Spent {
        let (ms, over) = (self.ns / devices / 1e6, |x: f64, y: f64| if y > 0.0 { x / y } else { 0.0 });
        Spent {
            op: op.into(),
            calls: self.calls / devices,
            ms,
            percent: 100.0 * over(ms, run_ms),
            flops: self.cost.flops / devices,
            bytes: self.cost.bytes / devices,
            // Per nanosecond.
            gflops_per_second: over(self.cost.flops, self.ns),
            gb_per_second: over(self.cost.bytes, self.ns),
            roofline: over(self.least_ns, self.ns),
        }
    }
}

impl CollectiveSpent {
    fn new(op: &str) -> CollectiveSpent {
        CollectiveSpent { op: op.into(), calls: 0.0, under_way: 0.0, moving_ms: 0.0, waiting_ms: 0.0 }
    }

    fn ms(&self) -> f64 {
        self.moving_ms + self.waiting_ms
    }
}

fn communicates(step: &Step) -> bool {
    match step.work {
        Work::Exchange(_) | Work::AllReduce(_) | Work::Combine(_) | Work::Finish(_) => true,
        Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) | Work::Band(_) | Work::Join(_) => false,
    }
}

/// Nanoseconds that a step takes at the least on a device.
fn least_ns(step: &Step, cost: Cost, device: &DeviceProfile) -> f64 {
    let flops = if step.dtype() == DType::Bf16 { device.bf16_flops } else { device.f32_flops };
    let time = |n: f64, speed: f64| if speed > 0.0 { 1e9 * n / speed } else { 0.0 };
    time(cost.flops, flops).max(time(cost.bytes, device.memory_bytes))
}

impl Profile {
    /// Made of what all devices of a plan measured, and of the session's clock for each function.
    ///
    /// # Errors
    /// Devices whose numbers are not those of the plan.
    pub(crate) fn new(
        plan: &ProgramPlan,
        clocks: &[Clock],
        mut measured: Vec<DeviceProfile>,
    ) -> Result<Profile, Failure> {
        measured.sort_by_key(|d| d.device);
        let devices = plan.mesh.size();
        if !measured.iter().map(|d| d.device as usize).eq(0..devices) {
            return Err(Failure::Mesh("C0042: not every device has told how long its steps took, once".into()));
        }
        let mean = |f: fn(&DeviceProfile) -> f64| measured.iter().map(f).sum::<f64>() / devices as f64 / 1e9;
        let mut functions = Vec::new();
        for ((name, plans), clock) in plan.functions.iter().zip(clocks) {
            functions.extend(FunctionProfile::new(name, plans, *clock, &measured)?);
        }
        functions.sort_by(|a, b| (b.ms * b.runs as f64).total_cmp(&(a.ms * a.runs as f64)));
        Ok(Profile {
            mesh: plan.mesh.to_string(),
            devices,
            f32_gflops_per_second: mean(|d| d.f32_flops),
            bf16_gflops_per_second: mean(|d| d.bf16_flops),
            memory_gb_per_second: mean(|d| d.memory_bytes),
            functions,
        })
    }

    /// As tables for people.
    pub fn text(&self) -> String {
        let mut out = format!(
            "a device of {}: {:.1} GFLOP/s in products of f32, {:.1} of bf16, {:.1} GB/s of memory, at the most\n",
            self.devices, self.f32_gflops_per_second, self.bf16_gflops_per_second, self.memory_gb_per_second
        );
        if self.functions.is_empty() {
            out += "nothing ran more than once: a function's first run is left out of its profile\n";
        }
        self.functions.iter().for_each(|f| f.write(&mut out));
        out
    }
}

impl FunctionProfile {
    /// None for a function that did not run twice.
    fn new(
        name: &Name,
        plans: &[DevicePlan],
        clock: Clock,
        measured: &[DeviceProfile],
    ) -> Result<Option<FunctionProfile>, Failure> {
        let of = |d: &DeviceProfile| d.functions.iter().find(|t| *t.function == **name).cloned();
        let times: Option<Vec<FunctionTimes>> = measured.iter().map(of).collect();
        let Some(times) = times.filter(|_| clock.runs > 1) else { return Ok(None) };
        let devices = plans.len() as f64;
        let ms = clock.time.as_secs_f64() * 1e3 / (clock.runs - 1) as f64;
        let mut ops: BTreeMap<&str, Sum> = BTreeMap::new();
        // Steps of one node that do the same are one: a halo of each input.
        let mut steps: BTreeMap<(NodeId, &str), (Sum, &Step)> = BTreeMap::new();
        let mut kinds: BTreeMap<&str, CollectiveSpent> = BTreeMap::new();
        let mut by_device = Vec::new();
        for ((plan, times), device) in plans.iter().zip(&times).zip(measured) {
            let count = plan.steps.len();
            if times.runs == 0 || times.spent_ns.len() != count || times.waited_ns.len() != count {
                let text = format!("C0042: device {} has run another plan of `{name}`", device.device);
                return Err(Failure::Mesh(text));
            }
            let (mut all, mut communicated, mut waited) = (0.0, 0.0, 0.0);
            for (step, (spent, waiting)) in plan.steps.iter().zip(times.spent_ns.iter().zip(&times.waited_ns)) {
                let (ns, cost) = (*spent as f64 / times.runs as f64, step.cost());
                // A collective is called where it begins.
                let later = step.work.under_way().is_some() && !step.work.begins();
                let calls = if later { 0.0 } else { 1.0 };
                let sum = Sum { calls, ns, cost, least_ns: least_ns(step, cost, device) };
                ops.entry(step.class()).or_default().add(&sum);
                let of_step = steps.entry((step.label.node, step.class()));
                of_step.or_insert((Sum::default(), step)).0.add(&sum);
                all += ns / 1e6;
                if communicates(step) {
                    let waiting_ms = (*waiting as f64 / times.runs as f64).min(ns) / 1e6;
                    communicated += ns / 1e6;
                    waited += waiting_ms;
                    let of = kinds.entry(step.class()).or_insert_with(|| CollectiveSpent::new(step.class()));
                    of.calls += calls / devices;
                    of.under_way += f64::from(u8::from(step.work.begins())) / devices;
                    of.moving_ms += (ns / 1e6 - waiting_ms) / devices;
                    of.waiting_ms += waiting_ms / devices;
                }
            }
            by_device.push(DeviceSpent {
                device: device.device,
                ms: all,
                computing_ms: all - communicated,
                moving_ms: communicated - waited,
                waiting_ms: waited,
            });
        }
        let mean = |f: fn(&DeviceSpent) -> f64| by_device.iter().map(f).sum::<f64>() / devices;
        let (moving_ms, waiting_ms) = (mean(|d| d.moving_ms), mean(|d| d.waiting_ms));
        let communicated = moving_ms + waiting_ms;
        let mut kinds: Vec<CollectiveSpent> = kinds.into_values().collect();
        kinds.sort_by(|a, b| b.ms().total_cmp(&a.ms()));
        let mut ops: Vec<Spent> = ops.iter().map(|(op, sum)| sum.spent(op, devices, ms)).collect();
        let step = |((_, op), (sum, step)): (&(NodeId, &str), &(Sum, &Step))| StepSpent {
            spent: sum.spent(op, devices, ms),
            extent: step.extent(),
            scope: step.label.scope.to_string(),
            place: step.label.place.to_string(),
        };
        let mut steps: Vec<StepSpent> = steps.iter().map(step).collect();
        ops.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        steps.sort_by(|a, b| b.spent.ms.total_cmp(&a.spent.ms));
        Ok(Some(FunctionProfile {
            function: name.to_string(),
            runs: clock.runs - 1,
            ms,
            outside_ms: ms - mean(|d| d.ms),
            ops,
            steps,
            communication: Communication { ms: communicated, moving_ms, waiting_ms, exposed_ms: communicated, kinds },
            by_device,
        }))
    }

    fn write(&self, out: &mut String) {
        let per_run = |ms: f64| format!("{ms:.2}");
        let percent = |ms: f64| format!("{:.1}", if self.ms > 0.0 { 100.0 * ms / self.ms } else { 0.0 });
        let _ = writeln!(
            out,
            "\nprofile of the function `{}`: {} ms a run, the mean of {} after the first",
            self.function,
            per_run(self.ms),
            self.runs
        );
        let speeds = |s: &Spent| {
            let [flops, bytes] = [s.gflops_per_second, s.gb_per_second].map(|v| format!("{v:.1}"));
            [flops, bytes, format!("{:.0} %", 100.0 * s.roofline)]
        };
        let mut table = Table::default();
        table.row([&"op", &"calls", &"ms", &"%", &"MFLOP", &"MB", &"GFLOP/s", &"GB/s", &"of roofline"]);
        for s in &self.ops {
            let [mflop, mb] = [s.flops, s.bytes].map(|n| format!("{:.1}", n / 1e6));
            let [flops, bytes, share] = speeds(s);
            table.row([&s.op, &s.calls, &per_run(s.ms), &percent(s.ms), &mflop, &mb, &flops, &bytes, &share]);
        }
        let (ms, share) = (per_run(self.outside_ms.max(0.0)), percent(self.outside_ms.max(0.0)));
        table.row([&"outside of steps", &"", &ms, &share, &"", &"", &"", &"", &""]);
        table.write(out);

        let _ = writeln!(out, "\nsteps that take longest");
        let mut table = Table::default();
        table.row([&"op", &"scope", &"ms", &"%", &"GFLOP/s", &"GB/s", &"of roofline", &"place", &"extent"]);
        for StepSpent { spent: s, extent, scope, place } in self.steps.iter().take(LISTED) {
            let [flops, bytes, share] = speeds(s);
            table.row([&s.op, scope, &per_run(s.ms), &percent(s.ms), &flops, &bytes, &share, place, extent]);
        }
        table.write(out);

        let c = &self.communication;
        let _ = writeln!(
            out,
            "\ncommunication: {} ms a run ({} %), {} moving and {} waiting, exposed: no other step was done meanwhile",
            per_run(c.ms),
            percent(c.ms),
            per_run(c.moving_ms),
            per_run(c.waiting_ms)
        );
        let mut table = Table::default();
        table.row([&"collective", &"calls", &"under way beside other steps", &"moving", &"waiting"]);
        for k in &c.kinds {
            table.row([&k.op, &k.calls, &k.under_way, &per_run(k.moving_ms), &per_run(k.waiting_ms)]);
        }
        table.write(out);
        if self.by_device.len() < 2 {
            return;
        }
        let columns: [fn(&DeviceSpent) -> f64; 4] = [|d| d.ms, |d| d.computing_ms, |d| d.moving_ms, |d| d.waiting_ms];
        let row = |f: fn(&[f64]) -> f64| {
            columns.map(|column| per_run(f(&self.by_device.iter().map(column).collect::<Vec<_>>())))
        };
        let mut table = Table::default();
        table.row([&"devices", &"ms in steps", &"computing", &"moving", &"waiting"]);
        let rows: [(&str, fn(&[f64]) -> f64); 3] = [
            ("least", |v| v.iter().copied().fold(f64::INFINITY, f64::min)),
            ("mean", |v| v.iter().sum::<f64>() / v.len() as f64),
            ("most", |v| v.iter().copied().fold(0.0, f64::max)),
        ];
        for (name, f) in rows {
            let [all, computing, moving, waiting] = row(f);
            table.row([&name, &all, &computing, &moving, &waiting]);
        }
        table.write(out);
    }
}
