//! The first value that is not finite is named, on every mesh, unless it is infinite and meant to be.

mod common;

use common::run::options;
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::graph::Tensor;
use mesh::nn;
use mesh::ops::window::Window;
use mesh::program::{Init, Program, ProgramBuilder};
use ndarray::ArrayD;

fn dims() -> [Dim; 2] {
    [dim("x", 16), dim("y", 16)]
}

/// Where the logarithm stands.
const LINE: u32 = line!() + 9;

fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let w = g.variable("w", &[dim("y", 16), dim("z", 16)], Init::ones());
        let x = g.input("x", DType::F32, &dims());
        let y = g.scoped("outer", || {
            let product = x.contract(&w, &["y"]);
            g.scoped("deep", || product.add_scalar(16.5).log())
        });
        // What is stored is named; what is fused into a sum would go by its name.
        g.output("log", &y);
        g.output("y", &y.square().add_scalar(1.0).sum(&["z"]).sqrt());
    })
    .unwrap();
    p.finish().unwrap()
}

/// All of this value, but for one element.
fn feed(value: f32, odd: f32) -> Array {
    let mut x = ArrayD::from_elem(vec![16, 16], value);
    x[[13, 3]] = odd;
    x.into()
}

#[test]
fn the_op_that_first_gives_no_number_is_named_with_its_place_on_every_mesh() {
    for (mesh, layout) in [("1", ""), ("a=2,b=2", "x:a,z:b"), ("a=2,b=2", "x:a,y:b")] {
        let mut s = Session::embedded(program(), &options(mesh, layout)).unwrap();
        let run = |s: &mut Session, x: &Array| {
            s.run("f", 0, &[("x", x)]).unwrap();
            s.non_finite()
        };
        s.watch(true);
        assert!(run(&mut s, &feed(1.0, 2.0)).is_empty(), "{mesh}");
        let found = run(&mut s, &feed(1.0, -40.0));
        assert_eq!(found.len(), 1, "{mesh}: {found:?}");
        for text in ["outer/deep", &format!("tests/watch.rs:{LINE}"), "are no number"] {
            assert!(found[0].contains(text), "{mesh}: `{text}` in {found:?}");
        }
        // What is infinite before it is no number is told too; then it is over.
        s.watch(true);
        let found = run(&mut s, &feed(3e38, -3e38));
        assert!(found[0].contains("are infinite"), "{mesh}: {found:?}");
        s.watch(false);
        assert!(run(&mut s, &feed(1.0, -40.0)).is_empty(), "{mesh}");
        // A variable that is not finite before the step.
        s.set_variable("w", &ArrayD::from_elem(vec![16, 16], f32::NAN).into()).unwrap();
        s.watch(true);
        let found = run(&mut s, &feed(1.0, 2.0));
        assert!(found[0].contains("the variable `w`, before the step"), "{mesh}: {found:?}");
    }
}

/// Scores of which some are masked, and what is computed from them; `odd` makes values of its own out of `x`.
fn masked(odd: impl Fn(&Tensor) -> Tensor) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let x = g.input("x", DType::F32, &dims());
        let bias = g.input("bias", DType::F32, &dims());
        let highest = g.state("highest", &dims()[..1], Init::Constant(f32::NEG_INFINITY));
        let w = g.variable("w", &dims(), Init::ones());
        // By a constant, by a feed, by padding.
        let scores = x.greater(&x.zeros_like()).select(&x, &g.scalar(f32::NEG_INFINITY));
        g.output("scores", &scores);
        let biased = scores.add(&bias).mul(&w);
        g.output("biased", &biased);
        let padded = biased.pad("y", 1, 1, f64::NEG_INFINITY);
        g.output("pooled", &padded.max_pool(&[Window::padded("y", 2, 1, 0, 0)]));
        // Two taps, neither of which meets the three elements.
        let narrow = x.slice("y", 0, 3);
        g.output("nothing", &narrow.max_pool(&[Window { dilation: 5, ..Window::padded("y", 2, 1, 4, 4) }]));
        let now = biased.max(&["y"]);
        g.output("softmax", &nn::softmax(&biased, &["y"]));
        g.assign(&highest, &highest.maximum(&now));
        g.output("odd", &g.scoped("odd", || odd(&x)));
    })
    .unwrap();
    p.finish().unwrap()
}

