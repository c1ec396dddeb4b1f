//! What the machine of fused bodies ([`super::vm`]) does to lanes: 32 bits a point, an `f32`, an `i32`, a 16-bit float as
//! the `f32` that it is, or a truth as 0 or 1. Each function is one tight loop over the lanes of a block, compiled for every
//! instruction set.

use super::half::{self, Bf16, Element, F16};
use super::isa::Isa;
use super::math;
use crate::dispatch;
use mesh::dim::DType;
use mesh::ops::binary::BinaryFn;
use mesh::ops::compare::CompareFn;
use mesh::ops::source::Distribution;
use mesh::ops::unary::UnaryFn;
use mesh::rng::{Stream, between_twos, box_muller, normal_quantiles, philox, unit};

/// How an operand's block of rows x columns lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Back to back.
    Contiguous,
    /// One element for the whole block.
    Splat,
    /// The same row again and again.
    SameRow,
    /// Anything else.
    Strided,
    /// Not in memory: each block is given its elements, one after the other.
    Given,
}

/// An operand of a loop nest.
pub struct Operand {
    /// Element type.
    pub dtype: DType,
    /// Element read at the first point.
    pub offset: usize,
    /// Elements between the points of each loop.
    pub strides: Vec<usize>,
    /// How a block lies.
    pub mode: Mode,
}

impl Operand {
    /// Elements between the points of the two innermost loops: rows and columns.
    pub fn along(&self) -> [usize; 2] {
        let d = self.strides.len();
        [self.strides[d - 2], self.strides[d - 1]]
    }

    /// The element that is read at a point.
    #[inline]
    pub fn at(&self, point: &[usize]) -> usize {
        self.offset + point.iter().zip(&self.strides).map(|(a, s)| a * s).sum::<usize>()
    }
}

/// Loads a block of an operand; gives where it lies: in `out`, or where it lay already.
///
/// # Safety
/// The buffer holds the block's elements.
pub unsafe fn load(
    isa: Isa,
    operand: &Operand,
    buffer: *const u8,
    start: usize,
    rows: usize,
    columns: usize,
    out: &mut [u32],
) -> *const u32 {
    if operand.mode == Mode::Contiguous && operand.dtype.bytes() == 4 {
        // SAFETY: by this function's contract.
        return unsafe { buffer.cast::<u32>().add(start) };
    }
    let at = [start, rows, columns];
    dispatch!(isa, fn(isa: Isa, operand: &Operand, buffer: *const u8, at: [usize; 3], out: &mut [u32]) {
        // SAFETY: by the contract of this function.
        unsafe { copy(isa, operand, buffer, at, out) }
    });
    out.as_ptr()
}

