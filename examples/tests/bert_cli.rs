//! The program `bert`, as a process: commands on small texts, in worker processes too, and what it says to bad input.

mod common;

use common::{Place, Ran, bits};
use coordinator::checkpoint::Checkpoints;
use coordinator::{Options, Session};
use examples::bert::{hf, program::Pretraining};
use mesh::optim::{Optimizer, Schedule};
use std::fs;
use worker::data::weights::{self, Weights};

/// A vocabulary of letters, some words and the special ones; a config.json for a model of two or three small layers.
fn place(layers: usize) -> Place {
    let place = Place::of(env!("CARGO_BIN_EXE_bert"));
    let mut words: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."].map(String::from).into();
    words.extend(('a'..='z').map(String::from));
    words.extend(('a'..='z').map(|c| format!("##{c}")));
    words.extend(["good", "bad", "film", "play", "day", "the", "was", "a"].map(String::from));
    fs::write(place.path("vocab.txt"), words.join("\n") + "\n").unwrap();
    let config = format!(
        "{{\"model_type\": \"bert\", \"vocab_size\": 80, \"hidden_size\": 64, \"num_hidden_layers\": {layers}, \
         \"num_attention_heads\": 2, \"intermediate_size\": 64, \"max_position_embeddings\": 32}}"
    );
    fs::write(place.path("config.json"), config).unwrap();
    let sentence = |d: usize, s: usize| {
        let word = |n: usize| ["good", "bad", "film", "play", "day"][(d * 7 + s * 3 + n) % 5];
        format!("The {} was a {} {} .", word(0), word(1 + s % 2), word(2))
    };
    let document = |d: usize| (0..6).map(|s| sentence(d, s)).collect::<Vec<_>>().join(" ");
    fs::write(place.path("text.txt"), (0..40).map(document).collect::<Vec<_>>().join("\n\n")).unwrap();
    place
}

const SMALL: &str = "--size config.json --vocab vocab.txt --data text.txt --seq 16 --batch 4 --threads 1 --set held_out=0.3 --set eval_batches=2";

fn hash(ran: &Ran) -> &str {
    ran.out.lines().find_map(|l| l.strip_prefix("variables ")).unwrap_or_else(|| panic!("{}{}", ran.out, ran.err))
}

