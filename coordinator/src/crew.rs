//! A session on workers: which of them it has, and what they are asked to do together.

use crate::checkpoint::{Catalogue, Entry, Position, manifest};
use crate::journal::Event;
use crate::keeper::not_written;
use crate::recorder;
use crate::server::{Coordinator, invalid};
use mesh::dim::Name;
use mesh::layout::Mesh;
use mesh::plan::{Part, PlanOptions, ProgramPlan, plan_program};
use mesh::program::Program;
use proto::control::{
    self, ArrayHead, ArrayName, CopyRequest, LoadHead, LoadPart, Peer, Settings, WriteRequest, load_part,
    worker_client::WorkerClient,
};
use std::future::Future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_stream::{StreamExt, iter};
use tonic::transport::Channel;
use tonic::{Code, Status};
use worker::checkpoint::{self, Written};
use worker::kernels::kernel::CpuBackend;
use worker::store::Store;
use worker::wire;

/// A program on some of the workers.
pub(crate) struct Active {
    pub epoch: u64,
    pub settings: Settings,
    /// Devices of the mesh that was asked for.
    pub wanted: usize,
    pub program: Program,
    pub plan: ProgramPlan,
    /// Workers with their devices, by device.
    pub crew: Vec<(u64, Vec<u32>)>,
    /// Steps that every device has done.
    pub steps: AtomicU64,
    /// Where its checkpoints are.
    pub catalogue: Option<Catalogue>,
    /// What the model program is to be told.
    notes: Mutex<Vec<String>>,
    /// Held while it is stopped.
    stopping: tokio::sync::Mutex<()>,
    /// The checkpoint that is being written; held while one is begun.
    pub writing: tokio::sync::Mutex<Option<tokio::task::JoinHandle<Result<(), String>>>>,
}

impl Active {
    /// Whether a worker is part of it.
    pub fn has(&self, worker: u64) -> bool {
        self.crew.iter().any(|(w, _)| *w == worker)
    }

    /// Keeps something to tell the model program.
    pub fn note(&self, text: String) {
        tracing::warn!("{text}");
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// What is to be told.
    pub fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The parts of a variable, feed or fetch, by device.
    pub fn parts(&self, name: &ArrayName) -> Result<Vec<&Part>, Status> {
        let missing = || Status::not_found(format!("C0014: `{}` of `{}` is not there", name.name, name.function));
        if name.function.is_empty() {
            let v = self.program.variable(&name.name).ok_or_else(missing)?.index();
            return Ok(self.plan.variables.iter().map(|d| &d[v].0).collect());
        }
        let devices = self.plan.functions.get(&Name::from(name.function.as_str())).ok_or_else(missing)?;
        let part = |d: usize| {
            let plan = &devices[d];
            plan.inputs.iter().chain(&plan.outputs).find(|(n, _, _)| **n == *name.name).map(|(_, part, _)| part)
        };
        (0..devices.len()).map(|d| part(d).ok_or_else(missing)).collect()
    }

    /// The workers, by their place in the crew, with their devices that hold just the box which a head announces.
    ///
    /// # Errors
    /// What is neither a feed nor a variable; a box that no device holds so.
    pub fn holders(&self, head: &ArrayHead) -> Result<Vec<(usize, Vec<u32>)>, Status> {
        let name = head.name.clone().unwrap_or_default();
        if name.epoch != self.epoch {
            return Err(invalid(format!("C0013: a stream of epoch {} goes on in epoch {}", self.epoch, name.epoch)));
        }
        let parts = self.parts(&name)?;
        let plan = self.plan.functions.get(&Name::from(name.function.as_str()));
        if plan.is_some_and(|devices| devices[0].inputs.iter().all(|(n, _, _)| **n != *name.name)) {
            return Err(invalid(format!("C0014: `{}` is not fed `{}`", name.function, name.name)));
        }
        let holds = |device: &u32| wire::is_head_of(head, parts[*device as usize]);
        let of = |(_, own): &(u64, Vec<u32>)| own.iter().copied().filter(holds).collect::<Vec<u32>>();
        let found: Vec<(usize, Vec<u32>)> =
            self.crew.iter().map(of).enumerate().filter(|(_, d)| !d.is_empty()).collect();
        if found.is_empty() {
            return Err(invalid(format!(
                "C0013: no device holds the box of `{}`, {}, that is of extents {:?} from {:?} on",
                name.name, parts[0].ty, head.shape, head.start
            )));
        }
        Ok(found)
    }
}

/// Meshes with fewer devices along some axes that `devices` devices can make up, those with the most devices first; of
/// equals, those that keep the first axes longest.
fn smaller(mesh: &Mesh, devices: usize) -> Vec<Mesh> {
    let mut sizes: Vec<Vec<usize>> = vec![vec![]];
    for (_, size) in mesh.axes() {
        let longer = |s: &Vec<usize>| (1..=*size).map(|n| [&s[..], &[n]].concat()).collect::<Vec<_>>();
        sizes = sizes.iter().flat_map(longer).filter(|s| s.iter().product::<usize>() <= devices).collect();
    }
    sizes.sort_by_key(|s| std::cmp::Reverse((s.iter().product::<usize>(), s.clone())));
    let mesh_of = |s: Vec<usize>| {
        let axes: Vec<String> = mesh.axes().iter().zip(s).map(|((n, _), s)| format!("{n}={s}")).collect();
        axes.join(",").parse::<Mesh>().ok()
    };
    sizes.into_iter().filter_map(mesh_of).filter(|m| m.size() < mesh.size()).collect()
}

impl Coordinator {
    /// Stops a session that cannot go on, and says with the reason which device kept the others waiting.
    pub(crate) async fn stop(&self, session: &Active, reason: &str) {
        // Whoever comes second finds it stopped.
        let _stopping = session.stopping.lock().await;
        if self.session(session.epoch).is_err() {
            return;
        }
        // What hangs is seen only for as long as it hangs.
        let flights = self.flights(session).await;
        let reason = match recorder::verdict(&flights) {
            Some(verdict) => format!("{reason}; {verdict}"),
            None => reason.into(),
        };
        tracing::warn!(epoch = session.epoch, "the session stops: {reason}");
        self.halt(session, &reason).await;
        self.keep(session.epoch, flights).await;
    }