#[inline(always)]
unsafe fn copy(isa: Isa, operand: &Operand, buffer: *const u8, [start, rows, columns]: [usize; 3], out: &mut [u32]) {
    let d = operand.strides.len();
    let (row, column) = (operand.strides[d - 2], operand.strides[d - 1]);
    // SAFETY: the block's elements lie in the buffer by the caller's contract.
    unsafe {
        match operand.dtype {
            DType::F32 | DType::I32 => {
                let from = buffer.cast::<u32>();
                match operand.mode {
                    Mode::Contiguous | Mode::Given => {
                        out.copy_from_slice(std::slice::from_raw_parts(from.add(start), out.len()))
                    }
                    Mode::Splat => out.fill(*from.add(start)),
                    Mode::SameRow => {
                        let first = std::slice::from_raw_parts(from.add(start), columns);
                        out.chunks_exact_mut(columns.max(1)).for_each(|o| o.copy_from_slice(first));
                    }
                    Mode::Strided if column == 1 => {
                        for (r, o) in out.chunks_exact_mut(columns.max(1)).enumerate() {
                            o.copy_from_slice(std::slice::from_raw_parts(from.add(start + r * row), columns));
                        }
                    }
                    Mode::Strided if column == 0 && row == 1 && (2..=8).contains(&columns) => {
                        let first = std::slice::from_raw_parts(from.add(start), rows);
                        match columns {
                            2 => repeat::<2>(first, out),
                            3 => repeat::<3>(first, out),
                            4 => repeat::<4>(first, out),
                            5 => repeat::<5>(first, out),
                            6 => repeat::<6>(first, out),
                            7 => repeat::<7>(first, out),
                            _ => repeat::<8>(first, out),
                        }
                    }
                    Mode::Strided if column == 0 => {
                        for (r, o) in out.chunks_exact_mut(columns.max(1)).enumerate() {
                            o.fill(*from.add(start + r * row));
                        }
                    }
                    Mode::Strided => {
                        for r in 0..rows {
                            for c in 0..columns {
                                out[r * columns + c] = *from.add(start + r * row + c * column);
                            }
                        }
                    }
                }
            }
            DType::Bf16 => halves::<Bf16>(operand, buffer.cast(), [start, columns], out),
            DType::F16 if operand.mode == Mode::Contiguous => {
                half::widen(isa, std::slice::from_raw_parts(buffer.cast::<u16>().add(start), out.len()), out);
            }
            DType::F16 => halves::<F16>(operand, buffer.cast(), [start, columns], out),
            DType::Bool => {
                for r in 0..rows {
                    for c in 0..columns {
                        out[r * columns + c] = u32::from(*buffer.add(start + r * row + c * column));
                    }
                }
            }
        }
    }
}

/// A block of 16-bit floats.
#[inline(always)]
unsafe fn halves<E: Element>(operand: &Operand, buffer: *const E, [start, columns]: [usize; 2], out: &mut [u32]) {
    let [row, column] = operand.along();
    // SAFETY: the block's elements lie in the buffer by the caller's contract.
    unsafe {
        if operand.mode == Mode::Contiguous {
            let from = std::slice::from_raw_parts(buffer.add(start), out.len());
            return out.iter_mut().zip(from).for_each(|(o, v)| *o = v.wide().to_bits());
        }
        for (r, o) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            let from = buffer.add(start + r * row);
            if column == 1 {
                let from = std::slice::from_raw_parts(from, columns);
                o.iter_mut().zip(from).for_each(|(o, v)| *o = v.wide().to_bits());
            } else {
                o.iter_mut().enumerate().for_each(|(c, o)| *o = (*from.add(c * column)).wide().to_bits());
            }
        }
    }
}

/// The lanes of `a` where the condition holds, and of `b` elsewhere.
pub fn select(isa: Isa, c: &[u32], a: &[u32], b: &[u32], out: &mut [u32]) {
    dispatch!(isa, fn(c: &[u32], a: &[u32], b: &[u32], out: &mut [u32]) {
        for (((o, c), a), b) in out.iter_mut().zip(c).zip(a).zip(b) {
            // Both are read whatever the condition, so that whole vectors are.
            let (a, b) = (*a, *b);
            *o = if *c != 0 { a } else { b };
        }
    });
}

/// Each element N times.
#[inline(always)]
fn repeat<const N: usize>(from: &[u32], to: &mut [u32]) {
    to.as_chunks_mut::<N>().0.iter_mut().zip(from).for_each(|(t, f)| *t = [*f; N]);
}

#[inline(always)]
fn floats(a: &[u32], out: &mut [u32], f: impl Fn(f32) -> f32) {
    for (o, a) in out.iter_mut().zip(a) {
        *o = f(f32::from_bits(*a)).to_bits();
    }
}

#[inline(always)]
fn floats2(a: &[u32], b: &[u32], out: &mut [u32], f: impl Fn(f32, f32) -> f32) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = f(f32::from_bits(*a), f32::from_bits(*b)).to_bits();
    }
}

#[inline(always)]
fn ints2(a: &[u32], b: &[u32], out: &mut [u32], f: impl Fn(i32, i32) -> i32) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = f(*a as i32, *b as i32) as u32;
    }
}

