//! Normalisation: `scale * (x - mean) / sqrt(var + eps) + bias`.
//!
//! All kinds are one function, with other dimensions to take the statistics over. The variance is the mean square of
//! `x - mean` (two passes), so that it is right for a mean much larger than the deviation. The gradient is the closed
//! form: all it needs of the size of x are x itself, the gradient of the result, and two sums.

use super::{Mode, dims_of, names};
use crate::dim::{DType, Dim, dim};
use crate::error::{Cause, Error, Place};
use crate::graph::Tensor;
use crate::program::Init;

/// What the mean over a set of elements is taken of.
#[derive(Clone)]
struct Statistics {
    /// Dimensions averaged over.
    over: Vec<Dim>,
    /// Averaged over as well: the members of a group of the channels, `f32[channel, group]` of 0 and 1.
    groups: Option<(Tensor, Dim, Dim)>,
}

impl Statistics {
    #[track_caller]
    fn over(x: &Tensor, names: &[&str]) -> Statistics {
        Statistics { over: dims_of(x, names), groups: None }
    }

    /// The number of elements that are averaged.
    fn count(&self) -> usize {
        let members = self.groups.as_ref().map_or(1, |(_, channel, group)| channel.size / group.size.max(1));
        (self.over.iter().map(|d| d.size).product::<usize>() * members).max(1)
    }

    /// The means, from sums over just the dimensions `over` that are not in `partial` (those are summed here).
    fn mean_of_sums(&self, sums: &Tensor) -> Tensor {
        let ty = sums.ty();
        let left: Vec<&str> = self.over.iter().map(|d| &*d.name).filter(|n| ty.has(n)).collect();
        let sums = if left.is_empty() { sums.clone() } else { sums.sum(&left) };
        let sums = match &self.groups {
            None => sums,
            Some((member, channel, group)) => sums.mul(member).sum(&[&channel.name]).mul(member).sum(&[&group.name]),
        };
        sums.div(&sums.number(self.count() as f32))
    }

    fn mean(&self, x: &Tensor) -> Tensor {
        self.mean_of_sums(&x.sum(&names(&self.over)))
    }
}

/// Scale and bias, of dimensions of what is normalised.
struct Affine {
    scale: Tensor,
    bias: Tensor,
}

impl Affine {
    fn new(x: &Tensor, dims: &[Dim]) -> Affine {
        let g = x.graph();
        Affine { scale: g.variable("scale", dims, Init::ones()), bias: g.variable("bias", dims, Init::zeros()) }
    }
}

/// What [`normalize`] found out on its way.
struct Normalized {
    y: Tensor,
    mean: Tensor,
    var: Tensor,
}

/// Normalises by x' own statistics.
fn normalize(x: &Tensor, by: Statistics, affine: &Affine, eps: f32) -> Normalized {
    let dtype = x.ty().dtype;
    let wide = x.cast(DType::F32);
    let mean = by.mean(&wide);
    let var = by.mean(&wide.sub(&mean).square());
    let rstd = var.add_scalar(eps).rsqrt();
    let y = wide.sub(&mean).mul(&rstd).mul(&affine.scale).add(&affine.bias).cast(dtype);
    let (scale, bias) = (affine.scale.clone(), affine.bias.clone());
    let centre = mean.clone();
    x.graph().with_grad(&[x, &affine.scale, &affine.bias], &y, move |dy| {
        let own = scale.ty();
        let dy = dy.cast(DType::F32);
        let unit = wide.sub(&centre).mul(&rstd);
        // Sums over what scale and bias lack serve their gradients and that of x.
        let first: Vec<&str> = by.over.iter().map(|d| &*d.name).filter(|n| !own.has(n)).collect();
        let sum = |v: &Tensor| if first.is_empty() { v.clone() } else { v.sum(&first) };
        let (sum_dy, sum_dy_unit) = (sum(&dy), sum(&dy.mul(&unit)));
        let mean_g = by.mean_of_sums(&sum_dy.mul(&scale));
        let mean_g_unit = by.mean_of_sums(&sum_dy_unit.mul(&scale));
        // rstd (g - mean(g) - unit mean(g unit)) with g = dy scale; what is small is multiplied first.
        let small = rstd.mul(&scale);
        let dx = dy.mul(&small).sub(&mean_g.mul(&rstd)).sub(&unit.mul(&mean_g_unit.mul(&rstd)));
        vec![Some(dx.cast(dtype)), Some(sum_dy_unit.sum_to(&own)), Some(sum_dy.sum_to(&bias.ty()))]
    });
    Normalized { y, mean, var }
}

