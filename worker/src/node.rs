//! A worker's life: it offers its devices to a coordinator and stays for as long as that wants it.

use crate::access;
use crate::kernels::isa::{Isa, UnknownIsa};
use crate::service::{Offer, WorkerService};
use crate::store::Store;
use crate::tls::{self, Role, Tls, TlsError};
use crate::transport::connector::{self, ListenOptions, Listener, Version};
use proto::control::worker_server::WorkerServer;
use proto::control::{FromWorker, WorkerHello, from_worker, membership_client::MembershipClient, to_worker};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint};

/// Largest message of the control plane.
pub const MESSAGE_BYTES: usize = 4 << 20;
/// Version of the control plane's protocol.
pub const PROTOCOL: u32 = 1;
/// How long a worker without a coordinator tries to find it again, if none has said otherwise.
const LEASE: Duration = Duration::from_secs(10);
/// How often a connection is tried, and how long it has for an answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Time between two beats.
const BEAT: Duration = Duration::from_millis(500);

/// How a worker runs.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The coordinator: `host:port`, or a URL.
    pub join: String,
    /// Where the worker's own services listen.
    pub bind: SocketAddr,
    /// What others call instead: `host` or `host:port`, the port being that of the worker's service.
    pub advertise: Option<String>,
    /// What it offers.
    pub offer: Offer,
    /// Allows services without TLS where other hosts can reach them.
    pub insecure: bool,
    /// TLS of every connection.
    pub tls: Option<Tls>,
    /// Where checkpoints may lie: there or below.
    pub store: String,
    /// How long a worker that was asked to end stays for its session to let go of it.
    pub grace: Duration,
}

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The coordinator does not let it in: another attempt would not help.
    #[error("error[W0030]: the coordinator {coordinator} refuses this worker: {reason}")]
    Refused {
        /// Who.
        coordinator: String,
        /// Why.
        reason: String,
    },
    /// The coordinator cannot be reached, or is gone.
    #[error(
        "error[W0031]: the coordinator {coordinator} is not there: {reason}\n  help: start it with `coordinator --listen \
         {coordinator}`, or name another one with --join"
    )]
    Gone {
        /// Who.
        coordinator: String,
        /// Why.
        reason: String,
    },
    /// Something that the system does not give.
    #[error("error[W0032]: {0}")]
    System(String),
    /// Options that are wrong, or none together.
    #[error("error[W0033]: {what}\n  help: {help}")]
    Options {
        /// What is wrong.
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// An instruction set that there is not.
    #[error(transparent)]
    Isa(#[from] UnknownIsa),
    /// Certificates that are not good, or an address that contradicts them.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl NodeError {
    /// The process's exit code: 2 configuration, 75 try again.
    pub fn exit_code(&self) -> u8 {
        match self {
            NodeError::Refused { .. } | NodeError::Options { .. } | NodeError::Tls(_) | NodeError::Isa(_) => 2,
            NodeError::Gone { .. } => 75,
            NodeError::System(_) => 1,
        }
    }
}

/// A channel to a control service of a process of that role.
///
/// # Errors
/// An address that is none, or contradicts whether there is TLS.
pub fn endpoint(address: &str, tls: Option<&Tls>, callee: Role) -> Result<Endpoint, TlsError> {
    let wrong = |e: tonic::transport::Error| TlsError::Address {
        address: address.into(),
        why: format!("is no address: {}", tls::causes(&e)),
        help: "write `host:port`",
    };
    let mut endpoint = Endpoint::from_shared(tls::url(address, tls.is_some())?).map_err(wrong)?;
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls.client(callee)).map_err(wrong)?;
    }
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        // A process that is there and does not answer is as good as gone.
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20))
}

/// Refuses to serve others in the clear.
///
/// # Errors
/// An address that other hosts reach, without TLS.
pub fn check_bind(bind: SocketAddr, tls: bool, insecure: bool) -> Result<(), NodeError> {
    if bind.ip().is_loopback() || tls || insecure {
        return Ok(());
    }
    Err(NodeError::Options {
        what: format!("{bind} can be reached from other hosts, and anyone there could use this process"),
        help: "name a folder of certificates with --tls (`coordinator certs init` makes one), or pass --insecure if \
               everyone on that network may",
    })
}

