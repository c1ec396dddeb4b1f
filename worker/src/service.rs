//! A worker: some devices offered to a coordinator, and the service by which it drives them.
//!
//! Every call carries the epoch of the session that it belongs to. Loading begins an epoch; what belongs to another one is
//! refused before anything is touched. A worker plans for itself: planning is a function of program, mesh and layout,
//! so all devices come to plans that fit together, and no plan travels.

use crate::arena::Arena;
use crate::checkpoint::{self, CheckpointError, Manifest, Snapshot};
use crate::device::{Device, Seat};
use crate::group::{self, DeviceGroup};
use crate::kernels::isa::Isa;
use crate::kernels::kernel::CpuBackend;
use crate::pool::Cores;
use crate::recorder::Recorder;
use crate::store::Store;
use crate::transport::bell::Doom;
use crate::transport::connector::{Address, ConnectOptions, HostId, Listener, Roster, TransportChoice};
use crate::transport::switchboard::Switchboard;
use crate::wire::{self, Assembler};
use mesh::array::Array;
use mesh::dim::Name;
use mesh::error::{Cause, Error};
use mesh::plan::{Part, PlanOptions, ProgramPlan, plan_program};
use mesh::program::Program;
use proto::control::{self, worker_server};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_stream::{StreamExt, iter};
use tonic::{Request, Response, Status, Streaming};

/// What a worker offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Devices.
    pub devices: usize,
    /// Threads of each.
    pub threads: usize,
    /// Bytes that each may use; None for no limit of the worker's own.
    pub memory: Option<usize>,
}

/// That a device may not hold the memory of two stages at once, which going from one to the other takes.
pub fn over_both(device: usize, needed: usize, budget: usize) -> Error {
    let mut e = Error::new(Cause::OverMemory { device, needed, budget, largest: vec![] });
    e.notes.push("going to another stage holds the variables and activations of both at once".into());
    e
}

/// A program on the worker's devices.
struct Loaded {
    epoch: u64,
    program: Program,
    plan: ProgramPlan,
    /// The worker's devices by their number in the mesh.
    own: Vec<usize>,
    group: DeviceGroup,
    /// Bytes that each device may use.
    budget: Option<usize>,
}

/// The epoch that runs, and how to stop its devices while they do.
#[derive(Default)]
struct Current {
    epoch: u64,
    doom: Option<Doom>,
    /// What the devices of the epoch that was loaded last do: outside of what a step holds.
    recorders: (u64, Vec<(usize, Arc<Recorder>)>),
}

/// The service of a worker.
#[derive(Clone)]
pub struct WorkerService {
    offer: Offer,
    listener: Arc<Listener>,
    current: Arc<Mutex<Current>>,
    loaded: Arc<Mutex<Option<Loaded>>>,
    /// Where checkpoints may lie.
    store: Store,
    /// What was copied for a checkpoint, and in which epoch.
    copied: Arc<Mutex<Option<(u64, Snapshot)>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stale(given: u64, current: u64) -> Status {
    Status::failed_precondition(format!("W0020: a call of epoch {given}, and this worker is in epoch {current}"))
}

/// The parts of [`wire::foresee`], put together again.
///
/// # Errors
/// A stream that breaks or has no head; a program beyond all bounds.
pub async fn foreseen(
    mut stream: Streaming<control::ForeseePart>,
) -> Result<(control::ForeseeHead, bytes::Bytes), Status> {
    use control::foresee_part::Kind;
    let (mut head, mut program) = (None, Vec::new());
    while let Some(part) = stream.next().await {
        match part?.kind {
            Some(Kind::Head(h)) => head = Some(h),
            Some(Kind::Program(b)) if program.len() + b.len() <= wire::PROGRAM_BYTES => program.extend_from_slice(&b),
            _ => return Err(Status::invalid_argument("W0026: a program beyond all bounds")),
        }
    }
    let head = head.ok_or_else(|| Status::invalid_argument("W0026: a program without a head"))?;
    Ok((head, program.into()))
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T, Status> + Send + 'static) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(f).await;
    done.unwrap_or_else(|e| Err(Status::internal(format!("W0021: a task of the worker ended: {e}"))))
}

/// What a coordinator needs to know of a checkpoint's failure: DATA_LOSS if an older one may do.
fn refused(e: CheckpointError) -> Status {
    if e.concerns_one() { Status::data_loss(e.to_string()) } else { Status::failed_precondition(e.to_string()) }
}

type PartStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<control::ShardPart, Status>> + Send>>;
type EventStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<control::DeviceEvents, Status>> + Send>>;
type ProfileStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<control::DeviceProfile, Status>> + Send>>;
type ArrayStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<control::ArrayPart, Status>> + Send>>;

impl WorkerService {
    /// A worker with that offer, whose devices meet their peers at `listener`; checkpoints lie in `store` or below it.
    pub fn new(offer: Offer, listener: Arc<Listener>, store: Store) -> WorkerService {
        let (current, loaded, copied) = (Arc::default(), Arc::default(), Arc::default());
        WorkerService { offer, listener, current, loaded, store, copied }
    }

