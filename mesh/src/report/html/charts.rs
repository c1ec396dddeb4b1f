//! Bars and lines: levels, memory over time, communication, cost.

use super::escape;
use crate::plan::describe::{bytes, flops, thousands};
use crate::report::{MemoryReport, Report};
use std::fmt::Write;

/// A row of bars: a name, and for each column a value with its text.
struct Bars {
    name: String,
    tip: String,
    values: Vec<(f64, String)>,
}

/// Bars beside each other, each column by its own largest value.
fn bars(columns: &[&str], rows: &[Bars]) -> String {
    let mut out = String::from("<table class=\"bars\">\n<thead><tr><th></th>");
    columns.iter().for_each(|c| out += &format!("<th>{}</th>", escape(c)));
    out += "</tr></thead>\n<tbody>\n";
    let most = |i: usize| rows.iter().map(|r| r.values[i].0).fold(0.0, f64::max);
    let most: Vec<f64> = (0..columns.len()).map(most).collect();
    for r in rows {
        let _ = write!(out, "<tr data-tip=\"{}\"><td>{}</td>", escape(&r.tip), escape(&r.name));
        for (i, (value, text)) in r.values.iter().enumerate() {
            let share = if most[i] > 0.0 { 100.0 * value / most[i] } else { 0.0 };
            let _ =
                write!(out, "<td><div class=\"bar b{i}\" style=\"--share:{share:.1}%\"><span>{text}</span></div></td>");
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table>\n"
}

/// By level: the first part of the scope.
pub(super) fn levels(r: &Report) -> String {
    let level = |scope: &str| scope.split('/').next().filter(|s| !s.is_empty()).unwrap_or("(top)").to_string();
    let mut names: Vec<String> = vec![];
    for s in &r.steps {
        if !names.contains(&level(&s.scope)) {
            names.push(level(&s.scope));
        }
    }
    let row = |name: &String| {
        let steps = r.steps.iter().filter(|s| level(&s.scope) == *name);
        let (mut work, mut sent, mut count) = (0.0, 0, 0);
        for s in steps {
            (work, sent, count) = (work + s.flops, sent + s.sent_bytes, count + 1);
        }
        let here = r.tensors.iter().filter(|t| t.kind == "activation" && level(&t.scope) == *name);
        let largest = here.max_by_key(|t| t.bytes);
        let held = largest.map_or(0, |t| t.most_bytes);
        let tip = match largest {
            Some(t) => {
                let dims: Vec<String> = t.dims.iter().map(|d| format!("{}: {}", d.name, d.why)).collect();
                format!("{name}, {count} steps\nlargest activation {}\n{}", t.ty, dims.join("\n"))
            }
            None => format!("{name}, {count} steps"),
        };
        let values = vec![(held as f64, bytes(held)), (work, flops(work as u64)), (sent as f64, bytes(sent))];
        Bars { name: name.clone(), tip, values }
    };
    bars(&["largest activation", "operations", "sent"], &names.iter().map(row).collect::<Vec<_>>())
}

/// By pattern and axes.
pub(super) fn communication(r: &Report) -> String {
    if r.communication.is_empty() {
        return "<p>Nothing is sent.</p>\n".into();
    }
    let row = |t: &crate::report::TrafficReport| Bars {
        name: format!("{} along {}", t.pattern, t.axes),
        tip: format!("{} steps, {} messages of all devices", t.steps, thousands(t.messages as u64)),
        values: vec![
            (t.sent_bytes as f64, bytes(t.sent_bytes)),
            (t.most_bytes as f64, bytes(t.most_bytes)),
            (t.messages as f64, thousands(t.messages as u64)),
        ],
    };
    bars(
        &["of all devices", "of the one that sends most", "messages"],
        &r.communication.iter().map(row).collect::<Vec<_>>(),
    )
}

/// By kind of work.
pub(super) fn cost(r: &Report) -> String {
    let mut sums: Vec<(&str, usize, f64, f64, usize)> = vec![];
    for s in &r.steps {
        let at = sums.iter().position(|(n, ..)| *n == s.class).unwrap_or_else(|| {
            sums.push((&s.class, 0, 0.0, 0.0, 0));
            sums.len() - 1
        });
        let (_, count, work, moved, sent) = &mut sums[at];
        (*count, *work, *moved, *sent) = (*count + 1, *work + s.flops, *moved + s.bytes, *sent + s.sent_bytes);
    }
    sums.sort_by(|a, b| (b.2, b.3).partial_cmp(&(a.2, a.3)).unwrap_or(std::cmp::Ordering::Equal));
    let row = |(name, count, work, moved, sent): &(&str, usize, f64, f64, usize)| Bars {
        name: (*name).into(),
        tip: format!("{count} steps"),
        values: vec![(*work, flops(*work as u64)), (*moved, bytes(*moved as usize)), (*sent as f64, bytes(*sent))],
    };
    bars(&["operations", "bytes of memory", "sent"], &sums.iter().map(row).collect::<Vec<_>>())
}

/// Width and height of a chart.
const SIZE: (f64, f64) = (960.0, 180.0);
/// Stretches of steps that can be pointed at.
const COLUMNS: usize = 240;
/// Devices unlike each other that are drawn.
const DRAWN: usize = 4;

/// Memory over the steps, for each group of devices that are alike.
pub(super) fn memory(r: &Report) -> String {
    let mut groups: Vec<&MemoryReport> = r.memory.iter().collect();
    groups.sort_by_key(|m| std::cmp::Reverse(m.alive_bytes.iter().max().copied()));
    let mut out = String::new();
    for m in groups.iter().take(DRAWN) {
        out += &timeline(r, m);
    }
    if groups.len() > DRAWN {
        let _ = writeln!(out, "<p class=\"note\">and {} more that need less</p>", groups.len() - DRAWN);
    }
    out
}

fn timeline(r: &Report, m: &MemoryReport) -> String {
    let most = m.alive_bytes.iter().copied().max().unwrap_or(0).max(1) as f64;
    let count = m.alive_bytes.len().max(1);
    let variables = r.devices[m.devices[0]].variable_bytes;
    let x = |step: usize| SIZE.0 * step as f64 / count as f64;
    let y = |b: usize| SIZE.1 * (1.0 - b as f64 / most);
    let mut path = format!("M0,{}", SIZE.1);
    for (i, b) in m.alive_bytes.iter().enumerate() {
        let _ = write!(path, " L{:.1},{:.1} L{:.1},{:.1}", x(i), y(*b), x(i + 1), y(*b));
    }
    let _ = write!(path, " L{},{} Z", SIZE.0, SIZE.1);
    let devices: Vec<String> = m.devices.iter().take(8).map(usize::to_string).collect();
    let more = if m.devices.len() > 8 { format!(" and {} more", m.devices.len() - 8) } else { String::new() };
    let mut out = format!(
        "<h3>devices {}{more}: {} at the most</h3>\n<div class=\"scroll\"><svg class=\"timeline\" viewBox=\"0 0 {} {}\" role=\"img\">\n",
        devices.join(", "),
        bytes(most as usize),
        SIZE.0,
        SIZE.1
    );
    let _ = writeln!(out, "<path class=\"alive\" d=\"{path}\"/>");
    let base = y(variables);
    let _ = writeln!(
        out,
        "<rect class=\"variables\" x=\"0\" y=\"{base:.1}\" width=\"{}\" height=\"{:.1}\"/>",
        SIZE.0,
        SIZE.1 - base
    );
    let _ = writeln!(
        out,
        "<line class=\"fullest\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"0\" y2=\"{1}\"/>",
        x(m.fullest),
        SIZE.1
    );
    let columns = count.min(COLUMNS);
    for c in 0..columns {
        let steps = c * count / columns..(c + 1) * count / columns;
        // The fullest step of the stretch stands for it.
        let Some(step) = steps.clone().max_by_key(|s| (m.alive_bytes[*s], std::cmp::Reverse(*s))) else { continue };
        let _ = writeln!(
            out,
            "<rect class=\"hit\" x=\"{:.1}\" y=\"0\" width=\"{:.1}\" height=\"{}\" data-tip=\"{}\"/>",
            x(steps.start),
            x(steps.end) - x(steps.start),
            SIZE.1,
            escape(&alive(r, m, step, variables))
        );
    }
    out + "</svg></div>\n"
}

/// What is alive at a step, the largest first.
fn alive(r: &Report, m: &MemoryReport, step: usize, variables: usize) -> String {
    let what = r.steps.get(step).map_or("the end".into(), |s| format!("{} of {}", s.op, s.scope));
    let mut text =
        format!("step {step}: {what}\n{} alive\n{} in variables", bytes(m.alive_bytes[step]), bytes(variables));
    let mut here: Vec<_> = m.spans.iter().filter(|s| s.from <= step && step <= s.to).collect();
    here.sort_by_key(|s| std::cmp::Reverse(s.bytes));
    for s in here.iter().take(7) {
        let _ = write!(text, "\n{}  {} (steps {} to {})", bytes(s.bytes), s.name, s.from, s.to);
    }
    if here.len() > 7 {
        let _ = write!(text, "\nand {} more", here.len() - 7);
    }
    text
}
