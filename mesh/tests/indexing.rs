//! Split and merged dimensions, gather, scatter-add and top-k: meanings, gradients, and what they refuse.

mod common;

use common::{assert_gradients, evaluate, ramp};
use mesh::dim::{DType, Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::ops::scatter_add::ScatterAdd;
use mesh::ops::split::MergeDims;
use mesh::program::ProgramBuilder;
use ndarray::array;

/// The error of a function of one `f32` input, which cites the constraint and this file.
fn assert_refused(constraint: &str, dims: &[Dim], build: impl Fn(&Graph, &Tensor) -> Tensor) {
    let e = ProgramBuilder::new()
        .function("f", |g| {
            let x = g.input("x", DType::F32, dims);
            g.output("y", &build(g, &x));
        })
        .unwrap_err()
        .to_string();
    assert!(e.contains(&format!("constraint {constraint} of")) && e.contains("tests/indexing.rs"), "{constraint}: {e}");
    assert!(e.contains("help: "), "{constraint} has no help: {e}");
}

/// The `i32` tensor with these elements.
fn indices(g: &Graph, dims: &[Dim], values: &[i32]) -> Tensor {
    let n = dim("i", values.len());
    let places = g.iota(&n);
    let zero = g.scalar_i32(0);
    let list = values.iter().enumerate().fold(zero.broadcast(std::slice::from_ref(&n)), |sum, (i, v)| {
        sum.add(&places.equal(&g.scalar_i32(i as i32)).select(&g.scalar_i32(*v), &zero))
    });
    match dims {
        [] => list.sum(&["i"]),
        _ => list.split_dim("i", dims),
    }
}

#[test]
fn splitting_and_merging_are_row_major_and_each_other_s_inverse() {
    let d = [dim("a", 2), dim("b", 6), dim("c", 2)];
    let x = ramp(&d, 1);
    let split = evaluate(&[(&d, x.clone())], |_, t| t[0].split_dim("b", &[dim("p", 2), dim("q", 3)]));
    assert_eq!(split.shape(), [2, 2, 3, 2]);
    assert_eq!(split[[1, 1, 2, 0]], x[[1, 5, 0]]);
    let back = |_: &Graph, t: &[Tensor]| t[0].split_dim("b", &[dim("p", 2), dim("q", 3)]).merge_dims(&["p", "q"], "b");
    assert_eq!(evaluate(&[(&d, x.clone())], back), x);
    let turned = evaluate(&[(&d, x.clone())], |_, t| t[0].merge_dims(&["c", "a"], "ca"));
    assert_eq!((turned.shape(), turned[[4, 2]]), (&[6, 4][..], x[[0, 4, 1]]));
    assert_gradients(&[(&d, x.clone())], |_, t| t[0].split_dim("b", &[dim("b", 3), dim("q", 2)]).square());
    assert_gradients(&[(&d, x)], |_, t| t[0].merge_dims(&["c", "a"], "a").square());
}

#[test]
fn gather_takes_rows_and_gives_zeros_for_an_index_outside() {
    let t = [dim("vocab", 3), dim("d", 2)];
    let table = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]].into_dyn();
    let y = evaluate(&[(&t, table)], |g, t| t[0].gather(&indices(g, &[dim("n", 4)], &[2, -1, 0, 3]), "vocab"));
    assert_eq!(y, array![[5.0, 6.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]].into_dyn());
}

#[test]
fn gather_matches_dimensions_that_table_and_indices_share() {
    let s = [dim("batch", 2), dim("class", 3)];
    let scores = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]].into_dyn();
    let y = evaluate(&[(&s, scores)], |g, t| t[0].gather(&indices(g, &[dim("batch", 2)], &[2, 0]), "class"));
    assert_eq!(y, array![3.0, 4.0].into_dyn());
}

#[test]
fn scatter_add_adds_up_by_row_and_passes_over_an_index_outside() {
    let u = [dim("n", 4), dim("d", 2)];
    let updates = array![[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]].into_dyn();
    let rows = dim("vocab", 3);
    let y =
        evaluate(&[(&u, updates.clone())], |g, t| t[0].scatter_add(&indices(g, &[dim("n", 4)], &[2, 0, 2, 7]), &rows));
    assert_eq!(y, array![[10.0, 20.0], [0.0, 0.0], [101.0, 202.0]].into_dyn());
    let batched = evaluate(&[(&u, updates)], |g, t| {
        let t = t[0].split_dim("n", &[dim("batch", 2), dim("n", 2)]);
        t.scatter_add_over(&indices(g, &[dim("batch", 2), dim("n", 2)], &[1, 1, 0, -2]), &dim("row", 2), &["n"])
    });
    assert_eq!(batched, array![[[0.0, 0.0], [11.0, 22.0]], [[100.0, 200.0], [0.0, 0.0]]].into_dyn());
}

#[test]
fn gather_and_scatter_add_have_the_gradients_of_finite_differences() {
    let t = [dim("b", 2), dim("vocab", 3), dim("d", 2)];
    let at = [dim("n", 2), dim("b", 2)];
    assert_gradients(&[(&t, ramp(&t, 1))], |g, t| t[0].gather(&indices(g, &at, &[0, 2, 2, 9]), "vocab").square());
    let plain = [dim("vocab", 3), dim("d", 2)];
    assert_gradients(&[(&plain, ramp(&plain, 1))], |g, t| t[0].gather(&indices(g, &at, &[1, 1, 2, 1]), "vocab"));
    let u = [dim("d", 2), dim("b", 2), dim("n", 2)];
    let (r, list) = (dim("r", 3), [0, 2, 2, -1]);
    assert_gradients(&[(&u, ramp(&u, 1))], |g, t| t[0].scatter_add(&indices(g, &at, &list), &r).square());
    assert_gradients(&[(&u, ramp(&u, 1))], |g, t| t[0].scatter_add_over(&indices(g, &at, &list), &r, &["n"]).square());
    assert_gradients(&[(&u, ramp(&u, 1))], |g, t| t[0].scatter_add_over(&indices(g, &at, &list), &r, &[]).square());
}

