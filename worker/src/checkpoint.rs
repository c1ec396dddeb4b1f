//! A checkpoint's format, and a worker's part in writing and reading it.
//!
//! A checkpoint is a folder in a [`Store`]: a safetensors file for each device (`shard-00002.safetensors`) with the parts
//! of variables that the device holds, each part once over all devices, and `manifest.json`, which names every part with
//! its BLAKE3. The manifest is written last: a folder that has one is complete, or was damaged afterwards, which the
//! hashes tell. It is read on any mesh: a device takes what overlaps its own part of a variable.
//!
//! Writing is done in two steps, so that training goes on meanwhile: [`Snapshot::copy`] and, in the background,
//! [`Snapshot::write`]. All randomness is a function of seed and step, which the manifest has: there is no other state.

use crate::group::DeviceGroup;
use crate::store::{Store, StoreError};
use bytes::Bytes;
use mesh::dim::{DType, Name};
use mesh::plan::ProgramPlan;
use mesh::program::Program;
use mesh::region::Region;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// Version of the format.
pub const VERSION: u32 = 2;
/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// Largest manifest, and largest head of a shard, that is read.
const MANIFEST_BYTES: u64 = 256 << 20;
const HEAD_BYTES: u64 = 64 << 20;

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Name of its folder.
    pub folder: String,
    /// Steps done: the next one has this number.
    pub step: u32,
    /// Seed of the run.
    pub seed: u64,
    /// The data cursor: samples drawn so far, for the reader to go on behind them.
    pub samples: u64,
    /// [`crate::wire::hash`] of the program.
    pub program: String,
    /// The program's stage; empty if it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stage: String,
    /// Mesh that wrote it.
    pub mesh: String,
    /// Layout that wrote it.
    pub layout: String,
    /// What the program was configured to, as it likes.
    pub config: serde_json::Value,
    /// Bytes of each file.
    pub files: BTreeMap<String, u64>,
    /// Variables by name.
    pub tensors: BTreeMap<String, Tensor>,
}

/// A variable in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Element type, as `f32`.
    pub dtype: String,
    /// Extents of the whole.
    pub shape: Vec<usize>,
    /// Where it lies: boxes that are all of it together, each once.
    pub parts: Vec<Part>,
}

