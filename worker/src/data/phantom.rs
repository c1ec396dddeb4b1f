//! A CT-like volume of a trunk with organs, made from a seed: for where no data can be fetched, and for tests.

use super::nifti::Volume;
use ::nifti::NiftiHeader;
use mesh::rng::{Stream, key_of};
use ndarray::Array3;

/// An ellipsoid in coordinates of -1 .. 1 a side: centre, radii, class, Hounsfield units.
struct Ellipsoid([f32; 3], [f32; 3], i32, f32);

/// The volume and its labels: 0 background, 1 liver, 2 spleen, 3 kidneys, 4 lungs.
pub fn phantom(shape: [usize; 3], seed: u64) -> (Volume, Array3<i32>) {
    let stream = Stream { seed, step: 0, key: key_of("phantom") };
    let jitter = |i: u64| (stream.uniform(i) - 0.5) * 0.08;
    let organs = [
        Ellipsoid([-0.38, -0.05, 0.55], [0.30, 0.45, 0.40], 4, -820.0),
        Ellipsoid([0.38, -0.05, 0.55], [0.30, 0.45, 0.40], 4, -820.0),
        Ellipsoid([0.35, 0.05, -0.05], [0.40, 0.42, 0.28], 1, 110.0),
        Ellipsoid([-0.50, 0.25, -0.10], [0.20, 0.24, 0.20], 2, 130.0),
        Ellipsoid([-0.32, 0.40, -0.48], [0.13, 0.14, 0.24], 3, 180.0),
        Ellipsoid([0.32, 0.40, -0.50], [0.13, 0.14, 0.24], 3, 180.0),
        Ellipsoid([0.0, 0.60, 0.0], [0.12, 0.13, 3.0], 0, 420.0),
    ];
    let inside =
        |p: [f32; 3], c: [f32; 3], r: [f32; 3]| (0..3).map(|a| ((p[a] - c[a]) / r[a]).powi(2)).sum::<f32>() <= 1.0;
    let mut labels = Array3::zeros((shape[0], shape[1], shape[2]));
    let mut index = 1000;
    let voxels = Array3::from_shape_fn((shape[0], shape[1], shape[2]), |(x, y, z)| {
        let at = [x, y, z];
        let p: [f32; 3] = std::array::from_fn(|a| (2.0 * at[a] as f32 + 1.0) / shape[a] as f32 - 1.0);
        let mut hu = if inside(p, [0.0; 3], [0.88, 0.80, 5.0]) { 40.0 } else { -1000.0 };
        for (i, Ellipsoid(c, r, class, units)) in organs.iter().enumerate() {
            let centre: [f32; 3] = std::array::from_fn(|a| c[a] + jitter((3 * i + a) as u64));
            if inside(p, centre, *r) {
                hu = *units;
                labels[[x, y, z]] = *class;
            }
        }
        index += 1;
        hu + (stream.uniform(index) - 0.5) * 80.0
    });
    let header = NiftiHeader {
        dim: [3, shape[0] as u16, shape[1] as u16, shape[2] as u16, 1, 1, 1, 1],
        pixdim: [1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0],
        sform_code: 1,
        srow_x: [3.0, 0.0, 0.0, 0.0],
        srow_y: [0.0, 3.0, 0.0, 0.0],
        srow_z: [0.0, 0.0, 3.0, 0.0],
        ..NiftiHeader::default()
    };
    (Volume { voxels, header }, labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_from_the_seed_and_holds_every_organ() {
        let (a, labels) = phantom([40, 36, 44], 5);
        let (b, _) = phantom([40, 36, 44], 5);
        let (c, _) = phantom([40, 36, 44], 6);
        assert_eq!(a.voxels, b.voxels);
        assert_ne!(a.voxels, c.voxels);
        for class in 0..5 {
            assert!(labels.iter().filter(|l| **l == class).count() > 100, "class {class}");
        }
    }
}
