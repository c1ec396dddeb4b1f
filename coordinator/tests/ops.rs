//! Every op and its gradient: near the reference, and the same bits however its tensors are split.

mod common;

use common::{Draws, assert_bits_eq, assert_near, chunks, expected, f32s, i32s, meet, program, run, same_on_the_grid};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::ops::Prim;
use mesh::ops::binary::{Binary, BinaryFn};
use mesh::ops::conv::{Conv, ConvTranspose, ConvWeightGrad};
use mesh::ops::resize::Resize;
use mesh::ops::source::Distribution;
use mesh::ops::unary::{Unary, UnaryFn};
use mesh::ops::window::Window;
use mesh::program::Init;

type Feed = (Vec<Dim>, Array);

fn dims(list: &[(&str, usize)]) -> Vec<Dim> {
    list.iter().map(|(n, s)| dim(*n, *s)).collect()
}

/// A feed of these dimensions; numbers in [-1, 1).
fn feed(list: &[(&str, usize)], key: u32) -> Feed {
    f32s(&dims(list), key)
}

/// A feed of numbers in [1, 3).
fn positive(list: &[(&str, usize)], key: u32) -> Feed {
    let (d, a) = feed(list, key);
    (d, Array::F32(a.as_f32().unwrap().mapv(|v| v + 2.0)))
}

/// Holds an op with its gradients.
fn hold(what: &str, feeds: &[Feed], build: impl Fn(&Graph, &[Tensor]) -> Tensor) {
    same_on_the_grid(what, &program(feeds, true, build), feeds, 1e-4);
}

/// Holds an op without gradients.
fn hold_value(what: &str, feeds: &[Feed], build: impl Fn(&Graph, &[Tensor]) -> Tensor) {
    same_on_the_grid(what, &program(feeds, false, build), feeds, 1e-4);
}

/// The floats of 16 bits, with the error that ops in them may have.
const HALVES: [(DType, f64); 2] = [(DType::Bf16, 0.03), (DType::F16, 0.004)];

/// Holds an op of two factors in 16 bits, with its gradients.
fn hold_halves(what: &str, feeds: &[Feed], build: impl Fn(&Graph, &Tensor, &Tensor) -> Tensor) {
    for (dtype, tolerance) in HALVES {
        let p = program(feeds, true, |g, t| build(g, &t[0].cast(dtype), &t[1].cast(dtype)));
        same_on_the_grid(&format!("{what}, {dtype}"), &p, feeds, tolerance);
    }
}

/// All subsets of names that are not empty.
fn subsets<'a>(names: &[&'a str]) -> Vec<Vec<&'a str>> {
    (1..1usize << names.len())
        .map(|bits| names.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, n)| *n).collect())
        .collect()
}

#[test]
fn unary_functions() {
    for f in UnaryFn::ALL {
        let x = positive(&[("a", 5), ("b", 7), ("c", 3)], 1);
        match f {
            UnaryFn::Not => hold_value("not", &[x], |g, t| t[0].greater(&g.scalar(2.0)).apply(Unary { f })),
            // Their gradient is none.
            UnaryFn::Sign | UnaryFn::Floor => {
                hold_value("steps", &[x], |_, t| t[0].add_scalar(-2.0).apply(Unary { f }))
            }
            _ => hold(&format!("{f:?}"), &[x], |_, t| t[0].apply(Unary { f })),
        }
    }
    let i = i32s(&dims(&[("a", 5), ("b", 7)]), 1, 9);
    hold_value("neg and abs of i32", &[i], |g, t| t[0].sub(&g.scalar_i32(4)).neg().abs());
}

#[test]
fn binary_functions_with_and_without_broadcasting() {
    let shapes: [(&[(&str, usize)], &[(&str, usize)]); 5] = [
        (&[("a", 5), ("b", 7)], &[("a", 5), ("b", 7)]),
        (&[("a", 5), ("b", 7)], &[("b", 7), ("a", 5)]),
        (&[("a", 5), ("b", 7)], &[("b", 7)]),
        (&[("a", 5)], &[("c", 3), ("b", 7)]),
        (&[], &[("a", 5), ("b", 7)]),
    ];
    for f in BinaryFn::ALL {
        for (x, y) in shapes {
            let what = format!("{f:?} of {x:?} and {y:?}");
            let feeds = [positive(x, 1), positive(y, 2)];
            let apply = |g: &Graph, a: &Tensor, b: &Tensor| g.apply(Binary { f }, &[a, b]);
            match f {
                BinaryFn::And | BinaryFn::Or => hold_value(&what, &feeds, |g, t| {
                    let two = g.scalar(2.0);
                    apply(g, &t[0].greater(&two), &t[1].less(&two))
                }),
                _ => hold(&what, &feeds, |g, t| apply(g, &t[0], &t[1])),
            }
            if !matches!(f, BinaryFn::And | BinaryFn::Or | BinaryFn::Pow | BinaryFn::Div) {
                let i = |list: &[(&str, usize)], key| {
                    let (d, a) = i32s(&dims(list), key, 40);
                    let Array::I32(a) = a else { unreachable!() };
                    (d, Array::I32(a.mapv(|v| if v == 0 { 7 } else { v })))
                };
                hold_value(&format!("{what}, i32"), &[i(x, 3), i(y, 4)], |g, t| apply(g, &t[0], &t[1]));
            }
        }
    }
}

