//! A plan as one page: everything is in it, and nothing is fetched. What one points at explains itself (`data-tip`).
//!
//! The page is well-formed XML as well, so that a test can read it. All text of a program goes through [`escape`].

mod blocks;
mod charts;

use super::{Report, TensorReport};
use crate::lint::Finding;
use crate::plan::describe::{bytes, flops, thousands};
use std::fmt::Write;

/// Tensors that are drawn on the mesh.
const DRAWN: usize = 6;

/// Text as it may stand in an element or an attribute.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' => out.push_str("&#10;"),
            // Others than these may not be in XML.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The page of some plans.
pub fn page(reports: &[Report]) -> String {
    let mut out = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    out += "<meta name=\"viewport\" content=\"width=device-width\"/>\n<title>Plan</title>\n<style>\n";
    out += include_str!("page.css");
    out += "</style>\n</head>\n<body>\n";
    for r in reports {
        plan(r, &mut out);
    }
    out += "<div id=\"tip\" role=\"status\"></div>\n<script>\n";
    out += include_str!("page.js");
    out += "</script>\n</body>\n</html>\n";
    out
}

fn section(title: &str, note: &str, body: &str, out: &mut String) {
    let _ = writeln!(out, "<section>\n<h2>{}</h2>", escape(title));
    if !note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(note));
    }
    let _ = writeln!(out, "{body}</section>");
}

fn plan(r: &Report, out: &mut String) {
    let _ =
        writeln!(out, "<main>\n<header>\n<h1>Plan of <code>{}</code></h1>\n<div class=\"cards\">", escape(&r.function));
    let most = |f: fn(&super::DeviceReport) -> f64| r.devices.iter().map(f).fold(0.0, f64::max);
    let layout = if r.layout.is_empty() { "everything whole" } else { &r.layout };
    let cards = [
        ("devices", r.devices.len().to_string(), "places of the mesh"),
        ("mesh", r.mesh.clone(), "axes with their devices; the last one is fastest"),
        ("layout", layout.into(), "which dimension is split over which axis"),
        ("memory", bytes(most(|d| d.peak_bytes as f64) as usize), "peak of the device that needs most"),
        ("sent", bytes(most(|d| d.sent_bytes as f64) as usize), "a run, by the device that sends most"),
        ("operations", flops(most(|d| d.flops) as u64), "a run, on the device that computes most"),
        ("steps", thousands(r.steps.len() as u64), "of the plan of a device"),
    ];
    for (what, value, tip) in cards {
        let (value, tip) = (escape(&value), escape(tip));
        let _ = writeln!(out, "<div class=\"card\" data-tip=\"{tip}\"><span>{what}</span><b>{value}</b></div>");
    }
    let _ = writeln!(out, "</div>\n</header>");
    section(
        "Findings",
        "What this layout costs that it need not; the most expensive first.",
        &findings(&r.findings),
        out,
    );
    let drawn: String = drawn(r).iter().map(|t| blocks::figure(r, t)).collect();
    let note = "Blocks as devices hold them, up to three dimensions, those that are split first. Point at one for its owners, \
                and at a name for why.";
    section("Tensors on the mesh", note, &format!("<div class=\"gallery\">\n{drawn}</div>\n"), out);
    let note = "By the first part of the scope, in the order of the program; of the device that has most.";
    section("Levels", note, &charts::levels(r), out);
    let note = "Bytes alive at each step; devices that are alike are one line. Point at a step for what is there.";
    section("Memory over time", note, &charts::memory(r), out);
    section("Communication", "Bytes a run by pattern and by axes.", &charts::communication(r), out);
    let note = "A run of the device that has most, by kind of work: what it computes, what passes between memory and cores, and \
                what it sends.";
    section("Cost", note, &charts::cost(r), out);
    section("Tensors", "Point at a dimension for why it is split, or whole.", &tensors(r), out);
    out.push_str("</main>\n");
}

fn findings(list: &[Finding]) -> String {
    if list.is_empty() {
        return "<p>None.</p>\n".into();
    }
    let mut out = String::new();
    for f in list {
        let _ =
            writeln!(out, "<article class=\"finding {}\">\n<h3><b>{}</b> {}</h3>", f.severity, f.code, escape(f.name));
        let _ = writeln!(out, "<p>{}</p>", escape(&f.message));
        let place = f.place.map(|p| p.to_string()).unwrap_or_default();
        let more = if f.count > 1 { format!(", and {} more", f.count - 1) } else { String::new() };
        let _ = writeln!(out, "<p class=\"note\">{}{more} {}</p>", escape(&place), escape(&f.lost.to_string()));
        let change = f.change.as_ref().map(|c| format!(" <code>{}</code>", escape(&c.to_string()))).unwrap_or_default();
        let _ = writeln!(out, "<p>{}{change}</p>\n</article>", escape(&f.help));
    }
    out
}

/// The largest tensors of unlike layouts: feeds, activations and variables.
fn drawn(r: &Report) -> Vec<&TensorReport> {
    let mut out: Vec<&TensorReport> = vec![];
    for (kind, count) in [("feed", 1), ("activation", 3), ("variable", 2)] {
        let mut list: Vec<&TensorReport> = r.tensors.iter().filter(|t| t.kind == kind && !t.dims.is_empty()).collect();
        list.sort_by_key(|t| std::cmp::Reverse(t.bytes));
        let mut seen: Vec<Vec<(&str, usize)>> = vec![];
        for t in list {
            let shape: Vec<(&str, usize)> = t.dims.iter().map(|d| (&*d.name, d.size)).collect();
            if seen.len() < count && !seen.contains(&shape) {
                seen.push(shape);
                out.push(t);
            }
        }
    }
    out.truncate(DRAWN);
    out
}

/// The dimensions of a tensor, each with why it lies so.
pub(super) fn chips(t: &TensorReport) -> String {
    let mut out = String::new();
    for d in &t.dims {
        let (class, over) = match &d.axes {
            Some(axes) => ("chip split", format!(" over {axes}")),
            None => ("chip", String::new()),
        };
        let text = escape(&format!("{}:{}{over}", d.name, d.size));
        let _ = write!(out, "<span class=\"{class}\" data-tip=\"{}\">{text}</span>", escape(&d.why));
    }
    out
}

fn tensors(r: &Report) -> String {
    let mut out = String::from("<input class=\"filter\" placeholder=\"filter by name, dimension or place\"/>\n");
    out += "<div class=\"scroll\"><table>\n<thead><tr><th>tensor</th><th>kind</th><th>layout</th><th>whole</th><th>a device</th>\
            </tr></thead>\n<tbody>\n";
    for t in &r.tensors {
        let _ = writeln!(
            out,
            "<tr data-tip=\"{}\"><td>{}</td><td>{}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td></tr>",
            escape(&format!("{} {}\n{}", t.name, t.ty, t.place)),
            escape(&t.name),
            t.kind,
            chips(t),
            bytes(t.bytes),
            bytes(t.most_bytes)
        );
    }
    out + "</tbody>\n</table></div>\n"
}
