//! The volume that a run is about.

use crate::config::{self, Config, times};
use examples::run::Failed;
use examples::settings::{Mistake, cache_dir, mistake};
use mesh::array::Array;
use mesh::dim::DType;
use mesh::region::Region;
use ndarray::{Array3, Array4, ArrayView3, Axis, s};
use std::path::Path;
use worker::data::phantom::Phantom;
use worker::data::picture::{self, Slice, Survey};
use worker::data::volume::{Block, Grid, Normal, View, extents, middle, slabs};
use worker::data::{DataError, ct, nifti};

/// What a program needs to know of its data.
pub struct Outline {
    /// Extents of what the network sees.
    pub shape: [usize; 3],
    /// Names of the classes.
    pub classes: Vec<String>,
    /// What it is, for people.
    pub source: String,
}

/// A volume with labels as the network sees it, made block by block of what a file holds, and how to bring a prediction
/// back to that file.
pub struct Scan {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// What it is, for people.
    pub source: String,
    voxels: Voxels,
    normal: Normal,
    cut: Cut,
}

/// An image and labels on one grid, as they are.
enum Voxels {
    Phantom(Phantom),
    Files {
        image: nifti::Volume,
        labels: nifti::Volume,
        /// The class of a label.
        class_of: fn(i32) -> i32,
    },
}

impl Voxels {
    fn shape(&self) -> [usize; 3] {
        match self {
            Voxels::Phantom(phantom) => phantom.shape(),
            Voxels::Files { image, .. } => image.shape(),
        }
    }

    fn image(&self, at: &Block) -> Result<Array3<f32>, DataError> {
        match self {
            Voxels::Phantom(phantom) => Ok(phantom.read(at).0),
            Voxels::Files { image, .. } => image.read(at),
        }
    }

    fn labels(&self, at: &Block) -> Result<Array3<i32>, DataError> {
        match self {
            Voxels::Phantom(phantom) => Ok(phantom.read(at).1),
            Voxels::Files { labels, class_of, .. } => Ok(labels.labels(at)?.mapv(class_of)),
        }
    }

