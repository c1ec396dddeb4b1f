//! Layers against their formulas in double precision, and their gradients against finite differences.

mod common;

use common::{assert_close, assert_gradients, assert_layer_gradients, evaluate, program, ramp, run_f};
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, BatchNorm, Mode};
use mesh::op::Reference;
use mesh::program::ProgramBuilder;
use mesh::reference::{self, Values};
use ndarray::{Axis, array};

fn volume() -> [Dim; 4] {
    [dim("batch", 2), dim("x", 3), dim("y", 2), dim("channel", 4)]
}

#[test]
fn every_norm_has_the_gradients_of_finite_differences() {
    let d = volume();
    let x = || ramp(&d, 3).mapv(|v| 3.0 * v + 1.0);
    assert_layer_gradients(&d, x(), |_, x| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Train));
    assert_layer_gradients(&d, x(), |_, x| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Eval));
    assert_layer_gradients(&d, x(), |_, x| nn::layer_norm(x, "n", &["channel"], 1e-3));
    assert_layer_gradients(&d, x(), |_, x| nn::layer_norm(x, "n", &["y", "channel"], 1e-3));
    assert_layer_gradients(&d, x(), |_, x| nn::instance_norm(x, "n", "channel", &["x", "y"], 1e-3));
    assert_layer_gradients(&d, x(), |_, x| nn::group_norm(x, "n", "channel", 2, &["x", "y"], 1e-3));
}

/// Normalised along the axes given, with the scale and bias of `variables` along the last axis.
fn by_hand(x: &Reference, axes: &[usize], eps: f64) -> Reference {
    let mean = |a: &Reference| axes.iter().fold(a.clone(), |a, &i| a.mean_axis(Axis(i)).unwrap().insert_axis(Axis(i)));
    let centred = x - &mean(x);
    let var = mean(&(&centred * &centred));
    centred / var.mapv(|v| (v + eps).sqrt())
}

#[test]
fn norms_have_mean_0_and_variance_1_over_their_dimensions_before_scale_and_bias() {
    let d = volume();
    let x = ramp(&d, 4);
    let affine = |unit: Reference, variables: &Values| {
        unit * &variables[&Name::from("n/scale")] + &variables[&Name::from("n/bias")]
    };
    let batch = |_: &Graph, x: &Tensor| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Train);
    let (p, v) = program(&d, batch);
    assert_close(&run_f(&p, &x, &v)[&Name::from("y")], &affine(by_hand(&x, &[0, 1, 2], 1e-6), &v), 1e-9);
    let (p, v) = program(&d, |_, x| nn::layer_norm(x, "n", &["channel"], 1e-3));
    assert_close(&run_f(&p, &x, &v)[&Name::from("y")], &affine(by_hand(&x, &[3], 1e-3), &v), 1e-7);
    let (p, v) = program(&d, |_, x| nn::instance_norm(x, "n", "channel", &["x", "y"], 1e-3));
    assert_close(&run_f(&p, &x, &v)[&Name::from("y")], &affine(by_hand(&x, &[1, 2], 1e-3), &v), 1e-7);
    let (p, v) = program(&d, |_, x| nn::group_norm(x, "n", "channel", 2, &["x", "y"], 1e-3));
    let split = x.clone().into_shape_with_order(vec![2, 3, 2, 2, 2]).unwrap();
    let unit = by_hand(&split, &[1, 2, 4], 1e-3).into_shape_with_order(x.shape().to_vec()).unwrap();
    assert_close(&run_f(&p, &x, &v)[&Name::from("y")], &affine(unit, &v), 1e-7);
}

