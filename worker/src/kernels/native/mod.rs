//! Fused bodies as machine code: the instructions of a body that stand in its innermost loop, compiled for AVX-512 when the
//! kernel is prepared.
//!
//! What cannot be compiled (operands that lie strided, random numbers, division of integers), and what only depends on that,
//! is computed by the machine of [`super::vm`] before, block by block, and read from its registers. Other instruction sets, and
//! systems on which memory cannot be made executable, leave everything to that machine. The bits are the same: both run
//! the functions of [`super::math`].
//!
//! Roofline: operands and results pass the memory or a cache once; 2 vectors an instruction cycle in between, which
//! leaves most bodies bound by memory.

mod emit;
mod tape;

use super::isa::Isa;
use super::lanes::{Mode, Operand};
use super::math::{self, Real};
use emit::{Code, Format, Source};
use mesh::body::Instr;
use mesh::dim::DType;
use mesh::ops::binary::BinaryFn;
use mesh::ops::compare::CompareFn;
use mesh::ops::unary::UnaryFn;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tape::{One, Op, Recorded, Tape, Test, Two, Value};

/// Where an input of compiled code lies.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// An operand's elements.
    Operand(usize),
    /// What an instruction of the machine has computed.
    Register(usize),
    /// The same, where all lanes are alike.
    Uniform(usize),
}

/// The compiled part of a body.
pub struct Native {
    code: Arc<Code>,
    /// What the table of pointers begins with; the results follow.
    pub inputs: Vec<Origin>,
    /// Bytes of an element of each input in memory, and then of each result.
    pub bytes: Vec<usize>,
    /// How it goes through a block.
    pub order: Order,
}

/// How compiled code goes through a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As one row.
    AtOnce,
    /// Row by row.
    ByRows,
    /// Sixteen columns of all rows, and then the next ones: what is the same in every row stays in registers.
    ByColumns,
}

impl Native {
    /// Runs it over rows of lanes.
    ///
    /// # Safety
    /// As for [`Code::run`].
    pub unsafe fn run(&self, table: &mut [usize], shape: [usize; 2]) {
        // SAFETY: by this function's contract.
        unsafe { self.code.run(table, shape) }
    }
}

/// Compiled so far: layers that are alike, and devices, share code.
static COMPILED: Mutex<Option<HashMap<Source, Arc<Code>>>> = Mutex::new(None);

/// What to compile a body's moving instructions from.
pub struct Moving<'a> {
    /// The machine's instruction set.
    pub isa: Isa,
    /// All instructions.
    pub instrs: &'a [(Instr, DType)],
    /// The operands.
    pub operands: &'a [Operand],
    /// Which instructions are moving, and which are the same at every point.
    pub moving: &'a [bool],
    /// Of those that are not moving, which are the same at every point.
    pub uniform: &'a [bool],
    /// The results, and their dtypes.
    pub results: &'a [(usize, DType)],
    /// How many of the results, the first ones, are stored as elements of their dtypes; the others as lanes.
    pub stored: usize,
    /// Points along the innermost loop.
    pub columns: usize,
}

/// Points of a row at least for a block to go row by row, and at most to go by columns: a block of these has more rows than a
/// row has vectors.
const LONG: usize = 32;
const SHORT: usize = 32;
/// Lanes of a vector.
pub const LANES: usize = 16;

