//! Elementary functions in single precision, of plain IEEE operations alone, fused multiply-adds among them: the same
//! bits in scalar code, in AVX2 and in AVX-512, and at any place of a vector. Inlined into loops they vectorise.
//!
//! They are written once, over whatever is a [`Real`]: a float, or what records the operations so that they can be compiled
//! ([`super::native`]).
//!
//! Polynomials after Moshier's Cephes library.

use mesh::ops::binary::BinaryFn;
use mesh::ops::unary::UnaryFn;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// A float, or what stands for one. Its bits may also be taken for an integer.
pub trait Real:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// Whether something holds.
    type Truth: Copy;
    /// A constant's bits, beside this value.
    fn of_bits(self, bits: u32) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// self * factor + term, rounded once.
    fn times_plus(self, factor: Self, term: Self) -> Self;
    /// `self` if it is less than the other, and the other one elsewhere: of two zeros, and where any is NaN.
    fn lesser(self, other: Self) -> Self;
    /// `self` if it is greater than the other, and the other one elsewhere.
    fn greater(self, other: Self) -> Self;
    /// self < other
    fn less(self, other: Self) -> Self::Truth;
    /// self <= other
    fn at_most(self, other: Self) -> Self::Truth;
    /// self = other
    fn equals(self, other: Self) -> Self::Truth;
    /// Whether one of them is no number.
    fn any_nan(self, other: Self) -> Self::Truth;
    /// `a` where it holds, `b` elsewhere.
    fn choose(truth: Self::Truth, a: Self, b: Self) -> Self;
    /// The bits that both have.
    fn and(self, other: Self) -> Self;
    /// The bits that any has.
    fn or(self, other: Self) -> Self;
    /// The sum of the integers, wrapping.
    fn plus(self, other: Self) -> Self;
    /// The bits shifted up.
    fn up(self, bits: u8) -> Self;
    /// The bits shifted down, zeros behind them.
    fn down(self, bits: u8) -> Self;
    /// The float nearest to the integer.
    fn as_float(self) -> Self;
    /// The integer that lies next towards zero, if there is one.
    fn as_integer(self) -> Self;
    /// A constant, beside this value.
    #[inline(always)]
    fn of(self, constant: f32) -> Self {
        self.of_bits(constant.to_bits())
    }
    /// The nearest `bf16`, ties to even; a zero of its sign for a subnormal number.
    #[inline(always)]
    fn to_bf16(self) -> Self {
        to_bf16(self)
    }
    /// self * 2^n, rounded once, of an integral n in -252 ..= 254 and a normal number that is 2^-0.5 to 2^0.5 or so.
    #[inline(always)]
    fn scaled(self, n: Self) -> Self {
        // In two factors, since n may lie outside the exponents of normal numbers: the first product is exact.
        let half = round(n * n.of(0.5));
        self * exp2i(half) * exp2i(n - half)
    }
    /// Whether it is no number.
    #[inline(always)]
    fn is_nan(self) -> Self::Truth {
        self.any_nan(self)
    }
    /// |self|
    #[inline(always)]
    fn abs(self) -> Self {
        self.and(self.of_bits(0x7fff_ffff))
    }
}

