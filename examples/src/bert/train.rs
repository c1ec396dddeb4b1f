//! Pretraining, judging it, and its plan.

use crate::config::Config;
use crate::data::{Data, fits};
use coordinator::drive::again;
use coordinator::session::FunctionId;
use coordinator::{Options, Position, Session};
use examples::bert::dropping::{Dropping, Specials};
use examples::bert::program::Pretraining;
use examples::memory::Fitted;
use examples::plan::{Outline, Shown};
use examples::report::{Work, say, thousands};
use examples::run::{self, Failed, Model, Ran, diverged, scalar};
use examples::text::kept;
use examples::text::sampler::Batch;
use mesh::array::Array;
use mesh::dim::Name;
use std::path::Path;
use std::time::{Duration, Instant};

/// What is to be done.
pub type Task = run::Task<Config>;

/// The program of a configuration, with the first step of each of its stages.
pub struct Setup {
    /// The program.
    pub pretraining: Pretraining,
    /// By stage.
    pub first: Vec<u32>,
}

impl Setup {
    /// That of a configuration, for a vocabulary with those special ids.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(c: &Config, specials: Specials) -> Result<Setup, Failed> {
        let architecture = c.architecture()?;
        let stages = c.stages(architecture.num_hidden_layers)?;
        let dropping = Dropping { keep: c.keep_tokens(), by: c.keep_by, specials };
        let pretraining = Pretraining {
            next_sentence: c.next_sentence,
            dtype: c.training.dtype.into(),
            parts: c.parts as u32,
            micro_batches: c.micro_batches,
            dropping: c.methods()?.token_drop.then_some(dropping),
            stages: stages.iter().map(|(_, groups)| *groups).collect(),
            shared: c.shared,
            reset_slots: c.reset_slots,
            ..Pretraining::plain(
                architecture,
                [c.batch / c.parts, c.seq, c.predictions()],
                c.training.optimizer(c.common.steps),
            )
        };
        Ok(Setup { pretraining, first: stages.iter().map(|(first, _)| *first).collect() })
    }

    /// The program of a run, so that it fits into the memory allowed.
    ///
    /// # Errors
    /// As [`run::Task::program`].
    pub fn program(&self, task: &Task, options: &Options) -> Result<Fitted, Failed> {
        let build =
            |recompute: &[Name]| Pretraining { recompute: recompute.to_vec(), ..self.pretraining.clone() }.program();
        task.program(options, build)
    }

    /// The stage of a step.
    fn stage(&self, step: u32) -> usize {
        self.first.iter().rposition(|first| *first <= step).unwrap_or(0)
    }

    /// The stage that a session is in.
    pub fn current(&self, session: &Session) -> usize {
        let p = &self.pretraining;
        (0..self.first.len()).find(|s| p.stage_name(*s) == session.stage()).unwrap_or(0)
    }

    /// Brings a session to the stage of a step: layers that shared variables get their own.
    fn enter(&self, session: &mut Session, step: u32) -> Result<Option<(String, Duration)>, Failed> {
        let (begun, mut news) = (Instant::now(), None);
        for stage in self.current(session)..self.stage(step) {
            let p = &self.pretraining;
            session.enter(&p.stage_name(stage + 1), Some(&p.named("unshare", stage)))?;
            let groups = p.stages[stage + 1];
            let layers = p.architecture.num_hidden_layers;
            let what = if groups == layers { "no weights".into() } else { format!("weights in {groups} groups") };
            news = Some((format!("from step {step} on layers share {what}"), begun.elapsed()));
        }
        Ok(news)
    }
}

/// What is about to be done with what, in a few lines.
fn introduction(c: &Config, setup: &Setup, data: &str, options: &Options, parameters: usize) -> String {
    let p = &setup.pretraining;
    let a = &p.architecture;
    let mut text = format!(
        "data     {data}\nmodel    {} parameters: {} layers x {}, {} heads, d_ff {}, vocabulary {}, drop-out {}\n",
        thousands(parameters as u64),
        a.num_hidden_layers,
        a.hidden_size,
        a.num_attention_heads,
        a.intermediate_size,
        thousands(a.vocab_size as u64),
        c.training.dropout,
    );
    text += &format!(
        "training {} at rate {}, batch {}{} x {} tokens, {} masked{}, seed {}\n",
        format!("{:?}", c.training.optimizer).to_lowercase(),
        c.training.rate,
        c.batch,
        match (c.parts, c.micro_batches) {
            (1, 1) => String::new(),
            (1, micro) => format!(" in {micro} micro-batches"),
            (parts, _) => format!(" in {parts} parts"),
        },
        c.seq,
        p.predictions,
        if c.next_sentence { ", next sentences" } else { "" },
        c.common.seed,
    );
    let tokens = c.batch as u64;
    let flops = |keep: usize| 3 * tokens * a.forward_flops(1, c.seq, p.predictions, keep);
    if let Some(dropping) = &p.dropping {
        let (all, kept) = (flops(c.seq), flops(dropping.keep));
        text += &format!(
            "dropping {} of {} tokens in the middle layers, by {}: {:.1} % fewer FLOPs a step\n",
            c.seq - dropping.keep,
            c.seq,
            format!("{:?}", dropping.by).to_lowercase(),
            100.0 * (1.0 - kept as f64 / all as f64),
        );
    }
    for (first, groups) in setup.first.iter().zip(&p.stages).filter(|_| p.stages.len() > 1) {
        let what = if *groups == a.num_hidden_layers { "of their own".into() } else { format!("in {groups} groups") };
        text += &format!("layers   from step {first} on: weights {what}\n");
    }
    text + &run::devices(options)
}

