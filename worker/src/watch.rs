//! Watching for values that are not finite: which step of a plan first writes one.
//!
//! A session that diverged does its last steps again with its devices watching; ordinary steps pay one comparison each.
//!
//! What is no number is always told of. Infinite values may be meant: a mask of -inf, padding with it, the maximum of
//! nothing. So they are told of only where finite values became infinite (an overflow, log 0, 1/0): as results of a step
//! that depend on no infinite constant and on operands that are all finite; and in weights before a step, which nobody
//! means. Feeds that are infinite, and an overflow in what a mask takes part in as well, are thus not told of; if they do
//! harm, it is by what is no number later on.

use mesh::body::{Body, Instr, Loop};
use mesh::dim::DType;
use mesh::ops::Prim;
use mesh::ops::reduce::ReduceFn;
use mesh::plan::{self, At, Band, Begun, Buffer, Epilogue, Segments, Share, Work};
use std::collections::BTreeMap;

/// What first was not finite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This variable, before the function ran.
    Variable(usize),
    /// What this step wrote, by its index.
    Step(usize),
}

/// Values that are not finite, where they first came up on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// Where.
    pub origin: Origin,
    /// The device, by its number in the mesh.
    pub device: usize,
    /// Whether some are no numbers; otherwise they are infinite.
    pub nan: bool,
    /// The op with its scope and its place in the user's source, how many values, and which is the first.
    pub text: String,
}

impl NonFinite {
    /// Whether this comes before another.
    pub fn before(&self, other: &NonFinite) -> bool {
        let key = |f: &NonFinite| match f.origin {
            Origin::Variable(v) => (0, v, f.device),
            Origin::Step(s) => (1, s, f.device),
        };
        key(self) < key(other)
    }

    /// Puts this among others, of which the first of each kind (infinite, no number) is kept.
    pub fn keep_first(self, among: &mut Vec<NonFinite>) {
        match among.iter_mut().find(|f| f.nan == self.nan) {
            Some(first) if self.before(first) => *first = self,
            Some(_) => {}
            None => among.push(self),
        }
    }
}

/// What of a step is looked through; nothing of steps that only move what others computed.
pub struct Looked {
    /// The dtype and number of elements of each operand.
    pub operands: Vec<(DType, usize)>,
    /// The results.
    pub results: Vec<Computed>,
}

/// A result of a step.
pub struct Computed {
    /// Its dtype.
    pub dtype: DType,
    /// Its elements.
    pub elements: usize,
    /// The operands by whose infinite values it may be infinite; None if it may be without any.
    pub infinite_by: Option<Vec<usize>>,
}

/// The dtype of a result, and the operands by whose infinite values it may be infinite.
type Result = (DType, Option<Vec<usize>>);

impl Looked {
    /// What of that step.
    pub fn of(step: &plan::Step) -> Looked {
        let (operands, results) = computed(&step.work);
        Looked::at(step, operands, results)
    }

    /// Operands and results of these dtypes where a step has them.
    fn at(step: &plan::Step, operands: Vec<DType>, results: Vec<Result>) -> Looked {
        let elements = |dtype: DType, buffer: &Buffer| buffer.bytes / dtype.bytes();
        let operands = operands.into_iter().zip(&step.inputs).map(|(d, b)| (d, elements(d, b))).collect();
        let results = results.into_iter().zip(&step.outputs);
        let computed = |((dtype, infinite_by), b): (Result, &Buffer)| Computed {
            dtype,
            elements: elements(dtype, b),
            infinite_by,
        };
        Looked { operands, results: results.map(computed).collect() }
    }
}

