//! Layers, losses and optimizers: near the reference, and the same bits however they are split, over training steps.

mod common;

use common::{assert_bits_eq, f32s, i32s, program, ramp, run, same_on_the_grid, stepping, steps_on_the_grid};
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, BatchNorm, Dense, Kernel, Mode};
use mesh::optim::{Adafactor, Optimizer, Rule, Schedule};
use mesh::program::{Init, Program};

fn volume() -> Vec<Dim> {
    vec![dim("batch", 3), dim("x", 5), dim("y", 7), dim("channel", 4)]
}

/// Three steps of gradient descent on a layer, held with its output and the gradient of its input.
fn hold(what: &str, dims: &[Dim], shift: f32, tolerance: f64, layer: impl Fn(&Graph, &Tensor) -> Tensor) {
    let (_, Array::F32(x)) = f32s(dims, 1) else { unreachable!() };
    let x = Array::F32(x.mapv(|v| v + shift));
    let p = stepping(|g| {
        let x = g.input("x", DType::F32, dims);
        let y = layer(g, &x);
        let weights = g.random_keyed(mesh::ops::source::Distribution::Uniform, &y.ty().dims, 99);
        let loss = y.mul(&weights).mean_all();
        g.output("y", &y);
        g.output("loss", &loss);
        g.output("d x", &g.gradients(&loss, &[&x])[0]);
        Optimizer::sgd(0.1).apply(g, &loss);
    });
    steps_on_the_grid(what, &p, 3, &[("x", &x)], tolerance);
}

#[test]
fn norms() {
    let train = |_: &Graph, x: &Tensor| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Train);
    hold("batch norm", &volume(), 0.3, 1e-4, train);
    hold("batch norm in evaluation", &volume(), 0.3, 1e-4, |_, x| {
        nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Eval)
    });
    // Single precision has 1e-3 left of x' own size there, and the result is 1.7 x.
    hold("batch norm far from 0", &volume(), 1e4, 5e-3, train);
    hold("layer norm", &volume(), 0.3, 1e-4, |_, x| nn::layer_norm(x, "n", &["channel"], 1e-3));
    hold("layer norm over two dimensions", &volume(), 0.3, 1e-4, |_, x| {
        nn::layer_norm(x, "n", &["y", "channel"], 1e-3)
    });
    hold("instance norm", &volume(), 0.3, 1e-4, |_, x| nn::instance_norm(x, "n", "channel", &["x", "y"], 1e-3));
    hold("group norm", &volume(), 0.3, 1e-4, |_, x| nn::group_norm(x, "n", "channel", 2, &["x", "y"], 1e-3));
}

#[test]
fn products_with_activations() {
    let d = [dim("batch", 5), dim("seq", 7), dim("model", 40)];
    hold("feed-forward", &d, 0.0, 1e-4, |_, x| {
        let wide = nn::gelu(&nn::dense(x, "up", &["model"], &[dim("ff", 70)], &Dense::default()));
        nn::dense(&wide, "down", &["ff"], &[dim("model", 40)], &Dense::unbiased()).add(x)
    });
    hold("attention", &[dim("batch", 2), dim("seq", 7), dim("model", 12)], 0.0, 1e-4, |_, x| {
        let heads = [dim("head", 3), dim("d", 4)];
        let of = |name: &str| nn::dense(x, name, &["model"], &heads, &Dense::default());
        let (q, k, v) = (of("q"), of("k").rename("seq", "keys"), of("v").rename("seq", "keys"));
        let weights = nn::softmax(&q.contract(&k, &["d"]).mul_scalar(0.5), &["keys"]);
        nn::dense(&weights.contract(&v, &["keys"]), "o", &["head", "d"], &[dim("model", 12)], &Dense::default())
    });
    hold("convolution, norm, activation, drop-out and pool", &volume(), 0.0, 1e-4, |_, x| {
        let y = nn::conv(x, "c", &Kernel::new(&["x", "y"], 3).unbiased(), &dim("channel", 6));
        let y = nn::leaky_relu(&nn::batch_norm(&y, "n", "channel", &BatchNorm::default(), Mode::Train), 0.1);
        nn::dropout(&y, 0.8, Mode::Train).max_pool(&[mesh::ops::window::Window::valid("x", 2, 2)])
    });
    hold("down and up again", &volume(), 0.0, 1e-4, |_, x| {
        let y = nn::silu(&nn::conv(x, "down", &Kernel::new(&["x", "y"], 3).stride(2), &dim("channel", 5)));
        let up = nn::conv_transpose(&y, "up", &Kernel::new(&["x", "y"], 2).stride(2).to(&[5, 7]), &dim("channel", 4));
        Tensor::concat(&[x, &up], "channel").tanh()
    });
}

