//! Optimizers: what a training step does with the gradients.
//!
//! An optimizer's [`Rule`] turns a variable's gradient and slots into an update; [`Schedule`] gives the learning rate.
//! Slots are variables beside the one they belong to (`conv/filter/adam.m` for `conv/filter`), so that layout rules by
//! name reach both. [`LossScale`] is for gradients in `f16`.

pub mod adafactor;
pub mod adam;
pub mod loss_scale;
pub mod schedule;

pub use adafactor::Adafactor;
pub use adam::{Adam, Sgd};
pub use loss_scale::{LossScale, Scaled};
pub use schedule::Schedule;

use crate::dim::DType;
use crate::graph::{Graph, Role, Tensor};
use crate::program::{Init, VarId};

/// How a gradient becomes an update.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// Gradient descent, with or without momentum.
    Sgd(Sgd),
    /// Adam; with weight decay AdamW, with a trust ratio LAMB.
    Adam(Adam),
    /// Adafactor.
    Adafactor(Adafactor),
}

/// An optimizer: `variable -= rate * (update + decay * variable)`.
#[derive(Clone, Debug)]
pub struct Optimizer {
    /// How a gradient becomes an update.
    pub rule: Rule,
    /// The learning rate.
    pub rate: Schedule,
    /// All gradients are multiplied by `min(1, clip_norm / norm)`, with the norm of all of them together.
    pub clip_norm: Option<f32>,
    /// Weight decay apart from the gradient (Loshchilov and Hutter 2019).
    pub decay: f32,
    /// Which variables decay, by path; as given all but biases and the scales of norms.
    pub decays: fn(&str) -> bool,
    /// How the loss is scaled, if at all.
    pub loss_scale: Option<LossScale>,
}

/// Whether a variable of that path decays: not a `bias` and not a norm's `scale`.
pub fn decays(path: &str) -> bool {
    !matches!(path.rsplit('/').next(), Some("bias" | "scale"))
}

/// Where a variable's gradients are added up.
#[track_caller]
fn gradient_slot(g: &Graph, id: VarId, variable: &Tensor) -> Tensor {
    let slot = || g.state("gradient", &variable.ty().dims, Init::zeros());
    g.with_role(Role::Gradient, || g.scoped_at(g.variable_name(id), slot))
}

/// What a training step may show of its update.
pub struct Update {
    /// The norm of all gradients together, not scaled and before clipping; `f32` scalar, infinite where loss scaling skips
    /// the step. Costs nothing where it is not used.
    pub grad_norm: Tensor,
    /// The learning rate; `f32` scalar.
    pub rate: Tensor,
    /// What loss scaling does, if there is any.
    pub scaled: Option<Scaled>,
}

impl Update {
    /// Makes outputs of what a run shows: `grad_norm`, and with loss scaling `loss_scale` and `skipped_steps`.
    #[track_caller]
    pub fn output(&self, g: &Graph) {
        g.output("grad_norm", &self.grad_norm);
        if let Some(scaled) = &self.scaled {
            g.output("loss_scale", &scaled.scale);
            g.output("skipped_steps", &scaled.skipped);
        }
    }
}

/// A step, as rules see it.
struct Step<'a> {
    g: &'a Graph,
    scaled: Option<&'a Scaled>,
}

impl Step<'_> {
    /// Sets a variable or slot, if the step counts; gives what it is then.
    fn set(&self, variable: &Tensor, next: &Tensor) -> Tensor {
        let next = match self.scaled {
            Some(scaled) => scaled.finite.select(next, variable),
            None => next.clone(),
        };
        self.g.assign(variable, &next);
        next
    }

    /// The number of the step among those that count, an `f32` scalar from 1.
    fn count(&self) -> Tensor {
        let count = self.g.step().cast(DType::F32).add_scalar(1.0);
        match self.scaled {
            Some(scaled) => count.sub(&scaled.skipped_before),
            None => count,
        }
    }
}

