//! The volume that a run is about.

use crate::config::{self, Config, Mistake, mistake};
use ndarray::Array3;
use std::path::Path;
use worker::data::{DataError, ct, nifti, phantom, volume};

/// A volume with labels, ready for the network, and how to bring a prediction back to the file it came from.
pub struct Scan {
    /// Intensities, normalised.
    pub image: Array3<f32>,
    /// Class of each voxel.
    pub labels: Array3<i32>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// What it is, for people.
    pub source: String,
    header: ::nifti::NiftiHeader,
    /// Extents of the file, of what they were resampled to, and first index of what was cut out of that.
    native: [usize; 3],
    resampled: [usize; 3],
    start: [usize; 3],
}

/// What is wrong with a run's data.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// Files.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Options.
    #[error(transparent)]
    Option(#[from] Mistake),
}

fn shape<T>(v: &Array3<T>) -> [usize; 3] {
    [v.dim().0, v.dim().1, v.dim().2]
}

/// The built-in phantom's extents, those of the example CT.
const PHANTOM: [usize; 3] = [122, 101, 112];

impl Scan {
    /// Loads what the configuration names; `say` is told what people should know.
    pub fn load(config: &Config, mut say: impl FnMut(&str)) -> Result<Scan, ScanError> {
        let organs = || ct::CLASSES.map(String::from).to_vec();
        if !config.labels.is_empty() && matches!(config.data.as_str(), "" | "ct" | "phantom") {
            return Err(Mistake("--labels goes with a NIfTI file in --data".into()).into());
        }
        let made = |seed| phantom::phantom(PHANTOM, seed);
        let (volume, labels, classes, source) = match config.data.as_str() {
            "phantom" => {
                let (v, l) = made(config.seed);
                (v, l, organs(), "phantom".to_string())
            }
            "" | "ct" => match ct::fetch(&config::cache_dir(), &mut say) {
                Ok([image, masks]) => {
                    let labels = nifti::read_labels(&masks)?.mapv(ct::class_of);
                    (nifti::read(&image)?, labels, organs(), "CT with organ masks of TotalSegmentator".into())
                }
                Err(e) if config.data.is_empty() => {
                    say(&format!("training on the built-in phantom, for the CT is not to be had: {e}"));
                    let (v, l) = made(config.seed);
                    (v, l, organs(), "phantom".into())
                }
                Err(e) => return Err(e.into()),
            },
            path => {
                if config.labels.is_empty() {
                    return Err(Mistake(format!("--data {path} needs --labels, a NIfTI file on the same grid")).into());
                }
                let labels = nifti::read_labels(Path::new(&config.labels))?;
                let classes = (*labels.iter().max().unwrap_or(&0) + 1).max(2);
                if classes > 256 {
                    let text = format!("{} has labels up to {}, and 255 is the most", config.labels, classes - 1);
                    return Err(Mistake(text).into());
                }
                let names = (0..classes).map(|c| if c == 0 { "background".into() } else { format!("label {c}") });
                (nifti::read(Path::new(path))?, labels, names.collect(), path.to_string())
            }
        };
        let native = shape(&volume.voxels);
        if shape(&labels) != native {
            let text = format!(
                "{} is {:?} and its labels are {:?}: they must lie on one grid",
                config.data,
                native,
                shape(&labels)
            );
            return Err(Mistake(text).into());
        }
        let mut image = volume.voxels;
        // Hounsfield units of air are about -1000; magnetic resonance has none below 0.
        let is_ct = image.iter().any(|v| *v < -500.0);
        if is_ct {
            volume::normalize_ct(&mut image)
        } else {
            volume::normalize_mr(&mut image)
        }
        if let Some(bad) = image.iter().find(|v| !v.is_finite()) {
            return Err(Mistake(format!("{source} has an intensity of {bad}")).into());
        }
        let mut labels = labels;
        if let Some(size) = config::extents(&config.size)? {
            (image, labels) = (volume::resample(&image, size), volume::resample_nearest(&labels, size));
        }
        let resampled = shape(&image);
        let mut start = [0; 3];
        if let Some(block) = config::extents(&config.crop)? {
            if (0..3).any(|a| block[a] > resampled[a]) {
                return mistake(format!("--crop {} is larger than the volume, {resampled:?}", config.crop))?;
            }
            start = volume::middle(resampled, block);
            (image, labels) = (volume::crop(&image, start, block), volume::crop(&labels, start, block));
        }
        let kind = if is_ct { "CT" } else { "MR" };
        let source = format!("{source}, {kind}, {:?} of {native:?} voxels", shape(&image));
        Ok(Scan { image, labels, classes, source, header: volume.header, native, resampled, start })
    }

    /// Extents of what the network sees.
    pub fn shape(&self) -> [usize; 3] {
        shape(&self.image)
    }

    /// Writes a prediction so that it overlays the file that the volume came from.
    pub fn write_prediction(&self, path: &Path, predicted: &Array3<i32>) -> Result<(), DataError> {
        let mut whole: Array3<u8> = Array3::zeros(self.resampled);
        for ((x, y, z), v) in predicted.indexed_iter() {
            whole[[x + self.start[0], y + self.start[1], z + self.start[2]]] = (*v).clamp(0, 255) as u8;
        }
        nifti::write_labels(path, &volume::resample_nearest(&whole, self.native), &self.header)
    }
}