    /// The highest epoch that this worker was part of.
    pub fn epoch(&self) -> u64 {
        lock(&self.current).epoch
    }

    /// The store of a session's checkpoints.
    fn checkpoints(&self, location: &str) -> Result<Store, Status> {
        if !self.store.contains(location) {
            return Err(Status::permission_denied(format!(
                "W0027: checkpoints in {location} are not below this worker's --store, {}",
                self.store.location()
            )));
        }
        Store::open(location).map_err(|e| Status::invalid_argument(e.to_string()))
    }

    /// Stops what runs and forgets the program; the worker is free for another epoch.
    pub fn unload(&self, epoch: u64, reason: &str) {
        let doom = {
            let mut current = lock(&self.current);
            current.epoch = current.epoch.max(epoch);
            current.doom.take()
        };
        if let Some(doom) = doom {
            doom.strike(reason);
        }
        // Waits for the devices to stop.
        *lock(&self.loaded) = None;
        *lock(&self.copied) = None;
    }

    /// Does something with the program of that epoch, on a thread that may block.
    async fn with<T: Send + 'static>(
        &self,
        epoch: u64,
        f: impl FnOnce(&mut Loaded) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let this = self.clone();
        blocking(move || {
            let mut loaded = lock(&this.loaded);
            let current = lock(&this.current).epoch;
            match loaded.as_mut() {
                Some(l) if l.epoch == epoch && current == epoch => f(l),
                _ => Err(stale(epoch, current)),
            }
        })
        .await
    }

    /// Takes the program of that epoch away from the devices, with its variables.
    fn take_over(&self, epoch: u64) -> Result<Loaded, Status> {
        *lock(&self.copied) = None;
        let doom = lock(&self.current).doom.take();
        let loaded = lock(&self.loaded).take();
        drop(doom);
        loaded.filter(|l| l.epoch == epoch).ok_or_else(|| {
            Status::failed_precondition(format!("W0029: the variables of epoch {epoch} are not here to be kept"))
        })
    }