/// A box of a variable, under the variable's name in a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The shard.
    pub file: String,
    /// Where the box begins.
    pub start: Vec<usize>,
    /// Its extents.
    pub shape: Vec<usize>,
    /// BLAKE3 of its bytes, row-major and little-endian.
    pub blake3: String,
}

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It is not what was written.
    #[error("W0050: the checkpoint {folder} is damaged: {file}: {what}")]
    Damaged {
        /// Its folder.
        folder: String,
        /// The file.
        file: String,
        /// What is wrong with it; names the tensor.
        what: String,
    },
    /// It is of another program.
    #[error(
        "W0051: the program's variable `{variable}` is {wanted}, and the checkpoint {folder} {has}; resume with the configuration that it was written with (`config` in its {MANIFEST})"
    )]
    Mismatch {
        /// The variable.
        variable: Name,
        /// Its type.
        wanted: String,
        /// The checkpoint's folder.
        folder: String,
        /// What it has instead.
        has: String,
    },
    /// It is written by a later or an earlier program.
    #[error("W0052: the checkpoint {folder} is of format {version}, and this program reads format {VERSION}")]
    Version {
        /// Its folder.
        folder: String,
        /// Its format.
        version: u64,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CheckpointError {
    /// Whether an older checkpoint may do.
    pub fn concerns_one(&self) -> bool {
        match self {
            CheckpointError::Damaged { .. } | CheckpointError::Version { .. } | CheckpointError::Store(_) => true,
            CheckpointError::Mismatch { .. } => false,
        }
    }
}

/// A manifest as it lies in its file: with a hash of its text, since a changed digit in it would be a changed run.
#[derive(Serialize, Deserialize)]
struct Sealed<'a> {
    blake3: String,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

impl Manifest {
    /// Its file's text.
    pub fn to_bytes(&self) -> Bytes {
        let text = serde_json::value::to_raw_value(self).expect("a manifest's keys are texts");
        let sealed = Sealed { blake3: blake3::hash(text.get().as_bytes()).to_hex().to_string(), manifest: &text };
        serde_json::to_vec(&sealed).expect("as above").into()
    }

    /// Adds a part that is written.
    pub fn add(&mut self, written: Written) {
        self.files.insert(written.part.file.clone(), written.file_bytes);
        if let Some(tensor) = self.tensors.get_mut(&written.variable) {
            tensor.parts.push(written.part);
        }
    }

    /// Reads that of a folder; gives the hash of its text as well.
    ///
    /// # Errors
    /// None there, or one that is not this folder's, or damaged.
    pub fn read(store: &Store, folder: &str) -> Result<(Manifest, String), CheckpointError> {
        let damaged = |what: String| CheckpointError::Damaged { folder: folder.into(), file: MANIFEST.into(), what };
        let bytes = store.get(&format!("{folder}/{MANIFEST}"), MANIFEST_BYTES)?;
        let sealed: Sealed = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        let text = sealed.manifest.get();
        if blake3::hash(text.as_bytes()).to_hex().as_str() != sealed.blake3 {
            return Err(damaged("it does not have its hash".into()));
        }
        #[derive(Deserialize)]
        struct Format {
            version: u64,
        }
        let Format { version } = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        if version != u64::from(VERSION) {
            return Err(CheckpointError::Version { folder: folder.into(), version });
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        if manifest.folder != folder {
            return Err(damaged(format!("it is that of {}", manifest.folder)));
        }
        for (name, t) in &manifest.tensors {
            let dims = t.shape.len();
            let inside = |p: &Part| {
                let fits = |((s, n), whole): ((&usize, &usize), &usize)| s.checked_add(*n).is_some_and(|e| e <= *whole);
                p.start.len() == dims && p.shape.len() == dims && p.start.iter().zip(&p.shape).zip(&t.shape).all(fits)
            };
            if dims > 16 || !t.parts.iter().all(inside) {
                return Err(damaged(format!("tensor `{name}` has a part outside of itself")));
            }
        }
        for (file, bytes) in &manifest.files {
            let damaged = |what: String| CheckpointError::Damaged { folder: folder.into(), file: file.clone(), what };
            match store.size(&format!("{folder}/{file}"))? {
                Some(there) if there == *bytes => {}
                Some(there) => return Err(damaged(format!("it has {there} bytes and was written with {bytes}"))),
                None => {
                    let holds = |t: &&String| manifest.tensors[*t].parts.iter().any(|p| p.file == *file);
                    let first = manifest.tensors.keys().find(holds).map_or("nothing", |t| t);
                    return Err(damaged(format!("it is not there; it holds tensor `{first}` among others")));
                }
            }
        }
        Ok((manifest, sealed.blake3))
    }

    /// The parts that overlap a box of a variable of that type; they must cover it.
    fn parts(
        &self,
        variable: &Name,
        dtype: DType,
        shape: &[usize],
        at: &Region,
    ) -> Result<Vec<(&Part, Region)>, CheckpointError> {
        let mismatch = |has: String| CheckpointError::Mismatch {
            variable: variable.clone(),
            wanted: format!("{dtype} {shape:?}"),
            folder: self.folder.clone(),
            has,
        };
        let tensor = self.tensors.get(&**variable).ok_or_else(|| mismatch("lacks it".into()))?;
        if tensor.dtype != dtype.to_string() || tensor.shape != shape {
            return Err(mismatch(format!("has {} {:?}", tensor.dtype, tensor.shape)));
        }
        let region = |p: &Part| {
            let ranges = p.start.iter().zip(&p.shape).map(|(s, n)| *s..s + n);
            Region(at.0.iter().map(|(n, _)| n.clone()).zip(ranges).collect())
        };
        let overlaps: Vec<(&Part, Region)> =
            tensor.parts.iter().map(|p| (p, region(p))).filter(|(_, r)| r.overlaps(at)).collect();
        let disjoint = overlaps.iter().enumerate().all(|(i, (_, a))| overlaps[..i].iter().all(|(_, b)| !a.overlaps(b)));
        let covered: usize = overlaps.iter().map(|(_, r)| r.intersect(at).elements()).sum();
        if !disjoint || covered != at.elements() {
            let what = format!("the parts of tensor `{variable}` are not all of it, each once");
            return Err(CheckpointError::Damaged { folder: self.folder.clone(), file: MANIFEST.into(), what });
        }
        Ok(overlaps)
    }
}

fn dtype_of(d: DType) -> Dtype {
    match d {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        DType::Bool => Dtype::BOOL,
    }
}

/// The variables of some devices at one moment.
pub struct Snapshot {
    shards: Vec<Shard>,
}

/// What one device writes.
struct Shard {
    device: usize,
    parts: Vec<(Name, DType, Region, Bytes)>,
}

/// A part that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The variable.
    pub variable: String,
    /// Where it lies.
    pub part: Part,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

impl Snapshot {
    /// Copies what devices have to write: `own` are the numbers in the mesh of `group`'s devices. Of the devices that hold
    /// the same part of a variable one writes it; they take turns from variable to variable.
    pub fn copy(program: &Program, plan: &ProgramPlan, own: &[usize], group: &DeviceGroup) -> Snapshot {
        let mut shards: Vec<Shard> = own.iter().map(|d| Shard { device: *d, parts: vec![] }).collect();
        for (v, variable) in program.variables.iter().enumerate() {
            for (at, &device) in own.iter().enumerate() {
                let region = &plan.variables[device][v].0.region;
                let holders: Vec<usize> =
                    (0..plan.variables.len()).filter(|d| plan.variables[*d][v].0.region == *region).collect();
                if !region.is_empty() && holders[v % holders.len()] == device {
                    let bytes = group.device(at).variable_bytes(v);
                    shards[at].parts.push((variable.name.clone(), variable.ty.dtype, region.clone(), bytes));
                }
            }
        }
        Snapshot { shards }
    }

    /// Writes the shards into a folder of a store. What is named in the result is there for good.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn write(&self, store: &Store, folder: &str) -> Result<Vec<Written>, StoreError> {
        let mut all = Vec::new();
        for shard in self.shards.iter().filter(|s| !s.parts.is_empty()) {
            let file = format!("shard-{:05}.safetensors", shard.device);
            let head = std::iter::once(shard.head());
            let file_bytes =
                store.put(&format!("{folder}/{file}"), &mut head.chain(shard.parts.iter().map(|p| p.3.clone())))?;
            all.extend(shard.parts.iter().map(|(variable, _, region, bytes)| Written {
                variable: variable.to_string(),
                part: Part {
                    file: file.clone(),
                    start: region.0.iter().map(|(_, r)| r.start).collect(),
                    shape: region.shape(),
                    blake3: blake3::hash(bytes).to_hex().to_string(),
                },
                file_bytes,
            }));
        }
        Ok(all)
    }
}

/// A tensor in the head of a safetensors file; offsets are those of its data.
#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

impl Shard {
    /// The head of a safetensors file: its length, then names, types and places as JSON.
    fn head(&self) -> Bytes {
        let mut at = 0;
        let entries: BTreeMap<&str, Entry> = self
            .parts
            .iter()
            .map(|(name, dtype, region, bytes)| {
                let data_offsets = [at, at + bytes.len()];
                at = data_offsets[1];
                (&**name, Entry { dtype: dtype_of(*dtype), shape: region.shape(), data_offsets })
            })
            .collect();
        let mut json = serde_json::to_vec(&entries).expect("names are texts");
        // Data begin at a multiple of 8.
        json.resize(json.len().next_multiple_of(8), b' ');
        [&(json.len() as u64).to_le_bytes()[..], &json].concat().into()
    }
}

/// Reads what the devices of a worker hold, checks it, and sets their variables when all of it is good.
///
/// # Errors
/// A damaged part, named; a variable that the checkpoint lacks or has with another type. Nothing is set then.
pub fn restore(
    store: &Store,
    manifest: &Manifest,
    program: &Program,
    plan: &ProgramPlan,
    own: &[usize],
    group: &DeviceGroup,
) -> Result<(), CheckpointError> {
    let mut heads = Heads { store, folder: &manifest.folder, known: BTreeMap::new() };
    let mut found = Vec::new();
    for (v, variable) in program.variables.iter().enumerate() {
        // Devices often hold the same part.
        let mut read: Vec<(&Region, Bytes)> = Vec::new();
        for (at, &device) in own.iter().enumerate() {
            let region = &plan.variables[device][v].0.region;
            let bytes = match read.iter().find(|(r, _)| *r == region) {
                Some((_, bytes)) => bytes.clone(),
                None => {
                    let dtype = variable.ty.dtype;
                    let mut bytes = vec![0; region.elements() * dtype.bytes()];
                    for (part, from) in manifest.parts(&variable.name, dtype, &variable.ty.shape(), region)? {
                        let held = heads.read(&variable.name, dtype, part)?;
                        copy_box(&held, &from, &mut bytes, region, dtype.bytes());
                    }
                    let bytes = Bytes::from(bytes);
                    read.push((region, bytes.clone()));
                    bytes
                }
            };
            found.push((at, v, bytes));
        }
    }
    for (at, v, bytes) in found {
        group.device(at).set_variable_bytes(v, &bytes);
    }
    Ok(())
}

/// The heads of shards that were read so far: where each tensor's bytes lie.
struct Heads<'a> {
    store: &'a Store,
    folder: &'a str,
    /// By file: where its data begin, and its tensors.
    known: BTreeMap<String, (u64, BTreeMap<String, Entry>)>,
}

