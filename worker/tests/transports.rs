//! What every transport keeps to, in one process and between real ones.
#![cfg(target_os = "linux")]

use mesh::chunk::{Tree, TreeDim, shard_chunks};
use mesh::dim::DType;
use mesh::ops::reduce::ReduceFn;
use mesh::plan::{AllReduce, BoxCopy, Buffer, Exchange, ExchangeKind, Message, Segments, Wire};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use worker::arena::Arena;
use worker::collective::{AllReducePlan, ExchangePlan};
use worker::pool::Pool;
use worker::transport::bell::Doom;
use worker::transport::connector::{
    self, Address, ConnectError, ConnectOptions, ListenOptions, Listener, Roster, TransportChoice, Version,
};
use worker::transport::in_process::SMALL;
use worker::transport::switchboard::Switchboard;
use worker::transport::{Batch, InProcess, Transport, TransportError};

/// The transports that must behave the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    InProcess,
    /// Rings between devices of one process, which need not dial.
    Siblings,
    /// Rings, as between processes.
    Rings,
    /// As siblings and rings, from arenas that peers look at.
    LendingSiblings,
    Lending,
    Grpc,
}

const KINDS: [Kind; 6] =
    [Kind::InProcess, Kind::Siblings, Kind::Rings, Kind::LendingSiblings, Kind::Lending, Kind::Grpc];

/// Bytes of a device's arena in these tests; what is not touched costs nothing.
const ARENA: usize = 256 << 20;

fn arena() -> Arc<Arena> {
    Arc::new(Arena::shared(ARENA).unwrap())
}

/// A device whose messages lie in its arena, some of them where they cannot be lent.
struct FromArena {
    end: Switchboard,
    arena: Arc<Arena>,
    used: usize,
    /// Batches with messages that lie there.
    under_way: Vec<Batch>,
}

impl FromArena {
    fn new(end: Switchboard, arena: Arc<Arena>) -> FromArena {
        FromArena { end, arena, used: 0, under_way: vec![] }
    }
}