#[test]
fn comparisons_choices_and_casts() {
    let small = |list: &[(&str, usize)], key| i32s(&dims(list), key, 4);
    let feeds = [small(&[("a", 5), ("b", 7)], 1), small(&[("b", 7), ("c", 3)], 2)];
    let all: [fn(&Tensor, &Tensor) -> Tensor; 6] =
        [Tensor::equal, Tensor::not_equal, Tensor::less, Tensor::less_equal, Tensor::greater, Tensor::greater_equal];
    for (i, compare) in all.iter().enumerate() {
        hold_value(&format!("comparison {i} of i32"), &feeds, |_, t| compare(&t[0], &t[1]));
        hold_value(&format!("comparison {i} of f32"), &feeds, |_, t| {
            compare(&t[0].cast(DType::F32), &t[1].cast(DType::F32))
        });
    }
    let x = [feed(&[("a", 5), ("b", 7)], 3), feed(&[("b", 7), ("c", 3)], 4), small(&[("c", 3), ("a", 5)], 5)];
    hold("select", &x, |g, t| t[2].less(&g.scalar_i32(2)).select(&t[0], &t[1]));
    hold("select from a scalar", &x, |g, t| t[0].greater(&g.scalar(0.1)).select(&t[1], &g.scalar(-2.0)));
    let x = [feed(&[("a", 5), ("b", 7)], 6)];
    hold_value("f32 to i32", &x, |_, t| t[0].mul_scalar(9.5).cast(DType::I32));
    hold_value("f32 to bool and back", &x, |_, t| t[0].cast(DType::I32).cast(DType::Bool).cast(DType::F32));
    hold_value("i32 to f32", &feeds, |_, t| t[0].cast(DType::F32).mul(&t[1].cast(DType::F32)));
}

#[test]
fn ops_of_16_bit_floats_are_the_same_bits_on_every_layout() {
    type Build = fn(&Tensor, &Tensor) -> Tensor;
    let window = || [Window::padded("b", 3, 2, 1, 1)];
    let each: [(&str, Build); 16] = [
        ("a product, a sum and a function", |x, y| x.mul(y).add_scalar(0.5).tanh()),
        ("a quotient", |x, y| x.div(&y.square().add_scalar(1.0)).exp()),
        ("a root and a logarithm", |x, y| x.square().add(&y.square()).add_scalar(0.5).sqrt().log()),
        ("a choice", |x, y| x.less(y).select(&x.neg(), &y.abs())),
        ("a maximum of two", |x, y| x.maximum(y).minimum(&x.number(0.4))),
        ("sums", |x, _| x.sum(&["a"])),
        ("means", |x, _| x.mean(&["a", "b"]).mul(x)),
        // More than 65504 on the way.
        ("a mean of large numbers", |x, _| x.add_scalar(2e4).mean_all().sub(&x.number(2e4)).mul(x).mul_scalar(1e-4)),
        ("maxima", |x, _| x.max(&["b"]).sub(&x.min(&["a"]))),
        ("a pool", |x, _| x.max_pool(&[Window::valid("b", 2, 2)])),
        ("windows that overlap", |x, _| x.max_pool(&[Window::padded("b", 3, 2, 1, 1)])),
        ("copies", |x, _| Tensor::concat(&[&x.slice("b", 1, 5), &x.pad("b", 1, 2, 0.3)], "b").shift("a", 1, true)),
        ("a broadcast", |x, y| x.mul(&y.rename("b", "c"))),
        ("a change of order", |x, y| x.reorder(&["b", "a"]).mul(y)),
        ("rows by index", |x, y| x.gather(&y.mul_scalar(4.9).abs().cast(DType::I32), "a")),
        ("a sum of products", |x, y| x.contract(y, &["b"]).mul(x)),
    ];
    let feeds = [feed(&[("a", 5), ("b", 7)], 1), feed(&[("b", 7)], 2)];
    for (what, build) in each {
        hold_halves(what, &feeds, |_, x, y| build(x, y).cast(DType::F32));
    }
    // Gradients of a mean over windows are sums over them, which are made in f32.
    hold_halves("means of windows", &feeds, |_, x, _| x.cast(DType::F32).avg_pool(&window()));
}

