//! What people see of a run: rows of figures, progress, results.

use crate::run::{Failed, written};
use coordinator::session::Peak;
use indicatif::{ProgressBar, ProgressStyle};
use mesh::dim::DType;
pub use mesh::plan::describe::{bytes, thousands};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a model shows of a step besides loss and gradient norm; the names of a row are words_with_underscores.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// For the row of the step.
    pub row: Vec<(&'static str, f64)>,
    /// For the progress line.
    pub shown: Vec<(&'static str, f64)>,
}

/// What a step gets done, for the speed in the progress line.
#[derive(Clone, Debug)]
pub struct Work {
    /// How much, in units.
    pub amount: f64,
    /// The unit, such as `token` or `Mvoxel`.
    pub unit: &'static str,
    /// Floating-point operations of its products, and what those are in, if their speed is to be shown.
    pub flops: Option<(f64, DType)>,
}

/// Seconds of a step.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Phases {
    /// Making and sending what is fed.
    pub feed: f64,
    /// Running the step on every device.
    pub run: f64,
    /// Fetching what is shown.
    pub fetch: f64,
    /// Of `run`: the device that did so longest, moving data and waiting for others.
    pub communicate: f64,
}

/// A row of `metrics.jsonl`.
#[derive(Serialize)]
pub struct Row {
    step: u32,
    loss: f32,
    /// The f32 as 8 hex digits.
    loss_bits: String,
    grad_norm: f32,
    grad_norm_bits: String,
    step_seconds: f64,
    phases: Phases,
    sample_ids: Vec<u64>,
    /// The model's own.
    #[serde(flatten, serialize_with = "pairs")]
    figures: Vec<(&'static str, f64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    variables_hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Vec<Peak>>,
}

fn pairs<S: Serializer>(pairs: &[(&'static str, f64)], s: S) -> Result<S::Ok, S::Error> {
    let mut map = s.serialize_map(Some(pairs.len()))?;
    for (name, value) in pairs {
        // A number that was an f32 has the digits of one.
        let short = *value as f32;
        if f64::from(short) == *value {
            map.serialize_entry(name, &short)?;
        } else {
            map.serialize_entry(name, value)?;
        }
    }
    map.end()
}

impl Row {
    /// The row of a step.
    pub fn new(
        step: u32,
        loss: f32,
        grad_norm: f32,
        step_seconds: f64,
        phases: Phases,
        sample_ids: Vec<u64>,
        figures: Vec<(&'static str, f64)>,
    ) -> Row {
        let bits = |v: f32| format!("{:08x}", v.to_bits());
        Row {
            step,
            loss,
            loss_bits: bits(loss),
            grad_norm,
            grad_norm_bits: bits(grad_norm),
            step_seconds,
            phases,
            sample_ids,
            figures,
            variables_hash: None,
            devices: None,
        }
    }

    /// Its step.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// Bits of loss and gradient norm.
    pub fn bits(&self) -> [String; 2] {
        [self.loss_bits.clone(), self.grad_norm_bits.clone()]
    }

    /// As a line of JSON.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a row has no maps with odd keys")
    }

    /// Its figures by name: loss, gradient norm and the model's own.
    pub fn scalars(&self) -> impl Iterator<Item = (&str, f64)> {
        let every = [("loss", f64::from(self.loss)), ("grad_norm", f64::from(self.grad_norm))];
        every.into_iter().chain(self.figures.iter().copied())
    }

    /// Adds what the last row has besides.
    pub fn finish(&mut self, hash: String, peaks: Vec<Peak>) {
        (self.variables_hash, self.devices) = (Some(hash), Some(peaks));
    }
}

/// A figure over the steps done, as far as the rows of a `metrics.jsonl` have it: (steps, figure).
pub fn column(path: &Path, name: &str) -> Vec<(f64, f64)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let point = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).ok()?;
        Some((row["step"].as_f64()? + 1.0, row[name].as_f64()?))
    };
    text.lines().filter_map(point).collect()
}

/// The rows of `metrics.jsonl`, each step once.
pub struct Rows {
    path: PathBuf,
    file: fs::File,
    /// Bits of loss and gradient norm of the steps that this process has done.
    done: BTreeMap<u32, [String; 2]>,
}

impl Rows {
    /// Opens the metrics for the rows from step `first` on, keeping those before it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn open(path: &Path, first: u32) -> Result<Rows, Failed> {
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

    /// Adds a row; that of a step which is done again must have the same bits, and is not written again. Tells whether it
    /// is new.
    ///
    /// # Errors
    /// A step that came out otherwise; a file that cannot be written.
    pub fn add(&mut self, row: &Row) -> Result<bool, Failed> {
        let now = row.bits();
        if let Some(before) = self.done.get(&row.step()) {
            for (field, (before, now)) in ["loss_bits", "grad_norm_bits"].into_iter().zip(before.iter().zip(&now)) {
                if before != now {
                    let (before, now) = (before.clone(), now.clone());
                    return Err(Failed::Otherwise { step: row.step(), field, before, now });
                }
            }
            return Ok(false);
        }
        self.done.insert(row.step(), now);
        written(&self.path, writeln!(self.file, "{}", row.line()).and_then(|()| self.file.flush()))?;
        Ok(true)
    }
}