impl Transport for FromArena {
    unsafe fn send(&mut self, batch: Batch, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError> {
        let offset = self.used + bytes % 8;
        self.used = (offset + bytes).next_multiple_of(64);
        self.under_way.push(batch);
        let at = self.arena.at(Buffer { offset, bytes });
        // SAFETY: by this function's contract; nothing else lies there before `finish`.
        unsafe {
            std::ptr::copy_nonoverlapping(from, at, bytes);
            self.end.send(batch, to, at, bytes)
        }
    }

    unsafe fn recv(&mut self, batch: Batch, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError> {
        // SAFETY: by this function's contract.
        unsafe { self.end.recv(batch, from, to, bytes) }
    }

    unsafe fn borrow(
        &mut self,
        batch: Batch,
        from: usize,
        scratch: *mut u8,
        bytes: usize,
    ) -> Result<(), TransportError> {
        // SAFETY: by this function's contract.
        unsafe { self.end.borrow(batch, from, scratch, bytes) }
    }

    fn borrowed(&mut self, batch: Batch) -> Result<&[*const u8], TransportError> {
        self.end.borrowed(batch)
    }

    fn finish(&mut self, batch: Batch) -> Result<(), TransportError> {
        let done = self.end.finish(batch);
        // By batch, so that what is still under way stays where it is.
        self.under_way.retain(|b| *b != batch);
        self.used = if self.under_way.is_empty() { 0 } else { self.used };
        done
    }

    fn progress(&mut self) -> Result<(), TransportError> {
        self.end.progress()
    }

    fn waited_ns(&self) -> u64 {
        self.end.waited_ns()
    }

    fn abort(&mut self, reason: &str) {
        self.end.abort(reason);
    }
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| connector::runtime().unwrap())
}

fn listener() -> Listener {
    Listener::bind(ListenOptions::default(), runtime().handle().clone()).unwrap()
}

fn options(choice: TransportChoice) -> ConnectOptions {
    ConnectOptions { choice, timeout: Duration::from_secs(20), ..ConnectOptions::default() }
}

/// Connects listeners that have a device each, with the arenas that there are.
fn connect(
    listeners: &[Listener],
    epoch: u64,
    choice: TransportChoice,
    doom: &Doom,
    arenas: &[Arc<Arena>],
) -> Vec<Switchboard> {
    let devices: Vec<Address> = listeners.iter().map(|l| l.address().clone()).collect();
    std::thread::scope(|s| {
        let one = |(d, l)| {
            let l: &Listener = l;
            let roster = Roster { job: "test".into(), epoch, devices: devices.clone(), mine: vec![d] };
            let options =
                ConnectOptions { arenas: arenas.iter().skip(d).take(1).cloned().collect(), ..options(choice) };
            s.spawn(move || l.connect(&roster, &options, doom).unwrap().pop().unwrap())
        };
        let threads: Vec<_> = listeners.iter().enumerate().map(one).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// The ends of a mesh, and what must stay open for them.
fn ends(kind: Kind, devices: usize) -> (Vec<Box<dyn Transport>>, Vec<Listener>) {
    let boxed = |ends: Vec<Switchboard>, arenas: Vec<Arc<Arena>>| {
        let mut arenas = arenas.into_iter();
        let one = |end| match arenas.next() {
            Some(arena) => Box::new(FromArena::new(end, arena)) as Box<dyn Transport>,
            None => Box::new(end),
        };
        ends.into_iter().map(one).collect()
    };
    let several = |choice, arenas: Vec<Arc<Arena>>| {
        let listeners: Vec<Listener> = (0..devices).map(|_| listener()).collect();
        (boxed(connect(&listeners, 1, choice, &Doom::new(), &arenas), arenas), listeners)
    };
    let siblings = |arenas: Vec<Arc<Arena>>| {
        let l = listener();
        let all = vec![l.address().clone(); devices];
        let roster = Roster { job: "test".into(), epoch: 1, devices: all, mine: (0..devices).collect() };
        let options = ConnectOptions { arenas: arenas.clone(), ..options(TransportChoice::Auto) };
        (boxed(l.connect(&roster, &options, &Doom::new()).unwrap(), arenas), vec![l])
    };
    let arenas = || (0..devices).map(|_| arena()).collect();
    match kind {
        Kind::InProcess => {
            (InProcess::mesh(devices, 4, 64).into_iter().map(|e| Box::new(e) as Box<dyn Transport>).collect(), vec![])
        }
        Kind::Siblings => siblings(vec![]),
        Kind::LendingSiblings => siblings(arenas()),
        Kind::Rings => several(TransportChoice::Ring, vec![]),
        Kind::Lending => several(TransportChoice::Ring, arenas()),
        Kind::Grpc => several(TransportChoice::Grpc, vec![]),
    }
}

/// Runs `f` for every device, each on a thread.
fn on_all<E: Transport + ?Sized>(ends: Vec<Box<E>>, f: impl Fn(usize, &mut E) + Sync)
where
    Box<E>: Send,
{
    std::thread::scope(|s| {
        for (me, mut end) in ends.into_iter().enumerate() {
            let f = &f;
            s.spawn(move || f(me, &mut end));
        }
    });
}

/// The bytes that `from` sends to `to` in a round.
fn pattern(from: usize, to: usize, round: usize, bytes: usize) -> Vec<u8> {
    let start = from * 31 + to * 17 + round * 7;
    (0..bytes).map(|i| (start + i + (i >> 8) * 3) as u8).collect()
}

/// One round: everyone sends `bytes` bytes to everyone.
fn all_to_all(
    end: &mut dyn Transport,
    me: usize,
    devices: usize,
    round: usize,
    bytes: usize,
) -> Result<(), TransportError> {
    let others: Vec<usize> = (0..devices).filter(|p| *p != me).collect();
    let out: Vec<Vec<u8>> = others.iter().map(|p| pattern(me, *p, round, bytes)).collect();
    let mut got: Vec<Vec<u8>> = others.iter().map(|_| vec![0u8; bytes]).collect();
    // SAFETY: both lists outlive `finish`.
    unsafe {
        for (peer, out) in others.iter().zip(&out) {
            end.send(0, *peer, out.as_ptr(), bytes)?;
        }
        for (peer, got) in others.iter().zip(&mut got).rev() {
            end.recv(0, *peer, got.as_mut_ptr(), bytes)?;
        }
    }
    end.finish(0)?;
    for (peer, got) in others.iter().zip(&got) {
        assert!(*got == pattern(*peer, me, round, bytes), "{me} was sent something else by {peer}");
    }
    Ok(())
}

#[test]
fn messages_of_a_pair_arrive_in_order_while_all_devices_exchange_at_once() {
    let devices = 4;
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, devices);
        on_all(ends, |me, end| {
            for round in 0..100u64 {
                let out: Vec<[u64; 2]> = (0..devices as u64).map(|to| [me as u64 * 100 + to, round]).collect();
                let mut got = vec![[0u64; 2]; devices];
                // SAFETY: both arrays outlive `finish`.
                unsafe {
                    for peer in (0..devices).filter(|p| *p != me) {
                        for half in 0..2 {
                            end.send(0, peer, (&raw const out[peer][half]).cast(), 8).unwrap();
                            end.recv(0, peer, (&raw mut got[peer][half]).cast(), 8).unwrap();
                        }
                    }
                }
                end.finish(0).unwrap();
                for peer in (0..devices).filter(|p| *p != me) {
                    assert_eq!(got[peer], [peer as u64 * 100 + me as u64, round], "{kind:?}");
                }
            }
        });
    }
}

#[test]
fn messages_of_every_size_arrive_whole() {
    let sizes = [0, 1, 23, 24, 25, 4095, (64 << 10) - 1, 64 << 10, (1 << 20) + 1, (5 << 20) + 3, 20 << 20];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            for (round, bytes) in sizes.into_iter().enumerate() {
                all_to_all(end, me, 2, round, bytes).unwrap();
            }
        });
    }
}

#[test]
fn small_and_large_messages_of_a_pair_stay_in_order() {
    let sizes = [10, 200_000, 0, 64 << 10, 3, (64 << 10) + 4, (1 << 20) + 2, 70_001, 8];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            let of = |from: usize| sizes.iter().enumerate().map(move |(i, n)| pattern(from, 1 - from, i, *n));
            let out: Vec<Vec<u8>> = of(me).collect();
            let mut got: Vec<Vec<u8>> = sizes.iter().map(|n| vec![0; *n]).collect();
            for _ in 0..3 {
                // SAFETY: both lists outlive `finish`.
                unsafe {
                    for (out, got) in out.iter().zip(&mut got) {
                        end.send(0, 1 - me, out.as_ptr(), out.len()).unwrap();
                        end.recv(0, 1 - me, got.as_mut_ptr(), got.len()).unwrap();
                    }
                }
                end.finish(0).unwrap();
                assert!(got.iter().cloned().eq(of(1 - me)), "{kind:?}");
                got.iter_mut().for_each(|g| g.fill(0));
            }
        });
    }
}

