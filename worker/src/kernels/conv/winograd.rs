//! Outputs of windows of three by three along the last two dimensions by minimal filtering ([`crate::kernels::minimal`]): four
//! products an output, for each tap along the first dimension, where a window has nine.
//!
//! A task has the sums of the inputs of its patches, of as many planes as the first dimension has taps, and each of the sixteen
//! products is a matrix product of its own, over channels and those taps. Patches are aligned in the whole tensor. Leaves are
//! made outputs before they are added up, since other devices have added up theirs.
//!
//! Roofline: 2 * 4 * taps * cin * cout flops an output. Sums of inputs cost about twelve operations an input and plane of
//! outputs, and sums of products about twelve an output; both are some percent from 16 channels on.

use super::geometry::Geometry;
use super::{ConvPlan, Outputs, Pointers};
use crate::kernels::minimal::{self, APART, CHANNELS, PRODUCTS, Patches, Places, Rows};
use crate::kernels::tile::{self, Combine, Tile};
use std::ops::Range;

/// Floats of sums of inputs that a task has at a time: about half of what the second-level cache holds.
const STAGED: usize = 128 << 10;

/// Patches that a task has at least, if there are as many: rows of products' tiles.
const PATCHES: usize = 28;

/// The last two dimensions of a convolution whose windows are filtered so.
pub(super) struct Winograd {
    along: [Along; 2],
    /// Whether windows lie the other way round.
    flipped: bool,
    /// The stack machine of a sum of one leaf.
    one: [Vec<Combine>; 1],
}

/// One of the last two dimensions.
struct Along {
    /// Global index of the first input that the first output's window reads; may be negative.
    base: isize,
    /// Global range held of x, elements between inputs, and the whole input's size.
    held: Range<usize>,
    stride: usize,
    whole: usize,
    /// 1 if the first output is the second one of its patch.
    odd: usize,
}

impl Winograd {
    /// Of the geometry of the last two dimensions.
    pub(super) fn new(spatial: &[Geometry], transposed: bool) -> Winograd {
        let along = |g: &Geometry| Along {
            base: g.phases()[0].base,
            held: g.held.clone(),
            stride: g.stride,
            whole: g.whole,
            odd: g.outputs.start % 2,
        };
        Winograd { along: [along(&spatial[0]), along(&spatial[1])], flipped: transposed, one: [vec![Combine::Leaf(0)]] }
    }

    /// How many outputs before that one, along one of those two dimensions, its patch begins.
    pub(super) fn before(&self, d: usize, output: usize) -> usize {
        (output + self.along[d].odd) % 2
    }

    /// What of a range of outputs along the first one of those dimensions is to be computed before the others: patches that are
    /// cut would be computed twice.
    pub(super) fn whole_patches(&self, range: Range<usize>, outputs: usize) -> Range<usize> {
        let start = if range.start == 0 { 0 } else { range.start + self.before(0, range.start) }.min(range.end);
        let end = if range.end == outputs { outputs } else { range.end - self.before(0, range.end).min(range.end) };
        start..end.max(start)
    }
}

/// What a task has in its workspace, in floats.
struct Room {
    /// Sums of inputs.
    sums: usize,
    /// Products.
    products: usize,
    /// A leaf's outputs, and how many of those there are at a time.
    outputs: usize,
    depth: usize,
}

impl Room {
    fn all(&self) -> usize {
        self.sums + self.products + self.outputs * self.depth
    }
}

/// A block of patches.
struct Block {
    /// How many along both dimensions.
    counts: [usize; 2],
    /// The outputs wanted, counted from the first patch's first one.
    outputs: [Range<usize>; 2],
    /// Output that this first one is, of those computed here; may be -1.
    first: [isize; 2],
}

