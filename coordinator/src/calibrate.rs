//! Calibration: a description of this machine ([`Machine`]), measured.
//!
//! Small networks are trained on it, a convolutional and a transformer one, in `f32` and in `bf16`, on one device with all
//! cores and on several that share them; all in turn, some rounds, so that what disturbs the machine for a while does not hit
//! one of them alone. Each step of their plans is a sample: its operations and bytes are known, its time is measured. For each
//! kind of work the straight line through its samples, with no coefficient below zero, is its rate; samples weigh as much as
//! they take, so that what a run spends its time on is right. What sums in tiles cost beside their products is that of some
//! numbers with which the lines of products fit best.

use crate::error::Failure;
use crate::session::{FunctionId, Options, Session};
use mesh::array::Array;
use mesh::dim::{DType, Name, Type, dim};
use mesh::error::Error;
use mesh::graph::Tensor;
use mesh::machine::{Link, Machine, Rate};
use mesh::nn::{self, Attention, BatchNorm, Dense, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::describe::Table;
use mesh::plan::{ProgramPlan, time};
use mesh::program::{Program, ProgramBuilder};
use ndarray::{ArrayD, Dimension, IxDyn};
use std::collections::BTreeMap;
use std::time::Instant;

/// Columns of a register tile, on every instruction set.
const COLUMNS: usize = 16;
/// What it may cost to begin a tile's sum, and to add it to another one of the tree, which depends on the registers that there
/// are: that with which products are off by least is a machine's.
const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// A link in memory: what arrives is copied by the receiver, which the rates of collectives count.
const IN_MEMORY: f64 = 1e12;
/// How often all networks are measured.
const ROUNDS: u32 = 3;
/// Runs of each network that count, in a round; the first of all does not.
const RUNS: u32 = 3;

/// A network to be measured: its program, mesh and layout.
struct Case {
    name: String,
    program: Program,
    mesh: &'static str,
    layout: &'static str,
}

/// A step that was measured.
struct Sample {
    class: String,
    family: &'static str,
    bf16: bool,
    flops: f64,
    bytes: f64,
    seconds: f64,
}

/// What a calibration found.
pub struct Calibration {
    /// The machine.
    pub machine: Machine,
    /// By kind of work: samples, and what share of their time the rates are off by.
    pub fits: BTreeMap<String, (usize, f64)>,
    /// By network: milliseconds of a run, measured and as the machine has it.
    pub checks: Vec<(String, f64, f64)>,
}

const SPACE: [&str; 3] = ["x", "y", "z"];

fn convolutional(side: usize, base: usize, dtype: DType) -> Result<Program, Error> {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let space: Vec<_> = [dim("batch", 1)].into_iter().chain(SPACE.map(|d| dim(d, side))).collect();
        let labels = g.input("labels", DType::I32, &space);
        let image = g.input("image", DType::F32, &[&space[..], &[dim("channel", 1)]].concat());
        let block = |x: &Tensor, name: &str, channels: usize| {
            let kernel = Kernel::new(&SPACE, 3).from_channel("channel");
            let x = nn::conv(x, &format!("{name}.0"), &kernel, &dim("channel", channels));
            let x = nn::batch_norm(&x, &format!("{name}.norm.0"), "channel", &BatchNorm::default(), Mode::Train).relu();
            let x = nn::conv(&x, &format!("{name}.1"), &kernel, &dim("channel", channels));
            nn::instance_norm(&x, &format!("{name}.norm.1"), "channel", &SPACE, 1e-5).relu()
        };
        let mut x = image.cast(dtype);
        let mut skips = vec![];
        for level in 0..3 {
            if level > 0 {
                x = x.max_pool(&SPACE.map(|d| Window::valid(d, 2, 2)));
            }
            x = block(&x, &format!("down.{level}"), base << level);
            skips.push(x.clone());
        }
        skips.pop();
        for (level, skip) in skips.iter().enumerate().rev() {
            let double = Kernel::new(&SPACE, 2).stride(2);
            let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &dim("channel", base << level));
            x = block(&Tensor::concat(&[&up, skip], "channel"), &format!("joined.{level}"), base << level);
        }
        let head = Kernel::new(&SPACE, 1).from_channel("channel");
        let logits = nn::conv(&x, "head", &head, &dim("class", 4)).cast(DType::F32);
        let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
        Optimizer::adam(1e-3).apply(g, &loss);
        g.output("loss", &loss);
    })?;
    p.finish()
}

