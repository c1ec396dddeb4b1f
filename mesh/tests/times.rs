//! How long a plan takes on a machine: closed forms, of rates that are easy to reckon with.

#[path = "common/machine.rs"]
mod machine;

use machine::{SIMPLE, simple};
use mesh::dim::{DType, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::machine::{Link, Machine};
use mesh::nn::{self, Dense};
use mesh::optim::Optimizer;
use mesh::plan::time::{Estimate, estimate};
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};

/// A backend without scratch.
struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

fn program(dtype: DType, build: impl Fn(&Graph, &Tensor)) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| build(g, &g.input("x", DType::F32, &[dim("row", 16), dim("in", 8)]).cast(dtype))).unwrap();
    p.finish().unwrap()
}

fn timed(program: &Program, mesh: &str, layout: &str, machine: &Machine) -> (ProgramPlan, Estimate) {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let plan = plan_program(program, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
    let time = estimate(&plan, "f", machine).unwrap();
    (plan, time)
}

fn product(dtype: DType) -> Program {
    program(dtype, |g, x| {
        let w = g.variable("w", &[dim("in", 8), dim("out", 4)], mesh::program::Init::ones()).cast(dtype);
        g.output("y", &x.contract_wide(&w, &["in"]));
    })
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

#[test]
fn a_product_takes_its_launch_and_its_flops_by_dtype() {
    let flops = 2.0 * 16.0 * 8.0 * 4.0;
    for (dtype, rate) in [(DType::F32, 1.0), (DType::Bf16, 2.0), (DType::F16, 1.0)] {
        let (_, time) = timed(&product(dtype), "1", "", &simple());
        assert!(near(time.seconds, 3.0 + flops / rate), "{dtype}: {time:?}");
        assert!(near(time.classes[&Name::from("contract")], time.seconds));
        let text = SIMPLE.replace("flops_bf16 = 2.0", "flops_bf16 = 2.0\nflops_f16 = 4.0");
        let (_, time) = timed(&product(dtype), "1", "", &Machine::from_toml(&text).unwrap());
        let rate = if dtype == DType::F16 { 4.0 } else { rate };
        assert!(near(time.seconds, 3.0 + flops / rate), "{dtype}: {time:?}");
    }
}

#[test]
fn a_tile_computes_all_of_its_columns_and_begins_each_sum() {
    let (out, sums) = (16.0 * 4.0, 8.0);
    let wide = Machine { columns: 16, ..simple() };
    let (_, time) = timed(&product(DType::F32), "1", "", &wide);
    assert!(near(time.seconds, 3.0 + 2.0 * out * sums * 4.0), "{time:?}");
    let slow = Machine { depth: 5, ..simple() };
    let (_, time) = timed(&product(DType::F32), "1", "", &slow);
    // Each of the 8 chunks of the sum is one element.
    assert!(near(time.seconds, 3.0 + 2.0 * out * (sums + 8.0 * 5.0)), "{time:?}");
}

#[test]
fn devices_share_the_work_or_the_machine() {
    let flops = 2.0 * 16.0 * 8.0 * 4.0;
    let program = product(DType::F32);
    let (_, time) = timed(&program, "d=2", "row:d", &simple());
    assert!(near(time.seconds, 3.0 + flops / 2.0) && near(time.share, 1.0), "{time:?}");
    // Two devices where there is one: each has half of it.
    let (_, time) = timed(&program, "d=2", "row:d", &Machine { devices: 1, hosts: Some(1), ..simple() });
    assert!(near(time.seconds, 3.0 + flops) && near(time.share, 2.0), "{time:?}");
}

#[test]
fn who_has_less_to_do_waits_for_who_has_more() {
    // 8 chunks of 2 rows over 3 devices are 3 + 3 + 2.
    let program = program(DType::F32, |g, x| {
        let w = g.variable("w", &[dim("in", 8), dim("out", 4)], mesh::program::Init::ones());
        g.output("y", &x.contract_wide(&w, &["in"]).sum(&["row"]));
    });
    let (_, time) = timed(&program, "d=3", "row:d", &Machine { devices: 3, ..simple() });
    let product = |rows: f64| 3.0 + 2.0 * rows * 8.0 * 4.0;
    let computing: Vec<f64> = time.devices.iter().map(|d| d.computing).collect();
    assert!(computing.iter().zip([6.0, 6.0, 4.0]).all(|(c, rows)| near(*c, product(rows))), "{time:?}");
    assert!(near(time.devices[2].waiting, product(6.0) - product(4.0)), "{time:?}");
    assert!(time.devices[..2].iter().all(|d| d.waiting == 0.0), "{time:?}");
}

#[test]
fn what_crosses_hosts_goes_by_the_slower_link() {
    let gather = program(DType::F32, |g, x| {
        let own = x.clone().with_layout("row:d");
        g.output("y", &own.add(&own).with_layout(""));
    });
    let bytes = 4.0 * 16.0 * 8.0 / 2.0;
    let (plan, time) = timed(&gather, "d=2", "row:d", &simple());
    assert!(plan.functions[&Name::from("f")][0].steps.iter().any(|s| s.class() == "all-gather"), "{time:?}");
    assert!(near(time.seconds, 1.0 + bytes / 0.1), "{time:?}");
    assert!(
        near(time.axes[&Name::from("d")].bytes, 2.0 * bytes) && near(time.devices[0].moving, time.seconds),
        "{time:?}"
    );
    let (_, time) = timed(&gather, "d=2", "row:d", &Machine { devices: 1, ..simple() });
    assert!(near(time.seconds, 50.0 + bytes / 0.001), "{time:?}");
}

#[test]
fn an_all_reduce_sends_parts_and_results() {
    let sum = program(DType::F32, |g, x| g.output("y", &x.sum(&["row"])));
    let (plan, time) = timed(&sum, "d=2", "row:d", &simple());
    let sent: usize = plan.functions[&Name::from("f")]
        .iter()
        .flat_map(|d| &d.steps)
        .filter_map(|s| if let Work::AllReduce(a) = &s.work { Some(a.sent_bytes()) } else { None })
        .sum();
    assert!(sent > 0 && near(time.axes[&Name::from("d")].bytes, sent as f64), "{time:?}");
    let each = sent as f64 / 2.0;
    assert!(near(time.seconds, 1.0 + each / 0.1), "{time:?}");
}

#[test]
fn a_function_that_is_not_there_has_no_time() {
    let (plan, _) = timed(&product(DType::F32), "1", "", &simple());
    assert!(estimate(&plan, "g", &simple()).is_none());
}

/// Four stages that go through a batch in parts, without anything that they share.
fn stages(parts: usize, width: usize) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let x = g.scoped("layer.0", || g.input("x", DType::F32, &[dim("batch", 512), dim("in", width)]));
        let of = |part: usize| {
            let x = g.scoped("layer.0", || x.micro_batch("batch", part, parts));
            let layer = |x: Tensor, i: usize| {
                let (from, to) = (if i == 0 { "in".into() } else { format!("h{i}") }, format!("h{}", i + 1));
                let y = nn::dense(&x, &format!("layer.{i}"), &[&from], &[dim(to.as_str(), width)], &Dense::default());
                g.scoped(format!("layer.{i}"), || y.tanh())
            };
            let y = (0..4).fold(x, layer);
            g.scoped("layer.3", || y.square().mean_all())
        };
        let (loss, _) = Optimizer::sgd(0.1).apply_in_parts(g, parts, of);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

const STAGES: &str =
    "@pipe:3, layer.0/**{ @pipe:0 }, layer.1/**{ @pipe:1 }, layer.2/**{ @pipe:2 }, layer.3/**{ @pipe:3 }";

/// What a pipeline of four stages takes in slots: one pass of a micro-batch through a stage, forward and back, is what all do
/// together by parts and stages. The first layer has no gradient of its input, so the stages are not quite alike.
fn slots(parts: usize, width: usize, schedule: &str) -> f64 {
    let mut machine = simple();
    machine.rates.values_mut().for_each(|r| r.launch = 0.0);
    (machine.within, machine.between) = (Link { latency: 0.0, bytes: 1e30 }, Link { latency: 0.0, bytes: 1e30 });
    let p = stages(parts, width);
    let machine = Machine { devices: 4, hosts: Some(1), ..machine };
    let whole = timed(&p, "1", "", &machine).1.seconds;
    let (_, time) = timed(&p, "pipe=4", &format!("{STAGES}, schedule:{schedule}"), &machine);
    time.seconds / (whole / 4.0 / parts as f64)
}

#[test]
fn stages_work_side_by_side_and_wait_as_long_as_the_papers_say() {
    let (count, parts) = (4.0, 8);
    for schedule in ["gpipe", "1f1b"] {
        let slots = slots(parts, 64, schedule);
        assert!(slots < parts as f64 + count - 1.0 + 0.9, "{schedule}: {slots}");
        assert!(slots > parts as f64, "{schedule}: {slots}");
    }
}

/// Of a pass forward and back a third is for gradients of weights, which nobody waits for: it goes into the other two. Layers
/// are wide, since products are all that takes time here.
#[test]
fn stages_wait_a_third_as_long_if_gradients_of_weights_are_apart() {
    let (count, parts) = (4.0, 8);
    let slots = slots(parts, 1024, "zero-bubble");
    assert!(slots < parts as f64 + (count - 1.0) / 3.0 + 0.9, "{slots}");
    assert!(slots > parts as f64, "{slots}");
}

#[test]
fn one_forward_one_backward_keeps_fewer_activations_than_gpipe() {
    let p = stages(8, 64);
    let peak =
        |schedule: &str| timed(&p, "pipe=4", &format!("{STAGES}, schedule:{schedule}"), &simple()).0.peak_bytes(2);
    // Those of 2 micro-batches against those of 8; each is the layer's input, and its result for the gradient of tanh.
    let activation = 512 / 8 * 64 * 4;
    assert!(peak("1f1b") + 5 * activation <= peak("gpipe"), "{} {}", peak("1f1b"), peak("gpipe"));
    // Each stage waits with gradients of weights for as many micro-batches as there are stages at the most.
    assert!(peak("zero-bubble") + 3 * activation <= peak("gpipe"), "{} {}", peak("zero-bubble"), peak("gpipe"));
}

#[test]
fn gradients_of_micro_batches_are_added_up_as_they_come() {
    let peak = |parts: usize| timed(&stages(parts, 64), "1", "", &simple()).0.peak_bytes(0);
    let weights = 64 * 64 * 4;
    // Twice as many micro-batches have half of the activations, and not a gradient more.
    assert!(peak(16) < peak(8) + weights, "{} {}", peak(8), peak(16));
}

/// Layers whose weights are most of what there is.
fn wide(optimizer: &Optimizer) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let x = g.input("x", DType::F32, &[dim("batch", 4), dim("h0", 256)]);
        let layer = |x: Tensor, i: usize| {
            let [from, to] = [i, i + 1].map(|i| format!("h{i}"));
            nn::dense(&x, &format!("layer.{i}"), &[&from], &[dim(to.as_str(), 256)], &Dense::default()).tanh()
        };
        let loss = (0..6).fold(x, layer).square().mean_all();
        optimizer.apply(g, &loss);
        g.output("loss", &loss);
    })
    .unwrap();
    p.finish().unwrap()
}

#[test]
fn a_gradient_goes_as_soon_as_its_variable_is_updated() {
    let weights = 256 * 256 * 4;
    // Beside weights and slots, in how many weights' place.
    let beside = |optimizer: Optimizer, slots: usize| {
        let peak = timed(&wide(&optimizer), "1", "", &simple()).0.peak_bytes(0);
        (peak / weights).saturating_sub(6 * (1 + slots))
    };
    assert_eq!((beside(Optimizer::sgd(0.1), 0), beside(Optimizer::adam(0.1), 2)), (0, 0));
    // A norm over all of them waits for the last.
    assert!(beside(Optimizer::adam(0.1).clipped(1.0), 2) >= 6);
}
