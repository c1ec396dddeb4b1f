//! Products, convolutions, pools and movements against finite differences of their references.

mod common;

use common::{assert_gradients, ramp};
use mesh::dim::{DType, Dim, dim};
use mesh::graph::Tensor;
use mesh::ops::conv::{Conv, ConvTranspose};
use mesh::ops::window::Window;

fn grid() -> [Dim; 3] {
    [dim("x", 5), dim("y", 3), dim("c", 2)]
}

#[test]
fn what_only_moves_elements_moves_their_gradients_back() {
    let d = grid();
    let inputs = [(&d[..], ramp(&d, 1))];
    assert_gradients(&inputs, |_, t| t[0].rename("x", "w"));
    assert_gradients(&inputs, |_, t| t[0].slice("x", 1, 4));
    assert_gradients(&inputs, |_, t| t[0].slice_by("x", 1, 5, 2));
    assert_gradients(&inputs, |_, t| t[0].pad("y", 2, 1, 3.0));
    assert_gradients(&inputs, |_, t| t[0].shift("x", 2, false));
    assert_gradients(&inputs, |_, t| t[0].shift("x", -7, true));
    assert_gradients(&inputs, |_, t| t[0].reorder(&["c", "x", "y"]));
    assert_gradients(&inputs, |_, t| t[0].broadcast(&[dim("new", 2), dim("x", 5), dim("y", 3), dim("c", 2)]));
    assert_gradients(&inputs, |_, t| Tensor::concat(&[&t[0], &t[0].slice("x", 0, 2).square()], "x"));
    assert_gradients(&inputs, |_, t| t[0].cast(DType::F32).mul(&t[0].stop_gradient().mul_scalar(0.0).add_scalar(2.0)));
}

#[test]
fn products_over_any_dimensions_have_both_gradients() {
    let (a, b) = ([dim("n", 2), dim("i", 3), dim("k", 4)], [dim("n", 2), dim("k", 4), dim("j", 2)]);
    let inputs = [(&a[..], ramp(&a, 1)), (&b[..], ramp(&b, 2))];
    assert_gradients(&inputs, |_, t| t[0].contract(&t[1], &["k"]));
    assert_gradients(&inputs, |_, t| t[0].contract(&t[1], &["n", "k"]));
    // Summed over a dimension that only one of them has.
    assert_gradients(&inputs, |_, t| t[0].contract(&t[1], &["k", "i"]));
    assert_gradients(&inputs, |_, t| t[0].contract(&t[1], &[]));
}

#[test]
fn the_gradient_of_a_pool_goes_to_the_largest() {
    let d = grid();
    let inputs = [(&d[..], ramp(&d, 5))];
    assert_gradients(&inputs, |_, t| t[0].max_pool(&[Window::valid("x", 2, 2)]));
    assert_gradients(&inputs, |_, t| t[0].max_pool(&[Window::same("x", 5, 3, 1, 1), Window::same("y", 3, 2, 2, 1)]));
}

#[test]
fn convolutions_of_every_kind_have_both_gradients_and_so_have_their_gradients() {
    let (x, f) = (grid(), [dim("k.x", 3), dim("k.y", 2), dim("c", 2), dim("o", 3)]);
    let windows = vec![Window::same("x", 5, 3, 2, 1), Window::padded("y", 2, 1, 1, 0).dilated(2)];
    let conv = Conv { windows, input: "c".into(), output: "o".into(), groups: 1 };
    let m: Vec<Dim> =
        ["x", "y"].iter().zip(&conv.windows).zip([5, 3]).map(|((n, w), size)| dim(*n, w.outputs(size))).collect();
    let y = [m[0].clone(), m[1].clone(), dim("o", 3)];
    let inputs = [(&x[..], ramp(&x, 1)), (&f[..], ramp(&f, 2)), (&y[..], ramp(&y, 3))];
    let pair = |a: usize, b: usize| [inputs[a].clone(), inputs[b].clone()];
    assert_gradients(&pair(0, 1), |_, t| t[0].conv(&t[1], &conv));
    let transposed = ConvTranspose { conv: conv.clone(), sizes: vec![5, 3] };
    assert_gradients(&pair(2, 1), |_, t| t[0].conv_transpose(&t[1], &transposed));
    assert_gradients(&pair(0, 2), |_, t| t[0].conv_weight_grad(&t[1], &conv));
}
