//! Speed, measured beside what a user would pick instead; the measurements lie in `benches/`.

use std::fmt::Display;

/// Prints the seconds of a profile for each of `steps` steps: by op, then by step of the plan, the longest first.
pub fn print_profile<N: Display>(profile: &[(N, f64)], steps: u32) {
    let named: Vec<(String, f64)> = profile.iter().map(|(n, s)| (n.to_string(), *s)).collect();
    let mut ops: Vec<(String, f64)> = Vec::new();
    for (name, s) in &named {
        let op = name.split(' ').next().unwrap_or_default();
        match ops.iter_mut().find(|(o, _)| o == op) {
            Some((_, t)) => *t += s,
            None => ops.push((op.into(), *s)),
        }
    }
    for mut list in [ops, named] {
        list.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (name, s) in list.iter().take(40) {
            eprintln!("{:>9.2} ms  {name}", s / f64::from(steps) * 1e3);
        }
        eprintln!();
    }
}