impl Real for f32 {
    type Truth = bool;
    #[inline(always)]
    fn of_bits(self, bits: u32) -> f32 {
        f32::from_bits(bits)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn times_plus(self, factor: f32, term: f32) -> f32 {
        self.mul_add(factor, term)
    }
    #[inline(always)]
    fn lesser(self, other: f32) -> f32 {
        if self < other { self } else { other }
    }
    #[inline(always)]
    fn greater(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn less(self, other: f32) -> bool {
        self < other
    }
    #[inline(always)]
    fn at_most(self, other: f32) -> bool {
        self <= other
    }
    #[inline(always)]
    fn equals(self, other: f32) -> bool {
        self == other
    }
    #[inline(always)]
    fn any_nan(self, other: f32) -> bool {
        self.is_nan() || other.is_nan()
    }
    #[inline(always)]
    fn choose(truth: bool, a: f32, b: f32) -> f32 {
        if truth { a } else { b }
    }
    #[inline(always)]
    fn and(self, other: f32) -> f32 {
        f32::from_bits(self.to_bits() & other.to_bits())
    }
    #[inline(always)]
    fn or(self, other: f32) -> f32 {
        f32::from_bits(self.to_bits() | other.to_bits())
    }
    #[inline(always)]
    fn plus(self, other: f32) -> f32 {
        f32::from_bits(self.to_bits().wrapping_add(other.to_bits()))
    }
    #[inline(always)]
    fn up(self, bits: u8) -> f32 {
        f32::from_bits(self.to_bits() << bits)
    }
    #[inline(always)]
    fn down(self, bits: u8) -> f32 {
        f32::from_bits(self.to_bits() >> bits)
    }
    #[inline(always)]
    fn as_float(self) -> f32 {
        self.to_bits() as i32 as f32
    }
    #[inline(always)]
    fn as_integer(self) -> f32 {
        f32::from_bits(self as i32 as u32)
    }
}

/// The polynomial with these coefficients, that of the highest power first.
#[inline(always)]
fn horner<R: Real, const N: usize>(x: R, coefficients: [f32; N]) -> R {
    coefficients[1..].iter().fold(x.of(coefficients[0]), |p, c| p.times_plus(x, x.of(*c)))
}

/// Not below `low` and not above `high`, but NaN where it is that.
#[inline(always)]
fn clamp<R: Real>(x: R, low: f32, high: f32) -> R {
    x.of(low).greater(x.of(high).lesser(x))
}

/// Nearest integer, ties to even, for |x| < 2^22.
#[inline(always)]
fn round<R: Real>(x: R) -> R {
    (x + x.of(SHIFT)) - x.of(SHIFT)
}

/// 1.5 * 2^23: added to an integer below 2^22 in magnitude, it leaves the integer in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// The integer in an integral n below 2^22 in magnitude, and `offset`; a cast would be done lane by lane, as it minds NaN.
#[inline(always)]
fn integer<R: Real>(n: R, offset: u32) -> R {
    (n + n.of(SHIFT)).plus(n.of_bits(offset.wrapping_sub(SHIFT.to_bits())))
}

/// 2^n for an integral n in -126 ..= 127.
#[inline(always)]
fn exp2i<R: Real>(n: R) -> R {
    integer(n, 127).up(23)
}

/// e^x, to 2 ulp.
#[inline(always)]
pub fn exp<R: Real>(x: R) -> R {
    let c = clamp(x, -104.0, 89.0);
    let n = c.times_plus(x.of(std::f32::consts::LOG2_E), x.of(SHIFT)) - x.of(SHIFT);
    let r = n.times_plus(x.of(2.121_944_4e-4), n.times_plus(x.of(-0.693_359_4), c));
    let p = horner(r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5]);
    let y = p.times_plus(r * r, r) + x.of(1.0);
    // From 88.72284 on that is too large for a float.
    R::choose(x.is_nan(), x, y.scaled(n))
}

/// Natural logarithm, to 2 ulp.
#[inline(always)]
pub fn log<R: Real>(x: R) -> R {
    let (zero, one) = (x.of(0.0), x.of(1.0));
    let small = x.less(x.of(f32::MIN_POSITIVE));
    let s = R::choose(small, x * x.of(8_388_608.0), x);
    let exponent = s.down(23).and(x.of_bits(0xff)).as_float();
    let e = exponent - R::choose(small, x.of(149.0), x.of(126.0));
    let m = s.and(x.of_bits(0x007f_ffff)).or(x.of_bits(0x3f00_0000));
    let low = m.less(x.of(std::f32::consts::FRAC_1_SQRT_2));
    let e = e - R::choose(low, one, zero);
    let m = R::choose(low, m + m, m) - one;
    let z = m * m;
    let coefficients = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333_1e-1,
    ];
    let p = horner(m, coefficients) * m * z;
    let y = z.times_plus(x.of(-0.5), e.times_plus(x.of(-2.121_944_4e-4), p));
    let y = e.times_plus(x.of(0.693_359_4), m + y);
    let y = R::choose(x.equals(x.of(f32::INFINITY)), x, y);
    let y = R::choose(x.equals(zero), x.of(f32::NEG_INFINITY), y);
    // Neither for negative ones nor for NaN.
    R::choose(zero.at_most(x), y, x.of(f32::NAN))
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh<R: Real>(x: R) -> R {
    let a = x.abs();
    let z = x * x;
    let p = horner(z, [-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1]);
    let small = (p * z).times_plus(x, x);
    let large = x.of(1.0) - x.of(2.0) / (exp(a + a) + x.of(1.0));
    let large = R::choose(x.less(x.of(0.0)), -large, large);
    let y = R::choose(a.less(x.of(0.625)), small, large);
    R::choose(x.is_nan(), x, y)
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid<R: Real>(x: R) -> R {
    x.of(1.0) / (x.of(1.0) + exp(-x))
}

/// Error function, to 4e-7: x P(x²) / Q(x²), fitted to the least largest relative error up to 3.92, where it is 1.
#[inline(always)]
pub fn erf<R: Real>(x: R) -> R {
    let c = clamp(x, -3.92, 3.92);
    let z = c * c;
    let p = horner(z, [2.050_1e-6, 2.848_808_1e-4, 3.765_538_8e-3, 5.274_848_6e-2, 1.904_046_7e-1, 1.128_379_107]);
    let q = horner(z, [3.809_174_4e-5, 1.162_516_2e-3, 1.496_906_2e-2, 1.141_083_7e-1, 5.020_744_8e-1, 1.0]);
    clamp(c * p / q, -1.0, 1.0)
}

/// Sine and cosine, for |x| < 1e4 to 2e-7.
#[inline(always)]
fn sin_cos<R: Real>(x: R) -> (R, R) {
    let n = round(x * x.of(std::f32::consts::FRAC_2_PI));
    let r = n.times_plus(x.of(-4.837_513e-4), n.times_plus(x.of(-1.570_312_5), x));
    let r = n.times_plus(x.of(-7.549_79e-8), r);
    let z = r * r;
    let s = (horner(z, [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]) * z).times_plus(r, r);
    let c = horner(z, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2, -0.5, 1.0]);
    // The quadrant: odd ones exchange the two, and the second bit, of the quadrant and of the next one, is the sign.
    let odd = integer(n, 0).up(31).as_float().less(x.of(0.0));
    let sign = |offset: u32, y: R| {
        let negative = integer(n, offset).down(1).up(31).as_float().less(x.of(0.0));
        R::choose(negative, -y, y)
    };
    (sign(0, R::choose(odd, c, s)), sign(1, R::choose(odd, s, c)))
}

/// Sine.
#[inline(always)]
pub fn sin<R: Real>(x: R) -> R {
    sin_cos(x).0
}

/// Cosine.
#[inline(always)]
pub fn cos<R: Real>(x: R) -> R {
    sin_cos(x).1
}

/// The largest integer not above x.
#[inline(always)]
pub fn floor<R: Real>(x: R) -> R {
    let t = x.as_integer().as_float();
    let t = R::choose(x.less(t), t - x.of(1.0), t);
    let y = R::choose(x.abs().less(x.of(8_388_608.0)), t, x);
    // -0.0 stays -0.0.
    R::choose(x.equals(x.of(0.0)), x, y)
}

/// a^b as e^(b log |a|), with the sign that an integral b gives to a negative a.
#[inline(always)]
pub fn pow<R: Real>(a: R, b: R) -> R {
    let magnitude = exp(b * log(a.abs()));
    let even = (floor(b * b.of(0.5)) * b.of(2.0)).equals(b);
    let signed = R::choose(even, magnitude, -magnitude);
    let signed = R::choose(floor(b).equals(b), signed, a.of(f32::NAN));
    let y = R::choose(a.less(a.of(0.0)), signed, magnitude);
    let y = R::choose(a.equals(a.of(1.0)), a.of(1.0), y);
    R::choose(b.equals(b.of(0.0)), a.of(1.0), y)
}

/// The larger of two, whatever their order: +0 above -0, NaN if any is NaN.
#[inline(always)]
pub fn max<R: Real>(a: R, b: R) -> R {
    let y = a.greater(b);
    let y = R::choose(a.equals(b), a.and(b), y);
    either_nan(a, b, y)
}

/// The smaller of two, whatever their order: -0 below +0, NaN if any is NaN.
#[inline(always)]
pub fn min<R: Real>(a: R, b: R) -> R {
    let y = a.lesser(b);
    let y = R::choose(a.equals(b), a.or(b), y);
    either_nan(a, b, y)
}

#[inline(always)]
fn either_nan<R: Real>(a: R, b: R, otherwise: R) -> R {
    R::choose(a.any_nan(b), a.of(f32::NAN), otherwise)
}

/// The nearest `bf16`, ties to even; of subnormal numbers, as the instruction for it has it, a zero.
#[inline(always)]
pub fn to_bf16<R: Real>(x: R) -> R {
    let upper = x.of_bits(0xffff_0000);
    let odd = x.down(16).and(x.of_bits(1));
    let rounded = x.plus(odd).plus(x.of_bits(0x7fff)).and(upper);
    let rounded = R::choose(x.abs().less(x.of(f32::MIN_POSITIVE)), x.and(x.of_bits(1 << 31)), rounded);
    R::choose(x.is_nan(), x.and(upper).or(x.of_bits(0x40_0000)), rounded)
}

/// A function of one float.
#[inline(always)]
pub fn unary<R: Real>(f: UnaryFn, x: R) -> R {
    let (zero, one) = (x.of(0.0), x.of(1.0));
    match f {
        UnaryFn::Identity => x,
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Sign => R::choose(zero.less(x), one, R::choose(x.less(zero), -one, x * zero)),
        UnaryFn::Exp => exp(x),
        UnaryFn::Log => log(x),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Rsqrt => one / x.sqrt(),
        UnaryFn::Recip => one / x,
        UnaryFn::Tanh => tanh(x),
        UnaryFn::Sigmoid => sigmoid(x),
        UnaryFn::Erf => erf(x),
        UnaryFn::Relu => R::choose(x.at_most(zero), zero, x),
        UnaryFn::Floor => floor(x),
        UnaryFn::Sin => sin(x),
        UnaryFn::Cos => cos(x),
        // Of truths alone, which are integers.
        UnaryFn::Not => x,
    }
}

/// A function of two floats.
#[inline(always)]
pub fn binary<R: Real>(f: BinaryFn, a: R, b: R) -> R {
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div => a / b,
        BinaryFn::Max => max(a, b),
        BinaryFn::Min => min(a, b),
        BinaryFn::Pow => pow(a, b),
        BinaryFn::Rem => a - b * floor(a / b),
        BinaryFn::And => a.and(b),
        BinaryFn::Or => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(name: &str, f: impl Fn(f32) -> f32, g: impl Fn(f64) -> f64, range: std::ops::Range<f64>, tolerance: f64) {
        for i in 0..20_000 {
            let x = (range.start + (range.end - range.start) * f64::from(i) / 20_000.0) as f32;
            let (y, z) = (f64::from(f(x)), g(f64::from(x)));
            assert!(
                (y - z).abs() <= tolerance * (1.0f64).max(z.abs()).min(z.abs() + 1e-3),
                "{name}({x}) = {y}, not {z}"
            );
        }
    }

    #[test]
    fn functions_agree_with_double_precision() {
        close("exp", exp, f64::exp, -80.0..88.0, 3e-7);
        close("log", log, f64::ln, 1e-6..1e3, 4e-7);
        close("tanh", tanh, f64::tanh, -10.0..10.0, 1e-6);
        close("sigmoid", sigmoid, |x| 1.0 / (1.0 + (-x).exp()), -20.0..20.0, 1e-6);
        close("erf", erf, |x| mesh::ops::unary::UnaryFn::Erf.eval(x), -4.0..4.0, 1e-6);
        close("floor", floor, f64::floor, -50.0..50.0, 0.0);
        for i in 0..10_000 {
            let x = i as f32 * 0.01 - 50.0;
            assert!((f64::from(sin(x)) - f64::from(x).sin()).abs() < 1e-6, "sin({x})");
            assert!((f64::from(cos(x)) - f64::from(x).cos()).abs() < 1e-6, "cos({x})");
        }
        assert!((pow(-2.0, 3.0) + 8.0).abs() < 1e-5 && (pow(2.0, 0.5) - std::f32::consts::SQRT_2).abs() < 1e-6);
    }

    #[test]
    fn functions_are_right_at_the_edges() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.722_84), f32::INFINITY);
        assert!(exp(88.722_83) < f32::INFINITY && exp(-103.97) > 0.0 && exp(-104.0) == 0.0);
        assert!(exp(f32::NAN).is_nan() && log(f32::NAN).is_nan() && log(-1.0).is_nan() && tanh(f32::NAN).is_nan());
        assert_eq!(log(0.0), f32::NEG_INFINITY);
        assert_eq!(log(f32::INFINITY), f32::INFINITY);
        assert_eq!((tanh(40.0), tanh(-40.0), sigmoid(100.0)), (1.0, -1.0, 1.0));
        assert_eq!(max(-0.0, 0.0).to_bits(), 0.0f32.to_bits());
        assert_eq!(max(0.0, -0.0).to_bits(), 0.0f32.to_bits());
        assert_eq!(min(0.0, -0.0).to_bits(), (-0.0f32).to_bits());
        assert!(max(1.0, f32::NAN).is_nan() && min(f32::NAN, 1.0).is_nan());
        let rounded = [1.003_906_3, 1.011_718_8, f32::MAX, -1e-40, f32::MIN_POSITIVE].map(to_bf16);
        assert_eq!(rounded, [1.0, 1.015_625, f32::INFINITY, 0.0, f32::MIN_POSITIVE]);
        assert!(rounded[3].is_sign_negative() && to_bf16(f32::NAN).is_nan());
    }
}