impl Moving<'_> {
    /// The compiled code, and by instruction whether the machine still has to compute it. None if nothing can be compiled.
    pub fn compile(&self) -> Option<(Native, Vec<bool>)> {
        let order = self.order();
        let before = self.before(order);
        let tape = Tape::new(self.isa.pairs());
        let lowering = Lowering { of: self, order, before: &before, tape, formats: vec![], inputs: vec![] };
        let (source, inputs) = lowering.source();
        let entries = inputs.len() + source.results.len();
        // What only stores values that the machine has computed gains nothing, nor what only loads them.
        let computes = source.ops.iter().any(|op| !emit::arguments(op).is_empty());
        let copies = self.stored > 0 && inputs.iter().any(|i| matches!(i, Origin::Operand(_)));
        if entries > TABLE || !computes && !copies {
            return None;
        }
        let element = |from: &Origin| match from {
            Origin::Operand(o) if self.operands[*o].mode != Mode::Given => self.operands[*o].dtype.bytes(),
            _ => 4,
        };
        let stored = |(r, (_, dtype)): (usize, &(usize, DType))| if r < self.stored { dtype.bytes() } else { 4 };
        let bytes = inputs.iter().map(element).chain(self.results.iter().enumerate().map(stored)).collect();
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        let compiled = compiled.get_or_insert_default();
        let code = match compiled.get(&source) {
            Some(code) => code.clone(),
            None => {
                let code = Arc::new(emit::compile(&source)?);
                compiled.insert(source, code.clone());
                code
            }
        };
        Some((Native { code, inputs, bytes, order }, before))
    }

    /// How the code is to go through a block.
    fn order(&self) -> Order {
        let moving = || (0..self.instrs.len()).filter(|i| self.moving[*i]);
        let fits = LANES.is_multiple_of(self.columns.max(1)) || self.columns.is_multiple_of(LANES);
        let repeats = |i: usize| !self.moving[i] && !self.uniform[i];
        let gains = |i: usize| self.repeats(i) || super::vm::arguments(&self.instrs[i].0).into_iter().any(repeats);
        let needs_rows = |i: usize| self.needs_rows(i) && !self.repeats(i);
        let long = self.columns >= LONG;
        if fits && self.columns <= SHORT && moving().any(gains) && !(long && moving().any(needs_rows)) {
            Order::ByColumns
        } else if long && moving().any(|i| self.needs_rows(i)) {
            Order::ByRows
        } else {
            Order::AtOnce
        }
    }

    /// Whether an instruction loads the same for each row of a block, as the lanes it is.
    fn repeats(&self, i: usize) -> bool {
        let Instr::Load(o) = self.instrs[i].0 else { return false };
        let operand = &self.operands[o];
        let lies = operand.mode == Mode::SameRow && self.columns.is_multiple_of(LANES);
        lies && matches!(operand.dtype, DType::F32 | DType::I32)
    }

    /// Whether an instruction loads what can only be compiled row by row, or by columns.
    fn needs_rows(&self, i: usize) -> bool {
        let Instr::Load(o) = self.instrs[i].0 else { return false };
        let operand = &self.operands[o];
        let [rows, columns] = operand.along();
        match operand.mode {
            Mode::SameRow => true,
            Mode::Strided => columns == 1 || (columns == 0 && rows > 0 && operand.dtype != DType::Bool),
            Mode::Contiguous | Mode::Splat | Mode::Given => false,
        }
    }

    /// Which instructions the machine computes: those that are not moving, that cannot be compiled, and what these need.
    fn before(&self, order: Order) -> Vec<bool> {
        let so = |i: usize| match order {
            Order::AtOnce => false,
            Order::ByRows => self.needs_rows(i),
            Order::ByColumns => self.repeats(i),
        };
        let compiled = |i: usize| self.moving[i] && (self.can_be_compiled(i) || so(i));
        let mut before: Vec<bool> = (0..self.instrs.len()).map(|i| !compiled(i)).collect();
        for i in (0..before.len()).rev().filter(|i| self.moving[*i]).collect::<Vec<_>>() {
            if before[i] {
                super::vm::arguments(&self.instrs[i].0).into_iter().for_each(|a| before[a] = true);
            }
        }
        before
    }

    fn can_be_compiled(&self, i: usize) -> bool {
        let (instr, dtype) = &self.instrs[i];
        match instr {
            Instr::Load(o) => match self.operands[*o].mode {
                Mode::Contiguous | Mode::Given => true,
                Mode::Splat => self.operands[*o].dtype != DType::Bool,
                Mode::SameRow | Mode::Strided => false,
            },
            Instr::Constant(_) | Instr::Select(..) | Instr::Compare(..) => true,
            Instr::Step | Instr::Index { .. } | Instr::Random { .. } => false,
            Instr::Unary(f, _) => dtype.is_float() || matches!(f, UnaryFn::Identity | UnaryFn::Not | UnaryFn::Neg),
            Instr::Binary(f, ..) => dtype.is_float() || !matches!(f, BinaryFn::Div | BinaryFn::Rem | BinaryFn::Pow),
            // To integers Rust's casts mind what has none.
            Instr::Cast(a) => *dtype != DType::I32 || !self.instrs[*a].1.is_float(),
        }
    }
}

