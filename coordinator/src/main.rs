//! `coordinator`: brings workers and model programs together.

use std::process::ExitCode;

fn main() -> ExitCode {
    coordinator::cli::main(std::env::args_os())
}
