//! The coordinator: knows which workers there are, and gives their devices to a session.
//!
//! Whenever the set of workers of a session changes the epoch rises, and what belongs to an older one is refused on every
//! side. `crew` is the session's side of it, `control` what model programs call.

use crate::crew::Active;
use crate::journal::{Event, Journal};
use proto::control::{
    self, Beat, FromWorker, ToWorker, Welcome, WorkerHello, control_server, from_worker, membership_server, to_worker,
    worker_client::WorkerClient,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use worker::access;
use worker::node::{MESSAGE_BYTES, PROTOCOL, endpoint};
use worker::store::Store;
use worker::tls::{Role, Tls};

/// The highest epoch that is believed: what others say must not make it wrap around.
const EPOCHS: u64 = u64::MAX / 2;

/// How the coordinator runs.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// How long a worker may be silent before it is given up.
    pub silence: Duration,
    /// How long a worker without a coordinator looks for it.
    pub lease: Duration,
    /// How long a session waits for enough devices.
    pub wait: Duration,
    /// How long a session that has lost workers waits for others.
    pub replace_timeout: Duration,
    /// Where sessions may have their checkpoints: there or below.
    pub store: String,
    /// Where to remember what must outlast this process; None to forget it.
    pub state: Option<PathBuf>,
    /// TLS of every connection.
    pub tls: Option<Tls>,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            silence: Duration::from_secs(2),
            lease: Duration::from_secs(10),
            wait: Duration::from_secs(60),
            replace_timeout: Duration::from_secs(60),
            store: ".".into(),
            state: None,
            tls: None,
        }
    }
}

/// The version of this program.
pub(crate) fn build() -> String {
    worker::transport::connector::Version::default().build
}

/// A worker that is there.
pub(crate) struct Member {
    pub hello: WorkerHello,
    pub client: WorkerClient<Channel>,
    heard: Instant,
    /// Why it is to go: it gets no more work, and goes when its session is over.
    pub leaving: Option<String>,
    /// Kept for as long as the worker may stay.
    directives: mpsc::Sender<Result<ToWorker, Status>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub epoch: u64,
    next: u64,
    pub members: BTreeMap<u64, Member>,
    pub session: Option<Arc<Active>>,
    /// Why the session cannot go on.
    pub failed: Option<String>,
    /// Why this coordinator is about to end, if it is.
    pub ending: Option<String>,
    pub recoveries: u64,
    pub checkpoints: u64,
    pub checkpoint: String,
    pub results: BTreeMap<String, f32>,
    journal: Option<Journal>,
}

impl State {
    /// Writes down what happened.
    pub fn record(&mut self, event: Event) {
        if let Some(journal) = &mut self.journal
            && let Err(e) = journal.add(&event)
        {
            // Workers and checkpoints know the epoch as well: the next life does not fall behind them.
            tracing::error!("cannot write {}: {e}", journal.path().display());
        }
    }

    /// Raises the epoch above all that was seen.
    pub fn raise(&mut self, seen: u64) -> u64 {
        self.epoch = self.epoch.max(seen.min(EPOCHS)) + 1;
        self.record(Event::Epoch { epoch: self.epoch });
        self.epoch
    }

    /// Devices of the workers that stay.
    pub fn devices(&self) -> usize {
        self.members.values().filter(|m| m.leaving.is_none()).map(|m| m.hello.devices as usize).sum()
    }
}

/// The services of a coordinator.
#[derive(Clone)]
pub struct Coordinator {
    pub(crate) options: ServerOptions,
    pub(crate) store: Store,
    state: Arc<Mutex<State>>,
    /// Counts changes of the state.
    changes: Arc<watch::Sender<u64>>,
}

pub(crate) type Reply<T> = Result<Response<T>, Status>;
pub(crate) type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(crate) fn invalid(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(e.to_string())
}

