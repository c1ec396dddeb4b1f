//! A product of matrices, as `nn::dense` has it: seconds and GFLOP/s of the product alone (casts are not counted), one JSON
//! line.
//!
//! `cargo bench --bench gemm -- --size 4096x1024x256 --threads 1`

use benches::{Steps, last_run};
use clap::Parser;
use mesh::array::Array;
use mesh::dim::{DType, Dim, dim};
use mesh::program::ProgramBuilder;
use ndarray::Array2;

#[derive(Parser)]
struct Args {
    /// Rows, columns and contracted elements.
    #[arg(long, default_value = "2048x2048x2048")]
    size: String,
    /// Where the contracted dimension lies in each factor: `nn`, as in a layer; `nt` or `tn`, as in its gradients.
    #[arg(long, default_value = "nn", value_parser = ["nn", "nt", "tn"])]
    order: String,
    #[command(flatten)]
    steps: Steps,
}

fn main() {
    let args = Args::parse();
    let sizes: Vec<usize> = args.size.split('x').map(|n| n.parse().expect("a number")).collect();
    let &[m, n, k] = &sizes[..] else { panic!("`{}` is not ROWSxCOLUMNSxDEPTH", args.size) };
    let of = |names: [&str; 2]| {
        names.map(|d| {
            dim(
                d,
                if d == "m" {
                    m
                } else if d == "n" {
                    n
                } else {
                    k
                },
            )
        })
    };
    let factors: [[Dim; 2]; 2] = [
        of(if args.order.starts_with('t') { ["k", "m"] } else { ["m", "k"] }),
        of(if args.order.ends_with('t') { ["n", "k"] } else { ["k", "n"] }),
    ];
    let mut p = ProgramBuilder::new();
    p.function("product", |g| {
        let [a, b] = [0, 1].map(|i| g.input(["a", "b"][i], DType::F32, &factors[i]).cast(args.steps.dtype()));
        g.output("c", &a.contract_wide(&b, &["k"]));
    })
    .unwrap_or_else(|e| panic!("{e}"));
    let program = p.finish().unwrap_or_else(|e| panic!("{e}"));
    let flops = program.function("product").expect("it is there").product_flops();
    let mut session = args.steps.session(program);
    let f = session.function("product").expect("it is there");
    for (name, dims) in ["a", "b"].iter().zip(&factors) {
        let at = |(i, j): (usize, usize)| ((i * 31 + j * 17) % 97) as f32 / 97.0 - 0.5;
        let array: Array = Array2::from_shape_fn((dims[0].size, dims[1].size), at).into();
        session.feed(f, name, &array).unwrap_or_else(|e| panic!("{e}"));
    }
    let case = serde_json::json!({"case": "gemm", "size": args.size, "order": args.order});
    args.steps
        .measure(&mut session, f, flops, case, |_, session| last_run(session, |step| step.starts_with("contract")));
}
