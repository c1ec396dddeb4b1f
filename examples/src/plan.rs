//! `plan`: what a run would do, as text, as JSON or as a page, or what changed between two of them; `explain`: what a
//! finding means.

use crate::run::{Failed, print, written};
use crate::settings::mistake;
use clap::{Args, ValueEnum};
use mesh::lint;
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use mesh::report::{self, Report, VERSION, diff::diff};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Findings that the text lists.
const LISTED: usize = 10;

/// What a plan is shown as.
#[derive(Clone, Copy, Default, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Text,
    /// For programs; docs/plan.md says what is in it
    Json,
    /// One page for a browser, with everything in it
    Html,
}

/// Options of the plan.
#[derive(Args)]
pub struct PlanOptions {
    /// What to show the plan as
    #[arg(long, help_heading = "Plan", value_enum, default_value_t)]
    format: Format,
    /// Instead: say what changed between two plans that were written with `--format json`
    #[arg(long, help_heading = "Plan", num_args = 2, value_names = ["A.json", "B.json"])]
    diff: Vec<PathBuf>,
}

/// What is planned, function by function.
pub struct Planned {
    /// What the run is, for the text.
    pub introduction: String,
    /// Functions, each with its plan and the program that it is of.
    pub functions: Vec<(String, ProgramPlan, Program)>,
    /// Bytes that a device may use.
    pub memory: Option<usize>,
}

/// What `--format json` writes.
#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    plans: Vec<Report>,
}

impl PlanOptions {
    /// Prints what is asked for; `plan` makes the plan if that is wanted.
    ///
    /// # Errors
    /// A plan that cannot be made; files that are no plans.
    pub fn run(&self, plan: impl FnOnce() -> Result<Planned, Failed>) -> Result<(), Failed> {
        if let [a, b] = &self.diff[..] {
            let (a, b) = (read(a)?, read(b)?);
            let both = a.plans.iter().zip(&b.plans);
            return print(&both.map(|(a, b)| diff(a, b)).collect::<Vec<_>>().join("\n"));
        }
        let planned = plan()?;
        match self.format {
            Format::Text => print(&planned.text()?),
            Format::Json => {
                let document = Document { version: VERSION, plans: planned.reports()? };
                let text = serde_json::to_string(&document).map_err(std::io::Error::from);
                print(&(written(Path::new("the plan as JSON"), text)? + "\n"))
            }
            Format::Html => print(&report::html::page(&planned.reports()?)),
        }
    }
}

impl Planned {
    fn text(&self) -> Result<String, Failed> {
        let mut text = self.introduction.clone();
        for (function, plan, program) in &self.functions {
            let found = lint::check(program, plan, self.memory)?;
            text += &format!("\n{}\n{}", plan.describe(program, function), lint::text(&found, LISTED));
        }
        Ok(text)
    }

    fn reports(&self) -> Result<Vec<Report>, Failed> {
        let mut reports = vec![];
        for (function, plan, program) in &self.functions {
            let found = lint::check(program, plan, self.memory)?;
            reports.extend(report::report(program, plan, function, found)?);
        }
        Ok(reports)
    }
}

fn read(path: &Path) -> Result<Document, Failed> {
    let file = path.display();
    let help = "write it with `plan --format json`";
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(why) => return Ok(mistake(format!("--diff cannot read {file}: {why}"), help)?),
    };
    match serde_json::from_str::<Document>(&text) {
        Ok(document) if document.version == VERSION => Ok(document),
        Ok(document) => {
            let what = format!("--diff {file} is of version {}, and this program reads {VERSION}", document.version);
            Ok(mistake(what, help)?)
        }
        Err(why) => Ok(mistake(format!("--diff {file} is no plan: {why}"), help)?),
    }
}

/// What to explain.
#[derive(Args)]
pub struct Explain {
    /// The code, such as L0301, or its name; none: a list of all
    code: Option<String>,
}

impl Explain {
    /// Prints it.
    ///
    /// # Errors
    /// A code that there is not.
    pub fn run(&self) -> Result<(), Failed> {
        match lint::explain(self.code.as_deref()) {
            Ok(text) => print(&text),
            Err(what) => {
                let (what, help) = what.split_once("\n  help: ").unwrap_or((&what, ""));
                Ok(mistake(what, help)?)
            }
        }
    }
}
