//! Names, dimensions, dtypes and tensor types.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

/// The name of a dimension, a mesh axis, a variable or a scope. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Name(Arc<str>);

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}
impl From<&str> for Name {
    fn from(s: &str) -> Self {
        Name(s.into())
    }
}
impl From<&Name> for Name {
    fn from(s: &Name) -> Self {
        s.clone()
    }
}
impl From<String> for Name {
    fn from(s: String) -> Self {
        Name(s.into())
    }
}
impl From<Name> for String {
    fn from(s: Name) -> Self {
        s.0.to_string()
    }
}
impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}
impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// A named dimension: `x:64`.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Dim {
    /// Its name; ops match dimensions by it.
    pub name: Name,
    /// Its size in elements, of the whole (unsharded) tensor.
    pub size: usize,
}

/// The dimension `name:size`.
pub fn dim(name: impl Into<Name>, size: usize) -> Dim {
    Dim { name: name.into(), size }
}

impl Dim {
    /// The same size under another name.
    pub fn named(&self, name: impl Into<Name>) -> Dim {
        dim(name, self.size)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.size)
    }
}
impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for Dim {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let (name, size) = s.split_once(':').ok_or_else(|| format!("`{s}` is not of the form name:size"))?;
        let size = size.trim().parse().map_err(|_| format!("`{}` in `{s}` is not a size", size.trim()))?;
        is_name(name.trim()).then(|| dim(name.trim(), size)).ok_or_else(|| format!("`{}` is not a name", name.trim()))
    }
}

/// Whether `s` may name a dimension or an axis: letters, digits, `_`, `.`, `-` and `'`, not starting with a digit.
pub fn is_name(s: &str) -> bool {
    s.starts_with(|c: char| c.is_alphabetic() || c == '_')
        && s.chars().all(|c| c.is_alphanumeric() || "_.-'".contains(c))
}

/// Numbers as their bits in JSON, which has no infinities.
pub mod bits {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// As 16 hexadecimal digits.
    pub fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{:016x}", value.to_bits()))
    }

    /// From 16 hexadecimal digits.
    pub fn deserialize<'a, D: Deserializer<'a>>(d: D) -> Result<f64, D::Error> {
        let text = String::deserialize(d)?;
        u64::from_str_radix(&text, 16).map(f64::from_bits).map_err(|_| D::Error::custom("not the bits of a number"))
    }
}

/// The type of an element.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// 32-bit signed integer.
    I32,
    /// True or false, a byte each.
    Bool,
}

impl DType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Bool => 1,
        }
    }
    /// Whether gradients flow through values of this type.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16)
    }
    /// Whether it is a float of 16 bits: each is an `f32` too, as which it is computed with.
    pub fn is_half(self) -> bool {
        matches!(self, DType::Bf16 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::Bool => "bool",
        })
    }
}

/// A tensor type: a dtype and an ordered list of dimensions with unlike names. The order is the order in memory
/// (last one contiguous) and nothing else: ops match by name.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub dims: Vec<Dim>,
}

impl Type {
    /// A type of the given dimensions.
    pub fn new(dtype: DType, dims: impl Into<Vec<Dim>>) -> Type {
        Type { dtype, dims: dims.into() }
    }
    /// A type without dimensions: one element.
    pub fn scalar(dtype: DType) -> Type {
        Type { dtype, dims: vec![] }
    }
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().map(|d| d.size).product()
    }
    /// Bytes of the whole tensor.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }
    /// Size of the dimension of that name.
    pub fn size_of(&self, name: &str) -> Option<usize> {
        self.dims.iter().find(|d| d.name == *name).map(|d| d.size)
    }
    /// Place of the dimension of that name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.dims.iter().position(|d| d.name == *name)
    }
    /// Whether there is a dimension of that name.
    pub fn has(&self, name: &str) -> bool {
        self.position(name).is_some()
    }
    /// The sizes in order.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().map(|d| d.size).collect()
    }
    /// The same dimensions with another element type.
    pub fn with_dtype(&self, dtype: DType) -> Type {
        Type { dtype, dims: self.dims.clone() }
    }
    /// The type without the dimensions named.
    pub fn without(&self, names: &[Name]) -> Type {
        Type { dtype: self.dtype, dims: self.dims.iter().filter(|d| !names.contains(&d.name)).cloned().collect() }
    }
    /// Whether it is one that a tensor may have: at most 16 dimensions of unlike names, at most 2^48 elements.
    pub fn check(&self) -> Result<(), String> {
        let most = 1usize << 48;
        let elements = self.dims.iter().try_fold(1usize, |n, d| n.checked_mul(d.size)).filter(|n| *n <= most);
        if self.dims.len() > 16 || elements.is_none() || self.duplicate().is_some() {
            return Err(format!("{self} has too many dimensions or elements, or a name twice"));
        }
        match self.dims.iter().find(|d| !is_name(&d.name)) {
            Some(d) => Err(format!("`{}` is not a name", d.name)),
            None => Ok(()),
        }
    }
    /// A name that occurs twice, if any.
    pub fn duplicate(&self) -> Option<&Name> {
        self.dims
            .iter()
            .enumerate()
            .find(|(i, d)| self.dims[..*i].iter().any(|e| e.name == d.name))
            .map(|(_, d)| &d.name)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, d) in self.dims.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { ", " } else { "" })?;
        }
        f.write_str("]")
    }
}
impl fmt::Debug for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_dimension_reads_back_as_it_is_written(name in "[a-z_][a-z0-9_.]{0,8}", size in 0usize..1_000_000) {
            let d = dim(name.as_str(), size);
            prop_assert_eq!(d.to_string().parse::<Dim>().unwrap(), d);
        }
    }
}
