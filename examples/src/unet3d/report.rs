//! What people see: progress, metrics, plans.

use coordinator::session::Peak;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, Instant};

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
    #[serde(skip_serializing_if = "Option::is_none")]
    variables_hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Vec<Peak>>,
}

impl Row {
    /// The row of a step.
    pub fn new(step: u32, loss: f32, grad_norm: f32, step_seconds: f64, phases: Phases, sample_ids: Vec<u64>) -> Row {
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

    /// Adds what the last row has besides.
    pub fn finish(&mut self, hash: String, peaks: Vec<Peak>) {
        (self.variables_hash, self.devices) = (Some(hash), Some(peaks));
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
}

impl Progress {
    /// For the steps `first .. steps`.
    pub fn new(first: u32, steps: u32, terminal: bool) -> Progress {
        let bar = terminal.then(|| {
            let bar = ProgressBar::new(u64::from(steps)).with_position(u64::from(first));
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Progress { bar, steps, first, begun: Instant::now(), warm: None }
    }

    /// Something that the user should know.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// After a step.
    pub fn step(&mut self, step: u32, loss: f32, dice: f32, speed: f64) {
        let done = (step + 1).saturating_sub(self.first).max(1);
        let left = match self.warm {
            Some(warm) if done > 1 => warm.elapsed().mul_f64(f64::from(self.steps - step - 1) / f64::from(done - 1)),
            _ => self.begun.elapsed() * (self.steps - step - 1),
        };
        self.warm.get_or_insert_with(Instant::now);
        let text = format!("loss {loss:.4}  dice {dice:.4}  {:.2} Mvoxel/s  {} left", speed / 1e6, time(left));
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

fn time(d: Duration) -> String {
    let s = d.as_secs();
    if s >= 3600 { format!("{}h{:02}m", s / 3600, s / 60 % 60) } else { format!("{}m{:02}s", s / 60, s % 60) }
}