/// What is found on a mesh when `masked` runs two steps; the feed has negative numbers, but not only.
fn found(p: &Program, mesh: &str, layout: &str) -> Vec<String> {
    let mut s = Session::embedded(p.clone(), &options(mesh, layout)).unwrap();
    let x =
        ArrayD::from_shape_fn(vec![16, 16], |i| if i[1] == 0 { 1.0 } else { (i[0] * 7 + i[1] * 5) as f32 % 9.0 - 4.0 });
    let bias = ArrayD::from_shape_fn(vec![16, 16], |i| if i[1] == 3 { f32::NEG_INFINITY } else { 0.5 });
    s.watch(true);
    for step in 0..2 {
        let out = s.run("f", step, &[("x", &x.clone().into()), ("bias", &bias.clone().into())]).unwrap();
        let infinite =
            |name: &str| out.iter().any(|(n, a)| &**n == name && a.as_f32().unwrap().iter().any(|v| v.is_infinite()));
        assert!(["scores", "biased", "pooled", "nothing"].iter().all(|n| infinite(n)), "{mesh} {layout}");
        assert!(!infinite("softmax"), "{mesh} {layout}");
    }
    s.non_finite()
}

const MESHES: [(&str, &str); 4] = [("1", ""), ("a=2", "x:a"), ("a=3", "y:a"), ("a=2,b=2", "x:a,y:b")];

#[test]
fn infinite_values_that_are_meant_are_no_finding() {
    let p = masked(|x| x.add_scalar(1.0));
    for (mesh, layout) in MESHES {
        assert_eq!(found(&p, mesh, layout), Vec::<String>::new(), "{mesh} {layout}");
    }
}

#[test]
fn what_finite_values_make_infinite_is_found_beside_masks() {
    let overflows: [(&str, fn(&Tensor) -> Tensor); 5] = [
        ("exp", |x| x.add_scalar(100.0).exp()),
        ("log 0", |x| x.mul(&x.zeros_like()).log()),
        ("1/0", |x| x.square().add_scalar(1.0).div(&x.mul(&x.zeros_like()))),
        // Finite on each of two devices, and only their sum is not.
        ("a sum", |x| x.square().mul_scalar(3e35).sum(&["x", "y"])),
        ("a product", |x| x.square().mul_scalar(1e37).contract(&x.square().rename("x", "z"), &["y"])),
    ];
    for (what, odd) in overflows {
        let p = masked(odd);
        for (mesh, layout) in MESHES {
            let found = found(&p, mesh, layout);
            assert_eq!(found.len(), 1, "{what} on {mesh} {layout}: {found:?}");
            assert!(found[0].contains(" odd` (") && found[0].contains("are infinite"), "{what} on {mesh}: {found:?}");
        }
    }
}

#[test]
fn an_infinite_weight_is_found_before_the_step_and_an_infinite_state_is_not() {
    let mut s = Session::embedded(masked(Tensor::clone), &options("a=2", "x:a")).unwrap();
    s.watch(true);
    s.set_variable("w", &ArrayD::from_elem(vec![16, 16], f32::INFINITY).into()).unwrap();
    let x: Array = ArrayD::from_elem(vec![16, 16], 1.0f32).into();
    s.run("f", 0, &[("x", &x), ("bias", &x)]).unwrap();
    let found = s.non_finite();
    assert!(found[0].starts_with("the variable `w`, before the step: 128 of 128 values"), "{found:?}");
    assert!(found[0].ends_with("are infinite"), "{found:?}");
}
