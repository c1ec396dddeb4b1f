//! Devices of one process: receivers copy straight out of the senders' memory.

use super::{Transport, TransportError};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A posted message.
struct Posted {
    from: *const u8,
    bytes: usize,
}

/// What others leave with a device.
struct Inbox {
    /// Messages by sender.
    messages: Vec<VecDeque<Posted>>,
    /// This device's own sends that are still to be taken.
    outstanding: usize,
    aborted: Option<TransportError>,
}

// SAFETY: the pointers are read by the receiver only, while the sender waits in `finish` for it to say that it is done.
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
    receives: Vec<Receive>,
    /// What is borrowed: where it lies, as far as it is there.
    borrowed: Vec<*const u8>,
    /// Who lent what is there.
    lenders: Vec<usize>,
    waited_ns: u64,
}

/// A posted receive.
struct Receive {
    from: usize,
    bytes: usize,
    to: To,
}

enum To {
    Copy(*mut u8),
    /// Stays where it is; its place in the list of what is borrowed.
    Borrow(usize),
}

// SAFETY: the pointers are used between `recv` and `finish` only, by the thread that posted them.
unsafe impl Send for InProcess {}

impl InProcess {
    /// The ends of `devices` devices, a pair of which posts `messages` messages at a time without growing a queue.
    pub fn mesh(devices: usize, messages: usize) -> Vec<InProcess> {
        let door = |_| Door {
            inbox: Mutex::new(Inbox {
                messages: (0..devices).map(|_| VecDeque::with_capacity(messages)).collect(),
                outstanding: 0,
                aborted: None,
            }),
            bell: Condvar::new(),
        };
        let doors: Arc<[Door]> = (0..devices).map(door).collect();
        (0..devices)
            .map(|me| InProcess {
                me,
                doors: doors.clone(),
                receives: Vec::with_capacity(messages * devices),
                borrowed: Vec::with_capacity(messages * devices),
                lenders: Vec::with_capacity(messages * devices),
                waited_ns: 0,
            })
            .collect()
    }

    /// Takes in all that was posted to be received: copies it, or finds where it lies.
    fn receive(&mut self) -> Result<(), TransportError> {
        let door = &self.doors[self.me];
        while !self.receives.is_empty() {
            let mut inbox = door.open();
            let (at, posted) = loop {
                InProcess::check(&inbox)?;
                let ready = self.receives.iter().enumerate().find_map(|(i, r)| {
                    // Messages of a pair stay in order: only its first receive may take one.
                    let first = self.receives[..i].iter().all(|q| q.from != r.from);
                    first.then(|| inbox.messages[r.from].pop_front()).flatten().map(|p| (i, p))
                });
                match ready {
                    Some(found) => break found,
                    None => inbox = door.wait(inbox, &mut self.waited_ns),
                }
            };
            drop(inbox);
            let Receive { from: peer, bytes: expected, to } = self.receives.remove(at);
            if posted.bytes != expected {
                return Err(TransportError::Disagreement { me: self.me, peer, expected, sent: posted.bytes });
            }
            match to {
                To::Copy(to) => {
                    // SAFETY: the sender keeps its bytes until we say that they are taken, the receiver's are ours.
                    unsafe { std::ptr::copy_nonoverlapping(posted.from, to, expected) };
                    self.taken(peer);
                }
                To::Borrow(place) => {
                    self.borrowed[place] = posted.from;
                    self.lenders.push(peer);
                }
            }
        }
        Ok(())
    }

    /// Tells a sender that one of its messages is not looked at any more.
    fn taken(&self, peer: usize) {
        let sender = &self.doors[peer];
        sender.open().outstanding -= 1;
        sender.bell.notify_one();
    }

    fn check(inbox: &Inbox) -> Result<(), TransportError> {
        inbox.aborted.clone().map_or(Ok(()), Err)
    }
}

impl Transport for InProcess {
    unsafe fn send(&mut self, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError> {
        self.doors[self.me].open().outstanding += 1;
        let door = &self.doors[to];
        let mut inbox = door.open();
        InProcess::check(&inbox)?;
        inbox.messages[self.me].push_back(Posted { from, bytes });
        drop(inbox);
        door.bell.notify_one();
        Ok(())
    }

    unsafe fn recv(&mut self, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError> {
        self.receives.push(Receive { from, bytes, to: To::Copy(to) });
        Ok(())
    }

    unsafe fn borrow(&mut self, from: usize, _scratch: *mut u8, bytes: usize) -> Result<(), TransportError> {
        self.receives.push(Receive { from, bytes, to: To::Borrow(self.borrowed.len()) });
        self.borrowed.push(std::ptr::null());
        Ok(())
    }

    fn borrowed(&mut self) -> Result<&[*const u8], TransportError> {
        self.receive()?;
        Ok(&self.borrowed)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.receive()?;
        self.borrowed.clear();
        while let Some(peer) = self.lenders.pop() {
            self.taken(peer);
        }
        let door = &self.doors[self.me];
        let mut inbox = door.open();
        while inbox.outstanding > 0 {
            InProcess::check(&inbox)?;
            inbox = door.wait(inbox, &mut self.waited_ns);
        }
        Ok(())
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
