//! `unet3d`: trains a 3-D UNet on whole volumes, spatially partitioned over a mesh of devices.

mod config;
mod data;
mod model;
mod report;
mod train;

use clap::{Args, Parser, Subcommand};
use config::{Config, Dtype, Mistake, Norm, OptimizerKind};
use std::path::PathBuf;
use std::process::ExitCode;

/// Trains a 3-D UNet on whole volumes, spatially partitioned over a mesh of devices.
///
/// The result is the same, bit for bit, for every mesh and layout.
#[derive(Parser)]
#[command(name = "unet3d", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train, and write a run folder: metrics, checkpoint, prediction and picture.
    Train(Options),
    /// Judge a run's newest checkpoint and write its prediction and picture.
    Eval(Options),
    /// Print what a run would do: devices, layouts, communication, memory, FLOPs. Runs nothing.
    Plan(Options),
}

#[derive(Args)]
struct Options {
    /// Device mesh: axes with sizes [default: x=2,y=2]
    #[arg(long)]
    mesh: Option<String>,
    /// Which dimension is split over which axis, `x:x,y:y`; dimensions are batch, x, y, z, channel
    /// [default: each axis splits the dimension of its name, and `data` the batch]
    #[arg(long)]
    layout: Option<String>,
    /// Number of devices; makes the mesh if none is given, and is checked against it otherwise
    #[arg(long)]
    devices: Option<usize>,
    /// Threads of each device; 0: the machine's cores shared out
    #[arg(long)]
    threads: Option<usize>,
    /// Memory that each device may use, such as `2GiB`
    #[arg(long)]
    memory: Option<String>,
    /// Filters at the first level
    #[arg(long)]
    base: Option<usize>,
    /// Steps to train, in all
    #[arg(long)]
    steps: Option<u32>,
    /// Seed of everything random
    #[arg(long)]
    seed: Option<u64>,
    /// Normalisation
    #[arg(long)]
    norm: Option<Norm>,
    /// Optimizer
    #[arg(long)]
    optimizer: Option<OptimizerKind>,
    /// Learning rate
    #[arg(long)]
    rate: Option<f32>,
    /// Element type (bf16: not yet)
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Share of activations that drop-out sets to 0
    #[arg(long)]
    dropout: Option<f32>,
    /// Augmented views a step
    #[arg(long)]
    batch: Option<usize>,
    /// Flip, turn and shift views at random
    #[arg(long)]
    augment: bool,
    /// `ct` (an example CT, fetched on first use), `phantom`, or a NIfTI file
    #[arg(long)]
    data: Option<String>,
    /// NIfTI file with the label of each voxel of `--data`
    #[arg(long)]
    labels: Option<String>,
    /// Extents to resample to: `64` or `64x64x48`
    #[arg(long)]
    size: Option<String>,
    /// Extents of the block in the middle to use: `64` or `40x37x33`
    #[arg(long)]
    crop: Option<String>,
    /// TOML file with any of the keys of `config.toml` in a run folder
    #[arg(long)]
    config: Option<PathBuf>,
    /// Set a key of the configuration: `--set organ_weight=4`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Run folder
    #[arg(long, default_value = "runs/unet3d")]
    out: PathBuf,
    /// Go on from the newest good checkpoint in the run folder, on any mesh
    #[arg(long)]
    resume: bool,
}

impl Options {
    /// The configuration: a resumed run's own, then the file, then flags, then `--set`.
    fn config(&self) -> Result<Config, Mistake> {
        let stored = self.out.join(train::CONFIG_FILE);
        let mut c = Config::default();
        if self.resume && stored.exists() {
            c = c.with_file(&stored)?;
        }
        if let Some(path) = &self.config {
            c = c.with_file(path)?;
        }
        if let Some(n) = self.devices.filter(|_| self.mesh.is_none()) {
            if n == 0 || n > 4096 {
                return config::mistake(format!("--devices {n} is not a number of devices"));
            }
            (c.mesh, c.layout) = (config::mesh_of(n), String::new());
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

/// Exit codes: 0 done, 2 configuration or program, 3 data, 4 checkpoint, 1 anything else.
fn main() -> ExitCode {
    let cli = Cli::parse();
    let (options, run): (_, fn(&train::Task) -> Result<(), train::Failed>) = match &cli.command {
        Command::Train(o) => (o, train::train),
        Command::Eval(o) => (o, train::eval),
        Command::Plan(o) => (o, train::plan),
    };
    let result = options.config().map_err(train::Failed::from).and_then(|config| {
        run(&train::Task { config, out: options.out.clone(), resume: options.resume, devices: options.devices })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(e.exit_code())
        }
    }
}