/// Wide and 16-bit sums of products are the same: every f16 is an f32, and the order of summation is that of those.
#[test]
fn products_of_f16_are_those_of_the_floats_that_they_are() {
    let feeds = [
        feed(&[("batch", 2), ("x", 9), ("y", 11), ("i", 35)], 1),
        feed(&[("k.x", 3), ("k.y", 2), ("i", 35), ("o", 19)], 2),
    ];
    let p = program(&feeds, false, |g, t| {
        let windows = vec![Window::same("x", 9, 3, 1, 1), Window::padded("y", 2, 2, 1, 0)];
        let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
        let (x, w) = (t[0].cast(DType::F16), t[1].cast(DType::F16));
        for (name, [x, w]) in [("half", [x.clone(), w.clone()]), ("wide", [x, w].map(|t| t.cast(DType::F32)))] {
            let of = |op: Prim, a: &Tensor, b: &Tensor| g.apply(op, &[a, b]);
            let y = of(conv.clone().into(), &x, &w);
            // A gradient of the same numbers in both.
            let dy = y.cast(DType::F16).cast(x.ty().dtype);
            let sizes = vec![9, 11];
            g.output(format!("{name} conv"), &y);
            g.output(format!("{name} dx"), &of(ConvTranspose { conv: conv.clone(), sizes }.into(), &dy, &w));
            g.output(format!("{name} dw"), &of(ConvWeightGrad { conv: conv.clone() }.into(), &x, &dy));
            g.output(format!("{name} contract"), &x.contract_wide(&w, &["i"]));
            g.output(format!("{name} contract by y"), &x.contract_wide(&dy.rename("y", "z"), &["x", "batch"]));
        }
        g.scalar(0.0)
    });
    for (mesh, layout) in [("1", ""), ("m=2", "i:m"), ("m=3,n=2", "x:m,batch:n")] {
        let found = run(&p, &feeds, mesh, layout, 2);
        let of = |prefix: &str| -> Vec<(Name, Array)> {
            found.iter().filter(|(n, _)| n.starts_with(prefix)).cloned().collect()
        };
        assert_eq!(of("half").len(), 5);
        assert_bits_eq("f16", &of("wide"), &of("half"), &format!("{mesh} with {layout}"));
    }
}

#[test]
fn broadcasts_and_other_orders_in_memory() {
    let x = [feed(&[("a", 5), ("b", 7)], 1)];
    hold("broadcast", &x, |_, t| t[0].broadcast(&dims(&[("c", 3), ("b", 7), ("d", 4), ("a", 5)])));
    hold("reorder", &x, |_, t| t[0].reorder(&["b", "a"]));
    hold("a fetch of its own order", &x, |_, t| t[0].mul_scalar(2.0).reorder(&["b", "a"]).add_scalar(1.0));
    hold("from a scalar", &[feed(&[], 1)], |_, t| t[0].broadcast(&dims(&[("a", 5), ("b", 7)])));
}

#[test]
fn sums_maxima_and_minima_over_every_subset_of_dimensions() {
    let list = [("a", 5), ("b", 7), ("c", 3), ("d", 10)];
    let reduce: [(&str, fn(&Tensor, &[&str]) -> Tensor); 4] =
        [("sum", Tensor::sum), ("max", Tensor::max), ("min", Tensor::min), ("mean", Tensor::mean)];
    let (x, i) = ([feed(&list, 1)], [i32s(&dims(&list), 2, 30)]);
    for over in subsets(&["a", "b", "c", "d"]) {
        for (name, f) in &reduce {
            hold(&format!("{name} over {over:?}"), &x, |_, t| f(&t[0], &over));
            if *name != "mean" {
                hold_value(&format!("{name} of i32 over {over:?}"), &i, |_, t| f(&t[0], &over));
            }
        }
        hold_value(&format!("any over {over:?}"), &i, |g, t| t[0].greater(&g.scalar_i32(28)).any(&over));
    }
}

#[test]
fn sums_of_many_chunks_of_many_elements() {
    let cases: [(&[(&str, usize)], &[&str]); 6] = [
        (&[("a", 1000)], &["a"]),
        (&[("a", 100), ("b", 33)], &["a"]),
        (&[("a", 33), ("b", 100)], &["b"]),
        (&[("a", 19), ("b", 3), ("c", 50)], &["a", "c"]),
        (&[("a", 19), ("b", 3), ("c", 50)], &["b", "a"]),
        (&[("a", 9), ("b", 9), ("c", 9), ("d", 2)], &["a", "b", "c"]),
    ];
    for (list, over) in cases {
        hold(&format!("sum of {list:?} over {over:?}"), &[feed(list, 1)], |_, t| t[0].square().sum(over));
        hold(&format!("two sums in one pass, {list:?} over {over:?}"), &[feed(list, 1)], |_, t| {
            t[0].sum(over).mul(&t[0].square().sum(over))
        });
    }
}

#[test]
fn reductions_of_unlike_dtypes_over_the_same_loops() {
    let d = [("a", 5), ("b", 7)];
    let feeds = [i32s(&dims(&d), 1, 30), feed(&d, 2)];
    hold("sums", &feeds, |_, t| t[0].sum(&["b"]).cast(DType::F32).mul(&t[1].sum(&["b"])));
    hold("maxima", &feeds, |g, t| {
        let any = t[0].greater(&g.scalar_i32(27)).any(&["b"]);
        any.select(&t[1].max(&["b"]), &t[0].sub(&g.scalar_i32(50)).max(&["b"]).cast(DType::F32))
    });
}

