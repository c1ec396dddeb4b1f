//! How the devices of an epoch find each other.
//!
//! A process binds a [`Listener`] and tells the coordinator its [`Address`]. For every epoch it gets a [`Roster`] of all
//! devices' addresses, and [`Listener::connect`] makes a [`Switchboard`] for each device of this process. Of a pair of
//! devices the one with the greater index dials. Who comes early waits in the lobby; who comes too late is refused.

use super::bell::{Bell, Doom};
use super::grpc;
use super::link::Link;
use super::lobby::{Arrival, Caller, Lobby};
use super::meeting::Meeting;
use super::ring::RING_BYTES;
use super::socket;
use super::switchboard::Switchboard;
use crate::arena::Arena;
use crate::tls::Tls;
use prost::Message;
use proto::data::Hello;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;
use tonic::transport::server::TcpIncoming;

/// The version of the data plane's protocol.
pub const PROTOCOL: u32 = 2;
/// How long a caller may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a device looks again before it sleeps, where every device has a core.
const SPIN: Duration = Duration::from_micros(10);

/// Why the devices of an epoch could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Peers that did not answer in time.
    #[error("W0011: no answer within {:.1} s from {}", waited.as_secs_f64(), list(missing))]
    Unanswered {
        /// How long they had.
        waited: Duration,
        /// Who is missing.
        missing: Vec<Missing>,
    },
    /// A peer does not let this process in, or is one that this process must not talk to.
    #[error("W0012: device {me} and device {peer} at {address} do not come together: {reason}")]
    Refused {
        /// A device of this process.
        me: usize,
        /// The peer.
        peer: usize,
        /// Where it was called.
        address: String,
        /// Why.
        reason: String,
    },
    /// Tensors would travel in the clear.
    #[error(
        "W0013: {address} can be reached from other hosts and there is no TLS; name a folder of certificates with --tls, listen on a loopback address, or allow it with --insecure"
    )]
    Insecure {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The epoch has passed.
    #[error("W0014: epoch {epoch} of job `{job}` is not after epoch {current}, in which this process already is")]
    Stale {
        /// The job.
        job: String,
        /// The epoch that was asked for.
        epoch: u64,
        /// The epoch of this process.
        current: u64,
    },
    /// Something that the operating system does not give.
    #[error("W0015: {what}: {source}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A roster that makes no sense.
    #[error("W0016: the roster names device {device} as this process's own, {why}")]
    Roster {
        /// The device.
        device: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// This process was told to stop.
    #[error("W0018: told to stop while connecting: {reason}")]
    Doomed {
        /// Why.
        reason: String,
    },
    /// A ring was asked for where none can be.
    #[error("W0017: device {me} and device {peer} are on different hosts and share no memory; use `auto` or `grpc`")]
    NoRing {
        /// A device of this process.
        me: usize,
        /// The peer.
        peer: usize,
    },
}

/// A pair of devices that did not come together in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// A device of this process.
    pub me: usize,
    /// The peer that did not answer.
    pub peer: usize,
    /// Where it is, or was called.
    pub address: String,
    /// What is known about it.
    pub detail: String,
}

fn list(missing: &[Missing]) -> String {
    let one = |m: &Missing| format!("device {} at {} (for device {}: {})", m.peer, m.address, m.me, m.detail);
    missing.iter().map(one).collect::<Vec<_>>().join(", ")
}

pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> ConnectError {
    move |source| ConnectError::System { what, source }
}

/// What must be the same for two processes to share memory: boot of the kernel, user, and network namespace (in which
/// the names of their sockets are known).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(String);

impl HostId {
    /// This process's.
    pub fn here() -> io::Result<HostId> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let network = std::fs::read_link("/proc/self/ns/net")?;
        let user = rustix::process::getuid().as_raw();
        Ok(HostId(format!("{}/{}/{user}", boot.trim(), network.display())))
    }
}

