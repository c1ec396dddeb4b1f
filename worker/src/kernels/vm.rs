//! The machine that evaluates fused bodies: block after block of points through registers of 32-bit lanes that stay in
//! the first-level cache. One instruction is one tight loop over the block; with AVX-512 most of a body is one loop, compiled
//! when the machine is prepared ([`super::native`]).
//!
//! Roofline: a chain of `n` instructions over `p` points costs about `n * p / 16` vector operations and the bytes of its
//! operands and results.

use super::isa::Isa;
use super::lanes::{Mode, Operand, binary, cast, compare, constant, load, random, select, store, unary};
use super::native::{LANES, Moving, Native, Order, Origin, TABLE};
use mesh::body::{Body, Instr, Loop, MAX_INSTRS};
use mesh::dim::DType;
use mesh::rng::Stream;

/// Points of a block.
pub const BLOCK: usize = 512;

/// Loops that a nest has at most.
pub const LOOPS: usize = 16;

/// What a run of a function is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepContext {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the step.
    pub step: u32,
    /// By loop of the nest that is run: how much further on it begins than it says, for a slice of a band.
    pub further: [usize; LOOPS],
}

impl StepContext {
    /// Of whole steps.
    pub const fn new(seed: u64, step: u32) -> StepContext {
        StepContext { seed, step, further: [0; LOOPS] }
    }
}

/// What a value depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Depends {
    /// Nothing: it is the same at every point.
    Uniform,
    /// The position along the innermost loop.
    Fixed,
    /// More than that.
    Moving,
}

/// What a body's last operand is, and what becomes of its results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Whether the last operand does not lie in memory: each block is given its elements.
    pub given: bool,
    /// How many of the results, the last ones, the caller sums up; the others are stored.
    pub summed: usize,
}

/// A body prepared for evaluation over a loop nest, whose last two loops make the rows and columns of blocks.
pub struct Machine {
    isa: Isa,
    /// How many of the results, the first ones, are stored; the others are summed up.
    stored: usize,
    /// Extents of the loops, at least two.
    pub extents: Vec<usize>,
    origin: Vec<usize>,
    /// By loop of the nest: which loop of these it became a part of, and by how much that goes on with each of its points.
    within: Vec<(usize, usize)>,
    operands: Vec<Operand>,
    instrs: Vec<(Instr, DType, usize)>,
    /// Instructions by what their values depend on.
    uniform: Vec<usize>,
    fixed: Vec<usize>,
    moving: Vec<usize>,
    /// What comes after those, if it could be compiled.
    native: Option<Native>,
    registers: usize,
    /// Values that are the results.
    pub results: Vec<(usize, DType)>,
}

/// A thread's evaluation of a machine, block after block, over one set of operands.
pub struct Evaluation<'a> {
    machine: &'a Machine,
    cx: StepContext,
    /// Global index of each loop's first point.
    origin: [usize; LOOPS],
    operands: &'a [*const u8],
    registers: &'a mut [f32],
    /// Where each value of the block lies.
    pointers: [*const u32; MAX_INSTRS],
    /// Whether the uniform values are there.
    uniform: bool,
    /// The first column, the columns and the rows for which the fixed values are there.
    fixed: (usize, usize, usize),
    /// The block's elements of an operand behind those in memory.
    given: *const u32,
    /// What compiled code is told of its inputs and results.
    table: [usize; 2 * TABLE],
}