    /// Stops a session's devices, so that none waits for another, and raises the epoch.
    async fn halt(&self, session: &Active, reason: &str) {
        let (epoch, clients) = {
            let mut state = self.state();
            if state.session.as_ref().is_none_or(|s| s.epoch != session.epoch) || state.failed.is_some() {
                return;
            }
            state.failed = Some(reason.into());
            let epoch = state.raise(0);
            let clients = session.crew.iter().filter_map(|(w, _)| state.members.get(w).map(|m| m.client.clone()));
            (epoch, clients.collect::<Vec<_>>())
        };
        self.changed();
        let mut calls = JoinSet::new();
        for mut client in clients {
            let request = control::AbortRequest { epoch, reason: reason.into() };
            calls.spawn(async move { tokio::time::timeout(Duration::from_secs(5), client.abort(request)).await });
        }
        while calls.join_next().await.is_some() {}
    }

    /// The session, if it is of that epoch and can go on.
    pub(crate) fn session(&self, epoch: u64) -> Result<Arc<Active>, Status> {
        let state = self.state();
        match (&state.session, &state.failed) {
            (Some(s), None) if s.epoch == epoch => Ok(s.clone()),
            (Some(s), Some(reason)) if s.epoch == epoch => Err(Status::aborted(reason.clone())),
            _ => Err(Status::failed_precondition(format!(
                "C0010: a call of epoch {epoch}, and the coordinator is in epoch {}",
                state.epoch
            ))),
        }
    }

