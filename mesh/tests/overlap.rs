//! Collectives that go on while other steps are done: which begin early and finish late, and what that takes.

#[path = "common/machine.rs"]
mod machine;
#[path = "common/models.rs"]
mod models;

use machine::simple;
use mesh::dim::{DType, Name, dim};
use mesh::graph::Graph;
use mesh::machine::Machine;
use mesh::nn::{self, Dense};
use mesh::optim::Optimizer;
use mesh::plan::time::{Estimate, estimate};
use mesh::plan::{Backend, Begun, DevicePlan, ExchangeKind, PlanOptions, ProgramPlan, Share, Step, Work, plan_program};
use mesh::program::{Init, Program, ProgramBuilder};
use models::{Bert, LARGE, bert, unet};
use std::collections::{BTreeMap, BTreeSet};

/// A backend whose products need some scratch.
struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, work: &Work) -> usize {
        match work {
            Work::Op(op) => op.output.region.elements(),
            _ => 0,
        }
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

fn planned(program: &Program, mesh: &str, layout: &str, waiting: bool) -> ProgramPlan {
    let options = PlanOptions { waiting, ..PlanOptions::default() };
    plan_program(program, &mesh.parse().unwrap(), &layout.parse().unwrap(), &options, &Plain)
        .unwrap_or_else(|e| panic!("{mesh} with {layout}: {e}"))
}

fn program(build: impl Fn(&Graph)) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| build(g)).unwrap();
    p.finish().unwrap()
}

/// What a device has under way, in the order in which it begins: first step, last step.
fn under_way(plan: &DevicePlan) -> Vec<(usize, usize)> {
    let (mut open, mut found): (BTreeMap<usize, usize>, Vec<(usize, usize)>) = Default::default();
    for (s, step) in plan.steps.iter().enumerate() {
        let Some(number) = step.work.under_way() else { continue };
        if step.work.begins() {
            assert!(open.insert(number, found.len()).is_none(), "{number} begins twice");
            found.push((s, s));
        }
        found[open[&number]].1 = s;
        if step.work.ends() {
            open.remove(&number);
        }
    }
    assert!(open.is_empty(), "what has begun ends");
    found
}

/// Layers whose gradients are clipped by their norm.
fn layers(optimizer: &Optimizer) -> Program {
    program(|g| {
        let d = dim("d", 256);
        let x = g.input("x", DType::F32, &[dim("batch", 512), d.clone()]);
        let layer =
            |x, i| nn::dense(&x, &format!("layer.{i}"), &["d"], std::slice::from_ref(&d), &Dense::default()).tanh();
        let loss = (0..6).fold(x, layer).square().mean_all();
        optimizer.apply(g, &loss);
        g.output("loss", &loss);
    })
}

const ZERO: &str = "batch:data, slots{ *:data }, gradients{ *:data }";
const SHARDED: &str = "batch:data, slots{ *:data }, gradients{ *:data }, variables{ *:data }";

/// Programs with meshes and layouts.
fn cases() -> Vec<(&'static str, Program, Vec<(&'static str, &'static str)>)> {
    let small = Bert { layers: 2, width: 256, heads: 4, batch: 64, ..LARGE };
    let clipped = Optimizer::adamw(0.1, 0.01).clipped(1.0);
    vec![
        ("layers", layers(&clipped), vec![("data=4", "batch:data"), ("data=4", ZERO), ("data=4", SHARDED)]),
        (
            "transformer",
            bert(small, &[]),
            vec![
                ("data=4", ZERO),
                ("data=2,model=2", "batch:data, heads:model, d_ff:model"),
                ("data=2", SHARDED),
                ("pipe=2", "@pipe:1, encoder/layer.0/**{ @pipe:0 }"),
            ],
        ),
        ("unet", unet(64, 8, 4, &[]), vec![("x=2,y=2", "x:x, y:y"), ("x=3", "x:x")]),
    ]
}

#[test]
fn no_device_takes_more_than_if_all_were_waiting() {
    let mut apart = 0;
    for (what, p, layouts) in cases() {
        for (mesh, layout) in layouts {
            let [plan, waiting] = [false, true].map(|waiting| planned(&p, mesh, layout, waiting));
            for d in 0..plan.mesh.size() {
                let of = |plan: &ProgramPlan| plan.peak_bytes(d);
                assert!(of(&plan) <= of(&waiting), "{what}, {d} on {mesh} with {layout}");
                assert!(under_way(&waiting.functions[&Name::from("train")][d]).is_empty());
            }
            let pieces = under_way(&plan.functions[&Name::from("train")][0]);
            apart += usize::from(!pieces.is_empty());
        }
    }
    assert!(apart >= 7, "{apart}");
}

