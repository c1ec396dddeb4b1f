//! `split_dim` and `merge_dims`: one dimension as several, and several as one; row-major, as they lie in memory, so that
//! where a device's bytes stay the same nothing is copied.
//!
//! C1. The dimensions named are dimensions of the input; `merge_dims` names at least one, each once.
//! C2. `split_dim`: there is at least one new dimension, and the product of their sizes is the size of the old one.
//! C3. `merge_dims`: the dimensions lie next to each other in the order named (the builder reorders).
//! C4. No two dimensions of the result have the same name.

use crate::dim::{Dim, Name, Type, dim};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::pipeline::MICRO;
use crate::region::Region;
use std::ops::Range;

/// A dimension as several, the first one outermost, in its place.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SplitDim {
    /// The dimension.
    pub dim: Name,
    /// What it becomes.
    pub into: Vec<Dim>,
}

/// Neighbouring dimensions as one, the first one outermost, in their place.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MergeDims {
    /// The dimensions.
    pub dims: Vec<Name>,
    /// What they become.
    pub into: Name,
}

fn position(x: &Type, name: &Name) -> Result<usize, Refusal> {
    x.position(name).map_or_else(
        || {
            let help = nearest(name, x.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
            refuse("C1", format!("cannot find `{name}` in {x}"), help.unwrap_or_default())
        },
        Ok,
    )
}

/// The type with `count` dimensions from `at` on replaced.
fn replaced(x: &Type, at: usize, count: usize, new: &[Dim]) -> Result<Type, Refusal> {
    let mut out = x.clone();
    out.dims.splice(at..at + count, new.iter().cloned());
    match out.duplicate() {
        None => Ok(out),
        Some(n) => refuse("C4", format!("would give {out}, with `{n}` twice"), "choose another name"),
    }
}

/// For row-major dimensions of those sizes: by how much the joint index grows with each one's.
pub(crate) fn steps(sizes: &[usize]) -> Vec<usize> {
    (0..sizes.len()).map(|i| sizes[i + 1..].iter().product()).collect()
}

/// The smallest range of joint indices that holds a box.
fn joint(ranges: &[Range<usize>], sizes: &[usize]) -> Range<usize> {
    if ranges.iter().any(|r| r.is_empty()) {
        return 0..0;
    }
    let at = |end: bool| -> usize {
        ranges.iter().zip(steps(sizes)).map(|(r, s)| if end { r.end - 1 } else { r.start } * s).sum()
    };
    at(false)..at(true) + 1
}

/// The fewest boxes that make up a range of joint indices, in order.
pub(crate) fn boxes(range: &Range<usize>, sizes: &[usize]) -> Vec<Vec<Range<usize>>> {
    let [first, rest @ ..] = sizes else { return vec![vec![]] };
    let inner: usize = rest.iter().product();
    if range.is_empty() || inner == 0 {
        return vec![];
    }
    // A part of one row: boxes of the inner dimensions.
    let row = |range: Range<usize>| {
        let i = range.start / inner;
        let inside = boxes(&(range.start - i * inner..range.end - i * inner), rest);
        inside.into_iter().map(move |b| std::iter::once(i..i + 1).chain(b).collect::<Vec<_>>())
    };
    let whole = range.start.div_ceil(inner)..(range.end / inner).min(*first);
    if whole.start > whole.end {
        return row(range.clone()).collect();
    }
    let (head, tail) = (range.start..whole.start * inner, whole.end * inner..range.end);
    let mut out = Vec::new();
    if !head.is_empty() {
        out.extend(row(head));
    }
    if !whole.is_empty() {
        out.push(std::iter::once(whole).chain(rest.iter().map(|n| 0..*n)).collect());
    }
    if !tail.is_empty() {
        out.extend(row(tail));
    }
    out
}

/// The smallest box that holds a range of joint indices.
fn bounding(range: &Range<usize>, sizes: &[usize]) -> Vec<Range<usize>> {
    let parts = boxes(range, sizes);
    (0..sizes.len())
        .map(|d| {
            let start = parts.iter().map(|b| b[d].start).min().unwrap_or(0);
            start..parts.iter().map(|b| b[d].end).max().unwrap_or(0)
        })
        .collect()
}

/// Whether the box `parts` of row-major dimensions of those sizes is just the range `whole` of their joint index.
fn same(whole: &Range<usize>, parts: &[Range<usize>], sizes: &[usize]) -> bool {
    let elements: usize = parts.iter().map(|r| r.len()).product();
    elements == whole.len() && (elements == 0 || joint(parts, sizes) == *whole)
}

fn ranges(r: &[(Name, Range<usize>)]) -> Vec<Range<usize>> {
    r.iter().map(|(_, r)| r.clone()).collect()
}

/// Whether what is held of the one joint dimension (at place `at` of `one`) is the same bytes as what is held of the
/// dimensions of those sizes (from place `at` of `many` on).
fn same_bytes(one: &Region, many: &Region, at: usize, sizes: &[usize]) -> bool {
    let (a, b) = (ranges(&one.0), ranges(&many.0));
    let after = at + sizes.len();
    one.elements() == 0 && many.elements() == 0
        || a[..at] == b[..at] && a[at + 1..] == b[after..] && same(&a[at], &b[at..after], sizes)
}

impl SplitDim {
    /// The sizes of the new dimensions.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.into.iter().map(|d| d.size).collect()
    }
    /// Whether these parts of input and result are the same bytes.
    pub(crate) fn same_bytes(&self, input: &Region, output: &Region) -> bool {
        let at = input.0.iter().position(|(n, _)| *n == self.dim);
        at.is_some_and(|at| same_bytes(input, output, at, &self.sizes()))
    }
}

