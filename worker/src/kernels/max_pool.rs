//! Max pooling and its gradient, over channel-last arrays.
//!
//! Roofline: the bytes of the input (and of the gradient), read once. Sixteen elements of the dimensions behind the
//! last window go at a time.

use super::half::{Bf16, Element, F16};
use super::isa::Isa;
use crate::dispatch;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::ops::window::Window;
use mesh::plan::{OpWork, Part};
use std::ops::Range;

/// One dimension in front of the lanes.
struct Axis {
    /// Outputs that are computed (for the gradient: whose windows hold own elements).
    count: usize,
    /// Local index of the first one in the pooled array (`dy` for the gradient), which may hold more.
    y_first: usize,
    /// Elements between them in the pooled array.
    y_stride: usize,
    /// By output: offsets of its taps in x and, for the gradient, their local index in dx ([`ELSEWHERE`] if another device's).
    taps: Vec<Vec<(usize, usize)>>,
    /// Elements between indices of dx.
    dx_stride: usize,
}

/// Max pooling or its gradient, prepared.
pub struct MaxPoolPlan {
    isa: Isa,
    dtype: DType,
    axes: Vec<Axis>,
    /// Elements behind the last window.
    lanes: usize,
    gradient: bool,
    /// Elements of dx along the first axis that is shared out, and all elements of dx for each of them.
    dx_elements: usize,
    taps: usize,
}

const LANES: usize = 16;
/// Marks a tap whose gradient is another device's to compute.
const ELSEWHERE: usize = usize::MAX;
/// Dimensions in front of the lanes, at most.
const AXES: usize = 12;

impl MaxPoolPlan {
    /// Prepares a `max_pool` or `max_pool_grad` for the best instruction set; None for another op.
    pub fn new(work: &OpWork) -> Option<MaxPoolPlan> {
        MaxPoolPlan::with_isa(work, Isa::detect())
    }

