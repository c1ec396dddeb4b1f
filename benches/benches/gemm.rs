//! Products of matrices, as `nn::dense` has them and its gradients: seconds and GFLOP/s, one line each.
//!
//! `cargo bench -p benches --bench gemm -- --threads 1`

use clap::Parser;
use coordinator::{Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, dim};
use mesh::program::ProgramBuilder;
use ndarray::Array2;

#[derive(Parser)]
struct Args {
    /// Rows, columns and contracted elements, `4096x1024x256`; several.
    #[arg(long, value_delimiter = ',', default_value = "2048x2048x2048,4096x1024x256,4096x256x1024,640x30522x256")]
    sizes: Vec<String>,
    /// Threads; 0: the machine's cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Products measured of each.
    #[arg(long, default_value_t = 10)]
    steps: u32,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let options = Options { threads: (args.threads > 0).then_some(args.threads), ..Options::default() };
    for size in &args.sizes {
        let s: Vec<usize> = size.split('x').map(|n| n.parse().expect("a number")).collect();
        let &[m, n, k] = &s[..] else { panic!("`{size}` is not ROWSxCOLUMNSxDEPTH") };
        // Where the contracted dimension lies in each factor: as in a layer, its input's and its kernel's gradient.
        for (kind, a, b) in
            [("nn", ["m", "k"], ["k", "n"]), ("nt", ["m", "k"], ["n", "k"]), ("tn", ["k", "m"], ["k", "n"])]
        {
            let of = |names: [&str; 2]| {
                names.map(|d| {
                    dim(
                        d,
                        match d {
                            "m" => m,
                            "n" => n,
                            _ => k,
                        },
                    )
                })
            };
            let mut p = ProgramBuilder::new();
            p.function("product", |g| {
                let product = g.input("a", DType::F32, &of(a)).contract(&g.input("b", DType::F32, &of(b)), &["k"]);
                g.output("c", &product);
            })
            .unwrap_or_else(|e| panic!("{e}"));
            let program = p.finish().unwrap_or_else(|e| panic!("{e}"));
            let mut session = Session::embedded(program, &options).unwrap_or_else(|e| panic!("{e}"));
            let f = session.function("product").expect("it is there");
            for (name, dims) in [("a", of(a)), ("b", of(b))] {
                let at = |(i, j): (usize, usize)| ((i * 31 + j * 17) % 97) as f32 / 97.0 - 0.5;
                let array: Array = Array2::from_shape_fn((dims[0].size, dims[1].size), at).into();
                session.feed(f, name, &array).unwrap_or_else(|e| panic!("{e}"));
            }
            let mut times = Vec::new();
            for step in 0..=args.steps {
                session.profile();
                session.step(f, step).unwrap_or_else(|e| panic!("{e}"));
                let seconds: f64 =
                    session.profile().iter().filter(|(n, _)| n.to_string().starts_with("contract")).map(|p| p.1).sum();
                times.push(seconds);
            }
            let mut times = times.split_off(1);
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            let gflops = 2e-9 * (m * n * k) as f64 / median;
            println!(
                "{}",
                serde_json::json!({"case": format!("gemm-{size}-{kind}"), "impl": "mesh", "threads": options.threads(), "step_s": median, "gflops": gflops})
            );
        }
    }
}
