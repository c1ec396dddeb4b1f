//! The configuration of a run.

use examples::settings::{Common, Dtype, Mistake, Settings, mistake, range};
use serde::{Deserialize, Serialize};

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

/// A run's configuration. Every field is a key of the TOML file and of `--set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The keys of every run.
    #[serde(flatten)]
    pub common: Common,
    /// Filters at the first level; each level below has twice as many.
    pub base: usize,
    /// Levels; each below the first one halves every extent.
    pub levels: usize,
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
}

impl Default for Config {
    fn default() -> Self {
        Config {
            common: Common { mesh: "x=2,y=2".into(), steps: 150, ..Common::default() },
            base: 8,
            levels: 4,
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
        }
    }
}

impl Settings for Config {
    const AXES: &'static [&'static str] = &["x", "y", "z"];
    const SPLITS: &'static [(&'static str, &'static str)] =
        &[("x", "x"), ("y", "y"), ("z", "z"), ("batch", "batch"), ("data", "batch")];

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn check_own(&self) -> Result<(), Mistake> {
        range("--base", self.base as u64, 1, 1024)?;
        range("--levels", self.levels as u64, 1, 10)?;
        range("--batch", self.batch as u64, 1, 4096)?;
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
        extents("--crop", &self.crop).map(|_| ())
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

#[cfg(test)]
mod tests {
    use super::*;
    use examples::settings::{layout_of, mesh_of};

    #[test]
    fn sizes_are_read_or_refused() {
        let extents = |text| extents("--size", text);
        assert_eq!(extents("64").unwrap(), Some([64; 3]));
        assert_eq!(extents("40x37x33").unwrap(), Some([40, 37, 33]));
        assert!(extents("40x37").is_err() && extents("0").is_err() && extents("x").is_err());
    }

    #[test]
    fn a_number_of_devices_is_a_mesh_over_space_that_splits_it() {
        let mesh = mesh_of(12, Config::AXES);
        assert_eq!(mesh, "x=3,y=2,z=2");
        assert_eq!(layout_of(&mesh.parse().unwrap(), Config::SPLITS), "x:x,y:y,z:z");
        assert_eq!(layout_of(&"data=2,x=2,w=2".parse().unwrap(), Config::SPLITS), "batch:data,x:x");
    }
}
