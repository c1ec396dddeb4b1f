//! Speed, measured beside what a user would pick instead; the measurements lie in `benches/`.

use coordinator::session::FunctionId;
use coordinator::{Options, Session};
use mesh::layout::Mesh;
use mesh::program::Program;
use serde_json::{Value, json};
use std::time::Instant;

/// What every measurement of steps takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Steps {
    /// Mesh; axes are called as the dimensions they split.
    #[arg(long, default_value = "1")]
    pub mesh: Mesh,
    /// Threads of each device; 0: the machine's cores shared out.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Steps measured, after one that is not.
    #[arg(long, default_value_t = 5)]
    pub steps: u32,
    /// Where the time of a step goes as well.
    #[arg(long)]
    pub profile: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Steps {
    /// A session of a program.
    ///
    /// # Panics
    /// A mesh that the program cannot be split over.
    pub fn session(&self, program: Program) -> Session {
        let rules: Vec<String> = self.mesh.axes().iter().map(|(n, _)| format!("{n}:{n}")).collect();
        let options = Options {
            layout: rules.join(",").parse().expect("rules of the axes' names"),
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
            "impl": "mesh", "mesh": self.mesh.to_string(), "threads": session.options().threads(), "step_s": median,
            "min_s": times[0], "max_s": times[times.len() - 1], "gflops": flops as f64 / 1e9 / median, "peak_mib": peak,
        });
        let losses = first.map(|first| json!({"loss_first": first, "loss_last": loss(session)}));
        for more in [Some(case), losses].into_iter().flatten() {
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
