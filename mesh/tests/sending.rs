//! What is sent once, what is sent twice, and in which form.

mod common;

use common::{Plain, stepping};
use mesh::dim::{DType, Dim, dim};
use mesh::graph::Tensor;
use mesh::layout::{Layout, Mesh};
use mesh::nn::{self, Dense, init::normal};
use mesh::optim::Optimizer;
use mesh::placement::Placement;
use mesh::plan::{PlanOptions, plan_program};
use mesh::program::Program;
use mesh::spmd::{self, SpmdOp, SpmdProgram};

fn lowered(p: &Program, mesh: &str, layout: &str) -> SpmdProgram {
    let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    layout.check(&mesh, p).unwrap();
    spmd::lower(p.function("step").unwrap(), &Placement::new(&mesh, &layout, p)).unwrap()
}

/// Moves that send something, and sums that several devices finish.
fn sends(p: &Program, mesh: &str, layout: &str) -> [usize; 2] {
    let spmd = lowered(p, mesh, layout);
    let moves = spmd.instrs.iter().filter(|i| {
        let held = &spmd.values[i.inputs.first().map_or(0, |v| v.index())].regions;
        let comes = &spmd.values[i.output.index()].regions;
        matches!(i.op, SpmdOp::Move) && !held.iter().zip(&**comes).all(|(held, comes)| held.contains(comes))
    });
    let sums = spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::AllReduce { .. }));
    [moves.count(), sums.count()]
}

fn peak(p: &Program, mesh: &str, layout: &str) -> usize {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let plan = plan_program(p, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
    (0..plan.mesh.size()).map(|d| plan.peak_bytes(d)).max().unwrap()
}

fn tokens(size: usize) -> [Dim; 2] {
    [dim("token", size), dim("d", 64)]
}

/// Layers that each add the same values of the other tokens, made by each of them by itself.
#[test]
fn what_several_layers_make_of_one_value_is_sent_once() {
    let layers = |count: usize| {
        stepping(|g| {
            let x = g.input("x", DType::F32, &[dim("token", 64), dim("d", 1024)]);
            let mask = g.input("mask", DType::F32, &[dim("token", 64)]).tanh();
            let layer = |x: Tensor, i: usize| {
                g.scoped(format!("layer.{i}"), || {
                    let seen = x.sum(&["d"]).add(&mask.rename("token", "other"));
                    x.mul_scalar(0.5).add(&seen.exp().sum(&["other"]))
                })
            };
            g.output("y", &(0..count).fold(x, layer).sum_all());
        })
    };
    let [one, ..] = sends(&layers(1), "m=4", "token:m,other:m?");
    assert_eq!(one, 1);
    assert_eq!(sends(&layers(6), "m=4", "token:m,other:m?")[0], one);
}

/// Of what is large, the backward pass gathers again what it needs, or memory would be what it is without the split.
#[test]
fn large_weights_are_gathered_again_and_small_ones_are_kept() {
    let layers = 6;
    let d = dim("d", 256);
    let p = stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("token", 2048), d.clone()]);
        let layer = |x: Tensor, i: usize| {
            nn::gelu(&nn::dense(&x, &format!("layer.{i}"), &["d"], std::slice::from_ref(&d), &Dense::default()))
        };
        let loss = (0..layers).fold(x, layer).square().mean_all();
        Optimizer::sgd(0.1).apply(g, &loss);
    });
    let zero = "token:data,variables{*:data},gradients{*:data},slots{*:data}";
    let [moves, _] = sends(&p, "data=4", zero);
    // Kernels and biases forward; kernels again backward, but for that of the first layer, whose input has no gradient.
    assert_eq!(moves, 2 * layers + layers - 1);
    assert!(peak(&p, "data=4", zero) < peak(&p, "data=4", "token:data"));
}

