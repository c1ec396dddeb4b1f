//! Convolution and transposed convolution, as implicit matrix products over channel-last arrays.
//!
//! A task computes some rows of outputs (fixed batch and outer indices, along the innermost spatial dimension): it
//! stages the input rows that its taps read, zeros where they leave the input, and runs register tiles over them.
//! Staging makes every stride, dilation, padding, halo and phase of a transposed convolution the same loop. Outputs next to
//! each other share what is staged. Weights are packed into panels once a run.
//!
//! Contracted channels are counted in units: elements of `f32`, pairs of `bf16` (the last one of a leaf may have a zero for
//! its second half). `f16` is staged and packed as the `f32` that it is. An epilogue takes a task's outputs from the workspace;
//! where it sums them up a task has whole rows.
//!
//! Roofline: 2 * taps * cin * cout flops an output against 4 * (cin + cout) bytes, or half of them; from 16 channels on the
//! multiply-add units bind. Staging costs a few percent.

mod geometry;
mod winograd;

use super::epilogue::{self, Epilogue};
use super::half;
use super::isa::Isa;
use super::kernel::Operands;
use super::minimal::PRODUCTS;
use super::pack::{self, NOTHING, Side};
use super::tile::{self, Combine, Leaves, Tile, panel_width};
use super::vm::{Evaluation, StepContext};
use crate::pool::{Pool, WORKSPACE_BYTES};
use geometry::{Axis, Geometry, Phase, around};
pub(super) use geometry::{Input, axis_of, batch_offsets, strides};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::plan::{ALIGN, OpWork, Share};
use mesh::region::Region;
use std::ops::Range;
use winograd::Winograd;

/// Floats, or pairs, that a task stages, with its results, to have more rows of outputs share what they read of x: a part of
/// what the second-level cache holds.
const STAGED: usize = 64 << 10;

/// Outputs along the first dimension that a task goes through at most, for the same sake, and tasks that there are to be for
/// each thread nevertheless.
const RUN: usize = 8;
const TASKS: usize = 8;

/// The outputs that a task computes: some of the rows along the second dimension, and a part of each phase along the
/// innermost one.
struct Outputs {
    batch: usize,
    o1: usize,
    rows: Range<usize>,
    range: Range<usize>,
    /// Planes of x before this one are staged, by the output before along the first dimension.
    staged: usize,
    /// Whether planes take turns in their places, for outputs one after the other.
    in_turns: bool,
}

/// A box of outputs along the first two dimensions.
struct Outer {
    firsts: Range<usize>,
    /// What of the second one tasks have.
    rows: Vec<Range<usize>>,
}

/// How many blocks of so many there are, where they begin `before` the first one.
fn blocks(n: usize, before: usize, size: usize) -> usize {
    (before + n).div_ceil(size)
}

/// Which part of a range block `n` is.
fn block(within: &Range<usize>, before: usize, n: usize, size: usize) -> Range<usize> {
    let first = within.start + n * size;
    first.saturating_sub(before).max(within.start)..(first + size - before).min(within.end)
}

/// A convolution or transposed convolution, prepared.
pub struct ConvPlan {
    isa: Isa,
    /// Where x lies, and how many of the step's inputs x and the weights are.
    x: Input,
    reads: usize,
    axes: [Axis; 2],
    phases: Vec<Phase>,
    /// Global range held of the innermost dimension, its stride, and the whole input's size.
    inner: (Range<usize>, usize, usize),
    /// Outputs along the three dimensions.
    outputs: [usize; 3],
    /// What is computed.
    boxes: Vec<Outer>,
    /// Whether a step before, which has the rest of the boxes, has packed the weights.
    packed: bool,
    /// Channels contracted in a group, and their offset in x.
    contracted: usize,
    x_channel: usize,
    /// Of `bf16`: the pairs of them, by number.
    pairs: Option<Vec<[usize; 2]>>,
    /// Of x and weights.
    dtype: DType,
    /// Whether the units are the channels as they lie in x.
    as_they_lie: bool,
    /// Output channels in a group, groups.
    produced: usize,
    groups: usize,
    leaves: Leaves,
    /// The units of each leaf.
    channels: Vec<Range<usize>>,
    epilogue: Option<Epilogue>,
    width: usize,
    taps: [usize; 3],
    /// Where weights lie: units and output channels of a tap, elements between taps and between groups, and the first one.
    w_units: Side,
    w_columns: Side,
    w_tap: usize,
    w_group: usize,
    w_first: usize,
    /// Whether outputs along the first dimension share what they read of x, one after the other.
    slides: bool,
    /// Planes of x that one of them reads at most.
    planes: usize,
    /// Rows of the second dimension and outputs of a phase that a task stages.
    block: (usize, usize),
    /// The last two dimensions, if their windows are filtered by fewer multiplications.
    winograd: Option<Winograd>,
}