#[test]
fn what_is_borrowed_lies_with_the_sender_or_in_the_scratch() {
    let sizes = [100, 64 << 10, 5, 3 << 20, (64 << 10) + 1];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        on_all(ends, |me, end| {
            let others: Vec<usize> = (0..3).filter(|p| *p != me).collect();
            for round in 0..3 {
                let mut scratch: Vec<Vec<u8>> = vec![];
                let mut out = vec![];
                // SAFETY: all lists outlive `finish`.
                unsafe {
                    for &peer in &others {
                        for bytes in sizes {
                            out.push(pattern(me, peer, round, bytes));
                            end.send(0, peer, out.last().unwrap().as_ptr(), bytes).unwrap();
                        }
                    }
                    for &peer in &others {
                        for bytes in sizes {
                            scratch.push(vec![0; bytes]);
                            end.borrow(0, peer, scratch.last_mut().unwrap().as_mut_ptr(), bytes).unwrap();
                        }
                    }
                }
                let lie = end.borrowed(0).unwrap().to_vec();
                assert_eq!(lie.len(), scratch.len());
                for (i, at) in lie.into_iter().enumerate() {
                    let (peer, bytes) = (others[i / sizes.len()], sizes[i % sizes.len()]);
                    // SAFETY: so many bytes lie there until `finish`.
                    let got = unsafe { std::slice::from_raw_parts(at, bytes) };
                    assert!(got == pattern(peer, me, round, bytes), "{kind:?}: {bytes} bytes");
                    let lends = matches!(kind, Kind::Lending | Kind::LendingSiblings);
                    let elsewhere =
                        kind == Kind::InProcess && bytes > SMALL || lends && bytes >= 64 << 10 && bytes % 4 == 0;
                    assert_eq!(at != scratch[i].as_ptr(), elsewhere, "{kind:?}: {bytes} bytes");
                }
                end.finish(0).unwrap();
            }
        });
    }
}

#[test]
fn what_is_lent_is_not_done_before_it_is_given_back() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        let given_back = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 1 << 20];
            // SAFETY: the memory outlives `finish`.
            unsafe {
                if me == 0 {
                    end.send(0, 1, memory.as_ptr(), memory.len()).unwrap();
                } else {
                    end.borrow(0, 0, memory.as_mut_ptr(), memory.len()).unwrap();
                    end.borrowed(0).unwrap();
                    std::thread::sleep(Duration::from_millis(50));
                    given_back.store(true, Ordering::SeqCst);
                }
            }
            end.finish(0).unwrap();
            assert!(given_back.load(Ordering::SeqCst), "{kind:?}");
        });
    }
}

#[test]
fn an_abort_reaches_whoever_waits_for_a_loan_to_be_given_back() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 1 << 20];
            // SAFETY: the memory outlives `finish` and `abort`.
            unsafe {
                if me == 0 {
                    end.send(0, 1, memory.as_ptr(), memory.len()).unwrap();
                } else {
                    end.borrow(0, 0, memory.as_mut_ptr(), memory.len()).unwrap();
                    end.borrowed(0).unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                    return end.abort("out of paper");
                }
            }
            let told = TransportError::Aborted { device: 1, reason: "out of paper".into() };
            assert_eq!(end.finish(0), Err(told), "{kind:?}");
        });
    }
}

/// Batches begin one after the other and end in another order; more is on the way than any buffer holds.
#[test]
fn several_batches_are_under_way_and_end_in_an_order_that_all_keep_to() {
    let sizes = [[8, 200_000, 0], [64 << 10, 3, 5 << 20], [SMALL, SMALL + 1, 70_000], [(1 << 20) + 4, 12, 64 << 10]];
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        on_all(ends, |me, end| {
            let others: Vec<usize> = (0..3).filter(|p| *p != me).collect();
            for round in 0..3 {
                let of =
                    |from: usize, to: usize, b: usize, i: usize| pattern(from, to, round * 16 + b * 3 + i, sizes[b][i]);
                let (mut out, mut got) = (vec![], vec![vec![]; sizes.len()]);
                for (b, sizes) in sizes.iter().enumerate() {
                    for &peer in &others {
                        for (i, bytes) in sizes.iter().enumerate() {
                            out.push(of(me, peer, b, i));
                            // SAFETY: all lists outlive `finish`.
                            unsafe { end.send(b, peer, out.last().unwrap().as_ptr(), *bytes).unwrap() };
                        }
                    }
                    for &peer in &others {
                        for (i, bytes) in sizes.iter().enumerate() {
                            let mut memory = vec![0u8; *bytes];
                            // SAFETY: as above; what is pushed stays where its bytes lie.
                            unsafe {
                                match b % 2 {
                                    0 => end.recv(b, peer, memory.as_mut_ptr(), *bytes).unwrap(),
                                    _ => end.borrow(b, peer, memory.as_mut_ptr(), *bytes).unwrap(),
                                }
                            }
                            got[b].push((peer, i, memory));
                        }
                    }
                    end.progress().unwrap();
                }
                for b in [2, 1, 3, 0] {
                    if b % 2 == 1 {
                        for (at, (peer, i, memory)) in end.borrowed(b).unwrap().iter().zip(&got[b]) {
                            // SAFETY: so many bytes lie there until `finish`.
                            let found = unsafe { std::slice::from_raw_parts(*at, memory.len()) };
                            assert!(
                                found == of(*peer, me, b, *i),
                                "{kind:?}: message {i} of batch {b} from {peer} to {me}"
                            );
                        }
                        end.finish(b).unwrap();
                    } else {
                        end.finish(b).unwrap();
                        for (peer, i, memory) in &got[b] {
                            assert!(
                                *memory == of(*peer, me, b, *i),
                                "{kind:?}: message {i} of batch {b} from {peer} to {me}"
                            );
                        }
                    }
                }
            }
        });
    }
}