#[test]
fn contractions() {
    let cases: [(&[(&str, usize)], &[(&str, usize)], &[&str]); 12] = [
        (&[("m", 5), ("k", 7)], &[("k", 7), ("n", 9)], &["k"]),
        (&[("k", 7), ("m", 5)], &[("n", 9), ("k", 7)], &["k"]),
        (&[("m", 33), ("k", 100)], &[("k", 100), ("n", 40)], &["k"]),
        (&[("m", 3), ("k", 1000)], &[("k", 1000), ("n", 2)], &["k"]),
        (&[("batch", 3), ("m", 5), ("k", 40)], &[("batch", 3), ("k", 40), ("n", 7)], &["k"]),
        (&[("m", 5), ("batch", 3), ("k", 40)], &[("k", 40), ("n", 7), ("batch", 3)], &["k"]),
        (&[("m", 6), ("k", 5), ("l", 9)], &[("k", 5), ("l", 9), ("n", 4)], &["k", "l"]),
        (&[("k", 5), ("m", 6), ("l", 9)], &[("l", 9), ("n", 4), ("k", 5)], &["l", "k"]),
        (&[("k", 40)], &[("k", 40)], &["k"]),
        (&[("m", 5)], &[("n", 7)], &[]),
        // Dimensions that only one of them has are summed over as well.
        (&[("m", 5), ("j", 7)], &[("n", 4), ("m", 5)], &["j", "n"]),
        (&[("batch", 2), ("head", 3), ("q", 5), ("d", 8)], &[("batch", 2), ("head", 3), ("k", 7), ("d", 8)], &["d"]),
    ];
    for (x, y, over) in cases {
        let feeds = [feed(x, 1), feed(y, 2)];
        let what = format!("{x:?} times {y:?} over {over:?}");
        hold(&what, &feeds, |_, t| t[0].contract(&t[1], over));
        hold_halves(&what, &feeds, |_, a, b| a.contract_wide(b, over));
        hold_halves(&format!("{what}, rounded"), &feeds, |_, a, b| a.contract(b, over).cast(DType::F32));
    }
}

#[test]
fn contractions_with_grains() {
    for (m, k, n) in [(40, 100, 70), (5, 300, 3), (64, 64, 64)] {
        let feeds = [feed(&[("m", m), ("k", k)], 1), feed(&[("k", k), ("n", n)], 2)];
        let what = format!("{m} by {k} by {n}, grains of 32");
        let product = |g: &Graph, a: &Tensor, b: &Tensor| {
            ["m", "k", "n"].iter().for_each(|d| g.grain(*d, 32));
            a.contract_wide(b, &["k"])
        };
        hold(&what, &feeds, |g, t| product(g, &t[0], &t[1]));
        hold_halves(&what, &feeds, product);
    }
}

#[test]
fn renames() {
    let x = [feed(&[("a", 5), ("b", 7)], 1)];
    hold("rename", &x, |_, t| t[0].rename("a", "c").mul_scalar(3.0));
    hold("rename of an outcome", &x, |_, t| t[0].square().rename("a", "c"));
    hold("rename there and back", &x, |_, t| t[0].rename("a", "c").tanh().rename("c", "a").add(&t[0]));
    hold("an outer product with itself", &x, |_, t| t[0].mul(&t[0].rename("a", "c")));
    hold("a product with itself", &x, |_, t| t[0].contract(&t[0].rename("a", "c"), &["b"]));
    let square = [feed(&[("a", 6), ("b", 6)], 1)];
    hold("two names change places", &square, |_, t| t[0].add(&t[0].rename("a", "t").rename("b", "a").rename("t", "b")));
}

#[test]
fn slices_and_paddings() {
    let x = [feed(&[("a", 11), ("b", 7)], 1)];
    for (start, stop, stride) in [(0, 11, 1), (0, 4, 1), (7, 11, 1), (3, 8, 1), (0, 11, 2), (1, 11, 3), (2, 10, 4)] {
        hold(&format!("slice {start}..{stop} by {stride}"), &x, |_, t| {
            t[0].slice_by("a", start, stop, stride).mul_scalar(2.0)
        });
    }
    for (lo, hi, value) in [(1, 0, 0.0), (0, 3, 0.0), (2, 2, -1.5), (9, 1, 7.0)] {
        hold(&format!("pad by {lo} and {hi} of {value}"), &x, |_, t| t[0].pad("a", lo, hi, value));
        hold(&format!("pad of a fused value by {lo} and {hi}"), &x, |_, t| t[0].exp().pad("b", lo, hi, value).square());
    }
    let i = [i32s(&dims(&[("a", 11), ("b", 7)]), 1, 100)];
    hold_value("i32", &i, |_, t| t[0].slice_by("a", 1, 10, 2).pad("b", 2, 1, 5.0));
    hold_value("bool", &i, |g, t| t[0].less(&g.scalar_i32(50)).slice("b", 2, 7).pad("a", 1, 1, 1.0));
    hold_value("an empty slice", &i, |_, t| t[0].slice("b", 3, 3).sum(&["b"]));
}