impl ConvPlan {
    /// Prepares a `conv` or `conv_transpose` for the best instruction set; None for another op.
    pub fn new(work: &OpWork) -> Option<ConvPlan> {
        ConvPlan::with_isa(work, Isa::detect())
    }

    /// Prepares it for one instruction set.
    pub fn with_isa(work: &OpWork, isa: Isa) -> Option<ConvPlan> {
        let (conv, transposed) = match &work.op {
            Prim::Conv(c) => (c, false),
            Prim::ConvTranspose(t) => (&t.conv, true),
            _ => return None,
        };
        let (x, w, out) = (&work.inputs[0], &work.inputs[1], &work.output);
        let (from, to) = if transposed { (&conv.output, &conv.input) } else { (&conv.input, &conv.output) };
        let k = conv.windows.len();
        let spatial: Vec<Geometry> = conv.windows.iter().map(|w| Geometry::new(w, x, out, transposed)).collect();
        // One to three dimensions as three: missing ones in front have one output that reads one input.
        let outer = |i: usize| match (i + k).checked_sub(3) {
            Some(d) => spatial[d].axis(),
            None => Axis { taps: vec![vec![(0, 0)]] },
        };
        let last = &spatial[k - 1];
        let taps: [usize; 3] = std::array::from_fn(|i| (i + k).checked_sub(3).map_or(1, |d| conv.windows[d].size));
        let axes = [outer(0), outer(1)];
        let outputs = [axes[0].taps.len(), axes[1].taps.len(), last.outputs.len()];
        let whole = x.ty.size_of(from).unwrap_or(0);
        let groups = conv.groups.max(1);
        let (held, x_stride) = axis_of(x, from);
        debug_assert_eq!(x_stride, 1);
        let (produced_range, _) = axis_of(out, to);
        let leaves = match &work.sum {
            Some((tree, owned)) => Leaves::new(tree, owned),
            None => Leaves { boxes: vec![vec![0..whole / groups]], nodes: vec![vec![Combine::Leaf(0)]], depth: 1 },
        };
        let start = leaves.boxes.iter().map(|b| b[0].start).min().unwrap_or(0);
        let end = leaves.boxes.iter().map(|b| b[0].end).max().unwrap_or(start);
        let boxes = leaves.boxes.iter().map(|b| b[0].start - start..b[0].end - start);
        let (channels, pairs): (Vec<Range<usize>>, _) = if x.ty.dtype == DType::Bf16 {
            let (channels, pairs) = in_units(2, boxes);
            (channels, Some(pairs))
        } else {
            (boxes.collect(), None)
        };
        let in_order = |(i, p): (usize, &[usize; 2])| *p == [2 * i, 2 * i + 1];
        let as_they_lie = pairs.as_ref().is_none_or(|p| p.iter().enumerate().all(in_order));
        let (w_from, w_from_stride) = axis_of(w, from);
        let (w_to, w_to_stride) = axis_of(w, to);
        let (_, tap_stride) = axis_of(w, &conv.windows[k - 1].kernel());
        let x_first = start - held.start.min(start);
        // With groups the weights' channel of a group counts from 0 for each of them.
        let w_first = if groups > 1 {
            0
        } else {
            (start - w_from.start.min(start)) * w_from_stride + (produced_range.start - w_to.start) * w_to_stride
        };
        let produced = produced_range.len() / groups;
        let contracted = end - start;
        let unit = |c: usize| if c == NOTHING { NOTHING } else { c * w_from_stride };
        let w_units = Side::new(match &pairs {
            Some(pairs) => pairs.iter().flatten().map(|c| unit(*c)).collect(),
            None => (0..contracted).map(unit).collect(),
        });
        let mut plan = ConvPlan {
            isa,
            x: Input::new(x, &work.pieces, conv, out, to),
            reads: work.reads(),
            axes,
            phases: last.phases(),
            inner: (last.held.clone(), last.stride, last.whole),
            outputs,
            boxes: vec![],
            packed: matches!(work.share, Share::Rim(_)),
            contracted,
            x_channel: x_first,
            pairs,
            dtype: x.ty.dtype,
            as_they_lie,
            produced,
            groups,
            leaves,
            channels,
            epilogue: work.epilogue.as_ref().map(|of| Epilogue::new(of, isa)),
            width: panel_width(isa, produced),
            taps,
            w_units,
            w_columns: Side::new((0..produced).map(|n| n * w_to_stride).collect()),
            w_tap: tap_stride,
            // `conv` numbers outputs through and inputs in a group; `conv_transpose` the other way round.
            w_group: if transposed { contracted } else { produced },
            w_first,
            slides: false,
            planes: 1,
            block: (1, 1),
            winograd: conv.is_minimal(&x.ty, from, &out.ty).then(|| Winograd::new(&spatial[k - 2..], transposed)),
        };
        plan.choose_block();
        let inside = |region: &Region| -> [Range<usize>; 2] {
            std::array::from_fn(|i| {
                let Some(d) = (i + k).checked_sub(3) else { return 0..1 };
                let first = spatial[d].outputs.start;
                let range = region.get(&conv.windows[d].dim).map_or(0..0, |r| r.start - first..r.end - first);
                match &plan.winograd {
                    Some(w) if i == 1 => w.whole_patches(range, outputs[1]),
                    _ => range,
                }
            })
        };
        let all = [0..outputs[0], 0..outputs[1]];
        let boxes = match &work.share {
            Share::Whole => vec![all],
            Share::Interior(region) => vec![inside(region)],
            Share::Rim(region) => around(all, inside(region)),
        };
        let outer = |[firsts, rows]: [Range<usize>; 2]| Outer { firsts, rows: plan.rows_of_tasks(rows) };
        plan.boxes = boxes.into_iter().map(outer).collect();
        Some(plan)
    }

