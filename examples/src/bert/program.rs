//! The programs of BERT: pretraining by any of the methods, fine-tuning, embedding.

use super::architecture::Architecture;
use super::dropping::Dropping;
use super::model::{Model, Text};
use super::sharing::{Groups, Shared, is_slot};
use mesh::dim::{DType, Dim, Name, dim};
use mesh::error::Error;
use mesh::graph::{Graph, Tensor};
use mesh::nn::{self, Mode};
use mesh::optim::Optimizer;
use mesh::program::{Program, ProgramBuilder, VarId};

/// Pretraining: masked words, and next sentences.
#[derive(Clone, Debug)]
pub struct Pretraining {
    /// The encoder's sizes.
    pub architecture: Architecture,
    /// Sequences of a run of `train`: of a micro-batch, where there are several.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Masked words of a sequence at the most.
    pub predictions: usize,
    /// Whether the model also learns which second sentence is the next one.
    pub next_sentence: bool,
    /// What the model computes in.
    pub dtype: DType,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Micro-batches of a step; 1: the step is one run of `train`.
    pub parts: u32,
    /// Token dropping, if any.
    pub dropping: Option<Dropping>,
    /// Sharing, if any: the numbers of groups, stage after stage, of which the last is the number of layers or less.
    pub stages: Vec<usize>,
    /// What is shared.
    pub shared: Shared,
    /// Whether optimizer slots start anew when layers are unshared, instead of being copied.
    pub reset_slots: bool,
    /// Blocks that are recomputed in the backward pass: `encoder/layer.0` and so on.
    pub recompute: Vec<Name>,
}

impl Pretraining {
    /// Plain BERT, as it is trained in one stage.
    pub fn plain(architecture: Architecture, [batch, seq, predictions]: [usize; 3], optimizer: Optimizer) -> Self {
        let stages = vec![architecture.num_hidden_layers];
        Pretraining {
            architecture,
            batch,
            seq,
            predictions,
            next_sentence: true,
            dtype: DType::F32,
            optimizer,
            parts: 1,
            dropping: None,
            stages,
            shared: Shared::Layer,
            reset_slots: false,
            recompute: vec![],
        }
    }

    /// Which layers share variables in a stage.
    pub fn groups(&self, stage: usize) -> Groups {
        Groups { layers: self.architecture.num_hidden_layers, groups: self.stages[stage], shared: self.shared }
    }

    /// What a function is called in a stage: in the last one, and where there is but one, by its plain name.
    pub fn named(&self, function: &str, stage: usize) -> String {
        if stage + 1 == self.stages.len() { function.into() } else { format!("{function}.{stage}") }
    }

    /// What a stage is called.
    pub fn stage_name(&self, stage: usize) -> String {
        match self.stages[stage] {
            groups if groups == self.architecture.num_hidden_layers => "layers".into(),
            groups => format!("groups-{groups}"),
        }
    }

    /// The program. In each stage it has
    /// - `train` (feeds of [`Text::feeds`], `positions` and `targets` `i32[batch, prediction]`, `weights`
    ///   `f32[batch, prediction]`, `next` `i32[batch]`; gives `loss` and the outputs of [`mesh::optim::Update::output`]), or, where a step
    ///   has several parts, `accumulate` (the same, gives `loss`) and `update` (gives the others);
    /// - `eval` (the same feeds; gives sums over the batch: `loss_sum`, `correct`, `weight`, and `next_correct`).
    ///
    /// Between stages there is `unshare`, named like the stage it ends.
    ///
    /// # Errors
    /// What is wrong with the sizes, with its place.
    pub fn program(&self) -> Result<Program, Error> {
        let mut p = ProgramBuilder::recomputing(&self.recompute);
        for stage in 0..self.stages.len() {
            let groups = self.groups(stage);
            let mut functions = self.training(&mut p, stage, &groups)?;
            functions.push(self.evaluation(&mut p, stage, &groups)?);
            let functions: Vec<&str> = functions.iter().map(|n| &**n).collect();
            p.stage(self.stage_name(stage), &functions)?;
            if stage > 0 {
                let before = self.groups(stage - 1);
                let origin = |path: &str| {
                    let fresh = self.reset_slots && is_slot(path) && path.starts_with("encoder/");
                    (!fresh).then(|| groups.origin(path, &before))
                };
                p.copies(self.named("unshare", stage - 1), functions[functions.len() - 2], origin)?;
            }
        }
        p.finish()
    }