#[test]
fn devices_begin_and_finish_what_they_do_together_at_the_same_steps() {
    for (what, p, layouts) in cases() {
        for (mesh, layout) in layouts {
            let plan = planned(&p, mesh, layout, false);
            let devices = &plan.functions[&Name::from("train")];
            for (d, device) in devices.iter().enumerate() {
                for (s, step) in device.steps.iter().enumerate() {
                    let peers: Vec<usize> = match &step.work {
                        Work::Exchange(e) | Work::Finish(Begun::Exchange(e)) => {
                            e.sends.iter().chain(&e.recvs).map(|m| m.peer).collect()
                        }
                        Work::AllReduce(a) | Work::Combine(a) | Work::Finish(Begun::AllReduce(a)) => a.devices.to_vec(),
                        _ => continue,
                    };
                    for peer in peers {
                        let there = &devices[peer].steps[s].work;
                        let same = std::mem::discriminant(there) == std::mem::discriminant(&step.work)
                            && there.under_way() == step.work.under_way();
                        assert!(same, "{what} on {mesh} with {layout}: step {s} of {d} and {peer}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_gradient_is_summed_up_while_those_of_the_layers_before_are_computed() {
    let p = layers(&Optimizer::adam(0.1));
    let plan = planned(&p, "data=4", "batch:data", false);
    let steps = &plan.functions[&Name::from("train")][0].steps;
    let products = |(from, to): &(usize, usize)| {
        let between = &steps[*from + 1..*to];
        between.iter().filter(|s| matches!(&s.work, Work::Op(op) if op.op.is_product())).count()
    };
    let large: Vec<(usize, usize)> = under_way(&plan.functions[&Name::from("train")][0])
        .into_iter()
        .filter(|(s, _)| steps[*s].inputs[0].bytes > 1 << 16)
        .collect();
    // All but that of the first layer, which is the last one.
    assert!(large.iter().filter(|pair| products(pair) > 0).count() >= 5, "{large:?}");
}

#[test]
fn norms_of_all_variables_are_summed_up_at_once() {
    let small = Bert { layers: 2, width: 256, heads: 4, batch: 64, ..LARGE };
    let p = bert(small, &[]);
    let trained = p.variables.iter().filter(|v| v.trainable).count();
    let plan = planned(&p, "data=4", ZERO, false);
    let device = &plan.functions[&Name::from("train")][0];
    let scalar = |(s, _): &&(usize, usize)| matches!(&device.steps[*s].work, Work::AllReduce(a) if a.elements == 1);
    let pieces = under_way(device);
    let scalars: Vec<&(usize, usize)> = pieces.iter().filter(scalar).collect();
    let most = (0..device.steps.len()).map(|s| scalars.iter().filter(|(from, to)| *from <= s && s < *to).count()).max();
    assert!(most >= Some(trained * 9 / 10), "{most:?} of {trained}");
}

#[test]
fn weights_are_gathered_while_the_layer_before_is_computed() {
    let small = Bert { layers: 2, width: 256, heads: 4, batch: 64, ..LARGE };
    let plan = planned(&bert(small, &[]), "data=2", SHARDED, false);
    let device = &plan.functions[&Name::from("train")][0];
    let gathers: Vec<(usize, usize)> = under_way(device)
        .into_iter()
        .filter(|(s, _)| *device.steps[*s].label.op == *"all-gather" && device.steps[*s].outputs[0].bytes > 1 << 16)
        .collect();
    // Of a product, or a pass over as many bytes.
    let computes = |s: &Step, bytes: usize| match s.family() {
        "product" => true,
        family => family != "collective" && s.outputs.iter().map(|b| b.bytes).sum::<usize>() > bytes,
    };
    let ahead = |(from, to): &&(usize, usize)| {
        let bytes = device.steps[*from].outputs[0].bytes;
        device.steps[*from + 1..*to].iter().any(|s| computes(s, bytes))
    };
    assert!(gathers.iter().filter(ahead).count() >= 5, "{gathers:?}");
}

fn times(p: &Program, mesh: &str, layout: &str, machine: &Machine) -> [Estimate; 2] {
    [false, true].map(|waiting| estimate(&planned(p, mesh, layout, waiting), "train", machine).unwrap())
}

#[test]
fn an_estimate_counts_what_is_hidden_once() {
    let machine = Machine::named("h100").unwrap().0;
    for (what, p, layouts) in cases() {
        for (mesh, layout) in layouts.into_iter().filter(|(mesh, _)| !mesh.starts_with("pipe")) {
            let [time, waiting] = times(&p, mesh, layout, &machine);
            assert!(time.seconds < waiting.seconds, "{what} on {mesh} with {layout}: {time:?} {waiting:?}");
            let [hidden, none] = [&time, &waiting].map(|t| t.mean().hidden);
            assert!(hidden > 0.0 && none == 0.0, "{what} on {mesh} with {layout}");
            // The same bytes, in the same time of the links.
            let sent = |t: &Estimate| t.axes.values().map(|a| a.bytes).sum::<f64>();
            assert_eq!(sent(&time), sent(&waiting), "{what} on {mesh} with {layout}");
        }
    }
}

/// A product beside a gather, of rates that are easy to reckon with: a second a FLOP, 10 a byte after a latency of 1.
#[test]
fn a_transfer_and_a_product_take_as_long_as_the_longer_of_them() {
    let mut machine = simple();
    machine.rates.values_mut().for_each(|r| r.launch = 0.0);
    for out in [2, 200] {
        let p = program(|g| {
            let x = g.input("x", DType::F32, &[dim("row", 16), dim("in", 8)]);
            let own = x.clone().with_layout("row:d");
            g.output("all", &own.add(&own).with_layout(""));
            let w = g.variable("w", &[dim("in", 8), dim("out", out)], Init::ones());
            g.output("y", &x.with_layout("row:d").contract(&w, &["in"]));
        });
        let [time, waiting] = times(&p, "d=2", "row:d", &machine);
        let (gather, product) = (1.0 + 4.0 * 16.0 * 8.0 / 2.0 / 0.1, 2.0 * 8.0 * 8.0 * out as f64);
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b;
        assert!(near(waiting.seconds, gather + product), "{out}: {waiting:?}");
        assert!(near(time.seconds, gather.max(product)), "{out}: {time:?}");
        let hidden = time.devices[0].hidden;
        assert!(near(hidden, gather.min(product)), "{out}: {time:?}");
    }
}

#[test]
fn what_is_under_way_has_a_number_of_its_own() {
    for (_, p, layouts) in cases() {
        for (mesh, layout) in layouts {
            let plan = planned(&p, mesh, layout, false);
            for device in &plan.functions[&Name::from("train")] {
                let pieces = under_way(device);
                let numbers: BTreeSet<usize> = device.steps.iter().filter_map(|s| s.work.under_way()).collect();
                let most = (0..device.steps.len()).map(|s| pieces.iter().filter(|(a, b)| *a <= s && s <= *b).count());
                // As few as are under way at a time, on some device.
                assert!(numbers.last().is_none_or(|last| *last < pieces.len()), "{numbers:?}");
                assert!(numbers.len() <= most.max().unwrap_or(0), "{numbers:?}");
            }
        }
    }
}

#[test]
fn the_interior_of_a_convolution_is_computed_while_its_halo_is_on_its_way() {
    let p = unet(64, 8, 2, &[]);
    // Rows are not cut.
    let along_rows = planned(&p, "z=3", "z:z", false);
    let interior = |step: &Step| matches!(&step.work, Work::Op(op) if op.share != Share::Whole);
    assert!(!along_rows.functions.values().flatten().flat_map(|d| &d.steps).any(interior));
    for (mesh, layout, thinner) in [("x=3", "x:x", [1, 2, 1]), ("y=3", "y:y", [1, 2, 1])] {
        let plan = planned(&p, mesh, layout, false);
        for (device, thinner) in plan.functions[&Name::from("train")].iter().zip(thinner) {
            let mut found = 0;
            for (s, step) in device.steps.iter().enumerate() {
                let Work::Op(op) = &step.work else { continue };
                let Share::Interior(interior) = &op.share else { continue };
                let halos = under_way(device).into_iter().filter(|(begin, _)| {
                    matches!(&device.steps[*begin].work, Work::Exchange(e) if e.kind == ExchangeKind::Halo)
                });
                let rim = device.steps[s + 1..].iter().position(|later| match &later.work {
                    Work::Op(other) => other.share == Share::Rim(interior.clone()) && later.outputs == step.outputs,
                    _ => false,
                });
                let rim = s + 1 + rim.expect("its rim comes behind it");
                // Its halo begins before it, and ends behind it and before the rim.
                let beside = |(begin, end): (usize, usize)| {
                    begin < s && s < end && end < rim && device.steps[begin].outputs[0] == step.inputs[0]
                };
                assert_eq!(halos.filter(|span| beside(*span)).count(), 1, "step {s} on {mesh}");
                let ranges = op.output.region.0.iter().zip(&interior.0);
                let less: usize = ranges.map(|((_, all), (_, inside))| all.len() - inside.len()).sum();
                assert!((1..=thinner).contains(&less), "{less} of {thinner} on {mesh}");
                found += 1;
            }
            assert!(found >= 6, "{found} on {mesh}");
        }
    }
}
