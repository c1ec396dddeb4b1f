//! `top_k`: indices of the largest elements along a dimension.
//!
//! Roofline: the bytes of the input, read once; a heap of the k largest so far lies in the cache, and most elements are
//! smaller than its least.

use super::conv::strides;
use super::nest::Nest;
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::ops::top_k::MOST;
use mesh::plan::OpWork;

/// A `top_k`, prepared.
pub struct TopKPlan {
    /// Points outside the dimension: offsets in x and y.
    outer: Nest<2>,
    /// Elements along the dimension, and from one to the next.
    n: usize,
    pitch: usize,
    k: usize,
    k_pitch: usize,
    float: bool,
}

#[derive(Clone, Copy)]
struct Pointers(*const u32, *mut i32);
// SAFETY: tasks write disjoint parts and only read the input.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// An element and its index as a number: larger for a larger element, and of equal ones for the lower index.
fn key(bits: u32, index: usize, float: bool) -> u64 {
    let order = match f32::from_bits(bits) {
        _ if !float => bits ^ 1 << 31,
        v if v.is_nan() => u32::MAX,
        0.0 => 1 << 31,
        v if v > 0.0 => bits | 1 << 31,
        _ => !bits,
    };
    u64::from(order) << 32 | u64::from(!(index as u32))
}

/// Lets the number at the top of a heap whose least number is on top sink to its place.
fn sink(heap: &mut [u64], mut at: usize) {
    loop {
        let mut least = at;
        for child in [2 * at + 1, 2 * at + 2] {
            if child < heap.len() && heap[child] < heap[least] {
                least = child;
            }
        }
        if least == at {
            return;
        }
        heap.swap(at, least);
        at = least;
    }
}

impl TopKPlan {
    /// Prepares a `top_k`; None for another op.
    pub fn new(work: &OpWork) -> Option<TopKPlan> {
        const { assert!(MOST * size_of::<u64>() <= WORKSPACE_BYTES) };
        let Prim::TopK(op) = &work.op else { return None };
        let (x, y) = (&work.inputs[0], &work.output);
        let at = x.ty.position(&op.dim)?;
        let names = y.ty.dims.iter().map(|d| &*d.name).filter(|n| **n != *op.k.name);
        let k_at = y.ty.position(&op.k.name)?;
        Some(TopKPlan {
            outer: Nest::new(names, y, [x, y]),
            n: x.ty.dims[at].size,
            pitch: strides(x)[at],
            k: op.k.size,
            k_pitch: strides(y)[k_at],
            float: x.ty.dtype == DType::F32,
        })
    }

    /// Runs it.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and do not overlap.
    pub unsafe fn run(&self, pool: &Pool, x: *const u32, y: *mut i32) {
        let p = Pointers(x, y);
        let points = self.outer.points();
        let tasks = points.min(pool.threads() * 8);
        pool.run(tasks, &|t, workspace| {
            let p = p;
            // SAFETY: the workspace is aligned to 64 bytes and holds the most that an op may ask for; any bits are a
            // number.
            let heap = unsafe { std::slice::from_raw_parts_mut(workspace.floats().as_mut_ptr().cast::<u64>(), self.k) };
            for point in points * t / tasks..points * (t + 1) / tasks {
                let at = self.outer.at(point);
                // SAFETY: by this function's contract; all of the dimension is held.
                let key = |i: usize| key(unsafe { *p.0.add(at[0] + i * self.pitch) }, i, self.float);
                heap.iter_mut().enumerate().for_each(|(i, h)| *h = key(i));
                (0..self.k / 2).rev().for_each(|i| sink(heap, i));
                for i in self.k..self.n {
                    let key = key(i);
                    if key > heap[0] {
                        heap[0] = key;
                        sink(heap, 0);
                    }
                }
                heap.sort_unstable_by(|a, b| b.cmp(a));
                for (i, h) in heap.iter().enumerate() {
                    // SAFETY: by this function's contract; points are disjoint.
                    unsafe { *p.1.add(at[1] + i * self.k_pitch) = !(*h as u32) as i32 };
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_order_elements_as_numbers_with_nan_on_top() {
        let ascending = [f32::NEG_INFINITY, -3e9, -1e9, -1.0, -1e-40, -0.0, 1e-40, 1.0, 2e9, f32::INFINITY, f32::NAN];
        let keys: Vec<u64> = ascending.iter().map(|v| key(v.to_bits(), 0, true)).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
        assert_eq!(key((-0.0f32).to_bits(), 3, true), key(0, 3, true));
        assert!(key((-f32::NAN).to_bits(), 1, true) > key(f32::INFINITY.to_bits(), 0, true));
        assert!(key(i32::MIN as u32, 0, false) < key(-1i32 as u32, 5, false));
        assert!(key(7, 1, false) > key(7, 2, false));
    }

    proptest! {
        #[test]
        fn a_heap_keeps_the_least_on_top(mut heap in prop::collection::vec(any::<u64>(), 1..40)) {
            (0..heap.len() / 2).rev().for_each(|i| sink(&mut heap, i));
            prop_assert_eq!(heap[0], *heap.iter().min().unwrap());
        }
    }
}
