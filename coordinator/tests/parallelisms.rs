//! Every parallelism, alone and with others: the same bits as on one device, the memory that was predicted, and as many
//! collectives as its closed form says.

mod common;

use common::run::options;
use common::{f32s, i32s};
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, dim};
use mesh::graph::{Graph, Node, Role, Tensor};
use mesh::nn::{self, Attention, BatchNorm, Dense, Kernel, Mixture, Mode};
use mesh::ops::window::Window;
use mesh::optim::Optimizer;
use mesh::plan::{DevicePlan, Step, Work};
use mesh::program::{Program, ProgramBuilder};
use std::collections::{BTreeMap, BTreeSet};

/// Steps of training.
const STEPS: u32 = 10;
/// Layers of the transformer, and of the mixtures of experts.
const LAYERS: usize = 2;
/// Parts of a step, where it is made in parts or in micro-batches.
const PARTS: usize = 2;
/// Batch norms of the UNet.
const NORMS: usize = 3;

/// A program, what it is fed, and the functions that make a step of it.
struct Model {
    program: Program,
    feeds: Vec<Feed>,
    step: Vec<&'static str>,
}

/// What an input in a scope is fed.
struct Feed {
    name: &'static str,
    scope: &'static str,
    dims: Vec<Dim>,
    data: Array,
}

impl Feed {
    fn new(name: &'static str, (dims, data): (Vec<Dim>, Array)) -> Feed {
        Feed { name, scope: "", dims, data }
    }
    fn input(&self, g: &Graph) -> Tensor {
        g.scoped_at(self.scope, || g.input(self.name, self.data.dtype(), &self.dims))
    }
}

fn words(seq: usize) -> [Dim; 2] {
    [dim("batch", 4), dim("seq", seq)]
}

fn d_model() -> Dim {
    dim("d_model", 64)
}

fn feed_forward(x: &Tensor, each: &[&str]) -> Tensor {
    let options = || each.iter().fold(Dense::default(), |dense, dim| dense.each(*dim));
    let wide = nn::gelu(&nn::dense(x, "up", &["d_model"], &[dim("d_ff", 128)], &options()));
    nn::dense(&wide, "down", &["d_ff"], &[d_model()], &options())
}

fn attention(keep: f32) -> Attention {
    Attention { heads: dim("heads", 4), head: dim("d_head", 32), init: nn::init::glorot_uniform(64, 64), keep }
}

/// The loss of a small BERT.
fn encoder(g: &Graph, tokens: &Tensor, labels: &Tensor) -> Tensor {
    let words = tokens.ty().dims;
    let start = || nn::init::glorot_uniform(64, 64);
    let table = |name: &str, rows: Dim| nn::embedding(g, name, &rows, &[d_model()], start());
    let x = g.scoped("words", || {
        table("word", dim("vocab", 128)).gather(tokens, "vocab").add(&table("position", words[1].clone()))
    });
    let mask = g.scalar(0.0).broadcast(&words);
    let x = (0..LAYERS).fold(x, |x, i| {
        let options = attention(0.9);
        g.scoped(format!("layer.{i}"), || {
            let seen = nn::attention(&x, &x, &mask, "attention", ["seq", "d_model"], &options, Mode::Train);
            let x = nn::layer_norm(&x.add(&seen), "attention_norm", &["d_model"], 1e-6);
            let y = nn::dropout(&feed_forward(&x, &[]), 0.9, Mode::Train);
            nn::layer_norm(&x.add(&y), "norm", &["d_model"], 1e-6)
        })
    });
    let logits = nn::dense(&x, "decoder", &["d_model"], &[dim("vocab", 128)], &Dense::default());
    nn::cross_entropy(&logits, labels, "vocab").mean_all()
}

fn words_fed(seq: usize) -> Vec<Feed> {
    let tokens = Feed { scope: "words", ..Feed::new("tokens", i32s(&words(seq), 1, 128)) };
    vec![tokens, Feed::new("labels", i32s(&words(seq), 2, 128))]
}