    /// Loads a program; the variables that `before` has too keep their values.
    fn load(&self, head: control::LoadHead, program: &[u8], before: Option<Loaded>) -> Result<control::Loaded, Status> {
        let bad = |e: mesh::error::Error| Status::invalid_argument(e.to_string());
        let settings = head.settings.unwrap_or_default();
        let program = wire::decode(program).map_err(bad)?;
        let mesh = settings.mesh.parse().map_err(bad)?;
        let layout = settings.layout.parse().map_err(bad)?;
        let limits = [self.offer.memory, (settings.memory > 0).then_some(settings.memory as usize)];
        let budget = limits.into_iter().flatten().min();
        let options = PlanOptions { memory: budget, devices: Some(head.peers.len()), apart: false, waiting: false };
        let backend = CpuBackend { threads: self.offer.threads };
        let plan = plan_program(&program, &mesh, &layout, &options, &backend).map_err(bad)?;
        if let (Some(before), Some(budget)) = (&before, budget) {
            let both = |d: &usize| before.plan.peak_bytes(*d) + plan.peak_bytes(*d);
            let most = before.own.iter().filter(|d| **d < head.peers.len()).map(|d| (both(d), *d)).max();
            if let Some((needed, device)) = most.filter(|(needed, _)| *needed > budget) {
                return Err(bad(over_both(device, needed, budget)));
            }
        }
        let own: Vec<usize> = head.own.iter().map(|d| *d as usize).collect();
        if own.is_empty() || own.len() > self.offer.devices || own.iter().any(|d| *d >= head.peers.len()) {
            return Err(Status::invalid_argument("W0022: devices that this worker does not have"));
        }
        let choice: TransportChoice =
            settings.transport.parse().map_err(|e: String| Status::invalid_argument(format!("W0023: {e}")))?;
        let addresses =
            head.peers.into_iter().map(|p| Address { host: HostId::from(p.host), socket: p.socket, grpc: p.address });
        let roster = Roster { job: head.job, epoch: head.epoch, devices: addresses.collect(), mine: own.clone() };
        let arenas: Result<Vec<_>, _> = own.iter().map(|d| Device::arena(&plan, *d, Arena::shared)).collect();
        let arenas = arenas.map_err(|e| Status::resource_exhausted(e.to_string()))?;
        let options = ConnectOptions { choice, arenas: arenas.clone(), ..ConnectOptions::default() };
        let doom = Doom::new();
        {
            // From now on an abort finds what it has to stop.
            let mut current = lock(&self.current);
            if current.epoch != head.epoch {
                return Err(stale(head.epoch, current.epoch));
            }
            current.doom = Some(doom.clone());
        }
        let ends = self.listener.connect(&roster, &options, &doom).map_err(|e| Status::unavailable(e.to_string()))?;
        let links = ends.iter().map(|e| e.to_string()).collect();
        let threads = self.offer.threads;
        let seat = |(end, arena): (Switchboard, Arc<Arena>)| {
            let device = end.device();
            let (place, devices) = roster.on_host(device);
            // Products of bf16 have one order of summation on the whole mesh.
            let isa = if head.amx { Isa::detect() } else { Isa::detect().min(Isa::Avx512) };
            Seat { device, arena, end: Box::new(end), cores: Cores::of(place, devices, threads), isa }
        };
        let mut group =
            DeviceGroup::new(&plan, ends.into_iter().zip(arenas).map(seat).collect(), threads, settings.seed);
        if let Some(before) = before {
            let pairs = group::carried((&program, &plan), (&before.program, &before.plan));
            let pairs = pairs.map_err(|v| Status::invalid_argument(format!("W0029: `{v}` has another layout now")))?;
            // Devices do not wait for each other in it: each fills what it holds.
            let init = plan.functions.keys().position(|n| **n == *"init");
            init.map_or(Ok(()), |init| group.run(init, 0)).map_err(|e| Status::aborted(e.to_string()))?;
            group.succeed(&before.group, &pairs);
        }
        let mut loaded = lock(&self.loaded);
        let mut current = lock(&self.current);
        if current.epoch != head.epoch {
            return Err(stale(head.epoch, current.epoch));
        }
        current.recorders = (head.epoch, group.recorders().to_vec());
        *loaded = Some(Loaded { epoch: head.epoch, program, plan, own, group, budget });
        Ok(control::Loaded { links })
    }

    /// Takes boxes of tensors off a stream and writes each where it lies on the devices that it names.
    async fn take(&self, mut stream: Streaming<control::ArrayPart>) -> Result<Response<control::Done>, Status> {
        let mut assembler = Assembler::default();
        while let Some(part) = stream.next().await {
            let Some((head, array)) = assembler.take(part?).map_err(Status::invalid_argument)? else { continue };
            let epoch = head.name.as_ref().map_or(0, |n| n.epoch);
            self.with(epoch, move |l| l.put(&head, &array)).await?;
        }
        assembler.end().map_err(Status::invalid_argument)?;
        Ok(Response::new(control::Done {}))
    }
}

