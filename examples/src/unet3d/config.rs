//! What a run is configured to: defaults, then a TOML file, then the command line, then `--set key=value`.

use mesh::error::nearest;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Normalisation after each convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// By the statistics of the batch and all space, as published.
    Batch,
    /// By those of each case and channel.
    Instance,
    /// By those of each case and group of channels.
    Group,
}

/// Optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adafactor, as published.
    Adafactor,
    /// Adam.
    Adam,
    /// Gradient descent with momentum 0.9.
    Sgd,
}

/// Element type of the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16; not yet.
    Bf16,
}

/// A run's configuration. Every field is a key of the TOML file and of `--set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Device mesh: axes with sizes, `x=2,y=2`.
    pub mesh: String,
    /// Layout rules, `x:x,y:y`; empty: each axis splits the dimension of its name, and `data` the batch.
    pub layout: String,
    /// Filters at the first level; each level below has twice as many.
    pub base: usize,
    /// Steps to train.
    pub steps: u32,
    /// Seed of everything random.
    pub seed: u64,
    /// Normalisation.
    pub norm: Norm,
    /// Optimizer.
    pub optimizer: OptimizerKind,
    /// Learning rate.
    pub rate: f32,
    /// Element type.
    pub dtype: Dtype,
    /// Share of activations that drop-out sets to 0.
    pub dropout: f32,
    /// Weight of a voxel of an organ in the cross-entropy; the background's is 1.
    pub organ_weight: f32,
    /// Augmented views a step.
    pub batch: usize,
    /// Whether views are flipped, turned and shifted in intensity at random.
    pub augment: bool,
    /// `ct`, `phantom` or a NIfTI file; empty: `ct`, or the phantom where that cannot be fetched.
    pub data: String,
    /// NIfTI file with the label of each voxel of `data`.
    pub labels: String,
    /// Extents to resample to: `64` or `64x64x48`; empty: as they are.
    pub size: String,
    /// Extents of the block in the middle to train on; empty: all.
    pub crop: String,
    /// Threads of each device; 0: the machine's cores shared out.
    pub threads: usize,
    /// Memory that each device may use, `2GiB`; empty: no limit.
    pub memory: String,
    /// Steps between checkpoints; one is always written at the end.
    pub checkpoint_every: u32,
    /// Checkpoints to keep.
    pub keep: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mesh: "x=2,y=2".into(),
            layout: String::new(),
            base: 8,
            steps: 150,
            seed: 1,
            norm: Norm::Batch,
            optimizer: OptimizerKind::Adam,
            rate: 0.003,
            dtype: Dtype::F32,
            dropout: 0.0,
            organ_weight: 8.0,
            batch: 1,
            augment: false,
            data: String::new(),
            labels: String::new(),
            size: String::new(),
            crop: String::new(),
            threads: 0,
            memory: String::new(),
            checkpoint_every: 50,
            keep: 2,
        }
    }
}

/// A mistake in the configuration or in the data.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistake(pub String);

/// A mistake with that text.
pub fn mistake<T>(text: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake(text.into()))
}

impl Config {
    /// The keys there are.
    fn keys() -> Vec<String> {
        let table = toml::Table::try_from(Config::default()).unwrap_or_default();
        table.keys().cloned().collect()
    }

    /// This configuration with some keys set.
    pub fn with(self, changes: &toml::Table) -> Result<Config, Mistake> {
        let mut table = toml::Table::try_from(&self).map_err(|e| Mistake(e.to_string()))?;
        let keys = Config::keys();
        for (key, value) in changes {
            let Some(old) = table.get(key) else {
                let near = nearest(key, keys.iter().map(String::as_str));
                let help = near.map_or(format!("the keys are {}", keys.join(", ")), |n| format!("did you mean `{n}`?"));
                return mistake(format!("there is no key `{key}`\n  help: {help}"));
            };
            // `rate = 1` is meant as 1.0.
            let value = match (old, value) {
                (toml::Value::Float(_), toml::Value::Integer(i)) => toml::Value::Float(*i as f64),
                _ => value.clone(),
            };
            table.insert(key.clone(), value);
        }
        table.try_into().map_err(|e: toml::de::Error| Mistake(format!("the configuration: {}", e.message())))
    }

