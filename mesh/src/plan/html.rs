//! A plan as a page: one file, with nothing from elsewhere.
//!
//! Everything on it is written here, out of a [`Report`], and escaped; a script only shows what lies under the pointer, from
//! the same report, which the page has as JSON, or a text that stands with an element (`data-tip`), and only by
//! `textContent`. Pictures are drawn in [`draw`].

mod draw;

use super::describe::{bytes, seconds, thousands};
use super::report::{FunctionPlan, Report, Tensor, Time, Traffic};
use crate::lint::Finding;
use std::fmt::Write;

/// Of groups of devices so many have their memory drawn, the fullest first.
const DRAWN: usize = 8;
/// Colors that parts of bars have, in turn.
const COLORS: usize = 6;

/// Text for between tags and in attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // What no page may have.
            c if c.is_control() && !c.is_whitespace() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// JSON for inside a script: nothing in it ends the script or a line of it.
fn in_script(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => _ = write!(out, "\\u{:04x}", c as u32),
            c => out.push(c),
        }
    }
    out
}

/// The page of a report.
pub fn page(title: &str, report: &Report) -> String {
    let mut out = String::new();
    let title = escape(title);
    let _ = writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width\"/>\n<title>Plan of {title}</title>\n\
         <style>{}</style>\n</head>\n<body>\n<h1>Plan of {title}</h1>",
        include_str!("page.css")
    );
    let layout = if report.layout.is_empty() { "everything whole" } else { &report.layout };
    let mut facts = vec![
        ("mesh", report.mesh.clone()),
        ("devices", thousands(report.devices as u64)),
        ("layout", layout.to_string()),
    ];
    facts.extend(report.machine.iter().map(|m| ("machine", m.clone())));
    list(&mut out, &facts);
    for (i, plan) in report.plans.iter().enumerate() {
        function(&mut out, report, i, plan);
    }
    let _ = writeln!(
        out,
        "<pre id=\"tip\" hidden=\"hidden\"></pre>\n<script type=\"application/json\" id=\"report\">{}</script>\n\
         <script>{}</script>\n</body>\n</html>",
        in_script(&report.to_json()),
        include_str!("page.js")
    );
    out
}

fn list(out: &mut String, facts: &[(&str, String)]) {
    out.push_str("<dl>");
    for (name, value) in facts {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(value));
    }
    out.push_str("</dl>\n");
}

fn function(out: &mut String, report: &Report, at: usize, plan: &FunctionPlan) {
    let _ = writeln!(out, "<section>\n<h2>Function <code>{}</code></h2>", escape(&plan.function));
    let mut facts = vec![("peak of a device", bytes(plan.peak_bytes)), ("FLOPs a step", thousands(plan.flops))];
    facts.extend(plan.time.iter().map(|t| ("time of a step", seconds(t.seconds))));
    list(out, &facts);
    findings(out, plan);
    out.push_str("<h3>Tensors on the mesh</h3>\n");
    match &plan.feed {
        Some(feed) => draw::blocks(out, feed),
        None => out.push_str("<p>Nothing is fed.</p>\n"),
    }
    levels(out, report, plan);
    variables(out, plan);
    out.push_str("<h3>Memory over the steps</h3>\n");
    draw::memory(out, at, plan);
    communication(out, plan);
    if let Some(t) = &plan.time {
        time(out, report, t);
    }
    out.push_str("</section>\n");
}

/// A table; what lies behind a row is shown when something points at it.
fn table(out: &mut String, headings: &[&str], rows: impl Iterator<Item = (Vec<String>, String)>) {
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    headings.iter().for_each(|h| _ = write!(out, "<th>{h}</th>"));
    out.push_str("</tr>\n");
    for (row, behind) in rows {
        let _ = write!(out, "<tr{}>", tip(&behind));
        row.iter().for_each(|cell| _ = write!(out, "<td>{}</td>", escape(cell)));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// The attribute with what is shown when something points at an element; nothing for an empty text.
fn tip(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" data-tip=\"{}\"", escape(text)) }
}

/// What stands behind a tensor: where it lies, and why.
fn why(t: &Tensor) -> String {
    let lies = format!("{}\n{}\nlies {}", t.name, t.ty, t.layout);
    std::iter::once(lies).chain(t.why.iter().cloned()).collect::<Vec<_>>().join("\n")
}

fn findings(out: &mut String, plan: &FunctionPlan) {
    out.push_str("<h3>Findings</h3>\n");
    if plan.findings.is_empty() {
        out.push_str("<p>None.</p>\n");
        return;
    }
    let row = |f: &Finding| {
        let change = f.change.as_ref().map_or(String::new(), |c| format!(": {c}"));
        let (place, lost, help) = (f.place.clone().unwrap_or_default(), f.lost.to_string(), f.help.clone() + &change);
        (vec![f.severity.to_string(), f.code.to_string(), f.message.clone(), place, lost, help], String::new())
    };
    table(out, &["", "code", "what", "where", "costs a device, a run", "what to do"], plan.findings.iter().map(row));
}

/// `12.5 %`.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn levels(out: &mut String, report: &Report, plan: &FunctionPlan) {
    out.push_str("<h3>Levels: the largest activation of each, and what it sends</h3>\n");
    draw::levels(out, report, plan);
    let headings = ["level", "tensor", "layout", "a device, at least", "at most", "sent", "for halos", "halo share"];
    let row = |l: &super::report::Level| {
        let (t, (least, most)) = (&l.tensor, l.tensor.bytes);
        let texts = [&t.name, &t.ty, &t.layout].map(String::clone).into_iter();
        let sizes = [least, most, l.sent_bytes, l.halo_bytes].map(bytes);
        (texts.chain(sizes).chain([percent(l.halo_share)]).collect(), why(t))
    };
    table(out, &headings, plan.levels.iter().map(row));
}

