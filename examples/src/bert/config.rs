//! The configuration of a run.

use examples::bert::architecture::Architecture;
use examples::bert::dropping::KeepBy;
use examples::bert::hf;
use examples::bert::sharing::Shared;
use examples::settings::{Common, Dtype, Mistake, Settings, mistake, range};
use mesh::optim::{Adam, Optimizer, Rule, Schedule};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with weight decay apart from the gradient.
    Adamw,
    /// AdamW with each variable's update scaled to its own norm, for large batches.
    Lamb,
}

/// How weights are trained, whatever for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Optimizer.
    pub optimizer: OptimizerKind,
    /// The highest learning rate.
    pub rate: f32,
    /// Steps until it is reached; 0: a tenth of all.
    pub warmup: u32,
    /// Weight decay, of all but biases and norms.
    pub decay: f32,
    /// The gradients' norm is cut to this.
    pub clip: f32,
    /// Drop-out of activations and attention weights.
    pub dropout: f32,
    /// Element type.
    pub dtype: Dtype,
    /// Steps between judgements on what is held out; one is always done at the end.
    pub eval_every: u32,
}

impl Default for Training {
    fn default() -> Self {
        Training {
            optimizer: OptimizerKind::Adamw,
            rate: 1e-3,
            warmup: 0,
            decay: 0.01,
            clip: 1.0,
            dropout: 0.1,
            dtype: Dtype::F32,
            eval_every: 100,
        }
    }
}

impl Training {
    /// Checks the numbers, and the share that is held out.
    ///
    /// # Errors
    /// One that makes no sense.
    pub fn check(&self, held_out: f64) -> Result<(), Mistake> {
        let shares = [("--dropout", f64::from(self.dropout)), ("held_out", held_out)];
        if let Some((option, share)) = shares.into_iter().find(|(_, s)| !(0.0..1.0).contains(s)) {
            return mistake(format!("{option} {share} is no share"), "it goes from 0 (none) to below 1");
        }
        let numbers = [("--rate", self.rate), ("decay", self.decay), ("clip", self.clip)];
        if let Some((option, v)) = numbers.into_iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return mistake(format!("{option} {v} makes no sense"), "it is a finite number from 0 on");
        }
        Ok(())
    }

    /// The optimizer of a run of so many steps.
    pub fn optimizer(&self, steps: u32) -> Optimizer {
        let warmup = if self.warmup > 0 { self.warmup } else { steps.div_ceil(10) };
        let power = 1.0;
        let rate = Schedule::Polynomial { start: self.rate, end: 0.0, power, steps }.warmup(warmup);
        let adam = Adam { eps: 1e-6, trust: self.optimizer == OptimizerKind::Lamb, ..Adam::default() };
        let optimizer = Optimizer { rule: Rule::Adam(adam), ..Optimizer::adamw(rate, self.decay) };
        let optimizer = self.dtype.trains(optimizer);
        if self.clip > 0.0 { optimizer.clipped(self.clip) } else { optimizer }
    }

    /// Whether what is held out is judged after so many steps of all.
    pub fn judges(&self, done: u32, steps: u32) -> bool {
        self.eval_every > 0 && done.is_multiple_of(self.eval_every) || done == steps
    }
}

/// Ways to train with less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Methods {
    /// Drop tokens in the middle layers (Hou et al. 2022).
    pub token_drop: bool,
    /// Share the layers' weights at first (Yang et al. 2021).
    pub share_unshare: bool,
}

/// Which dimensions an axis splits by its name: (axis, dimension).
pub const SPLITS: &[(&str, &str)] = &[
    ("data", "batch"),
    ("batch", "batch"),
    ("model", "heads"),
    ("model", "d_ff"),
    ("model", "vocab"),
    ("heads", "heads"),
    ("d_ff", "d_ff"),
    ("vocab", "vocab"),
    ("seq", "seq"),
];

