//! The devices of an epoch on their way to each other: who dials whom, by which link, and what is missing.

use super::bell::{Bell, Doom};
use super::connector::{Address, ConnectError, ConnectOptions, Listener, Missing, Roster, TransportChoice, system};
use super::grpc::{Ends, WINDOW};
use super::link::Link;
use super::lobby::{Arrival, Caller, Event};
use super::memory::LentMemory;
use super::ring::{RingLink, RingMemory};
use super::socket;
use prost::Message;
use proto::data::{Answer, Hello, answer::Kind};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

/// How often a connecting thread looks whether it was told to stop.
const WATCH: Duration = Duration::from_millis(50);

/// The devices of an epoch on their way to each other.
pub(super) struct Meeting<'a> {
    listener: &'a Listener,
    roster: &'a Roster,
    options: &'a ConnectOptions,
    /// Of this process's devices, in the roster's order, with the descriptors for peers.
    pub bells: Vec<(Arc<Bell>, OwnedFd)>,
}

impl<'a> Meeting<'a> {
    pub fn new(
        listener: &'a Listener,
        roster: &'a Roster,
        options: &'a ConnectOptions,
    ) -> Result<Meeting<'a>, ConnectError> {
        let bell = |_| Bell::create().map(|(bell, fd)| (Arc::new(bell), fd));
        let bells = roster.mine.iter().map(bell).collect::<io::Result<_>>();
        let bells = bells.map_err(system("there is no shared memory for a bell"))?;
        Ok(Meeting { listener, roster, options, bells })
    }

    /// Which link a pair of devices gets: whether it is a ring.
    fn by_ring(&self, me: usize, peer: usize) -> Result<bool, ConnectError> {
        let same = self.roster.devices[me].host == self.roster.devices[peer].host;
        match self.options.choice {
            TransportChoice::Auto => Ok(same),
            TransportChoice::Ring if same => Ok(true),
            TransportChoice::Ring => Err(ConnectError::NoRing { me, peer }),
            TransportChoice::Grpc => Ok(false),
        }
    }

    /// Dials, answers, and waits until every pair has its link: by device of this process, by peer.
    pub fn hold(
        &self,
        events: &mpsc::Sender<Event>,
        happened: &mpsc::Receiver<Event>,
        doom: &Doom,
    ) -> Result<Vec<Vec<Option<Box<dyn Link>>>>, ConnectError> {
        let roster = self.roster;
        let begun = Instant::now();
        let deadline = begun + self.options.timeout;
        let empty = || roster.devices.iter().map(|_| None).collect();
        let mut links: Vec<Vec<Option<Box<dyn Link>>>> = roster.mine.iter().map(|_| empty()).collect();
        // What is known about peers that are not there yet.
        let mut missing: HashMap<(usize, usize), String> = HashMap::new();
        for (mine, &me) in roster.mine.iter().enumerate() {
            for peer in (0..roster.devices.len()).filter(|p| *p != me) {
                let ring = self.by_ring(me, peer)?;
                let sibling = roster.mine.iter().position(|m| *m == peer);
                match sibling {
                    // Devices of one process need not dial.
                    Some(other) if ring => {
                        if me > peer {
                            let (a, b) = self.pair((mine, me), (other, peer))?;
                            links[mine][peer] = Some(a);
                            links[other][me] = Some(b);
                        }
                    }
                    _ => {
                        let detail = if me > peer { "it was called" } else { "it has not called" };
                        missing.insert((me, peer), detail.into());
                        if me > peer {
                            self.dial(mine, me, peer, ring, events.clone(), deadline);
                        }
                    }
                }
            }
        }
        self.claim(&mut links, &mut missing);
        while !missing.is_empty() {
            if let Some(reason) = doom.reason() {
                return Err(ConnectError::Doomed { reason: reason.into() });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match happened.recv_timeout(left.min(WATCH)) {
                Ok(Event::Arrived) => self.claim(&mut links, &mut missing),
                Ok(Event::Note { me, peer, detail }) => {
                    missing.entry((me, peer)).and_modify(|d| *d = detail);
                }
                Ok(Event::Dialled { me, peer, link }) => {
                    let address = self.roster.devices[peer].grpc.clone();
                    let link = link.map_err(|reason| ConnectError::Refused { me, peer, address, reason })?;
                    if let Some(mine) = self.index(me)
                        && missing.remove(&(me, peer)).is_some()
                    {
                        links[mine][peer] = Some(link);
                    }
                }
                Err(_) if !left.is_zero() => {}
                Err(_) => {
                    let one = |((me, peer), detail)| {
                        let address: &Address = &roster.devices[peer];
                        Missing { me, peer, address: address.grpc.clone(), detail }
                    };
                    let mut missing: Vec<_> = missing.into_iter().map(one).collect();
                    missing.sort_by_key(|m| (m.peer, m.me));
                    return Err(ConnectError::Unanswered { waited: begun.elapsed(), missing });
                }
            }
        }
        Ok(links)
    }

    /// What a device of this process lends from, by its place in the roster.
    fn lent(&self, mine: usize) -> Option<(&Arc<LentMemory>, &OwnedFd)> {
        self.options.arenas.get(mine).and_then(|a| a.lent())
    }

    /// What a device of this process shows to a peer that it calls.
    fn own(&self, mine: usize) -> io::Result<Own> {
        let lent = self.lent(mine).map(|(memory, fd)| fd.try_clone().map(|fd| (memory.clone(), fd)));
        Ok(Own { bell: self.bells[mine].1.try_clone()?, arena: lent.transpose()? })
    }

    fn index(&self, device: usize) -> Option<usize> {
        self.roster.mine.iter().position(|m| *m == device)
    }

    /// The links between two devices of this process; the first one dials, as it were.
    fn pair(
        &self,
        (a, me): (usize, usize),
        (b, peer): (usize, usize),
    ) -> Result<(Box<dyn Link>, Box<dyn Link>), ConnectError> {
        let memory = RingMemory::create(self.options.ring_bytes);
        let (memory, _) = memory.map_err(system("there is no shared memory for a ring"))?;
        let [lent_a, lent_b] = [a, b].map(|i| self.lent(i).map(|l| l.0.clone()));
        let mine = RingLink::new(me, peer, &memory, true, self.bells[b].0.clone(), None);
        let theirs = RingLink::new(peer, me, &memory, false, self.bells[a].0.clone(), None);
        Ok((Box::new(mine.lending(lent_a.clone(), lent_b.clone())), Box::new(theirs.lending(lent_b, lent_a))))
    }

    /// Has a task call a peer.
    fn dial(&self, mine: usize, me: usize, peer: usize, ring: bool, events: mpsc::Sender<Event>, deadline: Instant) {
        let (roster, version) = (self.roster.clone(), self.listener.options.version.clone());
        let address = self.roster.devices[peer].clone();
        let left = deadline.saturating_duration_since(Instant::now());
        let bell = self.bells[mine].0.clone();
        let notes = events.clone();
        // Nobody may be waiting any more.
        let note = move |detail| drop(notes.send(Event::Note { me, peer, detail }));
        if ring {
            let own = self.own(mine);
            let capacity = self.options.ring_bytes;
            self.listener.runtime.spawn(tokio::time::timeout(left, async move {
                let hello = roster.hello(&version, me, peer, capacity as u64);
                let check = |answer: &Hello| roster.check_answer(&version, me, peer, answer);
                let link = dial_ring(me, peer, &address.socket, &hello, capacity, own, check, note).await;
                let _ = events.send(Event::Dialled { me, peer, link: link.map(|l| Box::new(l) as Box<dyn Link>) });
            }));
        } else {
            let tls = self.listener.options.tls.clone();
            self.listener.runtime.spawn(tokio::time::timeout(left, async move {
                let hello = roster.hello(&version, me, peer, WINDOW);
                let check = |answer: &Hello| roster.check_answer(&version, me, peer, answer);
                let link = Ends { me, peer, bell }.dial(address.grpc, tls, hello, check, note).await;
                let _ = events.send(Event::Dialled { me, peer, link: link.map(|l| Box::new(l) as Box<dyn Link>) });
            }));
        }
    }

    /// Answers those who have dialled.
    fn claim(&self, links: &mut [Vec<Option<Box<dyn Link>>>], missing: &mut HashMap<(usize, usize), String>) {
        let arrivals = self.listener.lobby.open().claim(self.roster);
        for arrival in arrivals {
            let (me, peer) = (arrival.hello.to as usize, arrival.hello.from as usize);
            let Some(mine) = self.index(me) else {
                arrival.refuse(&format!("device {me} is not here"));
                continue;
            };
            if peer <= me || !missing.contains_key(&(me, peer)) {
                arrival.refuse(&format!("device {me} does not expect a call of device {peer}"));
                continue;
            }
            match self.answer(mine, me, peer, arrival) {
                Ok(link) => {
                    missing.remove(&(me, peer));
                    links[mine][peer] = Some(link);
                }
                Err(e) => {
                    missing.insert((me, peer), format!("it called, but {e}"));
                }
            }
        }
    }

    fn answer(&self, mine: usize, me: usize, peer: usize, arrival: Arrival) -> io::Result<Box<dyn Link>> {
        let Arrival { hello, caller } = arrival;
        let (roster, version) = (self.roster, &self.listener.options.version);
        let (bell, descriptor) = &self.bells[mine];
        match caller {
            Caller::Ring { socket, memory, bell: their_bell, arena } => {
                let capacity = usize::try_from(hello.window).map_err(io::Error::other)?;
                let memory = RingMemory::open(&memory, capacity)?;
                let their_bell = Arc::new(Bell::open(&their_bell)?);
                let theirs = arena.map(|fd| LentMemory::open(&fd)).transpose()?.map(Arc::new);
                let lent = self.lent(mine);
                let answer = Answer { kind: Some(Kind::Hello(roster.hello(version, me, peer, hello.window))) };
                let descriptors: Vec<_> = std::iter::once(descriptor).chain(lent.map(|l| l.1)).collect();
                socket::send(&socket, &answer.encode_to_vec(), &descriptors)?;
                let socket = Some(socket.into_std()?);
                let link = RingLink::new(me, peer, &memory, false, their_bell, socket);
                Ok(Box::new(link.lending(lent.map(|l| l.0.clone()), theirs)))
            }
            Caller::Grpc { frames, answer } => {
                let ends = Ends { me, peer, bell: bell.clone() };
                let (link, answers) = ends.accept(roster.hello(version, me, peer, WINDOW), hello.window, frames);
                answer.send(Ok(answers)).map_err(|_| io::Error::other("it hung up"))?;
                Ok(Box::new(link))
            }
        }
    }
}

