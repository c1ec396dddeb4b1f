//! Makes the loop nests of fused steps: once, and from that the loop of each device.

use super::band::View;
use super::fuse::Fused;
use crate::body::{Access, Body, Instr, Loop, Slot, strides};
use crate::dim::{DType, Name};
use crate::ops::Prim;
use crate::ops::binary::BinaryFn;
use crate::ops::unary::UnaryFn;
use crate::region::Region;
use crate::spmd::{SpmdOp, ValueId};
use std::collections::HashMap;
use std::sync::Arc;

/// The loop nest of a fused step: what is the same on every device.
pub(super) struct Nest {
    /// By operand: the value that is loaded, and the loop that each of its dimensions runs along.
    loads: Vec<(ValueId, Vec<usize>)>,
    /// By operand: the stored value whose bytes those are.
    pub loaded: Vec<ValueId>,
    body: Arc<Body>,
}

impl Nest {
    /// The nest whose results are `roots`: values in memory or not, each of as many dimensions as there are loops, in order,
    /// maybe under other names. Stored values are loaded, except those in `inside`, which the nest computes.
    pub fn new(fused: &Fused, roots: &[ValueId], inside: &[ValueId]) -> Nest {
        let (body, made) = (Body::default(), HashMap::new());
        let depth = roots.first().map_or(0, |v| fused.ty(*v).dims.len());
        let mut b = Builder { fused, inside, depth, loads: vec![], loaded: vec![], body, made };
        let names =
            |v: ValueId| fused.ty(v).dims.iter().enumerate().map(|(i, d)| (d.name.clone(), i)).collect::<Vec<_>>();
        b.body.results = roots.iter().map(|&v| b.emit(v, &names(v))).collect();
        Nest { loads: b.loads, loaded: b.loaded, body: b.body.into() }
    }

    /// The same nest with one of its operands behind all others.
    pub fn with_last(mut self, operand: usize) -> Nest {
        let last = self.loads.len() - 1;
        self.loads[operand..].rotate_left(1);
        self.loaded[operand..].rotate_left(1);
        for (instr, _) in &mut Arc::make_mut(&mut self.body).instrs {
            if let Instr::Load(o) = instr {
                *o = if *o == operand { last } else { *o - usize::from(*o > operand) };
            }
        }
        self
    }

    /// Its loop over `at`, where there is of values what `view` says.
    pub fn on(&self, view: View, at: &Region) -> Loop {
        let operands = (0..self.loads.len()).map(|o| self.access(o, view, at)).collect();
        let origin = at.0.iter().map(|(_, r)| r.start).collect();
        Loop { extents: at.shape(), origin, operands, body: self.body.clone() }
    }

    /// How the loop over `at` reads an operand.
    pub fn access(&self, operand: usize, view: View, at: &Region) -> Access {
        let (v, loops) = &self.loads[operand];
        let held = view.region(*v);
        let mut access = Access { dtype: view.fused.ty(*v).dtype, offset: 0, strides: vec![0; at.0.len()] };
        let mut stride = 1;
        for (&l, (_, range)) in loops.iter().zip(&held.0).rev() {
            let first = at.0[l].1.start;
            access.offset += (first - range.start.min(first)) * stride;
            access.strides[l] = stride;
            stride *= range.len();
        }
        access
    }
}

struct Builder<'a> {
    fused: &'a Fused<'a>,
    inside: &'a [ValueId],
    /// How many loops there are.
    depth: usize,
    loads: Vec<(ValueId, Vec<usize>)>,
    loaded: Vec<ValueId>,
    body: Body,
    made: HashMap<(ValueId, Vec<usize>), Slot>,
}

impl Builder<'_> {
    /// The slot of a value whose dimensions run along the loops that `names` gives them.
    fn emit(&mut self, v: ValueId, names: &[(Name, usize)]) -> Slot {
        let fused = self.fused;
        let value = &fused.spmd.values[v.index()];
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
        let root = fused.root(v);
        let slot = if fused.stored.contains(&root) && !self.inside.contains(&root) {
            self.load(v, root, &loops)
        } else {
            self.compute(v, &loops)
        };
        self.made.insert(key, slot);
        slot
    }

    /// Loads `v`, whose bytes are those of `root`.
    fn load(&mut self, v: ValueId, root: ValueId, loops: &[usize]) -> Slot {
        self.loads.push((v, loops.to_vec()));
        self.loaded.push(root);
        self.push(Instr::Load(self.loads.len() - 1), self.fused.ty(v).dtype)
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
                let mut by_loop = vec![0; self.depth];
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
