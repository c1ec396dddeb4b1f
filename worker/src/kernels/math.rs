//! Elementary functions in single precision, of plain IEEE operations alone: the same bits in scalar code, in AVX2 and
//! in AVX-512, and at any place of a vector. Inlined into loops they vectorise.
//!
//! Polynomials after Moshier's Cephes library.

/// Nearest integer, ties to even, for |x| < 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + SHIFT) - SHIFT
}

/// 1.5 * 2^23: added to an integer below 2^22 in magnitude, it leaves the integer in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// The integer in an integral n below 2^22 in magnitude; a cast would be done lane by lane, as it minds NaN.
#[inline(always)]
fn integer(n: f32) -> i32 {
    (n + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32
}

/// 2^n for an integral n in -126 ..= 127.
#[inline(always)]
fn exp2i(n: f32) -> f32 {
    f32::from_bits((integer(n).wrapping_add(127) << 23) as u32)
}

/// e^x, to 2 ulp.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // `clamp` and comparisons are written so that NaN stays NaN.
    let c = if x > 89.0 { 89.0 } else { x };
    let c = if c < -104.0 { -104.0 } else { c };
    let n = round(c * std::f32::consts::LOG2_E);
    let r = (c - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 0.166_666_66) * r
        + 0.5;
    let y = p * r * r + r + 1.0;
    // In two factors, since n may lie outside the exponents of normal numbers.
    let half = round(n * 0.5);
    let y = y * exp2i(half) * exp2i(n - half);
    let y = if x > 88.722_84 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// Natural logarithm, to 2 ulp.
#[inline(always)]
pub fn log(x: f32) -> f32 {
    let small = x < f32::MIN_POSITIVE;
    let s = if small { x * 8_388_608.0 } else { x };
    let bits = s.to_bits();
    let mut e = ((bits >> 23) & 0xff) as i32 as f32 - if small { 149.0 } else { 126.0 };
    let mut m = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let low = m < std::f32::consts::FRAC_1_SQRT_2;
    e -= if low { 1.0 } else { 0.0 };
    m = if low { m + m } else { m } - 1.0;
    let z = m * m;
    let p = ((((((((7.037_683_6e-2 * m - 1.151_461e-1) * m + 1.167_699_9e-1) * m - 1.242_014_1e-1) * m
        + 1.424_932_3e-1)
        * m
        - 1.666_805_7e-1)
        * m
        + 2.000_071_5e-1)
        * m
        - 2.499_999_4e-1)
        * m
        + 3.333_333_1e-1)
        * m
        * z;
    let y = p + e * -2.121_944_4e-4 - 0.5 * z;
    let y = m + y + e * 0.693_359_4;
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f32::NAN } else { y }
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = x * x;
    let small = ((((-5.704_988_7e-3 * z + 2.063_908_9e-2) * z - 5.373_971_6e-2) * z + 1.333_144_2e-1) * z
        - 3.333_328e-1)
        * z
        * x
        + x;
    let large = 1.0 - 2.0 / (exp(a + a) + 1.0);
    let large = if x < 0.0 { -large } else { large };
    let y = if a < 0.625 { small } else { large };
    if x.is_nan() { x } else { y }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Error function, to 4e-7: x P(x²) / Q(x²), fitted to the least largest relative error up to 3.92, where it is 1.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let c = if x > 3.92 { 3.92 } else { x };
    let c = if c < -3.92 { -3.92 } else { c };
    let z = c * c;
    let p = ((((2.050_1e-6 * z + 2.848_808_1e-4) * z + 3.765_538_8e-3) * z + 5.274_848_6e-2) * z + 1.904_046_7e-1) * z
        + 1.128_379_107;
    let q = ((((3.809_174_4e-5 * z + 1.162_516_2e-3) * z + 1.496_906_2e-2) * z + 1.141_083_7e-1) * z + 5.020_744_8e-1)
        * z
        + 1.0;
    let y = c * p / q;
    let y = if y > 1.0 { 1.0 } else { y };
    if y < -1.0 { -1.0 } else { y }
}

/// Sine and cosine, for |x| < 1e4 to 2e-7.
#[inline(always)]
fn sin_cos(x: f32) -> (f32, f32) {
    let n = round(x * std::f32::consts::FRAC_2_PI);
    let r = ((x - n * 1.570_312_5) - n * 4.837_513e-4) - n * 7.549_79e-8;
    let z = r * r;
    let s = ((-1.951_529_6e-4 * z + 8.332_161e-3) * z - 1.666_665_5e-1) * z * r + r;
    let c = ((2.443_315_7e-5 * z - 1.388_731_6e-3) * z + 4.166_664_6e-2) * z * z - 0.5 * z + 1.0;
    let q = integer(n);
    let (s, c) = if q & 1 != 0 { (c, s) } else { (s, c) };
    let s = if q & 2 != 0 { -s } else { s };
    let c = if q.wrapping_add(1) & 2 != 0 { -c } else { c };
    (s, c)
}

/// Sine.
#[inline(always)]
pub fn sin(x: f32) -> f32 {
    sin_cos(x).0
}

/// Cosine.
#[inline(always)]
pub fn cos(x: f32) -> f32 {
    sin_cos(x).1
}

/// The largest integer not above x.
#[inline(always)]
pub fn floor(x: f32) -> f32 {
    let t = x as i32 as f32;
    let t = if t > x { t - 1.0 } else { t };
    let y = if x.abs() < 8_388_608.0 { t } else { x };
    // -0.0 stays -0.0.
    if x == 0.0 { x } else { y }
}

/// a^b as e^(b log |a|), with the sign that an integral b gives to a negative a.
#[inline(always)]
pub fn pow(a: f32, b: f32) -> f32 {
    let magnitude = exp(b * log(a.abs()));
    let whole = floor(b) == b;
    let odd = whole && floor(b * 0.5) * 2.0 != b;
    let y = if odd { -magnitude } else { magnitude };
    let y = if a < 0.0 { if whole { y } else { f32::NAN } } else { magnitude };
    if b == 0.0 || a == 1.0 { 1.0 } else { y }
}

/// The larger of two, whatever their order: +0 above -0, NaN if any is NaN.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    let y = if a > b { a } else { b };
    let y = if a == b { f32::from_bits(a.to_bits() & b.to_bits()) } else { y };
    if a.is_nan() || b.is_nan() { f32::NAN } else { y }
}

/// The smaller of two, whatever their order: -0 below +0, NaN if any is NaN.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    let y = if a < b { a } else { b };
    let y = if a == b { f32::from_bits(a.to_bits() | b.to_bits()) } else { y };
    if a.is_nan() || b.is_nan() { f32::NAN } else { y }
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
        assert!(exp(f32::NAN).is_nan() && log(f32::NAN).is_nan() && log(-1.0).is_nan() && tanh(f32::NAN).is_nan());
        assert_eq!(log(0.0), f32::NEG_INFINITY);
        assert_eq!(log(f32::INFINITY), f32::INFINITY);
        assert_eq!((tanh(40.0), tanh(-40.0), sigmoid(100.0)), (1.0, -1.0, 1.0));
        assert_eq!(max(-0.0, 0.0).to_bits(), 0.0f32.to_bits());
        assert_eq!(max(0.0, -0.0).to_bits(), 0.0f32.to_bits());
        assert_eq!(min(0.0, -0.0).to_bits(), (-0.0f32).to_bits());
        assert!(max(1.0, f32::NAN).is_nan() && min(f32::NAN, 1.0).is_nan());
    }
}
