//! `unet3d`: trains a 3-D UNet on whole volumes, spatially partitioned over a mesh of devices.

mod config;
mod data;
mod model;
mod report;
mod train;

use clap::{Args, Parser, Subcommand};
use config::{Config, Dtype, Mistake, Norm, OptimizerKind};
use coordinator::Failure;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use worker::tls::{Role, Tls};
use worker::transport::connector::TransportChoice;

const EXAMPLES: &str = "\
Examples:
  unet3d train                                        the example CT on a mesh of 4 devices, in runs/unet3d
  unet3d train --mesh x=2,y=2,z=2 --base 16 --out runs/big
  unet3d train --data scan.nii.gz --labels organs.nii.gz --size 128
  unet3d train --resume --steps 300 --mesh x=2        goes on, on another mesh, with the same bits
  unet3d train --workers 4                            each device in a process of its own, with the same bits
  unet3d train --coordinator head:7070 --tls DIR      on the workers of a cluster
  unet3d eval --out runs/big
  unet3d plan --size 512 --base 32 --devices 64       what that would need; allocates nothing

Exit codes:
   0  done
   1  something failed on the way: a device, the disk, training that diverges
   2  the command line, the configuration, a certificate or the layout is wrong, or the plan is over --memory
   3  the data are missing or not usable
   4  there is no good checkpoint, or it is one of another program
  75  try again: stopped as asked, or workers or the coordinator are gone; --resume goes on";

const KEYS: &str = "\
Every option but --devices, --coordinator, --tls, --workers, --transport, --shrink, --config, --set, --out, --checkpoints
and --resume is also a key of the configuration, for --config and --set; further keys are
  organ_weight      weight of an organ's voxel in the cross-entropy; the background's is 1 [default: 8]
  checkpoint_every  steps between checkpoints; one is always written at the end [default: 50]
  keep              checkpoints to keep [default: 2]
Later ones win: --config, then options, then --set. With --resume, and for eval, the run's own config.toml comes first.

A run folder holds
  config.toml         the configuration, for --config
  metrics.jsonl       a row a step: loss and gradient norm with their bits, seconds by phase, samples; the last row has a hash
                      of all variables, and each device's predicted and measured peak of memory
  checkpoints/        safetensors with a manifest each, for --resume
  prediction.nii.gz   the predicted labels, on the grid of the input
  prediction.png      slices: labels on the left, prediction on the right

The exit codes are in `unet3d --help`.";

/// Trains a 3-D UNet on whole volumes, spatially partitioned over a mesh of devices.
///
/// The result is the same, bit for bit, for every mesh and layout.
#[derive(Parser)]
#[command(name = "unet3d", version, after_long_help = EXAMPLES, after_help = "Examples and exit codes: unet3d --help")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train, and write a run folder: metrics, checkpoints, prediction and picture
    #[command(after_long_help = KEYS)]
    Train(Options),
    /// Judge a run's newest checkpoint, and write its prediction and picture again
    #[command(after_long_help = KEYS)]
    Eval(Options),
    /// Print what a run would do: devices, layouts, communication, memory, FLOPs. Runs and fetches nothing
    #[command(after_long_help = KEYS)]
    Plan(Options),
    /// Offer devices to a coordinator: what `train --workers` starts
    #[command(hide = true, disable_help_flag = true)]
    Worker(Rest),
    /// Be a coordinator
    #[command(hide = true, disable_help_flag = true)]
    Coordinator(Rest),
}

/// A command line that is read elsewhere.
#[derive(Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Rest {
    fn of(&self, program: &str) -> impl Iterator<Item = OsString> {
        std::iter::once(program.into()).chain(self.args.clone())
    }
}

