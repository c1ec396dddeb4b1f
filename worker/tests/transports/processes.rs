//! Transports between real processes.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

const CHILD: &str = "MESH_TEST_CHILD";

/// A process of the tests below: this binary again.
struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Process {
    fn start(role: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::child", "--nocapture", "--test-threads=1"])
            .env(CHILD, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The harness may have written on the same line before.
                if let Some((_, said)) = line.split_once('@') {
                    let _ = send.send(said.to_string());
                }
            }
        });
        Process { child, stdin, lines }
    }

    /// What the process says next.
    fn hear(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(20)).expect("the process says something")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts processes with a device each and tells them of one another, as a coordinator does.
fn start(devices: usize, choice: TransportChoice, scenario: &str) -> Vec<Process> {
    let mut all: Vec<Process> = (0..devices).map(|d| Process::start(&format!("{d} {choice} {scenario}"))).collect();
    let addresses: Vec<Address> = all.iter().map(|p| serde_json::from_str(&p.hear()).unwrap()).collect();
    for p in &mut all {
        writeln!(p.stdin, "{}", serde_json::to_string(&addresses).unwrap()).unwrap();
    }
    all
}

/// Not a test: what the processes of the tests below do.
#[test]
fn child() {
    let Ok(role) = std::env::var(CHILD) else { return };
    let mut words = role.split(' ');
    let me: usize = words.next().unwrap().parse().unwrap();
    let choice: TransportChoice = words.next().unwrap().parse().unwrap();
    let scenario = words.next().unwrap();
    let l = listener();
    println!("@{}", serde_json::to_string(l.address()).unwrap());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let devices: Vec<Address> = serde_json::from_str(&line).unwrap();
    let n = devices.len();
    let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![me] };
    // Where the transport is left to choose, messages lie where a device's tensors lie.
    let arenas = if choice == TransportChoice::Auto { vec![arena()] } else { vec![] };
    let options = ConnectOptions { arenas: arenas.clone(), ..options(choice) };
    let end = l.connect(&roster, &options, &Doom::new()).unwrap().pop().unwrap();
    let mut end: Box<dyn Transport> = match arenas.into_iter().next() {
        Some(arena) => Box::new(FromArena::new(end, arena)),
        None => Box::new(end),
    };
    match scenario {
        "exchange" => {
            for (round, bytes) in [0, 1000, 100_000, 6 << 20, 10].into_iter().enumerate() {
                all_to_all(&mut *end, me, n, round, bytes).unwrap();
            }
            println!("@done");
            // What was sent last must arrive although the sender ends at once.
        }
        "forever" => {
            println!("@running");
            let failed = (0..).find_map(|round| all_to_all(&mut *end, me, n, round, 16 << 20).err()).unwrap();
            end.abort(&failed.to_string());
            println!("@{failed}");
            // Stays until it is killed: a broken socket must not be what tells the others.
            std::thread::sleep(Duration::from_secs(60));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn processes_exchange_over_rings_and_grpc() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        let mut all = start(3, choice, "exchange");
        for p in &mut all {
            assert_eq!(p.hear(), "done", "{choice}");
        }
        for p in &mut all {
            assert!(p.child.wait().unwrap().success(), "{choice}");
        }
    }
}

#[test]
fn the_death_of_a_process_in_the_middle_of_a_transfer_is_an_error_for_all_within_a_second() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        let mut all = start(4, choice, "forever");
        for p in &all {
            assert_eq!(p.hear(), "running");
        }
        std::thread::sleep(Duration::from_millis(300));
        let mut dead = all.remove(2);
        let killed = Instant::now();
        dead.child.kill().unwrap();
        for p in &all {
            let said = p.hear();
            assert!(said.starts_with("W0008") || said.starts_with("W0001"), "{choice}: {said}");
            assert!(said.contains("has lost device 2"), "{choice}: {said}");
        }
        let took = killed.elapsed();
        assert!(took < Duration::from_secs(1), "{choice}: {took:?}");
    }
}
