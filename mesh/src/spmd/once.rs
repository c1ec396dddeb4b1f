//! Scalars that are made of the same by the same ops are made once: each variable's update corrects its running means by
//! the number of the step, which is the same for all.

use super::{Instr, SpmdOp, SpmdProgram, ValueId};
use crate::ops::Prim;
use std::collections::HashMap;

/// The program with each scalar made once wherever it lies.
pub(super) fn once(mut program: SpmdProgram) -> SpmdProgram {
    let mut of: Vec<ValueId> = (0..program.values.len() as u32).map(ValueId).collect();
    let mut made: HashMap<Vec<ValueId>, Vec<(Prim, ValueId)>> = HashMap::new();
    let values = &program.values;
    program.instrs.retain_mut(|Instr { op, inputs, output }| {
        inputs.iter_mut().for_each(|v| *v = of[v.index()]);
        let SpmdOp::Compute { prim, sum: None } = op else { return true };
        let value = &values[output.index()];
        if value.ty.elements() > 1 {
            return true;
        }
        let same = made.entry(inputs.clone()).or_default();
        let there = |v: &ValueId| {
            let other = &values[v.index()];
            (&other.ty, &other.regions) == (&value.ty, &value.regions)
        };
        match same.iter().find(|(p, v)| p == prim && there(v)) {
            Some((_, first)) => of[output.index()] = *first,
            None => same.push((prim.clone(), *output)),
        }
        of[output.index()] == *output
    });
    let root = |v: &mut ValueId| *v = of[v.index()];
    program.outputs.iter_mut().for_each(|(_, v)| root(v));
    program.assigns.iter_mut().for_each(|(_, v)| root(v));
    program.sums.iter_mut().for_each(root);
    program.kept = program.kept.iter().map(|v| of[v.index()]).collect();
    program
}
