//! The command line of a model program: the options that every one has, and how it ends.
//!
//! A program flattens [`DeviceOptions`] first and [`RunOptions`] last into its own options (which have `--steps`), and
//! says of `mesh`, `layout` and `out` what is the model's own by clap's `mut_arg`; it flattens [`Process`] into its
//! commands, so that it can be its own workers and coordinator.

use crate::machine;
use crate::run::{CONFIG_FILE, Failed, Place, Task};
use crate::search::AUTO;
use crate::settings::{Mistake, Settings, layout_file, mesh_of, range};
use clap::{Args, Subcommand};
use coordinator::Failure;
use mesh::machine::Machine;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use worker::tls::{Role, Tls};
use worker::transport::connector::TransportChoice;

/// Options of the devices.
#[derive(Args, Default)]
pub struct DeviceOptions {
    /// Device mesh: axes with their sizes, or `1` for a single device
    #[arg(long, help_heading = "Devices", value_name = "AXIS=SIZE,..")]
    mesh: Option<String>,
    /// Which dimension is split over which axis, a file that says so, or `auto`: one is searched for, for --machine
    #[arg(long, help_heading = "Devices", value_name = "DIM:AXIS,..|FILE.toml|auto")]
    layout: Option<String>,
    /// Number of devices: makes the mesh if none is given, and is checked against it otherwise
    #[arg(long, help_heading = "Devices", value_name = "N")]
    devices: Option<usize>,
    /// Machine, for how long a step takes there, its memory, and --layout auto: `h100x16` or `a100x64` (so many devices, as
    /// by --devices), or a file that `coordinator calibrate` wrote
    #[arg(long, help_heading = "Devices", value_name = "NAME|FILE.toml")]
    machine: Option<String>,
    /// The most chunks that a dimension is cut into, and so the most shards that it may have. Sums go by chunks: another
    /// number is another order of them, and other bits [default: 8]
    #[arg(long, help_heading = "Devices", value_name = "N")]
    chunks: Option<usize>,
    /// Threads of each device; 0: the machine's cores shared out [default: 0]
    #[arg(long, help_heading = "Devices", value_name = "N")]
    threads: Option<usize>,
    /// Memory that each device may use, such as `2GiB` [default: no limit]
    #[arg(long, help_heading = "Devices", value_name = "BYTES")]
    memory: Option<String>,
    /// Blocks whose values are made again in the backward pass instead of kept for it, which saves memory, costs time and
    /// changes no bit: `auto` (what --memory takes, for the fewest FLOPs), `none`, or their names [default: auto]
    #[arg(long, help_heading = "Devices", value_name = "auto|none|BLOCK,..")]
    recompute: Option<String>,
    /// Run on the workers of this coordinator instead of in this process
    #[arg(long, help_heading = "Devices", value_name = "URL", conflicts_with = "workers")]
    coordinator: Option<String>,
    /// Folder with ca.pem, client.pem and client.key, for a --coordinator with TLS
    #[arg(long, help_heading = "Devices", value_name = "DIR", env = "MESH_TLS", hide_env_values = true)]
    tls: Option<PathBuf>,
    /// Start a coordinator and so many worker processes for this run, and share the devices out to them
    #[arg(long, help_heading = "Devices", value_name = "N")]
    workers: Option<usize>,
    /// How worker processes reach each other: rings in shared memory on one host and gRPC between hosts, or one of them
    #[arg(long, help_heading = "Devices", value_name = "auto|ring|grpc", default_value = "auto")]
    transport: TransportChoice,
    /// Go on with fewer devices when workers are lost and none take their place in time
    #[arg(long, help_heading = "Devices")]
    shrink: bool,
}

impl DeviceOptions {
    /// The machine that is named, and how many devices of it.
    ///
    /// # Errors
    /// A machine that there is not, a file that describes none.
    pub fn machine(&self) -> Result<Option<(Machine, Option<usize>)>, Failed> {
        self.machine.as_deref().map(machine::named).transpose()
    }
}

/// Options of the run.
#[derive(Args, Default)]
pub struct RunOptions {
    /// Seed of everything random [default: 1]
    #[arg(long, help_heading = "Training", value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: Option<u64>,
    /// TOML file of the configuration, with any of its keys
    #[arg(long, help_heading = "Run", value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Set a key of the configuration; may be repeated
    #[arg(long = "set", help_heading = "Run", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Run folder
    #[arg(long, help_heading = "Run", value_name = "DIR")]
    out: PathBuf,
    /// Where checkpoints are: a folder that the workers reach too, or `s3://bucket/prefix` [default: the run folder's
    /// `checkpoints`]
    #[arg(long, help_heading = "Run", value_name = "DIR|URL")]
    checkpoints: Option<String>,
    /// Write a trace of the last steps of all devices, for ui.perfetto.dev or chrome://tracing
    #[arg(long, help_heading = "Run", value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Say at the end where the time of a step went, by op and by step, and write that to the run folder as profile.txt and
    /// profile.json
    #[arg(long, help_heading = "Run")]
    profile: bool,
    /// Go on from the newest good checkpoint of the run, on any mesh
    #[arg(long, help_heading = "Run")]
    resume: bool,
}

