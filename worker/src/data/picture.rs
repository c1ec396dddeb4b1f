//! Slices of a volume as PNG.

use super::volume::Block;
use super::{DataError, file};
use image::{Rgb, RgbImage};
use ndarray::Array3;
use std::path::Path;

/// Colours of the classes from 1 on (Okabe and Ito's palette, which the colour-blind can tell apart).
pub const COLORS: [[f32; 3]; 7] = [
    [230.0, 159.0, 0.0],
    [86.0, 180.0, 233.0],
    [0.0, 158.0, 115.0],
    [240.0, 228.0, 66.0],
    [213.0, 94.0, 0.0],
    [204.0, 121.0, 167.0],
    [0.0, 114.0, 178.0],
];
const GAP: u32 = 6;
/// A picture's side at least, for volumes of few voxels.
const SIDE: usize = 220;

/// What a page has to know of the whole volume, which is looked at block by block.
#[derive(Clone, Copy, Debug)]
pub struct Survey {
    shape: [usize; 3],
    /// The lowest and the highest intensity.
    low: f32,
    high: f32,
    /// Of what is labelled: the sum of the indices, and how much it is.
    sums: [usize; 3],
    labelled: usize,
}

impl Survey {
    /// Of a volume of those extents.
    pub fn new(shape: [usize; 3]) -> Survey {
        Survey { shape, low: f32::MAX, high: f32::MIN, sums: [0; 3], labelled: 0 }
    }

    /// Looks at a block that begins at `start`.
    pub fn add(&mut self, start: [usize; 3], image: &Array3<f32>, labels: &Array3<i32>) {
        (self.low, self.high) = image.iter().fold((self.low, self.high), |(l, h), v| (l.min(*v), h.max(*v)));
        for ((x, y, z), _) in labels.indexed_iter().filter(|(_, l)| **l > 0) {
            let [i, j, k] = self.sums;
            self.sums = [i + start[0] + x, j + start[1] + y, k + start[2] + z];
            self.labelled += 1;
        }
    }

    /// The blocks that a page shows, across z, y and x: through the middle of what is labelled, or of the volume.
    pub fn slices(&self) -> [Block; 3] {
        [2, 1, 0].map(|cut| {
            let middle = self.sums[cut].checked_div(self.labelled).unwrap_or(self.shape[cut] / 2);
            std::array::from_fn(|a| if a == cut { middle..middle + 1 } else { 0..self.shape[a] })
        })
    }
}

/// A slice of a volume: all of it has one index along one axis.
pub struct Slice {
    /// Intensities.
    pub image: Array3<f32>,
    /// Classes.
    pub truth: Array3<i32>,
    /// Classes as predicted.
    pub predicted: Array3<i32>,
}

/// Writes the three slices of a survey (a row each), ground truth on the left, prediction on the right, the classes in
/// colour over the image.
///
/// The first index of x (of y, in the slice across x) is on the left; z points up, and in the slice across z y does: in a
/// NIfTI file as it should be, the patient's front.
pub fn write(path: &Path, survey: &Survey, slices: &[Slice; 3]) -> Result<(), DataError> {
    let Survey { shape, low, high, .. } = *survey;
    let grey = |v: f32| (v - low) / (high - low).max(1e-6) * 255.0;
    let scale = SIDE.div_ceil(*shape.iter().max().unwrap_or(&1)).max(1) as u32;
    // Of each slice, the axes to the right and down.
    let views = [(0, 1), (0, 2), (1, 2)];
    let size = |a: usize| shape[a] as u32 * scale;
    let width = views.iter().map(|v| size(v.0)).max().unwrap_or(1);
    let height: u32 = views.iter().map(|v| size(v.1) + GAP).sum();
    let mut page = RgbImage::from_pixel(2 * width + 3 * GAP, height + GAP, Rgb([24, 24, 24]));
    let mut top = GAP;
    for ((right, down), slice) in views.into_iter().zip(slices) {
        for (column, labels) in [&slice.truth, &slice.predicted].into_iter().enumerate() {
            let left = GAP + column as u32 * (width + GAP) + (width - size(right)) / 2;
            for (v, u) in (0..size(down)).flat_map(|v| (0..size(right)).map(move |u| (v, u))) {
                let mut at = [0; 3];
                at[right] = (u / scale) as usize;
                at[down] = shape[down] - 1 - (v / scale) as usize;
                let g = grey(slice.image[at]);
                let class = labels[at];
                let pixel = match usize::try_from(class) {
                    Ok(c) if c > 0 => COLORS[(c - 1) % COLORS.len()].map(|k| g * 0.55 + k * 0.45),
                    _ => [g; 3],
                };
                page.put_pixel(left + u, top + v, Rgb(pixel.map(|p| p as u8)));
            }
        }
        top += size(down) + GAP;
    }
    page.save_with_format(path, image::ImageFormat::Png).map_err(|e| file("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::super::phantom::Phantom;
    use super::super::volume::whole;
    use super::*;

    #[test]
    fn a_page_shows_truth_and_prediction_side_by_side() {
        let shape = [40, 30, 50];
        let phantom = Phantom::new(shape, 1);
        let mut survey = Survey::new(shape);
        for z in [0..20, 20..50] {
            let (image, labels) = phantom.read(&[0..40, 0..30, z.clone()]);
            survey.add([0, 0, z.start], &image, &labels);
        }
        let (image, labels) = phantom.read(&whole(shape));
        let mut at_once = Survey::new(shape);
        at_once.add([0; 3], &image, &labels);
        assert_eq!((survey.slices(), survey.low, survey.high), (at_once.slices(), at_once.low, at_once.high));
        let slices = survey.slices().map(|at| {
            let (image, truth) = phantom.read(&at);
            Slice { predicted: Array3::zeros(truth.raw_dim()), image, truth }
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.png");
        write(&path, &survey, &slices).unwrap();
        let page = image::open(&path).unwrap().to_rgb8();
        let coloured = |range: std::ops::Range<u32>| {
            range
                .flat_map(|x| (0..page.height()).map(move |y| (x, y)))
                .filter(|&(x, y)| {
                    let Rgb([r, g, b]) = *page.get_pixel(x, y);
                    r != g || g != b
                })
                .count()
        };
        assert!(coloured(0..page.width() / 2) > 1000, "the truth is in colour");
        assert_eq!(coloured(page.width() / 2..page.width()), 0, "an empty prediction is not");
    }
}
