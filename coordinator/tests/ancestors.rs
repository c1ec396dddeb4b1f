//! What Mesh-TensorFlow gets wrong, as tests: each is right here, whole and split.

mod common;

use common::{f32s, program, run, same_everywhere, wide};
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{Dim, dim};
use mesh::graph::{Graph, Tensor};
use mesh::ops::conv::Conv;
use mesh::ops::window::Window;

type Feed = (Vec<Dim>, Array);

/// A feed of these values.
fn given(dims: &[Dim], values: &[f32]) -> Feed {
    let shape: Vec<usize> = dims.iter().map(|d| d.size).collect();
    (dims.to_vec(), Array::F32(ndarray::ArrayD::from_shape_vec(shape, values.to_vec()).unwrap()))
}

/// The gradient by the first feed of the sum of what `build` makes, on a layout.
fn gradient(feeds: &[Feed], mesh: &str, layout: &str, build: &dyn Fn(&Graph, &[Tensor]) -> Tensor) -> Vec<f64> {
    let p = program(feeds, false, |g, t| {
        let loss = build(g, t).sum_all();
        g.gradients(&loss, &[&t[0]]).remove(0)
    });
    wide(&run(&p, feeds, mesh, layout, 1)[0].1).into_iter().collect()
}

/// Mesh-TensorFlow's rename keeps the slices where they are, so that a rename between dimensions of unlike layout gives
/// another tensor's data.
#[test]
fn a_rename_between_names_that_swap_mesh_axes_moves_the_data() {
    let feeds = [f32s(&[dim("rows", 6), dim("columns", 6), dim("c", 3)], 1)];
    let p = program(&feeds, true, |_, t| {
        let turned = t[0].rename("rows", "t").rename("columns", "rows").rename("t", "columns");
        turned.mul(&t[0]).tanh()
    });
    let layouts = [
        ("a=2,b=3", "rows:a,columns:b"),
        ("a=2,b=3", "rows:b,columns:a"),
        ("a=3,b=2", "rows:a"),
        ("a=3,b=2", "columns:b"),
        ("a=2,b=2", "rows:a,columns:b,t:a"),
    ];
    let rejected = layouts[4];
    same_everywhere("rename", &p, &feeds, &layouts[..4], 1e-4);
    // Two dimensions of one tensor on one axis: refused, with the line above.
    let options =
        Options { mesh: rejected.0.parse().unwrap(), layout: rejected.1.parse().unwrap(), ..Options::default() };
    let error = options.plan(&p).unwrap_err().to_string();
    assert!(error.starts_with("error[L0005]: dimensions `") && error.contains("--> coordinator/tests/ancestors.rs:"));
}

#[test]
fn a_rename_between_a_split_and_a_whole_name_moves_the_data() {
    let feeds = [f32s(&[dim("a", 7), dim("b", 5)], 1)];
    let p = program(&feeds, true, |_, t| t[0].square().rename("a", "z").sum(&["b"]).rename("z", "y"));
    let layouts = [("m=3", "a:m"), ("m=3", "z:m"), ("m=3", "y:m"), ("m=2,n=3", "a:m,z:n"), ("m=2,n=2", "a:m,z:n,y:m")];
    same_everywhere("rename", &p, &feeds, &layouts, 1e-4);
}

/// Mesh-TensorFlow's halo exchange assumes that a shard's outputs start at a stride's multiple.
#[test]
fn a_split_convolution_of_stride_2_reads_the_right_halo() {
    for (n, kernel) in [(8, 3), (16, 3), (12, 2), (12, 5), (10, 7)] {
        let op = |w| Conv { windows: vec![w], input: "ci".into(), output: "co".into(), groups: 1 };
        for window in [Window::same("x", n, kernel, 2, 1), Window::valid("x", kernel, 2)] {
            let feeds = [
                f32s(&[dim("batch", 2), dim("x", n), dim("ci", 3)], 1),
                f32s(&[dim("k.x", kernel), dim("ci", 3), dim("co", 4)], 2),
            ];
            let p = program(&feeds, true, |_, t| t[0].conv(&t[1], &op(window.clone())));
            let most = window.outputs(n).min(8);
            let all = [("m=2", 2), ("m=3", 3), ("m=4", 4)];
            let layouts: Vec<_> = all.iter().filter(|l| l.1 <= most).map(|(m, _)| (*m, "x:m")).collect();
            same_everywhere(&format!("{window:?}"), &p, &feeds, &layouts, 1e-4);
        }
    }
}