#[test]
fn concatenations() {
    let feeds = [feed(&[("a", 5), ("b", 7)], 1), feed(&[("a", 2), ("b", 7)], 2), feed(&[("b", 7), ("a", 4)], 3)];
    hold("two", &feeds[..2], |_, t| Tensor::concat(&[&t[0], &t[1]], "a"));
    hold("three, one of another order", &feeds, |_, t| Tensor::concat(&[&t[0], &t[1], &t[2]], "a"));
    hold("one value twice", &feeds[..1], |_, t| Tensor::concat(&[&t[0], &t[0].tanh(), &t[0]], "b"));
    hold("and cut again", &feeds, |_, t| Tensor::concat(&[&t[0], &t[2]], "a").slice("a", 3, 8));
}

#[test]
fn shifts() {
    for (n, by) in [(11, 1), (11, -1), (11, 4), (11, -5), (8, 3), (5, 12), (5, -7)] {
        for wrap in [false, true] {
            let x = [feed(&[("a", n), ("b", 7)], 1)];
            hold(&format!("shift of {n} by {by}, wrap {wrap}"), &x, |_, t| t[0].shift("a", by, wrap).mul(&t[0]));
        }
    }
}

#[test]
fn max_pools() {
    let x = [feed(&[("batch", 3), ("x", 9), ("y", 7), ("c", 3)], 1)];
    let windows = [
        vec![Window::valid("x", 2, 2)],
        vec![Window::valid("x", 3, 2), Window::valid("y", 2, 1)],
        vec![Window::same("x", 9, 3, 2, 1), Window::same("y", 7, 2, 3, 1)],
        vec![Window::padded("x", 4, 3, 2, 1), Window::padded("y", 3, 1, 1, 1)],
        vec![Window::padded("y", 2, 1, 0, 1).dilated(2)],
        vec![Window::valid("y", 3, 3), Window::valid("x", 5, 1)],
    ];
    for w in windows {
        hold(&format!("{w:?}"), &x, |_, t| t[0].max_pool(&w));
        // Ties, within windows and between devices.
        hold(&format!("{w:?} with ties"), &x, |_, t| t[0].mul_scalar(2.0).floor().add(&t[0].sub(&t[0])).max_pool(&w));
    }
    hold("a pool of a fused value", &x, |_, t| t[0].relu().max_pool(&[Window::valid("x", 2, 2)]).square());
}

#[test]
fn indices_and_one_hot() {
    let i = [i32s(&dims(&[("a", 5), ("b", 7)]), 1, 6), feed(&[("class", 6)], 2)];
    hold_value("iota", &i, |g, t| t[0].mul(&g.iota(&dim("b", 7))).add(&g.iota(&dim("a", 5))));
    hold_value("iota alone", &i, |g, _| g.iota(&dim("a", 5)));
    hold("one hot", &i, |_, t| t[0].one_hot(&dim("class", 6)).mul(&t[1]));
    hold("an embedding", &i, |_, t| t[0].one_hot(&dim("class", 6)).contract(&t[1], &["class"]));
    hold_value("arg max", &[feed(&[("a", 5), ("b", 7)], 1)], |_, t| mesh::nn::arg_max(&t[0], "b"));
}

#[test]
fn random_numbers() {
    let all =
        [Distribution::Uniform, Distribution::Normal, Distribution::TruncatedNormal, Distribution::Bernoulli(0.3)];
    let x = [feed(&[("a", 5), ("b", 7)], 1)];
    for d in all {
        hold_value(&format!("{d:?}"), &x, |g, _| g.random(d, &dims(&[("a", 5), ("b", 7), ("c", 3)])));
        hold(&format!("{d:?} in a chain"), &x, |g, t| g.random(d, &dims(&[("b", 7), ("a", 5)])).mul(&t[0]).sum(&["b"]));
        hold_value(&format!("{d:?} renamed"), &x, |g, t| g.random(d, &dims(&[("c", 7)])).rename("c", "b").add(&t[0]));
    }
    hold("drop-out", &x, |_, t| mesh::nn::dropout(&t[0], 0.7, mesh::nn::Mode::Train).square());
}

#[test]
fn values_that_are_constant_or_not_used() {
    let x = [feed(&[("a", 5), ("b", 7)], 1)];
    hold("a constant", &x, |g, _| g.scalar(3.5));
    hold("the input itself", &x, |_, t| t[0].clone());
    hold("no gradient", &x, |_, t| t[0].stop_gradient().mul(&t[0]));
    hold_value("the step", &x, |g, t| t[0].add(&g.step().cast(DType::F32)));
    hold("zeros", &x, |_, t| t[0].zeros_like());
}

/// Runs `step` three times on every layout of the grid and holds all variables and results to one device.
fn train_on_the_grid(what: &str, build: impl Fn(&Graph)) {
    common::steps_on_the_grid(what, &common::stepping(build), 3, &[], 1e-4);
}

