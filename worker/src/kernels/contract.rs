//! `contract`: sums of products of two tensors of any order of dimensions, as packed matrix products.
//!
//! Roofline: 2 * m * n * k flops; the multiply-add units bind once m and n reach a few tiles. Packing reads and writes
//! each operand once.

use super::conv::strides;
use super::isa::Isa;
use super::tile::{self, Leaves, Tile, panel_width};
use crate::pool::{Pool, WORKSPACE_BYTES};
use mesh::chunk::Tree;
use mesh::dim::Name;
use mesh::ops::Prim;
use mesh::plan::{OpWork, Part};
use std::ops::Range;

/// A contraction, prepared.
pub struct ContractPlan {
    isa: Isa,
    /// By batch: offsets in a, b and the result.
    batches: Vec<[usize; 3]>,
    /// Offsets in a and the result.
    rows: Vec<[usize; 2]>,
    /// Offsets in b and the result; the result's must be neighbours to store a panel at once.
    columns: Vec<[usize; 2]>,
    /// Offsets in a and b, leaf after leaf.
    depth: Vec<[usize; 2]>,
    leaves: Leaves,
    channels: Vec<Range<usize>>,
    elements: usize,
    width: usize,
    /// Whether the result's columns lie next to each other.
    dense: bool,
    /// Rows that a task packs.
    block: usize,
}

/// Rows of a tile at most, for its stack of results.
const ROWS: usize = 14;

#[derive(Clone, Copy)]
struct Pointers {
    a: *const f32,
    b: *const f32,
    out: *mut f32,
    scratch: *mut f32,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers {}
// SAFETY: as above.
unsafe impl Send for Pointers {}

/// The offsets of all points of some loops, row-major: each loop a range and, by tensor, (first held index, stride).
fn offsets<const N: usize>(loops: &[(Range<usize>, [(usize, usize); N])]) -> Vec<[usize; N]> {
    let mut out = vec![[0; N]];
    for (range, at) in loops {
        out = out
            .iter()
            .flat_map(|o| {
                range.clone().map(|i| {
                    let mut o = *o;
                    for t in 0..N {
                        o[t] += (i - at[t].0.min(i)) * at[t].1;
                    }
                    o
                })
            })
            .collect();
    }
    out
}

impl ContractPlan {
    /// Prepares a `contract` for the best instruction set; None for another op.
    pub fn new(work: &OpWork) -> Option<ContractPlan> {
        ContractPlan::with_isa(work, Isa::detect())
    }

    /// Prepares it for one instruction set.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<ContractPlan> {
        let Prim::Contract(op) = &work.op else { return None };
        let (a, b, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        // First held index and stride of a dimension in a tensor; stride 0 where the tensor lacks it.
        let place = |p: &Part, n: &Name| match p.ty.position(n) {
            Some(i) => (p.region.0[i].1.start, strides(p)[i]),
            None => (0, 0),
        };
        let (mut batch, mut rows, mut columns) = (vec![], vec![], vec![]);
        for (n, range) in &out.region.0 {
            match (a.ty.has(n), b.ty.has(n)) {
                (true, true) => batch.push((range.clone(), [place(a, n), place(b, n), place(out, n)])),
                (true, false) => rows.push((range.clone(), [place(a, n), place(out, n)])),
                _ => columns.push((range.clone(), [place(b, n), place(out, n)])),
            }
        }
        let (tree, owned) = work.sum.clone().unwrap_or((Tree { dims: vec![] }, vec![]));
        let leaves = Leaves::new(&tree, &owned);
        let names: Vec<&Name> =
            a.ty.dims
                .iter()
                .chain(b.ty.dims.iter().filter(|d| !a.ty.has(&d.name)))
                .map(|d| &d.name)
                .filter(|n| op.over.contains(n))
                .collect();
        let (mut depth, mut channels) = (Vec::new(), Vec::new());
        for leaf in &leaves.boxes {
            let loops: Vec<_> = leaf.iter().zip(&names).map(|(r, n)| (r.clone(), [place(a, n), place(b, n)])).collect();
            let start = depth.len();
            depth.extend(offsets(&loops));
            channels.push(start..depth.len());
        }
        let columns = offsets(&columns);
        let dense = columns.windows(2).all(|w| w[1][1] == w[0][1] + 1);
        let width = panel_width(isa, columns.len());
        let rows = offsets(&rows);
        let budget = WORKSPACE_BYTES / 4 - ROWS * 32 * leaves.nodes.len().max(1) - 64;
        let block = (budget / depth.len().max(1)).min(4 * ROWS).min(rows.len()).max(1);
        assert!(depth.len() <= budget, "a contraction over {} elements does not fit into the workspace", depth.len());
        Some(ContractPlan {
            isa,
            batches: offsets(&batch),
            rows,
            columns,
            depth,
            leaves,
            channels,
            elements: out.region.elements(),
            width,
            dense,
            block,
        })
    }

