//! Convolutions of every kind, forward and both gradients: near the reference, and the same bits however they are split.

mod common;

use common::{Draws, f32s, program, same_everywhere};
use mesh::dim::{DType, Dim, dim};
use mesh::ops::conv::{Conv, ConvTranspose};
use mesh::ops::window::Window;

const NAMES: [&str; 3] = ["x", "y", "z"];

fn window(draw: &mut Draws, name: &str, n: usize, kernel: usize) -> Window {
    let (stride, dilation) = (1 + draw.below(3), 1 + draw.below(2));
    let span = (kernel - 1) * dilation + 1;
    match draw.below(3) {
        0 => Window::same(name, n, kernel, stride, dilation),
        1 if span <= n => Window::valid(name, kernel, stride).dilated(dilation),
        _ => Window::padded(name, kernel, stride, draw.below(span), draw.below(span)).dilated(dilation),
    }
}

/// `count` convolutions over `axes` dimensions, each on layouts that split 1, 2 or 3 of them (and the channels); every
/// third one of bf16 or f16.
fn convolutions(seed: u64, axes: usize, count: usize, kernel: usize, size: usize, transposed: bool) {
    let mut draw = Draws::new(seed);
    let mut done = 0;
    while done < count {
        let groups = [1, 1, 1, 2][draw.below(4)];
        let (ci, co) = (groups * (1 + draw.below(3)), groups * (1 + draw.below(20)));
        let sizes: Vec<usize> = (0..axes).map(|_| 1 + draw.below(size)).collect();
        let windows: Vec<Window> = (0..axes)
            .map(|a| {
                let k = 1 + draw.below(kernel);
                window(&mut draw, NAMES[a], sizes[a], k)
            })
            .collect();
        let outputs: Vec<usize> = windows.iter().zip(&sizes).map(|(w, n)| w.outputs(*n)).collect();
        let padded = |w: &Window| w.lo >= w.span() || w.hi >= w.span();
        if outputs.contains(&0) || windows.iter().any(padded) {
            continue;
        }
        let op = Conv { windows, input: "ci".into(), output: "co".into(), groups };
        let (dtype, tolerance) = match done % 6 {
            2 => (DType::Bf16, 0.08),
            5 => (DType::F16, 0.01),
            _ => (DType::F32, 1e-4),
        };
        let case = Case { op, transposed, sizes, channels: [ci, co], chunks: 8, dtype, tolerance };
        done += usize::from(is_the_same(&mut draw, &case));
    }
}

/// A convolution, or its adjoint, and what it is of.
struct Case {
    op: Conv,
    transposed: bool,
    sizes: Vec<usize>,
    channels: [usize; 2],
    /// Chunks of a dimension at most.
    chunks: usize,
    dtype: DType,
    tolerance: f64,
}

/// Holds a convolution to its reference, on layouts; whether there are any.
fn is_the_same(draw: &mut Draws, case: &Case) -> bool {
    let Case { op, transposed, sizes, channels: [ci, co], chunks, dtype, tolerance } = case;
    let (axes, groups, ci, co) = (op.windows.len(), op.groups, *ci, *co);
    let outputs: Vec<usize> = op.windows.iter().zip(sizes).map(|(w, n)| w.outputs(*n)).collect();
    let batch = dim("batch", 1 + draw.below(3));
    let tensor = |sizes: &[usize], channel: Dim| -> Vec<Dim> {
        let space = sizes.iter().zip(NAMES).map(|(n, d)| dim(d, *n));
        [batch.clone()].into_iter().chain(space).chain([channel]).collect()
    };
    let x = if *transposed { tensor(&outputs, dim("co", co)) } else { tensor(sizes, dim("ci", ci)) };
    let taps = op.windows.iter().map(|w| dim(format!("k.{}", w.dim), w.size));
    let filter: Vec<Dim> = taps.chain([dim("ci", ci / groups), dim("co", co)]).collect();
    let feeds = [f32s(&x, 1), f32s(&filter, 2)];
    let p = program(&feeds, true, |_, t| {
        let [x, filter] = [0, 1].map(|i| t[i].cast(*dtype));
        let y = match transposed {
            true => x.conv_transpose(&filter, &ConvTranspose { conv: op.clone(), sizes: sizes.clone() }),
            false => x.conv(&filter, op),
        };
        y.cast(DType::F32)
    });
    let p = p.in_chunks(*chunks);
    // One layout of one axis, one of all axes; as many shards as both sides of the convolution have chunks.
    let most = |a: usize| sizes[a].min(outputs[a]).min(*chunks);
    let mut layouts: Vec<(String, String)> = Vec::new();
    let a = draw.below(axes);
    let shards = 2 + draw.below(3);
    if most(a) >= shards {
        layouts.push((format!("m={shards}"), format!("{}:m", NAMES[a])));
    }
    let (mut mesh, mut rules) = (vec![], vec![]);
    for (a, name) in NAMES.iter().enumerate().take(axes) {
        let shards = (2 + draw.below(2)).min(most(a));
        if shards > 1 {
            mesh.push(format!("m{name}={shards}"));
            rules.push(format!("{name}:m{name}"));
        }
    }
    if axes > 1 && mesh.len() > 1 {
        layouts.push((mesh.join(","), rules.join(",")));
    }
    if draw.below(4) == 0 && batch.size > 1 {
        layouts.push(("b=2".into(), "batch:b".into()));
    }
    if draw.below(4) == 0 && groups == 1 && ci > 1 && co > 1 {
        layouts.push(("c=2".into(), if draw.below(2) == 0 { "ci:c" } else { "co:c" }.into()));
    }
    if layouts.is_empty() {
        return false;
    }
    let layouts: Vec<(&str, &str)> = layouts.iter().map(|(m, l)| (m.as_str(), l.as_str())).collect();
    same_everywhere(&format!("{op:?} on {sizes:?}, batch {}, {dtype}", batch.size), &p, &feeds, &layouts, *tolerance);
    true
}

