//! BERT and its two methods, as their papers have them, on every layout.

use coordinator::{Options, Session};
use examples::bert::architecture::Architecture;
use examples::bert::dropping::{Dropping, KeepBy, Specials};
use examples::bert::program::Pretraining;
use examples::bert::sharing::{Groups, Shared};
use mesh::array::Array;
use mesh::dim::{DType, Name, dim};
use mesh::nn::Mode;
use mesh::optim::{LossScale, Optimizer, Schedule};
use mesh::program::{Program, ProgramBuilder};
use mesh::rng::Stream;
use ndarray::{Array1, Array2};
use std::collections::BTreeMap;

const BATCH: usize = 4;
const SEQ: usize = 16;
const PREDICTIONS: usize = 3;
const VOCAB: usize = 128;

/// 4 layers, 3 heads: no mesh of 2 splits them evenly.
fn tiny() -> Architecture {
    Architecture {
        vocab_size: VOCAB,
        hidden_size: 96,
        num_hidden_layers: 4,
        num_attention_heads: 3,
        intermediate_size: 128,
        max_position_embeddings: 32,
        ..Architecture::default()
    }
}

fn adamw() -> Optimizer {
    let rate = Schedule::Polynomial { start: 2e-3, end: 0.0, power: 1.0, steps: 100 }.warmup(3);
    Optimizer::adamw(rate, 0.01).clipped(1.0)
}

fn plain() -> Pretraining {
    Pretraining::plain(tiny(), [BATCH, SEQ, PREDICTIONS], adamw())
}

/// With a scale that is too large at first: some steps are skipped.
fn in_f16() -> Pretraining {
    let loss_scale = Some(LossScale { start: 16_777_216.0, ..LossScale::default() });
    Pretraining { dtype: DType::F16, optimizer: Optimizer { loss_scale, ..adamw() }, ..plain() }
}

fn dropping(keep: usize) -> Option<Dropping> {
    Some(Dropping { keep, by: KeepBy::Importance, specials: Specials::default() })
}

/// Sequences of a batch as feeds: some are padded, a word comes up again and again.
#[derive(Clone)]
struct Batch {
    tokens: Array2<i32>,
    segments: Array2<i32>,
    lengths: Array1<i32>,
    positions: Array2<i32>,
    targets: Array2<i32>,
    weights: Array2<f32>,
    next: Array1<i32>,
}

impl Batch {
    fn new(step: u32) -> Batch {
        let stream = Stream { seed: 11, step, key: 5 };
        let draw = |at: usize, below: usize| ((stream.uniform(at as u64) * below as f32) as usize).min(below - 1);
        let lengths = Array1::from_shape_fn(BATCH, |b| (SEQ - if b % 2 == 0 { 0 } else { draw(b, 6) }) as i32);
        let word = |b: usize, s: usize| 104 + draw(1000 + b * SEQ + s, VOCAB - 104) as i32;
        let tokens = Array2::from_shape_fn((BATCH, SEQ), |(b, s)| match s {
            0 => 101,
            _ if s as i32 >= lengths[b] => 0,
            _ if s as i32 == lengths[b] - 1 => 102,
            2 => 103,
            5 => 110,
            _ => word(b, s),
        });
        Batch {
            segments: Array2::from_shape_fn((BATCH, SEQ), |(_, s)| i32::from(s > SEQ / 2)),
            positions: Array2::from_shape_fn((BATCH, PREDICTIONS), |(_, p)| 2 + 3 * p as i32),
            // A word that is predicted by all, and one that counts for nothing.
            targets: Array2::from_shape_fn(
                (BATCH, PREDICTIONS),
                |(b, p)| if p == 1 { 110 } else { word(b, 2 + 3 * p) },
            ),
            weights: Array2::from_shape_fn((BATCH, PREDICTIONS), |(b, p)| f32::from(b != 3 || p < 2)),
            next: Array1::from_shape_fn(BATCH, |b| draw(2000 + b, 2) as i32),
            tokens,
            lengths,
        }
    }

    fn feeds(&self) -> Vec<(&'static str, Array)> {
        vec![
            ("tokens", self.tokens.clone().into()),
            ("segments", self.segments.clone().into()),
            ("lengths", self.lengths.clone().into()),
            ("positions", self.positions.clone().into()),
            ("targets", self.targets.clone().into()),
            ("weights", self.weights.clone().into()),
            ("next", self.next.clone().into()),
        ]
    }
}