/// Runs a worker until the coordinator is gone for good, or refuses it; blocks.
///
/// # Errors
/// Always, in the end: why it ended.
pub fn run(options: &NodeOptions) -> Result<(), NodeError> {
    run_telling(options, |_| ())
}

/// The same; `bound` is told where the worker is reached, before it joins.
///
/// # Errors
/// As for [`run`].
pub fn run_telling(options: &NodeOptions, bound: impl FnOnce(&WorkerHello)) -> Result<(), NodeError> {
    let system = |e: &dyn std::fmt::Display| NodeError::System(e.to_string());
    check_bind(options.bind, options.tls.is_some(), options.insecure)?;
    Isa::asked()?;
    let runtime = connector::runtime().map_err(|e| system(&e))?;
    let listen = ListenOptions {
        bind: SocketAddr::new(options.bind.ip(), 0),
        // The port that is given is that of the worker's service.
        advertise: options.advertise.as_deref().map(|a| connector::host_and_port(a).0.into()),
        insecure: options.insecure,
        tls: options.tls.clone(),
        ..ListenOptions::default()
    };
    let listener = Arc::new(Listener::bind(listen, runtime.handle().clone()).map_err(|e| system(&e))?);
    let store = Store::open(&options.store).map_err(|e| system(&e))?;
    let service = WorkerService::new(options.offer.clone(), listener.clone(), store);
    let end = runtime.block_on(async {
        let socket = TcpListener::bind(options.bind).await.map_err(|e| system(&e))?;
        let address = socket.local_addr().map_err(|e| system(&e))?;
        let served = WorkerServer::new(service.clone()).max_decoding_message_size(MESSAGE_BYTES);
        let address = connector::advertised(options.advertise.as_deref(), address).map_err(|e| system(&e))?;
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<WorkerServer<WorkerService>>().await;
        let server = access::server(options.tls.as_ref())
            .map_err(|e| system(&tls::causes(&e)))?
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .add_service(served)
            .add_service(health_service)
            .add_service(access::reflection())
            .serve_with_incoming(TcpIncoming::from(socket).with_nodelay(Some(true)));
        let server = tokio::spawn(server);
        let own = listener.address();
        let hello = WorkerHello {
            protocol: PROTOCOL,
            build: Version::default().build,
            address,
            data_address: own.grpc.clone(),
            host: own.host.to_string(),
            socket: own.socket.clone(),
            devices: options.offer.devices as u32,
            threads: options.offer.threads as u32,
            memory: options.offer.memory.unwrap_or(0) as u64,
            epoch: 0,
            amx: Isa::detect() == Isa::Amx,
        };
        bound(&hello);
        let asked = asked_to_end().map_err(|e| system(&e))?;
        let end = stay(options, hello, &service, asked).await;
        server.abort();
        end
    });
    let stop = service.clone();
    // Devices may be waiting for peers that are gone.
    std::thread::spawn(move || stop.unload(u64::MAX, "the worker ends")).join().ok();
    end
}

/// Counts the times that this process was asked to end.
fn asked_to_end() -> std::io::Result<watch::Receiver<u32>> {
    let (send, receive) = watch::channel(0);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let (mut signals, send) = (signal(kind)?, send.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                send.send_modify(|n| *n += 1);
            }
        });
    }
    Ok(receive)
}

/// Waits until this process was asked to end more than so many times.
async fn times(asked: &mut watch::Receiver<u32>, seen: u32) -> u32 {
    match asked.wait_for(|n| *n > seen).await {
        Ok(n) => *n,
        // Nobody will ask any more.
        Err(_) => std::future::pending().await,
    }
}

