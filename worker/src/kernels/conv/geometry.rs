//! Which inputs the outputs of a convolution read.

use mesh::dim::Name;
use mesh::ops::conv::Conv;
use mesh::ops::window::Window;
use mesh::plan::{Part, Piece};
use mesh::region::Region;
use std::ops::Range;

/// Row-major strides of what is held of a tensor.
pub fn strides(part: &Part) -> Vec<usize> {
    let shape = part.region.shape();
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// Held range and stride of a dimension; a dimension that is not there is one element.
pub fn axis_of(part: &Part, name: &Name) -> (Range<usize>, usize) {
    match part.ty.position(name) {
        Some(p) => (part.region.0[p].1.clone(), strides(part)[p]),
        None => (0..1, 0),
    }
}

/// One spatial dimension of the outputs computed here: by output, taps and the (held-local) input indices they read, for taps
/// inside the input.
pub struct Axis {
    pub taps: Vec<Vec<(usize, usize)>>,
}

/// Outputs along the innermost dimension that share their taps: every `out_step`-th.
pub struct Phase {
    /// First output, local.
    pub first: usize,
    /// Outputs between them.
    pub out_step: usize,
    /// How many.
    pub count: usize,
    /// Input indices from one output to the next.
    pub in_step: usize,
    /// Global input index that the first output's tap offset 0 reads; may be negative.
    pub base: isize,
    /// Tap and its offset in input indices.
    pub taps: Vec<(usize, usize)>,
}

impl Axis {
    /// Whether each output reads neighbouring inputs, and none that lie before those of the output before it.
    pub fn slides(&self) -> bool {
        let read = |taps: &Vec<(usize, usize)>| {
            let all = || taps.iter().map(|t| t.1);
            Some((all().min()?, all().max()?, taps.len()))
        };
        let windows: Vec<_> = self.taps.iter().filter_map(read).collect();
        windows.iter().all(|(low, high, n)| high - low + 1 == *n)
            && windows.is_sorted_by_key(|w| w.0)
            && windows.is_sorted_by_key(|w| w.1)
    }

    /// Input rows that `rows` neighbouring outputs span at most.
    pub fn span(&self, rows: usize) -> usize {
        self.taps
            .chunks(rows)
            .map(|c| {
                let all = || c.iter().flatten().map(|t| t.1);
                all().max().map_or(0, |h| h + 1 - all().min().unwrap_or(0))
            })
            .max()
            .unwrap_or(1)
            .max(1)
    }
}

/// One spatial dimension: who reads what.
pub struct Geometry<'a> {
    pub window: &'a Window,
    pub held: Range<usize>,
    pub stride: usize,
    pub whole: usize,
    pub outputs: Range<usize>,
    pub transposed: bool,
}

impl Geometry<'_> {
    pub fn new<'a>(window: &'a Window, x: &Part, out: &Part, transposed: bool) -> Geometry<'a> {
        let (held, stride) = axis_of(x, &window.dim);
        let (outputs, _) = axis_of(out, &window.dim);
        let whole = x.ty.size_of(&window.dim).unwrap_or(1);
        Geometry { window, held, stride, whole, outputs, transposed }
    }

    /// The global input index that tap `j` of output `o` reads, if inside the input.
    fn tap(&self, o: usize, j: usize) -> Option<usize> {
        if !self.transposed {
            return self.window.tap(o, j, self.whole);
        }
        let at = (o + self.window.lo).checked_sub(j * self.window.dilation)?;
        (at % self.window.stride == 0).then_some(at / self.window.stride).filter(|i| *i < self.whole)
    }

    pub fn axis(&self) -> Axis {
        let taps = self
            .outputs
            .clone()
            .map(|o| {
                let taps = (0..self.window.size).filter_map(|j| Some((j, self.tap(o, j)? - self.held.start)));
                taps.collect()
            })
            .collect();
        Axis { taps }
    }

    pub fn phases(&self) -> Vec<Phase> {
        let w = self.window;
        if !self.transposed {
            let base = (self.outputs.start * w.stride) as isize - w.lo as isize;
            let taps = (0..w.size).map(|j| (j, j * w.dilation)).collect();
            return vec![Phase { first: 0, out_step: 1, count: self.outputs.len(), in_step: w.stride, base, taps }];
        }
        (0..w.stride.min(self.outputs.len()))
            .map(|first| {
                // Taps in ascending order read descending inputs; offsets count from the lowest.
                let at = |j: usize| (self.outputs.start + first + w.lo) as isize - (j * w.dilation) as isize;
                let valid: Vec<usize> = (0..w.size).filter(|&j| at(j).rem_euclid(w.stride as isize) == 0).collect();
                let index = |j: usize| at(j).div_euclid(w.stride as isize);
                let base = valid.iter().map(|&j| index(j)).min().unwrap_or(0);
                let taps = valid.iter().map(|&j| (j, (index(j) - base) as usize)).collect();
                let count = (self.outputs.len() - first).div_ceil(w.stride);
                Phase { first, out_step: w.stride, count, in_step: 1, base, taps }
            })
            .collect()
    }
}

