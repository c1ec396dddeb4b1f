//! The `plan` command of a model program: on which machine, what of it could be better, and how it is shown; and `explain`.
//!
//! A program flattens [`PlanOptions`] into the options of its command, which is: [`PlanOptions::shown`] before its task
//! is made, [`Shown::fit`] before its program is, [`Shown::plan`] for each function, and [`Shown::print`] with the plans.

use crate::cli::DeviceOptions;
use crate::run::{self, Failed, Task};
use crate::settings::{Settings, mistake};
use clap::{Args, ValueEnum};
use coordinator::Options;
use mesh::error::Error;
use mesh::layout::{Layout, Mesh};
use mesh::lint::{self, Finding, Given};
use mesh::machine::Machine;
use mesh::plan::report::{JSON_BYTES, Report, report};
use mesh::plan::{ProgramPlan, diff, html, time};
use mesh::program::Program;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The longest description of a machine that is read; `Machine::from_toml` refuses one that is longer than it takes.
const MACHINE_BYTES: u64 = 1 << 20;

/// Findings that the text lists.
const LISTED: usize = 10;

/// Options of `plan` alone.
#[derive(Args)]
pub struct PlanOptions {
    /// Say how long a step would take on this machine, and plan for its memory: `h100x16` or `a100x64` (so many devices,
    /// as by --devices), or a file that `coordinator calibrate` wrote
    #[arg(long, help_heading = "Plan", value_name = "NAME|FILE.toml")]
    machine: Option<String>,
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

/// The plan of a function of a program.
pub struct Planned {
    /// The program.
    pub program: Program,
    /// Its plan.
    pub plan: ProgramPlan,
    /// The function.
    pub function: String,
    /// What the layout costs that it need not.
    pub findings: Vec<Finding>,
}

impl PlanOptions {
    /// How to show the plan; None if what changed between two plans was asked for, which is printed then. The machine's
    /// number of devices is that of the mesh, unless another one is given.
    ///
    /// # Errors
    /// A machine that there is not; a file that describes none, or is no plan of this version.
    pub fn shown(&self, devices: &mut DeviceOptions) -> Result<Option<Shown>, Failed> {
        if let Some(files) = &self.diff {
            let reports = files.iter().map(|path| kept(path)).collect::<Result<Vec<_>, _>>()?;
            // Clap takes two.
            if let [a, b] = reports.as_slice() {
                run::print(&diff::diff(a, b))?;
            }
            return Ok(None);
        }
        let format = self.format;
        let Some(text) = &self.machine else { return Ok(Some(Shown { machine: None, format })) };
        let (machine, n) = match text.ends_with(".toml") {
            true => (described(Path::new(text))?, None),
            false => Machine::named(text)?,
        };
        devices.or_devices(n);
        Ok(Some(Shown { machine: Some(machine), format }))
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

/// A machine from a file.
fn described(path: &Path) -> Result<Machine, Failed> {
    let text = read(path, MACHINE_BYTES).or_else(|why| {
        let help = "name a file that `coordinator calibrate` has written, or a machine such as `h100x16`";
        mistake(format!("--machine {} cannot be read: {why}", path.display()), help)
    })?;
    Ok(Machine::from_toml(&text).map_err(|e: Error| e.note(format!("in the file `{}`", path.display())))?)
}

/// The text of a file, of so many bytes at the most: what follows is left out.
fn read(path: &Path, most: u64) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(most).read_to_string(&mut text)?;
    Ok(text)
}

impl Shown {
    /// Sets the memory that a device may use to the machine's, if no other is said; devices that share one of the
    /// machine's share its memory too.
    ///
    /// # Errors
    /// A mesh that cannot be.
    pub fn fit<C: Settings>(&self, task: &mut Task<C>) -> Result<(), Failed> {
        if let Some(machine) = &self.machine
            && task.config.common().memory.trim().is_empty()
        {
            let (_, share) = machine.share(task.options()?.mesh.size());
            task.config.common_mut().memory = ((machine.memory as f64 / share) as usize).to_string();
        }
        Ok(())
    }

    /// The plan of a function of a program, and what is found in it.
    ///
    /// # Errors
    /// A layout that cannot be, or takes more memory than a device may use.
    pub fn plan(&self, options: &Options, program: Program, function: String) -> Result<Planned, Failed> {
        let plan = options.plan(&program)?;
        let findings = self.findings(options, &program, &plan)?;
        Ok(Planned { program, plan, function, findings })
    }

    fn findings(&self, options: &Options, program: &Program, plan: &ProgramPlan) -> Result<Vec<Finding>, Error> {
        let free = Options { memory: None, devices: None, ..options.clone() };
        let plan_on = |mesh: &Mesh, layout: &Layout| {
            Options { mesh: mesh.clone(), layout: layout.clone(), ..free.clone() }.plan(program)
        };
        let given = Given { memory: options.memory, machine: self.machine.as_ref(), plan: &plan_on };
        lint::check(program, plan, &given)
    }

    /// Prints plans of the program called `title`: as text after what introduces them, or alone in another format.
    ///
    /// # Errors
    /// A standard output that cannot be written.
    pub fn print(&self, title: &str, introduction: &str, plans: &[Planned]) -> Result<(), Failed> {
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