    /// Reads a TOML file into this configuration.
    pub fn with_file(self, path: &Path) -> Result<Config, Mistake> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Mistake(format!("cannot read {}: {e}", path.display())))?;
        let table: toml::Table = text.parse().map_err(|e| Mistake(format!("{}: {e}", path.display())))?;
        self.with(&table).map_err(|e| Mistake(format!("{}: {e}", path.display())))
    }

    /// Applies `key=value` texts; a value that is no TOML is taken as text.
    pub fn with_settings(self, settings: &[String]) -> Result<Config, Mistake> {
        let mut table = toml::Table::new();
        for s in settings {
            let Some((key, value)) = s.split_once('=') else {
                return mistake(format!("`{s}` is not of the form key=value"));
            };
            let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
            table.insert(key.trim().into(), parsed.unwrap_or_else(|| toml::Value::String(value.into())));
        }
        self.with(&table)
    }

    /// Checks what does not need the data.
    pub fn check(&self) -> Result<(), Mistake> {
        if self.dtype == Dtype::Bf16 {
            return mistake("--dtype bf16 is not supported yet\n  help: train in f32");
        }
        if self.base == 0 || self.base > 1024 || self.batch == 0 || self.steps == 0 {
            return mistake("base (at most 1024), batch and steps must be at least 1");
        }
        if self.norm == Norm::Group && !self.base.is_multiple_of(4) {
            return mistake(format!("group norm has 4 groups, which do not divide --base {}", self.base));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return mistake(format!("--dropout {} is not a share from 0 to below 1", self.dropout));
        }
        if !self.rate.is_finite() || !self.organ_weight.is_finite() || self.organ_weight <= 0.0 {
            return mistake("rate and organ_weight must be finite numbers, organ_weight positive");
        }
        Ok(())
    }

    /// Bytes that a device may use.
    pub fn memory_bytes(&self) -> Result<Option<usize>, Mistake> {
        let text = self.memory.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];
        let (number, shift) =
            units.iter().find_map(|(u, s)| text.strip_suffix(u).map(|n| (n, *s))).unwrap_or((text, 0));
        match number.trim().parse::<f64>() {
            Ok(n) if n > 0.0 && n < 1e12 => Ok(Some((n * f64::from(1 << shift)) as usize)),
            _ => mistake(format!("`{text}` is not an amount of memory such as `2GiB`")),
        }
    }
}

/// Extents: `64` or `64x64x48`; None if empty.
pub fn extents(text: &str) -> Result<Option<[usize; 3]>, Mistake> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let parts: Option<Vec<usize>> =
        text.split('x').map(|p| p.trim().parse().ok().filter(|n| *n > 0 && *n <= 4096)).collect();
    match parts.as_deref() {
        Some([n]) => Ok(Some([*n; 3])),
        Some([a, b, c]) => Ok(Some([*a, *b, *c])),
        _ => mistake(format!("`{text}` is not a size such as `64` or `64x64x48`")),
    }
}

/// Where the mesh has so many devices: a mesh that splits x, y and z in turn.
pub fn mesh_of(devices: usize) -> String {
    let mut sizes = [1usize; 3];
    let (mut rest, mut factor, mut turn) = (devices, 2, 0);
    let mut factors = vec![];
    while rest > 1 {
        if rest % factor == 0 {
            factors.push(factor);
            rest /= factor;
        } else {
            factor += 1;
        }
    }
    for f in factors.into_iter().rev() {
        sizes[turn % 3] *= f;
        turn += 1;
    }
    let axes: Vec<String> =
        sizes.iter().zip(["x", "y", "z"]).filter(|(s, _)| **s > 1).map(|(s, n)| format!("{n}={s}")).collect();
    if axes.is_empty() { "1".into() } else { axes.join(",") }
}

/// The layout that a mesh's axes mean by their names.
pub fn layout_of(mesh: &mesh::layout::Mesh) -> String {
    let rules = mesh.axes().iter().filter_map(|(n, _)| match &**n {
        "x" | "y" | "z" | "batch" => Some(format!("{n}:{n}")),
        "data" => Some("batch:data".into()),
        _ => None,
    });
    rules.collect::<Vec<_>>().join(",")
}

/// The folder for cached downloads.
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    base.filter(|b| b.is_absolute()).or_else(home).unwrap_or_else(std::env::temp_dir).join("mesh-tensor")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let e = Config::default().with_settings(&["optimiser=adam".into()]).unwrap_err().to_string();
        assert!(e.contains("no key `optimiser`") && e.contains("did you mean `optimizer`?"), "{e}");
        let c = Config::default().with_settings(&["base=16".into(), "mesh=z=3".into(), "rate=1".into()]).unwrap();
        assert_eq!((c.base, c.mesh.as_str(), c.rate), (16, "z=3", 1.0));
    }

    #[test]
    fn sizes_and_memory_are_read_or_refused() {
        assert_eq!(extents("64").unwrap(), Some([64; 3]));
        assert_eq!(extents("40x37x33").unwrap(), Some([40, 37, 33]));
        assert!(extents("40x37").is_err() && extents("0").is_err() && extents("x").is_err());
        let memory = |m: &str| Config { memory: m.into(), ..Config::default() }.memory_bytes();
        assert_eq!(memory("1.5GiB").unwrap(), Some(3 << 29));
        assert!(memory("much").is_err());
    }

    #[test]
    fn a_number_of_devices_becomes_a_mesh_over_space() {
        assert_eq!([1, 2, 4, 6, 8, 12].map(mesh_of), ["1", "x=2", "x=2,y=2", "x=3,y=2", "x=2,y=2,z=2", "x=3,y=2,z=2"]);
    }
}
