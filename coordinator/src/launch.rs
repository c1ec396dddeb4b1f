//! A coordinator inside this process and workers of its own beside it, for a model program's `--workers N`.
//!
//! They have an authority of their own for as long as they run, so that no other user of the machine gets in.
//! A worker that ends is started again: a run that has lost one goes on with the next.

use crate::certs::{Authority, CertsError};
use crate::error::Failure;
use crate::server::{Coordinator, ServerOptions};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use worker::tls::{Role, Tls};

/// Days for which certificates of such workers are good: longer than any run.
const DAYS: u32 = 3650;

/// How often it is looked whether workers are there.
const LOOK: Duration = Duration::from_millis(50);
/// A worker that ends within this time was no good; so many in a row are not started again.
const EARLY: Duration = Duration::from_secs(2);
const EARLY_ENDS: u32 = 5;

/// Workers on this host and a coordinator for them; all of them end with it.
pub struct Launched {
    /// Where model programs find the coordinator.
    pub url: String,
    /// And with which certificate.
    pub tls: Tls,
    workers: Arc<Mutex<Vec<Child>>>,
    over: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
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

fn lock(workers: &Mutex<Vec<Child>>) -> MutexGuard<'_, Vec<Child>> {
    workers.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Launched {
    /// Starts `workers` worker processes, made by `command` from the coordinator's address; sessions have their
    /// checkpoints in `store` or below it.
    ///
    /// # Errors
    /// No port to listen on, or a process that does not start.
    pub fn start(
        workers: usize,
        store: &str,
        mut command: impl FnMut(&str) -> Command + Send + 'static,
    ) -> Result<Launched, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::Mesh(format!("cannot start workers: {e}"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| failed(&e))?;
        let socket = runtime.block_on(TcpListener::bind("127.0.0.1:0")).map_err(|e| failed(&e))?;
        let address = socket.local_addr().map_err(|e| failed(&e))?.to_string();
        // Workers of a program that has ended have nobody to look for.
        let (coordinator, tls, folder) = certificates().map_err(|e| failed(&e))?;
        let lease = Duration::from_secs(1);
        let options = ServerOptions { lease, store: store.into(), tls: Some(coordinator), ..ServerOptions::default() };
        runtime.spawn(Coordinator::new(options).map_err(|e| failed(&e))?.serve(socket));
        let url = format!("https://{address}");
        let certificates = folder.path().to_path_buf();
        let mut start = move || {
            let mut command = command(&address);
            command.stdin(Stdio::null()).env("MESH_TLS", &certificates);
            if std::env::var_os("MESH_LOG").is_none() {
                command.env("MESH_LOG", "warn");
            }
            command.spawn()
        };
        let first: std::io::Result<Vec<Child>> = (0..workers).map(|_| start()).collect();
        let workers = Arc::new(Mutex::new(first.map_err(|e| failed(&e))?));
        let over = Arc::new(AtomicBool::new(false));
        let keeper = {
            let (workers, over) = (workers.clone(), over.clone());
            std::thread::spawn(move || keep(&workers, &over, start))
        };
        Ok(Launched { url, tls, workers, over, keeper: Some(keeper), _folder: folder, _runtime: runtime })
    }

    /// The workers' processes.
    pub fn processes(&self) -> Vec<u32> {
        lock(&self.workers).iter().map(Child::id).collect()
    }
}

/// Starts workers again that have ended, until it is over.
fn keep(workers: &Mutex<Vec<Child>>, over: &AtomicBool, mut start: impl FnMut() -> std::io::Result<Child>) {
    let count = lock(workers).len();
    let mut begun = vec![Instant::now(); count];
    let mut early = vec![0; count];
    while !over.load(Ordering::Acquire) {
        std::thread::sleep(LOOK);
        let mut workers = lock(workers);
        for (i, worker) in workers.iter_mut().enumerate() {
            let ended = early[i] < EARLY_ENDS && !matches!(worker.try_wait(), Ok(None));
            // Whoever ends the launch takes the lock first.
            if !ended || over.load(Ordering::Acquire) {
                continue;
            }
            early[i] = if begun[i].elapsed() < EARLY { early[i] + 1 } else { 0 };
            begun[i] = Instant::now();
            match start() {
                Ok(child) => *worker = child,
                Err(e) => tracing::error!("cannot start a worker again: {e}"),
            }
        }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        for worker in lock(&self.workers).iter_mut() {
            // One that has ended by itself is only waited for.
            let _ = worker.kill();
            let _ = worker.wait();
        }
        if let Some(keeper) = self.keeper.take() {
            // It has nothing to report.
            let _ = keeper.join();
        }
    }
}