impl Block {
    fn new(w: &Winograd, wanted: [&Range<usize>; 2]) -> Block {
        let before = [0, 1].map(|d| w.before(d, wanted[d].start));
        let outputs = [0, 1].map(|d| before[d]..before[d] + wanted[d].len());
        Block {
            counts: [0, 1].map(|d| outputs[d].end.div_ceil(2)),
            outputs,
            first: [0, 1].map(|d| wanted[d].start as isize - before[d] as isize),
        }
    }

    fn patches(&self) -> usize {
        self.counts[0] * self.counts[1]
    }

    /// The inputs that windows of wanted outputs read, counted from the first patch's first one.
    fn read(&self, d: usize) -> Range<usize> {
        self.outputs[d].start..self.outputs[d].end + 2
    }
}

/// What is multiplied for a panel of outputs.
struct Factors<'a> {
    one: &'a [Vec<Combine>],
    /// By tap along the first dimension: where it begins in the sums of inputs and in the packed weights.
    taps: &'a [[u32; 2]],
    sums: *const f32,
    /// Floats from one product's to the next one's: of sums of inputs, and of products.
    pitch: [usize; 2],
    /// Floats between patches.
    units: usize,
    packed: *const f32,
}

/// What of a leaf's outputs is stored.
struct Wanted {
    /// Floats between outputs.
    pitch: usize,
    /// Those of a row.
    across: Range<usize>,
    columns: usize,
}

impl ConvPlan {
    /// What a task of so many outputs along the last two dimensions needs.
    fn room(&self, rows: usize, columns: usize) -> Room {
        let patches = rows / 2 * (columns / 2);
        let several = self.leaves.nodes.iter().any(|n| n.len() > 1);
        Room {
            sums: self.planes * PRODUCTS * (patches * self.contracted.next_multiple_of(CHANNELS) + APART),
            products: PRODUCTS * (patches * self.width + APART),
            outputs: 4 * patches * self.width,
            depth: if several { self.leaves.depth } else { 0 },
        }
    }

    /// Rows and columns of a task's outputs.
    pub(super) fn choose_patches(&self, budget: usize) -> (usize, usize) {
        let even = |n: usize| n.next_multiple_of(2).max(2);
        let result = |rows: usize, columns: usize| match self.epilogue {
            Some(_) => rows * columns * self.produced,
            None => 0,
        };
        let fits = |rows: usize, columns: usize, staged: usize| {
            let room = self.room(rows, columns);
            room.sums <= staged && room.all() + result(rows, columns) <= budget
        };
        let (mut rows, mut columns) = (2, even(self.outputs[2]));
        while columns > 2 && !fits(rows, columns, STAGED) {
            columns = even(columns / 2);
        }
        assert!(fits(rows, columns, usize::MAX), "a convolution's sums of inputs do not fit into the workspace");
        let few = |rows: usize| rows * columns / 4 < PATCHES && fits(rows + 2, columns, usize::MAX);
        while rows < self.outputs[1] && (few(rows) || fits(rows + 2, columns, STAGED)) {
            rows += 2;
        }
        (rows, columns)
    }

    /// Packs the weights of a panel for a tap along the first dimension: a panel has them by product, tap and channel.
    pub(super) unsafe fn pack_products(&self, w: &Winograd, panel: usize, tap: usize, p: Pointers) {
        let size = self.contracted * self.width;
        // Some channels of windows, before their sums.
        let mut windows = [[[0.0f32; 32]; CHANNELS]; 9];
        let apart = windows[0].len() * windows[0][0].len();
        // SAFETY: panels lie one after another in the scratch; a window's element has room for some channels of a panel.
        unsafe {
            let to = p.scratch.add(panel * self.panel() + tap * size);
            for first in (0..self.contracted).step_by(CHANNELS) {
                let channels = first..(first + CHANNELS).min(self.contracted);
                for (k, to) in windows.iter_mut().enumerate() {
                    let tap = tap * 9 + if w.flipped { 8 - k } else { k };
                    self.pack_tap(p, 0, tap, channels.clone(), panel, to.as_mut_ptr().cast());
                }
                for at in (0..channels.len() * self.width).step_by(CHANNELS) {
                    let from = windows.as_ptr().cast::<f32>().add(at);
                    let to = to.add(first * self.width + at);
                    let to = Places { to, product: self.taps[0] * size, channels: 0, patch: 0, count: 1 };
                    minimal::window_sums(self.isa, from, apart, to);
                }
            }
        }
    }

