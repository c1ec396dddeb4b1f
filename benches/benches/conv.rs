//! A 3x3x3 convolution with bias, forward, or with the gradients of input, filter and bias. Prints one JSON line: seconds
//! (median) and GFLOP/s; of 16-bit floats without the casts of what is fed.
//!
//! `cargo bench --bench conv -- --channels 32 --size 64 --what both --threads 2`

use benches::{Steps, last_run};
use clap::Parser;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::nn::{self, Kernel};
use mesh::program::ProgramBuilder;
use ndarray::Array5;

const SPACE: [&str; 3] = ["x", "y", "z"];

#[derive(Parser)]
struct Args {
    /// Channels of input and result.
    #[arg(long, default_value_t = 16)]
    channels: usize,
    /// Voxels a side.
    #[arg(long, default_value_t = 96)]
    size: usize,
    /// `forward`, or `both`: with the gradients.
    #[arg(long, default_value = "forward", value_parser = ["forward", "both"])]
    what: String,
    #[command(flatten)]
    steps: Steps,
}

fn main() {
    let args = Args::parse();
    let (n, c, both) = (args.size, args.channels, args.what == "both");
    let mut p = ProgramBuilder::new();
    p.function("conv", |g| {
        let dims: Vec<Dim> = [dim("batch", 1)].into_iter().chain(SPACE.map(|d| dim(d, n))).collect();
        let dtype = args.steps.dtype();
        let feed = |name: &str| g.input(name, DType::F32, &[&dims[..], &[dim("channel", c)]].concat()).cast(dtype);
        let x = feed("x");
        let y = nn::conv(&x, "conv", &Kernel::new(&SPACE, 3), &dim("channel", c));
        g.output("y", &y);
        if !both {
            return;
        }
        // The sum of y times a feed has that feed for the gradient of y.
        let loss = y.mul(&feed("dy")).cast(DType::F32).sum_all();
        let mut of = vec![("dx".to_string(), x)];
        of.extend(g.trainable().into_iter().map(|(id, v)| (format!("d {}", g.variable_name(id)), v)));
        let tensors: Vec<_> = of.iter().map(|(_, t)| t).collect();
        for ((name, _), gradient) in of.iter().zip(g.gradients(&loss, &tensors)) {
            g.output(name.clone(), &gradient);
        }
    })
    .unwrap_or_else(|e| panic!("{e}"));
    let program = p.finish().unwrap_or_else(|e| panic!("{e}"));
    let flops = program.function("conv").expect("it is there").product_flops();
    let mut session = args.steps.session(program);
    let f = session.function("conv").expect("it is there");
    let at =
        |(_, x, y, z, c): (usize, usize, usize, usize, usize)| ((x * 7 + y * 13 + z * 29 + c) % 101) as f32 / 101.0;
    let values: Array = Array5::from_shape_fn((1, n, n, n, c), at).into();
    for name in ["x", "dy"].into_iter().take(1 + usize::from(both)) {
        session.feed(f, name, &values).unwrap_or_else(|e| panic!("{e}"));
    }
    let case = serde_json::json!({"case": "conv", "what": args.what, "channels": c, "size": n});
    args.steps.measure(&mut session, f, flops, case, |clock, session| match args.steps.dtype() {
        DType::Bf16 | DType::F16 => last_run(session, |step| !step.starts_with("map")),
        _ => clock,
    });
}
