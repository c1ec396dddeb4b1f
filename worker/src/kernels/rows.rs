//! Linear maps along one dimension by sparse rows: window sums, resizing, and their adjoints.
//!
//! Roofline: the bytes of input and result; an element is read again by every row that holds it, from the cache.
//! The elements behind the dimension go through together.

use super::isa::Isa;
use super::nest::Nest;
use crate::dispatch;
use crate::pool::Pool;
use mesh::dim::Name;
use mesh::ops::Prim;
use mesh::ops::rows::Rows;
use mesh::plan::OpWork;

/// A map along a dimension, prepared.
pub struct RowsPlan {
    isa: Isa,
    /// Points outside the map and the lanes: offsets in x and y.
    outer: Nest<2>,
    lanes: usize,
    /// Elements between neighbours along the dimension in y.
    pitch: usize,
    /// By row: its end among the entries.
    ends: Vec<usize>,
    /// Offset in x and weight.
    entries: Vec<(usize, f32)>,
    /// Bytes of an element, if rows only choose an element each.
    chosen: Option<usize>,
}

#[derive(Clone, Copy)]
struct Pointers(*const u8, *mut u8);
// SAFETY: tasks write disjoint parts and only read the input.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

impl RowsPlan {
    /// Prepares a map for one instruction set; None for an op that is none.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<RowsPlan> {
        let (rows, dim, chooses): (Rows, &Name, bool) = match &work.op {
            Prim::WindowSum(w) => (w.rows(), &w.window.dim, false),
            Prim::Resize(r) => (r.rows(), &r.dim, r.chooses()),
            _ => return None,
        };
        let (x, y) = (&work.inputs[0], &work.output);
        let at = y.ty.position(dim)?;
        let names = y.ty.dims.iter().map(|d| &*d.name).filter(|n| *n != &**dim);
        let mut outer = Nest::new(names, y, [x, y]);
        let lanes = outer.take_lanes([true, true], y.ty.dims.len() - 1 - at);
        let (stride, held) = (super::conv::strides(x)[at], &x.region.0[at].1);
        let (mut ends, mut entries) = (Vec::new(), Vec::new());
        for o in y.region.0[at].1.clone() {
            entries.extend(rows.row(o).iter().map(|(i, w)| ((i - held.start) * stride, *w)));
            ends.push(entries.len());
        }
        let chosen = chooses.then(|| y.ty.dtype.bytes());
        Some(RowsPlan { isa, outer, lanes, pitch: super::conv::strides(y)[at], ends, entries, chosen })
    }

    /// Runs it.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and do not overlap.
    pub unsafe fn run(&self, pool: &Pool, x: *const u8, y: *mut u8) {
        let p = Pointers(x, y);
        let rows = self.outer.points() * self.ends.len();
        let tasks = rows.min(pool.threads() * 8);
        pool.run(tasks, &|t, _| {
            let (plan, range) = (self, rows * t / tasks..rows * (t + 1) / tasks);
            dispatch!(self.isa, fn(plan: &RowsPlan, range: std::ops::Range<usize>, p: Pointers) {
                for r in range {
                    let (point, o) = (r / plan.ends.len(), r % plan.ends.len());
                    // SAFETY: by the contract of `run`; rows are disjoint.
                    unsafe { plan.row(plan.outer.at(point), o, p) };
                }
            });
        });
    }

    #[inline(always)]
    unsafe fn row(&self, at: [usize; 2], o: usize, p: Pointers) {
        let start = if o == 0 { 0 } else { self.ends[o - 1] };
        let entries = &self.entries[start..self.ends[o]];
        let (from, to) = (at[0], at[1] + o * self.pitch);
        // SAFETY: a row's elements lie inside what is held, by the op's sharding rule.
        unsafe {
            if let Some(bytes) = self.chosen {
                let x = p.0.add((from + entries[0].0) * bytes);
                std::ptr::copy_nonoverlapping(x, p.1.add(to * bytes), self.lanes * bytes);
                return;
            }
            let (x, y) = (p.0.cast::<f32>().add(from), p.1.cast::<f32>().add(to));
            let y = std::slice::from_raw_parts_mut(y, self.lanes);
            let Some(((offset, weight), rest)) = entries.split_first() else {
                y.fill(0.0);
                return;
            };
            let lanes = |offset: usize| std::slice::from_raw_parts(x.add(offset), self.lanes);
            y.iter_mut().zip(lanes(*offset)).for_each(|(y, x)| *y = weight * x);
            for (offset, weight) in rest {
                y.iter_mut().zip(lanes(*offset)).for_each(|(y, x)| *y += weight * x);
            }
        }
    }
}