#[test]
fn an_odd_size_is_halved_by_a_stride_of_2_and_split_unevenly() {
    for n in [5, 7, 9, 13] {
        let feeds = [
            f32s(&[dim("x", n), dim("y", n + 2), dim("ci", 2)], 1),
            f32s(&[dim("k.x", 3), dim("k.y", 3), dim("ci", 2), dim("co", 3)], 2),
        ];
        let windows = vec![Window::same("x", n, 3, 2, 1), Window::same("y", n + 2, 3, 2, 1)];
        let op = Conv { windows, input: "ci".into(), output: "co".into(), groups: 1 };
        let p = program(&feeds, true, |_, t| t[0].conv(&t[1], &op).relu());
        let layouts = [("m=2", "x:m"), ("m=3", "y:m"), ("m=2,n=3", "x:m,y:n"), ("m=3,n=2", "x:m,y:n")];
        same_everywhere(&format!("{n} by {}", n + 2), &p, &feeds, &layouts, 1e-4);
    }
}

/// Mesh-TensorFlow gives every tied maximum the whole gradient.
#[test]
fn tied_maxima_share_a_gradient_that_sums_to_one() {
    let d = [dim("a", 6), dim("b", 3)];
    let x = [2., 1., 5., 2., 5., 5., 0., 5., 5., 2., 0., 5., 1., 3., 5., 2., 5., 0.];
    let feeds = [given(&d, &x)];
    let layouts = [("1", ""), ("m=2", "a:m"), ("m=3", "a:m"), ("m=4", "a:m"), ("m=3", "b:m"), ("m=3,n=2", "a:m,b:n")];
    for (mesh, layout) in layouts {
        let over_a = gradient(&feeds, mesh, layout, &|_, t| t[0].max(&["a"]));
        let third = f64::from(1.0f32 / 3.0);
        let quarter = 0.25;
        let fifth = f64::from(1.0f32 / 5.0);
        let expected: Vec<f64> = (0..18)
            .map(|i| match (i % 3, x[i]) {
                (0, 2.0) => quarter,
                (1, 5.0) => third,
                (2, 5.0) => fifth,
                _ => 0.0,
            })
            .collect();
        assert_eq!(over_a, expected, "{mesh} {layout}");
        let all = gradient(&feeds, mesh, layout, &|_, t| t[0].max(&["a", "b"]));
        let eighth = |v: f32| if v == 5.0 { 0.125 } else { 0.0 };
        assert_eq!(all, x.map(eighth), "{mesh} {layout}");
        let least = gradient(&feeds, mesh, layout, &|_, t| t[0].min(&["b"]));
        for row in least.chunks(3) {
            assert_eq!(row.iter().sum::<f64>(), 1.0, "{mesh} {layout}");
        }
    }
}

#[test]
fn the_maximum_of_a_value_with_itself_has_gradient_one() {
    let feeds = [f32s(&[dim("a", 5), dim("b", 7)], 1)];
    for (mesh, layout) in [("1", ""), ("m=2", "a:m"), ("m=3,n=2", "b:m,a:n")] {
        assert_eq!(gradient(&feeds, mesh, layout, &|_, t| t[0].maximum(&t[0])), [1.0; 35]);
        assert_eq!(gradient(&feeds, mesh, layout, &|_, t| t[0].minimum(&t[0].mul_scalar(1.0))), [1.0; 35]);
    }
}