/// A run's configuration. Every field is a key of the TOML file and of `--set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The keys of every run.
    #[serde(flatten)]
    pub common: Common,
    /// `mini`, `small`, `base`, `large`, `LxDxH` (layers, width, heads), or a config.json.
    pub size: String,
    /// `plain`, `token-drop`, `share-unshare`, or the last two with a comma between.
    pub method: String,
    /// Positions of a sequence that token dropping keeps; 0: half.
    pub keep_tokens: usize,
    /// What tokens are kept by.
    pub keep_by: KeepBy,
    /// Where layers are unshared: a share of the steps (below 1, with a point), or a step.
    pub unshare_at: f64,
    /// Numbers of groups that share weights, one after the other until the layers are unshared.
    pub groups: String,
    /// What of a layer is shared.
    pub shared: Shared,
    /// Whether optimizer slots start anew when layers are unshared.
    pub reset_slots: bool,
    /// `brown`, or a text file, a folder of them, or a file of JSON lines.
    pub data: String,
    /// vocab.txt or tokenizer.json; empty: that of BERT, uncased.
    pub vocab: String,
    /// A document is held out by this probability.
    pub held_out: f64,
    /// Sequences of a step.
    pub batch: usize,
    /// Micro-batches that a step's sequences are cut into.
    pub parts: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Masked words of a sequence at the most; 0: 15 % of it.
    pub predictions: usize,
    /// Whether all pieces of a word are masked together.
    pub whole_words: bool,
    /// Whether sequences are pairs, of which the second may be the next sentence.
    pub next_sentence: bool,
    /// How the weights are trained.
    #[serde(flatten)]
    pub training: Training,
    /// Batches of a judgement at the most.
    pub eval_batches: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            common: Common { mesh: "1".into(), steps: 1000, checkpoint_every: 200, ..Common::default() },
            size: "mini".into(),
            method: "plain".into(),
            keep_tokens: 0,
            keep_by: KeepBy::Importance,
            unshare_at: 0.1,
            groups: "1".into(),
            shared: Shared::Layer,
            reset_slots: false,
            data: "brown".into(),
            vocab: String::new(),
            held_out: 0.05,
            batch: 32,
            parts: 1,
            seq: 128,
            predictions: 0,
            whole_words: false,
            next_sentence: true,
            training: Training::default(),
            eval_batches: 20,
        }
    }
}

impl Settings for Config {
    const AXES: &'static [&'static str] = &["data"];
    const SPLITS: &'static [(&'static str, &'static str)] = SPLITS;

    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn check_own(&self) -> Result<(), Mistake> {
        range("--batch", self.batch as u64, 1, 1 << 20)?;
        range("--parts", self.parts as u64, 1, 1 << 16)?;
        range("--seq", self.seq as u64, 8, 1 << 16)?;
        range("eval_batches", self.eval_batches as u64, 1, 1 << 20)?;
        if !self.batch.is_multiple_of(self.parts) {
            let what = format!("--parts {} does not divide --batch {}", self.parts, self.batch);
            return mistake(what, "make it a divisor of the batch");
        }
        range("--predictions", self.predictions as u64, 0, self.seq as u64 / 2)?;
        range("--keep-tokens", self.keep_tokens as u64, 0, self.seq as u64)?;
        self.training.check(self.held_out)?;
        if !(self.unshare_at.is_finite() && self.unshare_at >= 0.0) {
            return mistake(
                format!("--unshare-at {} is no time", self.unshare_at),
                "write a share of the steps, such as 0.1, or a step, such as 100",
            );
        }
        self.methods()?;
        Ok(())
    }
}

impl Config {
    /// The methods chosen.
    ///
    /// # Errors
    /// A name that there is not.
    pub fn methods(&self) -> Result<Methods, Mistake> {
        let mut methods = Methods { token_drop: false, share_unshare: false };
        for name in self.method.split([',', '+']).map(str::trim) {
            match name {
                "plain" | "" => {}
                "token-drop" => methods.token_drop = true,
                "share-unshare" => methods.share_unshare = true,
                _ => {
                    let known = ["plain", "token-drop", "share-unshare"];
                    let near = mesh::error::nearest(name, known).map(|n| format!("did you mean `{n}`?"));
                    let help =
                        near.unwrap_or("it is plain, token-drop, share-unshare, or token-drop,share-unshare".into());
                    return mistake(format!("there is no method `{name}`"), help);
                }
            }
        }
        Ok(methods)
    }

