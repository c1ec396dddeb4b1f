//! The volume that a run is about.

use crate::config::{self, Config, times};
use examples::run::Failed;
use examples::settings::{Mistake, cache_dir, mistake};
use ndarray::Array3;
use std::path::Path;
use worker::data::{DataError, ct, nifti, phantom, volume};

/// What a program needs to know of its data.
pub struct Outline {
    /// Extents of what the network sees.
    pub shape: [usize; 3],
    /// Names of the classes.
    pub classes: Vec<String>,
    /// What it is, for people.
    pub source: String,
}

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
    /// How it was cut out of the file.
    cut: Cut,
}

/// How the network's volume is cut out of a file's: resampled first, then the block in the middle.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Cut {
    native: [usize; 3],
    resampled: [usize; 3],
    block: [usize; 3],
}

impl Cut {
    fn new(native: [usize; 3], config: &Config) -> Result<Cut, Mistake> {
        let resampled = config::extents("--size", &config.size)?.unwrap_or(native);
        let block = config::extents("--crop", &config.crop)?.unwrap_or(resampled);
        if (0..3).any(|a| block[a] > resampled[a]) {
            let what = format!("--crop {} is larger than the volume, {}", times(block), times(resampled));
            return mistake(what, "take a smaller block, or resample the volume with --size");
        }
        Ok(Cut { native, resampled, block })
    }

    /// First index of the block.
    fn start(&self) -> [usize; 3] {
        volume::middle(self.resampled, self.block)
    }
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} voxels", times(self.native))?;
        if self.resampled != self.native {
            write!(f, ", resampled to {}", times(self.resampled))?;
        }
        if self.block != self.resampled {
            write!(f, ", cut to the {} in the middle", times(self.block))?;
        }
        Ok(())
    }
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
    /// An image and labels of other extents.
    #[error(
        "U0006: the image {} is {} voxels, and its labels {} are {}\n  help: give labels on the grid of the image",
        image.0, times(image.1), labels.0, times(labels.1)
    )]
    Mismatch {
        /// Path and extents.
        image: (String, [usize; 3]),
        /// Path and extents.
        labels: (String, [usize; 3]),
    },
}

impl From<ScanError> for Failed {
    fn from(e: ScanError) -> Failed {
        match e {
            ScanError::Option(mistake) => mistake.into(),
            data => Failed::Own { error: Box::new(data), exit_code: 3 },
        }
    }
}

fn shape<T>(v: &Array3<T>) -> [usize; 3] {
    [v.dim().0, v.dim().1, v.dim().2]
}

/// The extents of the example CT, and so of the phantom that stands in for it.
const EXAMPLE: [usize; 3] = [122, 101, 112];

fn organs() -> Vec<String> {
    ct::CLASSES.map(String::from).to_vec()
}

/// Where a configuration takes its volume from.
enum Source<'a> {
    /// The example CT; whether the phantom may stand in for it.
    Ct(bool),
    Phantom,
    Files(&'a Path, &'a Path),
}

impl Source<'_> {
    fn of(config: &Config) -> Result<Source<'_>, Mistake> {
        let source = match config.data.as_str() {
            "" => Source::Ct(true),
            "ct" => Source::Ct(false),
            "phantom" => Source::Phantom,
            path => Source::Files(Path::new(path), Path::new(&config.labels)),
        };
        match source {
            Source::Files(..) if config.labels.is_empty() => mistake(
                format!("--data {} has no labels", config.data),
                "give --labels, a NIfTI file with the label of each of its voxels",
            ),
            Source::Ct(_) | Source::Phantom if !config.labels.is_empty() => mistake(
                format!("--labels {} has no image", config.labels),
                "give the NIfTI file that they belong to with --data",
            ),
            source => Ok(source),
        }
    }
}

/// The classes of a file of labels.
fn classes_of(labels: &Array3<i32>, path: &Path) -> Result<Vec<String>, DataError> {
    let classes = (*labels.iter().max().unwrap_or(&0) + 1).max(2);
    if classes > 256 {
        let why = format!("it has labels up to {}, and 255 is the most; number them from 0 on", classes - 1);
        return Err(DataError::Format { path: path.into(), why });
    }
    Ok((0..classes).map(|c| if c == 0 { "background".into() } else { format!("label {c}") }).collect())
}

fn mismatch(image: &Path, native: [usize; 3], path: &Path, labels: &Array3<i32>) -> Result<(), ScanError> {
    if shape(labels) == native {
        return Ok(());
    }
    let (image, path) = (image.display().to_string(), path.display().to_string());
    Err(ScanError::Mismatch { image: (image, native), labels: (path, shape(labels)) })
}

