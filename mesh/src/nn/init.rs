//! How weights start. A fan is the number of products that meet in one element: of the result (`fan_in`, the product
//! of the contracted dimensions including the kernel's), or of the input's gradient (`fan_out`).

use crate::ops::source::Distribution;
use crate::program::Init;

/// Normal with that standard deviation.
pub fn normal(std: f32) -> Init {
    Init::Random { distribution: Distribution::Normal, scale: std, offset: 0.0 }
}

/// `std` times a standard normal that is drawn again outside [-2, 2], as BERT has it: its own standard deviation is
/// 0.88 `std`.
pub fn truncated_normal(std: f32) -> Init {
    Init::Random { distribution: Distribution::TruncatedNormal, scale: std, offset: 0.0 }
}

/// Uniform in [-limit, limit).
pub fn uniform(limit: f32) -> Init {
    Init::Random { distribution: Distribution::Uniform, scale: 2.0 * limit, offset: -limit }
}

/// Glorot and Bengio 2010: variance `2 / (fan_in + fan_out)`, uniform.
pub fn glorot_uniform(fan_in: usize, fan_out: usize) -> Init {
    uniform((6.0 / (fan_in + fan_out).max(1) as f32).sqrt())
}

/// Glorot and Bengio 2010: variance `2 / (fan_in + fan_out)`, normal.
pub fn glorot_normal(fan_in: usize, fan_out: usize) -> Init {
    normal((2.0 / (fan_in + fan_out).max(1) as f32).sqrt())
}

/// He et al. 2015, for ReLU: variance `2 / fan_in`, uniform.
pub fn he_uniform(fan_in: usize) -> Init {
    uniform((6.0 / fan_in.max(1) as f32).sqrt())
}

/// He et al. 2015, for ReLU: variance `2 / fan_in`, normal.
pub fn he_normal(fan_in: usize) -> Init {
    normal((2.0 / fan_in.max(1) as f32).sqrt())
}

/// LeCun 1998: variance `1 / fan_in`, normal.
pub fn lecun_normal(fan_in: usize) -> Init {
    normal((1.0 / fan_in.max(1) as f32).sqrt())
}