    fn panels(&self) -> usize {
        self.produced.div_ceil(self.width)
    }
    fn all_taps(&self) -> usize {
        self.taps.iter().product()
    }
    /// Floats, or pairs, of a panel of packed weights.
    fn panel(&self) -> usize {
        let each = if self.winograd.is_some() { PRODUCTS * self.taps[0] } else { self.all_taps() };
        each * self.units() * self.width
    }
    /// Units contracted in a group.
    fn units(&self) -> usize {
        self.pairs.as_ref().map_or(self.contracted, Vec::len)
    }
    /// Bytes of scratch: the packed weights, and what the epilogue has.
    pub fn scratch_bytes(&self) -> usize {
        self.weight_bytes() + epilogue::scratch_bytes(&self.epilogue)
    }
    fn weight_bytes(&self) -> usize {
        (self.panels() * self.panel() * self.groups * 4).next_multiple_of(ALIGN)
    }

    /// Rows along the second dimension and outputs along the innermost one such that what a task stages fits.
    fn choose_block(&mut self) {
        let budget = WORKSPACE_BYTES / 4 - epilogue::registers(&self.epilogue);
        let budget = budget.saturating_sub(self.all_taps() * 2 + 64);
        self.planes = self.axes[0].taps.iter().map(Vec::len).max().unwrap_or(1).max(1);
        self.block = if self.winograd.is_some() { self.choose_patches(budget) } else { self.choose_rows(budget) };
        self.slides = self.phases.len() == 1 && self.axes[0].slides();
    }

    /// Outputs along the first dimension that a task of so many threads goes through.
    fn run_of(&self, threads: usize) -> usize {
        let rows = self.boxes.iter().map(|b| b.rows.len()).max().unwrap_or(1);
        let parts = if self.has_sums() { 1 } else { self.longest().div_ceil(self.block.1) };
        let tasks = self.x.batches() * rows * parts * self.groups * self.outputs[0];
        if self.slides { (tasks / (TASKS * threads)).clamp(1, RUN) } else { 1 }
    }