impl Machine {
    /// Prepares a body. Loops are collapsed where `may_collapse(i)` allows loops `i` and `i + 1` to become one; how many
    /// each of those that remain stands for is given as well.
    pub fn new(nest: &Loop, isa: Isa, of: Use, may_collapse: impl Fn(usize) -> bool) -> (Machine, Vec<usize>) {
        assert!(nest.body.instrs.len() <= MAX_INSTRS, "a fused body of {} instructions", nest.body.instrs.len());
        let mut extents = nest.extents.clone();
        let mut origin = nest.origin.clone();
        let mut operands: Vec<(DType, usize, Vec<usize>)> =
            nest.operands.iter().map(|o| (o.dtype, o.offset, o.strides.clone())).collect();
        let (mut instrs, results) = simplified(&nest.body);
        // Which original loops each remaining one stands for: the number of them.
        let mut merged = vec![1; extents.len()];
        let mut first: Vec<usize> = (0..extents.len()).collect();
        let mut within: Vec<(usize, usize)> = (0..extents.len()).map(|l| (l, 1)).collect();
        let mut i = 0;
        while i + 1 < extents.len() {
            let inner = extents[i + 1];
            let last = first[i] + merged[i] - 1;
            let fits = may_collapse(last)
                && operands.iter().all(|(_, _, s)| s[i] == s[i + 1] * inner)
                && instrs.iter().all(|(instr, _)| match instr {
                    Instr::Index { dim } => *dim != i && *dim != i + 1,
                    Instr::Random { strides, .. } => strides[i] == strides[i + 1] * inner as u64,
                    _ => true,
                });
            if !fits {
                i += 1;
                continue;
            }
            // The collapsed loop's origin is only used for random strides, where it adds up to the same index.
            origin[i] = origin[i] * inner + origin[i + 1];
            extents[i] *= inner;
            merged[i] += merged[i + 1];
            for (l, step) in within.iter_mut().filter(|(l, _)| *l >= i) {
                *step *= if *l == i { inner } else { 1 };
                *l -= usize::from(*l > i);
            }
            operands.iter_mut().for_each(|(_, _, s)| {
                s.remove(i);
            });
            for (instr, _) in &mut instrs {
                match instr {
                    Instr::Index { dim } if *dim > i => *dim -= 1,
                    Instr::Random { strides, .. } => {
                        strides.remove(i);
                    }
                    _ => {}
                }
            }
            for list in [&mut extents, &mut origin, &mut merged, &mut first] {
                list.remove(i + 1);
            }
        }
        while extents.len() < 2 {
            extents.insert(0, 1);
            origin.insert(0, 0);
            merged.insert(0, 0);
            within.iter_mut().for_each(|(l, _)| *l += 1);
            operands.iter_mut().for_each(|(_, _, s)| s.insert(0, 0));
            for (instr, _) in &mut instrs {
                match instr {
                    Instr::Index { dim } => *dim += 1,
                    Instr::Random { strides, .. } => strides.insert(0, 0),
                    _ => {}
                }
            }
        }
        let d = extents.len();
        let in_memory = operands.len() - usize::from(of.given);
        let operands: Vec<Operand> = operands
            .into_iter()
            .enumerate()
            .map(|(i, (dtype, offset, mut strides))| {
                strides.iter_mut().zip(&extents).filter(|(_, n)| **n <= 1).for_each(|(s, _)| *s = 0);
                let (rows, columns) = (strides[d - 2], strides[d - 1]);
                let n = extents[d - 1];
                let mode = match (rows, columns) {
                    _ if i >= in_memory => Mode::Given,
                    (0, 0) => Mode::Splat,
                    // Of longer rows a block has one at a time.
                    (r, 1) if r == n || extents[d - 2] == 1 || n > BLOCK => Mode::Contiguous,
                    (_, 0) if n > BLOCK => Mode::Splat,
                    (0, 1) => Mode::SameRow,
                    _ => Mode::Strided,
                };
                Operand { dtype, offset, strides, mode }
            })
            .collect();
        let mut depends = dependence(&instrs, &operands, extents.len() - 1);
        if extents[d - 1] > BLOCK {
            // Every block has other columns.
            depends.iter_mut().filter(|d| **d == Depends::Fixed).for_each(|d| *d = Depends::Moving);
        }
        let results: Vec<(usize, DType)> =
            results.into_iter().zip(&nest.body.results).map(|(r, of)| (r, nest.body.instrs[*of].1)).collect();
        let stored = results.len() - of.summed;
        let [uniform, moving] =
            [Depends::Uniform, Depends::Moving].map(|d| depends.iter().map(|of| *of == d).collect::<Vec<_>>());
        let source = Moving {
            isa,
            instrs: &instrs,
            operands: &operands,
            moving: &moving,
            uniform: &uniform,
            results: &results,
            stored,
            columns: extents[d - 1],
        };
        let compiled = if isa >= Isa::Avx512 { source.compile() } else { None };
        let (native, before) = compiled.map_or((None, vec![true; instrs.len()]), |(n, before)| (Some(n), before));
        // A result that is merely loaded is copied to a register first: its memory may be another result's.
        let mut operands = operands;
        for (r, _) in results.iter().filter(|_| native.is_none() && stored > 0) {
            if let Instr::Load(o) = instrs[*r].0
                && operands[o].mode != Mode::Given
            {
                operands[o].mode = Mode::Strided;
            }
        }
        let place = |i: usize| match (&native, before[i]) {
            (None, _) if depends[i] == Depends::Moving => Place::Shared,
            (_, true) => Place::Own,
            _ if results[stored..].iter().any(|r| r.0 == i) => Place::Own,
            _ => Place::None,
        };
        let places: Vec<Place> = (0..instrs.len()).map(place).collect();
        let (instrs, registers) = allocate(instrs, &results, &places);
        let by = |d: Depends| (0..instrs.len()).filter(|i| depends[*i] == d && before[*i]).collect();
        let [uniform, fixed, moving] = [Depends::Uniform, Depends::Fixed, Depends::Moving].map(by);
        let machine = Machine {
            isa,
            stored,
            extents,
            origin,
            within,
            operands,
            instrs,
            uniform,
            fixed,
            moving,
            native,
            registers,
            results,
        };
        (machine, merged)
    }

