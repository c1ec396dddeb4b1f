//! The client's side of a session on workers: every call blocks.

use crate::checkpoint::{Newest, Position, Restored};
use crate::error::Failure;
use crate::interrupt;
use crate::recorder::collect;
use crate::session::{Need, Options, Peak};
use crate::source::Piece;
use mesh::array::Array;
use mesh::layout::{Layout, Mesh};
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use proto::control::{
    ArrayName, CheckpointRequest, DeviceEvents, DeviceProfile, EventsRequest, ForeseeHead, Noted, OpenPart, Opened,
    RestoreNewest, SessionName, Settings, StepRequest, control_client::ControlClient, open_part,
};
use std::cell::RefCell;
use std::future::Future;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt, iter};
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};
use worker::node::{MESSAGE_BYTES, endpoint};
use worker::recorder::now_ns;
use worker::tls::{self, Role};
use worker::watch::NonFinite;
use worker::wire::{self, Assembler};

/// A session that a coordinator holds.
pub(crate) struct Remote {
    /// The coordinator.
    pub url: String,
    /// The session's epoch.
    pub epoch: u64,
    /// How devices reach their peers, a line each.
    pub links: Vec<String>,
    mesh: String,
    runtime: Runtime,
    client: ControlClient<Channel>,
    heard: RefCell<Heard>,
    /// The session lasts for as long as this.
    _held: Streaming<Opened>,
}

/// What the coordinator has said beside its answers.
#[derive(Default)]
struct Heard {
    notes: Vec<String>,
    regroup: bool,
    communicated_ns: u64,
    lost: Option<String>,
}

/// What a coordinator answers in place of a result.
fn failed(status: Status) -> Failure {
    let text = status.message().to_string();
    match status.code() {
        Code::Aborted | Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown => {
            Failure::Lost(text)
        }
        // Of another epoch, or the workers are another program's for now.
        Code::FailedPrecondition | Code::ResourceExhausted => Failure::Lost(text),
        Code::DataLoss => Failure::Checkpoint(text),
        _ => Failure::Mesh(text),
    }
}

