//! The command line of a worker: that of the `worker` binary, and of model programs that run as their own workers.

use crate::config::{self, ParseError};
use crate::node::{self, NodeError, NodeOptions};
use crate::service::Offer;
use crate::tls::{Role, Tls};
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const AFTER: &str = "\
Examples:
  worker --join 127.0.0.1:7070 --devices cpu:2
  worker --join head:7070 --devices cpu:4 --listen 0.0.0.0:0 --advertise node7 --tls /etc/mesh
  worker --config worker.toml                     join = \"head:7070\", devices = \"cpu:4\", tls = \"/etc/mesh\", ..

Every option is also a key of the file that --config names; the environment wins over it, and the command line over both.

Exit codes:
   0  done
   1  something that the system does not give
   2  the options are wrong, or the coordinator refuses this worker
  75  the coordinator is gone for longer than its lease: try again";

/// Offers this machine's devices to a coordinator, and stays for as long as that is there.
#[derive(Parser, Clone, Debug)]
#[command(name = "worker", version, after_help = AFTER)]
struct WorkerArgs {
    /// The coordinator to join, `host:port`
    #[arg(long, env = "MESH_COORDINATOR", value_name = "ADDR")]
    join: String,
    /// Devices to offer
    #[arg(long, env = "MESH_DEVICES", default_value = "cpu:1", value_name = "cpu:N", value_parser = devices)]
    devices: usize,
    /// Threads of each device; 0: the machine's cores shared out
    #[arg(long, env = "MESH_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Memory that each device may use, such as `8GiB`; no limit if not given
    #[arg(long, env = "MESH_MEMORY", value_name = "BYTES", value_parser = memory)]
    memory: Option<usize>,
    /// Address of the worker's services; port 0 lets the system choose
    #[arg(long, env = "MESH_WORKER_LISTEN", default_value = "127.0.0.1:0", value_name = "ADDR")]
    listen: SocketAddr,
    /// What others call instead of that address, such as this host's name; the port is that of the worker's service
    #[arg(long, env = "MESH_ADVERTISE", value_name = "HOST[:PORT]")]
    advertise: Option<String>,
    /// Folder with ca.pem, worker.pem and worker.key: encrypts every connection, and lets in who is meant to be
    #[arg(long, env = "MESH_TLS", value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Serve other hosts without encryption, to anyone
    #[arg(long)]
    insecure: bool,
    /// Where checkpoints may lie: this folder or object store, or below it
    #[arg(long, env = "MESH_STORE", default_value = ".", value_name = "DIR|URL")]
    store: String,
    /// Seconds that a worker that was asked to end (SIGTERM) stays for its session to write a checkpoint
    #[arg(long, env = "MESH_GRACE", default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86400))]
    grace: u64,
    /// File with any of these options
    #[arg(long, value_name = "FILE.toml")]
    #[allow(dead_code, reason = "read before the other options are")]
    config: Option<PathBuf>,
    /// How to log; what is logged, the environment's MESH_LOG says
    #[arg(long, env = "MESH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

fn devices(text: &str) -> Result<usize, String> {
    let n = text.strip_prefix("cpu:").and_then(|n| n.parse().ok()).filter(|n| (1..=1024).contains(n));
    n.ok_or_else(|| format!("`{text}` is no number of devices such as `cpu:2`; there are CPU devices only"))
}

/// Bytes: `8GiB`, `512MiB`, `1000`.
///
/// # Errors
/// A text that is no amount of memory; in words.
pub fn memory(text: &str) -> Result<usize, String> {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];
    let text = text.trim();
    let (number, shift) = units.iter().find_map(|(u, s)| text.strip_suffix(u).map(|n| (n, *s))).unwrap_or((text, 0));
    match number.trim().parse::<f64>() {
        Ok(n) if n > 0.0 && n < 1e12 => Ok((n * f64::from(1 << shift)) as usize),
        _ => Err(format!("`{text}` is no amount of memory such as `2GiB`")),
    }
}

/// Reads a command line and the file that its `--config` names; the first word is the program's name.
///
/// # Errors
/// Options that are wrong, or help that was asked for: printed, with the exit code to end with.
pub fn options<T: CommandFactory + FromArgMatches>(args: impl IntoIterator<Item = OsString>) -> Result<T, ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    config::parse(&args).map_err(|e| match e {
        ParseError::CommandLine(e) => {
            // Nowhere to print to: the code still tells.
            let _ = e.print();
            ExitCode::from(e.exit_code() as u8)
        }
        ParseError::File(e) => {
            eprintln!("{}", error_text(&e.to_string()));
            ExitCode::from(2)
        }
    })
}

/// What people see of a failure whose text begins with its code: `W0001: ..` is `error[W0001]: ..`.
pub fn error_text(text: &str) -> String {
    match text.split_once(": ") {
        Some((code, rest)) if code.len() == 5 && code[1..].bytes().all(|b| b.is_ascii_digit()) => {
            format!("error[{code}]: {rest}")
        }
        _ if text.starts_with("error[") => text.into(),
        _ => format!("error: {text}"),
    }
}

/// Runs a worker by its command line, whose first word is the program's name, until it ends.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: WorkerArgs = match options(args) {
        Ok(args) => args,
        Err(code) => return code,
    };
    log(args.log_format);
    match args.options().and_then(|o| node::run(&o)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", error_text(&e.to_string()));
            ExitCode::from(e.exit_code())
        }
    }
}

impl WorkerArgs {
    fn options(self) -> Result<NodeOptions, NodeError> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if self.threads > 0 { self.threads } else { (cores / self.devices).max(1) };
        Ok(NodeOptions {
            tls: self.tls.map(|dir| Tls::load(&dir, Role::Worker)).transpose()?,
            join: self.join,
            bind: self.listen,
            advertise: self.advertise,
            offer: Offer { devices: self.devices, threads, memory: self.memory },
            insecure: self.insecure,
            store: self.store,
            grace: Duration::from_secs(self.grace),
        })
    }
}

/// Begins to log to standard error: what `MESH_LOG` says, such as `debug` or `worker=trace`; warnings if it says nothing.
pub fn log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MESH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,worker=info,coordinator=info"));
    let colours = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    // A second logger would be a mistake of the program's own; the first one stays.
    let _ = match format {
        LogFormat::Json => builder.json().try_init(),
        LogFormat::Text => builder.try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_memory_are_read_or_refused() {
        assert_eq!((devices("cpu:4"), memory("1.5GiB"), memory("77")), (Ok(4), Ok(3 << 29), Ok(77)));
        for bad in ["cpu", "cpu:0", "cuda:1", "4"] {
            assert!(devices(bad).unwrap_err().contains("CPU devices only"), "{bad}");
        }
        assert!(memory("much").is_err() && memory("-1GiB").is_err());
    }
}
