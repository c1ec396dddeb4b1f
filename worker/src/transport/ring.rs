//! The link between processes of one host: two rings in memory that both map.
//!
//! Each ring has one producer and one consumer. The producer copies bytes in behind its head and publishes the head; the
//! consumer copies bytes out behind its tail and publishes the tail. Heads and tails count bytes and never wrap. Each
//! side works with its own count and only publishes it; what the other side published is checked every time it is read,
//! so that a peer that writes nonsense is found out and cannot lead a copy outside the ring.

use super::TransportError;
use super::bell::Bell;
use super::link::{Link, PIECE};
use super::memory::{LentMemory, SharedMemory};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Bytes of a ring. Measured: from 1 MiB on, a stream of large messages runs at the same speed. Larger rings let a sender
/// go on before the receiver is there; smaller ones stay in a core's cache, which an all-reduce gains from.
pub const RING_BYTES: usize = 4 << 20;
/// The smallest and the largest ring that a peer may ask for.
pub const RING_LIMITS: std::ops::RangeInclusive<usize> = 4 << 10..=256 << 20;

/// What is shorter is copied and not lent. Measured: below, waiting for the peer to give back costs more than a copy.
pub const LEND: usize = 64 << 10;
/// Places that are lent are multiples of it, so that every element of the message is aligned.
const LEND_ALIGN: usize = 4;

/// A ring's page of control words. Head and tail lie two cache lines apart, for processors fetch lines in pairs.
const CONTROL: usize = 4096;
/// Bytes that the producer has put in.
const HEAD: usize = 0;
/// Bytes that the consumer has taken out.
const TAIL: usize = 128;
/// Loans that the consumer has given back: by a loan's number, modulo [`LOANS`], the number and one.
const GIVEN_BACK: usize = 1536;
/// Loans at a time: what comes on top of them is carried.
const LOANS: u64 = 256;
/// 1 while the producer waits for room; on a line of the producer's.
const WAITS: usize = 8;
/// 1 once the producer has given up; then the device that gave up first, and the reason's length and bytes.
const ABORTED: usize = 256;
const ABORT_DEVICE: usize = 260;
const ABORT_LENGTH: usize = 264;
const ABORT_REASON: usize = 320;
const REASON_BYTES: usize = 1024;

/// The memory of a pair of rings. The first is the dialler's to fill, the second the acceptor's.
#[derive(Clone, Debug)]
pub struct RingMemory {
    memory: Arc<SharedMemory>,
    capacity: usize,
}

impl RingMemory {
    fn bytes(capacity: usize) -> io::Result<usize> {
        if RING_LIMITS.contains(&capacity) && capacity.is_power_of_two() {
            Ok(2 * (CONTROL + capacity))
        } else {
            Err(io::Error::other(format!(
                "a ring of {capacity} bytes; it must be a power of two from {} to {}",
                RING_LIMITS.start(),
                RING_LIMITS.end()
            )))
        }
    }

    /// New rings of `capacity` bytes each, and the descriptor to hand to the peer.
    pub fn create(capacity: usize) -> io::Result<(RingMemory, OwnedFd)> {
        let (memory, fd) = SharedMemory::create("mesh-ring", RingMemory::bytes(capacity)?)?;
        Ok((RingMemory { memory: Arc::new(memory), capacity }, fd))
    }

    /// The rings of `capacity` bytes that a peer made.
    pub fn open(fd: &OwnedFd, capacity: usize) -> io::Result<RingMemory> {
        let memory = SharedMemory::open(fd, RingMemory::bytes(capacity)?)?;
        Ok(RingMemory { memory: Arc::new(memory), capacity })
    }

    fn lane(&self, second: bool) -> Lane {
        let control = if second { CONTROL + self.capacity } else { 0 };
        Lane { memory: self.memory.clone(), control, capacity: self.capacity, mine: 0, theirs: 0, waits: false }
    }
}

/// One ring, seen from one of its ends.
struct Lane {
    memory: Arc<SharedMemory>,
    control: usize,
    capacity: usize,
    /// This side's count; the shared word only tells the peer.
    mine: u64,
    /// The peer's count, as last read.
    theirs: u64,
    /// As a producer: there was no room, and the consumer was told that we wait for some.
    waits: bool,
}