    /// Whether every result is the operand that blocks are given, at most in fewer bits.
    pub fn only_given(&self) -> bool {
        self.summed().is_empty()
            && self.results.iter().all(|(r, _)| match self.instrs[*r].0 {
                Instr::Load(o) => self.operands[o].mode == Mode::Given,
                _ => false,
            })
    }

    /// The values that are summed up.
    pub fn summed(&self) -> &[(usize, DType)] {
        &self.results[self.stored..]
    }

    /// Floats of workspace that evaluation needs.
    pub fn workspace(&self) -> usize {
        self.registers * BLOCK
    }

    /// Rows that fit into a block of whole rows; 1 if a row is longer than a block.
    pub fn rows_per_block(&self) -> usize {
        (BLOCK / self.extents[self.extents.len() - 1].max(1)).max(1)
    }

    /// Begins an evaluation with registers of at least [`Machine::workspace`] floats.
    ///
    /// # Safety
    /// Until the evaluation ends, `operands` are buffers that hold what the loop nest's accesses reach, not written
    /// except as [`super::map::MapPlan::run`] allows. An epilogue's last operand lacks.
    pub unsafe fn evaluation<'a>(
        &'a self,
        cx: StepContext,
        operands: &'a [*const u8],
        registers: &'a mut [f32],
    ) -> Evaluation<'a> {
        assert!(registers.len() >= self.workspace());
        let pointers = [std::ptr::null(); MAX_INSTRS];
        let mut origin = [0; LOOPS];
        origin.iter_mut().zip(&self.origin).for_each(|(o, first)| *o = *first);
        self.within.iter().zip(&cx.further).for_each(|((l, step), n)| origin[*l] += n * step);
        Evaluation {
            machine: self,
            cx,
            origin,
            operands,
            registers,
            pointers,
            uniform: false,
            fixed: (0, 0, 0),
            given: std::ptr::null(),
            table: [0; 2 * TABLE],
        }
    }
}