#[test]
fn the_variance_is_a_mean_of_squared_distances_and_not_a_difference_of_large_numbers() {
    let d = volume();
    let build = |_: &Graph, x: &Tensor| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Train);
    let (p, v) = program(&d, build);
    let x = ramp(&d, 5);
    let far = run_f(&p, &x.mapv(|v| v + 1e4), &v)[&Name::from("y")].clone();
    assert_close(&far, &run_f(&p, &x, &v)[&Name::from("y")], 1e-9);
    // In f32 as well: every reduction before the result takes x itself or the square of a difference.
    let f = p.function("f").unwrap();
    let name = |id: mesh::graph::NodeId| f.node(id).op.op().name();
    let (_, loss) = f.outputs.iter().find(|(n, _)| *n == "y").unwrap();
    let reduced: Vec<_> = f.nodes[..loss.index()].iter().filter(|n| n.op.op().name() == "reduce_sum").collect();
    assert_eq!(reduced.len(), 2);
    assert_eq!(name(reduced[0].inputs[0]), "input");
    let square = f.node(reduced[1].inputs[0]);
    assert_eq!((square.op.op().name(), square.inputs[0]), ("mul", square.inputs[1]));
    assert_eq!(name(square.inputs[0]), "sub");
}

#[test]
fn the_backward_pass_of_batch_norm_has_two_reductions_over_the_volume() {
    let d = volume();
    let build = |_: &Graph, x: &Tensor| nn::batch_norm(x, "n", "channel", &BatchNorm::default(), Mode::Train);
    let (p, _) = program(&d, build);
    let f = p.function("f").unwrap();
    let (_, loss) = f.outputs.iter().find(|(n, _)| *n == "loss").unwrap();
    let after = f.nodes[loss.index() + 1..].iter();
    assert_eq!(after.filter(|n| n.op.op().name() == "reduce_sum").count(), 2);
}

#[test]
fn batch_norm_follows_the_statistics_in_training_and_uses_them_in_evaluation() {
    let d = [dim("batch", 4), dim("channel", 2)];
    let mut p = ProgramBuilder::new();
    for (name, mode) in [("train", Mode::Train), ("eval", Mode::Eval)] {
        p.function(name, |g| {
            let x = g.input("x", DType::F32, &d);
            g.output("y", &nn::batch_norm(&x, "n", "channel", &BatchNorm { momentum: 0.75, eps: 1e-6 }, mode));
        })
        .unwrap();
    }
    let p = p.finish().unwrap();
    assert_eq!(p.parameters(), 4);
    let mut variables = reference::init(&p, 1);
    assert_eq!(variables[&Name::from("n/mean")], array![0.0, 0.0].into_dyn());
    assert_eq!(variables[&Name::from("n/var")], array![1.0, 1.0].into_dyn());
    let x = ramp(&d, 6);
    let feeds = Values::from([(Name::from("x"), x.clone())]);
    let (mut mean, mut var) = (array![0.0, 0.0].into_dyn(), array![1.0, 1.0].into_dyn());
    for step in 0..3 {
        reference::run(&p, p.function("train").unwrap(), &feeds, &mut variables, 1, step);
        mean = mean * 0.75 + x.mean_axis(Axis(0)).unwrap() * 0.25;
        var = var * 0.75 + x.var_axis(Axis(0), 0.0) * 0.25;
    }
    assert_close(&variables[&Name::from("n/mean")], &mean, 1e-12);
    assert_close(&variables[&Name::from("n/var")], &var, 1e-12);
    let before = variables.clone();
    let y = reference::run(&p, p.function("eval").unwrap(), &feeds, &mut variables, 1, 3);
    assert_eq!(variables, before);
    assert_close(&y[&Name::from("y")], &((&x - &mean) / var.mapv(|v| (v + 1e-6_f64).sqrt())), 1e-9);
}

#[test]
fn dropout_keeps_the_mean_in_training_and_everything_in_evaluation() {
    let d = [dim("x", 100), dim("y", 100)];
    let x = Reference::ones(vec![100, 100]);
    let y = evaluate(&[(&d, x.clone())], |_, t| nn::dropout(&t[0], 0.8, Mode::Train));
    assert!(y.iter().all(|v| *v == 0.0 || (v - 1.25).abs() < 1e-6));
    assert!((y.mean().unwrap() - 1.0).abs() < 0.02);
    assert_eq!(evaluate(&[(&d, x.clone())], |_, t| nn::dropout(&t[0], 0.8, Mode::Eval)), x);
    let both =
        evaluate(&[(&d, x)], |_, t| nn::dropout(&t[0], 0.8, Mode::Train).sub(&nn::dropout(&t[0], 0.8, Mode::Train)));
    assert!(both.iter().any(|v| *v != 0.0), "two drop-outs have unlike masks");
    assert_gradients(&[(&d[..1], ramp(&d[..1], 1))], |_, t| nn::dropout(&t[0], 0.5, Mode::Train));
}

