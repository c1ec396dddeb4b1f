//! Which segments are which stage of a pipeline.

use super::solve::{Problem, Solution};

/// By segment: its stage, so that each stage is a run of segments in order and the longest one is as short as can be. What
/// belongs to no other segment, the first one, is the last stage's.
pub fn share(problem: &Problem, solution: &Solution, depth: usize) -> Vec<usize> {
    let chosen = problem.segments.iter().zip(&solution.chosen);
    let seconds: Vec<f64> = chosen
        .map(|(options, (option, again))| {
            let labels = options[*option].iter().filter(|l| l.again == *again);
            labels.map(|l| l.seconds).fold(f64::INFINITY, f64::min)
        })
        .collect();
    cut(&seconds, depth)
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