#[test]
fn losses() {
    let d = vec![dim("batch", 5), dim("x", 7)];
    let with_class: Vec<Dim> = d.iter().cloned().chain([dim("class", 4)]).collect();
    let feeds = [f32s(&with_class, 1), i32s(&d, 2, 4), f32s(&d, 3)];
    let hold = |what: &str, build: &dyn Fn(&[Tensor]) -> Tensor| {
        same_on_the_grid(what, &program(&feeds, true, |_, t| build(t)), &feeds, 1e-4);
    };
    hold("softmax", &|t| nn::softmax(&t[0], &["class"]));
    hold("softmax over what is split", &|t| nn::softmax(&t[0], &["x", "batch"]));
    hold("log softmax", &|t| nn::log_softmax(&t[0], &["class"]));
    hold("cross-entropy", &|t| nn::cross_entropy(&t[0].mul_scalar(30.0), &t[1], "class"));
    hold("weighted mean", &|t| nn::weighted_mean(&nn::cross_entropy(&t[0], &t[1], "class"), &t[2].square()));
    let target = |t: &[Tensor]| t[1].one_hot(&dim("class", 4));
    hold("dice", &|t| nn::dice_loss(&nn::softmax(&t[0], &["class"]), &target(t), "batch", &["x"]));
    hold("soft dice", &|t| nn::soft_dice_loss(&t[0].sigmoid(), &target(t), &["x"]));
    hold("drop-out", &|t| nn::softplus(&nn::dropout(&t[0], 0.6, Mode::Train)));
}

#[test]
fn accuracy_counts_the_same_on_every_layout() {
    let d = vec![dim("batch", 9), dim("x", 7)];
    let feeds = [f32s(&[d.clone(), vec![dim("class", 4)]].concat(), 1), i32s(&d, 2, 4)];
    let p = program(&feeds, false, |_, t| nn::accuracy(&t[0], &t[1], "class"));
    same_on_the_grid("accuracy", &p, &feeds, 1e-6);
}

/// Two dense layers and a cross-entropy, trained by `optimizer`.
fn two_layers(optimizer: &Optimizer) -> Program {
    stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("batch", 7), dim("in", 9)]);
        let labels = g.input("labels", DType::I32, &[dim("batch", 7)]);
        let hidden = nn::gelu(&nn::dense(&x, "first", &["in"], &[dim("hidden", 70)], &Dense::default()));
        let hidden = nn::layer_norm(&nn::dropout(&hidden, 0.9, Mode::Train), "norm", &["hidden"], 1e-5);
        let logits = nn::dense(&hidden, "second", &["hidden"], &[dim("class", 5)], &Dense::default());
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        let update = optimizer.apply(g, &loss);
        g.output("loss", &loss);
        g.output("norm", &update.grad_norm);
    })
}

#[test]
fn every_variable_is_the_same_after_four_steps_of_every_optimizer() {
    let (_, x) = f32s(&[dim("batch", 7), dim("in", 9)], 1);
    let (_, labels) = i32s(&[dim("batch", 7)], 2, 5);
    let factored = Rule::Adafactor(Adafactor { factored_from: 5, momentum: 0.9, ..Adafactor::default() });
    let rate = || Schedule::from(0.05).warmup(3);
    let all = [
        ("gradient descent", Optimizer::sgd(rate())),
        ("momentum", Optimizer::momentum(rate(), 0.9)),
        ("adam", Optimizer::adam(rate())),
        ("adamw", Optimizer::adamw(rate(), 0.1)),
        ("lamb", Optimizer::lamb(rate(), 0.01)),
        ("adafactor", Optimizer { rule: factored, ..Optimizer::adafactor(rate()) }),
    ];
    for (name, optimizer) in all {
        let clipped = optimizer.clone().clipped(0.3);
        let all = [("", optimizer.clone()), (", clipped", clipped), (", scaled", optimizer.scaled())];
        for (clipped, optimizer) in all {
            let p = two_layers(&optimizer);
            steps_on_the_grid(&format!("{name}{clipped}"), &p, 4, &[("x", &x), ("labels", &labels)], 2e-3);
        }
    }
}