fn options(mesh: &str, layout: &str) -> Options {
    Options {
        mesh: mesh.parse().unwrap(),
        layout: layout.parse().unwrap(),
        threads: Some(1),
        seed: 3,
        ..Options::default()
    }
}

fn session(program: Program, mesh: &str, layout: &str) -> Session {
    Session::embedded(program, &options(mesh, layout)).unwrap_or_else(|e| panic!("{mesh} {layout}: {e}"))
}

/// One run of a function on a batch.
fn run(session: &mut Session, function: &str, step: u32, batch: &Batch) -> BTreeMap<Name, Array> {
    let f = session.function(function).unwrap();
    for (name, array) in batch.feeds() {
        session.feed(f, name, &array).unwrap();
    }
    session.step(f, step).unwrap();
    let outputs = session.program().function(function).unwrap().outputs.clone();
    outputs.into_iter().map(|(n, _)| (n.clone(), session.fetch(f, &n).unwrap())).collect()
}

fn bits(outputs: &BTreeMap<Name, Array>, name: &str) -> u32 {
    outputs[&Name::from(name)].to_f32().unwrap().to_bits()
}

/// Bits of loss and gradient norm of so many steps of `train`, then the hash of all variables.
fn train(session: &mut Session, steps: std::ops::Range<u32>) -> (Vec<[u32; 2]>, String) {
    let one = |step| {
        let out = run(session, "train", step, &Batch::new(step));
        [bits(&out, "loss"), bits(&out, "grad_norm")]
    };
    let losses = steps.map(one).collect();
    (losses, session.variables_hash().unwrap())
}

#[test]
fn programs_have_the_parameters_of_the_table() {
    for (name, encoder, all) in
        [("mini", 11_170_560, 11_267_900), ("base", 109_482_240, 110_106_428), ("large", 335_141_888, 336_226_108)]
    {
        let a = Architecture::named(name).unwrap();
        let program = Pretraining::plain(a.clone(), [2, 32, 4], adamw()).program().unwrap();
        assert_eq!(program.parameters(), all, "{name}");
        let of_heads = |v: &&mesh::program::Variable| {
            v.trainable && (v.name.starts_with("masked_words") || v.name.starts_with("next_sentence"))
        };
        let heads: usize = program.variables.iter().filter(of_heads).map(|v| v.ty.elements()).sum();
        assert_eq!(all - heads, encoder, "{name}");
    }
}

#[test]
fn a_step_has_the_flops_of_the_closed_form_and_a_fifth_less_with_token_dropping() {
    let a = Architecture::named("base").unwrap();
    let [batch, seq, predictions] = [2, 512, 76];
    let flops = |keep: Option<usize>| {
        let p = Pretraining {
            dropping: keep.and_then(dropping),
            ..Pretraining::plain(a.clone(), [batch, seq, predictions], adamw())
        };
        let p = p.program().unwrap();
        let forward = p.function("eval").unwrap().product_flops();
        (p.function("train").unwrap().product_flops(), forward)
    };
    let (plain, forward) = flops(None);
    assert_eq!(forward, a.forward_flops(batch, seq, predictions, seq));
    assert_eq!(plain, 3 * forward, "each product has two gradients");
    // What BERT's authors count: 6 for each weight of a product and token, and attention.
    let weights = a.num_hidden_layers * (4 * 768 * 768 + 2 * 768 * 3072);
    let tokens = (batch * seq) as u64;
    let layers = 6 * weights as u64 * tokens + 12 * (a.num_hidden_layers * seq * a.hidden_size) as u64 * tokens;
    let heads = 3 * (plain / 3 - (layers / 3));
    assert_eq!(layers + heads, plain);
    let (dropped, _) = flops(Some(256));
    assert_eq!(dropped, 3 * a.forward_flops(batch, seq, predictions, 256));
    let saved = 1.0 - dropped as f64 / plain as f64;
    assert!((0.20..0.30).contains(&saved), "{saved}");
}