#[test]
fn activations_have_their_values_and_gradients() {
    let d = [dim("x", 7)];
    let x = array![-90.0, -2.0, -0.3, 0.0, 0.4, 1.5, 90.0].into_dyn();
    let values = |f: &dyn Fn(&Tensor) -> Tensor| evaluate(&[(&d, x.clone())], |_, t| f(&t[0]));
    let leaky = values(&|x| nn::leaky_relu(x, 0.1));
    assert_close(&leaky, &x.mapv(|v: f64| if v > 0.0 { v } else { 0.1 * v }), 1e-6);
    assert_close(&values(&nn::silu), &x.mapv(|v| v / (1.0 + (-v).exp())), 1e-6);
    assert_close(&values(&nn::softplus), &x.mapv(|v| if v > 50.0 { v } else { v.exp().ln_1p() }), 1e-6);
    // Φ(-2), Φ(0.4), Φ(1.5)
    let gelu = values(&nn::gelu);
    for (at, phi) in [(1, 0.022750131948), (4, 0.655421741610), (5, 0.933192798731)] {
        assert!((gelu[[at]] - x[[at]] * phi).abs() < 1e-6);
    }
    assert_close(&values(&nn::gelu_tanh), &gelu, 1e-3);
    let smooth: [(&str, &dyn Fn(&Tensor) -> Tensor); 5] = [
        ("leaky_relu", &|x| nn::leaky_relu(x, 0.1)),
        ("gelu", &nn::gelu),
        ("gelu_tanh", &nn::gelu_tanh),
        ("silu", &nn::silu),
        ("softplus", &nn::softplus),
    ];
    for (_, f) in smooth {
        assert_gradients(&[(&d, ramp(&d, 8).mapv(|v| 2.0 * v))], |_, t| f(&t[0]));
    }
    let slope_at_0 = evaluate(&[(&d[..1], Reference::zeros(vec![7]))], |g, t| {
        g.gradients(&nn::softplus(&t[0]).sum_all(), &[&t[0]]).remove(0)
    });
    assert_eq!(slope_at_0, Reference::from_elem(vec![7], 0.5));
}

#[test]
fn softmax_and_its_logarithm_survive_large_numbers_and_have_their_gradients() {
    let d = [dim("x", 2), dim("class", 3)];
    let x = array![[1000.0, 999.0, -1000.0], [0.5, 0.25, 0.0]].into_dyn();
    let p = evaluate(&[(&d, x.clone())], |_, t| nn::softmax(&t[0], &["class"]));
    let hand = |row: [f64; 3]| row.map(|v| v.exp() / row.iter().map(|v| v.exp()).sum::<f64>());
    let (a, b) = (hand([1.0, 0.0, -1999.0]), hand([0.5, 0.25, 0.0]));
    assert_close(&p, &array![a, b].into_dyn(), 1e-12);
    let l = evaluate(&[(&d, x.clone())], |_, t| nn::log_softmax(&t[0], &["class"]));
    assert_close(
        &l.slice(ndarray::s![.., ..2]).to_owned().into_dyn(),
        &p.slice(ndarray::s![.., ..2]).mapv(f64::ln).into_dyn(),
        1e-9,
    );
    let lse = evaluate(&[(&d, x)], |_, t| nn::log_sum_exp(&t[0], &["class"]));
    assert!((lse[[0]] - (1000.0 + (1.0 + (-1.0_f64).exp()).ln())).abs() < 1e-9);
    let inputs = [(&d[..], ramp(&d, 9))];
    assert_gradients(&inputs, |_, t| nn::softmax(&t[0], &["class"]));
    assert_gradients(&inputs, |_, t| nn::softmax(&t[0], &["class", "x"]));
    assert_gradients(&inputs, |_, t| nn::log_softmax(&t[0], &["class"]));
    assert_gradients(&inputs, |_, t| nn::log_sum_exp(&t[0], &["x"]));
}

