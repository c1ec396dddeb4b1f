//! Seeds: each target begins from real encodings, which it makes itself, so that they are never those of an old format.

use mesh::dim::{DType, dim};
use mesh::nn::{self, Dense, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::program::ProgramBuilder;
use std::path::Path;

/// Puts seeds into a target's corpus; called before the corpus is read.
pub fn seed(target: &str, seeds: impl IntoIterator<Item = Vec<u8>>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder).expect("a folder for the corpus");
    for (i, bytes) in seeds.into_iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{i}")), bytes).expect("a seed");
    }
}

/// Programs as bytes: one with many ops, and one that is hardly more than nothing.
pub fn programs() -> [Vec<u8>; 2] {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        g.grain("class", 3);
        let image = g.input("image", DType::F32, &[dim("x", 9), dim("y", 8), dim("channel", 2)]);
        let kernel = Kernel::new(&["x", "y"], 3).from_channel("channel");
        let x = nn::conv(&image, "conv", &kernel, &dim("channel", 4));
        let x = nn::batch_norm(&x, "norm", "channel", &nn::BatchNorm::default(), Mode::Train);
        let x = nn::dropout(&x.relu(), 0.8, Mode::Train).max_pool(&[Window::same("x", 9, 2, 2, 1)]);
        let x = x.pad("x", 1, 0, f64::NEG_INFINITY).with_layout("y:a");
        let (top, places) = x.top_k("y", &dim("k", 2));
        let loss = nn::dense(&top, "head", &["channel"], &[dim("class", 3)], &Dense::default()).square().mean_all();
        Optimizer::sgd(1e-3).apply(g, &loss);
        g.output("loss", &loss);
        g.output("places", &places);
    })
    .expect("a function");
    let mut q = ProgramBuilder::new();
    q.function("f", |g| {
        let x = g.input("x", DType::I32, &[dim("x", 3)]);
        g.output("y", &x.add(&x));
    })
    .expect("a function");
    [p, q].map(|p| worker::wire::encode(&p.finish().expect("a program")).expect("bytes"))
}