#[test]
fn every_layout_trains_to_the_same_bits_by_every_method() {
    let methods = [
        ("plain", plain()),
        ("token dropping", Pretraining { dropping: dropping(8), ..plain() }),
        ("shared", Pretraining { stages: vec![1], ..plain() }),
        ("plain, bf16", Pretraining { dtype: DType::Bf16, ..plain() }),
        ("token dropping, bf16", Pretraining { dropping: dropping(8), dtype: DType::Bf16, ..plain() }),
        ("token dropping, f16", Pretraining { dropping: dropping(8), ..in_f16() }),
    ];
    let layouts = [
        ("data=4", "batch:data"),
        ("model=2", "heads:model,d_ff:model,vocab:model"),
        ("model=3", "heads:model,d_ff:model,vocab:model"),
        ("seq=2", "seq:seq"),
        ("data=2,model=2", "batch:data,heads:model,d_ff:model,vocab:model"),
        ("data=2,seq=2", "batch:data,seq:seq"),
        ("data=2,model=2,seq=2", "batch:data,heads:model,d_ff:model,vocab:model,seq:seq"),
        ("model=2", "d_model:model"),
    ];
    for (name, method) in methods {
        let program = method.program().unwrap();
        let expected = train(&mut session(program.clone(), "1", ""), 0..20);
        for (mesh, layout) in layouts {
            let got = train(&mut session(program.clone(), mesh, layout), 0..20);
            assert!(
                got == expected,
                "{name} on {mesh} with {layout}: {:?}",
                got.0.iter().zip(&expected.0).position(|(a, b)| a != b)
            );
        }
    }
}

#[test]
fn every_choice_of_layers_to_recompute_trains_to_the_same_bits_in_the_memory_that_the_plan_says() {
    let dropping = Pretraining { dropping: dropping(8), ..plain() };
    for (mesh, layout) in [("1", ""), ("data=2,model=2", "batch:data,heads:model,d_ff:model,vocab:model")] {
        let kept = train(&mut session(dropping.program().unwrap(), mesh, layout), 0..2);
        for choice in 1..16 {
            let recompute = (0..4).filter(|i| choice >> i & 1 == 1).map(|i| format!("encoder/layer.{i}").into());
            let method = Pretraining { recompute: recompute.collect(), ..dropping.clone() };
            let mut session = session(method.program().unwrap(), mesh, layout);
            assert_eq!(train(&mut session, 0..2), kept, "{:?} on {mesh}", method.recompute);
            for peak in session.peaks().unwrap() {
                assert_eq!(peak.peak_bytes_predicted, peak.peak_bytes_measured, "{:?} on {mesh}", method.recompute);
            }
        }
    }
}

#[test]
fn keeping_every_token_is_plain_bert_bit_for_bit() {
    let mut kept = session(Pretraining { dropping: dropping(SEQ), ..plain() }.program().unwrap(), "1", "");
    let mut other = session(plain().program().unwrap(), "1", "");
    assert_eq!(train(&mut kept, 0..5).0, train(&mut other, 0..5).0);
    for v in &other.program().variables.clone() {
        assert_eq!(kept.variable(&v.name).unwrap(), other.variable(&v.name).unwrap(), "{}", v.name);
    }
}

/// The encoder's output with a routing, and the gradient of the word embeddings where only some positions' outputs count.
fn routed(keep: usize) -> Program {
    let a = Architecture { hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ..tiny() };
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let batch = dim("batch", BATCH);
        let text = examples::bert::model::Text::feeds(g, &batch, SEQ);
        let routing = dropping(keep).unwrap().routing(&text.tokens, VOCAB);
        let model = examples::bert::model::Model { architecture: &a, mode: Mode::Train, dtype: DType::F32 };
        let x = model.encoder(&text, Some(&routing));
        let weight = g.input("weight", DType::F32, &[dim("seq", SEQ)]);
        // A cube: the squares of what is normalised add up to a constant.
        let loss = x.mul(&weight).mul(&x).mul(&x).sum_all();
        let table =
            g.trainable().into_iter().find(|(id, _)| &*g.variable_name(*id) == "embeddings/word/table").unwrap().1;
        g.output("x", &x);
        g.output("d table", &g.gradients(&loss, &[&table])[0]);
        let seen = g.iota(&dim("seq", SEQ)).cast(DType::F32).broadcast(&[batch, dim("seq", SEQ)]);
        g.output("kept", &routing.split(&seen).0);
    })
    .unwrap();
    p.finish().unwrap()
}

fn run_routed(session: &mut Session, batch: &Batch, weight: &[f32; SEQ]) -> BTreeMap<Name, Array> {
    let f = session.function("f").unwrap();
    for (name, array) in batch.feeds().into_iter().take(3) {
        session.feed(f, name, &array).unwrap();
    }
    session.feed(f, "weight", &Array::from(Array1::from(weight.to_vec()))).unwrap();
    session.step(f, 0).unwrap();
    ["x", "d table", "kept"].map(|n| (Name::from(n), session.fetch(f, n).unwrap())).into_iter().collect()
}

