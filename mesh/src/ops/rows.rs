//! Linear maps along one dimension, as the sparse rows of their matrices: what `window_sum` and `resize` are, and their
//! adjoints.
//!
//! A row says which elements of the input an element of the result is the weighted sum of, in ascending order, which
//! is the order of the sum. Rows are made from global indices, so that every device has the same weights; the reference
//! and the kernels use the same rows.

use crate::dim::{Name, Type};
use crate::op::Reference;
use crate::region::Region;
use ndarray::Axis;
use std::ops::Range;

/// The rows of a linear map from `from` elements.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rows {
    from: usize,
    /// By row: its end among the entries.
    ends: Vec<usize>,
    /// Input index and weight.
    entries: Vec<(usize, f32)>,
}

impl Rows {
    /// The map with those rows, each in ascending order of the input indices.
    pub(crate) fn new<R: IntoIterator<Item = (usize, f32)>>(from: usize, rows: impl IntoIterator<Item = R>) -> Rows {
        let mut out = Rows { from, ends: vec![], entries: vec![] };
        for row in rows {
            out.entries.extend(row);
            out.ends.push(out.entries.len());
        }
        out
    }
    /// Number of rows: elements of the result.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
    /// Which elements are added up to element `i`, with which weights.
    pub fn row(&self, i: usize) -> &[(usize, f32)] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.entries[start..self.ends[i]]
    }
    /// The adjoint map.
    pub fn transposed(&self) -> Rows {
        let mut rows: Vec<Vec<(usize, f32)>> = vec![vec![]; self.from];
        for o in 0..self.len() {
            self.row(o).iter().for_each(|&(i, w)| rows[i].push((o, w)));
        }
        Rows::new(self.len(), rows)
    }
    /// The input elements that the elements `range` of the result are made of.
    pub fn reads(&self, range: &Range<usize>) -> Range<usize> {
        let entries = || range.clone().flat_map(|o| self.row(o)).map(|(i, _)| *i);
        entries().min().zip(entries().max()).map_or(0..0, |(first, last)| first..last + 1)
    }
    /// The sharding rule of a map along `dim` ([`crate::op::Op::needs`]).
    pub(crate) fn needs(&self, dim: &Name, input: &Type, at: &Region) -> Region {
        let range = at.get(dim).map(|o| self.reads(o)).unwrap_or(0..self.from);
        at.of(input).with(dim, range)
    }
    /// Operations on a result of that (local) type.
    pub(crate) fn flops(&self, out: &Type) -> u64 {
        2 * out.elements() as u64 * self.entries.len().div_ceil(self.len().max(1)) as u64
    }
    /// The map along a place of a tensor.
    pub(crate) fn apply(&self, x: &Reference, at: usize) -> Reference {
        let mut shape = x.shape().to_vec();
        shape[at] = self.len();
        let mut y = Reference::zeros(shape);
        for (o, mut y) in y.axis_iter_mut(Axis(at)).enumerate() {
            for &(i, w) in self.row(o) {
                y.scaled_add(f64::from(w), &x.index_axis(Axis(at), i));
            }
        }
        y
    }
}