impl Heads<'_> {
    /// Reads a part of a variable and checks it.
    fn read(&mut self, variable: &Name, dtype: DType, part: &Part) -> Result<Bytes, CheckpointError> {
        let (folder, path) = (self.folder, format!("{}/{}", self.folder, part.file));
        let damaged = |what: String| CheckpointError::Damaged {
            folder: folder.into(),
            file: part.file.clone(),
            what: format!("tensor `{variable}`: {what}"),
        };
        if !self.known.contains_key(&part.file) {
            let length = self.store.get_range(&path, 0..8)?;
            let length = <[u8; 8]>::try_from(&length[..]).map(u64::from_le_bytes).unwrap_or(u64::MAX);
            if length > HEAD_BYTES {
                return Err(damaged("the file's head is longer than any".into()));
            }
            let head = self.store.get_range(&path, 0..8 + length)?;
            let head = serde_json::from_slice(&head[8..]).map_err(|e| damaged(e.to_string()))?;
            self.known.insert(part.file.clone(), (8 + length, head));
        }
        let (data, head) = &self.known[&part.file];
        let Some(entry) = head.get(&**variable) else { return Err(damaged("it is not in the file".into())) };
        let [begin, end] = entry.data_offsets.map(|o| data.saturating_add(o as u64));
        let bytes = part.shape.iter().try_fold(dtype.bytes(), |n, s| n.checked_mul(*s));
        if entry.dtype != dtype_of(dtype)
            || entry.shape != part.shape
            || end.checked_sub(begin) != bytes.map(|b| b as u64)
        {
            return Err(damaged(format!("it is {:?} {:?} there, in bytes {begin} to {end}", entry.dtype, entry.shape)));
        }
        let bytes = self.store.get_range(&path, begin..end)?;
        if blake3::hash(&bytes).to_hex().as_str() != part.blake3 {
            return Err(damaged("it does not have its hash".into()));
        }
        Ok(bytes)
    }
}