#[test]
fn a_loan_holds_up_its_own_batch_and_no_other() {
    for kind in [Kind::InProcess, Kind::LendingSiblings, Kind::Lending] {
        let (ends, _listeners) = ends(kind, 2);
        let told = mpsc::channel();
        let (tell, hear) = (std::sync::Mutex::new(Some(told.0)), std::sync::Mutex::new(told.1));
        let given_back = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut memory = vec![me as u8; 2 << 20];
            for batch in [1, 2] {
                // SAFETY: the memory outlives `finish`.
                unsafe {
                    let at = memory.as_mut_ptr().add((batch - 1) << 20);
                    match me {
                        0 => end.send(batch, 1, at, 1 << 20).unwrap(),
                        _ => end.borrow(batch, 0, at, 1 << 20).unwrap(),
                    }
                }
            }
            if me == 0 {
                // The later one is done first, while the earlier one is still looked at.
                end.finish(2).unwrap();
                drop(tell.lock().unwrap().take());
                end.finish(1).unwrap();
                assert!(given_back.load(Ordering::SeqCst), "{kind:?}");
            } else {
                end.borrowed(1).unwrap();
                end.borrowed(2).unwrap();
                end.finish(2).unwrap();
                let gone = hear.lock().unwrap().recv_timeout(Duration::from_secs(20));
                assert_eq!(gone, Err::<(), _>(mpsc::RecvTimeoutError::Disconnected), "{kind:?}");
                given_back.store(true, Ordering::SeqCst);
                end.finish(1).unwrap();
            }
        });
    }
}

#[test]
fn what_is_small_is_sent_before_anyone_takes_it() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 2);
        let sent = AtomicBool::new(false);
        on_all(ends, |me, end| {
            let mut got = [[me as u8; SMALL]; 300];
            for (batch, at) in got.iter_mut().enumerate() {
                // SAFETY: the memory outlives `finish`.
                unsafe {
                    match me {
                        0 => end.send(batch, 1, at.as_ptr(), at.len()).unwrap(),
                        _ => end.recv(batch, 0, at.as_mut_ptr(), at.len()).unwrap(),
                    }
                }
            }
            if me == 0 {
                (0..300).for_each(|batch| end.finish(batch).unwrap());
                sent.store(true, Ordering::SeqCst);
            } else {
                let begun = Instant::now();
                while !sent.load(Ordering::SeqCst) && begun.elapsed() < Duration::from_secs(20) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(sent.load(Ordering::SeqCst), "{kind:?}");
                (0..300).for_each(|batch| end.finish(batch).unwrap());
                assert!(got.as_flattened().iter().all(|b| *b == 0), "{kind:?}");
            }
        });
    }
}

#[test]
fn an_abort_ends_all_batches_that_are_under_way() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 3);
        let told = Err(TransportError::Aborted { device: 2, reason: "out of paper".into() });
        on_all(ends, |me, end| {
            // More than any link takes while nobody reads it.
            let (large, mut got) = (vec![1u8; 12 << 20], vec![0u8; 12 << 20]);
            for batch in 0..3 {
                // SAFETY: the bytes outlive `finish` and `abort`.
                unsafe {
                    match me {
                        0 => end.send(batch, 1, large.as_ptr(), large.len()).unwrap(),
                        1 => end.borrow(batch, if batch == 0 { 0 } else { 2 }, got.as_mut_ptr(), got.len()).unwrap(),
                        _ => {}
                    }
                }
            }
            match me {
                2 => {
                    std::thread::sleep(Duration::from_millis(50));
                    end.abort("out of paper");
                }
                1 => {
                    let _ = end.borrowed(0);
                    assert_eq!(end.borrowed(1).map(|_| ()), told, "{kind:?}");
                    assert_eq!(end.finish(2), told, "{kind:?}");
                }
                _ => {
                    assert_eq!(end.finish(1), told, "{kind:?}");
                    assert_eq!(end.finish(2), told, "{kind:?}");
                }
            }
        });
    }
}

#[test]
fn four_devices_with_more_on_the_way_than_any_buffer_holds_do_not_block_each_other() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 4);
        on_all(ends, |me, end| all_to_all(end, me, 4, 0, 12 << 20).unwrap());
    }
}

