//! Sessions on worker processes: this test's own binary, started again.

use coordinator::server::{Coordinator, ServerOptions};
use coordinator::{Failure, Options, Session};
use mesh::program::Program;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a session may take to end.
const CLOSED: Duration = Duration::from_secs(20);

/// The command line of a worker, for a process that is to be one.
const WORKER: &str = "MESH_TEST_WORKER";

/// What a test binary does where it was started as a worker: its test `worker_process` is just this.
pub fn serve() {
    if let Ok(line) = std::env::var(WORKER) {
        worker::cli::main(line.split_whitespace().map(Into::into));
    }
}

/// A coordinator in this process, and workers in their own.
pub struct Workers {
    pub url: String,
    processes: Vec<Child>,
    _runtime: tokio::runtime::Runtime,
}

impl Workers {
    /// A worker for each of those options; sessions wait this long for more.
    pub fn start(options: &[String], wait: Duration) -> Workers {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        let silence = Duration::from_secs(30);
        let coordinator = Coordinator::new(ServerOptions { wait, silence, ..ServerOptions::default() }).unwrap();
        runtime.spawn(coordinator.serve(socket));
        let process = |options: &String| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "worker_process", "--nocapture", "--test-threads=1"])
                .env(WORKER, format!("worker --join {address} --threads 1 {options}"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        Workers {
            url: format!("http://{address}"),
            processes: options.iter().map(process).collect(),
            _runtime: runtime,
        }
    }

    pub fn session(&self, program: Program, options: &Options) -> Session {
        let begun = Instant::now();
        loop {
            match Session::connect(&self.url, program.clone(), options) {
                // The one before is being closed.
                Err(Failure::Lost(_)) if begun.elapsed() < CLOSED => std::thread::sleep(Duration::from_millis(20)),
                opened => return opened.unwrap(),
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
