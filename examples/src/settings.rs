//! What a run is configured to: defaults, then a TOML file, then the command line, then `--set key=value`.

use crate::memory::Recompute;
use mesh::dim::DType;
use mesh::error::nearest;
use mesh::layout::{Layout, Mesh};
use mesh::optim::Optimizer;
use mesh::program::Chunking;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Element type of the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16; variables, sums, statistics, softmax and losses stay 32-bit floats.
    Bf16,
    /// IEEE half precision, likewise, with the loss scaled.
    F16,
}

impl Dtype {
    /// An optimizer for gradients of this type.
    pub fn trains(self, optimizer: Optimizer) -> Optimizer {
        match self {
            Dtype::F32 | Dtype::Bf16 => optimizer,
            Dtype::F16 => optimizer.scaled(),
        }
    }
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> DType {
        match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::Bf16,
            Dtype::F16 => DType::F16,
        }
    }
}

/// The keys that the configuration of every model has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Common {
    /// Device mesh: axes with sizes, `x=2,y=2`.
    pub mesh: String,
    /// Layout rules, `x:x,y:y`, in a file also as a table; empty: those that the mesh's axes mean by their names.
    #[serde(deserialize_with = "layout_text")]
    pub layout: String,
    /// Steps to train.
    pub steps: u32,
    /// Seed of everything random.
    pub seed: u64,
    /// The most chunks that a dimension is cut into: it has no more shards, and sums go by them.
    pub chunks: usize,
    /// Threads of each device; 0: the machine's cores shared out.
    pub threads: usize,
    /// Memory that each device may use, `2GiB`; empty: no limit.
    pub memory: String,
    /// Blocks that the backward pass makes again: `auto`, `none`, or their names, `encoder.0,decoder.0`.
    pub recompute: String,
    /// Steps between checkpoints; one is always written at the end.
    pub checkpoint_every: u32,
    /// Checkpoints to keep.
    pub keep: usize,
}

impl Default for Common {
    fn default() -> Self {
        Common {
            mesh: "1".into(),
            layout: String::new(),
            steps: 100,
            seed: 1,
            chunks: Chunking::default().chunks,
            threads: 0,
            memory: String::new(),
            recompute: "auto".into(),
            checkpoint_every: 50,
            keep: 2,
        }
    }
}

/// A layout's text, from that or from a table of rules.
fn layout_text<'a, D: Deserializer<'a>>(from: D) -> Result<String, D::Error> {
    match toml::Value::deserialize(from)? {
        toml::Value::String(text) => Ok(text),
        rules => Ok(rules.try_into::<Layout>().map_err(serde::de::Error::custom)?.to_string()),
    }
}

/// The longest file of a layout that is read.
const LAYOUT_BYTES: u64 = 1 << 16;

/// The text of a layout that is a file of its own: a table of rules, as for the key `layout` of a configuration.
///
/// # Errors
/// A file that cannot be read, or has no layout; with the line.
pub fn layout_file(path: &Path) -> Result<String, Mistake> {
    let place = path.display().to_string();
    let read = |text: &mut String| File::open(path)?.take(LAYOUT_BYTES + 1).read_to_string(text);
    let mut text = String::new();
    read(&mut text).map_err(|e| Mistake::File { place: place.clone(), why: e.to_string() })?;
    if text.len() as u64 > LAYOUT_BYTES {
        return Err(Mistake::File { place, why: format!("a layout has at most {LAYOUT_BYTES} bytes") });
    }
    let layout: Layout = toml::from_str(&text).map_err(|e| {
        let line = e.span().and_then(|s| text.get(..s.start)).map(|before| before.matches('\n').count());
        let (line, why) = (line.unwrap_or(0), e.message().trim().to_string());
        let value = text.lines().nth(line).unwrap_or_default().trim().to_string();
        Mistake::Value {
            key: "layout".into(),
            value: format!("`{value}`"),
            why,
            place: format!("{place}:{}", line + 1),
        }
    })?;
    Ok(layout.to_string())
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
///
/// # Errors
/// Always: it is one.
pub fn mistake<T>(what: impl Into<String>, help: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake::Option { what: what.into(), help: help.into() })
}

