//! Checkpoints: all variables of a session in one folder, committed by rename.
//!
//! `DIR/step-00000020/variables.safetensors` holds every variable whole, so that it loads on any mesh;
//! `manifest.json` beside it names the step, the seed, what the program was configured to, and a BLAKE3 hash of each
//! tensor. A folder is written under another name and renamed when all of it is on disk: a folder that has its name is
//! complete, or damaged afterwards, which the hashes tell.

use crate::error::Failure;
use crate::session::Session;
use mesh::array::Array;
use mesh::dim::DType;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Steps done: the next one has this number.
    pub step: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Samples drawn so far, for the reader to go on behind them.
    pub samples: u64,
    /// Mesh and layout that wrote it, for people.
    pub written_on: String,
    /// What the program was configured to, as it likes.
    pub config: serde_json::Value,
    /// BLAKE3 of each variable's bytes, by name.
    pub tensors: BTreeMap<String, String>,
}

/// Version of the format that this code writes.
const VERSION: u32 = 1;
const TENSORS: &str = "variables.safetensors";
const MANIFEST: &str = "manifest.json";
/// Largest manifest that is read.
const MANIFEST_BYTES: u64 = 64 << 20;

/// What to write beside the variables.
#[derive(Clone, Debug)]
pub struct Position {
    /// Steps done.
    pub step: u32,
    /// Samples drawn so far.
    pub samples: u64,
    /// What the program was configured to.
    pub config: serde_json::Value,
}

fn failed(what: &str, path: &Path, why: impl std::fmt::Display) -> Failure {
    Failure::Checkpoint(format!("C0002: cannot {what} {}: {why}", path.display()))
}

fn damaged(path: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::Checkpoint(format!("C0003: the checkpoint {} is damaged: {what}", path.display()))
}

fn dtype_of(d: DType) -> Dtype {
    match d {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::Bool => Dtype::BOOL,
    }
}

/// Writes a checkpoint of a session below `dir` and deletes all but the `keep` newest. Gives its folder.
pub fn save(session: &Session, dir: &Path, position: &Position, keep: usize) -> Result<PathBuf, Failure> {
    let mut bytes = Vec::new();
    let mut tensors = BTreeMap::new();
    for v in &session.program().variables {
        let data = session.variable(&v.name)?.to_bytes();
        tensors.insert(v.name.to_string(), blake3::hash(&data).to_hex().to_string());
        bytes.push((v.name.to_string(), v.ty.clone(), data));
    }
    let views = bytes
        .iter()
        .map(|(name, ty, data)| TensorView::new(dtype_of(ty.dtype), ty.shape(), data).map(|view| (name.clone(), view)));
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(|e| failed("write", dir, e))?;
    let file = safetensors::serialize(views, None).map_err(|e| failed("write", dir, e))?;
    let manifest = Manifest {
        version: VERSION,
        step: position.step,
        seed: session.seed(),
        samples: position.samples,
        written_on: format!("mesh {}, layout {}", session.plan().mesh, session.plan().layout),
        config: position.config.clone(),
        tensors,
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| failed("write", dir, e))?;

    let target = dir.join(format!("step-{:08}", position.step));
    let staging = dir.join(format!(".writing-{:08}-{}", position.step, std::process::id()));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        let _ = fs::remove_dir_all(&staging);
        fs::create_dir(&staging)?;
        for (name, data) in [(TENSORS, &file), (MANIFEST, &text)] {
            let mut f = File::create(staging.join(name))?;
            f.write_all(data)?;
            f.sync_all()?;
        }
        File::open(&staging)?.sync_all()?;
        // The same step again, after a resume: the new one takes its place.
        let old = dir.join(format!(".old-{:08}-{}", position.step, std::process::id()));
        if target.exists() {
            fs::rename(&target, &old)?;
        }
        fs::rename(&staging, &target)?;
        File::open(dir)?.sync_all()?;
        if old.exists() {
            fs::remove_dir_all(&old)?;
        }
        Ok(())
    };
    write().map_err(|e| failed("write", &target, e))?;
    // Later steps are left from before a resume: damaged, or of a course that this run has not taken.
    let mut kept = list(dir);
    let end = kept.iter().position(|p| *p == target).map_or(kept.len(), |at| at + 1);
    let mut gone = kept.split_off(end);
    gone.extend(kept.drain(..kept.len().saturating_sub(keep.max(1))));
    for path in gone {
        // One that cannot be deleted does no harm.
        let _ = fs::remove_dir_all(path);
    }
    Ok(target)
}