fn transformer([batch, positions, width]: [usize; 3], dtype: DType) -> Result<Program, Error> {
    const WORDS: usize = 4096;
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let at = [dim("batch", batch), dim("position", positions)];
        let words = g.input("words", DType::I32, &at);
        let lengths = g.input("lengths", DType::I32, &at[..1]);
        let model = dim("model", width);
        let start = nn::init::truncated_normal(0.02);
        let table = nn::embedding(g, "words", &dim("word", WORDS), std::slice::from_ref(&model), start.clone());
        let mask = nn::attention_mask(&lengths, &at[1]);
        let heads = Attention { heads: dim("heads", width / 64), head: dim("head", 64), init: start, keep: 1.0 };
        let mut x = table.gather(&words, "word").cast(dtype);
        for layer in 0..2 {
            let name = |part: &str| format!("layer.{layer}.{part}");
            let seen = nn::attention(&x, &x, &mask, &name("attention"), ["position", "model"], &heads, Mode::Train);
            x = nn::layer_norm(&x.add(&seen), &name("norm.0"), &["model"], 1e-6);
            let wide = nn::dense(&x, &name("wide"), &["model"], &[dim("d_ff", 4 * width)], &Dense::default());
            let wide = nn::gelu(&wide);
            let narrow = nn::dense(&wide, &name("narrow"), &["d_ff"], std::slice::from_ref(&model), &Dense::default());
            x = nn::layer_norm(&x.add(&narrow), &name("norm.1"), &["model"], 1e-6);
        }
        let logits = x.contract_wide(&table.cast(dtype), &["model"]);
        let loss = nn::cross_entropy(&logits, &words, "word").mean_all();
        Optimizer::adamw(1e-3, 0.01).apply(g, &loss);
        g.output("loss", &loss);
    })?;
    p.finish()
}

fn cases() -> Result<Vec<Case>, Error> {
    let mut cases = vec![];
    for dtype in [DType::F32, DType::Bf16] {
        for (side, base) in [(24, 8), (40, 16), (20, 32), (12, 64)] {
            let (name, program) =
                (format!("convolutions {side}^3 base {base} {dtype}"), convolutional(side, base, dtype)?);
            cases.push(Case { name, program, mesh: "1", layout: "" });
        }
        for sizes @ [batch, positions, width] in [[4, 64, 128], [8, 128, 256], [2, 128, 512]] {
            let (name, program) =
                (format!("transformer {batch}x{positions}x{width} {dtype}"), transformer(sizes, dtype)?);
            cases.push(Case { name, program, mesh: "1", layout: "" });
        }
    }
    for (mesh, layout) in [("x=2", "x:x"), ("x=2,y=2", "x:x,y:y")] {
        let name = format!("convolutions 40^3 base 16 f32 on {mesh}");
        cases.push(Case { name, program: convolutional(40, 16, DType::F32)?, mesh, layout });
    }
    for (mesh, layout) in [("data=2", "batch:data"), ("data=2,model=2", "batch:data,heads:model,d_ff:model,word:model")]
    {
        let name = format!("transformer 8x128x256 f32 on {mesh}");
        cases.push(Case { name, program: transformer([8, 128, 256], DType::F32)?, mesh, layout });
    }
    Ok(cases)
}

/// A network that is being measured.
struct Running {
    session: Session,
    function: FunctionId,
    /// Seconds of each run.
    seconds: Vec<f64>,
    /// By run, device and step: seconds that were spent in it so far.
    spent: Vec<Vec<Vec<f64>>>,
}

