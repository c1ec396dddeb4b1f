//! What every transport keeps to, in one process and between real ones.
#![cfg(target_os = "linux")]

mod batches;
mod collectives;
mod connecting;
mod messages;
mod processes;

use mesh::plan::Buffer;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Runtime;
use worker::arena::Arena;
use worker::transport::bell::Doom;
use worker::transport::connector::{self, Address, ConnectOptions, ListenOptions, Listener, Roster, TransportChoice};
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
