//! Pictures of a plan: blocks that devices own, levels, memory. All of it is SVG, without a script.

use super::super::describe::bytes;
use super::super::report::{Feed, FunctionPlan, Group, Level, Report};
use super::{DRAWN, escape, tip, why};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Memory over the steps, of each group of devices.
pub(super) fn memory(out: &mut String, at: usize, plan: &FunctionPlan) {
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
             preserveAspectRatio=\"none\"><path d=\"{path}V100Z\"/>\
             <line x1=\"0\" x2=\"{}\" y1=\"{y:.2}\" y2=\"{y:.2}\"/><line class=\"at\" y1=\"0\" y2=\"100\"/>\
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
pub(super) fn blocks(out: &mut String, feed: &Feed) {
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
    let at = |x: f64, y: f64, z: f64| seen((200.0, 120.0), [x, y, z]);
    // Flat ones need no room above.
    let top = if split.len() < 3 { 90 } else { 0 };
    let _ = writeln!(out, "<div class=\"split\"><svg class=\"mesh\" viewBox=\"0 {top} 400 {}\">", 240 - top);
    // In the order of their lower corners what is nearer comes later.
    for (block, devices) in &owners {
        let ranges = [0, 1, 2].map(|k| range(block, k));
        let numbers = devices.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let part = |(i, (name, _)): (usize, &(String, usize))| {
            let (from, to) = feed.blocks[devices[0]][i];
            format!("{name}:{from}..{to}")
        };
        let has = feed.dims.iter().enumerate().map(part).collect::<Vec<_>>().join(", ");
        let lies = format!("devices {numbers}\n{} [{has}]\n{}", feed.name, feed.why.join("\n"));
        let _ = write!(out, "<g{}>", tip(&lies));
        for (face, light) in faces((200.0, 120.0), ranges).iter().zip([70, 62, 55]) {
            let hue = devices[0] * 137 % 360;
            let _ = write!(out, "<polygon fill=\"hsl({hue} 60% {light}%)\" points=\"{}\"/>", points(face));
        }
        let [[x0, x1], [y0, y1], [_, z1]] = ranges;
        let (x, y) = at((x0 + x1) / 2.0, (y0 + y1) / 2.0, z1);
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\">{numbers}</text></g>");
    }
    for (k, i) in split.iter().enumerate() {
        let (x, y) = [at(50.0, 122.0, 0.0), at(122.0, 50.0, 0.0), at(-8.0, 108.0, 50.0)][k];
        let _ = writeln!(out, "<text class=\"axis\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(&feed.dims[*i].0));
    }
    out.push_str("</svg>\n<ul class=\"why\">");
    feed.why.iter().for_each(|line| _ = write!(out, "<li>{}</li>", escape(line)));
    out.push_str("</ul></div>\n");
}

/// Where a point is seen from a corner: x to the lower left, y to the lower right, z up.
fn seen((x, y): (f64, f64), [u, v, w]: [f64; 3]) -> (f64, f64) {
    (x + (v - u) * 0.87, y + (u + v) * 0.5 - w)
}

fn points(list: &[(f64, f64)]) -> String {
    list.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ")
}

/// The faces of a block that are seen: above, to the left, to the right.
fn faces(origin: (f64, f64), [[x0, x1], [y0, y1], [z0, z1]]: [[f64; 2]; 3]) -> [[(f64, f64); 4]; 3] {
    [
        [[x0, y0, z1], [x1, y0, z1], [x1, y1, z1], [x0, y1, z1]],
        [[x1, y0, z0], [x1, y1, z0], [x1, y1, z1], [x1, y0, z1]],
        [[x0, y1, z0], [x1, y1, z0], [x1, y1, z1], [x0, y1, z1]],
    ]
    .map(|face| face.map(|corner| seen(origin, corner)))
}

/// A dimension of a level's tensor: name, size, and into how many shards it is split.
type Extent<'a> = (&'a str, usize, usize);

/// The dimensions of a type `f32[x:16, y:8]` that lies so: `x:a+b`.
fn extents<'a>(report: &Report, ty: &'a str, layout: &str) -> Vec<Extent<'a>> {
    let inside = ty.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']')).unwrap_or_default();
    let size = |axis: &str| report.axes.iter().find(|(name, _)| name == axis).map_or(1, |(_, n)| *n);
    let shards = |dim: &str| {
        let of = layout.split(',').find_map(|rule| rule.split_once(':').filter(|(d, _)| *d == dim));
        of.map_or(1, |(_, axes)| axes.split('+').map(size).product())
    };
    let dims = inside.split(", ").filter_map(|d| d.split_once(':'));
    dims.filter_map(|(d, n)| Some((d, n.parse().ok()?, shards(d)))).collect()
}

