//! The `plan` command of a model program: on which machine, what of it could be better, and how it is shown; and `explain`.
//!
//! A program flattens [`PlanOptions`] into the options of its command, which is: [`PlanOptions::shown`] before its task
//! is made, and [`Shown::run`] with what makes its program.

use crate::cli::DeviceOptions;
use crate::machine::read;
use crate::run::{self, Failed, Task};
use crate::settings::{Settings, mistake};
use clap::{Args, ValueEnum};
use coordinator::{Failure, Options};
use mesh::dim::Name;
use mesh::error::{Cause, Error};
use mesh::layout::{Layout, Mesh};
use mesh::lint::{self, Finding, Given};
use mesh::machine::Machine;
use mesh::plan::report::{JSON_BYTES, Report, report};
use mesh::plan::{ProgramPlan, diff, html, time};
use mesh::program::Program;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Findings that the text lists.
const LISTED: usize = 10;

/// Options of `plan` alone.
#[derive(Args)]
pub struct PlanOptions {
    /// Text for people, JSON for programs (docs/plan.md), or a page for browsers
    #[arg(long, help_heading = "Plan", value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Say instead what changed from one plan to another, both written by --format json
    #[arg(long, help_heading = "Plan", num_args = 2, value_names = ["A.json", "B.json"], conflicts_with_all = ["machine", "format"])]
    diff: Option<Vec<PathBuf>>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Text,
    Json,
    Html,
}

/// How plans are shown.
pub struct Shown {
    machine: Option<Machine>,
    format: Format,
}

/// What is to be planned.
pub struct Outline {
    /// What the run is, in a few lines.
    pub introduction: String,
    /// Programs, one or one a stage, each with the function whose plan is shown.
    pub functions: Vec<(Program, String)>,
}

/// The plan of a function of a program.
struct Planned {
    program: Program,
    plan: ProgramPlan,
    function: String,
    /// What the layout costs that it need not.
    findings: Vec<Finding>,
}

impl PlanOptions {
    /// How to show the plan; None if what changed between two plans was asked for, which is printed then.
    ///
    /// # Errors
    /// A machine that there is not; a file that describes none, or is no plan of this version.
    pub fn shown(&self, devices: &DeviceOptions) -> Result<Option<Shown>, Failed> {
        if let Some(files) = &self.diff {
            let reports = files.iter().map(|path| kept(path)).collect::<Result<Vec<_>, _>>()?;
            // Clap takes two.
            if let [a, b] = reports.as_slice() {
                run::print(&diff::diff(a, b))?;
            }
            return Ok(None);
        }
        let format = self.format;
        Ok(Some(Shown { machine: devices.machine()?.map(|(machine, _)| machine), format }))
    }
}

/// A plan from a file.
fn kept(path: &Path) -> Result<Report, Failed> {
    let text = read(path, JSON_BYTES as u64 + 1).or_else(|why| {
        let help = "name files that `plan --format json` has written";
        mistake(format!("--diff {} cannot be read: {why}", path.display()), help)
    })?;
    Ok(Report::from_json(&text).map_err(|e| e.note(format!("in the file `{}`", path.display())))?)
}

impl Shown {
    /// Plans what `make` makes of a task, and prints the plans of the program called `title`.
    ///
    /// # Errors
    /// A program or a layout that cannot be. A plan that takes more memory than a device may use is refused with what
    /// would help.
    pub fn run<C: Settings>(
        &self,
        title: &str,
        mut task: Task<C>,
        make: impl Fn(&Task<C>, &Options) -> Result<Outline, Failed>,
    ) -> Result<(), Failed> {
        self.fit(&mut task)?;
        let options = task.options()?;
        let planned = make(&task, &options).and_then(|outline| {
            let plans = outline.functions.into_iter().map(|(program, f)| self.plan(&options, &options, program, f));
            Ok((outline.introduction, plans.collect::<Result<Vec<_>, _>>()?))
        });
        match planned {
            Ok((introduction, plans)) => self.print(title, &introduction, &plans),
            Err(refused @ Failed::Session(Failure::Program(Error { cause: Cause::OverMemory { .. }, .. }))) => {
                let Ok(advice) = self.advice(task, &options, make) else { return Err(refused) };
                Err(Failed::Own { exit_code: refused.exit_code(), error: format!("{refused}\n\n{advice}").into() })
            }
            Err(e) => Err(e),
        }
    }