/// The checkpoints below a folder, by step.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u32>().ok();
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(|e| e.ok());
    let mut found: Vec<(u32, PathBuf)> = entries.filter_map(|e| Some((step(&e.path())?, e.path()))).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A checkpoint in memory, every hash checked.
pub struct Loaded {
    /// What it says of itself.
    pub manifest: Manifest,
    /// Its folder.
    pub path: PathBuf,
    arrays: Vec<(String, Array)>,
}

/// Reads one checkpoint.
pub fn load(path: &Path) -> Result<Loaded, Failure> {
    let text = path.join(MANIFEST);
    let size = fs::metadata(&text).map_err(|e| failed("read", &text, e))?.len();
    if size > MANIFEST_BYTES {
        return Err(damaged(path, format!("its manifest has {size} bytes")));
    }
    let manifest = fs::read(&text).map_err(|e| failed("read", &text, e))?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|e| damaged(path, format!("manifest: {e}")))?;
    if manifest.version != VERSION {
        let why = format!("it is of format {}, and this program reads format {VERSION}", manifest.version);
        return Err(failed("read", path, why));
    }
    let bytes = fs::read(path.join(TENSORS)).map_err(|e| failed("read", &path.join(TENSORS), e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, e))?;
    let mut arrays = Vec::new();
    for (name, hash) in &manifest.tensors {
        let view = file.tensor(name).map_err(|e| damaged(path, format!("tensor `{name}`: {e}")))?;
        if blake3::hash(view.data()).to_hex().as_str() != hash {
            return Err(damaged(path, format!("tensor `{name}` does not have its hash")));
        }
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::I32 => DType::I32,
            Dtype::BOOL => DType::Bool,
            other => return Err(damaged(path, format!("tensor `{name}` is {other:?}"))),
        };
        let array = Array::from_bytes(dtype, view.shape(), view.data());
        arrays.push((name.clone(), array.ok_or_else(|| damaged(path, format!("tensor `{name}` is cut short")))?));
    }
    Ok(Loaded { manifest, path: path.to_path_buf(), arrays })
}

/// Reads the newest checkpoint below a folder that is good; a damaged one is reported to `warn` and passed over.
pub fn load_newest(dir: &Path, mut warn: impl FnMut(&Failure)) -> Result<Loaded, Failure> {
    for path in list(dir).iter().rev() {
        match load(path) {
            Ok(loaded) => return Ok(loaded),
            Err(e) => warn(&e),
        }
    }
    Err(Failure::Checkpoint(format!("C0004: there is no good checkpoint in {}", dir.display())))
}

impl Loaded {
    /// Sets a session's variables, on whatever mesh it runs.
    ///
    /// # Errors
    /// A variable of the program that the checkpoint lacks or has with another type; the session is left as it was.
    pub fn restore(&self, session: &mut Session) -> Result<(), Failure> {
        let mut found = Vec::new();
        for v in &session.program().variables {
            let array = self.arrays.iter().find(|(n, _)| **n == *v.name).map(|(_, a)| a);
            let fits = array.filter(|a| a.dtype() == v.ty.dtype && a.shape() == v.ty.shape());
            let Some(array) = fits else {
                let has = array.map_or("lacks it".into(), |a| format!("has {} {:?}", a.dtype(), a.shape()));
                let text = format!(
                    "C0005: the program's variable `{}` is {}, and the checkpoint {} {has}; resume with the \
                     configuration that it was written with (`config` in its {MANIFEST})",
                    v.name,
                    v.ty,
                    self.path.display()
                );
                return Err(Failure::Checkpoint(text));
            };
            found.push((v.name.clone(), array));
        }
        for (name, array) in found {
            session.set_variable(&name, array)?;
        }
        Ok(())
    }
}
