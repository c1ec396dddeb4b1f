//! A record of what is done to a lane: operations in order, each on values of earlier ones.

use crate::kernels::math::{self, Real};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// The value that an operation gives: its place on the tape.
pub type Value = usize;

/// An operation on 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// An element of an input.
    Input(usize),
    /// These bits.
    Constant(u32),
    /// Of one value.
    One(One, Value),
    /// Of two.
    Two(Two, Value, Value),
    /// The first times the second plus the third, rounded once.
    TimesPlus([Value; 3]),
    /// The third value where the test of the first two holds, the fourth one elsewhere.
    Choose(Test, [Value; 4]),
}

/// An operation on one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum One {
    /// Square root.
    Sqrt,
    /// Bits shifted up.
    Up(u8),
    /// Bits shifted down, zeros behind them.
    Down(u8),
    /// The float nearest to an integer.
    FromInteger,
    /// The integer that lies next towards zero.
    ToInteger,
    /// The nearest `bf16`, by the instruction for it.
    ToBf16,
    /// The nearest `f16`.
    ToF16,
}

/// An operation on two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Two {
    /// Of floats.
    Add,
    /// Of floats.
    Sub,
    /// Of floats.
    Mul,
    /// Of floats.
    Div,
    /// Of floats: the first if it is less, else the second.
    Lesser,
    /// Of floats: the first if it is greater, else the second.
    Greater,
    /// Of floats: the first times two to the power of the second, rounded once.
    Scaled,
    /// Of bits.
    And,
    /// Of bits.
    Or,
    /// Of bits.
    Xor,
    /// Of integers, wrapping.
    Plus,
    /// Of integers, wrapping.
    Minus,
    /// Of integers, wrapping.
    Times,
    /// Of integers.
    Largest,
    /// Of integers.
    Smallest,
}

/// A test of two values; with a NaN only `Differs` and `Nan` hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Test {
    /// Floats, a = b.
    Equals,
    /// Floats, a ≠ b.
    Differs,
    /// Floats, a < b.
    Less,
    /// Floats, a ≤ b.
    AtMost,
    /// Any float is no number.
    Nan,
    /// Integers, a = b.
    Same,
    /// Integers, a ≠ b.
    Other,
    /// Integers, a < b.
    Below,
    /// Integers, a ≤ b.
    NotAbove,
}

/// A tape. What was recorded before is not recorded again.
pub struct Tape {
    ops: RefCell<Vec<Op>>,
    seen: RefCell<HashMap<Op, Value>>,
    /// Whether the machine has an instruction that rounds to `bf16`.
    pub rounds: bool,
}

impl Tape {
    /// An empty one.
    pub fn new(rounds: bool) -> Tape {
        Tape { ops: RefCell::default(), seen: RefCell::default(), rounds }
    }

    /// Records an operation.
    pub fn record(&self, op: Op) -> Value {
        *self.seen.borrow_mut().entry(op).or_insert_with(|| {
            let mut ops = self.ops.borrow_mut();
            ops.push(op);
            ops.len() - 1
        })
    }

    /// An operation.
    pub fn op(&self, value: Value) -> Op {
        self.ops.borrow()[value]
    }

    /// What stands for a value in functions of [`Real`]s.
    pub fn real(&self, value: Value) -> Recorded<'_> {
        Recorded { tape: self, value }
    }

    /// The operations, in order.
    pub fn finish(self) -> Vec<Op> {
        self.ops.into_inner()
    }
}

/// A value on a tape.
#[derive(Clone, Copy)]
pub struct Recorded<'a> {
    tape: &'a Tape,
    /// Its place.
    pub value: Value,
}

impl Recorded<'_> {
    fn one(self, f: One) -> Self {
        self.tape.real(self.tape.record(Op::One(f, self.value)))
    }

    fn two(self, f: Two, other: Self) -> Self {
        self.tape.real(self.tape.record(Op::Two(f, self.value, other.value)))
    }
}

macro_rules! arithmetic {
    ($($operator:ident $method:ident)*) => {
        $(impl $operator for Recorded<'_> {
            type Output = Self;
            fn $method(self, other: Self) -> Self {
                self.two(Two::$operator, other)
            }
        })*
    };
}

arithmetic!(Add add Sub sub Mul mul Div div);

impl Neg for Recorded<'_> {
    type Output = Self;
    fn neg(self) -> Self {
        self.two(Two::Xor, self.of_bits(1 << 31))
    }
}

impl<'a> Real for Recorded<'a> {
    type Truth = (Test, Self, Self);
    fn of_bits(self, bits: u32) -> Self {
        self.tape.real(self.tape.record(Op::Constant(bits)))
    }
    fn sqrt(self) -> Self {
        self.one(One::Sqrt)
    }
    fn times_plus(self, factor: Self, term: Self) -> Self {
        self.tape.real(self.tape.record(Op::TimesPlus([self, factor, term].map(|v| v.value))))
    }
    fn lesser(self, other: Self) -> Self {
        self.two(Two::Lesser, other)
    }
    fn greater(self, other: Self) -> Self {
        self.two(Two::Greater, other)
    }
    fn scaled(self, n: Self) -> Self {
        self.two(Two::Scaled, n)
    }
    fn less(self, other: Self) -> Self::Truth {
        (Test::Less, self, other)
    }
    fn at_most(self, other: Self) -> Self::Truth {
        (Test::AtMost, self, other)
    }
    fn equals(self, other: Self) -> Self::Truth {
        (Test::Equals, self, other)
    }
    fn any_nan(self, other: Self) -> Self::Truth {
        (Test::Nan, self, other)
    }
    fn choose((test, x, y): Self::Truth, a: Self, b: Self) -> Self {
        a.tape.real(a.tape.record(Op::Choose(test, [x, y, a, b].map(|v| v.value))))
    }
    fn and(self, other: Self) -> Self {
        self.two(Two::And, other)
    }
    fn or(self, other: Self) -> Self {
        self.two(Two::Or, other)
    }
    fn plus(self, other: Self) -> Self {
        self.two(Two::Plus, other)
    }
    fn up(self, bits: u8) -> Self {
        self.one(One::Up(bits))
    }
    fn down(self, bits: u8) -> Self {
        self.one(One::Down(bits))
    }
    fn as_float(self) -> Self {
        self.one(One::FromInteger)
    }
    fn as_integer(self) -> Self {
        self.one(One::ToInteger)
    }
    fn to_bf16(self) -> Self {
        if self.tape.rounds { self.one(One::ToBf16) } else { math::to_bf16(self) }
    }
}
