//! How the devices of an epoch find each other.
//!
//! A process binds a [`Listener`] and tells the coordinator its [`Address`]. For every epoch it gets a [`Roster`] of all
//! devices' addresses, and [`Listener::connect`] makes a [`Switchboard`] for each device of this process. Of a pair of
//! devices the one with the greater index dials. Who comes early waits in the lobby; who comes too late is refused.

use super::bell::{Bell, Doom};
use super::grpc::{self, Answers, Ends, WINDOW};
use super::link::Link;
use super::memory::LentMemory;
use super::ring::{RING_BYTES, RingLink, RingMemory};
use super::socket;
use super::switchboard::Switchboard;
use crate::arena::Arena;
use crate::tls::Tls;
use prost::Message;
use proto::data::{Answer, Frame, Hello, answer::Kind};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Streaming;
use tonic::transport::server::TcpIncoming;

/// The version of the data plane's protocol.
pub const PROTOCOL: u32 = 2;
/// How long a caller may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Callers that wait in the lobby at the most; the oldest are turned away.
const LOBBY: usize = 4096;
/// How often a connecting thread looks whether it was told to stop.
const WATCH: Duration = Duration::from_millis(50);
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

fn system(what: &'static str) -> impl Fn(io::Error) -> ConnectError {
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

    fn hello(&self, version: &Version, from: usize, to: usize, window: u64) -> Hello {
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
    fn check_answer(&self, version: &Version, me: usize, peer: usize, hello: &Hello) -> Result<(), String> {
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

/// Someone who has dialled and said hello.
pub(super) struct Arrival {
    pub hello: Hello,
    pub caller: Caller,
}

/// How it waits for an answer.
pub(super) enum Caller {
    Ring { socket: UnixStream, memory: OwnedFd, bell: OwnedFd, arena: Option<OwnedFd> },
    Grpc { frames: Streaming<Frame>, answer: oneshot::Sender<Result<Answers, String>> },
}

impl Arrival {
    fn refuse(self, reason: &str) {
        match self.caller {
            Caller::Ring { socket, .. } => {
                let answer = Answer { kind: Some(Kind::Refusal(reason.into())) };
                // Who is gone does not need to know.
                let _ = socket::send(&socket, &answer.encode_to_vec(), &[]);
            }
            Caller::Grpc { answer, .. } => {
                let _ = answer.send(Err(reason.into()));
            }
        }
    }
}

/// Where those who dialled wait for the epoch that they are meant for.
#[derive(Default)]
pub(super) struct Lobby {
    state: Mutex<LobbyState>,
}

#[derive(Default)]
struct LobbyState {
    waiting: VecDeque<Arrival>,
    /// The last epoch of each job that this process was part of.
    epochs: HashMap<String, u64>,
    /// Whoever connects now, to be told of arrivals.
    caller: Option<mpsc::Sender<Event>>,
}

/// What a connecting thread waits for.
enum Event {
    Arrived,
    Dialled {
        me: usize,
        peer: usize,
        link: Result<Box<dyn Link>, String>,
    },
    /// An attempt failed and is made again.
    Note {
        me: usize,
        peer: usize,
        detail: String,
    },
}

impl Lobby {
    fn open(&self) -> MutexGuard<'_, LobbyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets someone wait, or refuses them if their epoch has passed.
    pub fn enter(&self, arrival: Arrival) {
        let mut state = self.open();
        if let Some(reason) = state.stale(&arrival.hello) {
            drop(state);
            return arrival.refuse(&reason);
        }
        let turned_away = if state.waiting.len() >= LOBBY { state.waiting.pop_front() } else { None };
        state.waiting.push_back(arrival);
        if let Some(caller) = &state.caller {
            // Nobody may be connecting any more.
            let _ = caller.send(Event::Arrived);
        }
        drop(state);
        if let Some(arrival) = turned_away {
            arrival.refuse("too many wait here");
        }
    }
}

impl LobbyState {
    fn stale(&self, hello: &Hello) -> Option<String> {
        let current = *self.epochs.get(&hello.job)?;
        (hello.epoch < current).then(|| {
            format!("epoch {} of job `{}` has passed; this process is in epoch {current}", hello.epoch, hello.job)
        })
    }

    /// Begins an epoch: gives those back who are too late for it.
    fn begin(&mut self, roster: &Roster, caller: mpsc::Sender<Event>) -> Result<Vec<(Arrival, String)>, ConnectError> {
        let Roster { job, epoch, .. } = roster;
        match self.epochs.get(job) {
            Some(current) if current >= epoch => {
                return Err(ConnectError::Stale { job: job.clone(), epoch: *epoch, current: *current });
            }
            _ => self.epochs.insert(job.clone(), *epoch),
        };
        self.caller = Some(caller);
        let (mut late, mut waiting) = (vec![], VecDeque::new());
        for arrival in std::mem::take(&mut self.waiting) {
            match self.stale(&arrival.hello) {
                Some(reason) => late.push((arrival, reason)),
                None => waiting.push_back(arrival),
            }
        }
        self.waiting = waiting;
        Ok(late)
    }

    /// Takes out whoever waits for this epoch.
    fn claim(&mut self, roster: &Roster) -> Vec<Arrival> {
        let (mut mine, mut waiting) = (vec![], VecDeque::new());
        for arrival in std::mem::take(&mut self.waiting) {
            if arrival.hello.job == roster.job && arrival.hello.epoch == roster.epoch {
                mine.push(arrival);
            } else {
                waiting.push_back(arrival);
            }
        }
        self.waiting = waiting;
        mine
    }
}

/// A process's door: bound before addresses are exchanged, open for epoch after epoch.
pub struct Listener {
    address: Address,
    options: ListenOptions,
    lobby: Arc<Lobby>,
    runtime: Handle,
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

/// The devices of an epoch on their way to each other.
struct Meeting<'a> {
    listener: &'a Listener,
    roster: &'a Roster,
    options: &'a ConnectOptions,
    /// Of this process's devices, in the roster's order, with the descriptors for peers.
    bells: Vec<(Arc<Bell>, OwnedFd)>,
}

impl<'a> Meeting<'a> {
    fn new(
        listener: &'a Listener,
        roster: &'a Roster,
        options: &'a ConnectOptions,
    ) -> Result<Meeting<'a>, ConnectError> {
        let bell = |_| Bell::create().map(|(bell, fd)| (Arc::new(bell), fd));
        let bells = roster.mine.iter().map(bell).collect::<io::Result<_>>();
        let bells = bells.map_err(system("there is no shared memory for a bell"))?;
        Ok(Meeting { listener, roster, options, bells })
    }

    /// Which link a pair of devices gets: whether it is a ring.
    fn by_ring(&self, me: usize, peer: usize) -> Result<bool, ConnectError> {
        let same = self.roster.devices[me].host == self.roster.devices[peer].host;
        match self.options.choice {
            TransportChoice::Auto => Ok(same),
            TransportChoice::Ring if same => Ok(true),
            TransportChoice::Ring => Err(ConnectError::NoRing { me, peer }),
            TransportChoice::Grpc => Ok(false),
        }
    }

    /// Dials, answers, and waits until every pair has its link: by device of this process, by peer.
    fn hold(
        &self,
        events: &mpsc::Sender<Event>,
        happened: &mpsc::Receiver<Event>,
        doom: &Doom,
    ) -> Result<Vec<Vec<Option<Box<dyn Link>>>>, ConnectError> {
        let roster = self.roster;
        let begun = Instant::now();
        let deadline = begun + self.options.timeout;
        let empty = || roster.devices.iter().map(|_| None).collect();
        let mut links: Vec<Vec<Option<Box<dyn Link>>>> = roster.mine.iter().map(|_| empty()).collect();
        // What is known about peers that are not there yet.
        let mut missing: HashMap<(usize, usize), String> = HashMap::new();
        for (mine, &me) in roster.mine.iter().enumerate() {
            for peer in (0..roster.devices.len()).filter(|p| *p != me) {
                let ring = self.by_ring(me, peer)?;
                let sibling = roster.mine.iter().position(|m| *m == peer);
                match sibling {
                    // Devices of one process need not dial.
                    Some(other) if ring => {
                        if me > peer {
                            let (a, b) = self.pair((mine, me), (other, peer))?;
                            links[mine][peer] = Some(a);
                            links[other][me] = Some(b);
                        }
                    }
                    _ => {
                        let detail = if me > peer { "it was called" } else { "it has not called" };
                        missing.insert((me, peer), detail.into());
                        if me > peer {
                            self.dial(mine, me, peer, ring, events.clone(), deadline);
                        }
                    }
                }
            }
        }
        self.claim(&mut links, &mut missing);
        while !missing.is_empty() {
            if let Some(reason) = doom.reason() {
                return Err(ConnectError::Doomed { reason: reason.into() });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match happened.recv_timeout(left.min(WATCH)) {
                Ok(Event::Arrived) => self.claim(&mut links, &mut missing),
                Ok(Event::Note { me, peer, detail }) => {
                    missing.entry((me, peer)).and_modify(|d| *d = detail);
                }
                Ok(Event::Dialled { me, peer, link }) => {
                    let address = self.roster.devices[peer].grpc.clone();
                    let link = link.map_err(|reason| ConnectError::Refused { me, peer, address, reason })?;
                    if let Some(mine) = self.index(me)
                        && missing.remove(&(me, peer)).is_some()
                    {
                        links[mine][peer] = Some(link);
                    }
                }
                Err(_) if !left.is_zero() => {}
                Err(_) => {
                    let one = |((me, peer), detail)| {
                        let address: &Address = &roster.devices[peer];
                        Missing { me, peer, address: address.grpc.clone(), detail }
                    };
                    let mut missing: Vec<_> = missing.into_iter().map(one).collect();
                    missing.sort_by_key(|m| (m.peer, m.me));
                    return Err(ConnectError::Unanswered { waited: begun.elapsed(), missing });
                }
            }
        }
        Ok(links)
    }

    /// What a device of this process lends from, by its place in the roster.
    fn lent(&self, mine: usize) -> Option<(&Arc<LentMemory>, &OwnedFd)> {
        self.options.arenas.get(mine).and_then(|a| a.lent())
    }

    /// What a device of this process shows to a peer that it calls.
    fn own(&self, mine: usize) -> io::Result<Own> {
        let lent = self.lent(mine).map(|(memory, fd)| fd.try_clone().map(|fd| (memory.clone(), fd)));
        Ok(Own { bell: self.bells[mine].1.try_clone()?, arena: lent.transpose()? })
    }

    fn index(&self, device: usize) -> Option<usize> {
        self.roster.mine.iter().position(|m| *m == device)
    }

    /// The links between two devices of this process; the first one dials, as it were.
    fn pair(
        &self,
        (a, me): (usize, usize),
        (b, peer): (usize, usize),
    ) -> Result<(Box<dyn Link>, Box<dyn Link>), ConnectError> {
        let memory = RingMemory::create(self.options.ring_bytes);
        let (memory, _) = memory.map_err(system("there is no shared memory for a ring"))?;
        let [lent_a, lent_b] = [a, b].map(|i| self.lent(i).map(|l| l.0.clone()));
        let mine = RingLink::new(me, peer, &memory, true, self.bells[b].0.clone(), None);
        let theirs = RingLink::new(peer, me, &memory, false, self.bells[a].0.clone(), None);
        Ok((Box::new(mine.lending(lent_a.clone(), lent_b.clone())), Box::new(theirs.lending(lent_b, lent_a))))
    }

    /// Has a task call a peer.
    fn dial(&self, mine: usize, me: usize, peer: usize, ring: bool, events: mpsc::Sender<Event>, deadline: Instant) {
        let (roster, version) = (self.roster.clone(), self.listener.options.version.clone());
        let address = self.roster.devices[peer].clone();
        let left = deadline.saturating_duration_since(Instant::now());
        let bell = self.bells[mine].0.clone();
        let notes = events.clone();
        // Nobody may be waiting any more.
        let note = move |detail| drop(notes.send(Event::Note { me, peer, detail }));
        if ring {
            let own = self.own(mine);
            let capacity = self.options.ring_bytes;
            self.listener.runtime.spawn(tokio::time::timeout(left, async move {
                let hello = roster.hello(&version, me, peer, capacity as u64);
                let check = |answer: &Hello| roster.check_answer(&version, me, peer, answer);
                let link = dial_ring(me, peer, &address.socket, &hello, capacity, own, check, note).await;
                let _ = events.send(Event::Dialled { me, peer, link: link.map(|l| Box::new(l) as Box<dyn Link>) });
            }));
        } else {
            let tls = self.listener.options.tls.clone();
            self.listener.runtime.spawn(tokio::time::timeout(left, async move {
                let hello = roster.hello(&version, me, peer, WINDOW);
                let check = |answer: &Hello| roster.check_answer(&version, me, peer, answer);
                let link = Ends { me, peer, bell }.dial(address.grpc, tls, hello, check, note).await;
                let _ = events.send(Event::Dialled { me, peer, link: link.map(|l| Box::new(l) as Box<dyn Link>) });
            }));
        }
    }

    /// Answers those who have dialled.
    fn claim(&self, links: &mut [Vec<Option<Box<dyn Link>>>], missing: &mut HashMap<(usize, usize), String>) {
        let arrivals = self.listener.lobby.open().claim(self.roster);
        for arrival in arrivals {
            let (me, peer) = (arrival.hello.to as usize, arrival.hello.from as usize);
            let Some(mine) = self.index(me) else {
                arrival.refuse(&format!("device {me} is not here"));
                continue;
            };
            if peer <= me || !missing.contains_key(&(me, peer)) {
                arrival.refuse(&format!("device {me} does not expect a call of device {peer}"));
                continue;
            }
            match self.answer(mine, me, peer, arrival) {
                Ok(link) => {
                    missing.remove(&(me, peer));
                    links[mine][peer] = Some(link);
                }
                Err(e) => {
                    missing.insert((me, peer), format!("it called, but {e}"));
                }
            }
        }
    }

    fn answer(&self, mine: usize, me: usize, peer: usize, arrival: Arrival) -> io::Result<Box<dyn Link>> {
        let Arrival { hello, caller } = arrival;
        let (roster, version) = (self.roster, &self.listener.options.version);
        let (bell, descriptor) = &self.bells[mine];
        match caller {
            Caller::Ring { socket, memory, bell: their_bell, arena } => {
                let capacity = usize::try_from(hello.window).map_err(io::Error::other)?;
                let memory = RingMemory::open(&memory, capacity)?;
                let their_bell = Arc::new(Bell::open(&their_bell)?);
                let theirs = arena.map(|fd| LentMemory::open(&fd)).transpose()?.map(Arc::new);
                let lent = self.lent(mine);
                let answer = Answer { kind: Some(Kind::Hello(roster.hello(version, me, peer, hello.window))) };
                let descriptors: Vec<_> = std::iter::once(descriptor).chain(lent.map(|l| l.1)).collect();
                socket::send(&socket, &answer.encode_to_vec(), &descriptors)?;
                let socket = Some(socket.into_std()?);
                let link = RingLink::new(me, peer, &memory, false, their_bell, socket);
                Ok(Box::new(link.lending(lent.map(|l| l.0.clone()), theirs)))
            }
            Caller::Grpc { frames, answer } => {
                let ends = Ends { me, peer, bell: bell.clone() };
                let (link, answers) = ends.accept(roster.hello(version, me, peer, WINDOW), hello.window, frames);
                answer.send(Ok(answers)).map_err(|_| io::Error::other("it hung up"))?;
                Ok(Box::new(link))
            }
        }
    }
}

/// What a device of this process shows to a peer on this host.
struct Own {
    bell: OwnedFd,
    arena: Option<(Arc<LentMemory>, OwnedFd)>,
}

/// Calls a peer on this host until it answers or refuses.
async fn dial_ring(
    me: usize,
    peer: usize,
    name: &str,
    hello: &Hello,
    capacity: usize,
    own: io::Result<Own>,
    check: impl Fn(&Hello) -> Result<(), String>,
    note: impl Fn(String),
) -> Result<RingLink, String> {
    let said = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let own = own.map_err(said("no descriptor is left"))?;
    loop {
        // Fresh for every call: a peer may have written to that of the last.
        let (memory, descriptor) = RingMemory::create(capacity).map_err(said("no shared memory for a ring"))?;
        match call_ring(name, hello, &descriptor, &own).await {
            Ok((Some(Kind::Hello(answer)), descriptors, socket)) => {
                check(&answer)?;
                let mut descriptors = descriptors.into_iter();
                let bell = descriptors.next().ok_or("it has sent no bell")?;
                let bell = Bell::open(&bell).map_err(said("its bell cannot be rung"))?;
                let theirs = descriptors.next().map(|fd| LentMemory::open(&fd)).transpose();
                let theirs = theirs.map_err(said("its memory cannot be mapped"))?.map(Arc::new);
                let socket = Some(socket.into_std().map_err(said("its socket"))?);
                let link = RingLink::new(me, peer, &memory, true, Arc::new(bell), socket);
                return Ok(link.lending(own.arena.map(|a| a.0), theirs));
            }
            Ok((Some(Kind::Refusal(reason)), ..)) => return Err(reason),
            Ok(_) => note("it answered with something else".into()),
            Err(e) => note(e.to_string()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Calls once.
async fn call_ring(
    name: &str,
    hello: &Hello,
    memory: &OwnedFd,
    own: &Own,
) -> io::Result<(Option<Kind>, Vec<OwnedFd>, UnixStream)> {
    let socket = std_unix::UnixStream::connect_addr(&std_unix::SocketAddr::from_abstract_name(name)?)?;
    socket.set_nonblocking(true)?;
    let socket = UnixStream::from_std(socket)?;
    if !socket::same_user(&socket)? {
        return Err(io::Error::other("another user listens there"));
    }
    let descriptors: Vec<_> = [memory, &own.bell].into_iter().chain(own.arena.as_ref().map(|a| &a.1)).collect();
    socket::send(&socket, &hello.encode_to_vec(), &descriptors)?;
    let (bytes, descriptors) = socket::receive(&socket).await?;
    let answer = Answer::decode(&bytes[..]).map_err(io::Error::other)?;
    Ok((answer.kind, descriptors, socket))
}