impl RunOptions {
    /// A run in that folder, with its checkpoints there or where they are said to be.
    pub fn of(out: PathBuf, checkpoints: Option<String>) -> RunOptions {
        RunOptions { out, checkpoints, ..RunOptions::default() }
    }

    /// The configuration in the run folder.
    pub fn config_file(&self) -> PathBuf {
        self.out.join(CONFIG_FILE)
    }
}

/// What a command line asks for: the configuration is that of the run folder, if it is `of_run` or resumed, then the
/// file, then options, those of the model set by `own`, then `--set`.
///
/// # Errors
/// Options or files that make no sense; certificates that cannot be read.
pub fn task<C: Settings>(
    devices: &DeviceOptions,
    run: &RunOptions,
    of_run: bool,
    own: impl FnOnce(&mut C),
) -> Result<Task<C>, Failed> {
    let (machine, of_machine) = devices.machine()?.unzip();
    let count = devices.devices.or(of_machine.flatten());
    let config = config(devices, count, run, of_run || run.resume, own)?;
    let place = match (&devices.coordinator, devices.workers) {
        (Some(url), _) => Place::Coordinator(url.clone()),
        (None, Some(n)) => Place::Workers(n),
        (None, None) => Place::Here,
    };
    let tls = match (&place, &devices.tls) {
        (Place::Coordinator(_), Some(dir)) => Some(Tls::load(dir, Role::Client).map_err(Failure::from)?),
        _ => None,
    };
    Ok(Task {
        config,
        out: run.out.clone(),
        resume: run.resume,
        devices: count,
        chunks_given: of_run || run.resume || devices.chunks.is_some(),
        machine,
        place,
        transport: devices.transport,
        checkpoints: run.checkpoints.clone(),
        shrink: devices.shrink,
        trace: run.trace.clone(),
        profile: run.profile,
        tls,
    })
}

fn config<C: Settings>(
    devices: &DeviceOptions,
    count: Option<usize>,
    run: &RunOptions,
    of_run: bool,
    own: impl FnOnce(&mut C),
) -> Result<C, Mistake> {
    let stored = run.config_file();
    let mut c = C::default();
    if of_run && stored.exists() {
        (c, _) = c.with_file(&stored)?;
    }
    let mut mesh_given = devices.mesh.is_some();
    if let Some(path) = &run.config {
        let (file, has_mesh) = c.with_file(path)?;
        (c, mesh_given) = (file, mesh_given || has_mesh);
    }
    let common = c.common_mut();
    // Rules are for the mesh they were given with.
    let mut set_mesh = |mesh: String| (common.mesh, common.layout) = (mesh, String::new());
    if let Some(n) = count {
        range("--devices", n as u64, 1, 4096)?;
        if !mesh_given {
            let searched = devices.layout.as_deref() == Some(AUTO);
            set_mesh(if searched { AUTO.into() } else { mesh_of(n, C::AXES) });
        }
    }
    if let Some(mesh) = &devices.mesh {
        set_mesh(mesh.clone());
    }
    macro_rules! take {
        ($from:ident: $($field:ident),*) => { $(if let Some(v) = &$from.$field { common.$field = v.clone(); })* };
    }
    take!(devices: layout, chunks, threads, memory, recompute);
    if let Some(file) = devices.layout.as_ref().filter(|l| l.ends_with(".toml")) {
        common.layout = layout_file(Path::new(file))?;
    }
    take!(run: seed);
    own(&mut c);
    let c = c.with_settings(&run.settings)?;
    c.check()?;
    Ok(c)
}

/// Commands by which a model program is its own workers and coordinator.
#[derive(Subcommand)]
pub enum Process {
    /// Offer devices to a coordinator: what `--workers` starts
    #[command(hide = true, disable_help_flag = true)]
    Worker(Rest),
    /// Be a coordinator
    #[command(hide = true, disable_help_flag = true)]
    Coordinator(Rest),
}

/// A command line that is read elsewhere.
#[derive(Args)]
pub struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Process {
    /// Is that process, to its end.
    pub fn main(&self) -> ExitCode {
        let line = |program: &str, rest: &Rest| -> Vec<OsString> { [&[program.into()], rest.args.as_slice()].concat() };
        match self {
            Process::Worker(rest) => worker::cli::main(line("worker", rest)),
            Process::Coordinator(rest) => coordinator::cli::main(line("coordinator", rest)),
        }
    }
}

/// Ends the program: says what failed, if anything, and gives its exit code.
pub fn exit(result: Result<(), Failed>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", worker::cli::error_text(&e.to_string()));
            ExitCode::from(e.exit_code())
        }
    }
}