impl From<String> for HostId {
    fn from(id: String) -> HostId {
        HostId(id)
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a process can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Its host.
    pub host: HostId,
    /// Name of its unix socket, for rings (in the abstract namespace).
    pub socket: String,
    /// Host and port of its gRPC server.
    pub grpc: String,
}

/// Which link to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TransportChoice {
    /// Rings between processes of one host, gRPC between hosts.
    #[default]
    Auto,
    /// Rings only.
    Ring,
    /// gRPC only.
    Grpc,
}

impl fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Ring => "ring",
            TransportChoice::Grpc => "grpc",
        })
    }
}

impl FromStr for TransportChoice {
    type Err = String;
    fn from_str(s: &str) -> Result<TransportChoice, String> {
        let all = [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc];
        all.into_iter().find(|c| c.to_string() == s).ok_or_else(|| format!("`{s}` is none of auto, ring, grpc"))
    }
}

/// What must be the same on both sides: results are the same to the bit within one build only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Of the protocol.
    pub protocol: u32,
    /// Of the program.
    pub build: String,
}

impl Default for Version {
    fn default() -> Version {
        Version { protocol: PROTOCOL, build: env!("CARGO_PKG_VERSION").into() }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "build {} (data protocol {})", self.build, self.protocol)
    }
}

impl Version {
    /// Whether the speaker of a hello has this version.
    pub(super) fn check(&self, hello: &Hello) -> Result<(), String> {
        let theirs = Version { protocol: hello.protocol, build: hello.build.clone() };
        if *self == theirs {
            return Ok(());
        }
        Err(format!("{self} does not work with {theirs}; run the same build everywhere"))
    }
}

/// How to listen.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Where the gRPC server listens; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// What peers shall call: host, or host and port. None: the bound address, or the host's name where that is none.
    pub advertise: Option<String>,
    /// Allows a server without TLS where other hosts can reach it.
    pub insecure: bool,
    /// TLS for those who call and whom we call.
    pub tls: Option<Tls>,
    /// The version that peers must have.
    pub version: Version,
}

impl Default for ListenOptions {
    fn default() -> ListenOptions {
        ListenOptions {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            insecure: false,
            tls: None,
            version: Version::default(),
        }
    }
}

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Which link to use.
    pub choice: TransportChoice,
    /// How long to wait for all peers.
    pub timeout: Duration,
    /// Bytes of a ring, a power of two.
    pub ring_bytes: usize,
    /// How long a device looks again before it sleeps. None: a few microseconds, or not at all where this host has
    /// more devices than cores.
    pub spin: Option<Duration>,
    /// Memory of the devices of this process, in the roster's order. Large messages that lie there stay there for peers on
    /// this host to read, if the arena is a shared one. None: every message is carried.
    pub arenas: Vec<Arc<Arena>>,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            choice: TransportChoice::Auto,
            timeout: Duration::from_secs(30),
            ring_bytes: RING_BYTES,
            spin: None,
            arenas: vec![],
        }
    }
}

/// The devices of an epoch.
#[derive(Clone, Debug)]
pub struct Roster {
    /// The job.
    pub job: String,
    /// The epoch, which grows with every roster of a job.
    pub epoch: u64,
    /// By device: the address of its process.
    pub devices: Vec<Address>,
    /// The devices of this process.
    pub mine: Vec<usize>,
}

impl Roster {
    fn check(&self) -> Result<(), ConnectError> {
        for (i, &device) in self.mine.iter().enumerate() {
            if device >= self.devices.len() {
                return Err(ConnectError::Roster { device, why: "but has no address for it" });
            }
            if self.mine[..i].contains(&device) {
                return Err(ConnectError::Roster { device, why: "twice" });
            }
        }
        Ok(())
    }