/// A number that an option may have.
///
/// # Errors
/// A number out of the range, in words.
pub fn range(option: &str, value: impl Into<u64>, low: u64, high: u64) -> Result<(), Mistake> {
    let value = value.into();
    if !(low..=high).contains(&value) {
        return mistake(format!("{option} {value} is out of range"), format!("it goes from {low} to {high}"));
    }
    Ok(())
}

/// A model's configuration: a struct whose fields, and those of a flattened [`Common`], are the keys of the TOML file and
/// of `--set`.
pub trait Settings: Clone + Default + Serialize + DeserializeOwned {
    /// Mesh axes that `--devices N` makes a mesh of, each of a factor of N in turn.
    const AXES: &'static [&'static str];
    /// Which dimension a mesh axis of which name splits if no layout is given: (axis, dimension); an axis may split
    /// several.
    const SPLITS: &'static [(&'static str, &'static str)];

    /// The keys that every run has.
    fn common(&self) -> &Common;

    /// The keys that every run has, to be set.
    fn common_mut(&mut self) -> &mut Common;

    /// Checks the model's own keys, as far as that does not need the data.
    ///
    /// # Errors
    /// A value that makes no sense, alone or with the others.
    fn check_own(&self) -> Result<(), Mistake>;

    /// Checks all keys, as far as that does not need the data.
    ///
    /// # Errors
    /// As [`Settings::check_own`].
    fn check(&self) -> Result<(), Mistake> {
        self.check_own()?;
        let c = self.common();
        range("--steps", c.steps, 1, 1_000_000_000)?;
        // What TOML can hold.
        range("--seed", c.seed, 0, i64::MAX as u64)?;
        range("--chunks", c.chunks as u64, 1, 1024)?;
        range("--threads", c.threads as u64, 0, 1024)?;
        c.recompute.parse::<Recompute>()?;
        memory_bytes(&c.memory).map(|_| ())
    }

    /// This configuration with some keys set; `place` says where a key was set.
    ///
    /// # Errors
    /// A key that there is not, a value that it cannot have.
    fn with(self, changes: &toml::Table, place: impl Fn(&str) -> String) -> Result<Self, Mistake> {
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
                let mut keys: Vec<&str> = table.keys().map(String::as_str).collect();
                keys.sort_unstable();
                let near = nearest(key, keys.iter().copied());
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
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML, and as [`Settings::with`]; with the line.
    fn with_file(self, path: &Path) -> Result<(Self, bool), Mistake> {
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
    ///
    /// # Errors
    /// A text of another form, and as [`Settings::with`].
    fn with_settings(self, settings: &[String]) -> Result<Self, Mistake> {
        settings.iter().try_fold(self, |config, s| {
            let Some((key, value)) = s.split_once('=') else {
                return mistake(format!("`--set {s}` is not of the form key=value"), "write `--set steps=100`");
            };
            let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
            let value = parsed.unwrap_or_else(|| toml::Value::String(value.trim().into()));
            let table = toml::Table::from_iter([(key.trim().to_string(), value)]);
            config.with(&table, |_| format!("--set {s}"))
        })
    }

    /// What is unlike an earlier configuration, given as JSON, and changes what is computed: `rate 0.1 -> 0.2`.
    fn changes(&self, earlier: &serde_json::Value) -> Vec<String> {
        let own = serde_json::to_value(self).unwrap_or_default();
        let computed = |key: &str| !["threads", "memory", "recompute", "checkpoint_every", "keep"].contains(&key);
        let keys = own.as_object().into_iter().flatten().filter(|(key, _)| computed(key));
        keys.filter_map(|(key, new)| {
            let old = earlier.get(key)?;
            (old != new).then(|| format!("{key} {old} -> {new}"))
        })
        .collect()
    }

    /// The configuration's text as in the run folder.
    fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field is a TOML value; the seed is checked to be one")
    }
}