/// A model whose function `step` takes a step of Adam, of all that it is fed or in micro-batches of it; `loss` gives the loss
/// of one.
fn trained(feeds: Vec<Feed>, parts: usize, loss: impl Fn(&Graph, &[Tensor], usize) -> Tensor) -> Model {
    let program = common::stepping(|g| {
        let inputs: Vec<Tensor> = feeds.iter().map(|feed| feed.input(g)).collect();
        let of = |part: usize| {
            let both = feeds.iter().zip(&inputs);
            let taken = both.map(|(f, x)| g.scoped_at(f.scope, || x.micro_batch("batch", part, parts)));
            loss(g, &taken.collect::<Vec<_>>(), part)
        };
        let (loss, _) = Optimizer::adam(0.01).apply_in_parts(g, parts, of);
        g.output("loss", &loss);
    });
    Model { program, feeds, step: vec!["step"] }
}

fn transformer(parts: usize) -> Model {
    trained(words_fed(32), parts, |g, x, _| encoder(g, &x[0], &x[1]))
}

fn long_transformer(seq: usize) -> Model {
    trained(words_fed(seq), 1, |g, x, _| encoder(g, &x[0], &x[1]))
}

/// The same with the gradients of several parts of a step added up.
fn transformer_in_parts() -> Model {
    let (mut p, optimizer) = (ProgramBuilder::new(), Optimizer::adam(0.01));
    let feeds = words_fed(32);
    let variables = p
        .function("part", |g| {
            let loss = encoder(g, &feeds[0].input(g), &feeds[1].input(g));
            g.output("loss", &loss);
            optimizer.accumulate(g, &loss, PARTS as u32)
        })
        .unwrap();
    p.function("update", |g| optimizer.apply_accumulated(g, &variables).output(g)).unwrap();
    let step = [vec!["part"; PARTS], vec!["update"]].concat();
    Model { program: p.finish().unwrap(), feeds, step }
}

/// Layers of experts, each of two choices; the loss counts how unevenly they are used.
fn experts(parts: usize) -> Model {
    let x = [dim("batch", 8), dim("seq", 16), d_model()];
    trained(
        vec![Feed { scope: "layer.0", ..Feed::new("x", f32s(&x, 1)) }, Feed::new("wanted", f32s(&x, 2))],
        parts,
        |g, inputs, part| {
            let start = || nn::init::glorot_uniform(64, 8);
            let mut uneven = g.scalar(0.0);
            let y = (0..LAYERS).fold(inputs[0].clone(), |x, i| {
                let options = Mixture { experts: dim("experts", 8), choices: 2, capacity: 1.25, init: start() };
                g.scoped(format!("layer.{i}"), || {
                    let unit = nn::layer_norm(&x, "norm", &["d_model"], 1e-6);
                    let expert = |x: &Tensor| feed_forward(x, &["experts"]);
                    let mixed = nn::mixture(&unit, "mixture", ["seq", "d_model"], &options, expert);
                    uneven = uneven.add(&mixed.balance);
                    g.output(format!("dropped.{i}.{part}"), &mixed.dropped);
                    x.add(&mixed.y)
                })
            });
            y.sub(&inputs[1]).square().mean_all().add(&uneven.mul_scalar(0.01))
        },
    )
}

