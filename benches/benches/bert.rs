//! A pretraining step of BERT on masked words: AdamW, no drop-out, as `examples/src/bert` trains it. Prints one JSON
//! line: seconds a step (median), GFLOP/s, memory, and with `--profile` the seconds by kind of step.
//!
//! `cargo bench -p benches --bench bert -- --size mini --threads 2`

use clap::Parser;
use coordinator::{Options, Session};
use examples::bert::architecture::Architecture;
use examples::bert::program::Pretraining;
use mesh::array::Array;
use mesh::optim::Optimizer;
use ndarray::{Array1, Array2};
use std::time::Instant;

const SEQ: usize = 128;
const PREDICTIONS: usize = 20;

#[derive(Parser)]
struct Args {
    /// Size: `mini` or `base`, or another one with a name.
    #[arg(long, default_value = "mini")]
    size: String,
    /// Sequences of a step; 0: 32, or 8 for layers wider than 512.
    #[arg(long, default_value_t = 0)]
    batch: usize,
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
    let size = Architecture::named(&args.size).unwrap_or_else(|| panic!("there is no size `{}`", args.size));
    let architecture = Architecture { hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ..size };
    let batch = match args.batch {
        0 if architecture.hidden_size > 512 => 8,
        0 => 32,
        n => n,
    };
    let vocab = architecture.vocab_size;
    let optimizer = Optimizer::adamw(1e-4, 0.01);
    let plain = Pretraining::plain(architecture, [batch, SEQ, PREDICTIONS], optimizer);
    let program = Pretraining { next_sentence: false, ..plain }.program().unwrap_or_else(|e| panic!("{e}"));
    let flops = program.function("train").expect("it is there").product_flops();
    let mut session = Session::embedded(program, &options).unwrap_or_else(|e| panic!("{e}"));
    let f = session.function("train").expect("it is there");
    let word = |i: usize, j: usize| ((i * 7919 + j * 104_729 + 13) % vocab) as i32;
    let feeds: [(&str, Array); 6] = [
        ("tokens", Array2::from_shape_fn((batch, SEQ), |(i, j)| word(i, j)).into()),
        ("segments", Array2::from_shape_fn((batch, SEQ), |(_, j)| (j >= SEQ / 2) as i32).into()),
        ("lengths", Array1::from_elem(batch, SEQ as i32).into()),
        ("positions", Array2::from_shape_fn((batch, PREDICTIONS), |(i, j)| ((i + j * 6) % SEQ) as i32).into()),
        ("targets", Array2::from_shape_fn((batch, PREDICTIONS), |(i, j)| word(j, i)).into()),
        ("weights", Array2::from_elem((batch, PREDICTIONS), 1.0f32).into()),
    ];
    for (name, array) in &feeds {
        session.feed(f, name, array).unwrap_or_else(|e| panic!("{e}"));
    }
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
            "case": format!("bert-{}", args.size), "impl": "mesh", "batch": batch, "mesh": options.mesh.to_string(),
            "threads": options.threads(), "step_s": median, "min_s": seconds[0], "max_s": seconds[seconds.len() - 1],
            "gflops": flops as f64 / 1e9 / median, "peak_mib": peak, "loss_first": first, "loss_last": loss(&session),
        })
    );
    if args.profile {
        benches::print_profile(&session.profile(), args.steps);
    }
}
