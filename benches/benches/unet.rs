//! A training step of the 3-D UNet that medical frameworks use by default: 4 levels, two 3x3x3 convolutions with bias,
//! instance norm and ReLU a block, transposed convolutions up, soft dice, Adam. Prints one JSON line: seconds a step
//! (median), GFLOP/s, memory, and with `--profile` where a step's time goes.
//!
//! `cargo bench --bench unet -- --res 64 --base 16 --threads 2`

use benches::Steps;
use clap::Parser;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::graph::Tensor;
use mesh::nn::{self, Kernel};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use ndarray::{Array4, Array5};

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
    #[command(flatten)]
    steps: Steps,
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

fn program(res: usize, base: usize, dtype: DType) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        g.grain("class", CLASSES);
        let space: Vec<Dim> = [dim("batch", 1)].into_iter().chain(SPACE.map(|d| dim(d, res))).collect();
        let labels = g.input("labels", DType::I32, &space);
        let mut x = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat()).cast(dtype);
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
        let logits = nn::conv(&x, "head", &head, &dim("class", CLASSES)).cast(DType::F32);
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
    let program = program(args.res, args.base, args.steps.dtype());
    let flops = program.function("train").expect("it is there").product_flops();
    let mut session = args.steps.session(program);
    let f = session.function("train").expect("it is there");
    let n = args.res;
    let image =
        Array5::from_shape_fn((1, n, n, n, 1), |(_, x, y, z, _)| ((x * 7 + y * 13 + z * 29) % 101) as f32 / 101.0);
    let labels = Array4::from_shape_fn((1, n, n, n), |(_, x, y, z)| (image[[0, x, y, z, 0]] * 3.0) as i32);
    session.feed(f, "image", &Array::from(image)).expect("the image's type");
    session.feed(f, "labels", &Array::from(labels)).expect("the labels' type");
    let case = serde_json::json!({"case": "unet", "res": n, "base": args.base});
    args.steps.measure(&mut session, f, flops, case, |clock, _| clock);
}