/// Two levels of a UNet over three dimensions.
fn unet(parts: usize) -> Model {
    let volume = [dim("batch", 2), dim("x", 16), dim("y", 12), dim("z", 8), dim("channel", 2)];
    let labels = &volume[..4];
    let space = ["x", "y", "z"];
    let feeds =
        vec![Feed { scope: "top", ..Feed::new("image", f32s(&volume, 1)) }, Feed::new("labels", i32s(labels, 2, 3))];
    trained(feeds, parts, |_, inputs, _| {
        let (x, labels) = (&inputs[0], &inputs[1]);
        let g = x.graph();
        let block = |x: &Tensor, name: &str, channels: usize| {
            g.scoped(name, || {
                let y = nn::conv(x, "conv", &Kernel::new(&space, 3), &dim("channel", channels));
                nn::leaky_relu(&nn::batch_norm(&y, "norm", "channel", &BatchNorm::default(), Mode::Train), 0.1)
            })
        };
        let top = block(x, "top", 8);
        let halves = [("x", 16), ("y", 12), ("z", 8)].map(|(n, size)| Window::same(n, size, 2, 2, 1));
        let bottom = block(&top.max_pool(&halves), "bottom", 128);
        let up = nn::conv_transpose(&bottom, "up", &Kernel::new(&space, 2).stride(2), &dim("channel", 8));
        let joined = block(&Tensor::concat(&[&top, &up], "channel"), "joined", 8);
        let logits = nn::dense(&joined, "head", &["channel"], &[dim("class", 3)], &Dense::default());
        nn::cross_entropy(&logits, labels, "class").mean_all()
    })
}

/// The models by name, as rows and the book call them.
const MODELS: [(&str, fn() -> Model); 9] = [
    ("transformer", || transformer(1)),
    ("long transformer", || long_transformer(64)),
    ("longest transformer", || long_transformer(128)),
    ("transformer in parts", transformer_in_parts),
    ("experts", || experts(1)),
    ("unet", || unet(1)),
    ("transformer in micro-batches", || transformer(PARTS)),
    ("experts in micro-batches", || experts(PARTS)),
    ("unet in micro-batches", || unet(PARTS)),
];

/// Collectives by kind.
type Counts = BTreeMap<String, usize>;

/// The steps of the first device that send something, with their nodes.
fn sending<'a>(session: &'a Session, function: &str) -> impl Iterator<Item = (&'a Step, &'a Node)> {
    let kinds = ["all-reduce", "reduce-scatter", "all-gather", "all-to-all", "halo", "permute", "send"];
    let steps = session.plan().functions[&Name::from(function)][0].steps.iter();
    let nodes = &session.program().functions[&Name::from(function)].nodes;
    steps.filter(move |s| kinds.contains(&&*s.label.op)).map(|s| (s, &nodes[s.label.node.index()]))
}

/// What a step sends.
fn counts(model: &Model, session: &Session) -> Counts {
    let mut counts = Counts::new();
    for (step, _) in model.step.iter().flat_map(|function| sending(session, function)) {
        *counts.entry(step.label.op.to_string()).or_default() += 1;
    }
    counts
}

/// What a closed form says: `all-reduce 1 + V; all-gather V - 4 L`.
fn promised(closed_form: &str, letter: impl Fn(&str) -> i64) -> Counts {
    let factor = |f: &str| f.parse().unwrap_or_else(|_| letter(f));
    let value = |sum: &str| -> i64 {
        let sum = sum.replace("- ", "+ -1 ");
        sum.split('+').map(|term| term.split_whitespace().map(factor).product::<i64>()).sum()
    };
    let count = |part: &str| {
        let (kind, sum) = part.trim().split_once(' ').unwrap();
        (kind.to_string(), usize::try_from(value(sum)).unwrap())
    };
    closed_form.split(';').map(count).collect()
}

/// The number that a letter of a closed form stands for.
fn letter(model: &Model, letter: &str) -> i64 {
    let number = match letter {
        "V" => model.program.variables.iter().filter(|v| v.trainable).count(),
        "L" => LAYERS,
        "P" => PARTS,
        "N" => NORMS,
        _ => panic!("no closed form has a letter {letter}"),
    };
    number as i64
}

/// All results of every step and all variables at the end.
type Seen = Vec<(Name, Vec<u8>)>;

