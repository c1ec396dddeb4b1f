//! Training, and judging what was trained: as much of it as is the same for every model.
//!
//! A program's `train` is: [`Task::begin`], its data, [`Task::session`] with its program, its introduction,
//! [`Task::train`] with its [`Model`], and whatever it makes of the trained variables. Its `eval` is [`Task::begun`], a
//! session, [`Task::restored`]; its `plan` is in [`crate::plan`].

use crate::chart::{Chart, Series};
use crate::report::{Figures, Phases, Progress, Row, Rows, Work, bytes, column, say};
use crate::search::AUTO;
use crate::settings::{Mistake, Settings, layout_of, memory_bytes, mistake};
use crate::tensorboard::Events;
use coordinator::checkpoint::{Catalogue, Checkpoints, Restored};
use coordinator::drive::{self, End, Schedule, again, drive};
use coordinator::launch::Launched;
use coordinator::session::FunctionId;
use coordinator::{Failure, Options, Position, Session, interrupt, recorder};
use mesh::layout::Mesh;
use mesh::machine::Machine;
use mesh::program::Program;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use worker::data::DataError;
use worker::kernels::roofline::product_flops;
use worker::store::Store;
use worker::tls::Tls;
use worker::transport::connector::TransportChoice;

/// The resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
/// The rows of figures in a run folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The picture of the loss in a run folder.
pub const LOSS_FILE: &str = "loss.png";
/// The folder of event files for TensorBoard in a run folder.
pub const TENSORBOARD: &str = "tensorboard";
/// Where the time of a step went, in a run folder: for people, and for programs.
pub const PROFILE_FILES: [&str; 2] = ["profile.txt", "profile.json"];
/// Points of that picture's line at most; those of a longer run are means.
const LOSS_POINTS: usize = 200;
const CHECKPOINTS: &str = "checkpoints";

/// Where the devices are.
pub enum Place {
    /// In this process.
    Here,
    /// In so many worker processes, started for this run.
    Workers(usize),
    /// In the workers of a coordinator.
    Coordinator(String),
}

/// A session, and the workers that were started for it, which end after it.
pub struct Running {
    /// The session.
    pub session: Session,
    _workers: Option<Launched>,
}

/// What is to be done.
pub struct Task<C> {
    /// How.
    pub config: C,
    /// Run folder.
    pub out: PathBuf,
    /// Whether to go on from a checkpoint.
    pub resume: bool,
    /// Devices there are, if given.
    pub devices: Option<usize>,
    /// Whether the number of chunks is given, or that of the run which goes on: a search keeps to it then.
    pub chunks_given: bool,
    /// The machine that is planned for, if one is named.
    pub machine: Option<Machine>,
    /// Where the devices are.
    pub place: Place,
    /// How worker processes reach each other.
    pub transport: TransportChoice,
    /// Where checkpoints are; None for the run folder.
    pub checkpoints: Option<String>,
    /// Whether to go on with fewer devices when workers are lost.
    pub shrink: bool,
    /// Where to write a trace of the last steps, if anywhere.
    pub trace: Option<PathBuf>,
    /// Whether to say where the time of a step went.
    pub profile: bool,
    /// TLS to a coordinator.
    pub tls: Option<Tls>,
}

/// Why a command failed. Each text begins with its code, or is a whole `error[code]: ..` already.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] Mistake),
    /// The data, or writing results.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The session: program, layout, devices, checkpoints.
    #[error(transparent)]
    Session(#[from] Failure),
    /// What only this model program knows of.
    #[error("{error}")]
    Own {
        /// What.
        error: Box<dyn std::error::Error + Send + Sync>,
        /// The process's exit code.
        exit_code: u8,
    },
    /// The run folder.
    #[error("U0007: cannot write {}: {why}", path.display())]
    Output {
        /// What.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// Training went wrong.
    #[error("U0008: {what}\n  help: {help}")]
    Diverged {
        /// What.
        what: String,
        /// What to do.
        help: String,
    },
    /// A step that was done again after a loss came out otherwise.
    #[error(
        "U0009: step {step} was done again after a loss and came out otherwise: {field} was {before} and is {now}\n  help: use one build and one kind of machine everywhere; if they are, please report it"
    )]
    Otherwise {
        /// The step.
        step: u32,
        /// What differs.
        field: &'static str,
        /// Before.
        before: String,
        /// Now.
        now: String,
    },
    /// The process was asked to stop, and did.
    #[error("U0010: stopped as asked after step {step}; go on with --resume")]
    Interrupted {
        /// Steps done.
        step: u32,
    },
}

