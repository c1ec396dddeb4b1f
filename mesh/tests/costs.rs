//! What the steps of a plan take: the operations and bytes that a profile divides by time.

use mesh::dim::{DType, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Dense, Kernel};
use mesh::ops::conv::{Conv, ConvTranspose};
use mesh::ops::window::Window;
use mesh::plan::{Backend, DevicePlan, OpWork, PlanOptions, ProgramPlan, Step, Work, plan_program};
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

fn program(build: impl Fn(&Graph, &Tensor)) -> Program {
    let mut p = ProgramBuilder::new();
    let dims = [dim("batch", 4), dim("x", 16), dim("y", 12), dim("channel", 3)];
    p.function("f", |g| build(g, &g.input("image", DType::F32, &dims))).unwrap();
    p.finish().unwrap()
}

fn planned(program: &Program, mesh: &str, layout: &str) -> ProgramPlan {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    plan_program(program, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap()
}

/// The steps of `f` that are of a class, by device.
fn steps<'a>(plan: &'a ProgramPlan, class: &'a str) -> Vec<Vec<&'a Step>> {
    let of = |d: &'a DevicePlan| d.steps.iter().filter(|s| s.class() == class).collect();
    plan.functions[&Name::from("f")].iter().map(of).collect()
}

#[test]
fn the_products_of_all_devices_are_those_of_the_function() {
    let program = program(|g, x| {
        let kernel = Kernel::new(&["x", "y"], 3);
        let y = nn::conv(x, "first", &kernel, &dim("channel", 7)).relu();
        let y = nn::conv(&y, "second", &kernel.stride(2), &dim("channel", 8)).relu();
        let loss = nn::dense(&y, "out", &["channel"], &[dim("class", 5)], &Dense::default()).mean_all();
        g.gradients(&loss, &[x]).iter().for_each(|d| g.output("dx", d));
    });
    let products = ["conv", "conv_transpose", "conv_weight_grad", "contract"];
    let expected = program.functions[&Name::from("f")].product_flops() as f64;
    for (mesh, layout) in [("1", ""), ("x=2", "x:x"), ("x=3", "x:x"), ("data=2,y=2", "batch:data,y:y")] {
        let plan = planned(&program, mesh, layout);
        // Without what their epilogues do, which counts as well.
        let alone = |s: &Step| match &s.work {
            Work::Op(op) => {
                Step { work: Work::Op(Box::new(OpWork { epilogue: None, ..(**op).clone() })), ..s.clone() }.cost().flops
            }
            _ => 0.0,
        };
        let of = products.iter().flat_map(|c| steps(&plan, c).concat());
        let (all, with): (Vec<f64>, Vec<f64>) = of.map(|s| (alone(s), s.cost().flops)).unzip();
        let (all, with) = (all.iter().sum::<f64>(), with.iter().sum::<f64>());
        assert!(with > all, "{mesh}: biases are added where products are made");
        assert!((all - expected).abs() < 1e-9 * expected, "{mesh}: {all} and {expected}");
    }
}

/// Sixteen products for four outputs, where their windows have 36: forward, and backward where leaves have patches enough.
#[test]
fn windows_of_three_by_three_take_four_ninths_of_their_products() {
    let backward = ["conv", "conv_transpose"];
    let all = ["conv", "conv_transpose", "conv_weight_grad"];
    for (channels, dtype, chunks, minimal) in [
        (8, DType::F32, 2, &all[..]),
        (8, DType::F32, 8, &backward),
        (7, DType::F32, 2, &[]),
        (8, DType::F16, 2, &all[..]),
        (8, DType::Bf16, 2, &[]),
    ] {
        let program = program(|g, _| {
            let dims = |channel: &str| [dim("batch", 4), dim("x", 16), dim("y", 12), dim(channel, channels)];
            let filter = [dim("k.x", 3), dim("k.y", 3), dim("i", channels), dim("o", channels)];
            let [x, dy] = [("x", "i"), ("dy", "o")].map(|(n, c)| g.input(n, DType::F32, &dims(c)).cast(dtype));
            let filter = g.input("filter", DType::F32, &filter).cast(dtype);
            let windows = vec![Window::same("x", 16, 3, 1, 1), Window::same("y", 12, 3, 1, 1)];
            let conv = Conv { windows, input: "i".into(), output: "o".into(), groups: 1 };
            g.output("y", &x.conv(&filter, &conv));
            g.output("dx", &dy.conv_transpose(&filter, &ConvTranspose { conv: conv.clone(), sizes: vec![16, 12] }));
            g.output("dw", &x.conv_weight_grad(&dy, &conv));
        });
        let plan = planned(&program.in_chunks(chunks), "1", "");
        for class in all {
            let [step] = steps(&plan, class)[0][..] else { panic!("one {class}") };
            let found = step.cost().flops / (2 * 9 * 4 * 16 * 12 * channels * channels) as f64;
            let expected = if minimal.contains(&class) { 4.0 / 9.0 } else { 1.0 };
            assert!((found - expected).abs() < 1e-9, "{class} of {channels} channels of {dtype}: {found}");
        }
    }
}

#[test]
fn a_map_reads_each_operand_once_and_writes_its_results() {
    let program = program(|g, x| {
        let shift = g.input("shift", DType::F32, &[dim("channel", 3)]);
        g.output("y", &x.add(&shift).tanh());
    });
    let plan = planned(&program, "1", "");
    let [map] = steps(&plan, "map")[0][..] else { panic!("one map") };
    let n = 4 * 16 * 12 * 3;
    assert_eq!((map.cost().flops, map.cost().bytes), (2.0 * n as f64, f64::from(4 * (n + 3 + n))));
}

#[test]
fn exchanges_and_all_reduces_compute_little_and_move_what_they_receive() {
    let program = program(|g, x| {
        let y = nn::conv(x, "c", &Kernel::new(&["x"], 3), &dim("channel", 4));
        g.output("y", &y);
        g.output("sum", &y.sum(&["batch", "x", "y"]));
    });
    let plan = planned(&program, "x=2", "x:x");
    for (device, halos) in steps(&plan, "halo").iter().enumerate() {
        // Half of x and one line more.
        let [halo] = halos[..] else { panic!("device {device} has one halo") };
        assert_eq!((halo.cost().flops, halo.cost().bytes), (0.0, f64::from(2 * 4 * 4 * 9 * 12 * 3)));
    }
    for sums in steps(&plan, "all-reduce") {
        let [sum] = sums[..] else { panic!("one all-reduce") };
        // Of 4 channels. The tree halves the batch first, and then y in turns with x: each device holds 4 x 2 of its nodes.
        assert_eq!((sum.cost().flops, sum.cost().bytes), (f64::from(15 * 4), f64::from(17 * 4 * 4)));
    }
}
