//! The commands: `train`, `eval` and `plan`.

use crate::config::{self, Config, Mistake, times};
use crate::data::{Outline, Scan, ScanError};
use crate::model::{self, Shape};
use crate::report::{Phases, Progress, Row, say};
use coordinator::checkpoint::{Catalogue, Checkpoints, Restored};
use coordinator::drive::{End, Run, Schedule, again, drive};
use coordinator::launch::Launched;
use coordinator::session::FunctionId;
use coordinator::{Failure, Options, Position, Session, interrupt, recorder};
use mesh::array::Array;
use mesh::layout::Mesh;
use mesh::plan::describe::{bytes, thousands};
use mesh::program::Program;
use ndarray::{Array4, Array5, ArrayD, Axis, Ix4};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use worker::data::{DataError, picture, volume::View};
use worker::store::Store;
use worker::tls::Tls;
use worker::transport::connector::TransportChoice;

/// The resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
const METRICS_FILE: &str = "metrics.jsonl";
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
struct Running {
    session: Session,
    _workers: Option<Launched>,
}

/// What is to be done.
pub struct Task {
    /// How.
    pub config: Config,
    /// Run folder.
    pub out: PathBuf,
    /// Whether to go on from a checkpoint.
    pub resume: bool,
    /// Devices there are, if given.
    pub devices: Option<usize>,
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
    /// TLS to a coordinator.
    pub tls: Option<Tls>,
}

/// Why a command failed. Each text begins with its code, or is a whole `error[code]: ..` already.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] Mistake),
    /// The data.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// Writing results.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The session: program, layout, devices, checkpoints.
    #[error(transparent)]
    Session(#[from] Failure),
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
            Failed::Config(_) | Failed::Scan(ScanError::Option(_)) => 2,
            Failed::Scan(ScanError::Data(_) | ScanError::Mismatch { .. }) | Failed::Data(DataError::Format { .. }) => 3,
            Failed::Session(failure) => failure.exit_code(),
            Failed::Interrupted { .. } => 75,
            Failed::Data(DataError::Fetch(_) | DataError::File { .. })
            | Failed::Output { .. }
            | Failed::Diverged { .. }
            | Failed::Otherwise { .. } => 1,
        }
    }
}

fn written<T>(path: &Path, result: std::io::Result<T>) -> Result<T, Failed> {
    result.map_err(|why| Failed::Output { path: path.into(), why })
}

impl Task {
    fn options(&self) -> Result<Options, Failed> {
        let c = &self.config;
        let mesh: Mesh = c.mesh.parse()?;
        let layout = if c.layout.is_empty() { config::layout_of(&mesh) } else { c.layout.clone() };
        Ok(Options {
            layout: layout.parse()?,
            devices: self.devices,
            threads: (c.threads > 0).then_some(c.threads),
            memory: c.memory_bytes()?,
            seed: c.seed,
            transport: self.transport,
            checkpoints: Some(Checkpoints { location: self.location()?, keep: c.keep }),
            shrink: self.shrink,
            tls: self.tls.clone(),
            mesh,
        })
    }

    /// Where checkpoints are, in a form that workers understand as well.
    fn location(&self) -> Result<String, Failed> {
        let location = self.checkpoints.clone().unwrap_or_else(|| self.out.join(CHECKPOINTS).display().to_string());
        let store = Store::open(&location).map_err(|e| Failure::Checkpoint(e.to_string()))?;
        Ok(store.location().into())
    }

