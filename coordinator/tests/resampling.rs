//! Window sums, pooling and resizing: near the reference, and the same bits however they are split.

mod common;

use common::{Draws, f32s, i32s, program, run, same_everywhere};
use mesh::dim::{Dim, dim};
use mesh::ops::max_pool::MaxPoolGrad;
use mesh::ops::resize::Resize;
use mesh::ops::window::Window;
use ndarray::{Array3, s};
use std::convert::Infallible;
use worker::data::volume::{Block, Grid, whole};

const NAMES: [&str; 2] = ["x", "y"];

/// Splits `x`, `y` and the channels, each as far as all its sizes allow, alone and together.
fn layouts(draw: &mut Draws, most: &[usize; 2], channels: usize) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let (mut mesh, mut rules) = (vec![], vec![]);
    for (name, &n) in NAMES.iter().zip(most) {
        if n > 1 {
            let shards = 2 + draw.below(n.min(5) - 1);
            out.push((format!("m={shards}"), format!("{name}:m")));
            mesh.push(format!("m{name}={}", shards.min(3)));
            rules.push(format!("{name}:m{name}"));
        }
    }
    if mesh.len() > 1 {
        out.push((mesh.join(","), rules.join(",")));
    }
    if channels > 1 {
        mesh.push("c=2".into());
        rules.push("c:c".into());
        out.push((mesh.join(","), rules.join(",")));
    }
    out
}

fn texts(list: &[(String, String)]) -> Vec<(&str, &str)> {
    list.iter().map(|(m, l)| (m.as_str(), l.as_str())).collect()
}

/// `[c, x, y]` in some order.
fn tensor(draw: &mut Draws, size: usize) -> Vec<Dim> {
    let mut dims = vec![dim("x", 1 + draw.below(size)), dim("y", 1 + draw.below(size))];
    dims.insert(draw.below(3), dim("c", 1 + draw.below(20)));
    dims
}

fn size(dims: &[Dim], name: &str) -> usize {
    dims.iter().find(|d| d.name == *name).unwrap().size
}

#[test]
fn window_sums_and_average_pooling() {
    let mut draw = Draws::new(1);
    let mut done = 0;
    while done < 150 {
        let dims = tensor(&mut draw, 17);
        let windows = NAMES.map(|name| {
            let (taps, stride, dilation) = (1 + draw.below(5), 1 + draw.below(4), 1 + draw.below(2));
            let span = (taps - 1) * dilation + 1;
            match draw.below(2) {
                0 => Window::same(name, size(&dims, name), taps, stride, dilation),
                _ => Window::padded(name, taps, stride, draw.below(span), draw.below(span)).dilated(dilation),
            }
        });
        let outputs = [0, 1].map(|i| windows[i].outputs(size(&dims, NAMES[i])));
        if outputs.contains(&0) || windows.iter().any(|w| w.lo >= w.span() || w.hi >= w.span()) {
            continue;
        }
        let feeds = [f32s(&dims, 1)];
        let mean = draw.below(2) == 0;
        let p = program(&feeds, true, |_, t| if mean { t[0].avg_pool(&windows) } else { t[0].window_sum(&windows) });
        let most = [0, 1].map(|i| outputs[i].min(size(&dims, NAMES[i])));
        let layouts = layouts(&mut draw, &most, size(&dims, "c"));
        same_everywhere(&format!("{windows:?} on {dims:?}"), &p, &feeds, &texts(&layouts), 1e-5);
        done += 1;
    }
}

#[test]
fn resizing() {
    let mut draw = Draws::new(2);
    for case in 0..150 {
        let dims = tensor(&mut draw, 13);
        let to = [1 + draw.below(20), 1 + draw.below(20)];
        let method = if case % 3 == 0 { Resize::Nearest } else { Resize::Linear };
        let sizes = [("x", to[0]), ("y", to[1])];
        let mut feeds = [f32s(&dims, 1)];
        let labels = case % 9 == 0;
        if labels {
            feeds[0] = i32s(&dims, 1, i32::MAX);
        }
        let p = program(&feeds, !labels, |_, t| t[0].resize(&sizes, method));
        let most = [0, 1].map(|i| to[i].min(size(&dims, NAMES[i])));
        let layouts = layouts(&mut draw, &most, size(&dims, "c"));
        same_everywhere(&format!("{dims:?} to {to:?}, {method:?}"), &p, &feeds, &texts(&layouts), 1e-5);
    }
}

