//! Memory: nothing is allocated in the step loop, and what a plan predicts is what its execution takes.
//!
//! This binary's allocator counts. Device memory (arenas and the threads' workspaces) is what is allocated with the
//! alignment of a cache line or of a large page; arenas are handed out filled with a pattern, which shows what of them is written and
//! that nothing is read before.

mod common;

use common::workers::Workers;
use common::{f32s, i32s, staged};
use coordinator::{Failure, Options, Session, Source};
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::error::Cause;
use mesh::graph::Graph;
use mesh::nn::{self, BatchNorm, Dense, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use mesh::region::Region;
use ndarray::Array3;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use worker::pool::WORKSPACE_BYTES;

/// Bytes behind an arena that a device watches.
const GUARD: usize = 4096;
const LINE: usize = 64;

fn of_device(layout: Layout) -> bool {
    matches!(layout.align(), LINE | 0x20_0000)
}

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
/// Bytes of device memory now, and at the most.
static DEVICE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// Bytes of all other memory now, and at the most.
static HOST: AtomicUsize = AtomicUsize::new(0);
static HOST_MOST: AtomicUsize = AtomicUsize::new(0);
static PATTERN: AtomicU8 = AtomicU8::new(0);
/// The arenas handed out: address and size, in order.
static ARENAS: [(AtomicPtr<u8>, AtomicUsize); 8] =
    [const { (AtomicPtr::new(std::ptr::null_mut()), AtomicUsize::new(0)) }; 8];
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn taken(layout: Layout) {
    CALLS.fetch_add(1, SeqCst);
    let (now, most) = if of_device(layout) { (&DEVICE, &MOST) } else { (&HOST, &HOST_MOST) };
    most.fetch_max(now.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
}

fn given_back(layout: Layout) {
    let now = if of_device(layout) { &DEVICE } else { &HOST };
    now.fetch_sub(layout.size(), SeqCst);
}

// SAFETY: all memory is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout);
        // SAFETY: by this function's contract.
        let memory = unsafe { System.alloc(layout) };
        if of_device(layout) && layout.size() != WORKSPACE_BYTES && !memory.is_null() {
            // SAFETY: the block was just allocated.
            unsafe { std::ptr::write_bytes(memory, PATTERN.load(SeqCst), layout.size()) };
            if let Some((address, size)) = ARENAS.get(COUNT.fetch_add(1, SeqCst)) {
                address.store(memory, SeqCst);
                size.store(layout.size() - GUARD, SeqCst);
            }
        }
        memory
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout);
        // SAFETY: by this function's contract.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        given_back(layout);
        // SAFETY: by this function's contract.
        unsafe { System.dealloc(memory, layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by this function's contract, the size is one that a layout can have.
        taken(unsafe { Layout::from_size_align_unchecked(size, layout.align()) });
        given_back(layout);
        // SAFETY: by this function's contract.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static ALONE: Mutex<()> = Mutex::new(());

/// Waits until no other test runs and the harness has nothing left to say.
fn alone() -> MutexGuard<'static, ()> {
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let before = CALLS.load(SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        if CALLS.load(SeqCst) == before {
            return guard;
        }
    }
}

fn image() -> Vec<Dim> {
    vec![dim("batch", 2), dim("x", 11), dim("y", 14), dim("channel", 3)]
}

/// A small UNet with everything in it, and an evaluation that needs less memory.
fn network() -> Program {
    let mut p = ProgramBuilder::new();
    let forward = |g: &Graph, mode: Mode| {
        let x = g.input("image", DType::F32, &image());
        let block = |x: &mesh::graph::Tensor, name: &str, channels: usize| {
            let y = nn::conv(x, &format!("{name}.c"), &Kernel::new(&["x", "y"], 3), &dim("channel", channels));
            let y = nn::batch_norm(&y, &format!("{name}.n"), "channel", &BatchNorm::default(), mode);
            nn::dropout(&nn::leaky_relu(&y, 0.1), 0.9, mode)
        };
        let fine = block(&x, "a", 6);
        let coarse = block(&fine.max_pool(&[Window::same("x", 11, 2, 2, 1), Window::same("y", 14, 2, 2, 1)]), "b", 9);
        let up = Kernel::new(&["x", "y"], 2).stride(2).to(&[11, 14]);
        let up = nn::conv_transpose(&coarse, "up", &up, &dim("channel", 6));
        let joined = mesh::graph::Tensor::concat(&[&fine, &up], "channel");
        nn::dense(&joined, "head", &["channel"], &[dim("class", 4)], &Dense::default())
    };
    p.function("train", |g| {
        let labels = g.input("labels", DType::I32, &image()[..3]);
        let loss = nn::cross_entropy(&forward(g, Mode::Train), &labels, "class").mean_all();
        let update = Optimizer::adamw(0.01, 0.1).clipped(1.0).apply(g, &loss);
        g.output("loss", &loss);
        g.output("norm", &update.grad_norm);
    })
    .unwrap();
    p.function("eval", |g| g.output("class", &nn::arg_max(&forward(g, Mode::Eval), "class"))).unwrap();
    p.finish().unwrap()
}

fn options(mesh: &str, layout: &str, threads: usize) -> Options {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    Options { mesh, layout, threads: Some(threads), seed: 5, ..Options::default() }
}

const MESHES: [(&str, &str); 8] = [
    ("1", ""),
    ("x=2", "x:x"),
    ("x=3", "y:x"),
    ("x=2,y=2", "x:x,y:y"),
    ("data=2,x=3", "batch:data,x:x"),
    ("x=2,y=2,z=2", "x:x,y:y,batch:z"),
    ("x=2,y=3", "x:x+y"),
    ("data=2,x=2", "batch:data,x:x,variables{*:data},gradients{*:data},slots{*:data+x}"),
];

fn feeds() -> (Array, Array) {
    (f32s(&image(), 1).1, i32s(&image()[..3], 2, 4).1)
}

#[test]
fn the_step_loop_allocates_nothing() {
    let _alone = alone();
    let (image, labels) = feeds();
    for (mesh, layout) in MESHES {
        for threads in [1, 2] {
            let mut session = Session::embedded(network(), &options(mesh, layout, threads)).unwrap();
            let train = session.function("train").unwrap();
            session.feed(train, "image", &image).unwrap();
            session.feed(train, "labels", &labels).unwrap();
            let before = CALLS.load(SeqCst);
            for step in 0..5 {
                session.step(train, step).unwrap();
            }
            assert_eq!(CALLS.load(SeqCst) - before, 0, "allocations in five steps on {mesh}, {threads} threads");
        }
    }
}

/// A layout that cuts an inner reduced dimension sends a part for each chunk of the outer ones.
#[test]
fn a_step_of_many_messages_allocates_nothing() {
    let _alone = alone();
    let d = [dim("a", 16), dim("b", 16), dim("c", 16), dim("d", 2)];
    let p = common::stepping(|g| g.output("y", &g.input("x", DType::F32, &d).sum(&["a", "b", "c"])));
    for (mesh, layout) in [("m=3", "c:m"), ("m=5", "b:m")] {
        let mut session = Session::embedded(p.clone(), &options(mesh, layout, 1)).unwrap();
        let f = session.function("step").unwrap();
        session.feed(f, "x", &f32s(&d, 1).1).unwrap();
        let before = CALLS.load(SeqCst);
        (0..3).for_each(|step| session.step(f, step).unwrap());
        assert_eq!(CALLS.load(SeqCst) - before, 0, "{mesh} with {layout}");
    }
}

/// Bytes of an arena up to the last one that was written, in whole lines.
fn written(index: usize, pattern: u8) -> usize {
    let (address, size) = (&ARENAS[index].0, ARENAS[index].1.load(SeqCst));
    // SAFETY: the session that owns the arena lives, and no step runs.
    let memory = unsafe { std::slice::from_raw_parts(address.load(SeqCst), size) };
    memory.iter().rposition(|b| *b != pattern).map_or(0, |i| (i + 1).next_multiple_of(LINE))
}

#[test]
fn the_memory_that_was_predicted_is_the_memory_that_is_used() {
    let _alone = alone();
    let (image, labels) = feeds();
    let mut results: Vec<Vec<u8>> = vec![];
    for (mesh, layout) in MESHES {
        for threads in [1, 2] {
            // What is written may look like the pattern by chance, so there are two.
            let mut used = [0; 8];
            for pattern in [0xff, 0x5b] {
                PATTERN.store(pattern, SeqCst);
                COUNT.store(0, SeqCst);
                assert_eq!(DEVICE.load(SeqCst), 0);
                let mut session = Session::embedded(network(), &options(mesh, layout, threads)).unwrap();
                let taken = DEVICE.load(SeqCst);
                let feeds = [("image", &image), ("labels", &labels)];
                let out = session.run("train", 0, &feeds).unwrap();
                results.push(out.iter().flat_map(|(_, a)| a.to_bytes()).collect());
                let peaks = session.peaks().unwrap();
                assert_eq!(COUNT.load(SeqCst), peaks.len());
                let predicted: usize = peaks.iter().map(|p| p.peak_bytes_predicted).sum();
                assert_eq!(taken, predicted + peaks.len() * GUARD, "{mesh}: what the devices took");
                for (d, peak) in peaks.iter().enumerate() {
                    assert_eq!(
                        peak.peak_bytes_measured, peak.peak_bytes_predicted,
                        "device {d} of {mesh} with {layout}"
                    );
                    used[d] = written(d, pattern).max(used[d]);
                }
                // An evaluation needs no more.
                session.run("eval", 1, &[("image", &image)]).unwrap();
                assert_eq!(session.peaks().unwrap(), peaks);
                if pattern != 0xff {
                    for (d, peak) in peaks.iter().enumerate() {
                        let arena = peak.peak_bytes_predicted - threads * WORKSPACE_BYTES;
                        assert_eq!(used[d], arena, "written of the arena of device {d} of {mesh} with {layout}");
                    }
                }
            }
        }
    }
    // What memory held before changes nothing, nor does the mesh.
    assert!(results.iter().all(|r| *r == results[0]));
}

#[test]
fn a_change_of_stage_takes_the_memory_that_was_predicted() {
    let _alone = alone();
    for (mesh, layout) in [("1", ""), ("a=2", "batch:a"), ("a=2,b=2", "hidden:a,batch:b")] {
        let mut session = Session::embedded(staged::program(), &options(mesh, layout, 1)).unwrap();
        let devices = session.plan().mesh.size();
        MOST.store(DEVICE.load(SeqCst), SeqCst);
        session.enter("own", Some("unshare")).unwrap();
        let peaks = session.peaks().unwrap();
        let predicted: usize = peaks.iter().map(|p| p.peak_bytes_predicted).sum();
        assert_eq!(MOST.load(SeqCst), predicted + 2 * devices * GUARD, "{mesh} {layout}");
        assert!(peaks.iter().all(|p| p.peak_bytes_measured == p.peak_bytes_predicted), "{mesh} {layout}: {peaks:?}");
        // What was there before is gone.
        let now: usize = (0..devices).map(|d| session.plan().peak_bytes(d) + GUARD).sum();
        assert_eq!(DEVICE.load(SeqCst), now, "{mesh} {layout}");
        session.run("train", 0, &[("x", &f32s(&staged::batch(), 1).1)]).unwrap();
        assert_eq!((session.peaks().unwrap(), DEVICE.load(SeqCst)), (peaks, now), "{mesh} {layout}");
    }
}

#[test]
fn a_step_over_the_budget_is_refused_before_anything_is_allocated() {
    let _alone = alone();
    for (mesh, layout) in [("1", ""), ("x=2,y=2", "x:x,y:y")] {
        let fits = options(mesh, layout, 1);
        let plan = fits.plan(&network()).unwrap();
        let needed = (0..plan.mesh.size()).map(|d| plan.peak_bytes(d)).max().unwrap();
        COUNT.store(0, SeqCst);
        let refused = match Session::embedded(network(), &Options { memory: Some(needed - 1), ..fits.clone() }) {
            Err(Failure::Program(e)) => e,
            _ => panic!("a plan over the budget is accepted"),
        };
        assert!(
            matches!(refused.cause, Cause::OverMemory { needed: n, budget, .. } if n == needed && budget == needed - 1)
        );
        assert!(refused.to_string().contains("in function `train`"), "{refused}");
        assert_eq!((COUNT.load(SeqCst), DEVICE.load(SeqCst)), (0, 0));
        assert!(Session::embedded(network(), &Options { memory: Some(needed), ..fits }).is_ok());
    }
}

/// No test, but what this binary does where it was started as a worker.
#[test]
fn worker_process() {
    common::workers::serve();
}

/// Numbers by their place, which are nowhere before they are asked for.
struct Places([usize; 3]);

impl Source for Places {
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn shape(&self) -> Vec<usize> {
        self.0.to_vec()
    }
    fn part(&self, at: &Region) -> Result<Array, Box<dyn std::error::Error + Send + Sync>> {
        let start: Vec<usize> = at.0.iter().map(|(_, r)| r.start).collect();
        let place = |i: usize, j: usize, k: usize| {
            (start[0] + i) * self.0[1] * self.0[2] + (start[1] + j) * self.0[2] + start[2] + k
        };
        let shape = at.shape();
        Ok(Array3::from_shape_fn((shape[0], shape[1], shape[2]), |(i, j, k)| (place(i, j, k) % 8191) as f32).into())
    }
}

/// Of 128 MiB in sixteen boxes: one beside the devices that it goes to, or, with a coordinator in this process too and
/// workers in theirs, the two or three on the way.
#[test]
fn neither_a_program_nor_its_coordinator_holds_what_is_fed_by_region() {
    const SHAPE: [usize; 3] = [128, 512, 512];
    const BOX: usize = 8 << 20;
    let d = [dim("a", SHAPE[0]), dim("b", SHAPE[1]), dim("c", SHAPE[2])];
    let p = common::stepping(|g| g.output("y", &g.input("x", DType::F32, &d).sum(&["b", "c"])));
    let options = options("m=8,n=2", "a:m,b:n", 1);
    let fed = |session: &mut Session| {
        let f = session.function("step").unwrap();
        let before = HOST.load(SeqCst);
        HOST_MOST.store(before, SeqCst);
        session.feed(f, "x", &Places(SHAPE)).unwrap();
        let most = HOST_MOST.load(SeqCst) - before;
        session.step(f, 0).unwrap();
        (most, session.fetch(f, "y").unwrap().to_bytes())
    };
    let _alone = alone();
    let (here, sums) = fed(&mut Session::embedded(p.clone(), &options).unwrap());
    assert!((BOX..BOX + BOX / 8).contains(&here), "{here} bytes for a box of {BOX}");
    let workers = Workers::start(&["--devices cpu:8".into(), "--devices cpu:8".into()], Duration::from_secs(30));
    let (there, same) = fed(&mut workers.session(p, &options));
    assert!(there < 5 * BOX, "{there} bytes for boxes of {BOX}");
    assert_eq!(same, sums);
}
