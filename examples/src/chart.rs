//! Line charts as PNG, for people who would rather look than read.

use crate::run::{Failed, written};
use image::RgbImage;
use plotters::coord::Shift;
use plotters::coord::combinators::{BindKeyPoints, IntoLogRange, LogCoord};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use worker::data::picture::COLORS;

/// Points of a line: (x, y).
pub type Points = Vec<(f64, f64)>;

/// Colours of the series, the ones that stand out on white first.
const ORDER: [usize; 7] = [6, 4, 2, 0, 5, 1, 3];
/// Pixels of a picture, across and down.
const SIZE: (u32, u32) = (960, 600);
/// Pixels drawn for one of the picture across and down, which smooths every edge.
const FINE: u32 = 2;
const FONT: &str = "sans-serif";
const GREY: RGBColor = RGBColor(110, 110, 110);
const PALE: RGBColor = RGBColor(228, 228, 228);
const INK: RGBColor = RGBColor(40, 40, 40);

/// A line with a name.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// The line. Points that are no numbers, or not above 0 on a log axis, are left out.
    pub points: Points,
    /// What is shaded around it, if anything: (x, from, to).
    pub band: Vec<(f64, f64, f64)>,
}

impl Series {
    /// The mean of several runs where all of them have a point (x from 0 on, such as steps), and shaded what is between the least and the greatest.
    pub fn of_runs(name: &str, runs: &[Points]) -> Series {
        // From 0 on, floats are in the order of their bits.
        let mut at: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (x, y) in runs.iter().flatten().filter(|(x, _)| *x >= 0.0) {
            at.entry(x.to_bits()).or_default().push(*y);
        }
        let mut series = Series { name: name.into(), ..Series::default() };
        for (x, values) in at.into_iter().filter(|(_, values)| values.len() == runs.len()) {
            series.add(f64::from_bits(x), &values);
        }
        series
    }

    /// A line of so many points at most: the mean of runs of neighbours, and shaded what is between the least and the
    /// greatest of them.
    pub fn smooth(name: &str, points: &[(f64, f64)], most: usize) -> Series {
        let window = points.len().div_ceil(most.max(1)).max(1);
        if window == 1 {
            return Series { name: name.into(), points: points.to_vec(), band: vec![] };
        }
        let mut series = Series { name: format!("{name} (mean and range of {window} steps)"), ..Series::default() };
        for neighbours in points.chunks(window) {
            let x = neighbours.iter().map(|p| p.0).sum::<f64>() / neighbours.len() as f64;
            series.add(x, &neighbours.iter().map(|p| p.1).collect::<Vec<_>>());
        }
        series
    }

    fn add(&mut self, x: f64, values: &[f64]) {
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        self.points.push((x, values.iter().sum::<f64>() / values.len() as f64));
        self.band.push((x, low, high));
    }
}

/// A chart of lines.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What is across.
    pub x: String,
    /// What is up.
    pub y: String,
    /// Whether the axis upwards is logarithmic.
    pub log_y: bool,
    /// The lines.
    pub series: Vec<Series>,
}

