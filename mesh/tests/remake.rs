//! What the backward pass keeps of the forward pass, and what it makes again.

mod common;

use common::{program, ramp, run_f};
use mesh::dim::{Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, BatchNorm, Kernel, Mode};
use mesh::ops::Prim;
use mesh::program::Program;

/// Large enough that the backward pass minds keeping it.
fn image(side: usize) -> [Dim; 4] {
    [dim("batch", 2), dim("x", side), dim("y", side), dim("channel", 2)]
}

fn norm(x: &Tensor, name: &str) -> Tensor {
    nn::batch_norm(x, name, "channel", &BatchNorm::default(), Mode::Train)
}

/// Convolution, norm, activation, drop-out: the block of a UNet.
fn block(x: &Tensor, name: &str) -> Tensor {
    let y = nn::conv(x, &format!("{name}.conv"), &Kernel::new(&["x", "y"], 3).unbiased(), &dim("channel", 4));
    nn::dropout(&nn::leaky_relu(&norm(&y, &format!("{name}.norm")), 0.1), 0.5, Mode::Train)
}

fn head(x: &Tensor) -> Tensor {
    nn::conv(x, "c", &Kernel::new(&["x", "y"], 3).from_channel("channel"), &dim("class", 4))
}

fn network(_: &Graph, x: &Tensor) -> Tensor {
    head(&block(&block(x, "a"), "b"))
}

/// The results of the forward pass, not counting what is small or given, that nodes after the loss take: op and scope.
fn kept(p: &Program) -> Vec<(&'static str, &str)> {
    let f = p.function("f").unwrap();
    let (_, loss) = f.outputs.iter().find(|(n, _)| *n == "loss").unwrap();
    let mut kept = vec![];
    for user in &f.nodes[loss.index() + 1..] {
        for &id in user.inputs.iter().filter(|i| *i <= loss) {
            let node = f.node(id);
            let given = matches!(node.op, Prim::Input(_) | Prim::Read(_));
            let entry = (node.op.op().name(), &*node.scope);
            if !given && node.ty.elements() >= 4096 && !kept.contains(&entry) {
                kept.push(entry);
            }
        }
    }
    kept.sort();
    kept
}

#[test]
fn the_backward_pass_keeps_the_results_of_convolutions_and_nothing_else() {
    let (p, _) = program(&image(32), network);
    assert_eq!(kept(&p), [("conv", "a.conv"), ("conv", "b.conv")]);
}

#[test]
fn the_backward_pass_of_a_transformers_feed_forward_keeps_its_products() {
    let d = [dim("batch", 8), dim("seq", 16), dim("d_model", 32)];
    let (p, _) = program(&d, |_, x| {
        let dense =
            |x: &Tensor, name: &str, from: &str, to: Dim| nn::dense(x, name, &[from], &[to], &Default::default());
        let wide = nn::gelu(&dense(x, "up", "d_model", dim("d_ff", 64)));
        let y = nn::dropout(&dense(&wide, "down", "d_ff", dim("d_model", 32)), 0.9, Mode::Train);
        nn::layer_norm(&x.add(&y), "norm", &["d_model"], 1e-12)
    });
    let scopes: Vec<&str> = kept(&p).iter().map(|(_, scope)| *scope).collect();
    // Of the sum that goes into the norm either itself or its summands are kept.
    assert!(scopes.contains(&"up") && scopes.len() == 2, "{:?}", kept(&p));
}

#[test]
fn values_that_are_made_again_give_the_gradients_of_finite_differences() {
    let d = image(32);
    let (p, variables) = program(&d, |_, x| block(x, "a"));
    assert_eq!(kept(&p), [("conv", "a.conv")]);
    let x = ramp(&d, 1);
    let results = run_f(&p, &x, &variables);
    for name in ["a.conv/filter", "a.norm/scale", "a.norm/bias"] {
        let name = Name::from(name);
        let h = 1e-6;
        let loss = |by: f64| {
            let mut variables = variables.clone();
            variables.get_mut(&name).unwrap().iter_mut().take(1).for_each(|v| *v += by);
            run_f(&p, &x, &variables)[&Name::from("loss")].sum()
        };
        let difference = (loss(h) - loss(-h)) / (2.0 * h);
        let grad = *results[&Name::from(format!("d {name}"))].first().unwrap();
        assert!((grad - difference).abs() < 1e-3 * (1.0 + difference.abs()), "{name}: {grad}, {difference}");
    }
}

#[test]
fn gradients_with_recompute_regions_are_those_without() {
    let d = image(4);
    let plain = program(&d, network);
    let regions = program(&d, |g, x| {
        let a = g.recompute(|| block(x, "a"));
        let b = g.recompute(|| block(&a, "b"));
        head(&b)
    });
    let (a, b) = (run_f(&plain.0, &ramp(&d, 1), &plain.1), run_f(&regions.0, &ramp(&d, 1), &regions.1));
    assert_eq!(a.len(), 11, "y, the loss and nine gradients");
    assert_eq!(a, b);
    let count = |p: &Program| p.function("f").unwrap().nodes.iter().filter(|n| n.op.op().name() == "conv").count();
    assert_eq!((count(&plain.0), count(&regions.0)), (3, 5), "the regions' convolutions run twice");
}

#[test]
fn a_recompute_region_keeps_what_goes_in_and_what_leaves_it_and_nothing_of_its_inside() {
    let two = |x: &Tensor, name: &str| block(&block(x, &format!("{name}.0")), &format!("{name}.1"));
    let (p, _) = program(&image(32), |g, x| {
        let a = g.recompute(|| two(x, "a"));
        let b = g.recompute(|| two(&a, "b"));
        head(&Tensor::concat(&[&b, &a], "channel"))
    });
    // What leaves is cheaply made from the result of its convolution, whose statistics are small.
    assert_eq!(kept(&p), [("conv", "a.1.conv"), ("conv", "b.1.conv")]);
    let count = |op: &str| p.function("f").unwrap().nodes.iter().filter(|n| n.op.op().name() == op).count();
    assert_eq!(count("conv"), 5 + 2, "the first one of each region runs twice");
    let (plain, _) = program(&image(32), |_, x| {
        let a = two(x, "a");
        head(&Tensor::concat(&[&two(&a, "b"), &a], "channel"))
    });
    let sums = |p: &Program| p.function("f").unwrap().nodes.iter().filter(|n| n.op.op().name() == "reduce_sum").count();
    assert_eq!(sums(&p), sums(&plain), "statistics are not made again");
}