/// Removes a run's checkpoints of more steps, as if it had been stopped there.
fn stop_after(place: &Place, run: &str, step: u32) {
    let step_of = |name: &str| name.split(|c: char| !c.is_ascii_digit()).find_map(|n| n.parse::<u32>().ok());
    for entry in fs::read_dir(place.path(run).join("checkpoints")).unwrap().flatten() {
        if step_of(&entry.file_name().to_string_lossy()).is_some_and(|s| s > step) {
            fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}

#[test]
fn worker_processes_unshare_and_drop_with_the_bits_of_one_process_and_resume_at_the_unsharing() {
    let place = place(4);
    let method = "--method token-drop,share-unshare --unshare-at 10 --steps 20 --dropout 0.1 --set checkpoint_every=1";
    let alone = place.ok(&format!("pretrain {SMALL} {method} --out alone --set keep=1000"));
    assert!(alone.err.contains("from step 10 on layers share no weights"), "{}", alone.err);
    let four = place.ok(&format!("pretrain {SMALL} {method} --out four --mesh data=2,model=2 --workers 4"));
    assert_eq!(hash(&four), hash(&alone));
    assert_eq!(bits(&place.rows("four")), bits(&place.rows("alone")));
    // Stopped right before, at and right after the unsharing, and gone on with on another mesh.
    for (step, mesh) in [(9, "data=2"), (10, "model=2"), (11, "seq=2,data=2")] {
        let out = format!("at{step}");
        place.ok(&format!("pretrain {SMALL} {method} --out {out} --set keep=1000"));
        stop_after(&place, &out, step);
        let resumed = place.ok(&format!("pretrain --resume --out {out} --mesh {mesh} --threads 1"));
        assert!(resumed.err.contains(&format!("with {step} steps done")), "{}", resumed.err);
        assert_eq!(hash(&resumed), hash(&alone), "resumed at {step} on {mesh}");
    }
}

#[test]
fn a_run_is_exported_and_embeds_and_is_tuned_on_any_mesh() {
    let place = place(2);
    place.ok(&format!("pretrain {SMALL} --out run --steps 6 --mesh data=2 --method share-unshare --unshare-at 4"));
    let exported = place.ok("export --out run --to hf");
    assert!(exported.out.contains("BertForPreTraining"), "{}", exported.out);
    place.fails("export --out run --to hf", 2, &["H0003", "hf is there already"]);
    fs::write(place.path("films.tsv"), films(&[("good", "up"), ("bad", "down")])).unwrap();
    // A sentence's vector is the same whatever stands beside it and wherever it is computed.
    let one = place.ok("embed --from hf a.good.film").out;
    let two = place.command("embed --from hf --mesh model=2 --batch 3").args(["bad", "a.good.film"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&two.stdout).lines().nth(1), one.lines().next());
    let vector: serde_json::Value = serde_json::from_str(one.lines().next().unwrap()).unwrap();
    assert_eq!((&vector["text"], vector["vector"].as_array().unwrap().len()), (&"a.good.film".into(), 64));
    // Fine-tuning finds the word that decides, and has the same bits on a mesh and after going on.
    let tune = "finetune --from hf --data films.tsv --seq 16 --batch 8 --threads 1 --rate 0.01 --steps 40 --set held_out=0.3 --set checkpoint_every=20";
    let alone = place.ok(&format!("{tune} --out tuned"));
    assert!(alone.out.contains("held-out accuracy 1.0000"), "{}{}", alone.out, alone.err);
    let mesh = place.ok(&format!("{tune} --out mesh --mesh data=2,model=2 --workers 2"));
    assert_eq!((hash(&mesh), bits(&place.rows("mesh"))), (hash(&alone), bits(&place.rows("tuned"))));
    fs::remove_dir_all(newest(&place, "tuned")).unwrap();
    assert_eq!(hash(&place.ok("finetune --resume --out tuned --mesh model=2 --threads 1")), hash(&alone));
    let exported = place.ok("export --out tuned --to judge --shard 8KiB");
    assert!(exported.out.contains("BertForSequenceClassification"), "{}", exported.out);
    assert!(place.path("judge/model.safetensors.index.json").exists());
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(place.path("judge/config.json")).unwrap()).unwrap();
    assert_eq!(config["id2label"], serde_json::json!({"0": "down", "1": "up"}));
    let judge = Weights::open(&place.path("judge")).unwrap();
    let of_heads = judge.tensors().keys().filter(|n| !n.contains("encoder.") && !n.contains("embeddings."));
    let heads = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"];
    assert!(of_heads.eq(heads), "{:?}", judge.tensors().keys());
    // The run is judged as it was at its end; its encoder serves other classes too.
    assert!(alone.out.contains(place.ok("eval --out tuned --mesh data=2 --threads 1").out.trim_end()), "{}", alone.out);
    fs::write(place.path("three.tsv"), films(&[("good", "up"), ("bad", "down"), ("play", "level")])).unwrap();
    let three = place.ok(&format!("{} --out three", tune.replace("hf", "judge").replace("films", "three")));
    assert!(three.err.contains("`classifier/head/kernel` keeps its start: `classifier.weight` is for other classes"));
}

/// Sentences in which one word decides.
fn films(labels: &[(&str, &str)]) -> String {
    let line = |i: usize| {
        let (word, label) = labels[i % labels.len()];
        format!("a {word} film .. {}\t{label}\n", "x".repeat(i / labels.len() + 1))
    };
    (0..20 * labels.len()).map(line).collect()
}

#[test]
fn a_run_goes_on_with_its_own_vocabulary_only() {
    let place = place(2);
    place.ok(&format!("pretrain {SMALL} --out run --steps 2"));
    let own = fs::read_to_string(place.path("vocab.txt")).unwrap();
    let swapped = own.replace("\ngood\nbad\n", "\nbad\ngood\n");
    fs::write(place.path("swapped.txt"), &swapped).unwrap();
    fs::write(place.path("fewer.txt"), own.strip_suffix("a\n").unwrap()).unwrap();
    fs::write(place.path("same.txt"), &own).unwrap();
    let other =
        ["U0011", "swapped.txt", "the run in run was begun with", "id 58 is `bad` in it, and `good` in the run's"];
    place.fails("pretrain --resume --out run --steps 4 --vocab swapped.txt", 2, &other);
    place.fails("eval --out run --set vocab=swapped.txt", 2, &other);
    let fewer = ["U0011", "it has 65 words, and the run's 66", "help: give the run's own with --vocab"];
    place.fails("pretrain --resume --out run --steps 4 --vocab fewer.txt", 2, &fewer);
    assert_eq!(place.rows("run").len(), 2);
    // A file's name is of no matter, but what is in it.
    place.ok("pretrain --resume --out run --steps 4 --vocab same.txt");
    fs::write(place.path("same.txt"), &swapped).unwrap();
    let changed = ["U0011", "same.txt", "id 58 is `bad` in it"];
    place.fails("pretrain --resume --out run --steps 6", 2, &changed);
    place.fails("export --out run --to hf", 2, &changed);
    assert!(!place.path("hf").exists());
    // Fine-tuning alike.
    fs::write(place.path("films.tsv"), films(&[("good", "up"), ("bad", "down")])).unwrap();
    let tune =
        "finetune --from none --size config.json --vocab vocab.txt --data films.tsv --seq 16 --batch 8 --threads 1";
    place.ok(&format!("{tune} --steps 2 --out tuned --set held_out=0.3"));
    place.fails("finetune --resume --out tuned --steps 4 --vocab swapped.txt", 2, &other[..2]);
    place.fails("eval --out tuned --set vocab=swapped.txt", 2, &other[..2]);
    fs::write(place.path("vocab.txt"), &swapped).unwrap();
    place.fails("export --out tuned --to hf", 2, &["U0011", "vocab.txt", "id 58 is `bad` in it"]);
}

#[test]
fn a_regression_learns_the_numbers_of_words_with_the_same_bits_on_a_mesh() {
    let place = place(2);
    fs::write(place.path("numbers.tsv"), films(&[("good", "1.5"), ("bad", "-1.5"), ("play", "0.25")])).unwrap();
    let tune = "finetune --from none --size config.json --vocab vocab.txt --task regression --data numbers.tsv --seq 16 \
                --batch 8 --threads 1 --rate 0.003 --steps 80 --dropout 0 --set held_out=0.3";
    let alone = place.ok(&format!("{tune} --out alone"));
    let rows = place.rows("alone");
    let last = |key: &str| rows[79][key].as_f64().unwrap();
    assert!(last("loss") < 0.02 && last("held_out_error") < 0.02, "{}", rows[79]);
    assert!(last("held_out_correlation") > 0.99, "{}", rows[79]);
    assert!(alone.out.contains("Pearson correlation"), "{}", alone.out);
    place.ok(&format!("{tune} --out mesh --mesh data=2,model=2"));
    assert_eq!(bits(&place.rows("mesh")), bits(&rows));
}

#[test]
fn a_run_in_f16_skips_steps_while_its_scale_is_too_large_and_is_resumed_with_it() {
    let place = place(2);
    // Errors of 4 have gradients that do not fit into f16 at the first scale.
    fs::write(place.path("numbers.tsv"), films(&[("good", "4"), ("bad", "-4"), ("play", "1")])).unwrap();
    let tune = "finetune --from none --size config.json --vocab vocab.txt --task regression --data numbers.tsv --seq 16 \
                --batch 8 --threads 1 --dtype f16 --dropout 0 --set held_out=0.3 --set checkpoint_every=2";
    let whole = place.ok(&format!("{tune} --steps 60 --rate 0.01 --out whole"));
    place.ok(&format!("{tune} --steps 60 --rate 0.01 --out parts --mesh data=2 --set keep=1000"));
    stop_after(&place, "parts", 6);
    let resumed = place.ok("finetune --resume --out parts --mesh model=2 --threads 1 --workers 2");
    assert!(resumed.err.contains("with 6 steps done"), "{}", resumed.err);
    assert_eq!(hash(&resumed), hash(&whole));
    let [rows, parts] = ["whole", "parts"].map(|name| place.rows(name));
    let (mut scale, mut skipped) = (65_536.0, 0.0);
    for (row, part) in rows.iter().zip(&parts) {
        assert_eq!([&row["loss_scale"], &row["skipped_steps"]], [&part["loss_scale"], &part["skipped_steps"]]);
        assert_eq!(row["loss_scale"].as_f64(), Some(scale), "{row}");
        // An infinite number is none in JSON.
        if row["grad_norm"].is_null() {
            (scale, skipped) = (scale / 2.0, skipped + 1.0);
        }
        assert_eq!(row["skipped_steps"].as_f64(), Some(skipped), "{row}");
    }
    assert!(skipped > 0.0 && skipped < 10.0, "{skipped} steps of 60");
    assert!(whole.err.contains("scale 65536  skipped 1"), "{}", whole.err);
    let loss = |row: &serde_json::Value| row["loss"].as_f64().unwrap();
    assert!(loss(&rows[59]) < 0.5 * loss(&rows[0]), "{} to {}", rows[0], rows[59]);

    // Where training diverges later, the steps that were skipped are not to blame.
    let ran = place.run(&format!("{tune} --steps 30 --rate 1e30 --set warmup=1 --set clip=0 --out wild"));
    let rows = place.rows("wild");
    assert!(ran.code == 1 && ran.err.contains("U0008") && rows[0]["grad_norm"].is_null(), "{}", ran.err);
    let last = rows.len() - 1;
    assert!(last > 1 && ran.err.contains(&format!("  --> step {last}: ")), "{last} steps: {}", ran.err);
}

#[test]
fn an_export_holds_the_variables_of_the_checkpoint() {
    let place = place(2);
    place.ok(&format!("pretrain {SMALL} --out run --steps 3"));
    place.ok("export --out run --to hf");
    let model = hf::Model::open(&place.path("hf")).unwrap();
    let optimizer = Optimizer::adamw(Schedule::Constant(0.0), 0.0);
    let program = Pretraining::plain(model.config.architecture.clone(), [4, 16, 3], optimizer).program().unwrap();
    let names: Vec<_> = program.variables.iter().filter(|v| v.trainable).map(|v| v.name.to_string()).collect();
    let location = place.path("run/checkpoints").display().to_string();
    let options =
        Options { checkpoints: Some(Checkpoints { location, keep: 1 }), threads: Some(1), ..Options::default() };
    let [mut trained, mut read] = [(); 2].map(|()| Session::embedded(program.clone(), &options).unwrap());
    assert_eq!(trained.restore().unwrap().unwrap().position.step, 3);
    let fit = model.check(&program, false).unwrap();
    model.load(&mut read, &fit, |_, _| ()).unwrap();
    for name in &names {
        assert_eq!(read.variable(name).unwrap(), trained.variable(name).unwrap(), "{name}");
    }
    // Layers that share their weights are written one by one.
    place.ok(&format!("pretrain {SMALL} --out shared --steps 3 --method share-unshare --unshare-at 3"));
    place.ok("export --out shared --to shared-hf");
    let shared = Weights::open(&place.path("shared-hf")).unwrap();
    let layer = |n: usize| shared.read(&format!("bert.encoder.layer.{n}.output.dense.weight")).unwrap();
    assert_eq!(layer(0), layer(1));
}

#[test]
fn tensors_that_do_not_fit_end_a_fine_tuning_before_it_begins() {
    let place = place(2);
    place.ok(&format!("pretrain {SMALL} --out run --steps 1"));
    place.ok("export --out run --to hf");
    fs::write(place.path("films.tsv"), films(&[("good", "up"), ("bad", "down")])).unwrap();
    let config = fs::read_to_string(place.path("hf/config.json")).unwrap();
    fs::write(place.path("hf/config.json"), config.replace("\"intermediate_size\": 64", "\"intermediate_size\": 96"))
        .unwrap();
    let named = [
        "H0002",
        "mis-shaped: `bert.encoder.layer.0.intermediate.dense.weight` is [64, 64]; `encoder/layer.0/up/kernel` takes [96, 64]",
        "mis-shaped: `bert.encoder.layer.1.output.dense.weight` is [64, 64]",
    ];
    place.fails("finetune --from hf --data films.tsv --seq 16 --set held_out=0.3 --out y", 3, &named);
    assert!(!place.path("y").exists());
    // A vocabulary with more words than the model knows.
    fs::write(place.path("hf/config.json"), config).unwrap();
    let words: String = (0..300).map(|i| format!("word{i}\n")).collect();
    fs::write(place.path("hf/vocab.txt"), fs::read_to_string(place.path("vocab.txt")).unwrap() + &words).unwrap();
    place.fails(
        "finetune --from hf --data films.tsv --seq 16 --out y",
        2,
        &["has 366 words, and the model has room for 80"],
    );
    place.fails("embed --from hf word", 3, &["vocab.txt", "it has 366 words, and the model knows 80"]);
    fs::remove_file(place.path("hf").join(weights::SINGLE)).unwrap();
    place.fails("finetune --from hf --data films.tsv --seq 16 --out y", 3, &["safetensors"]);
}

fn newest(place: &Place, run: &str) -> std::path::PathBuf {
    let folder = place.path(run).join("checkpoints");
    fs::read_dir(folder).unwrap().flatten().map(|e| e.path()).max().unwrap()
}

#[test]
fn bad_input_is_said_clearly_and_nothing_is_lost() {
    let place = place(2);
    fs::write(place.path("empty.txt"), "").unwrap();
    fs::write(place.path("latin1.txt"), b"A good film.\nA caf\xe9 .\n").unwrap();
    let with = |data: &str| format!("pretrain {} --out x --steps 2", SMALL.replace("text.txt", data));
    place.fails(&with("empty.txt"), 3, &["D0002", "empty.txt"]);
    place.fails(&with("latin1.txt"), 3, &["latin1.txt", "byte 18, in line 2, is no UTF-8"]);
    place.fails(&with("missing.txt"), 3, &["D0001", "missing.txt"]);
    place.fails(
        &format!("pretrain {SMALL} --set seq=64 --out x"),
        2,
        &["--seq 64 is longer than the model's 32 positions"],
    );
    place.fails(&format!("pretrain {SMALL} --method token-dorp --out x"), 2, &["did you mean `token-drop`?"]);
    assert!(!place.path("x/metrics.jsonl").exists());
    // Another vocabulary than that of the model.
    let words: String = (0..300).map(|i| format!("word{i}\n")).collect();
    fs::write(place.path("large.txt"), fs::read_to_string(place.path("vocab.txt")).unwrap() + &words).unwrap();
    let large = SMALL.replace("vocab.txt", "large.txt");
    place.fails(&format!("pretrain {large} --out x"), 2, &["has 366 words, and the model has room for 80"]);
    // What diverges ends with its last good checkpoint there.
    let absurd = "--rate 1e30 --set clip=0 --set warmup=1 --set checkpoint_every=1 --steps 8";
    let named = ["U0008", "diverged", "  --> step 1: ", "examples/src/bert/", "are no number", " is kept"];
    place.fails(&format!("pretrain {SMALL} {absurd} --out wild"), 1, &named);
    place.fails(&format!("pretrain {SMALL} {absurd} --out wilder --mesh data=2 --workers 2"), 1, &named);
    assert!(fs::read_dir(place.path("wild/checkpoints")).unwrap().count() > 0);
    place.ok("eval --out wild --threads 1");
    // Labelled sentences and models.
    fs::write(place.path("one.tsv"), "a\tx\nb\tx\n").unwrap();
    fs::write(place.path("bad.tsv"), "a\tx\nno label\n").unwrap();
    fs::write(place.path("words.tsv"), "a\t1\nb\tmany\n").unwrap();
    let tune = "finetune --from none --size config.json --vocab vocab.txt --seq 16 --out y --data";
    place.fails(&format!("{tune} one.tsv"), 3, &["it has 1 of the two classes"]);
    place.fails(&format!("{tune} bad.tsv"), 3, &["bad.tsv", "line 2"]);
    place.fails(&format!("{tune} words.tsv --task regression"), 3, &["words.tsv", "`many` is no number"]);
    place.fails(&format!("{tune} empty.txt"), 3, &["empty.txt", "it has 0 of the two classes"]);
    place.fails(&format!("{tune} missing.tsv"), 3, &["D0001", "missing.tsv"]);
    assert!(!place.path("y").exists());
    place.fails("finetune --from nowhere --out y --data one.tsv", 2, &["nowhere holds no config.json", "bert export"]);
    place.fails("embed --from none word", 2, &["--from none has no weights"]);
    place.fails("export --out nothing --to z", 2, &["nothing holds no run"]);
    place.fails("embed --from . word", 3, &["safetensors"]);
}
