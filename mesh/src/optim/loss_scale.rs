//! Loss scaling: gradients in `f16`, whose smallest numbers many gradients are below.
//!
//! The loss is multiplied by a power of two before the backward pass, and the gradients by its inverse after it, in `f32`:
//! exactly. A step whose gradients are not all finite changes no variable and no slot; the scale is halved then, and
//! doubled after many steps without that. All of it is part of the graph: it is the same on every layout, and its state
//! is variables, which checkpoints have.

use crate::graph::{Graph, Role, Tensor};
use crate::program::Init;

/// The variable that is the scale; its counters lie beside it.
const SCALE: &str = "loss_scale";
/// The scale is no less.
const LEAST: f32 = 1.0;

/// How a loss is scaled (Micikevicius et al. 2018). Numbers are powers of two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// The first scale.
    pub start: f32,
    /// The largest one.
    pub most: f32,
    /// So many steps in a row with finite gradients double it.
    pub doubled_after: u32,
}

impl Default for LossScale {
    /// 65536, 2^24, 2000.
    fn default() -> Self {
        LossScale { start: 65_536.0, most: 16_777_216.0, doubled_after: 2000 }
    }
}

/// The state of a scale at a function's start: `f32` scalars.
struct State {
    scale: Tensor,
    /// Steps with finite gradients since the scale changed.
    good: Tensor,
    /// Steps whose update was skipped.
    skipped: Tensor,
}

/// What loss scaling does in a step.
pub struct Scaled {
    /// What the loss was multiplied by; `f32` scalar.
    pub scale: Tensor,
    /// Steps whose update was skipped so far, this one included; `f32` scalar.
    pub skipped: Tensor,
    /// Those before this one.
    pub(super) skipped_before: Tensor,
    /// Whether all gradients are finite, so that the update counts; `bool` scalar.
    pub(super) finite: Tensor,
}

impl LossScale {
    /// The scale and its counters: variables of these names wherever an optimizer is applied, one for all of a program.
    #[track_caller]
    fn state(&self, g: &Graph) -> State {
        let variable = |name: &str, start: f32| g.scoped_at("", || g.state(name, &[], Init::Constant(start)));
        State {
            scale: variable(SCALE, self.start),
            good: variable(&format!("{SCALE}/good_steps"), 0.0),
            skipped: variable(&format!("{SCALE}/skipped_steps"), 0.0),
        }
    }

    /// The gradients of a loss by way of the scaled one.
    #[track_caller]
    pub(super) fn gradients(&self, g: &Graph, loss: &Tensor, wrt: &[&Tensor]) -> Vec<Tensor> {
        let scale = self.state(g).scale;
        let scaled = g.gradients(&loss.mul(&scale), wrt);
        let inverse = g.scalar(1.0).div(&scale);
        g.with_role(Role::Gradient, || scaled.iter().map(|grad| grad.mul(&inverse)).collect())
    }

    /// Judges the gradients by the norm of all of them, and sets the next step's scale.
    #[track_caller]
    pub(super) fn follow(&self, g: &Graph, grad_norm: &Tensor) -> Scaled {
        let State { scale, good, skipped } = self.state(g);
        let (zero, one) = (g.scalar(0.0), g.scalar(1.0));
        let finite = grad_norm.less_equal(&g.scalar(f32::MAX));
        let counted = good.add(&one);
        let doubles = finite.and(&counted.greater_equal(&g.scalar(self.doubled_after as f32)));
        let grown = doubles.select(&scale.add(&scale).minimum(&g.scalar(self.most)), &scale);
        let next = finite.select(&grown, &scale.mul_scalar(0.5).maximum(&g.scalar(LEAST)));
        g.assign(&good, &doubles.select(&zero, &finite.select(&counted, &zero)));
        g.assign(&scale, &next);
        let now = finite.select(&skipped, &skipped.add(&one));
        g.assign(&skipped, &now);
        Scaled { scale, skipped: now, skipped_before: skipped, finite }
    }
}
