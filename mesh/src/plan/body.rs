//! Makes the loop nest of a fused step for one device.

use super::fuse::Fused;
use crate::body::{Access, Body, Instr, Loop, Slot};
use crate::dim::{DType, Name};
use crate::ops::Prim;
use crate::ops::binary::BinaryFn;
use crate::ops::unary::UnaryFn;
use crate::region::Region;
use crate::spmd::{SpmdOp, ValueId};
use std::collections::HashMap;

/// Row-major strides of an array of those extents.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// Builds the loop over `at` whose results are `roots`: values of just the dimensions of `at`, in memory or not.
/// Stored values are loaded, except those in `inside`, which this loop computes. Returns the loaded values too, in
/// the order of the loop's operands.
pub(super) fn build(
    fused: &Fused,
    device: usize,
    at: &Region,
    roots: &[ValueId],
    inside: &[ValueId],
) -> (Loop, Vec<ValueId>) {
    let mut b = Builder {
        fused,
        device,
        inside,
        at,
        origin: at.0.iter().map(|(_, r)| r.start).collect(),
        operands: vec![],
        loaded: vec![],
        body: Body::default(),
        made: HashMap::new(),
    };
    let names: Vec<(Name, usize)> = at.0.iter().enumerate().map(|(i, (n, _))| (n.clone(), i)).collect();
    b.body.results = roots.iter().map(|&v| b.emit(v, &names)).collect();
    (Loop { extents: at.shape(), origin: b.origin, operands: b.operands, body: b.body }, b.loaded)
}

struct Builder<'a> {
    fused: &'a Fused<'a>,
    device: usize,
    inside: &'a [ValueId],
    at: &'a Region,
    origin: Vec<usize>,
    operands: Vec<Access>,
    loaded: Vec<ValueId>,
    body: Body,
    made: HashMap<(ValueId, Vec<usize>), Slot>,
}

impl Builder<'_> {
    /// The slot of a value whose dimensions run along the loops that `names` gives them.
    fn emit(&mut self, v: ValueId, names: &[(Name, usize)]) -> Slot {
        let value = &self.fused.spmd.values[v.index()];
        let loops: Vec<usize> = value
            .ty
            .dims
            .iter()
            .map(|d| names.iter().find(|(n, _)| *n == d.name).map(|(_, l)| *l))
            .collect::<Option<_>>()
            .expect("every dimension of a fused value is one of the loop's");
        let key = (v, loops.clone());
        if let Some(&slot) = self.made.get(&key) {
            return slot;
        }
        let root = self.fused.root(v);
        let slot = if self.fused.stored.contains(&root) && !self.inside.contains(&root) {
            self.load(v, root, &loops)
        } else {
            self.compute(v, &loops)
        };
        self.made.insert(key, slot);
        slot
    }

    /// Loads `v`, whose bytes are those of `root`.
    fn load(&mut self, v: ValueId, root: ValueId, loops: &[usize]) -> Slot {
        let value = &self.fused.spmd.values[v.index()];
        let held = &value.regions[self.device];
        let own = strides(&held.shape());
        let mut access = Access { dtype: value.ty.dtype, offset: 0, strides: vec![0; self.origin.len()] };
        for ((&l, (_, range)), s) in loops.iter().zip(&held.0).zip(&own) {
            access.offset += (self.origin[l] - range.start.min(self.origin[l])) * s;
            access.strides[l] = *s;
        }
        self.operands.push(access);
        self.loaded.push(root);
        self.push(Instr::Load(self.operands.len() - 1), value.ty.dtype)
    }

    fn push(&mut self, instr: Instr, dtype: DType) -> Slot {
        self.body.instrs.push((instr, dtype));
        self.body.instrs.len() - 1
    }

    fn compute(&mut self, v: ValueId, loops: &[usize]) -> Slot {
        let fused = self.fused;
        let value = &fused.spmd.values[v.index()];
        let producer = fused.producer[v.index()].expect("feeds and variables are stored");
        let instr = &fused.spmd.instrs[producer];
        let SpmdOp::Compute { prim, .. } = &instr.op else { unreachable!("only elementwise values are not stored") };
        let names: Vec<(Name, usize)> =
            value.ty.dims.iter().map(|d| d.name.clone()).zip(loops.iter().copied()).collect();
        let dtype = value.ty.dtype;
        let inputs: Vec<Slot> = match prim {
            Prim::Rename(_) => {
                // The input's dimensions are the result's, one for one, under other names.
                let from = &fused.spmd.values[instr.inputs[0].index()].ty;
                let names: Vec<_> = from.dims.iter().map(|d| d.name.clone()).zip(loops.iter().copied()).collect();
                return self.emit(instr.inputs[0], &names);
            }
            _ => instr.inputs.iter().map(|&i| self.emit(i, &names)).collect(),
        };
        let made = match prim {
            Prim::Constant(c) => Instr::Constant(c.value),
            Prim::Step(_) => Instr::Step,
            Prim::Iota(_) => Instr::Index { dim: loops[0] },
            Prim::Random(r) => {
                let whole = strides(&value.ty.shape());
                let mut by_loop = vec![0; self.at.0.len()];
                loops.iter().zip(&whole).for_each(|(&l, &s)| by_loop[l] = s as u64);
                Instr::Random { distribution: r.distribution, key: r.key, strides: by_loop }
            }
            Prim::Unary(u) if u.f == UnaryFn::Identity => return inputs[0],
            Prim::Unary(u) => Instr::Unary(u.f, inputs[0]),
            Prim::Binary(b) => Instr::Binary(b.f, inputs[0], inputs[1]),
            Prim::Compare(c) => Instr::Compare(c.f, inputs[0], inputs[1]),
            Prim::Select(_) => Instr::Select(inputs[0], inputs[1], inputs[2]),
            Prim::Cast(_) => Instr::Cast(inputs[0]),
            Prim::Broadcast(_) => return inputs[0],
            other => unreachable!("{} is not elementwise", other.op().name()),
        };
        if dtype.is_half() && rounds(prim) {
            // At every op, so that it makes no difference which values are stored.
            let wide = self.push(made, DType::F32);
            return self.push(Instr::Cast(wide), dtype);
        }
        self.push(made, dtype)
    }
}

/// Whether an op of 16-bit floats may give one that is none.
fn rounds(prim: &Prim) -> bool {
    match prim {
        Prim::Unary(u) => !matches!(u.f, UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Sign | UnaryFn::Relu | UnaryFn::Floor),
        Prim::Binary(b) => !matches!(b.f, BinaryFn::Max | BinaryFn::Min),
        _ => false,
    }
}