impl Lane {
    /// Room for the producer, from the peer's tail as last read.
    fn room(&self) -> usize {
        self.capacity - (self.mine - self.theirs) as usize
    }

    /// Bytes for the consumer, from the peer's head as last read.
    fn filled(&self) -> usize {
        (self.theirs - self.mine) as usize
    }

    /// Reads the consumer's tail: it moves forward only, and never past the head.
    fn look_at_tail(&mut self) -> Result<(), String> {
        let tail = self.memory.word64(self.control + TAIL).load(Ordering::Acquire);
        if tail < self.theirs || tail > self.mine {
            return Err(format!("the ring's tail is {tail}, where {} to {} can be", self.theirs, self.mine));
        }
        self.theirs = tail;
        Ok(())
    }

    /// Reads the producer's head: it moves forward only, and never more than the capacity past the tail.
    fn look_at_head(&mut self) -> Result<(), String> {
        let head = self.memory.word64(self.control + HEAD).load(Ordering::Acquire);
        let last = self.mine.saturating_add(self.capacity as u64);
        if head < self.theirs || head > last {
            return Err(format!("the ring's head is {head}, where {} to {last} can be", self.theirs));
        }
        self.theirs = head;
        Ok(())
    }

    /// Where `n` bytes from this side's count on lie: an offset in the memory and the bytes before the ring's end.
    fn span(&self, n: usize) -> (usize, usize) {
        let at = (self.mine % self.capacity as u64) as usize;
        (self.control + CONTROL + at, n.min(self.capacity - at))
    }

    /// Copies up to a piece in.
    ///
    /// # Safety
    /// `bytes` bytes are readable.
    unsafe fn put(&mut self, from: *const u8, bytes: usize) -> Result<usize, String> {
        let wanted = bytes.min(PIECE);
        if self.room() < wanted {
            self.look_at_tail()?;
        }
        let waits = wanted > 0 && self.room() == 0;
        if waits != self.waits {
            self.waits = waits;
            self.memory.word32(self.control + WAITS).store(u32::from(waits), Ordering::Relaxed);
        }
        if waits {
            // Either we see what the consumer has taken, or it sees that we wait.
            fence(Ordering::SeqCst);
            self.look_at_tail()?;
        }
        let n = wanted.min(self.room());
        let (at, first) = self.span(n);
        // SAFETY: `n` is at most `bytes`; both parts lie in the ring.
        unsafe {
            self.memory.write(at, from, first);
            self.memory.write(self.control + CONTROL, from.add(first), n - first);
        }
        self.mine += n as u64;
        self.memory.word64(self.control + HEAD).store(self.mine, Ordering::Release);
        Ok(n)
    }

    /// Whether the producer may be waiting for room that the consumer has made.
    fn producer_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        self.memory.word32(self.control + WAITS).load(Ordering::Relaxed) != 0
    }

    /// Copies up to a piece out.
    ///
    /// # Safety
    /// `bytes` bytes are writable.
    unsafe fn take(&mut self, to: *mut u8, bytes: usize) -> Result<usize, String> {
        let wanted = bytes.min(PIECE);
        if self.filled() < wanted {
            self.look_at_head()?;
        }
        let n = wanted.min(self.filled());
        let (at, first) = self.span(n);
        // SAFETY: `n` is at most `bytes`; both parts lie in the ring.
        unsafe {
            self.memory.read(at, to, first);
            self.memory.read(self.control + CONTROL, to.add(first), n - first);
        }
        self.mine += n as u64;
        self.memory.word64(self.control + TAIL).store(self.mine, Ordering::Release);
        Ok(n)
    }

    /// Where the consumer says that it has given a loan back.
    fn given_back(&self, loan: u64) -> &AtomicU64 {
        self.memory.word64(self.control + GIVEN_BACK + 8 * (loan % LOANS) as usize)
    }

    /// What it has said there last, of a loan or an earlier one: it says only what it was lent.
    fn is_given_back(&self, loan: u64) -> Result<bool, String> {
        let said = self.given_back(loan).load(Ordering::Acquire);
        if said > loan + 1 {
            return Err(format!("loan {} was given back, of {}", said - 1, loan + 1));
        }
        Ok(said == loan + 1)
    }

    /// Leaves the producer's last word.
    fn abort(&self, device: usize, reason: &str) {
        let aborted = self.memory.word32(self.control + ABORTED);
        if aborted.load(Ordering::Relaxed) != 0 {
            return;
        }
        let bytes = reason.len().min(REASON_BYTES);
        self.memory.word32(self.control + ABORT_DEVICE).store(device as u32, Ordering::Relaxed);
        self.memory.word32(self.control + ABORT_LENGTH).store(bytes as u32, Ordering::Relaxed);
        // SAFETY: the reason has at least so many bytes.
        unsafe { self.memory.write(self.control + ABORT_REASON, reason.as_ptr(), bytes) };
        aborted.store(1, Ordering::Release);
    }

    /// The producer's last word, if there is one.
    fn aborted(&self) -> Option<(usize, String)> {
        if self.memory.word32(self.control + ABORTED).load(Ordering::Acquire) == 0 {
            return None;
        }
        let device = self.memory.word32(self.control + ABORT_DEVICE).load(Ordering::Relaxed) as usize;
        let length = self.memory.word32(self.control + ABORT_LENGTH).load(Ordering::Relaxed) as usize;
        let mut reason = [0u8; REASON_BYTES];
        // SAFETY: the whole field is copied, whatever length the peer wrote.
        unsafe { self.memory.read(self.control + ABORT_REASON, reason.as_mut_ptr(), REASON_BYTES) };
        Some((device, String::from_utf8_lossy(&reason[..length.min(REASON_BYTES)]).into_owned()))
    }
}