/// What a device of this process shows to a peer on this host.
struct Own {
    bell: OwnedFd,
    arena: Option<(Arc<LentMemory>, OwnedFd)>,
}

/// Calls a peer on this host until it answers or refuses.
async fn dial_ring(
    me: usize,
    peer: usize,
    name: &str,
    hello: &Hello,
    capacity: usize,
    own: io::Result<Own>,
    check: impl Fn(&Hello) -> Result<(), String>,
    note: impl Fn(String),
) -> Result<RingLink, String> {
    let said = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let own = own.map_err(said("no descriptor is left"))?;
    loop {
        // Fresh for every call: a peer may have written to that of the last.
        let (memory, descriptor) = RingMemory::create(capacity).map_err(said("no shared memory for a ring"))?;
        match call_ring(name, hello, &descriptor, &own).await {
            Ok((Some(Kind::Hello(answer)), descriptors, socket)) => {
                check(&answer)?;
                let mut descriptors = descriptors.into_iter();
                let bell = descriptors.next().ok_or("it has sent no bell")?;
                let bell = Bell::open(&bell).map_err(said("its bell cannot be rung"))?;
                let theirs = descriptors.next().map(|fd| LentMemory::open(&fd)).transpose();
                let theirs = theirs.map_err(said("its memory cannot be mapped"))?.map(Arc::new);
                let socket = Some(socket.into_std().map_err(said("its socket"))?);
                let link = RingLink::new(me, peer, &memory, true, Arc::new(bell), socket);
                return Ok(link.lending(own.arena.map(|a| a.0), theirs));
            }
            Ok((Some(Kind::Refusal(reason)), ..)) => return Err(reason),
            Ok(_) => note("it answered with something else".into()),
            Err(e) => note(e.to_string()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Calls once.
async fn call_ring(
    name: &str,
    hello: &Hello,
    memory: &OwnedFd,
    own: &Own,
) -> io::Result<(Option<Kind>, Vec<OwnedFd>, UnixStream)> {
    let socket = std_unix::UnixStream::connect_addr(&std_unix::SocketAddr::from_abstract_name(name)?)?;
    socket.set_nonblocking(true)?;
    let socket = UnixStream::from_std(socket)?;
    if !socket::same_user(&socket)? {
        return Err(io::Error::other("another user listens there"));
    }
    let descriptors: Vec<_> = [memory, &own.bell].into_iter().chain(own.arena.as_ref().map(|a| &a.1)).collect();
    socket::send(&socket, &hello.encode_to_vec(), &descriptors)?;
    let (bytes, descriptors) = socket::receive(&socket).await?;
    let answer = Answer::decode(&bytes[..]).map_err(io::Error::other)?;
    Ok((answer.kind, descriptors, socket))
}
