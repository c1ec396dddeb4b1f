//! Counter-based random numbers: a value is a pure function of (seed, step, key, element index).
//!
//! Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Nothing is
//! carried from one draw to the next, so a shard of a tensor draws exactly the values that the whole
//! tensor would hold there, on any layout and in any order.

use crate::ops::source::Distribution;

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Ten rounds of Philox 4x32 over one counter block.
#[inline(always)]
pub fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(c[0]);
        let p1 = u64::from(M1) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
    }
    c
}

/// The stream of one random op at one step of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run.
    pub step: u32,
    /// Key of the op: unlike ops of one program have unlike keys.
    pub key: u32,
}

impl Stream {
    /// The 32 random bits of element `index` (row-major in the whole, unsharded tensor).
    #[inline(always)]
    pub fn bits(&self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// The bits of elements `4 * block .. 4 * block + 4`.
    #[inline(always)]
    pub fn block(&self, block: u64) -> [u32; 4] {
        philox([block as u32, (block >> 32) as u32, self.step, self.key], [self.seed as u32, (self.seed >> 32) as u32])
    }

    /// Element `index` of a tensor of such numbers, in double precision: what the kernels approximate in single.
    pub fn draw(&self, distribution: Distribution, index: u64) -> f64 {
        let u = |i| f64::from(self.uniform(i));
        match distribution {
            Distribution::Uniform => u(index),
            Distribution::Normal => {
                let pair = box_muller(u(index & !1), u(index | 1));
                if index.is_multiple_of(2) { pair.0 } else { pair.1 }
            }
            Distribution::TruncatedNormal => normal_quantile(between_twos(u(index))),
            Distribution::Bernoulli(p) => f64::from(self.uniform(index) < p),
        }
    }

    /// Uniform in [0, 1), 24 bits.
    #[inline(always)]
    pub fn uniform(&self, index: u64) -> f32 {
        unit(self.bits(index))
    }
}

/// The standard normal pair that two uniform numbers give (Box and Muller 1958): elements `2p` and `2p + 1` of a tensor
/// of normal numbers come from the bits of just these elements.
pub fn box_muller(u0: f64, u1: f64) -> (f64, f64) {
    let r = (-2.0 * (1.0 - u0).ln()).sqrt();
    let angle = std::f64::consts::TAU * u1;
    (r * angle.cos(), r * angle.sin())
}

/// The probability that a standard normal number is below -2.
pub const BELOW_MINUS_TWO: f64 = 0.022_750_131_948_179_21;

/// The probability that a standard normal number is below one between -2 and 2, of a uniform number.
#[inline(always)]
pub fn between_twos(u: f64) -> f64 {
    BELOW_MINUS_TWO + u * (1.0 - 2.0 * BELOW_MINUS_TWO)
}

/// Probabilities up to which, from either end, the normal quantile is made of a logarithm.
const TAIL: f64 = 0.02425;

/// [`normal_quantile`] of a probability that is neither small nor large, without branches.
#[inline(always)]
fn central_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 5] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
    ];
    let (q, r) = (p - 0.5, (p - 0.5) * (p - 0.5));
    polynomial(&A, r) * q / (polynomial(&B, r) * r + 1.0)
}

#[inline(always)]
fn polynomial(c: &[f64], x: f64) -> f64 {
    c.iter().fold(0.0, |s, c| s * x + c)
}

/// [`normal_quantile`] of each of some probabilities, most of which are neither small nor large.
#[inline(always)]
pub fn normal_quantiles<const N: usize>(p: [f64; N]) -> [f64; N] {
    let mut all = [0.0; N];
    for i in 0..N {
        all[i] = central_quantile(p[i]);
    }
    for i in 0..N {
        if !(TAIL..=1.0 - TAIL).contains(&p[i]) {
            all[i] = normal_quantile(p[i]);
        }
    }
    all
}

/// The inverse of the standard normal distribution function, to 1e-9 (Acklam's rational approximation).
pub fn normal_quantile(p: f64) -> f64 {
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 4] =
        [7.784_695_709_041_462e-3, 3.224_671_290_700_398e-1, 2.445_134_137_142_996, 3.754_408_661_907_416];
    let tail = |q: f64| polynomial(&C, q) / (polynomial(&D, q) * q + 1.0);
    if p < TAIL {
        tail((-2.0 * p.ln()).sqrt())
    } else if p > 1.0 - TAIL {
        -tail((-2.0 * (1.0 - p).ln()).sqrt())
    } else {
        central_quantile(p)
    }
}

/// 32 random bits to a float in [0, 1) with 24 significant bits.
#[inline(always)]
pub fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// A key for the random op called `name`, for [`Stream::key`] (FNV-1a).
pub fn key_of(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    }
}