    /// Asks every worker of a session for something at once. The first failure is the result; it stops the others at once
    /// if they `wait` for each other in it.
    pub(crate) async fn ask<T, F>(
        &self,
        session: &Arc<Active>,
        wait: bool,
        mut call: impl FnMut(WorkerClient<Channel>, usize) -> F,
    ) -> Result<Vec<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let mut calls = JoinSet::new();
        for (place, (id, _)) in session.crew.iter().enumerate() {
            let client = self.state().members.get(id).map(|m| m.client.clone());
            let client = client.ok_or_else(|| Status::aborted(format!("worker {id} is lost")))?;
            let called = call(client, place);
            calls.spawn(async move { (place, called.await) });
        }
        let mut replies: Vec<Option<T>> = session.crew.iter().map(|_| None).collect();
        let mut changes = self.watched();
        loop {
            let done = tokio::select! {
                done = calls.join_next() => done,
                // A worker that hangs does not answer; it is given up by its silence, and everybody's calls with it.
                _ = changes.changed() => match self.session(session.epoch) {
                    Err(stopped) => return Err(stopped),
                    Ok(_) => continue,
                },
            };
            let Some(done) = done else { return Ok(replies.into_iter().flatten().collect()) };
            let (place, reply) = done.map_err(|e| Status::internal(e.to_string()))?;
            match reply {
                Ok(r) => replies[place] = Some(r),
                Err(status) => {
                    // What the worker said has no source; what became of the connection has.
                    let lost = if std::error::Error::source(&status).is_some() { " is lost" } else { "" };
                    let reason = format!("worker {}{lost}: {}", session.crew[place].0, status.message());
                    if wait {
                        self.stop(session, &reason).await;
                    }
                    return Err(Status::new(status.code(), reason));
                }
            }
        }
    }

