//! Lints: what a layout costs that it need not, said before anything runs.
//!
//! A [`Lint`] is one entry of one of the tables below: a code, an explanation, two small programs that show it, and a
//! check of a planned program. What a check finds is a [`Finding`]: a place in the user's source, what it costs, and what
//! to do, as something that can be applied where there is such a thing. The errors of programs, layouts and memory
//! ([`crate::error`]) are entries too; for them building or planning is the check. Those of other crates are in words alone.
//!
//! A suggested change of mesh or layout lowers without an error. Where it is to save time, it lowers to a program that
//! computes and sends less, by `prices`; those of the findings that cost most are planned as well, and are not said if that
//! refutes them. To add a lint, add an entry to the table of its kind. `mesh/tests/lints.rs` runs all of them, and
//! `docs/errors.md` is made of them.

mod change;
mod edges;
mod elsewhere;
mod finding;
mod lowered;
mod memory;
mod moves;
mod planned;
mod prices;
mod refusals;
mod sections;
mod shards;
mod sums;
mod windows;
mod work;

use crate::error::Error;
use crate::graph::Graph;
use crate::layout::{Layout, Mesh};
use crate::machine::Machine;
use crate::plan::ProgramPlan;
use crate::program::{Program, ProgramBuilder};
pub use change::Change;
pub use finding::{Finding, Lost, Severity, Tried};
use planned::Planned;
use std::fmt::Write;

/// Something that can be wrong with a layout.
pub struct Lint {
    /// `L0101`.
    pub code: &'static str,
    /// `unused-axis`.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is, why it costs, and what to do.
    pub about: &'static str,
    /// A program, mesh and layout that has it.
    pub failing: Example,
    /// One that does not.
    pub fixed: Example,
    check: Check,
}

impl Lint {
    /// Whether building or planning itself reports it, as an error.
    pub fn is_refusal(&self) -> bool {
        matches!(self.check, Check::Refusal)
    }
}

/// How a lint is found.
enum Check {
    /// Building the program, or planning it, fails with the lint's code.
    Refusal,
    /// In what is planned.
    Plan(fn(&Planned) -> Vec<Finding>),
}

/// A small program with a mesh and a layout.
#[derive(Clone, Copy)]
pub struct Example {
    /// Builds the function `step`.
    pub build: fn(&Graph),
    /// The program in words.
    pub program: &'static str,
    /// The mesh.
    pub mesh: &'static str,
    /// The layout.
    pub layout: &'static str,
    /// Bytes of memory that a device may use, if that matters.
    pub memory: Option<usize>,
    /// Devices that there are, if that matters.
    pub devices: Option<usize>,
}

const fn example(build: fn(&Graph), program: &'static str, mesh: &'static str, layout: &'static str) -> Example {
    Example { build, program, mesh, layout, memory: None, devices: None }
}

impl Example {
    const fn within(self, memory: usize) -> Example {
        Example { memory: Some(memory), ..self }
    }
    const fn on(self, devices: usize) -> Example {
        Example { devices: Some(devices), ..self }
    }
    /// The program.
    ///
    /// # Errors
    /// A mistake in it.
    pub fn program(&self) -> Result<Program, Error> {
        let mut p = ProgramBuilder::new();
        p.function("step", |g| (self.build)(g))?;
        p.finish()
    }
}

/// All lints, by code.
pub fn all() -> impl Iterator<Item = &'static Lint> {
    [
        refusals::LINTS,
        work::LINTS,
        moves::LINTS,
        windows::LINTS,
        sums::LINTS,
        shards::LINTS,
        sections::LINTS,
        memory::LINTS,
        edges::LINTS,
    ]
    .into_iter()
    .flatten()
}

/// The lint of that code, or that name.
pub fn find(code: &str) -> Option<&'static Lint> {
    all().find(|l| l.code.eq_ignore_ascii_case(code) || l.name.eq_ignore_ascii_case(code))
}

/// What a finding has to lose at the least: a share of the time of a run, or of the memory.
const WORTHWHILE: f64 = 0.01;
/// Changes that are planned whole at the most, for the findings that cost most.
const PLANNED: usize = 8;
/// Steps of devices that are planned for that at the most: of a large model on many devices a plan takes seconds, and one
/// change is planned.
const STEPS: usize = 200_000;

/// What findings are looked for with.
pub struct Given<'a> {
    /// Bytes of memory that a device may use, if that is limited.
    pub memory: Option<usize>,
    /// The machine that times are for.
    pub machine: Option<&'a Machine>,
    /// Plans the program on another mesh, with another layout, and without a limit of memory.
    pub plan: &'a dyn Fn(&Mesh, &Layout) -> Result<ProgramPlan, Error>,
}

/// Runs all lints on what is planned, also if that needs more memory than a device may use. Of one remedy there is one
/// finding, and those that cost most come first.
///
/// # Errors
/// A plan of another program.
pub fn check(program: &Program, plan: &ProgramPlan, given: &Given) -> Result<Vec<Finding>, Error> {
    let p = Planned::new(program, plan, given)?;
    let mut found = vec![];
    for lint in all() {
        let Check::Plan(check) = lint.check else { continue };
        let label =
            |f: Finding| Finding { code: lint.code.into(), name: lint.name.into(), severity: lint.severity, ..f };
        found.extend(check(&p).into_iter().map(label));
    }
    let mut found = finding::merged(found, &p.prices);
    found.retain(|f| {
        let all = p.functions.iter().find(|l| Some(&l.function.name) == f.function.as_ref());
        let run = p.prices.of(&all.map_or(p.now.lost, |l| l.total));
        let time = if run > 0.0 { p.prices.of(&f.lost) / run } else { 0.0 };
        let memory = f.lost.held_bytes / p.peak().max(1) as f64;
        f.lost == Lost::default() || time.max(memory) >= WORTHWHILE
    });
    if p.over().is_some() {
        // What does not fit does not run, however fast.
        found.sort_by_key(|f| f.lost.held_bytes == 0.0);
    }
    Ok(judged(&p, found))
}

