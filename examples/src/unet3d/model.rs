//! The network of Hou et al. 2019, "High Resolution Medical Image Analysis with Spatial Partitioning": written once,
//! with named dimensions, and nothing in it about devices.

use crate::config::{Config, Norm, OptimizerKind};
use mesh::dim::{DType, Dim, Name, dim};
use mesh::error::Error;
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::{Optimizer, Schedule};
use mesh::program::{Program, ProgramBuilder};

/// The spatial dimensions.
pub const SPACE: [&str; 3] = ["x", "y", "z"];
/// Two convolutions, each with norm, leaky ReLU and drop-out (none after the network's very first).
fn block(x: &Tensor, name: &str, channels: usize, config: &Config, mode: Mode) -> Tensor {
    let g = x.graph();
    g.scoped(name, || {
        let mut x = x.clone();
        for i in 0..2 {
            let kernel = Kernel::new(&SPACE, 3).unbiased().from_channel("channel");
            x = nn::conv(&x, &format!("conv.{i}"), &kernel, &dim("channel", channels));
            x = norm(&x, &format!("norm.{i}"), config, mode);
            x = nn::leaky_relu(&x, 0.1);
            if name != "encoder.0" || i > 0 {
                x = nn::dropout(&x, 1.0 - config.dropout, mode);
            }
        }
        x
    })
}

fn norm(x: &Tensor, name: &str, config: &Config, mode: Mode) -> Tensor {
    match config.norm {
        Norm::Batch => nn::batch_norm(x, name, "channel", &nn::BatchNorm::default(), mode),
        Norm::Instance => nn::instance_norm(x, name, "channel", &SPACE, 1e-5),
        Norm::Group => nn::group_norm(x, name, "channel", 4, &SPACE, 1e-5),
    }
}

/// Logits `[batch, x, y, z, class]` (f32) of an image `[batch, x, y, z, channel]`.
pub fn unet(image: &Tensor, classes: usize, config: &Config, mode: Mode) -> Tensor {
    let mut x = image.cast(config.dtype.into());
    let mut skips = Vec::new();
    let g = image.graph();
    for level in 0..config.levels {
        let name = format!("encoder.{level}");
        x = g.block(&name, || {
            if level > 0 {
                x = x.max_pool(&SPACE.map(|d| Window::same(d, x.dim(d).size, 2, 2, 1)));
            }
            block(&x, &name, config.base << level, config, mode)
        });
        if level + 1 < config.levels {
            skips.push(x.clone());
        }
    }
    for (level, skip) in skips.iter().enumerate().rev() {
        let name = format!("decoder.{level}");
        x = g.block(&name, || {
            let channels = dim("channel", config.base << level);
            let double = Kernel::new(&SPACE, 2).stride(2).unbiased().to(&SPACE.map(|d| skip.dim(d).size));
            let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &channels);
            let up = nn::dropout(&up, 1.0 - config.dropout, mode);
            block(&Tensor::concat(&[&up, skip], "channel"), &name, config.base << level, config, mode)
        });
    }
    let head = Kernel::new(&SPACE, 1).unbiased().from_channel("channel");
    nn::conv(&x, "head", &head, &dim("class", classes)).cast(DType::F32)
}

/// Dice of each class on the most probable labels: `2 I / (S + 0.001)`, over all cases.
fn dice_by_class(logits: &Tensor, is_class: &Tensor, batch: &str) -> Tensor {
    let predicted = nn::arg_max(logits, "class");
    let chosen = predicted.equal(&logits.graph().iota(&logits.dim("class"))).cast(DType::F32);
    nn::overlap(&chosen, is_class, &[batch, "x", "y", "z"], 0.0, 0.001)
}

/// The mean over the classes that are organs.
fn organ_mean(by_class: &Tensor) -> Tensor {
    let classes = by_class.dim("class").size;
    by_class.slice("class", 1, classes).mean(&["class"])
}

/// Loss and dice by class: `0.8 * cross-entropy (weighted by class) + 0.2 * dice loss of the organs`.
fn judge(g: &Graph, logits: &Tensor, labels: &Tensor, config: &Config, batch: &str) -> (Tensor, Tensor) {
    let class = logits.dim("class");
    let is_class = labels.equal(&g.iota(&class)).cast(DType::F32);
    let background = labels.equal(&g.scalar_i32(0));
    let weights = background.select(&g.scalar(1.0), &g.scalar(config.organ_weight));
    let entropy = nn::weighted_mean(&nn::cross_entropy(logits, labels, "class"), &weights);
    let p = nn::softmax(logits, &["class"]);
    let organs = |t: &Tensor| t.slice("class", 1, class.size);
    let dice = organs(&nn::dice_loss(&p, &is_class, batch, &SPACE)).mean(&["class"]);
    (entropy.mul_scalar(0.8).add(&dice.mul_scalar(0.2)), dice_by_class(logits, &is_class, batch))
}

/// What the program is for: the volume's extents and the number of its classes.
pub struct Shape {
    /// Extents along x, y and z.
    pub volume: [usize; 3],
    /// Classes, the background included.
    pub classes: usize,
}

/// A function's feeds; `batch` is the dimension of its cases.
fn feeds(g: &Graph, shape: &Shape, batch: Dim) -> (Tensor, Tensor) {
    // Classes are never split: all of a voxel's logits lie together.
    g.grain("class", shape.classes);
    let space = SPACE.iter().zip(shape.volume).map(|(d, n)| dim(*d, n));
    let space: Vec<Dim> = std::iter::once(batch).chain(space).collect();
    let labels = g.input("labels", DType::I32, &space);
    let image = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat());
    (image, labels)
}