    /// Has something done on every worker of a session. A failure stops all of them, and its reason is the session's.
    pub(crate) async fn everywhere<T, F>(
        &self,
        session: &Arc<Active>,
        call: impl FnMut(WorkerClient<Channel>, usize) -> F,
    ) -> Result<Vec<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let asked = self.ask(session, true, call).await;
        if let Err(status) = &asked {
            self.stop(session, status.message()).await;
            // A worker that was lost is the reason, and not what that made of the others.
            self.session(session.epoch)?;
        }
        asked
    }

    /// Waits for enough devices and takes them: workers in the order in which they joined. A mesh that may shrink gets,
    /// after the wait, what there is.
    async fn crew(&self, settings: &Settings, mesh: &Mesh) -> Result<(Mesh, Vec<(u64, Vec<u32>)>), Status> {
        let begun = Instant::now();
        let wait = if settings.after > 0 { self.options.replace_timeout } else { self.options.wait };
        let mut changes = self.watched();
        loop {
            let left = wait.saturating_sub(begun.elapsed());
            let there = self.state().devices();
            if there >= mesh.size() {
                return Ok((mesh.clone(), self.take(mesh.size())));
            }
            if left.is_zero() {
                if let Some(less) = smaller(mesh, there).into_iter().find(|_| settings.shrink) {
                    let crew = self.take(less.size());
                    return Ok((less, crew));
                }
                return Err(Status::unavailable(format!(
                    "C0011: the mesh needs {} devices, and {there} have joined within {wait:?}; start more workers{}",
                    mesh.size(),
                    if settings.shrink { "" } else { ", or allow a smaller mesh with --shrink" }
                )));
            }
            // A change that is missed here is seen at the next look.
            let _ = tokio::time::timeout(left.min(Duration::from_millis(500)), changes.changed()).await;
        }
    }

    /// The first so many devices of workers that stay.
    fn take(&self, devices: usize) -> Vec<(u64, Vec<u32>)> {
        let mut crew = Vec::new();
        let mut next = 0;
        for (id, member) in self.state().members.iter().filter(|(_, m)| m.leaving.is_none()) {
            let n = (member.hello.devices as usize).min(devices - next);
            if n > 0 {
                crew.push((*id, (next as u32..(next + n) as u32).collect()));
                next += n;
            }
        }
        crew
    }

    /// Whether the model program had better checkpoint and open its session anew.
    pub(crate) fn regroup(&self, session: &Active) -> bool {
        let state = self.state();
        let leaves = |(w, _): &(u64, Vec<u32>)| state.members.get(w).is_some_and(|m| m.leaving.is_some());
        let grows = session.plan.mesh.size() < session.wanted && state.devices() >= session.wanted;
        state.ending.is_some() || grows || session.crew.iter().any(leaves)
    }

    /// The catalogue of a session's checkpoints, if it is to have any.
    fn catalogue(&self, location: &str) -> Result<Option<Catalogue>, Status> {
        if location.is_empty() {
            return Ok(None);
        }
        if !self.store.contains(location) {
            return Err(Status::permission_denied(format!(
                "C0024: checkpoints in {location} are not below the coordinator's --store, {}",
                self.store.location()
            )));
        }
        Ok(Some(Catalogue::new(Store::open(location).map_err(invalid)?)))
    }

    /// Opens a session.
    pub(crate) async fn open_session(
        &self,
        settings: Settings,
        bytes: bytes::Bytes,
    ) -> Result<(Arc<Active>, Vec<String>), Status> {
        let program = wire::decode(&bytes).map_err(invalid)?;
        let mesh: Mesh = settings.mesh.parse().map_err(invalid)?;
        let layout = settings.layout.parse().map_err(invalid)?;
        let memory = (settings.memory > 0).then_some(settings.memory as usize);
        let plan = |mesh: &Mesh| {
            let options = PlanOptions { memory, devices: None, apart: false, waiting: false };
            plan_program(&program, mesh, &layout, &options, &CpuBackend { threads: 1 }).map_err(invalid)
        };
        // What is wrong with the plan is said before anything is closed or waited for.
        let whole = if settings.carry { None } else { Some(plan(&mesh)?) };
        let catalogue = self.catalogue(&settings.checkpoints)?;
        let before = self.free(settings.after)?;
        let (got, crew) = if settings.carry {
            let Some(before) = before else { return Err(gone(settings.after)) };
            // What was copied for a checkpoint is written first.
            if let Some(Err(failed)) = join(&mut *before.writing.lock().await).await {
                before.note(failed);
            }
            self.session(before.epoch)?;
            (before.plan.mesh.clone(), before.crew.clone())
        } else {
            if let Some(before) = before {
                self.close(&before).await;
            }
            if let Some(reason) = self.state().ending.clone() {
                return Err(Status::unavailable(format!("C0025: this coordinator is about to end: {reason}")));
            }
            self.crew(&settings, &mesh).await?
        };
        let plan = match whole {
            Some(whole) if got == mesh => whole,
            _ => plan(&got)?,
        };
        let seen = match catalogue.clone() {
            // One that cannot be listed is the business of those who use it.
            Some(c) => blocking(move || Ok(c.next_epoch().unwrap_or(0))).await?,
            None => 0,
        };
        let mut settings = settings;
        settings.mesh = got.to_string();
        let (session, peers, amx) = {
            let mut state = self.state();
            match &state.session {
                Some(s) if settings.carry && s.epoch == settings.after && state.failed.is_none() => {}
                None if !settings.carry => {}
                None => return Err(gone(settings.after)),
                Some(_) => return Err(busy()),
            }
            let (mut peers, mut amx) = (Vec::new(), true);
            for (id, devices) in &crew {
                let member =
                    state.members.get(id).ok_or_else(|| Status::unavailable(format!("worker {id} is lost")))?;
                amx &= member.hello.amx;
                peers.extend(devices.iter().map(|d| Peer {
                    device: *d,
                    address: member.hello.data_address.clone(),
                    host: member.hello.host.clone(),
                    socket: member.hello.socket.clone(),
                }));
            }
            let (epoch, recovery) = (state.raise(seen), settings.after > 0 && !settings.carry);
            state.recoveries += u64::from(recovery);
            state.record(Event::Opened { epoch, mesh: settings.mesh.clone(), recovery });
            let notes = state.session.as_ref().map(|s| s.notes()).unwrap_or_default();
            let session = Arc::new(Active {
                epoch,
                settings,
                wanted: mesh.size(),
                program,
                plan,
                crew,
                steps: AtomicU64::new(0),
                catalogue,
                notes: Mutex::new(notes),
                stopping: tokio::sync::Mutex::default(),
                writing: tokio::sync::Mutex::default(),
            });
            (state.session, state.failed) = (Some(session.clone()), None);
            (session, peers, amx)
        };
        self.changed();
        self.release();
        let loaded = self
            .everywhere(&session, |mut client, place| {
                let head = LoadHead {
                    epoch: session.epoch,
                    job: "session".into(),
                    settings: Some(session.settings.clone()),
                    peers: peers.clone(),
                    own: session.crew[place].1.clone(),
                    amx,
                };
                let parts: Vec<LoadPart> = std::iter::once(load_part::Kind::Head(head))
                    .chain(wire::slices(bytes.clone()).map(load_part::Kind::Program))
                    .map(|k| LoadPart { kind: Some(k) })
                    .collect();
                async move { client.load(iter(parts)).await.map(|r| r.into_inner().links) }
            })
            .await;
        match loaded {
            Ok(links) => Ok((session, links.into_iter().flatten().collect())),
            Err(status) => {
                self.close(&session).await;
                Err(status)
            }
        }
    }

    /// Whether a session may be opened: gives the one whose place it takes.
    fn free(&self, after: u64) -> Result<Option<Arc<Active>>, Status> {
        let state = self.state();
        match &state.session {
            Some(s) if s.epoch == after => Ok(Some(s.clone())),
            Some(_) => Err(busy()),
            None => Ok(None),
        }
    }

    /// Ends a session: its devices are stopped and free for another.
    pub(crate) async fn close(&self, session: &Arc<Active>) {
        self.halt(session, "the session is closed").await;
        {
            let mut state = self.state();
            if state.session.as_ref().is_some_and(|s| s.epoch == session.epoch) {
                (state.session, state.failed) = (None, None);
                state.results.clear();
            }
        }
        self.release();
        self.changed();
    }

    /// Has the variables copied, and written in the background.
    pub(crate) async fn checkpoint(&self, session: &Arc<Active>, position: Position) -> Result<(), Status> {
        let catalogue = session.catalogue.clone();
        let catalogue = catalogue.ok_or_else(|| invalid("C0022: this session was opened without checkpoints"))?;
        let mut writing = session.writing.lock().await;
        if let Some(Err(failed)) = join(&mut writing).await {
            session.note(failed);
        }
        let (epoch, step) = (session.epoch, position.step);
        self.everywhere(session, |mut client, _| async move { client.copy(CopyRequest { epoch, step }).await }).await?;
        let (this, session) = (self.clone(), session.clone());
        *writing = Some(tokio::spawn(async move {
            this.write(&session, &catalogue, position).await.map_err(|why| not_written(step, why))
        }));
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    pub(crate) async fn settle(&self, session: &Active) -> Result<(), Status> {
        match join(&mut *session.writing.lock().await).await {
            Some(Err(failed)) => Err(Status::data_loss(failed)),
            _ => Ok(()),
        }
    }

    /// Has the workers write what they copied, and commits it when all have.
    async fn write(&self, session: &Arc<Active>, catalogue: &Catalogue, position: Position) -> Result<(), String> {
        let entry = Entry { step: position.step, epoch: session.epoch };
        let request = WriteRequest {
            epoch: session.epoch,
            checkpoints: session.settings.checkpoints.clone(),
            folder: entry.to_string(),
        };
        let written = self
            .ask(session, false, |mut client, _| {
                let request = request.clone();
                async move {
                    let mut stream = client.write(request).await?.into_inner();
                    let mut parts = Vec::new();
                    while let Some(part) = stream.next().await {
                        parts.push(part?);
                    }
                    Ok(parts)
                }
            })
            .await;
        let (this, session, catalogue) = (self.clone(), session.clone(), catalogue.clone());
        let commit = blocking(move || {
            let commit = || {
                let (program, plan) = (&session.program, &session.plan);
                let seed = session.settings.seed;
                let mut manifest = manifest(entry, &position, seed, program, plan, &session.settings.stage)
                    .map_err(|e| e.to_string())?;
                for part in written.map_err(|s| s.message().to_string())?.into_iter().flatten() {
                    manifest.add(written_part(part));
                }
                // Whoever has raised the epoch meanwhile decides from now on.
                this.session(session.epoch).map_err(|s| s.message().to_string())?;
                catalogue.commit(&manifest, session.settings.keep as usize).map_err(|e| e.to_string())
            };
            let done: Result<(), String> = commit();
            if done.is_err() {
                catalogue.abandon(entry);
            } else {
                let (location, folder) = (session.settings.checkpoints.clone(), entry.to_string());
                let mut state = this.state();
                (state.checkpoints, state.checkpoint) = (state.checkpoints + 1, format!("{location}/{folder}"));
                state.record(Event::Committed { location, folder });
            }
            Ok(done)
        });
        let done = commit.await.map_err(|s| s.message().to_string())?;
        self.changed();
        done
    }

    /// Sets a session's variables to the newest good checkpoint.
    pub(crate) async fn restore(
        &self,
        session: &Arc<Active>,
        mut passed: Vec<String>,
    ) -> Result<control::Restored, Status> {
        let catalogue = session.catalogue.clone();
        let catalogue = catalogue.ok_or_else(|| invalid("C0022: this session was opened without checkpoints"))?;
        let lost = |e: &dyn std::fmt::Display| Status::data_loss(e.to_string());
        let listed = catalogue.clone();
        let entries = blocking(move || Ok(listed.entries())).await?.map_err(|e| lost(&e))?;
        let mut notes = Vec::new();
        let before = passed.len();
        for entry in entries.into_iter().rev().filter(|e| !passed.contains(&e.to_string())).collect::<Vec<_>>() {
            let read = catalogue.clone();
            let (manifest, hash) = match blocking(move || Ok(read.read(entry))).await? {
                Ok(read) => read,
                Err(e) => {
                    notes.push(format!("passed over: {e}"));
                    passed.push(entry.to_string());
                    continue;
                }
            };
            if !crate::checkpoint::is_of(&manifest, &session.settings.stage) {
                return Ok(control::Restored { stage: manifest.stage, notes, passed, ..control::Restored::default() });
            }
            let request = control::RestoreRequest {
                epoch: session.epoch,
                checkpoints: session.settings.checkpoints.clone(),
                folder: entry.to_string(),
                manifest: hash,
            };
            let set = self
                .ask(session, false, |mut client, _| {
                    let request = request.clone();
                    async move { client.restore(request).await }
                })
                .await;
            if set.is_err() {
                // A worker may have been lost.
                self.session(session.epoch)?;
            }
            match set {
                Ok(_) => {
                    return Ok(control::Restored {
                        found: true,
                        folder: entry.to_string(),
                        step: manifest.step,
                        samples: manifest.samples,
                        config: serde_json::to_vec(&manifest.config).unwrap_or_default().into(),
                        notes,
                        passed,
                        stage: String::new(),
                    });
                }
                Err(s) if s.code() == Code::DataLoss => {
                    notes.push(format!("passed over: {}", s.message()));
                    passed.push(entry.to_string());
                }
                // Of another program.
                Err(s) if s.code() == Code::FailedPrecondition => return Err(lost(&s.message())),
                Err(s) => {
                    self.stop(session, s.message()).await;
                    return Err(s);
                }
            }
        }
        if notes.is_empty() && before == 0 {
            return Ok(control::Restored::default());
        }
        notes.iter().for_each(|n| tracing::warn!("{n}"));
        let none = crate::checkpoint::none_good(&session.settings.checkpoints);
        Err(lost(&format!("{none}: {}", notes.join("; "))))
    }
}

