//! Resampling, normalisation and augmentation of volumes `[x, y, z]`, block by block: a block of the result is made from the
//! block of the volume that it takes, with the bits that it has in the whole.

use mesh::rng::{Stream, key_of};
use ndarray::{Array3, Axis};
use std::ops::Range;

/// A block of a volume: a range of indices by axis.
pub type Block = [Range<usize>; 3];

/// All of a volume.
pub fn whole(shape: [usize; 3]) -> Block {
    shape.map(|n| 0..n)
}

/// The extents of a block.
pub fn extents(block: &Block) -> [usize; 3] {
    block.clone().map(|r| r.len())
}

/// First indices of the block of those extents in the middle of a volume.
pub fn middle(shape: [usize; 3], block: [usize; 3]) -> [usize; 3] {
    std::array::from_fn(|a| (shape[a] - block[a].min(shape[a])) / 2)
}

/// Most elements of a slab of [`slabs`].
const SLAB: usize = 16 << 20;

/// A volume in slabs across x, one after the other: their elements in row-major order are the volume's.
pub fn slabs(shape: [usize; 3]) -> impl Iterator<Item = Block> {
    let [nx, ny, nz] = shape;
    let thick = (SLAB / (ny * nz).max(1)).max(1);
    (0..nx).step_by(thick).map(move |x| [x..(x + thick).min(nx), 0..ny, 0..nz])
}

/// A volume of the extents `from`, seen on a grid of the extents `to`: ends fall on ends' cells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Extents of the volume.
    pub from: [usize; 3],
    /// Extents of the grid.
    pub to: [usize; 3],
}

impl Grid {
    /// Between which elements index `i` falls along an axis, and which part of the way from the first to the second.
    fn between(&self, axis: usize, i: usize) -> (usize, usize, f32) {
        let (from, to) = (self.from[axis], self.to[axis]);
        if from == to {
            return (i, i, 0.0);
        }
        let place = ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, from as f32 - 1.0);
        let low = place.floor() as usize;
        (low, (low + 1).min(from - 1), place.fract())
    }

    /// The element that is nearest to those indices of the grid.
    pub fn nearest_to(&self, at: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|a| ((2 * at[a] + 1) * self.from[a] / (2 * self.to[a])).min(self.from[a] - 1))
    }

    /// What of the volume the block `at` of the grid is interpolated from.
    fn linear_reads(&self, at: &Block) -> Block {
        std::array::from_fn(|a| match at[a].is_empty() {
            true => 0..0,
            false => self.between(a, at[a].start).0..self.between(a, at[a].end - 1).1 + 1,
        })
    }

    /// The block `at` of the grid by trilinear interpolation; `read` gives a block of the volume.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn linear<E>(&self, at: &Block, read: impl FnOnce(&Block) -> Result<Array3<f32>, E>) -> Result<Array3<f32>, E> {
        let reads = self.linear_reads(at);
        let mut out = read(&reads)?;
        for a in (0..3).filter(|a| self.from[*a] != self.to[*a]) {
            let mut shape = out.raw_dim();
            shape[a] = at[a].len();
            let mut next = Array3::zeros(shape);
            for (mut row, i) in next.axis_iter_mut(Axis(a)).zip(at[a].clone()) {
                let (low, high, part) = self.between(a, i);
                row.assign(&out.index_axis(Axis(a), low - reads[a].start));
                row.zip_mut_with(&out.index_axis(Axis(a), high - reads[a].start), |l, h| *l += (h - *l) * part);
            }
            out = next;
        }
        Ok(out)
    }

    /// What of the volume the nearest elements of the block `at` of the grid lie in.
    fn nearest_reads(&self, at: &Block) -> Block {
        let [first, last] =
            [at.clone().map(|r| r.start), at.clone().map(|r| r.end.max(1) - 1)].map(|i| self.nearest_to(i));
        std::array::from_fn(|a| if at[a].is_empty() { 0..0 } else { first[a]..last[a] + 1 })
    }

    /// The block `at` of the grid, each element that of the nearest one; `read` gives a block of the volume.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn nearest<T: Clone, E>(
        &self,
        at: &Block,
        read: impl FnOnce(&Block) -> Result<Array3<T>, E>,
    ) -> Result<Array3<T>, E> {
        let reads = self.nearest_reads(at);
        let read = read(&reads)?;
        let place = |a: usize, i: usize| (2 * (at[a].start + i) + 1) * self.from[a] / (2 * self.to[a]);
        let places: [Vec<usize>; 3] = std::array::from_fn(|a| {
            (0..at[a].len()).map(|i| place(a, i).min(self.from[a] - 1) - reads[a].start).collect()
        });
        let element = |(x, y, z)| read[[places[0][x], places[1][y], places[2][z]]].clone();
        Ok(Array3::from_shape_fn(extents(at), element))
    }
}

