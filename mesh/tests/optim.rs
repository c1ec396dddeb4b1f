//! Optimizers and schedules against independent scalar implementations, over several steps.

mod common;

use common::ramp;
use mesh::dim::{Dim, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::op::Reference;
use mesh::optim::{Adafactor, Adam, LossScale, Optimizer, Rule, Schedule, Sgd};
use mesh::program::{Init, Program, ProgramBuilder};
use mesh::reference::{self, Values};
use ndarray::Axis;

/// `loss = Σ (w - target)² / 2 + 3 Σ bias`: the gradients are `w - target` and 3.
fn program(optimizer: &Optimizer, dims: &[Dim]) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let loss = g.scoped("layer", || {
            let w = g.variable("w", dims, Init::zeros());
            let target = g.state("target", dims, Init::zeros());
            w.sub(&target).square().sum_all().mul_scalar(0.5).add(&bias(g).sum_all().mul_scalar(3.0))
        });
        let update = g.scoped("elsewhere", || optimizer.apply(g, &loss));
        g.output("norm", &update.grad_norm);
        g.output("rate", &update.rate);
    })
    .unwrap();
    p.finish().unwrap()
}

fn bias(g: &Graph) -> Tensor {
    g.variable("bias", &[dim("out", 2)], Init::zeros())
}

/// Runs `steps` steps from different numbers; the values of `w` and `bias` and the outputs after each, and all variables.
fn train(optimizer: &Optimizer, dims: &[Dim], steps: u32) -> (Vec<(Reference, Reference, Values)>, Values) {
    let p = program(optimizer, dims);
    let mut variables = reference::init(&p, 1);
    variables.insert("layer/w".into(), ramp(dims, 1));
    variables.insert("layer/target".into(), ramp(dims, 2));
    variables.insert("layer/bias".into(), ramp(&[dim("out", 2)], 3));
    let mut seen = vec![];
    for step in 0..steps {
        let f = p.function("train").unwrap();
        let out = reference::run(&p, f, &Values::new(), &mut variables, 1, step);
        seen.push((variables[&Name::from("layer/w")].clone(), variables[&Name::from("layer/bias")].clone(), out));
    }
    (seen, variables)
}

/// Holds the run against `rule(step, w, gradient, state of the element)`, which returns the new element.
fn assert_follows(optimizer: &Optimizer, rule: impl Fn(u32, f64, f64, &mut [f64; 2]) -> f64) {
    let d = [dim("in", 3), dim("out", 2)];
    let (mut w, target) = (ramp(&d, 1), ramp(&d, 2));
    let mut state = vec![[0.0; 2]; w.len()];
    for (step, (seen, _, _)) in train(optimizer, &d, 5).0.iter().enumerate() {
        w.iter_mut().zip(&target).zip(&mut state).for_each(|((w, t), s)| *w = rule(step as u32, *w, *w - t, s));
        for (a, b) in seen.iter().zip(&w) {
            assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "step {step}: {a} and not {b}");
        }
    }
}

#[test]
fn gradient_descent_goes_against_the_gradient() {
    assert_follows(&Optimizer::sgd(0.1), |_, w, g, _| w - 0.1 * g);
    assert_follows(&Optimizer::momentum(0.1, 0.9), |_, w, g, s| {
        s[0] = 0.9 * s[0] + g;
        w - 0.1 * s[0]
    });
    let nesterov = Optimizer { rule: Rule::Sgd(Sgd { momentum: 0.9, nesterov: true }), ..Optimizer::sgd(0.1) };
    assert_follows(&nesterov, |_, w, g, s| {
        s[0] = 0.9 * s[0] + g;
        w - 0.1 * (0.9 * s[0] + g)
    });
}

/// The update of Adam with its usual constants.
fn adam(step: u32, g: f64, s: &mut [f64; 2], eps: f64) -> f64 {
    let t = step as i32 + 1;
    s[0] = 0.9 * s[0] + 0.1 * g;
    s[1] = 0.999 * s[1] + 0.001 * g * g;
    s[0] / (1.0 - 0.9_f64.powi(t)) / ((s[1] / (1.0 - 0.999_f64.powi(t))).sqrt() + eps)
}

#[test]
fn adam_corrects_its_means_for_their_start() {
    assert_follows(&Optimizer::adam(0.01), |t, w, g, s| w - 0.01 * adam(t, g, s, 1e-8));
}