/// Labels 2, 0, 1, .. as a tensor of the graph.
fn labels(g: &Graph, over: &Dim, classes: usize) -> Tensor {
    g.iota(over).add(&g.scalar_i32(2)).rem(&g.scalar_i32(classes as i32))
}

#[test]
fn cross_entropy_is_the_surprise_about_the_label() {
    let d = [dim("x", 4), dim("class", 3)];
    let x = ramp(&d, 10).mapv(|v| 3.0 * v);
    let loss = evaluate(&[(&d, x.clone())], |g, t| nn::cross_entropy(&t[0], &labels(g, &d[0], 3), "class"));
    for (i, row) in x.axis_iter(Axis(0)).enumerate() {
        let sum: f64 = row.iter().map(|v| v.exp()).sum();
        assert!((loss[[i]] - (sum.ln() - row[[(i + 2) % 3]])).abs() < 1e-12);
    }
    assert_gradients(&[(&d, x)], |g, t| nn::cross_entropy(&t[0], &labels(g, &d[0], 3), "class"));
}

#[test]
fn the_gradient_of_cross_entropy_makes_no_other_reduction() {
    let d = [dim("x", 4), dim("class", 3)];
    let (p, _) = program(&d, |g, x| nn::cross_entropy(x, &labels(g, &d[0], 3), "class"));
    let f = p.function("f").unwrap();
    let (_, loss) = f.outputs.iter().find(|(n, _)| *n == "loss").unwrap();
    assert!(f.nodes[loss.index() + 1..].iter().all(|n| !n.op.op().name().starts_with("reduce")));
}

#[test]
fn a_weighted_mean_leaves_out_what_weighs_nothing() {
    let d = [dim("x", 3)];
    let weigh = |w: Reference| {
        evaluate(&[(&d, array![1.0, 2.0, 9.0].into_dyn()), (&d, w)], |_, t| nn::weighted_mean(&t[0], &t[1]))
    };
    assert!((weigh(array![1.0, 3.0, 0.0].into_dyn()).sum() - 1.75).abs() < 1e-12);
    assert_eq!(weigh(array![0.0, 0.0, 0.0].into_dyn()).sum(), 0.0);
}

#[test]
fn dice_losses_have_their_published_values() {
    let d = [dim("batch", 2), dim("x", 3), dim("class", 2)];
    let (p, t) = (ramp(&d, 11).mapv(f64::abs), ramp(&d, 12).mapv(|v| f64::from(v > 0.0)));
    let both = [(&d[..], p.clone()), (&d[..], t.clone())];
    let published = evaluate(&both, |_, t| nn::dice_loss(&t[0], &t[1], "batch", &["x"]));
    let soft = evaluate(&both, |_, t| nn::soft_dice_loss(&t[0], &t[1], &["x"])).sum();
    let mut soft_sum = 0.0;
    for c in 0..2 {
        let of = |a: &Reference, b: usize| a.index_axis(Axis(2), c).index_axis(Axis(0), b).to_owned();
        let figures: Vec<(f64, f64)> =
            (0..2).map(|b| ((of(&p, b) * of(&t, b)).sum(), of(&p, b).sum() + of(&t, b).sum())).collect();
        let score = |(i, s): (f64, f64)| 2.0 * i / (s + 0.1);
        let global = score((figures[0].0 + figures[1].0, figures[0].1 + figures[1].1));
        let by_case = (score(figures[0]) + score(figures[1])) / 2.0;
        assert!((published[[c]] + (global + by_case) / 2.0).abs() < 1e-6);
        soft_sum += figures.iter().map(|(i, s)| (2.0 * i + 1.0) / (s + 1.0)).sum::<f64>();
    }
    assert!((soft - (1.0 - soft_sum / 4.0)).abs() < 1e-6);
    assert_gradients(&both, |_, t| nn::dice_loss(&t[0], &t[1], "batch", &["x"]));
    assert_gradients(&both, |_, t| nn::soft_dice_loss(&t[0], &t[1], &["x"]));
}