/// The operands and the results of a piece of work; nothing of one that only moves what others computed.
fn computed(work: &Work) -> (Vec<DType>, Vec<Result>) {
    let of_loop = |nest: &Loop| -> (Vec<DType>, Vec<Result>) {
        let result = |r: &usize| (nest.body.instrs[*r].1, infinite_by(&nest.body, *r));
        (nest.operands.iter().map(|o| o.dtype).collect(), nest.body.results.iter().map(result).collect())
    };
    match work {
        Work::Map(nest) => of_loop(nest),
        Work::Reduce(r) => of_loop(&r.nest),
        // The rim's step looks through all of it.
        Work::Op(op) if matches!(op.share, Share::Interior(_)) => (vec![], vec![]),
        Work::Op(op) => {
            // A window that lies in the padding has the maximum of nothing.
            let by = (!matches!(op.op, Prim::MaxPool(_))).then(|| (0..op.reads()).collect());
            let mut operands: Vec<DType> = op.inputs.iter().map(|part| part.ty.dtype).collect();
            // The device's own part of the first one.
            operands.extend((!op.pieces.is_empty()).then(|| operands[0]));
            let Some(nest) = op.epilogue.as_ref().map(Epilogue::nest) else {
                return (operands, vec![(op.output.ty.dtype, by)]);
            };
            // In place of the op's result, the loop's last operand, there are the op's operands.
            let (mut others, mut results) = of_loop(nest);
            others.pop();
            let (first, result) = (operands.len(), others.len());
            operands.extend(others);
            for by in results.iter_mut().filter_map(|(_, by)| by.as_mut()) {
                let each = |o: &usize| if *o == result { 0..first } else { first + o..first + o + 1 };
                *by = by.iter().flat_map(each).collect();
            }
            (operands, results)
        }
        Work::Band(band) => of_band(band),
        // What was begun is looked through when it is there.
        Work::AllReduce(a) if a.under_way.is_some() => (vec![], vec![]),
        Work::Combine(a) if a.segments == Segments::Shared => (vec![], vec![]),
        Work::Finish(Begun::AllReduce(a)) => (vec![], vec![(a.dtype, None)]),
        // A maximum or minimum is infinite only if a part is, maybe another device's.
        Work::AllReduce(a) | Work::Combine(a) => {
            (vec![a.dtype], vec![(a.dtype, (a.f == ReduceFn::Sum).then(|| vec![0]))])
        }
        Work::Copy(_) | Work::Exchange(_) | Work::Finish(Begun::Exchange(_)) => (vec![], vec![]),
        Work::Join(j) => (vec![j.dtype; 2], vec![(j.dtype, (j.f == ReduceFn::Sum).then(|| vec![0, 1]))]),
    }
}

/// Those of a band: what is between its steps is not looked through, but what its results depend on is followed.
fn of_band(band: &Band) -> (Vec<DType>, Vec<Result>) {
    let steps = band.slices.first().map_or(&[][..], |s| &s.steps);
    let mut inside: BTreeMap<usize, Result> = BTreeMap::new();
    let (mut operands, mut results): (BTreeMap<usize, DType>, BTreeMap<usize, Result>) = Default::default();
    for s in steps {
        if let (Work::Copy(_), [At::Inside(from)], [At::Outside { operand, .. }]) =
            (&s.work, &s.inputs[..], &s.outputs[..])
        {
            results.extend(inside.get(from).map(|r| (*operand, r.clone())));
            continue;
        }
        let (dtypes, made) = computed(&s.work);
        for (at, dtype) in s.inputs.iter().zip(dtypes) {
            if let At::Outside { operand, .. } = at {
                operands.insert(*operand, dtype);
            }
        }
        let reached = |operand: &usize| match &s.inputs[*operand] {
            At::Outside { operand, .. } => Some(vec![*operand]),
            At::Inside(buffer) => inside.get(buffer).and_then(|(_, by)| by.clone()),
        };
        let all = |by: &[usize]| by.iter().map(reached).collect::<Option<Vec<_>>>().map(|by| by.concat());
        let made: Vec<Result> = made.iter().map(|(dtype, by)| (*dtype, by.as_deref().and_then(all))).collect();
        for (at, result) in s.outputs.iter().zip(made) {
            if let At::Inside(buffer) = at {
                inside.insert(*buffer, result);
            }
        }
    }
    (operands.into_values().collect(), results.into_values().collect())
}