impl Coordinator {
    /// A coordinator without workers, which remembers what it has written down.
    ///
    /// # Errors
    /// A store or a state that cannot be used; in words.
    pub fn new(options: ServerOptions) -> Result<Coordinator, String> {
        let store = Store::open(&options.store).map_err(|e| e.to_string())?;
        let mut state = State::default();
        if let Some(dir) = &options.state {
            let (journal, replayed) = Journal::open(dir)?;
            if replayed.epoch > 0 {
                tracing::info!("went on from epoch {} of {}", replayed.epoch, journal.path().display());
            }
            if replayed.unread > 0 {
                tracing::warn!("{} lines of {} cannot be read", replayed.unread, journal.path().display());
            }
            (state.epoch, state.next, state.journal) = (replayed.epoch, replayed.worker, Some(journal));
            (state.recoveries, state.checkpoints) = (replayed.recoveries, replayed.checkpoints);
            state.checkpoint = replayed.checkpoint;
        }
        Ok(Coordinator { options, store, state: Arc::new(Mutex::new(state)), changes: Arc::new(watch::channel(0).0) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever waits for a change.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Tells of changes from now on.
    pub(crate) fn watched(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
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

    /// Asks the session to write a checkpoint and let go, and waits until it has, or `grace` is over.
    pub async fn end(&self, reason: &str, grace: Duration) {
        self.state().ending = Some(reason.into());
        let mut changes = self.watched();
        let over = async { while self.state().session.is_some() && changes.changed().await.is_ok() {} };
        // After its grace nobody is asked any more.
        let _ = tokio::time::timeout(grace, over).await;
    }

    /// Gives up workers that are silent.
    async fn watch(self) {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let silent: Vec<u64> = {
                let state = self.state();
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
            let mut state = self.state();
            let Some(member) = state.members.remove(&id) else { return };
            tracing::warn!("lost worker {id} at {}: {why}", member.hello.address);
            state.record(Event::Lost { worker: id, reason: why.into() });
            state.session.clone().filter(|s| s.has(id))
        };
        if let Some(session) = session {
            self.stop(&session, &format!("worker {id} is lost: {why}")).await;
        }
        self.changed();
    }

    /// Lets workers go that want to, or are to, and are part of no session.
    pub(crate) fn release(&self) {
        let state = self.state();
        for (id, member) in &state.members {
            let busy = state.session.as_ref().is_some_and(|s| s.has(*id));
            if let (Some(reason), false) = (&member.leaving, busy) {
                let leave = ToWorker { kind: Some(to_worker::Kind::Leave(reason.clone())) };
                // One that is not there any more is given up by its silence.
                let _ = member.directives.try_send(Ok(leave));
            }
        }
    }

    /// Marks a worker as one that is to go.
    ///
    /// # Errors
    /// A worker that is not there.
    pub(crate) fn drain(&self, id: u64, reason: &str) -> Result<(), Status> {
        {
            let mut state = self.state();
            let member = state.members.get_mut(&id);
            let member = member.ok_or_else(|| Status::not_found(format!("C0023: there is no worker {id}")))?;
            tracing::info!("worker {id} is to leave: {reason}");
            member.leaving = Some(reason.into());
        }
        self.release();
        self.changed();
        Ok(())
    }

    /// What there is.
    pub(crate) fn snapshot(&self) -> control::StatusReply {
        let state = self.state();
        let workers = state.members.iter().map(|(id, m)| control::WorkerStatus {
            worker: *id,
            address: m.hello.address.clone(),
            devices: m.hello.devices,
            silent_ms: m.heard.elapsed().as_millis() as u32,
            leaving: m.leaving.is_some(),
        });
        let session = state.session.as_ref();
        control::StatusReply {
            build: build(),
            epoch: state.epoch,
            workers: workers.collect(),
            session: session.map(|s| format!("mesh {}, layout {}", s.plan.mesh, s.plan.layout)).unwrap_or_default(),
            steps: session.map_or(0, |s| s.steps.load(Ordering::Relaxed)),
            recoveries: state.recoveries,
            checkpoints: state.checkpoints,
            checkpoint: state.checkpoint.clone(),
            results: state.results.clone().into_iter().collect(),
        }
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
            let mut state = self.state();
            state.next += 1;
            let id = state.next;
            let client = WorkerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
            tracing::info!("worker {id} at {} joins with {} devices", hello.address, hello.devices);
            state.record(Event::Joined { worker: id, address: hello.address.clone(), devices: hello.devices });
            // It may have served another coordinator, or this one before it forgot.
            state.epoch = state.epoch.max(hello.epoch.min(EPOCHS));
            let member = Member { hello, client, heard: Instant::now(), leaving: None, directives: send.clone() };
            state.members.insert(id, member);
            id
        };
        let lease_ms = self.options.lease.as_millis() as u32;
        let welcome = Welcome { protocol: PROTOCOL, build: build(), worker: id, lease_ms };
        let _ = send.send(Ok(ToWorker { kind: Some(to_worker::Kind::Welcome(welcome)) })).await;
        self.changed();
        let this = self.clone();
        let beats = send.downgrade();
        tokio::spawn(async move {
            let why = loop {
                match stream.next().await {
                    Some(Ok(message)) => {
                        if let Some(member) = this.state().members.get_mut(&id) {
                            member.heard = Instant::now();
                        }
                        if let Some(from_worker::Kind::Leaving(reason)) = message.kind {
                            // One that is gone already is not asked to stay.
                            let _ = this.drain(id, &reason);
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