impl Optimizer {
    fn new(rule: Rule, rate: impl Into<Schedule>) -> Optimizer {
        Optimizer { rule, rate: rate.into(), clip_norm: None, decay: 0.0, decays, loss_scale: None }
    }
    /// Gradient descent without momentum.
    pub fn sgd(rate: impl Into<Schedule>) -> Optimizer {
        Optimizer::new(Rule::Sgd(Sgd::default()), rate)
    }
    /// Gradient descent with momentum: the gradients' running sum, `m = momentum * m + gradient`.
    pub fn momentum(rate: impl Into<Schedule>, momentum: f32) -> Optimizer {
        Optimizer::new(Rule::Sgd(Sgd { momentum, nesterov: false }), rate)
    }
    /// Adam (Kingma and Ba 2015) with its usual constants.
    pub fn adam(rate: impl Into<Schedule>) -> Optimizer {
        Optimizer::new(Rule::Adam(Adam::default()), rate)
    }
    /// Adam with weight decay apart from the gradient.
    pub fn adamw(rate: impl Into<Schedule>, decay: f32) -> Optimizer {
        Optimizer { decay, ..Optimizer::adam(rate) }
    }
    /// LAMB (You et al. 2020): AdamW whose update has each variable's own norm.
    pub fn lamb(rate: impl Into<Schedule>, decay: f32) -> Optimizer {
        let rule = Rule::Adam(Adam { eps: 1e-6, trust: true, ..Adam::default() });
        Optimizer { decay, ..Optimizer::new(rule, rate) }
    }
    /// Adafactor (Shazeer and Stern 2018) with its usual constants; the rate is relative to each variable's size.
    pub fn adafactor(rate: impl Into<Schedule>) -> Optimizer {
        Optimizer::new(Rule::Adafactor(Adafactor::default()), rate)
    }
    /// This optimizer with the gradients clipped to a global norm.
    pub fn clipped(self, norm: f32) -> Optimizer {
        Optimizer { clip_norm: Some(norm), ..self }
    }
    /// This optimizer with the loss scaled as usual, for gradients in `f16`.
    pub fn scaled(self) -> Optimizer {
        Optimizer { loss_scale: Some(LossScale::default()), ..self }
    }

    /// Adds the backward pass of `loss` and one step on every trained variable that the graph reads.
    ///
    /// Without clipping the update of a variable depends on no other one's gradient, which can go as soon as it is used.
    #[track_caller]
    pub fn apply(&self, g: &Graph, loss: &Tensor) -> Update {
        let variables = g.trainable();
        let grads = self.gradients(g, loss, &variables);
        self.update(g, &variables, &grads)
    }

    /// The gradients of `loss` by some variables.
    #[track_caller]
    fn gradients(&self, g: &Graph, loss: &Tensor, variables: &[(VarId, Tensor)]) -> Vec<Tensor> {
        let wrt: Vec<&Tensor> = variables.iter().map(|(_, t)| t).collect();
        match &self.loss_scale {
            Some(scale) => scale.gradients(g, loss, &wrt),
            None => g.gradients(loss, &wrt),
        }
    }

    /// One step on variables with those gradients.
    #[track_caller]
    fn update(&self, g: &Graph, variables: &[(VarId, Tensor)], grads: &[Tensor]) -> Update {
        let update = || {
            // Each where its variable is.
            let square = |id: VarId, grad: &Tensor| g.scoped_at(g.variable_name(id), || grad.square().sum_all());
            let squares = variables.iter().zip(grads).map(|((id, _), grad)| square(*id, grad));
            let grad_norm = squares.reduce(|a, b| a.add(&b)).unwrap_or(g.scalar(0.0)).sqrt();
            let factor = self.clip_norm.map(|most| {
                // A norm of 0 must not give 0 / 0.
                g.scalar(most).div(&grad_norm.maximum(&g.scalar(most)))
            });
            let rate = self.rate.rate(g);
            let scaled = self.loss_scale.as_ref().map(|scale| scale.follow(g, &grad_norm));
            let step = Step { g, scaled: scaled.as_ref() };
            for ((id, variable), grad) in variables.iter().zip(grads) {
                let path = g.variable_name(*id);
                g.scoped_at(&path, || {
                    let grad = match &factor {
                        Some(factor) => grad.mul(factor),
                        None => grad.clone(),
                    };
                    self.step(&step, &path, variable, &grad, &rate);
                });
            }
            let grad_norm = match &scaled {
                // One infinity, whatever made it.
                Some(scaled) => scaled.finite.select(&grad_norm, &g.scalar(f32::INFINITY)),
                None => grad_norm,
            };
            Update { grad_norm, rate, scaled }
        };
        g.layer("optimizer", || g.with_role(Role::Update, update))
    }

