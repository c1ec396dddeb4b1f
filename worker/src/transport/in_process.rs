//! Devices of one process: receivers copy straight out of the senders' memory. What is small waits in the receiver's inbox
//! instead, so that who sends it need not wait for who takes it.

use super::{Batch, Transport, TransportError};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What has no more bytes is copied into the inbox: where many sums of scalars are under way, none waits for another.
pub const SMALL: usize = 256;

/// A posted message.
struct Posted {
    /// None: its bytes lie in the inbox.
    from: Option<*const u8>,
    bytes: usize,
    /// The sender's batch.
    batch: Batch,
}

/// Messages of one sender.
struct Queue {
    posted: VecDeque<Posted>,
    /// The bytes of those that are small.
    small: VecDeque<u8>,
}

/// What others leave with a device.
struct Inbox {
    /// Messages by sender.
    messages: Vec<Queue>,
    /// By batch: this device's own sends that are still to be taken.
    outstanding: Vec<usize>,
    aborted: Option<TransportError>,
}

// SAFETY: the pointers are read by the receiver only, until it says that it is done, for which the sender's `finish` waits.
unsafe impl Send for Inbox {}

struct Door {
    inbox: Mutex<Inbox>,
    bell: Condvar,
}

impl Door {
    fn open(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the bell, and adds the time that this takes.
    fn wait<'a>(&self, inbox: MutexGuard<'a, Inbox>, waited_ns: &mut u64) -> MutexGuard<'a, Inbox> {
        let begun = Instant::now();
        let inbox = self.bell.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        *waited_ns += begun.elapsed().as_nanos() as u64;
        inbox
    }
}

/// Transport between devices of one process: receivers copy straight out of the senders' memory.
///
/// After an error a peer may still read what was sent to it: the memory stays until every device has stopped.
pub struct InProcess {
    me: usize,
    doors: Arc<[Door]>,
    /// By sender, in the order of posting.
    receives: Vec<VecDeque<Receive>>,
    /// Of all of them.
    missing: usize,
    batches: Vec<Received>,
    waited_ns: u64,
}

/// What is received in a batch.
#[derive(Default)]
struct Received {
    /// Receives that are not done, and of these what is borrowed.
    missing: usize,
    awaited: usize,
    /// What is borrowed: where it lies, as far as it is there.
    borrowed: Vec<*const u8>,
    /// Who lent what is there, in which of its batches.
    lenders: Vec<(usize, Batch)>,
}

/// A posted receive.
struct Receive {
    batch: Batch,
    bytes: usize,
    to: *mut u8,
    /// If it may stay where it is: its place in the list of what is borrowed.
    borrow: Option<usize>,
}

// SAFETY: the pointers are used between posting and `finish` only, by the thread that posted them.
unsafe impl Send for InProcess {}

impl InProcess {
    /// The ends of `devices` devices, a pair of which has so many messages, and so many bytes of those that are small, on
    /// their way at a time without growing a queue.
    pub fn mesh(devices: usize, messages: usize, small: usize) -> Vec<InProcess> {
        let queue = |_| Queue { posted: VecDeque::with_capacity(messages), small: VecDeque::with_capacity(small) };
        let door = |_| Door {
            inbox: Mutex::new(Inbox {
                messages: (0..devices).map(queue).collect(),
                outstanding: vec![],
                aborted: None,
            }),
            bell: Condvar::new(),
        };
        let doors: Arc<[Door]> = (0..devices).map(door).collect();
        (0..devices)
            .map(|me| InProcess {
                me,
                doors: doors.clone(),
                receives: (0..devices).map(|_| VecDeque::with_capacity(messages)).collect(),
                missing: 0,
                batches: vec![],
                waited_ns: 0,
            })
            .collect()
    }

    /// Makes room for a batch in which so many messages are borrowed.
    pub fn reserve(&mut self, batch: Batch, borrows: usize) {
        self.doors[self.me].count(batch, 0);
        let received = self.batch(batch);
        received.borrowed.reserve(borrows);
        received.lenders.reserve(borrows);
    }

    /// What is received in a batch, which is new if need be.
    fn batch(&mut self, batch: Batch) -> &mut Received {
        if self.batches.len() <= batch {
            self.batches.resize_with(batch + 1, Received::default);
        }
        &mut self.batches[batch]
    }

    /// Takes in what has come until `done`; if nothing has, waits or not. Whatever it is that is waited for, all that comes
    /// is taken.
    fn take_in(&mut self, waits: bool, done: impl Fn(&Inbox, &[Received]) -> bool) -> Result<(), TransportError> {
        let doors = self.doors.clone();
        let door = &doors[self.me];
        let mut inbox = door.open();
        while !done(&inbox, &self.batches) {
            InProcess::check(&inbox)?;
            // Messages of a pair stay in order: only its first receive may take one.
            let ready =
                |(receives, queue): (&VecDeque<Receive>, &Queue)| !receives.is_empty() && !queue.posted.is_empty();
            match self.receives.iter().zip(&inbox.messages).position(ready) {
                Some(peer) => {
                    self.take(peer, inbox)?;
                    inbox = door.open();
                }
                None if waits => inbox = door.wait(inbox, &mut self.waited_ns),
                None => break,
            }
        }
        Ok(())
    }

