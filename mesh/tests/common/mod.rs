//! Helpers of the integration tests.
#![allow(dead_code, reason = "each test uses some of them")]

use mesh::dim::{DType, Dim, Name};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::plan::{Backend, Work};
use mesh::program::{Program, ProgramBuilder};
use mesh::reference::{self, Values};
use mesh::rng::Stream;

/// A backend without scratch or workspace.
pub struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

/// A program of one function, `step`.
pub fn stepping(build: impl Fn(&Graph)) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("step", |g| build(g)).unwrap();
    p.finish().unwrap()
}

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

/// A program with the function `f` of one `f32` input `x`, and variables that are all different.
pub fn program(dims: &[Dim], build: impl Fn(&Graph, &Tensor) -> Tensor) -> (Program, Values) {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let x = g.input("x", DType::F32, dims);
        let y = build(g, &x);
        let weights = g.random_keyed(mesh::ops::source::Distribution::Uniform, &y.ty().dims, 99);
        let loss = y.mul(&weights).sum_all();
        let trainable = g.trainable();
        let mut wrt = vec![&x];
        wrt.extend(trainable.iter().map(|(_, t)| t));
        let grads = g.gradients(&loss, &wrt);
        g.output("y", &y);
        g.output("loss", &loss);
        g.output("d x", &grads[0]);
        for ((id, _), grad) in trainable.iter().zip(&grads[1..]) {
            g.output(format!("d {}", g.variable_name(*id)), grad);
        }
    })
    .unwrap();
    let p = p.finish().unwrap();
    let variables = p.variables.iter().enumerate();
    let values = variables.map(|(i, v)| (v.name.clone(), ramp(&v.ty.dims, 50 + i as u32).mapv(|v| v + 1.5))).collect();
    (p, values)
}

/// Runs its `f` on `x`, as step 0.
pub fn run_f(p: &Program, x: &Reference, variables: &Values) -> Values {
    let feeds = Values::from([(Name::from("x"), x.clone())]);
    reference::run(p, p.function("f").unwrap(), &feeds, &mut variables.clone(), 1, 0)
}

/// Holds a layer's gradients by its input and by its variables against central differences.
pub fn assert_layer_gradients(dims: &[Dim], x: Reference, build: impl Fn(&Graph, &Tensor) -> Tensor) {
    let (p, variables) = program(dims, build);
    let results = run_f(&p, &x, &variables);
    let h = 1e-5;
    let loss = |x: &Reference, variables: &Values| run_f(&p, x, variables)[&Name::from("loss")].sum();
    let mut held = 0;
    let mut hold = |what: &str, at: usize, difference: f64| {
        let grad = results[&Name::from(format!("d {what}"))].iter().nth(at).copied().unwrap();
        let close = (grad - difference).abs() <= 1e-5 * (1.0 + difference.abs());
        assert!(close, "{what} {at}: gradient {grad}, difference quotient {difference}");
        held += 1;
    };
    let moved = |a: &Reference, at: usize, by: f64| {
        let mut a = a.clone();
        a.iter_mut().skip(at).take(1).for_each(|v| *v += by);
        a
    };
    for at in 0..x.len() {
        let by = |h| loss(&moved(&x, at, h), &variables);
        hold("x", at, (by(h) - by(-h)) / (2.0 * h));
    }
    for v in p.variables.iter().filter(|v| v.trainable) {
        for at in 0..v.ty.elements() {
            let by = |h| {
                let mut variables = variables.clone();
                let value = moved(&variables[&v.name], at, h);
                variables.insert(v.name.clone(), value);
                loss(&x, &variables)
            };
            hold(&v.name, at, (by(h) - by(-h)) / (2.0 * h));
        }
    }
    assert_eq!(held, x.len() + p.parameters());
}

/// Holds two arrays to be the same but for `tolerance` in each element.
pub fn assert_close(a: &Reference, b: &Reference, tolerance: f64) {
    assert_eq!(a.shape(), b.shape());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "off by {worst}\n{a}\n{b}");
}
