//! A plan as a page: one file, with nothing from elsewhere.
//!
//! Everything on it is written here, out of a [`Report`], and escaped; a script only shows what lies under the pointer, from
//! the same report, which the page has as JSON, and only by `textContent`.

use super::describe::{bytes, seconds, thousands};
use super::report::{Feed, FunctionPlan, Group, Report, Time};
use crate::lint::Finding;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Of groups of devices so many have their memory drawn, the fullest first.
const DRAWN: usize = 8;

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
    out.push_str("<h3>Who has what</h3>\n");
    match &plan.feed {
        Some(feed) => blocks(out, feed),
        None => out.push_str("<p>Nothing is fed.</p>\n"),
    }
    levels(out, plan);
    memory(out, at, plan);
    let sent: Vec<_> = plan.communication.iter().map(|t| (format!("{} along {}", t.kind, t.axis), t.bytes)).collect();
    out.push_str("<h3>Communication</h3>\n");
    if sent.is_empty() {
        out.push_str("<p>Devices send nothing.</p>\n");
    }
    bars(out, &sent.into_iter().map(|(n, b)| (n, b as f64, bytes(b))).collect::<Vec<_>>());
    if let Some(t) = &plan.time {
        time(out, report, t);
    }
    out.push_str("</section>\n");
}

fn table(out: &mut String, headings: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    out.push_str("<table>\n<tr>");
    headings.iter().for_each(|h| _ = write!(out, "<th>{h}</th>"));
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        row.iter().for_each(|cell| _ = write!(out, "<td>{}</td>", escape(cell)));
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
}

fn findings(out: &mut String, plan: &FunctionPlan) {
    out.push_str("<h3>Findings</h3>\n");
    if plan.findings.is_empty() {
        out.push_str("<p>None.</p>\n");
        return;
    }
    let row = |f: &Finding| {
        let change = f.change.as_ref().map_or(String::new(), |c| format!(": {c}"));
        let place = f.place.clone().unwrap_or_default();
        vec![
            f.severity.to_string(),
            f.code.to_string(),
            f.message.clone(),
            place,
            f.lost.to_string(),
            f.help.clone() + &change,
        ]
    };
    table(out, &["", "code", "what", "where", "costs a device, a run", "what to do"], plan.findings.iter().map(row));
}

/// `12.5 %`.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn levels(out: &mut String, plan: &FunctionPlan) {
    out.push_str("<h3>Levels: the largest activation of each, and what it sends</h3>\n");
    let headings = ["level", "tensor", "layout", "a device, at least", "at most", "sent", "for halos", "halo share"];
    let row = |l: &super::report::Level| {
        let (t, (least, most)) = (&l.tensor, l.tensor.bytes);
        let texts = [&t.name, &t.ty, &t.layout].map(String::clone).into_iter();
        let sizes = [least, most, l.sent_bytes, l.halo_bytes].map(bytes);
        texts.chain(sizes).chain([percent(l.halo_share)]).collect()
    };
    table(out, &headings, plan.levels.iter().map(row));
}

fn bars(out: &mut String, rows: &[(String, f64, String)]) {
    let most = rows.iter().map(|(_, v, _)| *v).fold(0.0, f64::max);
    out.push_str("<table class=\"bars\">\n");
    for (name, value, text) in rows {
        let width = if most > 0.0 { 100.0 * value / most } else { 0.0 };
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td><div style=\"width:{width:.2}%\"></div></td></tr>",
            escape(name),
            escape(text)
        );
    }
    out.push_str("</table>\n");
}

fn time(out: &mut String, report: &Report, t: &Time) {
    let _ = writeln!(out, "<h3>Time on {}</h3>", escape(report.machine.as_deref().unwrap_or("a machine")));
    if t.share > 1.0 {
        out.push_str("<p>Devices of the mesh share those of the machine.</p>\n");
    }
    let mut classes: Vec<_> = t.classes.iter().map(|(n, s)| (n.to_string(), *s, seconds(*s))).collect();
    classes.sort_by(|a, b| b.1.total_cmp(&a.1));
    bars(out, &classes);
    let row = |d: usize| {
        let name = if d == t.slowest { "slowest" } else { "" };
        let times = t.devices[d].map(seconds);
        [name.into(), d.to_string()].into_iter().chain(times).collect()
    };
    out.push_str("<h4>Devices</h4>\n");
    // The report has them all.
    let shown = (0..t.devices.len()).filter(|d| *d < DRAWN || *d == t.slowest);
    table(out, &["", "device", "computing", "moving", "waiting"], shown.map(row));
    let axes: Vec<_> = t.axes.iter().map(|(n, (_, s))| (format!("along {n}"), *s, seconds(*s))).collect();
    if !axes.is_empty() {
        out.push_str("<h4>Of the links, by axes of the mesh</h4>\n");
    }
    bars(out, &axes);
}