/// Where an array lies.
#[derive(Clone, Copy)]
enum Place {
    Variable(usize),
    Edge { function: usize, index: usize, input: bool },
}

impl Loaded {
    /// A variable, a feed or a fetch by name.
    fn place(&self, name: &control::ArrayName) -> Result<Place, Status> {
        let missing = || Status::not_found(format!("W0025: `{}` of `{}` is not there", name.name, name.function));
        if name.function.is_empty() {
            return self.program.variable(&name.name).map(|v| Place::Variable(v.index())).ok_or_else(missing);
        }
        let function = self.function(&name.function)?;
        let plan = &self.plan.functions[&Name::from(name.function.as_str())][self.own[0]];
        let find = |list: &[(Name, Part, mesh::plan::Buffer)]| list.iter().position(|(n, _, _)| **n == *name.name);
        let input = find(&plan.inputs).map(|index| Place::Edge { function, index, input: true });
        let output = || find(&plan.outputs).map(|index| Place::Edge { function, index, input: false });
        input.or_else(output).ok_or_else(missing)
    }

    /// Writes a box to every device that its head names; to none if it is not just what each of them holds.
    fn put(&self, head: &control::ArrayHead, array: &Array) -> Result<(), Status> {
        let name = head.name.clone().unwrap_or_default();
        let place = self.place(&name)?;
        if let Place::Edge { input: false, .. } = place {
            let text = format!("W0025: `{}` is a result of `{}`, which is not fed", name.name, name.function);
            return Err(Status::invalid_argument(text));
        }
        if head.holders.len() > self.own.len() {
            return Err(Status::invalid_argument("W0022: more devices than this worker has"));
        }
        let mut places = Vec::new();
        for device in &head.holders {
            let (at, part) = self.part(place, *device as usize)?;
            if !wire::is_head_of(head, part) {
                let text = format!(
                    "W0024: device {device} holds {} of `{}`, {}, and was sent the box of extents {:?} from {:?} on",
                    part.region, name.name, part.ty, head.shape, head.start
                );
                return Err(Status::invalid_argument(text));
            }
            places.push(at);
        }
        for at in places {
            let mut device = self.group.device(at);
            match place {
                Place::Variable(v) => device.set_variable(v, array),
                Place::Edge { function, index, .. } => device.feed(function, index, array),
            }
        }
        Ok(())
    }

    fn function(&self, name: &str) -> Result<usize, Status> {
        let found = self.plan.functions.keys().position(|n| **n == *name);
        found.ok_or_else(|| Status::not_found(format!("W0025: there is no function `{name}`")))
    }

    /// A device's place in the group, and the part that it holds.
    fn part(&self, place: Place, device: usize) -> Result<(usize, &Part), Status> {
        let at = self.own.iter().position(|d| *d == device);
        let at = at.ok_or_else(|| Status::invalid_argument(format!("W0022: device {device} is not this worker's")))?;
        Ok((at, self.part_of(place, device)))
    }

    fn part_of(&self, place: Place, device: usize) -> &Part {
        match place {
            Place::Variable(v) => &self.plan.variables[device][v].0,
            Place::Edge { function, index, input } => {
                // Functions are numbered in the order of the plan's map.
                let plan = self.plan.functions.values().nth(function).expect("found by `function`");
                let list = if input { &plan[device].inputs } else { &plan[device].outputs };
                &list[index].1
            }
        }
    }
}

#[tonic::async_trait]
impl worker_server::Worker for WorkerService {
    async fn load(&self, request: Request<Streaming<control::LoadPart>>) -> Result<Response<control::Loaded>, Status> {
        use control::load_part::Kind;
        let mut stream = request.into_inner();
        let (mut head, mut program) = (None, Vec::new());
        while let Some(part) = stream.next().await {
            match part?.kind {
                Some(Kind::Head(h)) => head = Some(h),
                Some(Kind::Program(bytes)) if program.len() + bytes.len() <= wire::PROGRAM_BYTES => {
                    program.extend_from_slice(&bytes);
                }
                _ => return Err(Status::invalid_argument("W0026: a program beyond all bounds")),
            }
        }
        let head = head.ok_or_else(|| Status::invalid_argument("W0026: a program without a head"))?;
        {
            let mut current = lock(&self.current);
            if head.epoch <= current.epoch {
                return Err(stale(head.epoch, current.epoch));
            }
            current.epoch = head.epoch;
        }
        let this = self.clone();
        let loaded = blocking(move || {
            let settings = head.settings.clone().unwrap_or_default();
            let before = settings.carry.then(|| this.take_over(settings.after)).transpose()?;
            this.unload(head.epoch, "another program is loaded");
            WorkerService::load(&this, head, &program, before)
        });
        Ok(Response::new(loaded.await?))
    }