impl MergeDims {
    /// The sizes of the old dimensions.
    pub(crate) fn sizes(&self, input: &Type) -> Vec<usize> {
        self.dims.iter().map(|n| input.size_of(n).unwrap_or(1)).collect()
    }
    /// Whether these parts of input and result are the same bytes.
    pub(crate) fn same_bytes(&self, ty: &Type, input: &Region, output: &Region) -> bool {
        let at = output.0.iter().position(|(n, _)| *n == self.into);
        at.is_some_and(|at| same_bytes(output, input, at, &self.sizes(ty)))
    }
}

impl Op for SplitDim {
    fn name(&self) -> &'static str {
        "split_dim"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let at = position(x[0], &self.dim)?;
        let n = x[0].dims[at].size;
        let product = self.into.iter().try_fold(1usize, |n, d| n.checked_mul(d.size));
        if self.into.is_empty() || product != Some(n) {
            let into: Vec<String> = self.into.iter().map(Dim::to_string).collect();
            let m = format!("cannot split `{}`, size {n}, into {}", self.dim, into.join(", "));
            return refuse("C2", m, "make the product of the new sizes the old one; `pad` or `slice` first");
        }
        replaced(x[0], at, 1, &self.into)
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let names: Vec<&str> = self.into.iter().map(|d| &*d.name).collect();
        vec![Some(cx.dy.merge_dims(&names, &self.dim))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let parts: Vec<Range<usize>> =
            self.into.iter().map(|d| at.get(&d.name).cloned().unwrap_or(0..d.size)).collect();
        at.of(inputs[0]).with(&self.dim, joint(&parts, &self.sizes()))
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], out: &Type) -> Reference {
        reshaped(x[0], out)
    }
}

impl Op for MergeDims {
    fn name(&self) -> &'static str {
        "merge_dims"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let Some(first) = self.dims.first() else {
            return refuse("C1", "names no dimension", "name the dimensions to merge");
        };
        let at = position(x[0], first)?;
        for (i, n) in self.dims.iter().enumerate() {
            let p = position(x[0], n)?;
            if self.dims[..i].contains(n) {
                return refuse("C1", format!("names `{n}` twice"), "name it once");
            }
            if p != at + i {
                let m = format!("cannot merge dimensions that do not lie side by side in {}", x[0]);
                return refuse("C3", m, "`merge_dims` on the tensor reorders them first");
            }
        }
        replaced(x[0], at, self.dims.len(), &[dim(&self.into, self.sizes(x[0]).iter().product())])
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let x = cx.inputs[0].ty();
        let into: Vec<Dim> = x.dims.into_iter().filter(|d| self.dims.contains(&d.name)).collect();
        vec![Some(cx.dy.split_dim(&self.into, &into))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let sizes = self.sizes(inputs[0]);
        let own = at.get(&self.into).cloned().unwrap_or(0..sizes.iter().product());
        // The merged dimension may have the name of one that it is made of.
        let parts = self.dims.iter().zip(bounding(&own, &sizes));
        parts.fold(at.of(inputs[0]), |r, (n, range)| r.with(n, range))
    }
    fn whole(&self, _: &[&Type], _: &Type) -> Vec<(Name, &'static str)> {
        let inner = self.dims.iter().skip(1).filter(|n| **n != self.into);
        inner.map(|n| (n.clone(), "parts of an inner dimension are strips of the merged one")).collect()
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], out: &Type) -> Reference {
        reshaped(x[0], out)
    }
}

