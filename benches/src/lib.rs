//! Speed, measured beside what a user would pick instead; the measurements lie in `benches/`.

use coordinator::session::FunctionId;
use coordinator::{Options, Session};
use mesh::dim::DType;
use mesh::layout::{Layout, Mesh};
use mesh::machine::Machine;
use mesh::plan::time::estimate;
use mesh::program::Program;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// What every measurement of steps takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Steps {
    /// Mesh.
    #[arg(long, default_value = "1")]
    pub mesh: Mesh,
    /// Layout; without one, axes are called as the dimensions they split.
    #[arg(long)]
    layout: Option<Layout>,
    /// Threads of each device; 0: the machine's cores shared out.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// What it computes in: `f32`, `bf16` or `f16`.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
    dtype: String,
    /// Chunks of a dimension at most; 1 takes exact mode away, so that the difference is its price.
    #[arg(long)]
    chunks: Option<usize>,
    /// Steps measured, after one that is not.
    #[arg(long, default_value_t = 5)]
    pub steps: u32,
    /// Where the time of a step goes as well.
    #[arg(long)]
    pub profile: bool,
    /// What `coordinator calibrate` wrote: says as well how long a step should take on that machine.
    #[arg(long)]
    machine: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Steps {
    /// What it computes in.
    pub fn dtype(&self) -> DType {
        match self.dtype.as_str() {
            "bf16" => DType::Bf16,
            "f16" => DType::F16,
            _ => DType::F32,
        }
    }

    /// A session of a program.
    ///
    /// # Panics
    /// A mesh that the program cannot be split over.
    pub fn session(&self, program: Program) -> Session {
        let chunks = self.chunks.unwrap_or(program.chunking.chunks);
        let program = program.in_chunks(chunks);
        let by_name = || {
            let rules: Vec<String> = self.mesh.axes().iter().map(|(n, _)| format!("{n}:{n}")).collect();
            rules.join(",").parse().expect("rules of the axes' names")
        };
        let options = Options {
            layout: self.layout.clone().unwrap_or_else(by_name),
            threads: (self.threads > 0).then_some(self.threads),
            mesh: self.mesh.clone(),
            ..Options::default()
        };
        Session::embedded(program, &options).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Times the steps of a function that was fed, and prints a JSON line: what `case` has, seconds a step (median, least,
    /// most), GFLOP/s, memory, and the first and the last `loss` where there is one; with `--profile` where a step's
    /// time goes as well. `seconds` is what a step took, given what its clock and its session say.
    ///
    /// # Panics
    /// A step that fails.
    pub fn measure(
        &self,
        session: &mut Session,
        f: FunctionId,
        flops: u64,
        case: Value,
        seconds: impl Fn(f64, &Session) -> f64,
    ) {
        let loss = |s: &Session| s.fetch(f, "loss").ok().and_then(|a| a.to_f32());
        let (mut first, mut times) = (None, Vec::new());
        for step in 0..=self.steps {
            let begun = Instant::now();
            session.step(f, step).unwrap_or_else(|e| panic!("{e}"));
            let time = seconds(begun.elapsed().as_secs_f64(), session);
            match step {
                0 => first = loss(session),
                _ => times.push(time),
            }
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let peaks = session.peaks().unwrap_or_default();
        let peak: Vec<usize> = peaks.iter().map(|p| p.peak_bytes_measured >> 20).collect();
        let mut line = json!({
            "impl": "mesh", "dtype": self.dtype, "mesh": self.mesh.to_string(), "threads": session.options().threads(), "step_s": median,
            "min_s": times[0], "max_s": times[times.len() - 1], "gflops": flops as f64 / 1e9 / median, "peak_mib": peak,
        });
        let predicted = self.machine.as_ref().map(|file| {
            let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let machine = Machine::from_toml(&text).unwrap_or_else(|e| panic!("{e}"));
            let seconds = estimate(session.plan(), "train", &machine).map(|e| e.seconds);
            json!({"layout": session.plan().layout.to_string(), "predicted_s": seconds})
        });
        let losses = first.map(|first| json!({"loss_first": first, "loss_last": loss(session)}));
        for more in [Some(case), losses, predicted].into_iter().flatten() {
            if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
                line.extend(more);
            }
        }
        println!("{line}");
        if self.profile {
            eprint!("{}", session.profile().unwrap_or_else(|e| panic!("{e}")).text());
        }
    }
}

/// Seconds that the last run spent in the steps whose label (op and scope) is asked for.
pub fn last_run(session: &Session, asked: impl Fn(&str) -> bool) -> f64 {
    let parts = session.events().unwrap_or_default();
    let events = || parts.iter().flat_map(|p| p.events.iter().map(|e| (e, &p.labels[e.label as usize])));
    let last = events().map(|(e, _)| e.run).max();
    let chosen = events().filter(|(e, label)| Some(e.run) == last && asked(label));
    chosen.map(|(e, _)| (e.end_ns - e.begin_ns) as f64 / 1e9).sum()
}
