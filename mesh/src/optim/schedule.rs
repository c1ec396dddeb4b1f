//! Learning rates as functions of the step.

use crate::dim::DType;
use crate::graph::{Graph, Tensor};

/// A learning rate as a function of the step (from 0), computed inside the graph.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// Always the same.
    Constant(f32),
    /// `start * factor^floor(step / every)`.
    StepDecay {
        /// At the first step.
        start: f32,
        /// Each time multiplied by this.
        factor: f32,
        /// Steps between.
        every: u32,
    },
    /// `(start - end) * (1 - step / steps)^power + end`, and `end` after that; power 1 is linear.
    Polynomial {
        /// At the first step.
        start: f32,
        /// From step `steps` on.
        end: f32,
        /// Exponent.
        power: f32,
        /// Length.
        steps: u32,
    },
    /// Half a cosine wave from `start` to `end` (Loshchilov and Hutter 2017), and `end` after that.
    Cosine {
        /// At the first step.
        start: f32,
        /// From step `steps` on.
        end: f32,
        /// Length.
        steps: u32,
    },
    /// `min(most, 1 / sqrt(step + 1))`: the relative step of Adafactor, with `most` 0.01.
    InverseSqrt {
        /// Upper bound.
        most: f32,
    },
    /// `then` times `min(1, (step + 1) / steps)`: the first step moves already, step `steps - 1` has the full rate.
    Warmup {
        /// Length.
        steps: u32,
        /// The schedule, which counts from step 0 as well.
        then: Box<Schedule>,
    },
}

impl From<f32> for Schedule {
    fn from(rate: f32) -> Self {
        Schedule::Constant(rate)
    }
}

impl Schedule {
    /// This schedule after a linear warm-up of so many steps.
    pub fn warmup(self, steps: u32) -> Schedule {
        Schedule::Warmup { steps, then: Box::new(self) }
    }

    /// The rate at the step that runs, an `f32` scalar. Steps count exactly up to 2^24.
    #[track_caller]
    pub fn rate(&self, g: &Graph) -> Tensor {
        let step = g.step().cast(DType::F32);
        let done = |steps: u32| step.div(&g.scalar(steps.max(1) as f32)).minimum(&g.scalar(1.0));
        match self {
            Schedule::Constant(rate) => g.scalar(*rate),
            Schedule::StepDecay { start, factor, every } => {
                let times = step.div(&g.scalar((*every).max(1) as f32)).floor();
                g.scalar(*factor).pow(&times).mul_scalar(*start)
            }
            Schedule::Polynomial { start, end, power, steps } => {
                let left = done(*steps).neg().add_scalar(1.0);
                left.pow(&g.scalar(*power)).mul_scalar(start - end).add_scalar(*end)
            }
            Schedule::Cosine { start, end, steps } => {
                let wave = done(*steps).mul_scalar(std::f32::consts::PI).cos().add_scalar(1.0);
                wave.mul_scalar(0.5 * (start - end)).add_scalar(*end)
            }
            Schedule::InverseSqrt { most } => step.add_scalar(1.0).rsqrt().minimum(&g.scalar(*most)),
            Schedule::Warmup { steps, then } => {
                let part = step.add_scalar(1.0).div(&g.scalar((*steps).max(1) as f32)).minimum(&g.scalar(1.0));
                part.mul(&then.rate(g))
            }
        }
    }
}