/// A function of one value.
pub fn unary(isa: Isa, f: UnaryFn, dtype: DType, a: &[u32], out: &mut [u32]) {
    dispatch!(isa, fn(f: UnaryFn, dtype: DType, a: &[u32], out: &mut [u32]) {
        if dtype == DType::I32 {
            let int = |x: i32| match f {
                UnaryFn::Neg => x.wrapping_neg(),
                UnaryFn::Abs => x.wrapping_abs(),
                UnaryFn::Sign => x.signum(),
                UnaryFn::Relu => x.max(0),
                _ => x,
            };
            return out.iter_mut().zip(a).for_each(|(o, a)| *o = int(*a as i32) as u32);
        }
        macro_rules! each {
            ($($f:ident)*) => {
                match f {
                    UnaryFn::Not => out.iter_mut().zip(a).for_each(|(o, a)| *o = u32::from(*a == 0)),
                    $(UnaryFn::$f => floats(a, out, |x| math::unary(UnaryFn::$f, x)),)*
                }
            };
        }
        each!(Identity Neg Abs Sign Exp Log Sqrt Rsqrt Recip Tanh Sigmoid Erf Relu Floor Sin Cos);
    });
}

/// A function of two values.
pub fn binary(isa: Isa, f: BinaryFn, dtype: DType, a: &[u32], b: &[u32], out: &mut [u32]) {
    dispatch!(isa, fn(f: BinaryFn, dtype: DType, a: &[u32], b: &[u32], out: &mut [u32]) {
        if dtype == DType::I32 {
            return match f {
                BinaryFn::Add => ints2(a, b, out, i32::wrapping_add),
                BinaryFn::Sub => ints2(a, b, out, i32::wrapping_sub),
                BinaryFn::Mul => ints2(a, b, out, i32::wrapping_mul),
                BinaryFn::Div => ints2(a, b, out, |x, y| x.checked_div(y).unwrap_or(0)),
                BinaryFn::Max => ints2(a, b, out, i32::max),
                BinaryFn::Min => ints2(a, b, out, i32::min),
                BinaryFn::Rem => ints2(a, b, out, |x, y| {
                    let r = x.checked_rem(y).unwrap_or(0);
                    if r != 0 && (r < 0) != (y < 0) { r + y } else { r }
                }),
                BinaryFn::Pow | BinaryFn::And | BinaryFn::Or => out.copy_from_slice(a),
            };
        }
        macro_rules! each {
            ($($f:ident)*) => {
                match f {
                    $(BinaryFn::$f => floats2(a, b, out, |x, y| math::binary(BinaryFn::$f, x, y)),)*
                }
            };
        }
        each!(Add Sub Mul Div Max Min Pow Rem And Or);
    });
}

/// A comparison: 0 or 1.
pub fn compare(isa: Isa, f: CompareFn, dtype: DType, a: &[u32], b: &[u32], out: &mut [u32]) {
    dispatch!(isa, fn(f: CompareFn, dtype: DType, a: &[u32], b: &[u32], out: &mut [u32]) {
        macro_rules! each {
            ($f:expr) => {
                if dtype.is_float() {
                    let f: fn(f32, f32) -> bool = $f;
                    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                        *o = u32::from(f(f32::from_bits(*a), f32::from_bits(*b)));
                    }
                } else {
                    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                        *o = u32::from(f.eval(*a as i32, *b as i32));
                    }
                }
            };
        }
        match f {
            CompareFn::Eq => each!(|x, y| x == y),
            CompareFn::Ne => each!(|x, y| x != y),
            CompareFn::Lt => each!(|x, y| x < y),
            CompareFn::Le => each!(|x, y| x <= y),
            CompareFn::Gt => each!(|x, y| x > y),
            CompareFn::Ge => each!(|x, y| x >= y),
        }
    });
}