impl From<mesh::error::Error> for Failed {
    fn from(e: mesh::error::Error) -> Failed {
        Failed::Session(e.into())
    }
}

impl Failed {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failed::Config(_) => 2,
            Failed::Data(DataError::Format { .. } | DataError::File { what: "read", .. }) => 3,
            Failed::Session(failure) => failure.exit_code(),
            Failed::Own { exit_code, .. } => *exit_code,
            Failed::Interrupted { .. } => 75,
            Failed::Data(DataError::Fetch(_) | DataError::File { .. })
            | Failed::Output { .. }
            | Failed::Diverged { .. }
            | Failed::Otherwise { .. } => 1,
        }
    }
}

/// That training has diverged.
pub fn diverged(what: String) -> Failed {
    let help = "try a smaller learning rate, a longer warm-up, or gradients that are cut off at a norm".into();
    Failed::Diverged { what: format!("training has diverged: {what}"), help }
}

/// The result of writing something.
///
/// # Errors
/// What could not be written, and why.
pub fn written<T>(path: &Path, result: std::io::Result<T>) -> Result<T, Failed> {
    result.map_err(|why| Failed::Output { path: path.into(), why })
}

/// Prints a text that is a command's result.
///
/// # Errors
/// A standard output that cannot be written.
pub fn print(text: &str) -> Result<(), Failed> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever read it has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => written(Path::new("to the standard output"), result),
    }
}

/// `1 device`, `2 devices`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Devices and layout, as lines of a run's introduction.
pub fn devices(options: &Options) -> String {
    let mut text = format!(
        "mesh     {} ({}, {} each), layout {}\n",
        options.mesh,
        count(options.mesh.size(), "device"),
        count(options.threads(), "thread"),
        if options.layout.is_empty() { "of nothing split".into() } else { options.layout.to_string() },
    );
    for (axis, _) in options.mesh.axes().iter().filter(|(_, size)| *size > 1) {
        if !options.layout.uses(axis) {
            text +=
                &format!("note     no dimension is split over the axis `{axis}`: devices along it do the same work\n");
        }
    }
    text
}

/// A value that a function gives as a scalar.
///
/// # Errors
/// A session that is lost, an output that there is not.
pub fn scalar(session: &Session, f: FunctionId, name: &str) -> Result<f32, Failed> {
    Ok(session.fetch(f, name)?.to_f32().unwrap_or(f32::NAN))
}

/// A step that was run.
#[derive(Default)]
pub struct Ran {
    /// Its loss.
    pub loss: f32,
    /// The norm of all gradients.
    pub grad_norm: f32,
    /// Whether loss scaling skipped the update, and the next step has a smaller scale.
    pub skipped: bool,
    /// The numbers of its samples.
    pub samples: Vec<u64>,
    /// What to show besides.
    pub figures: Figures,
    /// Time to make and send what it was fed.
    pub feed: Duration,
    /// Time that it ran on the devices.
    pub run: Duration,
    /// Of that, the device that did so longest, moving data and waiting for others.
    pub communicate: Duration,
}

impl Ran {
    /// Takes what a function shows of its update.
    ///
    /// # Errors
    /// As [`scalar`].
    pub fn update(&mut self, session: &Session, f: FunctionId) -> Result<(), Failed> {
        self.grad_norm = scalar(session, f, "grad_norm")?;
        if session.results(f).any(|name| name == "loss_scale") {
            let [scale, skipped] = [scalar(session, f, "loss_scale")?, scalar(session, f, "skipped_steps")?];
            // At the least scale nothing is left to halve.
            self.skipped = !self.grad_norm.is_finite() && scale > 1.0;
            let figures = [("loss_scale", f64::from(scale)), ("skipped_steps", f64::from(skipped))];
            self.figures.row.extend(figures);
            self.figures.shown.extend([("scale", figures[0].1), ("skipped", figures[1].1)]);
        }
        Ok(())
    }
}

/// What a model brings to its training.
pub trait Model {
    /// Runs step `at.step`, whose samples begin with number `at.samples`. A step that comes again does the same.
    ///
    /// # Errors
    /// Data that fail; a session that is lost.
    fn run(&mut self, session: &mut Session, at: &Position) -> Result<Ran, Failed>;

    /// What a step gets done.
    fn work(&self) -> Work;

    /// Keeps in the run folder what a run that is gone on with is checked against, beside its configuration.
    ///
    /// # Errors
    /// What cannot be written.
    fn keep(&self, _folder: &Path) -> Result<(), Failed> {
        Ok(())
    }
}