    fn choose_rows(&self, budget: usize) -> (usize, usize) {
        let rows_for = |rows: usize| self.axes[1].span(rows);
        let length = |count: usize| {
            self.phases
                .iter()
                .map(|p| (count - 1) * p.in_step + p.taps.iter().map(|t| t.1).max().unwrap_or(0) + 1)
                .max()
                .unwrap_or(1)
        };
        let result = if self.epilogue.is_some() { self.produced * self.groups * self.phases.len() } else { 0 };
        let units = self.units().max(1);
        let size =
            |rows: usize, count: usize| self.planes * rows_for(rows) * length(count) * units + rows * count * result;
        // Enough outputs that the weights of a panel, read once a task, are used often.
        let (mut rows, mut count) = (1, self.longest().max(1));
        while count > 1 && size(1, count) > budget {
            count = count.div_ceil(2);
        }
        let few = |rows: usize| rows * count < 96 && size(rows + 1, count) <= budget / 2;
        while rows < self.outputs[1] && (few(rows) || size(rows + 1, count) <= STAGED) {
            rows += 1;
        }
        assert!(size(rows, count) <= budget, "a convolution's rows of one output do not fit into the workspace");
        (rows, count)
    }

    /// How far before the first output of a range along the second or third dimension blocks of it begin.
    fn before(&self, d: usize, first: usize) -> usize {
        self.winograd.as_ref().map_or(0, |w| w.before(d, first))
    }

    /// Runs it; the result is `[nodes, batch.., spatial.., channel]`.
    ///
    /// # Safety
    /// The operands are buffers of the plan's parts and of the scratch asked for; they overlap only where the plan lets the
    /// epilogue write in place.
    pub unsafe fn run(&self, pool: &Pool, o: &Operands, cx: StepContext) {
        let (inputs, operands) = o.inputs.split_at(self.reads);
        // SAFETY: the scratch is as large as was asked for.
        let behind = unsafe { o.scratch.add(self.weight_bytes()) }.cast();
        let scratch = o.scratch.cast();
        let p = Pointers { inputs, w: inputs[1], operands, results: o.outputs, scratch, behind, cx };
        let panels = if self.packed { 0 } else { self.panels() * self.groups };
        pool.run(panels * self.taps[0], &|t, _| {
            let p = p;
            // SAFETY: every tap of a panel is a part of the scratch of its own.
            unsafe { self.pack(t / self.taps[0], t % self.taps[0], p) }
        });
        let (along, run) = (0..self.longest(), self.run_of(pool.threads()));
        let parts = blocks(along.len(), self.before(1, 0), self.block.1);
        // A task has all parts of rows that are summed up.
        let [parts, of_task] = if self.has_sums() { [1, parts] } else { [parts, 1] };
        let tasks = |b: &Outer| self.x.batches() * blocks(b.firsts.len(), 0, run) * b.rows.len() * parts * self.groups;
        pool.run(self.boxes.iter().map(tasks).sum(), &|mut t, workspace| {
            let p = p;
            let mut boxes = self.boxes.iter();
            let within = loop {
                let Some(within) = boxes.next() else { return };
                let n = tasks(within);
                if t < n {
                    break within;
                }
                t -= n;
            };
            let (group, t) = (t % self.groups, t / self.groups);
            let (part, t) = (t % parts, t / parts);
            let (all, t) = (&within.rows[t % within.rows.len()], t / within.rows.len());
            let runs = blocks(within.firsts.len(), 0, run);
            let firsts = block(&within.firsts, 0, t % runs, run);
            let (registers, rest) = workspace.floats().split_at_mut(epilogue::registers(&self.epilogue));
            // SAFETY: by this function's contract.
            let mut e = self.epilogue.as_ref().map(|e| (e, unsafe { e.begin(p.cx, p.operands, registers) }));
            for rows in self.blocks_of_rows(all) {
                for part in part * of_task..(part + 1) * of_task {
                    let range = block(&along, self.before(1, 0), part, self.block.1);
                    let (rows, in_turns) = (rows.clone(), run > 1);
                    let mut at = Outputs { batch: t / runs, o1: firsts.start, rows, range, staged: 0, in_turns };
                    for o1 in firsts.clone() {
                        at.o1 = o1;
                        // SAFETY: tasks write disjoint outputs.
                        unsafe { self.task(&at, group, p, &mut e, rest) };
                        let read = self.axes[0].taps[o1].iter().map(|t| t.1 + 1);
                        at.staged = read.max().unwrap_or(0).max(at.staged);
                    }
                }
            }
        });
        if let Some(epilogue) = &self.epilogue {
            // SAFETY: all outputs have been taken.
            unsafe { epilogue.finish(pool, o.outputs, p.behind, cx) };
        }
    }

