//! The book's Rust, word for word, with what it takes around it: compiled here, and run by the tests below.

use coordinator::Source;
use coordinator::checkpoint::{Checkpoints, Position};
use coordinator::drive::{Run, Schedule, drive};
use coordinator::{Failure, Options, Session};
use examples::bert::architecture::Architecture;
use examples::bert::dropping::{Dropping, KeepBy, Specials};
use examples::bert::hf::{self, Export};
use examples::bert::model::{Model, Text};
use examples::bert::program::Pretraining;
use examples::bert::sharing::{Groups, Shared};
use mesh::array::Array;
use mesh::dim::{DType, Name, dim};
use mesh::graph::{Graph, Tensor};
use mesh::layout::{Layout, Section};
use mesh::nn::{self, BatchNorm, Dense, Kernel, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::ProgramPlan;
use mesh::program::{Program, ProgramBuilder};
use mesh::region::Region;
use ndarray::ArrayD;
use std::error::Error;
use std::path::Path;
use worker::data::nifti;

type Done = Result<(), Box<dyn Error>>;

/// Whether Rust of a page stands in this file, spaces and comments apart; there may be more where it has an empty line, or
/// one of `...`.
///
/// # Errors
/// What does not.
pub fn compiled(block: &str) -> Result<(), String> {
    let here = tokens(include_str!("code.rs"));
    let mut rest = here.as_str();
    for part in block.replace("\n...\n", "\n\n").split("\n\n") {
        let part_tokens = tokens(part);
        let at = rest.find(&part_tokens).ok_or_else(|| format!("examples/tests/book/code.rs does not have\n{part}"))?;
        rest = &rest[at + part_tokens.len()..];
    }
    Ok(())
}

/// Rust without comments, spaces, and commas that end a list.
fn tokens(rust: &str) -> String {
    let code: String = rust.lines().map(|l| l.split_once("//").map_or(l, |(code, _)| code)).collect();
    let code: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    [",)", ",]", ",}"].iter().fold(code, |code, end| code.replace(end, &end[1..]))
}

fn zeros(shape: &[usize]) -> Array {
    Array::F32(ArrayD::zeros(shape.to_vec()))
}

// README.md

const SPACE: [&str; 3] = ["x", "y", "z"];

fn block(x: &Tensor, name: &str, channels: usize, mode: Mode) -> Tensor {
    x.graph().scoped(name, || {
        let mut x = x.clone();
        for i in 0..2 {
            let kernel = Kernel::new(&["x", "y", "z"], 3).unbiased().from_channel("channel");
            x = nn::conv(&x, &format!("conv.{i}"), &kernel, &dim("channel", channels));
            x = nn::batch_norm(&x, &format!("norm.{i}"), "channel", &BatchNorm::default(), mode);
            x = nn::dropout(&nn::leaky_relu(&x, 0.1), 0.8, mode);
        }
        x
    })
}

fn unet(g: &Graph, mut x: Tensor, labels: Tensor) {
    let (base, classes, mode) = (4, 3, Mode::Train);
    let loss = |logits: &Tensor, labels: &Tensor| nn::cross_entropy(logits, labels, "class").mean_all();
    let mut skips = Vec::new();
    for level in 0..4 {
        x = block(&x, &format!("encoder.{level}"), base << level, mode);
        if level < 3 {
            skips.push(x.clone());
            x = x.max_pool(&["x", "y", "z"].map(|d| Window::same(d, x.dim(d).size, 2, 2, 1)));
        }
    }
    for (level, skip) in skips.iter().enumerate().rev() {
        let double = Kernel::new(&["x", "y", "z"], 2).stride(2).unbiased().to(&SPACE.map(|d| skip.dim(d).size));
        let up = nn::conv_transpose(&x, &format!("up.{level}"), &double, &dim("channel", base << level));
        x = block(&Tensor::concat(&[&up, skip], "channel"), &format!("decoder.{level}"), base << level, mode);
    }
    let logits =
        nn::conv(&x, "head", &Kernel::new(&["x", "y", "z"], 1).from_channel("channel"), &dim("class", classes));
    let update = Optimizer::adam(0.003).apply(g, &loss(&logits, &labels));
    update.output(g);
}

#[test]
fn the_unet_of_the_readme_trains() -> Done {
    let space = SPACE.map(|d| dim(d, 16));
    let [image, labels] =
        [[&[dim("batch", 1)], &space[..], &[dim("channel", 1)]].concat(), [&[dim("batch", 1)], &space[..]].concat()];
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        unet(g, g.input("image", DType::F32, &image), g.input("labels", DType::I32, &labels));
    })?;
    let options = Options { mesh: "x=2,y=2".parse()?, layout: "x:x,y:y".parse()?, ..Options::default() };
    let mut session = Session::embedded(p.finish()?, &options)?;
    let image = ArrayD::from_shape_fn(vec![1, 16, 16, 16, 1], |at| (at[1] * at[2] % 7) as f32);
    let labels = ArrayD::from_shape_fn(vec![1, 16, 16, 16], |at| (at[1] / 6) as i32);
    let feeds = [("image", &image.into()), ("labels", &Array::I32(labels))];
    let out = session.run("train", 0, &feeds)?;
    assert!(out.iter().all(|(_, a)| a.to_f32().is_some_and(f32::is_finite)), "{out:?}");
    Ok(())
}

