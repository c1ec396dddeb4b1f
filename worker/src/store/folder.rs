//! A folder as a store.
//!
//! A file is written under a hidden name beside its own, synchronised, renamed, and the folder synchronised: whoever
//! finds the name finds the whole file, whenever the machine stops.

use super::{Backend, HIDDEN, Location, StoreError, shown};
use bytes::Bytes;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// A folder that was renamed out of sight so long ago is not being deleted any more: its deletion was cut short.
const ABANDONED: Duration = Duration::from_secs(600);

/// A folder as a store.
pub struct Folder {
    /// Absolute, and UTF-8: it travels to workers as a text.
    root: PathBuf,
}

impl Folder {
    pub fn open(location: &str, path: &Path) -> Result<Folder, StoreError> {
        let refuse = |why: String| StoreError::Location { location: shown(location), why };
        let root = std::path::absolute(path).map_err(|e| refuse(e.to_string()))?;
        if root.to_str().is_none() {
            return Err(refuse("the working directory's name is not UTF-8".into()));
        }
        Ok(Folder { root })
    }

    fn at(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    /// An open file with its size.
    fn file(&self, path: &str) -> Result<(File, u64), StoreError> {
        let at = self.at(path);
        // Not opened before it is known to be a file: opening a pipe would wait for a writer.
        match fs::metadata(&at).and_then(|m| if m.is_file() { File::open(&at).map(Some) } else { Ok(None) }) {
            Ok(Some(file)) => {
                let size = file.metadata().map_err(|e| failed("read", &at, e))?.len();
                Ok((file, size))
            }
            Ok(None) => Err(StoreError::NotFound { path: self.full(path) }),
            Err(e) => Err(failed("read", &at, e)),
        }
    }
}

fn failed(what: &'static str, path: &Path, e: io::Error) -> StoreError {
    let (path, why) = (path.display().to_string(), e.to_string());
    match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => StoreError::NotFound { path },
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::Full { what, path, why },
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreError::Denied { what, path, why },
        _ => StoreError::Failed { what, path, why },
    }
}

/// Whether an error says that something is not there.
fn gone(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn synchronise(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder and those above it, durably.
fn make(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let Some(above) = folder.parent() else { return Ok(()) };
    make(above)?;
    match fs::create_dir(folder) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists || !folder.is_dir() => Err(e),
        // Made by somebody else just now: it may not be on disk yet.
        _ => synchronise(above),
    }
}

/// The path with `..` and symlinks resolved, as far as it exists; None where that cannot be known.
fn resolved(path: &Path) -> Option<PathBuf> {
    let mut at = PathBuf::new();
    for part in std::path::absolute(path).ok()?.components() {
        match part {
            Component::ParentDir => {
                at.pop();
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => at.push(part),
            Component::Normal(name) => {
                at.push(name);
                match fs::canonicalize(&at) {
                    Ok(real) => at = real,
                    Err(e) if e.kind() == ErrorKind::NotFound => match fs::symlink_metadata(&at) {
                        // A symlink to nothing may be one to anywhere tomorrow.
                        Ok(there) if there.is_symlink() => return None,
                        // Not there, or made by another worker this moment.
                        _ => {}
                    },
                    Err(_) => return None,
                }
            }
        }
    }
    Some(at)
}

impl Backend for Folder {
    fn contains(&self, other: &str) -> bool {
        let Ok(Location::Folder(other)) = Location::parse(other) else { return false };
        matches!((resolved(&self.root), resolved(other)), (Some(root), Some(other)) if other.starts_with(&root))
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        let at = self.at(path);
        let names = fs::read_dir(&at).and_then(|entries| {
            // Names that are not UTF-8 were not made here.
            let names = entries.map(|e| e.map(|e| e.file_name().into_string().ok()));
            names.filter_map(Result::transpose).collect()
        });
        match names {
            Err(e) if gone(&e) => Ok(Vec::new()),
            other => other.map_err(|e| failed("list", &at, e)),
        }
    }

    fn put(&self, path: &str, parts: &mut dyn Iterator<Item = Bytes>) -> Result<u64, StoreError> {
        let at = self.at(path);
        let folder = at.parent().unwrap_or(&self.root);
        let write = || {
            make(folder)?;
            let mut builder = tempfile::Builder::new();
            builder.prefix(HIDDEN);
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                // As for any other file, the process's mask decides who may read it.
                builder.permissions(fs::Permissions::from_mode(0o666));
            }
            // Deletes itself unless it is given its name.
            let mut file = builder.tempfile_in(folder)?;
            let mut bytes = 0;
            for part in parts {
                file.write_all(&part)?;
                bytes += part.len() as u64;
            }
            file.as_file().sync_all()?;
            file.persist(&at).map_err(|e| e.error)?;
            synchronise(folder)?;
            Ok(bytes)
        };
        write().map_err(|e| failed("write", &at, e))
    }

    fn get(&self, path: &str, limit: u64) -> Result<Bytes, StoreError> {
        let (file, size) = self.file(path)?;
        let too_large = |size| StoreError::TooLarge { path: self.full(path), size, limit };
        if size > limit {
            return Err(too_large(size));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| failed("read", &self.at(path), e))?;
        // It may have grown in between.
        if bytes.len() as u64 > limit { Err(too_large(bytes.len() as u64)) } else { Ok(bytes.into()) }
    }

    fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (mut file, size) = self.file(path)?;
        if range.end > size {
            return Err(StoreError::Range { path: self.full(path), start: range.start, end: range.end, size });
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let read = file.seek(SeekFrom::Start(range.start)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|e| failed("read", &self.at(path), e))?;
        Ok(bytes.into())
    }

    fn size(&self, path: &str) -> Result<Option<u64>, StoreError> {
        let at = self.at(path);
        match fs::metadata(&at) {
            Ok(m) => Ok(m.is_file().then_some(m.len())),
            Err(e) if gone(&e) => Ok(None),
            Err(e) => Err(failed("look at", &at, e)),
        }
    }

    fn delete(&self, path: &str) -> Result<(), StoreError> {
        let at = self.at(path);
        let above = at.parent().unwrap_or(&self.root);
        let delete = || {
            if let Err(e) = fs::symlink_metadata(&at) {
                return if gone(&e) { Ok(()) } else { Err(e) };
            }
            let out_of_sight = tempfile::Builder::new().prefix(&format!("{HIDDEN}gone-")).tempdir_in(above)?;
            match fs::rename(&at, out_of_sight.path().join("it")) {
                // Somebody else was faster.
                Err(e) if gone(&e) => return Ok(()),
                other => other?,
            }
            synchronise(above)?;
            out_of_sight.close()?;
            sweep(above);
            Ok(())
        };
        delete().map_err(|e| failed("delete", &at, e))
    }

    fn full(&self, path: &str) -> String {
        self.at(path).display().to_string()
    }
}

/// Deletes what a deletion that was cut short has left out of sight.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|n| n.starts_with(HIDDEN) && n.contains("gone-"));
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if ours && age.is_some_and(|a| a > ABANDONED) {
            // It takes room and does no other harm; the next deletion tries again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
