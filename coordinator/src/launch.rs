//! A coordinator inside this process and workers of its own beside it, for a model program's `--workers N`.
//!
//! They have an authority of their own for as long as they run, so that no other user of the machine gets in.

use crate::certs::{Authority, CertsError};
use crate::error::Failure;
use crate::server::{Coordinator, ServerOptions};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use worker::tls::{Role, Tls};

/// Days for which certificates of such workers are good: longer than any run.
const DAYS: u32 = 3650;

/// Workers on this host and a coordinator for them; all of them end with it.
pub struct Launched {
    /// Where model programs find the coordinator.
    pub url: String,
    /// And with which certificate.
    pub tls: Tls,
    workers: Vec<Child>,
    /// The workers' certificate.
    _folder: TempDir,
    _runtime: Runtime,
}

/// Certificates of a fresh authority: the coordinator's, the model program's, and a folder with the workers'. The
/// authority's own key is forgotten.
fn certificates() -> Result<(Tls, Tls, TempDir), CertsError> {
    let authority = Authority::new()?;
    let tls = |role: Role| Ok::<_, CertsError>(authority.tls(role, &authority.issue_for(role, "launched", DAYS)?)?);
    let why = |why| CertsError::File { path: std::env::temp_dir(), why };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
    let folder = builder.prefix("mesh-").tempdir().map_err(why)?;
    authority.write(folder.path(), Role::Worker, &authority.issue_for(Role::Worker, "launched", DAYS)?)?;
    Ok((tls(Role::Coordinator)?, tls(Role::Client)?, folder))
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
        let (coordinator, tls, folder) = certificates().map_err(|e| failed(&e))?;
        let options =
            ServerOptions { lease: Duration::from_secs(1), tls: Some(coordinator), ..ServerOptions::default() };
        runtime.spawn(Coordinator::new(options).serve(socket));
        let mut launched =
            Launched { url: format!("https://{address}"), tls, workers: vec![], _folder: folder, _runtime: runtime };
        for _ in 0..workers {
            let mut command = command(&address);
            command.stdin(Stdio::null()).env("MESH_TLS", launched._folder.path());
            if std::env::var_os("MESH_LOG").is_none() {
                command.env("MESH_LOG", "warn");
            }
            let child = command.spawn().map_err(|e| failed(&e))?;
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