fn top(x: Reference, k: usize) -> (Reference, Reference) {
    let d = [dim("row", x.shape()[0]), dim("class", x.shape()[1])];
    let both = |values: bool| {
        evaluate(&[(&d, x.clone())], move |_, t| {
            let (v, i) = t[0].top_k("class", &dim("k", k));
            if values { v } else { i }
        })
    };
    (both(true), both(false))
}

#[test]
fn top_k_is_right_below_minus_1e9_and_breaks_ties_by_the_lower_index() {
    let inf = f64::INFINITY;
    let (values, at) = top(array![[-3e9, -2e9, -inf, -5e9], [4.0, 7.0, 7.0, -inf]].into_dyn(), 4);
    assert_eq!(at, array![[1.0, 0.0, 3.0, 2.0], [1.0, 2.0, 0.0, 3.0]].into_dyn());
    assert_eq!(values, array![[-2e9, -3e9, -5e9, -inf], [7.0, 7.0, 4.0, -inf]].into_dyn());
    let (_, at) = top(array![[1.0, f64::NAN, inf, -0.0, 0.0, f64::NAN]].into_dyn(), 6);
    assert_eq!(at, array![[1.0, 5.0, 2.0, 0.0, 3.0, 4.0]].into_dyn());
}

#[test]
fn gradients_flow_through_the_values_of_top_k() {
    let d = [dim("x", 2), dim("class", 5), dim("y", 2)];
    assert_gradients(&[(&d, ramp(&d, 1))], |_, t| t[0].top_k("class", &dim("k", 2)).0.square());
}

#[test]
fn what_breaks_a_constraint_is_refused_with_its_number() {
    let d = [dim("vocab", 6), dim("d", 2)];
    assert_refused("C1", &d, |_, x| x.split_dim("vocap", &[dim("p", 2), dim("q", 3)]));
    assert_refused("C2", &d, |_, x| x.split_dim("vocab", &[dim("p", 2), dim("q", 2)]));
    assert_refused("C4", &d, |_, x| x.split_dim("vocab", &[dim("p", 3), dim("d", 2)]));
    assert_refused("C1", &d, |_, x| x.merge_dims(&[], "e"));
    assert_refused("C1", &d, |_, x| x.merge_dims(&["vocab", "e"], "f"));
    assert_refused("C1", &d, |_, x| x.merge_dims(&["vocab", "vocab"], "f"));
    assert_refused("C3", &d, |_, x| x.apply(MergeDims { dims: vec!["d".into(), "vocab".into()], into: "e".into() }));
    let three = [dim("vocab", 6), dim("d", 2), dim("e", 2)];
    assert_refused("C4", &three, |_, x| x.merge_dims(&["vocab", "d"], "e"));

    let at = |g: &Graph, d: &[Dim]| g.scalar_i32(0).broadcast(d);
    assert_refused("C1", &d, |g, x| x.gather(&at(g, &[dim("n", 2)]), "vocap"));
    assert_refused("C1", &d, |g, x| x.gather(&at(g, &[dim("vocab", 2)]), "vocab"));
    assert_refused("C2", &d, |g, x| x.gather(&at(g, &[dim("n", 2)]).cast(DType::F32), "vocab"));
    assert_refused("C3", &d, |g, x| x.greater(&g.scalar(0.0)).gather(&at(g, &[dim("n", 2)]), "vocab"));
    assert_refused("C4", &d, |g, x| x.gather(&at(g, &[dim("d", 3)]), "vocab"));

    let rows = dim("row", 3);
    assert_refused("C1", &d, |g, x| x.scatter_add(&at(g, &d[..1]).cast(DType::F32), &rows));
    assert_refused("C2", &d, |g, x| x.greater(&g.scalar(0.0)).scatter_add(&at(g, &d[..1]), &rows));
    assert_refused("C3", &d, |g, x| x.scatter_add(&at(g, &[dim("n", 2)]), &rows));
    assert_refused("C4", &d, |g, x| x.scatter_add_over(&at(g, &d[..1]), &rows, &["d"]));
    assert_refused("C4", &d, |g, x| {
        let over = vec!["vocab".into(), "vocab".into()];
        g.apply(ScatterAdd { dim: rows.clone(), over }, &[x, &at(g, &d[..1])])
    });
    assert_refused("C5", &d, |g, x| x.scatter_add(&at(g, &d[..1]), &dim("d", 3)));

    assert_refused("C1", &d, |_, x| x.top_k("vocob", &dim("k", 1)).1);
    assert_refused("C2", &d, |g, x| x.greater(&g.scalar(0.0)).top_k("vocab", &dim("k", 1)).1);
    assert_refused("C3", &d, |_, x| x.top_k("vocab", &dim("k", 7)).1);
    assert_refused("C3", &d, |_, x| x.top_k("vocab", &dim("k", 0)).1);
    assert_refused("C4", &d, |_, x| x.top_k("vocab", &dim("d", 1)).1);
}