/// Another dtype.
pub fn cast(isa: Isa, from: DType, to: DType, a: &[u32], out: &mut [u32]) {
    dispatch!(isa, fn(isa: Isa, from: DType, to: DType, a: &[u32], out: &mut [u32]) {
        use DType::{Bf16, Bool, F16, F32, I32};
        match (from, to) {
            (F32 | Bf16 | F16, F32) | (Bf16, Bf16) | (F16, F16) => out.copy_from_slice(a),
            (I32, I32) | (Bool, Bool) | (Bool, I32) => out.copy_from_slice(a),
            (F32 | Bf16, F16) => half::round(isa, a, out),
            (F32 | F16, Bf16) => out.iter_mut().zip(a).for_each(|(o, a)| *o = u32::from(to_bf16(*a)) << 16),
            (F32 | Bf16 | F16, I32) => out.iter_mut().zip(a).for_each(|(o, a)| *o = f32::from_bits(*a) as i32 as u32),
            (F32 | Bf16 | F16, Bool) => {
                out.iter_mut().zip(a).for_each(|(o, a)| *o = u32::from(f32::from_bits(*a) != 0.0))
            }
            (I32, F32) => out.iter_mut().zip(a).for_each(|(o, a)| *o = (*a as i32 as f32).to_bits()),
            (I32, Bf16) => {
                out.iter_mut().zip(a).for_each(|(o, a)| *o = u32::from(to_bf16((*a as i32 as f32).to_bits())) << 16)
            }
            (I32, F16) => {
                out.iter_mut().zip(a).for_each(|(o, a)| *o = half::F16::of(*a as i32 as f32).wide().to_bits())
            }
            (I32, Bool) => out.iter_mut().zip(a).for_each(|(o, a)| *o = u32::from(*a != 0)),
            (Bool, F32 | Bf16 | F16) => {
                out.iter_mut().zip(a).for_each(|(o, a)| *o = if *a != 0 { 1.0f32.to_bits() } else { 0 })
            }
        }
    });
}

/// The bits of the nearest bf16, ties to even.
#[inline(always)]
pub fn to_bf16(bits: u32) -> u16 {
    (math::to_bf16(f32::from_bits(bits)).to_bits() >> 16) as u16
}

/// A constant's bits in a lane.
pub fn constant(c: f64, dtype: DType) -> u32 {
    match dtype {
        DType::F32 => (c as f32).to_bits(),
        DType::Bf16 => u32::from(to_bf16((c as f32).to_bits())) << 16,
        DType::F16 => F16::of(c as f32).wide().to_bits(),
        DType::I32 => c as i32 as u32,
        DType::Bool => u32::from(c != 0.0),
    }
}

/// Random numbers of elements `start`, `start + stride`, ..
pub fn random(isa: Isa, stream: Stream, distribution: Distribution, start: u64, stride: u64, out: &mut [u32]) {
    dispatch!(isa, fn(stream: Stream, distribution: Distribution, start: u64, stride: u64, out: &mut [u32]) {
        if stride == 1 {
            bits(stream, start, out);
        } else {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = stream.bits(start + i as u64 * stride));
        }
        match distribution {
            Distribution::Bernoulli(p) => {
                out.iter_mut().for_each(|o| *o = if unit(*o) < p { 1.0f32.to_bits() } else { 0 });
            }
            Distribution::Uniform => out.iter_mut().for_each(|o| *o = unit(*o).to_bits()),
            Distribution::TruncatedNormal => truncated_normals(out),
            Distribution::Normal => normals(stream, start, stride, out),
        }
    });
}

/// Normal numbers between -2 and 2 of random bits.
#[inline(always)]
fn truncated_normals(out: &mut [u32]) {
    const LANES: usize = 16;
    for some in out.chunks_mut(LANES) {
        let mut p = [0.5; LANES];
        p.iter_mut().zip(&*some).for_each(|(p, bits)| *p = between_twos(f64::from(unit(*bits))));
        some.iter_mut().zip(normal_quantiles(p)).for_each(|(o, x)| *o = (x as f32).to_bits());
    }
}