#[test]
fn tied_maxima_of_a_pool_have_gradients_that_sum_to_one_a_window() {
    // All alike: every window is a tie, across devices too.
    let d = [dim("x", 9), dim("y", 7), dim("c", 2)];
    let feeds = [given(&d, &[1.5; 126])];
    let windows = [
        vec![Window::valid("x", 2, 2)],
        vec![Window::valid("x", 3, 2), Window::valid("y", 3, 1)],
        vec![Window::same("x", 9, 3, 1, 1), Window::same("y", 7, 2, 2, 1)],
    ];
    for w in windows {
        let outputs: usize =
            d.iter().map(|d| w.iter().find(|w| w.dim == d.name).map_or(d.size, |w| w.outputs(d.size))).product();
        let whole = gradient(&feeds, "1", "", &|_, t| t[0].max_pool(&w));
        assert_eq!(whole.iter().sum::<f64>(), outputs as f64);
        for (mesh, layout) in [("m=2", "x:m"), ("m=4", "x:m"), ("m=3", "y:m"), ("m=3,n=2", "x:m,y:n"), ("m=2", "c:m")] {
            assert_eq!(gradient(&feeds, mesh, layout, &|_, t| t[0].max_pool(&w)), whole, "{w:?} on {mesh} {layout}");
        }
    }
}

/// Mesh-TensorFlow's gradient of a broadcast maximum has the wrong shape.
#[test]
fn the_gradient_of_a_broadcast_maximum_sums_over_what_was_broadcast() {
    let feeds = [given(&[dim("b", 3)], &[1., 5., 2.]), given(&[dim("a", 2), dim("b", 3)], &[0., 5., 3., 1., 4., 9.])];
    for (mesh, layout) in [("1", ""), ("m=2", "a:m"), ("m=3", "b:m"), ("m=2,n=2", "a:n,b:m")] {
        // By column: above both but tied with one; tied with one and above the other; below both.
        let found = gradient(&feeds, mesh, layout, &|_, t| t[0].maximum(&t[1]));
        assert_eq!(found, [1.5, 1.5, 0.0], "{mesh} {layout}");
        let turned = [feeds[1].clone(), feeds[0].clone()];
        let found = gradient(&turned, mesh, layout, &|_, t| t[1].maximum(&t[0]));
        assert_eq!(found, [0.0, 0.5, 1.0, 0.5, 0.0, 1.0], "{mesh} {layout}");
    }
    let feeds = [f32s(&[dim("b", 7)], 1), f32s(&[dim("a", 5), dim("b", 7)], 2)];
    let p = program(&feeds, true, |_, t| t[0].maximum(&t[1]).minimum(&t[0].mul_scalar(2.0)));
    same_everywhere("maximum", &p, &feeds, &[("m=2", "a:m"), ("m=3", "b:m"), ("m=3,n=2", "a:m,b:n")], 1e-4);
}

/// Mesh-TensorFlow ignores a rule that no dimension has.
#[test]
fn a_typo_in_a_layout_rule_is_an_error() {
    let feeds = [f32s(&[dim("batch", 4), dim("hidden", 8)], 1)];
    let p = program(&feeds, false, |_, t| t[0].tanh());
    let options = |mesh: &str, layout: &str| Options {
        mesh: mesh.parse().unwrap(),
        layout: layout.parse().unwrap(),
        ..Options::default()
    };
    let error = |layout: &str| match Session::embedded(p.clone(), &options("data=2,model=2", layout)) {
        Ok(_) => panic!("{layout} is accepted"),
        Err(e) => e.to_string(),
    };
    assert!(error("bacth:data").contains("help: did you mean `batch`?"));
    assert!(error("batch:dta").contains("help: did you mean `data`?"));
    assert!(Session::embedded(p.clone(), &options("data=2,model=2", "batch:data,hidden:model")).is_ok());
}
