//! The command line of a coordinator: that of the `coordinator` binary, and of model programs that run as their own.

use crate::certs;
use crate::server::{Coordinator, ServerOptions};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use worker::cli::{LogFormat, error_text, log, options};
use worker::node::{NodeError, check_bind};
use worker::tls::{Role, Tls};

const AFTER: &str = "\
Examples:
  coordinator                                     for workers and model programs of this machine
  coordinator certs init /etc/mesh                an authority for the cluster, and certificates
  coordinator --listen 0.0.0.0:7070 --tls /etc/mesh
  coordinator --config coordinator.toml           listen = \"0.0.0.0:7070\", tls = \"/etc/mesh\", wait = 600, ..

Every option is also a key of the file that --config names; the environment wins over it, and the command line over both.

Exit codes:
  0  done
  1  something that the system does not give
  2  the options, a configuration file or a certificate are wrong";

/// Brings workers and model programs together: workers join it, model programs run on their devices.
#[derive(Parser)]
#[command(name = "coordinator", version, after_help = AFTER, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Make the certificates of a cluster
    #[command(subcommand)]
    Certs(Certs),
}

#[derive(Subcommand)]
enum Certs {
    /// Make a certificate authority, and a certificate for each role: coordinator, worker, client, observer
    Init {
        /// Folder to write to
        dir: PathBuf,
        /// Days for which the certificates are good
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Issue a further certificate, in a folder of its own
    Add {
        /// Folder of the authority
        dir: PathBuf,
        /// What its owner may be
        #[arg(long, value_name = "coordinator|worker|client|observer")]
        role: Role,
        /// Its owner's name, which refusals are logged with
        #[arg(long)]
        name: String,
        /// Days for which the certificate is good
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
}

/// Seconds of an option.
fn seconds() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=86400)
}

#[derive(Args)]
struct Serve {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, env = "MESH_LISTEN", default_value = "127.0.0.1:7070", value_name = "ADDR")]
    listen: SocketAddr,
    /// Folder with ca.pem, coordinator.pem and coordinator.key: encrypts every connection, and lets in who is meant to be
    #[arg(long, env = "MESH_TLS", value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Serve other hosts without encryption, to anyone
    #[arg(long)]
    insecure: bool,
    /// Where a status for browsers and monitoring is served, read-only and unencrypted; nowhere if not given
    #[arg(long, env = "MESH_STATUS", value_name = "ADDR")]
    status: Option<SocketAddr>,
    /// Folder in which to remember what must outlast this process; nothing is remembered if not given
    #[arg(long, env = "MESH_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where checkpoints may lie: this folder or object store, or below it
    #[arg(long, env = "MESH_STORE", default_value = ".", value_name = "DIR|URL")]
    store: String,
    /// Seconds that a model program waits for enough devices
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    wait: u64,
    /// Seconds of silence after which a worker is given up
    #[arg(long, default_value_t = 2, value_name = "SECONDS", value_parser = seconds())]
    silence: u64,
    /// Seconds that a model program that has lost workers waits for others
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    replace_timeout: u64,
    /// Seconds that a model program has for a checkpoint when the coordinator is asked to end (SIGTERM)
    #[arg(long, env = "MESH_GRACE", default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    grace: u64,
    /// Seconds that a worker looks for a lost coordinator before it ends
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = seconds())]
    lease: u64,
    /// File with any of these options
    #[arg(long, value_name = "FILE.toml")]
    #[allow(dead_code, reason = "read before the other options are")]
    config: Option<PathBuf>,
    /// How to log; what is logged, the environment's MESH_LOG says
    #[arg(long, env = "MESH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// Why a coordinator ends.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("C0020: cannot listen on {address}: {why}\n  help: name another address with --listen")]
    Listen { address: SocketAddr, why: std::io::Error },
    #[error("C0036: {0}")]
    System(String),
    /// A store or a state that cannot be used.
    #[error("{0}")]
    Setup(String),
    #[error(transparent)]
    Options(#[from] NodeError),
    #[error(transparent)]
    Certs(#[from] certs::CertsError),
}

impl From<worker::tls::TlsError> for Failed {
    fn from(e: worker::tls::TlsError) -> Failed {
        Failed::Options(e.into())
    }
}

impl Failed {
    fn exit_code(&self) -> u8 {
        match self {
            Failed::Listen { .. } | Failed::Setup(_) => 2,
            Failed::System(_) => 1,
            Failed::Options(e) => e.exit_code(),
            Failed::Certs(certs::CertsError::File { .. } | certs::CertsError::Make(_)) => 1,
            Failed::Certs(_) => 2,
        }
    }
}

/// Runs a coordinator by its command line, whose first word is the program's name, until it ends.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli: Cli = match options(args) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let done = match cli.command {
        Some(Command::Certs(command)) => certificates(command),
        None => serve(cli.serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", error_text(&e.to_string()));
            ExitCode::from(e.exit_code())
        }
    }
}

fn certificates(command: Certs) -> Result<(), Failed> {
    let said = match command {
        Certs::Init { dir, days } => certs::init(&dir, days)?,
        Certs::Add { dir, role, name, days } => certs::add(&dir, role, &name, days)?,
    };
    print!("{said}");
    Ok(())
}

fn serve(cli: Serve) -> Result<(), Failed> {
    log(cli.log_format);
    let tls = cli.tls.map(|dir| Tls::load(&dir, Role::Coordinator)).transpose()?;
    check_bind(cli.listen, tls.is_some(), cli.insecure)?;
    let options = ServerOptions {
        silence: Duration::from_secs(cli.silence),
        lease: Duration::from_secs(cli.lease),
        wait: Duration::from_secs(cli.wait),
        replace_timeout: Duration::from_secs(cli.replace_timeout),
        tls,
        status: cli.status,
        state: cli.state,
        store: cli.store,
    };
    let system = |e: &dyn std::fmt::Display| Failed::System(e.to_string());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| system(&e))?.block_on(async {
        let socket = tokio::net::TcpListener::bind(cli.listen).await;
        let socket = socket.map_err(|why| Failed::Listen { address: cli.listen, why })?;
        let address = socket.local_addr().map_err(|e| system(&e))?;
        let coordinator = Coordinator::new(options).map_err(Failed::Setup)?;
        let mut ends = signal(SignalKind::terminate()).map_err(|e| system(&e))?;
        println!("listening on {address}");
        tokio::select! {
            done = coordinator.clone().serve(socket) => done.map_err(|e| system(&worker::tls::causes(&e))),
            _ = ends.recv() => {
                let grace = Duration::from_secs(cli.grace);
                tracing::info!("asked to end: the session has {grace:?} for a checkpoint");
                coordinator.end("it was asked to end", grace).await;
                Ok(())
            }
        }
    })
}
