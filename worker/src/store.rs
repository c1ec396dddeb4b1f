//! Where checkpoints lie: a folder, or a prefix of an object store.
//!
//! | module | what it is |
//! |---|---|
//! | `folder` | a folder of this machine, or one that hosts share |
//! | `object` | a prefix of an object store: S3, or memory |
//!
//! Files are whole or not there, names are paths with `/` below the store's location, and nothing that a caller passes
//! leads out of it. All calls block; they may be made from any thread, inside a runtime or not.

mod folder;
mod object;

use bytes::Bytes;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The longest name of a file in a store, in bytes.
pub const NAME_BYTES: usize = 1024;
/// The longest part of a name between two `/`, in bytes.
pub const PART_BYTES: usize = 200;
/// What the store's own names begin with: they are never listed, and refused when asked for.
const HIDDEN: &str = ".store-";

/// What went wrong in a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A location that cannot be opened.
    #[error(
        "W0040: `{location}` is no place for checkpoints: {why}; give a folder, `s3://bucket/prefix` or `memory://name`"
    )]
    Location {
        /// As given.
        location: String,
        /// Why.
        why: String,
    },
    /// A name that no file of a store can have.
    #[error("W0041: `{path}` is no name below a store: {why}")]
    Name {
        /// As given, or its beginning.
        path: String,
        /// Why.
        why: &'static str,
    },
    /// There is no such file.
    #[error("W0042: {path} is not there")]
    NotFound {
        /// The file.
        path: String,
    },
    /// No room is left.
    #[error(
        "W0043: no room is left to {what} {path}: {why}; free some, raise the quota, or keep fewer checkpoints; what was there before is intact"
    )]
    Full {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: String,
        /// As the system says it.
        why: String,
    },
    /// A file beyond the limit.
    #[error("W0044: {path} has {size} bytes, and {limit} are the most")]
    TooLarge {
        /// The file.
        path: String,
        /// What it has, or would have.
        size: u64,
        /// What it may have.
        limit: u64,
    },
    /// Bytes that a file does not have.
    #[error(
        "W0045: bytes {start} to {end} of {path} are asked for, and it has {size}: it is cut short, or another file"
    )]
    Range {
        /// The file.
        path: String,
        /// The first byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
        /// What it has.
        size: u64,
    },
    /// The store does not let us.
    #[error(
        "W0046: it is not allowed to {what} {path}: {why}; check the owner of the folder, or the AWS_* credentials"
    )]
    Denied {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: String,
        /// As the store says it.
        why: String,
    },
    /// Anything else: the disk or the network.
    #[error("W0047: cannot {what} {path}: {why}; check the disk or the connection to the store and try again")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: String,
        /// As the system says it.
        why: String,
    },
}

/// Where checkpoints lie: a folder, or a prefix of an object store.
#[derive(Clone)]
pub struct Store {
    location: Arc<str>,
    backend: Arc<dyn Backend>,
}

/// What a store needs of what is below it. Names are valid; the empty one is the top.
trait Backend: Send + Sync {
    fn contains(&self, other: &str) -> bool;
    fn list(&self, path: &str) -> Result<Vec<String>, StoreError>;
    fn put(&self, path: &str, parts: &mut dyn Iterator<Item = Bytes>) -> Result<u64, StoreError>;
    fn get(&self, path: &str, limit: u64) -> Result<Bytes, StoreError>;
    /// The range is not empty; one that the file does not have is [`StoreError::Range`].
    fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
    fn size(&self, path: &str) -> Result<Option<u64>, StoreError>;
    fn delete(&self, path: &str) -> Result<(), StoreError>;
    /// What people call a file.
    fn full(&self, path: &str) -> String;
}

/// A location, taken apart.
#[derive(Debug, PartialEq)]
enum Location<'a> {
    Folder(&'a Path),
    Objects { scheme: &'a str, bucket: &'a str, prefix: &'a str },
}

impl<'a> Location<'a> {
    fn parse(location: &'a str) -> Result<Location<'a>, StoreError> {
        let refuse = |why: &str| Err(StoreError::Location { location: shown(location), why: why.into() });
        if location.is_empty() || location.len() > 4096 || location.contains('\0') {
            return refuse("it is empty, or beyond all bounds");
        }
        let Some((scheme, rest)) = location.split_once("://") else {
            return Ok(Location::Folder(Path::new(location)));
        };
        match scheme {
            "file" if !rest.starts_with('/') => refuse("`file://` is followed by an absolute path"),
            "file" if rest.contains('%') => refuse("with `%` in it, give the path without `file://`"),
            "file" => Ok(Location::Folder(Path::new(rest))),
            "s3" | "memory" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
                let good = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
                if bucket.is_empty() || bucket.len() > 255 || !bucket.chars().all(good) {
                    return refuse("it does not name a bucket");
                }
                match fault(prefix).filter(|_| !prefix.is_empty()) {
                    Some(why) => refuse(why),
                    None => Ok(Location::Objects { scheme, bucket, prefix }),
                }
            }
            _ => refuse("this kind is not known"),
        }
    }
}

/// The beginning of a text from outside, for a message.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(120).collect();
    if short.len() < text.len() { format!("{short}…") } else { short }
}