/// The operands whose infinite values may reach a value of a body; None if an infinite constant, such as a mask's, may.
fn infinite_by(body: &Body, result: usize) -> Option<Vec<usize>> {
    let (mut operands, mut seen, mut open) = (vec![], vec![false; body.instrs.len()], vec![result]);
    while let Some(at) = open.pop() {
        let (instr, dtype) = &body.instrs[at];
        // Whole numbers and truths are finite.
        if !dtype.is_float() || std::mem::replace(&mut seen[at], true) {
            continue;
        }
        match instr {
            Instr::Load(operand) => operands.push(*operand),
            Instr::Constant(c) if infinite(*c, *dtype) => return None,
            Instr::Constant(_) | Instr::Step | Instr::Index { .. } | Instr::Random { .. } => {}
            Instr::Unary(_, x) | Instr::Cast(x) => open.push(*x),
            Instr::Binary(_, x, y) | Instr::Compare(_, x, y) => open.extend([*x, *y]),
            Instr::Select(_, x, y) => open.extend([*x, *y]),
        }
    }
    Some(operands)
}

/// Whether a constant is infinite in a dtype.
fn infinite(c: f64, dtype: DType) -> bool {
    match dtype {
        DType::F32 => (c as f32).is_infinite(),
        DType::Bf16 => half::bf16::from_f64(c).is_infinite(),
        DType::F16 => half::f16::from_f64(c).is_infinite(),
        DType::I32 | DType::Bool => false,
    }
}

/// Values of one kind among others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Odd {
    /// How many.
    pub count: usize,
    /// Index of the first, if there is any.
    pub first: usize,
}

/// What of some values is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// What is infinite.
    pub infinite: Odd,
    /// What is no number.
    pub nan: Odd,
}

impl Scan {
    /// Whether all values are finite.
    pub fn finite(&self) -> bool {
        self.infinite.count + self.nan.count == 0
    }

    /// Infinite values and those that are no numbers, with whether they are the latter; where there are any.
    pub fn odd(&self) -> impl Iterator<Item = (bool, Odd)> + use<> {
        [(false, self.infinite), (true, self.nan)].into_iter().filter(|(_, odd)| odd.count > 0)
    }

    fn note(&mut self, index: usize, nan: bool) {
        let odd = if nan { &mut self.nan } else { &mut self.infinite };
        if odd.count == 0 {
            odd.first = index;
        }
        odd.count += 1;
    }
}

