//! What tiles of weight gradients read of the leaves of a piece: rows of products, or a list of them.

use super::WeightGradPlan;
use super::blocks::Box4;
use super::pack::Packed;
use std::ops::Range;

/// Where a task finds its block's x and dy: in the inputs, or packed.
#[derive(Clone, Copy)]
pub struct View {
    /// Of x.
    pub x: *const f32,
    /// Of dy.
    pub dy: *const f32,
    /// If packed.
    pub packed: Option<Packed>,
    /// From a product to the next one along s1, s2 and the innermost dimension, in x and in dy: elements, or units.
    pub next: [[usize; 2]; 3],
}

impl View {
    /// The first elements or units of a batch in x and in dy.
    pub fn batch(&self, plan: &WeightGradPlan, b: usize) -> [usize; 2] {
        match &self.packed {
            Some(p) => p.batch().map(|units| units * (b - p.first[0])),
            None => plan.batches[b],
        }
    }
}

/// What of a leaf a tap reads: where its first products lie, and how many there are. Tiles read it for every leaf, so it is
/// all that they need of a leaf of one batch.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Span {
    /// Elements or units: from the beginning on if it is of one batch, otherwise from a batch's first one on.
    pub x: usize,
    /// As well, in dy.
    pub dy: usize,
    /// Rows along s1 and s2.
    pub rows: [u32; 2],
    /// Products of a row.
    pub count: u32,
    /// Batches.
    pub batches: u32,
}

/// Floats of workspace that a span takes.
pub const SPAN: usize = size_of::<Span>() / 4;

impl Span {
    /// That of a leaf, with its units.
    pub fn new(
        plan: &WeightGradPlan,
        view: &View,
        [j1, j2, j3]: [usize; 3],
        (at, units): &(Box4, Range<usize>),
    ) -> Span {
        let [a1, a2, a3] = &plan.axes;
        let (rows1, rows2) = (a1.valid(&at[1], j1), a2.valid(&at[2], j2));
        let reads = |a: &super::Axis, r: &Range<usize>, j| if r.is_empty() { None } else { a.x(r.start, j) };
        let (Some(x1), Some(x2)) = (reads(a1, &rows1, j1), reads(a2, &rows2, j2)) else { return Span::default() };
        let (x, dy, count) = if units.is_empty() {
            let run = a3.valid(&at[3], j3);
            let Some(x3) = reads(a3, &run, j3) else { return Span::default() };
            let [x, dy] = match &view.packed {
                Some(p) => {
                    [p.x([x1, x2]) + x3 - p.x_first[2], p.dy([rows1.start, rows2.start]) + run.start - p.first[3]]
                }
                None => [
                    x1 * a1.x_stride + x2 * a2.x_stride + x3 * a3.x_stride,
                    rows1.start * a1.dy_stride + rows2.start * a2.dy_stride + run.start * a3.dy_stride,
                ],
            };
            (x, dy, run.len())
        } else {
            let [x, dy] = view.packed.map_or([0, 0], |p| [p.x([x1, x2]), p.dy([rows1.start, rows2.start])]);
            (x + units.start, dy + units.start, units.len())
        };
        let [first_x, first_dy] = if at[0].len() == 1 { view.batch(plan, at[0].start) } else { [0, 0] };
        let rows = [rows1.len() as u32, rows2.len() as u32];
        Span { x: first_x + x, dy: first_dy + dy, rows, count: count as u32, batches: at[0].len() as u32 }
    }

    /// The same leaf's products, listed in the order in which they are summed behind the first `listed` ones, which become
    /// more.
    pub fn listed(
        self,
        plan: &WeightGradPlan,
        view: &View,
        first: usize,
        list: &mut [Product],
        listed: &mut usize,
    ) -> Span {
        let start = *listed;
        let [next1, next2, next3] = view.next;
        let further = |at: [usize; 2], next: [usize; 2], n: u32| [0, 1].map(|t| at[t] + next[t] * n as usize);
        for b in 0..self.batches {
            let batch = if self.batches == 1 { [0, 0] } else { view.batch(plan, first + b as usize) };
            let at = [batch[0] + self.x, batch[1] + self.dy];
            for i1 in 0..self.rows[0] {
                for i2 in 0..self.rows[1] {
                    let row = further(further(at, next1, i1), next2, i2);
                    for i3 in 0..self.count {
                        list[*listed] = further(row, next3, i3);
                        *listed += 1;
                    }
                }
            }
        }
        Span { x: start, count: (*listed - start) as u32, ..Span::default() }
    }
}

/// Where the factors of a product lie in x and in dy: elements or units.
pub type Product = [usize; 2];

/// Floats of workspace that it takes.
pub const PRODUCT: usize = size_of::<Product>() / 4;

/// How tiles go through the products of a piece's leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Walk {
    /// Row by row.
    Rows,
    /// From a list of all: rows of a few products are ended before a processor foresees it.
    Listed,
    /// Each of several leaves is a single product: groups of them are summed channel by channel.
    Groups,
}
