//! One device's end of the data plane between processes: a link to every peer.
//!
//! Every message is preceded by an [`Envelope`], and the receiver knows what must stand in it. [`Transport::finish`]
//! goes round the links and moves on each what can be moved now, of any batch, so that no order of messages between peers can
//! block another; when nothing moves on any of them, it sleeps on the device's bell. A link may lend a message instead of
//! carrying it: then only its envelope is on the way, the receiver reads the bytes where they lie, and the message is
//! done when the receiver has given it back.

use super::bell::{Bell, Doom};
use super::link::{Envelope, Link, PIECE};
use super::{Batch, Transport, TransportError};
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
/// comes later fails as well: a new epoch gets a new switchboard. Only a peer to whom bytes of this device's arena are
/// lent may still read them. The arena stays for it, and as it is: after a failure no more steps run on the device.
pub struct Switchboard {
    me: usize,
    bell: Arc<Bell>,
    doom: Doom,
    spin: Duration,
    /// By device; None for this one.
    ports: Vec<Option<Port>>,
    batches: Vec<Open>,
    /// Why nothing can be moved any more.
    broken: Option<TransportError>,
    waited_ns: u64,
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
    into: Lane<Destination>,
    /// Messages that are out and still looked at: their numbers on the link, and their batches.
    unsettled: Vec<(u64, Batch)>,
    /// Loans that have come.
    loans: u64,
}

/// Where a message goes.
#[derive(Clone, Copy)]
struct Destination {
    to: *mut u8,
    /// The message need not go there if it can be read elsewhere: its place in the list of what is borrowed.
    borrow: Option<usize>,
}

/// A batch under way.
#[derive(Default)]
struct Open {
    /// Messages of it that are not done, and of these what is to be borrowed and not there yet.
    missing: usize,
    awaited: usize,
    /// Where what is borrowed lies, once it is there.
    borrowed: Vec<*const u8>,
    /// What is to be given back: peers and their loans.
    held: Vec<(usize, u64)>,
}
// SAFETY: as for `Lane`.
unsafe impl Send for Open {}

/// Messages in one direction.
struct Lane<P> {
    /// Where each message's bytes lie, how many they are, and their batch.
    posted: VecDeque<(P, usize, Batch)>,
    /// Messages that have passed.
    sequence: u64,
    /// The envelope of the first posted message, as far as it has passed.
    envelope: [u8; Envelope::BYTES],
    /// Bytes of the first posted message that have passed, its envelope's first.
    passed: usize,
    /// Where the first posted message lies if it is lent; None if the link carries it.
    lent: Option<*const u8>,
}

// SAFETY: the pointers are used by the thread that posted them only, between posting and `finish`.
unsafe impl<P> Send for Lane<P> {}

impl<P> Lane<P> {
    fn new() -> Lane<P> {
        let posted = VecDeque::with_capacity(QUEUE);
        Lane { posted, sequence: 0, envelope: [0; Envelope::BYTES], passed: 0, lent: None }
    }

    /// Goes on to the next message.
    fn next(&mut self) {
        self.posted.pop_front();
        self.sequence += 1;
        self.passed = 0;
        self.lent = None;
    }
}

impl Port {
    /// Whether nothing is left to be moved or waited for.
    fn idle(&self) -> bool {
        self.out.posted.is_empty() && self.into.posted.is_empty() && self.unsettled.is_empty()
    }