#[test]
fn adamw_decays_apart_from_the_gradient_and_leaves_biases_alone() {
    let optimizer = Optimizer::adamw(0.01, 0.3);
    assert_follows(&optimizer, |t, w, g, s| w - 0.01 * (adam(t, g, s, 1e-8) + 0.3 * w));
    let d = [dim("in", 3), dim("out", 2)];
    let (decayed, plain) = (train(&optimizer, &d, 3).0, train(&Optimizer::adam(0.01), &d, 3).0);
    assert_eq!(decayed[2].1, plain[2].1);
    let all = train(&Optimizer { decays: |_| true, ..optimizer }, &d, 3).0;
    assert_ne!(all[2].1, plain[2].1);
}

#[test]
fn lamb_moves_each_variable_in_proportion_to_its_norm() {
    let d = [dim("in", 3), dim("out", 2)];
    let seen = train(&Optimizer::lamb(0.01, 0.0), &d, 1).0;
    let start = ramp(&d, 1);
    let norm = |a: &Reference| a.iter().map(|v| v * v).sum::<f64>().sqrt();
    assert!((norm(&(&seen[0].0 - &start)) - 0.01 * norm(&start)).abs() < 1e-8);
}

#[test]
fn slots_lie_beside_their_variable_wherever_the_optimizer_is_applied() {
    let (_, variables) = train(&Optimizer::adam(0.01), &[dim("in", 3)], 1);
    let names: Vec<&str> = variables.keys().map(|n| &**n).collect();
    let expected = [
        "layer/bias",
        "layer/bias/adam.m",
        "layer/bias/adam.v",
        "layer/target",
        "layer/w",
        "layer/w/adam.m",
        "layer/w/adam.v",
    ];
    assert_eq!(names, expected);
}

#[test]
fn the_norm_of_the_gradient_is_that_of_all_gradients_together() {
    let d = [dim("in", 3), dim("out", 2)];
    let (seen, _) = train(&Optimizer::sgd(0.1), &d, 1);
    let of_w: f64 = (ramp(&d, 1) - ramp(&d, 2)).iter().map(|v| v * v).sum();
    assert!((seen[0].2[&Name::from("norm")].sum() - (of_w + 2.0 * 9.0).sqrt()).abs() < 1e-9);
    assert!((seen[0].2[&Name::from("rate")].sum() - 0.1).abs() < 1e-8);
}

#[test]
fn clipping_scales_all_gradients_by_one_factor_and_leaves_small_ones_alone() {
    let d = [dim("in", 3), dim("out", 2)];
    let (seen, _) = train(&Optimizer::sgd(0.1).clipped(0.5), &d, 1);
    let norm = seen[0].2[&Name::from("norm")].sum();
    assert!(norm > 4.0, "the norm shown is that before clipping");
    let expected = ramp(&d, 1) - (ramp(&d, 1) - ramp(&d, 2)) * (0.1 * 0.5 / norm);
    assert!((&seen[0].0 - &expected).iter().all(|e| e.abs() < 1e-8));
    assert!((&seen[0].1 - &(ramp(&[dim("out", 2)], 3) - 0.1 * 3.0 * 0.5 / norm)).iter().all(|e| e.abs() < 1e-8));
    assert_follows(&Optimizer::sgd(0.1).clipped(100.0), |_, w, g, _| w - 0.1 * g);
}

#[test]
fn without_clipping_no_update_depends_on_another_variables_gradient() {
    let p = program(&Optimizer::adamw(0.1, 0.1), &[dim("in", 3)]);
    let f = p.function("train").unwrap();
    let w = p.variable("layer/w").unwrap();
    let (_, assign) = f.assigns.iter().find(|(v, _)| *v == w).unwrap();
    let (mut open, mut reads) = (vec![*assign], vec![]);
    while let Some(id) = open.pop() {
        if let mesh::ops::Prim::Read(r) = &f.node(id).op {
            reads.push(&*p.variables[r.var.index()].name);
        }
        open.extend(&f.node(id).inputs);
    }
    assert!(reads.contains(&"layer/w") && !reads.iter().any(|n| n.contains("bias")), "{reads:?}");
}