    /// Which of the devices on its host a device is, and how many there are.
    pub fn on_host(&self, device: usize) -> (usize, usize) {
        let host = |d: &Address| d.host == self.devices[device].host;
        (self.devices[..device].iter().filter(|d| host(d)).count(), self.devices.iter().filter(|d| host(d)).count())
    }

    pub(super) fn hello(&self, version: &Version, from: usize, to: usize, window: u64) -> Hello {
        Hello {
            protocol: version.protocol,
            build: version.build.clone(),
            job: self.job.clone(),
            epoch: self.epoch,
            from: from as u32,
            to: to as u32,
            window,
        }
    }

    /// Whether the hello with which `peer` answers `me` is right.
    pub(super) fn check_answer(&self, version: &Version, me: usize, peer: usize, hello: &Hello) -> Result<(), String> {
        version.check(hello)?;
        let whom = (&*hello.job, hello.epoch, hello.from as usize, hello.to as usize);
        if whom != (&*self.job, self.epoch, peer, me) {
            let (job, epoch, from, to) = whom;
            return Err(format!(
                "the answer is device {from}'s to device {to} in epoch {epoch} of job `{job}`, not device {peer}'s to device {me} in epoch {} of job `{}`",
                self.epoch, self.job
            ));
        }
        Ok(())
    }
}

/// A runtime for a worker process's network tasks: two threads at most, the cores are the devices'.
pub fn runtime() -> io::Result<Runtime> {
    let threads = std::thread::available_parallelism().map_or(1, |n| if n.get() > 2 { 2 } else { 1 });
    Builder::new_multi_thread().worker_threads(threads).thread_name("mesh-net").enable_all().build()
}

/// A process's door: bound before addresses are exchanged, open for epoch after epoch.
pub struct Listener {
    address: Address,
    pub(super) options: ListenOptions,
    pub(super) lobby: Arc<Lobby>,
    pub(super) runtime: Handle,
    tasks: Vec<JoinHandle<()>>,
    /// One epoch is connected at a time.
    connecting: Mutex<()>,
}

impl Listener {
    /// Binds the unix socket and the gRPC server; `runtime` runs their tasks and those of the links.
    pub fn bind(options: ListenOptions, runtime: Handle) -> Result<Listener, ConnectError> {
        if !options.bind.ip().is_loopback() && options.tls.is_none() && !options.insecure {
            return Err(ConnectError::Insecure { address: options.bind });
        }
        let _inside = runtime.enter();
        let lobby = Arc::new(Lobby::default());
        let (socket, unix) = bind_unix().map_err(system("a unix socket cannot be bound"))?;
        let incoming = TcpIncoming::bind(options.bind).map_err(system("the gRPC address cannot be bound"))?;
        let incoming = incoming.with_nodelay(Some(true));
        let bound = incoming.local_addr().map_err(system("the gRPC address is not known"))?;
        let grpc = advertised(options.advertise.as_deref(), bound).map_err(system("the host has no name"))?;
        let host = HostId::here().map_err(system("the host has no identity"))?;
        let address = Address { host, socket, grpc };
        let (tls, version) = (options.tls.clone(), options.version.clone());
        let serve = grpc::serve(incoming, tls, version.clone(), lobby.clone());
        let tasks = vec![
            // Whoever waits for an answer is told by the time-out of `connect`.
            runtime.spawn(async { drop(serve.await) }),
            runtime.spawn(accept_unix(unix, version, lobby.clone())),
        ];
        drop(_inside);
        Ok(Listener { address, options, lobby, runtime, tasks, connecting: Mutex::new(()) })
    }