/// Constants of batch norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Share of the old value that running statistics keep at a step.
    pub momentum: f32,
    /// Added to the variance.
    pub eps: f32,
}

impl Default for BatchNorm {
    /// Momentum 0.9, eps 1e-6.
    fn default() -> Self {
        BatchNorm { momentum: 0.9, eps: 1e-6 }
    }
}

/// Batch norm (Ioffe and Szegedy 2015): statistics over all dimensions but `channel`.
///
/// Variables `scale`, `bias`, and the running `mean` (from 0) and `var` (from 1), `f32[channel]`. In training it
/// normalises by the batch and sets `running = momentum * running + (1 - momentum) * batch` (the variance divided by
/// the number of elements, as it normalises); otherwise it normalises by the running statistics.
#[track_caller]
pub fn batch_norm(x: &Tensor, name: &str, channel: &str, options: &BatchNorm, mode: Mode) -> Tensor {
    let g = x.graph();
    let own = [x.dim(channel)];
    g.layer(name, || {
        let affine = Affine::new(x, &own);
        let running_mean = g.state("mean", &own, Init::zeros());
        let running_var = g.state("var", &own, Init::ones());
        match mode {
            Mode::Train => {
                let ty = x.ty();
                let over: Vec<&str> = ty.dims.iter().map(|d| &*d.name).filter(|n| *n != channel).collect();
                let n = normalize(x, Statistics::over(x, &over), &affine, options.eps);
                for (running, batch) in [(&running_mean, &n.mean), (&running_var, &n.var)] {
                    let kept = running.mul_scalar(options.momentum);
                    g.assign(running, &kept.add(&batch.mul_scalar(1.0 - options.momentum)));
                }
                n.y
            }
            Mode::Eval => {
                let rstd = running_var.add_scalar(options.eps).rsqrt();
                let unit = x.cast(DType::F32).sub(&running_mean).mul(&rstd);
                unit.mul(&affine.scale).add(&affine.bias).cast(x.ty().dtype)
            }
        }
    })
}

/// Layer norm (Ba et al. 2016): statistics over the dimensions named, which `scale` and `bias` have.
#[track_caller]
pub fn layer_norm(x: &Tensor, name: &str, over: &[&str], eps: f32) -> Tensor {
    let by = Statistics::over(x, over);
    x.graph().layer(name, || normalize(x, by.clone(), &Affine::new(x, &by.over), eps).y)
}

/// Instance norm (Ulyanov et al. 2016): statistics over the dimensions `space`, for each case and channel; `scale` and
/// `bias` have the dimension `channel`.
#[track_caller]
pub fn instance_norm(x: &Tensor, name: &str, channel: &str, space: &[&str], eps: f32) -> Tensor {
    let (by, own) = (Statistics::over(x, space), [x.dim(channel)]);
    x.graph().layer(name, || normalize(x, by, &Affine::new(x, &own), eps).y)
}

/// Group norm (Wu and He 2018): statistics over the dimensions `space` and over each of `groups` runs of `channel`;
/// `scale` and `bias` have the dimension `channel`. The groups must divide the channels.
#[track_caller]
pub fn group_norm(x: &Tensor, name: &str, channel: &str, groups: usize, space: &[&str], eps: f32) -> Tensor {
    let g = x.graph();
    let own = x.dim(channel);
    if groups == 0 || !own.size.is_multiple_of(groups) {
        let what = format!("group norm cannot cut {own} into {groups} equal groups");
        let help = "make the number of groups a divisor of the number of channels".into();
        g.fail(Error::new(Cause::Feed { what, help }).at(Place::here()));
        return x.clone();
    }
    let group = dim(format!("{channel}.group"), groups);
    let index = g.iota(&own).cast(DType::F32).mul_scalar(groups as f32 / own.size as f32);
    // Half an element off the edge, so that rounding cannot move a channel to another group.
    let index = index.add_scalar(0.5 * groups as f32 / own.size as f32).floor().cast(DType::I32);
    let member = index.one_hot(&group);
    let by = Statistics { groups: Some((member, own.clone(), group)), ..Statistics::over(x, space) };
    g.layer(name, || normalize(x, by, &Affine::new(x, &[own]), eps).y)
}