/// Looks through values.
///
/// # Safety
/// So many elements of that dtype lie at `values`, and nobody writes them meanwhile.
pub unsafe fn scan(dtype: DType, values: *const u8, elements: usize) -> Scan {
    let mut scan = Scan::default();
    match dtype {
        DType::F32 => {
            // SAFETY: by this function's contract.
            let all = unsafe { std::slice::from_raw_parts(values.cast::<f32>(), elements) };
            let odd = all.iter().enumerate().filter(|(_, v)| !v.is_finite());
            odd.for_each(|(i, v)| scan.note(i, v.is_nan()));
        }
        DType::Bf16 | DType::F16 => {
            // SAFETY: as above.
            let all = unsafe { std::slice::from_raw_parts(values.cast::<u16>(), elements) };
            let infinity = if dtype == DType::F16 { 0x7c00 } else { 0x7f80 };
            let odd = all.iter().map(|v| v & 0x7fff).enumerate().filter(|(_, v)| *v >= infinity);
            odd.for_each(|(i, v)| scan.note(i, v > infinity));
        }
        DType::I32 | DType::Bool => {}
    }
    scan
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh::ops::binary::BinaryFn;
    use mesh::ops::compare::CompareFn;
    use mesh::ops::unary::UnaryFn;

    #[test]
    fn a_scan_tells_infinite_values_from_what_is_no_number() {
        let floats = [0.0f32, 1e38, f32::INFINITY, -1.0, f32::NEG_INFINITY];
        let halves: [u16; 4] = [0x3f80, 0x7f7f, 0x7fc0, 0xff80];
        let odd = |count, first| Odd { count, first };
        // SAFETY: the arrays hold as many elements.
        unsafe {
            assert!(scan(DType::F32, floats.as_ptr().cast(), 2).finite());
            let infinite = scan(DType::F32, floats.as_ptr().cast(), 5);
            assert_eq!(infinite, Scan { infinite: odd(2, 2), nan: odd(0, 0) });
            assert_eq!(infinite.odd().collect::<Vec<_>>(), [(false, odd(2, 2))]);
            let both = scan(DType::Bf16, halves.as_ptr().cast(), 4);
            assert_eq!(both, Scan { infinite: odd(1, 3), nan: odd(1, 2) });
            assert_eq!(both.odd().collect::<Vec<_>>(), [(false, odd(1, 3)), (true, odd(1, 2))]);
            let halves: [u16; 4] = [0x3c00, 0x7bff, 0x7e00, 0xfc00];
            let both = scan(DType::F16, halves.as_ptr().cast(), 4);
            assert_eq!(both, Scan { infinite: odd(1, 3), nan: odd(1, 2) });
            assert!(scan(DType::I32, halves.as_ptr().cast(), 2).finite());
        }
    }

    #[test]
    fn a_result_is_infinite_by_the_constants_and_operands_that_reach_it() {
        let mask = |c| Body {
            instrs: vec![
                (Instr::Load(0), DType::F32),
                (Instr::Load(1), DType::F32),
                (Instr::Compare(CompareFn::Lt, 0, 1), DType::Bool),
                (Instr::Constant(c), DType::F32),
                (Instr::Select(2, 1, 3), DType::F32),
                (Instr::Unary(UnaryFn::Exp, 0), DType::F32),
                (Instr::Cast(0), DType::Bf16),
                (Instr::Binary(BinaryFn::Add, 4, 5), DType::F32),
            ],
            results: vec![4, 5, 7],
        };
        let masked = mask(f64::NEG_INFINITY);
        let by = |body: &Body| body.results.iter().map(|r| infinite_by(body, *r)).collect::<Vec<_>>();
        // By what is compared nothing is infinite.
        assert_eq!(by(&masked), [None, Some(vec![0]), None]);
        assert_eq!(by(&mask(-1e30)), [Some(vec![1]), Some(vec![0]), Some(vec![0, 1])]);
        assert_eq!(infinite_by(&masked, 2), Some(vec![]));
        for c in [f64::NEG_INFINITY, f64::INFINITY, -1e39] {
            assert!(infinite(c, DType::F32) && infinite(c, DType::Bf16) && !infinite(c, DType::I32), "{c}");
        }
        assert!(!infinite(f64::from(f32::MIN), DType::F32) && infinite(f64::from(f32::MIN), DType::Bf16));
        assert!(!infinite(65_519.0, DType::F16) && infinite(-65_520.0, DType::F16));
    }

    #[test]
    fn the_first_step_counts_then_the_first_device_and_variables_before_all() {
        let at = |origin, device, nan| NonFinite { origin, device, nan, text: String::new() };
        let mut kept = vec![];
        for f in [
            at(Origin::Step(7), 1, true),
            at(Origin::Step(5), 3, true),
            at(Origin::Step(5), 2, true),
            at(Origin::Step(9), 0, false),
        ] {
            f.keep_first(&mut kept);
        }
        assert_eq!(kept, [at(Origin::Step(5), 2, true), at(Origin::Step(9), 0, false)]);
        at(Origin::Variable(4), 3, true).keep_first(&mut kept);
        assert_eq!(kept[0].origin, Origin::Variable(4));
    }
}