#[test]
fn a_scaled_loss_trains_as_the_loss_itself() {
    assert_follows(&Optimizer::sgd(0.1).scaled(), |_, w, g, _| w - 0.1 * g);
    assert_follows(&Optimizer::adam(0.01).scaled(), |t, w, g, s| w - 0.01 * adam(t, g, s, 1e-8));
    let d = [dim("in", 3), dim("out", 2)];
    let clipped = Optimizer::momentum(0.1, 0.9).clipped(0.5);
    let (plain, scaled) = (train(&clipped, &d, 3).0, train(&clipped.clone().scaled(), &d, 3).0);
    for ((w, bias, out), (w_scaled, bias_scaled, out_scaled)) in plain.iter().zip(&scaled) {
        assert_eq!((w, bias), (w_scaled, bias_scaled), "a power of two changes no bit");
        assert_eq!(out[&Name::from("norm")], out_scaled[&Name::from("norm")]);
    }
}

#[test]
fn a_step_whose_gradient_is_not_finite_changes_nothing_but_the_scale() {
    let d = [dim("in", 3), dim("out", 2)];
    let scale = LossScale { start: 4.0, most: 8.0, doubled_after: 2 };
    let optimizers = [
        Optimizer::adam(0.01).clipped(1.0),
        Optimizer::momentum(0.1, 0.9),
        Optimizer { rule: Rule::Adafactor(Adafactor { momentum: 0.9, ..Adafactor::default() }), ..Optimizer::sgd(0.1) },
    ];
    for optimizer in optimizers {
        let p = program(&Optimizer { loss_scale: Some(scale), ..optimizer.clone() }, &d);
        let mut variables = reference::init(&p, 1);
        variables.insert("layer/w".into(), ramp(&d, 1));
        let states = ["loss_scale", "loss_scale/good_steps", "loss_scale/skipped_steps"];
        // What one gradient of w is in a step, and what the states are after it.
        let steps = [
            (1.0, [4.0, 1.0, 0.0]),
            (f64::INFINITY, [2.0, 0.0, 1.0]),
            (f64::NAN, [1.0, 0.0, 2.0]),
            (f64::NEG_INFINITY, [1.0, 0.0, 3.0]),
            (1.0, [1.0, 1.0, 3.0]),
            (1.0, [2.0, 0.0, 3.0]),
            (1.0, [2.0, 1.0, 3.0]),
            (1.0, [4.0, 0.0, 3.0]),
            (1.0, [4.0, 1.0, 3.0]),
            (1.0, [8.0, 0.0, 3.0]),
            (1.0, [8.0, 1.0, 3.0]),
            (1.0, [8.0, 0.0, 3.0]),
        ];
        let mut updates = vec![];
        for (step, (gradient, after)) in steps.into_iter().enumerate() {
            let mut target = &variables[&Name::from("layer/w")] - 1.0;
            target[[1, 0]] += 1.0 - gradient;
            variables.insert("layer/target".into(), target);
            let before = variables.clone();
            let out = reference::run(&p, p.function("train").unwrap(), &Values::new(), &mut variables, 1, step as u32);
            let states = states.map(|n| variables[&Name::from(n)].sum());
            assert_eq!(states, after, "after step {step}");
            let norm = out[&Name::from("norm")].sum();
            let kept = |name: &Name| before[name] == variables[name];
            let moved = |name: &&Name| !kept(name) && !name.starts_with("loss_scale") && **name != *"layer/target";
            match gradient.is_finite() {
                true => updates.push(&variables[&Name::from("layer/w")] - &before[&Name::from("layer/w")]),
                false => assert_eq!((norm, before.keys().find(moved)), (f64::INFINITY, None), "step {step}"),
            }
            assert!(!gradient.is_finite() || norm.is_finite() && moved(&&"layer/w".into()), "step {step}");
        }
        // Steps that were skipped do not count: the mean of Adam is as young as its updates are few.
        let plain = train_on_ones(&optimizer, &d, updates.len() as u32);
        if matches!(optimizer.rule, Rule::Adam(_)) {
            for (a, b) in updates.iter().zip(plain) {
                assert!((a - &b).iter().all(|e| e.abs() < 1e-9), "{a} and {b}");
            }
        }
    }
}

/// The updates of `w` when all its gradients are 1.
fn train_on_ones(optimizer: &Optimizer, d: &[Dim], steps: u32) -> Vec<Reference> {
    let p = program(optimizer, d);
    let mut variables = reference::init(&p, 1);
    variables.insert("layer/w".into(), ramp(d, 1));
    let step = |step| {
        let before = variables[&Name::from("layer/w")].clone();
        variables.insert("layer/target".into(), &before - 1.0);
        reference::run(&p, p.function("train").unwrap(), &Values::new(), &mut variables, 1, step);
        &variables[&Name::from("layer/w")] - &before
    };
    (0..steps).map(step).collect()
}

