//! What changed from one plan to another.

use super::describe::{Table, bytes, flops, seconds};
use super::report::{FunctionPlan, Report};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// What changed from `a` to `b`, as text.
pub fn diff(a: &Report, b: &Report) -> String {
    let mut out = String::new();
    let mut whole = Table::default();
    let layout = |r: &Report| if r.layout.is_empty() { "everything whole".into() } else { r.layout.clone() };
    let machine = |r: &Report| r.machine.clone().unwrap_or("none".into());
    row(&mut whole, "mesh", a.mesh.clone(), b.mesh.clone());
    row(&mut whole, "layout", layout(a), layout(b));
    row(&mut whole, "machine", machine(a), machine(b));
    whole.write(&mut out);
    let find = |r: &'_ Report, name: &str| r.plans.iter().position(|p| p.function == name);
    for plan in &a.plans {
        match find(b, &plan.function) {
            Some(i) => of_function(plan, &b.plans[i], &mut out),
            None => _ = writeln!(out, "the function `{}` is only in the first", plan.function),
        }
    }
    for plan in b.plans.iter().filter(|p| find(a, &p.function).is_none()) {
        let _ = writeln!(out, "the function `{}` is only in the second", plan.function);
    }
    if out.is_empty() { "no difference\n".into() } else { out }
}

/// A row for what is not the same.
fn row(table: &mut Table, what: &str, a: String, b: String) {
    if a != b {
        if table.is_empty() {
            table.row([&"", &"first", &"second", &""]);
        }
        table.row([&what, &a, &b, &""]);
    }
}

/// A row for numbers that are not the same, with the change in percent.
fn number(table: &mut Table, what: &str, a: f64, b: f64, text: impl Fn(f64) -> String) {
    if a != b {
        if table.is_empty() {
            table.row([&"", &"first", &"second", &""]);
        }
        let change = if a > 0.0 { format!("({:+.1} %)", 100.0 * (b / a - 1.0)) } else { String::new() };
        table.row([&what, &text(a), &text(b), &change]);
    }
}

fn of_function(a: &FunctionPlan, b: &FunctionPlan, out: &mut String) {
    let mut table = Table::default();
    let size = |n: f64| bytes(n as usize);
    number(&mut table, "FLOPs", a.flops as f64, b.flops as f64, |n| flops(n as u64));
    number(&mut table, "peak of a device", a.peak_bytes as f64, b.peak_bytes as f64, size);
    if let (Some(a), Some(b)) = (&a.time, &b.time) {
        number(&mut table, "time of a step", a.seconds, b.seconds, seconds);
        let classes: BTreeSet<_> = a.classes.keys().chain(b.classes.keys()).collect();
        for class in classes {
            let of = |t: &super::report::Time| t.classes.get(class).copied().unwrap_or(0.0);
            number(&mut table, &format!("  in {class}"), of(a), of(b), seconds);
        }
    }
    let (sent_a, sent_b) = (sent(a), sent(b));
    let axes: BTreeSet<_> = sent_a.keys().chain(sent_b.keys()).collect();
    for axis in axes {
        let of = |sent: &BTreeMap<&str, usize>| sent.get(axis).copied().unwrap_or(0) as f64;
        number(&mut table, &format!("sent along {axis}"), of(&sent_a), of(&sent_b), size);
    }
    let (tensors_a, tensors_b) = (tensors(a), tensors(b));
    let names: BTreeSet<_> = tensors_a.keys().chain(tensors_b.keys()).collect();
    for name in names {
        let of = |t: &BTreeMap<String, String>| t.get(name).cloned().unwrap_or("not there".into());
        row(&mut table, name, of(&tensors_a), of(&tensors_b));
    }
    if !table.is_empty() {
        let _ = writeln!(out, "function `{}`", a.function);
        table.write(out);
    }
}

/// Bytes that all devices send, by axes.
fn sent(plan: &FunctionPlan) -> BTreeMap<&str, usize> {
    let mut sums = BTreeMap::new();
    plan.communication.iter().for_each(|t| *sums.entry(t.axis.as_str()).or_default() += t.bytes);
    sums
}

/// Types and layouts of tensors, by name.
fn tensors(plan: &FunctionPlan) -> BTreeMap<String, String> {
    let levels = plan.levels.iter().map(|l| ("largest of", &l.tensor));
    let all = plan.variables.iter().map(|v| ("variable", v)).chain(levels);
    all.map(|(what, t)| (format!("{what} {}", t.name), format!("{} {}", t.ty, t.layout))).collect()
}
