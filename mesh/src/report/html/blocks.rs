//! A tensor's blocks as boxes seen from above and the side.

use super::{chips, escape};
use crate::plan::describe::bytes;
use crate::report::{Report, TensorReport};
use std::fmt::Write;

/// Width and height of a drawing.
const SIZE: (f64, f64) = (300.0, 220.0);
/// Boxes that are drawn at the most.
const BOXES: usize = 64;

/// A box: where it begins and ends along the three dimensions that are drawn, and who holds it.
struct Block {
    at: [(f64, f64); 3],
    devices: Vec<usize>,
    range: String,
}

/// The drawing of a tensor.
pub(super) fn figure(r: &Report, t: &TensorReport) -> String {
    // The split dimensions first, then the largest ones; drawn in the tensor's order.
    let mut order: Vec<usize> = (0..t.dims.len()).collect();
    order.sort_by_key(|&i| (t.dims[i].axes.is_none(), std::cmp::Reverse(t.dims[i].size)));
    order.truncate(3);
    order.sort_unstable();
    let blocks = blocks(r, t, &order);
    let mut out = format!("<figure>\n<figcaption data-tip=\"{}\">{}</figcaption>\n", escape(&t.place), escape(&t.name));
    let _ = writeln!(out, "<svg viewBox=\"0 0 {} {}\" role=\"img\">", SIZE.0, SIZE.1);
    // Extents are shown by their cube roots: what is 8 times as long is twice as long here, so that nothing vanishes.
    let extent = |k: usize| order.get(k).map_or(0.25, |&i| (t.dims[i].size.max(1) as f64).cbrt());
    let length = [extent(0), extent(1), extent(2)];
    let scale = 1.0 / length.iter().copied().fold(0.0, f64::max);
    let length = length.map(|l| (l * scale).max(0.12));
    for b in &blocks {
        solid(b, length, &mut out);
    }
    out += "</svg>\n";
    let _ = writeln!(out, "<div>{}</div>", chips(t));
    let _ =
        writeln!(out, "<p class=\"note\">{} in all, {} a device</p>\n</figure>", bytes(t.bytes), bytes(t.most_bytes));
    out
}

fn blocks(r: &Report, t: &TensorReport, order: &[usize]) -> Vec<Block> {
    let mut out: Vec<(Vec<(usize, usize)>, Block)> = vec![];
    for (d, ranges) in t.blocks.iter().enumerate() {
        if let Some((_, b)) = out.iter_mut().find(|(known, _)| known == ranges) {
            b.devices.push(d);
            continue;
        }
        if out.len() == BOXES {
            continue;
        }
        let share = |k: usize| match order.get(k) {
            Some(&i) => {
                let size = t.dims[i].size.max(1) as f64;
                (ranges[i].0 as f64 / size, ranges[i].1 as f64 / size)
            }
            None => (0.0, 1.0),
        };
        let text: Vec<String> =
            t.dims.iter().zip(ranges).map(|(d, (from, to))| format!("{} {from}..{to}", d.name)).collect();
        out.push((
            ranges.clone(),
            Block { at: [share(0), share(1), share(2)], devices: vec![d], range: text.join(", ") },
        ));
    }
    let mut blocks: Vec<Block> = out.into_iter().map(|(_, b)| b).collect();
    // What is behind is drawn first: far along the second dimension, low along the third.
    let depth = |b: &Block| (b.at[0].0 - b.at[1].0 + b.at[2].1, b.at[0].0);
    blocks.sort_by(|a, b| depth(a).partial_cmp(&depth(b)).unwrap_or(std::cmp::Ordering::Equal));
    let at = |d: usize| {
        let list = r.axes.iter().zip(&r.devices[d].at).map(|((n, _), i)| format!("{n}={i}"));
        list.collect::<Vec<_>>().join(",")
    };
    for b in &mut blocks {
        let who: Vec<String> = b.devices.iter().take(8).map(|d| format!("device {d} ({})", at(*d))).collect();
        let more = if b.devices.len() > 8 { format!(", and {} more", b.devices.len() - 8) } else { String::new() };
        b.range = format!("{}\n{}{more}", b.range, who.join(", "));
    }
    blocks
}

/// A box with its three visible faces.
fn solid(b: &Block, length: [f64; 3], out: &mut String) {
    // Along x to the right and down, along y to the right and up, along z up.
    let unit = 0.42 * SIZE.1;
    let total = [length[0], length[1], length[2]];
    let left = (SIZE.0 - (total[0] + total[1]) * unit * 0.87) / 2.0;
    let point = |x: f64, y: f64, z: f64| {
        let px = left + (x + y) * unit * 0.87;
        let py = SIZE.1 * 0.5 + (x - y) * unit * 0.5
            - (z - total[2] / 2.0) * unit * 0.9
            - (total[0] - total[1]) * unit * 0.25;
        (px, py)
    };
    // A gap between blocks.
    let gap = |(from, to): (f64, f64), l: f64| {
        let inset = ((to - from) * 0.04).min(0.02);
        ((from + inset) * l, (to - inset) * l)
    };
    let [(x0, x1), (y0, y1), (z0, z1)] = [gap(b.at[0], length[0]), gap(b.at[1], length[1]), gap(b.at[2], length[2])];
    let face = |points: [(f64, f64); 4]| points.map(|(x, y)| format!("{x:.1},{y:.1}")).join(" ");
    let top = face([point(x0, y0, z1), point(x1, y0, z1), point(x1, y1, z1), point(x0, y1, z1)]);
    let front = face([point(x0, y0, z0), point(x1, y0, z0), point(x1, y0, z1), point(x0, y0, z1)]);
    let side = face([point(x1, y0, z0), point(x1, y1, z0), point(x1, y1, z1), point(x1, y0, z1)]);
    // Neighbours in number get unlike hues.
    let hue = (b.devices[0] as f64 * 137.5) % 360.0;
    let _ = writeln!(out, "<g class=\"block\" data-tip=\"{}\" style=\"--hue:{hue:.0}\">", escape(&b.range));
    for (class, points) in [("top", top), ("front", front), ("side", side)] {
        let _ = writeln!(out, "<polygon class=\"{class}\" points=\"{points}\"/>");
    }
    out.push_str("</g>\n");
}
