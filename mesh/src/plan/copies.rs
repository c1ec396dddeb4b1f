//! Ops that only move elements within a device, as copies of boxes.

use super::exchange::box_copy;
use super::step::{CopyWork, Part};
use crate::body::strides;
use crate::dim::{DType, Name};
use crate::ops::Prim;
use crate::ops::split::{boxes as split_boxes, steps};
use crate::region::Region;
use std::ops::Range;

/// The copies that an op amounts to on one device; None for an op that does more than copy.
pub(super) fn copies(prim: &Prim, inputs: &[Part], output: &Part) -> Option<CopyWork> {
    let element = output.ty.dtype.bytes();
    let mut boxes = Vec::new();
    let mut fill = None;
    match prim {
        Prim::Rename(_) => {
            let from = renamed(&inputs[0].region, output);
            boxes.push((0, box_copy(&output.region, &from, &output.region)));
        }
        Prim::SplitDim(s) => {
            let at = inputs[0].ty.position(&s.dim)?;
            let steps = steps(&s.sizes());
            let (held, own) = (&inputs[0].region, &output.region);
            if !own.is_empty() {
                let read = strides(&held.shape());
                let mut copy = box_copy(own, own, own);
                let joint: usize = own.0[at..].iter().zip(&steps).map(|((_, r), s)| r.start * s).sum();
                let first = |i: usize| if i < at { own.0[i].1.start } else { own.0[i + steps.len() - 1].1.start };
                let first = |i: usize| if i == at { joint } else { first(i) };
                copy.from = held.0.iter().enumerate().map(|(i, (_, h))| (first(i) - h.start) * read[i]).sum();
                copy.from_strides = read.clone();
                copy.from_strides.splice(at..at + 1, steps.iter().map(|s| s * read[at]));
                boxes.push((0, copy));
            }
        }
        Prim::MergeDims(m) => {
            let at = output.ty.position(&m.into)?;
            let sizes = m.sizes(&inputs[0].ty);
            let steps = steps(&sizes);
            let (held, own) = (&inputs[0].region, &output.region);
            let written = strides(&own.shape());
            let range = if own.is_empty() { 0..0 } else { own.0[at].1.clone() };
            for part in split_boxes(&range, &sizes) {
                let joint: usize = part.iter().zip(&steps).map(|(r, s)| r.start * s).sum();
                let mut piece = own.clone();
                piece.0.splice(at..at + 1, m.dims.iter().cloned().zip(part));
                let mut copy = box_copy(&piece, held, &piece);
                copy.to = (joint - range.start) * written[at];
                copy.to_strides = written.clone();
                copy.to_strides.splice(at..at + 1, steps.iter().map(|s| s * written[at]));
                boxes.push((0, copy));
            }
        }
        Prim::Slice(s) => {
            // The box is laid out in the input's indices; only its strides along the dimension differ.
            let at = output.ty.position(&s.dim)?;
            let own = output.region.0[at].1.clone();
            if !output.region.is_empty() {
                let first = s.start + own.start * s.stride;
                let mut copy = box_copy(&output.region, &output.region, &output.region);
                let held = &inputs[0].region;
                let moved = output.region.clone().with(&s.dim, first..first + 1);
                copy.from = box_copy(&moved, held, &moved).from;
                copy.from_strides = strides(&held.shape());
                copy.from_strides[at] *= s.stride;
                boxes.push((0, copy));
            }
        }
        Prim::Pad(p) => {
            fill = Some(bytes_of(p.value, output.ty.dtype));
            let n = inputs[0].ty.size_of(&p.dim)?;
            shifted(&mut boxes, 0, &inputs[0].region, &output.region, &p.dim, 0..n, p.lo as isize);
        }
        Prim::Shift(s) => {
            let n = output.ty.size_of(&s.dim)? as isize;
            fill = Some(bytes_of(0.0, output.ty.dtype));
            let by = if s.wrap && n > 0 { s.by.rem_euclid(n) } else { s.by };
            shifted(&mut boxes, 0, &inputs[0].region, &output.region, &s.dim, 0..n as usize, by);
            if s.wrap {
                shifted(&mut boxes, 0, &inputs[0].region, &output.region, &s.dim, 0..n as usize, by - n);
            }
        }
        Prim::Concat(c) => {
            let mut start = 0;
            for (i, part) in inputs.iter().enumerate() {
                let n = part.ty.size_of(&c.dim)?;
                shifted(&mut boxes, i, &part.region, &output.region, &c.dim, 0..n, start as isize);
                start += n;
            }
        }
        _ => return None,
    }
    Some(CopyWork { element, fill, boxes })
}

/// What is held of the input of a rename, under the result's names.
fn renamed(held: &Region, output: &Part) -> Region {
    Region(output.region.0.iter().zip(&held.0).map(|((n, _), (_, r))| (n.clone(), r.clone())).collect())
}

/// Adds the copy of the input's elements `range` along `dim` to `by` places further on, as far as the output holds them.
fn shifted(
    boxes: &mut Vec<(usize, super::step::BoxCopy)>,
    input: usize,
    held: &Region,
    output: &Region,
    dim: &Name,
    range: Range<usize>,
    by: isize,
) {
    let Some(own) = output.get(dim) else { return };
    let start = (range.start as isize + by).max(own.start as isize).max(0);
    let end = (range.end as isize + by).min(own.end as isize).max(start);
    let to = output.clone().with(dim, start as usize..end as usize);
    if to.is_empty() {
        return;
    }
    let from = output.clone().with(dim, (start - by) as usize..(end - by) as usize);
    let mut copy = box_copy(&to, &to, output);
    let read = box_copy(&from, held, &from);
    (copy.from, copy.from_strides) = (read.from, read.from_strides);
    boxes.push((input, copy));
}

/// An element's bytes.
fn bytes_of(value: f64, dtype: DType) -> [u8; 4] {
    match dtype {
        DType::F32 => (value as f32).to_le_bytes(),
        DType::I32 => (value as i32).to_le_bytes(),
        DType::Bf16 => {
            let bits = (value as f32).to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            rounded.to_le_bytes()
        }
        DType::F16 => {
            let [low, high] = half::f16::from_f32(value as f32).to_le_bytes();
            [low, high, 0, 0]
        }
        DType::Bool => [u8::from(value != 0.0), 0, 0, 0],
    }
}
