//! How bytes move between devices.
//!
//! A [`Transport`] is one device's end. Sends and receives are posted and then finished together, so that an
//! implementation may move them in any order and overlap them; between a pair of devices messages arrive in the order
//! in which they were posted, and both sides know every message's length from the plan.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What went wrong between devices.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// A device gave up, and everyone with it.
    #[error("W0001: device {device} stopped the step: {reason}")]
    Aborted {
        /// Who.
        device: usize,
        /// Why.
        reason: String,
    },
    /// Two devices do not agree about a message: they run different plans.
    #[error(
        "W0002: device {me} expects {expected} bytes from device {peer} and was sent {sent}; the devices do not run the same plan"
    )]
    Disagreement {
        /// The receiver.
        me: usize,
        /// The sender.
        peer: usize,
        /// Bytes that the receiver's plan has.
        expected: usize,
        /// Bytes that were sent.
        sent: usize,
    },
}

/// One device's end of the data plane.
pub trait Transport: Send {
    /// Posts the sending of `bytes` bytes to device `to`.
    ///
    /// # Safety
    /// The bytes stay readable and unchanged until [`Transport::finish`] returns.
    unsafe fn send(&mut self, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError>;

    /// Posts the receiving of `bytes` bytes from device `from`.
    ///
    /// # Safety
    /// The bytes stay writable, and nobody else touches them, until [`Transport::finish`] returns.
    unsafe fn recv(&mut self, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError>;

    /// Waits until all that was posted is done.
    fn finish(&mut self) -> Result<(), TransportError>;

    /// Tells everyone that this device cannot go on; whoever waits is woken with [`TransportError::Aborted`].
    fn abort(&mut self, reason: &str);
}

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
}

/// Transport between devices of one process: receivers copy straight out of the senders' memory.
pub struct InProcess {
    me: usize,
    doors: Arc<[Door]>,
    /// Posted receives: sender, where to, bytes.
    receives: Vec<(usize, *mut u8, usize)>,
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
            .map(|me| InProcess { me, doors: doors.clone(), receives: Vec::with_capacity(messages * devices) })
            .collect()
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
        self.receives.push((from, to, bytes));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        let door = &self.doors[self.me];
        while !self.receives.is_empty() {
            let mut inbox = door.open();
            let (at, posted) = loop {
                InProcess::check(&inbox)?;
                let ready = self.receives.iter().enumerate().find_map(|(i, r)| {
                    // Messages of a pair stay in order: only its first receive may take one.
                    let first = self.receives[..i].iter().all(|q| q.0 != r.0);
                    first.then(|| inbox.messages[r.0].pop_front()).flatten().map(|p| (i, p))
                });
                match ready {
                    Some(found) => break found,
                    None => inbox = door.bell.wait(inbox).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(inbox);
            let (peer, to, expected) = self.receives.remove(at);
            if posted.bytes != expected {
                return Err(TransportError::Disagreement { me: self.me, peer, expected, sent: posted.bytes });
            }
            // SAFETY: the sender keeps its bytes until we say that they are taken, the receiver's are ours.
            unsafe { std::ptr::copy_nonoverlapping(posted.from, to, expected) };
            let sender = &self.doors[peer];
            sender.open().outstanding -= 1;
            sender.bell.notify_one();
        }
        let mut inbox = door.open();
        while inbox.outstanding > 0 {
            InProcess::check(&inbox)?;
            inbox = door.bell.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn abort(&mut self, reason: &str) {
        let error = TransportError::Aborted { device: self.me, reason: reason.into() };
        for door in self.doors.iter() {
            door.open().aborted.get_or_insert_with(|| error.clone());
            door.bell.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_pair_arrive_in_order_while_all_devices_exchange_at_once() {
        let devices = 4;
        let ends = InProcess::mesh(devices, 2);
        std::thread::scope(|s| {
            for (me, mut end) in ends.into_iter().enumerate() {
                s.spawn(move || {
                    for round in 0..200u64 {
                        let out: Vec<[u64; 2]> = (0..devices as u64).map(|to| [me as u64 * 100 + to, round]).collect();
                        let mut got = vec![[0u64; 2]; devices];
                        // SAFETY: both arrays outlive `finish`.
                        unsafe {
                            for peer in (0..devices).filter(|p| *p != me) {
                                for half in 0..2 {
                                    end.send(peer, (&raw const out[peer][half]).cast(), 8).unwrap();
                                    end.recv(peer, (&raw mut got[peer][half]).cast(), 8).unwrap();
                                }
                            }
                        }
                        end.finish().unwrap();
                        for peer in (0..devices).filter(|p| *p != me) {
                            assert_eq!(got[peer], [peer as u64 * 100 + me as u64, round]);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn an_abort_wakes_whoever_waits() {
        let mut ends = InProcess::mesh(2, 1);
        let (mut b, mut a) = (ends.pop().unwrap(), ends.pop().unwrap());
        std::thread::scope(|s| {
            s.spawn(move || {
                let mut byte = 0u8;
                // SAFETY: the byte outlives `finish`.
                unsafe { a.recv(1, &raw mut byte, 1).unwrap() };
                assert_eq!(a.finish(), Err(TransportError::Aborted { device: 1, reason: "out of paper".into() }));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            b.abort("out of paper");
        });
    }

    #[test]
    fn devices_of_different_plans_find_out() {
        let mut ends = InProcess::mesh(2, 1);
        let (mut b, mut a) = (ends.pop().unwrap(), ends.pop().unwrap());
        let (out, mut got) = ([1u8; 4], [0u8; 8]);
        // SAFETY: both arrays outlive `finish`.
        unsafe {
            a.send(1, out.as_ptr(), 4).unwrap();
            b.recv(0, got.as_mut_ptr(), 8).unwrap();
        }
        assert_eq!(b.finish(), Err(TransportError::Disagreement { me: 1, peer: 0, expected: 8, sent: 4 }));
    }
}
