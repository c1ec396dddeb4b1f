//! A training step of the 3-D UNet that medical frameworks use by default: 4 levels, two 3x3x3 convolutions with bias,
//! instance norm and ReLU a block, transposed convolutions up, soft dice, Adam. Prints one JSON line: seconds a step
//! (median), GFLOP/s, memory, and with `--profile` the seconds by kind of step.
//!
//! `cargo bench -p benches --bench unet -- --res 64 --base 16 --threads 2`

use clap::Parser;
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, Kernel};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use ndarray::{Array4, Array5};
use std::time::Instant;

const SPACE: [&str; 3] = ["x", "y", "z"];
const CLASSES: usize = 3;

#[derive(Parser)]
struct Args {
    /// Voxels a side.
    #[arg(long, default_value_t = 64)]
    res: usize,
    /// Filters at the first level.
    #[arg(long, default_value_t = 16)]
    base: usize,
    /// Mesh; axes are called as the dimensions they split.
    #[arg(long, default_value = "1")]
    mesh: String,
    /// Threads of each device; 0: the machine's cores shared out.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Steps measured, after one that is not.
    #[arg(long, default_value_t = 5)]
    steps: u32,
    /// Seconds by kind of step as well.
    #[arg(long)]
    profile: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn block(x: &Tensor, name: &str, channels: usize) -> Tensor {
    x.graph().scoped(name, || {
        let mut x = x.clone();
        for i in 0..2 {
            let kernel = Kernel::new(&SPACE, 3).from_channel("channel");
            x = nn::conv(&x, &format!("conv.{i}"), &kernel, &dim("channel", channels));
            x = nn::instance_norm(&x, &format!("norm.{i}"), "channel", &SPACE, 1e-5).relu();
        }
        x
    })
}

fn program(res: usize, base: usize) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        g.grain("class", CLASSES);
        let space: Vec<Dim> = [dim("batch", 1)].into_iter().chain(SPACE.map(|d| dim(d, res))).collect();
        let labels = g.input("labels", DType::I32, &space);
        let mut x = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat());
        let mut skips = Vec::new();
        for level in 0..4 {
            if level > 0 {
                x = x.max_pool(&SPACE.map(|d| Window::valid(d, 2, 2)));
            }
            x = block(&x, &format!("encoder.{level}"), base << level);
            skips.push(x.clone());
        }
        skips.pop();
        for (level, skip) in skips.iter().enumerate().rev() {
            let double = Kernel::new(&SPACE, 2).stride(2);
            let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &dim("channel", base << level));
            x = block(&Tensor::concat(&[&up, skip], "channel"), &format!("decoder.{level}"), base << level);
        }
        let head = Kernel::new(&SPACE, 1).from_channel("channel");
        let logits = nn::conv(&x, "head", &head, &dim("class", CLASSES));
        let is_class = labels.equal(&g.iota(&dim("class", CLASSES))).cast(DType::F32);
        let loss = nn::soft_dice_loss(&nn::softmax(&logits, &["class"]), &is_class, &SPACE);
        Optimizer::adam(1e-3).apply(g, &loss);
        g.output("loss", &loss);
    })
    .expect("the program is right");
    p.finish().expect("the program is right")
}

fn main() {
    let args = Args::parse();
    let mesh: mesh::layout::Mesh = args.mesh.parse().unwrap_or_else(|e| panic!("{e}"));
    let rules: Vec<String> = mesh.axes().iter().map(|(n, _)| format!("{n}:{n}")).collect();
    let options = Options {
        layout: rules.join(",").parse().expect("rules of the axes' names"),
        threads: (args.threads > 0).then_some(args.threads),
        mesh,
        ..Options::default()
    };
    let program = program(args.res, args.base);
    let flops = program.function("train").expect("it is there").product_flops();
    let mut session = Session::embedded(program, &options).unwrap_or_else(|e| panic!("{e}"));
    let f = session.function("train").expect("it is there");
    let n = args.res;
    let image =
        Array5::from_shape_fn((1, n, n, n, 1), |(_, x, y, z, _)| ((x * 7 + y * 13 + z * 29) % 101) as f32 / 101.0);
    let labels = Array4::from_shape_fn((1, n, n, n), |(_, x, y, z)| (image[[0, x, y, z, 0]] * 3.0) as i32);
    session.feed(f, "image", &Array::from(image)).expect("the image's type");
    session.feed(f, "labels", &Array::from(labels)).expect("the labels' type");
    let loss = |s: &Session| s.fetch(f, "loss").ok().and_then(|a| a.to_f32());
    let (mut first, mut seconds) = (None, Vec::new());
    for step in 0..=args.steps {
        if step == 1 && args.profile {
            session.profile();
        }
        let begun = Instant::now();
        session.step(f, step).unwrap_or_else(|e| panic!("{e}"));
        if step == 0 {
            first = loss(&session);
        } else {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let peak: Vec<usize> = session.peaks().unwrap_or_default().iter().map(|p| p.peak_bytes_measured >> 20).collect();
    println!(
        "{}",
        serde_json::json!({
            "case": "unet", "impl": "mesh", "res": n, "base": args.base, "mesh": options.mesh.to_string(),
            "threads": options.threads(), "step_s": median, "min_s": seconds[0], "max_s": seconds[seconds.len() - 1],
            "gflops": flops as f64 / 1e9 / median, "peak_mib": peak, "loss_first": first, "loss_last": loss(&session),
        })
    );
    if args.profile {
        benches::print_profile(&session.profile(), args.steps);
    }
}
