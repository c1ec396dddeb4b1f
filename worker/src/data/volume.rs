//! Resampling, cropping and augmentation of volumes `[x, y, z]`.

use mesh::rng::{Stream, key_of};
use ndarray::{Array3, Axis, s};

/// The grid of `from` elements seen by `to`: the place that each index falls on, ends on ends' cells.
fn places(from: usize, to: usize) -> Vec<f32> {
    (0..to).map(|i| ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, from as f32 - 1.0)).collect()
}

/// The volume on a grid of other extents, by trilinear interpolation.
pub fn resample(v: &Array3<f32>, to: [usize; 3]) -> Array3<f32> {
    let mut out = v.clone();
    for (a, &n) in to.iter().enumerate() {
        if out.len_of(Axis(a)) == n {
            continue;
        }
        let at = places(out.len_of(Axis(a)), n);
        let mut shape = out.raw_dim();
        shape[a] = n;
        let mut next = Array3::zeros(shape);
        for (i, p) in at.iter().enumerate() {
            let (low, part) = (p.floor() as usize, p.fract());
            let high = (low + 1).min(out.len_of(Axis(a)) - 1);
            let mut row = next.index_axis_mut(Axis(a), i);
            row.assign(&out.index_axis(Axis(a), low));
            row.zip_mut_with(&out.index_axis(Axis(a), high), |l, h| *l += (h - *l) * part);
        }
        out = next;
    }
    out
}

/// The volume on a grid of other extents, each element that of the nearest one.
pub fn resample_nearest<T: Clone>(v: &Array3<T>, to: [usize; 3]) -> Array3<T> {
    let at: [Vec<usize>; 3] = std::array::from_fn(|a| {
        let n = v.len_of(Axis(a));
        (0..to[a]).map(|i| ((2 * i + 1) * n / (2 * to[a])).min(n - 1)).collect()
    });
    Array3::from_shape_fn((to[0], to[1], to[2]), |(x, y, z)| v[[at[0][x], at[1][y], at[2][z]]].clone())
}

/// First indices of the block of those extents in the middle of a volume.
pub fn middle(shape: [usize; 3], block: [usize; 3]) -> [usize; 3] {
    std::array::from_fn(|a| (shape[a] - block[a].min(shape[a])) / 2)
}

/// The block of those extents from `start` on.
pub fn crop<T: Clone>(v: &Array3<T>, start: [usize; 3], block: [usize; 3]) -> Array3<T> {
    let [x, y, z] = std::array::from_fn(|a| start[a]..start[a] + block[a]);
    v.slice(s![x, y, z]).to_owned()
}

/// How CT numbers (Hounsfield units) are brought to 0..1: `clip(hu / 1024 + 0.5, 0, 1)`.
pub fn normalize_ct(v: &mut Array3<f32>) {
    v.mapv_inplace(|hu| (hu / 1024.0 + 0.5).clamp(0.0, 1.0));
}

/// Mean 0 and deviation 1 over what is brighter than nothing.
pub fn normalize_mr(v: &mut Array3<f32>) {
    let inside: Vec<f64> = v.iter().filter(|x| **x > 0.0).map(|x| f64::from(*x)).collect();
    let n = inside.len().max(1) as f64;
    let mean = inside.iter().sum::<f64>() / n;
    let deviation = (inside.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt().max(1e-6);
    v.mapv_inplace(|x| ((f64::from(x) - mean) / deviation) as f32);
}

/// One augmented view: which axes are flipped, whether it is turned by 180 degrees about z, and by how much each class
/// is shifted in intensity.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Number of the view: what it is drawn from.
    pub id: u64,
    /// Flipped axes.
    pub flips: [bool; 3],
    /// Turned by 180 degrees about z.
    pub turned: bool,
    /// Added to the intensity of each class.
    pub shifts: Vec<f32>,
}

impl View {
    /// View `id` of the run with that seed: a function of the two alone, on any mesh and after any resume.
    pub fn draw(seed: u64, id: u64, classes: usize) -> View {
        let stream = Stream { seed, step: 0, key: key_of("augment") };
        let base = id * (4 + classes as u64);
        let coin = |i: u64| stream.uniform(base + i) < 0.5;
        View {
            id,
            flips: [coin(0), coin(1), coin(2)],
            turned: coin(3),
            shifts: (0..classes).map(|c| (stream.uniform(base + 4 + c as u64) - 0.5) * 0.04).collect(),
        }
    }

    /// The view that changes nothing.
    pub fn plain(id: u64, classes: usize) -> View {
        View { id, flips: [false; 3], turned: false, shifts: vec![0.0; classes] }
    }

    /// Image and labels in this view.
    pub fn apply(&self, image: &Array3<f32>, labels: &Array3<i32>) -> (Array3<f32>, Array3<i32>) {
        // A turn by 180 degrees about z flips x and y.
        let flips = [self.flips[0] != self.turned, self.flips[1] != self.turned, self.flips[2]];
        let (mut i, mut l) = (image.view(), labels.view());
        for (a, _) in flips.iter().enumerate().filter(|(_, f)| **f) {
            i.invert_axis(Axis(a));
            l.invert_axis(Axis(a));
        }
        let (mut image, labels) = (i.as_standard_layout().to_owned(), l.as_standard_layout().to_owned());
        if self.shifts.iter().any(|s| *s != 0.0) {
            image.zip_mut_with(&labels, |v, c| *v += self.shifts.get(*c as usize).copied().unwrap_or(0.0));
        }
        (image, labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp() -> Array3<f32> {
        Array3::from_shape_fn((4, 5, 6), |(x, y, z)| x as f32 + 10.0 * y as f32 + 100.0 * z as f32)
    }

    #[test]
    fn resampling_keeps_planes_and_undoes_itself_on_labels() {
        let up = resample(&ramp(), [8, 5, 12]);
        assert_eq!(up.shape(), [8, 5, 12]);
        // Linear inside: index 3 of 8 lies at 1.25 of 4, index 5 of 12 at 2.25 of 6.
        assert!((up[[3, 2, 5]] - (1.25 + 20.0 + 225.0)).abs() < 1e-3);
        let labels = ramp().mapv(|v| v as i32);
        assert_eq!(resample_nearest(&resample_nearest(&labels, [8, 10, 12]), [4, 5, 6]), labels);
        assert_eq!(crop(&labels, middle([4, 5, 6], [2, 3, 4]), [2, 3, 4])[[0, 0, 0]], labels[[1, 1, 1]]);
    }

    #[test]
    fn a_view_moves_image_and_labels_alike_and_depends_on_seed_and_number_alone() {
        let (image, labels) = (ramp(), ramp().mapv(|v| v as i32));
        for id in 0..32 {
            let view = View::draw(3, id, 2);
            assert_eq!(view, View::draw(3, id, 2));
            let plain = View { shifts: vec![], ..view.clone() };
            let (i, l) = plain.apply(&image, &labels);
            assert_eq!(i.mapv(|v| v as i32), l);
            assert_eq!(plain.apply(&i, &l), (image.clone(), labels.clone()), "views are their own inverses");
        }
        let all: Vec<View> = (0..32).map(|id| View::draw(3, id, 2)).collect();
        for a in 0..3 {
            assert!((6..26).contains(&all.iter().filter(|v| v.flips[a]).count()));
        }
    }
}