/// Why there is no connection to a coordinator.
fn unreachable(url: &str, e: &(dyn std::error::Error + 'static)) -> Failure {
    match tls::refusal(e) {
        Some(reason) => Failure::Refused { coordinator: url.into(), reason },
        None => Failure::Lost(format!("the coordinator {url} is not there: {}", tls::causes(e))),
    }
}

impl Remote {
    /// Opens a session in a stage of its program; one of epoch `after` gives up its place to it, and with `carry` its
    /// workers and the values of the variables that both have.
    ///
    /// # Errors
    /// A coordinator that is not there, has too few workers, or refuses the program.
    pub fn open(
        url: &str,
        program: &Program,
        options: &Options,
        stage: &str,
        (after, carry): (u64, bool),
    ) -> Result<Remote, Failure> {
        // A thread of its own: connections live, and what was fed is on its way, while this one makes the next box.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Failure::Mesh(e.to_string()))?;
        let bytes = bytes::Bytes::from(wire::encode(program)?);
        let checkpoints = options.checkpoints.as_ref();
        let settings = Settings {
            mesh: options.mesh.to_string(),
            layout: options.layout.to_string(),
            seed: options.seed,
            memory: options.memory.unwrap_or(0) as u64,
            transport: options.transport.to_string(),
            checkpoints: checkpoints.map(|c| c.location.clone()).unwrap_or_default(),
            keep: checkpoints.map_or(0, |c| c.keep as u32),
            shrink: options.shrink,
            after,
            carry,
            stage: stage.into(),
        };
        let open = async {
            let endpoint = endpoint(url, options.tls.as_ref(), Role::Coordinator)?;
            let channel = endpoint.connect().await.map_err(|e| unreachable(url, &e))?;
            let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES);
            let parts: Vec<OpenPart> = std::iter::once(open_part::Kind::Settings(settings))
                .chain(wire::slices(bytes).map(open_part::Kind::Program))
                .map(|k| OpenPart { kind: Some(k) })
                .collect();
            // A certificate that the coordinator does not accept shows only now.
            let opened = client.open(iter(parts)).await;
            let opened = opened.map_err(|s| match (std::error::Error::source(&s), s.code()) {
                (Some(_), _) => unreachable(url, &s),
                (None, Code::PermissionDenied) => {
                    Failure::Refused { coordinator: url.into(), reason: s.message().into() }
                }
                (None, _) => failed(s),
            });
            let mut held = opened?.into_inner();
            let opened = held.next().await.ok_or_else(|| Failure::Lost("the session ended at once".into()))?;
            Ok::<_, Failure>((client, opened.map_err(failed)?, held))
        };
        // The coordinator may let us wait for workers.
        let (client, opened, held) = runtime.block_on(async {
            tokio::select! {
                opened = open => opened,
                () = interrupt::wait() => Err(Failure::Lost("stopped as asked while waiting for workers".into())),
            }
        })?;
        Ok(Remote {
            url: url.into(),
            epoch: opened.epoch,
            links: opened.links,
            mesh: opened.mesh,
            runtime,
            client,
            heard: RefCell::default(),
            _held: held,
        })
    }

    /// The plan of the session: `whole`, or that of the smaller mesh which it has.
    ///
    /// # Errors
    /// A mesh that is none.
    pub fn plan(&self, program: &Program, options: &Options, whole: ProgramPlan) -> Result<ProgramPlan, Failure> {
        let mesh: Mesh = self.mesh.parse()?;
        if mesh == whole.mesh {
            return Ok(whole);
        }
        Ok(Options { mesh, devices: None, ..options.clone() }.plan(program)?)
    }

    /// Makes a call; remembers it if the session is lost with it.
    fn call<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        self.wait(async { call.await.map_err(failed) })
    }

    /// The same of several calls together.
    fn wait<T>(&self, calls: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let result = self.runtime.block_on(calls);
        if let Err(Failure::Lost(why)) = &result {
            self.heard.borrow_mut().lost.get_or_insert_with(|| why.clone());
        }
        result
    }

    fn note(&self, reply: Response<Noted>) {
        let (reply, mut heard) = (reply.into_inner(), self.heard.borrow_mut());
        heard.notes.extend(reply.notes);
        heard.regroup = reply.regroup;
    }

    /// Says that the session is lost.
    pub fn give_up(&mut self, why: &str) {
        self.heard.get_mut().lost.get_or_insert_with(|| why.into());
    }

    /// Why the session is lost, if it is.
    pub fn lost(&self) -> Option<String> {
        self.heard.borrow().lost.clone()
    }

    /// Whether it is time for a checkpoint and a new session.
    pub fn regroup(&self) -> bool {
        self.heard.borrow().regroup
    }

    /// Takes over what another session had not told yet.
    pub fn hear(&mut self, notes: Vec<String>) {
        self.heard.get_mut().notes.extend(notes);
    }

    /// What was not told yet.
    pub fn notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.heard.get_mut().notes)
    }

    fn name(&self, function: &str, name: &str) -> ArrayName {
        ArrayName { epoch: self.epoch, function: function.into(), name: name.into() }
    }

    /// Sends pieces of a feed, or of a variable (of no function). One is made when the one before is on its way.
    pub fn send(
        &mut self,
        function: &str,
        name: &str,
        pieces: impl Iterator<Item = Result<Piece, Failure>>,
    ) -> Result<(), Failure> {
        let (name, mut client, (send, receive)) = (self.name(function, name), self.client.clone(), mpsc::channel(1));
        let make = async move {
            for piece in pieces {
                let Piece { at, array, .. } = piece?;
                let start: Vec<usize> = at.0.iter().map(|(_, r)| r.start).collect();
                let parts = wire::parts(name.clone(), vec![], &start, &array);
                drop(array);
                for part in parts {
                    if send.send(part).await.is_err() {
                        // The answer says why nobody takes it.
                        return Ok(());
                    }
                }
            }
            Ok(())
        };
        let parts = ReceiverStream::new(receive);
        let setting = function.is_empty();
        let sent = async move {
            let sent = if setting { client.set(parts).await } else { client.feed(parts).await };
            sent.map_err(failed)
        };
        self.wait(async { tokio::try_join!(make, sent) }).map(|_| ())
    }

    /// Runs a function; watched, it gives what came up first that is not finite.
    pub fn step(&mut self, function: &str, step: u32, watch: bool) -> Result<Vec<NonFinite>, Failure> {
        let request = StepRequest { epoch: self.epoch, function: function.into(), step, watch };
        let reply = self.call(self.client.clone().step(request))?;
        self.heard.borrow_mut().communicated_ns = reply.get_ref().communicate_ns;
        let non_finite = reply.get_ref().non_finite.iter().cloned().map(wire::non_finite_of).collect();
        self.note(reply);
        Ok(non_finite)
    }

    /// A result of a function, or a variable (of no function).
    pub fn fetch(&self, function: &str, name: &str) -> Result<Array, Failure> {
        let (request, mut client) = (self.name(function, name), self.client.clone());
        self.call(async {
            let mut stream = client.fetch(request).await?.into_inner();
            let mut assembler = Assembler::default();
            while let Some(part) = stream.next().await {
                if let Some((_, array)) = assembler.take(part?).map_err(Status::internal)? {
                    return Ok(array);
                }
            }
            Err(Status::unavailable(format!("`{name}` came cut short")))
        })
    }

    /// Begins a checkpoint.
    pub fn checkpoint(&mut self, position: &Position) -> Result<(), Failure> {
        let Position { step, samples, ref config } = *position;
        let config = serde_json::to_vec(config).unwrap_or_default().into();
        let request = CheckpointRequest { epoch: self.epoch, step, samples, config };
        self.call(self.client.clone().checkpoint(request)).map(|reply| self.note(reply))
    }

    /// Waits for the checkpoint that is being written.
    pub fn settle(&mut self) -> Result<(), Failure> {
        self.call(self.client.clone().settle(SessionName { epoch: self.epoch })).map(|reply| self.note(reply))
    }

    /// Sets the variables to the newest good checkpoint of those not `passed` over, if it is of the session's stage.
    pub fn restore(&mut self, passed: &mut Vec<String>) -> Result<Newest, Failure> {
        let request = RestoreNewest { epoch: self.epoch, passed: passed.clone() };
        let reply = self.call(self.client.clone().restore(request))?.into_inner();
        self.heard.get_mut().notes.extend(reply.notes);
        *passed = reply.passed;
        if !reply.stage.is_empty() {
            return Ok(Newest::OfStage(reply.stage));
        }
        if !reply.found {
            return Ok(Newest::None);
        }
        let config = serde_json::from_slice(&reply.config).unwrap_or_default();
        let position = Position { step: reply.step, samples: reply.samples, config };
        Ok(Newest::Restored(Restored { folder: reply.folder, position }))
    }

    /// Nanoseconds of the last step in which the device that communicated longest did so.
    pub fn communicated_ns(&self) -> u64 {
        self.heard.borrow().communicated_ns
    }

    /// What the devices did last, on this process's clock.
    pub fn events(&self) -> Result<Vec<DeviceEvents>, Failure> {
        let (request, mut client) = (EventsRequest { epoch: self.epoch }, self.client.clone());
        let mut events = self.call(async {
            let asked = now_ns();
            collect(client.events(request).await?.into_inner(), asked).await
        })?;
        events.sort_by_key(|e| e.device);
        Ok(events)
    }

    /// How long the devices' steps took.
    pub fn profile(&self, devices: usize) -> Result<Vec<DeviceProfile>, Failure> {
        let (request, mut client) = (SessionName { epoch: self.epoch }, self.client.clone());
        self.call(async {
            client.profile(request).await?.into_inner().take(devices).collect::<Result<_, Status>>().await
        })
    }

    /// What a program with that layout would take of each device, beside what the one there takes.
    pub fn foresee(&self, program: &Program, layout: &Layout) -> Result<Vec<Need>, Failure> {
        let program = bytes::Bytes::from(wire::encode(program)?);
        let head = ForeseeHead { epoch: self.epoch, layout: layout.to_string() };
        let parts = wire::foresee(head, &program);
        let reply = self.call(self.client.clone().foresee(iter(parts)))?.into_inner();
        let mut devices = reply.devices;
        devices.sort_by_key(|d| d.device);
        let need = |d: proto::control::Need| Need {
            now: d.now as usize,
            other: d.other as usize,
            budget: (d.budget > 0).then_some(d.budget as usize),
        };
        Ok(devices.into_iter().map(need).collect())
    }

    /// Predicted and measured memory, by device.
    pub fn peaks(&self) -> Result<Vec<Peak>, Failure> {
        let reply = self.call(self.client.clone().memory(SessionName { epoch: self.epoch }))?.into_inner();
        let mut devices = reply.devices;
        devices.sort_by_key(|d| d.device);
        let peak = |d: proto::control::DeviceMemory| Peak {
            peak_bytes_predicted: d.predicted as usize,
            peak_bytes_measured: d.measured as usize,
        };
        Ok(devices.into_iter().map(peak).collect())
    }
}