    /// The encoder's sizes, with the drop-out of this configuration.
    ///
    /// # Errors
    /// A size that there is not, or a config.json that is not usable.
    pub fn architecture(&self) -> Result<Architecture, Mistake> {
        let a = architecture(&self.size, self.seq, self.training.dropout)?;
        let methods = self.methods()?;
        if methods.token_drop && a.num_hidden_layers < 3 {
            let what = format!("token dropping has nothing to skip in {} layers", a.num_hidden_layers);
            return mistake(what, "use a model of at least 3 layers");
        }
        Ok(a)
    }

    /// Masked words of a sequence at the most.
    pub fn predictions(&self) -> usize {
        if self.predictions > 0 { self.predictions } else { (self.seq * 15).div_ceil(100) }
    }

    /// Positions that token dropping keeps.
    pub fn keep_tokens(&self) -> usize {
        if self.keep_tokens > 0 { self.keep_tokens } else { self.seq.div_ceil(2) }
    }

    /// Stages of sharing: (first step, groups), of which the last has no groups left. One if nothing is shared.
    ///
    /// # Errors
    /// Groups that are no ascending numbers below that of the layers.
    pub fn stages(&self, layers: usize) -> Result<Vec<(u32, usize)>, Mistake> {
        if !self.methods()?.share_unshare {
            return Ok(vec![(0, layers)]);
        }
        let groups: Option<Vec<usize>> = self.groups.split(',').map(|n| n.trim().parse().ok()).collect();
        let ascending =
            |g: &[usize]| g.windows(2).all(|w| w[0] < w[1]) && g.first() >= Some(&1) && g.last() < Some(&layers);
        let Some(groups) = groups.filter(|g| ascending(g)) else {
            return mistake(
                format!("groups `{}` do not lead to {layers} layers", self.groups),
                format!("write ascending numbers from 1 to below {layers}, such as `1` or `1,2,4`"),
            );
        };
        let steps = self.common.steps;
        let end = if self.unshare_at < 1.0 { f64::from(steps) * self.unshare_at } else { self.unshare_at };
        let end = end.round().min(f64::from(u32::MAX)) as u32;
        let begin = |i: usize| (u64::from(end) * i as u64 / groups.len() as u64) as u32;
        let all = groups.iter().copied().enumerate().map(|(i, g)| (begin(i), g)).chain([(end, layers)]);
        // What is never reached is not planned for.
        Ok(all.filter(|(first, _)| *first == 0 || *first < steps).collect())
    }
}

/// The sizes that a text names (`mini`, `6x256x4`, or a config.json), for sequences of `seq` tokens.
///
/// # Errors
/// A size that there is not, or a config.json that is not usable; one with fewer positions.
pub fn architecture(size: &str, seq: usize, dropout: f32) -> Result<Architecture, Mistake> {
    let named = Architecture::named(size).or_else(|| {
        let numbers: Option<Vec<usize>> = size.split('x').map(|n| n.parse().ok().filter(|n| *n > 0)).collect();
        match numbers?[..] {
            [layers, d_model, heads] if d_model % heads == 0 => Some(Architecture::sized(layers, d_model, heads)),
            _ => None,
        }
    });
    let path = Path::new(size);
    let of_file = || {
        let file = if path.is_dir() { path.join(hf::CONFIG) } else { path.into() };
        let read = hf::Config::read(&file).map(|c| c.architecture);
        read.map_err(|e| Mistake::File { place: size.into(), why: e.to_string() })
    };
    let a = match named {
        Some(a) => a,
        None if path.exists() => of_file()?,
        None => {
            return mistake(
                format!("there is no size `{size}`"),
                "it is mini, small, base, large, layers x width x heads (6x256x4), or a config.json",
            );
        }
    };
    fitted(a, seq, dropout)
}

/// An architecture with that drop-out.
///
/// # Errors
/// One with fewer positions than `seq`.
pub fn fitted(mut a: Architecture, seq: usize, dropout: f32) -> Result<Architecture, Mistake> {
    (a.hidden_dropout_prob, a.attention_probs_dropout_prob) = (dropout, dropout);
    if seq > a.max_position_embeddings {
        let what = format!("--seq {seq} is longer than the model's {} positions", a.max_position_embeddings);
        return mistake(what, "use shorter sequences, or a model with more positions");
    }
    Ok(a)
}