/// Why a text cannot be the name of a file in a store, if it cannot.
fn fault(path: &str) -> Option<&'static str> {
    let why = if path.is_empty() {
        "it is empty"
    } else if path.len() > NAME_BYTES || path.split('/').any(|p| p.len() > PART_BYTES) {
        "it is too long"
    } else if path.split('/').any(|p| matches!(p, "" | "." | "..")) {
        "it must be relative, with nothing empty, `.` or `..` between its `/`"
    } else if path.contains(|c: char| c.is_control() || c == '\\') {
        "it has a character that not every store can keep"
    } else if path.split('/').any(|p| p.starts_with(HIDDEN)) {
        "names that begin with `.store-` are the store's own"
    } else {
        return None;
    };
    Some(why)
}

fn check(path: &str) -> Result<(), StoreError> {
    fault(path).map_or(Ok(()), |why| Err(StoreError::Name { path: shown(path), why }))
}

impl Store {
    /// Opens `path/to/folder`, `file:///path`, `s3://bucket/prefix` or `memory://name` (one shared store in memory for
    /// each name and process, for tests). Nothing is made or asked for yet.
    ///
    /// S3 is set up by the usual variables: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and for other
    /// servers than Amazon's `AWS_ENDPOINT_URL`, with `AWS_ALLOW_HTTP=true` if it does not encrypt.
    ///
    /// # Errors
    /// A location of no known kind, or settings that make no sense.
    pub fn open(location: &str) -> Result<Store, StoreError> {
        match Location::parse(location)? {
            Location::Folder(path) => {
                let folder = folder::Folder::open(location, path)?;
                Ok(Store { location: folder.full("").into(), backend: Arc::new(folder) })
            }
            Location::Objects { scheme, bucket, prefix } => {
                let objects = object::Objects::open(location, scheme, bucket, prefix)?;
                Ok(Store { location: location.into(), backend: Arc::new(objects) })
            }
        }
    }

    /// The location as given to [`Store::open`]; for folders, the absolute path.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Whether `other` is this store's location or lies below it (`..` and symlinks resolved for folders): what a worker
    /// may be asked to write. What cannot be resolved is not contained.
    pub fn contains(&self, other: &str) -> bool {
        self.backend.contains(other)
    }

    /// Names right below `path` (empty for the top): folders and files, sorted. Below what is not there, there is nothing.
    ///
    /// # Errors
    /// A name that is none; a store that does not answer.
    pub fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        if !path.is_empty() {
            check(path)?;
        }
        let mut names = self.backend.list(path)?;
        names.retain(|n| !n.starts_with(HIDDEN));
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Writes a file whole: it is there completely and durably when this returns, in place of the one that had its name,
    /// or not at all. The parts are written one after the other and make no second copy of it. Gives its bytes.
    ///
    /// # Errors
    /// A name that is none; [`StoreError::Full`]; a store that fails. An error leaves the file as it was.
    pub fn put(&self, path: &str, parts: &mut dyn Iterator<Item = Bytes>) -> Result<u64, StoreError> {
        check(path)?;
        self.backend.put(path, parts)
    }

    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    /// A file that is not there, is larger, or cannot be read.
    pub fn get(&self, path: &str, limit: u64) -> Result<Bytes, StoreError> {
        check(path)?;
        self.backend.get(path, limit)
    }

    /// Reads a range of a file.
    ///
    /// # Errors
    /// A file that is not there, ends before the range does, or cannot be read.
    pub fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check(path)?;
        if range.start < range.end {
            return self.backend.get_range(path, range);
        }
        // No store is asked for no bytes: most refuse.
        match self.size(path)? {
            Some(size) if range.start == range.end && range.end <= size => Ok(Bytes::new()),
            Some(size) => {
                Err(StoreError::Range { path: self.backend.full(path), start: range.start, end: range.end, size })
            }
            None => Err(StoreError::NotFound { path: self.backend.full(path) }),
        }
    }

    /// Bytes of a file; None if it is not there.
    ///
    /// # Errors
    /// A name that is none; a store that does not answer.
    pub fn size(&self, path: &str) -> Result<Option<u64>, StoreError> {
        check(path)?;
        self.backend.size(path)
    }

    /// Deletes a file, or a folder and everything below it (empty: all that the store has); what is already gone is no
    /// error. A local folder is renamed out of sight first, so that nobody sees half of it; an object store deletes one
    /// file after the other, so delete what others know it by first.
    ///
    /// # Errors
    /// A name that is none; a store that fails.
    pub fn delete(&self, path: &str) -> Result<(), StoreError> {
        if !path.is_empty() {
            check(path)?;
            return self.backend.delete(path);
        }
        self.list("")?.iter().try_for_each(|name| self.backend.delete(name))
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.location)
    }
}
