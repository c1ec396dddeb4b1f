//! Exchanges and all-reduces over a [`Transport`], at once or in the steps of one that goes on while others are done.

use crate::kernels::copy::CopyPlan;
use crate::kernels::join::combine;
use crate::pool::Pool;
use crate::transport::{Batch, Transport, TransportError};
use mesh::plan::{AllReduce, Exchange, Message, Segments, Wire, Work};

/// The batches of a collective: the first of those whose number it has, or of those that are finished at once; of an
/// all-reduce by shared segments the parts, and then the results.
fn batches(under_way: Option<usize>) -> [Batch; 2] {
    let number = under_way.map_or(0, |n| n + 1);
    [2 * number, 2 * number + 1]
}

/// The batches that a step posts to, and how many messages it borrows in each.
pub(crate) fn borrows(work: &Work) -> Vec<(Batch, usize)> {
    match work {
        Work::Exchange(e) => {
            let staged = e.recvs.iter().filter(|m| matches!(m.at, Wire::Staged { .. })).count();
            vec![(batches(e.under_way)[0], staged)]
        }
        Work::AllReduce(a) => {
            let nodes = (0..a.devices.len()).filter(|p| *p != a.me).map(|p| a.nodes[p]).sum();
            let [parts, results] = batches(a.under_way);
            vec![(parts, nodes), (results, 0)]
        }
        _ => vec![],
    }
}

/// A message with its packing prepared.
struct Mail {
    peer: usize,
    bytes: usize,
    at: Place,
}

enum Place {
    /// Offset in the tensor.
    Tensor(usize),
    /// Offset in the scratch, and the copy between there and the tensor.
    Scratch(usize, CopyPlan),
}

impl Mail {
    fn new(m: &Message, element: usize) -> Mail {
        let at = match &m.at {
            Wire::InPlace(offset) => Place::Tensor(*offset),
            Wire::Staged { scratch, copy } => Place::Scratch(*scratch, CopyPlan::new(copy, element)),
        };
        Mail { peer: m.peer, bytes: m.bytes, at }
    }
}

/// Boxes that move between devices, prepared.
pub struct ExchangePlan {
    under_way: Option<usize>,
    local: Vec<CopyPlan>,
    sends: Vec<Mail>,
    recvs: Vec<Mail>,
}

impl ExchangePlan {
    /// Prepares an exchange.
    pub fn new(work: &Exchange) -> ExchangePlan {
        ExchangePlan {
            under_way: work.under_way,
            local: work.local.iter().map(|c| CopyPlan::new(c, work.element)).collect(),
            sends: work.sends.iter().map(|m| Mail::new(m, work.element)).collect(),
            recvs: work.recvs.iter().map(|m| Mail::new(m, work.element)).collect(),
        }
    }

    /// Runs it, or begins it if it is to go on while other steps are done. What stays on the device is copied while messages
    /// are on their way.
    ///
    /// # Safety
    /// Input, output and scratch are buffers as large as the work says, which do not overlap. Until the end of
    /// [`ExchangePlan::finish`] nobody else writes to them.
    pub unsafe fn run(
        &self,
        pool: &Pool,
        transport: &mut dyn Transport,
        input: *const u8,
        output: *mut u8,
        scratch: *mut u8,
    ) -> Result<(), TransportError> {
        let [batch, _] = batches(self.under_way);
        // SAFETY: by this function's contract; what is posted stays as it is until `finish`.
        unsafe {
            for m in &self.sends {
                let from = match &m.at {
                    Place::Tensor(offset) => input.add(*offset),
                    Place::Scratch(offset, copy) => {
                        copy.run(pool, input, scratch.add(*offset));
                        scratch.add(*offset)
                    }
                };
                transport.send(batch, m.peer, from, m.bytes)?;
            }
            for m in &self.recvs {
                match &m.at {
                    Place::Tensor(offset) => transport.recv(batch, m.peer, output.add(*offset), m.bytes)?,
                    Place::Scratch(offset, _) => transport.borrow(batch, m.peer, scratch.add(*offset), m.bytes)?,
                }
            }
            for copy in &self.local {
                copy.run(pool, input, output);
            }
            if self.under_way.is_some() { Ok(()) } else { self.finish(pool, transport, output) }
        }
    }