    /// Computes a block of outputs; `place(r, row)` is where the first one of the `r`-th row goes.
    pub(super) unsafe fn filter(
        &self,
        w: &Winograd,
        at: &Outputs,
        range: &Range<usize>,
        p: Pointers,
        list: &mut [[u32; 2]],
        stage: &mut [f32],
        place: impl Fn(usize, usize) -> *mut f32,
    ) {
        let (units, width) = (self.contracted.next_multiple_of(CHANNELS), self.width);
        let block = Block::new(w, [&at.rows, range]);
        let taps = &self.axes[0].taps[at.o1];
        let room = self.room(self.block.0, self.block.1);
        let (sums, rest) = stage.split_at_mut(room.sums);
        let (products, stack) = rest.split_at_mut(room.products);
        let pitch = [block.patches() * units + APART, block.patches() * width + APART];
        debug_assert!(self.planes * PRODUCTS * pitch[0] <= sums.len() && PRODUCTS * pitch[1] <= products.len());
        let place_of = |s1: usize, i1: usize| {
            let place = if at.in_turns { i1 % self.planes } else { s1 };
            place * PRODUCTS * pitch[0]
        };
        // SAFETY: indices inside the held ranges, by the plan, and inside the parts of the workspace, by `room`.
        unsafe {
            for (s1, (j1, i1)) in taps.iter().enumerate() {
                if *i1 >= at.staged {
                    let to = sums[place_of(s1, *i1)..].as_mut_ptr();
                    let row = |i2: usize| self.x.row(p.inputs, at.batch, [*i1, i2]);
                    self.sum_inputs(w, &block, row, to, [pitch[0], units]);
                }
                list[s1] = [place_of(s1, *i1) as u32, (j1 * self.contracted * width) as u32];
            }
            let positions = self.x.batches() * self.outputs.iter().product::<usize>();
            for panel in 0..self.panels() {
                let columns = width.min(self.produced - panel * width);
                let factors = Factors {
                    one: &w.one,
                    taps: &list[..taps.len()],
                    sums: sums.as_ptr(),
                    pitch,
                    units,
                    packed: p.scratch.add(panel * self.panel()),
                };
                for (node, program) in self.leaves.nodes.iter().enumerate() {
                    let row = |r: usize| {
                        let r = r.checked_sub(block.outputs[0].start).filter(|r| *r < at.rows.len())?;
                        let first = place(r, at.rows.start + r).add(node * positions * self.produced + panel * width);
                        Some(first.wrapping_sub(block.outputs[1].start * self.produced))
                    };
                    let [across, all] = [block.outputs[1].clone(), 0..2 * block.counts[1]];
                    if let [Combine::Leaf(l)] = program[..] {
                        let to = |r| row(r).unwrap_or(std::ptr::null_mut());
                        self.leaf(l, &factors, &block, products, to, Wanted { pitch: self.produced, across, columns });
                        continue;
                    }
                    // Outputs of leaves, all of their patches, on a stack.
                    let mut top = 0;
                    for c in program {
                        match *c {
                            Combine::Leaf(l) => {
                                let first = stack[top * room.outputs..].as_mut_ptr();
                                let to = |r| first.wrapping_add(r * all.end * width);
                                let wanted = Wanted { pitch: width, across: all.clone(), columns: width };
                                self.leaf(l, &factors, &block, products, to, wanted);
                                top += 1;
                            }
                            Combine::Add => {
                                top -= 1;
                                let (a, b) = stack.split_at_mut(top * room.outputs);
                                let a = a[(top - 1) * room.outputs..].as_mut_ptr();
                                tile::add(self.isa, a, b.as_ptr(), 4 * block.patches() * width);
                            }
                        }
                    }
                    for (r, to) in block.outputs[0].clone().filter_map(|r| Some((r, row(r)?))) {
                        for c in across.clone() {
                            let from = stack[(r * all.end + c) * width..].as_ptr();
                            std::ptr::copy_nonoverlapping(from, to.wrapping_add(c * self.produced), columns);
                        }
                    }
                }
            }
        }
    }

