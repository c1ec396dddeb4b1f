//! Runs in which processes die: the loss curve, the variables and the samples are those of the run in which none did.
//!
//! `MESH_KILLS=50 cargo test -p examples --release --test faults a_worker_killed` kills so many workers, in as many runs.

mod common;

use common::{Place, bits};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUN: &str = "train --data phantom --crop 20x18x16 --base 4 --dropout 0.2 --augment --mesh x=2,y=2 --steps 24 \
                   --set checkpoint_every=4";

/// A process of a test: killed when the test ends before it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts the program with what it says in a file.
    fn start(place: &Place, log: &str, args: &str) -> Process {
        let file = File::create(place.path(log)).unwrap();
        let mut command = place.command(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).env("MESH_LOG", "info");
        Process(command.spawn().unwrap())
    }

    fn signal(&self, signal: &str) {
        signal_to(self.0.id(), signal);
    }

    /// Its exit code, once it has ended by itself.
    fn end(&mut self, within: Duration) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < within {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it has not ended within {within:?}");
    }
}

fn signal_to(process: u32, signal: &str) {
    // One that has just ended needs no signal.
    let _ = Command::new("kill").args([&format!("-{signal}"), &process.to_string()]).stderr(Stdio::null()).status();
}

/// The worker processes that a process has started.
fn workers_of(process: &Process) -> Vec<u32> {
    let parent = process.0.id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let mut fields = rest.split_whitespace();
        let (state, of) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        if state != "Z" && of == parent.to_string() {
            found.push(id);
        }
    }
    found.sort();
    found
}

/// Waits until a run has done so many steps.
fn wait_for_steps(place: &Place, run: &str, steps: usize) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        if let Ok(file) = File::open(place.path(run).join("metrics.jsonl"))
            && BufReader::new(file).lines().count() >= steps
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{steps} steps are not done:\n{}", log(place, run));
}

fn log(place: &Place, name: &str) -> String {
    fs::read_to_string(place.path(&format!("{name}.log"))).unwrap_or_default()
}

/// The rows of the run in which nobody dies.
fn undisturbed(place: &Place) -> Vec<Value> {
    place.ok(&format!("{RUN} --out whole"));
    place.rows("whole")
}

/// Random numbers that differ from run to run; the seed is printed where a test fails.
struct Draw(u64);

impl Draw {
    fn new() -> Draw {
        let seed = std::env::var("MESH_SEED").ok().and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
        eprintln!("MESH_SEED={seed}");
        Draw(seed)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

#[test]
fn a_worker_killed_at_any_moment_changes_no_bit() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut draw = Draw::new();
    let kills: usize = std::env::var("MESH_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let name = format!("run{kill}");
        let mut run = Process::start(&place, &format!("{name}.log"), &format!("{RUN} --workers 4 --out {name}"));
        wait_for_steps(&place, &name, draw.below(22));
        std::thread::sleep(Duration::from_micros(draw.below(50_000) as u64));
        let workers = workers_of(&run);
        // Every other run loses two at once.
        for at in 0..1 + kill % 2 {
            signal_to(workers[(draw.below(workers.len()) + at) % workers.len()], "KILL");
        }
        let killed = Instant::now();
        if kill % 5 == 4 {
            // And one more while the run recovers.
            std::thread::sleep(Duration::from_millis(draw.below(400) as u64));
            workers_of(&run).first().into_iter().for_each(|w| signal_to(*w, "KILL"));
        }
        let said = |what: &str| {
            while !log(&place, &name).contains(what) && killed.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(5));
            }
            killed.elapsed()
        };
        let (noticed, resumed) = (said("is lost"), said("goes on from step"));
        let code = run.end(Duration::from_secs(120));
        assert_eq!(code, Some(0), "{name}:\n{}", log(&place, &name));
        assert!(noticed < Duration::from_secs(2), "{name}: noticed after {noticed:?}\n{}", log(&place, &name));
        assert!(resumed < Duration::from_secs(12), "{name}: resumed after {resumed:?}\n{}", log(&place, &name));
        slowest = slowest.max(resumed);
        assert_eq!(bits(&place.rows(&name)), bits(&whole), "{name}:\n{}", log(&place, &name));
    }
    eprintln!("{kills} runs; the slowest went on {slowest:?} after the kill");
}

