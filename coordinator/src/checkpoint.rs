//! The catalogue of checkpoints in a store: which there are, committing another, letting go of old ones.
//!
//! `LOCATION/step-00000020-epoch-3/` is the checkpoint of 20 steps that the session of epoch 3 wrote; what is in it,
//! [`worker::checkpoint`] says. What counts is read from the store each time, never remembered.

use crate::error::Failure;
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use worker::checkpoint::{CheckpointError, MANIFEST, Manifest, Tensor, VERSION};
use worker::store::{Store, StoreError};

/// Where checkpoints go, and how many stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    /// A folder, or `s3://bucket/prefix`.
    pub location: String,
    /// The newest so many are kept.
    pub keep: usize,
}

/// Where a run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Position {
    /// Steps done: the next one has this number.
    pub step: u32,
    /// Samples drawn so far.
    pub samples: u64,
    /// What the program is configured to.
    pub config: serde_json::Value,
}

/// A checkpoint that a session's variables were set to.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// Its folder.
    pub folder: String,
    /// Where it is in its run.
    pub position: Position,
}

/// What became of a restore.
#[derive(Clone, Debug, PartialEq)]
pub enum Newest {
    /// There is no checkpoint at all.
    None,
    /// The variables are those of this one.
    Restored(Restored),
    /// The newest one is of that stage of the program, and nothing was done.
    OfStage(String),
}

/// Whether a checkpoint is of that stage; a session without stages takes what has its variables.
pub(crate) fn is_of(manifest: &Manifest, stage: &str) -> bool {
    stage.is_empty() || manifest.stage.is_empty() || manifest.stage == stage
}

/// Name of a checkpoint's folder: `step-00000020-epoch-3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Steps done.
    pub step: u32,
    /// Epoch of the session that wrote it.
    pub epoch: u64,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step-{:08}-epoch-{}", self.step, self.epoch)
    }
}

impl FromStr for Entry {
    type Err = ();
    fn from_str(name: &str) -> Result<Entry, ()> {
        let (step, epoch) = name.strip_prefix("step-").and_then(|n| n.split_once("-epoch-")).ok_or(())?;
        let entry = Entry { step: step.parse().map_err(|_| ())?, epoch: epoch.parse().map_err(|_| ())? };
        if entry.to_string() == name { Ok(entry) } else { Err(()) }
    }
}

/// The checkpoints in a store.
#[derive(Clone)]
pub struct Catalogue {
    store: Store,
}

impl Catalogue {
    /// That of a store.
    pub fn new(store: Store) -> Catalogue {
        Catalogue { store }
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// All folders of checkpoints, finished or not, the oldest first.
    ///
    /// # Errors
    /// A store that cannot be listed; one that is not there yet has none.
    pub fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let names = match self.store.list("") {
            Err(StoreError::NotFound { .. }) => vec![],
            names => names?,
        };
        let mut entries: Vec<Entry> = names.iter().filter_map(|n| n.parse().ok()).collect();
        entries.sort();
        Ok(entries)
    }

    /// An epoch after all that have written here.
    ///
    /// # Errors
    /// As for [`Catalogue::entries`].
    pub fn next_epoch(&self) -> Result<u64, StoreError> {
        Ok(self.entries()?.iter().map(|e| e.epoch).max().map_or(1, |e| e.saturating_add(1)))
    }

    /// The manifest of a checkpoint, and the hash of its text.
    ///
    /// # Errors
    /// A checkpoint that was not finished, or is damaged.
    pub fn read(&self, entry: Entry) -> Result<(Manifest, String), CheckpointError> {
        let damaged = |file: String, what: String| CheckpointError::Damaged { folder: entry.to_string(), file, what };
        let unfinished =
            |_| damaged(MANIFEST.into(), "it is not there; the checkpoint was not finished, or lost it".into());
        let (manifest, hash) = match Manifest::read(&self.store, &entry.to_string()) {
            Err(CheckpointError::Store(e @ StoreError::NotFound { .. })) => return Err(unfinished(e)),
            read => read?,
        };
        if manifest.step != entry.step {
            return Err(damaged(MANIFEST.into(), format!("it is of step {}", manifest.step)));
        }
        Ok((manifest, hash))
    }

