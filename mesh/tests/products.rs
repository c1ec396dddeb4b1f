//! Dense and convolution layers against naive loops, and their gradients against finite differences.

mod common;

use common::{assert_close, assert_layer_gradients, program, ramp, run_f};
use mesh::dim::{DType, Dim, Name, dim};
use mesh::nn::{self, Dense, Kernel, Padding};
use mesh::op::Reference;
use mesh::program::ProgramBuilder;
use proptest::prelude::*;

fn y(values: &mesh::reference::Values) -> Reference {
    values[&Name::from("y")].clone()
}

#[test]
fn a_dense_layer_sums_over_the_dimensions_named_and_keeps_the_others() {
    let d = [dim("batch", 3), dim("heads", 2), dim("d_head", 4)];
    let into = [dim("d_model", 5)];
    let (p, v) = program(&d, |_, x| nn::dense(x, "out", &["heads", "d_head"], &into, &Dense::default()));
    let x = ramp(&d, 1);
    let (kernel, bias) = (&v[&Name::from("out/kernel")], &v[&Name::from("out/bias")]);
    assert_eq!((kernel.shape(), bias.shape()), (&[2, 4, 5][..], &[5][..]));
    let expected = Reference::from_shape_fn(vec![3, 5], |i| {
        let products = ndarray::indices((2, 4)).into_iter().map(|(h, k)| x[[i[0], h, k]] * kernel[[h, k, i[1]]]);
        products.sum::<f64>() + bias[[i[1]]]
    });
    assert_close(&y(&run_f(&p, &x, &v)), &expected, 1e-9);
    assert_layer_gradients(&d, x, |_, x| nn::dense(x, "out", &["heads", "d_head"], &into, &Dense::default()));
}

#[test]
fn a_dense_layer_may_make_a_dimension_of_the_name_it_sums_over() {
    let d = [dim("batch", 2), dim("d_model", 4)];
    let build = |x: &mesh::graph::Tensor| nn::dense(x, "pool", &["d_model"], &[dim("d_model", 3)], &Dense::unbiased());
    let (p, _) = program(&d, |_, x| build(x));
    assert_eq!(p.variables.iter().map(|v| v.ty.to_string()).collect::<Vec<_>>(), ["f32[d_model_in:4, d_model:3]"]);
    assert_layer_gradients(&d, ramp(&d, 1), |_, x| build(x));
}

#[test]
fn a_chunk_of_contracted_dimensions_holds_about_32_products() {
    let count = |d: [Dim; 2]| {
        let over = [d[0].clone(), d[1].clone()];
        let (p, _) = program(&[dim("batch", 1), d[0].clone(), d[1].clone()], |_, x| {
            nn::dense(x, "n", &["heads", "d_head"], &[dim("d_ff", 64)], &Dense::default())
        });
        over.map(|d| p.chunking.count(&d.name, d.size))
    };
    assert_eq!(count([dim("heads", 8), dim("d_head", 64)]), [8, 2]);
    assert_eq!(count([dim("heads", 8), dim("d_head", 16)]), [4, 1]);
}

#[test]
fn a_dense_layer_refuses_to_make_what_its_input_keeps() {
    let e = ProgramBuilder::new()
        .function("f", |g| {
            let x = g.input("x", DType::F32, &[dim("seq", 3), dim("d_model", 4)]);
            g.output("y", &nn::dense(&x, "n", &["d_model"], &[dim("seq", 3)], &Dense::default()));
        })
        .unwrap_err();
    assert!(e.to_string().contains("keeps its `seq`") && e.to_string().contains("tests/products.rs"), "{e}");
}

