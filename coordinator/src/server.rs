//! The coordinator: knows which workers there are, gives their devices to a session, and drives them in step.
//!
//! A session lasts for as long as the model program holds its stream. Whenever the set of workers of a session changes
//! the epoch rises, and what belongs to an older one is refused on every side.

use mesh::array::Array;
use mesh::dim::Name;
use mesh::plan::{Part, PlanOptions, ProgramPlan, plan_program};
use mesh::program::Program;
use proto::control::{
    self, ArrayName, ArrayPart, Beat, Done, FromWorker, LoadHead, LoadPart, OpenPart, Opened, Peer, Settings, ToWorker,
    Welcome, WorkerHello, control_server, from_worker, load_part, membership_server, open_part, to_worker,
    worker_client::WorkerClient,
};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt, iter};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use worker::access;
use worker::kernels::kernel::CpuBackend;
use worker::node::{MESSAGE_BYTES, PROTOCOL, endpoint};
use worker::tls::{Role, Tls};
use worker::wire::{self, Assembler};

/// How the coordinator runs.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// How long a worker may be silent before it is given up.
    pub silence: Duration,
    /// How long a worker without a coordinator looks for it.
    pub lease: Duration,
    /// How long a session waits for enough devices.
    pub wait: Duration,
    /// How long a session waits for a worker in a lost one's place.
    pub replace: Duration,
    /// TLS of every connection.
    pub tls: Option<Tls>,
    /// Where a status is served, read-only.
    pub status: Option<SocketAddr>,
    /// Folder for what must outlive the coordinator.
    pub state: Option<PathBuf>,
    /// Where checkpoints lie: a folder or a URL.
    pub store: String,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            silence: Duration::from_secs(2),
            lease: Duration::from_secs(10),
            wait: Duration::from_secs(60),
            replace: Duration::from_secs(60),
            tls: None,
            status: None,
            state: None,
            store: ".".into(),
        }
    }
}

/// The version of this program.
fn build() -> String {
    worker::transport::connector::Version::default().build
}

/// A worker that is there.
struct Member {
    hello: WorkerHello,
    client: WorkerClient<Channel>,
    heard: Instant,
    /// Kept for as long as the worker may stay.
    _directives: mpsc::Sender<Result<ToWorker, Status>>,
}

/// A program on some of the workers.
struct Active {
    epoch: u64,
    program: Program,
    plan: ProgramPlan,
    /// Workers with their devices, by device.
    crew: Vec<(u64, Vec<u32>)>,
    /// Steps that every device has done.
    steps: AtomicU64,
}

#[derive(Default)]
struct State {
    epoch: u64,
    next: u64,
    members: BTreeMap<u64, Member>,
    /// The session's epoch and workers, while there is one.
    session: Option<Arc<Active>>,
    /// Why the session cannot go on.
    failed: Option<String>,
}

/// The services of a coordinator.
#[derive(Clone)]
pub struct Coordinator {
    options: ServerOptions,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

type Reply<T> = Result<Response<T>, Status>;
type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(e.to_string())
}

impl Coordinator {
    /// A coordinator without workers.
    pub fn new(options: ServerOptions) -> Coordinator {
        Coordinator { options, state: Arc::default(), changed: Arc::default() }
    }

    /// Serves on a socket until the task is dropped.
    ///
    /// # Errors
    /// A server that cannot go on.
    pub async fn serve(self, socket: TcpListener) -> Result<(), tonic::transport::Error> {
        let tls = self.options.tls.clone();
        let watch = tokio::spawn(self.clone().watch());
        let control = control_server::ControlServer::new(self.clone()).max_decoding_message_size(MESSAGE_BYTES);
        let membership = membership_server::MembershipServer::new(self).max_decoding_message_size(MESSAGE_BYTES);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<control_server::ControlServer<Coordinator>>().await;
        let done = access::server(tls.as_ref())?
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .add_service(control)
            .add_service(membership)
            .add_service(health_service)
            .add_service(access::reflection())
            .serve_with_incoming(TcpIncoming::from(socket).with_nodelay(Some(true)))
            .await;
        watch.abort();
        done
    }

