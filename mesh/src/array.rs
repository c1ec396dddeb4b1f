//! Host arrays: what is fed to a program and fetched from it.

use crate::dim::DType;
use crate::region::Region;
use ndarray::{ArrayD, SliceInfoElem};

/// An array of one of the dtypes that cross the API's edge, its dimensions in a tensor type's order.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// `f32`
    F32(ArrayD<f32>),
    /// `i32`
    I32(ArrayD<i32>),
    /// `bool`
    Bool(ArrayD<bool>),
}

impl Array {
    /// Its element type.
    pub fn dtype(&self) -> DType {
        match self {
            Array::F32(_) => DType::F32,
            Array::I32(_) => DType::I32,
            Array::Bool(_) => DType::Bool,
        }
    }
    /// Its extents.
    pub fn shape(&self) -> &[usize] {
        match self {
            Array::F32(a) => a.shape(),
            Array::I32(a) => a.shape(),
            Array::Bool(a) => a.shape(),
        }
    }
    /// Zeros, or false; 16-bit floats go by way of `f32`.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Array {
        match dtype {
            DType::F32 | DType::Bf16 | DType::F16 => Array::F32(ArrayD::zeros(shape)),
            DType::I32 => Array::I32(ArrayD::zeros(shape)),
            DType::Bool => Array::Bool(ArrayD::from_elem(shape, false)),
        }
    }
    /// The box of it.
    pub fn part(&self, at: &Region) -> Array {
        let at: Vec<SliceInfoElem> = at.0.iter().map(|(_, r)| SliceInfoElem::from(r.start..r.end)).collect();
        match self {
            Array::F32(a) => Array::F32(a.slice(at.as_slice()).to_owned()),
            Array::I32(a) => Array::I32(a.slice(at.as_slice()).to_owned()),
            Array::Bool(a) => Array::Bool(a.slice(at.as_slice()).to_owned()),
        }
    }
    /// Puts an array into the box of it that begins at `start`; says whether that fits.
    pub fn put(&mut self, start: &[usize], part: &Array) -> bool {
        let fits = start.len() == self.shape().len()
            && part.shape().len() == start.len()
            && start.iter().zip(part.shape()).zip(self.shape()).all(|((s, n), whole)| s + n <= *whole);
        if !fits {
            return false;
        }
        let at: Vec<SliceInfoElem> =
            start.iter().zip(part.shape()).map(|(s, n)| SliceInfoElem::from(*s..s + n)).collect();
        match (self, part) {
            (Array::F32(a), Array::F32(p)) => a.slice_mut(at.as_slice()).assign(p),
            (Array::I32(a), Array::I32(p)) => a.slice_mut(at.as_slice()).assign(p),
            (Array::Bool(a), Array::Bool(p)) => a.slice_mut(at.as_slice()).assign(p),
            _ => return false,
        }
        true
    }
    /// An `f32` scalar.
    pub fn scalar(value: f32) -> Array {
        Array::F32(ndarray::arr0(value).into_dyn())
    }
    /// Its elements in row-major order, little-endian; a byte each for `bool`.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Array::F32(a) => a.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Array::I32(a) => a.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Array::Bool(a) => a.iter().map(|v| u8::from(*v)).collect(),
        }
    }
    /// The array of that shape whose elements are these bytes; None if their number is another one.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Option<Array> {
        let elements = shape.iter().try_fold(1usize, |n, s| n.checked_mul(*s))?;
        if elements.checked_mul(dtype.bytes())? != bytes.len() {
            return None;
        }
        let words = || bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        Some(match dtype {
            DType::F32 => Array::F32(ArrayD::from_shape_vec(shape, words().map(f32::from_le_bytes).collect()).ok()?),
            DType::I32 => Array::I32(ArrayD::from_shape_vec(shape, words().map(i32::from_le_bytes).collect()).ok()?),
            DType::Bool => Array::Bool(ArrayD::from_shape_vec(shape, bytes.iter().map(|b| *b != 0).collect()).ok()?),
            DType::Bf16 | DType::F16 => return None,
        })
    }
    /// The `f32` array, if it is one.
    pub fn as_f32(&self) -> Option<&ArrayD<f32>> {
        match self {
            Array::F32(a) => Some(a),
            Array::I32(_) | Array::Bool(_) => None,
        }
    }
    /// The single `f32` element, if there is just one.
    pub fn to_f32(&self) -> Option<f32> {
        self.as_f32().filter(|a| a.len() == 1).and_then(|a| a.first().copied())
    }
}

impl<D: ndarray::Dimension> From<ndarray::Array<f32, D>> for Array {
    fn from(a: ndarray::Array<f32, D>) -> Self {
        Array::F32(a.into_dyn())
    }
}
impl<D: ndarray::Dimension> From<ndarray::Array<i32, D>> for Array {
    fn from(a: ndarray::Array<i32, D>) -> Self {
        Array::I32(a.into_dyn())
    }
}
