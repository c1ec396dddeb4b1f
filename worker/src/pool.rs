//! The threads of a device: a caller and some helpers that take tasks from a shared counter.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The cores that the threads of a device are pinned to, one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cores {
    first: usize,
}

impl Cores {
    /// Cores for device `index` of `devices` with `threads` threads each, where they have the machine's cores to
    /// themselves, one a thread. Otherwise None: the system shares cores out better than a fixed place would.
    pub fn of(index: usize, devices: usize, threads: usize) -> Option<Cores> {
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        (devices * threads == available).then_some(Cores { first: index * threads })
    }

    /// Pins the calling thread, thread `i` of the device.
    pub fn pin(self, i: usize) {
        #[cfg(target_os = "linux")]
        {
            use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
            let Ok(allowed) = sched_getaffinity(None) else { return };
            let core = (0..CpuSet::MAX_CPU).filter(|c| allowed.is_set(*c)).nth(self.first + i);
            if let Some(core) = core {
                let mut one = CpuSet::new();
                one.set(core);
                // A thread that cannot be pinned runs wherever it is put.
                let _ = sched_setaffinity(None, &one);
            }
        }
    }
}

/// Bytes of a thread's workspace.
pub const WORKSPACE_BYTES: usize = 2 << 20;

/// Scratch memory of one thread, 64-byte aligned.
pub struct Workspace {
    lines: Vec<Line>,
    thread: usize,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; 16]);

impl Workspace {
    fn new(thread: usize) -> Workspace {
        Workspace { lines: vec![Line([0.0; 16]); WORKSPACE_BYTES / 64], thread }
    }
    /// Which of the pool's threads has it.
    pub fn thread(&self) -> usize {
        self.thread
    }
    /// The memory as floats.
    pub fn floats(&mut self) -> &mut [f32] {
        let n = self.lines.len() * 16;
        debug_assert_eq!(size_of_val(&self.lines[0].0) * self.lines.len(), n * 4);
        // SAFETY: `Line` is a transparent-in-size, aligned array of 16 floats, so n floats lie there back to back.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<f32>(), n) }
    }
}

type Job = *const (dyn Fn(usize, &mut Workspace) + Sync);

struct Shared {
    job: UnsafeCell<Option<Job>>,
    /// Raised by one for every job; [`STOP`] ends the helpers.
    epoch: AtomicUsize,
    tasks: AtomicUsize,
    next: AtomicUsize,
    busy: AtomicUsize,
    panicked: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    done: Condvar,
}

// SAFETY: `job` is written by the caller only while no helper is busy (before `epoch` is raised, after `busy` has
// fallen to 0), and read by helpers only after they saw the raised epoch.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer inside is only used while the closure it points to is borrowed by `run`.
unsafe impl Send for Shared {}

const STOP: usize = usize::MAX;
const SPINS: usize = 2000;

/// A fixed set of threads. The caller of [`Pool::run`] is the first of them.
pub struct Pool {
    /// None for the caller alone.
    crew: Option<Crew>,
    own: Mutex<Workspace>,
}

struct Crew {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads, at least the caller's; helpers are pinned to `cores` if given.
    pub fn new(threads: usize, cores: Option<Cores>) -> Pool {
        let crew = (threads > 1).then(|| Crew::new(threads, cores));
        Pool { crew, own: Mutex::new(Workspace::new(0)) }
    }

    /// Runs `f` with a pool of the calling thread alone, whose workspace is that one; allocates nothing.
    pub fn alone(workspace: &mut Workspace, f: impl FnOnce(&Pool)) {
        let lines = std::mem::take(&mut workspace.lines);
        let pool = Pool { crew: None, own: Mutex::new(Workspace { lines, thread: 0 }) };
        // The workspace goes back whatever happens.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(&pool)));
        workspace.lines = pool.own.into_inner().unwrap_or_else(PoisonError::into_inner).lines;
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.crew.as_ref().map_or(1, |c| c.helpers.len() + 1)
    }