    async fn feed(&self, request: Request<Streaming<control::ArrayPart>>) -> Result<Response<control::Done>, Status> {
        self.take(request.into_inner()).await
    }

    async fn set(&self, request: Request<Streaming<control::ArrayPart>>) -> Result<Response<control::Done>, Status> {
        self.take(request.into_inner()).await
    }

    async fn run(&self, request: Request<control::StepRequest>) -> Result<Response<control::Ran>, Status> {
        let r = request.into_inner();
        let run = self.with(r.epoch, move |l| {
            let function = l.function(&r.function)?;
            if r.watch {
                l.group.watch(Some(&l.program));
            }
            l.group.run(function, r.step).map_err(|e| Status::aborted(e.to_string()))?;
            let non_finite = l.group.non_finite().iter().map(wire::non_finite).collect();
            if r.watch {
                l.group.watch(None);
            }
            Ok(control::Ran { communicate_ns: l.group.communicated_ns(), non_finite })
        });
        Ok(Response::new(run.await?))
    }

    type FetchStream = ArrayStream;

    async fn fetch(&self, request: Request<control::ArrayName>) -> Result<Response<ArrayStream>, Status> {
        let name = request.into_inner();
        let parts = self
            .with(name.epoch, move |l| {
                let place = l.place(&name)?;
                let mut parts = Vec::new();
                for (at, device) in l.own.iter().enumerate() {
                    let part = l.part_of(place, *device);
                    if part.region.is_empty() {
                        continue;
                    }
                    let mut array = Array::zeros(part.ty.dtype, &part.region.shape());
                    let held = l.group.device(at);
                    match place {
                        Place::Variable(v) => held.variable(v, &mut array),
                        Place::Edge { function, index, .. } => held.fetch(function, index, &mut array),
                    }
                    let start: Vec<usize> = part.region.0.iter().map(|(_, r)| r.start).collect();
                    parts.extend(wire::parts(name.clone(), vec![*device as u32], &start, &array));
                }
                Ok(parts)
            })
            .await?;
        Ok(Response::new(Box::pin(iter(parts.into_iter().map(Ok)))))
    }

    async fn copy(&self, request: Request<control::CopyRequest>) -> Result<Response<control::Done>, Status> {
        let (epoch, copied) = (request.into_inner().epoch, self.copied.clone());
        self.with(epoch, move |l| {
            let snapshot = Snapshot::copy(&l.program, &l.plan, &l.own, &l.group);
            *lock(&copied) = Some((epoch, snapshot));
            Ok(())
        })
        .await?;
        Ok(Response::new(control::Done {}))
    }

    type WriteStream = PartStream;

    async fn write(&self, request: Request<control::WriteRequest>) -> Result<Response<PartStream>, Status> {
        let r = request.into_inner();
        let store = self.checkpoints(&r.checkpoints)?;
        let snapshot = match lock(&self.copied).take() {
            Some((epoch, snapshot)) if epoch == r.epoch => snapshot,
            _ => return Err(stale(r.epoch, self.epoch())),
        };
        // Training goes on meanwhile: the program is not held.
        let written =
            blocking(move || snapshot.write(&store, &r.folder).map_err(|e| Status::resource_exhausted(e.to_string())));
        let parts = written.await?.into_iter().map(|w| control::ShardPart {
            variable: w.variable,
            file: w.part.file,
            start: w.part.start.iter().map(|s| *s as u64).collect(),
            shape: w.part.shape.iter().map(|s| *s as u64).collect(),
            blake3: w.part.blake3,
            file_bytes: w.file_bytes,
        });
        Ok(Response::new(Box::pin(iter(parts.map(Ok).collect::<Vec<_>>()))))
    }