    /// Finishes what [`ExchangePlan::run`] has begun.
    ///
    /// # Safety
    /// As for that.
    pub unsafe fn finish(
        &self,
        pool: &Pool,
        transport: &mut dyn Transport,
        output: *mut u8,
    ) -> Result<(), TransportError> {
        let [batch, _] = batches(self.under_way);
        let staged = self.recvs.iter().filter_map(|m| match &m.at {
            Place::Tensor(_) => None,
            Place::Scratch(_, copy) => Some(copy),
        });
        for (copy, from) in staged.zip(transport.borrowed(batch)?) {
            // SAFETY: by this function's contract; what is borrowed stays as it is until `finish`.
            unsafe { copy.run(pool, *from, output) };
        }
        transport.finish(batch)
    }
}

/// An all-reduce, prepared: everyone finishes a segment of the result, and sends it to all others; or a reduce-scatter, in
/// which it is what each is to have.
///
/// Roofline: memory. Of a result of `n` bytes on `p` devices with a node each, a device reads the `n` bytes that are to be
/// combined where their owners have them, writes `n/p`, and copies the other `n - n/p`: `3n` bytes in all. (What a link
/// carries is written and read twice more.)
pub struct AllReducePlan {
    work: AllReduce,
    /// By participant: its first node among all that the others send.
    first: Vec<usize>,
    /// By participant: the first element of its segment in a node, or in the scratch and the copy that brings it there.
    segments: Vec<Segment>,
}

enum Segment {
    Node(usize),
    Scratch(usize, CopyPlan),
}

impl AllReducePlan {
    /// Prepares an all-reduce.
    pub fn new(work: &AllReduce) -> AllReducePlan {
        let mut next = 0;
        let first = (0..work.devices.len())
            .map(|p| {
                let at = next;
                next += if p == work.me { 0 } else { work.nodes[p] };
                at
            })
            .collect();
        let segment = |p: usize| match (work.segment_start(p), &work.segments) {
            (None, Segments::Boxes(boxes)) => {
                Segment::Scratch(work.packed_start(p), CopyPlan::new(&boxes[p], work.dtype.bytes()))
            }
            (start, _) => Segment::Node(start.unwrap_or(0)),
        };
        AllReducePlan { work: work.clone(), first, segments: (0..work.devices.len()).map(segment).collect() }
    }

    /// Where this device's nodes of what participant `p` finishes begin, and how far apart they are, in elements.
    unsafe fn nodes_for(&self, p: usize, input: *const u8, scratch: *mut u8) -> (*const u8, usize) {
        let size = self.work.dtype.bytes();
        // SAFETY: by the contract of `run`.
        unsafe {
            match &self.segments[p] {
                Segment::Node(start) => (input.add(start * size), self.work.elements),
                Segment::Scratch(start, _) => (scratch.add(start * size).cast_const(), self.work.segment_elements(p)),
            }
        }
    }

