//! `gather`: elements of a table by index.
//!
//! Roofline: the bytes of the indices and of the result, and as many of the table.

use super::nest::Nest;
use crate::pool::Pool;
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::OpWork;
use std::ops::Range;

/// A gather, prepared. Elements are copied as they are, whatever their dtype.
pub struct GatherPlan {
    /// Points outside the lanes: offsets in table, indices and result.
    outer: Nest<3>,
    lanes: usize,
    /// Elements from a row of the table to the next one.
    pitch: usize,
    /// First row of the table that is held, and all the rows there are.
    held: usize,
    rows: usize,
    /// Rows of each node of the sum.
    nodes: Vec<Range<usize>>,
    /// Elements of the result.
    elements: usize,
    /// What another node's row adds: -0.0, or 0.
    neutral: u32,
}

#[derive(Clone, Copy)]
struct Pointers {
    table: *const u32,
    indices: *const i32,
    out: *mut u32,
}
// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

impl GatherPlan {
    /// Prepares a `gather`; None for another op.
    pub fn new(work: &OpWork) -> Option<GatherPlan> {
        let Prim::Gather(op) = &work.op else { return None };
        let (table, indices, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        let at = table.ty.position(&op.dim)?;
        let mut outer = Nest::new(out.ty.dims.iter().map(|d| &*d.name), out, [table, indices, out]);
        let lanes = outer.take_lanes([true, false, true], out.ty.dims.len());
        let rows = |(tree, owned): &(mesh::chunk::Tree, mesh::chunk::ChunkBox)| {
            tree.nodes(owned).iter().map(|n| tree.elements(&n.chunks)[0].clone()).collect()
        };
        Some(GatherPlan {
            outer,
            lanes,
            pitch: super::conv::strides(table)[at],
            held: table.region.0[at].1.start,
            rows: table.ty.dims[at].size,
            nodes: work.sum.as_ref().map(rows).unwrap_or_default(),
            elements: out.region.elements(),
            neutral: if out.ty.dtype == DType::F32 { (-0.0f32).to_bits() } else { 0 },
        })
    }

    /// Runs it: `out` is `[nodes, ..]`.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and do not overlap.
    pub unsafe fn run(&self, pool: &Pool, table: *const u32, indices: *const i32, out: *mut u32) {
        let p = Pointers { table, indices, out };
        let points = self.outer.points();
        let tasks = points.min(pool.threads() * 8);
        pool.run(tasks, &|t, _| {
            let p = p;
            for point in points * t / tasks..points * (t + 1) / tasks {
                let at = self.outer.at(point);
                // SAFETY: by this function's contract; points are disjoint, and a node's rows are held.
                unsafe {
                    let row = usize::try_from(*p.indices.add(at[1])).ok().filter(|r| *r < self.rows);
                    for (n, rows) in self.nodes.iter().enumerate() {
                        let to = p.out.add(n * self.elements + at[2]);
                        match row {
                            Some(row) if rows.contains(&row) => {
                                let from = p.table.add(at[0] + (row - self.held) * self.pitch);
                                std::ptr::copy_nonoverlapping(from, to, self.lanes);
                            }
                            // An index outside gives 0, which the first row's node has to say: the others' -0.0 leave it.
                            None if rows.start == 0 => std::slice::from_raw_parts_mut(to, self.lanes).fill(0),
                            _ => std::slice::from_raw_parts_mut(to, self.lanes).fill(self.neutral),
                        }
                    }
                }
            }
        });
    }
}