    /// What is found about memory in plans that are refused for it, with all blocks recomputed if that was not decided.
    fn advice<C: Settings>(
        &self,
        mut task: Task<C>,
        options: &Options,
        make: impl Fn(&Task<C>, &Options) -> Result<Outline, Failed>,
    ) -> Result<String, Failed> {
        let free = Options { memory: None, ..options.clone() };
        let mut text = String::new();
        task.config.common_mut().memory.clear();
        let mut outline = make(&task, &free)?;
        let blocks: BTreeSet<Name> = outline.functions.iter().flat_map(|(program, _)| program.blocks()).collect();
        if task.config.common().recompute.trim() == "auto" && !blocks.is_empty() {
            task.config.common_mut().recompute = blocks.iter().map(|b| &**b).collect::<Vec<_>>().join(",");
            outline = make(&task, &free)?;
            text = "with all blocks recomputed, ".into();
        }
        let mut findings = vec![];
        for (program, function) in outline.functions {
            for f in self.plan(options, &free, program, function)?.findings {
                if f.lost.held_bytes > 0.0 && !findings.contains(&f) {
                    findings.push(f);
                }
            }
        }
        Ok(text + &lint::text(&findings, LISTED))
    }

    /// Sets the memory that a device may use to the machine's, if no other is said; devices that share one of the
    /// machine's share its memory too.
    fn fit<C: Settings>(&self, task: &mut Task<C>) -> Result<(), Failed> {
        if let Some(machine) = &self.machine
            && task.config.common().memory.trim().is_empty()
        {
            let (_, share) = machine.share(task.options()?.mesh.size());
            task.config.common_mut().memory = ((machine.memory as f64 / share) as usize).to_string();
        }
        Ok(())
    }

    /// The plan of a function of a program under some options, and what is found in it for the memory of others.
    fn plan(&self, of: &Options, under: &Options, program: Program, function: String) -> Result<Planned, Failed> {
        let plan = under.plan(&program)?;
        let free = Options { memory: None, devices: None, ..under.clone() };
        let other = |mesh: &Mesh, layout: &Layout| {
            Options { mesh: mesh.clone(), layout: layout.clone(), ..free.clone() }.plan(&program)
        };
        let given = Given { memory: of.memory, machine: self.machine.as_ref(), plan: &other };
        let findings = lint::check(&program, &plan, &given)?;
        Ok(Planned { program, plan, function, findings })
    }

    /// Prints plans of the program called `title`: as text after what introduces them, or alone in another format.
    fn print(&self, title: &str, introduction: &str, plans: &[Planned]) -> Result<(), Failed> {
        if self.format == Format::Text {
            return run::print(&(introduction.to_string() + &self.text(plans)));
        }
        let parts: Vec<_> = plans.iter().map(|p| (&p.program, &p.plan, p.function.as_str())).collect();
        let mut report =
            report(&parts, self.machine.as_ref()).expect("programs have the functions that they were planned for");
        for (of, planned) in report.plans.iter_mut().zip(plans) {
            of.findings.clone_from(&planned.findings);
        }
        match self.format {
            Format::Html => run::print(&html::page(title, &report)),
            Format::Json | Format::Text => run::print(&(report.to_json() + "\n")),
        }
    }

    fn text(&self, plans: &[Planned]) -> String {
        let mut text = String::new();
        for Planned { program, plan, function, findings } in plans {
            text += &format!("\n{}", plan.describe(program, function));
            let estimate = |m| time::estimate(plan, function, m).map(|e| e.describe(m));
            text += &self.machine.as_ref().and_then(estimate).unwrap_or_default();
            text += &format!("\n{}", lint::text(findings, LISTED));
        }
        text
    }
}

/// What to explain.
#[derive(Args)]
pub struct Explain {
    /// The code, such as L0301, or its name; none: a list of all
    code: Option<String>,
}

impl Explain {
    /// Prints what a code means, or the list of all.
    ///
    /// # Errors
    /// A code that there is not.
    pub fn run(&self) -> Result<(), Failed> {
        match lint::explain(self.code.as_deref()) {
            Ok(text) => run::print(&text),
            Err(unknown) => Ok(mistake(unknown.what, unknown.help)?),
        }
    }
}
