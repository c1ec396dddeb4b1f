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

/// A mistake in the configuration, or between it and the data or the run folder.
#[derive(Debug, thiserror::Error)]
pub enum Mistake {
    /// A key that there is not.
    #[error("U0001: there is no key `{key}`\n  --> {place}\n  help: {help}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Option or line of a file.
        place: String,
        /// The nearest key, or all of them.
        help: String,
    },
    /// A value that a key cannot have.
    #[error("U0002: `{key}` cannot be {value}: {why}\n  --> {place}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Why.
        why: String,
        /// Option or line of a file.
        place: String,
    },
    /// A configuration file that cannot be read.
    #[error("U0003: cannot read the configuration: {why}\n  --> {place}")]
    File {
        /// The file, and the line.
        place: String,
        /// Why.
        why: String,
    },
    /// Options that make no sense, or none together.
    #[error("U0004: {what}\n  help: {help}")]
    Option {
        /// What is wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// A run folder that is not what the command needs.
    #[error("U0005: {} {what}\n  help: {help}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        help: String,
    },
}

/// Options that make no sense.
pub fn mistake<T>(what: impl Into<String>, help: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake::Option { what: what.into(), help: help.into() })
}

impl Config {
    /// The keys there are.
    fn keys() -> Vec<String> {
        let table = toml::Table::try_from(Config::default()).unwrap_or_default();
        table.keys().cloned().collect()
    }

    /// This configuration with some keys set; `place` says where a key was set.
    fn with(self, changes: &toml::Table, place: impl Fn(&str) -> String) -> Result<Config, Mistake> {
        let keys = Config::keys();
        let mut config = self;
        for (key, value) in changes {
            let value_error = |why: String| Mistake::Value {
                key: key.clone(),
                value: value.to_string(),
                why: why.trim().into(),
                place: place(key),
            };
            let mut table = toml::Table::try_from(&config).map_err(|e| value_error(e.to_string()))?;
            let Some(old) = table.get(key) else {
                let near = nearest(key, keys.iter().map(String::as_str));
                let help = near.map_or(format!("the keys are {}", keys.join(", ")), |n| format!("did you mean `{n}`?"));
                return Err(Mistake::UnknownKey { key: key.clone(), place: place(key), help });
            };
            let value = match (old, value) {
                // `rate = 1` is meant as 1.0, `size = 64` as "64".
                (toml::Value::Float(_), toml::Value::Integer(i)) => toml::Value::Float(*i as f64),
                (toml::Value::String(_), toml::Value::Integer(i)) => toml::Value::String(i.to_string()),
                _ => value.clone(),
            };
            table.insert(key.clone(), value);
            config = table.try_into().map_err(|e: toml::de::Error| value_error(e.message().into()))?;
        }
        Ok(config)
    }