/// Copies what two boxes share, from the bytes of the one to the bytes of the other.
fn copy_box(from: &[u8], from_at: &Region, to: &mut [u8], to_at: &Region, element: usize) {
    let both = from_at.intersect(to_at);
    // The last dimension is one run.
    let (outer, run) = both.0.split_at(both.0.len().saturating_sub(1));
    let run = run.first().map_or(0..1, |(_, r)| r.clone());
    let offset = |at: &Region, index: &[usize]| {
        let outer = at.0.iter().zip(index).fold(0, |o, ((_, r), i)| o * r.len() + i - r.start);
        match at.0.last() {
            Some((_, r)) => (outer * r.len() + run.start - r.start) * element,
            None => 0,
        }
    };
    let bytes = run.len() * element;
    let mut index: Vec<usize> = outer.iter().map(|(_, r)| r.start).collect();
    for _ in 0..outer.iter().map(|(_, r)| r.len()).product() {
        let (source, target) = (offset(from_at, &index), offset(to_at, &index));
        to[target..target + bytes].copy_from_slice(&from[source..source + bytes]);
        for d in (0..outer.len()).rev() {
            index[d] += 1;
            if index[d] < outer[d].1.end {
                break;
            }
            index[d] = outer[d].1.start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(ranges: &[std::ops::Range<usize>]) -> Region {
        Region(ranges.iter().enumerate().map(|(i, r)| (format!("d{i}").into(), r.clone())).collect())
    }

    /// Element `i` of the whole has the value `i`.
    fn bytes(shape: &[usize], at: &Region) -> Vec<u8> {
        let mut all = vec![];
        let mut index: Vec<usize> = at.0.iter().map(|(_, r)| r.start).collect();
        for _ in 0..at.elements() {
            all.push(index.iter().zip(shape).fold(0, |o, (i, n)| o * n + i) as u8);
            for d in (0..index.len()).rev() {
                index[d] += 1;
                if index[d] < at.0[d].1.end {
                    break;
                }
                index[d] = at.0[d].1.start;
            }
        }
        all
    }

    #[test]
    fn boxes_are_put_together_from_boxes_cut_otherwise() {
        let shape = [4, 5, 6];
        let quarters = [region(&[0..1, 0..5, 0..6]), region(&[1..4, 0..3, 0..6]), region(&[1..4, 3..5, 0..6])];
        for wanted in [region(&[0..4, 0..5, 0..6]), region(&[0..3, 2..4, 1..5]), region(&[2..3, 3..4, 5..6])] {
            let mut got = vec![0; wanted.elements()];
            for part in &quarters {
                copy_box(&bytes(&shape, part), part, &mut got, &wanted, 1);
            }
            assert_eq!(got, bytes(&shape, &wanted), "{wanted}");
        }
        let mut scalar = [0];
        copy_box(&[7], &region(&[]), &mut scalar, &region(&[]), 1);
        assert_eq!(scalar, [7]);
    }
}
