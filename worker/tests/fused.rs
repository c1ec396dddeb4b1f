//! Fused loops of any shape give the same bits on every instruction set: those that are compiled, those of which a part is,
//! and those that are evaluated instruction by instruction.

use mesh::body::{Access, Body, Instr, Loop, Reduction};
use mesh::chunk::{Tree, TreeDim};
use mesh::dim::DType;
use mesh::ops::binary::BinaryFn;
use mesh::ops::compare::CompareFn;
use mesh::ops::reduce::ReduceFn;
use mesh::ops::source::Distribution;
use mesh::ops::unary::UnaryFn;
use proptest::prelude::*;
use worker::kernels::isa::Isa;
use worker::kernels::map::MapPlan;
use worker::kernels::reduce::ReducePlan;
use worker::kernels::vm::StepContext;
use worker::pool::Pool;

/// Choices, one after the other, from a seed.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

const DTYPES: [DType; 5] = [DType::F32, DType::Bf16, DType::F16, DType::I32, DType::Bool];

const COMPARISONS: [CompareFn; 6] =
    [CompareFn::Eq, CompareFn::Ne, CompareFn::Lt, CompareFn::Le, CompareFn::Gt, CompareFn::Ge];

/// An operand that is read along some of the loops, densely, with gaps between rows, or with columns apart.
fn access(c: &mut Choices, extents: &[usize]) -> Access {
    let (mut strides, mut step) = (vec![0; extents.len()], c.of(&[1, 1, 1, 1, 3]));
    for (s, n) in strides.iter_mut().zip(extents).rev() {
        if c.below(3) > 0 {
            *s = step;
            step = step * n + c.of(&[0, 0, 5]);
        }
    }
    let dtype = c.of(&[DType::F32, DType::F32, DType::Bf16, DType::F16, DType::I32, DType::Bool]);
    Access { dtype, offset: c.below(4), strides }
}

/// A body over some operands; values of every dtype, used more than once and late.
fn body(c: &mut Choices, operands: &[Access], loops: usize, length: usize) -> Body {
    let mut instrs: Vec<(Instr, DType)> = Vec::new();
    for i in 0..operands.len().max(length) {
        let of = |c: &mut Choices, instrs: &[(Instr, DType)], wanted: fn(DType) -> bool| {
            let fits: Vec<usize> = (0..instrs.len()).filter(|i| wanted(instrs[*i].1)).collect();
            (!fits.is_empty()).then(|| c.of(&fits))
        };
        let any = |c: &mut Choices, instrs: &[(Instr, DType)]| of(c, instrs, |_| true);
        let same = |c: &mut Choices, instrs: &[(Instr, DType)], d: DType| {
            let fits: Vec<usize> = (0..instrs.len()).filter(|i| instrs[*i].1 == d).collect();
            c.of(&fits)
        };
        let made = if i < operands.len() {
            Some((Instr::Load(i), operands[i].dtype))
        } else {
            match c.below(13) {
                0 => Some((Instr::Constant(c.of(&[0.0, 1.0, -2.5, 3.0])), c.of(&DTYPES))),
                1 => Some((Instr::Index { dim: c.below(loops) }, DType::I32)),
                2 | 12 => {
                    let distribution = c.of(&[Distribution::Uniform, Distribution::Bernoulli(0.5)]);
                    let strides = (0..loops as u64).map(|l| 1000 * (loops as u64 - 1 - l) + 1).collect();
                    Some((Instr::Random { distribution, key: 7, strides }, DType::F32))
                }
                3 | 4 => of(c, &instrs, |d| d.is_float()).map(|a| {
                    let all: Vec<UnaryFn> = UnaryFn::ALL.into_iter().filter(|f| *f != UnaryFn::Not).collect();
                    (Instr::Unary(c.of(&all), a), DType::F32)
                }),
                5 => of(c, &instrs, |d| d == DType::Bool).map(|a| (Instr::Unary(UnaryFn::Not, a), DType::Bool)),
                6 => any(c, &instrs).map(|a| (Instr::Cast(a), c.of(&DTYPES))),
                7 => any(c, &instrs).map(|a| {
                    let b = same(c, &instrs, instrs[a].1);
                    (Instr::Compare(c.of(&COMPARISONS), a, b), DType::Bool)
                }),
                8 => of(c, &instrs, |d| d == DType::Bool).map(|t| {
                    let a = c.below(instrs.len());
                    (Instr::Select(t, a, same(c, &instrs, instrs[a].1)), instrs[a].1)
                }),
                _ => any(c, &instrs).map(|a| {
                    use BinaryFn::{Add, And, Div, Max, Min, Mul, Or, Pow, Rem, Sub};
                    let b = same(c, &instrs, instrs[a].1);
                    let (f, dtype) = match instrs[a].1 {
                        DType::Bool => (c.of(&[And, Or]), DType::Bool),
                        DType::I32 => (c.of(&[Add, Sub, Mul, Div, Max, Min, Rem]), DType::I32),
                        _ => (c.of(&[Add, Sub, Mul, Mul, Div, Max, Min, Pow, Rem]), DType::F32),
                    };
                    (Instr::Binary(f, a, b), dtype)
                }),
            }
        };
        instrs.extend(made);
    }
    let results = (0..1 + c.below(4)).map(|_| instrs.len() - 1 - c.below(instrs.len().min(6))).collect();
    Body { instrs, results }
}