fn training(p: &mut ProgramBuilder, shape: &Shape, config: &Config) -> Result<(), Error> {
    p.function("train", |g| {
        let (image, labels) = feeds(g, shape, dim("batch", config.batch));
        let logits = unet(&image, shape.classes, config, Mode::Train);
        let (loss, dice) = judge(g, &logits, &labels, config, "batch");
        let update = optimizer(config).apply(g, &loss);
        g.output("loss", &loss);
        update.output(g);
        g.output("dice", &organ_mean(&dice));
    })
}

fn evaluation(p: &mut ProgramBuilder, shape: &Shape, config: &Config) -> Result<(), Error> {
    p.function("eval", |g| {
        // One case cannot be split, whatever the layout says of batches.
        let (image, labels) = feeds(g, shape, dim("case", 1));
        let logits = unet(&image, shape.classes, config, Mode::Eval);
        let (loss, dice) = judge(g, &logits, &labels, config, "case");
        g.output("loss", &loss);
        g.output("dice", &dice);
        g.output("prediction", &nn::arg_max(&logits, "class"));
    })
}

/// The program: `train` (feeds `image` and `labels`; gives `loss`, `dice` and the outputs of
/// [`mesh::optim::Update::output`]) and `eval` (the same feeds for one case; gives `prediction`, `loss`, `dice` by class). `train` recomputes those of its blocks, `encoder.0` to
/// `decoder.0`.
pub fn program(shape: &Shape, config: &Config, recompute: &[Name]) -> Result<Program, Error> {
    let mut p = ProgramBuilder::recomputing(recompute);
    training(&mut p, shape, config)?;
    evaluation(&mut p, shape, config)?;
    p.finish()
}

/// The program without `train`: it needs neither an optimizer's variables nor the memory of a backward pass.
pub fn eval_program(shape: &Shape, config: &Config) -> Result<Program, Error> {
    let mut p = ProgramBuilder::new();
    evaluation(&mut p, shape, config)?;
    p.finish()
}

fn optimizer(config: &Config) -> Optimizer {
    let rate = config.rate;
    // As published: a factor of 0.3 every 20,000 steps.
    let steps = Schedule::StepDecay { start: rate, factor: 0.3, every: 20_000 };
    config.dtype.trains(match config.optimizer {
        OptimizerKind::Adafactor => Optimizer::adafactor(steps),
        OptimizerKind::Adam => Optimizer::adam(steps),
        OptimizerKind::Sgd => Optimizer::momentum(steps, 0.9),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The closed form of the published network's multiply-adds a voxel of level 0, forward; every size even.
    fn forward_flops(base: u64, levels: u32, classes: u64, voxels: u64) -> u64 {
        let conv = |ci: u64, co: u64, level: u32| 2 * 27 * ci * co * (voxels >> (3 * level));
        let mut flops = conv(1, base, 0) + conv(base, base, 0);
        for level in 1..levels {
            flops += conv(base << (level - 1), base << level, level) + conv(base << level, base << level, level);
        }
        for level in (0..levels - 1).rev() {
            let (low, own) = (base << (level + 1), base << level);
            flops += 2 * 8 * low * own * (voxels >> (3 * (level + 1)));
            flops += conv(2 * own, own, level) + conv(own, own, level);
        }
        flops + 2 * base * classes * voxels
    }

    #[test]
    fn it_has_the_parameters_and_the_flops_of_the_published_network() {
        let config = Config { base: 32, norm: Norm::Batch, ..Config::default() };
        let p = program(&Shape { volume: [64; 3], classes: 3 }, &config, &[]).unwrap();
        assert_eq!(p.parameters(), 5_600_960);
        let flops = |name: &str| -> u64 {
            let f = p.function(name).unwrap();
            let products = f.nodes.iter().filter(|n| n.op.op().name().starts_with("conv"));
            products.map(|n| n.op.op().flops(&f.input_types(n), &n.ty)).sum()
        };
        let forward = forward_flops(32, 4, 3, 64 * 64 * 64);
        assert_eq!(flops("eval"), forward);
        // Backward: the gradients by data and by filter cost what forward does, but nobody asks for the image's.
        assert_eq!(flops("train"), 3 * forward - 2 * 27 * 32 * 64 * 64 * 64);
        assert!((forward as f64 / 112e9 - 1.0).abs() < 0.01);
    }

    #[test]
    fn it_has_as_many_levels_as_are_asked_for() {
        for levels in [1, 2, 6] {
            let config = Config { base: 8, levels, ..Config::default() };
            let p = program(&Shape { volume: [64; 3], classes: 3 }, &config, &[]).unwrap();
            let f = p.function("eval").unwrap();
            let products = f.nodes.iter().filter(|n| n.op.op().name().starts_with("conv"));
            let flops: u64 = products.map(|n| n.op.op().flops(&f.input_types(n), &n.ty)).sum();
            assert_eq!(flops, forward_flops(8, levels as u32, 3, 64 * 64 * 64), "{levels} levels");
        }
    }

    #[test]
    fn its_activations_take_less_than_two_kilobytes_a_voxel() {
        let config = Config { base: 32, norm: Norm::Batch, ..Config::default() };
        let p = program(&Shape { volume: [64; 3], classes: 3 }, &config, &[]).unwrap();
        let plan = coordinator::Options { threads: Some(1), ..Default::default() }.plan(&p).unwrap();
        let variables: usize = p.variables.iter().map(|v| v.ty.bytes()).sum();
        let voxel = (plan.peak_bytes(0) - variables) as f64 / f64::from(64 * 64 * 64);
        assert!((1000.0..2000.0).contains(&voxel), "{voxel} bytes a voxel");
    }
}
