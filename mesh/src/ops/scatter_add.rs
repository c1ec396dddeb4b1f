//! `scatter_add`: adds updates up in the rows that indices name; the adjoint of `gather`.
//!
//! The updates have all dimensions of the indices. Those of them that `over` names are summed over; the indices' other
//! ones are batch dimensions `b`. With `o` the dimensions summed over and `r` the updates' dimensions that the indices
//! do not have: `result[b.., row, r..] = sum of updates[b.., o.., r..] over those o.. with indices[b.., o..] = row`, its
//! dimensions in just this order. An index outside `0 .. n` adds nothing.
//!
//! C1. The indices are `i32`.
//! C2. The updates are `f32` or `i32`.
//! C3. Every dimension of the indices is a dimension of the updates, with its size.
//! C4. Every dimension summed over is a dimension of the indices, named once.
//! C5. The new dimension is none of the updates'.
//!
//! The sum runs along the summation tree over `o`, in the indices' order: within a leaf in row-major order, from -0.0;
//! the tree's first leaf from +0.0. So a leaf without an update for a row may be passed over (x + -0.0 is x), and a row
//! without any is +0.0 on every layout.

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// Sums of updates (the first input) by row (the second one).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ScatterAdd {
    /// The rows.
    pub dim: Dim,
    /// The indices' dimensions that are summed over.
    pub over: Vec<Name>,
}

impl Op for ScatterAdd {
    fn name(&self) -> &'static str {
        "scatter_add"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (updates, indices) = (x[0], x[1]);
        if indices.dtype != DType::I32 {
            return refuse("C1", format!("cannot index by {}", indices.dtype), "cast the indices to i32");
        }
        if !matches!(updates.dtype, DType::F32 | DType::I32) {
            return refuse("C2", format!("cannot add up {}", updates.dtype), "cast the updates to f32 or i32");
        }
        if let Some(d) = indices.dims.iter().find(|d| updates.size_of(&d.name) != Some(d.size)) {
            let m = format!("needs {d} of the indices {indices} in the updates {updates}");
            return refuse("C3", m, "broadcast the updates, or rename one of them");
        }
        for (i, n) in self.over.iter().enumerate() {
            if !indices.has(n) || self.over[..i].contains(n) {
                let help = nearest(n, indices.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
                let m = format!("cannot sum over `{n}` of the indices {indices}");
                return refuse("C4", m, help.unwrap_or("name it once".into()));
            }
        }
        if updates.has(&self.dim.name) {
            let m = format!("cannot add the rows `{}` to {updates}, which has that dimension", self.dim.name);
            return refuse("C5", m, "rename the updates' dimension");
        }
        let batch = indices.dims.iter().filter(|d| !self.over.contains(&d.name));
        let others = updates.dims.iter().filter(|d| !indices.has(&d.name));
        Ok(Type::new(updates.dtype, batch.chain([&self.dim]).chain(others).cloned().collect::<Vec<_>>()))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let ty = cx.inputs[0].ty();
        let names: Vec<&str> = ty.dims.iter().map(|d| &*d.name).collect();
        vec![Some(cx.dy.gather(&cx.inputs[1], &self.dim.name).reorder(&names)), None]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        x[1].dims.iter().filter(|d| self.over.contains(&d.name)).cloned().collect()
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        x[0].elements() as u64
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut y = Reference::zeros(out.shape());
        for (i, &v) in x[0].indexed_iter() {
            let index = |name: &Name| t[0].position(name).map(|p| i[p]).unwrap_or(0);
            let at: Vec<usize> = t[1].dims.iter().map(|d| index(&d.name)).collect();
            let row = x[1][at.as_slice()];
            if row >= 0.0 && row < self.dim.size as f64 {
                let place = |d: &Dim| if d.name == self.dim.name { row as usize } else { index(&d.name) };
                y[out.dims.iter().map(place).collect::<Vec<_>>().as_slice()] += v;
            }
        }
        y
    }
}

impl Tensor {
    /// These updates added up in the rows of a new dimension `dim` that `i32` indices name: `[vocab, d_model]` for
    /// updates `[batch, seq, d_model]`, indices `[batch, seq]` and `dim("vocab", n)`. An index outside adds nothing.
    #[track_caller]
    pub fn scatter_add(&self, indices: &Tensor, dim: &Dim) -> Tensor {
        let over = indices.ty().dims;
        self.scatter_add_over(indices, dim, &over.iter().map(|d| &*d.name).collect::<Vec<_>>())
    }
    /// [`Tensor::scatter_add`] that sums over the indices' dimensions `over` alone; the others are batch dimensions,
    /// which the result keeps in front of the rows.
    #[track_caller]
    pub fn scatter_add_over(&self, indices: &Tensor, dim: &Dim, over: &[&str]) -> Tensor {
        let op = ScatterAdd { dim: dim.clone(), over: over.iter().map(|&n| n.into()).collect() };
        self.graph().apply(op, &[self, indices])
    }
}
