//! A plan as text for people.

use super::step::Work;
use super::{DevicePlan, ProgramPlan};
use crate::dim::Name;
use crate::layout::Placement;
use crate::program::{Function, Program};
use std::collections::BTreeMap;
use std::fmt::Write;

/// `1.5 MiB`.
pub fn bytes(n: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// The first two parts of a scope, `encoder.0/conv.1`: what people call a layer.
fn layer(scope: &str) -> String {
    let parts: Vec<&str> = scope.split('/').take(2).collect();
    if scope.is_empty() { "(top)".into() } else { parts.join("/") }
}

#[derive(Default)]
struct Traffic {
    steps: usize,
    /// Bytes that all devices send.
    sent: usize,
    /// Messages that all devices send.
    messages: usize,
}

fn traffic(work: &Work) -> Option<(usize, usize)> {
    match work {
        Work::Exchange(e) => Some((e.sends.iter().map(|m| m.bytes).sum(), e.sends.len())),
        Work::AllReduce(a) => {
            let others = a.devices.len() - 1;
            Some((a.sent_bytes(), others * (a.nodes[a.me] + usize::from(a.segmented))))
        }
        Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) => None,
    }
}

impl ProgramPlan {
    /// Devices, layout of variables and activations, communication, memory over time and FLOPs of a function.
    pub fn describe(&self, program: &Program, function: &str) -> String {
        let mut out = String::new();
        let key = Name::from(function);
        let (Some(f), Some(devices)) = (program.functions.get(&key), self.functions.get(&key)) else { return out };
        let _ = writeln!(out, "function {function}\nmesh     {} ({} devices)", self.mesh, self.mesh.size());
        let _ = writeln!(out, "layout   {}", self.layout);
        self.variables_text(program, &mut out);
        self.activations_text(program, f, &mut out);
        communication_text(devices, &mut out);
        self.memory_text(&key, devices, &mut out);
        let whole = f.flops();
        let products: u64 = f
            .nodes
            .iter()
            .filter(|n| {
                let name = n.op.op().name();
                name.starts_with("conv") || name == "contract"
            })
            .map(|n| n.op.op().flops(&f.input_types(n), &n.ty))
            .sum();
        let _ = writeln!(
            out,
            "\nFLOPs a step: {:.3} G, of which products {:.3} G ({products})",
            whole as f64 / 1e9,
            products as f64 / 1e9
        );
        out
    }

    fn variables_text(&self, program: &Program, out: &mut String) {
        let parameters = program.parameters();
        let all: usize = program.variables.iter().map(|v| v.ty.bytes()).sum();
        let _ = writeln!(
            out,
            "\nvariables: {}, {parameters} trained parameters, {} in all",
            program.variables.len(),
            bytes(all)
        );
        for (i, v) in program.variables.iter().enumerate().filter(|(_, v)| v.trainable) {
            let (part, buffer) = &self.variables[0][i];
            let split = part.region.shape() != v.ty.shape();
            let held = if split { format!("device 0 holds {}", part.region) } else { "whole on every device".into() };
            let _ = writeln!(out, "  {:34} {:44} {:>10}  {held}", v.name, v.ty.to_string(), bytes(buffer.bytes));
        }
    }