    /// Whether the epilogue sums outputs up.
    fn has_sums(&self) -> bool {
        self.epilogue.as_ref().is_some_and(|e| e.chunks().is_some())
    }

    /// Which rows along the second dimension tasks have: a block of them, or, where they are summed up, all of some chunks.
    fn rows_of_tasks(&self, within: Range<usize>) -> Vec<Range<usize>> {
        let Some(chunks) = self.epilogue.as_ref().and_then(Epilogue::chunks) else {
            return self.blocks_of_rows(&within).collect();
        };
        let mut rows: Vec<Range<usize>> = Vec::new();
        for chunk in chunks {
            match rows.last_mut().filter(|r| r.len() < self.block.0) {
                Some(last) => last.end = chunk.end,
                None => rows.push(chunk.clone()),
            }
        }
        rows
    }

    /// Blocks of rows that are computed at a time.
    fn blocks_of_rows(&self, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, before) = (rows.clone(), self.before(0, rows.start));
        let count = blocks(rows.len(), before, self.block.0);
        let even = (before + rows.len()).div_ceil(count.max(1)).next_multiple_of(2);
        let size = if self.has_sums() { even.min(self.block.0) } else { self.block.0 };
        (0..count).map(move |n| block(&rows, before, n, size)).filter(|rows| !rows.is_empty())
    }

    /// Outputs of the longest phase.
    fn longest(&self) -> usize {
        self.phases.iter().map(|p| p.count).max().unwrap_or(0)
    }

    /// Packs the weights of a panel for a tap along the first dimension.
    unsafe fn pack(&self, panel: usize, tap: usize, p: Pointers) {
        if let Some(w) = &self.winograd {
            // SAFETY: by the contract of `run`.
            return unsafe { self.pack_products(w, panel, tap, p) };
        }
        let (group, local, each) = (panel / self.panels(), panel % self.panels(), self.all_taps() / self.taps[0]);
        for t in tap * each..(tap + 1) * each {
            // SAFETY: panels lie one after another in the scratch.
            unsafe {
                let to = p.scratch.add(panel * self.panel() + t * self.units() * self.width);
                self.pack_tap(p, group * self.w_group, t, 0..self.units(), local, to);
            }
        }
    }

    /// Packs some units of a tap's weights for a panel of outputs; those of its group begin `first` elements behind all.
    unsafe fn pack_tap(&self, p: Pointers, first: usize, tap: usize, units: Range<usize>, panel: usize, to: *mut f32) {
        let columns = panel * self.width..((panel + 1) * self.width).min(self.produced);
        let sides = [&self.w_units, &self.w_columns];
        // SAFETY: the weights' buffer holds every index; there is room for the units, by the contract of those that ask.
        unsafe {
            let from = p.w.add((self.w_first + first + tap * self.w_tap) * self.dtype.bytes());
            pack::panel(self.isa, self.dtype, from, sides, [units, columns], to, self.width);
        }
    }

    /// Computes a block of outputs, phase by phase.
    unsafe fn task(
        &self,
        at: &Outputs,
        group: usize,
        p: Pointers,
        epilogue: &mut Option<(&Epilogue, Evaluation)>,
        workspace: &mut [f32],
    ) {
        let (tap_list, rest) = workspace.split_at_mut((self.all_taps() * 2).next_multiple_of(16));
        let channels = self.produced * self.groups;
        // Phases take turns along the innermost dimension.
        let step = self.phases.len();
        let along = at.range.start * step..(at.range.end * step).min(self.outputs[2]);
        let row_result = if self.epilogue.is_some() { along.len() * channels } else { 0 };
        let (result, stage) = rest.split_at_mut(at.rows.len() * row_result);
        let output = |row: usize| ((at.batch * self.outputs[0] + at.o1) * self.outputs[1] + row) * self.outputs[2];
        for phase in self.phases.iter().filter(|phase| phase.count > at.range.start) {
            let range = at.range.start..at.range.end.min(phase.count);
            let place = |r: usize, row: usize| match &self.epilogue {
                Some(_) => result[r * row_result + phase.first * channels..].as_ptr().cast_mut(),
                None => p.results[0].cast::<f32>().wrapping_add((output(row) + along.start + phase.first) * channels),
            };
            // SAFETY: by the contract of `run`; results have places of their own in the result or the workspace.
            unsafe { self.phase(at, phase, range, group, p, tap_list, stage, place) };
        }
        let Some((epilogue, evaluation)) = epilogue else { return };
        // SAFETY: as above.
        unsafe {
            for (r, row) in at.rows.clone().enumerate() {
                let (to, from) = ((output(row) + along.start) * channels, result[r * row_result..].as_ptr());
                epilogue.take(evaluation, to, from, row_result, p.results, p.behind);
            }
        }
    }

    /// Computes the outputs of a block that belong to a phase; `place(r, row)` is where the first one of the `r`-th row goes.
    unsafe fn phase(
        &self,
        at: &Outputs,
        phase: &Phase,
        range: Range<usize>,
        group: usize,
        p: Pointers,
        tap_list: &mut [f32],
        stage: &mut [f32],
        place: impl Fn(usize, usize) -> *mut f32,
    ) {
        let list = &mut tap_list[..self.all_taps() * 2];
        // SAFETY: the list lies in its own part of the workspace; u32 and f32 are alike in size and alignment.
        let list = unsafe { std::slice::from_raw_parts_mut(list.as_mut_ptr().cast::<[u32; 2]>(), self.all_taps()) };
        if let Some(w) = &self.winograd {
            // SAFETY: by the contract of `run`.
            return unsafe { self.filter(w, at, &range, p, list, stage, place) };
        }
        let units = self.units();
        let taps1 = &self.axes[0].taps[at.o1];
        let seconds = || at.rows.clone().flat_map(|o| self.axes[1].taps[o].iter().map(|t| t.1));
        let low = seconds().min().unwrap_or(0);
        let high = seconds().max().map_or(low, |h| h + 1);
        let reach = phase.taps.iter().map(|t| t.1).max().unwrap_or(0);
        let length = (range.len() - 1) * phase.in_step + reach + 1;
        let start = phase.base + (range.start * phase.in_step) as isize;
        let row_size = length * units;
        let height = high - low;
        // There are as many places as an output reads planes.
        let place_of = |s1: usize, i1: usize| if at.in_turns { i1 % self.planes } else { s1 };
        debug_assert!(taps1.len() * height * row_size <= stage.len());
        // SAFETY: indices inside the held ranges, by the plan.
        unsafe {
            for (s1, (_, i1)) in taps1.iter().enumerate().filter(|(_, (_, i1))| *i1 >= at.staged) {
                for i2 in low..high {
                    let x = self.x.row(p.inputs, at.batch, [*i1, i2]);
                    let channel = self.x_channel + group * if self.groups > 1 { self.contracted } else { 0 };
                    let row = &mut stage[(place_of(s1, *i1) * height + i2 - low) * row_size..][..row_size];
                    self.stage(x, channel, start, length, row);
                }
            }
            let channels = self.produced * self.groups;
            let positions = self.x.batches() * self.outputs.iter().product::<usize>();
            for panel in 0..self.panels() {
                for (r, o2) in at.rows.clone().enumerate() {
                    let mut n = 0;
                    for (s1, (j1, i1)) in taps1.iter().enumerate() {
                        for (j2, i2) in &self.axes[1].taps[o2] {
                            for (j3, offset) in &phase.taps {
                                let tap = (j1 * self.taps[1] + j2) * self.taps[2] + j3;
                                let from = (place_of(s1, *i1) * height + i2 - low) * row_size + offset * units;
                                list[n] = [from as u32, (tap * units * self.width) as u32];
                                n += 1;
                            }
                        }
                    }
                    let first = panel * self.width;
                    let tile = Tile {
                        x: stage.as_ptr(),
                        pairs: self.pairs.is_some(),
                        pitch: phase.in_step * units,
                        step: 1,
                        taps: &list[..n],
                        channels: &self.channels,
                        w: p.scratch.add((group * self.panels() + panel) * self.panel()),
                        nodes: &self.leaves.nodes,
                        goes_on: false,
                        out: place(r, o2).add(group * self.produced + first),
                        out_pitch: phase.out_step * channels,
                        node_pitch: positions * channels,
                        columns: self.width.min(self.produced - first),
                    };
                    tile::run(self.isa, self.width, tile, range.len());
                }
            }
        }
    }

    /// Copies `length` input positions of a row from the global index `start` on, from that channel on, zeros outside the input.
    unsafe fn stage(&self, x: *const u8, first: usize, start: isize, length: usize, row: &mut [f32]) {
        let (held, stride, whole) = &self.inner;
        let units = self.units();
        let inside = |i: isize| i.clamp(0, *whole as isize);
        let (a, b) = (inside(start), inside(start + length as isize));
        let skip = (a - start) as usize * units;
        let n = (b - a) as usize;
        row[..skip.min(length * units)].fill(0.0);
        // SAFETY: the held range covers every position inside the input that a task reads, and the row has room for them.
        unsafe {
            let from = first + (a as usize).saturating_sub(held.start) * stride;
            let to = row.as_mut_ptr().add(skip);
            match &self.pairs {
                None if self.dtype == DType::F16 => {
                    let from = x.cast::<u16>().add(from);
                    if *stride == self.contracted {
                        half::widen_to(self.isa, from, n * self.contracted, to);
                    } else {
                        (0..n).for_each(|i| {
                            half::widen_to(
                                self.isa,
                                from.add(i * stride),
                                self.contracted,
                                to.add(i * self.contracted),
                            );
                        });
                    }
                }
                None => copy(x.cast::<f32>().add(from), *stride, to, self.contracted, n),
                Some(_) if self.as_they_lie => {
                    copy(x.cast::<u16>().add(from), *stride, to.cast(), self.contracted, n);
                }
                Some(pairs) => {
                    let x = x.cast::<u16>().add(from);
                    for i in 0..n {
                        for (u, pair) in pairs.iter().enumerate() {
                            let half = |c: usize| if c == NOTHING { 0 } else { u32::from(*x.add(i * stride + c)) };
                            *to.add(i * units + u) = f32::from_bits(half(pair[0]) | half(pair[1]) << 16);
                        }
                    }
                }
            }
        }
        row[(skip + n * units).min(length * units)..].fill(0.0);
    }
}

