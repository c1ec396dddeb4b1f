//! A small network and its training, for tests of sessions and checkpoints.

use super::{f32s, i32s};
use coordinator::checkpoint::Checkpoints;
use coordinator::{Failure, Options, Session};
use mesh::dim::{DType, Dim, dim};
use mesh::nn::{self, BatchNorm, Dense, Mode};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use std::path::Path;

pub const SIZES: (usize, usize) = (10, 70);

pub fn batch() -> [Dim; 2] {
    [dim("batch", 10), dim("in", SIZES.0)]
}

/// Two layers with a norm between, trained by Adam; `hidden` units.
pub fn network(hidden: usize) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("image", DType::F32, &batch());
        let labels = g.input("labels", DType::I32, &batch()[..1]);
        let y = nn::dense(&x, "first", &["in"], &[dim("hidden", hidden)], &Dense::default());
        let y = nn::dropout(
            &nn::gelu(&nn::batch_norm(&y, "n", "hidden", &BatchNorm::default(), Mode::Train)),
            0.9,
            Mode::Train,
        );
        let logits = nn::dense(&y, "second", &["hidden"], &[dim("class", 5)], &Dense::default());
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        Optimizer::adam(0.01).apply(g, &loss);
        g.output("loss", &loss);
        g.output("accuracy", &nn::accuracy(&logits, &labels, "class"));
    })
    .unwrap();
    p.finish().unwrap()
}

pub fn options(mesh: &str, layout: &str) -> Options {
    let (mesh, layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    Options { mesh, layout, threads: Some(1), seed: 3, ..Options::default() }
}

pub fn session_of(p: Program, mesh: &str, layout: &str) -> Session {
    Session::embedded(p, &options(mesh, layout)).unwrap()
}

/// A session of the network with its checkpoints, of which `keep` stay, in a folder.
pub fn session_in(dir: &Path, keep: usize, mesh: &str, layout: &str) -> Session {
    let checkpoints = Some(Checkpoints { location: dir.to_str().unwrap().into(), keep });
    Session::embedded(network(SIZES.1), &Options { checkpoints, ..options(mesh, layout) }).unwrap()
}

pub fn session(mesh: &str, layout: &str) -> Session {
    session_of(network(SIZES.1), mesh, layout)
}

/// Runs steps `from .. to`; the losses.
pub fn train(s: &mut Session, from: u32, to: u32) -> Vec<Vec<u8>> {
    (from..to)
        .map(|step| {
            let (image, labels) = (f32s(&batch(), step).1, i32s(&batch()[..1], 100 + step, 5).1);
            let out = s.run("train", step, &[("image", &image), ("labels", &labels)]).unwrap();
            out[0].1.to_bytes()
        })
        .collect()
}

pub fn text<T>(result: Result<T, Failure>) -> String {
    match result {
        Ok(_) => panic!("it is accepted"),
        Err(e) => e.to_string(),
    }
}

pub const LAYOUTS: [(&str, &str); 4] =
    [("1", ""), ("a=3", "batch:a"), ("a=5", "batch:a"), ("a=2,b=5", "hidden:a,batch:b")];
