//! The checkpoints of a session in this process: copied between steps, written by a thread of their own.

use crate::checkpoint::{Catalogue, Checkpoints, Entry, Newest, Position, manifest};
use crate::error::Failure;
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use std::thread::JoinHandle;
use worker::checkpoint::{self, Snapshot};
use worker::group::DeviceGroup;
use worker::store::Store;

/// Writes and reads the checkpoints of the devices of this process.
pub(crate) struct Keeper {
    catalogue: Catalogue,
    keep: usize,
    /// After all that have written there; known once something is written.
    epoch: Option<u64>,
    writing: Option<(u32, JoinHandle<Result<(), Failure>>)>,
    notes: Vec<String>,
}

/// What is said of a checkpoint that could not be written.
pub(crate) fn not_written(step: u32, why: impl std::fmt::Display) -> String {
    format!("C0007: the checkpoint of step {step} could not be written, and training goes on: {why}")
}

impl Keeper {
    /// That of a place for checkpoints.
    ///
    /// # Errors
    /// A location that is none.
    pub fn new(c: &Checkpoints) -> Result<Keeper, Failure> {
        let store = Store::open(&c.location).map_err(|e| Failure::Checkpoint(e.to_string()))?;
        Ok(Keeper { catalogue: Catalogue::new(store), keep: c.keep, epoch: None, writing: None, notes: vec![] })
    }

    /// Copies the variables and has them written.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn begin(
        &mut self,
        program: &Program,
        plan: &ProgramPlan,
        group: &DeviceGroup,
        position: &Position,
        seed: u64,
        stage: &str,
    ) -> Result<(), Failure> {
        self.wait();
        let epoch = match self.epoch {
            Some(epoch) => epoch,
            None => match self.catalogue.next_epoch() {
                Ok(epoch) => *self.epoch.insert(epoch),
                Err(e) => {
                    self.notes.push(not_written(position.step, e));
                    return Ok(());
                }
            },
        };
        let own: Vec<usize> = (0..plan.mesh.size()).collect();
        let snapshot = Snapshot::copy(program, plan, &own, group);
        let entry = Entry { step: position.step, epoch };
        let mut manifest = manifest(entry, position, seed, program, plan, stage)?;
        let (catalogue, keep) = (self.catalogue.clone(), self.keep);
        let write = move || {
            let written = snapshot.write(catalogue.store(), &entry.to_string());
            let committed = written.map_err(|e| Failure::Checkpoint(e.to_string())).and_then(|written| {
                written.into_iter().for_each(|w| manifest.add(w));
                catalogue.commit(&manifest, keep)
            });
            if committed.is_err() {
                catalogue.abandon(entry);
            }
            committed
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.writing = Some((position.step, thread.map_err(|e| Failure::Mesh(e.to_string()))?));
        Ok(())
    }

    /// Waits for what is being written; what went wrong becomes a note.
    fn wait(&mut self) {
        if let Err(e) = self.settle() {
            self.notes.push(e.to_string());
        }
    }

    /// Waits for what is being written.
    ///
    /// # Errors
    /// That it could not be written.
    pub fn settle(&mut self) -> Result<(), Failure> {
        let Some((step, thread)) = self.writing.take() else { return Ok(()) };
        let done = thread.join().unwrap_or_else(|_| Err(Failure::Checkpoint("the thread that writes ended".into())));
        done.map_err(|e| Failure::Checkpoint(not_written(step, e)))
    }

    /// Sets the variables to the newest good checkpoint of those not `passed` over, if it is of this stage.
    ///
    /// # Errors
    /// As for [`Catalogue::newest`].
    pub fn restore(
        &mut self,
        program: &Program,
        plan: &ProgramPlan,
        group: &DeviceGroup,
        stage: &str,
        passed: &mut Vec<String>,
    ) -> Result<Newest, Failure> {
        self.wait();
        let own: Vec<usize> = (0..plan.mesh.size()).collect();
        let (catalogue, notes) = (&self.catalogue, &mut self.notes);
        catalogue.newest(
            stage,
            passed,
            |m| checkpoint::restore(catalogue.store(), m, program, plan, &own, group),
            |note| notes.push(note),
        )
    }

    /// What was not told yet.
    pub fn notes(&mut self) -> Vec<String> {
        if self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) {
            self.wait();
        }
        std::mem::take(&mut self.notes)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // A run that ends waits for its checkpoint; what fails now has nobody to be told to.
        let _ = self.settle();
    }
}
