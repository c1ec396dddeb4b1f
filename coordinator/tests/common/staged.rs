//! A program of two stages: layers that share variables first and have their own later.

use mesh::dim::{DType, Dim, dim};
use mesh::nn::{self, Dense, Mode};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};

pub const LAYERS: usize = 3;

pub fn batch() -> [Dim; 2] {
    [dim("batch", 8), dim("width", 64)]
}

/// The path of a shared variable, for that of a layer's.
pub fn shared(path: &str) -> String {
    (0..LAYERS).fold(path.into(), |p, i| p.replace(&format!("layer.{i}/"), "shared/"))
}

/// Three layers with drop-out that share variables in the first stage, and have their own in the second.
pub fn program() -> Program {
    let mut p = ProgramBuilder::new();
    for (name, sharing) in [("train.shared", true), ("train", false)] {
        p.function(name, |g| {
            let x = g.input("x", DType::F32, &batch());
            let build = || {
                (0..LAYERS).fold(x.clone(), |x, i| {
                    g.scoped(format!("layer.{i}"), || {
                        let wide = nn::dense(&x, "up", &["width"], &[dim("hidden", 96)], &Dense::default());
                        let y =
                            nn::dense(&nn::gelu(&wide), "down", &["hidden"], &[dim("width", 64)], &Dense::default());
                        nn::dropout(&y, 0.8, Mode::Train).add(&x)
                    })
                })
            };
            let y = if sharing { g.renamed(shared, build) } else { build() };
            let loss = y.square().mean_all();
            Optimizer::adamw(0.01, 0.01).clipped(1.0).apply(g, &loss);
            g.output("loss", &loss);
        })
        .unwrap();
    }
    p.stage("shared", &["train.shared"]).unwrap();
    p.stage("own", &["train"]).unwrap();
    p.copies("unshare", "train", |path| Some(shared(path))).unwrap();
    p.finish().unwrap()
}
