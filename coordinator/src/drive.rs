//! Driving a run: steps one after the other, checkpoints when they are due, and going on after a loss.
//!
//! Steps, feeds and random numbers are functions of the step's number, so a run that goes back to a checkpoint repeats
//! what it did, bit for bit.

use crate::checkpoint::Position;
use crate::error::Failure;
use crate::interrupt;
use crate::session::Session;
use std::time::Instant;

/// Losses in a row without a step done in between, after which a run is given up.
const ATTEMPTS: u32 = 5;

/// A run, as its driver sees it.
pub trait Run {
    /// What can go wrong in it.
    type Error: From<Failure>;

    /// Does step number `at.step`: feeds, runs, fetches, and counts what it drew on in `at.samples`. After a loss steps
    /// come again.
    ///
    /// # Errors
    /// Whatever goes wrong; a lost session is opened anew, anything else ends the run.
    fn step(&mut self, session: &mut Session, at: &mut Position) -> Result<(), Self::Error>;

    /// Tells the user something.
    fn note(&mut self, text: &str);
}

/// How far, and when to write checkpoints.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Steps in all.
    pub steps: u32,
    /// Steps between checkpoints; 0 for one at the end only.
    pub checkpoint_every: u32,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Done,
    /// The process was asked to stop ([`interrupt`]); where the session has a place for them, a checkpoint is written.
    Interrupted,
}

/// Runs the steps from `at` on, which says where the run is at any time.
///
/// # Errors
/// What [`Run::step`] fails with; a session that is lost again and again; a last checkpoint that cannot be written.
pub fn drive<R: Run>(
    session: &mut Session,
    run: &mut R,
    at: &mut Position,
    schedule: &Schedule,
) -> Result<End, R::Error> {
    let start = at.clone();
    let mut saved = None;
    let (mut furthest, mut losses) = (at.step, 0);
    loop {
        let failure = match go(session, run, at, schedule, &mut saved) {
            Ok(end) => return Ok(end),
            Err(e) => e,
        };
        let Some(mut reason) = session.lost() else { return Err(failure) };
        if at.step > furthest {
            (furthest, losses) = (at.step, 0);
        }
        // What goes wrong while going on is one more loss.
        loop {
            losses += 1;
            if losses > ATTEMPTS || interrupt::asked() {
                return Err(failure);
            }
            run.note(&format!("{reason}; waiting for workers to go on with"));
            match resume(session, run, at, &start) {
                Ok(()) => break,
                Err(Failure::Lost(why)) => reason = why,
                Err(other) => return Err(other.into()),
            }
        }
        saved = None;
    }
}

/// Does what comes after the last step and may be done again: on a session that is opened anew, with the last checkpoint,
/// if it is lost in between.
///
/// # Errors
/// What `f` fails with; a session that is lost again and again.
pub fn again<T, E: From<Failure>>(
    session: &mut Session,
    mut note: impl FnMut(&str),
    mut f: impl FnMut(&mut Session) -> Result<T, E>,
) -> Result<T, E> {
    let mut losses = 0;
    loop {
        let failure = match f(session) {
            Ok(done) => return Ok(done),
            Err(e) => e,
        };
        losses += 1;
        let Some(reason) = session.lost().filter(|_| losses <= ATTEMPTS && !interrupt::asked()) else {
            return Err(failure);
        };
        note(&format!("{reason}; waiting for workers to go on with"));
        match session.reopen() {
            Ok(_) | Err(Failure::Lost(_)) => {}
            Err(other) => return Err(other.into()),
        }
    }
}

/// Opens the session anew and goes back to where it is then.
fn resume<R: Run>(session: &mut Session, run: &mut R, at: &mut Position, start: &Position) -> Result<(), Failure> {
    let begun = Instant::now();
    let restored = session.reopen();
    session.notes().iter().for_each(|n| run.note(n));
    let config = std::mem::take(&mut at.config);
    *at = match restored? {
        Some(restored) => restored.position,
        None if start.step == 0 => start.clone(),
        None => return Err(Failure::Checkpoint(format!("C0008: no checkpoint is left of step {}", start.step))),
    };
    at.config = config;
    run.note(&format!(
        "goes on from step {} on mesh {}, {:.1} s after the loss",
        at.step,
        session.plan().mesh,
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Runs until the end, or until something happens.
fn go<R: Run>(
    session: &mut Session,
    run: &mut R,
    at: &mut Position,
    schedule: &Schedule,
    saved: &mut Option<u32>,
) -> Result<End, R::Error> {
    let writes = session.options().checkpoints.is_some();
    while at.step < schedule.steps {
        run.step(session, at)?;
        at.step += 1;
        session.notes().iter().for_each(|n| run.note(n));
        let due = schedule.checkpoint_every > 0 && at.step.is_multiple_of(schedule.checkpoint_every);
        let stop = interrupt::asked();
        let regroup = session.regroup() && writes;
        if writes && *saved != Some(at.step) && (due || stop || regroup || at.step == schedule.steps) {
            session.checkpoint(at)?;
            *saved = Some(at.step);
        }
        if stop {
            if let Err(e) = session.settle() {
                run.note(&e.to_string());
            }
            return Ok(End::Interrupted);
        }
        if regroup && at.step < schedule.steps {
            match session.settle() {
                Ok(()) => {
                    run.note("the workers change");
                    let start = at.clone();
                    resume(session, run, at, &start)?;
                }
                // Without a checkpoint nothing is given up; the next step tries again.
                Err(Failure::Checkpoint(why)) => {
                    run.note(&why);
                    *saved = None;
                }
                Err(lost) => return Err(lost.into()),
            }
        }
    }
    session.settle()?;
    session.notes().iter().for_each(|n| run.note(n));
    Ok(End::Done)
}