impl Evaluation<'_> {
    /// Evaluates `rows x columns` points (at most [`BLOCK`]) from the point `at` (local loop indices) on; more than one row
    /// only of whole rows. What is to be summed up waits in registers; the other results are stored where they lie in `to`.
    ///
    /// # Safety
    /// The results that are stored have room for every point, and no operand's memory that is still to be read lies there.
    pub unsafe fn block(&mut self, at: &[usize], rows: usize, columns: usize, to: &[*mut u8]) {
        let (m, n) = (self.machine, rows * columns);
        assert!(to.len() == m.stored, "as many places as results that are stored");
        self.begin(at, rows, columns);
        let (stored, summed) = m.results.split_at(m.stored);
        let first = at.iter().zip(&m.extents).fold(0, |i, (a, e)| i * e + a);
        // SAFETY: by this function's contract.
        let places = to.iter().zip(stored).map(|(to, (_, dtype))| unsafe { to.add(first * dtype.bytes()) });
        let Some(native) = &m.native else {
            for (to, (slot, dtype)) in places.zip(stored) {
                // SAFETY: as above. All operands of a block are read before its results are stored: what is merely loaded has
                // a register of its own.
                unsafe { store(m.isa, *dtype, self.pointers[*slot], to, n) };
            }
            return;
        };
        let base = self.registers.as_mut_ptr().cast::<u32>();
        // SAFETY: a result that is summed up has a register of its own.
        let register = |r: usize| unsafe { base.add(m.instrs[r].2 * BLOCK) };
        let results = places.chain(summed.iter().map(|(r, _)| register(*r).cast()));
        // SAFETY: registers have room for a block, and results by this function's contract.
        unsafe { self.compiled(native, at, [rows, columns], results) };
        // Only now: what was merely loaded may have lain where the operand lies.
        summed.iter().for_each(|(r, _)| self.pointers[*r] = register(*r));
    }

    /// Evaluates what the machine computes of a block.
    fn begin(&mut self, at: &[usize], rows: usize, columns: usize) {
        assert!(rows * columns <= BLOCK);
        let m = self.machine;
        if !self.uniform {
            self.uniform = true;
            self.run(&m.uniform, at, 1, BLOCK);
        }
        let column = at[at.len() - 1];
        if self.fixed.0 != column || self.fixed.1 != columns || self.fixed.2 < rows {
            self.fixed = (column, columns, rows);
            self.run(&m.fixed, at, rows, columns);
        }
        if !m.moving.is_empty() {
            self.run(&m.moving, at, rows, columns);
        }
    }

    /// Runs the compiled part over a block.
    ///
    /// # Safety
    /// The results have room for the block.
    unsafe fn compiled(
        &mut self,
        native: &Native,
        at: &[usize],
        [rows, columns]: [usize; 2],
        results: impl Iterator<Item = *mut u8>,
    ) {
        // It counts rows down to none.
        if rows * columns == 0 {
            return;
        }
        let m = self.machine;
        let (entries, inputs) = (native.bytes.len(), native.inputs.len());
        let (pointers, further) = self.table[..2 * entries].split_at_mut(entries);
        let by_columns = native.order == Order::ByColumns;
        // From a row to the next one, or from sixteen columns to the next ones.
        let ahead = |row: usize, bytes: usize| if by_columns { LANES * bytes } else { row * bytes };
        for (i, input) in native.inputs.iter().enumerate() {
            let bytes = native.bytes[i];
            (pointers[i], further[i]) = match *input {
                Origin::Register(r) => (self.pointers[r].expose_provenance(), ahead(columns, bytes)),
                Origin::Uniform(r) => (self.pointers[r].expose_provenance(), 0),
                Origin::Operand(o) if m.operands[o].mode == Mode::Given => {
                    (self.given.expose_provenance(), ahead(columns, bytes))
                }
                Origin::Operand(o) => {
                    let operand = &m.operands[o];
                    // SAFETY: by the contract of `Machine::evaluation` the operand's buffer holds every element of the block.
                    let first = unsafe { self.operands[o].add(operand.at(at) * bytes) };
                    let step = if operand.mode == Mode::Splat { 0 } else { ahead(operand.along()[0], bytes) };
                    (first.expose_provenance(), step)
                }
            };
        }
        for (i, r) in (inputs..entries).zip(results) {
            (pointers[i], further[i]) = (r.expose_provenance(), ahead(columns, native.bytes[i]));
        }
        let table = &mut self.table[..2 * entries];
        // SAFETY: inputs and results have as many elements; the machine has the instruction set it was prepared for.
        unsafe {
            match native.order {
                Order::AtOnce => native.run(table, [1, rows * columns]),
                Order::ByRows => native.run(table, [rows, columns]),
                Order::ByColumns if columns == m.extents[m.extents.len() - 1] => {
                    native.run(table, [columns.div_ceil(LANES), rows * columns]);
                }
                // Of a part of a row sixteen lanes at a time.
                Order::ByColumns => {
                    for first in (0..columns).step_by(LANES) {
                        let mut part = [0; 2 * TABLE];
                        part[..entries].copy_from_slice(&table[..entries]);
                        part[..entries]
                            .iter_mut()
                            .zip(&table[entries..])
                            .for_each(|(p, step)| *p += first / LANES * step);
                        native.run(&mut part[..2 * entries], [1, LANES.min(columns - first)]);
                    }
                }
            }
        }
    }

    /// Runs some of the instructions. What each does to its lanes is a function of its own: otherwise the constants of all
    /// of them would be set up for every block.
    fn run(&mut self, list: &[usize], at: &[usize], rows: usize, columns: usize) {
        let n = rows * columns;
        let (m, isa, cx) = (self.machine, self.machine.isa, self.cx);
        let base = self.registers.as_mut_ptr().cast::<u32>();
        let d = m.extents.len();
        for &i in list {
            let (instr, dtype, register) = &m.instrs[i];
            // SAFETY: registers are BLOCK lanes each, and n <= BLOCK.
            let out = unsafe { std::slice::from_raw_parts_mut(base.add(register * BLOCK), n) };
            let pointers = &mut self.pointers;
            pointers[i] = out.as_ptr();
            // SAFETY: every argument is an earlier instruction, whose pointer is set to n valid lanes.
            let lanes = |a: usize| unsafe { std::slice::from_raw_parts(pointers[a], n) };
            match instr {
                Instr::Load(o) if m.operands[*o].mode == Mode::Given => pointers[i] = self.given,
                Instr::Load(o) => {
                    let operand = &m.operands[*o];
                    // SAFETY: by the contract of `Machine::evaluation` the operand's buffer holds every element of the block.
                    pointers[i] = unsafe { load(isa, operand, self.operands[*o], operand.at(at), rows, columns, out) };
                }
                Instr::Constant(c) => out.fill(constant(*c, *dtype)),
                Instr::Step => out.fill(cx.step),
                Instr::Index { dim } => {
                    let first = (self.origin[*dim] + at[*dim]) as u32;
                    for (r, row) in out.chunks_exact_mut(columns.max(1)).enumerate() {
                        match d - dim {
                            1 => row.iter_mut().zip(first..).for_each(|(o, i)| *o = i),
                            2 => row.fill(first + r as u32),
                            _ => row.fill(first),
                        }
                    }
                }
                Instr::Random { distribution, key, strides } => {
                    let stream = Stream { seed: cx.seed, step: cx.step, key: *key };
                    let start: u64 = (0..d).map(|l| (self.origin[l] + at[l]) as u64 * strides[l]).sum();
                    for (r, row) in out.chunks_mut(columns.max(1)).enumerate() {
                        random(isa, stream, *distribution, start + r as u64 * strides[d - 2], strides[d - 1], row);
                    }
                }
                Instr::Unary(f, a) => unary(isa, *f, *dtype, lanes(*a), out),
                Instr::Binary(f, a, b) => binary(isa, *f, *dtype, lanes(*a), lanes(*b), out),
                Instr::Compare(f, a, b) => compare(isa, *f, m.instrs[*a].1, lanes(*a), lanes(*b), out),
                Instr::Select(c, a, b) => select(isa, lanes(*c), lanes(*a), lanes(*b), out),
                Instr::Cast(a) => cast(isa, m.instrs[*a].1, *dtype, lanes(*a), out),
            }
        }
    }

    /// Where the next block's elements of the operand behind those in memory lie, one after the other, as lanes.
    pub fn give(&mut self, elements: *const u32) {
        self.given = elements;
    }

    /// The lanes of a result of the last block, as many as it had points.
    pub fn pointer(&self, slot: usize) -> *const u32 {
        self.pointers[slot]
    }
}