    fn activations_text(&self, program: &Program, f: &Function, out: &mut String) {
        let placement = Placement { mesh: &self.mesh, layout: &self.layout, chunking: &program.chunking };
        let _ = writeln!(out, "\nactivations (largest of each layer):");
        let mut largest: Vec<(String, &crate::graph::Node)> = Vec::new();
        for n in f.nodes.iter().filter(|n| !n.ty.dims.is_empty() && !n.scope.starts_with("optimizer")) {
            let name = layer(&n.scope);
            match largest.iter_mut().find(|(l, _)| *l == name) {
                Some((_, old)) if old.ty.bytes() >= n.ty.bytes() => {}
                Some((_, old)) => *old = n,
                None => largest.push((name, n)),
            }
        }
        for (name, n) in largest {
            let Ok(spec) = placement.spec("", &n.ty, n.layout.as_deref(), &[], n.place) else { continue };
            let split: Vec<String> =
                n.ty.dims
                    .iter()
                    .zip(&spec)
                    .filter_map(|(d, a)| a.map(|a| format!("{}:{}", d.name, self.mesh.axes()[a].0)))
                    .collect();
            let held: Vec<usize> =
                placement.regions(&n.ty, &spec).iter().map(|r| r.elements() * n.ty.dtype.bytes()).collect();
            let (least, most) = (held.iter().min().unwrap_or(&0), held.iter().max().unwrap_or(&0));
            let range = if least == most { bytes(*most) } else { format!("{} to {}", bytes(*least), bytes(*most)) };
            let how = if split.is_empty() { "whole".into() } else { split.join(",") };
            let _ = writeln!(out, "  {name:24} {:54} {how:12} {range} a device", n.ty.to_string());
        }
    }

    fn memory_text(&self, key: &Name, devices: &[DevicePlan], out: &mut String) {
        let _ = writeln!(out, "\nmemory:");
        for (d, plan) in devices.iter().enumerate() {
            let _ = writeln!(
                out,
                "  device {d}: {} predicted peak ({} arena of this function, {} workspaces), {} steps",
                bytes(self.peak_bytes(d)),
                bytes(plan.arena_bytes),
                bytes(self.workspace_bytes),
                plan.steps.len()
            );
        }
        let Some(timeline) = self.timelines.get(key).and_then(|t| t.first()) else { return };
        let most = timeline.alive.iter().copied().max().unwrap_or(0);
        let _ = writeln!(out, "  device 0 over time (its peak, {}, is full height):", bytes(most));
        let bars = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let columns = timeline.alive.len().clamp(1, 100);
        let line: String = (0..columns)
            .map(|c| {
                let range = c * timeline.alive.len() / columns..((c + 1) * timeline.alive.len() / columns).max(1);
                let top = timeline.alive.get(range).and_then(|r| r.iter().max().copied()).unwrap_or(0);
                bars[(top * (bars.len() - 1)).checked_div(most).unwrap_or(0)]
            })
            .collect();
        let _ = writeln!(out, "  {line}\n  alive at the peak:");
        for (name, n, place) in timeline.largest.iter().take(8) {
            let _ = writeln!(out, "    {:>10}  {name}  ({place})", bytes(*n));
        }
    }
}

fn communication_text(devices: &[DevicePlan], out: &mut String) {
    let mut by_kind: BTreeMap<Name, Traffic> = BTreeMap::new();
    let mut by_layer: Vec<(String, Traffic)> = Vec::new();
    for (d, plan) in devices.iter().enumerate() {
        for s in &plan.steps {
            let Some((sent, messages)) = traffic(&s.work) else { continue };
            let name = format!("{} {}", layer(&s.label.scope), s.label.op);
            if !by_layer.iter().any(|(n, _)| *n == name) {
                by_layer.push((name.clone(), Traffic::default()));
            }
            let row = by_layer.iter_mut().find(|(n, _)| *n == name).map(|(_, t)| t);
            for t in [Some(by_kind.entry(s.label.op.clone()).or_default()), row].into_iter().flatten() {
                t.steps += usize::from(d == 0);
                t.sent += sent;
                t.messages += messages;
            }
        }
    }
    let total: usize = by_kind.values().map(|t| t.sent).sum();
    let _ = writeln!(out, "\ncommunication a step: {} sent in all", bytes(total));
    let line = |out: &mut String, name: &str, t: &Traffic| {
        let _ = writeln!(out, "  {name:44} {:>4} steps {:>7} messages {:>10}", t.steps, t.messages, bytes(t.sent));
    };
    by_kind.iter().for_each(|(n, t)| line(out, n, t));
    if !by_layer.is_empty() {
        let _ = writeln!(out, "by layer:");
        by_layer.iter().for_each(|(n, t)| line(out, n, t));
    }
}