    /// Prepares it for one instruction set.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<MaxPoolPlan> {
        let (windows, gradient) = match &work.op {
            Prim::MaxPool(p) => (&p.windows, false),
            Prim::MaxPoolGrad(p) => (&p.windows, true),
            _ => return None,
        };
        let x = &work.inputs[0];
        let y = if gradient { &work.inputs[1] } else { &work.output };
        let strides = |p: &Part| super::conv::strides(p);
        let (xs, ys, ds) = (strides(x), strides(y), strides(&work.output));
        // Lanes run along what all arrays hold alike; an array may hold more than is read of it.
        let unlike = |p: usize| {
            let held = &work.output.region.0[p].1;
            x.region.0[p].1 != *held || y.region.0[p].1 != *held || windows.iter().any(|w| w.dim == x.ty.dims[p].name)
        };
        let last = (0..x.ty.dims.len()).rev().find(|p| unlike(*p)).unwrap_or(0);
        let axes: Vec<Axis> = (0..=last)
            .map(|p| {
                let dim = &x.ty.dims[p];
                let (held, own) = (&x.region.0[p].1, &work.output.region.0[p].1);
                let window = windows.iter().find(|w| w.dim == dim.name);
                let out = match window {
                    Some(w) if gradient => w.read_by(own, y.ty.dims[p].size),
                    _ => own.clone(),
                };
                let tap = |i: usize| {
                    let at = (i - held.start) * xs[p];
                    (at, if own.contains(&i) { i - own.start } else { ELSEWHERE })
                };
                let taps = out.clone().map(|o| match window {
                    Some(w) => (0..w.size).filter_map(|j| w.tap(o, j, dim.size)).map(tap).collect(),
                    None => vec![tap(o)],
                });
                let y_first = out.start.saturating_sub(y.region.0[p].1.start);
                Axis { count: out.len(), y_first, y_stride: ys[p], taps: taps.collect(), dx_stride: ds[p] }
            })
            .collect();
        assert!(axes.len() <= AXES, "max_pool behind {} dimensions", axes.len());
        let lanes = work.output.region.shape()[last + 1..].iter().product();
        let taps: usize = windows.iter().map(|w: &Window| w.size).product();
        assert!(taps * 16 <= WORKSPACE_BYTES, "a window of {taps} elements");
        let dtype = x.ty.dtype;
        Some(MaxPoolPlan { isa, dtype, axes, lanes, gradient, dx_elements: work.output.region.elements(), taps })
    }

    /// Runs it: inputs are x, and for the gradient dy.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and do not overlap.
    pub unsafe fn run(&self, pool: &Pool, inputs: &[*const u8], output: *mut u8) {
        let p = Pointers {
            x: inputs[0],
            y: if self.gradient { inputs[1].cast_mut() } else { output },
            dx: if self.gradient { output } else { std::ptr::null_mut() },
        };
        if self.gradient {
            // SAFETY: the result's elements.
            unsafe { std::ptr::write_bytes(p.dx, 0, self.dx_elements * self.dtype.bytes()) };
        }
        // Windows along the axis that is shared out must not overlap in dx: an axis without a window, or one whose
        // neighbouring windows read different elements.
        let shared = self.axes.iter().position(|a| {
            a.count > 1
                && (!self.gradient
                    || a.taps.windows(2).all(|t| t[0].iter().all(|(o, _)| t[1].iter().all(|(p, _)| o != p))))
        });
        let tasks = shared.map_or(1, |a| self.axes[a].count.min(pool.threads() * 8));
        pool.run(tasks, &|t, workspace| {
            let p = p;
            let mut ranges: [Range<usize>; AXES] = std::array::from_fn(|a| 0..self.axes.get(a).map_or(1, |x| x.count));
            if let Some(a) = shared {
                ranges[a] = self.axes[a].count * t / tasks..self.axes[a].count * (t + 1) / tasks;
            }
            let ranges = &ranges[..self.axes.len()];
            if ranges.iter().all(|r| !r.is_empty()) {
                let (plan, windows) = (self, workspace.floats());
                dispatch!(self.isa, fn(plan: &MaxPoolPlan, ranges: &[Range<usize>], windows: &mut [f32], p: Pointers) {
                    // SAFETY: by the contract of `run`; tasks write disjoint elements.
                    unsafe {
                        match plan.dtype {
                            DType::Bf16 => plan.boxed::<Bf16>(ranges, windows, p),
                            DType::F16 => plan.boxed::<F16>(ranges, windows, p),
                            _ => plan.boxed::<f32>(ranges, windows, p),
                        }
                    }
                });
            }
        });
    }

    /// The outputs of a box, row-major.
    #[inline(always)]
    unsafe fn boxed<E: Element>(&self, ranges: &[Range<usize>], list: &mut [f32], p: Pointers) {
        // SAFETY: the workspace is 64-byte aligned, larger (checked by `new`), and any bits are an integer.
        let windows =
            unsafe { std::slice::from_raw_parts_mut(list.as_mut_ptr().cast::<[usize; 2]>(), self.taps.max(1)) };
        let d = ranges.len();
        let mut at = [0usize; AXES];
        for (a, r) in ranges.iter().enumerate() {
            at[a] = r.start;
        }
        loop {
            windows[0] = [0, 0];
            let mut found = 1;
            for (axis, o) in self.axes.iter().zip(&at) {
                let taps = &axis.taps[*o];
                // Row-major: later axes vary faster. Grown in place from the back.
                for k in (0..found).rev() {
                    let [x, dx] = windows[k];
                    for (j, (offset, index)) in taps.iter().enumerate().rev() {
                        let place = if *index == ELSEWHERE || dx == ELSEWHERE {
                            ELSEWHERE
                        } else {
                            dx + index * axis.dx_stride
                        };
                        windows[k * taps.len() + j] = [x + offset, place];
                    }
                }
                found *= taps.len();
            }
            let y = self.axes.iter().zip(&at).map(|(a, o)| (a.y_first + o) * a.y_stride).sum::<usize>();
            // SAFETY: offsets inside the parts, by the plan.
            unsafe { self.window::<E>(&windows[..found], y, p) };
            let mut l = d;
            loop {
                if l == 0 {
                    return;
                }
                l -= 1;
                at[l] += 1;
                if at[l] < ranges[l].end {
                    break;
                }
                at[l] = ranges[l].start;
            }
        }
    }

    #[inline(always)]
    unsafe fn window<E: Element>(&self, taps: &[[usize; 2]], y: usize, p: Pointers) {
        let mut c = 0;
        while c < self.lanes {
            let n = (self.lanes - c).min(LANES);
            // SAFETY: by the contract of `run`.
            unsafe {
                let mut best = [f32::NEG_INFINITY; LANES];
                let mut chosen = [u32::MAX; LANES];
                for (t, [offset, _]) in taps.iter().enumerate() {
                    let x = p.x.cast::<E>().add(offset + c);
                    for l in 0..n {
                        let v = (*x.add(l)).wide();
                        let larger = v > best[l] || chosen[l] == u32::MAX || (v.is_nan() && !best[l].is_nan());
                        best[l] = if larger { v } else { best[l] };
                        chosen[l] = if larger { t as u32 } else { chosen[l] };
                    }
                }
                let out = p.y.cast::<E>().add(y + c);
                if !self.gradient {
                    (0..n).for_each(|l| *out.add(l) = E::of(best[l]));
                } else {
                    for (t, [_, place]) in taps.iter().enumerate() {
                        if *place == ELSEWHERE {
                            continue;
                        }
                        let dx = p.dx.cast::<E>().add(place + c);
                        for l in 0..n {
                            // Windows of 16-bit floats do not overlap: an element is added to nothing but zeros.
                            let own = if chosen[l] == t as u32 { *out.add(l) } else { E::of(0.0) };
                            *dx.add(l) = (*dx.add(l)).plus(own);
                        }
                    }
                }
            }
            c += n;
        }
    }
}

/// Elements are of either dtype.
#[derive(Clone, Copy)]
struct Pointers {
    x: *const u8,
    /// The pooled array: written by the forward pass, read by the gradient.
    y: *mut u8,
    dx: *mut u8,
}
// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}
