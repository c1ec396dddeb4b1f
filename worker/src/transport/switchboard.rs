//! One device's end of the data plane between processes: a link to every peer.
//!
//! Every message is preceded by an [`Envelope`], and the receiver knows what must stand in it. [`Transport::finish`]
//! goes round the links and moves on each what can be moved now, so that no order of messages between peers can block
//! another; when nothing moves on any of them, it sleeps on the device's bell.

use super::bell::{Bell, Doom};
use super::link::{Envelope, Link, PIECE};
use super::{Transport, TransportError};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a device sleeps at most before it looks whether its peers are still there.
const WATCH: Duration = Duration::from_millis(50);
/// How long a device that is done waits for its last bytes to arrive.
const FAREWELL: Duration = Duration::from_secs(2);
/// Messages that a pair of devices posts at a time without growing a queue.
const QUEUE: usize = 64;
/// Bytes that move in one direction of a link before it is another's turn.
const TURN: usize = 4 * PIECE;

/// One device's end, over one link a peer.
///
/// Once a call has failed or [`Transport::abort`] has returned, no posted memory is looked at any more, and all that
/// comes later fails as well: a new epoch gets a new switchboard.
pub struct Switchboard {
    me: usize,
    bell: Arc<Bell>,
    doom: Doom,
    spin: Duration,
    /// By device; None for this one.
    ports: Vec<Option<Port>>,
    /// Why nothing can be moved any more.
    broken: Option<TransportError>,
}

/// `device 0: ring to 1, 2; gRPC to 3`.
impl fmt::Display for Switchboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for port in self.ports.iter().flatten() {
            kinds.entry(port.link.kind()).or_default().push(port.peer.to_string());
        }
        let kinds: Vec<String> = kinds.iter().map(|(k, peers)| format!("{k} to {}", peers.join(", "))).collect();
        write!(f, "device {}: {}", self.me, if kinds.is_empty() { "no peers".into() } else { kinds.join("; ") })
    }
}

/// A link and what is posted on it.
struct Port {
    me: usize,
    peer: usize,
    epoch: u64,
    link: Box<dyn Link>,
    out: Lane<*const u8>,
    into: Lane<*mut u8>,
}

/// Messages in one direction.
struct Lane<P> {
    /// Where each message's bytes lie, and how many they are.
    posted: VecDeque<(P, usize)>,
    /// Messages that have passed.
    sequence: u64,
    /// The envelope of the first posted message, as far as it has passed.
    envelope: [u8; Envelope::BYTES],
    /// Bytes of the first posted message that have passed, its envelope's first.
    passed: usize,
}

// SAFETY: the pointers are used by the thread that posted them only, between posting and `finish`.
unsafe impl<P> Send for Lane<P> {}

impl<P> Lane<P> {
    fn new() -> Lane<P> {
        Lane { posted: VecDeque::with_capacity(QUEUE), sequence: 0, envelope: [0; Envelope::BYTES], passed: 0 }
    }

    /// Counts `n` bytes more of the first message, which has `bytes` bytes; goes on to the next after its last.
    fn pass(&mut self, n: usize, bytes: usize) {
        self.passed += n;
        if self.passed == Envelope::BYTES + bytes {
            self.posted.pop_front();
            self.sequence += 1;
            self.passed = 0;
        }
    }
}

impl Port {
    fn done(&self) -> bool {
        self.out.posted.is_empty() && self.into.posted.is_empty() && self.link.settled()
    }