/// A buffer of small numbers, some of them zero, large, subnormal or none.
fn numbers(c: &mut Choices, dtype: DType, n: usize) -> Vec<u8> {
    let float = |c: &mut Choices| match c.below(40) {
        0 => 0.0,
        1 => -1e-41,
        2 => f32::NAN,
        3 => f32::NEG_INFINITY,
        4 => 1e30,
        _ => (c.below(2001) as f32 - 1000.0) / 250.0,
    };
    let element = |c: &mut Choices| match dtype {
        DType::F32 => float(c).to_le_bytes().to_vec(),
        DType::Bf16 => ((float(c).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        // Some of them subnormal.
        DType::F16 if c.below(20) == 0 => (c.below(0x400) as u16).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(float(c)).to_le_bytes().to_vec(),
        DType::I32 => (c.below(9) as i32 - 3).to_le_bytes().to_vec(),
        DType::Bool => vec![c.below(2) as u8],
    };
    (0..n).flat_map(|_| element(c)).collect()
}

/// The results' elements, one no number like another.
fn elements(dtype: DType, bytes: &[u8]) -> Vec<u32> {
    match dtype {
        DType::F32 => {
            let of = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            bytes.chunks(4).map(of).map(|v| if v.is_nan() { 1 << 31 | 1 } else { v.to_bits() }).collect()
        }
        DType::Bf16 => {
            let of = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            bytes.chunks(2).map(of).map(|v| if v.is_nan() { 1 << 31 | 1 } else { v.to_bits() }).collect()
        }
        DType::F16 => {
            let of = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]);
            bytes.chunks(2).map(of).map(|v| if v.is_nan() { 1 << 31 | 1 } else { v.to_bits().into() }).collect()
        }
        DType::I32 | DType::Bool => bytes.iter().map(|b| u32::from(*b)).collect(),
    }
}

/// A loop over random operands, and their buffers.
fn nest(c: &mut Choices, extents: &[usize], operands: usize, length: usize) -> (Loop, Vec<Vec<u8>>) {
    let operands: Vec<Access> = (0..operands).map(|_| access(c, extents)).collect();
    let body = body(c, &operands, extents.len(), length);
    let reach = |a: &Access| 1 + a.offset + a.strides.iter().zip(extents).map(|(s, n)| s * (n - 1)).sum::<usize>();
    let buffers: Vec<Vec<u8>> = operands.iter().map(|a| numbers(c, a.dtype, reach(a))).collect();
    (Loop { origin: vec![3; extents.len()], extents: extents.to_vec(), operands, body: body.into() }, buffers)
}

