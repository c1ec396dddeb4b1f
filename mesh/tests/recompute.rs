//! The choice of blocks to recompute within a budget of memory.

mod common;

use mesh::dim::{DType, Dim, Name, dim};
use mesh::error::Error;
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, BatchNorm, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::recompute::{Choice, Chosen};
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::{Program, ProgramBuilder};

struct NoScratch;

impl Backend for NoScratch {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        0
    }
}

/// Convolutions, each with norm and activation.
fn convolutions(x: &Tensor, name: &str, channels: &[usize]) -> Tensor {
    channels.iter().enumerate().fold(x.clone(), |x, (i, &c)| {
        let kernel = Kernel::new(&["x", "y"], 3).unbiased().from_channel("channel");
        let x = nn::conv(&x, &format!("{name}.{i}"), &kernel, &dim("channel", c));
        let x = nn::batch_norm(&x, &format!("{name}.norm.{i}"), "channel", &BatchNorm::default(), Mode::Train);
        nn::dropout(&nn::leaky_relu(&x, 0.1), 0.9, Mode::Train)
    })
}

/// Blocks of unlike width one after the other.
fn chain(g: &Graph, x: &Tensor) -> Tensor {
    [[4, 8], [16, 4], [8, 8], [2, 24]]
        .iter()
        .enumerate()
        .fold(x.clone(), |x, (i, channels)| g.block(&format!("{i}"), || convolutions(&x, &format!("{i}"), channels)))
}

/// Three levels with skips between them.
fn unet(g: &Graph, x: &Tensor) -> Tensor {
    let (mut x, mut skips) = (x.clone(), vec![]);
    for level in 0..3 {
        x = g.block(&format!("encoder.{level}"), || {
            let pooled = match level {
                0 => x.clone(),
                _ => x.max_pool(&["x", "y"].map(|d| Window::same(d, x.dim(d).size, 2, 2, 1))),
            };
            convolutions(&pooled, &format!("encoder.{level}"), &[4 << level; 2])
        });
        skips.push(x.clone());
    }
    skips.pop();
    for (level, skip) in skips.iter().enumerate().rev() {
        x = g.block(&format!("decoder.{level}"), || {
            let double = Kernel::new(&["x", "y"], 2).stride(2).unbiased().to(&["x", "y"].map(|d| skip.dim(d).size));
            let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &dim("channel", 4 << level));
            let both = Tensor::concat(&[&up, skip], "channel");
            convolutions(&both, &format!("decoder.{level}"), &[4 << level; 2])
        });
    }
    x
}

/// Layers whose sums over attention-like products are larger than what goes from layer to layer.
fn layers(g: &Graph, x: &Tensor) -> Tensor {
    let other = [dim("x", 32), dim("y", 32)].map(|d| (d.name.clone(), Name::from(format!("{}'", d.name))));
    (0..3).fold(x.clone(), |x, i| {
        g.block(&format!("layer.{i}"), || {
            // Without the batch: products that have dimensions in common with both factors are made again anyway.
            let memory = other.iter().fold(x.sum(&["batch"]), |m, (from, to)| m.rename(from, to));
            let scores = nn::softmax(&x.contract(&memory, &["channel"]), &["x'", "y'"]);
            let seen = scores.contract(&memory, &["x'", "y'"]);
            nn::layer_norm(&x.add(&seen), &format!("layer.{i}"), &["channel"], 1e-5)
        })
    })
}

type Network = fn(&Graph, &Tensor) -> Tensor;

const NETWORKS: [(&str, Network); 3] = [("chain", chain), ("unet", unet), ("layers", layers)];

fn build(network: Network, side: usize, blocks: &[Name]) -> Result<Program, Error> {
    let image: Vec<Dim> = vec![dim("batch", 1), dim("x", side), dim("y", side), dim("channel", 2)];
    let mut p = ProgramBuilder::recomputing(blocks);
    p.function("train", |g| {
        let loss = network(g, &g.input("image", DType::F32, &image)).square().mean_all();
        Optimizer::adam(1e-3).apply(g, &loss);
        g.output("loss", &loss);
    })?;
    p.function("eval", |g| g.output("y", &network(g, &g.input("image", DType::F32, &image))))?;
    p.finish()
}

fn plan(program: &Program, mesh: &str) -> Result<Vec<ProgramPlan>, Error> {
    let layout = ["x", "y"].into_iter().filter(|axis| mesh.contains(axis)).map(|axis| format!("{axis}:{axis}"));
    let (mesh, layout) = (mesh.parse()?, layout.collect::<Vec<_>>().join(",").parse()?);
    Ok(vec![plan_program(program, &mesh, &layout, &PlanOptions::default(), &NoScratch)?])
}

