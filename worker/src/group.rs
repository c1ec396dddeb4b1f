//! The devices of one process, each with a thread that drives it.

use crate::arena::Arena;
use crate::collective::borrows;
use crate::device::{Device, DeviceError, Seat};
use crate::kernels::isa::Isa;
use crate::kernels::roofline::Roofline;
use crate::pool::Cores;
use crate::recorder::Recorder;
use crate::transport::InProcess;
use crate::transport::in_process::SMALL;
use crate::watch::NonFinite;
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use proto::control::{DeviceProfile, FunctionTimes};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What the devices' threads are to do next.
#[derive(Clone, Copy)]
enum Order {
    Run { function: usize, step: u32 },
    Stop,
}

struct Board {
    /// Raised by one for every order.
    round: u64,
    order: Order,
    /// Devices that are still at it.
    busy: usize,
    failure: Option<String>,
}

struct Shared {
    board: Mutex<Board>,
    posted: Condvar,
    done: Condvar,
    devices: Vec<Mutex<Device>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices of one process, each with a thread that drives it: all of a mesh's, or a worker's share.
pub struct DeviceGroup {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    recorders: Vec<(usize, Arc<Recorder>)>,
    /// Threads of each device.
    each: usize,
    /// Kept until every thread has stopped: a device may read a peer's memory while it receives.
    _arenas: Vec<Arc<Arena>>,
}

/// The variables that two plans have, as pairs of indices (`new`, `old`), for [`DeviceGroup::succeed`].
///
/// # Errors
/// The name of one whose type, or a device's part of it, differs: it cannot be carried over.
pub fn carried(new: (&Program, &ProgramPlan), old: (&Program, &ProgramPlan)) -> Result<Vec<(usize, usize)>, String> {
    let mut pairs = Vec::new();
    for (here, variable) in new.0.variables.iter().enumerate() {
        let Some(there) = old.0.variable(&variable.name) else { continue };
        let there = there.index();
        let part = |plan: &ProgramPlan, v: usize| -> Vec<_> {
            plan.variables.iter().map(|d| (d[v].0.ty.clone(), d[v].0.region.clone())).collect()
        };
        if part(new.1, here) != part(old.1, there) {
            return Err(variable.name.to_string());
        }
        pairs.push((here, there));
    }
    Ok(pairs)
}

/// A device failed; the mesh is of no use any more.
#[derive(Clone, Debug, thiserror::Error)]
#[error("W0004: {0}")]
pub struct MeshFailure(pub String);

impl DeviceGroup {
    /// All devices of a plan's mesh, with `threads` threads each.
    ///
    /// # Errors
    /// A device for which there is no memory, or a `MESH_ISA` that is no instruction set.
    pub fn embedded(plan: &ProgramPlan, threads: usize, seed: u64) -> Result<DeviceGroup, DeviceError> {
        Isa::asked()?;
        let most = |counts: fn(usize) -> usize| {
            plan.functions.values().flatten().map(|p| p.most_posted(counts)).max().unwrap_or(0)
        };
        // Who is ahead has begun as much again as others have not taken yet.
        let (messages, small) = (2 * most(|_| 1), 2 * most(|bytes| if bytes <= SMALL { bytes } else { 0 }));
        let size = plan.mesh.size();
        let seat = |(device, mut end): (usize, InProcess)| {
            let steps = plan.functions.values().flat_map(|f| &f[device].steps);
            steps.for_each(|s| borrows(&s.work).into_iter().for_each(|(batch, n)| end.reserve(batch, n)));
            let arena = Device::arena(plan, device, Arena::private)?;
            Ok(Seat { device, arena, end: Box::new(end), cores: Cores::of(device, size, threads), isa: Isa::detect() })
        };
        let seats = InProcess::mesh(size, messages, small).into_iter().enumerate().map(seat);
        Ok(DeviceGroup::new(plan, seats.collect::<Result<_, DeviceError>>()?, threads, seed))
    }

    /// Some devices of a plan, with `threads` threads each.
    pub fn new(plan: &ProgramPlan, seats: Vec<Seat>, threads: usize, seed: u64) -> DeviceGroup {
        let arenas = seats.iter().map(|s| s.arena.clone()).collect();
        let cores: Vec<_> = seats.iter().map(|s| s.cores).collect();
        let device = |s: Seat| (s.device, Device::new(plan, s, threads, seed));
        let devices: Vec<(usize, Device)> = seats.into_iter().map(device).collect();
        let recorders = devices.iter().map(|(number, d)| (*number, d.recorder())).collect();
        let shared = Arc::new(Shared {
            board: Mutex::new(Board { round: 0, order: Order::Stop, busy: 0, failure: None }),
            posted: Condvar::new(),
            done: Condvar::new(),
            devices: devices.into_iter().map(|(_, d)| Mutex::new(d)).collect(),
        });
        let drive = |(i, cores): (usize, Option<Cores>)| {
            let shared = shared.clone();
            std::thread::spawn(move || {
                cores.iter().for_each(|c| c.pin(0));
                drive(&shared, i)
            })
        };
        let (each, threads) = (threads, cores.into_iter().enumerate().map(drive).collect());
        DeviceGroup { shared, threads, recorders, each, _arenas: arenas }
    }