const CX: StepContext = StepContext::new(5, 3);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]
    #[test]
    fn a_fused_loop_has_the_same_bits_on_every_instruction_set(
        seed in any::<u64>(),
        operands in 1usize..14,
        length in 1usize..70,
        extents in prop::sample::select(vec![
            vec![1], vec![40], vec![1100], vec![5, 3], vec![7, 16], vec![3, 33], vec![9, 48], vec![2, 515], vec![3, 4, 17], vec![2, 5, 100],
            vec![2, 3, 700], vec![70, 16], vec![3, 37, 32], vec![40, 8], vec![2, 9, 4],
        ]),
    ) {
        let mut c = Choices(seed);
        let (nest, buffers) = nest(&mut c, &extents, operands, length);
        let points: usize = extents.iter().product();
        let pool = Pool::new(1, None);
        let mut first: Option<Vec<Vec<u32>>> = None;
        for isa in Isa::available() {
            let dtypes: Vec<DType> = nest.body.results.iter().map(|r| nest.body.instrs[*r].1).collect();
            // A guard behind each result.
            let mut results: Vec<Vec<u8>> = dtypes.iter().map(|d| vec![0xa5; points * d.bytes() + 64]).collect();
            let from: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr()).collect();
            let to: Vec<*mut u8> = results.iter_mut().map(|r| r.as_mut_ptr()).collect();
            // SAFETY: operands hold what the loop reaches, and results have room for its points.
            unsafe { MapPlan::with_isa(&nest, isa).run(&pool, &from, &to, CX) };
            prop_assert!(results.iter().all(|r| r[r.len() - 64..].iter().all(|b| *b == 0xa5)), "wrote behind; {isa:?}");
            let bits: Vec<Vec<u32>> =
                results.iter().zip(&dtypes).map(|(r, d)| elements(*d, &r[..r.len() - 64])).collect();
            let wanted = first.get_or_insert_with(|| bits.clone());
            prop_assert_eq!(&*wanted, &bits, "{:?}", isa);
        }
    }

    #[test]
    fn a_fused_sum_that_stores_has_the_same_bits_on_every_instruction_set_and_apart(
        seed in any::<u64>(),
        operands in 1usize..5,
        length in 1usize..20,
        (extents, reduced) in prop::sample::select(vec![
            (vec![40], vec![true]), (vec![9], vec![false]), (vec![700], vec![true]), (vec![5, 3], vec![true, false]), (vec![7, 48], vec![false, true]),
            (vec![90, 40], vec![false, true]), (vec![3, 515], vec![true, false]), (vec![2, 5, 100], vec![false, true, false]),
            (vec![3, 4, 17], vec![true, true, true]), (vec![2, 70, 6], vec![true, false, true]), (vec![300, 3], vec![false, true]),
            (vec![3, 30, 7], vec![false, false, true]), (vec![70, 8], vec![false, true]), (vec![65, 1], vec![false, true]),
            (vec![70, 200], vec![false, true]), (vec![3, 9, 40, 16], vec![true, true, true, false]),
            (vec![2, 3, 70, 32], vec![false, true, true, false]), (vec![4, 5, 6, 3, 2], vec![true, true, true, true, false]),
        ]),
        f in prop::sample::select(vec![ReduceFn::Sum, ReduceFn::Max, ReduceFn::Min]),
    ) {
        let mut c = Choices(seed);
        let (mut nest, buffers) = nest(&mut c, &extents, operands, length);
        // Sums are of floats; some of what was merely loaded.
        let floats: Vec<usize> = (0..nest.body.instrs.len()).filter(|i| nest.body.instrs[*i].1 == DType::F32).collect();
        prop_assume!(!floats.is_empty());
        let summed: Vec<usize> = (0..1 + c.below(3)).map(|_| c.of(&floats)).collect();
        let stored: Vec<usize> = (0..c.below(3)).map(|_| c.below(nest.body.instrs.len())).collect();
        nest.origin = vec![0; extents.len()];
        let over = || extents.iter().zip(&reduced).filter(|(_, r)| **r).map(|(n, _)| *n);
        let dims: Vec<TreeDim> = over().map(|n| TreeDim { size: n, chunks: 1 + c.below(n.min(8)) }).collect();
        let first = Some(c.below(4)).filter(|first| *first < dims.len());
        let tree = Tree { dims, first };
        let kept: usize = extents.iter().zip(&reduced).filter(|(_, r)| !**r).map(|(n, _)| *n).product();
        let points: usize = extents.iter().product();
        let dtypes: Vec<DType> = stored.iter().map(|r| nest.body.instrs[*r].1).collect();
        // The first value that is stored lies where an operand does that is read at the same points alone.
        let fits = |a: &Access| dtypes.first().is_some_and(|d| d.bytes() == a.dtype.bytes()) && a.is_whole(&extents);
        let in_place = nest.operands.iter().position(fits);
        let of = |results: Vec<usize>| Loop { body: Body { results, ..Body::clone(&nest.body) }.into(), ..nest.clone() };
        let pass = |count: usize| Reduction {
            nest: of([&stored[..count], &summed].concat()),
            reduced: reduced.clone(),
            stored: count,
            f,
            tree: tree.clone(),
            owned: tree.dims.iter().map(|d| 0..d.chunks).collect(),
        };
        let pool = Pool::new(1, None);
        let run = |sum: &Reduction, isa: Isa| {
            let plan = ReducePlan::with_isa(sum, isa);
            let mut scratch = vec![0u64; plan.scratch_bytes() / 8 + 1];
            let sizes = dtypes.iter().take(sum.stored).map(|d| points * d.bytes()).chain(summed.iter().map(|_| 4 * kept));
            let mut results: Vec<Vec<u8>> = sizes.map(|bytes| vec![0xa5; bytes + 64]).collect();
            let mut from: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr()).collect();
            let to: Vec<*mut u8> = results.iter_mut().map(|r| r.as_mut_ptr()).collect();
            if let (Some(operand), Some(to)) = (in_place, to.first().filter(|_| sum.stored > 0)) {
                // SAFETY: the result is as large as the operand.
                unsafe { std::ptr::copy_nonoverlapping(from[operand], *to, buffers[operand].len()) };
                from[operand] = *to;
            }
            // SAFETY: operands hold what the loop reaches, results have room for what is kept and stored, and the scratch is
            // as asked for.
            unsafe { plan.run(&pool, &from, &to, scratch.as_mut_ptr().cast(), CX) };
            let guarded = results.iter().all(|r| r[r.len() - 64..].iter().all(|b| *b == 0xa5));
            assert!(guarded, "wrote behind; {isa:?}");
            let dtypes = dtypes.iter().take(sum.stored).copied().chain(summed.iter().map(|_| DType::F32));
            results.iter().zip(dtypes).map(|(r, d)| elements(d, &r[..r.len() - 64])).collect::<Vec<_>>()
        };
        let alone = MapPlan::with_isa(&of(stored.clone()), Isa::Portable);
        let mut results: Vec<Vec<u8>> = dtypes.iter().map(|d| vec![0; points * d.bytes()]).collect();
        let from: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr()).collect();
        let to: Vec<*mut u8> = results.iter_mut().map(|r| r.as_mut_ptr()).collect();
        if !stored.is_empty() {
            // SAFETY: operands hold what the loop reaches, and results have room for its points.
            unsafe { alone.run(&pool, &from, &to, CX) };
        }
        let mut wanted: Vec<Vec<u32>> = results.iter().zip(&dtypes).map(|(r, d)| elements(*d, r)).collect();
        wanted.extend(run(&pass(0), Isa::Portable));
        for isa in Isa::available() {
            prop_assert_eq!(&wanted, &run(&pass(stored.len()), isa), "{:?}", isa);
        }
    }
}

