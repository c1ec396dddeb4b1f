//! What a coordinator remembers when it is started again: a file of JSON lines, each on disk before it counts.
//!
//! `DIR/journal.jsonl` is replayed on start. Its epochs fence off whoever belongs to an earlier life; the rest tells what
//! happened and when.

use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const FILE: &str = "journal.jsonl";
const LOCK: &str = "lock";
/// Longest line that is read, and the size at which the file is begun anew.
const LINE_BYTES: u64 = 64 << 10;
const FILE_BYTES: u64 = 4 << 20;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// The epoch has risen to this.
    Epoch {
        /// Number.
        epoch: u64,
    },
    /// A worker joined.
    Joined {
        /// Its number.
        worker: u64,
        /// Where it is.
        address: String,
        /// Devices that it offers.
        devices: u32,
    },
    /// A worker is gone.
    Lost {
        /// Its number.
        worker: u64,
        /// Why.
        reason: String,
    },
    /// A session began.
    Opened {
        /// Its epoch.
        epoch: u64,
        /// Its mesh.
        mesh: String,
        /// Whether it took the place of one that was lost.
        recovery: bool,
    },
    /// A checkpoint was committed.
    Committed {
        /// Where.
        location: String,
        /// Its folder.
        folder: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Line {
    /// Milliseconds since 1970.
    at: u64,
    #[serde(flatten)]
    event: Event,
}

/// What a journal says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// The highest epoch.
    pub epoch: u64,
    /// The highest number of a worker.
    pub worker: u64,
    /// Sessions that took the place of another.
    pub recoveries: u64,
    /// Checkpoints committed, and the newest one's location and folder.
    pub checkpoints: u64,
    /// The newest one.
    pub checkpoint: String,
    /// Lines that could not be read: the last one if the machine went down, others if the file is damaged.
    pub unread: usize,
}

/// A coordinator's memory.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Held for as long as the coordinator runs: two would not agree about the epoch.
    _lock: File,
}

impl Journal {
    /// Opens the journal in a folder, which is made if it is not there, and replays it.
    ///
    /// # Errors
    /// A folder that cannot be written or that another coordinator uses; in words.
    pub fn open(dir: &Path) -> Result<(Journal, Replayed), String> {
        let failed =
            |e: io::Error| format!("cannot keep the state in {}: {e}; name another folder with --state", dir.display());
        std::fs::create_dir_all(dir).map_err(failed)?;
        let lock = File::create(dir.join(LOCK)).map_err(failed)?;
        lock.try_lock().map_err(|_| format!("another coordinator uses the state in {}", dir.display()))?;
        let path = dir.join(FILE);
        let replayed = match File::open(&path) {
            Ok(file) => replay(BufReader::new(file)).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Replayed::default(),
            Err(e) => return Err(failed(e)),
        };
        let begin_anew = std::fs::metadata(&path).is_ok_and(|m| m.len() > FILE_BYTES);
        if begin_anew {
            std::fs::rename(&path, dir.join(format!("{FILE}.old"))).map_err(failed)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        File::open(dir).and_then(|d| d.sync_all()).map_err(failed)?;
        let mut journal = Journal { path, file, _lock: lock };
        // A line that was cut short must not swallow the next one.
        journal.file.write_all(b"\n").map_err(failed)?;
        if begin_anew {
            journal.add(&Event::Epoch { epoch: replayed.epoch }).map_err(failed)?;
        }
        Ok((journal, replayed))
    }

    /// Adds what happened; it is on disk when this returns.
    ///
    /// # Errors
    /// What the disk refuses.
    pub fn add(&mut self, event: &Event) -> io::Result<()> {
        let at = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_millis() as u64);
        let mut line = serde_json::to_vec(&Line { at, event: event.clone() }).map_err(io::Error::other)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.file.sync_data()
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn replay(mut lines: impl BufRead) -> io::Result<Replayed> {
    let mut all = Replayed::default();
    loop {
        let mut line = Vec::new();
        if lines.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(all);
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice::<Line>(&line).map(|l| l.event) {
            Ok(Event::Epoch { epoch }) => all.epoch = all.epoch.max(epoch),
            Ok(Event::Joined { worker, .. } | Event::Lost { worker, .. }) => all.worker = all.worker.max(worker),
            Ok(Event::Opened { epoch, recovery, .. }) => {
                all.epoch = all.epoch.max(epoch);
                all.recoveries += u64::from(recovery);
            }
            Ok(Event::Committed { location, folder }) => {
                all.checkpoints += 1;
                all.checkpoint = format!("{location}/{folder}");
            }
            Err(_) => all.unread += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_replayed_and_a_line_cut_short_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, replayed) = Journal::open(dir.path()).unwrap();
        assert_eq!(replayed, Replayed::default());
        journal.add(&Event::Epoch { epoch: 4 }).unwrap();
        journal.add(&Event::Joined { worker: 7, address: "a:1".into(), devices: 2 }).unwrap();
        journal.add(&Event::Opened { epoch: 5, mesh: "x=2".into(), recovery: true }).unwrap();
        journal.add(&Event::Committed { location: "/c".into(), folder: "step-00000001-epoch-5".into() }).unwrap();
        journal.file.write_all(b"{\"at\":1,\"event\":\"epoch\",\"ep").unwrap();
        assert!(Journal::open(dir.path()).err().unwrap().contains("another coordinator uses"));
        drop(journal);
        let (mut journal, replayed) = Journal::open(dir.path()).unwrap();
        let expected = Replayed {
            epoch: 5,
            worker: 7,
            recoveries: 1,
            checkpoints: 1,
            checkpoint: "/c/step-00000001-epoch-5".into(),
            unread: 1,
        };
        assert_eq!(replayed, expected);
        journal.add(&Event::Epoch { epoch: 9 }).unwrap();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1.epoch, 9);
    }
}