    /// Runs a function, by its index ([`Device::function`]), on every device, and waits for all of them.
    pub fn run(&mut self, function: usize, step: u32) -> Result<(), MeshFailure> {
        let mut board = lock(&self.shared.board);
        if let Some(failure) = &board.failure {
            return Err(MeshFailure(failure.clone()));
        }
        if self.threads.is_empty() {
            return Err(MeshFailure("there are no devices any more".into()));
        }
        board.round += 1;
        board.order = Order::Run { function, step };
        board.busy = self.threads.len();
        self.shared.posted.notify_all();
        while board.busy > 0 {
            board = self.shared.done.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        board.failure.clone().map_or(Ok(()), |f| Err(MeshFailure(f)))
    }

    /// Lets every device watch for values that are not finite from now on, in a plan of that program, or no more.
    pub fn watch(&self, program: Option<&Program>) {
        (0..self.size()).for_each(|at| self.device(at).watch(program));
    }

    /// The first values seen that are not finite: those infinite, and those that are no numbers.
    pub fn non_finite(&self) -> Vec<NonFinite> {
        let mut first = vec![];
        for at in 0..self.size() {
            self.device(at).non_finite().iter().cloned().for_each(|f| f.keep_first(&mut first));
        }
        first
    }

    /// A device by its place in the group, between runs.
    pub fn device(&self, index: usize) -> MutexGuard<'_, Device> {
        lock(&self.shared.devices[index])
    }

    /// Takes the place of another group of the same devices ([`Device::succeed`]): pairs of indices of variables, here and
    /// there, of equal parts.
    pub fn succeed(&self, before: &DeviceGroup, pairs: &[(usize, usize)]) {
        (0..self.size()).for_each(|at| self.device(at).succeed(&before.device(at), pairs));
    }

    /// What each device, by its number in the mesh, did last; to be read at any time.
    pub fn recorders(&self) -> &[(usize, Arc<Recorder>)] {
        &self.recorders
    }

    /// Nanoseconds of the last run in which the device that communicated longest did so.
    pub fn communicated_ns(&self) -> u64 {
        self.recorders.iter().map(|(_, r)| r.communicated_ns()).max().unwrap_or(0)
    }

    /// How long each device's steps took so far.
    pub fn times(&self) -> Vec<Vec<FunctionTimes>> {
        self.recorders.iter().map(|(_, recorder)| recorder.times()).collect()
    }

    /// How long each device's steps took, and what the device can do at the most, which is measured now.
    pub fn profile(&mut self) -> Vec<DeviceProfile> {
        let Roofline { product_flops: [f32_flops, bf16_flops], memory_bytes } =
            Roofline::measure(self.size(), self.each);
        let of = |((device, _), functions): (&(usize, Arc<Recorder>), Vec<FunctionTimes>)| {
            let device = *device as u32;
            DeviceProfile { device, f32_flops, bf16_flops, memory_bytes, functions }
        };
        self.recorders.iter().zip(self.times()).map(of).collect()
    }

    /// Number of devices.
    pub fn size(&self) -> usize {
        self.shared.devices.len()
    }
}

fn drive(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let order = {
            let mut board = lock(&shared.board);
            while board.round == seen {
                board = shared.posted.wait(board).unwrap_or_else(PoisonError::into_inner);
            }
            seen = board.round;
            board.order
        };
        let Order::Run { function, step } = order else { return };
        let mut device = lock(&shared.devices[index]);
        let failure = match catch_unwind(AssertUnwindSafe(|| device.run(function, step))) {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(e.to_string()),
            Err(_) => {
                device.abort("a kernel panicked");
                Some(format!("a kernel of device {index} panicked"))
            }
        };
        drop(device);
        let mut board = lock(&shared.board);
        if let Some(f) = failure {
            board.failure.get_or_insert(f);
        }
        board.busy -= 1;
        if board.busy == 0 {
            shared.done.notify_all();
        }
    }
}

impl Drop for DeviceGroup {
    fn drop(&mut self) {
        {
            let mut board = lock(&self.shared.board);
            board.round += 1;
            board.order = Order::Stop;
        }
        self.shared.posted.notify_all();
        for t in self.threads.drain(..) {
            // Failures were reported by `run`.
            let _ = t.join();
        }
    }
}
