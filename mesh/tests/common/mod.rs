//! Helpers of the integration tests.
#![allow(dead_code, reason = "each test uses some of them")]

use mesh::dim::{DType, Dim, Name};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::program::ProgramBuilder;
use mesh::reference::{self, Values};
use mesh::rng::Stream;

/// A value that is different at every element and never twice the same in one tensor.
pub fn ramp(dims: &[Dim], key: u32) -> Reference {
    let stream = Stream { seed: 7, step: 0, key };
    let mut i = 0;
    Reference::from_shape_simple_fn(dims.iter().map(|d| d.size).collect::<Vec<_>>(), || {
        i += 1;
        f64::from(stream.uniform(i)) * 2.0 - 1.0
    })
}

/// Evaluates `build` on `f32` inputs with the reference.
pub fn evaluate(inputs: &[(&[Dim], Reference)], build: impl Fn(&Graph, &[Tensor]) -> Tensor) -> Reference {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let xs: Vec<Tensor> =
            inputs.iter().enumerate().map(|(i, (d, _))| g.input(format!("x{i}"), DType::F32, d)).collect();
        g.output("y", &build(g, &xs));
    })
    .unwrap();
    let p = p.finish().unwrap();
    let feeds: Values = inputs.iter().enumerate().map(|(i, (_, v))| (Name::from(format!("x{i}")), v.clone())).collect();
    reference::run(&p, p.function("f").unwrap(), &feeds, &mut reference::init(&p, 1), 1, 0)
        .remove(&Name::from("y"))
        .unwrap()
}

/// Holds the gradients of `build` by its `f32` inputs against central differences of its reference evaluation.
///
/// The loss is the sum of the result weighted by fixed random numbers.
pub fn assert_gradients(inputs: &[(&[Dim], Reference)], build: impl Fn(&Graph, &[Tensor]) -> Tensor) {
    let loss_of = |g: &Graph, xs: &[Tensor]| {
        let y = build(g, xs);
        let weights = g.random_keyed(mesh::ops::source::Distribution::Uniform, &y.ty().dims, 99);
        y.mul(&weights).sum_all()
    };
    for (i, (dims, x)) in inputs.iter().enumerate() {
        let grad = evaluate(inputs, |g, xs| {
            let loss = loss_of(g, xs);
            g.gradients(&loss, &[&xs[i]]).remove(0)
        });
        assert_eq!(grad.shape(), dims.iter().map(|d| d.size).collect::<Vec<_>>());
        let h = 1e-5;
        for (at, &g) in grad.indexed_iter() {
            let at: Vec<usize> = (0..dims.len()).map(|d| at[d]).collect();
            let moved = |by: f64| {
                let mut inputs = inputs.to_vec();
                inputs[i].1[at.as_slice()] = x[at.as_slice()] + by;
                evaluate(&inputs, loss_of).sum()
            };
            let difference = (moved(h) - moved(-h)) / (2.0 * h);
            assert!(
                (g - difference).abs() <= 1e-4 * (1.0 + difference.abs()),
                "input {i} at {at:?}: gradient {g}, difference quotient {difference}"
            );
        }
    }
}
