//! Copies of boxes between row-major arrays: slices, pads, concatenations, renames, and what moves between devices.
//!
//! Roofline: each byte is read once and written once.

use crate::pool::Pool;
use mesh::plan::{BoxCopy, CopyWork};

/// A copy of a box, its loops collapsed: runs of contiguous bytes where both sides have them.
#[derive(Debug)]
pub struct CopyPlan {
    /// Extents outside the runs, outermost first.
    extents: Vec<usize>,
    from: usize,
    from_strides: Vec<usize>,
    to: usize,
    to_strides: Vec<usize>,
    /// Bytes of a run.
    run: usize,
    /// Iterations of the outer loops.
    runs: usize,
}

/// Loops that a copy has at most after collapsing.
const LOOPS: usize = 16;

impl CopyPlan {
    /// Prepares a copy of elements of `element` bytes.
    pub fn new(copy: &BoxCopy, element: usize) -> CopyPlan {
        // (extent, from, to) in bytes, innermost last; the element itself is the innermost loop.
        let mut loops: Vec<(usize, usize, usize)> = Vec::new();
        let strides = copy.extents.iter().zip(copy.from_strides.iter().zip(&copy.to_strides));
        let outer = strides.map(|(n, (f, t))| (*n, f * element, t * element)).filter(|l| l.0 != 1);
        for l in outer.chain([(element, 1, 1)]) {
            match loops.last_mut() {
                Some(p) if p.1 == l.0 * l.1 && p.2 == l.0 * l.2 => *p = (p.0 * l.0, l.1, l.2),
                _ => loops.push(l),
            }
        }
        let (run, _, _) = loops.pop().unwrap_or((0, 1, 1));
        assert!(loops.len() <= LOOPS, "a copy of {} loops", loops.len());
        CopyPlan {
            runs: loops.iter().map(|l| l.0).product(),
            extents: loops.iter().map(|l| l.0).collect(),
            from: copy.from * element,
            from_strides: loops.iter().map(|l| l.1).collect(),
            to: copy.to * element,
            to_strides: loops.iter().map(|l| l.2).collect(),
            run,
        }
    }

    /// Bytes copied.
    pub fn bytes(&self) -> usize {
        self.runs * self.run
    }

    /// Copies runs `range` of the box.
    ///
    /// # Safety
    /// The box lies inside what `from` and `to` point at, and those do not overlap.
    unsafe fn copy(&self, range: std::ops::Range<usize>, from: *const u8, to: *mut u8) {
        let d = self.extents.len();
        let mut at = [0usize; LOOPS];
        let (mut f, mut t) = (self.from, self.to);
        let mut rest = range.start;
        for l in (0..d).rev() {
            at[l] = rest % self.extents[l];
            rest /= self.extents[l];
            f += at[l] * self.from_strides[l];
            t += at[l] * self.to_strides[l];
        }
        for _ in range {
            // SAFETY: by this function's contract. Small runs are copied without a call.
            unsafe {
                match self.run {
                    4 => to.add(t).cast::<[u8; 4]>().write(from.add(f).cast::<[u8; 4]>().read()),
                    _ => std::ptr::copy_nonoverlapping(from.add(f), to.add(t), self.run),
                }
            }
            for l in (0..d).rev() {
                at[l] += 1;
                f += self.from_strides[l];
                t += self.to_strides[l];
                if at[l] < self.extents[l] {
                    break;
                }
                f -= at[l] * self.from_strides[l];
                t -= at[l] * self.to_strides[l];
                at[l] = 0;
            }
        }
    }

    /// Copies the box, large ones by all threads.
    ///
    /// # Safety
    /// The box lies inside what `from` and `to` point at, and those do not overlap.
    pub unsafe fn run(&self, pool: &Pool, from: *const u8, to: *mut u8) {
        let p = Pointers(from, to);
        let tasks = if self.bytes() < 1 << 16 { 1 } else { (pool.threads() * 2).min(self.runs) };
        pool.run(tasks, &|t, _| {
            let p = p;
            // SAFETY: by this function's contract; tasks copy disjoint runs.
            unsafe { self.copy(self.runs * t / tasks..self.runs * (t + 1) / tasks, p.0, p.1) };
        });
    }
}

#[derive(Clone, Copy)]
struct Pointers(*const u8, *mut u8);
// SAFETY: tasks write disjoint parts and only read the source.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// Copies of boxes into one output, prepared.
pub struct CopiesPlan {
    fill: Option<[u8; 4]>,
    element: usize,
    boxes: Vec<(usize, CopyPlan)>,
}

impl CopiesPlan {
    /// Prepares the copies.
    pub fn new(work: &CopyWork) -> CopiesPlan {
        let boxes = work.boxes.iter().map(|(i, b)| (*i, CopyPlan::new(b, work.element))).collect();
        CopiesPlan { fill: work.fill, element: work.element, boxes }
    }

    /// Runs them; the output has `bytes` bytes.
    ///
    /// # Safety
    /// Inputs and output are buffers as large as the work says and do not overlap.
    pub unsafe fn run(&self, pool: &Pool, inputs: &[*const u8], output: *mut u8, bytes: usize) {
        if let Some(fill) = self.fill {
            // SAFETY: the output has that many bytes.
            let out = unsafe { std::slice::from_raw_parts_mut(output, bytes) };
            let element = &fill[..self.element];
            if element.iter().all(|b| *b == 0) {
                out.fill(0);
            } else {
                out.chunks_exact_mut(self.element).for_each(|e| e.copy_from_slice(element));
            }
        }
        for (i, copy) in &self.boxes {
            // SAFETY: by this function's contract.
            unsafe { copy.run(pool, inputs[*i], output) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_arrives_in_its_place_element_by_element() {
        let from: Vec<u32> = (0..4 * 5 * 6).collect();
        // Box [1..3, 2..5, 1..4] of a 4 x 5 x 6 array, transposed into a 3 x 2 x 3 one.
        let copy = BoxCopy {
            extents: vec![2, 3, 3],
            from: 30 + 12 + 1,
            from_strides: vec![30, 6, 1],
            to: 0,
            to_strides: vec![3, 6, 1],
        };
        let mut to = vec![0u32; 18];
        let plan = CopyPlan::new(&copy, 4);
        // SAFETY: the box lies inside both arrays.
        unsafe { plan.run(&Pool::new(1, None), from.as_ptr().cast(), to.as_mut_ptr().cast()) };
        for (i, j, k) in (0..18).map(|n| (n / 9, n / 3 % 3, n % 3)) {
            assert_eq!(to[j * 6 + i * 3 + k], from[(i + 1) * 30 + (j + 2) * 6 + k + 1]);
        }
        assert_eq!(plan.bytes(), 72);
    }
}