#[test]
fn convolutions_over_one_dimension() {
    convolutions(1, 1, 1200, 7, 17, false);
}

#[test]
fn convolutions_over_two_dimensions() {
    convolutions(2, 2, 700, 7, 17, false);
}

#[test]
fn convolutions_over_three_dimensions() {
    convolutions(3, 3, 250, 5, 9, false);
}

#[test]
fn transposed_convolutions() {
    convolutions(4, 1, 300, 4, 17, true);
    convolutions(5, 2, 100, 4, 12, true);
    convolutions(6, 3, 60, 3, 7, true);
}

/// Windows of three by three over channels enough for minimal filtering, and with chunks long enough for that of gradients.
#[test]
fn windows_of_three_by_three() {
    let mut draw = Draws::new(7);
    let mut done = 0;
    while done < 40 {
        let (transposed, axes, chunks) = (done % 3 == 2, 2 + draw.below(2), [2, 3, 8][draw.below(3)]);
        let channels = [8 + draw.below(12), 8 + draw.below(12)];
        let mut sizes: Vec<usize> = (0..2).map(|_| 9 + draw.below(6)).collect();
        let mut windows: Vec<Window> = NAMES[axes - 2..axes]
            .iter()
            .map(|name| Window::padded(*name, 3, 1, draw.below(3), draw.below(3)))
            .collect();
        if axes == 3 {
            let (n, k) = (1 + draw.below(7), 1 + draw.below(3));
            sizes.insert(0, n);
            windows.insert(0, window(&mut draw, NAMES[0], n, k));
        }
        if windows.iter().zip(&sizes).any(|(w, n)| w.outputs(*n) == 0 || w.lo >= w.span() || w.hi >= w.span()) {
            continue;
        }
        let op = Conv { windows, input: "ci".into(), output: "co".into(), groups: 1 };
        let (dtype, tolerance) = if done % 4 == 3 { (DType::F16, 0.01) } else { (DType::F32, 1e-4) };
        let case = Case { op, transposed, sizes, channels, chunks, dtype, tolerance };
        done += usize::from(is_the_same(&mut draw, &case));
    }
}

/// What a device has beside a halo is read where it lies, so nothing may be written there meanwhile.
#[test]
fn residual_convolutions() {
    let [x, y, channel] = [dim("x", 16), dim("y", 12), dim("c", 12)];
    let window = |name: &str, n| Window::same(name, n, 3, 1, 1);
    let op =
        Conv { windows: vec![window("x", 16), window("y", 12)], input: "c".into(), output: "c.out".into(), groups: 1 };
    let filter = [dim("k.x", 3), dim("k.y", 3), channel.clone(), dim("c.out", 12)];
    let feeds = [f32s(&[dim("batch", 2), x, y, channel], 1), f32s(&filter, 2)];
    let layouts = [("m=2", "x:m"), ("m=4", "x:m"), ("m=2", "y:m"), ("mx=2,my=2", "x:mx,y:my")];
    for gradients in [false, true] {
        let p = program(&feeds, gradients, |_, t| {
            let x = (&t[0] * 2.0).relu();
            &x.conv(&t[1], &op).rename("c.out", "c") + &x
        });
        same_everywhere("a residual convolution", &p, &feeds, &layouts, 1e-4);
    }
}