#[test]
fn truth_values_are_resized_to_the_nearest_too() {
    let dims = [dim("x", 7), dim("c", 3)];
    let feeds = [f32s(&dims, 1)];
    let p = program(&feeds, false, |g, t| t[0].greater(&g.scalar(0.0)).resize(&[("x", 12)], Resize::Nearest));
    same_everywhere("bool", &p, &feeds, &[("m=3", "x:m"), ("m=3", "c:m")], 0.0);
}

#[test]
fn the_nearest_element_is_that_of_the_volume_reader() {
    let dims = [dim("x", 5), dim("y", 6), dim("z", 7)];
    let feeds = [f32s(&dims, 1)];
    let p = program(&feeds, false, |_, t| t[0].resize(&[("x", 8), ("y", 3), ("z", 7)], Resize::Nearest));
    let volume: Array3<f32> = feeds[0].1.as_f32().unwrap().clone().into_dimensionality().unwrap();
    let grid = Grid { from: [5, 6, 7], to: [8, 3, 7] };
    let slice = |[x, y, z]: &Block| Ok::<_, Infallible>(volume.slice(s![x.clone(), y.clone(), z.clone()]).to_owned());
    let expected = grid.nearest(&whole(grid.to), slice).unwrap();
    assert_eq!(run(&p, &feeds, "1", "", 1)[0].1, expected.into());
}

#[test]
fn what_a_device_holds_beyond_what_it_needs_does_not_matter() {
    let dims = [dim("a", 4), dim("x", 9), dim("b", 3), dim("c", 4)];
    let feeds = [f32s(&dims, 1)];
    let windows = [Window::padded("x", 3, 2, 1, 1)];
    let layouts = [("m=2", "c:m"), ("m=2", "b:m"), ("m=2", "a:m"), ("m=3", "x:m"), ("m=2,n=2", "c:m,a:n")];
    // The input lies whole on every device.
    let hold = |what: &str, build: &dyn Fn(&mesh::graph::Tensor) -> mesh::graph::Tensor| {
        let p = program(&feeds, true, |_, t| build(&t[0].mul_scalar(2.0).with_layout("")));
        same_everywhere(what, &p, &feeds, &layouts, 1e-5);
    };
    hold("avg_pool", &|x| x.avg_pool(&windows));
    hold("resize", &|x| x.resize(&[("x", 5)], Resize::Linear));
    hold("nearest", &|x| x.resize(&[("x", 5)], Resize::Nearest));
    hold("top_k", &|x| x.top_k("x", &dim("k", 2)).0);
    hold("split_dim", &|x| x.split_dim("x", &[dim("p", 3), dim("q", 3)]));
    hold("merge_dims", &|x| x.merge_dims(&["x", "b"], "xb"));
    hold("max_pool", &|x| x.max_pool(&windows));
    let pooled = [dim("a", 4), dim("x", 5), dim("b", 3), dim("c", 4)];
    let feeds = [f32s(&dims, 1), f32s(&pooled, 2)];
    for whole in [[true, true], [true, false], [false, true]] {
        let p = program(&feeds, false, |g, t| {
            let held = |i: usize| {
                let x = t[i].mul_scalar(2.0);
                if whole[i] { x.with_layout("") } else { x }
            };
            g.apply(MaxPoolGrad { windows: windows.to_vec() }, &[&held(0), &held(1)])
        });
        same_everywhere(&format!("max_pool_grad {whole:?}"), &p, &feeds, &layouts, 1e-5);
    }
}
