//! `worker`: offers this machine's devices to a coordinator.

use clap::{Parser, ValueEnum};
use std::process::ExitCode;
use worker::cli::{self, WorkerArgs};

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

const CODES: &str = "\
Exit codes:
   1  something that the system does not give
   2  the coordinator refuses this worker, or the options are wrong
  75  the coordinator is gone for longer than its lease: try again";

/// Offers this machine's devices to a coordinator, and stays for as long as that is there.
#[derive(Parser)]
#[command(name = "worker", version, after_help = CODES)]
struct Cli {
    #[command(flatten)]
    worker: WorkerArgs,
    /// How to log; what is logged, the environment's MESH_LOG says
    #[arg(long, default_value = "text")]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli::log(matches!(cli.log_format, LogFormat::Json));
    cli::main(&cli.worker)
}