fn choose(network: Network, mesh: &str, budget: usize) -> Result<Chosen, Error> {
    let build = |blocks: &[Name]| build(network, 32, blocks);
    Choice { build: &build, plan: &|p| plan(p, mesh) }.within(budget)
}

/// Every choice there is: its blocks, its cost (the sum of its blocks' own) and its peak.
fn all(network: Network, mesh: &str) -> Vec<(Vec<Name>, u64, usize)> {
    let without = build(network, 32, &[]).unwrap();
    let names = without.blocks();
    let flops = |blocks: &[Name]| build(network, 32, blocks).unwrap().function("train").unwrap().flops();
    let costs: Vec<u64> = names.iter().map(|n| flops(std::slice::from_ref(n)) - flops(&[])).collect();
    let choice = |mask: usize| {
        let chosen = || (0..names.len()).filter(|i| mask >> i & 1 == 1);
        let blocks: Vec<Name> = chosen().map(|i| names[i].clone()).collect();
        let plan = plan(&build(network, 32, &blocks).unwrap(), mesh).unwrap().remove(0);
        let peak = (0..plan.mesh.size()).map(|d| plan.peak_bytes(d)).max().unwrap();
        let cost = chosen().map(|i| costs[i]).sum();
        assert_eq!(flops(&blocks) - flops(&[]), cost, "costs add up");
        (blocks, cost, peak)
    };
    (0..1 << names.len()).map(choice).collect()
}

#[test]
fn the_choice_is_the_best_of_all() {
    for (name, network) in NETWORKS {
        for mesh in ["1", "x=2,y=2"] {
            let all = all(network, mesh);
            let mut peaks: Vec<usize> = all.iter().map(|(_, _, peak)| *peak).collect();
            peaks.sort();
            peaks.dedup();
            let none = all[0].2;
            assert!(peaks[0] < none, "{name} on {mesh}: recomputation saves nothing: {peaks:?}");
            for &budget in peaks.iter().filter(|p| **p <= none) {
                let chosen = choose(network, mesh, budget).unwrap();
                let best = all.iter().filter(|c| c.2 <= budget).map(|c| c.1).min().unwrap();
                let (_, cost, peak) = all.iter().find(|c| c.0 == chosen.blocks).unwrap();
                assert_eq!(*cost, best, "{name} on {mesh} within {budget}: {:?}", chosen.blocks);
                assert_eq!(chosen.peak, [*peak, none]);
                assert_eq!(chosen.flops[0] - chosen.flops[1], best);
                assert!(!chosen.cut && *peak <= budget);
            }
            let error = choose(network, mesh, peaks[0] - 1).unwrap_err().to_string();
            assert!(
                error.contains("M0001") && error.contains("no choice of blocks to recompute needs less"),
                "{error}"
            );
            assert!(
                error.contains(&format!("({} bytes)", mesh::plan::describe::thousands(peaks[0] as u64))),
                "{error}"
            );
        }
    }
}

#[test]
fn no_choice_goes_below_the_bound_that_a_smaller_one_sets() {
    for (name, network) in NETWORKS {
        let names = build(network, 32, &[]).unwrap().blocks();
        let of = |mask: usize| {
            let blocks: Vec<Name> = (0..names.len()).filter(|i| mask >> i & 1 == 1).map(|i| names[i].clone()).collect();
            plan(&build(network, 32, &blocks).unwrap(), "x=2").unwrap().remove(0)
        };
        let plans: Vec<ProgramPlan> = (0..1 << names.len()).map(of).collect();
        for (a, few) in plans.iter().enumerate() {
            for (b, more) in plans.iter().enumerate().filter(|(b, _)| a & b == a && a != *b) {
                let t = few.timelines[&Name::from("train")][0].waiting();
                let gone = |step: usize| -> usize {
                    (0..names.len()).filter(|i| (b & !a) >> i & 1 == 1).map(|i| t.inside[i][step]).sum()
                };
                let floor = (0..t.alive.len()).map(|step| t.alive[step] - t.kept[step] - gone(step)).max().unwrap();
                assert!(floor <= more.peak_bytes(0), "{name}: {a:b} says {floor} of {b:b}: {}", more.peak_bytes(0));
            }
        }
    }
}

#[test]
fn a_network_without_blocks_is_refused_as_ever() {
    let plain: Network = |_, x| convolutions(x, "a", &[4, 4]);
    let error = choose(plain, "1", 1000).unwrap_err();
    assert_eq!(error.cause.code(), "M0001");
    assert!(!error.to_string().contains("recompute needs less"));
    let chosen = choose(plain, "1", 1 << 30).unwrap();
    assert!(chosen.blocks.is_empty() && chosen.more() == 0.0);
}
