//! Losses. They are f32, whatever the dtype of their inputs.

use crate::dim::DType;
use crate::graph::Tensor;

/// Cross-entropy of integer labels: `-log softmax(logits)[label]` for each element of `labels` (`i32`, the dimensions of
/// `logits` without `class`). A label outside the classes counts as none of them; give it the weight 0.
#[track_caller]
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, class: &str) -> Tensor {
    let dtype = logits.ty().dtype;
    let is_label = labels.equal(&logits.graph().iota(&logits.dim(class)));
    let wide = logits.cast(DType::F32);
    let zero = wide.number(0.0);
    let total = super::log_sum_exp(logits, &[class]);
    let loss = total.sub(&is_label.select(&wide, &zero).sum(&[class]));
    // softmax - one-hot: one pass over the logits, and nothing of their size is kept besides them.
    logits.graph().with_grad(&[logits], &loss, move |dy| {
        let p = wide.sub(&total).exp();
        let dx = is_label.select(&p.add_scalar(-1.0), &p).mul(dy);
        vec![Some(dx.cast(dtype))]
    });
    loss
}

/// `Σ w x / Σ w` over all elements; 0 if all weights are.
#[track_caller]
pub fn weighted_mean(x: &Tensor, weights: &Tensor) -> Tensor {
    let weights = weights.broadcast(&x.ty().dims);
    x.mul(&weights).sum_all().div(&weights.sum_all().add_scalar(f32::MIN_POSITIVE))
}

/// Overlap of probabilities p with indicators t: `(2 Σ p t + top) / (Σ p + Σ t + bottom)`, sums over the dimensions
/// named. Of the dimensions that are left: one value a class, or a case and class.
#[track_caller]
pub fn overlap(p: &Tensor, t: &Tensor, over: &[&str], top: f32, bottom: f32) -> Tensor {
    let (p, t) = (p.cast(DType::F32), t.cast(DType::F32));
    let both = p.mul(&t).sum(over).mul_scalar(2.0).add_scalar(top);
    both.div(&p.sum(over).add(&t.sum(over)).add_scalar(bottom))
}

/// Dice loss of Hou et al. 2019 for every class: minus the mean of the overlap of each case and that of the whole
/// batch, `-2 Σ p t / (Σ p + Σ t + 0.1)`. `over` names the space, `batch` the cases. Of p's other dimensions.
#[track_caller]
pub fn dice_loss(p: &Tensor, t: &Tensor, batch: &str, over: &[&str]) -> Tensor {
    let mut all = vec![batch];
    all.extend(over);
    let by_case = overlap(p, t, over, 0.0, 0.1).mean(&[batch]);
    by_case.add(&overlap(p, t, &all, 0.0, 0.1)).mul_scalar(-0.5)
}

/// `1 - mean((2 Σ p t + 1) / (Σ p + Σ t + 1))`, sums over the dimensions named, the mean over the others; a scalar.
#[track_caller]
pub fn soft_dice_loss(p: &Tensor, t: &Tensor, over: &[&str]) -> Tensor {
    overlap(p, t, over, 1.0, 1.0).mean_all().neg().add_scalar(1.0)
}
