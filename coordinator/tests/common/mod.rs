//! Helpers of the integration tests: programs on many meshes, bit for bit.
#![allow(dead_code, reason = "each test uses some of them")]

pub mod run;
pub mod staged;
pub mod workers;

use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::program::{Program, ProgramBuilder};
use mesh::reference::{self, Values};
use mesh::rng::Stream;
use ndarray::ArrayD;
use std::collections::BTreeMap;

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

/// A draw from `0 .. below`, in order.
pub struct Draws(Stream, u64);

impl Draws {
    /// Draws that are a function of `seed`.
    pub fn new(seed: u64) -> Draws {
        Draws(Stream { seed, step: 0, key: 1 }, 0)
    }
    /// The next one.
    pub fn below(&mut self, below: usize) -> usize {
        self.1 += 1;
        ((self.0.uniform(self.1) * below as f32) as usize).min(below - 1)
    }
}

/// Layouts (mesh and rules) that split one, two or three of the dimensions over 2 to 4 devices each; the first ones
/// split each dimension alone.
pub fn layouts(draw: &mut Draws, dims: &[Dim], more: usize) -> Vec<(String, String)> {
    let large: Vec<&Dim> = dims.iter().filter(|d| d.size > 1).collect();
    let mut out = Vec::new();
    for i in 0..large.len() + if large.len() > 1 { more } else { 0 } {
        let mut chosen = vec![large[i % large.len()]];
        for _ in 0..if i < large.len() { 0 } else { 1 + draw.below(2) } {
            let d = large[draw.below(large.len())];
            if !chosen.contains(&d) {
                chosen.push(d);
            }
        }
        let most = if chosen.len() > 1 { 3 } else { 4 };
        let shards: Vec<usize> = chosen.iter().map(|d| 2 + draw.below(d.size.min(most) - 1)).collect();
        let mesh: Vec<String> = shards.iter().enumerate().map(|(a, n)| format!("m{a}={n}")).collect();
        let rules: Vec<String> = chosen.iter().enumerate().map(|(a, d)| format!("{}:m{a}", d.name)).collect();
        out.push((mesh.join(","), rules.join(",")));
    }
    out
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
    for peak in session.peaks().unwrap() {
        assert!(peak.peak_bytes_measured <= peak.peak_bytes_predicted);
    }
    out
}

/// An array in double precision.
pub fn wide(a: &Array) -> Reference {
    match a {
        Array::F32(a) => a.mapv(f64::from),
        Array::I32(a) => a.mapv(f64::from),
        Array::Bool(a) => a.mapv(|b| f64::from(u8::from(b))),
    }
}

/// The results of the reference evaluation of `f`.
pub fn expected(p: &Program, feeds: &[(Vec<Dim>, Array)]) -> Values {
    let values: Values = feeds.iter().enumerate().map(|(i, (_, a))| (Name::from(format!("x{i}")), wide(a))).collect();
    reference::run(p, p.function("f").unwrap(), &values, &mut reference::init(p, 1), 1, 0)
}

/// Holds results to those of the reference evaluation: `|got - want| <= tolerance (1 + |want|)`.
pub fn assert_near(what: &str, got: &[(Name, Array)], expected: &Values, tolerance: f64) {
    for (name, array) in got {
        let (got, want) = (wide(array), &expected[name]);
        assert_eq!(got.shape(), want.shape(), "{what} {name}");
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            let near = (g - w).abs() <= tolerance * (1.0 + w.abs()) || (g.is_nan() && w.is_nan()) || g == w;
            assert!(near, "{what}: {name}[{i}] of {:?} is {g}, the reference says {w}", got.shape());
        }
    }
}

/// Holds the results on a mesh to those on one device, bit for bit.
pub fn assert_bits_eq(what: &str, whole: &[(Name, Array)], split: &[(Name, Array)], on: &str) {
    for ((name, a), (_, b)) in whole.iter().zip(split) {
        if a.to_bytes() != b.to_bytes() {
            let pairs = wide(a).into_iter().zip(wide(b)).enumerate();
            let (count, first) = pairs.fold((0, None), |(n, first), (i, (a, b))| {
                let differs = a.to_bits() != b.to_bits();
                (n + usize::from(differs), first.or(differs.then_some((i, a, b))))
            });
            let first = first.map(|(i, a, b)| format!("element {i} is {a} on one device and {b} here"));
            let first = first.unwrap_or_default();
            panic!("{what}: {name} of {:?} on {on} differs in {count} elements; {first}", a.shape());
        }
    }
}

/// Holds `f` on one device to its reference evaluation, and on every other mesh to the one device, bit for bit.
pub fn same_everywhere(what: &str, p: &Program, feeds: &[(Vec<Dim>, Array)], layouts: &[(&str, &str)], tolerance: f64) {
    let whole = run(p, feeds, "1", "", 1);
    assert_near(what, &whole, &expected(p, feeds), tolerance);
    for (i, (mesh, layout)) in layouts.iter().enumerate() {
        let split = run(p, feeds, mesh, layout, 1 + i % 2);
        assert_bits_eq(what, &whole, &split, &format!("{mesh} with {layout}"));
    }
}