/// A coordinator with an address, its state and two workers with two devices each.
struct Mesh<'a> {
    place: &'a Place,
    address: String,
    coordinator: Option<Process>,
    workers: Vec<Process>,
}

impl<'a> Mesh<'a> {
    fn start(place: &'a Place) -> Mesh<'a> {
        // A port that is free now: nobody else takes it before the coordinator does, most likely.
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap().to_string();
        drop(socket);
        let mut mesh = Mesh { place, address, coordinator: None, workers: vec![] };
        mesh.coordinate("coordinator.log", 10);
        for n in 0..2 {
            mesh.work(&format!("worker{n}.log"));
        }
        mesh
    }

    fn coordinate(&mut self, log: &str, lease: u32) {
        let args = format!(
            "coordinator --listen {} --state state --lease {lease} --replace-timeout 3 --grace 20",
            self.address
        );
        self.coordinator = Some(Process::start(self.place, log, &args));
    }

    fn work(&mut self, log: &str) {
        let args = format!("worker --join {} --devices cpu:2 --threads 1 --grace 20", self.address);
        self.workers.push(Process::start(self.place, log, &args));
    }

    fn train(&self, name: &str, more: &str) -> Process {
        let args = format!("{RUN} --coordinator http://{} --out {name} {more}", self.address);
        // The coordinator may not listen yet.
        let begun = Instant::now();
        while std::net::TcpStream::connect(&self.address).is_err() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Process::start(self.place, &format!("{name}.log"), &args)
    }
}

#[test]
fn a_coordinator_that_is_killed_and_started_again_goes_on_where_it_was() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut mesh = Mesh::start(&place);
    let mut run = mesh.train("run", "");
    wait_for_steps(&place, "run", 7);
    mesh.coordinator.take().unwrap().signal("KILL");
    std::thread::sleep(Duration::from_millis(300));
    mesh.coordinate("again.log", 10);
    let code = run.end(Duration::from_secs(60));
    assert_eq!(code, Some(0), "{}\n{}", log(&place, "run"), log(&place, "again"));
    assert_eq!(bits(&place.rows("run")), bits(&whole));
    assert!(log(&place, "run").contains("goes on from step 4"), "{}", log(&place, "run"));
    // The journal of the first life was replayed, and the epoch has risen above it.
    assert!(log(&place, "again").contains("went on from epoch"), "{}", log(&place, "again"));
    let journal = fs::read_to_string(place.path("state/journal.jsonl")).unwrap();
    let epochs: Vec<u64> = journal
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .filter(|v| v["event"] == "epoch")
        .map(|v| v["epoch"].as_u64().unwrap())
        .collect();
    assert!(epochs.len() >= 2 && epochs.windows(2).all(|w| w[0] < w[1]), "{epochs:?}");
    assert!(mesh.workers.iter_mut().all(|w| w.0.try_wait().unwrap().is_none()), "the workers are those of before");
}

#[test]
fn a_coordinator_that_is_asked_to_end_costs_no_step() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut mesh = Mesh::start(&place);
    let mut run = mesh.train("run", "--set checkpoint_every=100");
    wait_for_steps(&place, "run", 5);
    let mut coordinator = mesh.coordinator.take().unwrap();
    coordinator.signal("TERM");
    assert_eq!(coordinator.end(Duration::from_secs(20)), Some(0), "{}", log(&place, "coordinator"));
    mesh.coordinate("again.log", 10);
    assert_eq!(run.end(Duration::from_secs(60)), Some(0), "{}\n{}", log(&place, "run"), log(&place, "again"));
    assert_eq!(bits(&place.rows("run")), bits(&whole));
    let said = log(&place, "run");
    let step: usize = said.split("goes on from step ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(step >= 5, "it went back to step {step}:\n{said}");
}