/// Blocks of two layers whose weights are split, some of them made again.
fn regions(made_again: usize) -> Program {
    stepping(|g| {
        let x = g.input("x", DType::F32, &tokens(256));
        let tensor = |x: &Tensor, name: &str| {
            let wide = nn::dense(x, &format!("{name}.up"), &["d"], &[dim("d_ff", 256)], &Dense::default());
            nn::dense(&nn::gelu(&wide), &format!("{name}.down"), &["d_ff"], &[dim("d", 64)], &Dense::default())
        };
        let block = |x: Tensor, i: usize| {
            let inside = || tensor(&tensor(&x, &format!("{i}.first")).tanh(), &format!("{i}.second")).tanh();
            if i < made_again { g.recompute(inside) } else { inside() }
        };
        let loss = (0..2).fold(x, block).square().mean_all();
        Optimizer::sgd(0.1).apply(g, &loss);
    })
}

#[test]
fn a_sum_inside_of_a_region_that_is_made_again_is_kept_where_there_is_room() {
    let [none, all] = [regions(0), regions(2)].map(|p| sends(&p, "model=2", "d_ff:model")[1]);
    // One sum is inside of each region; the other one leaves it, and is kept for that.
    assert_eq!(all, none);
    assert!(peak(&regions(2), "model=2", "d_ff:model") < peak(&regions(0), "model=2", "d_ff:model"));
}

/// A product over `row`, which its result's `out` is split over too: either what it takes is gathered, or parts of the sum
/// are. What another reader has gathered decides.
#[test]
fn what_was_moved_for_another_reader_counts_as_there() {
    let product = |gathered: bool| {
        stepping(|g| {
            let x = g.input("x", DType::F32, &[dim("row", 64), dim("col", 64)]).tanh();
            let w = g.variable("w", &[dim("row", 64), dim("out", 16)], normal(0.1)).with_layout("");
            if gathered {
                g.output("other", &x.rename("row", "whole").exp().sum_all());
            }
            g.output("y", &x.contract(&w, &["row"]).exp());
        })
    };
    // The sum of the product is finished by all, unless x is there.
    let finished = |p: &Program| {
        let spmd = lowered(p, "m=4", "row:m,out:m?");
        spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::AllReduce { .. })).count()
    };
    assert_eq!([false, true].map(|gathered| finished(&product(gathered))), [1, 0]);
}

/// The sum of what lies split over another dimension than its result is made there: only the result moves.
#[test]
fn a_sum_is_made_where_its_input_lies() {
    let p = stepping(|g| {
        let x = g.scoped("heads", || g.input("x", DType::F32, &[dim("token", 64), dim("head", 8)]).tanh());
        g.output("y", &x.sum(&["token"]));
    });
    let spmd = lowered(&p, "m=4", "heads/**{head:m}");
    let moved: Vec<usize> = spmd
        .instrs
        .iter()
        .filter(|i| matches!(i.op, SpmdOp::Move))
        .map(|i| spmd.values[i.output.index()].ty.elements())
        .collect();
    assert_eq!(moved, [8]);
}

/// Where each device updates a part of a variable, it needs that part of the gradient.
#[test]
fn a_gradient_that_is_used_in_parts_is_summed_up_in_parts() {
    let p = stepping(|g| {
        let x = g.input("x", DType::F32, &tokens(64));
        let y = nn::dense(&x, "layer", &["d"], &[dim("out", 64)], &Dense::unbiased());
        // Used twice: its gradients are added first.
        let loss = y
            .square()
            .mean_all()
            .add(&nn::dense(&x, "layer", &["d"], &[dim("out", 64)], &Dense::unbiased()).mean_all());
        Optimizer::momentum(0.1, 0.9).apply(g, &loss);
    });
    let spmd = lowered(&p, "data=2", "token:data,slots{*:data}");
    let parts =
        spmd.instrs.iter().filter(|i| matches!(i.op, SpmdOp::AllReduce { .. })).map(|i| &spmd.values[i.output.index()]);
    let elements: Vec<usize> = parts.filter(|v| v.ty.elements() == 64 * 64).map(|v| v.regions[0].elements()).collect();
    assert!(!elements.is_empty() && elements.iter().all(|e| *e == 64 * 64 / 2), "{elements:?}");
}

