//! How a reduction combines elements: rows of values, one after the other, into a row of results, or into lanes.
//!
//! Roofline: the values, once, from the first-level cache, and an operation for each.

use super::isa::Isa;
use super::math;
use super::row_sums::{self, LANES, from_lanes, into_lanes};
use super::tile::Combine;
use crate::dispatch;
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;
use std::ops::Range;

/// Evaluates an expression with the function that combines two elements, known when it is compiled.
macro_rules! with_function {
    ($by:expr, |$f:ident| $body:expr) => {
        match $by {
            (ReduceFn::Sum, true) => with_function!(@ $f, $body, |a: f32, b: f32| a + b),
            (ReduceFn::Max, true) => with_function!(@ $f, $body, |a: f32, b: f32| math::max(a, b)),
            (ReduceFn::Min, true) => with_function!(@ $f, $body, |a: f32, b: f32| math::min(a, b)),
            (by, false) => with_function!(@ $f, $body, |a: f32, b: f32| {
                f32::from_bits(integer(by, a.to_bits() as i32, b.to_bits() as i32) as u32)
            }),
        }
    };
    (@ $f:ident, $body:expr, $function:expr) => {{
        let $f = $function;
        $body
    }};
}

/// How elements of one dtype are combined; the bits of an `i32` or `bool` lie in a float's.
#[derive(Clone, Copy)]
pub(super) struct Fold {
    isa: Isa,
    /// The function, and whether it is of floats.
    by: (ReduceFn, bool),
}

impl Fold {
    /// By a function, for one instruction set.
    pub(super) fn new(isa: Isa, f: ReduceFn, dtype: DType) -> Fold {
        Fold { isa, by: (f, dtype.is_float()) }
    }

    /// What there is of nothing.
    pub(super) fn identity(&self) -> f32 {
        match self.by {
            (f, true) => f.identity(),
            (ReduceFn::Sum, false) => 0.0,
            (ReduceFn::Max, false) => f32::from_bits(i32::MIN as u32),
            (ReduceFn::Min, false) => f32::from_bits(i32::MAX as u32),
        }
    }

    /// a = a + b.
    pub(super) fn add(&self, a: &mut [f32], b: &[f32]) {
        let by = self.by;
        dispatch!(self.isa, fn(by: (ReduceFn, bool), a: &mut [f32], b: &[f32]) {
            with_function!(by, |f| a.iter_mut().zip(b).for_each(|(a, b)| *a = f(*a, *b)));
        });
    }

    /// Sums up rows of values, one after the other, by the runs that they belong to. `open` has the sums of the run that has
    /// begun; at its end they are added to its leaf's, those of run `n` at `sums[n * pitch..]`.
    // Closures have the instruction set of what they stand in.
    #[allow(clippy::redundant_closure)]
    pub(super) fn runs(&self, rows: Rows, runs: &[Range<usize>], sums: &mut [f32], pitch: usize, open: &mut [f32]) {
        let (by, identity) = (self.by, self.identity());
        dispatch!(self.isa, fn(
            by: (ReduceFn, bool),
            identity: f32,
            rows: Rows,
            runs: &[Range<usize>],
            sums: &mut [f32],
            pitch: usize,
            open: &mut [f32],
        ) {
            if by != (ReduceFn::Sum, true) {
                return with_function!(by, |f| each_run(rows, runs, sums, pitch, open, |run, v, begins, leaf| {
                    combine_rows(run, v, begins.then_some(identity), leaf, f)
                }));
            }
            match rows.columns {
                1 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<1>(r, v, b, l)),
                2 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<2>(r, v, b, l)),
                3 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<3>(r, v, b, l)),
                4 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<4>(r, v, b, l)),
                5 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<5>(r, v, b, l)),
                6 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<6>(r, v, b, l)),
                7 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<7>(r, v, b, l)),
                8 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<8>(r, v, b, l)),
                16 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<16>(r, v, b, l)),
                32 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<32>(r, v, b, l)),
                64 => each_run(rows, runs, sums, pitch, open, |r, v, b, l| add_rows::<64>(r, v, b, l)),
                _ => each_run(rows, runs, sums, pitch, open, |run, v, begins, leaf| {
                    combine_rows(run, v, begins.then_some(0.0), leaf, |a, b| a + b)
                }),
            }
        });
    }

    /// Adds a part of each row of `columns` values to lanes, row after row; value `i` of a part goes to lane
    /// `(first + i) % 16`, and `first` is a multiple of 16.
    pub(super) fn lanes(&self, lanes: &mut [f32], v: &[f32], columns: usize, part: Range<usize>, first: usize) {
        debug_assert_eq!(first % LANES, 0);
        let by = self.by;
        dispatch!(self.isa, fn(
            by: (ReduceFn, bool),
            lanes: &mut [f32],
            v: &[f32],
            columns: usize,
            part: Range<usize>,
        ) {
            let Ok(lanes) = <&mut [f32; LANES]>::try_from(lanes) else { return };
            with_function!(by, |f| v.chunks_exact(columns).for_each(|v| into_lanes(lanes, &v[part.clone()], f)));
        });
    }

    /// The sum of lanes.
    pub(super) fn finish_lanes(&self, lanes: &[f32]) -> f32 {
        let mut l = [0.0f32; LANES];
        l.copy_from_slice(lanes);
        with_function!(self.by, |f| from_lanes(l, f))
    }

    /// The sums of rows of `n` values each, by the stack machine of a node over leaves inside a row.
    pub(super) fn row_sums(
        &self,
        program: &[Combine],
        leaves: &[Vec<Range<usize>>],
        v: &[f32],
        n: usize,
        sums: &mut [f32],
    ) {
        let by = self.by;
        if by.1 && n > row_sums::SHORT && row_sums::wide(self.isa, by.0, program, leaves, v, n, sums) {
            return;
        }
        let identity = self.identity();
        dispatch!(self.isa, fn(
            by: (ReduceFn, bool),
            program: &[Combine],
            leaves: &[Vec<Range<usize>>],
            v: &[f32],
            n: usize,
            sums: &mut [f32],
            identity: f32,
        ) {
            with_function!(by, |f| row_sums::rows(program, leaves, v, n, sums, identity, f));
        });
    }
}