#[test]
fn variables_are_read_before_and_set_after_everything_else() {
    let random = Init::Random { distribution: Distribution::Normal, scale: 1.0, offset: 0.5 };
    let d = dims(&[("a", 5), ("b", 7)]);
    let two = |g: &Graph| (g.variable("v", &d, random.clone()), g.variable("w", &d, random.clone()));
    train_on_the_grid("in place", |g| {
        let (v, _) = two(g);
        g.assign(&v, &v.mul_scalar(0.5));
    });
    train_on_the_grid("a value of other dimensions' order", |g| {
        let (v, _) = two(g);
        g.assign(&v, &v.reorder(&["b", "a"]).mul_scalar(0.5));
    });
    train_on_the_grid("two change places", |g| {
        let (v, w) = two(g);
        g.assign(&v, &w);
        g.assign(&w, &v);
    });
    train_on_the_grid("one value for both", |g| {
        let (v, w) = two(g);
        let sum = v.add(&w);
        g.assign(&v, &sum);
        g.assign(&w, &sum);
    });
    train_on_the_grid("the old value is a result", |g| {
        let (v, w) = two(g);
        g.output("old v", &v);
        g.output("old w renamed", &w.rename("a", "c"));
        g.output("sum of the old", &v.add(&w));
        g.assign(&v, &v.mul_scalar(0.5));
        g.assign(&w, &v);
    });
    train_on_the_grid("the new value is a result", |g| {
        let (v, w) = two(g);
        let next = v.mul(&w);
        g.output("next", &next);
        g.output("next again", &next.add_scalar(1.0));
        g.assign(&v, &next);
    });
    train_on_the_grid("a variable that is used late", |g| {
        let (v, w) = two(g);
        g.assign(&v, &v.add(&w.sum(&["a"])));
        g.assign(&w, &v.sum(&["b"]).mul(&w));
    });
    train_on_the_grid("a shift in place", |g| {
        let (v, _) = two(g);
        g.assign(&v, &v.shift("a", 1, true).add(&v));
    });
    train_on_the_grid("random numbers by step", |g| {
        let (v, w) = two(g);
        g.assign(&v, &g.random(Distribution::Normal, &d));
        g.assign(&w, &g.step().cast(DType::F32).broadcast(&d));
    });
}

/// A tensor's own rules, for a mesh `m=2, n=3`, in place of the layout's.
#[test]
fn tensors_with_layouts_of_their_own() {
    let feeds = [feed(&[("a", 6), ("b", 7), ("c", 5)], 1), feed(&[("c", 5), ("d", 9)], 2)];
    let rules = ["", "a:m", "b:m", "c:n", "a:n", "b:m,c:n", "c:m,a:n", "a:m,b:n"];
    let build = |inputs: &'static str, inner: &'static str, last: &'static str| {
        program(&feeds, true, move |_, t| {
            let x = t[0].clone().with_layout(inputs);
            let y = x.tanh().with_layout(inner);
            let s = y.sum(&["b"]);
            let z = y.contract(&t[1], &["c"]).max_pool(&[Window::valid("b", 3, 2)]);
            z.add(&s.max(&["c"])).with_layout(last)
        })
    };
    let whole = run(&build("", "", ""), &feeds, "1", "", 1);
    assert_near("overrides", &whole, &expected(&build("", "", ""), &feeds), 1e-4);
    for (i, inputs) in rules.iter().enumerate() {
        for (j, inner) in rules.iter().enumerate() {
            let last = ["", "a:m", "d:m,a:n", "d:n", "b:m"][(i + j) % 5];
            let layout = ["", "a:m", "b:m,c:n", "a:n,d:m", "c:m"][(i + 2 * j) % 5];
            let split = run(&build(inputs, inner, last), &feeds, "m=2,n=3", layout, 1);
            assert_bits_eq("overrides", &whole, &split, &format!("{layout}; own rules {inputs}; {inner}; {last}"));
        }
    }
}

mod random_graphs {
    use super::*;

    /// Sizes of a graph's dimensions; `e` and `f` are what others are renamed to.
    const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

    /// Whether both can be taken together: common dimensions are of one size.
    fn fit(x: &Tensor, y: &Tensor) -> bool {
        let y = y.ty();
        let together = y.dims.iter().filter(|d| !x.ty().has(&d.name)).count() + x.ty().dims.len();
        together <= 4 && x.ty().dims.iter().all(|d| y.size_of(&d.name).is_none_or(|n| n == d.size))
    }

    /// Some of the names of a tensor.
    fn some(draw: &mut Draws, x: &Tensor) -> Vec<String> {
        let ty = x.ty();
        ty.dims.iter().filter(|_| draw.below(2) == 0).map(|d| d.name.to_string()).collect()
    }

