//! Adafactor (Shazeer and Stern 2018): Adam's second moment in the memory of a row and a column.

use super::Step;
use crate::dim::Dim;
use crate::graph::Tensor;
use crate::program::Init;

/// Adafactor. The second moment of a variable whose two largest dimensions have at least `factored_from` elements each
/// is kept as its means over either one (slots `adafactor.row`, without the smaller of them, and `adafactor.column`,
/// without the larger one), any other one's whole (slot `adafactor.v`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Step t (from 1) keeps the share `1 - t^-exponent` of the second moment.
    pub exponent: f32,
    /// Added to squared gradients.
    pub eps: f32,
    /// The update is scaled down to this root mean square.
    pub clip: f32,
    /// The update is multiplied by the variable's root mean square, which counts as at least this; None: not at all.
    pub least_scale: Option<f32>,
    /// Share of the running mean of updates that a step keeps (slot `adafactor.m`); 0 for none.
    pub momentum: f32,
    /// Least size of the two dimensions that a second moment is factored by.
    pub factored_from: usize,
}

impl Default for Adafactor {
    /// 0.8, 1e-30, 1, 1e-3, no momentum, 128.
    fn default() -> Self {
        Adafactor { exponent: 0.8, eps: 1e-30, clip: 1.0, least_scale: Some(1e-3), momentum: 0.0, factored_from: 128 }
    }
}

/// The root of the mean square.
fn rms(t: &Tensor) -> Tensor {
    t.square().mean_all().sqrt()
}

impl Adafactor {
    /// The largest and the second largest dimension, if the second moment is factored by them.
    fn factors(&self, dims: &[Dim]) -> Option<(Dim, Dim)> {
        let mut sorted: Vec<&Dim> = dims.iter().collect();
        sorted.sort_by_key(|d| std::cmp::Reverse(d.size));
        match sorted[..] {
            [first, second, ..] if second.size >= self.factored_from => Some((first.clone(), second.clone())),
            _ => None,
        }
    }

    pub(super) fn update(&self, step: &Step, variable: &Tensor, grad: &Tensor) -> Tensor {
        let (g, dims, count) = (step.g, grad.ty().dims, step.count());
        let fresh = count.pow(&g.scalar(-self.exponent));
        let kept = fresh.neg().add_scalar(1.0);
        let follow = |slot: &str, now: &Tensor| {
            let old = g.state(slot, &now.ty().dims, Init::zeros());
            step.set(&old, &old.mul(&kept).add(&now.mul(&fresh)))
        };
        let square = grad.square().add_scalar(self.eps);
        let scaled = match self.factors(&dims) {
            Some((large, small)) => {
                let row = follow("adafactor.row", &square.mean(&[&small.name]));
                let column = follow("adafactor.column", &square.mean(&[&large.name]));
                let row = row.div(&row.mean(&[&large.name]));
                grad.mul(&row.rsqrt()).mul(&column.rsqrt())
            }
            None => grad.mul(&follow("adafactor.v", &square).rsqrt()),
        };
        let one = g.scalar(1.0);
        let clipped = scaled.div(&rms(&scaled).mul_scalar(1.0 / self.clip).maximum(&one));
        let update = match self.least_scale {
            Some(least) => clipped.mul(&rms(variable).maximum(&g.scalar(least))),
            None => clipped,
        };
        if self.momentum == 0.0 {
            return update;
        }
        let slot = g.state("adafactor.m", &dims, Init::zeros());
        step.set(&slot, &slot.mul_scalar(self.momentum).add(&update.mul_scalar(1.0 - self.momentum)))
    }
}