/// Trains on a mesh.
fn train(model: &Model, mesh: &str, layout: &str) -> (Seen, Session) {
    let opened = Session::embedded(model.program.clone(), &options(mesh, layout));
    let mut session = opened.unwrap_or_else(|e| panic!("{mesh} with {layout}: {e}"));
    let feeds: Vec<(&str, &Array)> = model.feeds.iter().map(|f| (f.name, &f.data)).collect();
    let mut seen = vec![];
    for step in 0..STEPS {
        for function in &model.step {
            let fed = if *function == "update" { &[][..] } else { &feeds[..] };
            let results = session.run(function, step, fed).unwrap();
            seen.extend(results.into_iter().map(|(n, a)| (format!("{n} of step {step}").into(), a.to_bytes())));
        }
    }
    for v in &model.program.variables {
        seen.push((v.name.clone(), session.variable(&v.name).unwrap().to_bytes()));
    }
    (seen, session)
}

/// Parallelisms, alone and together: name, model, mesh, layout, and the collectives of a step where there is a closed form,
/// of the number of trained variables `V`, of layers `L`, of parts `P` and of batch norms `N`.
const TABLE: &str = "
data                           | transformer                  | data=4                  | batch:data                                                                                                | all-reduce 1 + V
ZeRO-1                         | transformer                  | data=2                  | batch:data, slots{ *:data }                                                                               | all-reduce 1; reduce-scatter V; all-gather V
ZeRO-2                         | transformer                  | data=2                  | batch:data, slots{ *:data }, gradients{ *:data }                                                          | all-reduce 1; reduce-scatter V; all-gather V
ZeRO-3                         | transformer                  | data=2                  | batch:data, slots{ *:data }, gradients{ *:data }, variables{ *:data }                                     | all-reduce 1; reduce-scatter V; all-gather V + 7 L
tensor                         | transformer                  | model=4                 | heads:model, d_ff:model                                                                                   | all-reduce 4 L
sequence                       | transformer                  | model=4                 | heads:model, d_ff:model, seq:model?                                                                       | all-gather 4 L + 2; reduce-scatter 4 L; all-reduce 4 + 6 L
context                        | long transformer             | sp=2                    | seq:sp, memory_seq:sp?                                                                                    | all-gather 4 L + 1; reduce-scatter 2 L; all-reduce V
ring                           | long transformer             | sp=2                    | seq:sp, memory_seq:ring(sp)                                                                               | permute 10 L; all-gather 1; all-reduce V
Ulysses                        | long transformer             | sp=4                    | seq:sp, **/attention{ seq:none, heads:sp }                                                                | all-to-all 8 L; all-gather 1 + 9 L; all-reduce V - 7 L
experts                        | experts                      | data=4                  | batch:data?, experts:data                                                                                 | all-to-all 6 L; all-reduce 1 + 5 L
experts in groups              | experts                      | data=2,model=2          | batch:data+model, **/experts/**{ batch:data, experts:model }                                              | all-to-all 6 L; all-reduce 1 + 9 L
spatial                        | unet                         | x=4                     | x:x                                                                                                       | halo 5; all-reduce 1 + V + 2 N
spatial 2-D                    | unet                         | x=2,y=2                 | x:x, y:y                                                                                                  | halo 5; all-reduce 1 + V + 2 N
spatial 3-D                    | unet                         | x=2,y=2,z=2             | x:x, y:y, z:z                                                                                             | halo 5; all-reduce 1 + V + 2 N
parts                          | transformer in parts         | data=4                  | batch:data                                                                                                | all-reduce P + P V
data, tensor                   | transformer                  | data=2,model=2          | batch:data, heads:model, d_ff:model                                                                       | all-reduce 1 + V + 4 L
data, tensor, ZeRO-1           | transformer                  | data=2,model=2          | batch:data, heads:model, d_ff:model, slots{ *:data }                                                      | all-reduce 1 + 8 L; reduce-scatter V - 4 L; all-gather V - 4 L
data, tensor, ZeRO-3           | transformer                  | data=2,model=4          | batch:data, heads:model, d_ff:model, slots{ *:data }, gradients{ *:data }, variables{ *:data }            | all-reduce 1 + 8 L; reduce-scatter V - 4 L; all-gather V + 2 L + 2
data, tensor, words            | transformer                  | data=4,model=4          | batch:data, heads:model, d_ff:model, vocab:model                                                          | all-reduce 6 + V + 4 L
data, sequence                 | transformer                  | data=2,model=4          | batch:data, heads:model, d_ff:model, seq:model?                                                           | all-gather 4 L + 2; reduce-scatter 4 L; all-reduce 1 + V
data, context                  | long transformer             | data=2,sp=2             | batch:data, seq:sp, memory_seq:sp?                                                                        | all-gather 4 L + 1; reduce-scatter 2 L; all-reduce 1 + V
data, tensor, context          | long transformer             | data=2,sp=2,model=2     | batch:data, seq:sp, memory_seq:sp?, heads:model, d_ff:model                                               | all-gather 4 L + 1; reduce-scatter 2 L; all-reduce 1 + V + 4 L
data, ring                     | long transformer             | data=2,sp=2             | batch:data, seq:sp, memory_seq:ring(sp)                                                                   | permute 10 L; all-gather 1; all-reduce 1 + V
data, ring, uneven             | longest transformer          | data=2,sp=3             | batch:data, seq:sp, memory_seq:ring(sp)                                                                   |
data, tensor, ring             | long transformer             | data=2,sp=2,model=2     | batch:data, seq:sp, memory_seq:ring(sp), heads:model, d_ff:model                                          |
ring, of four                  | longest transformer          | sp=4                    | seq:sp, memory_seq:ring(sp)                                                                               | permute 30 L; all-gather 1; all-reduce V
data, Ulysses                  | long transformer             | data=2,sp=4             | batch:data, seq:sp, **/attention{ seq:none, heads:sp }                                                    | all-to-all 8 L; all-gather 1 + 9 L; all-reduce 1 + V
data, tensor, Ulysses          | long transformer             | data=4,sp=2,model=2     | batch:data, seq:sp, heads:model, d_ff:model, **/attention{ seq:none, heads:model+sp }                     |
parts, ZeRO-2                  | transformer in parts         | data=2                  | batch:data, slots{ *:data }, gradients{ *:data }                                                          | all-reduce P + V; reduce-scatter P V; all-gather V
parts, tensor                  | transformer in parts         | data=2,model=2          | batch:data, heads:model, d_ff:model                                                                       | all-reduce P + P V + 4 P L + 10 L
experts, tensor                | experts                      | data=2,model=2          | batch:data?, experts:data, d_ff:model                                                                     | all-to-all 6 L; all-reduce 1 + 7 L
experts, ZeRO-1                | experts                      | data=2                  | batch:data?, experts:data, slots{ *:data }                                                                | all-to-all 6 L; all-reduce 1 + 2 L; reduce-scatter 3 L; all-gather 3 L
experts in groups, tensor      | experts                      | data=2,model=4,tensor=2 | batch:data+model, d_ff:tensor, **/experts/**{ batch:data, experts:model }                                 | all-to-all 6 L; all-reduce 1 + 11 L
data, spatial                  | unet                         | data=2,x=3              | batch:data, x:x                                                                                           |
data, spatial 3-D              | unet                         | data=2,x=2,y=2,z=2      | batch:data, x:x, y:y, z:z                                                                                 | halo 5; all-reduce 1 + V + 2 N
spatial, channels              | unet                         | x=2,y=2                 | x:x, y:y, bottom/**{ x:none, y:none, channel:x+y? }                                                       |
spatial, ZeRO-3                | unet                         | x=2,y=2                 | x:x, y:y, slots{ *:x+y }, gradients{ *:x+y }, variables{ *:x+y }                                          |
spatial, one dimension         | unet                         | x=2,y=4                 | x:x+y                                                                                                     | halo 5; all-reduce 1 + V + 2 N
pipeline                       | transformer in micro-batches | pipe=2                  | @pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }                                                       | send 2 P + 2
pipeline, gpipe                | transformer in micro-batches | pipe=2                  | @pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, schedule:gpipe                                       | send 2 P + 2
pipeline, zero-bubble          | transformer in micro-batches | pipe=2                  | @pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, schedule:zero-bubble                                 | send 2 P + 2
pipeline, data                 | transformer in micro-batches | data=2,pipe=2           | batch:data, @pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }                                           | send 2 P + 2; all-reduce 18 P
pipeline, data, tensor, ZeRO-1 | transformer in micro-batches | data=2,pipe=2,model=2   | batch:data, heads:model, d_ff:model, @pipe:1, words/**{ @pipe:0 }, layer.0/**{ @pipe:0 }, slots{ *:data } | send 2 P + 2; all-reduce 8 P; reduce-scatter 14 P; all-gather 14
pipeline, experts              | experts in micro-batches     | pipe=2,data=2           | batch:data?, experts:data, @pipe:1, layer.0/**{ @pipe:0 }                                                 |
pipeline, skips, zero-bubble   | unet in micro-batches        | x=2,pipe=2              | x:x, @pipe:1, top/**{ @pipe:0 }, schedule:zero-bubble                                                     |
pipeline, skips                | unet in micro-batches        | pipe=2                  | @pipe:1, top/**{ @pipe:0 }                                                                                | send 2 P + 2
pipeline, there and back       | unet in micro-batches        | pipe=3                  | @pipe:0, bottom/**{ @pipe:1 }, up/**{ @pipe:2 }                                                           | send 4 P + 2
pipeline, spatial 2-D          | unet in micro-batches        | pipe=2,x=2,y=2          | x:x, y:y, @pipe:1, top/**{ @pipe:0 }                                                                      | send 2 P + 1; halo P; all-reduce 6 P
data, slots over all           | transformer                  | data=2,model=2          | batch:data, slots{ *:data+model }                                                                         |
";

/// A line of the table.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    model: &'static str,
    mesh: &'static str,
    layout: &'static str,
    closed_form: &'static str,
}

fn rows() -> impl Iterator<Item = Row> {
    TABLE.lines().filter(|line| !line.is_empty()).map(|line| {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let [name, model, mesh, layout, closed_form] = columns[..] else { panic!("{line}") };
        Row { name, model, mesh, layout, closed_form }
    })
}

#[test]
fn every_parallelism_has_the_bits_of_one_device_the_memory_foreseen_and_the_collectives_of_its_closed_form() {
    let mut others: Vec<String> = vec![];
    for (name, model) in MODELS {
        let model = model();
        let (whole, _) = train(&model, "1", "");
        for row in rows().filter(|row| row.model == name) {
            let (split, session) = train(&model, row.mesh, row.layout);
            for ((what, a), (_, b)) in whole.iter().zip(&split) {
                assert!(a == b, "{}: {what} is not what it is on one device", row.name);
            }
            for peak in session.peaks().unwrap() {
                assert_eq!(peak.peak_bytes_measured, peak.peak_bytes_predicted, "{}", row.name);
            }
            let sent = counts(&model, &session);
            if !row.closed_form.is_empty() {
                let promised = promised(row.closed_form, |l| letter(&model, l));
                others.extend((sent != promised).then(|| format!("{}: {sent:?}, not {promised:?}", row.name)));
            }
        }
    }
    assert!(others.is_empty(), "{}", others.join("\n"));
    assert!(rows().all(|row| MODELS.iter().any(|(name, _)| *name == row.model)), "every row has a model");
}

/// The blocks of the book's cookbook are rows of the table, as they stand there; and each parallelism alone has one.
#[test]
fn the_cookbook_says_what_is_run() {
    let book = include_str!("../../docs/layouts.md");
    let blocks = book.split("```layout\n").skip(1).map(|rest| rest.split_once("```").unwrap().0);
    let mut shown = BTreeSet::new();
    for block in blocks {
        let key = |key: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
            line.unwrap_or_default().trim()
        };
        let same = |row: &Row| (row.mesh, row.layout, row.closed_form) == (key("mesh"), key("layout"), key("sends"));
        let row = rows().find(same).unwrap_or_else(|| panic!("no row of the table is\n{block}"));
        shown.insert(row.name);
    }
    let alone = rows().map(|row| row.name).filter(|name| !name.contains(','));
    assert_eq!(alone.collect::<BTreeSet<_>>().difference(&shown).count(), 0, "only these are in the book: {shown:?}");
}

/// The all-reduces of the forward and of the backward pass of a layer with its input's gradient, on `model=2`.
fn all_reduces(layout: &str, layer: impl Fn(&Tensor) -> Tensor) -> [usize; 2] {
    let x = [dim("batch", 2), dim("seq", 16), d_model()];
    let p = common::stepping(|g| {
        let x = g.input("x", DType::F32, &x);
        let loss = layer(&x).square().mean_all();
        g.output("dx", &g.gradients(&loss, &[&x])[0]);
        Optimizer::sgd(0.1).apply(g, &loss);
    });
    let session = Session::embedded(p, &options("model=2", layout)).unwrap();
    assert!(sending(&session, "step").all(|(step, _)| *step.label.op == *"all-reduce"));
    [Role::Forward, Role::Backward].map(|role| sending(&session, "step").filter(|(_, node)| node.role == role).count())
}

/// Megatron (Shoeybi et al. 2019), figure 3 and 4.
#[test]
fn tensor_parallel_layers_send_one_all_reduce_forward_and_one_backward() {
    assert_eq!(all_reduces("d_ff:model", |x| feed_forward(x, &[])), [1, 1]);
    let heads = [dim("heads", 4), dim("d_head", 32)];
    let one_product = |x: &Tensor| {
        let sides = dim("side", 3);
        // The three sides are summed up together, not in parts.
        x.graph().grain("side", 3);
        let into = [vec![sides], heads.to_vec()].concat();
        let all = nn::dense(x, "sides", &["d_model"], &into, &Dense::default());
        let side = |i: usize| all.slice("side", i, i + 1).sum(&["side"]);
        let (q, k, v) = (side(0), side(1).rename("seq", "memory_seq"), side(2).rename("seq", "memory_seq"));
        let weights = nn::softmax(&q.contract(&k, &["d_head"]), &["memory_seq"]);
        nn::dense(
            &weights.contract(&v, &["memory_seq"]),
            "output",
            &["heads", "d_head"],
            &[d_model()],
            &Dense::default(),
        )
    };
    assert_eq!(all_reduces("heads:model", one_product), [1, 1]);
    // With a product each for queries, keys and values the sum backward is of all three.
    let three_products = |x: &Tensor| {
        let mask = x.graph().scalar(0.0).broadcast(&[x.dim("batch"), x.dim("seq")]);
        nn::attention(x, x, &mask, "attention", ["seq", "d_model"], &attention(0.9), Mode::Train)
    };
    assert_eq!(all_reduces("heads:model", three_products), [1, 1]);
}

/// GShard (Lepikhin et al. 2020): a layer sends the places of its experts four times, there and back in both passes, and
/// twice the weights of the places; never all tokens to a device.
#[test]
fn experts_are_sent_their_places_and_nothing_else() {
    let model = experts(1);
    let devices = 4;
    let session = Session::embedded(model.program.clone(), &options("data=4", "batch:data?, experts:data")).unwrap();
    let sent = |device: &DevicePlan| -> usize {
        let exchanges = device.steps.iter().filter_map(|s| match &s.work {
            Work::Exchange(exchange) => Some(exchange),
            _ => None,
        });
        exchanges.flat_map(|e| &e.sends).map(|m| m.bytes).sum()
    };
    let bytes: usize = session.plan().functions[&"step".into()].iter().map(sent).sum();
    // 8 experts, 8 groups, 16 · 2 / 8 · 1.25 places.
    let places = 8 * 8 * 5;
    let floats = LAYERS * (4 * places * d_model().size + 2 * places);
    // Of what a device has or gets a part is its own.
    assert_eq!(bytes, 4 * floats * (devices - 1) / devices);
}
