//! Which segments are which stage of a pipeline, and what that takes of memory.

use super::solve::{Label, Problem, Solution};
use super::split::Pipeline;

/// How often the limit of memory is set anew for stages that are not alike.
const ROUNDS: usize = 6;

/// The fastest solution of `most` seconds or less in which no stage takes more memory than `limit`, and by segment its stage;
/// None if there is none, as far as that was looked for. A problem adds up seconds and what is kept as if stages were alike:
/// where one has more than others the solution takes longer than its bound, and the problem is solved within less memory.
pub fn solve(problem: &Problem, pipeline: Pipeline, limit: f64, most: f64) -> Option<(Solution, Vec<usize>)> {
    let (mut within, mut bound) = (limit, None);
    for _ in 0..ROUNDS {
        let mut solution = problem.solve(within, most)?;
        if pipeline.depth == 1 {
            let stages = vec![0; solution.chosen.len()];
            return Some((solution, stages));
        }
        let chosen = labels(problem, &solution);
        let stages = share(&chosen, pipeline.depth);
        let memory = memory(&chosen, &stages, pipeline);
        if memory <= limit {
            solution.bound = bound.unwrap_or(solution.bound);
            solution.seconds *= longer(&chosen, &stages, pipeline);
            solution.memory = memory;
            return Some((solution, stages));
        }
        bound.get_or_insert(solution.bound);
        within = 0.99 * within.min(solution.memory) * limit / memory;
    }
    None
}

/// By segment: what was chosen.
fn labels(problem: &Problem, solution: &Solution) -> Vec<Label> {
    let chosen = problem.segments.iter().zip(&solution.chosen);
    let label = |(options, (option, again)): (&std::sync::Arc<Vec<Vec<Label>>>, &(usize, bool))| {
        let mut labels = options[*option].iter().filter(|l| l.again == *again).copied();
        labels.next().unwrap_or_default()
    };
    chosen.map(label).collect()
}

/// By segment: its stage, so that each stage is a run of segments in order and the longest one is as short as can be. What
/// belongs to no other segment, the first one, is the last stage's.
fn share(chosen: &[Label], depth: usize) -> Vec<usize> {
    cut(&chosen.iter().map(|l| l.seconds).collect::<Vec<_>>(), depth)
}

/// How much longer a step takes than with stages that are alike: each micro-batch goes through all stages, and every one but
/// the first follows another as fast as the longest stage lets it.
fn longer(chosen: &[Label], stages: &[usize], pipeline: Pipeline) -> f64 {
    let all: f64 = chosen.iter().map(|l| l.seconds).sum();
    let own = |stage: usize| chosen.iter().zip(stages).filter(|(_, s)| **s == stage).map(|(l, _)| l.seconds).sum();
    let longest = (0..pipeline.depth).map(own).fold(0.0, f64::max);
    let micro = pipeline.micro as f64;
    if all > 0.0 { (1.0 + (micro - 1.0) * longest / all) / micro / pipeline.seconds() } else { 1.0 }
}

/// Bytes of the fullest stage: of its segments, what is there once, the activations of the micro-batches that it has in
/// flight, and what the largest one takes while it runs.
fn memory(chosen: &[Label], stages: &[usize], pipeline: Pipeline) -> f64 {
    let depth = pipeline.depth as f64;
    let of = |stage: usize| {
        let in_flight = pipeline.in_flight(stage) as f64;
        let own = || chosen.iter().zip(stages).filter(|(_, s)| **s == stage).map(|(l, _)| l);
        let fixed = |l: &Label| depth * l.kept - pipeline.in_flight(0) as f64 * l.flight;
        let kept: f64 = own().map(|l| fixed(l) + in_flight * l.flight).sum();
        kept + own().map(|l| l.transient).fold(0.0, f64::max)
    };
    (0..pipeline.depth).map(of).fold(0.0, f64::max)
}

fn cut(seconds: &[f64], depth: usize) -> Vec<usize> {
    let n = seconds.len();
    let run = |from: usize, to: usize| seconds[from..to].iter().sum::<f64>();
    // By stages and where the last of them ends: the longest stage, and where the last one begins.
    let mut best = vec![vec![(f64::INFINITY, 0); n + 1]; depth + 1];
    best[0][1] = (0.0, 1);
    for stages in 1..=depth {
        let rest = if stages == depth { seconds[0] } else { 0.0 };
        for end in 1..=n {
            let choices = (1..=end).map(|begin| (best[stages - 1][begin].0.max(run(begin, end) + rest), begin));
            best[stages][end] = choices.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, end));
        }
    }
    let (mut of, mut end) = (vec![depth - 1; n], n);
    for stage in (0..depth).rev() {
        let begin = best[stage + 1][end].1;
        of[begin..end].fill(stage);
        end = begin;
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_stage_is_as_short_as_can_be() {
        // The first one, which belongs nowhere, makes the last stage longer.
        assert_eq!(cut(&[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2), [1, 0, 0, 0, 0, 1, 1]);
        assert_eq!(cut(&[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3), [2, 0, 0, 1, 1, 2, 2]);
        assert_eq!(cut(&[0.0, 5.0, 1.0, 1.0, 1.0], 2), [1, 0, 1, 1, 1]);
        assert_eq!(cut(&[1.0, 2.0], 1), [0, 0]);
    }
}
