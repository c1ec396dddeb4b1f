//! `coordinator`: brings workers and model programs together.

use clap::{Parser, ValueEnum};
use coordinator::server::{Coordinator, ServerOptions};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Brings workers and model programs together: workers join it, model programs run on their devices.
#[derive(Parser)]
#[command(name = "coordinator", version)]
struct Cli {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, env = "MESH_LISTEN", default_value = "127.0.0.1:7070", value_name = "ADDR")]
    listen: SocketAddr,
    /// Seconds that a model program waits for enough devices
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    wait: u64,
    /// Seconds that a model program that has lost workers waits for others
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    replace_timeout: u64,
    /// Folder in which to remember what must outlast this process; nothing is remembered if not given
    #[arg(long, env = "MESH_STATE", value_name = "DIR")]
    state: Option<std::path::PathBuf>,
    /// Where checkpoints may lie: this folder or object store, or below it
    #[arg(long, env = "MESH_STORE", default_value = ".", value_name = "DIR|URL")]
    store: String,
    /// Seconds that a model program has for a checkpoint when the coordinator is asked to end (SIGTERM)
    #[arg(long, env = "MESH_GRACE", default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Seconds that a worker looks for a lost coordinator before it ends
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    lease: u64,
    /// Serve other hosts without encryption
    #[arg(long)]
    insecure: bool,
    /// How to log; what is logged, the environment's MESH_LOG says
    #[arg(long, default_value = "text")]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    worker::cli::log(matches!(cli.log_format, LogFormat::Json));
    let options = ServerOptions {
        wait: Duration::from_secs(cli.wait),
        lease: Duration::from_secs(cli.lease),
        replace_timeout: Duration::from_secs(cli.replace_timeout),
        state: cli.state.clone(),
        store: cli.store.clone(),
        ..ServerOptions::default()
    };
    match serve(&cli, options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error[C0020]: {e}");
            ExitCode::from(2)
        }
    }
}

fn serve(cli: &Cli, options: ServerOptions) -> Result<(), String> {
    worker::node::check_bind(cli.listen, cli.insecure)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| e.to_string())?.block_on(async {
        let socket = tokio::net::TcpListener::bind(cli.listen).await;
        let socket =
            socket.map_err(|e| format!("cannot listen on {}: {e}; name another address with --listen", cli.listen))?;
        let address = socket.local_addr().map_err(|e| e.to_string())?;
        println!("listening on {address}");
        let coordinator = Coordinator::new(options)?;
        let mut ends = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
        tokio::select! {
            done = coordinator.clone().serve(socket) => done.map_err(|e| e.to_string()),
            _ = ends.recv() => {
                let grace = Duration::from_secs(cli.grace);
                tracing::info!("asked to end: the session has {grace:?} for a checkpoint");
                coordinator.end("it was asked to end", grace).await;
                Ok(())
            }
        }
    })
}