#[test]
fn padding_is_dropped_first_and_special_tokens_never() {
    let weight = [1.0; SEQ];
    let batch = Batch::new(0);
    for keep in [4, 8, 12] {
        let out = run_routed(&mut session(routed(keep), "1", ""), &batch, &weight);
        let Array::F32(kept) = &out[&Name::from("kept")] else { unreachable!() };
        for b in 0..BATCH {
            let kept: Vec<usize> = (0..keep).map(|i| kept[[b, i]] as usize).collect();
            assert!(kept.windows(2).all(|w| w[0] < w[1]), "in ascending order");
            let special = (0..SEQ).filter(|s| (100..=103).contains(&batch.tokens[[b, *s]]));
            assert!(special.clone().count() <= keep && special.clone().all(|s| kept.contains(&s)), "{kept:?}");
            let words = (0..SEQ).filter(|s| batch.tokens[[b, *s]] != 0).count();
            let padding = kept.iter().filter(|s| batch.tokens[[b, **s]] == 0).count();
            assert_eq!(padding, keep.saturating_sub(words), "padding only where there is nothing else");
            // All words are as important at the start: the lower positions are kept.
            let plain: Vec<usize> =
                (0..SEQ).filter(|s| batch.tokens[[b, *s]] > 103).take(keep - special.count().min(keep)).collect();
            assert!(plain.iter().all(|s| kept.contains(s)), "{plain:?} of {kept:?}");
        }
    }
}

#[test]
fn dropped_tokens_have_an_output_and_send_a_gradient_to_their_embeddings() {
    let batch = Batch::new(0);
    let weight = [1.0; SEQ];
    let mut s = session(routed(6), "1", "");
    let out = run_routed(&mut s, &batch, &weight);
    let Array::F32(kept) = &out[&Name::from("kept")] else { unreachable!() };
    // A position that is dropped, of a word that no other position of the batch has.
    let count = |token: i32| batch.tokens.iter().filter(|t| **t == token).count();
    let dropped = (0..BATCH).flat_map(|b| (0..SEQ).map(move |s| (b, s))).find(|(b, s)| {
        let token = batch.tokens[[*b, *s]];
        token > 103 && count(token) == 1 && (0..6).all(|i| kept[[*b, i]] as usize != *s)
    });
    let (b, at) = dropped.expect("a word that comes up once, among the last ones");
    let Array::F32(x) = &out[&Name::from("x")] else { unreachable!() };
    assert!(x.slice(ndarray::s![b, at, ..]).iter().any(|v| v.abs() > 0.01));
    // Through its own output, and through others that look at it.
    let mut own = [0.0; SEQ];
    own[at] = 1.0;
    for weight in [own, std::array::from_fn(|i| 1.0 - own[i])] {
        let out = run_routed(&mut s, &batch, &weight);
        let Array::F32(d) = &out[&Name::from("d table")] else { unreachable!() };
        let row = d.slice(ndarray::s![batch.tokens[[b, at]] as usize, ..]);
        assert!(row.iter().any(|v| v.abs() > 1e-6), "{weight:?}");
    }
}

#[test]
fn a_sequence_permuted_with_its_positions_gives_the_permuted_output() {
    let weight = [1.0; SEQ];
    let mut s = session(routed(8), "1", "");
    let order: [usize; SEQ] = std::array::from_fn(|i| (i * 5 + 3) % SEQ);
    // Each word has an importance of its own, so nothing is decided by position.
    let importance = Array1::from_shape_fn(VOCAB, |v| 10.0 + (v * 37 % 101) as f32 * 0.01);
    s.set_variable("importance", &importance.into()).unwrap();
    let mut batch = Batch::new(0);
    batch.lengths.fill(SEQ as i32);
    batch.tokens = Array2::from_shape_fn((BATCH, SEQ), |(b, s)| 104 + ((b * 7 + s) % (VOCAB - 104)) as i32);
    let x = run_routed(&mut s, &batch, &weight).remove(&Name::from("x")).unwrap();
    let mut permuted = batch.clone();
    permuted.tokens = Array2::from_shape_fn((BATCH, SEQ), |(b, s)| batch.tokens[[b, order[s]]]);
    permuted.segments = Array2::from_shape_fn((BATCH, SEQ), |(b, s)| batch.segments[[b, order[s]]]);
    let Array::F32(table) = s.variable("embeddings/position/table").unwrap() else { unreachable!() };
    let mut moved = table.clone();
    for (i, from) in order.iter().enumerate() {
        moved.slice_mut(ndarray::s![i, ..]).assign(&table.slice(ndarray::s![*from, ..]));
    }
    s.set_variable("embeddings/position/table", &Array::F32(moved)).unwrap();
    let y = run_routed(&mut s, &permuted, &weight).remove(&Name::from("x")).unwrap();
    let (Array::F32(x), Array::F32(y)) = (x, y) else { unreachable!() };
    for (b, i) in (0..BATCH).flat_map(|b| (0..SEQ).map(move |i| (b, i))) {
        let (a, b) = (y.slice(ndarray::s![b, i, ..]), x.slice(ndarray::s![b, order[i], ..]));
        // The sums over positions run in another order.
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4), "{a} {b}");
    }
}