#[derive(Args)]
struct Options {
    /// Device mesh: axes with their sizes, or `1` for a single device [default: x=2,y=2]
    #[arg(long, help_heading = "Devices", value_name = "AXIS=SIZE,..")]
    mesh: Option<String>,
    /// Which dimension is split over which axis; dimensions are batch, x, y, z and channel [default: each axis splits
    /// the dimension of its name, and `data` the batch]
    #[arg(long, help_heading = "Devices", value_name = "DIM:AXIS,..")]
    layout: Option<String>,
    /// Number of devices: makes the mesh if none is given, and is checked against it otherwise
    #[arg(long, help_heading = "Devices", value_name = "N")]
    devices: Option<usize>,
    /// Threads of each device; 0: the machine's cores shared out [default: 0]
    #[arg(long, help_heading = "Devices", value_name = "N")]
    threads: Option<usize>,
    /// Memory that each device may use, such as `2GiB` [default: no limit]
    #[arg(long, help_heading = "Devices", value_name = "BYTES")]
    memory: Option<String>,
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
    /// Filters at the first level; each of the three levels below has twice as many [default: 8]
    #[arg(long, help_heading = "Model", value_name = "N")]
    base: Option<usize>,
    /// Normalisation after each convolution [default: batch]
    #[arg(long, help_heading = "Model")]
    norm: Option<Norm>,
    /// Share of the activations that drop-out sets to 0 [default: 0]
    #[arg(long, help_heading = "Model", value_name = "SHARE")]
    dropout: Option<f32>,
    /// Element type of the computation [default: f32]
    #[arg(long, help_heading = "Model")]
    dtype: Option<Dtype>,
    /// Steps to train, those before a --resume included [default: 150]
    #[arg(long, help_heading = "Training", value_name = "N")]
    steps: Option<u32>,
    /// Optimizer [default: adam]
    #[arg(long, help_heading = "Training")]
    optimizer: Option<OptimizerKind>,
    /// Learning rate; times 0.3 every 20,000 steps [default: 0.003]
    #[arg(long, help_heading = "Training", value_name = "RATE")]
    rate: Option<f32>,
    /// Views of the volume a step [default: 1]
    #[arg(long, help_heading = "Training", value_name = "N")]
    batch: Option<usize>,
    /// Flip, turn and shift views at random
    #[arg(long, help_heading = "Training")]
    augment: bool,
    /// Seed of everything random [default: 1]
    #[arg(long, help_heading = "Training", value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: Option<u64>,
    /// `ct` (an example CT of 122x101x112 voxels with 4 organs, fetched with pip on first use), `phantom` (made up, of
    /// the same size), or a NIfTI file [default: ct, or phantom where that cannot be fetched]
    #[arg(long, help_heading = "Data", value_name = "ct|phantom|FILE")]
    data: Option<String>,
    /// NIfTI file with the label of each voxel of --data: whole numbers, 0 the background
    #[arg(long, help_heading = "Data", value_name = "FILE")]
    labels: Option<String>,
    /// Extents to resample to, `64` or `64x64x48` [default: as they are]
    #[arg(long, help_heading = "Data", value_name = "N|NxNxN")]
    size: Option<String>,
    /// Extents of the block to use, from the middle of the (resampled) volume [default: all of it]
    #[arg(long, help_heading = "Data", value_name = "N|NxNxN")]
    crop: Option<String>,
    /// TOML file of the configuration, with any of its keys
    #[arg(long, help_heading = "Run", value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Set a key of the configuration, such as `--set organ_weight=4`; may be repeated
    #[arg(long = "set", help_heading = "Run", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Run folder
    #[arg(long, help_heading = "Run", value_name = "DIR", default_value = "runs/unet3d")]
    out: PathBuf,
    /// Where checkpoints are: a folder that the workers reach too, or `s3://bucket/prefix` [default: the run folder's
    /// `checkpoints`]
    #[arg(long, help_heading = "Run", value_name = "DIR|URL")]
    checkpoints: Option<String>,
    /// Write a trace of the last steps of all devices, for ui.perfetto.dev or chrome://tracing
    #[arg(long, help_heading = "Run", value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Go on from the newest good checkpoint of the run, on any mesh
    #[arg(long, help_heading = "Run")]
    resume: bool,
}

impl Options {
    /// The configuration: that of the run to go on with, then the file, then flags, then `--set`.
    fn config(&self, of_run: bool) -> Result<Config, Mistake> {
        let stored = self.out.join(train::CONFIG_FILE);
        let mut c = Config::default();
        if of_run && stored.exists() {
            (c, _) = c.with_file(&stored)?;
        }
        let mut mesh_given = self.mesh.is_some();
        if let Some(path) = &self.config {
            let (file, has_mesh) = c.with_file(path)?;
            (c, mesh_given) = (file, mesh_given || has_mesh);
        }
        if let Some(n) = self.devices {
            if n == 0 || n > 4096 {
                return config::mistake(format!("--devices {n} is out of range"), "it goes from 1 to 4096");
            }
            if !mesh_given {
                (c.mesh, c.layout) = (config::mesh_of(n), String::new());
            }
        }
        if let Some(mesh) = &self.mesh {
            // Rules are for the mesh they were given with.
            (c.mesh, c.layout) = (mesh.clone(), String::new());
        }
        macro_rules! take {
            ($($field:ident),*) => { $(if let Some(v) = &self.$field { c.$field = v.clone(); })* };
        }
        take!(
            layout, threads, memory, base, steps, seed, norm, optimizer, rate, dtype, dropout, batch, data, labels,
            size, crop
        );
        c.augment |= self.augment;
        let c = c.with_settings(&self.settings)?;
        c.check()?;
        Ok(c)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (options, run): (_, fn(&train::Task) -> Result<(), train::Failed>) = match &cli.command {
        Command::Train(o) => (o, train::train),
        Command::Eval(o) => (o, train::eval),
        Command::Plan(o) => (o, train::plan),
        Command::Worker(rest) => return worker::cli::main(rest.of("worker")),
        Command::Coordinator(rest) => return coordinator::cli::main(rest.of("coordinator")),
    };
    let of_run = options.resume || matches!(cli.command, Command::Eval(_));
    let result = options.config(of_run).map_err(train::Failed::from).and_then(|config| {
        let place = match (&options.coordinator, options.workers) {
            (Some(url), _) => train::Place::Coordinator(url.clone()),
            (None, Some(n)) => train::Place::Workers(n),
            (None, None) => train::Place::Here,
        };
        let tls = match (&place, &options.tls) {
            (train::Place::Coordinator(_), Some(dir)) => Some(Tls::load(dir, Role::Client).map_err(Failure::from)?),
            _ => None,
        };
        let (out, resume, devices) = (options.out.clone(), options.resume, options.devices);
        let trace = options.trace.clone();
        let (transport, checkpoints, shrink) = (options.transport, options.checkpoints.clone(), options.shrink);
        run(&train::Task { config, out, resume, devices, place, transport, checkpoints, shrink, tls, trace })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", worker::cli::error_text(&e.to_string()));
            ExitCode::from(e.exit_code())
        }
    }
}