#[test]
fn an_abort_wakes_whoever_waits_also_behind_full_buffers() {
    for kind in KINDS {
        let (ends, _listeners) = ends(kind, 4);
        let told = Err(TransportError::Aborted { device: 2, reason: "out of paper".into() });
        on_all(ends, |me, end| {
            let (large, mut byte) = (vec![1u8; 20 << 20], 0u8);
            // SAFETY: the bytes outlive `finish` and `abort`.
            unsafe {
                match me {
                    // Wait for messages that never come, while others have sent more than fits.
                    0 => end.recv(0, 1, &raw mut byte, 1).unwrap(),
                    3 => end.recv(0, 0, &raw mut byte, 1).unwrap(),
                    // Waits for one that takes nothing.
                    1 => end.send(0, 3, large.as_ptr(), large.len()).unwrap(),
                    _ => {
                        std::thread::sleep(Duration::from_millis(50));
                        end.send(0, 0, large.as_ptr(), large.len()).unwrap();
                        std::thread::sleep(Duration::from_millis(50));
                        return end.abort("out of paper");
                    }
                }
            }
            assert_eq!(end.finish(0), told, "{kind:?}");
            assert_eq!(end.finish(0), told, "{kind:?}: it stays so");
        });
    }
}

#[test]
fn devices_of_different_plans_find_out() {
    for kind in KINDS {
        let (mut ends, _listeners) = ends(kind, 2);
        let (mut b, mut a) = (ends.pop().unwrap(), ends.pop().unwrap());
        let (out, mut got) = ([1u8; 4], [0u8; 8]);
        // SAFETY: both arrays outlive `finish`.
        unsafe {
            a.send(0, 1, out.as_ptr(), 4).unwrap();
            b.recv(0, 0, got.as_mut_ptr(), 8).unwrap();
        }
        if kind != Kind::InProcess {
            a.finish(0).unwrap();
        }
        let found = b.finish(0);
        assert_eq!(found, Err(TransportError::Disagreement { me: 1, peer: 0, expected: 8, sent: 4 }), "{kind:?}");
    }
}

#[test]
fn a_doom_stops_the_devices_of_its_process_and_they_tell_the_others() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        let (mine, doom) = (Doom::new(), Doom::new());
        let devices: Vec<Address> = listeners.iter().map(|l| l.address().clone()).collect();
        let run = |d: usize, doom: &Doom| {
            let roster = Roster { job: "test".into(), epoch: 1, devices: devices.clone(), mine: vec![d] };
            let mut end = listeners[d].connect(&roster, &options(choice), doom).unwrap().pop().unwrap();
            let mut byte = 0u8;
            // SAFETY: the byte outlives `finish`.
            unsafe { end.recv(0, 1 - d, &raw mut byte, 1).unwrap() };
            let e = end.finish(0).unwrap_err();
            end.abort(&e.to_string());
            e
        };
        std::thread::scope(|s| {
            let a = s.spawn(|| run(0, &mine));
            let b = s.spawn(|| run(1, &doom));
            std::thread::sleep(Duration::from_millis(100));
            doom.strike("the coordinator is gone");
            let doomed = TransportError::Doomed { me: 1, reason: "the coordinator is gone".into() };
            assert_eq!(a.join().unwrap(), TransportError::Aborted { device: 1, reason: doomed.to_string() });
            assert_eq!(b.join().unwrap(), doomed);
        });
    }
}

#[test]
fn listeners_serve_epoch_after_epoch_and_a_stale_one_is_refused() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        for epoch in [1, 2, 7] {
            let ends = connect(&listeners, epoch, choice, &Doom::new(), &[]).into_iter().map(Box::new).collect();
            on_all(ends, |me, end| all_to_all(end, me, 2, 0, 100_000).unwrap());
        }
        // A process that was away and has not heard of the new epoch.
        let old = listener();
        let devices = vec![listeners[0].address().clone(), old.address().clone()];
        let roster = |epoch, d| Roster { job: "test".into(), epoch, devices: devices.clone(), mine: vec![d] };
        match old.connect(&roster(3, 1), &options(choice), &Doom::new()).err() {
            Some(ConnectError::Refused { me: 1, peer: 0, reason, .. }) => {
                assert_eq!(reason, "epoch 3 of job `test` has passed; this process is in epoch 7");
            }
            other => panic!("{choice}: {other:?}"),
        }
        match listeners[0].connect(&roster(3, 0), &options(choice), &Doom::new()).err() {
            Some(ConnectError::Stale { epoch: 3, current: 7, .. }) => {}
            other => panic!("{choice}: {other:?}"),
        }
    }
}

#[test]
fn whoever_comes_early_waits_for_the_epoch() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let listeners = [listener(), listener()];
        let devices: Vec<Address> = listeners.iter().map(|l| l.address().clone()).collect();
        let roster = |d| Roster { job: "test".into(), epoch: 4, devices: devices.clone(), mine: vec![d] };
        std::thread::scope(|s| {
            let early = s.spawn(|| listeners[1].connect(&roster(1), &options(choice), &Doom::new()).unwrap());
            std::thread::sleep(Duration::from_millis(150));
            listeners[0].connect(&roster(0), &options(choice), &Doom::new()).unwrap();
            early.join().unwrap();
        });
    }
}

