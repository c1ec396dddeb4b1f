//! Gradient descent, Adam and LAMB.

use super::Step;
use crate::graph::Tensor;
use crate::program::Init;

/// Gradient descent. Slot `momentum` where there is momentum.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Sgd {
    /// Share of the running sum of gradients that a step keeps; 0 for none.
    pub momentum: f32,
    /// Nesterov's form: the update looks one step ahead.
    pub nesterov: bool,
}

impl Sgd {
    pub(super) fn update(&self, step: &Step, grad: &Tensor) -> Tensor {
        if self.momentum == 0.0 {
            return grad.clone();
        }
        let slot = step.g.state("momentum", &grad.ty().dims, Init::zeros());
        let sum = step.set(&slot, &slot.mul_scalar(self.momentum).add(grad));
        if self.nesterov { sum.mul_scalar(self.momentum).add(grad) } else { sum }
    }
}

/// Adam (Kingma and Ba 2015): `m' / (sqrt(v') + eps)`, with running means m of the gradient and v of its square and
/// m' and v' corrected for their start at 0. Slots `adam.m` and `adam.v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Share of the old m that a step keeps.
    pub beta1: f32,
    /// Share of the old v that a step keeps.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Whether the update (with its decay) is multiplied by `norm(variable) / norm(update)`, as in LAMB; by 1 where
    /// either is 0.
    pub trust: bool,
}

impl Default for Adam {
    /// 0.9, 0.999, 1e-8, no trust ratio.
    fn default() -> Self {
        Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, trust: false }
    }
}

impl Adam {
    pub(super) fn update(&self, step: &Step, grad: &Tensor) -> Tensor {
        let (g, dims) = (step.g, grad.ty().dims);
        let (m, v) = (g.state("adam.m", &dims, Init::zeros()), g.state("adam.v", &dims, Init::zeros()));
        let m_next = m.mul_scalar(self.beta1).add(&grad.mul_scalar(1.0 - self.beta1));
        let v_next = v.mul_scalar(self.beta2).add(&grad.square().mul_scalar(1.0 - self.beta2));
        let (m_next, v_next) = (step.set(&m, &m_next), step.set(&v, &v_next));
        let count = step.count();
        let start = |beta: f32| g.scalar(beta).pow(&count).neg().add_scalar(1.0);
        let root = v_next.div(&start(self.beta2)).sqrt().add_scalar(self.eps);
        m_next.div(&start(self.beta1)).div(&root)
    }

    pub(super) fn trusted(&self, variable: &Tensor, update: Tensor) -> Tensor {
        if !self.trust {
            return update;
        }
        let norm = |t: &Tensor| t.square().sum_all().sqrt();
        let (own, new) = (norm(variable), norm(&update));
        let zero = own.number(0.0);
        let both = own.greater(&zero).and(&new.greater(&zero));
        let ratio = both.select(&own.div(&new), &own.number(1.0));
        update.mul(&ratio)
    }
}
