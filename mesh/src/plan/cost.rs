//! What a step of a plan takes at the least: operations, and bytes that pass between memory and cores.
//!
//! Both are of one device and count nothing twice: an element that is used again is read once. A profile divides them by
//! the time that the step took.

use super::step::{AllReduce, Begun, BoxCopy, Buffer, Epilogue, Exchange, OpWork, Part, Segments, Slices, Step, Work};
use crate::body::{Access, Instr, Loop};
use crate::chunk::{ChunkBox, Tree};
use crate::dim::{DType, Type};
use crate::ops::Prim;

/// What a step takes at the least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two.
    pub flops: f64,
    /// Bytes read and bytes written.
    pub bytes: f64,
}

impl Step {
    /// What kind of work it is: the op's name, the collective's, or what it was fused into (`map`, `reduce`, `copy`).
    pub fn class(&self) -> &str {
        match &self.work {
            Work::Map(_) => "map",
            Work::Reduce(_) => "reduce",
            Work::Copy(_) if !self.is_idle() => "copy",
            Work::Band(_) => "band",
            Work::Copy(_) | Work::Op(_) | Work::Exchange(_) | Work::AllReduce(_) | Work::Join(_) => &self.label.op,
            Work::Finish(Begun::Exchange(e)) => e.kind.name(),
            Work::Combine(a) | Work::Finish(Begun::AllReduce(a)) => a.name(),
        }
    }

    /// What it goes over: the result by dimension name and how many elements are summed for it, the points of a loop and
    /// the instructions at each, or the bytes of what it copies.
    pub fn extent(&self) -> String {
        let nest = |l: &Loop| format!("{} points x {}", points(l), l.body.instrs.len());
        match &self.work {
            Work::Map(l) => nest(l),
            Work::Reduce(r) => nest(&r.nest),
            Work::Op(op) => {
                let dims: Vec<_> = op.output.region.0.iter().map(|(n, r)| format!("{n}:{}", r.len())).collect();
                let count = |(tree, owned): &(Tree, ChunkBox)| tree.elements(owned).iter().map(|r| r.len()).product();
                let sum: Option<usize> = op.sum.as_ref().map(count);
                dims.join(" ") + &sum.map_or(String::new(), |n| format!(", sums of {n}"))
            }
            Work::Band(band) => {
                let steps = band.slices.first().map_or(&[][..], |s| &s.steps);
                let names: Vec<&str> = steps.iter().map(|s| &*s.name).filter(|n| *n != "copy").collect();
                format!("{} slices of {}", band.count(), names.join(", "))
            }
            Work::Copy(_)
            | Work::Exchange(_)
            | Work::AllReduce(_)
            | Work::Combine(_)
            | Work::Finish(_)
            | Work::Join(_) => {
                let buffers = if self.outputs.is_empty() { &self.inputs } else { &self.outputs };
                format!("{} bytes", buffers.iter().map(|b| b.bytes).sum::<usize>())
            }
        }
    }

    /// The dtype of a product's factors; `f32` for all else.
    pub fn dtype(&self) -> DType {
        let mut works: Box<dyn Iterator<Item = &Work>> = match &self.work {
            Work::Band(b) => Box::new(b.slices.iter().flat_map(|s| &s.steps).map(|s| &s.work)),
            work => Box::new(std::iter::once(work)),
        };
        works.find_map(half_factors).unwrap_or(DType::F32)
    }

    /// What it takes at the least.
    pub fn cost(&self) -> Cost {
        let bytes = |list: &[Buffer]| list.iter().map(|b| b.bytes).sum();
        cost(&self.work, bytes(&self.inputs), bytes(&self.outputs))
    }
}

/// What work on so many bytes takes at the least.
pub(super) fn cost(work: &Work, inputs: usize, outputs: usize) -> Cost {
    let bytes = match work {
        Work::Map(nest) => loads(nest) + stores(nest),
        Work::Reduce(r) => loads(&r.nest) + outputs,
        Work::Op(op) => {
            // The op's result, an epilogue's last operand, does not come from memory.
            let epilogue = |e: &Epilogue| loads(e.nest()) - points(e.nest()) * op.output.ty.dtype.bytes();
            op_reads(op) + op.epilogue.as_ref().map_or(0, epilogue) + outputs
        }
        Work::Copy(c) => {
            let copied: usize = c.boxes.iter().map(|(_, b)| elements(b) * c.element).sum();
            copied + if c.fill.is_some() { outputs } else { copied }
        }
        // What is between its steps stays in the cache.
        Work::Band(_) => inputs + outputs,
        Work::Exchange(e) if e.under_way.is_some() => kept(e),
        Work::Exchange(e) => kept(e) + received(e),
        Work::Finish(Begun::Exchange(e)) => received(e),
        Work::AllReduce(a) => packed(a) + if a.under_way.is_some() { 0 } else { combined(a).1 + shared(a) },
        Work::Combine(a) => combined(a).1,
        Work::Finish(Begun::AllReduce(a)) => shared(a),
        Work::Join(j) => (j.nodes().0 + j.places) * j.elements * j.dtype.bytes(),
    };
    let share = if let Work::Op(op) = work { op.computed() } else { 1.0 };
    Cost { flops: share * flops(work), bytes: share * bytes as f64 }
}