/// Sums of many leaves beside each other, of as many columns as are summed up leaf by leaf: their rows are more than a thread's
/// workspace holds.
#[test]
fn many_chunks_of_wide_rows_fit_into_the_workspace() {
    let (rows, columns) = (128, 8192);
    let access = Access { dtype: DType::F32, offset: 0, strides: vec![columns, 1] };
    let body = Body { instrs: vec![(Instr::Load(0), DType::F32)], results: vec![0] };
    let nest = Loop { extents: vec![rows, columns], origin: vec![0; 2], operands: vec![access], body: body.into() };
    let tree = Tree { dims: vec![TreeDim { size: rows, chunks: 64 }], first: None };
    let owned = tree.root().chunks;
    let sum = Reduction { nest, reduced: vec![true, false], stored: 0, f: ReduceFn::Sum, tree, owned };
    // Whole numbers, whose sums are exact in any order.
    let x: Vec<f32> = (0..rows * columns).map(|i| (i / columns * (i % columns % 5)) as f32).collect();
    for isa in Isa::available() {
        let plan = ReducePlan::with_isa(&sum, isa);
        let mut scratch = vec![0u64; plan.scratch_bytes() / 8 + 1];
        let mut y = vec![0.0f32; columns];
        let (from, to) = ([x.as_ptr().cast()], [y.as_mut_ptr().cast()]);
        // SAFETY: the operand holds what the loop reaches, and there is room for the sums and the scratch.
        unsafe { plan.run(&Pool::new(2, None), &from, &to, scratch.as_mut_ptr().cast(), CX) };
        let wanted = |c: usize| ((rows - 1) * rows / 2 * (c % 5)) as f32;
        assert!(y.iter().enumerate().all(|(c, y)| *y == wanted(c)), "{isa:?}");
    }
}