    /// The intensities, one after the other in row-major order.
    fn each(&self, see: &mut dyn FnMut(f32)) -> Result<(), DataError> {
        slabs(self.shape()).try_for_each(|at| {
            self.image(&at)?.iter().for_each(|v| see(*v));
            Ok(())
        })
    }
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
        // One pooling may find a single voxel, and leave it as it is.
        let least = 1 << config.levels.saturating_sub(3);
        if config.levels > 2 && block.iter().all(|n| *n <= least) {
            let what =
                format!("--levels {} halve {} voxels until there is one, and go on", config.levels, times(block));
            return mistake(what, format!("take fewer levels, or a volume of more than {least} voxels along an axis"));
        }
        Ok(Cut { native, resampled, block })
    }

    /// First index of the block.
    fn start(&self) -> [usize; 3] {
        middle(self.resampled, self.block)
    }

    /// The file's volume on the grid that it is resampled to.
    fn grid(&self) -> Grid {
        Grid { from: self.native, to: self.resampled }
    }

    /// A block of the network's volume on that grid.
    fn resampled(&self, at: &Block) -> Block {
        let start = self.start();
        std::array::from_fn(|a| start[a] + at[a].start..start[a] + at[a].end)
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
fn classes_of(labels: &nifti::Volume, path: &Path) -> Result<Vec<String>, DataError> {
    let mut most = 1;
    for at in slabs(labels.shape()) {
        most = labels.labels(&at)?.iter().copied().fold(most, i32::max);
    }
    if most > 255 {
        let why = format!("it has labels up to {most}, and 255 is the most; number them from 0 on");
        return Err(DataError::Format { path: path.into(), why });
    }
    Ok((0..=most).map(|c| if c == 0 { "background".into() } else { format!("label {c}") }).collect())
}

/// The labels of an image of those extents.
fn labels_for(image: &Path, native: [usize; 3], path: &Path) -> Result<nifti::Volume, ScanError> {
    let labels = nifti::Volume::open(path)?;
    if labels.shape() == native {
        return Ok(labels);
    }
    let (image, path) = (image.display().to_string(), path.display().to_string());
    Err(ScanError::Mismatch { image: (image, native), labels: (path, labels.shape()) })
}

impl Outline {
    /// What the configuration's data are, as far as that can be told without fetching anything or reading an image's
    /// voxels.
    pub fn of(config: &Config) -> Result<Outline, ScanError> {
        let (native, classes, source) = match Source::of(config)? {
            Source::Ct(_) => (EXAMPLE, organs(), "the example CT"),
            Source::Phantom => (EXAMPLE, organs(), "phantom"),
            Source::Files(image, path) => {
                let native = nifti::shape_of(image)?;
                let labels = labels_for(image, native, path)?;
                (native, classes_of(&labels, path)?, config.data.as_str())
            }
        };
        let cut = Cut::new(native, config)?;
        Ok(Outline { shape: cut.block, classes, source: format!("{source}, {cut}") })
    }
}

impl Scan {
    /// Opens what the configuration names, and looks through it once; `say` is told what people should know.
    pub fn open(config: &Config, mut say: impl FnMut(&str)) -> Result<Scan, ScanError> {
        let made = || (Voxels::Phantom(Phantom::new(EXAMPLE, config.common.seed)), organs(), "phantom");
        let (voxels, classes, source) = match Source::of(config)? {
            Source::Phantom => made(),
            Source::Ct(or_phantom) => match ct::fetch(&cache_dir(), &mut say) {
                Ok([image, masks]) => {
                    let (image, labels) = (nifti::Volume::open(&image)?, nifti::Volume::open(&masks)?);
                    let voxels = Voxels::Files { image, labels, class_of: ct::class_of };
                    (voxels, organs(), "CT with organ masks of TotalSegmentator")
                }
                Err(e) if or_phantom => {
                    say(&format!("training on the built-in phantom, for the CT is not to be had: {e}"));
                    made()
                }
                Err(e) => return Err(e.into()),
            },
            Source::Files(image, path) => {
                let volume = nifti::Volume::open(image)?;
                let labels = labels_for(image, volume.shape(), path)?;
                if !nifti::same_place(volume.header(), labels.header()) {
                    say(
                        "the headers of image and labels put them in unlike places; voxels are paired by their indices",
                    );
                }
                finite(&volume, image)?;
                let classes = classes_of(&labels, path)?;
                (Voxels::Files { image: volume, labels, class_of: |label| label }, classes, config.data.as_str())
            }
        };
        let cut = Cut::new(voxels.shape(), config)?;
        let normal = Normal::of(|see| voxels.each(see))?;
        let kind = if normal == Normal::Ct { "Hounsfield units" } else { "intensities by mean and deviation" };
        let source = format!("{source}, {cut}, {kind}");
        Ok(Scan { classes, source, voxels, normal, cut })
    }

    /// Extents.
    pub fn shape(&self) -> [usize; 3] {
        self.cut.block
    }

    /// What the program needs to know of it.
    pub fn outline(&self) -> Outline {
        Outline { shape: self.shape(), classes: self.classes.clone(), source: self.source.clone() }
    }

    /// A block of a view of the image: intensities, normalised.
    ///
    /// # Errors
    /// Files that can no longer be read.
    pub fn image(&self, view: &View, at: &Block) -> Result<Array3<f32>, DataError> {
        let block = self.cut.resampled(&view.reads(self.shape(), at));
        let image = self.cut.grid().linear(&block, |at| {
            let mut image = self.voxels.image(at)?;
            self.normal.apply(&mut image);
            Ok::<_, DataError>(image)
        });
        let mut image = view.turn(image?);
        if view.shifts_any() {
            view.shift(&mut image, &self.labels(view, at)?);
        }
        Ok(image)
    }

    /// A block of a view of the labels: the class of each voxel.
    ///
    /// # Errors
    /// As for [`Scan::image`].
    pub fn labels(&self, view: &View, at: &Block) -> Result<Array3<i32>, DataError> {
        let block = self.cut.resampled(&view.reads(self.shape(), at));
        Ok(view.turn(self.cut.grid().nearest(&block, |at| self.voxels.labels(at))?))
    }

    /// Writes a prediction `[x, y, z]` so that it overlays the file that the volume came from.
    pub fn write_prediction(&self, path: &Path, predicted: ArrayView3<i32>) -> Result<(), DataError> {
        let (grid, start) = (Grid { from: self.cut.resampled, to: self.cut.native }, self.cut.start());
        // Beside the block there is nothing but background.
        let class = |(x, y, z)| {
            let at = grid.nearest_to([x, y, z]);
            let at: [usize; 3] = std::array::from_fn(|a| at[a].wrapping_sub(start[a]));
            predicted.get(at).map_or(0, |v| (*v).clamp(0, 255) as u8)
        };
        let phantom;
        let header = match &self.voxels {
            Voxels::Phantom(p) => {
                phantom = p.header();
                &phantom
            }
            Voxels::Files { image, .. } => image.header(),
        };
        nifti::write_labels(path, &Array3::from_shape_fn(self.cut.native, class), header)
    }

    /// Writes a picture of labels and prediction `[x, y, z]`.
    pub fn write_picture(&self, path: &Path, predicted: ArrayView3<i32>) -> Result<(), DataError> {
        let plain = View::plain(0, self.classes.len());
        let mut survey = Survey::new(self.shape());
        for at in slabs(self.shape()) {
            survey.add(at.clone().map(|r| r.start), &self.image(&plain, &at)?, &self.labels(&plain, &at)?);
        }
        let slice = |at: &Block| {
            let [x, y, z] = at.clone();
            let predicted = predicted.slice(s![x, y, z]).to_owned();
            Ok(Slice { image: self.image(&plain, at)?, truth: self.labels(&plain, at)?, predicted })
        };
        let [across_z, across_y, across_x] = survey.slices();
        picture::write(path, &survey, &[slice(&across_z)?, slice(&across_y)?, slice(&across_x)?])
    }
}

/// That the intensities of an image are numbers.
fn finite(image: &nifti::Volume, path: &Path) -> Result<(), DataError> {
    let (mut count, mut first) = (0usize, None);
    for at in slabs(image.shape()) {
        for ((x, y, z), v) in image.read(&at)?.indexed_iter().filter(|(_, v)| !v.is_finite()) {
            first.get_or_insert(((at[0].start + x, y, z), *v));
            count += 1;
        }
    }
    let Some((at, v)) = first else { return Ok(()) };
    let why = format!("{count} intensities are no numbers, such as {v} at {at:?}; replace them");
    Err(DataError::Format { path: path.into(), why })
}

/// Views of a scan as what is fed for their image: `[batch, x, y, z, channel]`, or `case` in place of `batch`.
pub struct Images<'a>(pub &'a Scan, pub &'a [View]);

/// Views of a scan as what is fed for their labels: `[batch, x, y, z]`, or `case` in place of `batch`.
pub struct Labels<'a>(pub &'a Scan, pub &'a [View]);

/// Why a source has no part; as the session wants it.
type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// The part of views that a region of their number (the first dimension: `batch`, or `case`) and of space says.
fn stack<T: Clone + Default>(
    views: &[View],
    at: &Region,
    read: impl Fn(&View, &Block) -> Result<Array3<T>, DataError>,
) -> Result<Array4<T>, DataError> {
    let block = ["x", "y", "z"].map(|dim| at.get(dim).cloned().unwrap_or_default());
    let batch = at.0.first().map(|(_, range)| range.clone()).unwrap_or_default();
    let [x, y, z] = extents(&block);
    let mut parts = Array4::default((batch.len(), x, y, z));
    for (mut part, view) in parts.outer_iter_mut().zip(&views[batch]) {
        part.assign(&read(view, &block)?);
    }
    Ok(parts)
}

impl coordinator::Source for Images<'_> {
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn shape(&self) -> Vec<usize> {
        [&[self.1.len()], &self.0.shape()[..], &[1]].concat()
    }
    fn part(&self, at: &Region) -> Result<Array, Boxed> {
        Ok(stack(self.1, at, |view, at| self.0.image(view, at))?.insert_axis(Axis(4)).into())
    }
}

