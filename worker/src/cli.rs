//! The command line of a worker: that of the `worker` binary, and of model programs that run as their own workers.

use crate::node::{self, NodeOptions};
use crate::service::Offer;
use std::net::SocketAddr;
use std::process::ExitCode;

/// Options of a worker.
#[derive(clap::Args, Clone, Debug)]
pub struct WorkerArgs {
    /// The coordinator to join, `host:port`
    #[arg(long, env = "MESH_COORDINATOR", value_name = "ADDR")]
    pub join: String,
    /// Devices to offer
    #[arg(long, env = "MESH_DEVICES", default_value = "cpu:1", value_name = "cpu:N", value_parser = devices)]
    pub devices: usize,
    /// Threads of each device; 0: the machine's cores shared out
    #[arg(long, env = "MESH_THREADS", default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Memory that each device may use, such as `8GiB`; no limit if not given
    #[arg(long, env = "MESH_MEMORY", value_name = "BYTES", value_parser = memory)]
    pub memory: Option<usize>,
    /// Address of the worker's services; port 0 lets the system choose
    #[arg(long, env = "MESH_WORKER_LISTEN", default_value = "127.0.0.1:0", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Serve other hosts without encryption
    #[arg(long)]
    pub insecure: bool,
    /// Where checkpoints may lie: this folder or object store, or below it
    #[arg(long, env = "MESH_STORE", default_value = ".", value_name = "DIR|URL")]
    pub store: String,
    /// Seconds that a worker that was asked to end (SIGTERM) stays for its session to write a checkpoint
    #[arg(long, env = "MESH_GRACE", default_value_t = 30, value_name = "SECONDS")]
    pub grace: u64,
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

/// Runs a worker until it ends. Exit codes: 2 refused or misconfigured, 75 the coordinator is gone (try again), 1 else.
pub fn main(args: &WorkerArgs) -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if args.threads > 0 { args.threads } else { (cores / args.devices).max(1) };
    let options = NodeOptions {
        join: args.join.clone(),
        bind: args.listen,
        offer: Offer { devices: args.devices, threads, memory: args.memory },
        insecure: args.insecure,
        store: args.store.clone(),
        grace: std::time::Duration::from_secs(args.grace),
    };
    match node::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// Begins to log to standard error: what `MESH_LOG` says, such as `debug` or `worker=trace`; warnings if it says nothing.
pub fn log(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MESH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,worker=info,coordinator=info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second logger would be a mistake of the program's own; the first one stays.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
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