    /// Takes the next message of a peer.
    fn take(&mut self, peer: usize, mut inbox: MutexGuard<Inbox>) -> Result<(), TransportError> {
        let queue = &mut inbox.messages[peer];
        let (Some(posted), Some(receive)) = (queue.posted.pop_front(), self.receives[peer].pop_front()) else {
            return Ok(());
        };
        let Receive { batch, bytes: expected, to, borrow } = receive;
        if posted.bytes != expected {
            return Err(TransportError::Disagreement { me: self.me, peer, expected, sent: posted.bytes });
        }
        let received = &mut self.batches[batch];
        let lent = match (posted.from, borrow) {
            (None, _) => {
                let mut to = to;
                for piece in [queue.small.as_slices().0, queue.small.as_slices().1] {
                    let n = piece.len().min(expected - (to.addr() - receive.to.addr()));
                    // SAFETY: no more than is left of the receiver's memory.
                    unsafe {
                        std::ptr::copy_nonoverlapping(piece.as_ptr(), to, n);
                        to = to.add(n);
                    }
                }
                queue.small.drain(..expected);
                drop(inbox);
                receive.to.cast_const()
            }
            (Some(from), None) => {
                drop(inbox);
                // SAFETY: the sender keeps its bytes until we say that they are taken, the receiver's are ours.
                unsafe { std::ptr::copy_nonoverlapping(from, to, expected) };
                self.doors[peer].taken(posted.batch);
                from
            }
            (Some(from), Some(_)) => {
                drop(inbox);
                received.lenders.push((peer, posted.batch));
                from
            }
        };
        if let Some(place) = borrow {
            received.borrowed[place] = lent;
            received.awaited -= 1;
        }
        received.missing -= 1;
        self.missing -= 1;
        Ok(())
    }

    fn check(inbox: &Inbox) -> Result<(), TransportError> {
        inbox.aborted.clone().map_or(Ok(()), Err)
    }

    fn post(&mut self, from: usize, receive: Receive) {
        self.batch(receive.batch).missing += 1;
        self.missing += 1;
        self.receives[from].push_back(receive);
    }
}

impl Door {
    /// Counts so many more sends of a batch, which is new if need be.
    fn count(&self, batch: Batch, more: usize) {
        let outstanding = &mut self.open().outstanding;
        let batches = outstanding.len().max(batch + 1);
        outstanding.resize(batches, 0);
        outstanding[batch] += more;
    }

    /// Tells a sender that one of its messages is not looked at any more.
    fn taken(&self, batch: Batch) {
        let outstanding = &mut self.open().outstanding[batch];
        *outstanding -= 1;
        if *outstanding == 0 {
            self.bell.notify_one();
        }
    }
}

impl Transport for InProcess {
    unsafe fn send(&mut self, batch: Batch, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError> {
        let small = bytes <= SMALL;
        if !small {
            self.doors[self.me].count(batch, 1);
        }
        let door = &self.doors[to];
        let mut inbox = door.open();
        InProcess::check(&inbox)?;
        let queue = &mut inbox.messages[self.me];
        if small {
            // SAFETY: by this function's contract.
            queue.small.extend(unsafe { std::slice::from_raw_parts(from, bytes) });
        }
        queue.posted.push_back(Posted { from: (!small).then_some(from), bytes, batch });
        drop(inbox);
        door.bell.notify_one();
        Ok(())
    }

    unsafe fn recv(&mut self, batch: Batch, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError> {
        self.post(from, Receive { batch, bytes, to, borrow: None });
        Ok(())
    }

    unsafe fn borrow(
        &mut self,
        batch: Batch,
        from: usize,
        scratch: *mut u8,
        bytes: usize,
    ) -> Result<(), TransportError> {
        let received = self.batch(batch);
        let place = received.borrowed.len();
        received.borrowed.push(std::ptr::null());
        received.awaited += 1;
        self.post(from, Receive { batch, bytes, to: scratch, borrow: Some(place) });
        Ok(())
    }

    fn borrowed(&mut self, batch: Batch) -> Result<&[*const u8], TransportError> {
        self.batch(batch);
        self.take_in(true, |_, batches| batches[batch].awaited == 0)?;
        Ok(&self.batches[batch].borrowed)
    }

    fn finish(&mut self, batch: Batch) -> Result<(), TransportError> {
        self.batch(batch);
        self.take_in(true, |_, batches| batches[batch].missing == 0)?;
        let received = &mut self.batches[batch];
        received.borrowed.clear();
        while let Some((peer, batch)) = received.lenders.pop() {
            self.doors[peer].taken(batch);
        }
        self.take_in(true, |inbox, _| inbox.outstanding.get(batch).is_none_or(|n| *n == 0))
    }

    fn progress(&mut self) -> Result<(), TransportError> {
        if self.missing == 0 { Ok(()) } else { self.take_in(false, |_, _| false) }
    }

    fn waited_ns(&self) -> u64 {
        self.waited_ns
    }

    fn abort(&mut self, reason: &str) {
        let error = TransportError::Aborted { device: self.me, reason: reason.into() };
        for door in self.doors.iter() {
            door.open().aborted.get_or_insert_with(|| error.clone());
            door.bell.notify_all();
        }
    }
}