impl coordinator::Source for Labels<'_> {
    fn dtype(&self) -> DType {
        DType::I32
    }
    fn shape(&self) -> Vec<usize> {
        [&[self.1.len()], &self.0.shape()[..]].concat()
    }
    fn part(&self, at: &Region) -> Result<Array, Boxed> {
        Ok(stack(self.1, at, |view, at| self.0.labels(view, at))?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coordinator::Source as _;
    use worker::data::volume::whole;

    fn labelled(size: &str, crop: &str, data: &Path, labels: &Path) -> Config {
        let text = |p: &Path| p.display().to_string();
        let (data, labels) = (text(data), text(labels));
        Config { data, labels, size: size.into(), crop: crop.into(), ..Config::default() }
    }

    /// Scans of every kind of source, as they are, larger, smaller, and cut.
    fn scans(folder: &Path) -> Vec<Scan> {
        let header = Phantom::new([2; 3], 0).header();
        let shape = [13, 9, 11];
        let volume = |of: fn(usize) -> u8| Array3::from_shape_fn(shape, |(x, y, z)| of(x * 7 + y * 13 + z * 29));
        let phantom = |crop: &str| labelled("", crop, Path::new("phantom"), Path::new(""));
        let mut configs = vec![phantom("9x8x7"), phantom("21")];
        for end in ["nii", "nii.gz"] {
            let (image, labels) = (folder.join(format!("i.{end}")), folder.join(format!("l.{end}")));
            nifti::write_labels(&image, &volume(|i| (i % 251) as u8), &header).unwrap();
            nifti::write_labels(&labels, &volume(|i| (i / 40 % 3) as u8), &header).unwrap();
            for (size, crop) in [("", ""), ("20x9x7", "15x8x7"), ("24", ""), ("5x4x6", "")] {
                configs.push(labelled(size, crop, &image, &labels));
            }
        }
        configs.iter().map(|c| Scan::open(c, |_| {}).unwrap()).collect()
    }

    #[test]
    fn a_box_of_what_is_fed_is_that_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let scans = scans(folder.path());
        for (i, scan) in scans.iter().enumerate() {
            let views: Vec<View> = (0..4).map(|id| View::draw(5, 4 * i as u64 + id, scan.classes.len())).collect();
            let [nx, ny, nz] = scan.shape();
            let region = |batch: std::ops::Range<usize>, at: &Block| {
                let ranges = [batch].into_iter().chain(at.clone());
                Region(["batch", "x", "y", "z"].iter().zip(ranges).map(|(n, r)| ((*n).into(), r)).collect())
            };
            let with_channel = |at: Region| Region([at.0, vec![("channel".into(), 0..1)]].concat());
            let (images, labels) = (Images(scan, &views), Labels(scan, &views));
            let all = region(0..4, &whole(scan.shape()));
            let (image, label) = (images.part(&with_channel(all.clone())).unwrap(), labels.part(&all).unwrap());
            assert_eq!((image.dtype(), image.shape()), (images.dtype(), &*images.shape()));
            assert_eq!((label.dtype(), label.shape()), (labels.dtype(), &*labels.shape()));
            let cuts = [[0..1, 0..1, 0..1], [nx / 2..nx, 0..ny, nz / 3..nz], [1..3, ny - 1..ny, 0..nz / 2]];
            for (at, batch) in cuts.iter().zip([0..4, 1..3, 3..4]) {
                let at = region(batch, at);
                assert_eq!(labels.part(&at).unwrap(), label.part(&at), "labels of scan {i}, {at}");
                let at = with_channel(at);
                let [part, of_whole] = [images.part(&at).unwrap(), image.part(&at)];
                assert_eq!(part.to_bytes(), of_whole.to_bytes(), "image of scan {i}, {at}");
            }
            // What a turn and a shift by classes are, said without blocks.
            let plain = View::plain(0, scan.classes.len());
            let image = scan.image(&plain, &whole(scan.shape())).unwrap();
            let label = scan.labels(&plain, &whole(scan.shape())).unwrap();
            let view = View { flips: [true, false, true], shifts: vec![0.5, 0.25], ..plain };
            let [seen, classes] = [[1, 2, 3], [nx - 2, 2, nz - 4]];
            let at = seen.map(|i: usize| i..i + 1);
            let shift = view.shifts.get(label[classes] as usize).copied().unwrap_or(0.0);
            assert_eq!(scan.image(&view, &at).unwrap()[[0; 3]], image[classes] + shift);
            assert_eq!(scan.labels(&view, &at).unwrap()[[0; 3]], label[classes]);
        }
    }
}
