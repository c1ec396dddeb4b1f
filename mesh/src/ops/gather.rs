//! `gather`: elements of a table by index: an embedding, a label's score, the values of a `top_k`.
//!
//! `result[i.., r..] = table[indices[i..], b.., r..]`, where `i` are the indices' dimensions, `b` those of them that the
//! table has as well (batch dimensions, matched by name) and `r` the table's other ones. An index outside `0 .. n` gives
//! zeros.
//!
//! C1. The dimension gathered along is a dimension of the table, and not of the indices.
//! C2. The indices are `i32`.
//! C3. The table is `f32` or `i32`.
//! C4. A dimension that both have is of the same size in both.
//!
//! Sharding: the dimension gathered along counts as summed over, so a table that is split along it stays where it is.
//! Each device contributes the rows that it owns and -0.0 (0 for `i32`) for the others; x + -0.0 is x, bit for bit, so
//! the order of the sum does not matter.

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// Elements of a table (the first input) by index (the second one).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Gather {
    /// The table's dimension that the indices count along.
    pub dim: Name,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (table, indices) = (x[0], x[1]);
        if !table.has(&self.dim) {
            let help = nearest(&self.dim, table.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
            return refuse("C1", format!("cannot gather along `{}` of {table}", self.dim), help.unwrap_or_default());
        }
        if indices.has(&self.dim) {
            let m = format!("cannot gather along `{}`, which the indices {indices} have as well", self.dim);
            return refuse("C1", m, "rename the indices' dimension");
        }
        if indices.dtype != DType::I32 {
            return refuse("C2", format!("cannot index by {}", indices.dtype), "cast the indices to i32");
        }
        if !matches!(table.dtype, DType::F32 | DType::I32) {
            return refuse("C3", format!("cannot gather {}", table.dtype), "cast the table to f32 or i32");
        }
        if let Some(d) = table.dims.iter().find(|d| indices.size_of(&d.name).is_some_and(|n| n != d.size)) {
            let m = format!("cannot match {d} of {table} with {indices}");
            return refuse("C4", m, "rename or slice one of them");
        }
        let others = table.dims.iter().filter(|d| d.name != self.dim && !indices.has(&d.name));
        Ok(Type::new(table.dtype, indices.dims.iter().chain(others).cloned().collect::<Vec<_>>()))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (table, indices) = (cx.inputs[0].ty(), cx.inputs[1].ty());
        let over: Vec<&str> = indices.dims.iter().map(|d| &*d.name).filter(|n| !table.has(n)).collect();
        let names: Vec<&str> = table.dims.iter().map(|d| &*d.name).collect();
        let rows = cx.inputs[0].dim(&self.dim);
        vec![Some(cx.dy.scatter_add_over(&cx.inputs[1], &rows, &over).reorder(&names)), None]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        x[0].dims.iter().filter(|d| d.name == self.dim).cloned().collect()
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let n = t[0].size_of(&self.dim).unwrap_or(0);
        Reference::from_shape_fn(out.shape(), |i| {
            let index = |name: &Name| out.position(name).map(|p| i[p]).unwrap_or(0);
            let at: Vec<usize> = t[1].dims.iter().map(|d| index(&d.name)).collect();
            let row = x[1][at.as_slice()];
            if row < 0.0 || row >= n as f64 {
                return 0.0;
            }
            let place = |d: &Dim| if d.name == self.dim { row as usize } else { index(&d.name) };
            x[0][t[0].dims.iter().map(place).collect::<Vec<_>>().as_slice()]
        })
    }
}

impl Tensor {
    /// The elements of this table at `i32` indices along `dim`: the result has the indices' dimensions, then the table's
    /// other ones; dimensions that both have are matched. An index outside the dimension gives zeros.
    ///
    /// `embedding.gather(&tokens, "vocab")` is `[batch, seq, d_model]` for tokens `[batch, seq]` and an embedding
    /// `[vocab, d_model]`; `scores.gather(&label, "class")` is `[batch]` for a label `[batch]` and scores
    /// `[batch, class]`.
    #[track_caller]
    pub fn gather(&self, indices: &Tensor, dim: &str) -> Tensor {
        let dtype = self.ty().dtype;
        self.graph().apply(Gather { dim: dim.into() }, &[&self.wide(), indices]).cast(dtype)
    }
}
