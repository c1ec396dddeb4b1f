//! Nodes of a summation tree combined along it: what several devices hold of a sum, or what one has made bit by bit.
//!
//! Roofline: memory. Every node is read once and every result written once.

use super::math;
use crate::pool::Pool;
use mesh::chunk::Finish;
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;
use mesh::plan::Join;

/// Results on the stack at a time: a tree over owners is no deeper.
const DEPTH: usize = 64;
/// Elements combined at a time, so that the stack stays in the first-level cache.
const BLOCK: usize = 256;

/// Parts of a sum on one device that are to be joined, prepared.
pub struct JoinPlan(Join);

impl JoinPlan {
    /// Prepares a join.
    pub fn new(work: &Join) -> JoinPlan {
        JoinPlan(work.clone())
    }

    /// Runs it: inputs and output are `[nodes, elements]`.
    ///
    /// # Safety
    /// Buffers as large as the work says; the output may be an input's.
    pub unsafe fn run(&self, pool: &Pool, inputs: &[*const u8], output: *mut u8) {
        let w = &self.0;
        let node = w.elements * w.dtype.bytes();
        let inputs: Vec<Shared> = inputs.iter().map(|i| Shared(*i)).collect();
        // SAFETY: by this function's contract; a node lies inside of its input.
        unsafe {
            let part = |input: usize, i: usize| inputs[input].0.add(i * node);
            combine(pool, (w.dtype, w.f), &w.order, &part, (output, w.elements, w.places));
        }
    }
}

struct Shared(*const u8);
// SAFETY: tasks only read what it points to, but for elements that they alone combine.
unsafe impl Sync for Shared {}

#[derive(Clone, Copy)]
struct Output<T>(*mut T);
// SAFETY: tasks write disjoint elements.
unsafe impl<T> Sync for Output<T> {}

/// Combines nodes by a stack machine; `part` says where one begins, by its owner and its index. What is on the stack in the
/// end goes to the output, one after the other: where it begins, the elements of each node, and how many have a place there.
/// Places that are left over are zero.
///
/// # Safety
/// Nodes and output are as large as that. The output may be the place of nodes: of each element all nodes are read before a
/// result is written.
pub(crate) unsafe fn combine(
    pool: &Pool,
    (dtype, f): (DType, ReduceFn),
    order: &[Finish],
    part: &(impl Fn(usize, usize) -> *const u8 + Sync),
    to: (*mut u8, usize, usize),
) {
    // Each combination is a loop of its own, so that the compiler can make it one of vectors.
    // SAFETY: by this function's contract.
    unsafe {
        match (dtype, f) {
            (DType::I32, ReduceFn::Sum) => combine_by(pool, order, part, to, i32::wrapping_add),
            (DType::I32, ReduceFn::Max) => combine_by(pool, order, part, to, i32::max),
            (DType::I32, ReduceFn::Min) => combine_by(pool, order, part, to, i32::min),
            (DType::Bool, ReduceFn::Sum | ReduceFn::Max) => combine_by(pool, order, part, to, |a: u8, b| a | b),
            (DType::Bool, ReduceFn::Min) => combine_by(pool, order, part, to, |a: u8, b| a & b),
            (DType::F32 | DType::Bf16 | DType::F16, ReduceFn::Sum) => {
                combine_by(pool, order, part, to, |a: f32, b| a + b)
            }
            (DType::F32 | DType::Bf16 | DType::F16, ReduceFn::Max) => {
                combine_by(pool, order, part, to, math::max::<f32>)
            }
            (DType::F32 | DType::Bf16 | DType::F16, ReduceFn::Min) => {
                combine_by(pool, order, part, to, math::min::<f32>)
            }
        }
    }
}

/// Combines nodes along the tree, block by block of elements.
unsafe fn combine_by<T: Copy + Default>(
    pool: &Pool,
    order: &[Finish],
    part: &(impl Fn(usize, usize) -> *const u8 + Sync),
    (output, elements, places): (*mut u8, usize, usize),
    f: impl Fn(T, T) -> T + Copy + Sync,
) {
    let output = Output(output.cast::<T>());
    let blocks = elements.div_ceil(BLOCK);
    let tasks = if blocks < 64 { 1 } else { pool.threads() };
    pool.run(tasks, &|t, _| {
        // The wrapper, not the pointer inside, is shared with the tasks.
        let output = &output;
        let mut stack = [[T::default(); BLOCK]; DEPTH];
        for b in blocks * t / tasks..blocks * (t + 1) / tasks {
            let (at, n) = (b * BLOCK, BLOCK.min(elements - b * BLOCK));
            // SAFETY: by the contract of `combine`; blocks are disjoint.
            unsafe {
                let top = block(order, &|o, i| part(o, i).cast::<T>().add(at), n, &mut stack, f);
                stack[top..places].iter_mut().for_each(|left| left[..n].fill(T::default()));
                for (place, made) in stack[..places].iter().enumerate() {
                    std::ptr::copy_nonoverlapping(made.as_ptr(), output.0.add(place * elements + at), n);
                }
            }
        }
    });
}

/// Combines `n` elements, and says how many results lie on the stack.
unsafe fn block<T: Copy>(
    order: &[Finish],
    part: &impl Fn(usize, usize) -> *const T,
    n: usize,
    stack: &mut [[T; BLOCK]; DEPTH],
    f: impl Fn(T, T) -> T,
) -> usize {
    let mut top = 0;
    let mut steps = order.iter().peekable();
    while let Some(step) = steps.next() {
        match *step {
            Finish::Take { owner, node } => {
                // SAFETY: there are as many elements, and nobody writes to them now.
                let part = unsafe { std::slice::from_raw_parts(part(owner, node), n) };
                // What is taken to be combined at once needs no place of its own.
                if steps.next_if_eq(&&Finish::Combine).is_some() {
                    stack[top - 1][..n].iter_mut().zip(part).for_each(|(a, b)| *a = f(*a, *b));
                } else {
                    stack[top][..n].copy_from_slice(part);
                    top += 1;
                }
            }
            Finish::Combine => {
                let (a, b) = stack.split_at_mut(top - 1);
                a[top - 2][..n].iter_mut().zip(&b[0][..n]).for_each(|(a, b)| *a = f(*a, *b));
                top -= 1;
            }
        }
    }
    top
}
