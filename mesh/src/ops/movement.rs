//! Ops that move elements without changing them: `rename`, `slice`, `pad`, `concat`, `shift`.
//!
//! C1. The dimension named is a dimension of the input.
//! C2. `slice`: `start <= stop <= size`, stride at least 1.
//! C3. `concat`: at least one input; all have the same dtype and, but for the size of the dimension, the same
//!     dimensions in the same order (the builder reorders).
//! C4. `rename`: the input has no dimension of the new name.

use crate::dim::{Dim, Name, Type, dim};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::region::Region;
use ndarray::{Axis, Slice as NdSlice};
use std::ops::Range;

/// The same values with a dimension under another name.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rename {
    /// The old name.
    pub from: Name,
    /// The new name.
    pub to: Name,
}

/// Every `stride`-th element from `start` to before `stop` along a dimension.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Slice {
    /// The dimension.
    pub dim: Name,
    /// First element.
    pub start: usize,
    /// End.
    pub stop: usize,
    /// Step.
    pub stride: usize,
}

/// More elements of one value before and after a dimension.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Pad {
    /// The dimension.
    pub dim: Name,
    /// Elements before.
    pub lo: usize,
    /// Elements after.
    pub hi: usize,
    /// Their value.
    #[serde(with = "crate::dim::bits")]
    pub value: f64,
}

/// Inputs one after another along a dimension.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Concat {
    /// The dimension.
    pub dim: Name,
}

/// Element `i` moves to `i + by` along a dimension; what is left free is 0, or what was pushed out (`wrap`).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Shift {
    /// The dimension.
    pub dim: Name,
    /// Places, forwards or backwards.
    pub by: isize,
    /// Whether what is pushed out comes in on the other side.
    pub wrap: bool,
}

/// Place and size of a dimension, or the refusal C1.
fn find(x: &Type, name: &Name) -> Result<(usize, usize), Refusal> {
    match x.position(name) {
        Some(p) => Ok((p, x.dims[p].size)),
        None => {
            let help = nearest(name, x.dims.iter().map(|d| &*d.name)).map(|n| format!("did you mean `{n}`?"));
            refuse("C1", format!("cannot find `{name}` in {x}"), help.unwrap_or_default())
        }
    }
}

fn resized(x: &Type, at: usize, size: usize) -> Type {
    let mut out = x.clone();
    out.dims[at].size = size;
    out
}

/// A range of indices moved by `by` and cut to `0 .. n`.
fn moved(range: &Range<usize>, by: isize, n: usize) -> Range<usize> {
    let cut = |i: usize| (i as isize + by).clamp(0, n as isize) as usize;
    cut(range.start)..cut(range.end).max(cut(range.start))
}

impl Op for Rename {
    fn name(&self) -> &'static str {
        "rename"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (at, _) = find(x[0], &self.from)?;
        if x[0].has(&self.to) {
            return refuse(
                "C4",
                format!("cannot call `{}` `{}` in {}", self.from, self.to, x[0]),
                "choose another name",
            );
        }
        let mut out = x[0].clone();
        out.dims[at].name = self.to.clone();
        Ok(out)
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        vec![Some(cx.dy.rename(&self.to, &self.from))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let r = at.of(inputs[0]);
        match at.get(&self.to) {
            Some(range) => r.with(&self.from, range.clone()),
            None => r,
        }
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], _: &[&Type], _: &Type) -> Reference {
        x[0].clone()
    }
}

impl Op for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (at, n) = find(x[0], &self.dim)?;
        if self.start > self.stop || self.stop > n || self.stride == 0 {
            let m = format!("cannot take {}..{} by {} of `{}`, size {n}", self.start, self.stop, self.stride, self.dim);
            return refuse("C2", m, "keep start <= stop <= size and the stride at least 1");
        }
        Ok(resized(x[0], at, (self.stop - self.start).div_ceil(self.stride)))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let x = &cx.inputs[0];
        let (n, m) = (x.dim(&self.dim).size, cx.dy.dim(&self.dim).size);
        if self.stride == 1 {
            return vec![Some(cx.dy.pad(&self.dim, self.start, n - self.start - m, 0.0))];
        }
        // Element i of the slice is element start + i * stride: a product with the matrix that says so.
        let (g, name) = (cx.dy.graph(), Name::from(format!("{}.slice", self.dim)));
        let at = g.iota(&dim(&name, m)).mul(&g.scalar_i32(self.stride as i32)).add(&g.scalar_i32(self.start as i32));
        let hit = at.one_hot(&dim(&self.dim, n));
        vec![Some(cx.dy.rename(&self.dim, &name).contract(&hit, &[&name]).sum_to(&x.ty()))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let r = at.of(inputs[0]);
        match at.get(&self.dim) {
            Some(o) if o.is_empty() => r.with(&self.dim, 0..0),
            Some(o) => {
                r.with(&self.dim, self.start + o.start * self.stride..self.start + (o.end - 1) * self.stride + 1)
            }
            None => r,
        }
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], _: &Type) -> Reference {
        let at = t[0].position(&self.dim).unwrap_or(0);
        let range = NdSlice::new(self.start as isize, Some(self.stop as isize), self.stride as isize);
        x[0].slice_axis(Axis(at), range).to_owned()
    }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (at, n) = find(x[0], &self.dim)?;
        Ok(resized(x[0], at, self.lo + n + self.hi))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let n = cx.inputs[0].dim(&self.dim).size;
        vec![Some(cx.dy.slice(&self.dim, self.lo, self.lo + n))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let n = inputs[0].size_of(&self.dim).unwrap_or(0);
        let own = at.get(&self.dim).map(|r| moved(r, -(self.lo as isize), n)).unwrap_or(0..n);
        at.of(inputs[0]).with(&self.dim, own)
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let at = t[0].position(&self.dim).unwrap_or(0);
        let mut y = Reference::from_elem(out.shape(), self.value);
        let end = self.lo + t[0].dims[at].size;
        y.slice_axis_mut(Axis(at), NdSlice::from(self.lo..end)).assign(x[0]);
        y
    }
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs > 0
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let Some(first) = x.first() else { return refuse("C3", "has no inputs", "give it at least one") };
        let (at, _) = find(first, &self.dim)?;
        let mut total = 0;
        for t in x {
            let (_, n) = find(t, &self.dim)?;
            if t.dtype != first.dtype
                || t.dims.len() != first.dims.len()
                || resized(t, at.min(t.dims.len() - 1), 0) != resized(first, at, 0)
            {
                return refuse(
                    "C3",
                    format!("cannot join {first} and {t} along `{}`", self.dim),
                    "make the other dimensions and the dtype equal",
                );
            }
            total += n;
        }
        Ok(resized(first, at, total))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let mut start = 0;
        cx.inputs
            .iter()
            .map(|x| {
                let n = x.dim(&self.dim).size;
                start += n;
                Some(cx.dy.slice(&self.dim, start - n, start))
            })
            .collect()
    }
    fn needs(&self, i: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let sizes: Vec<usize> = inputs.iter().map(|t| t.size_of(&self.dim).unwrap_or(0)).collect();
        let start: usize = sizes[..i].iter().sum();
        let own = at.get(&self.dim).map(|r| moved(r, -(start as isize), sizes[i])).unwrap_or(0..sizes[i]);
        at.of(inputs[i]).with(&self.dim, own)
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let at = t[0].position(&self.dim).unwrap_or(0);
        let mut y = Reference::zeros(out.shape());
        let mut start = 0;
        for x in x {
            let n = x.shape()[at];
            y.slice_axis_mut(Axis(at), NdSlice::from(start..start + n)).assign(x);
            start += n;
        }
        y
    }
}