/// Searches for the layout, if that is asked for, by the time of the last stage; what is to be said of it.
fn searched(task: &mut Task) -> Result<String, Failed> {
    let setup = Setup::new(&task.config, Specials::default())?;
    let p = setup.pretraining;
    let function = p.named(if task.config.parts > 1 { "accumulate" } else { "train" }, p.stages.len() - 1);
    task.search(&function, |_, recompute| Pretraining { recompute: recompute.to_vec(), ..p.clone() }.program())
}

/// Floating-point operations of a step's products.
fn flops(c: &Config, p: &Pretraining) -> f64 {
    let keep = p.dropping.map_or(c.seq, |d| d.keep);
    3.0 * p.architecture.forward_flops(c.batch, c.seq, p.predictions, keep) as f64
}

/// The text of a configuration, and the program that it is for; `run` is the folder of the run if it has begun.
fn prepared(c: &Config, run: Option<&Path>) -> Result<(Data, Setup), Failed> {
    let data = Data::open(c, run)?;
    let setup = Setup::new(c, data.specials())?;
    fits(&data.vocabulary, &setup.pretraining.architecture)?;
    Ok((data, setup))
}

/// Pretrains.
pub fn pretrain(mut task: Task) -> Result<(), Failed> {
    eprint!("{}", searched(&mut task)?);
    let task = &task;
    let options = task.begin()?;
    let c = &task.config;
    let (data, setup) = prepared(c, task.resume.then_some(task.out.as_path()))?;
    let fitted = setup.program(task, &options)?;
    let mut running = task.session(fitted.program, &options)?;
    let session = &mut running.session;
    let parameters = session.program().parameters();
    eprint!("{}{}", introduction(c, &setup, &data.description, &options, parameters), fitted.text);
    let entropy = data.train.unigram_entropy(&data.held_out)?;
    eprintln!("unigrams {entropy:.3} nats: what a model that knows only how often words are would lose");
    task.train(session, &mut Training { config: c, setup: &setup, data: &data })?;
    let judgement = judge(session, &setup, &data, c)?;
    judgement.say(entropy);
    if !judgement.loss.is_finite() {
        return Err(diverged(format!("the loss of what is held out is {}", judgement.loss)));
    }
    Ok(())
}

/// Steps on a corpus.
struct Training<'a> {
    config: &'a Config,
    setup: &'a Setup,
    data: &'a Data,
}

/// Feeds a batch.
fn feed(session: &mut Session, f: FunctionId, batch: &Batch, next_sentence: bool) -> Result<(), Failed> {
    session.feed(f, "tokens", &Array::from(batch.tokens.clone()))?;
    session.feed(f, "segments", &Array::from(batch.segments.clone()))?;
    session.feed(f, "lengths", &Array::from(batch.lengths.clone()))?;
    session.feed(f, "positions", &Array::from(batch.positions.clone()))?;
    session.feed(f, "targets", &Array::from(batch.targets.clone()))?;
    session.feed(f, "weights", &Array::from(batch.weights.clone()))?;
    if next_sentence {
        session.feed(f, "next", &Array::from(batch.next.clone()))?;
    }
    Ok(())
}