    /// Where this process can be reached.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects this process's devices with all others of an epoch: a switchboard for each of `roster.mine`, in that
    /// order. Not to be called from a task of the runtime.
    ///
    /// # Errors
    /// Peers that did not answer in time or do not let us in, named; an epoch that has passed.
    pub fn connect(
        &self,
        roster: &Roster,
        options: &ConnectOptions,
        doom: &Doom,
    ) -> Result<Vec<Switchboard>, ConnectError> {
        let _one = self.connecting.lock().unwrap_or_else(PoisonError::into_inner);
        roster.check()?;
        let _inside = self.runtime.enter();
        let meeting = Meeting::new(self, roster, options)?;
        let (events, happened) = mpsc::channel();
        let late = self.lobby.open().begin(roster, events.clone())?;
        late.into_iter().for_each(|(arrival, reason)| arrival.refuse(&reason));
        let links = meeting.hold(&events, &happened, doom);
        self.lobby.open().caller = None;
        let spin = options.spin.unwrap_or_else(|| spin(roster, &self.address.host));
        let board = |((me, links), bell): ((&usize, Vec<Option<Box<dyn Link>>>), &(Arc<Bell>, OwnedFd))| {
            Switchboard::new(*me, roster.epoch, links, bell.0.clone(), doom.clone(), spin)
        };
        Ok(roster.mine.iter().zip(links?).zip(&meeting.bells).map(board).collect())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// How long devices may spin: not at all where they share cores.
fn spin(roster: &Roster, host: &HostId) -> Duration {
    let devices = roster.devices.iter().filter(|a| a.host == *host).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if devices > cores { Duration::ZERO } else { SPIN }
}

/// What others are to call: the name that is advertised, or else the bound address, or else this host's name.
pub(crate) fn advertised(advertise: Option<&str>, bound: SocketAddr) -> io::Result<String> {
    let host = match advertise.map(host_and_port) {
        Some((host, Some(port))) => return Ok(format!("{host}:{port}")),
        Some((host, None)) => host.to_string(),
        None if bound.ip().is_unspecified() => std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_string(),
        None => return Ok(bound.to_string()),
    };
    let host = if host.parse::<Ipv6Addr>().is_ok() { format!("[{host}]") } else { host };
    Ok(format!("{host}:{}", bound.port()))
}

/// Host and port of `host`, `host:port`, `::1` or `[::1]:port`.
pub(crate) fn host_and_port(text: &str) -> (&str, Option<u16>) {
    let split = || text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match split() {
        Some((host, port)) if text.parse::<Ipv6Addr>().is_err() => (host, Some(port)),
        _ => (text, None),
    }
}

fn bind_unix() -> io::Result<(String, UnixListener)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let clock = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos());
    let name = format!("mesh-{}-{clock:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let listener = std_unix::UnixListener::bind_addr(&std_unix::SocketAddr::from_abstract_name(&name)?)?;
    listener.set_nonblocking(true)?;
    Ok((name, UnixListener::from_std(listener)?))
}

/// Lets callers on the unix socket in.
async fn accept_unix(listener: UnixListener, version: Version, lobby: Arc<Lobby>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let (version, lobby) = (version.clone(), lobby.clone());
                tokio::spawn(async move {
                    // Who does not say hello in time, or says something else, is not answered.
                    let _ = tokio::time::timeout(HELLO_TIMEOUT, greet(socket, &version, &lobby)).await;
                });
            }
            // Out of descriptors, say: better in a moment.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn greet(socket: UnixStream, version: &Version, lobby: &Lobby) -> io::Result<()> {
    if !socket::same_user(&socket)? {
        return Err(io::Error::other("another user"));
    }
    let (bytes, descriptors) = socket::receive(&socket).await?;
    let hello = Hello::decode(&bytes[..]).map_err(io::Error::other)?;
    let mut descriptors = descriptors.into_iter();
    let (Some(memory), Some(bell), arena) = (descriptors.next(), descriptors.next(), descriptors.next()) else {
        return Err(io::Error::other("descriptors are missing"));
    };
    let checked = version.check(&hello);
    let arrival = Arrival { hello, caller: Caller::Ring { socket, memory, bell, arena } };
    match checked {
        Ok(()) => lobby.enter(arrival),
        Err(reason) => arrival.refuse(&reason),
    }
    Ok(())
}