/// One device's end of a pair of rings.
pub struct RingLink {
    me: usize,
    peer: usize,
    out: Lane,
    into: Lane,
    /// The peer's bell.
    bell: Arc<Bell>,
    /// Bytes moved that the peer may wait for, since its bell was rung last.
    unrung: usize,
    /// Closes when the peer's process ends; None between devices of one process.
    socket: Option<UnixStream>,
    /// What this device lends from and what the peer lends from.
    mine: Option<Arc<LentMemory>>,
    theirs: Option<Arc<LentMemory>>,
    /// Loans to the peer.
    lent: u64,
    /// Whether the message that is being written is the last of them.
    lends: bool,
}

impl RingLink {
    /// Device `me`'s end. `dialler` says which ring is whose; `bell` is the peer's; `socket` must not block, and is
    /// only watched.
    pub fn new(
        me: usize,
        peer: usize,
        memory: &RingMemory,
        dialler: bool,
        bell: Arc<Bell>,
        socket: Option<UnixStream>,
    ) -> RingLink {
        let (out, into) = (memory.lane(!dialler), memory.lane(dialler));
        RingLink { me, peer, out, into, bell, unrung: 0, socket, mine: None, theirs: None, lent: 0, lends: false }
    }

    /// Lends from this device's memory, which the peer maps, and borrows from the peer's.
    pub(super) fn lending(self, mine: Option<Arc<LentMemory>>, theirs: Option<Arc<LentMemory>>) -> RingLink {
        RingLink { mine, theirs, ..self }
    }

    fn corrupt(&self, what: String) -> TransportError {
        TransportError::Corrupt { me: self.me, peer: self.peer, what }
    }

    /// Counts bytes moved; rings when they are so many that the peer should begin before we are through.
    fn moved(&mut self, n: usize) {
        self.unrung += n;
        if self.unrung >= PIECE {
            self.flush();
        }
    }
}

