//! Helpers of the integration tests: programs on many meshes, bit for bit.
#![allow(dead_code, reason = "each test uses some of them")]

use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::program::{Program, ProgramBuilder};
use mesh::reference::{self, Values};
use mesh::rng::Stream;
use ndarray::ArrayD;

/// Random numbers in [-1, 1), a function of `key`.
pub fn ramp(dims: &[Dim], key: u32) -> ArrayD<f32> {
    let stream = Stream { seed: 7, step: 0, key };
    let mut i = 0;
    ArrayD::from_shape_simple_fn(dims.iter().map(|d| d.size).collect::<Vec<_>>(), || {
        i += 1;
        stream.uniform(i) * 2.0 - 1.0
    })
}

/// A feed of a test: its dimensions, and f32 or i32 values.
pub fn f32s(dims: &[Dim], key: u32) -> (Vec<Dim>, Array) {
    (dims.to_vec(), Array::F32(ramp(dims, key)))
}

/// Integers in `0 .. below`.
pub fn i32s(dims: &[Dim], key: u32, below: i32) -> (Vec<Dim>, Array) {
    (dims.to_vec(), Array::I32(ramp(dims, key).mapv(|v| (((v + 1.0) * 0.5 * below as f32) as i32).clamp(0, below - 1))))
}

/// A program whose `f` takes `x0, x1, ..` and gives `y`, and the gradients `d x0, ..` of a random weighting of y by
/// its float inputs.
pub fn program(feeds: &[(Vec<Dim>, Array)], gradients: bool, build: impl Fn(&Graph, &[Tensor]) -> Tensor) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let xs: Vec<Tensor> =
            feeds.iter().enumerate().map(|(i, (d, a))| g.input(format!("x{i}"), a.dtype(), d)).collect();
        let y = build(g, &xs);
        g.output("y", &y);
        if gradients {
            let weights = g.random_keyed(mesh::ops::source::Distribution::Uniform, &y.ty().dims, 99);
            let loss = y.mul(&weights).sum_all();
            let floats: Vec<&Tensor> = xs.iter().filter(|x| x.ty().dtype == DType::F32).collect();
            for (x, grad) in floats.iter().zip(g.gradients(&loss, &floats)) {
                let i = xs.iter().position(|t| t.id() == x.id()).unwrap();
                g.output(format!("d x{i}"), &grad);
            }
        }
    })
    .unwrap();
    p.finish().unwrap()
}

/// Runs `f` on a mesh.
pub fn run(p: &Program, feeds: &[(Vec<Dim>, Array)], mesh: &str, layout: &str, threads: usize) -> Vec<(Name, Array)> {
    let options = Options {
        mesh: mesh.parse().unwrap(),
        layout: layout.parse().unwrap(),
        threads: Some(threads),
        seed: 1,
        ..Options::default()
    };
    let mut session = Session::embedded(p.clone(), &options).unwrap_or_else(|e| panic!("{mesh} {layout}: {e}"));
    let names: Vec<String> = (0..feeds.len()).map(|i| format!("x{i}")).collect();
    let feeds: Vec<(&str, &Array)> = names.iter().zip(feeds).map(|(n, (_, a))| (n.as_str(), a)).collect();
    let out = session.run("f", 0, &feeds).unwrap();
    for peak in session.peaks() {
        assert!(peak.peak_bytes_measured <= peak.peak_bytes_predicted);
    }
    out
}

pub fn wide(a: &Array) -> Reference {
    match a {
        Array::F32(a) => a.mapv(f64::from),
        Array::I32(a) => a.mapv(f64::from),
        Array::Bool(a) => a.mapv(|b| f64::from(u8::from(b))),
    }
}

/// Holds `f` on one device to its reference evaluation, and on every other mesh to the one device, bit for bit.
pub fn same_everywhere(what: &str, p: &Program, feeds: &[(Vec<Dim>, Array)], layouts: &[(&str, &str)], tolerance: f64) {
    let whole = run(p, feeds, "1", "", 1);
    let values: Values = feeds.iter().enumerate().map(|(i, (_, a))| (Name::from(format!("x{i}")), wide(a))).collect();
    let expected = reference::run(p, p.function("f").unwrap(), &values, &mut reference::init(p, 1), 1, 0);
    for (name, array) in &whole {
        let (got, want) = (wide(array), &expected[name]);
        assert_eq!(got.shape(), want.shape(), "{what} {name}");
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            let near = (g - w).abs() <= tolerance * (1.0 + w.abs()) || (g.is_nan() && w.is_nan()) || g == w;
            assert!(near, "{what}: {name}[{i}] of {:?} is {g}, the reference says {w}", got.shape());
        }
    }
    for (i, (mesh, layout)) in layouts.iter().enumerate() {
        for ((name, a), (_, b)) in whole.iter().zip(run(p, feeds, mesh, layout, 1 + i % 2)) {
            if a.to_bytes() != b.to_bytes() {
                let pairs = wide(a).into_iter().zip(wide(&b)).enumerate();
                let (count, first) = pairs.fold((0, None), |(n, first), (i, (a, b))| {
                    let differs = a.to_bits() != b.to_bits();
                    (n + usize::from(differs), first.or(differs.then_some((i, a, b))))
                });
                let first = first.map(|(i, a, b)| format!("element {i} is {a} on one device and {b} here"));
                panic!(
                    "{what}: {name} of {:?} on {mesh} with {layout} differs in {count} elements; {}",
                    a.shape(),
                    first.unwrap_or_default()
                );
            }
        }
    }
}