/// A network, ready to be measured.
fn ready(case: &Case) -> Result<Running, Failure> {
    // What a collective takes is told by one step.
    let options =
        Options { mesh: case.mesh.parse()?, layout: case.layout.parse()?, waiting: true, ..Options::default() };
    let mut session = Session::embedded(case.program.clone(), &options)?;
    let f = session.function("train")?;
    let inputs: Vec<(Name, Type)> = session.plan().functions.get(&Name::from("train")).map_or(vec![], |plans| {
        plans[0].inputs.iter().map(|(name, part, _)| (name.clone(), Type::clone(&part.ty))).collect()
    });
    for (name, ty) in inputs {
        // A class, a word or a length that there is; an image that is not the same everywhere.
        let varied = |at: IxDyn| at.slice().iter().fold(7, |a, b| (a * 31 + b) % 97) as f32 / 97.0 - 0.5;
        let array: Array = match ty.dtype {
            DType::F32 => ArrayD::from_shape_fn(ty.shape(), varied).into(),
            _ => ArrayD::<i32>::ones(ty.shape()).into(),
        };
        session.feed(f, &name, &array)?;
    }
    session.step(f, 0)?;
    Ok(Running { session, function: f, seconds: vec![], spent: vec![] })
}

impl Running {
    /// Some runs more.
    fn round(&mut self) -> Result<(), Failure> {
        for _ in 0..RUNS {
            // The first run was not measured.
            let step = self.seconds.len() as u32 + 1;
            let begun = Instant::now();
            self.session.step(self.function, step)?;
            self.seconds.push(begun.elapsed().as_secs_f64());
            // The first run is not recorded.
            let all = self.session.times().into_iter().map(|of| {
                let of = of.into_iter().find(|t| t.function == "train");
                of.map_or(vec![], |t| t.spent_ns.iter().map(|ns| *ns as f64 / 1e9).collect())
            });
            self.spent.push(all.collect());
        }
        Ok(())
    }

    /// Medians, so that a run that something else disturbs does not count.
    fn measured(self) -> Measured {
        let plan = self.session.plan().clone();
        let plans = plan.functions.get(&Name::from("train")).map_or(&[][..], Vec::as_slice);
        let runs = |d: usize, s: usize| {
            let so_far = self.spent.iter().map(move |run| run[d].get(s).copied().unwrap_or(0.0));
            let before = [0.0].into_iter().chain(so_far.clone());
            so_far.zip(before).map(|(now, before)| now - before)
        };
        let steps = plans.iter().enumerate().map(|(d, p)| {
            let of = |s| median(runs(d, s).collect());
            (0..p.steps.len()).map(of).collect()
        });
        // By run, the least of the devices that have to do with a step.
        let soonest = (0..plans.first().map_or(0, |p| p.steps.len())).map(|s| {
            let busy = plans.iter().enumerate().filter(|(_, p)| !p.steps[s].is_idle());
            let all: Vec<Vec<f64>> = busy.map(|(d, _)| runs(d, s).collect()).collect();
            let least = |run: usize| all.iter().map(|of| of[run]).fold(f64::INFINITY, f64::min);
            median((0..self.spent.len()).map(least).collect())
        });
        let (steps, soonest) = (steps.collect(), soonest.collect());
        Measured { seconds: median(self.seconds), steps, soonest, plan }
    }
}

/// What was measured of a network.
struct Measured {
    plan: ProgramPlan,
    /// Seconds of a run.
    seconds: f64,
    /// Seconds by device and step.
    steps: Vec<Vec<f64>>,
    /// Seconds by step of the device that took the fewest.
    soonest: Vec<f64>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

impl Measured {
    /// Of one device all steps that compute, of several those that communicate: of each what it took the device that came to it
    /// last, and so did not wait for others, which an estimate works out by itself.
    fn samples(&self, depth: usize, out: &mut Vec<Sample>) {
        let Some(plans) = self.plan.functions.get(&Name::from("train")) else { return };
        // Devices share the machine, so that a byte takes so many times as long.
        let devices = plans.len() as f64;
        let own = if plans.len() > 1 { vec![&self.soonest; plans.len()] } else { self.steps.iter().collect() };
        for (plan, seconds) in plans.iter().zip(own) {
            for (step, &seconds) in plan.steps.iter().zip(seconds) {
                if step.is_idle() || (step.family() == "collective") != (plans.len() > 1) || seconds <= 0.0 {
                    continue;
                }
                let cost = step.tiled(COLUMNS, depth);
                let bf16 = step.dtype() == DType::Bf16;
                let (flops, bytes) = (cost.flops * devices, cost.bytes * devices);
                out.push(Sample { class: step.class().into(), family: step.family(), bf16, flops, bytes, seconds });
            }
        }
    }

