//! Routing: some positions take one way, the others another, and they meet again.

use crate::dim::{DType, Dim, dim};
use crate::graph::Tensor;

/// Which positions are selected, for each case.
#[derive(Clone)]
pub struct Routing {
    positions: Dim,
    selected: Dim,
    /// Positions `i32[.., order]`: the selected ones first, then the rest; each in ascending order.
    order: Tensor,
}

/// The dimension of [`Routing::order`].
const ORDER: &str = "routing_order";

impl Routing {
    /// Selects the `keep` positions of highest score (`f32`, with the dimension `positions`); of equal scores the lower
    /// position goes first. No gradient flows through the choice.
    #[track_caller]
    pub fn by_score(score: &Tensor, positions: &str, keep: usize) -> Routing {
        let g = score.graph();
        let all = score.dim(positions);
        let (_, chosen) = score.stop_gradient().top_k(positions, &dim(ORDER, keep));
        let one = g.scalar_i32(1).broadcast(&chosen.ty().dims);
        let is_chosen = one.scatter_add_over(&chosen, &all, &[ORDER]);
        // Descending in this: the chosen by ascending position, then the others.
        let n = i32::try_from(all.size).unwrap_or(i32::MAX);
        let key = is_chosen.mul(&g.scalar_i32(n)).sub(&g.iota(&all));
        let (_, order) = key.top_k(positions, &dim(ORDER, all.size));
        Routing { selected: dim(all.name.clone(), keep), positions: all, order }
    }

    /// Positions that are selected, in number.
    pub fn kept(&self) -> usize {
        self.selected.size
    }

    /// The selected positions of x and the rest, each in ascending order along the same dimension's name; there is no
    /// rest where all are selected.
    #[track_caller]
    pub fn split(&self, x: &Tensor) -> (Tensor, Option<Tensor>) {
        let n = self.positions.size;
        let rest = (self.kept() < n).then(|| self.take(x, self.kept(), n));
        (self.take(x, 0, self.kept()), rest)
    }

    #[track_caller]
    fn take(&self, x: &Tensor, start: usize, stop: usize) -> Tensor {
        let name = &*self.positions.name;
        let whole = format!("whole_{name}");
        let indices = self.order.slice(ORDER, start, stop).rename(ORDER, name);
        let ty = x.ty();
        let names: Vec<&str> = ty.dims.iter().map(|d| &*d.name).collect();
        x.rename(name, &whole).gather(&indices, &whole).reorder(&names)
    }

    /// What [`Routing::split`] took apart, in its order again.
    #[track_caller]
    pub fn merge(&self, selected: &Tensor, rest: Option<&Tensor>) -> Tensor {
        let name = &*self.positions.name;
        let ty = selected.ty();
        let names: Vec<&str> = ty.dims.iter().map(|d| &*d.name).collect();
        let both = match rest {
            Some(rest) => Tensor::concat(&[selected, rest], name),
            None => selected.clone(),
        };
        let g = both.graph();
        let all = dim(ORDER, self.positions.size);
        // Where each position lies in the order.
        let place = g.iota(&all).broadcast(&self.order.ty().dims);
        let place = place.scatter_add_over(&self.order, &self.positions, &[ORDER]);
        debug_assert_eq!(place.ty().dtype, DType::I32);
        both.rename(name, ORDER).gather(&place, ORDER).reorder(&names)
    }
}