impl Model for Training<'_> {
    fn run(&mut self, session: &mut Session, at: &Position) -> Result<Ran, Failed> {
        let (c, setup) = (self.config, self.setup);
        if let Some((news, took)) = setup.enter(session, at.step)? {
            eprintln!("{news} ({:.0} ms)", took.as_secs_f64() * 1e3);
        }
        let stage = setup.current(session);
        let p = &setup.pretraining;
        let begun = Instant::now();
        let part = (c.batch / c.parts) as u64;
        let take = |session: &mut Session, f, part_number: u64| {
            let first = at.samples + part_number * part;
            let batch = self.data.train.batch(first..first + part)?;
            feed(session, f, &batch, c.next_sentence)?;
            Ok((first..first + part).collect::<Vec<u64>>())
        };
        let mut ran = if c.parts == 1 {
            let f = session.function(&p.named("train", stage))?;
            run::one(session, f, at.step, |session| take(session, f, 0))?
        } else {
            let f = session.function(&p.named("accumulate", stage))?;
            let mut ran = Ran::default();
            for part in 0..c.parts as u64 {
                let begun = Instant::now();
                ran.samples.extend(take(session, f, part)?);
                ran.feed += begun.elapsed();
                // Each part draws random numbers of its own.
                session.step(f, at.step * c.parts as u32 + part as u32)?;
                ran.communicate += session.communicated();
                ran.loss += scalar(session, f, "loss")? / c.parts as f32;
            }
            let f = session.function(&p.named("update", stage))?;
            session.step(f, at.step)?;
            ran.update(session, f)?;
            ran.run = begun.elapsed() - ran.feed;
            ran
        };
        let seconds = (ran.feed + ran.run).as_secs_f64();
        ran.figures.row.push(("tokens_per_second", (c.batch * c.seq) as f64 / seconds));
        let done = at.step + 1;
        if c.training.judges(done, c.common.steps) {
            let judgement = judge(session, setup, self.data, c)?;
            ran.figures.row.extend(judgement.figures());
            ran.figures.shown.push(("held out", judgement.loss));
        }
        Ok(ran)
    }

    fn work(&self) -> Work {
        let c = self.config;
        let flops = (flops(c, &self.setup.pretraining), c.training.dtype.into());
        Work { amount: (c.batch * c.seq) as f64, unit: "token", flops: Some(flops) }
    }

    fn keep(&self, folder: &Path) -> Result<(), Failed> {
        Ok(kept::keep(folder, &self.data.vocabulary)?)
    }
}

/// How well masked words of documents that were held out are found.
struct Judgement {
    /// Mean loss of a masked word in nats.
    loss: f64,
    /// Share of them that the most probable word is right for.
    accuracy: f64,
    /// Share of next sentences that are told from others.
    next_accuracy: Option<f64>,
    /// Masked words.
    words: f64,
}

impl Judgement {
    fn figures(&self) -> Vec<(&'static str, f64)> {
        let mut figures = vec![("held_out_loss", self.loss), ("held_out_accuracy", self.accuracy)];
        figures.extend(self.next_accuracy.map(|a| ("held_out_next_accuracy", a)));
        figures
    }

    fn say(&self, entropy: f64) {
        say(format!("held-out masked-word loss {:.4} nats ({} words; unigrams {entropy:.4})", self.loss, self.words));
        say(format!("held-out masked-word accuracy {:.4}", self.accuracy));
        if let Some(accuracy) = self.next_accuracy {
            say(format!("held-out next-sentence accuracy {accuracy:.4}"));
        }
    }
}

/// Judges the variables of a session on what is held out; all tokens are kept.
fn judge(session: &mut Session, setup: &Setup, data: &Data, c: &Config) -> Result<Judgement, Failed> {
    let part = (c.batch / c.parts) as u64;
    let batches = (data.held_out.len() / part).clamp(1, c.eval_batches as u64);
    let mut sums = [0.0f64; 4];
    for i in 0..batches {
        let batch = data.held_out.batch(i * part..(i + 1) * part)?;
        let got = again(
            session,
            |note| eprintln!("{note}"),
            |session| {
                let f = session.function(&setup.pretraining.named("eval", setup.current(session)))?;
                feed(session, f, &batch, c.next_sentence)?;
                session.step(f, 0)?;
                let get = |name| scalar(session, f, name).map(f64::from);
                let next = if c.next_sentence { get("next_correct")? } else { 0.0 };
                Ok::<_, Failed>([get("loss_sum")?, get("correct")?, get("weight")?, next])
            },
        )?;
        sums.iter_mut().zip(got).for_each(|(sum, v)| *sum += v);
    }
    let [loss, correct, words, next] = sums;
    Ok(Judgement {
        loss: loss / words,
        accuracy: correct / words,
        next_accuracy: c.next_sentence.then(|| next / (batches * part) as f64),
        words,
    })
}

/// Judges a run's newest checkpoint.
pub fn eval(task: &Task) -> Result<(), Failed> {
    let options = task.begun()?;
    let c = &task.config;
    let (data, setup) = prepared(c, Some(&task.out))?;
    let mut running = task.session(setup.program(task, &options)?.program, &options)?;
    let session = &mut running.session;
    task.restored(session)?;
    let entropy = data.train.unigram_entropy(&data.held_out)?;
    judge(session, &setup, &data, c)?.say(entropy);
    Ok(())
}

/// Prints what a run would do.
pub fn plan(mut task: Task, shown: &Shown) -> Result<(), Failed> {
    let searched = searched(&mut task)?;
    let setup = Setup::new(&task.config, Specials::default())?;
    shown.run("bert", task, |task, options| {
        let c = &task.config;
        let Fitted { program, text: recomputed } = setup.program(task, options)?;
        let introduction = introduction(c, &setup, &c.data, options, program.parameters()) + &recomputed + &searched;
        let of_stage = |stage: usize| {
            let p = &setup.pretraining;
            let function = p.named(if c.parts > 1 { "accumulate" } else { "train" }, stage);
            Ok((program.stage(&p.stage_name(stage))?, function))
        };
        let functions = (0..setup.first.len()).map(of_stage).collect::<Result<Vec<_>, Failed>>()?;
        Ok(Outline { introduction, functions })
    })
}