impl Chart {
    /// Writes it as PNG.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Failed> {
        let (width, height) = (SIZE.0 * FINE, SIZE.1 * FINE);
        let mut pixels = vec![255; (width * height * 3) as usize];
        let drawn = self.draw(&mut pixels, (width, height)).map_err(std::io::Error::other);
        written(path, drawn)?;
        let fine = RgbImage::from_raw(width, height, pixels).expect("there are as many pixels");
        let picture = image::imageops::thumbnail(&fine, SIZE.0, SIZE.1);
        let saved = picture.save_with_format(path, image::ImageFormat::Png);
        written(path, saved.map_err(std::io::Error::other))
    }

    fn draw(&self, pixels: &mut [u8], size: (u32, u32)) -> Result<(), String> {
        let font = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
        font.map_err(|_| "the font cannot be read".to_string())?;
        let area = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
        let shown = |y: &f64| y.is_finite() && (!self.log_y || *y > 0.0);
        let series: Vec<Series> = self.series.iter().map(|s| s.only(shown)).collect();
        let lines = series.iter().flat_map(|s| s.points.iter().copied());
        let bands = series.iter().flat_map(|s| s.band.iter().flat_map(|(x, a, b)| [(*x, *a), (*x, *b)]));
        let all: Points = lines.chain(bands).collect();
        let x = extent(all.iter().map(|p| p.0));
        if self.log_y {
            let y = extent(all.iter().map(|p| p.1.log10()));
            let margin = (y.end - y.start) * 0.05;
            let y = 10f64.powf(y.start - margin)..10f64.powf(y.end + margin);
            let ticks = log_ticks(&y);
            let y: LogCoord<f64> = y.log_scale().into();
            self.lines(&area, &series, x, y.with_key_points(ticks))
        } else {
            let y = extent(all.iter().map(|p| p.1));
            let margin = (y.end - y.start) * 0.05;
            // What is not negative is not shown below 0.
            let low = if y.start >= 0.0 { (y.start - margin).max(0.0) } else { y.start - margin };
            self.lines(&area, &series, x, low..y.end + margin)
        }
        .map_err(|e| e.to_string())
    }

    fn lines<Y: AsRangedCoord<Value = f64>>(
        &self,
        area: &DrawingArea<BitMapBackend, Shift>,
        series: &[Series],
        x: Range<f64>,
        y: Y,
    ) -> Result<(), Box<dyn std::error::Error>>
    where
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let text = |size: u32, color: RGBColor| (FONT, size * FINE).into_font().color(&color);
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, text(20, INK))
            .margin(16 * FINE)
            .margin_right(28 * FINE)
            .x_label_area_size(44 * FINE)
            .y_label_area_size(64 * FINE)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .axis_desc_style(text(14, INK))
            .label_style(text(12, GREY))
            .x_label_formatter(&|v| number(*v))
            .y_label_formatter(&|v| number(*v))
            .x_labels(9)
            .y_labels(8)
            .light_line_style(TRANSPARENT)
            .bold_line_style(PALE.stroke_width(FINE))
            .axis_style(GREY.stroke_width(FINE))
            .draw()?;
        for (i, s) in series.iter().enumerate() {
            let [r, g, b] = COLORS[ORDER[i % ORDER.len()]].map(|c| c as u8);
            let color = RGBColor(r, g, b);
            let there = s.band.iter().map(|(x, low, _)| (*x, *low));
            let back = s.band.iter().rev().map(|(x, _, high)| (*x, *high));
            if s.band.len() > 1 {
                chart.draw_series([Polygon::new(there.chain(back).collect::<Vec<_>>(), color.mix(0.18))])?;
            }
            let line = color.stroke_width(2 * FINE);
            if let [only] = s.points[..] {
                chart.draw_series([Circle::new(only, 3 * FINE, color.filled())])?;
            }
            chart
                .draw_series(LineSeries::new(s.points.iter().copied(), line))?
                .label(&s.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22 * FINE as i32, y)], line));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(10 * FINE)
            .legend_area_size(30 * FINE)
            .background_style(WHITE.mix(0.85))
            .border_style(PALE.stroke_width(FINE))
            .label_font(text(13, INK))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

impl Series {
    fn only(&self, shown: impl Fn(&f64) -> bool) -> Series {
        let points = self.points.iter().copied().filter(|(x, y)| x.is_finite() && shown(y));
        let band = self.band.iter().copied().filter(|(x, a, b)| x.is_finite() && shown(a) && shown(b));
        Series { name: self.name.clone(), points: points.collect(), band: band.collect() }
    }
}

/// From the least to the greatest value, and never nothing.
fn extent(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let least = high.abs().max(1e-9) * 1e-6;
    if high - low < least { low - low.abs().max(1.0) * 0.5..high + high.abs().max(1.0) * 0.5 } else { low..high }
}

/// Where a logarithmic axis has ticks: at the powers of ten, and at 2 and 5 times those where they are few.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let (low, high) = (range.start.log10().floor() as i32, range.end.log10().ceil() as i32);
    let steps: &[f64] = if high - low > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let every = (low..=high).flat_map(|e| steps.iter().map(move |s| s * 10f64.powi(e)));
    every.filter(|v| range.contains(v)).collect()
}