// docs/concepts.md

#[test]
#[rustfmt::skip]
fn four_devices_own_what_the_book_says() -> Done {
let mut p = ProgramBuilder::new();
p.function("layer", |g| {
    let x = g.input("x", DType::F32, &[dim("batch", 8), dim("d_in", 64)]);
    let y = nn::dense(&x, "up", &["d_in"], &[dim("d_ff", 128)], &Dense::default());
    g.output("y", &y);
    g.output("mean", &y.mean_all());
})?;
let program = p.finish()?;
let options = Options { mesh: "data=2,model=2".parse()?, layout: "batch:data, d_ff:model".parse()?, ..Options::default() };
let plan = options.plan(&program)?;
for (device, plan) in plan.functions[&Name::from("layer")].iter().enumerate() {
    println!("device {device}: x {}, y {}", plan.inputs[0].1.region, plan.outputs[0].1.region);
}
    let page = include_str!("../../../docs/concepts.md");
    for (device, plan) in plan.functions[&Name::from("layer")].iter().enumerate() {
        let line = format!("device {device}: x {}, y {}\n", plan.inputs[0].1.region, plan.outputs[0].1.region);
        assert!(page.contains(&line), "the page does not have {line}");
    }
    // What is said of the moves.
    let sends = |layout: &str| -> Result<Vec<String>, Box<dyn Error>> {
        let plan = Options { layout: layout.parse()?, ..options.clone() }.plan(&program)?;
        let steps = plan.functions[&Name::from("layer")][0].steps.iter();
        Ok(steps.filter(|s| s.class() == "all-reduce").map(|s| s.extent()).collect())
    };
    assert_eq!(sends("batch:data, d_ff:model")?.len(), 1);
    assert_eq!(sends("d_in:model")?, [format!("{} bytes", 8 * 128 * 4)]);
    Ok(())
}

// docs/layouts.md

#[test]
fn the_layout_in_rust_is_the_one_in_toml() -> Done {
    let layout = Layout::default()
        .with("batch:data, d_ff:model")?
        .section(Section::Slots, "*:data")?
        .scope("layer.*/**", "seq:model?")?;
    assert_eq!(layout.to_string(), "batch:data,d_ff:model,slots{*:data},layer.*/**{seq:model?}");
    Ok(())
}

// docs/model-programs.md

#[rustfmt::skip]
fn small_program() -> Result<Program, Box<dyn Error>> {
use mesh::{dim::{DType, dim}, nn::{self, Dense}, optim::Optimizer, program::ProgramBuilder};

let mut p = ProgramBuilder::new();
p.function("train", |g| {
    let x = g.input("x", DType::F32, &[dim("batch", 32), dim("d_in", 64)]);
    let labels = g.input("labels", DType::I32, &[dim("batch", 32)]);
    let hidden = nn::dense(&x, "up", &["d_in"], &[dim("d_ff", 256)], &Dense::default()).relu();
    let logits = nn::dense(&hidden, "head", &["d_ff"], &[dim("class", 10)], &Dense::default());
    let loss = nn::cross_entropy(&logits, &labels, "class").mean_all();
    Optimizer::adam(1e-3).apply(g, &loss);
    g.output("loss", &loss);
})?;
let program = p.finish()?;
Ok(program)
}

#[rustfmt::skip]
fn run(program: Program, x: Array, labels: Array) -> Result<Array, Box<dyn Error>> {
use coordinator::{Options, Session};

let options = Options { mesh: "data=2,model=2".parse()?, layout: "batch:data,d_ff:model".parse()?, ..Options::default() };
let mut session = Session::embedded(program, &options)?;       // or Session::connect("http://host:7070", ..)
let train = session.function("train")?;
for step in 0..1000 {
    session.feed(train, "x", &x)?;
    session.feed(train, "labels", &labels)?;
    session.step(train, step)?;
}
println!("{:?}", session.fetch(train, "loss")?.to_f32());
Ok(session.fetch(train, "loss")?)
}

