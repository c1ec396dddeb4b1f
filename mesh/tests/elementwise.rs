//! Elementwise ops and reductions against finite differences, and the cases that others get wrong.

mod common;

use common::{assert_gradients, evaluate, ramp};
use mesh::dim::{DType, dim};
use mesh::op::Reference;
use mesh::ops::unary::{Unary, UnaryFn};
use ndarray::array;

#[test]
fn gradients_of_unary_functions_are_their_derivatives() {
    let d = [dim("x", 5)];
    for f in UnaryFn::ALL {
        let positive = matches!(f, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip);
        let x = ramp(&d, 1).mapv(|v| if positive { v.abs() + 0.5 } else { v });
        if !matches!(f, UnaryFn::Not | UnaryFn::Sign | UnaryFn::Floor) {
            assert_gradients(&[(&d, x)], |_, t| t[0].apply(Unary { f }));
        }
    }
}

#[test]
fn gradients_of_binary_functions_sum_over_what_was_broadcast() {
    let (a, b) = ([dim("x", 3), dim("c", 2)], [dim("c", 2), dim("y", 2)]);
    let inputs = [(&a[..], ramp(&a, 1)), (&b[..], ramp(&b, 2))];
    assert_gradients(&inputs, |_, t| t[0].add(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].sub(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].mul(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].div(&t[1].add_scalar(3.0)));
    assert_gradients(&inputs, |_, t| t[0].add_scalar(2.0).pow(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].maximum(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].minimum(&t[1]));
    assert_gradients(&inputs, |_, t| t[0].less(&t[1]).select(&t[0].mul(&t[0]), &t[1]));
}

fn gradient_of(
    x: Reference,
    dims: &[mesh::dim::Dim],
    f: impl Fn(&mesh::graph::Tensor) -> mesh::graph::Tensor,
) -> Reference {
    evaluate(&[(dims, x)], |g, t| {
        let loss = f(&t[0]).sum_all();
        g.gradients(&loss, &[&t[0]]).remove(0)
    })
}

#[test]
fn tied_maxima_share_a_gradient_that_sums_to_one() {
    let d = [dim("x", 4)];
    let g = gradient_of(array![2.0, 7.0, 7.0, 1.0].into_dyn(), &d, |x| x.max(&["x"]));
    assert_eq!(g, array![0.0, 0.5, 0.5, 0.0].into_dyn());
}

#[test]
fn maximum_of_a_value_with_itself_has_gradient_one() {
    let d = [dim("x", 2)];
    assert_eq!(gradient_of(array![3.0, -1.0].into_dyn(), &d, |x| x.maximum(x)), array![1.0, 1.0].into_dyn());
}

#[test]
fn reductions_have_the_gradients_of_finite_differences() {
    let d = [dim("x", 3), dim("y", 2), dim("z", 2)];
    let inputs = [(&d[..], ramp(&d, 3))];
    assert_gradients(&inputs, |_, t| t[0].sum(&["x", "z"]));
    assert_gradients(&inputs, |_, t| t[0].mean(&["y"]));
    assert_gradients(&inputs, |_, t| t[0].max(&["z"]));
    assert_gradients(&inputs, |_, t| t[0].square().min(&["x", "y", "z"]));
}

#[test]
fn one_hot_marks_the_index() {
    let c = dim("class", 3);
    let y = evaluate(&[(&[dim("x", 2)], array![2.0, 0.0].into_dyn())], |_, t| t[0].cast(DType::I32).one_hot(&c));
    assert_eq!(y, array![[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]].into_dyn());
}
