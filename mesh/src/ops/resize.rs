//! `resize`: a dimension sampled at another number of places, and the adjoint.
//!
//! Elements are cells of equal width, and both grids have the same ends: element `i` of `to` lies at
//! `(i + 0.5) * from / to - 0.5` of `from`, clamped to its ends.
//!
//! C1. The dimension is a dimension of the input, of the size that the op says.
//! C2. Neither size is 0.
//! C3. Linear interpolation and both adjoints take `f32`; the nearest element is that of any dtype.
//!
//! Sharding: a halo of an element where a device's part of the one grid reaches over its part of the other one.

use super::rows::Rows;
use super::window_sum::resized;
use crate::dim::{DType, Name, Type};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::region::Region;

/// How elements between those of the old grid are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Resize {
    /// The element in whose cell the place lies: index `(2 i + 1) * from / (2 to)`.
    Nearest,
    /// Between the two elements around the place, in proportion.
    Linear,
}

/// A dimension sampled at another number of places, or the adjoint of that.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ResizeDim {
    /// The dimension.
    pub dim: Name,
    /// How.
    pub method: Resize,
    /// Its old size.
    pub from: usize,
    /// Its new size.
    pub to: usize,
    /// The adjoint, from the new size to the old one, instead.
    pub adjoint: bool,
}

impl ResizeDim {
    /// The map as rows.
    pub fn rows(&self) -> Rows {
        let (n, m) = (self.from, self.to);
        let rows = Rows::new(
            n,
            (0..m).map(|i| {
                // The place times 2 m, exactly.
                let place = ((2 * i + 1) * n).saturating_sub(m).min(2 * m * n.saturating_sub(1));
                let (low, rest) = (place / (2 * m), place % (2 * m));
                let part = rest as f64 / (2 * m) as f64;
                match self.method {
                    Resize::Nearest => vec![(((2 * i + 1) * n / (2 * m)).min(n.saturating_sub(1)), 1.0)],
                    Resize::Linear if rest == 0 => vec![(low, 1.0)],
                    Resize::Linear => vec![(low, (1.0 - part) as f32), (low + 1, part as f32)],
                }
            }),
        );
        if self.adjoint { rows.transposed() } else { rows }
    }
    /// Whether each element of the result is one of the input's.
    pub fn chooses(&self) -> bool {
        self.method == Resize::Nearest && !self.adjoint
    }
}

impl Op for ResizeDim {
    fn name(&self) -> &'static str {
        if self.adjoint { "resize_grad" } else { "resize" }
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (from, to) = if self.adjoint { (self.to, self.from) } else { (self.from, self.to) };
        let out = resized("C1", x[0], &self.dim, from, to)?;
        if self.from == 0 || self.to == 0 {
            let m = format!("cannot resize `{}` from {} to {}", self.dim, self.from, self.to);
            return refuse("C2", m, "make both sizes 1 or more");
        }
        if !self.chooses() && x[0].dtype != DType::F32 {
            let m = format!("cannot interpolate {}", x[0].dtype);
            return refuse("C3", m, "cast it to f32, or take the nearest element");
        }
        Ok(out)
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        vec![Some(cx.dy.apply(ResizeDim { adjoint: !self.adjoint, ..self.clone() }))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        self.rows().needs(&self.dim, inputs[0], at)
    }
    fn flops(&self, _: &[&Type], out: &Type) -> u64 {
        if self.chooses() { 0 } else { self.rows().flops(out) }
    }
    fn copies(&self) -> bool {
        self.chooses()
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], _: &Type) -> Reference {
        self.rows().apply(x[0], t[0].position(&self.dim).unwrap_or(0))
    }
}

impl Tensor {
    /// The dimensions named at other sizes, one after the other: `x.resize(&[("x", 20), ("y", 30)], Resize::Linear)`.
    /// Centres lie at half indices; what lies outside the outermost centres takes their value.
    #[track_caller]
    pub fn resize(&self, sizes: &[(&str, usize)], method: Resize) -> Tensor {
        let mut x = self.clone();
        for &(name, to) in sizes {
            let from = x.ty().size_of(name).unwrap_or(0);
            if from != to {
                x = x.apply(ResizeDim { dim: name.into(), method, from, to, adjoint: false });
            }
        }
        x
    }
}
