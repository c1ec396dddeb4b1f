//! A plan as text for people.

use super::step::{Segments, Work};
use super::{DevicePlan, ProgramPlan, Timeline};
use crate::dim::{Name, Type};
use crate::error::Place;
use crate::graph::Node;
use crate::layout::{AT, Mesh};
use crate::placement::{Placement, Spec, Subject};
use crate::program::{Function, Program};
use std::collections::BTreeMap;
use std::fmt::{Display, Write};

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

/// `1.5 ms`.
pub fn seconds(t: f64) -> String {
    let units = [("s", 1.0), ("ms", 1e-3), ("us", 1e-6)];
    let (unit, size) = units.into_iter().find(|(_, size)| t >= *size).unwrap_or(("us", 1e-6));
    format!("{:.1} {unit}", t / size)
}

/// `5,600,960`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `57.1 TFLOP`.
pub fn flops(n: u64) -> String {
    let (unit, size) = [("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)]
        .into_iter()
        .find(|(_, size)| n as f64 >= *size)
        .unwrap_or(("FLOP", 1.0));
    format!("{:.1} {unit}", n as f64 / size)
}

/// Devices that are listed one by one; of more, only these.
const LISTED: usize = 16;
/// Tensors that are listed of those alive at a peak.
const ALIVE: usize = 10;

/// The first two parts of a scope, `encoder.0/conv.1`: what people call a layer.
fn layer(scope: &str) -> String {
    let parts: Vec<&str> = scope.split('/').take(2).collect();
    if scope.is_empty() { "(top)".into() } else { parts.join("/") }
}

/// The first part of a scope, `encoder.0`: what people call a stage, a block or a level.
pub(super) fn stage(scope: &str) -> String {
    if scope.is_empty() { "(top)".into() } else { scope.split('/').take(1).collect() }
}

/// Rows in columns; numbers (and what follows them, a unit) to the right.
#[derive(Default)]
pub struct Table(Vec<Vec<String>>);

impl Table {
    /// Adds a row; the first one is the headings.
    pub fn row<const N: usize>(&mut self, cells: [&dyn Display; N]) {
        self.0.push(cells.map(|c| c.to_string()).into());
    }

    /// Whether it has no row.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes it, two spaces in.
    pub fn write(&self, out: &mut String) {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let number = |c: &str| c.starts_with(|c: char| c.is_ascii_digit());
        let width = |i: usize| self.0.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // A heading stands where its column's cells do.
        let right: Vec<bool> = (0..columns)
            .map(|i| {
                let mut cells = self.0.iter().skip(1).filter_map(|r| r.get(i)).filter(|c| !c.is_empty()).peekable();
                cells.peek().is_some() && cells.all(|c| number(c))
            })
            .collect();
        for row in &self.0 {
            let mut line = String::new();
            for (i, cell) in row.iter().enumerate() {
                let width = widths[i];
                let _ = if right[i] { write!(line, "  {cell:>width$}") } else { write!(line, "  {cell:width$}") };
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
}

/// What is sent.
#[derive(Clone, Default)]
struct Traffic {
    /// Steps of a device.
    steps: usize,
    messages: usize,
    /// Bytes by sending device.
    sent: Vec<usize>,
}

impl Traffic {
    fn add(&mut self, device: usize, sent: usize, messages: usize) {
        self.steps += usize::from(device == 0);
        self.messages += messages;
        self.sent.resize(self.sent.len().max(device + 1), 0);
        self.sent[device] += sent;
    }
    fn all(&self) -> usize {
        self.sent.iter().sum()
    }
    fn most(&self) -> usize {
        self.sent.iter().copied().max().unwrap_or(0)
    }
}

/// Bytes and messages that a step sends; None for one within a device.
fn traffic(work: &Work) -> Option<(usize, usize)> {
    match work {
        Work::Exchange(e) => Some((e.sends.iter().map(|m| m.bytes).sum(), e.sends.len())),
        Work::AllReduce(a) => {
            let others = a.devices.len() - 1;
            Some((a.sent_bytes(), others * (a.nodes[a.me] + usize::from(a.segments == Segments::Shared))))
        }
        // What was begun is counted there.
        Work::Combine(_) | Work::Finish(_) => None,
        Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) | Work::Band(_) | Work::Join(_) => None,
    }
}

/// How a tensor is split: `x:x,y:y`, or `whole`.
pub(super) fn split(mesh: &Mesh, ty: &Type, spec: &Spec) -> String {
    let over = |axes: &[usize]| axes.iter().map(|a| &*mesh.axes()[*a].0).collect::<Vec<_>>().join("+");
    let split = ty.dims.iter().zip(&spec.dims).filter(|(_, axes)| !axes.is_empty());
    let split = split.map(|(d, axes)| format!("{}:{}", d.name, over(axes)));
    let stage = spec.stage.iter().map(|(axis, at)| format!("{AT}{}:{at}", mesh.axes()[*axis].0));
    let rules: Vec<String> = stage.chain(split).collect();
    if rules.is_empty() { "whole".into() } else { rules.join(",") }
}

/// The largest activation of each stage of a function, in the order of the program.
pub(super) fn largest<'a>(program: &Program, f: &'a Function) -> Vec<(String, &'a Node)> {
    let mut largest: Vec<(String, &Node)> = Vec::new();
    // Tensors of a variable's type are variables, their gradients and slots.
    let own = |n: &&Node| !n.ty.dims.is_empty() && !program.variables.iter().any(|v| v.ty.dims == n.ty.dims);
    for n in f.nodes.iter().filter(|n| !n.scope.is_empty()).filter(own) {
        let name = stage(&n.scope);
        match largest.iter_mut().find(|(l, _)| *l == name) {
            Some((_, old)) if old.ty.bytes() >= n.ty.bytes() => {}
            Some((_, old)) => *old = n,
            None => largest.push((name, n)),
        }
    }
    largest
}

impl ProgramPlan {
    /// Devices, layout of variables and activations, communication, memory over time and FLOPs of a function.
    pub fn describe(&self, program: &Program, function: &str) -> String {
        let mut out = String::new();
        let key = Name::from(function);
        let (Some(f), Some(devices)) = (program.functions.get(&key), self.functions.get(&key)) else { return out };
        let _ = writeln!(out, "plan of the function `{function}`");
        self.devices_text(devices, &mut out);
        self.variables_text(program, &mut out);
        self.activations_text(program, f, &mut out);
        communication_text(f, devices, &mut out);
        self.memory_text(&key, devices, &mut out);
        flops_text(f, &mut out);
        out
    }

    fn devices_text(&self, devices: &[DevicePlan], out: &mut String) {
        let _ = writeln!(out, "\ndevices: {}", self.mesh.size());
        let layout = if self.layout.is_empty() { "everything whole".into() } else { self.layout.to_string() };
        let _ = writeln!(out, "  mesh    {}\n  layout  {layout}", self.mesh);
        let biggest = |d: &DevicePlan| {
            let by_size = |(_, part, _): &&(Name, super::Part, super::Buffer)| part.ty.bytes();
            d.inputs.iter().max_by_key(by_size).map(|(n, part, _)| format!("{n} {}", part.region))
        };
        let mut table = Table::default();
        table.row([&"device", &"at", &"block of the largest feed"]);
        for (d, plan) in devices.iter().enumerate().take(LISTED) {
            let at = self.mesh.axes().iter().zip(self.mesh.coordinates(d)).map(|((n, _), i)| format!("{n}={i}"));
            table.row([&d, &at.collect::<Vec<_>>().join(","), &biggest(plan).unwrap_or_default()]);
        }
        table.write(out);
        if devices.len() > LISTED {
            let _ = writeln!(out, "  .. and {} more", devices.len() - LISTED);
        }
    }

    fn variables_text(&self, program: &Program, out: &mut String) {
        let (trained, others): (Vec<_>, Vec<_>) = program.variables.iter().enumerate().partition(|(_, v)| v.trainable);
        let size = |list: &[(usize, &crate::program::Variable)]| bytes(list.iter().map(|(_, v)| v.ty.bytes()).sum());
        let _ = writeln!(
            out,
            "\nvariables: {} parameters in {} variables ({}); {} more for optimizer and statistics ({})",
            thousands(program.parameters() as u64),
            trained.len(),
            size(&trained),
            others.len(),
            size(&others)
        );
        let mut table = Table::default();
        table.row([&"variable", &"type", &"a device", &"layout"]);
        for (i, v) in trained {
            let (part, buffer) = &self.variables[0][i];
            let split = part.region.shape() != v.ty.shape();
            let held = match split {
                true if part.region.is_empty() => "another stage's".into(),
                true => format!("device 0 holds {}", part.region),
                false => "whole".into(),
            };
            table.row([&v.name, &v.ty, &bytes(buffer.bytes), &held]);
        }
        table.write(out);
    }

    fn activations_text(&self, program: &Program, f: &Function, out: &mut String) {
        let placement = Placement::new(&self.mesh, &self.layout, program);
        let _ = writeln!(out, "\nactivations: the largest of each group of layers");
        let mut table = Table::default();
        table.row([&"group", &"type", &"layout", &"a device, at least", &"at most"]);
        for (name, n) in largest(program, f) {
            let Ok(spec) = placement.spec(&Subject::node(f, n)) else { continue };
            let held: Vec<usize> =
                placement.regions(&n.ty, &spec).iter().map(|r| r.elements() * n.ty.dtype.bytes()).collect();
            let (least, most) = (held.iter().min().unwrap_or(&0), held.iter().max().unwrap_or(&0));
            table.row([&name, &n.ty, &split(&self.mesh, &n.ty, &spec), &bytes(*least), &bytes(*most)]);
        }
        table.write(out);
    }

    fn memory_text(&self, key: &Name, devices: &[DevicePlan], out: &mut String) {
        let peaks: Vec<usize> = (0..devices.len()).map(|d| self.peak_bytes(d)).collect();
        let most = peaks.iter().copied().max().unwrap_or(0);
        let _ = writeln!(
            out,
            "\nmemory: {} at most on a device, {} on all {} together",
            bytes(most),
            bytes(peaks.iter().sum()),
            devices.len()
        );
        let Some(timelines) = self.timelines.get(key) else { return };
        // Devices of one column of numbers are one row.
        let variables = |d: usize| self.variables[d].iter().map(|(_, b)| b.bytes).sum::<usize>();
        let numbers = |d: usize| (peaks[d], variables(d), devices[d].arena_bytes, timelines[d].fullest);
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for d in 0..devices.len() {
            match groups.iter_mut().find(|g| numbers(g[0]) == numbers(d)) {
                Some(g) => g.push(d),
                None => groups.push(vec![d]),
            }
        }
        let mut table = Table::default();
        table.row([&"devices", &"peak", &"variables", &"others", &"gaps", &"workspaces", &"fullest at"]);
        for g in &groups {
            let (d, t) = (g[0], &timelines[g[0]]);
            let alive = t.alive.get(t.fullest).copied().unwrap_or(0);
            let at = match devices[d].steps.get(t.fullest) {
                Some(s) => format!(
                    "step {} of {}: {} of {}",
                    t.fullest,
                    devices[d].steps.len(),
                    s.label.op,
                    layer(&s.label.scope)
                ),
                None => "the end, where variables are set".into(),
            };
            let list: Vec<String> = g.iter().take(LISTED).map(usize::to_string).collect();
            let more = if g.len() > LISTED { format!(", {} more", g.len() - LISTED) } else { String::new() };
            table.row([
                &format!("{}{more}", list.join(" ")),
                &bytes(peaks[d]),
                &bytes(variables(d)),
                &bytes(alive.saturating_sub(variables(d))),
                &bytes(self.arena_bytes(d).saturating_sub(alive)),
                &bytes(self.workspace_bytes),
                &at,
            ]);
        }
        table.write(out);
        let arenas: Vec<String> = self
            .functions
            .iter()
            .map(|(n, f)| format!("{n} {}", bytes(f.iter().map(|d| d.arena_bytes).max().unwrap_or(0))))
            .collect();
        let _ = writeln!(out, "  A device has one arena, for its most demanding function: {}.", arenas.join(", "));
        groups.sort_by_key(|g| std::cmp::Reverse(peaks[g[0]]));
        for (i, g) in groups.iter().enumerate().take(LISTED) {
            let t = &timelines[g[0]];
            if i == 0 {
                let _ = writeln!(out, "  device {} over time; full height is its peak:\n  {}", g[0], bars(t));
            }
            let _ = writeln!(out, "  device {}, alive at its fullest step:", g[0]);
            alive_text(t, variables(g[0]), if i == 0 { ALIVE } else { 3 }, out);
        }
    }
}

/// Memory over time, as a line of blocks.
fn bars(t: &Timeline) -> String {
    let most = t.alive.iter().copied().max().unwrap_or(0);
    let blocks = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = t.alive.len().clamp(1, 100);
    (0..columns)
        .map(|c| {
            let range = c * t.alive.len() / columns..((c + 1) * t.alive.len() / columns).max(1);
            let top = t.alive.get(range).and_then(|r| r.iter().max().copied()).unwrap_or(0);
            blocks[(top * (blocks.len() - 1)).checked_div(most).unwrap_or(0)]
        })
        .collect()
}

/// What is alive at the fullest step: tensors of one name and place together.
fn alive_text(t: &Timeline, variables: usize, rows: usize, out: &mut String) {
    let mut list: Vec<(usize, usize, String, Option<Place>)> = Vec::new();
    for a in t.largest.iter().filter(|a| !a.variable) {
        match list.iter_mut().find(|(_, _, name, place)| *name == a.name && *place == Some(a.place)) {
            Some((n, count, _, _)) => (*n, *count) = (*n + a.bytes, *count + 1),
            None => list.push((a.bytes, 1, a.name.clone(), Some(a.place))),
        }
    }
    list.push((variables, 1, "all variables".into(), None));
    list.sort_by_key(|(n, ..)| std::cmp::Reverse(*n));
    let mut table = Table::default();
    table.row([&"bytes", &"tensor", &"place"]);
    for (n, count, name, place) in list.iter().take(rows) {
        let times = if *count > 1 { format!(", {count} of them") } else { String::new() };
        table.row([&bytes(*n), &format!("{name}{times}"), &place.map(|p| p.to_string()).unwrap_or_default()]);
    }
    let rest: usize = list.iter().skip(rows).map(|(n, ..)| n).sum();
    if rest > 0 {
        table.row([&bytes(rest), &format!("in {} others", list.len() - rows), &""]);
    }
    table.write(out);
}

fn communication_text(f: &Function, devices: &[DevicePlan], out: &mut String) {
    let mut all = Traffic::default();
    let mut by_kind: BTreeMap<Name, Traffic> = BTreeMap::new();
    // By stage, then by layer, pattern and what it is for; both in the order of the program.
    let mut by_stage: Vec<(String, Traffic, Vec<(String, Traffic)>)> = Vec::new();
    for (d, plan) in devices.iter().enumerate() {
        for s in &plan.steps {
            let Some((sent, messages)) = traffic(&s.work) else { continue };
            let group = stage(&s.label.scope);
            let reason = f.node(s.label.node).op.op().name();
            let name = format!("{}: {} for {reason}", layer(&s.label.scope), s.label.op);
            let at = by_stage.iter().position(|(n, ..)| *n == group).unwrap_or_else(|| {
                by_stage.push((group, Traffic::default(), vec![]));
                by_stage.len() - 1
            });
            let (_, sum, rows) = &mut by_stage[at];
            let row = rows.iter().position(|(n, _)| *n == name).unwrap_or_else(|| {
                rows.push((name, Traffic::default()));
                rows.len() - 1
            });
            for t in [&mut all, by_kind.entry(s.label.op.clone()).or_default(), sum, &mut rows[row].1] {
                t.add(d, sent, messages);
            }
        }
    }
    let _ = writeln!(
        out,
        "\ncommunication: {} a step sent by all devices, {} at most by one",
        bytes(all.all()),
        bytes(all.most())
    );
    if by_kind.is_empty() {
        return;
    }
    let mut table = Table::default();
    let line = |table: &mut Table, name: &str, t: &Traffic| {
        let (steps, messages) = (thousands(t.steps as u64), thousands(t.messages as u64));
        table.row([&name, &steps, &messages, &bytes(t.all()), &bytes(t.most())]);
    };
    table.row([&"pattern", &"steps", &"messages", &"sent by all", &"most by one"]);
    by_kind.iter().for_each(|(n, t)| line(&mut table, n, t));
    let halos: Vec<(String, Traffic)> = by_stage
        .iter()
        .filter_map(|(group, _, rows)| {
            let mut sum = Traffic::default();
            for (_, t) in rows.iter().filter(|(n, _)| n.contains(": halo for ")) {
                (sum.steps, sum.messages) = (sum.steps + t.steps, sum.messages + t.messages);
                t.sent.iter().enumerate().for_each(|(d, b)| {
                    sum.sent.resize(sum.sent.len().max(d + 1), 0);
                    sum.sent[d] += b;
                });
            }
            (sum.steps > 0).then(|| (format!("halo of {group}"), sum))
        })
        .collect();
    table.row([&"", &"", &"", &"", &""]);
    halos.iter().for_each(|(n, t)| line(&mut table, n, t));
    table.row([&"", &"", &"", &"", &""]);
    for (group, sum, rows) in &by_stage {
        line(&mut table, &format!("{group} in all"), sum);
        rows.iter().for_each(|(n, t)| line(&mut table, &format!("  {n}"), t));
    }
    table.write(out);
}

fn flops_text(f: &Function, out: &mut String) {
    let mut by_op: BTreeMap<&str, u64> = BTreeMap::new();
    let mut rest = 0;
    for n in &f.nodes {
        let flops = n.op.op().flops(&f.input_types(n), &n.ty);
        if n.op.is_product() { *by_op.entry(n.op.op().name()).or_default() += flops } else { rest += flops }
    }
    let products: u64 = by_op.values().sum();
    let _ = writeln!(out, "\nFLOPs: {} a step, of which {} in products", flops(f.flops()), flops(products));
    let mut table = Table::default();
    table.row([&"op", &"FLOPs"]);
    by_op.iter().for_each(|(n, v)| table.row([n, &thousands(*v)]));
    table.row([&"products in all", &thousands(products)]);
    table.row([&"everything else", &thousands(rest)]);
    table.write(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!([0, 999, 1000, 5_600_960].map(thousands), ["0", "999", "1,000", "5,600,960"]);
        assert_eq!([1023, 1536, 3 << 30].map(bytes), ["1023 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!([0.0, 2.5e-6, 0.0031, 75.0].map(seconds), ["0.0 us", "2.5 us", "3.1 ms", "75.0 s"]);
    }

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let mut t = Table::default();
        t.row([&"name", &"bytes"]);
        t.row([&"a", &"1.5 KiB"]);
        t.row([&"longer", &"12 B"]);
        let mut out = String::new();
        t.write(&mut out);
        assert_eq!(out, "  name      bytes\n  a       1.5 KiB\n  longer     12 B\n");
    }
}