/// A convolution along `x` of `[x, i]` with a filter `[k, i / groups, o]`, written down as it is defined.
fn naive(
    x: &Reference,
    f: &Reference,
    stride: usize,
    dilation: usize,
    pad: (usize, usize),
    groups: usize,
) -> Reference {
    let (n, k, each, o) = (x.shape()[0], f.shape()[0], f.shape()[1], f.shape()[2]);
    let m = (n + pad.0 + pad.1 - (k - 1) * dilation - 1) / stride + 1;
    Reference::from_shape_fn(vec![m, o], |at| {
        let group = at[1] / (o / groups);
        let mut sum = 0.0;
        for (j, i) in ndarray::indices((k, each)) {
            let from = (at[0] * stride + j * dilation).wrapping_sub(pad.0);
            if from < n {
                sum += x[[from, group * each + i]] * f[[j, i, at[1]]];
            }
        }
        sum
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_convolution_layer_is_its_definition(
        n in 5usize..10, k in 1usize..4, stride in 1usize..4, dilation in 1usize..3, groups in 1usize..3, kind in 0usize..3,
    ) {
        let reach = (k - 1) * dilation + 1;
        let (padding, pad) = match kind {
            0 => {
                let total = ((n.div_ceil(stride) - 1) * stride + reach).saturating_sub(n);
                (Padding::Same, (total / 2, total - total / 2))
            }
            1 => (Padding::Valid, (0, 0)),
            _ => (Padding::Explicit(vec![(reach - 1, reach / 2)]), (reach - 1, reach / 2)),
        };
        let d = [dim("x", n), dim("channel", 2 * groups)];
        let kernel = Kernel::new(&["x"], k).stride(stride).dilation(dilation).groups(groups).padding(padding).unbiased();
        let (p, v) = program(&d, |_, x| nn::conv(x, "c", &kernel, &dim("channel", 3 * groups)));
        let x = ramp(&d, 1);
        let expected = naive(&x, &v[&Name::from("c/filter")], stride, dilation, pad, groups);
        assert_close(&y(&run_f(&p, &x, &v)), &expected, 1e-9);
    }

    #[test]
    fn a_transposed_convolution_is_the_adjoint_of_the_convolution(
        m in 2usize..5, k in 1usize..5, stride in 1usize..4, groups in 1usize..3, same in proptest::bool::ANY,
    ) {
        // <conv(x), y> = <x, convT(y)> with one filter.
        let padding = if same { Padding::Same } else { Padding::Valid };
        let kernel = Kernel::new(&["x"], k).stride(stride).groups(groups).padding(padding).unbiased();
        let (small, wide, narrow) = (dim("x", m), dim("wide", 2 * groups), dim("narrow", groups));
        let up = kernel.clone().from_channel("wide");
        let d = [small, wide.clone()];
        let (p, v) = program(&d, |_, y| nn::conv_transpose(y, "c", &up, &narrow));
        let below = ramp(&d, 1);
        let grown = y(&run_f(&p, &below, &v));
        let d = [dim("x", grown.shape()[0]), narrow];
        let down = kernel.from_channel("narrow");
        let (p, _) = program(&d, |_, x| nn::conv(x, "c", &down, &wide));
        let above = ramp(&d, 2);
        let shrunk = y(&run_f(&p, &above, &v));
        let (a, b) = ((&shrunk * &below).sum(), (&above * &grown).sum());
        prop_assert!((a - b).abs() < 1e-9 * (1.0 + a.abs()), "{a} {b}");
    }
}

#[test]
fn convolution_layers_have_the_gradients_of_finite_differences() {
    let d = [dim("batch", 2), dim("x", 4), dim("y", 3), dim("channel", 2)];
    let channel = dim("channel", 4);
    let kernels = [
        Kernel::new(&["x", "y"], 3),
        Kernel::of(&[("x", 2), ("y", 3)]).stride(2).groups(2),
        Kernel::new(&["y"], 2).dilation(2).padding(Padding::Explicit(vec![(1, 2)])),
    ];
    for kernel in kernels {
        assert_layer_gradients(&d, ramp(&d, 3), |_, x| nn::conv(x, "c", &kernel, &channel));
        assert_layer_gradients(&d, ramp(&d, 4), |_, x| nn::conv_transpose(x, "c", &kernel, &channel));
    }
}

#[test]
fn a_transposed_convolution_doubles_a_volume_or_meets_an_odd_skip() {
    let d = [dim("x", 3), dim("y", 2), dim("z", 1), dim("channel", 4)];
    let up = Kernel::new(&["x", "y", "z"], 2).stride(2).unbiased();
    let (p, v) = program(&d, |_, x| nn::conv_transpose(x, "up", &up, &dim("channel", 2)));
    assert_eq!(y(&run_f(&p, &ramp(&d, 1), &v)).shape(), [6, 4, 2, 2]);
    assert_eq!(p.parameters(), 8 * 4 * 2);
    let odd = up.to(&[5, 3, 2]);
    let (p, v) = program(&d, |_, x| nn::conv_transpose(x, "up", &odd, &dim("channel", 2)));
    assert_eq!(y(&run_f(&p, &ramp(&d, 1), &v)).shape(), [5, 3, 2, 2]);
}

#[test]
fn a_wrong_kernel_is_an_error_at_the_users_line() {
    let wrong: [(&str, Kernel, usize); 6] = [
        ("has no dimension `chanel`", Kernel::new(&["x"], 3).from_channel("chanel"), 4),
        ("has no dimension `xx`", Kernel::new(&["xx"], 3), 4),
        ("another number of paddings", Kernel::new(&["x"], 3).padding(Padding::Explicit(vec![])), 4),
        ("another number of sizes", Kernel::new(&["x"], 3).to(&[1, 2]), 4),
        ("of 0", Kernel::new(&["x"], 3).stride(0), 4),
        ("cannot cut channel:3 into 2 groups", Kernel::new(&["x"], 3).groups(2), 3),
    ];
    for (text, kernel, channels) in wrong {
        for transposed in [false, true] {
            let e = ProgramBuilder::new()
                .function("f", |g| {
                    let x = g.input("image", DType::F32, &[dim("x", 4), dim("channel", 2)]);
                    let channel = dim("channel", channels);
                    g.output(
                        "y",
                        &match transposed {
                            false => nn::conv(&x, "c", &kernel, &channel),
                            true => nn::conv_transpose(&x, "c", &kernel, &channel),
                        },
                    );
                })
                .unwrap_err();
            assert!(e.to_string().contains(text) && e.to_string().contains("tests/products.rs"), "{e}");
        }
    }
}