impl Link for RingLink {
    fn kind(&self) -> &'static str {
        "ring"
    }

    unsafe fn write(&mut self, from: *const u8, bytes: usize) -> Result<usize, TransportError> {
        // SAFETY: by this function's contract.
        let n = unsafe { self.out.put(from, bytes) }.map_err(|what| self.corrupt(what))?;
        self.moved(n);
        Ok(n)
    }

    unsafe fn read(&mut self, to: *mut u8, bytes: usize) -> Result<usize, TransportError> {
        // SAFETY: by this function's contract.
        let n = unsafe { self.into.take(to, bytes) }.map_err(|what| self.corrupt(what))?;
        if n > 0 && self.into.producer_waits() {
            self.moved(n);
        }
        Ok(n)
    }

    fn flush(&mut self) {
        if self.unrung > 0 {
            self.unrung = 0;
            self.bell.ring();
        }
    }

    unsafe fn lend(&mut self, from: *const u8, bytes: usize) -> Result<Option<u64>, TransportError> {
        let offset = self.mine.as_ref().filter(|_| bytes >= LEND).and_then(|m| m.offset_of(from, bytes));
        let Some(offset) = offset.filter(|o| o % LEND_ALIGN == 0) else { return Ok(None) };
        // The place of the one that is so many loans back must be free.
        if let Some(before) = self.lent.checked_sub(LOANS)
            && !self.out.is_given_back(before).map_err(|what| self.corrupt(what))?
        {
            return Ok(None);
        }
        self.lent += 1;
        self.lends = true;
        Ok(Some(offset as u64))
    }

    fn borrow(&self, place: u64, bytes: usize) -> Option<*const u8> {
        let offset = usize::try_from(place).ok().filter(|o| o % LEND_ALIGN == 0)?;
        self.theirs.as_ref()?.at(offset, bytes)
    }

    fn give_back(&mut self, loan: u64) {
        self.into.given_back(loan).store(loan + 1, Ordering::Release);
        self.unrung += 1;
    }

    fn end(&mut self) -> Option<u64> {
        std::mem::take(&mut self.lends).then(|| self.lent - 1)
    }

    fn settled(&self, message: u64) -> bool {
        // A peer that gives back what it was not lent yet reads what it should not; a later loan finds out.
        self.out.given_back(message).load(Ordering::Acquire) > message
    }

    fn release(&mut self) {}

    fn aborted(&self) -> Option<(usize, String)> {
        self.into.aborted()
    }

    fn lost(&mut self) -> Option<String> {
        let socket = self.socket.as_ref()?;
        let mut byte = [0u8; 1];
        match rustix::net::recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => None,
            Ok((0, _)) => Some("its process has ended or closed the connection".into()),
            Ok(_) => Some("it sent bytes where none are allowed".into()),
            Err(e) => Some(e.to_string()),
        }
    }

    fn abort(&mut self, device: usize, reason: &str) {
        self.out.abort(device, reason);
        self.bell.ring();
    }

    fn close(&mut self) -> bool {
        // The peer maps the memory too.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::bell::Doom;
    use crate::transport::switchboard::Switchboard;
    use crate::transport::{Transport, link::Envelope};
    use proptest::prelude::*;
    use std::time::Duration;

    const CAPACITY: usize = 4096;

    /// A device's end of a pair of rings, and the memory, for a peer that does with it what it likes. The peer lends from
    /// memory of a megabyte.
    fn end_and_memory() -> (Switchboard, RingMemory, Arc<LentMemory>) {
        let (memory, _) = RingMemory::create(CAPACITY).unwrap();
        let bell = Arc::new(Bell::create().unwrap().0);
        let theirs = Arc::new(Bell::create().unwrap().0);
        let lent = Arc::new(LentMemory::create("test", 1 << 20).unwrap().0);
        let link = RingLink::new(0, 1, &memory, false, theirs, None).lending(None, Some(lent.clone()));
        let links: Vec<Option<Box<dyn Link>>> = vec![None, Some(Box::new(link))];
        (Switchboard::new(0, 7, links, bell, Doom::new(), Duration::ZERO), memory, lent)
    }

    /// What a hostile peer does to one word of the memory.
    fn attack() -> impl Strategy<Value = (usize, u64)> {
        let words = [HEAD, WAITS, TAIL, GIVEN_BACK, ABORT_DEVICE / 8 * 8, ABORT_LENGTH, ABORT_REASON];
        let lanes = [0, CONTROL + CAPACITY];
        let word = (0..words.len(), 0..2usize).prop_map(move |(w, l)| lanes[l] + words[w]);
        let data = (0..CAPACITY / 8).prop_map(|i| CONTROL + i * 8);
        let value = prop_oneof![any::<u64>(), 0..3 * CAPACITY as u64, Just(u64::MAX), Just(CAPACITY as u64 + 1)];
        (prop_oneof![3 => word, 1 => data], value)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Reads and writes go on while a peer spoils the memory: they give bytes or an error, and nothing is touched
        /// outside the buffers.
        #[test]
        fn a_hostile_peer_gets_an_error_and_nothing_else(
            steps in prop::collection::vec((attack(), 0..6000usize, any::<bool>()), 1..40),
        ) {
            let (memory, _) = RingMemory::create(CAPACITY).unwrap();
            let theirs = Arc::new(Bell::create().unwrap().0);
            let mut link = RingLink::new(0, 1, &memory, false, theirs, None);
            for ((offset, value), bytes, write) in steps {
                memory.memory.word64(offset).store(value, Ordering::Release);
                let mut buffer = vec![0xa5u8; bytes + 128];
                // SAFETY: `bytes` bytes lie in the buffer behind the first 64.
                let done = unsafe {
                    let at = buffer.as_mut_ptr().add(64);
                    if write { link.write(at, bytes) } else { link.read(at, bytes) }
                };
                match done {
                    Ok(n) => prop_assert!(n <= bytes.min(CAPACITY)),
                    Err(TransportError::Corrupt { me: 0, peer: 1, .. }) => {}
                    Err(e) => prop_assert!(false, "{}", e),
                }
                prop_assert!(buffer[..64].iter().chain(&buffer[64 + bytes..]).all(|b| *b == 0xa5));
                prop_assert!(link.aborted().is_none_or(|(_, reason)| reason.chars().count() <= REASON_BYTES));
            }
        }

        /// A peer that keeps the counts but writes any envelope is told apart by what is wrong with it.
        #[test]
        fn a_wrong_envelope_is_an_error(epoch in 6..9u64, sequence in 0..3u64, length in prop_oneof![90..110u64, any::<u64>()]) {
            let (mut end, memory, _) = end_and_memory();
            let sent = Envelope { epoch, sequence, length, lent: None };
            let bell = Arc::new(Bell::create().unwrap().0);
            let mut peer = RingLink::new(1, 0, &memory, true, bell, None);
            let bytes = [sent.encode().to_vec(), vec![3; 100]].concat();
            let mut got = [0u8; 100];
            // SAFETY: the arrays outlive the calls.
            let result = unsafe {
                prop_assert_eq!(peer.write(bytes.as_ptr(), bytes.len()).unwrap(), bytes.len());
                end.recv(0, 1, got.as_mut_ptr(), 100).unwrap();
                end.finish(0)
            };
            let expected = match sent {
                Envelope { epoch: 7, sequence: 0, length: 100, .. } => Ok(()),
                Envelope { epoch: 7, sequence: 0, length, .. } => {
                    Err(TransportError::Disagreement { me: 0, peer: 1, expected: 100, sent: length as usize })
                }
                Envelope { epoch: 7, sequence, .. } => {
                    Err(TransportError::OutOfOrder { me: 0, peer: 1, expected: 0, sent: sequence })
                }
                Envelope { epoch, .. } => Err(TransportError::StaleEpoch { me: 0, peer: 1, expected: 7, sent: epoch }),
            };
            prop_assert_eq!(&result, &expected);
            if result.is_err() {
                prop_assert_eq!(end.finish(0), expected, "an error stays");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// A peer that lends at any place at all lends what it shares, or is found out.
        #[test]
        fn a_loan_outside_of_what_is_shared_is_an_error(
            place in prop_oneof![0..2u64 << 20, 0..u64::MAX],
            bytes in prop_oneof![Just(0usize), 1..3usize << 20],
            borrow: bool,
        ) {
            let (mut end, memory, lent) = end_and_memory();
            let envelope = Envelope { epoch: 7, sequence: 0, length: bytes as u64, lent: Some(place) }.encode();
            let bell = Arc::new(Bell::create().unwrap().0);
            let mut peer = RingLink::new(1, 0, &memory, true, bell, None);
            let mut got = vec![0u8; bytes];
            // SAFETY: envelope and memory outlive the calls.
            let result = unsafe {
                peer.write(envelope.as_ptr(), envelope.len()).unwrap();
                if borrow {
                    end.borrow(0, 1, got.as_mut_ptr(), bytes).unwrap();
                    end.borrowed(0).map(|b| b[0])
                } else {
                    end.recv(0, 1, got.as_mut_ptr(), bytes).unwrap();
                    end.finish(0).map(|()| lent.at(place as usize, bytes).unwrap_or(got.as_ptr()))
                }
            };
            let shared = usize::try_from(place).ok().filter(|p| p % 4 == 0).and_then(|p| lent.at(p, bytes));
            match (shared, result) {
                (Some(at), Ok(found)) => prop_assert_eq!(at, found),
                (None, Err(TransportError::Corrupt { me: 0, peer: 1, what })) => {
                    prop_assert_eq!(what, format!("it lends {bytes} bytes at {place}, which it does not share"));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn loans_are_given_back_once_and_not_more_often() {
        let (memory, _) = RingMemory::create(CAPACITY).unwrap();
        let lent = Arc::new(LentMemory::create("test", 1 << 20).unwrap().0);
        let bell = || Arc::new(Bell::create().unwrap().0);
        let mut mine = RingLink::new(0, 1, &memory, false, bell(), None).lending(Some(lent.clone()), None);
        let mut theirs = RingLink::new(1, 0, &memory, true, bell(), None).lending(None, Some(lent.clone()));
        let start = lent.start();
        // SAFETY: the bytes outlive the links.
        unsafe {
            assert_eq!(mine.lend(start, LEND - 1).unwrap(), None, "too short");
            assert_eq!(mine.lend(start.add(1), LEND).unwrap(), None, "elements would not be aligned");
            assert_eq!(mine.lend([0u8; LEND].as_ptr(), LEND).unwrap(), None, "elsewhere");
            assert_eq!(mine.lend(start.add(64), LEND).unwrap(), Some(64));
            assert_eq!(mine.lend(start.add(128), LEND).unwrap(), Some(128));
        }
        assert_eq!(theirs.borrow(64, LEND), Some(start.wrapping_add(64).cast_const()));
        assert_eq!(mine.end(), Some(1), "the message that was lent last");
        assert_eq!(mine.end(), None, "what is carried is nobody's once it is written");
        theirs.give_back(1);
        assert!(mine.settled(1) && !mine.settled(0), "in any order");
        theirs.give_back(0);
        assert!(mine.settled(0));
    }

    #[test]
    fn what_is_lent_on_top_of_all_loans_is_carried() {
        let (memory, _) = RingMemory::create(CAPACITY).unwrap();
        let lent = Arc::new(LentMemory::create("test", 1 << 20).unwrap().0);
        let bell = || Arc::new(Bell::create().unwrap().0);
        let mut mine = RingLink::new(0, 1, &memory, false, bell(), None).lending(Some(lent.clone()), None);
        let mut theirs = RingLink::new(1, 0, &memory, true, bell(), None).lending(None, Some(lent.clone()));
        // SAFETY: the bytes outlive the links.
        let mut lend = || unsafe { mine.lend(lent.start(), LEND) };
        (0..LOANS).for_each(|_| assert_eq!(lend().unwrap(), Some(0)));
        theirs.give_back(1);
        assert_eq!(lend().unwrap(), None, "the first one is still out");
        theirs.give_back(0);
        assert_eq!(lend().unwrap(), Some(0));
        assert_eq!(lend().unwrap(), Some(0));
        theirs.give_back(7 + LOANS);
        (0..5).for_each(|_| assert_eq!(lend().unwrap(), None));
        (2..7).for_each(|loan| theirs.give_back(loan));
        (2..7).for_each(|_| assert_eq!(lend().unwrap(), Some(0)));
        let found = lend().unwrap_err();
        assert!(found.to_string().contains("loan 263 was given back, of 8"), "{found}");
    }

    #[test]
    fn rings_of_a_strange_size_are_refused() {
        for capacity in [0, 1, 4095, 5000, 3 << 20, 512 << 20, usize::MAX] {
            assert!(RingMemory::create(capacity).is_err(), "{capacity}");
        }
    }

    #[test]
    fn a_head_at_the_end_of_all_numbers_is_no_overflow() {
        let (memory, _) = RingMemory::create(CAPACITY).unwrap();
        let mut lane = memory.lane(false);
        lane.mine = u64::MAX - 10;
        lane.theirs = u64::MAX - 10;
        memory.memory.word64(HEAD).store(u64::MAX, Ordering::Release);
        assert_eq!((lane.look_at_head(), lane.filled()), (Ok(()), 10));
    }
}
