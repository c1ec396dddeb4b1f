//! Regions: a range of global indices for each of some named dimensions. What a device owns of a tensor, what an op
//! reads of it and what a halo consists of are all regions.

use crate::dim::{Name, Type};
use std::fmt;
use std::ops::Range;

/// A box of global indices by dimension name.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Region(pub Vec<(Name, Range<usize>)>);

impl Region {
    /// Nothing of a tensor. One without dimensions has a nameless range of no index instead.
    pub fn nothing(ty: &Type) -> Region {
        let dims = ty.dims.iter().map(|d| (d.name.clone(), 0..0));
        Region(if ty.dims.is_empty() { vec![("".into(), 0..0)] } else { dims.collect() })
    }
    /// All of a tensor.
    pub fn full(ty: &Type) -> Region {
        Region(ty.dims.iter().map(|d| (d.name.clone(), 0..d.size)).collect())
    }
    /// The range of the dimension of that name.
    pub fn get(&self, name: &str) -> Option<&Range<usize>> {
        // Most often it is the same name, not only an equal one.
        self.0.iter().find(|(n, _)| std::ptr::eq(&**n, name) || **n == *name).map(|(_, r)| r)
    }
    /// This region with the range of one dimension put in place (added if it was absent).
    pub fn with(mut self, name: &Name, range: Range<usize>) -> Region {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, r)) => *r = range,
            None => self.0.push((name.clone(), range)),
        }
        self
    }
    /// This region seen by a tensor: its dimensions in its order, whole where this region says nothing.
    pub fn of(&self, ty: &Type) -> Region {
        Region(ty.dims.iter().map(|d| (d.name.clone(), self.get(&d.name).cloned().unwrap_or(0..d.size))).collect())
    }
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.0.iter().map(|(_, r)| r.len()).product()
    }
    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.0.iter().any(|(_, r)| r.is_empty())
    }
    /// Extents in order.
    pub fn shape(&self) -> Vec<usize> {
        self.0.iter().map(|(_, r)| r.len()).collect()
    }
    /// Whether it has the extents of another one.
    pub fn has_shape_of(&self, other: &Region) -> bool {
        self.0.iter().map(|(_, r)| r.len()).eq(other.0.iter().map(|(_, r)| r.len()))
    }
    /// Whether `inner` lies inside. An empty region lies inside everything.
    pub fn contains(&self, inner: &Region) -> bool {
        inner.is_empty()
            || !self.is_empty()
                && self.0.iter().zip(&inner.0).all(|((a, r), (b, s))| {
                    debug_assert_eq!(a, b);
                    r.start <= s.start && s.end <= r.end
                })
    }
    /// Whether both are the same ranges, maybe under other names.
    pub fn same_ranges(&self, other: &Region) -> bool {
        self.0.iter().map(|(_, r)| r).eq(other.0.iter().map(|(_, r)| r))
    }
    /// Whether there is an element that both hold (dimensions in the same order).
    pub fn overlaps(&self, other: &Region) -> bool {
        let mut ranges = self.0.iter().zip(&other.0);
        !self.is_empty() && !other.is_empty() && ranges.all(|((_, r), (_, s))| r.start.max(s.start) < r.end.min(s.end))
    }
    /// What both hold (dimensions in the same order).
    pub fn intersect(&self, other: &Region) -> Region {
        if let Some(empty) = [self, other].into_iter().find(|r| r.is_empty()) {
            return empty.clone();
        }
        Region(
            self.0
                .iter()
                .zip(&other.0)
                .map(|((n, r), (m, s))| {
                    debug_assert_eq!(n, m);
                    let start = r.start.max(s.start);
                    (n.clone(), start..r.end.min(s.end).max(start))
                })
                .collect(),
        )
    }
    /// The least region that holds both (dimensions in the same order).
    pub fn hull(&self, other: &Region) -> Region {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other.clone(),
            (_, true) => self.clone(),
            _ => {
                let both = self.0.iter().zip(&other.0);
                Region(both.map(|((n, r), (_, s))| (n.clone(), r.start.min(s.start)..r.end.max(s.end))).collect())
            }
        }
    }
    /// The type of the tensor that holds just this region of `ty`.
    pub fn local(&self, ty: &Type) -> Type {
        Type::new(
            ty.dtype,
            ty.dims.iter().zip(&self.0).map(|(d, (_, r))| crate::dim::dim(&d.name, r.len())).collect::<Vec<_>>(),
        )
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, (n, r)) in self.0.iter().enumerate() {
            write!(f, "{}{n}:{}..{}", if i > 0 { ", " } else { "" }, r.start, r.end)?;
        }
        f.write_str("]")
    }
}
impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