#[test]
fn importance_follows_the_mean_loss_of_each_id_as_by_hand_on_every_layout() {
    let method = Pretraining { dropping: dropping(8), ..plain() };
    let architecture = Architecture { hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ..tiny() };
    let method = Pretraining { architecture: architecture.clone(), ..method };
    let batch = Batch::new(0);
    let mut expected = None;
    for (mesh, layout) in [("1", ""), ("data=2", "batch:data"), ("seq=2", "seq:seq"), ("vocab=2", "vocab:vocab")] {
        let mut s = session(method.program().unwrap(), mesh, layout);
        run(&mut s, "train", 0, &batch);
        let Array::F32(importance) = s.variable("importance").unwrap() else { unreachable!() };
        let first = expected.get_or_insert_with(|| importance.clone());
        assert_eq!(*first, importance, "{mesh} {layout}");
    }
    // By hand: the losses of the same model at its start.
    let losses = word_losses(&method, &batch);
    let mut sums: BTreeMap<i32, (f64, f64)> = BTreeMap::new();
    for ((at, target), weight) in batch.targets.indexed_iter().zip(&batch.weights) {
        let entry = sums.entry(*target).or_default();
        *entry = (entry.0 + f64::from(losses[at] * weight), entry.1 + f64::from(*weight));
    }
    let importance = expected.unwrap();
    for id in 0..VOCAB as i32 {
        let by_hand = match sums.get(&id).filter(|(_, n)| *n > 0.0 && !(100..=103).contains(&id)) {
            Some((sum, n)) => 0.995 * 10.0 + 0.005 * sum / n,
            None => 10.0,
        };
        assert!((f64::from(importance[[id as usize]]) - by_hand).abs() < 1e-5, "{id}");
    }
    assert!(sums[&110].1 >= 4.0, "a word that is predicted several times");
}

/// The loss of each prediction, of a model at its start in training with token dropping.
fn word_losses(method: &Pretraining, batch: &Batch) -> Array2<f32> {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let text = examples::bert::model::Text::feeds(g, &dim("batch", BATCH), SEQ);
        let predictions = [dim("batch", BATCH), dim("prediction", PREDICTIONS)];
        let positions = g.input("positions", DType::I32, &predictions);
        let targets = g.input("targets", DType::I32, &predictions);
        let routing = method.dropping.unwrap().routing(&text.tokens, VOCAB);
        let model =
            examples::bert::model::Model { architecture: &method.architecture, mode: Mode::Train, dtype: DType::F32 };
        let logits = model.words_at(&model.encoder(&text, Some(&routing)), &positions);
        g.output("losses", &mesh::nn::cross_entropy(&logits, &targets, "vocab"));
    })
    .unwrap();
    let mut s = session(p.finish().unwrap(), "1", "");
    let f = s.function("f").unwrap();
    for (name, array) in batch.feeds().into_iter().take(5) {
        s.feed(f, name, &array).unwrap();
    }
    s.step(f, 0).unwrap();
    let Array::F32(losses) = s.fetch(f, "losses").unwrap() else { unreachable!() };
    losses.into_dimensionality().unwrap()
}

#[test]
fn it_learns_eight_sequences_by_heart() {
    let a = Architecture { hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ..tiny() };
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let plain = Pretraining::plain(a.clone(), [BATCH, SEQ, PREDICTIONS], Optimizer::adamw(3e-3, 0.0).clipped(1.0));
        let optimizer = if dtype == DType::F16 { plain.optimizer.clone().scaled() } else { plain.optimizer.clone() };
        let mut s = session(Pretraining { dtype, optimizer, ..plain }.program().unwrap(), "1", "");
        let batches = [Batch::new(0), Batch::new(1)];
        let mut losses = vec![];
        for step in 0..300u32 {
            let out = run(&mut s, "train", step, &batches[step as usize % 2]);
            losses.push(f32::from_bits(bits(&out, "loss")));
        }
        let last = &losses[298..];
        assert!(losses[0] > 4.0 && last.iter().all(|l| *l < 0.1), "{dtype}: {} -> {last:?}", losses[0]);
    }
}