#[test]
fn the_first_of_the_largest_is_the_prediction() {
    let d = [dim("x", 3), dim("class", 3)];
    let x = array![[1.0, 5.0, 5.0], [7.0, 0.0, 7.0], [0.0, 0.0, 1.0]].into_dyn();
    let top = evaluate(&[(&d, x.clone())], |_, t| nn::arg_max(&t[0], "class"));
    assert_eq!(top, array![1.0, 0.0, 2.0].into_dyn());
    let share = evaluate(&[(&d, x)], |g, t| nn::accuracy(&t[0], &g.iota(&d[0]), "class"));
    assert!((share.sum() - 1.0 / 3.0).abs() < 1e-6, "labels 0, 1, 2: the last one is right");
}

#[test]
fn layers_work_in_16_bits_with_f32_variables() {
    let d = volume();
    for dtype in [DType::Bf16, DType::F16] {
        assert_layer_gradients(&d, ramp(&d, 13), |_, x| {
            let x = x.cast(dtype);
            let x = nn::batch_norm(&x, "b", "channel", &BatchNorm::default(), Mode::Train);
            let x = nn::dropout(&nn::leaky_relu(&x, 0.1), 0.5, Mode::Train);
            let x = nn::softplus(&nn::gelu(&nn::silu(&nn::layer_norm(&x.relu(), "l", &["channel"], 1e-3))));
            let x = nn::softmax(&nn::gelu_tanh(&x), &["channel"]);
            assert_eq!(x.ty().dtype, dtype);
            nn::log_softmax(&x, &["channel"])
        });
    }
}

#[test]
fn initial_values_have_the_variance_of_their_fans() {
    let mut p = ProgramBuilder::new();
    let d = [dim("i", 200), dim("o", 300)];
    let inits = [
        (nn::init::glorot_uniform(200, 300), 2.0 / 500.0),
        (nn::init::glorot_normal(200, 300), 2.0 / 500.0),
        (nn::init::he_uniform(200), 2.0 / 200.0),
        (nn::init::he_normal(200), 2.0 / 200.0),
        (nn::init::lecun_normal(200), 1.0 / 200.0),
        (nn::init::truncated_normal(0.02), 0.02 * 0.02 * 0.7737),
    ];
    p.function("f", |g| {
        for (i, (init, _)) in inits.iter().enumerate() {
            g.output(format!("{i}"), &g.variable(&format!("v{i}"), &d, init.clone()));
        }
    })
    .unwrap();
    let values = reference::init(&p.finish().unwrap(), 3);
    for (i, (_, variance)) in inits.iter().enumerate() {
        let v = &values[&Name::from(format!("v{i}"))];
        assert!((v.mapv(|x| x * x).mean().unwrap() / variance - 1.0).abs() < 0.03, "init {i}");
        assert!(v.mean().unwrap().abs() < 0.03 * variance.sqrt(), "init {i}");
    }
}

#[test]
fn a_misspelt_dimension_is_an_error_at_the_users_line_with_the_nearest_name() {
    let wrong: [(&str, u32, &dyn Fn(&Tensor) -> Tensor); 4] = [
        ("chanel", line!(), &|x| nn::batch_norm(x, "n", "chanel", &BatchNorm::default(), Mode::Train)),
        ("channell", line!(), &|x| nn::layer_norm(x, "n", &["channell"], 1e-6)),
        ("chanel", line!(), &|x| nn::softmax(x, &["chanel"])),
        ("chanel", line!(), &|x| nn::log_sum_exp(x, &["chanel"])),
    ];
    for (name, line, layer) in wrong {
        let e = ProgramBuilder::new()
            .function("f", |g| g.output("y", &layer(&g.input("x", DType::F32, &volume()))))
            .unwrap_err();
        let text = e.to_string();
        assert!(text.contains(&format!("`{name}`")) && text.contains("did you mean `channel`?"), "{text}");
        assert!(text.contains(&format!("tests/nn.rs:{line}:")), "{text}");
    }
}

#[test]
fn groups_must_divide_the_channels() {
    let e = ProgramBuilder::new()
        .function("f", |g| {
            let x = g.input("x", DType::F32, &volume());
            g.output("y", &nn::group_norm(&x, "n", "channel", 3, &["x", "y"], 1e-6));
        })
        .unwrap_err();
    assert!(e.to_string().contains("cannot cut channel:4 into 3 equal groups"), "{e}");
    assert!(e.to_string().contains("tests/nn.rs"), "{e}");
}
