//! The command line of a coordinator: that of the `coordinator` binary, and of model programs that run as their own.

use crate::calibrate::calibrate;
use crate::certs;
use crate::server::{Coordinator, ServerOptions};
use crate::status;
use clap::{Args, Parser, Subcommand};
use proto::control::control_client::ControlClient;
use proto::control::{DrainRequest, StatusReply, StatusRequest};
use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;
use worker::cli::{LogFormat, error_text, log, options};
use worker::node::{NodeError, check_bind, endpoint};
use worker::tls::{Role, Tls};

const AFTER: &str = "\
Examples:
  coordinator                                     for workers and model programs of this machine
  coordinator certs init /etc/mesh                an authority for the cluster, and certificates
  coordinator --listen 0.0.0.0:7070 --tls /etc/mesh
  coordinator status 127.0.0.1:7070               what it has; `watch` shows changes, `drain` lets a worker go
  coordinator --config coordinator.toml           listen = \"0.0.0.0:7070\", tls = \"/etc/mesh\", wait = 600, ..

Every option is also a key of the file that --config names; the environment wins over it, and the command line over both.

Exit codes:
  0  done
  1  something that the system does not give
  2  the options, a configuration file or a certificate are wrong
 75  (status, watch, drain) the coordinator is not there: try again";

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
    /// Show what a coordinator has: workers, session, steps
    Status {
        #[command(flatten)]
        at: At,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a line whenever that changes
    Watch {
        #[command(flatten)]
        at: At,
    },
    /// Measure this machine, in about a minute, for `plan --machine FILE`
    Calibrate {
        /// Where the description goes
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
        /// What the machine is called
        #[arg(long, default_value = "this machine")]
        name: String,
    },
    /// Have a worker leave: its session writes a checkpoint and goes on without it
    Drain {
        #[command(flatten)]
        at: At,
        /// The worker's number, as `status` shows it
        worker: u64,
        /// Why, for the logs
        #[arg(long, default_value = "an operator asks for it")]
        reason: String,
    },
    /// Say what a code means, of an error or of a finding of `plan`
    Explain {
        /// The code, such as L0301, or its name; none: a list of all
        code: Option<String>,
    },
}

/// A coordinator that runs already.
#[derive(Args)]
struct At {
    /// The coordinator, `host:port`
    coordinator: String,
    /// Folder with ca.pem and the observer's certificate; to drain, the client's
    #[arg(long, env = "MESH_TLS", value_name = "DIR")]
    tls: Option<PathBuf>,
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
    #[error("C0039: the coordinator {coordinator} is not there: {why}\n  help: start it, or name another one")]
    Away { coordinator: String, why: String },
    #[error("C0038: the coordinator {coordinator} does not do that: {why}")]
    Answer { coordinator: String, why: String },
    /// A store or a state that cannot be used.
    #[error("{0}")]
    Setup(String),
    #[error("C0045: {0}")]
    Unknown(mesh::lint::Unknown),
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
            Failed::Listen { .. } | Failed::Setup(_) | Failed::Unknown(_) => 2,
            Failed::System(_) | Failed::Answer { .. } => 1,
            Failed::Away { .. } => 75,
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
        Some(Command::Explain { code }) => {
            mesh::lint::explain(code.as_deref()).map(|text| say(&text)).map_err(Failed::Unknown)
        }
        Some(Command::Status { at, json }) => operate(&at, Role::Observer, async |mut c| {
            let status = c.status(StatusRequest {}).await?.into_inner();
            say(&if json { json_of(&status) } else { table_of(&status) });
            Ok(())
        }),
        Some(Command::Watch { at }) => operate(&at, Role::Observer, async |mut c| {
            let mut stream = c.watch(StatusRequest {}).await?.into_inner();
            let mut said = String::new();
            while let Some(status) = stream.message().await? {
                let line = line_of(&status);
                if line != said {
                    say(&format!("{line}\n"));
                    said = line;
                }
            }
            Ok(())
        }),
        Some(Command::Drain { at, worker, reason }) => {
            operate(&at, Role::Client, async |mut c| c.drain(DrainRequest { worker, reason }).await.map(|_| ()))
        }
        Some(Command::Calibrate { file, name }) => measure(&file, &name),
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

/// Writes what this machine can do to a file.
fn measure(file: &Path, name: &str) -> Result<(), Failed> {
    let cannot = |e: std::io::Error| Failed::Setup(format!("C0044: cannot write {}: {e}", file.display()));
    // What cannot be written is not measured first; what is there stays until that is done.
    std::fs::OpenOptions::new().append(true).create(true).open(file).map_err(cannot)?;
    let lines = std::fs::read_to_string("/proc/meminfo").map_err(|e| Failed::System(format!("the memory: {e}")))?;
    let total =
        lines.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    let memory = total.ok_or_else(|| Failed::System("the memory: /proc/meminfo does not say".into()))? * 1024;
    let found = calibrate(name, memory, |line| eprintln!("{line}")).map_err(|e| Failed::System(e.to_string()))?;
    say(&found.text());
    std::fs::write(file, found.machine.to_toml()).map_err(cannot)
}

/// Asks a coordinator for something.
fn operate(
    at: &At,
    role: Role,
    ask: impl AsyncFnOnce(ControlClient<Channel>) -> Result<(), tonic::Status>,
) -> Result<(), Failed> {
    let tls = at.tls.as_ref().map(|dir| Tls::load(dir, role)).transpose()?;
    let coordinator = || at.coordinator.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Failed::System(e.to_string()))?.block_on(async {
        let channel = endpoint(&at.coordinator, tls.as_ref(), Role::Coordinator)?.connect().await;
        let channel = channel.map_err(|e| Failed::Away { coordinator: coordinator(), why: worker::tls::causes(&e) })?;
        let asked = ask(ControlClient::new(channel)).await;
        asked.map_err(|s| Failed::Answer { coordinator: coordinator(), why: worker::tls::said(&s) })
    })
}