    fn training(&self, p: &mut ProgramBuilder, stage: usize, groups: &Groups) -> Result<Vec<String>, Error> {
        let groups = *groups;
        let build = |g: &Graph| g.renamed(move |path| groups.path(path), || self.losses(g, Mode::Train));
        if self.parts == 1 {
            let name = self.named("train", stage);
            p.function(name.clone(), |g| {
                let losses = build(g);
                let update = self.optimizer.apply(g, &losses.loss);
                losses.follow(self.dropping.as_ref());
                g.output("loss", &losses.loss);
                update.output(g);
            })?;
            return Ok(vec![name]);
        }
        let [accumulate, update] = ["accumulate", "update"].map(|n| self.named(n, stage));
        let variables: Vec<VarId> = p.function(accumulate.clone(), |g| {
            let losses = build(g);
            let variables = self.optimizer.accumulate(g, &losses.loss, self.parts);
            losses.follow(self.dropping.as_ref());
            g.output("loss", &losses.loss);
            variables
        })?;
        p.function(update.clone(), |g| {
            let update = self.optimizer.apply_accumulated(g, &variables);
            update.output(g);
        })?;
        Ok(vec![accumulate, update])
    }

    fn evaluation(&self, p: &mut ProgramBuilder, stage: usize, groups: &Groups) -> Result<String, Error> {
        let (name, groups) = (self.named("eval", stage), *groups);
        p.function(name.clone(), |g| {
            let losses = g.renamed(move |path| groups.path(path), || self.losses(g, Mode::Eval));
            let hit = nn::arg_max(&losses.logits, "vocab").equal(&losses.targets).cast(DType::F32);
            g.output("loss_sum", &losses.words.mul(&losses.weights).sum_all());
            g.output("correct", &hit.mul(&losses.weights).sum_all());
            g.output("weight", &losses.weights.sum_all());
            if let Some((logits, next)) = &losses.next {
                g.output("next_correct", &nn::arg_max(logits, "class").equal(next).cast(DType::F32).sum_all());
            }
        })?;
        Ok(name)
    }

    /// The forward pass and what it is judged by. Nothing is dropped in evaluation.
    fn losses(&self, g: &Graph, mode: Mode) -> Losses {
        let batch = dim("batch", self.batch);
        let text = Text::feeds(g, &batch, self.seq);
        let predictions = [batch.clone(), dim("prediction", self.predictions)];
        let positions = g.input("positions", DType::I32, &predictions);
        let targets = g.input("targets", DType::I32, &predictions);
        let weights = g.input("weights", DType::F32, &predictions);
        let vocab = self.architecture.vocab_size;
        let routing = match (&self.dropping, mode) {
            (Some(dropping), Mode::Train) => Some(dropping.routing(&text.tokens, vocab)),
            _ => None,
        };
        let model = Model { architecture: &self.architecture, mode, dtype: self.dtype };
        let x = model.encoder(&text, routing.as_ref());
        let logits = model.words_at(&x, &positions);
        let words = nn::cross_entropy(&logits, &targets, "vocab");
        let mut loss = nn::weighted_mean(&words, &weights);
        let next = self.next_sentence.then(|| {
            let next = g.input("next", DType::I32, &[batch]);
            (model.classes(&model.pooled(&x), "next_sentence", 2), next)
        });
        if let Some((logits, next)) = &next {
            loss = loss.add(&nn::cross_entropy(logits, next, "class").mean_all());
        }
        Losses { loss, words, logits, targets, weights, next, vocab }
    }
}

