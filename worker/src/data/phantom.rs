//! A CT-like volume of a trunk with organs, made from a seed: for where no data can be fetched, and for tests.

use super::volume::{Block, extents};
use ::nifti::NiftiHeader;
use mesh::rng::{Stream, key_of};
use ndarray::Array3;

/// An ellipsoid: by axis and index, the square of the distance from its centre in radii.
struct Ellipsoid([Vec<f32>; 3]);

impl Ellipsoid {
    /// In coordinates of -1 .. 1 a side.
    fn new(shape: [usize; 3], centre: [f32; 3], radii: [f32; 3]) -> Ellipsoid {
        let place = |a: usize, i: usize| (2.0 * i as f32 + 1.0) / shape[a] as f32 - 1.0;
        let square = |a: usize, i: usize| ((place(a, i) - centre[a]) / radii[a]).powi(2);
        Ellipsoid(std::array::from_fn(|a| (0..shape[a]).map(|i| square(a, i)).collect()))
    }

    fn holds(&self, [x, y, z]: [usize; 3]) -> bool {
        self.0[0][x] + self.0[1][y] + self.0[2][z] <= 1.0
    }
}

/// The volume `[x, y, z]` and its labels: 0 background, 1 liver, 2 spleen, 3 kidneys, 4 lungs. Nothing of it is kept.
pub struct Phantom {
    shape: [usize; 3],
    stream: Stream,
    body: Ellipsoid,
    /// With class and Hounsfield units; later ones lie over earlier ones.
    organs: Vec<(Ellipsoid, i32, f32)>,
}

/// The first number of the noise; those before are the organs'.
const NOISE: u64 = 1001;

impl Phantom {
    /// That of those extents and that seed.
    pub fn new(shape: [usize; 3], seed: u64) -> Phantom {
        let stream = Stream { seed, step: 0, key: key_of("phantom") };
        let organs = [
            ([-0.38, -0.05, 0.55], [0.30, 0.45, 0.40], 4, -820.0),
            ([0.38, -0.05, 0.55], [0.30, 0.45, 0.40], 4, -820.0),
            ([0.35, 0.05, -0.05], [0.40, 0.42, 0.28], 1, 110.0),
            ([-0.50, 0.25, -0.10], [0.20, 0.24, 0.20], 2, 130.0),
            ([-0.32, 0.40, -0.48], [0.13, 0.14, 0.24], 3, 180.0),
            ([0.32, 0.40, -0.50], [0.13, 0.14, 0.24], 3, 180.0),
            ([0.0, 0.60, 0.0], [0.12, 0.13, 3.0], 0, 420.0),
        ];
        let jitter = |i: usize| (stream.uniform(i as u64) - 0.5) * 0.08;
        let organs = organs.iter().enumerate().map(|(i, (centre, radii, class, units))| {
            let centre = std::array::from_fn(|a| centre[a] + jitter(3 * i + a));
            (Ellipsoid::new(shape, centre, *radii), *class, *units)
        });
        let (body, organs) = (Ellipsoid::new(shape, [0.0; 3], [0.88, 0.80, 5.0]), organs.collect());
        Phantom { shape, stream, body, organs }
    }

    /// Extents.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// A block of the volume in Hounsfield units, and of its labels.
    pub fn read(&self, at: &Block) -> (Array3<f32>, Array3<i32>) {
        let mut labels = Array3::zeros(extents(at));
        let [_, ny, nz] = self.shape.map(|n| n as u64);
        let voxels = Array3::from_shape_fn(extents(at), |(i, j, k)| {
            let [x, y, z] = [at[0].start + i, at[1].start + j, at[2].start + k];
            let mut hu = if self.body.holds([x, y, z]) { 40.0 } else { -1000.0 };
            for (organ, class, units) in &self.organs {
                if organ.holds([x, y, z]) {
                    hu = *units;
                    labels[[i, j, k]] = *class;
                }
            }
            let number = NOISE + (x as u64 * ny + y as u64) * nz + z as u64;
            hu + (self.stream.uniform(number) - 0.5) * 80.0
        });
        (voxels, labels)
    }

    /// A header for files that overlay it.
    pub fn header(&self) -> NiftiHeader {
        let [x, y, z] = self.shape.map(|n| n as u16);
        NiftiHeader {
            dim: [3, x, y, z, 1, 1, 1, 1],
            pixdim: [1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0],
            sform_code: 1,
            srow_x: [3.0, 0.0, 0.0, 0.0],
            srow_y: [0.0, 3.0, 0.0, 0.0],
            srow_z: [0.0, 0.0, 3.0, 0.0],
            ..NiftiHeader::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::volume::whole;
    use super::*;
    use ndarray::s;
    use proptest::prelude::*;

    const SHAPE: [usize; 3] = [40, 36, 44];

    fn phantom(seed: u64) -> (Array3<f32>, Array3<i32>) {
        Phantom::new(SHAPE, seed).read(&whole(SHAPE))
    }

    #[test]
    fn it_is_made_from_the_seed_and_holds_every_organ() {
        let (a, labels) = phantom(5);
        assert_eq!(a, phantom(5).0);
        assert_ne!(a, phantom(6).0);
        for class in 0..5 {
            assert!(labels.iter().filter(|l| **l == class).count() > 100, "class {class}");
        }
    }

    proptest! {
        #[test]
        fn a_block_is_that_of_the_whole(x in 0usize..40, y in 0usize..36, z in 0usize..44, size in prop::array::uniform3(0usize..20)) {
            thread_local!(static WHOLE: (Array3<f32>, Array3<i32>) = phantom(5));
            let at: Block = [x..(x + size[0]).min(40), y..(y + size[1]).min(36), z..(z + size[2]).min(44)];
            let (voxels, labels) = Phantom::new(SHAPE, 5).read(&at);
            WHOLE.with(|(v, l)| {
                let [x, y, z] = at;
                assert_eq!(voxels, v.slice(s![x.clone(), y.clone(), z.clone()]));
                assert_eq!(labels, l.slice(s![x, y, z]));
            });
        }
    }
}