#[test]
fn another_build_is_refused_with_both_versions() {
    for choice in [TransportChoice::Ring, TransportChoice::Grpc] {
        let ours = listener();
        let version = Version { build: "0.0.9".into(), ..Version::default() };
        let theirs = ListenOptions { version, ..ListenOptions::default() };
        let theirs = Listener::bind(theirs, runtime().handle().clone()).unwrap();
        let devices = vec![ours.address().clone(), theirs.address().clone()];
        let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![1] };
        match theirs.connect(&roster, &options(choice), &Doom::new()).err() {
            Some(ConnectError::Refused { reason, .. }) => assert_eq!(
                reason,
                format!(
                    "build {} (data protocol 2) does not work with build 0.0.9 (data protocol 2); run the same build everywhere",
                    env!("CARGO_PKG_VERSION")
                )
            ),
            other => panic!("{choice}: {other:?}"),
        }
    }
}

#[test]
fn who_did_not_answer_is_named() {
    let l = listener();
    let nobody = Address { socket: "mesh-nobody".into(), grpc: "127.0.0.1:9".into(), ..l.address().clone() };
    let devices = vec![nobody.clone(), l.address().clone(), nobody];
    for (epoch, choice) in [(1, TransportChoice::Ring), (2, TransportChoice::Grpc)] {
        let roster = Roster { job: "test".into(), epoch, devices: devices.clone(), mine: vec![1] };
        let options = ConnectOptions { timeout: Duration::from_millis(300), ..options(choice) };
        let e = l.connect(&roster, &options, &Doom::new()).err().unwrap();
        let ConnectError::Unanswered { missing, .. } = &e else { panic!("{e}") };
        assert_eq!(missing.iter().map(|m| (m.me, m.peer)).collect::<Vec<_>>(), [(1, 0), (1, 2)]);
        let text = e.to_string();
        assert!(text.contains("device 0 at 127.0.0.1:9 (for device 1: "), "{text}");
        assert!(text.contains("refused"), "{text}");
        assert!(text.contains("device 2 at 127.0.0.1:9 (for device 1: it has not called)"), "{text}");
    }
}

#[test]
fn a_doom_ends_the_waiting_for_peers() {
    let l = listener();
    let roster = Roster {
        job: "test".into(),
        epoch: 1,
        devices: vec![l.address().clone(), listener().address().clone()],
        mine: vec![0],
    };
    let doom = Doom::new();
    std::thread::scope(|s| {
        let waits = s.spawn(|| l.connect(&roster, &options(TransportChoice::Auto), &doom).err());
        std::thread::sleep(Duration::from_millis(50));
        doom.strike("the job is over");
        let told = waits.join().unwrap();
        assert!(matches!(&told, Some(ConnectError::Doomed { reason }) if reason == "the job is over"), "{told:?}");
    });
}

#[test]
fn tensors_do_not_travel_in_the_clear_by_accident() {
    let open = ListenOptions { bind: ([0, 0, 0, 0], 0).into(), ..ListenOptions::default() };
    let bind = |options| Listener::bind(options, runtime().handle().clone());
    assert!(matches!(bind(open.clone()).err(), Some(ConnectError::Insecure { .. })));
    let advertised = |name: Option<&str>| {
        let options = ListenOptions { insecure: true, advertise: name.map(Into::into), ..open.clone() };
        bind(options).unwrap().address().grpc.clone()
    };
    assert!(advertised(Some("node7")).starts_with("node7:"));
    assert_eq!(advertised(Some("node7:80")), "node7:80");
    assert!(advertised(Some("fd00::7")).starts_with("[fd00::7]:"));
    assert!(!advertised(None).starts_with("0.0.0.0"));
}

#[test]
fn choices_are_spelled_as_they_are_read() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        assert_eq!(choice.to_string().parse(), Ok(choice));
    }
    assert!("tcp".parse::<TransportChoice>().is_err());
}

#[test]
fn a_device_knows_its_place_among_those_of_its_host() {
    let here = Address { host: "here".to_string().into(), socket: String::new(), grpc: String::new() };
    let there = Address { host: "there".to_string().into(), ..here.clone() };
    let devices = vec![here.clone(), there.clone(), there, here.clone(), here];
    let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![3] };
    assert_eq!([0, 1, 2, 3, 4].map(|d| roster.on_host(d)), [(0, 3), (0, 2), (1, 2), (1, 3), (2, 3)]);
}

#[test]
fn processes_with_several_devices_each_mix_links() {
    let listeners = [listener(), listener()];
    let of = [0, 1, 1, 0];
    let mut devices: Vec<Address> = of.iter().map(|l: &usize| listeners[*l].address().clone()).collect();
    // The second process claims to be elsewhere: rings inside, gRPC between.
    for d in [1, 2] {
        devices[d].host = "elsewhere".to_string().into();
    }
    std::thread::scope(|s| {
        for process in 0..2 {
            let mine: Vec<usize> = (0..4).filter(|d| of[*d] == process).collect();
            let roster = Roster { job: "test".into(), epoch: 1, devices: devices.clone(), mine };
            let listeners = &listeners;
            s.spawn(move || {
                let ends = listeners[process].connect(&roster, &options(TransportChoice::Auto), &Doom::new()).unwrap();
                std::thread::scope(|s| {
                    for mut end in ends {
                        s.spawn(move || {
                            let me = end.device();
                            (0..3).for_each(|round| all_to_all(&mut end, me, 4, round, 300_000).unwrap());
                        });
                    }
                });
            });
        }
    });
}