/// The most inputs and results of compiled code.
pub const TABLE: usize = 40;

struct Lowering<'a> {
    of: &'a Moving<'a>,
    order: Order,
    before: &'a [bool],
    tape: Tape,
    formats: Vec<Format>,
    inputs: Vec<Origin>,
}

impl Lowering<'_> {
    fn source(mut self) -> (Source, Vec<Origin>) {
        let mut values: Vec<Option<Value>> = vec![None; self.of.instrs.len()];
        let compiled: Vec<usize> = (0..values.len()).filter(|i| !self.before[*i]).collect();
        for i in compiled {
            for a in super::vm::arguments(&self.of.instrs[i].0).into_iter().filter(|a| self.before[*a]) {
                self.given(a, &mut values);
            }
            values[i] = Some(self.lower(i, &values));
        }
        let mut results = Vec::new();
        for (i, (r, dtype)) in self.of.results.iter().enumerate() {
            if self.before[*r] {
                self.given(*r, &mut values);
            }
            let value = values[*r].expect("every result is computed");
            results.push(match i < self.of.stored {
                true => self.stored(*r, value, *dtype),
                false => (value, Format::Lanes),
            });
        }
        let step = if self.order == Order::ByColumns { self.of.columns.max(LANES) } else { LANES };
        (Source { ops: self.tape.finish(), inputs: self.formats, results, step }, self.inputs)
    }

    /// An input for what the machine has computed; a constant is one.
    fn given(&mut self, i: usize, values: &mut [Option<Value>]) {
        if values[i].is_some() {
            return;
        }
        values[i] = Some(match self.of.instrs[i] {
            (Instr::Constant(c), dtype) => self.tape.record(Op::Constant(super::lanes::constant(c, dtype))),
            _ if self.of.uniform[i] => self.input(Origin::Uniform(i), Format::Splat),
            _ if self.order == Order::ByColumns && !self.of.moving[i] => {
                self.input(Origin::Register(i), Format::Repeated)
            }
            _ => self.input(Origin::Register(i), Format::Lanes),
        });
    }

    fn input(&mut self, from: Origin, format: Format) -> Value {
        self.inputs.push(from);
        self.formats.push(format);
        self.tape.record(Op::Input(self.inputs.len() - 1))
    }

    /// Records an instruction.
    fn lower(&mut self, i: usize, values: &[Option<Value>]) -> Value {
        let (instr, dtype) = &self.of.instrs[i];
        if let Instr::Load(o) = instr {
            let operand = &self.of.operands[*o];
            let one = operand.mode == Mode::Splat || (operand.mode == Mode::Strided && operand.along()[1] == 0);
            let format = match (operand.mode, operand.dtype) {
                (Mode::Given, _) => Format::Lanes,
                (_, DType::F32 | DType::I32) if one => Format::Splat,
                (Mode::SameRow, DType::F32 | DType::I32) if self.order == Order::ByColumns => Format::Repeated,
                (_, DType::F32 | DType::I32) => Format::Lanes,
                (_, DType::Bf16) if one => Format::SplatBf16,
                (_, DType::Bf16) => Format::Bf16,
                (_, DType::F16) if one => Format::SplatF16,
                (_, DType::F16) => Format::F16,
                (_, DType::Bool) => Format::Byte,
            };
            return self.input(Origin::Operand(*o), format);
        }
        let tape = &self.tape;
        let at = |a: usize| tape.real(values[a].expect("arguments come before"));
        let of = |a: usize| self.of.instrs[a].1;
        let (one, zero) = (|x: Recorded| x.of_bits(1).value, |x: Recorded| x.of_bits(0).value);
        match *instr {
            Instr::Constant(c) => tape.record(Op::Constant(super::lanes::constant(c, *dtype))),
            Instr::Unary(f, a) if dtype.is_float() => math::unary(f, at(a)).value,
            Instr::Unary(UnaryFn::Not, a) => {
                let a = at(a);
                tape.record(Op::Choose(Test::Same, [a.value, zero(a), one(a), zero(a)]))
            }
            Instr::Unary(UnaryFn::Neg, a) => tape.record(Op::Two(Two::Minus, zero(at(a)), at(a).value)),
            Instr::Unary(_, a) => at(a).value,
            Instr::Binary(f, a, b) if dtype.is_float() => math::binary(f, at(a), at(b)).value,
            Instr::Binary(f, a, b) => {
                let f = match (f, dtype) {
                    (BinaryFn::Add, _) => Two::Plus,
                    (BinaryFn::Sub, _) => Two::Minus,
                    (BinaryFn::Mul, _) => Two::Times,
                    (BinaryFn::Max, _) => Two::Largest,
                    (BinaryFn::Min, _) => Two::Smallest,
                    (BinaryFn::And, DType::Bool) => Two::And,
                    (BinaryFn::Or, DType::Bool) => Two::Or,
                    // As the machine has it.
                    _ => return at(a).value,
                };
                tape.record(Op::Two(f, at(a).value, at(b).value))
            }
            Instr::Compare(f, a, b) => {
                let (test, a, b) = test(f, of(a), at(a), at(b));
                tape.record(Op::Choose(test, [a.value, b.value, one(a), zero(a)]))
            }
            Instr::Select(c, a, b) => {
                let c = at(c);
                // What a comparison chose a truth by may choose the values itself.
                let (test, [x, y]) = match tape.op(c.value) {
                    Op::Choose(test, [x, y, yes, no]) if yes == one(c) && no == zero(c) => (test, [x, y]),
                    _ => (Test::Other, [c.value, zero(c)]),
                };
                tape.record(Op::Choose(test, [x, y, at(a).value, at(b).value]))
            }
            Instr::Cast(a) => {
                let x = at(a);
                let truth = |test| Op::Choose(test, [x.value, zero(x), one(x), zero(x)]);
                let float = |from| if from == DType::I32 { x.as_float() } else { x };
                match (of(a), *dtype) {
                    (from, to) if from == to => x.value,
                    (DType::F32 | DType::Bf16 | DType::F16, DType::Bool) => tape.record(truth(Test::Differs)),
                    (DType::I32, DType::Bool) => tape.record(truth(Test::Other)),
                    (DType::Bool, DType::F32 | DType::Bf16 | DType::F16) => {
                        tape.record(Op::Choose(Test::Other, [x.value, zero(x), x.of(1.0).value, zero(x)]))
                    }
                    (from, DType::Bf16) => float(from).to_bf16().value,
                    (from, DType::F16) => tape.record(Op::One(One::ToF16, float(from).value)),
                    (DType::I32, DType::F32) => x.as_float().value,
                    _ => x.value,
                }
            }
            Instr::Load(_) | Instr::Step | Instr::Index { .. } | Instr::Random { .. } => {
                unreachable!("the machine computes these before")
            }
        }
    }

    /// A result that is stored, and how.
    fn stored(&self, r: usize, value: Value, dtype: DType) -> (Value, Format) {
        match dtype {
            DType::F32 | DType::I32 => (value, Format::Lanes),
            DType::Bool => (value, Format::Byte),
            // What was rounded before is not rounded by itself: if nothing else needs that, it is not computed.
            DType::Bf16 if self.tape.rounds => match self.tape.op(value) {
                Op::One(One::ToBf16, wide) => (wide, Format::ToBf16),
                _ => (value, Format::ToBf16),
            },
            DType::F16 => match self.tape.op(value) {
                Op::One(One::ToF16, wide) => (wide, Format::F16),
                _ => (value, Format::F16),
            },
            DType::Bf16 => {
                let rounded = matches!(self.of.instrs[r], (Instr::Cast(_) | Instr::Load(_), DType::Bf16));
                let value = if rounded { value } else { self.tape.real(value).to_bf16().value };
                (value, Format::Bf16)
            }
        }
    }
}

/// The test that a comparison is, and its sides.
fn test<'a>(f: CompareFn, dtype: DType, a: Recorded<'a>, b: Recorded<'a>) -> (Test, Recorded<'a>, Recorded<'a>) {
    let (equal, other, less, at_most) = match dtype.is_float() {
        true => (Test::Equals, Test::Differs, Test::Less, Test::AtMost),
        false => (Test::Same, Test::Other, Test::Below, Test::NotAbove),
    };
    match f {
        CompareFn::Eq => (equal, a, b),
        CompareFn::Ne => (other, a, b),
        CompareFn::Lt => (less, a, b),
        CompareFn::Le => (at_most, a, b),
        CompareFn::Gt => (less, b, a),
        CompareFn::Ge => (at_most, b, a),
    }
}
