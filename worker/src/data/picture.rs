//! Slices of a volume as PNG.

use super::{DataError, file};
use image::{Rgb, RgbImage};
use ndarray::{Array3, Axis};
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

/// Writes three orthogonal slices (a row each: across z, y and x), ground truth on the left, prediction on the right, the
/// classes in colour over the image.
///
/// Slices go through the middle of what is labelled. The first index of x (of y, in the slice across x) is on the left;
/// z points up, and in the slice across z y does: in a NIfTI file as it should be, the patient's front.
pub fn write(path: &Path, image: &Array3<f32>, truth: &Array3<i32>, predicted: &Array3<i32>) -> Result<(), DataError> {
    let (low, high) = image.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let grey = |v: f32| (v - low) / (high - low).max(1e-6) * 255.0;
    let centre = centre(truth);
    let scale = SIDE.div_ceil(*image.shape().iter().max().unwrap_or(&1)).max(1) as u32;
    // Rows of the page: the axis cut, the axes to the right and down.
    let views = [(2, 0, 1), (1, 0, 2), (0, 1, 2)];
    let size = |a: usize| image.len_of(Axis(a)) as u32 * scale;
    let width = views.iter().map(|v| size(v.1)).max().unwrap_or(1);
    let height: u32 = views.iter().map(|v| size(v.2) + GAP).sum();
    let mut page = RgbImage::from_pixel(2 * width + 3 * GAP, height + GAP, Rgb([24, 24, 24]));
    let mut top = GAP;
    for (cut, right, down) in views {
        for (column, labels) in [truth, predicted].into_iter().enumerate() {
            let left = GAP + column as u32 * (width + GAP) + (width - size(right)) / 2;
            for (v, u) in (0..size(down)).flat_map(|v| (0..size(right)).map(move |u| (v, u))) {
                let mut at = [0; 3];
                at[cut] = centre[cut];
                at[right] = (u / scale) as usize;
                at[down] = image.len_of(Axis(down)) - 1 - (v / scale) as usize;
                let g = grey(image[at]);
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

/// The middle of what is labelled, or of the volume.
fn centre(labels: &Array3<i32>) -> [usize; 3] {
    let mut sums = [0usize; 4];
    for ((x, y, z), _) in labels.indexed_iter().filter(|(_, l)| **l > 0) {
        sums = [sums[0] + x, sums[1] + y, sums[2] + z, sums[3] + 1];
    }
    std::array::from_fn(|a| sums[a].checked_div(sums[3]).unwrap_or(labels.shape()[a] / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_truth_and_prediction_side_by_side() {
        let (volume, labels) = super::super::phantom::phantom([40, 30, 50], 1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.png");
        write(&path, &volume.voxels, &labels, &Array3::zeros(labels.raw_dim())).unwrap();
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