#[test]
fn collectives_give_the_same_bits_over_every_transport() {
    for (devices, under_way) in [(3, false), (4, false), (3, true)] {
        let mut whole = vec![];
        for segments in [Segments::All, Segments::Shared] {
            let reduced = KINDS.map(|kind| all_reduce(kind, devices, segments.clone(), under_way));
            assert!(reduced[0].iter().all(|r| *r == reduced[0][0]), "all devices have the same");
            assert!(reduced.iter().all(|r| *r == reduced[0]), "all transports give the same");
            whole = reduced[0][0].clone();
        }
        // By columns, which are no stretches, and by rows, which are; unevenly.
        let cut = |n: usize, d: usize| shard_chunks(n, devices, d);
        for columns in [true, false] {
            let part = |d: usize| if columns { (0..ROWS, cut(COLUMNS, d)) } else { (cut(ROWS, d), 0..COLUMNS) };
            let boxes = (0..devices).map(part).map(|(r, c)| BoxCopy {
                extents: vec![r.len(), c.len()],
                from: r.start * COLUMNS + c.start,
                from_strides: vec![COLUMNS, 1],
                to: 0,
                to_strides: vec![c.len(), 1],
            });
            let boxes = Segments::Boxes(boxes.collect());
            let expected: Vec<Vec<u32>> = (0..devices)
                .map(part)
                .map(|(r, c)| r.flat_map(|r| whole[r * COLUMNS..][c.clone()].to_vec()).collect())
                .collect();
            for kind in KINDS {
                assert!(
                    all_reduce(kind, devices, boxes.clone(), under_way) == expected,
                    "a reduce-scatter is a part of it"
                );
            }
        }
        let exchanged = KINDS.map(|kind| exchange(kind, devices, under_way));
        assert!(exchanged.iter().all(|r| *r == exchanged[0]));
    }
}

const ROWS: usize = 7;
const COLUMNS: usize = 10_003;

/// Every device's result of an all-reduce of values of very different sizes, as bits.
fn all_reduce(kind: Kind, devices: usize, segments: Segments, under_way: bool) -> Vec<Vec<u32>> {
    let elements = ROWS * COLUMNS;
    let tree = Tree { dims: vec![TreeDim { size: 8, chunks: 8 }], first: None };
    let owned: Vec<_> = (0..devices).map(|d| vec![shard_chunks(8, devices, d)]).collect();
    let nodes: Vec<usize> = owned.iter().map(|o| tree.nodes(o).len()).collect();
    let order = tree.finish(&owned);
    let (ends, _listeners) = ends(kind, devices);
    let (results, collected) = mpsc::channel();
    on_all(ends, |me, end| {
        let work = AllReduce {
            f: ReduceFn::Sum,
            dtype: DType::F32,
            elements,
            devices: (0..devices).collect(),
            nodes: nodes.clone().into(),
            me,
            order: order.clone().into(),
            segments: segments.clone(),
            under_way: under_way.then_some(2),
        };
        let value = |i: usize| ((i * 2654435761 + me * 97) % 1009) as f32 * 10f32.powi((i % 13) as i32 - 6);
        let input: Vec<f32> = (0..nodes[me] * elements).map(value).collect();
        let scattered = matches!(segments, Segments::Boxes(_));
        let mut output = vec![0f32; if scattered { work.segment_elements(me) } else { elements }];
        let mut scratch = vec![0u8; work.scratch_bytes()];
        let plan = AllReducePlan::new(&work);
        let pool = Pool::new(1, None);
        for _ in 0..3 {
            // SAFETY: the buffers are as large as the work says.
            unsafe {
                let [input, scratch] = [input.as_ptr().cast_mut().cast(), scratch.as_mut_ptr()];
                plan.run(&pool, end, input, output.as_mut_ptr().cast(), scratch).unwrap();
                if under_way {
                    end.progress().unwrap();
                    plan.combine(&pool, end, input, output.as_mut_ptr().cast(), scratch).unwrap();
                    plan.finish(end).unwrap();
                }
            }
        }
        results.send((me, output.iter().map(|v| v.to_bits()).collect())).unwrap();
    });
    drop(results);
    sorted(collected)
}