    /// Reads a TOML file into this configuration; tells also whether the file says which mesh to use.
    pub fn with_file(self, path: &Path) -> Result<(Config, bool), Mistake> {
        let line = |n: usize| format!("{}:{n}", path.display());
        let text = std::fs::read_to_string(path)
            .map_err(|e| Mistake::File { place: path.display().to_string(), why: e.to_string() })?;
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let before = e.span().and_then(|s| text.get(..s.start)).unwrap_or_default();
            Mistake::File {
                place: line(before.matches('\n').count() + 1),
                why: format!("it is no TOML: {}", e.message()),
            }
        })?;
        let place = |key: &str| {
            let at = text.lines().position(|l| l.trim_start().trim_start_matches('"').starts_with(key));
            at.map_or(path.display().to_string(), |n| line(n + 1))
        };
        Ok((self.with(&table, place)?, table.contains_key("mesh")))
    }

    /// Applies `key=value` texts; a value that is no TOML is taken as text.
    pub fn with_settings(self, settings: &[String]) -> Result<Config, Mistake> {
        settings.iter().try_fold(self, |config, s| {
            let Some((key, value)) = s.split_once('=') else {
                return mistake(format!("`--set {s}` is not of the form key=value"), "write `--set base=16`");
            };
            let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
            let value = parsed.unwrap_or_else(|| toml::Value::String(value.trim().into()));
            let table = toml::Table::from_iter([(key.trim().to_string(), value)]);
            config.with(&table, |_| format!("--set {s}"))
        })
    }

    /// Checks what does not need the data.
    pub fn check(&self) -> Result<(), Mistake> {
        if self.dtype == Dtype::Bf16 {
            return mistake("--dtype bf16 is not supported yet", "train in f32");
        }
        let ranges = [
            ("--base", self.base as u64, 1, 1024),
            ("--batch", self.batch as u64, 1, 4096),
            ("--steps", self.steps.into(), 1, 1_000_000_000),
            // What TOML can hold.
            ("--seed", self.seed, 0, i64::MAX as u64),
            ("--threads", self.threads as u64, 0, 1024),
        ];
        for (option, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return mistake(format!("{option} {value} is out of range"), format!("it goes from {low} to {high}"));
            }
        }
        if self.norm == Norm::Group && !self.base.is_multiple_of(4) {
            let what = format!("group norm has 4 groups of channels, which do not divide --base {}", self.base);
            return mistake(what, "use a --base that is a multiple of 4, or another --norm");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let what = format!("--dropout {} is not a share of the activations", self.dropout);
            return mistake(what, "it goes from 0 (none) to below 1");
        }
        if !(self.rate.is_finite() && self.rate >= 0.0) {
            return mistake(format!("--rate {} is no learning rate", self.rate), "it is a finite number from 0 on");
        }
        if !(self.organ_weight.is_finite() && self.organ_weight > 0.0) {
            let what = format!("organ_weight {} is no weight", self.organ_weight);
            return mistake(what, "it is a finite number above 0");
        }
        extents("--size", &self.size)?;
        extents("--crop", &self.crop)?;
        self.memory_bytes().map(|_| ())
    }

    /// Bytes that a device may use.
    pub fn memory_bytes(&self) -> Result<Option<usize>, Mistake> {
        let text = self.memory.trim();
        if text.is_empty() {
            return Ok(None);
        }
        match worker::cli::memory(text) {
            Ok(n) => Ok(Some(n)),
            Err(_) => mistake(
                format!("--memory {text} is no amount of memory"),
                "write `2GiB`, `512MiB` or a number of bytes",
            ),
        }
    }

    /// What is unlike an earlier configuration, given as JSON, and changes what is computed: `rate 0.1 -> 0.2`.
    pub fn changes(&self, earlier: &serde_json::Value) -> Vec<String> {
        let own = serde_json::to_value(self).unwrap_or_default();
        let computed = |key: &str| !["threads", "memory", "checkpoint_every", "keep"].contains(&key);
        let keys = own.as_object().into_iter().flatten().filter(|(key, _)| computed(key));
        keys.filter_map(|(key, new)| {
            let old = earlier.get(key)?;
            (old != new).then(|| format!("{key} {old} -> {new}"))
        })
        .collect()
    }

    /// The configuration's text as in the run folder.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field is a TOML value; the seed is checked to be one")
    }
}

/// Extents: `64` or `64x64x48`; None if empty.
pub fn extents(option: &str, text: &str) -> Result<Option<[usize; 3]>, Mistake> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let parts: Option<Vec<usize>> =
        text.split('x').map(|p| p.trim().parse().ok().filter(|n| *n > 0 && *n <= 4096)).collect();
    match parts.as_deref() {
        Some([n]) => Ok(Some([*n; 3])),
        Some([a, b, c]) => Ok(Some([*a, *b, *c])),
        _ => mistake(format!("{option} {text} is no size"), "write `64` or `64x64x48`; an extent goes from 1 to 4096"),
    }
}

/// Extents as people write them: `64x64x48`.
pub fn times(extents: [usize; 3]) -> String {
    extents.map(|n| n.to_string()).join("x")
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
        let c = Config::default().with_settings(&["size=64".into(), "mesh=1".into()]).unwrap();
        assert_eq!((c.size.as_str(), c.mesh.as_str()), ("64", "1"));
        let e = Config::default().with_settings(&["base=wide".into()]).unwrap_err().to_string();
        assert!(e.contains("`base` cannot be \"wide\"") && e.contains("--> --set base=wide"), "{e}");
    }

    #[test]
    fn sizes_and_memory_are_read_or_refused() {
        let extents = |text| extents("--size", text);
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