/// What each instruction's value depends on.
fn dependence(instrs: &[(Instr, DType)], operands: &[Operand], innermost: usize) -> Vec<Depends> {
    let mut depends: Vec<Depends> = Vec::with_capacity(instrs.len());
    for (instr, _) in instrs {
        depends.push(match instr {
            Instr::Constant(_) | Instr::Step => Depends::Uniform,
            Instr::Load(o) if operands[*o].mode == Mode::Splat && operands[*o].strides.iter().all(|s| *s == 0) => {
                Depends::Uniform
            }
            Instr::Load(o) if operands[*o].mode == Mode::Given => Depends::Moving,
            Instr::Load(o) if operands[*o].strides[..innermost].iter().all(|s| *s == 0) => Depends::Fixed,
            Instr::Index { dim } if *dim == innermost => Depends::Fixed,
            Instr::Load(_) | Instr::Index { .. } | Instr::Random { .. } => Depends::Moving,
            Instr::Unary(..) | Instr::Binary(..) | Instr::Compare(..) | Instr::Select(..) | Instr::Cast(_) => {
                arguments(instr).into_iter().map(|a| depends[a]).max().unwrap_or(Depends::Uniform)
            }
        });
    }
    depends
}

/// A body without the casts that change no lane: a 16-bit float is held as the `f32` that it is, and what stores a result
/// rounds it. Its instructions and, for each result, that which computes it.
fn simplified(body: &Body) -> (Vec<(Instr, DType)>, Vec<usize>) {
    let dtype = |i: usize| body.instrs[i].1;
    let mut same: Vec<usize> = Vec::with_capacity(body.instrs.len());
    for (i, (instr, to)) in body.instrs.iter().enumerate() {
        same.push(match *instr {
            Instr::Cast(a) if dtype(a) == *to || dtype(a).is_half() && *to == DType::F32 => same[a],
            _ => i,
        });
    }
    let mut uses = vec![0usize; body.instrs.len()];
    (0..body.instrs.len()).filter(|i| same[*i] == *i).for_each(|i| {
        arguments(&body.instrs[i].0).into_iter().for_each(|a| uses[same[a]] += 1);
    });
    let sources: Vec<usize> = body
        .results
        .iter()
        .map(|&r| match body.instrs[same[r]].0 {
            Instr::Cast(a) if uses[same[r]] == 0 && dtype(a) == DType::F32 && dtype(r).is_half() => same[a],
            _ => same[r],
        })
        .collect();
    let mut needed = vec![false; body.instrs.len()];
    sources.iter().for_each(|&s| needed[s] = true);
    for i in (0..needed.len()).rev().filter(|i| same[*i] == *i) {
        if needed[i] {
            arguments(&body.instrs[i].0).into_iter().for_each(|a| needed[same[a]] = true);
        }
    }
    let mut place = vec![0; needed.len()];
    let mut instrs = Vec::with_capacity(needed.len());
    for (i, (instr, dtype)) in body.instrs.iter().enumerate().filter(|(i, _)| needed[*i]) {
        place[i] = instrs.len();
        let at = |a: usize| place[same[a]];
        let instr = match instr {
            Instr::Unary(f, a) => Instr::Unary(*f, at(*a)),
            Instr::Cast(a) => Instr::Cast(at(*a)),
            Instr::Binary(f, a, b) => Instr::Binary(*f, at(*a), at(*b)),
            Instr::Compare(f, a, b) => Instr::Compare(*f, at(*a), at(*b)),
            Instr::Select(a, b, c) => Instr::Select(at(*a), at(*b), at(*c)),
            leaf => leaf.clone(),
        };
        instrs.push((instr, *dtype));
    }
    (instrs, sources.into_iter().map(|s| place[s]).collect())
}