    /// Runs it, or begins it if it is to go on while other steps are done: `input` is `[nodes, elements]`, `output` is
    /// `[elements]`, or this device's segment of that.
    ///
    /// # Safety
    /// Input, output and scratch are buffers as large as the work says, which do not overlap. Until the end of
    /// [`AllReducePlan::combine`] nobody else writes to input and scratch.
    pub unsafe fn run(
        &self,
        pool: &Pool,
        transport: &mut dyn Transport,
        input: *const u8,
        output: *mut u8,
        scratch: *mut u8,
    ) -> Result<(), TransportError> {
        let w = &self.work;
        let size = w.dtype.bytes();
        let own = w.segment_elements(w.me);
        let [parts, _] = batches(w.under_way);
        // SAFETY: by this function's contract; what is posted stays as it is until `finish`.
        unsafe {
            for (p, segment) in self.segments.iter().enumerate() {
                let elements = w.segment_elements(p);
                if let Segment::Scratch(start, copy) = segment {
                    for node in 0..w.nodes[w.me] {
                        let to = scratch.add((start + node * elements) * size);
                        copy.run(pool, input.add(node * w.elements * size), to);
                    }
                }
                let (first, apart) = self.nodes_for(p, input, scratch);
                for node in (0..w.nodes[w.me]).filter(|_| p != w.me) {
                    transport.send(parts, w.devices[p], first.add(node * apart * size), elements * size)?;
                }
            }
            for p in self.others() {
                for node in 0..w.nodes[p] {
                    let to = scratch.add((self.first[p] + node) * own * size);
                    transport.borrow(parts, w.devices[p], to, own * size)?;
                }
            }
            if w.under_way.is_some() {
                return Ok(());
            }
            self.combine(pool, transport, input, output, scratch)?;
        }
        self.finish(transport)
    }

    fn others(&self) -> impl Iterator<Item = usize> {
        let me = self.work.me;
        (0..self.work.devices.len()).filter(move |p| *p != me)
    }

    /// Waits for the parts, combines them, and sends the result on if others are to have it.
    ///
    /// # Safety
    /// As for [`AllReducePlan::run`]; of shared segments nobody writes to the output until the end of
    /// [`AllReducePlan::finish`].
    pub unsafe fn combine(
        &self,
        pool: &Pool,
        transport: &mut dyn Transport,
        input: *const u8,
        output: *mut u8,
        scratch: *mut u8,
    ) -> Result<(), TransportError> {
        let w = &self.work;
        let size = w.dtype.bytes();
        let own = w.segment_elements(w.me);
        let [received, results] = batches(w.under_way);
        // SAFETY: by this function's contract; what is posted stays as it is until `finish`.
        unsafe {
            let (mine, apart) = self.nodes_for(w.me, input, scratch);
            let parts = Parts { plan: self, mine, apart, others: transport.borrowed(received)? };
            let start = if w.segments == Segments::Shared { w.segment_start(w.me).unwrap_or(0) } else { 0 };
            let result = output.add(start * size);
            let part = |owner: usize, node: usize| parts.node(owner, node);
            combine(pool, (w.dtype, w.f), &w.order, &part, (result, own, 1));
            if w.segments == Segments::Shared {
                for p in self.others() {
                    transport.send(results, w.devices[p], result, own * size)?;
                    let (start, elements) = (w.segment_start(p).unwrap_or(0), w.segment_elements(p));
                    transport.recv(results, w.devices[p], output.add(start * size), elements * size)?;
                }
            }
        }
        transport.finish(received)
    }

    /// Waits for the others' segments of the result, if they are shared.
    pub fn finish(&self, transport: &mut dyn Transport) -> Result<(), TransportError> {
        let [_, results] = batches(self.work.under_way);
        if self.work.segments == Segments::Shared { transport.finish(results) } else { Ok(()) }
    }
}

/// What the participants hold of the segment that this device finishes.
struct Parts<'a> {
    plan: &'a AllReducePlan,
    /// The first one of this device's nodes, and how far apart they are.
    mine: *const u8,
    apart: usize,
    /// What the others have sent, in the order of participants and nodes.
    others: &'a [*const u8],
}
// SAFETY: tasks only read the parts.
unsafe impl Sync for Parts<'_> {}

impl Parts<'_> {
    /// Where a participant's node begins.
    fn node(&self, owner: usize, node: usize) -> *const u8 {
        let w = &self.plan.work;
        if owner != w.me {
            return self.others[self.plan.first[owner] + node];
        }
        // SAFETY: this device's nodes have a segment's elements each, so far apart.
        unsafe { self.mine.add(node * self.apart * w.dtype.bytes()) }
    }
}
