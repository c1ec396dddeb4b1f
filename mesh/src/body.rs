//! Fused loops: a straight-line program that is evaluated at every point of a loop nest.
//!
//! The planner makes bodies out of chains of elementwise ops; a backend runs them over blocks of points, either to
//! store results ([`Loop`] as a map) or to reduce them ([`Reduction`]).

use crate::chunk::{ChunkBox, Tree};
use crate::dim::DType;
use crate::ops::binary::BinaryFn;
use crate::ops::compare::CompareFn;
use crate::ops::reduce::ReduceFn;
use crate::ops::source::Distribution;
use crate::ops::unary::UnaryFn;
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
/// canonical order: within a leaf row-major over the reduced loops, one accumulator per kept point; but where the
/// innermost loop is a reduced one, 16 lanes (lane = index in the leaf's run along that loop, modulo 16) that last for
/// the whole leaf and are added at its end as a binary tree (lane l with lane l + 8, then + 4, + 2, + 1).
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