    /// One step whose batch goes in `parts` micro-batches: `loss` gives the loss of each, of what [`Tensor::micro_batch`]
    /// takes of the inputs. Gives the mean of their losses too.
    ///
    /// All of it is one function, so that the stages of a pipeline work on several at a time ([`crate::pipeline`]), and its
    /// bits are the same on every layout; of another number of parts they are others. Where a state of the model is set
    /// (running statistics), the last micro-batch counts.
    #[track_caller]
    pub fn apply_in_parts(&self, g: &Graph, parts: usize, loss: impl Fn(usize) -> Tensor) -> (Tensor, Update) {
        let share = 1.0 / parts.max(1) as f32;
        let mut mean: Option<Tensor> = None;
        let mut sums: Vec<(VarId, Tensor, Tensor)> = vec![];
        for part in 0..parts.max(1) {
            let loss = loss(part);
            let loss = if parts > 1 { loss.mul_scalar(share) } else { loss };
            let variables = g.trainable();
            let grads = self.gradients(g, &loss, &variables);
            mean = Some(mean.map_or(loss.clone(), |sum| sum.add(&loss)));
            for ((id, variable), grad) in variables.into_iter().zip(grads) {
                let path = g.variable_name(id);
                let module = path.rsplit_once('/').map_or("", |(module, _)| module);
                let add = |sum: &Tensor| g.scoped_at(module, || g.with_role(Role::Gradient, || sum.add(&grad)));
                match sums.iter_mut().find(|(v, ..)| *v == id) {
                    Some((_, _, sum)) => *sum = add(sum),
                    None => sums.push((id, variable, grad)),
                }
            }
        }
        let variables: Vec<(VarId, Tensor)> = sums.iter().map(|(id, v, _)| (*id, v.clone())).collect();
        let grads: Vec<Tensor> = sums.into_iter().map(|(_, _, sum)| sum).collect();
        let update = self.update(g, &variables, &grads);
        (mean.unwrap_or_else(|| g.scalar(0.0)), update)
    }

    /// Adds the gradients of `loss`, divided by `parts`, up in slots (`gradient`) instead of using them: a step in `parts`
    /// micro-batches is so many runs of a function that accumulates, then one of a function with what is returned here
    /// and [`Optimizer::apply_accumulated`].
    #[track_caller]
    pub fn accumulate(&self, g: &Graph, loss: &Tensor, parts: u32) -> Vec<VarId> {
        let variables = g.trainable();
        let grads = self.gradients(g, loss, &variables);
        for ((id, variable), grad) in variables.iter().zip(&grads) {
            let slot = gradient_slot(g, *id, variable);
            let sum = || slot.add(&grad.mul_scalar(1.0 / parts.max(1) as f32));
            g.assign(&slot, &g.with_role(Role::Gradient, sum));
        }
        variables.into_iter().map(|(id, _)| id).collect()
    }

    /// One step on those variables with the gradients that were accumulated, whose slots are zero again after it.
    #[track_caller]
    pub fn apply_accumulated(&self, g: &Graph, variables: &[VarId]) -> Update {
        let variables: Vec<(VarId, Tensor)> = variables.iter().map(|id| (*id, g.read(*id))).collect();
        let slots: Vec<Tensor> = variables.iter().map(|(id, t)| gradient_slot(g, *id, t)).collect();
        let update = self.update(g, &variables, &slots);
        g.with_role(Role::Gradient, || slots.iter().for_each(|slot| g.assign(slot, &slot.zeros_like())));
        update
    }

    fn step(&self, step: &Step, path: &str, variable: &Tensor, grad: &Tensor, rate: &Tensor) {
        let decay = if (self.decays)(path) { self.decay } else { 0.0 };
        let decayed = |update: Tensor| match decay {
            0.0 => update,
            _ => update.add(&variable.mul_scalar(decay)),
        };
        let update = match &self.rule {
            Rule::Sgd(rule) => decayed(rule.update(step, grad)),
            Rule::Adam(rule) => rule.trusted(variable, decayed(rule.update(step, grad))),
            Rule::Adafactor(rule) => decayed(rule.update(step, variable, grad)),
        };
        step.set(variable, &variable.sub(&update.mul(rate)));
    }
}