/// Prints; a reader who has gone away is no reason to fail.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
}

fn line_of(s: &StatusReply) -> String {
    let devices: u32 = s.workers.iter().map(|w| w.devices).sum();
    let mut results: Vec<String> = s.results.iter().map(|(n, v)| format!("{n} {v:.4}")).collect();
    results.sort();
    format!(
        "epoch {}, {} workers with {devices} devices, {}, {} steps, {} recoveries, {} checkpoints  {}",
        s.epoch,
        s.workers.len(),
        if s.session.is_empty() { "no session" } else { &s.session },
        s.steps,
        s.recoveries,
        s.checkpoints,
        results.join("  ")
    )
    .trim_end()
    .to_string()
}

fn table_of(s: &StatusReply) -> String {
    let mut text = format!("{}\n", line_of(s));
    if !s.checkpoint.is_empty() {
        text += &format!("newest checkpoint {}\n", s.checkpoint);
    }
    text += &format!("{:>6}  {:28} {:>7} {:>10}\n", "worker", "address", "devices", "heard of");
    for w in &s.workers {
        let ago = format!("{:.1} s ago", f64::from(w.silent_ms) / 1e3);
        let leaving = if w.leaving { "  leaving" } else { "" };
        text += &format!("{:>6}  {:28} {:>7} {ago:>10}{leaving}\n", w.worker, w.address, w.devices);
    }
    text
}

fn json_of(s: &StatusReply) -> String {
    let worker = |w: &proto::control::WorkerStatus| {
        serde_json::json!({
            "worker": w.worker, "address": w.address, "devices": w.devices, "silent_ms": w.silent_ms, "leaving": w.leaving,
        })
    };
    let status = serde_json::json!({
        "build": s.build, "epoch": s.epoch, "session": s.session, "steps": s.steps, "recoveries": s.recoveries,
        "checkpoints": s.checkpoints, "checkpoint": s.checkpoint, "results": s.results,
        "workers": s.workers.iter().map(worker).collect::<Vec<_>>(),
    });
    format!("{status}\n")
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
    for address in [Some(cli.listen), cli.status].into_iter().flatten() {
        check_bind(address, tls.is_some(), cli.insecure)?;
    }
    let options = ServerOptions {
        silence: Duration::from_secs(cli.silence),
        lease: Duration::from_secs(cli.lease),
        wait: Duration::from_secs(cli.wait),
        replace_timeout: Duration::from_secs(cli.replace_timeout),
        tls,
        state: cli.state,
        store: cli.store,
    };
    let system = |e: &dyn std::fmt::Display| Failed::System(e.to_string());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| system(&e))?.block_on(async {
        let listen = async |address| {
            let socket = tokio::net::TcpListener::bind(address).await;
            let socket = socket.map_err(|why| Failed::Listen { address, why })?;
            let bound = socket.local_addr().map_err(|e| system(&e))?;
            Ok::<_, Failed>((socket, bound))
        };
        let (socket, address) = listen(cli.listen).await?;
        let coordinator = Coordinator::new(options).map_err(Failed::Setup)?;
        let mut ends = signal(SignalKind::terminate()).map_err(|e| system(&e))?;
        println!("listening on {address}");
        if let Some(address) = cli.status {
            let (socket, address) = listen(address).await?;
            println!("status at http://{address}/");
            tokio::spawn(status::serve(coordinator.clone(), socket));
        }
        // It serves on while it ends.
        let mut server = tokio::spawn(coordinator.clone().serve(socket));
        tokio::select! {
            done = &mut server => done.map_err(|e| system(&e))?.map_err(|e| system(&worker::tls::causes(&e))),
            _ = ends.recv() => {
                let grace = Duration::from_secs(cli.grace);
                tracing::info!("asked to end: the session has {grace:?} for a checkpoint");
                coordinator.end("it was asked to end", grace).await;
                Ok(())
            }
        }
    })
}