/// Joins, and joins again when the coordinator was lost, until it is gone for longer than the lease or the worker may go.
async fn stay(
    options: &NodeOptions,
    mut hello: WorkerHello,
    service: &WorkerService,
    mut asked: watch::Receiver<u32>,
) -> Result<(), NodeError> {
    let gone = |reason: String| NodeError::Gone { coordinator: options.join.clone(), reason };
    let channel = endpoint(&options.join, options.tls.as_ref(), Role::Coordinator)?.connect_lazy();
    let mut lease = LEASE;
    let mut alone = Instant::now();
    loop {
        hello.epoch = service.epoch();
        match join(&channel, &hello, &mut lease, &mut asked, options.grace).await {
            Left::Done(reason) => {
                tracing::info!("leaves: {reason}");
                return Ok(());
            }
            Left::Refused(reason) => {
                return Err(NodeError::Refused { coordinator: options.join.clone(), reason });
            }
            Left::Lost { reason, joined } => {
                if joined {
                    tracing::warn!("lost the coordinator {}: {reason}", options.join);
                    alone = Instant::now();
                    // What runs belongs to an epoch that ends with the connection.
                    let service = service.clone();
                    let stop = move || service.unload(0, "this worker has lost its coordinator");
                    tokio::task::spawn_blocking(stop).await.map_err(|e| NodeError::System(e.to_string()))?;
                }
                if *asked.borrow() > 0 {
                    return Ok(());
                }
                if alone.elapsed() > lease {
                    return Err(gone(reason));
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

enum Left {
    /// It was asked to end, and may go.
    Done(String),
    Refused(String),
    Lost {
        reason: String,
        joined: bool,
    },
}

async fn join(
    channel: &Channel,
    hello: &WorkerHello,
    lease: &mut Duration,
    asked: &mut watch::Receiver<u32>,
    grace: Duration,
) -> Left {
    let mut client = MembershipClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES);
    let (send, receive) = mpsc::channel(8);
    let message = |kind| FromWorker { kind: Some(kind) };
    let lost = |reason: String, joined| Left::Lost { reason, joined };
    if send.send(message(from_worker::Kind::Hello(hello.clone()))).await.is_err() {
        return lost("the stream did not open".into(), false);
    }
    let mut stream = match client.join(ReceiverStream::new(receive)).await {
        Ok(reply) => reply.into_inner(),
        Err(s) if matches!(s.code(), tonic::Code::FailedPrecondition | tonic::Code::PermissionDenied) => {
            return Left::Refused(s.message().into());
        }
        Err(s) => match tls::refusal(&s) {
            Some(reason) => return Left::Refused(reason),
            None => return lost(tls::said(&s), false),
        },
    };
    let mut joined = false;
    let mut deadline: Option<Instant> = None;
    let mut beats = tokio::time::interval(BEAT);
    let mut heard = Instant::now();
    let mut count = 0;
    loop {
        tokio::select! {
            _ = beats.tick() => {
                count += 1;
                if deadline.is_some_and(|d| d <= Instant::now()) {
                    return Left::Done(format!("its session has not let go of it within {grace:?}"));
                }
                if heard.elapsed() > *lease {
                    return lost(format!("it was silent for {:?}", heard.elapsed()), joined);
                }
                if send.send(message(from_worker::Kind::Beat(proto::control::Beat { count }))).await.is_err() {
                    return lost("the stream is closed".into(), joined);
                }
            }
            // A worker that was asked before it joined leaves as soon as it has; asked twice, it goes at once.
            times = times(asked, u32::from(deadline.is_some() || !joined)) => {
                if times > 1 {
                    return Left::Done("it was asked to end at once".into());
                }
                deadline = Some(Instant::now() + grace);
                let reason = format!("it was asked to end, and stays for {grace:?} at most");
                tracing::info!("leaving: {reason}");
                if send.send(message(from_worker::Kind::Leaving(reason))).await.is_err() {
                    return lost("the stream is closed".into(), joined);
                }
            }
            next = stream.next() => match next.map(|n| n.map(|m| m.kind)) {
                Some(Ok(Some(to_worker::Kind::Welcome(w)))) => {
                    if w.build != hello.build || w.protocol != hello.protocol {
                        let ours = format!("build {} (control protocol {})", hello.build, hello.protocol);
                        let theirs = format!("build {} (control protocol {})", w.build, w.protocol);
                        return Left::Refused(format!("this worker is {ours} and the coordinator {theirs}"));
                    }
                    *lease = Duration::from_millis(u64::from(w.lease_ms.max(1000)));
                    (joined, heard) = (true, Instant::now());
                    tracing::info!("joined as worker {} with {} devices", w.worker, hello.devices);
                }
                Some(Ok(Some(to_worker::Kind::Refusal(reason)))) => return Left::Refused(reason),
                Some(Ok(Some(to_worker::Kind::Leave(reason)))) => return Left::Done(reason),
                Some(Ok(_)) => heard = Instant::now(),
                Some(Err(s)) => return lost(s.message().into(), joined),
                None => return lost("it has closed the stream".into(), joined),
            }
        }
    }
}