#[test]
fn the_first_program_learns_its_labels() -> Done {
    let x = ArrayD::from_shape_fn(vec![32, 64], |at| if at[0] % 10 == at[1] { 1.0 } else { 0.0 });
    let labels = ArrayD::from_shape_fn(vec![32], |at| (at[0] % 10) as i32);
    let loss = run(small_program()?, Array::F32(x), Array::I32(labels))?.to_f32();
    assert!(loss.is_some_and(|loss| loss < 0.01), "{loss:?}");
    Ok(())
}

struct Scan {
    volume: nifti::Volume,
}

impl Source for Scan {
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn shape(&self) -> Vec<usize> {
        self.volume.shape().to_vec()
    }
    fn part(&self, at: &Region) -> Result<Array, Box<dyn Error + Send + Sync>> {
        // at: [x:0..32, y:64..128, z:0..64]
        let block = ["x", "y", "z"].map(|dim| at.get(dim).cloned().unwrap_or_default());
        Ok(self.volume.read(&block)?.into())
    }
}

#[test]
fn a_volume_is_fed_by_region() -> Done {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| g.output("sum", &g.input("image", DType::F32, &SPACE.map(|d| dim(d, 24))).sum_all()))?;
    let options = Options { mesh: "x=2,y=2".parse()?, layout: "x:x,y:y".parse()?, ..Options::default() };
    let mut session = Session::embedded(p.finish()?, &options)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("scan.nii");
    let options = ::nifti::writer::WriterOptions::new(&file);
    options.write_nifti(&ndarray::Array3::<f32>::ones([24, 24, 24]))?;
    let scan = Scan { volume: nifti::Volume::open(&file)? };
    let train = session.function("train")?;

    session.feed(train, "image", &scan)?;

    session.step(train, 0)?;
    assert_eq!(session.fetch(train, "sum")?.to_f32(), Some(24f32.powi(3)));
    Ok(())
}

/// A layer whose weights are those of the first one while they are shared.
fn two_layers(g: &Graph, shared: bool) {
    let x = g.input("x", DType::F32, &[dim("batch", 4), dim("d", 8)]);
    let layers = || {
        (0..2).fold(x.clone(), |x, i| {
            let y = nn::dense(&x, &format!("layer.{i}"), &["d"], &[dim("d_out", 8)], &Dense::default());
            y.rename("d_out", "d")
        })
    };
    let y = if shared { g.renamed(shared_name, layers) } else { layers() };
    Optimizer::adam(0.01).apply(g, &y.square().mean_all());
}

fn shared_name(path: &str) -> String {
    path.replace("layer.1", "layer.0")
}

#[test]
fn a_program_goes_from_stage_to_stage() -> Done {
    let mut p = ProgramBuilder::new();
    p.function("train.shared", |g| two_layers(g, true))?;
    p.function("train", |g| two_layers(g, false))?;

    p.stage("shared", &["train.shared"])?; // a session begins in the first stage
    p.stage("own", &["train"])?;
    p.copies("unshare", "train", |path| Some(shared_name(path)))?; // sets each variable, slots too, from another one

    let mut session = Session::embedded(p.finish()?, &Options::default())?;
    session.run("train.shared", 0, &[("x", &zeros(&[4, 8]))])?;

    session.enter("own", Some("unshare"))?; // between two steps

    assert_eq!(session.variable("layer.0/kernel")?, session.variable("layer.1/kernel")?);
    assert_eq!(session.stage(), "own");
    Ok(())
}

#[test]
fn a_loss_is_scaled() -> Done {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("x", DType::F32, &[dim("batch", 4), dim("d", 8)]);
        let half = x.cast(DType::F16);
        let y = nn::dense(&half, "layer", &["d"], &[dim("d_out", 8)], &Dense::default());
        let loss = y.cast(DType::F32).square().mean_all();

        let update = Optimizer::adam(1e-3).clipped(1.0).scaled().apply(g, &loss);
        update.output(g); // grad_norm, loss_scale, skipped_steps
    })?;
    let mut session = Session::embedded(p.finish()?, &Options::default())?;
    let out = session.run("train", 0, &[("x", &zeros(&[4, 8]))])?;
    let names: Vec<&str> = out.iter().map(|(name, _)| &**name).collect();
    assert!(["grad_norm", "loss_scale", "skipped_steps"].iter().all(|n| names.contains(n)), "{names:?}");
    Ok(())
}