/// Where an instruction's value is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a register that is another value's before and after.
    Shared,
    /// In a register of its own.
    Own,
    /// In none: compiled code has it.
    None,
}

/// Gives instructions registers such that values that are alive together have different ones.
fn allocate(
    instrs: Vec<(Instr, DType)>,
    results: &[(usize, DType)],
    places: &[Place],
) -> (Vec<(Instr, DType, usize)>, usize) {
    let mut last: Vec<usize> = (0..instrs.len()).collect();
    for (i, (instr, _)) in instrs.iter().enumerate() {
        for a in arguments(instr) {
            last[a] = i;
        }
    }
    results.iter().for_each(|(r, _)| last[*r] = instrs.len());
    (0..instrs.len()).filter(|i| places[*i] != Place::Shared).for_each(|i| last[i] = instrs.len());
    let mut free: Vec<usize> = Vec::new();
    let mut count = 0;
    let mut register = vec![0; instrs.len()];
    let mut out = Vec::with_capacity(instrs.len());
    for (i, (instr, dtype)) in instrs.into_iter().enumerate() {
        // A register of its own has its value before others are computed, whatever its place.
        let reused = if places[i] == Place::Shared { free.pop() } else { None };
        register[i] = match (places[i], reused) {
            (Place::None, _) => 0,
            (_, Some(register)) => register,
            (_, None) => {
                count += 1;
                count - 1
            }
        };
        // An argument's register is free for the instructions after the one that uses it last.
        let mut ended: Vec<usize> = arguments(&instr).into_iter().filter(|&a| last[a] == i).collect();
        ended.sort_unstable();
        ended.dedup();
        free.extend(ended.into_iter().map(|a| register[a]));
        if last[i] == i {
            free.push(register[i]);
        }
        out.push((instr, dtype, register[i]));
    }
    (out, count)
}

/// The instructions whose values one reads.
pub(super) fn arguments(instr: &Instr) -> Vec<usize> {
    match instr {
        Instr::Load(_) | Instr::Constant(_) | Instr::Step | Instr::Index { .. } | Instr::Random { .. } => vec![],
        Instr::Unary(_, a) | Instr::Cast(a) => vec![*a],
        Instr::Binary(_, a, b) | Instr::Compare(_, a, b) => vec![*a, *b],
        Instr::Select(a, b, c) => vec![*a, *b, *c],
    }
}