    async fn restore(&self, request: Request<control::RestoreRequest>) -> Result<Response<control::Done>, Status> {
        let r = request.into_inner();
        let store = self.checkpoints(&r.checkpoints)?;
        self.with(r.epoch, move |l| {
            let (manifest, hash) = Manifest::read(&store, &r.folder).map_err(refused)?;
            if hash != r.manifest {
                return Err(Status::data_loss(format!(
                    "W0028: the checkpoint {} is another one here than the coordinator sees; use a store that all share",
                    r.folder
                )));
            }
            checkpoint::restore(&store, &manifest, &l.program, &l.plan, &l.own, &l.group).map_err(refused)
        })
        .await?;
        Ok(Response::new(control::Done {}))
    }

    async fn memory(&self, request: Request<control::SessionName>) -> Result<Response<control::MemoryReply>, Status> {
        let devices = self.with(request.into_inner().epoch, |l| {
            let memory = |(at, d): (usize, &usize)| {
                let peak = l.group.device(at).peak();
                let (predicted, measured) = (peak.predicted as u64, peak.measured as u64);
                control::DeviceMemory { device: *d as u32, predicted, measured }
            };
            Ok(l.own.iter().enumerate().map(memory).collect())
        });
        Ok(Response::new(control::MemoryReply { devices: devices.await? }))
    }

    async fn foresee(
        &self,
        request: Request<Streaming<control::ForeseePart>>,
    ) -> Result<Response<control::Needs>, Status> {
        let (head, program) = foreseen(request.into_inner()).await?;
        let threads = self.offer.threads;
        let devices = self.with(head.epoch, move |l| {
            let bad = |e: Error| Status::invalid_argument(e.to_string());
            let program = wire::decode(&program).map_err(bad)?;
            let layout = head.layout.parse().map_err(bad)?;
            let options = PlanOptions { memory: l.budget, devices: None, apart: false, waiting: false };
            let plan = plan_program(&program, &l.plan.mesh, &layout, &options, &CpuBackend { threads }).map_err(bad)?;
            let need = |d: &usize| control::Need {
                device: *d as u32,
                now: l.plan.peak_bytes(*d) as u64,
                other: plan.peak_bytes(*d) as u64,
                budget: l.budget.unwrap_or(0) as u64,
            };
            Ok(l.own.iter().map(need).collect())
        });
        Ok(Response::new(control::Needs { devices: devices.await? }))
    }

    type EventsStream = EventStream;

    async fn events(&self, request: Request<control::EventsRequest>) -> Result<Response<EventStream>, Status> {
        let epoch = request.into_inner().epoch;
        let recorders = {
            let current = lock(&self.current);
            let (of, recorders) = &current.recorders;
            if *of != epoch || recorders.is_empty() {
                return Err(stale(epoch, current.epoch));
            }
            recorders.clone()
        };
        let parts = recorders.into_iter().flat_map(|(device, recorder)| recorder.events(device));
        Ok(Response::new(Box::pin(iter(parts.map(Ok)))))
    }

    type ProfileStream = ProfileStream;

    async fn profile(&self, request: Request<control::SessionName>) -> Result<Response<ProfileStream>, Status> {
        let devices = self.with(request.into_inner().epoch, |l| Ok(l.group.profile())).await?;
        Ok(Response::new(Box::pin(iter(devices.into_iter().map(Ok)))))
    }

    async fn abort(&self, request: Request<control::AbortRequest>) -> Result<Response<control::Done>, Status> {
        let r = request.into_inner();
        let current = lock(&self.current).epoch;
        if r.epoch < current {
            return Err(stale(r.epoch, current));
        }
        let this = self.clone();
        blocking(move || {
            this.unload(r.epoch, &r.reason);
            Ok(())
        })
        .await?;
        Ok(Response::new(control::Done {}))
    }
}