/// What a forward pass is judged by.
struct Losses {
    /// What is minimised.
    loss: Tensor,
    /// `f32[batch, prediction]`.
    words: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    /// Logits and the truth.
    next: Option<(Tensor, Tensor)>,
    vocab: usize,
}

impl Losses {
    fn follow(&self, dropping: Option<&Dropping>) {
        if let Some(dropping) = dropping {
            dropping.follow(&self.words, &self.targets, &self.weights, self.vocab);
        }
    }
}

/// What a sentence is judged to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// One of so many classes.
    Classes(usize),
    /// A number.
    Regression,
}

/// Fine-tuning the encoder to judge sentences by its pooled output.
#[derive(Clone, Debug)]
pub struct FineTuning {
    /// The encoder's sizes.
    pub architecture: Architecture,
    /// Sentences of a step.
    pub batch: usize,
    /// Tokens of a sentence.
    pub seq: usize,
    /// What the model computes in.
    pub dtype: DType,
    /// What is judged.
    pub task: Task,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Blocks that are recomputed in the backward pass.
    pub recompute: Vec<Name>,
}

impl FineTuning {
    /// The program: `train` (feeds of [`Text::feeds`]; `labels`, `i32[batch]` for classes and `f32[batch]` for a
    /// regression; gives `loss` and the outputs of [`mesh::optim::Update::output`]) and `eval` (feeds of the text; gives `judgement`: the class `i32[batch]`,
    /// or the number `f32[batch]`).
    ///
    /// # Errors
    /// What is wrong with the sizes, with its place.
    pub fn program(&self) -> Result<Program, Error> {
        let mut p = ProgramBuilder::recomputing(&self.recompute);
        let batch = dim("batch", self.batch);
        p.function("train", |g| {
            let output = self.output(g, &batch, Mode::Train);
            let loss = match self.task {
                Task::Classes(_) => {
                    let labels = g.input("labels", DType::I32, std::slice::from_ref(&batch));
                    nn::cross_entropy(&output, &labels, "class").mean_all()
                }
                Task::Regression => {
                    let labels = g.input("labels", DType::F32, std::slice::from_ref(&batch));
                    output.sum(&["class"]).sub(&labels).square().mean_all()
                }
            };
            let update = self.optimizer.apply(g, &loss);
            g.output("loss", &loss);
            update.output(g);
        })?;
        p.function("eval", |g| {
            let output = self.output(g, &batch, Mode::Eval);
            let judgement = match self.task {
                Task::Classes(_) => nn::arg_max(&output, "class"),
                Task::Regression => output.sum(&["class"]),
            };
            g.output("judgement", &judgement);
        })?;
        p.finish()
    }

    fn output(&self, g: &Graph, batch: &Dim, mode: Mode) -> Tensor {
        let text = Text::feeds(g, batch, self.seq);
        let model = Model { architecture: &self.architecture, mode, dtype: self.dtype };
        let classes = match self.task {
            Task::Classes(n) => n,
            Task::Regression => 1,
        };
        let pooled = model.pooled(&model.encoder(&text, None));
        let keep = 1.0 - self.architecture.hidden_dropout_prob;
        g.scoped("classifier", || model.classes(&nn::dropout(&pooled, keep, mode), "head", classes))
    }
}

/// The program `embed` (feeds of [`Text::feeds`]; gives `vectors` `f32[batch, d_model]`, the mean of the sequence output
/// over what is no padding).
///
/// # Errors
/// What is wrong with the sizes, with its place.
pub fn embedding(architecture: &Architecture, batch: usize, seq: usize, dtype: DType) -> Result<Program, Error> {
    let mut p = ProgramBuilder::new();
    p.function("embed", |g| {
        let text = Text::feeds(g, &dim("batch", batch), seq);
        let model = Model { architecture, mode: Mode::Eval, dtype };
        let x = model.encoder(&text, None);
        g.output("vectors", &model.mean_pooled(&x, &text));
    })?;
    p.finish()
}