/// Some rows of values, which lie one after the other.
pub(super) struct Rows<'a> {
    pub v: &'a [f32],
    pub columns: usize,
    /// Where they lie along the loop of runs.
    pub at: Range<usize>,
}

/// Gives each run what it has of the rows: `add(run, values, begins, leaf)`.
#[inline(always)]
fn each_run(
    rows: Rows,
    runs: &[Range<usize>],
    sums: &mut [f32],
    pitch: usize,
    open: &mut [f32],
    add: impl Fn(&mut [f32], &[f32], bool, Option<&mut [f32]>),
) {
    let Rows { v, columns, at } = rows;
    let mut from = at.start;
    for (number, run) in runs.iter().enumerate() {
        let end = run.end.min(at.end);
        if end <= from {
            continue;
        }
        if run.start >= at.end {
            break;
        }
        let (v, begins) = (&v[(from - at.start) * columns..(end - at.start) * columns], from == run.start);
        let own = &mut sums[number * pitch..][..columns];
        add(open, v, begins, (end == run.end).then_some(own));
        from = end;
    }
}

/// Adds rows of N values to N sums, which stay in registers, and those at last to the leaf's.
#[inline(always)]
fn add_rows<const N: usize>(run: &mut [f32], v: &[f32], begins: bool, leaf: Option<&mut [f32]>) {
    let Ok(run) = <&mut [f32; N]>::try_from(run) else { return };
    let mut local = if begins { [0.0; N] } else { *run };
    for row in v.as_chunks::<N>().0 {
        for l in 0..N {
            local[l] += row[l];
        }
    }
    match leaf.and_then(|leaf| <&mut [f32; N]>::try_from(leaf).ok()) {
        Some(leaf) => (0..N).for_each(|l| leaf[l] += local[l]),
        None => *run = local,
    }
}

/// Combines rows of values with a row of results, which begins with `begins`, and that at last with the leaf's.
#[inline(always)]
fn combine_rows(
    run: &mut [f32],
    v: &[f32],
    begins: Option<f32>,
    leaf: Option<&mut [f32]>,
    f: impl Fn(f32, f32) -> f32,
) {
    if let Some(identity) = begins {
        run.fill(identity);
    }
    let onto = |to: &mut [f32], v: &[f32]| to.iter_mut().zip(v).for_each(|(a, b)| *a = f(*a, *b));
    v.chunks_exact(run.len().max(1)).for_each(|v| onto(run, v));
    if let Some(leaf) = leaf {
        onto(leaf, run);
    }
}

fn integer(f: ReduceFn, x: i32, y: i32) -> i32 {
    match f {
        ReduceFn::Sum => x.wrapping_add(y),
        ReduceFn::Max => x.max(y),
        ReduceFn::Min => x.min(y),
    }
}