    /// Gives up workers that are silent.
    async fn watch(self) {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let silent: Vec<u64> = {
                let state = lock(&self.state);
                let late = state.members.iter().filter(|(_, m)| m.heard.elapsed() > self.options.silence);
                late.map(|(id, _)| *id).collect()
            };
            for id in silent {
                self.lose(id, &format!("it was silent for {:?}", self.options.silence)).await;
            }
        }
    }

    /// A worker is gone: the session that it is part of stops.
    async fn lose(&self, id: u64, why: &str) {
        let session = {
            let mut state = lock(&self.state);
            let Some(member) = state.members.remove(&id) else { return };
            tracing::warn!("lost worker {id} at {}: {why}", member.hello.address);
            state.session.clone().filter(|s| s.crew.iter().any(|(w, _)| *w == id))
        };
        if let Some(session) = session {
            self.stop(&session, &format!("worker {id} is lost: {why}")).await;
        }
        self.changed.notify_waiters();
    }

    /// Stops a session's devices, so that none waits for another, and raises the epoch.
    async fn stop(&self, session: &Active, reason: &str) {
        let (epoch, clients) = {
            let mut state = lock(&self.state);
            if state.session.as_ref().is_none_or(|s| s.epoch != session.epoch) || state.failed.is_some() {
                return;
            }
            state.failed = Some(reason.into());
            state.epoch += 1;
            let clients = session.crew.iter().filter_map(|(w, _)| state.members.get(w).map(|m| m.client.clone()));
            (state.epoch, clients.collect::<Vec<_>>())
        };
        let mut calls = JoinSet::new();
        for mut client in clients {
            let request = control::AbortRequest { epoch, reason: reason.into() };
            calls.spawn(async move { tokio::time::timeout(Duration::from_secs(5), client.abort(request)).await });
        }
        while calls.join_next().await.is_some() {}
    }

    /// The session, if it is of that epoch and can go on.
    fn session(&self, epoch: u64) -> Result<Arc<Active>, Status> {
        let state = lock(&self.state);
        match (&state.session, &state.failed) {
            (Some(s), None) if s.epoch == epoch => Ok(s.clone()),
            (Some(s), Some(reason)) if s.epoch == epoch => Err(Status::aborted(reason.clone())),
            _ => Err(Status::failed_precondition(format!(
                "C0010: a call of epoch {epoch}, and the coordinator is in epoch {}",
                state.epoch
            ))),
        }
    }

    /// Does something on every worker of a session at once. The first failure stops all of them.
    async fn everywhere<T, F>(
        &self,
        session: &Arc<Active>,
        call: impl Fn(WorkerClient<Channel>, usize) -> F,
    ) -> Result<Vec<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let mut calls = JoinSet::new();
        for (place, (id, _)) in session.crew.iter().enumerate() {
            let client = lock(&self.state).members.get(id).map(|m| m.client.clone());
            let Some(client) = client else {
                let reason = format!("worker {id} is lost");
                self.stop(session, &reason).await;
                return Err(Status::aborted(reason));
            };
            let called = call(client, place);
            calls.spawn(async move { (place, called.await) });
        }
        let mut replies: Vec<Option<T>> = session.crew.iter().map(|_| None).collect();
        let mut failure: Option<Status> = None;
        while let Some(done) = calls.join_next().await {
            let (place, reply) = done.map_err(|e| Status::internal(e.to_string()))?;
            match reply {
                Ok(r) => replies[place] = Some(r),
                Err(status) if failure.is_none() => {
                    let reason = format!("worker {}: {}", session.crew[place].0, status.message());
                    self.stop(session, &reason).await;
                    failure = Some(Status::new(status.code(), reason));
                }
                // What fails after that fails because it was stopped.
                Err(_) => {}
            }
        }
        match failure {
            Some(status) => Err(status),
            None => Ok(replies.into_iter().flatten().collect()),
        }
    }

    /// Waits for enough devices and takes them: workers in the order in which they joined.
    async fn crew(&self, devices: usize) -> Result<Vec<(u64, Vec<u32>)>, Status> {
        let begun = Instant::now();
        loop {
            let changed = self.changed.notified();
            let there = {
                let state = lock(&self.state);
                let mut crew = Vec::new();
                let mut next = 0;
                for (id, member) in &state.members {
                    let n = (member.hello.devices as usize).min(devices - next);
                    if n > 0 {
                        crew.push((*id, (next as u32..(next + n) as u32).collect()));
                        next += n;
                    }
                }
                if next == devices {
                    return Ok(crew);
                }
                next
            };
            let left = self.options.wait.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(Status::unavailable(format!(
                    "C0011: the mesh needs {devices} devices, and {there} have joined within {:?}; start more workers",
                    self.options.wait
                )));
            }
            // A change that is missed here is seen at the next look.
            let _ = tokio::time::timeout(left.min(Duration::from_millis(500)), changed).await;
        }
    }

    async fn open(&self, settings: Settings, bytes: bytes::Bytes) -> Result<(Arc<Active>, Vec<String>), Status> {
        if lock(&self.state).session.is_some() {
            return Err(Status::resource_exhausted(
                "C0012: another model program has the workers; try again when it is done",
            ));
        }
        let program = wire::decode(&bytes).map_err(invalid)?;
        let mesh = settings.mesh.parse().map_err(invalid)?;
        let layout = settings.layout.parse().map_err(invalid)?;
        let memory = (settings.memory > 0).then_some(settings.memory as usize);
        let options = PlanOptions { memory, devices: None };
        let plan = plan_program(&program, &mesh, &layout, &options, &CpuBackend { threads: 1 }).map_err(invalid)?;
        let crew = self.crew(mesh.size()).await?;
        let (session, peers) = {
            let mut state = lock(&self.state);
            if state.session.is_some() {
                return Err(Status::resource_exhausted(
                    "C0012: another model program was faster; try again when it is done",
                ));
            }
            let mut peers = Vec::new();
            for (id, devices) in &crew {
                let member =
                    state.members.get(id).ok_or_else(|| Status::unavailable(format!("worker {id} is lost")))?;
                peers.extend(devices.iter().map(|d| Peer {
                    device: *d,
                    address: member.hello.data_address.clone(),
                    host: member.hello.host.clone(),
                    socket: member.hello.socket.clone(),
                }));
            }
            state.epoch += 1;
            let session = Arc::new(Active { epoch: state.epoch, program, plan, crew, steps: AtomicU64::new(0) });
            (state.session, state.failed) = (Some(session.clone()), None);
            (session, peers)
        };
        let loaded = self
            .everywhere(&session, |mut client, place| {
                let head = LoadHead {
                    epoch: session.epoch,
                    job: "session".into(),
                    settings: Some(settings.clone()),
                    peers: peers.clone(),
                    own: session.crew[place].1.clone(),
                };
                let data = (0..bytes.len()).step_by(wire::PART_BYTES);
                let data =
                    data.map(|i| load_part::Kind::Program(bytes.slice(i..(i + wire::PART_BYTES).min(bytes.len()))));
                let parts: Vec<LoadPart> = std::iter::once(load_part::Kind::Head(head))
                    .chain(data)
                    .map(|k| LoadPart { kind: Some(k) })
                    .collect();
                async move { client.load(iter(parts)).await.map(|r| r.into_inner().links) }
            })
            .await;
        match loaded {
            Ok(links) => Ok((session, links.into_iter().flatten().collect())),
            Err(status) => {
                self.close(&session).await;
                Err(status)
            }
        }
    }

    /// Ends a session: its devices are stopped and free for another.
    async fn close(&self, session: &Arc<Active>) {
        self.stop(session, "the session is closed").await;
        let mut state = lock(&self.state);
        if state.session.as_ref().is_some_and(|s| s.epoch == session.epoch) {
            (state.session, state.failed) = (None, None);
        }
    }

    /// Sends arrays to the devices that hold parts of them.
    async fn spread(&self, mut stream: Streaming<ArrayPart>) -> Reply<Done> {
        let mut assembler = Assembler::default();
        while let Some(part) = stream.next().await {
            let Some((head, array)) = assembler.take(part?).map_err(invalid)? else { continue };
            let name = head.name.unwrap_or_default();
            let session = self.session(name.epoch)?;
            let parts = session.parts(&name)?;
            if array.shape() != parts[0].ty.shape() || array.dtype() != parts[0].ty.dtype {
                return Err(invalid(format!(
                    "C0013: `{}` is {}, and was sent {:?}",
                    name.name,
                    parts[0].ty,
                    array.shape()
                )));
            }
            let feeding = !name.function.is_empty();
            self.everywhere(&session, |mut client, place| {
                let sent: Vec<ArrayPart> = session.crew[place]
                    .1
                    .iter()
                    .flat_map(|d| {
                        let region = &parts[*d as usize].region;
                        wire::parts(name.clone(), *d, region, &array.part(region))
                    })
                    .collect();
                async move { if feeding { client.feed(iter(sent)).await } else { client.set(iter(sent)).await } }
            })
            .await?;
        }
        Ok(Response::new(Done {}))
    }
}