/// How intensities are brought to what a network sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normal {
    /// Of a CT, in Hounsfield units: `clip(hu / 1024 + 0.5, 0, 1)`.
    Ct,
    /// Of anything else: mean 0 and deviation 1 over what is brighter than nothing.
    Spread {
        /// Mean of that.
        mean: f64,
        /// Its deviation.
        deviation: f64,
    },
}

impl Normal {
    /// That of a volume, which `pass` shows a value at a time, in row-major order, as often as it is called.
    ///
    /// # Errors
    /// Those of `pass`.
    pub fn of<E>(pass: impl Fn(&mut dyn FnMut(f32)) -> Result<(), E>) -> Result<Normal, E> {
        let (mut lowest, mut sum, mut count) = (f32::INFINITY, 0.0, 0usize);
        pass(&mut |v| {
            lowest = lowest.min(v);
            if v > 0.0 {
                sum += f64::from(v);
                count += 1;
            }
        })?;
        // Air is about -1000 Hounsfield units; magnetic resonance has nothing below 0.
        if lowest < -500.0 {
            return Ok(Normal::Ct);
        }
        let n = count.max(1) as f64;
        let (mean, mut squares) = (sum / n, 0.0);
        pass(&mut |v| {
            if v > 0.0 {
                squares += (f64::from(v) - mean).powi(2);
            }
        })?;
        Ok(Normal::Spread { mean, deviation: (squares / n).sqrt().max(1e-6) })
    }

    /// Brings intensities to it.
    pub fn apply(&self, v: &mut Array3<f32>) {
        match *self {
            Normal::Ct => v.mapv_inplace(|hu| (hu / 1024.0 + 0.5).clamp(0.0, 1.0)),
            Normal::Spread { mean, deviation } => {
                v.mapv_inplace(|x| ((f64::from(x) - mean) / deviation) as f32);
            }
        }
    }
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

    /// Axes along which the view goes backwards: a turn by 180 degrees about z flips x and y.
    fn backwards(&self) -> [bool; 3] {
        [self.flips[0] != self.turned, self.flips[1] != self.turned, self.flips[2]]
    }

    /// What of a volume of those extents the block `at` of this view shows.
    pub fn reads(&self, shape: [usize; 3], at: &Block) -> Block {
        let backwards = self.backwards();
        std::array::from_fn(|a| match backwards[a] {
            true => shape[a] - at[a].end..shape[a] - at[a].start,
            false => at[a].clone(),
        })
    }

    /// What it shows, the way round that it shows it.
    pub fn turn<T>(&self, mut read: Array3<T>) -> Array3<T> {
        let backwards = self.backwards();
        (0..3).filter(|a| backwards[*a]).for_each(|a| read.invert_axis(Axis(a)));
        read
    }

    /// Whether it shifts intensities at all.
    pub fn shifts_any(&self) -> bool {
        self.shifts.iter().any(|s| *s != 0.0)
    }