fn busy() -> Status {
    Status::resource_exhausted("C0012: another model program has the workers; try again when it is done")
}

fn gone(epoch: u64) -> Status {
    Status::failed_precondition(format!("C0010: there is no session of epoch {epoch} to go on with"))
}

fn written_part(p: control::ShardPart) -> Written {
    let usizes = |v: Vec<u64>| v.into_iter().map(|n| n as usize).collect();
    let part = checkpoint::Part { file: p.file, start: usizes(p.start), shape: usizes(p.shape), blake3: p.blake3 };
    Written { variable: p.variable, part, file_bytes: p.file_bytes }
}

/// Waits for the checkpoint that is being written, if one is.
async fn join(writing: &mut Option<tokio::task::JoinHandle<Result<(), String>>>) -> Option<Result<(), String>> {
    let task = writing.take()?;
    Some(task.await.unwrap_or_else(|e| Err(e.to_string())))
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(f).await.unwrap_or_else(|e| Err(Status::internal(e.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_shrinks_to_as_many_devices_as_there_are_and_keeps_its_axes() {
        let meshes = |mesh: &str, devices| {
            smaller(&mesh.parse().unwrap(), devices).iter().map(Mesh::to_string).collect::<Vec<_>>()
        };
        assert_eq!(meshes("x=2,y=2", 3)[..3], ["x=2,y=1", "x=1,y=2", "x=1,y=1"]);
        assert_eq!(meshes("data=4,x=2", 7)[0], "data=3,x=2");
        assert_eq!(meshes("x=8", 5)[0], "x=5");
        assert!(meshes("x=2,y=2", 0).is_empty() && meshes("x=1", 1).is_empty());
    }
}