    /// Seconds of a run beside its steps.
    fn outside(&self) -> f64 {
        let longest = self.steps.iter().map(|s| s.iter().sum()).fold(0.0, f64::max);
        (self.seconds - longest).max(0.0)
    }
}

/// The rates of all samples, where sums in tiles have some cost.
struct Fitted {
    depth: usize,
    /// By kind of work and family: the rate, the number of samples, and what share of their time it is off by.
    fits: BTreeMap<String, (Rate, usize, f64)>,
    /// Seconds by which the rates of products are off.
    products_off: f64,
}

impl Fitted {
    fn new(depth: usize, all: &[Sample]) -> Fitted {
        let mut classes: BTreeMap<String, Vec<&Sample>> = BTreeMap::new();
        for s in all {
            classes.entry(s.class.clone()).or_default().push(s);
            classes.entry(s.family.into()).or_default().push(s);
        }
        let mut products_off = 0.0;
        let fit = |(class, samples): (String, Vec<&Sample>)| {
            let (rate, off) = fit(&samples);
            if samples.iter().any(|s| s.family == "product" && s.class == class) {
                products_off += off * samples.iter().map(|s| s.seconds).sum::<f64>();
            }
            (class, (rate, samples.len(), off))
        };
        let fits = classes.into_iter().map(fit).collect();
        Fitted { depth, fits, products_off }
    }
}

/// The rate of some samples, and by which share of their time it is off.
///
/// A launch and a byte take what they take in `f32`, and `bf16` has a rate of its own for FLOPs: where it is emulated it
/// follows other lines, which those of `f32` are not to bend to.
fn fit(samples: &[&Sample]) -> (Rate, f64) {
    let (bf16, of_f32): (Vec<&Sample>, Vec<&Sample>) = samples.iter().partition(|s| s.bf16);
    let is_mixed = !bf16.is_empty() && !of_f32.is_empty();
    let [launch, flop, byte] = line(if of_f32.is_empty() { &bf16 } else { &of_f32 });
    let rest = |s: &Sample| launch + s.bytes * byte;
    let sum = |of: &dyn Fn(&Sample) -> f64| bf16.iter().map(|s| of(s)).sum::<f64>();
    let flop_bf16 = match sum(&|s| s.flops) {
        flops if is_mixed && flops > 0.0 => (sum(&|s| s.seconds - rest(s)) / flops).max(0.0),
        _ => flop,
    };
    let predicted = |s: &Sample| rest(s) + s.flops * if s.bf16 { flop_bf16 } else { flop };
    let all: f64 = samples.iter().map(|s| s.seconds).sum();
    let off: f64 = samples.iter().map(|s| (predicted(s) - s.seconds).abs()).sum();
    // What costs nothing beside the rest is fast.
    let rate = |seconds: f64| (1.0 / seconds.max(1e-15)).min(1e15);
    let rate = Rate { launch, flops: rate(flop), flops_bf16: rate(flop_bf16), flops_f16: None, bytes: rate(byte) };
    (rate, if all > 0.0 { off / all } else { 0.0 })
}

/// Seconds of a launch, a FLOP and a byte: the straight line through some samples, with no coefficient below zero.
fn line(samples: &[&Sample]) -> [f64; 3] {
    let row = |s: &Sample| [1.0, s.flops, s.bytes];
    let mut normal = [[0.0f64; 3]; 3];
    let mut right = [0.0f64; 3];
    for s in samples {
        let (x, weight) = (row(s), 1.0 / s.seconds);
        for i in 0..3 {
            right[i] += weight * x[i] * s.seconds;
            (0..3).for_each(|j| normal[i][j] += weight * x[i] * x[j]);
        }
    }
    // Each coefficient in turn, none below zero: the function is convex, so this ends at its least.
    let mut by = [0.0f64; 3];
    for _ in 0..5000 {
        for i in 0..3 {
            let others: f64 = (0..3).filter(|j| *j != i).map(|j| normal[i][j] * by[j]).sum();
            by[i] = if normal[i][i] > 0.0 { ((right[i] - others) / normal[i][i]).max(0.0) } else { 0.0 };
        }
    }
    let all: f64 = samples.iter().map(|s| s.seconds).sum();
    let sum: f64 = samples.iter().map(|s| row(s).iter().zip(&by).map(|(x, b)| x * b).sum::<f64>()).sum();
    // The weights lean towards the fast ones, so what all take together is made right; but of collectives, the slow ones
    // have waited all the same, for a core that another device had.
    if sum > 0.0 && samples.iter().all(|s| s.family != "collective") {
        by = by.map(|b| b * all / sum);
    }
    by
}

/// Measures this machine, telling of each network that is measured.
///
/// # Errors
/// Memory or threads that the system does not give.
pub fn calibrate(name: &str, memory: usize, mut tell: impl FnMut(&str)) -> Result<Calibration, Failure> {
    let mut running = vec![];
    for case in cases()? {
        running.push((ready(&case)?, case.name));
    }
    for round in 1..=ROUNDS {
        for (running, name) in &mut running {
            running.round()?;
            let last = running.seconds.last().copied().unwrap_or(0.0);
            tell(&format!("round {round} of {ROUNDS}: {name:<44} {:8.2} ms", last * 1e3));
        }
    }
    let measured: Vec<_> = running.into_iter().map(|(running, name)| (name, running.measured())).collect();
    let fitted = DEPTHS.map(|depth| {
        let mut samples = vec![];
        measured.iter().for_each(|(_, m)| m.samples(depth, &mut samples));
        Fitted::new(depth, &samples)
    });
    let [first, rest @ ..] = fitted;
    let better = |a: Fitted, b: Fitted| if b.products_off < a.products_off { b } else { a };
    let Fitted { depth, fits, .. } = rest.into_iter().fold(first, better);
    let link = Link { latency: 0.0, bytes: IN_MEMORY };
    let machine = Machine {
        name: name.into(),
        devices: 1,
        hosts: Some(1),
        memory,
        columns: COLUMNS,
        depth,
        step: median(measured.iter().map(|(_, m)| m.outside()).collect()),
        rates: fits.iter().map(|(class, (rate, ..))| (class.clone(), *rate)).collect(),
        within: link,
        between: link,
    };
    let check = |(name, m): (String, Measured)| {
        let predicted = time::estimate(&m.plan, "train", &machine).map_or(0.0, |e| e.seconds);
        (name, m.seconds * 1e3, predicted * 1e3)
    };
    let checks = measured.into_iter().map(check).collect();
    Ok(Calibration { fits: fits.into_iter().map(|(c, (_, n, off))| (c, (n, off))).collect(), checks, machine })
}

impl Calibration {
    /// As tables for people.
    pub fn text(&self) -> String {
        let mut out = String::from("rates, by kind of work\n");
        let mut table = Table::default();
        table.row([&"work", &"samples", &"launch", &"GFLOP/s", &"of bf16", &"GB/s", &"off by"]);
        for (class, rate) in &self.machine.rates {
            let (samples, off) = self.fits.get(class).copied().unwrap_or_default();
            let giga = |v: f64| if v >= 1e15 { "-".to_string() } else { format!("{:.1}", v / 1e9) };
            let [flops, bf16, bytes] = [rate.flops, rate.flops_bf16, rate.bytes].map(giga);
            let (launch, off) = (format!("{:.1} us", rate.launch * 1e6), format!("{:.0} %", off * 100.0));
            table.row([class, &samples, &launch, &flops, &bf16, &bytes, &off]);
        }
        table.write(&mut out);
        out += "\nruns, measured and by these rates\n";
        let mut table = Table::default();
        table.row([&"network", &"measured", &"by rates", &"off by"]);
        for (name, measured, predicted) in &self.checks {
            let [a, b] = [measured, predicted].map(|ms| format!("{ms:.2} ms"));
            table.row([name, &a, &b, &format!("{:+.0} %", (predicted / measured - 1.0) * 100.0)]);
        }
        table.write(&mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(flops: f64, bytes: f64, bf16: bool, seconds: f64) -> Sample {
        Sample { class: "conv".into(), family: "product", bf16, flops, bytes, seconds }
    }

    /// Work of a machine with 2 us a launch, 100 GFLOP/s (twice that in `bf16`) and 10 GB/s.
    fn work(i: usize) -> Sample {
        let (flops, bytes, bf16) = ((i * 7919 % 97) as f64 * 1e6, (i * 104_729 % 89) as f64 * 1e4, i.is_multiple_of(2));
        sample(flops, bytes, bf16, 2e-6 + flops / if bf16 { 2e11 } else { 1e11 } + bytes / 1e10)
    }

    fn near(a: f64, b: f64) -> bool {
        (a / b - 1.0).abs() < 0.01
    }

    #[test]
    fn a_rate_is_found_in_its_samples() {
        let samples: Vec<Sample> = (1..80).map(work).collect();
        let (rate, off) = fit(&samples.iter().collect::<Vec<_>>());
        let found = [rate.launch, rate.flops, rate.flops_bf16, rate.bytes];
        assert!(found.iter().zip([2e-6, 1e11, 2e11, 1e10]).all(|(a, b)| near(*a, b)), "{rate:?}");
        assert!(off < 0.01, "{off}");
    }

    #[test]
    fn work_in_bf16_that_follows_no_line_leaves_that_of_f32_as_it_is() {
        let mut samples: Vec<Sample> = (1..80).map(work).collect();
        samples.iter_mut().filter(|s| s.bf16).enumerate().for_each(|(i, s)| s.seconds *= 2.0 + (i % 5) as f64);
        let (rate, _) = fit(&samples.iter().collect::<Vec<_>>());
        assert!(near(rate.launch, 2e-6) && near(rate.flops, 1e11) && near(rate.bytes, 1e10), "{rate:?}");
        let of = |s: &&Sample| rate.launch + s.flops / rate.flops_bf16 + s.bytes / rate.bytes;
        let bf16: Vec<&Sample> = samples.iter().filter(|s| s.bf16).collect();
        assert!(near(bf16.iter().map(of).sum(), bf16.iter().map(|s| s.seconds).sum()), "{rate:?}");
    }

    #[test]
    fn what_work_takes_together_is_right_and_who_waited_in_a_collective_does_not_count() {
        let mut samples: Vec<Sample> = (1..80).map(work).collect();
        samples.iter_mut().step_by(10).for_each(|s| s.seconds *= 5.0);
        let predicted = |samples: &[Sample]| {
            let (r, _) = fit(&samples.iter().collect::<Vec<_>>());
            let of = |s: &Sample| r.launch + s.flops / if s.bf16 { r.flops_bf16 } else { r.flops } + s.bytes / r.bytes;
            samples.iter().map(of).sum::<f64>()
        };
        let all: f64 = samples.iter().map(|s| s.seconds).sum();
        assert!(near(predicted(&samples), all), "{} of {all}", predicted(&samples));
        samples.iter_mut().for_each(|s| s.family = "collective");
        assert!(predicted(&samples) < 0.95 * all, "{} of {all}", predicted(&samples));
    }

    #[test]
    fn rates_of_products_are_off_by_what_no_line_goes_through() {
        let samples: Vec<Sample> = (1..80).map(work).collect();
        assert!(Fitted::new(8, &samples).products_off < 1e-2 * samples.iter().map(|s| s.seconds).sum::<f64>());
        let uneven = |(i, s): (usize, Sample)| Sample { seconds: s.seconds * (1.0 + (i % 3) as f64), ..s };
        let uneven: Vec<Sample> = (1..80).map(work).enumerate().map(uneven).collect();
        let Fitted { fits, products_off, .. } = Fitted::new(8, &uneven);
        let all: f64 = uneven.iter().map(|s| s.seconds).sum();
        assert!(products_off > 0.2 * all && near(products_off, fits["conv"].2 * all), "{products_off} of {all}");
    }

    #[test]
    fn work_of_no_flops_and_bytes_has_rates_that_a_description_may_have() {
        let (rate, off) = fit(&[&sample(0.0, 0.0, false, 1e-6)]);
        assert!(near(rate.launch, 1e-6) && off < 1e-9, "{rate:?}");
        assert!([rate.flops, rate.flops_bf16, rate.bytes].iter().all(|r| *r > 0.0 && *r <= 1e30), "{rate:?}");
    }
}