/// Runs the function `f`, which gives `loss` and what [`Ran::update`] takes, with what `feed` gives it; says which samples that were.
///
/// # Errors
/// As [`Model::run`].
pub fn one(
    session: &mut Session,
    f: FunctionId,
    step: u32,
    feed: impl FnOnce(&mut Session) -> Result<Vec<u64>, Failed>,
) -> Result<Ran, Failed> {
    let begun = Instant::now();
    let samples = feed(session)?;
    let fed = begun.elapsed();
    session.step(f, step)?;
    let run = begun.elapsed() - fed;
    let (loss, communicate) = (scalar(session, f, "loss")?, session.communicated());
    let mut ran = Ran { loss, samples, feed: fed, run, communicate, ..Ran::default() };
    ran.update(session, f)?;
    Ok(ran)
}

impl<C: Settings> Task<C> {
    /// Options of the session.
    ///
    /// # Errors
    /// A mesh, a layout or a place for checkpoints that cannot be.
    pub fn options(&self) -> Result<Options, Failed> {
        let c = self.config.common();
        if c.layout.trim() == AUTO || c.mesh.trim() == AUTO {
            let what = "a layout can be searched for by `plan`, `train` and `pretrain` only";
            mistake(what, "give --mesh and --layout, such as those that one of these has found")?;
        }
        let mesh: Mesh = c.mesh.parse()?;
        let layout = if c.layout.is_empty() { layout_of(&mesh, C::SPLITS) } else { c.layout.clone() };
        Ok(Options {
            layout: layout.parse()?,
            devices: self.devices,
            threads: (c.threads > 0).then_some(c.threads),
            memory: memory_bytes(&c.memory)?,
            seed: c.seed,
            transport: self.transport,
            checkpoints: Some(Checkpoints { location: self.location()?, keep: c.keep }),
            shrink: self.shrink,
            tls: self.tls.clone(),
            mesh,
            waiting: false,
        })
    }

    /// Where checkpoints are, in a form that workers understand as well.
    fn location(&self) -> Result<String, Failed> {
        let location = self.checkpoints.clone().unwrap_or_else(|| self.out.join(CHECKPOINTS).display().to_string());
        let store = Store::open(&location).map_err(|e| Failure::Checkpoint(e.to_string()))?;
        Ok(store.location().into())
    }

    /// Begins a training run, before anything is loaded: from here on, being asked to stop ends it with a checkpoint.
    ///
    /// # Errors
    /// A run folder that holds a run which is not to be resumed; options that cannot be.
    pub fn begin(&self) -> Result<Options, Failed> {
        let options = self.options()?;
        if !self.resume && (self.out.join(METRICS_FILE).exists() || self.has_checkpoints()?) {
            return Err(
                self.folder("holds a run already", "go on with it by --resume, or name another folder with --out")
            );
        }
        // Only now: what has not begun may be stopped in the usual way.
        interrupt::listen(75).map_err(|e| Failure::Mesh(format!("cannot listen for signals: {e}")))?;
        Ok(options)
    }

    /// Options for a command on a run that there is.
    ///
    /// # Errors
    /// A run folder that holds no run; options that cannot be.
    pub fn begun(&self) -> Result<Options, Failed> {
        if !self.out.join(CONFIG_FILE).exists() {
            return Err(self.folder("holds no run", "train first, or name the folder of a run with --out"));
        }
        self.options()
    }

    /// Begins a session where the devices are.
    ///
    /// # Errors
    /// A layout that cannot be, a plan over the memory allowed; workers or a coordinator that are not there.
    pub fn session(&self, program: Program, options: &Options) -> Result<Running, Failed> {
        let session = match &self.place {
            Place::Here => Session::embedded(program, options)?,
            Place::Coordinator(url) => Session::connect(url, program, options)?,
            Place::Workers(n) => {
                let devices = options.mesh.size();
                if *n == 0 || !devices.is_multiple_of(*n) {
                    return mistake(
                        format!("--workers {n} cannot share out the {devices} devices of the mesh {}", options.mesh),
                        "make it a divisor of the number of devices",
                    )?;
                }
                // What is wrong with the plan is said before any process starts.
                options.plan(&program)?;
                let own = std::env::current_exe()
                    .map_err(|why| Failed::Output { path: "this program's own file".into(), why })?;
                let (each, threads) = (format!("cpu:{}", devices / n), options.threads().to_string());
                let store = options.checkpoints.as_ref().map_or(".", |c| &c.location).to_string();
                let below = store.clone();
                let workers = Launched::start(*n, &store, move |address| {
                    let mut command = std::process::Command::new(&own);
                    command.args(["worker", "--join", address, "--devices", &each, "--threads", &threads]);
                    command.args(["--store", &below]);
                    command
                })?;
                let options = Options { tls: Some(workers.tls.clone()), ..options.clone() };
                let session = Session::connect(&workers.url, program, &options)?;
                return Ok(Running { session, _workers: Some(workers) });
            }
        };
        Ok(Running { session, _workers: None })
    }