/// Copies the channels of `n` positions that lie `stride` elements apart.
///
/// # Safety
/// They lie at `from`, and there is room for them at `to`.
unsafe fn copy<T: Copy>(from: *const T, stride: usize, to: *mut T, channels: usize, n: usize) {
    // SAFETY: by this function's contract.
    unsafe {
        if stride == channels {
            return std::ptr::copy_nonoverlapping(from, to, n * channels);
        }
        (0..n).for_each(|i| std::ptr::copy_nonoverlapping(from.add(i * stride), to.add(i * channels), channels));
    }
}

/// Neighbouring elements of each range, in pairs (`unit` 2) or one by one (1): the units of each one, and all of them,
/// [`NOTHING`] in place of a second half that there is not.
pub(super) fn in_units(
    unit: usize,
    ranges: impl Iterator<Item = Range<usize>>,
) -> (Vec<Range<usize>>, Vec<[usize; 2]>) {
    let mut units = Vec::new();
    let of = ranges.map(|r| {
        let first = units.len();
        let second = |i: usize| if unit == 2 && i + 1 < r.end { i + 1 } else { NOTHING };
        units.extend(r.clone().step_by(unit).map(|i| [i, second(i)]));
        first..units.len()
    });
    (of.collect(), units)
}

/// Inputs are of either dtype.
#[derive(Clone, Copy)]
struct Pointers<'a> {
    /// Those in which x lies, and the weights.
    inputs: &'a [*const u8],
    w: *const u8,
    /// What an epilogue reads besides.
    operands: &'a [*const u8],
    results: &'a [*mut u8],
    /// Packed weights.
    scratch: *mut f32,
    /// What the epilogue has of the scratch.
    behind: *mut f32,
    cx: StepContext,
}

// SAFETY: tasks write disjoint parts and only read inputs.
unsafe impl Sync for Pointers<'_> {}
// SAFETY: as above.
unsafe impl Send for Pointers<'_> {}