#[test]
fn a_step_in_parts_is_the_step_of_the_means_of_its_parts() {
    let a = Architecture { hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ..tiny() };
    let method = Pretraining::plain(a, [BATCH, SEQ, PREDICTIONS], Optimizer::sgd(0.5));
    let mut whole = session(method.program().unwrap(), "1", "");
    let mut parts = session(Pretraining { parts: 2, ..method }.program().unwrap(), "data=2", "batch:data");
    let batch = Batch::new(0);
    let once = run(&mut whole, "train", 0, &batch);
    for part in 0..2 {
        // The same batch twice: the mean of two equal gradients is the gradient.
        let out = run(&mut parts, "accumulate", part, &batch);
        assert_eq!(bits(&out, "loss"), bits(&once, "loss"));
    }
    let update = parts.function("update").unwrap();
    parts.step(update, 0).unwrap();
    for v in whole.program().variables.clone() {
        assert_eq!(whole.variable(&v.name).unwrap(), parts.variable(&v.name).unwrap(), "{}", v.name);
        let Array::F32(left) = parts.variable(&format!("{}/gradient", v.name)).unwrap() else { unreachable!() };
        assert!(left.iter().all(|g| *g == 0.0), "{}", v.name);
    }
}

/// The gradients of the variables by the masked-word loss, under their paths, with and without sharing.
fn gradients(groups: usize) -> Program {
    let a = Architecture { ..tiny() };
    let groups = Groups { layers: a.num_hidden_layers, groups, shared: Shared::Layer };
    let mut p = ProgramBuilder::new();
    p.function("f", |g| {
        let text = examples::bert::model::Text::feeds(g, &dim("batch", BATCH), SEQ);
        let model = examples::bert::model::Model { architecture: &a, mode: Mode::Train, dtype: DType::F32 };
        let x = g.renamed(move |p| groups.path(p), || model.encoder(&text, None));
        let loss = x.mul(&x).mul(&x).sum_all();
        g.output("loss", &loss);
        let variables = g.trainable();
        let wrt: Vec<_> = variables.iter().map(|(_, t)| t).collect();
        for ((id, _), grad) in variables.iter().zip(g.gradients(&loss, &wrt)) {
            g.output(format!("d {}", g.variable_name(*id)), &grad);
        }
    })
    .unwrap();
    p.finish().unwrap()
}

#[test]
fn the_gradient_of_a_shared_variable_is_the_sum_of_those_of_its_layers() {
    let batch = Batch::new(0);
    let fetch = |s: &mut Session| {
        let f = s.function("f").unwrap();
        batch.feeds().into_iter().take(3).for_each(|(n, a)| s.feed(f, n, &a).unwrap());
        s.step(f, 0).unwrap();
        let outputs = s.program().function("f").unwrap().outputs.clone();
        outputs.into_iter().map(|(n, _)| (n.to_string(), s.fetch(f, &n).unwrap())).collect::<BTreeMap<_, _>>()
    };
    let mut shared = session(gradients(1), "1", "");
    let mut own = session(gradients(4), "1", "");
    let groups = Groups { layers: 4, groups: 1, shared: Shared::Layer };
    for v in own.program().variables.clone() {
        let value = shared.variable(&groups.path(&v.name)).unwrap();
        own.set_variable(&v.name, &value).unwrap();
    }
    let (shared, own) = (fetch(&mut shared), fetch(&mut own));
    assert_eq!(shared["loss"], own["loss"], "the same numbers run through both");
    for (name, sum) in shared.iter().filter(|(n, _)| n.starts_with("d encoder/shared.1.0/")) {
        let within = name.strip_prefix("d encoder/shared.1.0/").unwrap();
        let Array::F32(sum) = sum else { unreachable!() };
        // The backward pass comes to the last layer first.
        let layer = |i: usize| match &own[&format!("d encoder/layer.{i}/{within}")] {
            Array::F32(a) => a.clone(),
            _ => unreachable!(),
        };
        let by_hand = (0..3).rev().fold(layer(3), |sum, i| sum + layer(i));
        assert_eq!(sum, &by_hand, "{within}");
    }
}
