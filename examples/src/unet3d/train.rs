//! The commands: `train`, `eval` and `plan`.

use crate::config::{self, Config, Mistake};
use crate::data::{Scan, ScanError};
use crate::model::{self, Shape};
use crate::report::{Progress, Row};
use coordinator::checkpoint::{self, Position};
use coordinator::{Failure, Options, Session};
use mesh::array::Array;
use mesh::layout::Mesh;
use ndarray::{Array4, Array5, ArrayD, Axis, Ix4};
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use worker::data::{DataError, picture, volume::View};

/// The resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
const METRICS_FILE: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";

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
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The configuration.
    #[error("error: {0}")]
    Config(#[from] Mistake),
    /// The data.
    #[error("error: {0}")]
    Scan(#[from] ScanError),
    /// Writing results.
    #[error("error: {0}")]
    Data(#[from] DataError),
    /// The session: program, layout, devices, checkpoints.
    #[error("{0}")]
    Session(#[from] Failure),
    /// The run folder.
    #[error("error: cannot write {}: {why}", path.display())]
    Output {
        /// What.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// Training went wrong.
    #[error("error: {0}")]
    Diverged(String),
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
            Failed::Config(_) | Failed::Session(Failure::Program(_)) | Failed::Scan(ScanError::Option(_)) => 2,
            Failed::Scan(_) | Failed::Data(_) => 3,
            Failed::Session(Failure::Checkpoint(_)) => 4,
            Failed::Session(_) | Failed::Output { .. } | Failed::Diverged(_) => 1,
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
            mesh,
        })
    }

    fn scan(&self) -> Result<Scan, Failed> {
        Ok(Scan::load(&self.config, |text| eprintln!("{text}"))?)
    }

    fn program(&self, scan: &Scan) -> Result<mesh::program::Program, Failed> {
        Ok(model::program(&Shape { volume: scan.shape(), classes: scan.classes.len() }, &self.config)?)
    }

    /// The newest good checkpoint of the run folder.
    fn checkpoint(&self) -> Result<checkpoint::Loaded, Failed> {
        let dir = self.out.join(CHECKPOINTS);
        Ok(checkpoint::load_newest(&dir, |e| eprintln!("passed over: {e}"))?)
    }
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

fn scalar(session: &Session, f: coordinator::session::FunctionId, name: &str) -> Result<f32, Failed> {
    Ok(session.fetch(f, name)?.to_f32().unwrap_or(f32::NAN))
}

/// Trains.
pub fn train(task: &Task) -> Result<(), Failed> {
    let c = &task.config;
    let scan = task.scan()?;
    eprintln!("{}", scan.source);
    let options = task.options()?;
    let mut session = Session::embedded(task.program(&scan)?, &options)?;
    eprintln!(
        "{} parameters; mesh {} with layout {}; {} threads a device; at most {:.1} MiB a device",
        session.program().parameters(),
        options.mesh,
        options.layout,
        options.threads(),
        (0..options.mesh.size()).map(|d| session.plan().peak_bytes(d)).max().unwrap_or(0) as f64 / f64::from(1 << 20)
    );
    let (mut first, mut samples) = (0, 0);
    let metrics = task.out.join(METRICS_FILE);
    if task.resume {
        let loaded = task.checkpoint()?;
        loaded.restore(&mut session)?;
        (first, samples) = (loaded.manifest.step, loaded.manifest.samples);
        eprintln!("resumed from {} at step {first}", loaded.path.display());
    } else if metrics.exists() {
        let text =
            format!("{} holds a run; go on with --resume, or name another folder with --out", task.out.display());
        return Err(Mistake(text).into());
    }
    written(&task.out, fs::create_dir_all(&task.out))?;
    let text = toml::to_string_pretty(c).map_err(|e| Mistake(e.to_string()))?;
    let path = task.out.join(CONFIG_FILE);
    written(&path, fs::write(&path, text))?;
    let mut rows = open_metrics(&metrics, first)?;

    let f = session.function("train")?;
    let voxels = c.batch * scan.image.len();
    let mut progress = Progress::new(first, c.steps, std::io::stderr().is_terminal());
    let mut saved = first;
    let save = |session: &Session, step: u32, samples: u64| {
        let config = serde_json::to_value(c).unwrap_or_default();
        checkpoint::save(session, &task.out.join(CHECKPOINTS), &Position { step, samples, config }, c.keep)
    };
    for step in first..c.steps {
        let begun = Instant::now();
        let ids: Vec<u64> = (samples..samples + c.batch as u64).collect();
        let classes = scan.classes.len();
        let drawn =
            ids.iter().map(|id| if c.augment { View::draw(c.seed, *id, classes) } else { View::plain(*id, classes) });
        let (image, labels) = views(&scan, &drawn.collect::<Vec<_>>());
        session.feed(f, "image", &image)?;
        session.feed(f, "labels", &labels)?;
        session.step(f, step)?;
        samples += c.batch as u64;
        let (loss, grad_norm) = (scalar(&session, f, "loss")?, scalar(&session, f, "grad_norm")?);
        let seconds = begun.elapsed().as_secs_f64();
        let last = step + 1 == c.steps;
        let mut row = Row::new(step, loss, grad_norm, seconds, ids);
        if last {
            row.finish(session.variables_hash()?, session.peaks());
        }
        let line = serde_json::to_string(&row).map_err(|e| Mistake(e.to_string()))?;
        written(&metrics, writeln!(rows, "{line}").and_then(|()| rows.flush()))?;
        progress.step(step, loss, scalar(&session, f, "dice")?, voxels as f64 / seconds);
        if !loss.is_finite() {
            let text = format!(
                "the loss is {loss} at step {step}; the newest checkpoint is of step {saved}. Try a smaller --rate"
            );
            return Err(Failed::Diverged(text));
        }
        if last || (c.checkpoint_every > 0 && (step + 1) % c.checkpoint_every == 0) {
            save(&session, step + 1, samples)?;
            saved = step + 1;
        }
    }
    progress.finish();
    judge(task, &scan, &mut session)
}

/// Opens the metrics for the rows from step `first` on, keeping those before it.
fn open_metrics(path: &Path, first: u32) -> Result<fs::File, Failed> {
    let mut kept = Vec::new();
    if first > 0 {
        if let Ok(file) = fs::File::open(path) {
            for line in BufReader::new(file).lines().map_while(Result::ok) {
                let step = serde_json::from_str::<serde_json::Value>(&line).ok().and_then(|v| v["step"].as_u64());
                if step.is_some_and(|s| s < u64::from(first)) {
                    kept.push(line);
                }
            }
        }
    }
    let mut file = written(path, fs::File::create(path))?;
    for line in kept {
        written(path, writeln!(file, "{line}"))?;
    }
    Ok(file)
}

/// Predicts the whole volume, says how good that is, and writes prediction and picture.
fn judge(task: &Task, scan: &Scan, session: &mut Session) -> Result<(), Failed> {
    let (image, labels) = views(scan, &[View::plain(0, scan.classes.len())]);
    let results = session.run("eval", 0, &[("image", &image), ("labels", &labels)])?;
    let result = |name: &str| results.iter().find(|(n, _)| **n == *name).map(|(_, a)| a);
    let dice: Vec<f32> =
        result("dice").and_then(Array::as_f32).map(|a| a.iter().copied().collect()).unwrap_or_default();
    for (name, d) in scan.classes.iter().zip(&dice) {
        println!("dice {name:12} {d:.4}");
    }
    let organs = &dice[1.min(dice.len())..];
    println!("dice mean organ   {:.4}", organs.iter().sum::<f32>() / organs.len().max(1) as f32);
    let Some(Array::I32(predicted)) = result("prediction") else { return Ok(()) };
    let predicted: ArrayD<i32> = predicted.clone();
    let Ok(predicted) = predicted.into_dimensionality::<Ix4>() else { return Ok(()) };
    let predicted = predicted.index_axis(Axis(0), 0).to_owned();
    let (nii, png) = (task.out.join("prediction.nii.gz"), task.out.join("prediction.png"));
    scan.write_prediction(&nii, &predicted)?;
    picture::write(&png, &scan.image, &scan.labels, &predicted)?;
    println!("wrote {} and {}", nii.display(), png.display());
    Ok(())
}

/// Judges a run's newest checkpoint.
pub fn eval(task: &Task) -> Result<(), Failed> {
    let stored = task.out.join(CONFIG_FILE);
    if !stored.exists() {
        return Err(Mistake(format!("{} holds no run; train first, or name one with --out", task.out.display())).into());
    }
    let loaded = task.checkpoint()?;
    let scan = task.scan()?;
    eprintln!("{}", scan.source);
    let mut session = Session::embedded(task.program(&scan)?, &task.options()?)?;
    loaded.restore(&mut session)?;
    eprintln!("checkpoint {} of step {}", loaded.path.display(), loaded.manifest.step);
    judge(task, &scan, &mut session)
}

/// Prints what a run would do.
pub fn plan(task: &Task) -> Result<(), Failed> {
    let scan = task.scan()?;
    let program = task.program(&scan)?;
    let options = task.options()?;
    print!("{}", options.plan(&program)?.describe(&program, "train"));
    Ok(())
}
