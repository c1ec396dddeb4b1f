//! A coordinator inside this process and workers of its own beside it, for a model program's `--workers N`.

use crate::error::Failure;
use crate::server::{Coordinator, ServerOptions};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Workers on this host and a coordinator for them; all of them end with it.
pub struct Launched {
    /// Where model programs find the coordinator.
    pub url: String,
    workers: Vec<Child>,
    _runtime: Runtime,
}

impl Launched {
    /// Starts `workers` worker processes, made by `command` from the coordinator's address.
    ///
    /// # Errors
    /// No port to listen on, or a process that does not start.
    pub fn start(workers: usize, mut command: impl FnMut(&str) -> Command) -> Result<Launched, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::Mesh(format!("cannot start workers: {e}"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| failed(&e))?;
        let socket = runtime.block_on(TcpListener::bind("127.0.0.1:0")).map_err(|e| failed(&e))?;
        let address = socket.local_addr().map_err(|e| failed(&e))?.to_string();
        // Workers of a program that has ended have nobody to look for.
        let options = ServerOptions { lease: Duration::from_secs(1), ..ServerOptions::default() };
        runtime.spawn(Coordinator::new(options).serve(socket));
        let mut launched = Launched { url: format!("http://{address}"), workers: vec![], _runtime: runtime };
        for _ in 0..workers {
            let child = command(&address).stdin(Stdio::null()).spawn().map_err(|e| failed(&e))?;
            launched.workers.push(child);
        }
        Ok(launched)
    }

    /// The workers' processes, in the order in which they were started.
    pub fn processes(&self) -> Vec<u32> {
        self.workers.iter().map(Child::id).collect()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // One that has ended by itself is only waited for.
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}