#[test]
fn without_a_coordinator_workers_end_within_their_lease() {
    let place = Place::new();
    let mut mesh = Mesh::start(&place);
    mesh.coordinator = None;
    mesh.coordinate("short.log", 2);
    let run = mesh.train("run", "");
    wait_for_steps(&place, "run", 3);
    mesh.coordinator.take().unwrap().signal("KILL");
    for worker in &mut mesh.workers {
        assert_eq!(worker.end(Duration::from_secs(7)), Some(75));
    }
    drop(run);
}

#[test]
fn a_worker_that_is_asked_to_end_leaves_with_a_checkpoint_and_no_step_is_lost() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut mesh = Mesh::start(&place);
    let mut run = mesh.train("run", "--set checkpoint_every=100");
    wait_for_steps(&place, "run", 5);
    mesh.work("worker2.log");
    mesh.workers[0].signal("TERM");
    assert_eq!(mesh.workers[0].end(Duration::from_secs(20)), Some(0), "{}", log(&place, "worker0"));
    assert_eq!(run.end(Duration::from_secs(60)), Some(0), "{}", log(&place, "run"));
    assert_eq!(bits(&place.rows("run")), bits(&whole));
    let said = log(&place, "run");
    let step: usize = said.split("goes on from step ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(step > 5, "it went back to step {step}:\n{said}");
    assert!(!said.contains("is lost"), "{said}");
}

#[test]
fn where_none_takes_a_workers_place_the_mesh_shrinks_and_grows_again() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut mesh = Mesh::start(&place);
    let mut run = mesh.train("run", "--shrink --set steps=60");
    wait_for_steps(&place, "run", 6);
    mesh.workers[1].signal("KILL");
    let begun = Instant::now();
    while !log(&place, "run").contains("on mesh x=2,y=1") && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(20));
    }
    wait_for_steps(&place, "run", 12);
    mesh.work("worker2.log");
    assert_eq!(run.end(Duration::from_secs(60)), Some(0), "{}", log(&place, "run"));
    let said = log(&place, "run");
    assert!(said.contains("on mesh x=2,y=1") && said.contains("on mesh x=2,y=2"), "{said}");
    let rows = place.rows("run");
    // The last row of the shorter run has a hash, which those of others lack.
    assert_eq!(bits(&rows)[..23], bits(&whole)[..23]);
}

#[test]
fn a_model_program_that_is_asked_to_stop_writes_a_checkpoint_and_goes_on_later() {
    let place = Place::new();
    let whole = undisturbed(&place);
    for (name, devices) in [("here", ""), ("workers", "--workers 2")] {
        let args = format!("{RUN} --set checkpoint_every=100 {devices} --out {name}");
        let mut run = Process::start(&place, &format!("{name}.log"), &args);
        wait_for_steps(&place, name, 5);
        run.signal("TERM");
        assert_eq!(run.end(Duration::from_secs(25)), Some(75), "{}", log(&place, name));
        assert!(log(&place, name).contains("error[U0010]: stopped as asked after step"), "{}", log(&place, name));
        let done = place.rows(name).len();
        assert!((5..24).contains(&done), "{done}");
        let r = place.ok(&format!("train --resume --mesh x=2 --out {name}"));
        assert!(r.err.contains(&format!("with {done} steps done")), "no step is lost:\n{}", r.err);
        assert_eq!(bits(&place.rows(name)), bits(&whole), "{name}");
    }
}

#[test]
fn a_worker_that_hangs_is_given_up_within_two_seconds() {
    let place = Place::new();
    let whole = undisturbed(&place);
    let mut run = Process::start(&place, "run.log", &format!("{RUN} --workers 4 --out run"));
    wait_for_steps(&place, "run", 6);
    let stopped = workers_of(&run)[2];
    signal_to(stopped, "STOP");
    let begun = Instant::now();
    while !log(&place, "run").contains("it was silent for 2s") && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(begun.elapsed() < Duration::from_millis(2600), "noticed after {:?}", begun.elapsed());
    // It wakes up in an epoch that has passed, joins again, and serves as its own replacement.
    signal_to(stopped, "CONT");
    assert_eq!(run.end(Duration::from_secs(60)), Some(0), "{}", log(&place, "run"));
    assert_eq!(bits(&place.rows("run")), bits(&whole));
}
