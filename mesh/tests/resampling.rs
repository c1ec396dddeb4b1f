//! Window sums, average pooling and resizing: meanings, gradients, and what they refuse.

mod common;

use common::{assert_close, assert_gradients, evaluate, ramp};
use mesh::dim::{DType, Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::ops::resize::{Resize, ResizeDim};
use mesh::ops::window::Window;
use mesh::ops::window_sum::WindowSum;
use mesh::program::ProgramBuilder;
use ndarray::array;

fn refusal(dims: &[Dim], build: impl Fn(&Graph, &Tensor) -> Tensor) -> String {
    let built = ProgramBuilder::new().function("f", |g| {
        let x = g.input("x", DType::F32, dims);
        g.output("y", &build(g, &x));
    });
    built.unwrap_err().to_string()
}

#[test]
fn the_mean_of_a_padded_window_is_that_of_its_elements_inside_the_input() {
    let d = [dim("x", 5)];
    let x = array![1.0, 2.0, 4.0, 8.0, 16.0].into_dyn();
    let y = evaluate(&[(&d, x.clone())], |_, t| t[0].avg_pool(&[Window::padded("x", 3, 2, 1, 1)]));
    assert_close(&y, &array![1.5, 14.0 / 3.0, 12.0].into_dyn(), 1e-6);
    let valid = evaluate(&[(&d, x.clone())], |_, t| t[0].avg_pool(&[Window::valid("x", 2, 1)]));
    assert_close(&valid, &array![1.5, 3.0, 6.0, 12.0].into_dyn(), 1e-6);
    let sums = evaluate(&[(&d, x)], |_, t| t[0].window_sum(&[Window::padded("x", 2, 3, 2, 2).dilated(2)]));
    assert_close(&sums, &array![1.0, 10.0, 16.0].into_dyn(), 1e-6);
}

#[test]
fn resizing_puts_centres_at_half_indices() {
    let d = [dim("x", 4)];
    let x = array![0.0, 10.0, 20.0, 30.0].into_dyn();
    let y = |to, method| evaluate(&[(&d, x.clone())], |_, t| t[0].resize(&[("x", to)], method));
    assert_close(&y(2, Resize::Linear), &array![5.0, 25.0].into_dyn(), 1e-5);
    assert_close(&y(8, Resize::Linear), &array![0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30.0].into_dyn(), 1e-5);
    assert_close(&y(1, Resize::Linear), &array![15.0].into_dyn(), 1e-5);
    assert_close(&y(3, Resize::Nearest), &array![0.0, 20.0, 30.0].into_dyn(), 0.0);
    assert_close(&y(8, Resize::Nearest), &array![0.0, 0.0, 10.0, 10.0, 20.0, 20.0, 30.0, 30.0].into_dyn(), 0.0);
}

#[test]
fn window_sums_and_resizing_have_the_gradients_of_finite_differences() {
    let d = [dim("b", 2), dim("x", 5), dim("y", 4)];
    let x = [(&d[..], ramp(&d, 1))];
    let windows = [Window::padded("x", 3, 2, 1, 1), Window::valid("y", 2, 1).dilated(2)];
    assert_gradients(&x, |_, t| t[0].window_sum(&windows).square());
    assert_gradients(&x, |_, t| t[0].avg_pool(&windows).square());
    for method in [Resize::Nearest, Resize::Linear] {
        assert_gradients(&x, |_, t| t[0].resize(&[("x", 7), ("y", 3)], method).square());
    }
    // The adjoints have gradients as well.
    let adjoint = WindowSum { window: Window::padded("x", 3, 2, 1, 1), size: 10, adjoint: true };
    assert_gradients(&x, |_, t| t[0].apply(adjoint.clone()).square());
    let adjoint = ResizeDim { dim: "y".into(), method: Resize::Linear, from: 6, to: 4, adjoint: true };
    assert_gradients(&x, |_, t| t[0].apply(adjoint.clone()).square());
}

#[test]
fn what_breaks_a_constraint_is_refused_with_its_number() {
    let d = [dim("x", 5), dim("c", 2)];
    let cases: Vec<(&str, Box<dyn Fn(&Graph, &Tensor) -> Tensor>)> = vec![
        ("C1", Box::new(|_, x| x.window_sum(&[Window::valid("y", 2, 1)]))),
        ("C1", Box::new(|_, x| x.avg_pool(&[Window::padded("x", 2, 1, 2, 0)]))),
        ("C1", Box::new(|_, x| x.window_sum(&[Window::valid("x", 2, 0)]))),
        ("C1", Box::new(|_, x| x.apply(WindowSum { window: Window::valid("x", 2, 1), size: 4, adjoint: false }))),
        ("C2", Box::new(|_, x| x.cast(DType::I32).window_sum(&[Window::valid("x", 2, 1)]))),
        ("C3", Box::new(|_, x| x.window_sum(&[Window::valid("x", 6, 1)]))),
        ("C1", Box::new(|_, x| x.resize(&[("y", 3)], Resize::Linear))),
        ("C2", Box::new(|_, x| x.resize(&[("x", 0)], Resize::Nearest))),
        ("C3", Box::new(|_, x| x.cast(DType::I32).resize(&[("x", 3)], Resize::Linear))),
    ];
    for (constraint, build) in cases {
        let e = refusal(&d, build);
        assert!(e.contains(&format!("constraint {constraint} of")) && e.contains("tests/resampling.rs"), "{e}");
    }
}