/// The element offsets in x of the batches computed, in the order of the result.
pub fn batch_offsets(conv: &Conv, x: &Part, out: &Part, channel: &Name) -> Vec<usize> {
    let mut offsets = vec![0];
    for (d, (name, range)) in out.ty.dims.iter().zip(&out.region.0) {
        if conv.windows.iter().any(|w| w.dim == d.name) || d.name == *channel {
            continue;
        }
        let (held, stride) = axis_of(x, name);
        offsets = offsets
            .iter()
            .flat_map(|o| range.clone().map(move |i| (o, i)))
            .map(|(o, i)| o + (i - held.start) * stride)
            .collect();
    }
    offsets
}

/// Where the rows of a convolution's input lie: positions along its innermost dimension, with their channels. One array has
/// them all, or a device's own part some, and what came from other devices the others.
pub struct Input(Vec<Rows>);

/// An array of rows.
struct Rows {
    /// Which of the step's inputs it lies in, and its first byte there.
    input: usize,
    first: usize,
    bytes: usize,
    /// Indices that it has along the two outer dimensions, counted from the first ones held.
    held: [Range<usize>; 2],
    /// Elements between them.
    strides: [usize; 2],
    /// Element offsets of the batches.
    batches: Vec<usize>,
}

impl Input {
    /// That of a convolution of `x`, in pieces if there are any, of the batches of `out`, whose channels are those of that name.
    pub fn new(x: &Part, pieces: &[Piece], conv: &Conv, out: &Part, channel: &Name) -> Input {
        let rows = |region: &Region, input: usize, first: usize| {
            let part = Part { ty: x.ty.clone(), region: region.clone() };
            // One to three dimensions as three: a missing one in front has one index.
            let outer = |i: usize| (i + conv.windows.len()).checked_sub(3).map(|d| &conv.windows[d].dim);
            let along = [0, 1].map(|i| match outer(i) {
                None => (0..1, 0),
                Some(name) => {
                    let ((from, _), (here, stride)) = (axis_of(x, name), axis_of(&part, name));
                    (here.start - from.start..here.end - from.start, stride)
                }
            });
            let strides = [along[0].1, along[1].1];
            let batches = batch_offsets(conv, &part, out, channel);
            Rows { input, first, bytes: x.ty.dtype.bytes(), held: along.map(|(held, _)| held), strides, batches }
        };
        match pieces {
            [] => Input(vec![rows(&x.region, 0, 0)]),
            pieces => {
                let there = pieces.iter().filter(|p| !p.region.is_empty());
                Input(there.map(|p| rows(&p.region, p.input, p.first)).collect())
            }
        }
    }

    /// How many batches there are.
    pub fn batches(&self) -> usize {
        self.0.first().map_or(0, |rows| rows.batches.len())
    }

    /// The first element held of a row, by indices along the two outer dimensions. Some array has it.
    #[inline]
    pub fn row(&self, inputs: &[*const u8], batch: usize, at: [usize; 2]) -> *const u8 {
        let has = |rows: &&Rows| rows.held[0].contains(&at[0]) && rows.held[1].contains(&at[1]);
        let rows = match &self.0[..] {
            [all] => all,
            several => several.iter().find(has).expect("what is read is held"),
        };
        let along = |d: usize| (at[d] - rows.held[d].start) * rows.strides[d];
        inputs[rows.input].wrapping_add(rows.first + (rows.batches[batch] + along(0) + along(1)) * rows.bytes)
    }
}

/// What lies outside of a box inside of another one, in boxes.
pub fn around(mut all: [Range<usize>; 2], inside: [Range<usize>; 2]) -> Vec<[Range<usize>; 2]> {
    let mut boxes = vec![];
    for (i, inside) in inside.into_iter().enumerate() {
        for side in [all[i].start..inside.start, inside.end..all[i].end] {
            let mut slab = all.clone();
            slab[i] = side;
            boxes.extend((!slab[i].is_empty()).then_some(slab));
        }
        all[i] = inside;
    }
    boxes
}