    /// Begins a session where the devices are.
    fn session(&self, program: Program, options: &Options) -> Result<Running, Failed> {
        let session = match &self.place {
            Place::Here => Session::embedded(program, options)?,
            Place::Coordinator(url) => Session::connect(url, program, options)?,
            Place::Workers(n) => {
                let devices = options.mesh.size();
                if *n == 0 || !devices.is_multiple_of(*n) {
                    return config::mistake(
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

    fn scan(&self) -> Result<Scan, Failed> {
        Ok(Scan::load(&self.config, |text| eprintln!("{text}"))?)
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
}

fn shape(outline: &Outline) -> Shape {
    Shape { volume: outline.shape, classes: outline.classes.len() }
}

/// `1 device`, `2 devices`.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// What is about to be done with what, in a few lines.
fn introduction(c: &Config, outline: &Outline, options: &Options, parameters: usize) -> String {
    let mut extents = outline.shape;
    let mut levels = vec![times(extents)];
    let even = (0..3).all(|a| outline.shape[a].is_multiple_of(1 << model::POOLINGS));
    for _ in 0..model::POOLINGS {
        extents = extents.map(|n| n.div_ceil(2));
        levels.push(times(extents));
    }
    let odd = if even { "" } else { "; odd extents stay as they are, nothing is padded or cut off" };
    let norm = format!("{:?}", c.norm).to_lowercase();
    let optimizer = format!("{:?}", c.optimizer).to_lowercase();
    let mut text = format!(
        "data     {}\nlevels   {}{odd}\nclasses  {}\nmodel    {} parameters: base {}, {norm} norm, drop-out {}\n\
         training {optimizer} at rate {}, batch {}{}, seed {}\nmesh     {} ({}, {} each), layout {}\n",
        outline.source,
        levels.join(", "),
        outline.classes.join(", "),
        thousands(parameters as u64),
        c.base,
        c.dropout,
        c.rate,
        c.batch,
        if c.augment { ", augmented" } else { "" },
        c.seed,
        options.mesh,
        count(options.mesh.size(), "device"),
        count(options.threads(), "thread"),
        if options.layout.rules().is_empty() { "of nothing split".into() } else { options.layout.to_string() },
    );
    for (axis, _) in options.mesh.axes().iter().filter(|(_, size)| *size > 1) {
        if !options.layout.rules().iter().any(|(_, a)| a == axis) {
            text +=
                &format!("note     no dimension is split over the axis `{axis}`: devices along it do the same work\n");
        }
    }
    text
}

/// Views of one step as feeds: `image [batch, x, y, z, channel]`, `labels [batch, x, y, z]`.
fn views(scan: &Scan, views: &[View]) -> (Array, Array) {
    let mut images = Vec::new();
    let mut labels = Vec::new();
    for view in views {
        let (i, l) = view.apply(&scan.image, &scan.labels);
        images.push(i.insert_axis(Axis(3)));
        labels.push(l);
    }
    let stack = |v: &[ndarray::Array4<f32>]| -> Array5<f32> {
        ndarray::stack(Axis(0), &v.iter().map(|a| a.view()).collect::<Vec<_>>()).expect("views are of one shape")
    };
    let labels: Array4<i32> =
        ndarray::stack(Axis(0), &labels.iter().map(|a| a.view()).collect::<Vec<_>>()).expect("views are of one shape");
    (stack(&images).into(), labels.into())
}

fn scalar(session: &Session, f: FunctionId, name: &str) -> Result<f32, Failed> {
    Ok(session.fetch(f, name)?.to_f32().unwrap_or(f32::NAN))
}

/// Trains.
pub fn train(task: &Task) -> Result<(), Failed> {
    let c = &task.config;
    let options = task.options()?;
    let metrics = task.out.join(METRICS_FILE);
    if !task.resume && (metrics.exists() || task.has_checkpoints()?) {
        return Err(task.folder("holds a run already", "go on with it by --resume, or name another folder with --out"));
    }
    // Only now: what has not begun may be stopped in the usual way.
    interrupt::listen(75).map_err(|e| Failure::Mesh(format!("cannot listen for signals: {e}")))?;
    let scan = task.scan()?;
    let outline = scan.outline();
    let mut running = task.session(model::program(&shape(&outline), c)?, &options)?;
    let session = &mut running.session;
    eprint!("{}", introduction(c, &outline, &options, session.program().parameters()));
    session.links().iter().for_each(|link| eprintln!("links    {link}"));
    let most = (0..session.plan().mesh.size()).map(|d| session.plan().peak_bytes(d)).max().unwrap_or(0);
    eprintln!("memory   {} at most on a device\nrun      {}", bytes(most), task.out.display());
    let config = serde_json::to_value(c).unwrap_or_default();
    let mut at = Position { step: 0, samples: 0, config };
    if task.resume
        && let Some(Restored { folder, position }) = task.restore(session)?
    {
        eprintln!("resumed from {folder} with {} steps done", position.step);
        let changed = c.changes(&position.config);
        if !changed.is_empty() {
            eprintln!("changed since: {}", changed.join(", "));
        }
        if position.step >= c.steps {
            eprintln!("nothing left to train of --steps {}", c.steps);
        }
        (at.step, at.samples) = (position.step, position.samples);
    }
    written(&task.out, fs::create_dir_all(&task.out))?;
    let path = task.out.join(CONFIG_FILE);
    written(&path, fs::write(&path, c.to_toml()))?;
    let mut training = Training {
        config: c,
        scan: &scan,
        function: session.function("train")?,
        rows: Rows::open(&metrics, at.step)?,
        progress: Progress::new(at.step, c.steps, std::io::stderr().is_terminal()),
    };
    let end =
        drive(session, &mut training, &mut at, &Schedule { steps: c.steps, checkpoint_every: c.checkpoint_every });
    training.progress.finish();
    let end = end?;
    if let Some(path) = &task.trace {
        let trace = recorder::trace(&session.events()?);
        written(path, fs::write(path, trace.to_string()))?;
    }
    if end == End::Interrupted {
        return Err(Failed::Interrupted { step: at.step });
    }
    let hash = again(session, |note| eprintln!("{note}"), |s| s.variables_hash())?;
    say(format!("variables {hash}"));
    judge(task, &scan, session)
}

/// A run of training steps.
struct Training<'a> {
    config: &'a Config,
    scan: &'a Scan,
    function: FunctionId,
    rows: Rows,
    progress: Progress,
}

impl Run for Training<'_> {
    type Error = Failed;

    fn step(&mut self, session: &mut Session, at: &mut Position) -> Result<(), Failed> {
        let (c, f, step) = (self.config, self.function, at.step);
        let begun = Instant::now();
        let ids: Vec<u64> = (at.samples..at.samples + c.batch as u64).collect();
        let classes = self.scan.classes.len();
        let draw = |id: &u64| if c.augment { View::draw(c.seed, *id, classes) } else { View::plain(*id, classes) };
        let (image, labels) = views(self.scan, &ids.iter().map(draw).collect::<Vec<_>>());
        session.feed(f, "image", &image)?;
        session.feed(f, "labels", &labels)?;
        let fed = begun.elapsed();
        session.step(f, step)?;
        let ran = begun.elapsed();
        at.samples += c.batch as u64;
        let (loss, grad_norm) = (scalar(session, f, "loss")?, scalar(session, f, "grad_norm")?);
        let dice = scalar(session, f, "dice")?;
        let fetched = begun.elapsed();
        let phases = Phases {
            feed: fed.as_secs_f64(),
            run: (ran - fed).as_secs_f64(),
            fetch: (fetched - ran).as_secs_f64(),
            communicate: session.communicated().as_secs_f64(),
        };
        let seconds = fetched.as_secs_f64();
        let mut row = Row::new(step, loss, grad_norm, seconds, phases, ids);
        if step + 1 == c.steps {
            row.finish(session.variables_hash()?, session.peaks()?);
        }
        self.rows.add(&row)?;
        let voxels = c.batch * self.scan.image.len();
        self.progress.step(step, loss, dice, voxels as f64 / seconds);
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(diverged(format!("at step {step} the loss is {loss}, the gradient's norm {grad_norm}")));
        }
        Ok(())
    }

    fn note(&mut self, text: &str) {
        self.progress.note(text);
    }
}

/// The rows of `metrics.jsonl`, each step once.
struct Rows {
    path: PathBuf,
    file: fs::File,
    /// Bits of loss and gradient norm of the steps that this process has done.
    done: BTreeMap<u32, [String; 2]>,
}

impl Rows {
    /// Opens the metrics for the rows from step `first` on, keeping those before it.
    fn open(path: &Path, first: u32) -> Result<Rows, Failed> {
        let mut kept = Vec::new();
        if first > 0
            && let Ok(file) = fs::File::open(path)
        {
            for line in BufReader::new(file).lines().map_while(Result::ok) {
                let step = serde_json::from_str::<serde_json::Value>(&line).ok().and_then(|v| v["step"].as_u64());
                if step.is_some_and(|s| s < u64::from(first)) {
                    kept.push(line);
                }
            }
        }
        let mut file = written(path, fs::File::create(path))?;
        for line in kept {
            written(path, writeln!(file, "{line}"))?;
        }
        Ok(Rows { path: path.into(), file, done: BTreeMap::new() })
    }

    /// Adds a row; that of a step which is done again must have the same bits, and is not written again.
    fn add(&mut self, row: &Row) -> Result<(), Failed> {
        let now = row.bits();
        if let Some(before) = self.done.get(&row.step()) {
            for (field, (before, now)) in ["loss_bits", "grad_norm_bits"].into_iter().zip(before.iter().zip(&now)) {
                if before != now {
                    let (before, now) = (before.clone(), now.clone());
                    return Err(Failed::Otherwise { step: row.step(), field, before, now });
                }
            }
            return Ok(());
        }
        self.done.insert(row.step(), now);
        written(&self.path, writeln!(self.file, "{}", row.line()).and_then(|()| self.file.flush()))
    }
}

fn diverged(what: String) -> Failed {
    Failed::Diverged { what: format!("training has diverged: {what}"), help: "try a smaller --rate".into() }
}

/// Predicts the whole volume, says how good that is, and writes prediction and picture.
fn judge(task: &Task, scan: &Scan, session: &mut Session) -> Result<(), Failed> {
    let (image, labels) = views(scan, &[View::plain(0, scan.classes.len())]);
    let feeds = [("image", &image), ("labels", &labels)];
    let results = again(session, |note| eprintln!("{note}"), |s| s.run("eval", 0, &feeds))?;
    let result = |name: &str| results.iter().find(|(n, _)| **n == *name).map(|(_, a)| a);
    let loss = result("loss").and_then(Array::to_f32).unwrap_or(f32::NAN);
    if !loss.is_finite() {
        return Err(diverged(format!("the loss of the whole volume is {loss}")));
    }
    let dice: Vec<f32> =
        result("dice").and_then(Array::as_f32).map(|a| a.iter().copied().collect()).unwrap_or_default();
    let organs = &dice[1.min(dice.len())..];
    say(format!("loss {loss:.4}"));
    for (name, d) in scan.classes.iter().zip(&dice) {
        say(format!("dice {name:12} {d:.4}"));
    }
    say(format!(
        "dice mean of all but {} {:.4}",
        scan.classes[0],
        organs.iter().sum::<f32>() / organs.len().max(1) as f32
    ));
    let Some(Array::I32(predicted)) = result("prediction") else { return Ok(()) };
    let predicted: ArrayD<i32> = predicted.clone();
    let Ok(predicted) = predicted.into_dimensionality::<Ix4>() else { return Ok(()) };
    let predicted = predicted.index_axis(Axis(0), 0).to_owned();
    let (nii, png) = (task.out.join("prediction.nii.gz"), task.out.join("prediction.png"));
    scan.write_prediction(&nii, &predicted)?;
    picture::write(&png, &scan.image, &scan.labels, &predicted)?;
    say(format!("wrote {} and {}", nii.display(), png.display()));
    Ok(())
}

/// Judges a run's newest checkpoint.
pub fn eval(task: &Task) -> Result<(), Failed> {
    if !task.out.join(CONFIG_FILE).exists() {
        return Err(task.folder("holds no run", "train first, or name the folder of a run with --out"));
    }
    let options = task.options()?;
    let scan = task.scan()?;
    let outline = scan.outline();
    let mut running = task.session(model::eval_program(&shape(&outline), &task.config)?, &options)?;
    let session = &mut running.session;
    eprint!("{}", introduction(&task.config, &outline, &options, session.program().parameters()));
    let Restored { folder, position } = task.restore(session)?.ok_or_else(|| task.none_good())?;
    eprintln!("checkpoint {folder} of {} steps", position.step);
    judge(task, &scan, session)
}

/// Prints what a run would do.
pub fn plan(task: &Task) -> Result<(), Failed> {
    let options = task.options()?;
    let outline = Outline::of(&task.config)?;
    let program = model::program(&shape(&outline), &task.config)?;
    let plan = options.plan(&program)?;
    let text =
        introduction(&task.config, &outline, &options, program.parameters()) + "\n" + &plan.describe(&program, "train");
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever read it has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => written(Path::new("to the standard output"), result),
    }
}