/// The dimensions of a program's function with the fewest chunks that a tensor has along them, in alphabetical order.
pub fn chunks(p: &Program, function: &str) -> Vec<(Name, usize)> {
    let mut least: BTreeMap<Name, usize> = BTreeMap::new();
    let variables = p.variables.iter().map(|v| &v.ty);
    for d in p.function(function).unwrap().nodes.iter().map(|n| &n.ty).chain(variables).flat_map(|t| &t.dims) {
        let n = p.chunking.count(&d.name, d.size);
        least.entry(d.name.clone()).and_modify(|m| *m = n.min(*m)).or_insert(n);
    }
    least.into_iter().collect()
}

/// Whether some tensor of the function (or some variable) has both dimensions.
pub fn meet(p: &Program, function: &str, a: &str, b: &str) -> bool {
    let variables = p.variables.iter().map(|v| &v.ty);
    let mut types = p.function(function).unwrap().nodes.iter().map(|n| &n.ty).chain(variables);
    types.any(|t| t.has(a) && t.has(b))
}

/// Layouts of a function: every dimension alone over 2, 3 and 4 devices, all pairs and all triples of dimensions on an
/// axis each, and pairs that no tensor has together on one axis. As far as there are chunks.
pub fn grid(p: &Program, function: &str) -> Vec<(String, String)> {
    let dims = chunks(p, function);
    let mut found = vec![];
    for (i, (a, n)) in dims.iter().enumerate() {
        let shards = |n: usize, most: usize| n.min(most);
        found.extend((2..=4).filter(|s| s <= n).map(|s| (format!("m={s}"), format!("{a}:m"))));
        for (j, (b, m)) in dims.iter().enumerate().skip(i + 1) {
            let (s, t) = (shards(*n, 2 + (i + j) % 2), shards(*m, 3 - (i + j) % 2));
            if s > 1 && t > 1 {
                found.push((format!("m={s},n={t}"), format!("{a}:m,{b}:n")));
                if !meet(p, function, a, b) {
                    found.push((format!("m={}", s.min(t)), format!("{a}:m,{b}:m")));
                }
            }
            for (c, _) in dims.iter().skip(j + 1).filter(|(_, k)| *k.min(n).min(m) > 1) {
                found.push(("m=2,n=2,o=2".into(), format!("{a}:o,{b}:m,{c}:n")));
            }
        }
    }
    found
}

/// [`same_everywhere`] on the [`grid`] of the program's layouts.
pub fn same_on_the_grid(what: &str, p: &Program, feeds: &[(Vec<Dim>, Array)], tolerance: f64) {
    let layouts = grid(p, "f");
    let layouts: Vec<(&str, &str)> = layouts.iter().map(|(m, l)| (m.as_str(), l.as_str())).collect();
    same_everywhere(what, p, feeds, &layouts, tolerance);
}

/// A program whose function `step` is what `build` makes.
pub fn stepping(build: impl Fn(&Graph)) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("step", |g| build(g)).unwrap();
    p.finish().unwrap()
}

/// Runs `step` some times on a mesh: all results of every step, and all variables at the end.
pub fn steps(p: &Program, mesh: &str, layout: &str, count: u32, feeds: &[(&str, &Array)]) -> Vec<(Name, Array)> {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let options = Options { mesh, layout, threads: Some(1), seed: 1, ..Options::default() };
    let mut session = Session::embedded(p.clone(), &options)
        .unwrap_or_else(|e| panic!("{} with {}: {e}", options.mesh, options.layout));
    let mut seen = vec![];
    for step in 0..count {
        let results = session.run("step", step, feeds).unwrap();
        seen.extend(results.into_iter().map(|(n, a)| (Name::from(format!("{n} of step {step}")), a)));
    }
    for v in &p.variables {
        seen.push((v.name.clone(), session.variable(&v.name).unwrap()));
    }
    seen
}

/// What [`steps`] gives, by the reference evaluation.
pub fn expected_steps(p: &Program, count: u32, feeds: &[(&str, &Array)]) -> Values {
    let mut variables = reference::init(p, 1);
    let mut seen = Values::new();
    let feeds: Values = feeds.iter().map(|(n, a)| (Name::from(*n), wide(a))).collect();
    for step in 0..count {
        let results = reference::run(p, p.function("step").unwrap(), &feeds, &mut variables, 1, step);
        seen.extend(results.into_iter().map(|(n, a)| (Name::from(format!("{n} of step {step}")), a)));
    }
    seen.extend(variables);
    seen
}

/// Holds `count` steps on one device to the reference evaluation, and on every layout of the [`grid`] to the one
/// device, bit for bit: all results and all variables.
pub fn steps_on_the_grid(what: &str, p: &Program, count: u32, feeds: &[(&str, &Array)], tolerance: f64) {
    let whole = steps(p, "1", "", count, feeds);
    assert_near(what, &whole, &expected_steps(p, count, feeds), tolerance);
    for (mesh, layout) in grid(p, "step") {
        let split = steps(p, &mesh, &layout, count, feeds);
        assert_bits_eq(what, &whole, &split, &format!("{mesh} with {layout}"));
    }
}