/// The gradient of what three layers take is one product: one sum to finish.
#[test]
fn gradients_by_products_alike_are_one_sum() {
    let p = |sides: usize| {
        stepping(|g| {
            let x = g.input("x", DType::F32, &tokens(64)).tanh();
            let all: Vec<Tensor> = (0..sides)
                .map(|i| nn::dense(&x, &format!("side.{i}"), &["d"], &[dim("d_ff", 128)], &Dense::default()).tanh())
                .collect();
            let sum = all.into_iter().reduce(|a, b| a.mul(&b)).unwrap();
            let loss = nn::dense(&sum, "down", &["d_ff"], &[dim("d", 64)], &Dense::default()).square().mean_all();
            g.output("dx", &g.gradients(&loss, &[&x])[0]);
        })
    };
    assert_eq!(sends(&p(1), "model=4", "d_ff:model")[1], 2);
    assert_eq!(sends(&p(3), "model=4", "d_ff:model")[1], 2);
}

/// Scores of each row by every other one: the rows are needed whole.
#[test]
fn a_gather_of_all_of_a_tensor_has_to_be_asked_for() {
    let rows = |size: usize| {
        stepping(|g| {
            let x = g.input("x", DType::F32, &[dim("row", size), dim("d", 512)]).tanh();
            g.scoped("scores", || g.output("y", &x.exp().rename("row", "other").square().sum_all()));
        })
    };
    let plan = |size: usize, mesh: &str, layout: &str| {
        let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
        plan_program(&rows(size), &mesh, &layout, &PlanOptions::default(), &Plain).map(|_| ())
    };
    let e = plan(1024, "m=4", "row:m").unwrap_err();
    assert_eq!(e.cause.code(), "L0010");
    let text = e.to_string();
    for part in
        ["`row`, split over the axis `m`", "this `rename`", "all of exp f32[row:1024, d:512]", "1.5 MiB", "`row:m?`"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(e.place.unwrap().file, file!());
    // Asked for, in each way; of a part; a small one.
    for layout in ["row:m?", "row:m,scores/**{row:none}", "row:m,scores{row:none}", "gathers:allow,row:m"] {
        plan(1024, "m=4", layout).unwrap_or_else(|e| panic!("{layout}: {e}"));
    }
    plan(1024, "m=2,n=2", "row:m,d:n").unwrap();
    plan(512, "m=4", "row:m").unwrap();
    assert!(plan(1024, "m=4", "gathers:refuse,row:m").is_err());
}

/// Twelve heads over four devices are two parts of a sum on each, so that weights are gathered in place of finishing sums of
/// tokens: those of queries, keys and values together. Nobody has to ask for that.
#[test]
fn weights_side_by_side_may_be_gathered_as_each_may() {
    let p = stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("token", 8192), dim("d", 768)]).tanh();
        let into = [dim("heads", 12), dim("d_head", 64)];
        let side = |i: usize| nn::dense(&x, &format!("side.{i}"), &["d"], &into, &Dense::unbiased());
        let loss = side(0).tanh().mul(&side(1)).mul(&side(2)).mean_all();
        g.output("dx", &g.gradients(&loss, &[&x])[0]);
    });
    let (mesh, layout) = ("model=4".parse().unwrap(), "heads:model,token:model?".parse().unwrap());
    let plan = plan_program(&p, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
    let sends = plan.functions[&"step".into()][0].steps.iter();
    let mut gathered = sends.filter(|s| &*s.label.op == "all-gather").flat_map(|s| &s.outputs).map(|b| b.bytes);
    assert!(gathered.any(|bytes| bytes == 3 * 768 * 768 * 4));
}