    fn panels(&self) -> usize {
        self.columns.len().div_ceil(self.width)
    }

    /// Bytes of scratch: b, packed, of all batches.
    pub fn scratch_bytes(&self) -> usize {
        self.batches.len() * self.panels() * self.width * self.depth.len() * 4
    }

    /// Runs it: `out` is `[nodes, ..]`.
    ///
    /// # Safety
    /// The pointers are buffers of the plan's parts and of the scratch asked for, which do not overlap.
    pub unsafe fn run(&self, pool: &Pool, a: *const f32, b: *const f32, out: *mut f32, scratch: *mut f32) {
        let p = Pointers { a, b, out, scratch };
        let (panels, k) = (self.panels(), self.depth.len());
        pool.run(self.batches.len() * panels, &|t, _| {
            let p = p;
            let (batch, first) = (t / panels, t % panels * self.width);
            let columns = &self.columns[first..(first + self.width).min(self.columns.len())];
            // SAFETY: every panel is a part of the scratch of its own; offsets lie inside b.
            unsafe {
                let to = p.scratch.add(t * self.width * k);
                let from = p.b.add(self.batches[batch][1]);
                for (i, d) in self.depth.iter().enumerate() {
                    let row = to.add(i * self.width);
                    for (n, c) in columns.iter().enumerate() {
                        *row.add(n) = *from.add(d[1] + c[0]);
                    }
                    std::ptr::write_bytes(row.add(columns.len()), 0, self.width - columns.len());
                }
            }
        });
        let blocks = self.rows.len().div_ceil(self.block);
        pool.run(self.batches.len() * blocks, &|t, w| {
            let p = p;
            let (batch, first) = (t / blocks, t % blocks * self.block);
            let rows = &self.rows[first..(first + self.block).min(self.rows.len())];
            let (sums, packed) =
                w.floats().split_at_mut((ROWS * 32 * self.leaves.nodes.len().max(1)).next_multiple_of(16));
            // SAFETY: offsets lie inside a; tasks write disjoint outputs.
            unsafe {
                let from = p.a.add(self.batches[batch][0]);
                for (r, row) in rows.iter().enumerate() {
                    for (i, d) in self.depth.iter().enumerate() {
                        packed[r * k + i] = *from.add(row[0] + d[0]);
                    }
                }
                for panel in 0..panels {
                    let columns = &self.columns[panel * self.width..((panel + 1) * self.width).min(self.columns.len())];
                    for (group, rows) in rows.chunks(ROWS).enumerate() {
                        let tile = Tile {
                            x: packed.as_ptr().add(group * ROWS * k),
                            pitch: k,
                            taps: &[[0, 0]],
                            channels: &self.channels,
                            w: p.scratch.add((batch * panels + panel) * self.width * k),
                            nodes: &self.leaves.nodes,
                            out: sums.as_mut_ptr(),
                            out_pitch: 32,
                            node_pitch: ROWS * 32,
                            columns: columns.len(),
                        };
                        tile::run(self.isa, self.width, tile, rows.len());
                        for n in 0..self.leaves.nodes.len() {
                            for (r, row) in rows.iter().enumerate() {
                                let from = &sums[(n * ROWS + r) * 32..][..columns.len()];
                                let to = p.out.add(n * self.elements + self.batches[batch][2] + row[1]);
                                if self.dense {
                                    std::ptr::copy_nonoverlapping(from.as_ptr(), to.add(columns[0][1]), from.len());
                                } else {
                                    columns.iter().zip(from).for_each(|(c, v)| *to.add(c[1]) = *v);
                                }
                            }
                        }
                    }
                }
            }
        });
    }
}