/// Progress: a bar on a terminal, lines otherwise.
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u32,
    first: u32,
    begun: Instant,
    /// When the first step was done: it says nothing about the speed of the others.
    warm: Option<Instant>,
    /// Floating-point operations a second that the devices can do at the most, if that is known.
    most: Option<f64>,
}

impl Progress {
    /// For the steps `first .. steps`, on devices that can do `most` floating-point operations a second.
    pub fn new(first: u32, steps: u32, terminal: bool, most: Option<f64>) -> Progress {
        let bar = terminal.then(|| {
            let bar = ProgressBar::new(u64::from(steps)).with_position(u64::from(first));
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Progress { bar, steps, first, begun: Instant::now(), warm: None, most }
    }

    /// Something that the user should know.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// After a step, which got so much done in so many seconds.
    pub fn step(&mut self, step: u32, loss: f32, shown: &[(&str, f64)], work: &Work, seconds: f64) {
        let done = (step + 1).saturating_sub(self.first).max(1);
        let left = match self.warm {
            Some(warm) if done > 1 => warm.elapsed().mul_f64(f64::from(self.steps - step - 1) / f64::from(done - 1)),
            _ => self.begun.elapsed() * (self.steps - step - 1),
        };
        self.warm.get_or_insert_with(Instant::now);
        let mut text = format!("loss {loss:.4}");
        for (name, value) in shown {
            // Counts have no fraction.
            let digits = if value.fract() == 0.0 { 0 } else { 4 };
            text += &format!("  {name} {value:.digits$}");
        }
        text += &format!("  {} {}/s", speed(work.amount / seconds), work.unit);
        if let Some((flops, _)) = work.flops {
            text += &format!("  {} GFLOP/s", speed(flops / 1e9 / seconds));
            text += &self.most.map_or(String::new(), |most| format!(" ({:.0} %)", 100.0 * flops / seconds / most));
        }
        text += &format!("  {} left", time(left));
        match &self.bar {
            Some(bar) => {
                bar.set_position(u64::from(step + 1));
                bar.set_message(text);
            }
            None => eprintln!("step {:>5}/{}  {text}", step + 1, self.steps),
        }
    }

    /// After the last one.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// A line of results. A reader who has gone away is no reason to stop.
pub fn say(line: String) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Three digits at least.
fn speed(v: f64) -> String {
    if v < 100.0 { format!("{v:.2}") } else { thousands(v as u64) }
}

fn time(d: Duration) -> String {
    let s = d.as_secs();
    if s >= 3600 { format!("{}h{:02}m", s / 3600, s / 60 % 60) } else { format!("{}m{:02}s", s / 60, s % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u32, loss: f32) -> Row {
        let phases = Phases { feed: 0.1, run: 0.2, fetch: 0.3, communicate: 0.05 };
        let figures = vec![("tokens_per_second", 1234.5), ("accuracy", f64::from(0.1f32))];
        Row::new(step, loss, 1.0, 0.6, phases, vec![7, 8], figures)
    }

    #[test]
    fn a_row_has_the_figures_of_the_model_beside_those_of_every_run() {
        let names: Vec<String> = row(3, 0.5).scalars().map(|(name, _)| name.into()).collect();
        assert_eq!(names, ["loss", "grad_norm", "tokens_per_second", "accuracy"]);
        let v: serde_json::Value = serde_json::from_str(&row(3, 0.5).line()).unwrap();
        assert_eq!((v["step"].as_u64(), v["loss"].as_f64()), (Some(3), Some(0.5)));
        assert_eq!((v["tokens_per_second"].as_f64(), v["accuracy"].as_f64()), (Some(1234.5), Some(0.1)));
        assert_eq!((v["loss_bits"].as_str(), v["sample_ids"][1].as_u64()), (Some("3f000000"), Some(8)));
        assert!(v.get("figures").is_none() && v.get("variables_hash").is_none(), "{v}");
    }

    #[test]
    fn a_step_has_one_row_and_must_come_out_the_same_when_it_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let steps = || {
            let text = fs::read_to_string(&path).unwrap();
            let step = |l: &str| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap();
            text.lines().map(step).collect::<Vec<_>>()
        };
        let mut rows = Rows::open(&path, 0).unwrap();
        assert!((0..4).all(|s| rows.add(&row(s, 0.5)).unwrap()));
        assert!(!rows.add(&row(2, 0.5)).unwrap());
        assert_eq!(steps(), [0, 1, 2, 3]);
        let e = rows.add(&row(3, 0.75)).unwrap_err().to_string();
        assert!(e.contains("step 3 was done again") && e.contains("loss_bits was 3f000000 and is 3f400000"), "{e}");
        // Going on from step 2, the rows from there on are written anew.
        let mut rows = Rows::open(&path, 2).unwrap();
        rows.add(&row(2, 0.75)).unwrap();
        assert_eq!(steps(), [0, 1, 2]);
        assert_eq!(column(&path, "loss"), [(1.0, 0.5), (2.0, 0.5), (3.0, 0.75)]);
        assert_eq!(column(&path, "elephants"), []);
    }
}