/// Bytes that `--memory` gives a device; None for no limit.
///
/// # Errors
/// A text that is no amount.
pub fn memory_bytes(text: &str) -> Result<Option<usize>, Mistake> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    match worker::cli::memory(text) {
        Ok(n) => Ok(Some(n)),
        Err(_) => {
            mistake(format!("--memory {text} is no amount of memory"), "write `2GiB`, `512MiB` or a number of bytes")
        }
    }
}

/// A mesh of so many devices that splits those axes in turn, the largest factors first.
pub fn mesh_of(devices: usize, axes: &[&str]) -> String {
    let mut sizes = vec![1usize; axes.len()];
    let (mut rest, mut factor, mut factors) = (devices, 2, vec![]);
    while rest > 1 {
        if rest.is_multiple_of(factor) {
            factors.push(factor);
            rest /= factor;
        } else {
            factor += 1;
        }
    }
    for (turn, f) in factors.into_iter().rev().enumerate() {
        sizes[turn % axes.len()] *= f;
    }
    let axes: Vec<String> = sizes.iter().zip(axes).filter(|(s, _)| **s > 1).map(|(s, n)| format!("{n}={s}")).collect();
    if axes.is_empty() { "1".into() } else { axes.join(",") }
}

/// The layout that a mesh's axes mean by their names; `splits` are pairs of an axis and a dimension that it splits.
pub fn layout_of(mesh: &Mesh, splits: &[(&str, &str)]) -> String {
    let of = |name: &str| {
        let rules = splits.iter().filter(move |(axis, _)| *axis == name);
        rules.map(|(axis, dimension)| format!("{dimension}:{axis}")).collect::<Vec<_>>()
    };
    mesh.axes().iter().flat_map(|(name, _)| of(name)).collect::<Vec<_>>().join(",")
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

    #[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
    struct Config {
        #[serde(flatten)]
        common: Common,
        rate: f32,
        size: String,
        optimizer: String,
        base: usize,
    }

    impl Settings for Config {
        const AXES: &'static [&'static str] = &["data", "model"];
        const SPLITS: &'static [(&'static str, &'static str)] =
            &[("data", "batch"), ("model", "heads"), ("model", "d_ff")];

        fn common(&self) -> &Common {
            &self.common
        }

        fn common_mut(&mut self) -> &mut Common {
            &mut self.common
        }

        fn check_own(&self) -> Result<(), Mistake> {
            range("--base", self.base as u64, 0, 8)
        }
    }

    fn set(text: &str) -> Result<Config, Mistake> {
        Config::default().with_settings(&text.split_whitespace().map(String::from).collect::<Vec<_>>())
    }

    #[test]
    fn an_unknown_key_names_the_nearest_of_the_model_and_of_every_run() {
        let e = set("optimiser=adam").unwrap_err().to_string();
        assert!(e.contains("no key `optimiser`") && e.contains("did you mean `optimizer`?"), "{e}");
        let e = set("stepz=3").unwrap_err().to_string();
        assert!(e.contains("did you mean `steps`?"), "{e}");
        let e = set("elephant=1").unwrap_err().to_string();
        assert!(e.contains("the keys are base, checkpoint_every, chunks, keep, layout, memory, mesh, "), "{e}");
    }

    #[test]
    fn values_are_read_as_their_key_needs_them() {
        let c = set("base=4 mesh=z=3 rate=1 size=64 steps=7").unwrap();
        assert_eq!((c.base, c.common.mesh.as_str(), c.rate, c.size.as_str(), c.common.steps), (4, "z=3", 1.0, "64", 7));
        assert_eq!(set("mesh=1").unwrap().common.mesh, "1");
        let e = set("base=wide").unwrap_err().to_string();
        assert!(e.contains("`base` cannot be \"wide\"") && e.contains("--> --set base=wide"), "{e}");
        let e = set("steps=-1").unwrap_err().to_string();
        assert!(e.contains("`steps` cannot be -1"), "{e}");
        for (wrong, text) in [("base=9", "--base 9 is out of range"), ("steps=0", "--steps 0"), ("memory=much", "much")]
        {
            let e = set(wrong).unwrap().check().unwrap_err().to_string();
            assert!(e.contains(text) && e.contains("help: "), "{e}");
        }
        assert_eq!(memory_bytes("1.5GiB").unwrap(), Some(3 << 29));
    }

    #[test]
    fn the_text_in_the_run_folder_reads_back_and_says_what_changed() {
        let c = set("base=4 mesh=z=3 rate=0.1 threads=3 seed=9223372036854775807").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, c.to_toml()).unwrap();
        assert_eq!(Config::default().with_file(&path).unwrap(), (c.clone(), true));
        let earlier = serde_json::to_value(&c).unwrap();
        let now = c.with_settings(&["rate=0.25".into(), "threads=1".into(), "steps=5".into()]).unwrap();
        assert_eq!(now.changes(&earlier), ["rate 0.10000000149011612 -> 0.25", "steps 100 -> 5"]);
        std::fs::write(&path, "rate = 1\n\nbase = \"wide\"\n").unwrap();
        let e = Config::default().with_file(&path).unwrap_err().to_string();
        assert!(e.contains("`base` cannot be \"wide\"") && e.contains("config.toml:3"), "{e}");
    }

    #[test]
    fn a_layout_may_be_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("layout.toml");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            layout_file(&file).map_err(|e| e.to_string().replace(folder.path().to_str().unwrap(), ".."))
        };
        let table = "batch = \"data\"\n[slots]\n\"*\" = \"data\"\n[\"b/**\"]\nx = \"none\"\n";
        let text = read(table).unwrap();
        assert_eq!(text, "batch:data,slots{*:data},b/**{x:none}");
        assert_eq!(read(&toml::to_string(&text.parse::<Layout>().unwrap()).unwrap()).unwrap(), text);
        assert_eq!(read("").unwrap(), "");
        for (wrong, says, line) in [
            ("batch = \"data\"\nx = \"\"", "U0002: `layout` cannot be `x = \"\"`: error[L0001]: `x:`", 2),
            ("[slots]\nbatch = \"a+a\"", "names each axis once", 2),
            ("batch = \"data\"\nbatch = \"x\"", "duplicate key", 2),
            ("batch", "U0002", 1),
            ("batch = 3", "layout rules", 1),
        ] {
            let e = read(wrong).unwrap_err();
            assert!(e.contains(says) && e.contains(&format!("  --> ../layout.toml:{line}")), "{wrong}: {e}");
        }
        assert!(read(&"#".repeat(1 << 17)).unwrap_err().starts_with("U0003"));
        std::fs::remove_file(&file).unwrap();
        assert!(
            layout_file(&file).unwrap_err().to_string().starts_with("U0003: cannot read the configuration: No such")
        );
    }

    #[test]
    fn a_layout_is_a_text_or_a_table() {
        let table = "[layout]\nbatch = \"data\"\n[layout.slots]\n\"*\" = \"data\"\n[layout.\"b/**\"]\nx = \"none\"\n";
        let with = |text: &str| Config::default().with(&text.parse().unwrap(), |_| "here".into());
        let config = with(table).unwrap();
        assert_eq!(config.common.layout, "batch:data,slots{*:data},b/**{x:none}");
        // Written and read again it is the same text.
        assert_eq!(with(&config.to_toml()).unwrap().common.layout, config.common.layout);
        let e = with("[layout]\nbatch = \"\"").unwrap_err().to_string();
        assert!(e.starts_with("U0002: `layout`") && e.contains("error[L0001]: `batch:`"), "{e}");
    }

    #[test]
    fn a_number_of_devices_becomes_a_mesh_and_its_axes_a_layout() {
        let space = |n| mesh_of(n, &["x", "y", "z"]);
        assert_eq!([1, 2, 4, 6, 8, 12].map(space), ["1", "x=2", "x=2,y=2", "x=3,y=2", "x=2,y=2,z=2", "x=3,y=2,z=2"]);
        assert_eq!([3, 8].map(|n| mesh_of(n, &["data"])), ["data=3", "data=8"]);
        let layout = |mesh: &str| layout_of(&mesh.parse().unwrap(), Config::SPLITS);
        assert_eq!(
            [layout("data=2,model=2"), layout("model=4,other=2"), layout("1")],
            ["batch:data,heads:model,d_ff:model", "heads:model,d_ff:model", ""]
        );
    }
}