    /// Sets a session's variables to the newest good checkpoint of the run; None for a run that has begun and not written
    /// one yet.
    fn restore(&self, session: &mut Session) -> Result<Option<Restored>, Failed> {
        let restored = session.restore();
        session.notes().iter().for_each(|note| eprintln!("{note}"));
        match restored? {
            None if !self.out.join(CONFIG_FILE).exists() => Err(self.none_good()),
            restored => Ok(restored),
        }
    }

    /// Sets a session's variables to the newest good checkpoint of the run, and says which that is.
    ///
    /// # Errors
    /// No good checkpoint, or that of another program.
    pub fn restored(&self, session: &mut Session) -> Result<Restored, Failed> {
        let restored = self.restore(session)?.ok_or_else(|| self.none_good())?;
        eprintln!("checkpoint {} of {} steps", restored.folder, restored.position.step);
        Ok(restored)
    }

    /// Floating-point operations a second that the devices can do at the most in what a step does, where they are this
    /// process's own.
    fn most(&self, session: &Session, work: &Work) -> Option<f64> {
        let (_, dtype) = work.flops.filter(|_| matches!(self.place, Place::Here))?;
        Some(product_flops(dtype, session.options().threads() * session.plan().mesh.size()))
    }

    fn none_good(&self) -> Failed {
        Failure::Checkpoint(format!("C0004: there is no good checkpoint in {}", self.out.display())).into()
    }

    /// Whether there is any checkpoint.
    fn has_checkpoints(&self) -> Result<bool, Failed> {
        let store = Store::open(&self.location()?).map_err(|e| Failure::Checkpoint(e.to_string()))?;
        Ok(!Catalogue::new(store).entries().map_err(|e| Failure::Checkpoint(e.to_string()))?.is_empty())
    }

    fn folder(&self, what: &str, help: &str) -> Failed {
        Mistake::Folder { folder: self.out.clone(), what: what.into(), help: help.into() }.into()
    }

    /// Trains all steps, from the newest good checkpoint on if the run is resumed, and leaves the trained variables in the
    /// session.
    ///
    /// # Errors
    /// Whatever goes wrong; being asked to stop.
    pub fn train(&self, session: &mut Session, model: &mut impl Model) -> Result<(), Failed> {
        let c = self.config.common();
        session.links().iter().for_each(|link| eprintln!("links    {link}"));
        let most = (0..session.plan().mesh.size()).map(|d| session.plan().peak_bytes(d)).max().unwrap_or(0);
        eprintln!("memory   {} at most on a device\nrun      {}", bytes(most), self.out.display());
        let mut at = self.start(session)?;
        written(&self.out, fs::create_dir_all(&self.out))?;
        let path = self.out.join(CONFIG_FILE);
        written(&path, fs::write(&path, self.config.to_toml()))?;
        model.keep(&self.out)?;
        let most = self.most(session, &model.work());
        let mut training = Training {
            model,
            steps: c.steps,
            rows: Rows::open(&self.out.join(METRICS_FILE), at.step)?,
            events: Events::begin(&self.out.join(TENSORBOARD), at.step)?,
            progress: Progress::new(at.step, c.steps, std::io::stderr().is_terminal(), most),
        };
        let schedule = Schedule { steps: c.steps, checkpoint_every: c.checkpoint_every };
        let end = drive(session, &mut training, &mut at, &schedule);
        training.progress.finish();
        let end = match end {
            Err(Failed::Diverged { what, help }) => {
                let (model, last) = (&mut *training.model, at.step);
                let origin = self.origin(session, model, last).unwrap_or_else(|e| format!("\n  note: {e}"));
                return Err(Failed::Diverged { what: what + &origin, help });
            }
            end => end?,
        };
        if let Some(path) = &self.trace {
            let trace = recorder::trace(&session.events()?);
            written(path, fs::write(path, trace.to_string()))?;
        }
        if self.profile {
            let profile = session.profile()?;
            let json = serde_json::to_string_pretty(&profile).expect("a profile has no maps");
            for (name, text) in PROFILE_FILES.iter().zip([profile.text(), json]) {
                let path = self.out.join(name);
                written(&path, fs::write(&path, text))?;
            }
            say(profile.text());
        }
        if end == End::Interrupted {
            return Err(Failed::Interrupted { step: at.step });
        }
        let hash = again(session, |note| eprintln!("{note}"), |s| s.variables_hash())?;
        say(format!("variables {hash}"));
        self.draw_loss()
    }