impl Active {
    /// The parts of a variable, feed or fetch, by device.
    fn parts(&self, name: &ArrayName) -> Result<Vec<&Part>, Status> {
        let missing = || Status::not_found(format!("C0014: `{}` of `{}` is not there", name.name, name.function));
        if name.function.is_empty() {
            let v = self.program.variable(&name.name).ok_or_else(missing)?.index();
            return Ok(self.plan.variables.iter().map(|d| &d[v].0).collect());
        }
        let devices = self.plan.functions.get(&Name::from(name.function.as_str())).ok_or_else(missing)?;
        let part = |d: usize| {
            let plan = &devices[d];
            plan.inputs.iter().chain(&plan.outputs).find(|(n, _, _)| **n == *name.name).map(|(_, part, _)| part)
        };
        (0..devices.len()).map(|d| part(d).ok_or_else(missing)).collect()
    }
}

#[tonic::async_trait]
impl membership_server::Membership for Coordinator {
    type JoinStream = Sent<ToWorker>;

    async fn join(&self, request: Request<Streaming<FromWorker>>) -> Reply<Sent<ToWorker>> {
        let mut stream = request.into_inner();
        let first = tokio::time::timeout(Duration::from_secs(5), stream.next()).await;
        let Ok(Some(Ok(FromWorker { kind: Some(from_worker::Kind::Hello(hello)) }))) = first else {
            return Err(invalid("C0015: a worker begins with a hello"));
        };
        if hello.build != build() || hello.protocol != PROTOCOL {
            return Err(Status::failed_precondition(format!(
                "C0016: this coordinator is build {} (control protocol {PROTOCOL}) and the worker build {} (control \
                 protocol {}); run the same build everywhere",
                build(),
                hello.build,
                hello.protocol
            )));
        }
        if hello.devices == 0 || hello.devices > 1 << 16 {
            return Err(Status::failed_precondition(format!("C0017: a worker with {} devices", hello.devices)));
        }
        let channel =
            endpoint(&hello.address, self.options.tls.as_ref(), Role::Worker).map_err(invalid)?.connect_lazy();
        let (send, receive) = mpsc::channel(8);
        let id = {
            let mut state = lock(&self.state);
            state.next += 1;
            let id = state.next;
            let client = WorkerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
            tracing::info!("worker {id} at {} joins with {} devices", hello.address, hello.devices);
            let member = Member { hello, client, heard: Instant::now(), _directives: send.clone() };
            state.members.insert(id, member);
            id
        };
        let lease_ms = self.options.lease.as_millis() as u32;
        let welcome = Welcome { protocol: PROTOCOL, build: build(), worker: id, lease_ms };
        let _ = send.send(Ok(ToWorker { kind: Some(to_worker::Kind::Welcome(welcome)) })).await;
        self.changed.notify_waiters();
        let this = self.clone();
        let beats = send.downgrade();
        tokio::spawn(async move {
            let why = loop {
                match stream.next().await {
                    Some(Ok(message)) => {
                        if let Some(member) = lock(&this.state).members.get_mut(&id) {
                            member.heard = Instant::now();
                        }
                        if let Some(from_worker::Kind::Leaving(reason)) = message.kind {
                            break format!("it leaves: {reason}");
                        }
                        let beat = ToWorker { kind: Some(to_worker::Kind::Beat(Beat::default())) };
                        match beats.upgrade() {
                            Some(send) => drop(send.try_send(Ok(beat))),
                            None => break "it was given up".into(),
                        }
                    }
                    Some(Err(status)) => break format!("its stream broke: {}", status.message()),
                    None => break "it closed its stream".into(),
                }
            };
            this.lose(id, &why).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

#[tonic::async_trait]
impl control_server::Control for Coordinator {
    type OpenStream = Sent<Opened>;

    async fn open(&self, request: Request<Streaming<OpenPart>>) -> Reply<Sent<Opened>> {
        let mut stream = request.into_inner();
        let (mut settings, mut program) = (None, Vec::new());
        while let Some(part) = stream.next().await {
            match part?.kind {
                Some(open_part::Kind::Settings(s)) => settings = Some(s),
                Some(open_part::Kind::Program(b)) if program.len() + b.len() <= wire::PROGRAM_BYTES => {
                    program.extend_from_slice(&b);
                }
                _ => return Err(invalid("C0018: a program beyond all bounds")),
            }
        }
        let settings = settings.ok_or_else(|| invalid("C0018: a session without settings"))?;
        let (session, links) = Coordinator::open(self, settings, program.into()).await?;
        tracing::info!("session of epoch {} on {} workers", session.epoch, session.crew.len());
        let (send, receive) = mpsc::channel(1);
        let _ = send.send(Ok(Opened { epoch: session.epoch, links })).await;
        let this = self.clone();
        tokio::spawn(async move {
            send.closed().await;
            tracing::info!("session of epoch {} ends", session.epoch);
            this.close(&session).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn feed(&self, request: Request<Streaming<ArrayPart>>) -> Reply<Done> {
        self.spread(request.into_inner()).await
    }

    async fn set(&self, request: Request<Streaming<ArrayPart>>) -> Reply<Done> {
        self.spread(request.into_inner()).await
    }

    async fn step(&self, request: Request<control::StepRequest>) -> Reply<Done> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        self.everywhere(&session, |mut client, _| {
            let r = r.clone();
            async move { client.run(r).await }
        })
        .await?;
        session.steps.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(Done {}))
    }

    type FetchStream = Sent<ArrayPart>;

    async fn fetch(&self, request: Request<ArrayName>) -> Reply<Sent<ArrayPart>> {
        let name = request.into_inner();
        let session = self.session(name.epoch)?;
        let ty = session.parts(&name)?[0].ty.clone();
        let pieces = self
            .everywhere(&session, |mut client, _| {
                let name = name.clone();
                async move {
                    let mut stream = client.fetch(name).await?.into_inner();
                    let (mut assembler, mut found) = (Assembler::default(), Vec::new());
                    while let Some(part) = stream.next().await {
                        found.extend(assembler.take(part?).map_err(invalid)?);
                    }
                    Ok(found)
                }
            })
            .await?;
        let mut whole = Array::zeros(ty.dtype, &ty.shape());
        for (head, array) in pieces.into_iter().flatten() {
            let start: Vec<usize> = head.start.iter().map(|s| *s as usize).collect();
            if !whole.put(&start, &array) {
                return Err(Status::internal(format!("C0019: a part of `{}` does not fit", name.name)));
            }
        }
        let parts = wire::parts(name, 0, &mesh::region::Region::full(&ty), &whole);
        Ok(Response::new(Box::pin(iter(parts.into_iter().map(Ok)))))
    }

    async fn memory(&self, request: Request<control::SessionName>) -> Reply<control::MemoryReply> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        let replies = self
            .everywhere(&session, |mut client, _| async move { client.memory(r).await.map(|m| m.into_inner().devices) })
            .await?;
        Ok(Response::new(control::MemoryReply { devices: replies.into_iter().flatten().collect() }))
    }

    async fn status(&self, _: Request<control::StatusRequest>) -> Reply<control::StatusReply> {
        let state = lock(&self.state);
        let workers = state.members.iter().map(|(id, m)| control::WorkerStatus {
            worker: *id,
            address: m.hello.address.clone(),
            devices: m.hello.devices,
            silent_ms: m.heard.elapsed().as_millis() as u32,
        });
        Ok(Response::new(control::StatusReply {
            build: build(),
            epoch: state.epoch,
            workers: workers.collect(),
            session: state
                .session
                .as_ref()
                .map(|s| format!("mesh {}, layout {}", s.plan.mesh, s.plan.layout))
                .unwrap_or_default(),
            steps: state.session.as_ref().map_or(0, |s| s.steps.load(Ordering::Relaxed)),
        }))
    }
}
