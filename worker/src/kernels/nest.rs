//! Loop nests: the points of a box with their offsets in several arrays.

use mesh::plan::Part;

/// Loops, outermost first.
pub struct Nest<const N: usize> {
    /// Extent, and elements between neighbours in each array.
    loops: Vec<(usize, [usize; N])>,
    /// Offset of the first point in each array.
    first: [usize; N],
}

impl<const N: usize> Nest<N> {
    /// The loops over the dimensions named, over the indices that `own` holds of them, in arrays that hold `parts`. An
    /// array without a dimension has the same element all along it.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, own: &Part, parts: [&Part; N]) -> Nest<N> {
        let strides = parts.map(super::conv::strides);
        let mut nest = Nest { loops: vec![], first: [0; N] };
        for name in names {
            let Some(range) = own.region.get(name) else { continue };
            let mut stride = [0; N];
            for a in 0..N {
                let Some(p) = parts[a].ty.position(name) else { continue };
                stride[a] = strides[a][p];
                let held = &parts[a].region.0[p].1;
                nest.first[a] += range.start.saturating_sub(held.start) * stride[a];
            }
            nest.loops.push((range.len(), stride));
        }
        nest
    }

    /// Takes the innermost loops, `most` at most, that run through neighbours in the arrays `along` and stand still in
    /// the others off the nest. Returns how many elements they run through.
    pub fn take_lanes(&mut self, along: [bool; N], most: usize) -> usize {
        let mut lanes = 1;
        for _ in 0..most {
            let Some((n, stride)) = self.loops.last() else { break };
            if (0..N).any(|a| *n > 1 && stride[a] != if along[a] { lanes } else { 0 }) {
                break;
            }
            lanes *= n;
            self.loops.pop();
        }
        lanes
    }

    /// Number of points.
    pub fn points(&self) -> usize {
        self.loops.iter().map(|l| l.0).product()
    }

    /// The offsets of a point, counted row-major.
    pub fn at(&self, mut point: usize) -> [usize; N] {
        let mut at = self.first;
        for (n, stride) in self.loops.iter().rev() {
            let i = point % n;
            point /= n;
            for a in 0..N {
                at[a] += i * stride[a];
            }
        }
        at
    }
}