fn variables(out: &mut String, plan: &FunctionPlan) {
    if plan.variables.is_empty() {
        return;
    }
    out.push_str("<details><summary>Variables, and where they lie between steps</summary>\n");
    let row = |t: &Tensor| {
        let sizes = [t.bytes.0, t.bytes.1].map(bytes);
        ([&t.name, &t.ty, &t.layout].map(String::clone).into_iter().chain(sizes).collect(), why(t))
    };
    let headings = ["variable", "type", "layout", "a device, at least", "at most"];
    table(out, &headings, plan.variables.iter().map(row));
    out.push_str("</details>\n");
}

/// A row of a chart: parts of a bar, each with its color and what is behind it.
struct Bar {
    name: String,
    text: String,
    parts: Vec<(f64, usize, String)>,
}

impl Bar {
    /// Of one part.
    fn of(name: impl Into<String>, value: f64, text: String) -> Bar {
        let name = name.into();
        let behind = format!("{name}: {text}");
        Bar { name, text, parts: vec![(value, 0, behind)] }
    }
}

fn bars(out: &mut String, rows: &[Bar]) {
    let sum = |b: &Bar| b.parts.iter().map(|(v, ..)| v).sum::<f64>();
    let most = rows.iter().map(sum).fold(0.0, f64::max);
    out.push_str("<div class=\"bars\">\n");
    for bar in rows {
        let (name, text) = (escape(&bar.name), escape(&bar.text));
        let _ = write!(out, "<span>{name}</span><span class=\"value\">{text}</span><span class=\"track\">");
        for (value, color, behind) in &bar.parts {
            let width = if most > 0.0 { 100.0 * value / most } else { 0.0 };
            let _ = write!(out, "<i class=\"c{}\" style=\"width:{width:.2}%\"{}></i>", color % COLORS, tip(behind));
        }
        out.push_str("</span>\n");
    }
    out.push_str("</div>\n");
}

fn legend(out: &mut String, names: &[&str]) {
    out.push_str("<p class=\"legend\">");
    for (i, name) in names.iter().enumerate() {
        let _ = write!(out, "<span><i class=\"c{}\"></i>{}</span>", i % COLORS, escape(name));
    }
    out.push_str("</p>\n");
}

/// What is sent along each axis, or between devices that differ in several, by kind.
fn communication(out: &mut String, plan: &FunctionPlan) {
    out.push_str("<h3>Communication, by axes of the mesh</h3>\n");
    if plan.communication.is_empty() {
        out.push_str("<p>Devices send nothing.</p>\n");
        return;
    }
    let total = |kind: &str| plan.communication.iter().filter(|t| t.kind == kind).map(|t| t.bytes).sum::<usize>();
    let mut kinds: Vec<&str> = plan.communication.iter().map(|t| t.kind.as_str()).collect();
    kinds.sort_by_key(|k| (std::cmp::Reverse(total(k)), *k));
    kinds.dedup();
    let part = |t: &Traffic| {
        let color = kinds.iter().position(|k| *k == t.kind).unwrap_or(0);
        let (sent, messages) = (bytes(t.bytes), thousands(t.messages as u64));
        (t.bytes as f64, color, format!("{} along {}\n{sent} in {messages} messages of all devices", t.kind, t.axis))
    };
    let along = |of: &[Traffic]| {
        let mut of: Vec<&Traffic> = of.iter().collect();
        of.sort_by_key(|t| kinds.iter().position(|k| *k == t.kind));
        let text = bytes(of.iter().map(|t| t.bytes).sum());
        Bar { name: format!("along {}", of[0].axis), text, parts: of.into_iter().map(part).collect() }
    };
    // They come in order of their axes.
    bars(out, &plan.communication.chunk_by(|a, b| a.axis == b.axis).map(along).collect::<Vec<_>>());
    legend(out, &kinds);
}

fn time(out: &mut String, report: &Report, t: &Time) {
    let _ = writeln!(out, "<h3>Time on {}</h3>", escape(report.machine.as_deref().unwrap_or("a machine")));
    if t.share > 1.0 {
        out.push_str("<p>Devices of the mesh share those of the machine.</p>\n");
    }
    if t.hidden > 0.0 {
        let _ =
            writeln!(out, "<p>Beside computation devices move for {} more, the mean of all.</p>", seconds(t.hidden));
    }
    const PARTS: [&str; 3] = ["computing", "moving", "waiting"];
    let row = |d: usize| {
        let parts = (0..3).map(|i| (t.devices[d][i], i, format!("{} {}", PARTS[i], seconds(t.devices[d][i]))));
        let name = format!("device {d}{}", if d == t.slowest { ", the slowest" } else { "" });
        Bar { name, text: seconds(t.devices[d].iter().sum()), parts: parts.collect() }
    };
    // The report has them all.
    let shown = (0..t.devices.len()).filter(|d| *d < DRAWN || *d == t.slowest);
    bars(out, &shown.map(row).collect::<Vec<_>>());
    legend(out, &PARTS);
    out.push_str("<h4>By kind of work, the mean of all devices</h4>\n");
    let mut classes: Vec<_> = t.classes.iter().collect();
    classes.sort_by(|a, b| b.1.total_cmp(a.1));
    bars(out, &classes.into_iter().map(|(n, s)| Bar::of(&**n, *s, seconds(*s))).collect::<Vec<_>>());
    if !t.axes.is_empty() {
        out.push_str("<h4>Of the links, by axes of the mesh</h4>\n");
        let link = |(n, (_, s)): (&crate::dim::Name, &(f64, f64))| Bar::of(format!("along {n}"), *s, seconds(*s));
        bars(out, &t.axes.iter().map(link).collect::<Vec<_>>());
    }
}
