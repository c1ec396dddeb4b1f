//! The commands: `train`, `eval` and `plan`.

use crate::config::{Config, times};
use crate::data::{Outline, Scan};
use crate::model::{self, Shape};
use coordinator::drive::again;
use coordinator::{Options, Position, Session};
use examples::memory::Fitted;
use examples::plan::Planned;
use examples::report::{Figures, Work, say, thousands};
use examples::run::{self, Failed, Model, Ran, diverged, scalar};
use mesh::array::Array;
use ndarray::{Array4, Array5, ArrayD, Axis, Ix4};
use worker::data::{picture, volume::View};

/// What is to be done.
pub type Task = run::Task<Config>;

fn scan(task: &Task) -> Result<Scan, Failed> {
    Ok(Scan::load(&task.config, |text| eprintln!("{text}"))?)
}

fn shape(outline: &Outline) -> Shape {
    Shape { volume: outline.shape, classes: outline.classes.len() }
}

/// The program of a run, so that it fits into the memory allowed.
fn program(task: &Task, outline: &Outline, options: &Options) -> Result<Fitted, Failed> {
    let shape = shape(outline);
    task.program(options, |recompute| model::program(&shape, &task.config, recompute))
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
    let text = format!(
        "data     {}\nlevels   {}{odd}\nclasses  {}\nmodel    {} parameters: base {}, {norm} norm, drop-out {}\n\
         training {optimizer} at rate {}, batch {}{}, seed {}\n",
        outline.source,
        levels.join(", "),
        outline.classes.join(", "),
        thousands(parameters as u64),
        c.base,
        c.dropout,
        c.rate,
        c.batch,
        if c.augment { ", augmented" } else { "" },
        c.common.seed,
    );
    text + &run::devices(options)
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

/// Trains.
pub fn train(task: &Task) -> Result<(), Failed> {
    let options = task.begin()?;
    let scan = scan(task)?;
    let outline = scan.outline();
    let fitted = program(task, &outline, &options)?;
    let mut running = task.session(fitted.program, &options)?;
    let session = &mut running.session;
    let introduction = introduction(&task.config, &outline, &options, session.program().parameters());
    eprint!("{introduction}{}", fitted.text);
    task.train(session, &mut Training { config: &task.config, scan: &scan })?;
    judge(task, &scan, session)
}

/// Steps on views of one scan.
struct Training<'a> {
    config: &'a Config,
    scan: &'a Scan,
}

impl Model for Training<'_> {
    fn run(&mut self, session: &mut Session, at: &Position) -> Result<Ran, Failed> {
        let c = self.config;
        let f = session.function("train")?;
        let mut ran = run::one(session, f, at.step, |session| {
            let ids: Vec<u64> = (at.samples..at.samples + c.batch as u64).collect();
            let (seed, classes) = (c.common.seed, self.scan.classes.len());
            let draw = |id: &u64| if c.augment { View::draw(seed, *id, classes) } else { View::plain(*id, classes) };
            let (image, labels) = views(self.scan, &ids.iter().map(draw).collect::<Vec<_>>());
            session.feed(f, "image", &image)?;
            session.feed(f, "labels", &labels)?;
            Ok(ids)
        })?;
        let dice = f64::from(scalar(session, f, "dice")?);
        ran.figures = Figures { row: vec![("dice", dice)], shown: vec![("dice", dice)] };
        Ok(ran)
    }

    fn work(&self) -> Work {
        let voxels = self.config.batch * self.scan.image.len();
        Work { amount: voxels as f64 / 1e6, unit: "Mvoxel", flops: None }
    }
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
    let options = task.begun()?;
    let scan = scan(task)?;
    let outline = scan.outline();
    let mut running = task.session(model::eval_program(&shape(&outline), &task.config)?, &options)?;
    let session = &mut running.session;
    eprint!("{}", introduction(&task.config, &outline, &options, session.program().parameters()));
    task.restored(session)?;
    judge(task, &scan, session)
}

/// What a run would do.
pub fn plan(task: &Task) -> Result<Planned, Failed> {
    let options = task.options()?;
    let outline = Outline::of(&task.config)?;
    let Fitted { program, text } = program(task, &outline, &options)?;
    let introduction = introduction(&task.config, &outline, &options, program.parameters()) + &text;
    let functions = vec![("train".into(), options.plan(&program)?, program)];
    Ok(Planned { introduction, functions, memory: options.memory })
}