/// Normal numbers of random bits: neighbours are pairs, of which both are made at once.
#[inline(always)]
fn normals(stream: Stream, start: u64, stride: u64, out: &mut [u32]) {
    let single = |i: usize| (stream.draw(Distribution::Normal, start + i as u64 * stride) as f32).to_bits();
    if stride != 1 {
        return out.iter_mut().enumerate().for_each(|(i, o)| *o = single(i));
    }
    let mut i = 0;
    while i < out.len() {
        let whole = (start + i as u64).is_multiple_of(2) && i + 1 < out.len();
        if !whole {
            out[i] = single(i);
            i += 1;
            continue;
        }
        let pair = box_muller(f64::from(unit(out[i])), f64::from(unit(out[i + 1])));
        (out[i], out[i + 1]) = ((pair.0 as f32).to_bits(), (pair.1 as f32).to_bits());
        i += 2;
    }
}

/// The random bits of consecutive elements, sixteen Philox blocks at a time.
#[inline(always)]
fn bits(stream: Stream, start: u64, out: &mut [u32]) {
    const LANES: usize = 16;
    let mut done = 0;
    while done < out.len() {
        let index = start + done as u64;
        let first = index / 4;
        let skip = (index % 4) as usize;
        let mut words = [[0u32; LANES]; 4];
        for l in 0..LANES {
            let b = first + l as u64;
            let w = philox(
                [b as u32, (b >> 32) as u32, stream.step, stream.key],
                [stream.seed as u32, (stream.seed >> 32) as u32],
            );
            for k in 0..4 {
                words[k][l] = w[k];
            }
        }
        let mut flat = [0u32; 4 * LANES];
        for l in 0..LANES {
            for k in 0..4 {
                flat[4 * l + k] = words[k][l];
            }
        }
        let n = (4 * LANES - skip).min(out.len() - done);
        out[done..done + n].copy_from_slice(&flat[skip..skip + n]);
        done += n;
    }
}

/// Stores lanes as elements of a dtype.
///
/// # Safety
/// So many lanes lie at `from`, and as many elements fit at `to`.
pub unsafe fn store(isa: Isa, dtype: DType, from: *const u32, to: *mut u8, n: usize) {
    dispatch!(isa, fn(isa: Isa, dtype: DType, from: *const u32, to: *mut u8, n: usize) {
        // SAFETY: by the contract of this function; only lanes of 32 bits may lie where they are stored.
        unsafe {
            if dtype.bytes() == 4 {
                return std::ptr::copy(from, to.cast(), n);
            }
            let from = std::slice::from_raw_parts(from, n);
            match dtype {
                DType::Bf16 => {
                    let to = std::slice::from_raw_parts_mut(to.cast::<u16>(), n);
                    to.iter_mut().zip(from).for_each(|(t, f)| *t = to_bf16(*f));
                }
                DType::F16 => half::narrow(isa, from, std::slice::from_raw_parts_mut(to.cast::<u16>(), n)),
                _ => {
                    let to = std::slice::from_raw_parts_mut(to, n);
                    to.iter_mut().zip(from).for_each(|(t, f)| *t = *f as u8);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_are_those_that_their_indices_draw() {
        let stream = Stream { seed: 11, step: 3, key: 5 };
        let normal = [Distribution::Normal, Distribution::TruncatedNormal];
        for distribution in normal.into_iter().chain([Distribution::Uniform, Distribution::Bernoulli(0.3)]) {
            for (start, stride, n) in [(0, 1, 3000), (7, 1, 66), (2, 1, 1), (5, 3, 40)] {
                let draw = |i: u64| (stream.draw(distribution, start + i * stride) as f32).to_bits();
                let expected: Vec<u32> = (0..n).map(draw).collect();
                for isa in Isa::available() {
                    let mut found = vec![0; n as usize];
                    random(isa, stream, distribution, start, stride, &mut found);
                    assert!(found == expected, "{distribution:?} from {start} by {stride} on {isa:?}");
                }
            }
        }
    }
}
