//! Runs side by side: a table, and a chart of one of their figures.

use examples::chart::{Chart, Points, Series};
use examples::report::column;
use examples::run::{Failed, METRICS_FILE, print};
use examples::settings::mistake;
use std::path::PathBuf;

/// What to compare.
#[derive(clap::Args)]
pub struct CompareOptions {
    /// A series: a name and the run folders of its seeds; may be repeated
    #[arg(long, value_name = "NAME=DIR,DIR,..", required = true)]
    series: Vec<String>,
    /// The figure of metrics.jsonl that is compared; less is better
    #[arg(long, value_name = "NAME", default_value = "held_out_loss")]
    figure: String,
    /// Chart to write, a PNG: means, and shaded from the least to the greatest
    #[arg(long, value_name = "FILE.png")]
    to: Option<PathBuf>,
    /// What the chart is called
    #[arg(long, value_name = "TEXT", default_value = "")]
    title: String,
}

/// The runs of a series.
struct Group {
    name: String,
    runs: Vec<Points>,
    /// Median seconds of a step.
    seconds: f64,
}

impl Group {
    fn read(text: &str, figure: &str) -> Result<Group, Failed> {
        let Some((name, folders)) = text.split_once('=') else {
            return mistake(format!("--series {text} names no runs"), "write NAME=DIR,DIR,..")?;
        };
        let (mut runs, mut seconds) = (vec![], vec![]);
        for folder in folders.split(',').map(PathBuf::from) {
            let file = folder.join(METRICS_FILE);
            let points = column(&file, figure);
            if points.is_empty() {
                let what = format!("{} has no figure `{figure}`", file.display());
                return mistake(what, "name the folders of runs, and with --figure one that their metrics.jsonl has")?;
            }
            runs.push(points);
            seconds.extend(column(&file, "step_seconds").into_iter().map(|p| p.1));
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Group { name: name.into(), runs, seconds: seconds.get(seconds.len() / 2).copied().unwrap_or(0.0) })
    }

    /// Mean, least and greatest of the last figures.
    fn last(&self) -> [f64; 3] {
        let last: Vec<f64> = self.runs.iter().filter_map(|r| r.last()).map(|p| p.1).collect();
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        [mean, last.iter().copied().fold(f64::MAX, f64::min), last.iter().copied().fold(f64::MIN, f64::max)]
    }

    /// The first step at which the mean of the runs is as low as `goal`, on the line between two measurements.
    fn reaches(&self, goal: f64) -> Option<f64> {
        let mean = Series::of_runs("", &self.runs).points;
        let first = mean.iter().position(|p| p.1 <= goal)?;
        let (x, y) = mean[first];
        let Some((x0, y0)) = first.checked_sub(1).map(|i| mean[i]) else { return Some(x) };
        Some(x0 + (x - x0) * (y0 - goal) / (y0 - y).max(f64::MIN_POSITIVE))
    }
}

/// Compares runs; every series is held against the first one's last figure.
pub fn compare(o: &CompareOptions) -> Result<(), Failed> {
    let groups = o.series.iter().map(|s| Group::read(s, &o.figure)).collect::<Result<Vec<_>, _>>()?;
    print(&table(&groups, &o.figure))?;
    if let Some(path) = &o.to {
        let series = groups.iter().map(|g| Series::of_runs(&g.name, &g.runs)).collect();
        let [x, y] = ["steps".into(), o.figure.replace('_', " ")];
        Chart { title: o.title.clone(), x, y, log_y: false, series }.write(path)?;
    }
    Ok(())
}

/// A table in Markdown.
fn table(groups: &[Group], figure: &str) -> String {
    let goal = groups[0].last()[0];
    let name = &groups[0].name;
    let mut text = format!(
        "| series | seeds | {} at the end (least - greatest) | steps until {name}'s {goal:.4} | seconds a step | seconds until then |\n|---|---|---|---|---|---|\n",
        figure.replace('_', " ")
    );
    for g in groups {
        let [mean, low, high] = g.last();
        let (steps, time) = match g.reaches(goal) {
            Some(steps) => (format!("{steps:.0}"), format!("{:.0}", steps * g.seconds)),
            None => ("not reached".into(), "-".into()),
        };
        text += &format!(
            "| {} | {} | {mean:.4} ({low:.4} - {high:.4}) | {steps} | {:.3} | {time} |\n",
            g.name,
            g.runs.len(),
            g.seconds
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_held_against_the_end_of_the_first_one() {
        let group = |name: &str, runs: &[&[f64]], seconds| Group {
            name: name.into(),
            runs: runs.iter().map(|r| (1..).map(|s| f64::from(s) * 10.0).zip(r.iter().copied()).collect()).collect(),
            seconds,
        };
        let plain = group("plain", &[&[7.0, 6.0, 5.0], &[7.0, 6.4, 5.2]], 2.0);
        let quick = group("quick", &[&[6.0, 5.0, 4.0], &[6.2, 5.0, 4.2]], 1.0);
        let slow = group("slow", &[&[8.0, 8.0, 8.0]], 1.0);
        let text = table(&[plain, quick, slow], "held_out_loss");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("held out loss at the end") && lines[0].contains("plain's 5.1000"), "{text}");
        assert_eq!(lines[2], "| plain | 2 | 5.1000 (5.0000 - 5.2000) | 30 | 2.000 | 60 |");
        assert_eq!(lines[3], "| quick | 2 | 4.1000 (4.0000 - 4.2000) | 19 | 1.000 | 19 |");
        assert!(lines[4].ends_with("| not reached | 1.000 | - |"), "{text}");
    }
}
