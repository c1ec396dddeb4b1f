//! The data plane between real processes: bandwidth of a pair by message size, time of a small round trip, and an
//! all-reduce over several devices. Prints a JSON line for each measurement.
//!
//! `cargo bench --bench transport -- --transport ring --case allreduce`

use clap::{Parser, ValueEnum};
use mesh::chunk::{Tree, TreeDim, shard_chunks};
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;
use mesh::plan::{AllReduce, Buffer, Segments};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use worker::arena::Arena;
use worker::collective::AllReducePlan;
use worker::pool::Pool;
use worker::transport::Transport;
use worker::transport::bell::Doom;
use worker::transport::connector::{self, Address, ConnectOptions, ListenOptions, Listener, Roster, TransportChoice};
use worker::transport::switchboard::Switchboard;

/// Tells a process that it is one of the devices, and which.
const DEVICE: &str = "MESH_BENCH_DEVICE";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    Bandwidth,
    Latency,
    Allreduce,
}

#[derive(Parser)]
struct Args {
    /// Link: ring or grpc. Both if left out.
    #[arg(long, overrides_with = "transport")]
    transport: Option<TransportChoice>,
    /// Measurement. All if left out.
    #[arg(long, value_enum, overrides_with = "case")]
    case: Option<Case>,
    /// Bytes of a message, for the bandwidth. Several sizes if left out.
    #[arg(long)]
    bytes: Option<usize>,
    /// MiB that are sent for a figure of bandwidth.
    #[arg(long, default_value_t = 1024)]
    mib: usize,
    /// MiB that are reduced, in floats.
    #[arg(long, default_value_t = 16)]
    reduce_mib: usize,
    /// Devices that reduce.
    #[arg(long, default_value_t = 4)]
    devices: usize,
    /// Repetitions; the median is printed.
    #[arg(long, default_value_t = 9)]
    repeat: usize,
    /// KiB of a ring.
    #[arg(long, default_value_t = worker::transport::ring::RING_BYTES >> 10)]
    ring_kib: usize,
    /// Microseconds that a device looks again before it sleeps. Chosen by cores and devices if left out.
    #[arg(long)]
    spin: Option<u64>,
    /// Keeps tensors in memory that peers do not map, so that rings carry every byte.
    #[arg(long)]
    private: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn transports(&self) -> Vec<TransportChoice> {
        self.transport.map_or(vec![TransportChoice::Ring, TransportChoice::Grpc], |t| vec![t])
    }
    fn cases(&self) -> Vec<Case> {
        self.case.map_or(vec![Case::Bandwidth, Case::Latency, Case::Allreduce], |c| vec![c])
    }
    fn sizes(&self) -> Vec<usize> {
        self.bytes.map_or(vec![64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20], |b| vec![b])
    }
    /// Bytes of a device's memory.
    fn arena_bytes(&self, case: Case) -> usize {
        match case {
            Case::Bandwidth => 64 << 20,
            Case::Latency => 0,
            // Input and output, and what others send.
            Case::Allreduce => 3 * (self.reduce_mib << 20),
        }
    }
    fn devices(&self, case: Case) -> usize {
        if case == Case::Allreduce { self.devices } else { 2 }
    }
}

fn main() {
    let args = Args::parse();
    if let Ok(device) = std::env::var(DEVICE) {
        // The launcher's arguments, narrowed to one measurement.
        return measure(&args, args.transports()[0], args.cases()[0], device.parse().expect("a device's index"));
    }
    for choice in args.transports() {
        for case in args.cases() {
            launch(choice, case, args.devices(case));
        }
    }
}

