//! The reference evaluation of a whole function: scalar loops over whole tensors in double precision.
//!
//! It defines what a program means; the tests hold kernels, lowering and gradients against it.

use crate::dim::Name;
use crate::op::Reference;
use crate::ops::Prim;
use crate::program::{Function, Program};
use crate::rng::Stream;
use std::collections::BTreeMap;

/// Values by name.
pub type Values = BTreeMap<Name, Reference>;

/// Runs `function` once.
///
/// `feeds` holds its inputs and `variables` every variable it reads; those it assigns are updated in place. Returns
/// the outputs.
///
/// # Panics
/// If a feed or a variable is missing: this is an oracle for tests.
pub fn run(
    program: &Program,
    function: &Function,
    feeds: &Values,
    variables: &mut Values,
    seed: u64,
    step: u32,
) -> Values {
    let mut values: Vec<Reference> = Vec::with_capacity(function.nodes.len());
    for node in &function.nodes {
        let value = match &node.op {
            Prim::Input(i) => feeds[&i.name].clone(),
            Prim::Read(r) => variables[&program.variables[r.var.index()].name].clone(),
            Prim::Step(_) => Reference::from_elem(ndarray::IxDyn(&[]), f64::from(step)),
            Prim::Random(r) => {
                let stream = Stream { seed, step, key: r.key };
                let mut index = 0;
                Reference::from_shape_simple_fn(node.ty.shape(), || {
                    index += 1;
                    stream.draw(r.distribution, index - 1)
                })
            }
            prim => {
                let inputs: Vec<&Reference> = node.inputs.iter().map(|i| &values[i.index()]).collect();
                prim.op().reference(&inputs, &function.input_types(node), &node.ty)
            }
        };
        assert_eq!(value.shape(), node.ty.shape(), "{} {}", node.op.op().name(), node.ty);
        values.push(value);
    }
    for (var, node) in &function.assigns {
        variables.insert(program.variables[var.index()].name.clone(), values[node.index()].clone());
    }
    function.outputs.iter().map(|(n, id)| (n.clone(), values[id.index()].clone())).collect()
}

/// Variables as the program's `init` sets them.
pub fn init(program: &Program, seed: u64) -> Values {
    let mut variables = Values::new();
    if let Some(f) = program.functions.get(&Name::from("init")) {
        run(program, f, &Values::new(), &mut variables, seed, 0);
    }
    variables
}