    /// Where values first were not finite, as lines of an error: does the steps from the newest good checkpoint up to
    /// `last` once more, watched, and writes nothing.
    fn origin(&self, session: &mut Session, model: &mut impl Model, last: u32) -> Result<String, Failed> {
        // What is still being written would be the newest.
        let _ = session.settle();
        let begin = session.rewind()?;
        let mut at = begin.as_ref().map_or(Position::default(), |r| r.position.clone());
        eprintln!("looking for the first value that is not finite: from step {} on again", at.step);
        session.watch(true);
        while at.step <= last && session.non_finite().is_empty() {
            let ran = model.run(session, &at)?;
            if ran.skipped && ran.loss.is_finite() {
                // What was infinite was meant to be found out: it did no harm.
                session.watch(true);
            }
            at.step += 1;
            at.samples += ran.samples.len() as u64;
        }
        let found = session.non_finite();
        session.watch(false);
        let mut first = found.iter().map(|line| format!("\n  --> step {}: {line}", at.step - 1)).collect::<String>();
        if found.is_empty() {
            first = "\n  note: done again, no step made of finite values what is infinite or no number".into();
        }
        let kept = begin.map(|r| format!("\n  note: {} of {} steps is kept", r.folder, r.position.step));
        Ok(first + &kept.unwrap_or_default())
    }

    /// Draws the loss over all steps.
    fn draw_loss(&self) -> Result<(), Failed> {
        let series = Series::smooth("loss", &column(&self.out.join(METRICS_FILE), "loss"), LOSS_POINTS);
        let [title, x, y] = [format!("Training loss of {}", self.out.display()), "steps".into(), "loss".into()];
        Chart { title, x, y, log_y: false, series: vec![series] }.write(&self.out.join(LOSS_FILE))
    }

    /// Where the run is: at its start, or where the checkpoint it goes on from was.
    fn start(&self, session: &mut Session) -> Result<Position, Failed> {
        let steps = self.config.common().steps;
        let config = serde_json::to_value(&self.config).unwrap_or_default();
        let mut at = Position { step: 0, samples: 0, config };
        if self.resume
            && let Some(Restored { folder, position }) = self.restore(session)?
        {
            eprintln!("resumed from {folder} with {} steps done", position.step);
            let changed = self.config.changes(&position.config);
            if !changed.is_empty() {
                eprintln!("changed since: {}", changed.join(", "));
            }
            if position.step >= steps {
                eprintln!("nothing left to train of --steps {steps}");
            }
            (at.step, at.samples) = (position.step, position.samples);
        }
        Ok(at)
    }
}

/// A run of training steps.
struct Training<'a, M> {
    model: &'a mut M,
    steps: u32,
    rows: Rows,
    events: Events,
    progress: Progress,
}

impl<M: Model> drive::Run for Training<'_, M> {
    type Error = Failed;

    fn step(&mut self, session: &mut Session, at: &mut Position) -> Result<(), Failed> {
        let (step, begun) = (at.step, Instant::now());
        let ran = self.model.run(session, at)?;
        let (loss, grad_norm, all) = (ran.loss, ran.grad_norm, begun.elapsed());
        at.samples += ran.samples.len() as u64;
        let phases = Phases {
            feed: ran.feed.as_secs_f64(),
            run: ran.run.as_secs_f64(),
            fetch: all.saturating_sub(ran.feed + ran.run).as_secs_f64(),
            communicate: ran.communicate.as_secs_f64(),
        };
        let mut row = Row::new(step, loss, grad_norm, all.as_secs_f64(), phases, ran.samples, ran.figures.row);
        if step + 1 == self.steps {
            row.finish(session.variables_hash()?, session.peaks()?);
        }
        if self.rows.add(&row)? {
            self.events.scalars(step, row.scalars())?;
        }
        let seconds = (ran.feed + ran.run).as_secs_f64();
        self.progress.step(step, loss, &ran.figures.shown, &self.model.work(), seconds);
        if !loss.is_finite() || !(grad_norm.is_finite() || ran.skipped) {
            return Err(diverged(format!("at step {step} the loss is {loss}, the gradient's norm {grad_norm}")));
        }
        Ok(())
    }

    fn note(&mut self, text: &str) {
        self.progress.note(text);
    }
}