    /// The next op, on one or two of the values so far; None where the draw does not fit.
    fn next(draw: &mut Draws, g: &Graph, pool: &[Tensor]) -> Option<Tensor> {
        let recent = pool.len() - 1 - draw.below(pool.len().min(3));
        let (x, y) = (&pool[recent], &pool[draw.below(pool.len())]);
        let ty = x.ty();
        let own = (!ty.dims.is_empty()).then(|| ty.dims[draw.below(ty.dims.len().max(1))].clone());
        let free = NAMES.iter().find(|n| !ty.has(n) && draw.below(2) == 0);
        Some(match draw.below(30) {
            0 => x.tanh(),
            1 => x.square().add_scalar(0.5).rsqrt(),
            2 => x.relu().add(&x.sigmoid()),
            3 if fit(x, y) => x.add(y),
            4 if fit(x, y) => x.mul(y).sin(),
            5 if fit(x, y) => x.maximum(y),
            6 if fit(x, y) => x.less(y).select(x, &y.mul_scalar(0.5)),
            7 if fit(x, y) => x.sub(y).mul(x),
            8 | 9 => {
                let over = some(draw, x);
                let over: Vec<&str> = over.iter().map(|n| &**n).collect();
                match draw.below(4) {
                    0 => x.sum(&over).mul_scalar(0.3),
                    1 => x.mean(&over).add(x),
                    2 => x.max(&over),
                    _ => x.min(&over).mul(x),
                }
            }
            10 | 11 if fit(x, y) => {
                let all: Vec<String> = [some(draw, x), some(draw, y)].concat();
                let mut over: Vec<&str> = all.iter().map(|n| &**n).collect();
                over.sort();
                over.dedup();
                x.contract(y, &over).tanh()
            }
            12 => x.rename(&own?.name, free?),
            13 => {
                let d = own.filter(|d| d.size > 2)?;
                let start = draw.below(d.size - 1);
                x.slice_by(&d.name, start, start + 1 + draw.below(d.size - start), 1 + draw.below(2))
            }
            14 => x.pad(&own.filter(|d| d.size < 9)?.name, draw.below(3), draw.below(2), 0.25),
            15 => {
                let d = own?;
                let part = x.slice(&d.name, 0, d.size.div_ceil(2));
                Tensor::concat(&[&part, x], &d.name)
            }
            16 => x.shift(&own?.name, draw.below(7) as isize - 3, draw.below(2) == 0).add(x),
            17 => {
                let d = own.filter(|d| d.size > 2)?;
                let (size, stride) = (2 + draw.below(2), 1 + draw.below(3));
                x.max_pool(&[Window::padded(&d.name, size, stride, draw.below(2), draw.below(2))])
            }
            18 => x.mul(&g.random(Distribution::Bernoulli(0.6), &ty.dims)),
            19 => mesh::nn::softmax(x, &[&own?.name]),
            20 if ty.dims.len() > 1 => {
                let names: Vec<&str> = ty.dims.iter().rev().map(|d| &*d.name).collect();
                x.reorder(&names)
            }
            21 => {
                let d = own?;
                let window = Window::same(&d.name, d.size, 1 + draw.below(3), 1 + draw.below(2), 1);
                let channel = ty.dims.iter().find(|c| c.name != d.name)?;
                let free = free?;
                let k = dim(window.kernel(), window.size);
                let filter = g.random(Distribution::Normal, &[k, channel.clone(), dim(*free, 3)]);
                let conv =
                    Conv { windows: vec![window], input: channel.name.clone(), output: (*free).into(), groups: 1 };
                x.conv(&filter, &conv).tanh()
            }
            22 | 23 => {
                let d = own?;
                let factor = (2..=d.size).find(|f| d.size % f == 0 && draw.below(2) == 0)?;
                let (inner, outer) = (dim(*free?, factor), dim(&d.name, d.size / factor));
                let into = if draw.below(2) == 0 { [inner, outer] } else { [outer, inner] };
                x.split_dim(&d.name, &into)
            }
            24 if ty.dims.len() > 1 => {
                let d = own?;
                let other = ty.dims.iter().find(|o| o.name != d.name && o.size * d.size <= 12)?;
                let into = if draw.below(2) == 0 { &d.name } else { &other.name };
                x.merge_dims(&[&d.name, &other.name], into)
            }
            25 if fit(x, y) => {
                // Rows chosen by a value: some of them outside.
                let d = own?;
                let scores = if y.ty().has(&d.name) { y.mean(&[&d.name]) } else { y.clone() };
                let at = scores.mul_scalar(d.size as f32).cast(DType::I32);
                x.gather(&at, &d.name).tanh()
            }
            26 => {
                let d = own?;
                let at = x.tanh().mul_scalar(4.0).cast(DType::I32).max(&[&d.name]);
                x.scatter_add(&at, &dim(*free?, 3)).tanh()
            }
            27 => {
                let d = own?;
                x.top_k(&d.name, &dim(*free?, 1 + draw.below(d.size))).0
            }
            28 => {
                let d = own.filter(|d| d.size > 2)?;
                let (size, stride) = (2 + draw.below(2), 1 + draw.below(3));
                let window = [Window::padded(&d.name, size, stride, draw.below(2), draw.below(2))];
                if draw.below(2) == 0 { x.avg_pool(&window) } else { x.window_sum(&window).tanh() }
            }
            29 => {
                let method = if draw.below(2) == 0 { Resize::Nearest } else { Resize::Linear };
                x.resize(&[(&*own?.name, 1 + draw.below(10))], method)
            }
            _ => return None,
        })
    }