fn network(p: &mut ProgramBuilder) -> Result<(), mesh::error::Error> {
    p.function("train", |g| {
        let x = g.input("x", DType::F32, &[dim("batch", 4096), dim("d", 64)]);
        let y = (0..4).fold(x, |x, i| {
            g.block(&format!("layer.{i}"), || {
                let wide = nn::dense(&x, &format!("up.{i}"), &["d"], &[dim("d_ff", 512)], &Dense::default()).tanh();
                nn::dense(&wide, &format!("down.{i}"), &["d_ff"], &[dim("d", 64)], &Dense::default())
            })
        });
        Optimizer::sgd(0.01).apply(g, &y.square().mean_all());
    })
}

#[rustfmt::skip]
fn choose(options: &Options, budget: usize) -> Result<mesh::plan::recompute::Chosen, mesh::error::Error> {
use mesh::plan::recompute::Choice;

let build = |blocks: &[Name]| { let mut p = ProgramBuilder::recomputing(blocks); network(&mut p)?; p.finish() };
let plan = |program: &Program| Ok(vec![options.plan(program)?]);              // options without a limit of memory
let chosen = Choice { build: &build, plan: &plan }.within(budget)?;           // chosen.program, .blocks, .peak, .more()
Ok(chosen)
}

#[test]
fn blocks_are_chosen_for_a_budget() -> Done {
    let options = Options::default();
    let plain = choose(&options, 2 << 30)?;
    assert!(plain.blocks.is_empty());
    let tight = choose(&options, plain.peak[0] - (4 << 20))?;
    assert!(!tight.blocks.is_empty() && tight.peak[0] <= plain.peak[0] - (4 << 20), "{:?}", tight.blocks);
    let _: fn(&Options, &Program) -> Result<ProgramPlan, mesh::error::Error> = Options::plan;
    Ok(())
}

// docs/recovery.md

/// What a run steps with.
struct Training {
    train: coordinator::session::FunctionId,
    losses: Vec<f32>,
}

impl Training {
    fn image(&self, samples: u64) -> Array {
        Array::F32(ArrayD::from_elem(vec![4, 8], samples as f32))
    }
    fn log(&mut self, _: u32, loss: Array) -> Result<(), Failure> {
        self.losses.extend(loss.to_f32());
        Ok(())
    }
}

#[rustfmt::skip]
impl Run for Training {
    type Error = Failure;
    fn step(&mut self, session: &mut Session, at: &mut Position) -> Result<(), Failure> {
        session.feed(self.train, "image", &self.image(at.samples))?;
        session.step(self.train, at.step)?;
        at.samples += 1;
        self.log(at.step, session.fetch(self.train, "loss")?)
    }
    fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }
}

#[rustfmt::skip]
fn driven(mut session: Session, mut training: Training) -> Result<Training, Failure> {
let mut at = session.restore()?.map_or(Position::default(), |r| r.position);
let end = drive(&mut session, &mut training, &mut at, &Schedule { steps: 1000, checkpoint_every: 50 })?;
    assert_eq!((end, at.samples), (coordinator::drive::End::Done, 1000));
    Ok(training)
}

#[test]
fn a_run_is_driven_to_its_end() -> Done {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let x = g.input("image", DType::F32, &[dim("batch", 4), dim("d", 8)]);
        let loss = nn::dense(&x, "layer", &["d"], &[dim("d_out", 8)], &Dense::default()).square().mean_all();
        Optimizer::adam(0.01).apply(g, &loss);
        g.output("loss", &loss);
    })?;
    let folder = tempfile::tempdir()?;
    let checkpoints = Some(Checkpoints { location: folder.path().display().to_string(), keep: 2 });
    let session = Session::embedded(p.finish()?, &Options { checkpoints, ..Options::default() })?;
    let train = session.function("train")?;
    assert_eq!(driven(session, Training { train, losses: vec![] })?.losses.len(), 1000);
    assert!(folder.path().read_dir()?.next().is_some());
    Ok(())
}

// docs/bert.md

const BATCH: usize = 2;
const SEQ: usize = 8;

fn tiny() -> Architecture {
    Architecture {
        vocab_size: 128,
        hidden_size: 32,
        num_hidden_layers: 4,
        num_attention_heads: 2,
        intermediate_size: 32,
        max_position_embeddings: 32,
        ..Architecture::default()
    }
}