#[test]
fn a_scaled_step_in_parts_is_skipped_if_any_part_is_not_finite() {
    let d = [dim("in", 3)];
    let optimizer = Optimizer::adam(0.1).scaled();
    let mut p = ProgramBuilder::new();
    let variables = p
        .function("accumulate", |g| {
            let w = g.variable("w", &d, Init::ones());
            let x = g.input("x", mesh::dim::DType::F32, &d);
            optimizer.accumulate(g, &w.mul(&x).sum_all(), 2)
        })
        .unwrap();
    p.function("update", |g| optimizer.apply_accumulated(g, &variables).output(g)).unwrap();
    let p = p.finish().unwrap();
    let mut variables = reference::init(&p, 1);
    let mut run = |name: &str, step, x: [f64; 3]| {
        let feeds = [("x".into(), ndarray::arr1(&x).into_dyn())].into_iter().collect();
        let out = reference::run(&p, p.function(name).unwrap(), &feeds, &mut variables, 1, step);
        (out, ["w", "w/gradient", "loss_scale"].map(|n| variables[&Name::from(n)].clone()))
    };
    let ones = ndarray::arr1(&[1.0; 3]).into_dyn();
    run("accumulate", 0, [1.0, f64::INFINITY, 0.0]);
    run("accumulate", 1, [2.0, f64::NEG_INFINITY, 0.0]);
    let (out, [w, gradient, scale]) = run("update", 0, [0.0; 3]);
    assert_eq!((w, gradient.sum(), scale.sum()), (ones.clone(), 0.0, 32_768.0));
    let shown = |out: &Values| ["loss_scale", "skipped_steps"].map(|n| out[&Name::from(n)].sum());
    assert_eq!(shown(&out), [65_536.0, 1.0]);
    run("accumulate", 2, [1.0, 4.0, 0.0]);
    let (_, [_, gradient, _]) = run("accumulate", 3, [3.0, 2.0, 0.0]);
    assert_eq!(gradient, ndarray::arr1(&[2.0, 3.0, 0.0]).into_dyn(), "the mean, not scaled");
    let (out, [w, gradient, _]) = run("update", 1, [0.0; 3]);
    assert!(w[[0]] < 1.0 && w[[1]] < 1.0 && w[[2]] == 1.0 && gradient.sum() == 0.0);
    assert_eq!((out[&Name::from("grad_norm")].sum(), shown(&out)), (13f64.sqrt(), [32_768.0, 1.0]));
}

fn rms(a: &Reference) -> f64 {
    (a.iter().map(|v| v * v).sum::<f64>() / a.len() as f64).sqrt()
}

/// Adafactor as the paper's algorithm 4 (factored over the last two axes) and 5 (not factored) say it.
fn adafactor(d: &[Dim], factored: bool, momentum: f64, steps: u32, rate: f64) -> Vec<Reference> {
    let (mut w, target) = (ramp(d, 1), ramp(d, 2));
    let (last, before) = (Axis(d.len() - 1), Axis(d.len().saturating_sub(2)));
    let (mut row, mut column, mut v) = (None::<Reference>, None::<Reference>, None::<Reference>);
    let mut m = w.mapv(|_| 0.0);
    let mut seen = vec![];
    for t in 1..=steps {
        let g = &w - &target;
        let square = g.mapv(|g| g * g + 1e-30);
        let beta = 1.0 - f64::from(t).powf(-0.8);
        let follow = |old: &mut Option<Reference>, now: Reference| {
            let next = match old.take() {
                Some(old) => old * beta + now * (1.0 - beta),
                None => now,
            };
            old.replace(next.clone());
            next
        };
        let v = if factored {
            let row = follow(&mut row, square.mean_axis(last).unwrap());
            let column = follow(&mut column, square.mean_axis(before).unwrap());
            let mean = row.mean_axis(Axis(d.len() - 2)).unwrap().insert_axis(Axis(d.len() - 2));
            (&row / &mean).insert_axis(last) * column.insert_axis(before)
        } else {
            follow(&mut v, square)
        };
        let u = g / v.mapv(f64::sqrt);
        let u = &u / rms(&u).max(1.0) * rms(&w).max(1e-3);
        m = m * momentum + u * (1.0 - momentum);
        w = w - &m * rate;
        seen.push(w.clone());
    }
    seen
}