fn reshaped(x: &Reference, out: &Type) -> Reference {
    let mut elements = x.iter();
    Reference::from_shape_simple_fn(out.shape(), || elements.next().copied().unwrap_or(f64::NAN))
}

impl Tensor {
    /// A dimension as several, the first one outermost: `x.split_dim("d_model", &[dim("heads", 4), dim("d_head", 16)])`.
    ///
    /// Element `i` of the old dimension is element `(i / 16, i % 16)` of the new ones.
    #[track_caller]
    pub fn split_dim(&self, name: &str, into: &[Dim]) -> Tensor {
        match into {
            [only] if self.ty().size_of(name) == Some(only.size) => self.rename(name, &only.name),
            _ => self.apply(SplitDim { dim: name.into(), into: into.to_vec() }),
        }
    }
    /// The `part`-th of `parts` micro-batches along `dim`: every `parts`-th element, so that each device has its share of
    /// every micro-batch where the dimension is split.
    #[track_caller]
    pub fn micro_batch(&self, dim: &str, part: usize, parts: usize) -> Tensor {
        if parts <= 1 {
            return self.clone();
        }
        let whole = self.dim(dim);
        let into = [crate::dim::dim(dim, whole.size / parts), crate::dim::dim(MICRO, parts)];
        self.split_dim(dim, &into).slice(MICRO, part, part + 1).merge_dims(&[dim, MICRO], dim)
    }
    /// Dimensions as one, the first one named outermost: `x.merge_dims(&["heads", "d_head"], "d_model")`; the inverse of
    /// [`Tensor::split_dim`]. It lies where the first one lay; dimensions that do not lie side by side are reordered.
    #[track_caller]
    pub fn merge_dims(&self, names: &[&str], into: &str) -> Tensor {
        if let [only] = names {
            return self.rename(only, into);
        }
        let ty = self.ty();
        let sound = names.iter().enumerate().all(|(i, n)| ty.has(n) && !names[..i].contains(n));
        let beside = |at: usize| names.iter().enumerate().all(|(i, n)| ty.position(n) == Some(at + i));
        let first = names.first().and_then(|n| ty.position(n)).unwrap_or(0);
        let merge = MergeDims { dims: names.iter().map(|&n| n.into()).collect(), into: into.into() };
        if !sound || beside(first) {
            return self.apply(merge);
        }
        let merged = |d: &&Dim| names.contains(&&*d.name);
        let before = ty.dims[..first].iter().filter(|d| !merged(d)).map(|d| &*d.name);
        let after = ty.dims[first..].iter().filter(|d| !merged(d)).map(|d| &*d.name);
        let order: Vec<&str> = before.chain(names.iter().copied()).chain(after).collect();
        self.reorder(&order).apply(merge)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn boxes_make_up_the_range_in_order(sizes in prop::collection::vec(1usize..5, 1..4), a in 0usize..64, b in 0usize..64) {
            let n: usize = sizes.iter().product();
            let range = a.min(b).min(n)..a.max(b).min(n);
            let parts = boxes(&range, &sizes);
            let mut found = Vec::new();
            for part in &parts {
                let mut points = vec![0];
                for (r, s) in part.iter().zip(steps(&sizes)) {
                    points = points.iter().flat_map(|p| r.clone().map(move |i| p + i * s)).collect();
                }
                found.extend(points);
            }
            prop_assert_eq!(found, range.clone().collect::<Vec<_>>());
            prop_assert!(parts.len() < 2 * sizes.len());
            if let [only] = &parts[..] {
                prop_assert!(same(&range, only, &sizes));
            }
            prop_assert!(joint(&bounding(&range, &sizes), &sizes).len() >= range.len());
        }
    }
}