    /// Computes a leaf's part of the outputs of a panel; `to(r)` is where the `r`-th row of the block goes, null if it is not
    /// wanted.
    unsafe fn leaf(
        &self,
        leaf: usize,
        f: &Factors,
        block: &Block,
        products: &mut [f32],
        to: impl Fn(usize) -> *mut f32,
        wanted: Wanted,
    ) {
        // SAFETY: by the contract of `run`; products have room, by `room`.
        unsafe {
            for i in 0..PRODUCTS {
                let tile = Tile {
                    x: f.sums.add(i * f.pitch[0]),
                    pairs: false,
                    pitch: f.units,
                    step: 1,
                    taps: f.taps,
                    channels: std::slice::from_ref(&self.channels[leaf]),
                    w: f.packed.add(i * self.taps[0] * self.contracted * self.width),
                    nodes: f.one,
                    goes_on: false,
                    out: products[i * f.pitch[1]..].as_mut_ptr(),
                    out_pitch: self.width,
                    node_pitch: 0,
                    columns: self.width,
                };
                tile::run(self.isa, self.width, tile, block.patches());
            }
            for r in 0..block.counts[0] {
                let Wanted { pitch, across, columns } = &wanted;
                let to = [to(2 * r), to(2 * r + 1)];
                let to = Rows { to, pitch: *pitch, outputs: across.clone(), columns: *columns };
                let from = products[r * block.counts[1] * self.width..].as_ptr();
                minimal::outputs(self.isa, from, self.width, f.pitch[1], to);
            }
        }
    }

    /// `B' d B` of the patches of a plane, of which `row` gives the first element held of each row; zeros for what wanted outputs
    /// do not read.
    unsafe fn sum_inputs(
        &self,
        w: &Winograd,
        block: &Block,
        row: impl Fn(usize) -> *const u8,
        to: *mut f32,
        [product, patch]: [usize; 2],
    ) {
        let [along, across] = &w.along;
        let origin = [along.base + block.first[0], across.base + block.first[1]];
        let inside = |from: isize, n: usize| (from.max(0) as usize).min(n);
        let read = block.read(1);
        // The columns of the input that are read, counted likewise.
        let end = read.end.min(inside(across.whole as isize - origin[1], read.end));
        let columns = read.start.max(inside(-origin[1], end))..end;
        let before = (origin[1] - across.held.start as isize) * across.stride as isize + self.x_channel as isize;
        let before = before * self.dtype.bytes() as isize;
        for patches in 0..block.counts[0] {
            let mut rows = [std::ptr::null(); 4];
            for (r, to) in rows.iter_mut().enumerate() {
                let (at, i) = (2 * patches + r, origin[0] + (2 * patches + r) as isize);
                if block.read(0).contains(&at) && (0..along.whole as isize).contains(&i) {
                    *to = row(i as usize - along.held.start).wrapping_offset(before);
                }
            }
            let from = Patches::new(self.dtype, rows, across.stride, columns.clone(), self.contracted);
            let to = to.wrapping_add(patches * block.counts[1] * patch);
            let to = Places { to, product, channels: CHANNELS, patch, count: block.counts[1] };
            // SAFETY: what is read is held; the sums have room, by `room`.
            unsafe { minimal::input_sums(self.isa, from, to) };
        }
    }
}