/// Findings with what their changes take as planned, the first ones. One that this refutes is none: the change does not fit,
/// or saves nothing of the memory, or of the time, that it is about.
fn judged(p: &Planned, found: Vec<Finding>) -> Vec<Finding> {
    let mut left = p.affordable(STEPS, PLANNED);
    let mut judge = |mut f: Finding| {
        f.lost.seconds = p.given.machine.map(|_| p.prices.of(&f.lost));
        let Some(change) = f.change.as_ref().filter(|_| left > 0) else { return Some(f) };
        left -= 1;
        f.tried = p.planned(change, f.function.as_ref());
        let now = p.as_it_is(f.function.as_ref()).seconds;
        // On another mesh there are other devices.
        let (Some(then), None) = (f.tried, &change.mesh) else { return Some(f) };
        if p.over().is_none() && p.given.memory.is_some_and(|m| then.peak_bytes > m) {
            return None;
        }
        if f.lost.held_bytes > 0.0 {
            return (then.peak_bytes < p.peak()).then_some(f);
        }
        if let (Some(now), Some(then)) = (now, then.seconds) {
            f.lost.seconds = Some(now - then);
            return (then < now).then_some(f);
        }
        Some(f)
    };
    found.into_iter().filter_map(&mut judge).collect()
}

/// Findings as text for people: the `most` first ones.
pub fn text(found: &[Finding], most: usize) -> String {
    if found.is_empty() {
        return "findings: none\n".into();
    }
    let mut out = format!("findings: {}; `explain CODE` says more of one\n", found.len());
    for f in found.iter().take(most) {
        let _ = writeln!(out, "{f}");
    }
    if found.len() > most {
        let _ = writeln!(out, "and {} more that cost less; `--format json` has all of them", found.len() - most);
    }
    out
}

/// A code that there is not.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{what}\n  help: {help}")]
pub struct Unknown {
    /// What was asked for.
    pub what: String,
    /// What may have been meant.
    pub help: String,
}

/// Every code, by letter and number, with what it means: lints, errors, and those of other crates.
pub fn codes() -> Vec<(&'static str, &'static str)> {
    let mut codes: Vec<_> = all().map(|l| (l.code, l.about)).chain(elsewhere::CODES.iter().copied()).collect();
    codes.sort_unstable();
    codes
}

/// All there is to say about a code, or a list of all of them.
///
/// # Errors
/// A code that there is not.
pub fn explain(code: Option<&str>) -> Result<String, Unknown> {
    let Some(code) = code else {
        let line = |(code, about): (&str, &str)| match find(code) {
            Some(l) => format!("{code}  {:7}  {}\n", l.severity.to_string(), l.name),
            None => format!("{code}  error    {}\n", about.split_inclusive(['.', ':']).next().unwrap_or(about)),
        };
        return Ok(codes().into_iter().map(line).collect());
    };
    if let Some(l) = find(code) {
        return Ok(format!("{}[{}]: {}\n\n{}\n{}", l.severity, l.code, l.name, l.about, examples(l)));
    }
    if let Some((code, about)) = elsewhere::CODES.iter().find(|(c, _)| c.eq_ignore_ascii_case(code)) {
        return Ok(format!("error[{code}]\n\n{about}\n"));
    }
    let upper = code.to_ascii_uppercase();
    let mut near = crate::error::near(&upper, codes().into_iter().map(|(code, _)| code));
    near.extend(crate::error::near(&code.to_ascii_lowercase(), all().map(|l| l.name)));
    near.truncate(3);
    let help = match near.is_empty() {
        true => "`explain` without a code lists all of them".into(),
        false => format!("did you mean {}?", near.join(" or ")),
    };
    Err(Unknown { what: format!("there is nothing to explain about `{code}`"), help })
}

/// What has a lint and what has not.
fn examples(l: &Lint) -> String {
    let mut out = String::new();
    for (title, e) in [("like this", &l.failing), ("better", &l.fixed)] {
        let layout = if e.layout.is_empty() { "everything whole" } else { e.layout };
        let _ = writeln!(out, "\n{title}: {}\n  mesh    {}\n  layout  {layout}", e.program, e.mesh);
        if let Some(memory) = e.memory {
            let _ = writeln!(out, "  memory  {}", crate::plan::describe::bytes(memory));
        }
        if let Some(devices) = e.devices {
            let _ = writeln!(out, "  devices {devices}");
        }
    }
    out
}

/// The page of all codes, `docs/errors.md`.
pub fn page() -> String {
    let mut out = "# Errors and findings\n\n\
        Every code that a program of this project says. `unet3d explain CODE`, `bert explain CODE` and `coordinator explain \
        CODE` say the same.\n\
        Those with examples are about layouts and programs: `mesh/tests/lints.rs` runs the examples. This page is made of the \
        tables in `mesh/src/lint`:\n\
        `UPDATE_DOCS=1 cargo test -p mesh --test lints` writes it anew.\n"
        .to_string();
    for (code, about) in codes() {
        let _ = match find(code) {
            Some(l) => writeln!(
                out,
                "\n## {code} {} ({})\n\n{about}\n\n```text\n{}\n```",
                l.name,
                l.severity,
                examples(l).trim()
            ),
            None => writeln!(out, "\n## {code} (error)\n\n{about}"),
        };
    }
    out
}
