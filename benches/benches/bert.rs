//! A pretraining step of BERT on masked words: AdamW, no drop-out, as `examples/src/bert` trains it. Prints one JSON
//! line: seconds a step (median), GFLOP/s, memory, and with `--profile` where a step's time goes.
//!
//! `cargo bench --bench bert -- --size mini --threads 2`

use benches::Steps;
use clap::Parser;
use examples::bert::architecture::Architecture;
use examples::bert::program::Pretraining;
use mesh::array::Array;
use mesh::optim::Optimizer;
use ndarray::{Array1, Array2};

const PREDICTIONS: usize = 20;

#[derive(Parser)]
struct Args {
    /// Size: `mini` or `base`, or another one with a name.
    #[arg(long, default_value = "mini")]
    size: String,
    /// Sequences of a step; 0: 32, or 8 for layers wider than 512.
    #[arg(long, default_value_t = 0)]
    batch: usize,
    /// Positions of a sequence.
    #[arg(long, default_value_t = 128)]
    seq: usize,
    #[command(flatten)]
    steps: Steps,
}

fn main() {
    let args = Args::parse();
    let seq = args.seq;
    let size = Architecture::named(&args.size).unwrap_or_else(|| panic!("there is no size `{}`", args.size));
    let architecture = Architecture {
        hidden_dropout_prob: 0.0,
        attention_probs_dropout_prob: 0.0,
        max_position_embeddings: seq.max(size.max_position_embeddings),
        ..size
    };
    let batch = match args.batch {
        0 if architecture.hidden_size > 512 => 8,
        0 => 32,
        n => n,
    };
    let vocab = architecture.vocab_size;
    let optimizer = Optimizer::adamw(1e-4, 0.01);
    let plain = Pretraining::plain(architecture, [batch, seq, PREDICTIONS], optimizer);
    let dtype = args.steps.dtype();
    let program = Pretraining { next_sentence: false, dtype, ..plain }.program().unwrap_or_else(|e| panic!("{e}"));
    let flops = program.function("train").expect("it is there").product_flops();
    let mut session = args.steps.session(program);
    let f = session.function("train").expect("it is there");
    let word = |i: usize, j: usize| ((i * 7919 + j * 104_729 + 13) % vocab) as i32;
    let feeds: [(&str, Array); 6] = [
        ("tokens", Array2::from_shape_fn((batch, seq), |(i, j)| word(i, j)).into()),
        ("segments", Array2::from_shape_fn((batch, seq), |(_, j)| (j >= seq / 2) as i32).into()),
        ("lengths", Array1::from_elem(batch, seq as i32).into()),
        ("positions", Array2::from_shape_fn((batch, PREDICTIONS), |(i, j)| ((i + j * 6) % seq) as i32).into()),
        ("targets", Array2::from_shape_fn((batch, PREDICTIONS), |(i, j)| word(j, i)).into()),
        ("weights", Array2::from_elem((batch, PREDICTIONS), 1.0f32).into()),
    ];
    for (name, array) in &feeds {
        session.feed(f, name, array).unwrap_or_else(|e| panic!("{e}"));
    }
    let case = serde_json::json!({"case": format!("bert-{}", args.size), "batch": batch, "seq": seq});
    args.steps.measure(&mut session, f, flops, case, |clock, _| clock);
}