/// A tick's number as people write it: `0.25`, `12k`, `1e-5`.
fn number(v: f64) -> String {
    let digits = |v: f64| {
        let text = format!("{v:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    };
    match v.abs() {
        a if a < 1e-12 => "0".into(),
        a if a < 1e-3 => format!("{v:.0e}"),
        a if a >= 1e9 => format!("{v:.1e}"),
        a if a >= 1e6 => digits(v / 1e6) + "M",
        a if a >= 1e4 => digits(v / 1e3) + "k",
        _ => digits(v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(series: &Series, i: usize) -> (f64, f64, (f64, f64, f64)) {
        (series.points[i].0, series.points[i].1, series.band[i])
    }

    #[test]
    fn several_runs_are_their_mean_and_what_is_between_them() {
        let runs = [vec![(1.0, 4.0), (2.0, 2.0), (3.0, 9.0)], vec![(2.0, 1.0), (1.0, 2.0)]];
        let series = Series::of_runs("loss", &runs);
        assert_eq!(series.points.len(), 2, "where every run has a point");
        assert_eq!((at(&series, 0), at(&series, 1)), ((1.0, 3.0, (1.0, 2.0, 4.0)), (2.0, 1.5, (2.0, 1.0, 2.0))));
    }

    #[test]
    fn a_long_line_becomes_the_means_of_neighbours() {
        let line: Points = (0..10).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert_eq!(Series::smooth("loss", &line, 10).points, line);
        let series = Series::smooth("loss", &line, 5);
        assert_eq!((series.points.len(), at(&series, 1)), (5, (2.5, 0.5, (2.5, 0.0, 1.0))));
        assert_eq!(series.name, "loss (mean and range of 2 steps)");
    }

    #[test]
    fn numbers_at_ticks_are_short() {
        let written = [0.0, 0.25, 3.0, 1500.0, 12_000.0, 2.5e6, 3e-5, -0.5].map(number);
        assert_eq!(written, ["0", "0.25", "3", "1500", "12k", "2.5M", "3e-5", "-0.5"]);
    }

    #[test]
    fn a_logarithmic_axis_has_ticks_within_a_decade_too() {
        assert_eq!(log_ticks(&(1.5..11.0)), [2.0, 5.0, 10.0]);
        assert_eq!(log_ticks(&(0.5..2e5)), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
    }

    #[test]
    fn a_chart_has_its_lines_in_their_colours_and_whatever_is_no_number_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let falling: Points = (1..50).map(|i| (f64::from(i), 10.0 / f64::from(i))).collect();
        let broken = vec![(1.0, f64::NAN), (2.0, 0.0), (3.0, 1.0), (4.0, f64::INFINITY), (5.0, 2.0)];
        let series = |name: &str, points: &Points| Series { name: name.into(), points: points.clone(), band: vec![] };
        let cases = [vec![], vec![series("one", &vec![(1.0, 1.0)])], vec![series("a", &falling), series("b", &broken)]];
        for (i, log_y) in [false, true].into_iter().flat_map(|log| (0..3).map(move |i| (i, log))) {
            let path = dir.path().join("chart.png");
            let [title, x, y] = ["Loss", "step", "loss"].map(String::from);
            Chart { title, x, y, log_y, series: cases[i].clone() }.write(&path).unwrap();
            let picture = image::open(&path).unwrap().to_rgb8();
            assert_eq!((picture.width(), picture.height()), SIZE);
            let close = |color: usize| {
                let near = |p: &image::Rgb<u8>| (0..3).all(|c| (f32::from(p[c]) - COLORS[color][c]).abs() < 12.0);
                picture.pixels().filter(|p| near(p)).count()
            };
            let (first, second) = (close(ORDER[0]), close(ORDER[1]));
            assert_eq!((first > 20, second > 20), (i > 0, i > 1), "{first} and {second} pixels of chart {i}");
            let dark = picture.pixels().filter(|p| p.0.iter().all(|c| *c < 100)).count();
            assert!(dark > 100, "there is text: {dark} dark pixels");
        }
        let e = Chart::default().write(&dir.path().join("none/chart.png")).unwrap_err().to_string();
        assert!(e.contains("U0007: cannot write ") && e.contains("none/chart.png"), "{e}");
    }
}