fn memory(out: &mut String, at: usize, plan: &FunctionPlan) {
    out.push_str("<h3>Memory over the steps</h3>\n");
    let mut groups: Vec<(usize, &Group)> = plan.groups.iter().enumerate().collect();
    groups.sort_by_key(|(_, g)| std::cmp::Reverse(g.peak_bytes));
    for (i, g) in groups.into_iter().take(DRAWN) {
        let numbers: Vec<String> = g.devices.iter().map(usize::to_string).collect();
        let (n, most) = (g.alive.len(), g.alive.iter().copied().max().unwrap_or(0).max(1));
        let mut path = "M0 100".to_string();
        for (s, alive) in g.alive.iter().enumerate() {
            let y = 100.0 - 100.0 * *alive as f64 / most as f64;
            let _ = write!(path, "V{y:.2}H{}", s + 1);
        }
        let line = |b: usize| 100.0 - 100.0 * b as f64 / most as f64;
        let _ = writeln!(
            out,
            "<figure><figcaption>devices <b>{}</b>, peak <b>{}</b>, variables <b>{}</b></figcaption>\
             <svg class=\"memory\" data-plan=\"{at}\" data-group=\"{i}\" viewBox=\"0 0 {} 100\" \
             preserveAspectRatio=\"none\"><path d=\"{path}V100Z\"/><line x1=\"0\" x2=\"{}\" y1=\"{y:.2}\" y2=\"{y:.2}\"/>\
             </svg></figure>",
            numbers.join(", "),
            bytes(g.peak_bytes),
            bytes(g.variables_bytes),
            n.max(1),
            n.max(1),
            y = line(g.variables_bytes),
        );
    }
}

/// The blocks of a feed that devices own, along up to three dimensions that are split, seen from a corner.
fn blocks(out: &mut String, feed: &Feed) {
    let is_split = |i: &usize| feed.blocks.iter().any(|b| b.get(*i) != feed.blocks[0].get(*i));
    let split: Vec<usize> = (0..feed.dims.len()).filter(is_split).take(3).collect();
    let whole: Vec<String> = feed.dims.iter().map(|(n, s)| format!("{n}:{s}")).collect();
    let _ = writeln!(out, "<p>The largest feed, <code>{}</code></p>", escape(&feed.name));
    let _ = writeln!(out, "<p class=\"type\"><code>{}</code></p>", escape(&whole.join(", ")));
    if split.is_empty() {
        out.push_str("<p>Every device has all of it.</p>\n");
        return;
    }
    // Devices of one block stand together.
    let mut owners: BTreeMap<Vec<(usize, usize)>, Vec<usize>> = BTreeMap::new();
    // A device of another stage has none.
    let held = |(_, block): &(usize, &Vec<(usize, usize)>)| block.iter().all(|(begin, end)| begin < end);
    for (d, block) in feed.blocks.iter().enumerate().filter(held) {
        owners.entry(split.iter().filter_map(|i| block.get(*i).copied()).collect()).or_default().push(d);
    }
    let size = |k: usize| split.get(k).map_or(1, |i| feed.dims[*i].1).max(1) as f64;
    // Units of 100 for a whole dimension, with room between blocks.
    let range = |block: &[(usize, usize)], k: usize| match block.get(k) {
        Some((from, to)) => [100.0 * *from as f64 / size(k) + 2.0, 100.0 * *to as f64 / size(k) - 2.0],
        None => [0.0, 20.0],
    };
    let at = |x: f64, y: f64, z: f64| (200.0 + (x - y) * 0.87, 120.0 + (x + y) * 0.5 - z);
    let points = |list: &[(f64, f64)]| list.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
    out.push_str("<svg class=\"mesh\" viewBox=\"0 0 400 240\">\n");
    // In the order of their lower corners what is nearer comes later.
    for (block, devices) in &owners {
        let [[x0, x1], [y0, y1], [z0, z1]] = [0, 1, 2].map(|k| range(block, k));
        let faces = [
            [at(x0, y0, z1), at(x1, y0, z1), at(x1, y1, z1), at(x0, y1, z1)],
            [at(x1, y0, z0), at(x1, y1, z0), at(x1, y1, z1), at(x1, y0, z1)],
            [at(x0, y1, z0), at(x1, y1, z0), at(x1, y1, z1), at(x0, y1, z1)],
        ];
        let hue = devices[0] * 137 % 360;
        let numbers = devices.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let _ = write!(out, "<g><title>devices {numbers}</title>");
        for (face, light) in faces.iter().zip([70, 55, 62]) {
            let _ = write!(out, "<polygon fill=\"hsl({hue} 60% {light}%)\" points=\"{}\"/>", points(face));
        }
        let (x, y) = at((x0 + x1) / 2.0, (y0 + y1) / 2.0, z1);
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\">{numbers}</text></g>");
    }
    for (k, i) in split.iter().enumerate() {
        let (x, y) = [at(50.0, 122.0, 0.0), at(122.0, 50.0, 0.0), at(-8.0, 108.0, 50.0)][k];
        let _ = writeln!(out, "<text class=\"axis\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(&feed.dims[*i].0));
    }
    out.push_str("</svg>\n");
}
