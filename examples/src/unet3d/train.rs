//! The commands: `train`, `eval` and `plan`.

use crate::config::{Config, times};
use crate::data::{Images, Labels, Outline, Scan};
use crate::model::{self, Shape};
use coordinator::drive::again;
use coordinator::session::FunctionId;
use coordinator::{Failure, Options, Position, Session};
use examples::memory::Fitted;
use examples::plan::{self, Shown};
use examples::report::{Work, say, thousands};
use examples::run::{self, Failed, Model, Ran, diverged, scalar};
use mesh::array::Array;
use ndarray::{Axis, Ix4};
use worker::data::volume::View;

/// What is to be done.
pub type Task = run::Task<Config>;

fn scan(task: &Task) -> Result<Scan, Failed> {
    Ok(Scan::open(&task.config, |text| eprintln!("{text}"))?)
}

fn shape(outline: &Outline) -> Shape {
    Shape { volume: outline.shape, classes: outline.classes.len() }
}

/// The program of a run, so that it fits into the memory allowed.
fn program(task: &Task, outline: &Outline, options: &Options) -> Result<Fitted, Failed> {
    let shape = shape(outline);
    task.program(options, |recompute| model::program(&shape, &task.config, recompute))
}

/// Searches for the layout, if that is asked for; what is to be said of it.
fn searched(task: &mut Task) -> Result<String, Failed> {
    let outline = Outline::of(&task.config)?;
    task.search("train", |config, recompute| model::program(&shape(&outline), config, recompute))
}

/// What is about to be done with what, in a few lines.
fn introduction(c: &Config, outline: &Outline, options: &Options, parameters: usize) -> String {
    let mut extents = outline.shape;
    let mut levels = vec![times(extents)];
    let even = (0..3).all(|a| outline.shape[a].is_multiple_of(1 << (c.levels - 1)));
    for _ in 1..c.levels {
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

/// Feeds views of a scan.
fn feed(session: &mut Session, f: FunctionId, scan: &Scan, views: &[View]) -> Result<(), Failure> {
    session.feed(f, "image", &Images(scan, views))?;
    session.feed(f, "labels", &Labels(scan, views))
}

/// Trains.
pub fn train(mut task: Task) -> Result<(), Failed> {
    eprint!("{}", searched(&mut task)?);
    let task = &task;
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
            feed(session, f, self.scan, &ids.iter().map(draw).collect::<Vec<_>>())?;
            Ok(ids)
        })?;
        let dice = f64::from(scalar(session, f, "dice")?);
        ran.figures.row.push(("dice", dice));
        ran.figures.shown.push(("dice", dice));
        Ok(ran)
    }

    fn work(&self) -> Work {
        let voxels = self.config.batch * self.scan.shape().iter().product::<usize>();
        Work { amount: voxels as f64 / 1e6, unit: "Mvoxel", flops: None }
    }
}

/// Predicts the whole volume, says how good that is, and writes prediction and picture.
fn judge(task: &Task, scan: &Scan, session: &mut Session) -> Result<(), Failed> {
    let plain = [View::plain(0, scan.classes.len())];
    let judged = |s: &mut Session| {
        let f = s.function("eval")?;
        feed(s, f, scan, &plain)?;
        s.step(f, 0)?;
        Ok::<_, Failure>((s.fetch(f, "loss")?, s.fetch(f, "dice")?, s.fetch(f, "prediction")?))
    };
    let (loss, dice, predicted) = again(session, |note| eprintln!("{note}"), judged)?;
    let loss = loss.to_f32().unwrap_or(f32::NAN);
    if !loss.is_finite() {
        return Err(diverged(format!("the loss of the whole volume is {loss}")));
    }
    let dice: Vec<f32> = dice.as_f32().map(|a| a.iter().copied().collect()).unwrap_or_default();
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
    let Array::I32(predicted) = predicted else { return Ok(()) };
    let Ok(predicted) = predicted.into_dimensionality::<Ix4>() else { return Ok(()) };
    let predicted = predicted.index_axis(Axis(0), 0);
    let (nii, png) = (task.out.join("prediction.nii.gz"), task.out.join("prediction.png"));
    scan.write_prediction(&nii, predicted)?;
    scan.write_picture(&png, predicted)?;
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

/// Prints what a run would do.
pub fn plan(mut task: Task, shown: &Shown) -> Result<(), Failed> {
    let searched = searched(&mut task)?;
    let outline = Outline::of(&task.config)?;
    shown.run("unet3d", task, |task, options| {
        let Fitted { program, text } = program(task, &outline, options)?;
        let introduction = introduction(&task.config, &outline, options, program.parameters()) + &text + &searched;
        Ok(plan::Outline { introduction, functions: vec![(program, "train".into())] })
    })
}