    /// Writes what there is room for, up to a turn's bytes; whether anything moved.
    fn write(&mut self) -> Result<bool, TransportError> {
        let (lane, mut moved) = (&mut self.out, 0);
        while let Some(&(from, bytes)) = lane.posted.front() {
            if lane.passed == 0 {
                let envelope = Envelope { epoch: self.epoch, sequence: lane.sequence, length: bytes as u64 };
                lane.envelope = envelope.encode();
            }
            // SAFETY: the rest of the envelope, which lies in the port and is copied by the link, or of the message,
            // which stays readable by the contract of `Transport::send`.
            let n = unsafe {
                match lane.passed.checked_sub(Envelope::BYTES) {
                    None => self.link.write(lane.envelope[lane.passed..].as_ptr(), Envelope::BYTES - lane.passed)?,
                    Some(at) => self.link.write(from.add(at), bytes - at)?,
                }
            };
            moved += n;
            lane.pass(n, bytes);
            if n == 0 || moved >= TURN {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Reads what is there, up to a turn's bytes; whether anything moved.
    fn read(&mut self) -> Result<bool, TransportError> {
        let (lane, mut moved) = (&mut self.into, 0);
        while let Some(&(to, bytes)) = lane.posted.front() {
            // SAFETY: never more than is left of the envelope, or of the message's own memory, which stays writable by
            // the contract of `Transport::recv`.
            let n = unsafe {
                match lane.passed.checked_sub(Envelope::BYTES) {
                    None => {
                        let left = &mut lane.envelope[lane.passed..];
                        self.link.read(left.as_mut_ptr(), left.len())?
                    }
                    Some(at) => self.link.read(to.add(at), bytes - at)?,
                }
            };
            moved += n;
            if lane.passed < Envelope::BYTES && lane.passed + n == Envelope::BYTES {
                let expected = Envelope { epoch: self.epoch, sequence: lane.sequence, length: bytes as u64 };
                check(self.me, self.peer, expected, Envelope::decode(&lane.envelope))?;
            }
            lane.pass(n, bytes);
            if n == 0 || moved >= TURN {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Moves what can be moved now; whether that was anything.
    fn progress(&mut self) -> Result<bool, TransportError> {
        let written = self.write()?;
        let read = self.read()?;
        if written || read {
            self.link.flush();
        }
        Ok(written || read)
    }
}

/// Checks that the envelope that came is the one that must come.
fn check(me: usize, peer: usize, expected: Envelope, sent: Envelope) -> Result<(), TransportError> {
    if sent.epoch != expected.epoch {
        return Err(TransportError::StaleEpoch { me, peer, expected: expected.epoch, sent: sent.epoch });
    }
    if sent.sequence != expected.sequence {
        return Err(TransportError::OutOfOrder { me, peer, expected: expected.sequence, sent: sent.sequence });
    }
    if sent.length != expected.length {
        let (expected, sent) = (expected.length as usize, sent.length as usize);
        return Err(TransportError::Disagreement { me, peer, expected, sent });
    }
    Ok(())
}

impl Switchboard {
    /// Device `me`'s end in an epoch. `links` are by device, with None in this one's place; they ring `bell`. `spin` is
    /// how long to look again before sleeping: zero where devices share cores.
    pub fn new(
        me: usize,
        epoch: u64,
        links: Vec<Option<Box<dyn Link>>>,
        bell: Arc<Bell>,
        doom: Doom,
        spin: Duration,
    ) -> Switchboard {
        doom.attach(&bell);
        let port = |(peer, link): (usize, Option<Box<dyn Link>>)| {
            link.map(|link| Port { me, peer, epoch, link, out: Lane::new(), into: Lane::new() })
        };
        let ports = links.into_iter().enumerate().map(port).collect();
        Switchboard { me, bell, doom, spin, ports, broken: None }
    }

    /// The device.
    pub fn device(&self) -> usize {
        self.me
    }

    fn port(&mut self, peer: usize) -> Result<&mut Port, TransportError> {
        let me = self.me;
        self.ports.get_mut(peer).and_then(Option::as_mut).ok_or(TransportError::Unconnected { me, peer })
    }

    /// Whether nobody has given up and nobody said to stop.
    fn healthy(&self) -> Result<(), TransportError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        if let Some(reason) = self.doom.reason() {
            return Err(TransportError::Doomed { me: self.me, reason: reason.into() });
        }
        for port in self.ports.iter().flatten() {
            if let Some((device, reason)) = port.link.aborted() {
                return Err(TransportError::Aborted { device, reason });
            }
        }
        Ok(())
    }

    /// Forgets everything that was posted: after this, no link looks at anybody's memory.
    fn clear(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            port.link.release();
            port.out.posted.clear();
            port.into.posted.clear();
        }
    }

    /// Keeps an error, so that what comes later fails with it too.
    fn kept<T>(&mut self, result: Result<T, TransportError>) -> Result<T, TransportError> {
        if let Err(e) = &result {
            self.broken.get_or_insert_with(|| e.clone());
            self.clear();
        }
        result
    }

    fn move_all(&mut self) -> Result<(), TransportError> {
        self.healthy()?;
        let mut watched: Option<Instant> = None;
        loop {
            let seen = self.bell.rings();
            let (mut moved, mut done) = (false, true);
            for port in self.ports.iter_mut().flatten().filter(|p| !p.done()) {
                moved |= port.progress()?;
                done &= port.done();
            }
            if done {
                return Ok(());
            }
            if moved {
                continue;
            }
            self.healthy()?;
            let now = Instant::now();
            if watched.is_some_and(|t| now - t >= WATCH) {
                self.watch()?;
                watched = None;
            }
            watched.get_or_insert(now);
            self.bell.wait(seen, self.spin, WATCH);
        }
    }

    /// Looks whether those that we wait for are still there.
    fn watch(&mut self) -> Result<(), TransportError> {
        let me = self.me;
        for port in self.ports.iter_mut().flatten().filter(|p| !p.done()) {
            // What it had sent before it went still counts.
            if let Some(detail) = port.link.lost()
                && !port.progress()?
            {
                return Err(TransportError::Lost { me, peer: port.peer, detail });
            }
        }
        Ok(())
    }
}

impl Transport for Switchboard {
    unsafe fn send(&mut self, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError> {
        let sent = self.broken.clone().map_or(Ok(()), Err).and_then(|()| self.port(to)).and_then(|port| {
            port.out.posted.push_back((from, bytes));
            // On its way at once, so that it travels while the device prepares the next.
            if port.write()? {
                port.link.flush();
            }
            Ok(())
        });
        self.kept(sent)
    }

    unsafe fn recv(&mut self, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError> {
        let posted = self.port(from).map(|port| port.into.posted.push_back((to, bytes)));
        self.kept(posted)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        let moved = self.move_all();
        self.kept(moved)
    }

    fn abort(&mut self, reason: &str) {
        // Who was told by another passes on what it was told.
        let (device, reason) = match &self.broken {
            Some(TransportError::Aborted { device, reason }) => (*device, reason.clone()),
            _ => (self.me, reason.to_string()),
        };
        for port in self.ports.iter_mut().flatten() {
            port.link.abort(device, &reason);
        }
        self.broken.get_or_insert(TransportError::Aborted { device, reason });
        self.clear();
    }
}

impl Drop for Switchboard {
    fn drop(&mut self) {
        self.clear();
        // The process may end next: what `finish` reported as sent must not end with it.
        let begun = Instant::now();
        while self.broken.is_none() && begun.elapsed() < FAREWELL {
            let seen = self.bell.rings();
            let open = self.ports.iter_mut().flatten().map(|p| !p.link.close()).filter(|open| *open).count();
            if open == 0 {
                break;
            }
            self.bell.wait(seen, Duration::ZERO, WATCH);
        }
    }
}