    /// Tries the checkpoints that are not `passed` over already, the newest first, until `load` takes one, or one is of
    /// another stage than `stage`; those passed over are told to `note`.
    ///
    /// # Errors
    /// No good one among those that there are, or one of another program.
    pub fn newest(
        &self,
        stage: &str,
        passed: &mut Vec<String>,
        mut load: impl FnMut(&Manifest) -> Result<(), CheckpointError>,
        mut note: impl FnMut(String),
    ) -> Result<Newest, Failure> {
        let entries = self.entries().map_err(|e| Failure::Checkpoint(e.to_string()))?;
        for entry in entries.into_iter().rev().filter(|e| !passed.contains(&e.to_string())).collect::<Vec<_>>() {
            let loaded = match self.read(entry) {
                Ok((m, _)) if !is_of(&m, stage) => return Ok(Newest::OfStage(m.stage)),
                Ok((m, _)) => load(&m).map(|()| m),
                Err(e) => Err(e),
            };
            match loaded {
                Ok(manifest) => return Ok(Newest::Restored(Restored::new(manifest))),
                Err(e) if e.concerns_one() => {
                    passed.push(entry.to_string());
                    note(format!("passed over: {e}"));
                }
                Err(e) => return Err(Failure::Checkpoint(e.to_string())),
            }
        }
        if passed.is_empty() { Ok(Newest::None) } else { Err(none_good(self.store.location())) }
    }

    /// Commits a checkpoint whose shards are written: from now on it counts. Then lets go of old ones.
    ///
    /// # Errors
    /// A shard that is not to be seen from here, or a store that refuses; the checkpoint does not count then.
    pub fn commit(&self, manifest: &Manifest, keep: usize) -> Result<(), Failure> {
        let failed = |e: StoreError| Failure::Checkpoint(e.to_string());
        for (file, bytes) in &manifest.files {
            let path = format!("{}/{file}", manifest.folder);
            if self.store.size(&path).map_err(failed)? != Some(*bytes) {
                return Err(Failure::Checkpoint(format!(
                    "C0006: {path} was written by a worker and is not to be seen in {} from here; use a folder that all \
                     hosts share, or an object store",
                    self.store.location()
                )));
            }
        }
        let path = format!("{}/{MANIFEST}", manifest.folder);
        self.store.put(&path, &mut std::iter::once(manifest.to_bytes())).map_err(failed)?;
        // One that cannot be deleted does no harm.
        if let Ok(entry) = manifest.folder.parse() {
            self.let_go(entry, keep);
        }
        Ok(())
    }

    /// Deletes a folder that did not become a checkpoint.
    pub fn abandon(&self, entry: Entry) {
        // What stays has no manifest and does not count.
        let _ = self.store.delete(&entry.to_string());
    }

    /// Deletes all but the `keep` newest up to `last`, which was just committed. Later steps are left from before a
    /// rollback: damaged, or of a course that this run has not taken; an older epoch's of the same step is superseded.
    fn let_go(&self, last: Entry, keep: usize) {
        let Ok(entries) = self.entries() else { return };
        let (before, mut gone): (Vec<Entry>, Vec<Entry>) =
            entries.into_iter().filter(|e| *e != last).partition(|e| e.step < last.step);
        let finished = |e: &Entry| self.store.size(&format!("{e}/{MANIFEST}")).is_ok_and(|s| s.is_some());
        let (finished, unfinished): (Vec<Entry>, Vec<Entry>) = before.into_iter().partition(finished);
        gone.extend(unfinished);
        gone.extend(&finished[..finished.len().saturating_sub(keep.max(1) - 1)]);
        gone.into_iter().for_each(|e| self.abandon(e));
    }
}

/// There are checkpoints, and none of them is good.
pub(crate) fn none_good(location: &str) -> Failure {
    Failure::Checkpoint(format!("C0004: there is no good checkpoint in {location}"))
}

impl Restored {
    pub(crate) fn new(m: Manifest) -> Restored {
        Restored { folder: m.folder, position: Position { step: m.step, samples: m.samples, config: m.config } }
    }
}

/// What a checkpoint is to say of itself before its parts are written.
///
/// # Errors
/// A program that has no hash.
pub(crate) fn manifest(
    entry: Entry,
    position: &Position,
    seed: u64,
    program: &Program,
    plan: &ProgramPlan,
    stage: &str,
) -> Result<Manifest, Failure> {
    let tensor = |v: &mesh::program::Variable| {
        (v.name.to_string(), Tensor { dtype: v.ty.dtype.to_string(), shape: v.ty.shape(), parts: vec![] })
    };
    Ok(Manifest {
        version: VERSION,
        folder: entry.to_string(),
        step: position.step,
        seed,
        samples: position.samples,
        program: worker::wire::hash(program)?,
        stage: stage.into(),
        mesh: plan.mesh.to_string(),
        layout: plan.layout.to_string(),
        config: position.config.clone(),
        files: BTreeMap::new(),
        tensors: program.variables.iter().map(tensor).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_checkpoints_are_read_back_and_others_are_none() {
        for entry in [Entry { step: 0, epoch: 1 }, Entry { step: 123_456_789, epoch: u64::MAX }] {
            assert_eq!(entry.to_string().parse(), Ok(entry));
        }
        for other in ["step-1-epoch-1", "step-00000001", "step-00000001-epoch-01", "step-00000001-epoch-", "best", ""] {
            assert_eq!(other.parse::<Entry>(), Err(()), "{other}");
        }
    }
}