impl Outline {
    /// What the configuration's data are, as far as that can be told without fetching anything or reading an image's
    /// voxels.
    pub fn of(config: &Config) -> Result<Outline, ScanError> {
        let (native, classes, source) = match Source::of(config)? {
            Source::Ct(_) => (EXAMPLE, organs(), "the example CT"),
            Source::Phantom => (EXAMPLE, organs(), "phantom"),
            Source::Files(image, path) => {
                let native = nifti::extents(image)?;
                let (labels, _) = nifti::read_labels(path)?;
                mismatch(image, native, path, &labels)?;
                (native, classes_of(&labels, path)?, config.data.as_str())
            }
        };
        let cut = Cut::new(native, config)?;
        Ok(Outline { shape: cut.block, classes, source: format!("{source}, {cut}") })
    }
}

impl Scan {
    /// Loads what the configuration names; `say` is told what people should know.
    pub fn load(config: &Config, mut say: impl FnMut(&str)) -> Result<Scan, ScanError> {
        let made = || {
            let (volume, labels) = phantom::phantom(EXAMPLE, config.common.seed);
            (volume, labels, organs(), "phantom")
        };
        let (volume, labels, classes, source) = match Source::of(config)? {
            Source::Phantom => made(),
            Source::Ct(or_phantom) => match ct::fetch(&cache_dir(), &mut say) {
                Ok([image, masks]) => {
                    let labels = nifti::read_labels(&masks)?.0.mapv(ct::class_of);
                    (nifti::read(&image)?, labels, organs(), "CT with organ masks of TotalSegmentator")
                }
                Err(e) if or_phantom => {
                    say(&format!("training on the built-in phantom, for the CT is not to be had: {e}"));
                    made()
                }
                Err(e) => return Err(e.into()),
            },
            Source::Files(image, path) => {
                let volume = nifti::read(image)?;
                let (labels, header) = nifti::read_labels(path)?;
                mismatch(image, shape(&volume.voxels), path, &labels)?;
                let count = volume.voxels.iter().filter(|v| !v.is_finite()).count();
                if let Some((at, v)) = volume.voxels.indexed_iter().find(|(_, v)| !v.is_finite()) {
                    let why = format!("{count} intensities are no numbers, such as {v} at {at:?}; replace them");
                    return Err(DataError::Format { path: image.into(), why }.into());
                }
                if !nifti::same_place(&volume.header, &header) {
                    say(
                        "the headers of image and labels put them in unlike places; voxels are paired by their indices",
                    );
                }
                let classes = classes_of(&labels, path)?;
                (volume, labels, classes, config.data.as_str())
            }
        };
        let cut = Cut::new(shape(&volume.voxels), config)?;
        let (mut image, mut labels) = (volume.voxels, labels);
        // Hounsfield units of air are about -1000; magnetic resonance has none below 0.
        let is_ct = image.iter().any(|v| *v < -500.0);
        if is_ct {
            volume::normalize_ct(&mut image)
        } else {
            volume::normalize_mr(&mut image)
        }
        if cut.resampled != cut.native {
            image = volume::resample(&image, cut.resampled);
            labels = volume::resample_nearest(&labels, cut.resampled);
        }
        if cut.block != cut.resampled {
            image = volume::crop(&image, cut.start(), cut.block);
            labels = volume::crop(&labels, cut.start(), cut.block);
        }
        let kind = if is_ct { "Hounsfield units" } else { "intensities by mean and deviation" };
        let source = format!("{source}, {cut}, {kind}");
        Ok(Scan { image, labels, classes, source, header: volume.header, cut })
    }

    /// What the program needs to know of it.
    pub fn outline(&self) -> Outline {
        Outline { shape: shape(&self.image), classes: self.classes.clone(), source: self.source.clone() }
    }

    /// Writes a prediction so that it overlays the file that the volume came from.
    pub fn write_prediction(&self, path: &Path, predicted: &Array3<i32>) -> Result<(), DataError> {
        let [x0, y0, z0] = self.cut.start();
        let mut whole: Array3<u8> = Array3::zeros(self.cut.resampled);
        for ((x, y, z), v) in predicted.indexed_iter() {
            whole[[x + x0, y + y0, z + z0]] = (*v).clamp(0, 255) as u8;
        }
        nifti::write_labels(path, &volume::resample_nearest(&whole, self.cut.native), &self.header)
    }
}