    /// Writes what there is room for, up to a turn's bytes; whether anything moved.
    fn write(&mut self, batches: &mut [Open]) -> Result<bool, TransportError> {
        let (lane, mut moved) = (&mut self.out, 0);
        while let Some(&(from, bytes, batch)) = lane.posted.front() {
            if lane.passed == 0 && lane.lent.is_none() {
                // SAFETY: the bytes stay readable by the contract of `Transport::send`.
                let lent = unsafe { self.link.lend(from, bytes)? };
                lane.lent = lent.map(|_| from);
                let (epoch, sequence, length) = (self.epoch, lane.sequence, bytes as u64);
                lane.envelope = Envelope { epoch, sequence, length, lent }.encode();
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
            lane.passed += n;
            let carried = if lane.lent.is_some() { 0 } else { bytes };
            if lane.passed == Envelope::BYTES + carried {
                lane.next();
                match self.link.end() {
                    Some(message) => self.unsettled.push((message, batch)),
                    None => batches[batch].missing -= 1,
                }
            }
            if n == 0 || moved >= TURN {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Reads what is there, up to a turn's bytes; whether anything moved.
    fn read(&mut self, batches: &mut [Open]) -> Result<bool, TransportError> {
        let (lane, mut moved) = (&mut self.into, 0);
        while let Some(&(Destination { to, borrow }, bytes, batch)) = lane.posted.front() {
            // SAFETY: never more than is left of the envelope, or of the message's own memory, which stays writable by
            // the contract of `Transport::recv`.
            let n = unsafe {
                match (lane.passed.checked_sub(Envelope::BYTES), lane.lent) {
                    (None, _) => {
                        let left = &mut lane.envelope[lane.passed..];
                        self.link.read(left.as_mut_ptr(), left.len())?
                    }
                    (Some(at), None) => self.link.read(to.add(at), bytes - at)?,
                    (Some(at), Some(_)) if borrow.is_some() => bytes - at,
                    (Some(at), Some(from)) => {
                        let n = (bytes - at).min(TURN);
                        std::ptr::copy_nonoverlapping(from.add(at), to.add(at), n);
                        n
                    }
                }
            };
            moved += n;
            if lane.passed < Envelope::BYTES && lane.passed + n == Envelope::BYTES {
                let sent = Envelope::decode(&lane.envelope);
                let (epoch, sequence, length, lent) = (self.epoch, lane.sequence, bytes as u64, sent.lent);
                check(self.me, self.peer, Envelope { epoch, sequence, length, lent }, sent)?;
                if let Some(place) = lent {
                    let what = || format!("it lends {bytes} bytes at {place}, which it does not share");
                    let nowhere = || TransportError::Corrupt { me: self.me, peer: self.peer, what: what() };
                    lane.lent = Some(self.link.borrow(place, bytes).ok_or_else(nowhere)?);
                }
            }
            lane.passed += n;
            if lane.passed == Envelope::BYTES + bytes {
                let batch = &mut batches[batch];
                match (borrow, lane.lent) {
                    (Some(i), lent) => {
                        batch.borrowed[i] = lent.unwrap_or(to);
                        batch.awaited -= 1;
                        batch.held.extend(lent.map(|_| (self.peer, self.loans)));
                    }
                    (None, Some(_)) => self.link.give_back(self.loans),
                    (None, None) => {}
                }
                self.loans += u64::from(lane.lent.is_some());
                batch.missing -= 1;
                lane.next();
            }
            if n == 0 || moved >= TURN {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Moves what can be moved now, and looks what is settled; whether that was anything.
    fn progress(&mut self, batches: &mut [Open]) -> Result<bool, TransportError> {
        let written = self.write(batches)?;
        let read = self.read(batches)?;
        if written || read {
            self.link.flush();
        }
        let before = self.unsettled.len();
        self.unsettled.retain(|(message, batch)| {
            let settled = self.link.settled(*message);
            batches[*batch].missing -= usize::from(settled);
            !settled
        });
        Ok(written || read || self.unsettled.len() < before)
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
            let (out, into) = (Lane::new(), Lane::new());
            link.map(|link| Port { me, peer, epoch, link, out, into, unsettled: Vec::with_capacity(QUEUE), loans: 0 })
        };
        let ports: Vec<_> = links.into_iter().enumerate().map(port).collect();
        Switchboard { me, bell, doom, spin, ports, batches: vec![], broken: None, waited_ns: 0 }
    }

    /// The device.
    pub fn device(&self) -> usize {
        self.me
    }

    /// The port to a peer, and a batch, which is new if need be, that has one message more.
    fn post(&mut self, peer: usize, batch: Batch) -> Result<(&mut Port, &mut [Open]), TransportError> {
        self.batch(batch).missing += 1;
        let me = self.me;
        let port = self.ports.get_mut(peer).and_then(Option::as_mut).ok_or(TransportError::Unconnected { me, peer })?;
        Ok((port, &mut self.batches))
    }

    fn batch(&mut self, batch: Batch) -> &mut Open {
        if self.batches.len() <= batch {
            self.batches.resize_with(batch + 1, Open::default);
        }
        &mut self.batches[batch]
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
        // Not given back: the lender is to hear that we have failed, not that all is well.
        self.batches.clear();
        for port in self.ports.iter_mut().flatten() {
            port.link.release();
            port.out.posted.clear();
            port.into.posted.clear();
            port.unsettled.clear();
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

    /// Goes round the links until `done`, and waits where nothing moves.
    fn move_all(&mut self, done: impl Fn(&[Open]) -> bool) -> Result<(), TransportError> {
        self.healthy()?;
        let mut watched: Option<Instant> = None;
        loop {
            let seen = self.bell.rings();
            // Also what we do not wait for: a peer may, and what we wait for may depend on it.
            let moved = self.go_round()?;
            if done(&self.batches) {
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
            self.waited_ns += now.elapsed().as_nanos() as u64;
        }
    }

    /// Moves on each link what can be moved now; whether that was anything.
    fn go_round(&mut self) -> Result<bool, TransportError> {
        let mut moved = false;
        for port in self.ports.iter_mut().flatten().filter(|p| !p.idle()) {
            moved |= port.progress(&mut self.batches)?;
        }
        Ok(moved)
    }

    /// Looks whether those that we have to do with are still there.
    fn watch(&mut self) -> Result<(), TransportError> {
        let me = self.me;
        for port in self.ports.iter_mut().flatten().filter(|p| !p.idle()) {
            // What it had sent before it went still counts.
            if let Some(detail) = port.link.lost()
                && !port.progress(&mut self.batches)?
            {
                let lost = TransportError::Lost { me, peer: port.peer, detail };
                // And so does why it went: it may have left word since we last looked.
                self.healthy()?;
                return Err(lost);
            }
        }
        Ok(())
    }
}

impl Transport for Switchboard {
    unsafe fn send(&mut self, batch: Batch, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError> {
        let sent =
            self.broken.clone().map_or(Ok(()), Err).and_then(|()| self.post(to, batch)).and_then(|(port, batches)| {
                port.out.posted.push_back((from, bytes, batch));
                // On its way at once, so that it travels while the device prepares the next.
                if port.write(batches)? {
                    port.link.flush();
                }
                Ok(())
            });
        self.kept(sent)
    }

    unsafe fn recv(&mut self, batch: Batch, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError> {
        let to = Destination { to, borrow: None };
        let posted = self.post(from, batch).map(|(port, _)| port.into.posted.push_back((to, bytes, batch)));
        self.kept(posted)
    }

    unsafe fn borrow(
        &mut self,
        batch: Batch,
        from: usize,
        scratch: *mut u8,
        bytes: usize,
    ) -> Result<(), TransportError> {
        let posted = self.post(from, batch).map(|(port, batches)| {
            let open = &mut batches[batch];
            let to = Destination { to: scratch, borrow: Some(open.borrowed.len()) };
            open.borrowed.push(std::ptr::null());
            open.awaited += 1;
            port.into.posted.push_back((to, bytes, batch));
        });
        self.kept(posted)
    }

    fn borrowed(&mut self, batch: Batch) -> Result<&[*const u8], TransportError> {
        self.batch(batch);
        let moved = self.move_all(|batches| batches[batch].awaited == 0);
        self.kept(moved)?;
        Ok(&self.batches[batch].borrowed)
    }

    fn finish(&mut self, batch: Batch) -> Result<(), TransportError> {
        let mut moved = Ok(());
        if self.batch(batch).awaited > 0 {
            moved = self.move_all(|batches| batches[batch].awaited == 0);
        }
        let moved = moved.and_then(|()| {
            let open = &mut self.batches[batch];
            open.borrowed.clear();
            for (peer, loan) in open.held.drain(..) {
                if let Some(port) = self.ports[peer].as_mut() {
                    port.link.give_back(loan);
                    port.link.flush();
                }
            }
            self.move_all(|batches| batches[batch].missing == 0)
        });
        self.kept(moved)
    }

    fn progress(&mut self) -> Result<(), TransportError> {
        if self.ports.iter().flatten().all(Port::idle) {
            return Ok(());
        }
        let moved = self.healthy().and_then(|()| self.go_round().map(|_| ()));
        self.kept(moved)
    }

    fn waited_ns(&self) -> u64 {
        self.waited_ns
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
        if let Some(TransportError::Aborted { device, reason }) = self.broken.clone() {
            // The word of the device that gave up may reach a peer later than our going does.
            self.ports.iter_mut().flatten().for_each(|port| port.link.abort(device, &reason));
        }
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