#[test]
fn adafactor_is_the_algorithm_of_the_paper() {
    let rule = Adafactor { factored_from: 4, ..Adafactor::default() };
    let with = |rule| Optimizer { rule: Rule::Adafactor(rule), ..Optimizer::adafactor(0.05) };
    let cases = [
        (vec![dim("a", 6), dim("b", 5)], true, 0.0),
        (vec![dim("k", 2), dim("a", 4), dim("b", 5)], true, 0.0),
        (vec![dim("a", 6), dim("b", 3)], false, 0.0),
        (vec![dim("a", 6)], false, 0.0),
        (vec![dim("a", 6), dim("b", 5)], true, 0.9),
    ];
    for (d, factored, momentum) in cases {
        let (seen, variables) = train(&with(Adafactor { momentum: momentum as f32, ..rule }), &d, 4);
        for (step, (a, b)) in seen.iter().zip(adafactor(&d, factored, momentum, 4, 0.05)).enumerate() {
            let worst = (&a.0 - &b).iter().fold(0.0_f64, |w, e| w.max(e.abs()));
            assert!(worst < 1e-6, "{d:?} step {step}: off by {worst}");
        }
        assert_eq!(variables.contains_key(&Name::from("layer/w/adafactor.v")), !factored);
        assert_eq!(variables.contains_key(&Name::from("layer/w/adafactor.m")), momentum > 0.0);
    }
}

#[test]
fn adafactor_keeps_a_row_and_a_column_of_the_two_largest_dimensions() {
    let d = [dim("in", 130), dim("k", 3), dim("out", 128)];
    let (_, variables) = train(&Optimizer::adafactor(0.05), &d, 1);
    assert_eq!(variables[&Name::from("layer/w/adafactor.row")].shape(), [130, 3]);
    assert_eq!(variables[&Name::from("layer/w/adafactor.column")].shape(), [3, 128]);
}

/// The schedule's rate at a step.
fn rate(schedule: &Schedule, step: u32) -> f64 {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| g.output("rate", &schedule.rate(g))).unwrap();
    let p = p.finish().unwrap();
    let f = p.function("f").unwrap();
    reference::run(&p, f, &Values::new(), &mut Values::new(), 1, step)[&Name::from("rate")].sum()
}

#[test]
fn schedules_have_their_rates_at_their_steps() {
    let decay = Schedule::StepDecay { start: 0.003, factor: 0.3, every: 20_000 };
    let linear = Schedule::Polynomial { start: 1.0, end: 0.0, power: 1.0, steps: 100 };
    let cubic = Schedule::Polynomial { start: 1.0, end: 0.5, power: 3.0, steps: 100 };
    let cosine = Schedule::Cosine { start: 1.0, end: 0.2, steps: 100 };
    let relative = Schedule::InverseSqrt { most: 0.01 };
    let warm = linear.clone().warmup(10);
    let cases = [
        (&Schedule::from(0.5), 7, 0.5),
        (&decay, 0, 0.003),
        (&decay, 19_999, 0.003),
        (&decay, 20_000, 0.0009),
        (&decay, 60_001, 0.003 * 0.027),
        (&linear, 0, 1.0),
        (&linear, 25, 0.75),
        (&linear, 500, 0.0),
        (&cubic, 50, 0.5 + 0.5 * 0.125),
        (&cubic, 100, 0.5),
        (&cosine, 0, 1.0),
        (&cosine, 50, 0.6),
        (&cosine, 75, 0.6 - 0.4 * std::f64::consts::FRAC_1_SQRT_2),
        (&cosine, 1000, 0.2),
        (&relative, 0, 0.01),
        (&relative, 39_999, 0.005),
        (&warm, 0, 0.1),
        (&warm, 4, 0.5 * 0.96),
        (&warm, 9, 0.91),
        (&warm, 50, 0.5),
    ];
    for (schedule, step, expected) in cases {
        let found = rate(schedule, step);
        assert!((found - expected).abs() < 1e-6 * (1e-3 + expected), "{schedule:?} at {step}: {found}, not {expected}");
    }
}

#[test]
fn constants_that_are_not_the_usual_ones_count() {
    let rule = Rule::Adam(Adam { eps: 0.5, ..Adam::default() });
    assert_follows(&Optimizer { rule, ..Optimizer::adam(0.01) }, |t, w, g, s| w - 0.01 * adam(t, g, s, 0.5));
}