    /// A random program; `own` gives the `i`-th value a layout of its own.
    fn build(seed: u64, feeds: &[Feed], own: &dyn Fn(usize, &Tensor) -> Option<String>) -> mesh::program::Program {
        program(feeds, true, |g, inputs| {
            let mut draw = Draws::new(seed);
            let mut pool: Vec<Tensor> = inputs.to_vec();
            let length = inputs.len() + 5 + draw.below(11);
            while pool.len() < length {
                let Some(made) = next(&mut draw, g, &pool) else { continue };
                let elements = made.ty().elements();
                if elements > 4000 || made.ty().dims.iter().any(|d| d.size > 12) {
                    continue;
                }
                pool.push(match own(pool.len(), &made) {
                    Some(rules) => made.with_layout(&rules),
                    None => made,
                });
            }
            // Everything that was made counts, in the result and so in the gradients.
            let rest = pool.iter().skip(2).rev().skip(1).map(|t| t.mean_all());
            rest.fold(pool[pool.len() - 1].clone(), |sum, t| sum.add(&t))
        })
    }

    /// Random rules: dimensions to one or two axes, no two that meet in a tensor on one axis, no more shards than chunks;
    /// others only where they fit.
    fn rules(draw: &mut Draws, axes: &[usize], dims: &[(Name, usize)], meet: &dyn Fn(&str, &str) -> bool) -> String {
        let mut rules: Vec<(Name, Vec<usize>, bool)> = vec![];
        for (d, chunks) in dims {
            let first = draw.below(axes.len() + 1);
            if first == axes.len() {
                continue;
            }
            let second = draw.below(axes.len());
            let over = if draw.below(2) == 0 && second != first { vec![first, second] } else { vec![first] };
            let shared = |(e, a, optional): &(Name, Vec<usize>, bool)| {
                !optional && a.iter().any(|a| over.contains(a)) && meet(d, e)
            };
            let fits = over.iter().map(|a| axes[*a]).product::<usize>() <= *chunks && !rules.iter().any(shared);
            rules.push((d.clone(), over, !fits));
        }
        let text = |(d, over, optional): &(Name, Vec<usize>, bool)| {
            let over: Vec<String> = over.iter().map(|a| format!("m{a}")).collect();
            format!("{d}:{}{}", over.join("+"), if *optional { "?" } else { "" })
        };
        rules.iter().map(text).collect::<Vec<_>>().join(",")
    }

    /// How many graphs; `MESH_GRAPHS=5000` looks further. Only the first ones are held to the reference, since single
    /// precision cancels to nothing in some of them.
    fn graphs() -> u64 {
        std::env::var("MESH_GRAPHS").ok().and_then(|n| n.parse().ok()).unwrap_or(HELD_TO_REFERENCE)
    }
    const HELD_TO_REFERENCE: u64 = 200;

    #[test]
    fn random_graphs_on_random_layouts() {
        for seed in 0..graphs() {
            let mut draw = Draws::new(1000 + seed);
            let sizes: Vec<(&str, usize)> = NAMES[..4].iter().map(|n| (*n, 1 + draw.below(9))).collect();
            let pick = |draw: &mut Draws| {
                let from = draw.below(3);
                sizes[from..from + 1 + draw.below(4 - from)].to_vec()
            };
            let feeds: Vec<Feed> = (0..2 + draw.below(2)).map(|i| feed(&pick(&mut draw), 10 + i as u32)).collect();
            let p = build(seed, &feeds, &|_, _| None);
            let whole = run(&p, &feeds, "1", "", 1);
            let what = format!("graph {seed}");
            if seed < HELD_TO_REFERENCE {
                assert_near(&what, &whole, &expected(&p, &feeds), 1e-3);
            }
            let dims = chunks(&p, "f");
            for round in 0..5 {
                let axes: Vec<usize> = (0..1 + draw.below(3)).map(|_| 2 + draw.below(3)).collect();
                let axes = if axes.iter().product::<usize>() > 12 { vec![3, 2] } else { axes };
                let mesh: Vec<String> = axes.iter().enumerate().map(|(i, n)| format!("m{i}={n}")).collect();
                let layout = rules(&mut draw, &axes, &dims, &|a, b| meet(&p, "f", a, b));
                let seed_of_rules = draw.below(1 << 20) as u64;
                let own = |i: usize, t: &Tensor| {
                    let mut draw = Draws::new(seed_of_rules + 7919 * i as u64);
                    let dims: Vec<(Name, usize)> =
                        t.ty().dims.iter().map(|d| (d.name.clone(), d.size.min(8))).collect();
                    (round > 1 && draw.below(3) == 0).then(|| rules(&mut draw, &axes, &dims, &|_, _| true))
                };
                let split = run(&build(seed, &feeds, &own), &feeds, &mesh.join(","), &layout, 1 + round % 2);
                assert_bits_eq(&what, &whole, &split, &format!("{} with {layout}, round {round}", mesh.join(",")));
            }
        }
    }
}