/// Runs the devices of a measurement, each a process, and passes their addresses round.
fn launch(choice: TransportChoice, case: Case, devices: usize) {
    let case = case.to_possible_value().expect("no case is skipped");
    let start = |device: usize| {
        Command::new(std::env::current_exe().expect("this program"))
            .args(std::env::args_os().skip(1))
            .args(["--transport", &choice.to_string(), "--case", case.get_name()])
            .env(DEVICE, device.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts again")
    };
    let mut all: Vec<Child> = (0..devices).map(start).collect();
    let mut says: Vec<_> =
        all.iter_mut().map(|c| BufReader::new(c.stdout.take().expect("it is piped")).lines()).collect();
    let mut next = |d: usize| says[d].next().and_then(Result::ok);
    let addresses: Vec<Address> = (0..devices)
        .map(|d| serde_json::from_str(&next(d).expect("a device says its address")).expect("an address"))
        .collect();
    let roster = serde_json::to_string(&addresses).expect("addresses are JSON");
    for c in &mut all {
        writeln!(c.stdin.as_mut().expect("it is piped"), "{roster}").expect("the device reads");
    }
    while let Some(line) = next(0) {
        println!("{line}");
    }
    for mut c in all {
        assert!(c.wait().expect("it was started").success(), "a device failed");
    }
}

/// What a device does.
fn measure(args: &Args, choice: TransportChoice, case: Case, me: usize) {
    let runtime = connector::runtime().expect("a runtime");
    let listener = Listener::bind(ListenOptions::default(), runtime.handle().clone()).unwrap_or_else(|e| panic!("{e}"));
    println!("{}", serde_json::to_string(listener.address()).expect("addresses are JSON"));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the roster comes");
    let devices = serde_json::from_str(&line).expect("a roster");
    let roster = Roster { job: "bench".into(), epoch: 1, devices, mine: vec![me] };
    let new = if args.private { Arena::private } else { Arena::shared };
    let arena = Arc::new(new(args.arena_bytes(case)).expect("the machine has that much memory"));
    let options = ConnectOptions {
        choice,
        timeout: Duration::from_secs(30),
        ring_bytes: args.ring_kib << 10,
        spin: args.spin.map(Duration::from_micros),
        arenas: vec![arena.clone()],
    };
    let mut ends = listener.connect(&roster, &options, &Doom::new()).unwrap_or_else(|e| panic!("{e}"));
    let mut end = ends.pop().expect("one device");
    // SAFETY: the arena has that many bytes, and nothing else touches them.
    let memory = unsafe { std::slice::from_raw_parts_mut(place(&arena, 0, arena.bytes()), arena.bytes()) };
    match case {
        Case::Bandwidth => args.sizes().into_iter().for_each(|bytes| bandwidth(args, choice, &mut end, memory, bytes)),
        Case::Latency => latency(args, choice, &mut end),
        Case::Allreduce => all_reduce(args, choice, &mut end, memory),
    }
}

fn place(arena: &Arena, offset: usize, bytes: usize) -> *mut u8 {
    arena.at(Buffer { offset, bytes })
}

/// Sends or receives one message and waits for it.
fn one(end: &mut Switchboard, send: bool, memory: &mut [u8]) {
    let peer = 1 - end.device();
    // SAFETY: the memory outlives `finish`.
    let posted = unsafe {
        if send {
            end.send(0, peer, memory.as_ptr(), memory.len())
        } else {
            end.recv(0, peer, memory.as_mut_ptr(), memory.len())
        }
    };
    posted.and_then(|()| end.finish(0)).unwrap_or_else(|e| panic!("{e}"));
}

/// Waits for the other of two devices.
fn meet(end: &mut Switchboard) {
    let first = end.device() == 0;
    one(end, first, &mut [0]);
    one(end, !first, &mut [0]);
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn bandwidth(args: &Args, choice: TransportChoice, end: &mut Switchboard, memory: &mut [u8], bytes: usize) {
    // Messages come from and go to different places, as tensors do.
    memory.fill(1);
    let places = (memory.len() / bytes).max(1);
    let messages = ((args.mib << 20) / bytes).max(4);
    let me = end.device();
    let mut run = |messages: usize| {
        meet(end);
        let begun = Instant::now();
        for i in 0..messages {
            let at = i % places * bytes;
            one(end, me == 0, &mut memory[at..at + bytes]);
        }
        // The last word is the receiver's.
        one(end, me == 1, &mut [0]);
        begun.elapsed().as_secs_f64()
    };
    run(messages / 4);
    let seconds = median((0..args.repeat).map(|_| run(messages)).collect());
    if me == 0 {
        let gb_s = (messages * bytes) as f64 / seconds / 1e9;
        println!(
            "{}",
            json!({"case": "bandwidth", "impl": "mesh", "transport": choice.to_string(), "bytes": bytes, "gb_s": gb_s})
        );
    }
}

fn latency(args: &Args, choice: TransportChoice, end: &mut Switchboard) {
    let mut message = [1u8; 1024];
    let first = end.device() == 0;
    let mut seconds = Vec::new();
    for i in 0..(args.repeat * 1000) {
        let begun = Instant::now();
        one(end, first, &mut message);
        one(end, !first, &mut message);
        if i >= 500 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    if first {
        seconds.sort_by(f64::total_cmp);
        let p = |share: f64| seconds[(seconds.len() as f64 * share) as usize] * 1e6;
        println!(
            "{}",
            json!({"case": "latency", "impl": "mesh", "transport": choice.to_string(), "bytes": message.len(),
                "round_trip_us": p(0.5), "p10_us": p(0.1), "p90_us": p(0.9)})
        );
    }
}

fn all_reduce(args: &Args, choice: TransportChoice, end: &mut Switchboard, memory: &mut [u8]) {
    let (n, me) = (args.devices, end.device());
    let elements = (args.reduce_mib << 20) / 4;
    let tree = Tree { dims: vec![TreeDim { size: n, chunks: n }], first: None };
    let owned: Vec<_> = (0..n).map(|d| vec![shard_chunks(n, n, d)]).collect();
    let work = AllReduce {
        f: ReduceFn::Sum,
        dtype: DType::F32,
        elements,
        devices: (0..n).collect(),
        nodes: owned.iter().map(|o| tree.nodes(o).len()).collect(),
        me,
        order: tree.finish(&owned).into(),
        segments: Segments::Shared,
        under_way: None,
    };
    let (input, rest) = memory.split_at_mut(elements * 4);
    let (output, scratch) = rest.split_at_mut(elements * 4);
    assert!(work.scratch_bytes() <= scratch.len(), "the memory is too small");
    for (i, value) in input.chunks_exact_mut(4).enumerate() {
        value.copy_from_slice(&((i % 1000 + me) as f32).to_ne_bytes());
    }
    let (plan, pool) = (AllReducePlan::new(&work), Pool::new(1, None));
    let mut seconds = Vec::new();
    for i in 0..args.repeat * 4 + 3 {
        let begun = Instant::now();
        // SAFETY: the buffers are as large as the work says.
        unsafe { plan.run(&pool, end, input.as_ptr(), output.as_mut_ptr(), scratch.as_mut_ptr()) }
            .unwrap_or_else(|e| panic!("{e}"));
        if i >= 3 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    let expected = |i: usize| (0..n).map(|d| (i % 1000 + d) as f32).sum::<f32>();
    let right = |(i, v): (usize, &[u8])| v == expected(i).to_ne_bytes();
    assert!(output.chunks_exact(4).enumerate().all(right), "a wrong sum");
    if me == 0 {
        let min = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let step = median(seconds);
        // What each device sends, as is usual for this measure.
        let sent = 2.0 * (n - 1) as f64 / n as f64 * (elements * 4) as f64;
        println!(
            "{}",
            json!({"case": "allreduce", "impl": "mesh", "transport": choice.to_string(), "devices": n,
                "bytes": elements * 4, "step_s": step, "min_s": min, "bus_gb_s": sent / step / 1e9})
        );
    }
}