/// What is drawn of a level: up to three dimensions, those that are split first, then the largest ones, in order.
fn drawn(mut dims: Vec<Extent>) -> Vec<Extent> {
    let all = dims.clone();
    dims.sort_by_key(|(_, size, shards)| std::cmp::Reverse((*shards > 1, *size)));
    dims.truncate(3);
    all.into_iter().filter(|d| dims.contains(d)).collect()
}

/// The room that a level has, and what its block has of it.
const ROOM: f64 = 92.0;
const EDGE: f64 = 40.0;

/// A block for each level, cut as it is split, in the order of the program; what has fewer points stands lower. So a UNet
/// is a U.
pub(super) fn levels(out: &mut String, report: &Report, plan: &FunctionPlan) {
    let shown: Vec<(&Level, Vec<Extent>)> =
        plan.levels.iter().map(|l| (l, drawn(extents(report, &l.tensor.ty, &l.tensor.layout)))).collect();
    if shown.is_empty() {
        return;
    }
    let mut largest: BTreeMap<&str, usize> = BTreeMap::new();
    for (dim, size, _) in shown.iter().flat_map(|(_, dims)| dims) {
        let most = largest.entry(dim).or_default();
        *most = (*most).max(*size);
    }
    // How many times a tensor's points are halved from the level with the most on.
    let halved = |dims: &[Extent]| -> f64 { -dims.iter().map(|(_, size, _)| (*size as f64).log2()).sum::<f64>() };
    let top = shown.iter().map(|(_, dims)| halved(dims)).fold(f64::INFINITY, f64::min);
    let (width, down) = (ROOM * shown.len() as f64, |dims: &[Extent]| ((halved(dims) - top) * 14.0).min(140.0));
    let height = 130.0 + shown.iter().map(|(_, dims)| down(dims)).fold(0.0, f64::max);
    let _ = writeln!(
        out,
        "<div class=\"wide\"><svg class=\"levels\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         style=\"width:{width:.0}px\">"
    );
    let middle = |(i, dims): (usize, &[Extent])| (ROOM * (i as f64 + 0.5), 52.0 + down(dims));
    let way: Vec<_> = shown.iter().enumerate().map(|(i, (_, dims))| middle((i, dims))).collect();
    let _ = writeln!(out, "<polyline points=\"{}\"/>", points(&way));
    for (i, (level, dims)) in shown.iter().enumerate() {
        let (x, y) = middle((i, dims));
        let edge =
            |k: usize| dims.get(k).map_or(6.0, |(d, n, _)| (EDGE * (*n as f64 / largest[d] as f64).sqrt()).max(6.0));
        let ranges = [0, 1, 2].map(|k| [-edge(k) / 2.0, edge(k) / 2.0]);
        let sends = format!("sends {} in all, {} of it for halos", bytes(level.sent_bytes), bytes(level.halo_bytes));
        let _ = write!(out, "<g{}>", tip(&format!("{}\n{sends}", why(&level.tensor))));
        for (face, light) in faces((x, y), ranges).iter().zip(["top", "left", "right"]) {
            let _ = write!(out, "<polygon class=\"{light}\" points=\"{}\"/>", points(face));
        }
        for (k, (.., shards)) in dims.iter().enumerate() {
            cuts(out, (x, y), ranges, k, *shards);
        }
        let below = y + (edge(0) + edge(1)) / 4.0 + edge(2) / 2.0;
        let (name, held) = (escape(&level.tensor.name), bytes(level.tensor.bytes.1));
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{:.1}\">{name}</text><text class=\"held\" x=\"{x:.1}\" y=\"{:.1}\">{held}</text></g>",
            below + 14.0,
            below + 26.0
        );
    }
    out.push_str("</svg></div>\n");
}

/// Where a block is cut along one of its dimensions: lines on the two faces that show it.
fn cuts(out: &mut String, origin: (f64, f64), ranges: [[f64; 2]; 3], k: usize, shards: usize) {
    let [from, to] = ranges[k];
    let corner = |at: [Option<f64>; 3]| seen(origin, [0, 1, 2].map(|d| at[d].unwrap_or(ranges[d][1])));
    for cut in (1..shards).map(|i| from + (to - from) * i as f64 / shards as f64) {
        let mut ends = |a: [Option<f64>; 3], b: [Option<f64>; 3]| {
            let _ = write!(out, "<polyline class=\"cut\" points=\"{}\"/>", points(&[corner(a), corner(b)]));
        };
        // On each of the faces at the far end of another dimension, along the third one.
        for face in (0..3).filter(|d| *d != k) {
            let along = 3 - k - face;
            let mut line = [[None; 3]; 2];
            line.iter_mut().for_each(|end| end[k] = Some(cut));
            line[0][along] = Some(ranges[along][0]);
            ends(line[0], line[1]);
        }
    }
}
