//! Windows: how convolutions and pooling walk along one spatial dimension.

use crate::dim::Name;
use crate::error::{Refusal, refuse};
use std::ops::Range;

/// A window that slides along one dimension: output index `o` reads the input indices `o * stride - lo + j * dilation`,
/// `j = 0 .. size`; what lies outside the input is padding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Window {
    /// The dimension.
    pub dim: Name,
    /// Taps.
    pub size: usize,
    /// Input steps from one output to the next.
    pub stride: usize,
    /// Input steps from one tap to the next.
    pub dilation: usize,
    /// Padding before the first element.
    pub lo: usize,
    /// Padding after the last one.
    pub hi: usize,
}

impl Window {
    /// A window with the padding given.
    pub fn padded(dim: impl Into<Name>, size: usize, stride: usize, lo: usize, hi: usize) -> Window {
        Window { dim: dim.into(), size, stride, dilation: 1, lo, hi }
    }
    /// A window without padding.
    pub fn valid(dim: impl Into<Name>, size: usize, stride: usize) -> Window {
        Window::padded(dim, size, stride, 0, 0)
    }
    /// A window padded such that a dimension of `n` elements gives `ceil(n / stride)` outputs; an odd rest of the
    /// padding goes behind.
    pub fn same(dim: impl Into<Name>, n: usize, size: usize, stride: usize, dilation: usize) -> Window {
        let outputs = n.div_ceil(stride.max(1));
        let covered = outputs.saturating_sub(1) * stride + size.saturating_sub(1) * dilation + 1;
        let total = covered.saturating_sub(n);
        Window { dim: dim.into(), size, stride, dilation, lo: total / 2, hi: total - total / 2 }
    }
    /// The window with its taps apart.
    pub fn dilated(self, dilation: usize) -> Window {
        Window { dilation, ..self }
    }
    /// From the first tap to the last one, both included.
    pub fn span(&self) -> usize {
        (self.size - 1) * self.dilation + 1
    }
    /// The name of the kernel's dimension: `k.x` for `x`.
    pub fn kernel(&self) -> Name {
        format!("k.{}", self.dim).into()
    }
    /// Outputs of an input of size `n`.
    pub fn outputs(&self, n: usize) -> usize {
        (n + self.lo + self.hi + self.stride).saturating_sub(self.span()) / self.stride
    }
    /// Constraint `C` of the ops that use windows: sizes, strides and dilations are at least 1, and a window that
    /// could lie wholly in the padding is refused.
    pub(crate) fn check(&self, constraint: &'static str) -> Result<(), Refusal> {
        if self.size == 0 || self.stride == 0 || self.dilation == 0 {
            return refuse(
                constraint,
                format!("has a window of size, stride or dilation 0 along `{}`", self.dim),
                "make them 1 or more",
            );
        }
        if self.lo >= self.span() || self.hi >= self.span() {
            let m = format!("pads `{}` by {} and {}, and its window spans {}", self.dim, self.lo, self.hi, self.span());
            return refuse(constraint, m, "pad by less than the window's span; use `pad` for more");
        }
        Ok(())
    }
    /// The input range that outputs read, cut to the input's `n` elements.
    pub fn reads(&self, outputs: &Range<usize>, n: usize) -> Range<usize> {
        if outputs.is_empty() {
            return 0..0;
        }
        let start = (outputs.start * self.stride).saturating_sub(self.lo).min(n);
        let end = ((outputs.end - 1) * self.stride + self.span()).saturating_sub(self.lo).min(n);
        start..end.max(start)
    }
    /// The outputs (of `m`) that read any of an input range.
    pub fn read_by(&self, inputs: &Range<usize>, m: usize) -> Range<usize> {
        if inputs.is_empty() {
            return 0..0;
        }
        let start = (inputs.start + self.lo + 1).saturating_sub(self.span()).div_ceil(self.stride).min(m);
        let end = ((inputs.end - 1 + self.lo) / self.stride + 1).min(m);
        start..end.max(start)
    }
    /// The input index that tap `j` of output `o` reads, if it lies inside the input's `n` elements.
    pub fn tap(&self, o: usize, j: usize, n: usize) -> Option<usize> {
        (o * self.stride + j * self.dilation).checked_sub(self.lo).filter(|i| *i < n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_cover_just_the_taps(n in 1usize..20, size in 1usize..8, stride in 1usize..4, dilation in 1usize..3, lo in 0usize..3, hi in 0usize..3, a in 0usize..20, b in 0usize..20) {
            let w = Window { dim: "x".into(), size, stride, dilation, lo, hi };
            prop_assume!(w.check("C").is_ok());
            let m = w.outputs(n);
            let outs = a.min(b).min(m)..a.max(b).min(m);
            let taps: Vec<usize> = outs.clone().flat_map(|o| (0..size).filter_map(|j| w.tap(o, j, n)).collect::<Vec<_>>()).collect();
            let r = w.reads(&outs, n);
            prop_assert!(taps.iter().all(|t| r.contains(t)));
            let ins = a.min(b).min(n)..a.max(b).min(n);
            let back = w.read_by(&ins, m);
            for o in 0..m {
                let touches = (0..size).any(|j| w.tap(o, j, n).is_some_and(|i| ins.contains(&i)));
                prop_assert!(!touches || back.contains(&o));
            }
        }

        #[test]
        fn same_padding_gives_the_size_divided_by_the_stride(n in 1usize..50, size in 1usize..8, stride in 1usize..4) {
            prop_assert_eq!(Window::same("x", n, size, stride, 1).outputs(n), n.div_ceil(stride));
        }
    }
}