    /// Shifts the intensities of a block of the view by the classes there.
    pub fn shift(&self, image: &mut Array3<f32>, labels: &Array3<i32>) {
        image.zip_mut_with(labels, |v, c| *v += self.shifts.get(*c as usize).copied().unwrap_or(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::s;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn ramp() -> Array3<f32> {
        Array3::from_shape_fn((4, 5, 6), |(x, y, z)| x as f32 + 10.0 * y as f32 + 100.0 * z as f32)
    }

    fn part<T: Clone>(v: &Array3<T>, [x, y, z]: &Block) -> Array3<T> {
        v.slice(s![x.clone(), y.clone(), z.clone()]).to_owned()
    }

    fn linear(grid: &Grid, v: &Array3<f32>, at: &Block) -> Array3<f32> {
        grid.linear(at, |at| Ok::<_, Infallible>(part(v, at))).unwrap()
    }

    fn nearest(grid: &Grid, v: &Array3<i32>, at: &Block) -> Array3<i32> {
        grid.nearest(at, |at| Ok::<_, Infallible>(part(v, at))).unwrap()
    }

    fn bits(v: &Array3<f32>) -> Array3<u32> {
        v.mapv(f32::to_bits)
    }

    #[test]
    fn resampling_keeps_planes_and_undoes_itself_on_labels() {
        let grid = Grid { from: [4, 5, 6], to: [8, 5, 12] };
        let up = linear(&grid, &ramp(), &whole(grid.to));
        assert_eq!(up.shape(), [8, 5, 12]);
        // Linear inside: index 3 of 8 lies at 1.25 of 4, index 5 of 12 at 2.25 of 6.
        assert!((up[[3, 2, 5]] - (1.25 + 20.0 + 225.0)).abs() < 1e-3);
        let labels = ramp().mapv(|v| v as i32);
        let (up, down) = (Grid { from: [4, 5, 6], to: [8, 10, 12] }, Grid { from: [8, 10, 12], to: [4, 5, 6] });
        let there = nearest(&up, &labels, &whole(up.to));
        assert_eq!(nearest(&down, &there, &whole(down.to)), labels);
        assert_eq!(middle([4, 5, 6], [2, 3, 4]), [1, 1, 1]);
        assert!(slabs([40, 1024, 2048]).eq([
            [0..8, 0..1024, 0..2048],
            [8..16, 0..1024, 0..2048],
            [16..24, 0..1024, 0..2048],
            [24..32, 0..1024, 0..2048],
            [32..40, 0..1024, 0..2048]
        ]));
    }

    /// A range within `0 .. n`, of at least one index.
    fn range(n: usize, draw: (u32, u32)) -> Range<usize> {
        let start = draw.0 as usize % n;
        start..start + 1 + draw.1 as usize % (n - start)
    }

    proptest! {
        #[test]
        fn a_block_has_the_bits_that_it_has_in_the_whole(
            from in prop::array::uniform3(1usize..20),
            to in prop::array::uniform3(1usize..20),
            at in prop::array::uniform3(any::<(u32, u32)>()),
            seed in any::<u64>(),
        ) {
            let stream = Stream { seed, step: 0, key: 1 };
            let mut i = 0;
            let image = Array3::from_shape_simple_fn(from, || { i += 1; stream.uniform(i) * 2000.0 - 1000.0 });
            let labels = image.mapv(|v| v as i32);
            let grid = Grid { from, to };
            let at: Block = std::array::from_fn(|a| range(to[a], at[a]));
            let all = linear(&grid, &image, &whole(to));
            prop_assert_eq!(bits(&linear(&grid, &image, &at)), bits(&part(&all, &at)));
            let by_index = Array3::from_shape_fn(to, |(x, y, z)| labels[grid.nearest_to([x, y, z])]);
            prop_assert_eq!(nearest(&grid, &labels, &at), part(&by_index, &at));
            prop_assert!((0..3).all(|a| extents(&grid.linear_reads(&at))[a] <= at[a].len() * from[a] / to[a] + 3));
            let view = View::draw(seed, 1, 3);
            let shown = view.turn(all.clone());
            prop_assert_eq!(bits(&view.turn(part(&all, &view.reads(to, &at)))), bits(&part(&shown, &at)));
        }
    }

    #[test]
    fn intensities_are_brought_to_0_and_1_or_to_mean_and_deviation() {
        let pass = |v: &[f32]| {
            let v = v.to_vec();
            move |each: &mut dyn FnMut(f32)| {
                v.iter().for_each(|v| each(*v));
                Ok::<_, ()>(())
            }
        };
        let ct = Normal::of(pass(&[-1000.0, 0.0, 256.0])).unwrap();
        let mut v = Array3::from_shape_vec((1, 1, 3), vec![-1000.0, 256.0, 3000.0]).unwrap();
        ct.apply(&mut v);
        assert_eq!((ct, v.into_raw_vec_and_offset().0), (Normal::Ct, vec![0.0, 0.75, 1.0]));
        let mr = Normal::of(pass(&[0.0, 2.0, 0.0, 4.0, -1.0])).unwrap();
        assert_eq!(mr, Normal::Spread { mean: 3.0, deviation: 1.0 });
        let mut v = Array3::from_elem((1, 1, 1), 5.0);
        mr.apply(&mut v);
        assert_eq!(v[[0, 0, 0]], 2.0);
        assert_eq!(Normal::of(pass(&[0.0; 4])).unwrap(), Normal::Spread { mean: 0.0, deviation: 1e-6 });
        assert_eq!(Normal::of(|_| Err("broken")), Err("broken"));
    }

    #[test]
    fn a_view_moves_image_and_labels_alike_and_depends_on_seed_and_number_alone() {
        let (image, labels) = (ramp(), ramp().mapv(|v| v as i32));
        for id in 0..32 {
            let view = View::draw(3, id, 2);
            assert_eq!(view, View::draw(3, id, 2));
            let (i, l) = (view.turn(image.clone()), view.turn(labels.clone()));
            assert_eq!(i.mapv(|v| v as i32), l);
            assert_eq!(
                (view.turn(i.clone()), view.turn(l)),
                (image.clone(), labels.clone()),
                "views are their own inverses"
            );
            assert!(view.shifts_any() && !View::plain(id, 2).shifts_any());
            let (mut shifted, classes) = (i.clone(), Array3::from_shape_fn((4, 5, 6), |(x, _, _)| x as i32));
            view.shift(&mut shifted, &classes);
            assert_eq!(shifted[[1, 2, 3]], i[[1, 2, 3]] + view.shifts[1]);
            assert_eq!(shifted[[3, 2, 3]], i[[3, 2, 3]], "a class without a shift stays");
        }
        let all: Vec<View> = (0..32).map(|id| View::draw(3, id, 2)).collect();
        for a in 0..3 {
            assert!((6..26).contains(&all.iter().filter(|v| v.flips[a]).count()));
        }
    }
}