/// A product in f16 whose gradient has the size of its input times 65536, trained with the loss scaled.
fn overflowing() -> Program {
    stepping(|g| {
        let x = g.input("x", DType::F32, &[dim("batch", 8), dim("in", 6)]).cast(DType::F16);
        let w = g.variable("w", &[dim("in", 6), dim("out", 4)], nn::init::he_normal(6));
        let y = x.contract(&w.cast(DType::F16), &["in"]);
        let bias = g.variable("bias", &[dim("out", 4)], Init::zeros());
        let loss = y.cast(DType::F32).add(&bias).mean_all();
        Optimizer::adam(0.01).clipped(1.0).scaled().apply(g, &loss).output(g);
        g.output("loss", &loss);
    })
}

#[test]
fn a_step_whose_gradient_overflows_is_skipped_on_all_devices_and_halves_the_scale() {
    let small = ramp(&[dim("batch", 8), dim("in", 6)], 1);
    // Of one device's part of w a gradient is more than 65504, at the first scale and at the next one.
    let [mut large, mut larger] = [small.clone(), small.clone()];
    large[[5, 4]] = 40.0;
    larger[[5, 4]] = 100.0;
    let inputs = [&small, &large, &small, &larger, &small];
    let train = |mesh: &str, layout: &str| {
        let mut session = Session::embedded(overflowing(), &run::options(mesh, layout)).unwrap();
        let names: Vec<Name> = session.program().variables.iter().map(|v| v.name.clone()).collect();
        let variables =
            |s: &Session| -> Vec<(Name, Array)> { names.iter().map(|n| (n.clone(), s.variable(n).unwrap())).collect() };
        let mut seen = vec![(vec![], variables(&session))];
        for (step, x) in (0..).zip(inputs) {
            let out = session.run("step", step, &[("x", &x.clone().into())]).unwrap();
            seen.push((out, variables(&session)));
        }
        seen
    };
    let value = |list: &[(Name, Array)], name: &str| list.iter().find(|(n, _)| **n == *name).unwrap().1.to_f32();
    let whole = train("1", "");
    let after = [(65_536.0, 0.0), (32_768.0, 1.0), (32_768.0, 1.0), (16_384.0, 2.0), (16_384.0, 2.0)];
    for (step, (scale, skipped)) in after.into_iter().enumerate() {
        let ((out, now), (_, before)) = (&whole[step + 1], &whole[step]);
        assert_eq!((value(now, "loss_scale"), value(out, "skipped_steps")), (Some(scale), Some(skipped)), "{step}");
        assert_eq!(value(out, "loss_scale"), value(before, "loss_scale"), "what the step's loss was multiplied by");
        let skips = step % 2 == 1;
        assert_eq!(value(out, "grad_norm").unwrap().is_finite(), !skips, "step {step}");
        assert!(value(out, "loss").unwrap().is_finite());
        for ((name, now), (_, before)) in now.iter().zip(before).filter(|((n, _), _)| !n.starts_with("loss_scale")) {
            assert_eq!(now.to_bytes() == before.to_bytes(), skips, "{name} after step {step}");
        }
    }
    for (mesh, layout) in [("m=2", "in:m"), ("m=2", "batch:m"), ("m=2", "out:m"), ("m=3,n=2", "in:m,batch:n")] {
        for (step, ((out, now), (out_split, now_split))) in whole.iter().zip(train(mesh, layout)).enumerate() {
            let on = format!("{mesh} with {layout}, {step} steps done");
            assert_bits_eq("results", out, &out_split, &on);
            assert_bits_eq("variables", now, &now_split, &on);
        }
    }
}
