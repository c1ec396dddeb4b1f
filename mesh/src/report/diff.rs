//! What changed from one plan to another.

use super::{Report, TensorReport};
use crate::plan::describe::{Table, bytes, flops};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Before, after and the change in percent; None where both are equal.
fn change(before: f64, after: f64, unit: impl Fn(f64) -> String) -> Option<[String; 3]> {
    let share = match before {
        0.0 => "new".into(),
        _ => format!("{:+.1} %", 100.0 * (after - before) / before),
    };
    (before != after).then(|| [unit(before), unit(after), share])
}

/// How a tensor is split, in the layout's language.
fn split(t: &TensorReport) -> String {
    let rules: Vec<String> = t.dims.iter().filter_map(|d| Some(format!("{}:{}", d.name, d.axes.as_ref()?))).collect();
    if rules.is_empty() { "whole".into() } else { rules.join(",") }
}

/// What changed, as text for people.
pub fn diff(a: &Report, b: &Report) -> String {
    let mut out = String::new();
    let same = a.mesh == b.mesh && a.layout == b.layout;
    let _ = writeln!(out, "plan of `{}`: {}", a.function, if same { "mesh and layout are the same" } else { "A -> B" });
    for (what, before, after) in [("mesh", &a.mesh, &b.mesh), ("layout", &a.layout, &b.layout)] {
        if before != after {
            let _ = writeln!(out, "  {what:7} {before} -> {after}");
        }
    }
    let size = |n: f64| bytes(n as usize);
    let work = |n: f64| flops(n as u64);
    let most = |r: &Report, f: fn(&super::DeviceReport) -> f64| r.devices.iter().map(f).fold(0.0, f64::max);
    let rows: [(&str, fn(&super::DeviceReport) -> f64, &dyn Fn(f64) -> String); 4] = [
        ("peak of memory", |d| d.peak_bytes as f64, &size),
        ("variables", |d| d.variable_bytes as f64, &size),
        ("operations", |d| d.flops, &work),
        ("sent", |d| d.sent_bytes as f64, &size),
    ];
    let _ = writeln!(out, "\nthe device that has most");
    let mut table = Table::default();
    table.row([&"what", &"before", &"after", &"change"]);
    let mut none = true;
    for (name, of, unit) in rows {
        if let Some([before, after, share]) = change(most(a, of), most(b, of), unit) {
            table.row([&name, &before, &after, &share]);
            none = false;
        }
    }
    if none {
        table.row([&"nothing", &"", &"", &""]);
    }
    table.write(&mut out);

    let by_axis = |r: &Report| {
        let mut sums: BTreeMap<String, f64> = BTreeMap::new();
        for t in &r.communication {
            *sums.entry(format!("{} along {}", t.pattern, t.axes)).or_default() += t.sent_bytes as f64;
        }
        sums
    };
    let (before, after) = (by_axis(a), by_axis(b));
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let get = |sums: &BTreeMap<String, f64>, n: &String| sums.get(n).copied().unwrap_or(0.0);
    let rows: Vec<_> =
        names.into_iter().filter_map(|n| Some((n, change(get(&before, n), get(&after, n), size)?))).collect();
    if !rows.is_empty() {
        let _ = writeln!(out, "\nsent by all devices");
        let mut table = Table::default();
        table.row([&"pattern", &"before", &"after", &"change"]);
        rows.iter().for_each(|(n, [before, after, share])| table.row([n, before, after, share]));
        table.write(&mut out);
    }

    let key = |t: &TensorReport| (t.kind.clone(), t.name.clone());
    let old: BTreeMap<_, &TensorReport> = a.tensors.iter().map(|t| (key(t), t)).collect();
    let new: BTreeMap<_, &TensorReport> = b.tensors.iter().map(|t| (key(t), t)).collect();
    let mut table = Table::default();
    table.row([&"tensor", &"kind", &"before", &"after", &"a device", &"then", &"change"]);
    let mut changed = 0;
    for t in &b.tensors {
        let (before, held) = match old.get(&key(t)) {
            Some(o) if split(o) == split(t) && o.most_bytes == t.most_bytes => continue,
            Some(o) => (split(o), change(o.most_bytes as f64, t.most_bytes as f64, size).unwrap_or_default()),
            None => ("not there".into(), [String::new(), bytes(t.most_bytes), String::new()]),
        };
        table.row([&t.name, &t.kind, &before, &split(t), &held[0], &held[1], &held[2]]);
        changed += 1;
    }
    for t in a.tensors.iter().filter(|t| !new.contains_key(&key(t))) {
        table.row([&t.name, &t.kind, &split(t), &"not there", &"", &"", &""]);
        changed += 1;
    }
    let _ = writeln!(out, "\ntensors whose layout changed: {changed} of {}", b.tensors.len());
    if changed > 0 {
        table.write(&mut out);
    }
    out
}
