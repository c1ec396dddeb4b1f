//! What a device sleeps on.
//!
//! A [`Bell`] belongs to one device. Whoever has done something that the device may be waiting for rings it: peers on
//! the same host, who map it, and the threads of its own process. It is a futex word in shared memory: ringing one
//! whose owner is awake costs no system call.

use super::memory::SharedMemory;
use rustix::fs::Timespec;
use rustix::thread::futex;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

const BYTES: usize = 4096;
/// Raised by one for every ring.
const RINGS: usize = 0;
/// 1 while the owner sleeps, or is about to; on a cache line of its own.
const ASLEEP: usize = 128;

/// A bell: one owner waits, anyone rings.
#[derive(Debug)]
pub struct Bell {
    memory: SharedMemory,
}

impl Bell {
    /// A bell, and the descriptor to hand to those who shall ring it.
    pub fn create() -> io::Result<(Bell, OwnedFd)> {
        let (memory, fd) = SharedMemory::create("mesh-bell", BYTES)?;
        Ok((Bell { memory }, fd))
    }

    /// Another process's bell.
    pub fn open(fd: &OwnedFd) -> io::Result<Bell> {
        Ok(Bell { memory: SharedMemory::open(fd, BYTES)? })
    }

    fn word(&self) -> &AtomicU32 {
        self.memory.word32(RINGS)
    }

    /// How often it has rung. Read before looking for work, and given to [`Bell::wait`] when there was none.
    pub fn rings(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Rings.
    pub fn ring(&self) {
        // Sequentially consistent on both sides: either the owner sees the ring before it sleeps, or we see it asleep.
        self.word().fetch_add(1, Ordering::SeqCst);
        let asleep = self.memory.word32(ASLEEP);
        if asleep.load(Ordering::SeqCst) != 0 && asleep.swap(0, Ordering::SeqCst) != 0 {
            // An error means that nobody is there to be woken.
            let _ = futex::wake(self.word(), futex::Flags::empty(), 1);
        }
    }

    /// Waits until it has rung since `seen`: looks again and again for the time of `spin`, then sleeps for the time of
    /// `nap` at most, so that a peer that spoils the word can delay us but not hold us. Returns early without reason.
    pub fn wait(&self, seen: u32, spin: Duration, nap: Duration) {
        if !spin.is_zero() {
            let begun = Instant::now();
            while begun.elapsed() < spin {
                for _ in 0..32 {
                    if self.rings() != seen {
                        return;
                    }
                    std::hint::spin_loop();
                }
            }
        }
        let asleep = self.memory.word32(ASLEEP);
        asleep.store(1, Ordering::SeqCst);
        if self.rings() == seen {
            let nap = Timespec { tv_sec: nap.as_secs() as i64, tv_nsec: i64::from(nap.subsec_nanos()) };
            // Woken, timed out, interrupted or rung meanwhile: the caller looks again in any case.
            let _ = futex::wait(self.word(), futex::Flags::empty(), seen, Some(&nap));
        }
        asleep.store(0, Ordering::SeqCst);
    }
}

/// The word that ends an epoch: whoever holds it can stop all devices of the process that were connected with it.
#[derive(Clone, Debug, Default)]
pub struct Doom(Arc<DoomState>);

#[derive(Debug, Default)]
struct DoomState {
    struck: AtomicBool,
    reason: OnceLock<String>,
    bells: Mutex<Vec<Weak<Bell>>>,
}

impl Doom {
    /// A word that has not been spoken.
    pub fn new() -> Doom {
        Doom::default()
    }

    /// Speaks it: devices fail what they are waiting for, and whatever comes later, with this reason. The first reason stays.
    pub fn strike(&self, reason: &str) {
        self.0.reason.get_or_init(|| reason.into());
        let bells = self.0.bells.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.struck.store(true, Ordering::SeqCst);
        bells.iter().filter_map(Weak::upgrade).for_each(|b| b.ring());
    }

    /// The reason, once spoken.
    pub fn reason(&self) -> Option<&str> {
        if self.0.struck.load(Ordering::Acquire) { self.0.reason.get().map(String::as_str) } else { None }
    }

    /// Has `bell` rung when the word is spoken.
    pub(super) fn attach(&self, bell: &Arc<Bell>) {
        let mut bells = self.0.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|b| b.strong_count() > 0);
        bells.push(Arc::downgrade(bell));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ring_is_missed_between_two_mappings() {
        let (bell, fd) = Bell::create().unwrap();
        let other = Bell::open(&fd).unwrap();
        let (back, back_fd) = Bell::create().unwrap();
        let back_other = Bell::open(&back_fd).unwrap();
        let (rounds, nap) = (2000, Duration::from_secs(20));
        let begun = Instant::now();
        std::thread::scope(|s| {
            s.spawn(|| {
                for round in 0..rounds {
                    while bell.rings() == round {
                        bell.wait(round, Duration::ZERO, nap);
                    }
                    back_other.ring();
                }
            });
            for round in 0..rounds {
                other.ring();
                while back.rings() == round {
                    back.wait(round, Duration::ZERO, nap);
                }
            }
        });
        assert!(begun.elapsed() < nap, "a ring was missed");
    }

    #[test]
    fn the_first_reason_of_a_doom_stays() {
        let doom = Doom::new();
        assert_eq!(doom.reason(), None);
        doom.strike("a worker is gone");
        doom.strike("something else");
        assert_eq!(doom.reason(), Some("a worker is gone"));
    }
}