/// Every device's result of an all-to-all from rows to columns.
fn exchange(kind: Kind, devices: usize, under_way: bool) -> Vec<Vec<u32>> {
    let (rows, columns) = (40, 300 * devices);
    let part = columns / devices;
    let (ends, _listeners) = ends(kind, devices);
    let (results, collected) = mpsc::channel();
    on_all(ends, |me, end| {
        let bytes = rows * part * 4;
        let take = |peer: usize, to: usize| BoxCopy {
            extents: vec![rows, part],
            from: peer * part,
            from_strides: vec![columns, 1],
            to,
            to_strides: vec![part, 1],
        };
        let others = || (0..devices).filter(|p| *p != me);
        let work = Exchange {
            kind: ExchangeKind::AllToAll,
            element: 4,
            local: vec![take(me, me * rows * part)],
            sends: others()
                .map(|peer| {
                    let at = Wire::Staged { scratch: peer * bytes, copy: take(peer, 0) };
                    Message { peer, bytes, at }
                })
                .collect(),
            recvs: others().map(|peer| Message { peer, bytes, at: Wire::InPlace(peer * bytes) }).collect(),
            under_way: under_way.then_some(0),
        };
        let input: Vec<u32> = (0..rows * columns).map(|i| (i * 8 + me) as u32).collect();
        let mut output = vec![0u32; rows * columns];
        let mut scratch = vec![0u8; devices * bytes];
        let plan = ExchangePlan::new(&work);
        // SAFETY: the buffers are as large as the work says.
        unsafe {
            let (pool, output) = (Pool::new(1, None), output.as_mut_ptr().cast());
            plan.run(&pool, end, input.as_ptr().cast(), output, scratch.as_mut_ptr()).unwrap();
            if under_way {
                plan.finish(&pool, end, output).unwrap();
            }
        }
        results.send((me, output)).unwrap();
    });
    drop(results);
    sorted(collected)
}

fn sorted<T>(collected: mpsc::Receiver<(usize, T)>) -> Vec<T> {
    let mut all: Vec<_> = collected.into_iter().collect();
    all.sort_by_key(|(d, _)| *d);
    all.into_iter().map(|(_, r)| r).collect()
}

const CHILD: &str = "MESH_TEST_CHILD";

/// A process of the tests below: this binary again.
struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Process {
    fn start(role: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(CHILD, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The harness may have written on the same line before.
                if let Some((_, said)) = line.split_once('@') {
                    let _ = send.send(said.to_string());
                }
            }
        });
        Process { child, stdin, lines }
    }

    /// What the process says next.
    fn hear(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(20)).expect("the process says something")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts processes with a device each and tells them of one another, as a coordinator does.
fn start(devices: usize, choice: TransportChoice, scenario: &str) -> Vec<Process> {
    let mut all: Vec<Process> = (0..devices).map(|d| Process::start(&format!("{d} {choice} {scenario}"))).collect();
    let addresses: Vec<Address> = all.iter().map(|p| serde_json::from_str(&p.hear()).unwrap()).collect();
    for p in &mut all {
        writeln!(p.stdin, "{}", serde_json::to_string(&addresses).unwrap()).unwrap();
    }
    all
}

/// Not a test: what the processes of the tests below do.
#[test]
fn child() {
    let Ok(role) = std::env::var(CHILD) else { return };
    let mut words = role.split(' ');
    let me: usize = words.next().unwrap().parse().unwrap();
    let choice: TransportChoice = words.next().unwrap().parse().unwrap();
    let scenario = words.next().unwrap();
    let l = listener();
    println!("@{}", serde_json::to_string(l.address()).unwrap());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let devices: Vec<Address> = serde_json::from_str(&line).unwrap();
    let n = devices.len();
    let roster = Roster { job: "test".into(), epoch: 1, devices, mine: vec![me] };
    // Where the transport is left to choose, messages lie where a device's tensors lie.
    let arenas = if choice == TransportChoice::Auto { vec![arena()] } else { vec![] };
    let options = ConnectOptions { arenas: arenas.clone(), ..options(choice) };
    let end = l.connect(&roster, &options, &Doom::new()).unwrap().pop().unwrap();
    let mut end: Box<dyn Transport> = match arenas.into_iter().next() {
        Some(arena) => Box::new(FromArena::new(end, arena)),
        None => Box::new(end),
    };
    match scenario {
        "exchange" => {
            for (round, bytes) in [0, 1000, 100_000, 6 << 20, 10].into_iter().enumerate() {
                all_to_all(&mut *end, me, n, round, bytes).unwrap();
            }
            println!("@done");
            // What was sent last must arrive although the sender ends at once.
        }
        "forever" => {
            println!("@running");
            let failed = (0..).find_map(|round| all_to_all(&mut *end, me, n, round, 16 << 20).err()).unwrap();
            end.abort(&failed.to_string());
            println!("@{failed}");
            // Stays until it is killed: a broken socket must not be what tells the others.
            std::thread::sleep(Duration::from_secs(60));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn processes_exchange_over_rings_and_grpc() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        let mut all = start(3, choice, "exchange");
        for p in &mut all {
            assert_eq!(p.hear(), "done", "{choice}");
        }
        for p in &mut all {
            assert!(p.child.wait().unwrap().success(), "{choice}");
        }
    }
}

#[test]
fn the_death_of_a_process_in_the_middle_of_a_transfer_is_an_error_for_all_within_a_second() {
    for choice in [TransportChoice::Auto, TransportChoice::Ring, TransportChoice::Grpc] {
        let mut all = start(4, choice, "forever");
        for p in &all {
            assert_eq!(p.hear(), "running");
        }
        std::thread::sleep(Duration::from_millis(300));
        let mut dead = all.remove(2);
        let killed = Instant::now();
        dead.child.kill().unwrap();
        for p in &all {
            let said = p.hear();
            assert!(said.starts_with("W0008") || said.starts_with("W0001"), "{choice}: {said}");
            assert!(said.contains("has lost device 2"), "{choice}: {said}");
        }
        let took = killed.elapsed();
        assert!(took < Duration::from_secs(1), "{choice}: {took:?}");
    }
}
