//! Where those who have dialled wait for the epoch that they are meant for.

use super::connector::{ConnectError, Roster};
use super::grpc::Answers;
use super::link::Link;
use super::socket;
use prost::Message;
use proto::data::{Answer, Frame, Hello, answer::Kind};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tonic::Streaming;

/// Callers that wait in the lobby at the most; the oldest are turned away.
const LOBBY: usize = 4096;

/// Someone who has dialled and said hello.
pub(super) struct Arrival {
    pub hello: Hello,
    pub caller: Caller,
}

/// How it waits for an answer.
pub(super) enum Caller {
    Ring { socket: UnixStream, memory: OwnedFd, bell: OwnedFd, arena: Option<OwnedFd> },
    Grpc { frames: Streaming<Frame>, answer: oneshot::Sender<Result<Answers, String>> },
}

impl Arrival {
    /// Sends them away.
    pub fn refuse(self, reason: &str) {
        match self.caller {
            Caller::Ring { socket, .. } => {
                let answer = Answer { kind: Some(Kind::Refusal(reason.into())) };
                // Who is gone does not need to know.
                let _ = socket::send(&socket, &answer.encode_to_vec(), &[]);
            }
            Caller::Grpc { answer, .. } => {
                let _ = answer.send(Err(reason.into()));
            }
        }
    }
}

/// Where those who dialled wait for the epoch that they are meant for.
#[derive(Default)]
pub(super) struct Lobby {
    state: Mutex<LobbyState>,
}

#[derive(Default)]
pub(super) struct LobbyState {
    waiting: VecDeque<Arrival>,
    /// The last epoch of each job that this process was part of.
    epochs: HashMap<String, u64>,
    /// Whoever connects now, to be told of arrivals.
    pub caller: Option<mpsc::Sender<Event>>,
}

/// What a connecting thread waits for.
pub(super) enum Event {
    Arrived,
    Dialled {
        me: usize,
        peer: usize,
        link: Result<Box<dyn Link>, String>,
    },
    /// An attempt failed and is made again.
    Note {
        me: usize,
        peer: usize,
        detail: String,
    },
}

impl Lobby {
    pub fn open(&self) -> MutexGuard<'_, LobbyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets someone wait, or refuses them if their epoch has passed.
    pub fn enter(&self, arrival: Arrival) {
        let mut state = self.open();
        if let Some(reason) = state.stale(&arrival.hello) {
            drop(state);
            return arrival.refuse(&reason);
        }
        let turned_away = if state.waiting.len() >= LOBBY { state.waiting.pop_front() } else { None };
        state.waiting.push_back(arrival);
        if let Some(caller) = &state.caller {
            // Nobody may be connecting any more.
            let _ = caller.send(Event::Arrived);
        }
        drop(state);
        if let Some(arrival) = turned_away {
            arrival.refuse("too many wait here");
        }
    }
}

impl LobbyState {
    fn stale(&self, hello: &Hello) -> Option<String> {
        let current = *self.epochs.get(&hello.job)?;
        (hello.epoch < current).then(|| {
            format!("epoch {} of job `{}` has passed; this process is in epoch {current}", hello.epoch, hello.job)
        })
    }

    /// Begins an epoch: gives those back who are too late for it.
    pub fn begin(
        &mut self,
        roster: &Roster,
        caller: mpsc::Sender<Event>,
    ) -> Result<Vec<(Arrival, String)>, ConnectError> {
        let Roster { job, epoch, .. } = roster;
        match self.epochs.get(job) {
            Some(current) if current >= epoch => {
                return Err(ConnectError::Stale { job: job.clone(), epoch: *epoch, current: *current });
            }
            _ => self.epochs.insert(job.clone(), *epoch),
        };
        self.caller = Some(caller);
        let (mut late, mut waiting) = (vec![], VecDeque::new());
        for arrival in std::mem::take(&mut self.waiting) {
            match self.stale(&arrival.hello) {
                Some(reason) => late.push((arrival, reason)),
                None => waiting.push_back(arrival),
            }
        }
        self.waiting = waiting;
        Ok(late)
    }

    /// Takes out whoever waits for this epoch.
    pub fn claim(&mut self, roster: &Roster) -> Vec<Arrival> {
        let (mut mine, mut waiting) = (vec![], VecDeque::new());
        for arrival in std::mem::take(&mut self.waiting) {
            if arrival.hello.job == roster.job && arrival.hello.epoch == roster.epoch {
                mine.push(arrival);
            } else {
                waiting.push_back(arrival);
            }
        }
        self.waiting = waiting;
        mine
    }
}
