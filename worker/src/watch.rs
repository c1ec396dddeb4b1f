//! Watching for values that are not finite: which step of a plan first writes one.
//!
//! A session that diverged does its last steps again with its devices watching; ordinary steps pay one comparison each.

use mesh::dim::DType;
use mesh::plan::{self, Work};

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

/// The dtype and number of elements of each result that a step computes; empty for steps that only move and add up what
/// others computed.
pub fn results(step: &plan::Step) -> Vec<(DType, usize)> {
    let of_bodies = |body: &mesh::body::Body| body.results.iter().map(|r| body.instrs[*r].1).collect::<Vec<_>>();
    let dtypes = match &step.work {
        Work::Map(nest) => of_bodies(&nest.body),
        Work::Reduce(r) => of_bodies(&r.nest.body),
        Work::Op(op) => vec![op.output.ty.dtype],
        Work::Copy(_) | Work::Exchange(_) | Work::AllReduce(_) => vec![],
    };
    dtypes.into_iter().zip(&step.outputs).map(|(d, b)| (d, b.bytes / d.bytes())).collect()
}

/// What of some values is not finite: whether any is no number, how many, and the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Whether any is no number.
    pub nan: bool,
    /// How many are not finite.
    pub count: usize,
    /// Index of the first.
    pub first: usize,
}

/// Looks through values; None if all are finite.
///
/// # Safety
/// So many elements of that dtype lie at `values`, and nobody writes them meanwhile.
pub unsafe fn scan(dtype: DType, values: *const u8, elements: usize) -> Option<Scan> {
    let found = |odd: &mut dyn Iterator<Item = (usize, bool)>| {
        let (first, nan) = odd.next()?;
        let scan = Scan { nan, count: 1, first };
        Some(odd.fold(scan, |s, (_, nan)| Scan { nan: s.nan || nan, count: s.count + 1, ..s }))
    };
    match dtype {
        DType::F32 => {
            // SAFETY: by this function's contract.
            let all = unsafe { std::slice::from_raw_parts(values.cast::<f32>(), elements) };
            found(&mut all.iter().enumerate().filter(|(_, v)| !v.is_finite()).map(|(i, v)| (i, v.is_nan())))
        }
        DType::Bf16 => {
            // SAFETY: as above.
            let all = unsafe { std::slice::from_raw_parts(values.cast::<u16>(), elements) };
            let odd = all.iter().enumerate().filter(|(_, v)| **v & 0x7f80 == 0x7f80);
            found(&mut odd.map(|(i, v)| (i, *v & 0x7f != 0)))
        }
        DType::I32 | DType::Bool => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_tells_infinite_values_from_what_is_no_number() {
        let floats = [0.0f32, 1e38, f32::INFINITY, -1.0, f32::NEG_INFINITY];
        let halves: [u16; 4] = [0x3f80, 0x7f7f, 0x7fc0, 0xff80];
        // SAFETY: the arrays hold as many elements.
        unsafe {
            assert_eq!(scan(DType::F32, floats.as_ptr().cast(), 2), None);
            assert_eq!(scan(DType::F32, floats.as_ptr().cast(), 5), Some(Scan { nan: false, count: 2, first: 2 }));
            assert_eq!(scan(DType::Bf16, halves.as_ptr().cast(), 4), Some(Scan { nan: true, count: 2, first: 2 }));
            assert_eq!(scan(DType::I32, halves.as_ptr().cast(), 2), None);
        }
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