fn flops(work: &Work) -> f64 {
    match work {
        Work::Map(nest) => loop_flops(nest, 0),
        Work::Reduce(r) => loop_flops(&r.nest, r.sums()),
        Work::Op(op) => {
            op_flops(op)
                + match &op.epilogue {
                    None => 0.0,
                    Some(Epilogue::Map(nest)) => loop_flops(nest, 0),
                    Some(Epilogue::Reduce(r)) => loop_flops(&r.nest, r.sums()),
                }
        }
        Work::Band(b) => {
            let slice = |s: &Slices| s.steps.iter().map(|s| flops(&s.work)).sum::<f64>();
            b.slices.iter().map(|s| s.at.len() as f64 * slice(s)).sum()
        }
        Work::Copy(_) | Work::Exchange(_) | Work::Finish(_) => 0.0,
        Work::AllReduce(a) if a.under_way.is_some() => 0.0,
        Work::AllReduce(a) | Work::Combine(a) => combined(a).0 as f64,
        Work::Join(j) => ((j.nodes().0 - j.nodes().1) * j.elements) as f64,
    }
}

/// Of a loop that reduces so many of its results.
fn loop_flops(nest: &Loop, sums: usize) -> f64 {
    ((arithmetic(nest) + sums) * points(nest)) as f64
}

fn points(nest: &Loop) -> usize {
    nest.extents.iter().product()
}

/// The dtype of an op's inputs, if they are all of one of 16 bits.
fn half_factors(work: &Work) -> Option<DType> {
    let Work::Op(op) = work else { return None };
    let half = op.inputs.first().map(|p| p.ty.dtype).filter(|d| d.is_half())?;
    op.inputs.iter().all(|p| p.ty.dtype == half).then_some(half)
}

/// Operations at each point, counted as the ops do that were fused.
fn arithmetic(nest: &Loop) -> usize {
    let operation = |i: &Instr| match i {
        Instr::Unary(..) | Instr::Binary(..) | Instr::Compare(..) | Instr::Select(..) => 1,
        Instr::Load(_) | Instr::Constant(_) | Instr::Step | Instr::Index { .. } | Instr::Random { .. } => 0,
        Instr::Cast(_) => 0,
    };
    nest.body.instrs.iter().map(|(i, _)| operation(i)).sum()
}

/// Bytes of what the operands are read at: along a loop that does not move it, an operand is read once.
fn loads(nest: &Loop) -> usize {
    let one = |a: &Access| {
        let moving = nest.extents.iter().zip(&a.strides).filter(|(_, s)| **s > 0);
        // A loop of no points reads nothing.
        moving.map(|(n, _)| *n).product::<usize>() * a.dtype.bytes() * usize::from(points(nest) > 0)
    };
    nest.operands.iter().map(one).sum()
}

fn stores(nest: &Loop) -> usize {
    let result = |slot: &usize| nest.body.instrs[*slot].1.bytes();
    points(nest) * nest.body.results.iter().map(result).sum::<usize>()
}

/// What kernels do for whole tensors, and of that the share which is computed here.
fn op_flops(op: &OpWork) -> f64 {
    let types: Vec<&Type> = op.inputs.iter().map(|p| &*p.ty).collect();
    let tree = op.sum.as_ref().map(|(tree, _)| tree);
    let whole = op.op.op().flops(&types, &op.output.ty) as f64 * op.op.op().kernel_share(&types, &op.output.ty, tree);
    let mut share = op.output.region.elements() as f64 / op.output.ty.elements().max(1) as f64;
    if let Some((tree, owned)) = &op.sum {
        let own = tree.elements(owned);
        share *= own.iter().zip(&tree.dims).map(|(own, d)| own.len() as f64 / d.size.max(1) as f64).product::<f64>();
    }
    whole * share
}

fn op_reads(op: &OpWork) -> usize {
    let bytes = |p: &Part| p.region.elements() * p.ty.dtype.bytes();
    match &op.op {
        // Of its table it reads the rows that come out.
        Prim::Gather(_) => bytes(&op.output) + op.inputs.iter().skip(1).map(bytes).sum::<usize>(),
        _ => op.inputs.iter().map(bytes).sum(),
    }
}

fn elements(b: &BoxCopy) -> usize {
    b.extents.iter().product()
}

/// What is kept is read and written.
fn kept(e: &Exchange) -> usize {
    2 * e.local.iter().map(|b| elements(b) * e.element).sum::<usize>()
}

/// As is what comes from others; that what is sent is read is the receiver's.
fn received(e: &Exchange) -> usize {
    2 * e.recvs.iter().map(|m| m.bytes).sum::<usize>()
}

/// Operations and bytes of combining its segment of all parts.
fn combined(a: &AllReduce) -> (usize, usize) {
    let (parts, own) = (a.nodes.iter().sum::<usize>(), a.segment_elements(a.me));
    (parts.saturating_sub(1) * own, (parts + 1) * own * a.dtype.bytes())
}

/// Bytes of copying the others' results.
fn shared(a: &AllReduce) -> usize {
    match a.segments {
        Segments::Shared => 2 * (a.elements - a.segment_elements(a.me)) * a.dtype.bytes(),
        Segments::All | Segments::Boxes(_) => 0,
    }
}

/// Bytes of putting nodes of boxes together.
fn packed(a: &AllReduce) -> usize {
    let packed = (0..a.devices.len()).filter(|p| a.segment_start(*p).is_none());
    let nodes: usize = packed.map(|p| a.nodes[a.me] * a.segment_elements(p)).sum();
    2 * nodes * a.dtype.bytes()
}
