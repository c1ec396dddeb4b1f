//! Embeddings: a vector for each index.

use crate::dim::Dim;
use crate::graph::{Graph, Tensor};
use crate::program::Init;

/// The table `[rows, dims..]` of an embedding: variable `<name>/table`. Look up by `table.gather(&indices, "rows")`; a
/// decoder that is tied to it contracts with it.
#[track_caller]
pub fn embedding(g: &Graph, name: &str, rows: &Dim, dims: &[Dim], init: Init) -> Tensor {
    let all: Vec<Dim> = std::iter::once(rows).chain(dims).cloned().collect();
    g.layer(name, || g.variable("table", &all, init))
}
