//! `unet3d`: trains a 3-D UNet on whole volumes, spatially partitioned over a mesh of devices.

mod config;
mod data;
mod model;
mod train;

use clap::{Args, Parser, Subcommand};
use config::{Config, Norm, OptimizerKind};
use examples::cli::{self, DeviceOptions, Process, RunOptions};
use examples::plan::{Explain, PlanOptions};
use examples::run::Failed;
use examples::settings::Dtype;
use std::process::ExitCode;
use train::Task;

const EXAMPLES: &str = "\
Examples:
  unet3d train                                        the example CT on a mesh of 4 devices, in runs/unet3d
  unet3d train --mesh x=2,y=2,z=2 --base 16 --out runs/big
  unet3d train --data scan.nii.gz --labels organs.nii.gz --size 128
  unet3d train --resume --steps 300 --mesh x=2        goes on, on another mesh, with the same bits
  unet3d train --memory 500MiB                        recomputes blocks to fit into that, with the same bits
  unet3d train --workers 4                            each device in a process of its own, with the same bits
  unet3d train --coordinator head:7070 --tls DIR      on the workers of a cluster
  unet3d eval --out runs/big
  unet3d plan --size 512 --base 32 --devices 64       what that would need; allocates nothing
  unet3d explain L0301                                what a finding of `plan`, or an error, means
  unet3d plan --size 256 --base 32 --machine h100x16  how long a step would take there
  unet3d plan --machine h100x4 --format html          as a page, on the standard output; json for programs

Exit codes:
   0  done
   1  something failed on the way: a device, the disk, training that diverges
   2  the command line, the configuration, a certificate or the layout is wrong, or the plan is over --memory
   3  the data are missing or not usable
   4  there is no good checkpoint, or it is one of another program
  75  try again: stopped as asked, or workers or the coordinator are gone; --resume goes on";

const KEYS: &str = "\
Every option but --devices, --coordinator, --tls, --workers, --transport, --shrink, --config, --set, --out, --checkpoints,
--trace, --profile and --resume is also a key of the configuration, for --config and --set; further keys are
  organ_weight      weight of an organ's voxel in the cross-entropy; the background's is 1 [default: 8]
  checkpoint_every  steps between checkpoints; one is always written at the end [default: 50]
  keep              checkpoints to keep [default: 2]
Later ones win: --config, then options, then --set. With --resume, and for eval, the run's own config.toml comes first.

A run folder holds
  config.toml         the configuration, for --config
  metrics.jsonl       a row a step: loss and gradient norm with their bits, dice, seconds by phase, samples; the last row has a
                      hash of all variables, and each device's predicted and measured peak of memory
  tensorboard/        loss, gradient norm and dice for TensorBoard: `tensorboard --logdir RUN/tensorboard`
  loss.png            a chart of the loss
  profile.txt         with --profile: where the time of a step went; profile.json for programs
  checkpoints/        safetensors with a manifest each, for --resume
  prediction.nii.gz   the predicted labels, on the grid of the input
  prediction.png      slices: labels on the left, prediction on the right

The exit codes are in `unet3d --help`.";

const MESH: &str = "Device mesh: axes with their sizes, or `1` for a single device [default: x=2,y=2]";
const LAYOUT: &str = "\
Which dimension is split over which axis, a file `.toml` that says so, or `auto`: one is searched for, for --machine; dimensions are batch, x, y, z and channel \
[default: each axis splits the dimension of its name, and `data` the batch]";

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
    Plan(Plan),
    /// Say what a code means, of a finding of `plan` or of an error, and how it is made and mended
    Explain(Explain),
    #[command(flatten)]
    Process(Process),
}

#[derive(Args)]
struct Plan {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    plan: PlanOptions,
}

impl Plan {
    fn plan(self) -> Result<(), Failed> {
        match self.plan.shown(&self.options.devices)? {
            Some(shown) => train::plan(self.options.task(false)?, &shown),
            None => Ok(()),
        }
    }
}

#[derive(Args)]
#[command(
    mut_arg("mesh", |a| a.help(MESH)),
    mut_arg("layout", |a| a.help(LAYOUT)),
    mut_arg("settings", |a| a.help("Set a key of the configuration, such as `--set organ_weight=4`; may be repeated")),
    mut_arg("out", |a| a.required(false).default_value("runs/unet3d")),
)]
struct Options {
    #[command(flatten)]
    devices: DeviceOptions,
    /// Filters at the first level; each level below has twice as many [default: 8]
    #[arg(long, help_heading = "Model", value_name = "N")]
    base: Option<usize>,
    /// Levels; each below the first one halves every extent [default: 4]
    #[arg(long, help_heading = "Model", value_name = "N")]
    levels: Option<usize>,
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
    #[command(flatten)]
    run: RunOptions,
}

impl Options {
    /// What to do on a run that there is (`of_run`), or on a new one.
    fn task(&self, of_run: bool) -> Result<Task, Failed> {
        cli::task(&self.devices, &self.run, of_run, |c: &mut Config| {
            if let Some(steps) = self.steps {
                c.common.steps = steps;
            }
            macro_rules! take {
                ($($field:ident),*) => { $(if let Some(v) = &self.$field { c.$field = v.clone(); })* };
            }
            take!(base, levels, norm, optimizer, rate, dtype, dropout, batch, data, labels, size, crop);
            c.augment |= self.augment;
        })
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(o) => o.task(false).and_then(train::train),
        Command::Eval(o) => o.task(true).and_then(|t| train::eval(&t)),
        Command::Plan(o) => o.plan(),
        Command::Explain(o) => o.run(),
        Command::Process(process) => return process.main(),
    };
    cli::exit(result)
}
