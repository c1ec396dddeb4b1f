//! Fused loops: a straight-line program that is evaluated at every point of a loop nest.
//!
//! The planner makes bodies out of chains of elementwise ops; a backend runs them over blocks of points, either to
//! store results ([`Loop`] as a map) or to reduce them ([`Reduction`]).

use crate::chunk::{ChunkBox, Tree, TreeDim};
use crate::dim::DType;
use crate::ops::binary::BinaryFn;
use crate::ops::compare::CompareFn;
use crate::ops::reduce::ReduceFn;
use crate::ops::source::Distribution;
use crate::ops::unary::UnaryFn;
use std::ops::Range;
use std::sync::Arc;

/// Index of an earlier instruction of the body, whose value is meant.
pub type Slot = usize;

/// One instruction of a body; it computes one value a point.
#[derive(Clone, Debug, PartialEq)]
pub enum Instr {
    /// Element of operand `0`.
    Load(usize),
    /// A constant.
    Constant(f64),
    /// The step that runs.
    Step,
    /// The global index along one loop.
    Index {
        /// The loop.
        dim: usize,
    },
    /// A random number of the stream (seed, step, `key`).
    Random {
        /// What is drawn.
        distribution: Distribution,
        /// Key of the op.
        key: u32,
        /// Strides of the whole random tensor by loop (0 where it lacks the dimension); the element's index is their
        /// product with the *global* loop indices, summed up.
        strides: Vec<u64>,
    },
    /// A function of one value.
    Unary(UnaryFn, Slot),
    /// A function of two values of one dtype.
    Binary(BinaryFn, Slot, Slot),
    /// A comparison of two values of one dtype.
    Compare(CompareFn, Slot, Slot),
    /// Condition, value if true, value if false.
    Select(Slot, Slot, Slot),
    /// The value in the instruction's dtype.
    Cast(Slot),
}

/// The most instructions a body may have; loops are not merged beyond that.
pub const MAX_INSTRS: usize = 192;

/// A straight-line program; the dtype beside each instruction is its result's.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Body {
    /// Instructions in order.
    pub instrs: Vec<(Instr, DType)>,
    /// Which values are the results.
    pub results: Vec<Slot>,
}

/// How a loop nest reads an operand's buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    /// Element type of the buffer.
    pub dtype: DType,
    /// Element read at the first point.
    pub offset: usize,
    /// Elements between the points of each loop; 0 for a broadcast.
    pub strides: Vec<usize>,
}

impl Access {
    /// Whether a nest of those extents reads the buffer's elements one after the other, each once.
    pub fn is_whole(&self, extents: &[usize]) -> bool {
        let mut step = 1;
        let mut loops = self.strides.iter().zip(extents).rev();
        self.offset == 0
            && loops.all(|(stride, n)| {
                let fits = *stride == step || *n <= 1;
                step *= n;
                fits
            })
    }
}

/// A loop nest with a body. As a map, result `r` is stored contiguously in loop order in buffer `r`.
#[derive(Clone, Debug, PartialEq)]
pub struct Loop {
    /// Points of each loop, outermost first.
    pub extents: Vec<usize>,
    /// Global index of each loop's first point.
    pub origin: Vec<usize>,
    /// Operands that [`Instr::Load`] names.
    pub operands: Vec<Access>,
    /// What is computed at each point, on every device the same.
    pub body: Arc<Body>,
}

/// A loop nest whose results are reduced over some of the loops; the first of them may be stored, as a map's.
///
/// Results are stored as `[nodes, kept loops..]` for the nodes of `tree` that `owned` holds completely. Sums run in the
/// canonical order: a leaf loop by loop, first each run along the last reduced loop, one element after the other, then the
/// sums of those along the reduced loop before, and so on, one accumulator per kept point and loop; but where the innermost
/// loop is a reduced one, 16 lanes (lane = index in the leaf's run along that loop, modulo 16) that last for the whole leaf,
/// row-major over the reduced loops, and are added at its end as a binary tree (lane l with lane l + 8, then + 4, + 2, + 1).
#[derive(Clone, Debug, PartialEq)]
pub struct Reduction {
    /// The loop nest; the reduced loops run over just what `owned` holds.
    pub nest: Loop,
    /// Which loops are reduced.
    pub reduced: Vec<bool>,
    /// How many of the results, the first ones, are stored and not reduced.
    pub stored: usize,
    /// How.
    pub f: ReduceFn,
    /// The summation tree over the reduced loops, in their order.
    pub tree: Tree,
    /// The chunks reduced here.
    pub owned: ChunkBox,
}

impl Reduction {
    /// How many of the results, the last ones, are reduced.
    pub fn sums(&self) -> usize {
        self.nest.body.results.len() - self.stored
    }

    /// The local indices of each chunk that is reduced here, by reduced loop.
    pub fn chunks(&self) -> Vec<Vec<Range<usize>>> {
        let origins = self.nest.origin.iter().zip(&self.reduced).filter(|(_, reduced)| **reduced).map(|(o, _)| *o);
        let of_loop = |((dim, owned), origin): ((&TreeDim, &Range<usize>), usize)| {
            let edge = |chunk: usize| chunk * dim.size / dim.chunks - origin;
            owned.clone().map(|chunk| edge(chunk)..edge(chunk + 1)).collect()
        };
        self.tree.dims.iter().zip(&self.owned).zip(origins).map(of_loop).collect()
    }

    /// What is left to do where each leaf's sums over the last `loops` reduced loops are there, for each point of the others:
    /// operand `r` has those of result `r` that is reduced, with an element for each chunk where the nest has its points.
    pub fn rest(&self, loops: usize) -> Reduction {
        let mut rest = Reduction { stored: 0, ..self.clone() };
        let reduced = (0..self.reduced.len()).filter(|l| self.reduced[*l]);
        for (dim, l) in reduced.enumerate().skip(self.tree.dims.len() - loops) {
            (rest.nest.extents[l], rest.nest.origin[l]) = (self.owned[dim].len(), self.owned[dim].start);
            rest.tree.dims[dim].size = self.tree.dims[dim].chunks;
        }
        let access = |dtype| Access { dtype, offset: 0, strides: strides(&rest.nest.extents) };
        let dtype = |slot: &Slot| self.nest.body.instrs[*slot].1;
        let dtypes: Vec<DType> = self.nest.body.results[self.stored..].iter().map(dtype).collect();
        rest.nest.operands = dtypes.iter().copied().map(access).collect();
        let instrs = dtypes.iter().enumerate().map(|(r, dtype)| (Instr::Load(r), *dtype)).collect();
        rest.nest.body = Body { instrs, results: (0..dtypes.len()).collect() }.into();
        rest
    }
}

/// Row-major strides of an array of those extents.
pub(crate) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}