#[rustfmt::skip]
fn dropping_losses(g: &Graph, architecture: &Architecture) -> Tensor {
    let vocab = architecture.vocab_size;
    let dropping = Dropping { keep: SEQ / 2, by: KeepBy::Importance, specials: Specials::default() };
    let text = Text::feeds(g, &dim("batch", BATCH), SEQ);
    let model = Model { architecture, mode: Mode::Train, dtype: DType::F32 };
let routing = dropping.routing(&text.tokens, vocab);            // by the importance of each token's word
let x = model.encoder(&text, Some(&routing));                   // Routing::split before the middle, merge before the last
    let words = [dim("batch", BATCH), dim("prediction", 3)];
    let [positions, targets] = ["positions", "targets"].map(|n| g.input(n, DType::I32, &words));
    let weights = g.input("weights", DType::F32, &words);
    let losses = nn::cross_entropy(&model.words_at(&x, &positions), &targets, "vocab");
dropping.follow(&losses, &targets, &weights, vocab);            // importance: 0.995 old + 0.005 mean loss of the word
    nn::weighted_mean(&losses, &weights)
}

struct Sharing(Architecture);

impl Sharing {
    fn losses(&self, g: &Graph, mode: Mode) -> Tensor {
        let text = Text::feeds(g, &dim("batch", BATCH), SEQ);
        let model = Model { architecture: &self.0, mode, dtype: DType::F32 };
        model.encoder(&text, None).square().mean_all()
    }

    #[rustfmt::skip]
    fn training(&self, g: &Graph, groups: Groups) {
        let loss =
g.renamed(move |path| groups.path(path), || self.losses(g, Mode::Train));   // layers use one group's variables
        Optimizer::adam(1e-3).apply(g, &loss);
    }
}

#[test]
fn tokens_are_dropped() -> Done {
    let (mut p, architecture) = (ProgramBuilder::new(), tiny());
    p.function("train", |g| _ = Optimizer::adam(1e-3).apply(g, &dropping_losses(g, &architecture)))?;
    let session = Session::embedded(p.finish()?, &Options::default())?;
    assert!(session.variable("importance")?.as_f32().is_some_and(|i| i.iter().all(|i| *i == 10.0)));
    Ok(())
}

#[test]
fn layers_share_and_then_have_their_own() -> Done {
    let of = |groups| Groups { layers: 4, groups, shared: Shared::Layer };
    let (mut p, sharing, before, groups) = (ProgramBuilder::new(), Sharing(tiny()), of(1), of(4));
    p.function("train.0", |g| sharing.training(g, before))?;
    p.function("train", |g| sharing.training(g, groups))?;
    p.stage("groups-1", &["train.0"])?;
    p.stage("layers", &["train"])?;

    p.copies("unshare", "train", |path| Some(groups.origin(path, &before)))?; // each gets its own, slots too

    let mut session = Session::embedded(p.finish()?, &Options::default())?;

    session.enter("layers", Some("unshare"))?; // between two steps, on the devices

    let [first, last] = [0, 3].map(|i| session.variable(&format!("encoder/layer.{i}/up/kernel")));
    assert_eq!(first?, last?);
    Ok(())
}

// docs/huggingface.md

#[rustfmt::skip]
fn come_and_go(folder: &Path, out: &Path, sizes: [usize; 3], optimizer: Optimizer, options: Options) -> Done {
let model = hf::Model::open(folder)?;                        // reads heads of files, no weights
let program = Pretraining::plain(model.config.architecture.clone(), sizes, optimizer).program()?;
let fit = model.check(&program, true)?;                      // every tensor that does not fit, by name
let mut session = Session::embedded(program, &options)?;     // any mesh, any layout
model.load(&mut session, &fit, |done, all| eprintln!("{done} of {all}"))?;
let export = Export { config: &model.config, vocabulary: &[], classes: &[], shard_bytes: None, path: &|p| p.into() };
hf::export(&session, out, &export)?;
Ok(())
}

#[test]
fn a_model_comes_and_goes() -> Done {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-bert");
    let place = tempfile::tempdir()?;
    let options = Options { mesh: "data=2".parse()?, layout: "batch:data".parse()?, ..Options::default() };
    come_and_go(&folder, &place.path().join("out"), [4, 12, 3], Optimizer::adam(1e-3), options)?;
    assert!(place.path().join("out/model.safetensors").exists());
    Ok(())
}