impl Op for Shift {
    fn name(&self) -> &'static str {
        "shift"
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        find(x[0], &self.dim)?;
        Ok(x[0].clone())
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        vec![Some(cx.dy.shift(&self.dim, -self.by, self.wrap))]
    }
    fn needs(&self, _: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        let n = inputs[0].size_of(&self.dim).unwrap_or(0);
        let r = at.of(inputs[0]);
        let Some(own) = at.get(&self.dim).cloned() else { return r };
        if !self.wrap {
            return r.with(&self.dim, moved(&own, -self.by, n));
        }
        // A range that wraps around is covered by everything.
        let by = if n == 0 { 0 } else { (-self.by).rem_euclid(n as isize) as usize };
        let (a, b) = (own.start + by, own.end + by);
        let range = if own.is_empty() {
            0..0
        } else if b <= n {
            a..b
        } else if a >= n {
            a - n..b - n
        } else {
            0..n
        };
        r.with(&self.dim, range)
    }
    fn flops(&self, _: &[&Type], _: &Type) -> u64 {
        0
    }
    fn copies(&self) -> bool {
        true
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let at = t[0].position(&self.dim).unwrap_or(0);
        let n = out.dims[at].size as isize;
        Reference::from_shape_fn(out.shape(), |i| {
            let mut i: Vec<usize> = (0..out.dims.len()).map(|d| i[d]).collect();
            let from = i[at] as isize - self.by;
            if !self.wrap && !(0..n).contains(&from) {
                return 0.0;
            }
            i[at] = from.rem_euclid(n) as usize;
            x[0][i.as_slice()]
        })
    }
}

impl Tensor {
    /// The same values with a dimension under another name. Where the layout treats the names differently the data
    /// moves, never wrongly.
    #[track_caller]
    pub fn rename(&self, from: &str, to: &str) -> Tensor {
        if from == to { self.clone() } else { self.apply(Rename { from: from.into(), to: to.into() }) }
    }
    /// Elements `start .. stop` along a dimension.
    #[track_caller]
    pub fn slice(&self, dim: &str, start: usize, stop: usize) -> Tensor {
        self.slice_by(dim, start, stop, 1)
    }
    /// Every `stride`-th element from `start` to before `stop` along a dimension.
    #[track_caller]
    pub fn slice_by(&self, dim: &str, start: usize, stop: usize, stride: usize) -> Tensor {
        self.apply(Slice { dim: dim.into(), start, stop, stride })
    }
    /// `lo` elements of `value` before and `hi` after a dimension.
    #[track_caller]
    pub fn pad(&self, dim: &str, lo: usize, hi: usize, value: f64) -> Tensor {
        if lo + hi == 0 { self.clone() } else { self.apply(Pad { dim: dim.into(), lo, hi, value }) }
    }
    /// Element `i` moves to `i + by` along a dimension; what is left free is 0, or comes from the other side (`wrap`).
    #[track_caller]
    pub fn shift(&self, dim: &str, by: isize, wrap: bool) -> Tensor {
        self.apply(Shift { dim: dim.into(), by, wrap })
    }
    /// The values one after another along a dimension, in the first one's order of dimensions.
    #[track_caller]
    pub fn concat(parts: &[&Tensor], dim: &str) -> Tensor {
        let Some(first) = parts.first() else { panic!("concat needs at least one tensor") };
        let names: Vec<Dim> = first.ty().dims;
        let names: Vec<&str> = names.iter().map(|d| &*d.name).collect();
        let ordered: Vec<Tensor> = parts.iter().map(|p| p.reorder(&names)).collect();
        first.graph().apply(Concat { dim: dim.into() }, &ordered.iter().collect::<Vec<_>>())
    }
}
