//! `worker`: offers this machine's devices to a coordinator.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::cli::main(std::env::args_os())
}