    /// Runs tasks `0 .. tasks`, each once, on whichever thread is free, and returns when all are done.
    ///
    /// # Panics
    /// If a task panics, after the others have ended.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize, &mut Workspace) + Sync)) {
        let mut own = lock(&self.own);
        match &self.crew {
            Some(crew) if tasks > 1 => crew.run(tasks, f, &mut own),
            _ => (0..tasks).for_each(|t| f(t, &mut own)),
        }
    }
}

impl Crew {
    fn new(threads: usize, cores: Option<Cores>) -> Crew {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        // A pool that is there has its memory: helpers take theirs where they are pinned, and are waited for.
        let ready = Arc::new(Barrier::new(threads));
        let helpers = (1..threads)
            .map(|i| {
                let (shared, ready) = (shared.clone(), ready.clone());
                std::thread::spawn(move || {
                    cores.iter().for_each(|c| c.pin(i));
                    let workspace = Workspace::new(i);
                    ready.wait();
                    help(&shared, workspace)
                })
            })
            .collect();
        ready.wait();
        Crew { shared, helpers }
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize, &mut Workspace) + Sync), own: &mut Workspace) {
        let s = &*self.shared;
        // SAFETY: the lifetime is cut off only for the time of this call: it returns after every helper has finished
        // with the job. No helper is busy now, so nobody reads the cell.
        unsafe {
            *s.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize, &mut Workspace) + Sync), Job>(f));
        }
        s.tasks.store(tasks, Ordering::Relaxed);
        s.next.store(0, Ordering::Relaxed);
        s.busy.store(self.helpers.len(), Ordering::Relaxed);
        {
            let _guard = lock(&s.sleep);
            s.epoch.fetch_add(1, Ordering::Release);
        }
        s.wake.notify_all();
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(s, f, own)));
        let mut spins = 0;
        while s.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                let guard = lock(&s.sleep);
                if s.busy.load(Ordering::Acquire) > 0 {
                    drop(s.done.wait(guard).unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
        let helper_panicked = s.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!helper_panicked, "a task panicked on a helper thread");
    }
}

fn take_tasks(s: &Shared, f: &(dyn Fn(usize, &mut Workspace) + Sync), workspace: &mut Workspace) {
    let tasks = s.tasks.load(Ordering::Relaxed);
    loop {
        let t = s.next.fetch_add(1, Ordering::Relaxed);
        if t >= tasks {
            return;
        }
        f(t, workspace);
    }
}

fn help(s: &Shared, mut workspace: Workspace) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        let epoch = loop {
            let now = s.epoch.load(Ordering::Acquire);
            if now != seen {
                break now;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                let guard = lock(&s.sleep);
                if s.epoch.load(Ordering::Acquire) == seen {
                    drop(s.wake.wait(guard).unwrap_or_else(PoisonError::into_inner));
                }
            }
        };
        if epoch == STOP {
            return;
        }
        seen = epoch;
        // SAFETY: the epoch was raised after the job was written, and `run` does not return before `busy` is 0.
        let f = unsafe { (*s.job.get()).map(|job| &*job) };
        if let Some(f) = f {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(s, f, &mut workspace)));
            if done.is_err() {
                s.panicked.store(true, Ordering::Relaxed);
            }
        }
        if s.busy.fetch_sub(1, Ordering::AcqRel) == 1 {
            drop(lock(&s.sleep));
            s.done.notify_all();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        {
            let _guard = lock(&self.shared.sleep);
            self.shared.epoch.store(STOP, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for h in self.helpers.drain(..) {
            // A helper that panicked outside a task has nothing left to say.
            let _ = h.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in 1..4 {
            let pool = Pool::new(threads, None);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|t, w| {
                    w.floats()[0] = t as f32;
                    counts[t].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2, None);
        for _ in 0..20 {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(8, &|t, _| assert!(t != 3, "task three"));
            }));
            assert!(caught.is_err());
            pool.run(4, &|_, _| {});
        }
    }
}
