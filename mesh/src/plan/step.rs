//! What a device executes: steps over one arena, everything resolved to offsets.

use super::exchange::box_copy;
use crate::body::{Loop, Reduction};
use crate::chunk::{self, ChunkBox, Tree};
use crate::dim::{DType, Name, Type};
use crate::error::Place;
use crate::graph::NodeId;
use crate::ops::Prim;
use crate::ops::reduce::ReduceFn;
use crate::region::Region;
use std::collections::HashMap;
use std::sync::Arc;

/// A stretch of the arena. Offsets are multiples of [`ALIGN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Buffer {
    /// First byte.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// Alignment of buffers in bytes: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// A tensor, or the part of it that a device holds: contiguous, row-major in the type's order of dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The whole tensor's type.
    pub ty: Arc<Type>,
    /// What is held.
    pub region: Region,
}

/// One device's step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What to do.
    pub work: Work,
    /// Buffers read, in the work's order.
    pub inputs: Vec<Buffer>,
    /// Buffers written. One may be an input's where the work allows it.
    pub outputs: Vec<Buffer>,
    /// Room for intermediate results, as large as the backend asked for.
    pub scratch: Buffer,
    /// Where it comes from.
    pub label: Arc<Label>,
}

/// What a step is called on devices that have nothing to do with it, since it is another stage's.
pub const IDLE: &str = "idle";

/// Where a step comes from, for plans, traces and errors.
#[derive(Clone, Debug, PartialEq)]
pub struct Label {
    /// Name of the op, or of the collective.
    pub op: Name,
    /// Scope in the program.
    pub scope: Name,
    /// Place in the user's source.
    pub place: Place,
    /// Node of the function.
    pub node: NodeId,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// A fused elementwise loop; one output per result of its body.
    Map(Loop),
    /// A fused reduction; one output per result of its body.
    Reduce(Box<Reduction>),
    /// A primitive op on parts of its inputs.
    Op(Box<OpWork>),
    /// Copies of boxes within the device; what no box covers is `fill`.
    Copy(CopyWork),
    /// Steps that are done slice by slice.
    Band(Band),
    /// Moves boxes between devices, or begins to.
    Exchange(Arc<Exchange>),
    /// Finishes sums (maxima, minima) whose parts several devices hold, or begins to: an all-reduce along the summation tree.
    AllReduce(Arc<AllReduce>),
    /// Waits for the parts of sums that were begun, combines them, and sends the results on if others are to have them.
    Combine(Arc<AllReduce>),
    /// Waits for what was begun.
    Finish(Begun),
    /// Joins parts of a sum that the device made one after the other.
    Join(Join),
}

/// A collective that goes on while other steps are done.
#[derive(Clone, Debug, PartialEq)]
pub enum Begun {
    /// Boxes on their way.
    Exchange(Arc<Exchange>),
    /// Results of sums on their way.
    AllReduce(Arc<AllReduce>),
}

impl Step {
    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        *self.label.op == *IDLE
    }
}

impl Work {
    /// What it posts to one other device, the one that gets most, where a message of so many bytes counts so much.
    fn posts(&self, counts: &impl Fn(usize) -> usize) -> usize {
        match self {
            Work::Exchange(e) => {
                let mut to: HashMap<usize, usize> = HashMap::new();
                e.sends.iter().for_each(|m| *to.entry(m.peer).or_default() += counts(m.bytes));
                to.into_values().max().unwrap_or(0)
            }
            Work::AllReduce(a) | Work::Combine(a) => {
                let bytes = |p: usize| counts(a.segment_elements(p) * a.dtype.bytes());
                let parts = (0..a.devices.len()).map(|p| a.nodes[a.me].max(1) * bytes(p)).max().unwrap_or(0);
                let begins = matches!(self, Work::AllReduce(_));
                // The results follow where the parts are combined.
                usize::from(begins) * parts + usize::from(!self.begins()) * bytes(a.me)
            }
            Work::Map(_)
            | Work::Reduce(_)
            | Work::Op(_)
            | Work::Copy(_)
            | Work::Band(_)
            | Work::Join(_)
            | Work::Finish(_) => 0,
        }
    }

    /// The number of the collective under way that it is a step of; None for all else.
    pub fn under_way(&self) -> Option<usize> {
        match self {
            Work::Exchange(e) | Work::Finish(Begun::Exchange(e)) => e.under_way,
            Work::AllReduce(a) | Work::Combine(a) | Work::Finish(Begun::AllReduce(a)) => a.under_way,
            Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) | Work::Band(_) | Work::Join(_) => None,
        }
    }

    /// Whether it begins a collective that a later step finishes.
    pub fn begins(&self) -> bool {
        matches!(self, Work::Exchange(_) | Work::AllReduce(_)) && self.under_way().is_some()
    }

    /// Whether it is the last step of a collective, or all of it.
    pub fn ends(&self) -> bool {
        match self {
            Work::Exchange(_) | Work::AllReduce(_) => self.under_way().is_none(),
            Work::Combine(a) => a.segments != Segments::Shared,
            Work::Finish(_) => true,
            Work::Map(_) | Work::Reduce(_) | Work::Op(_) | Work::Copy(_) | Work::Band(_) | Work::Join(_) => false,
        }
    }
}

impl DevicePlan {
    /// The most that it has on its way to one other device at a time, where a message of so many bytes counts so much.
    pub fn most_posted(&self, counts: impl Fn(usize) -> usize) -> usize {
        let (mut most, mut now) = (0, 0);
        let mut open: HashMap<usize, usize> = HashMap::new();
        for work in self.steps.iter().map(|s| &s.work) {
            let posted = work.posts(&counts);
            most = most.max(now + posted);
            let Some(number) = work.under_way() else { continue };
            *open.entry(number).or_default() += posted;
            now += posted;
            if work.ends() {
                now -= open.remove(&number).unwrap_or(0);
            }
        }
        most
    }
}

/// A primitive op on parts of its inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct OpWork {
    /// The op.
    pub op: Prim,
    /// What is held of each input: at least what the op needs for `at`.
    pub inputs: Vec<Part>,
    /// What is computed: the result's type and the region of it.
    pub output: Part,
    /// For an op that sums over dimensions: its tree and the chunks summed here. The output then is
    /// `[nodes, region..]` for the tree's nodes inside those chunks.
    pub sum: Option<(Tree, ChunkBox)>,
    /// What takes the result where it is made, block by block, so that only its own results are stored.
    pub epilogue: Option<Epilogue>,
    /// Which elements of its result it computes.
    pub share: Share,
    /// Where its first input lies, if it is not one array: what came from other devices is the step's first input, and what
    /// the device has itself is read where it lies, an input behind the op's.
    pub pieces: Vec<Piece>,
}

/// A loop that takes an op's result where it is made. Its last operand is that result, whose elements are its points, in
/// order; the step reads the others after the op's inputs.
#[derive(Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Its results are stored.
    Map(Loop),
    /// Some are reduced: over the two loops before the innermost one, which is kept, and maybe others. Of a convolution of as
    /// many spatial dimensions.
    Reduce(Box<Reduction>),
}

impl Epilogue {
    /// The loop.
    pub fn nest(&self) -> &Loop {
        match self {
            Epilogue::Map(nest) => nest,
            Epilogue::Reduce(r) => &r.nest,
        }
    }
}

/// The same loop by itself, of a result that lies in memory.
impl From<Epilogue> for Work {
    fn from(epilogue: Epilogue) -> Work {
        match epilogue {
            Epilogue::Map(nest) => Work::Map(nest),
            Epilogue::Reduce(r) => Work::Reduce(r),
        }
    }
}

/// A box of an op's input that is an array of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The box.
    pub region: Region,
    /// Which of the step's inputs it lies in.
    pub input: usize,
    /// Its first byte there.
    pub first: usize,
}

impl Piece {
    /// Its place in an array of what is held.
    pub fn into_whole(&self, held: &Region) -> BoxCopy {
        box_copy(&self.region, &self.region, held)
    }
}

impl OpWork {
    /// How many of a step's inputs are the op's; an epilogue's are behind them.
    pub fn reads(&self) -> usize {
        self.inputs.len() + usize::from(!self.pieces.is_empty())
    }

    /// Which part of its result's elements it computes: 1 for all of them.
    pub fn computed(&self) -> f64 {
        let inside = |r: &Region| r.elements() as f64 / self.output.region.elements().max(1) as f64;
        match &self.share {
            Share::Whole => 1.0,
            Share::Interior(region) => inside(region),
            Share::Rim(region) => 1.0 - inside(region),
        }
    }
}

/// Which elements of an op's result a step computes. Each element has the same bits, whoever computes it.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Share {
    /// All of them.
    #[default]
    Whole,
    /// Those of a box that is less than all: they need nothing of what is on its way from other devices.
    Interior(Region),
    /// Those that a step before, with the same box, has left.
    Rim(Region),
}

/// Steps that a thread does one after the other on a slice of what they compute, in memory of its own. Slices are
/// independent of each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Band {
    /// By shape of slice.
    pub slices: Vec<Slices>,
}

impl Band {
    /// Bytes that a thread needs for the slice that it does.
    pub fn room(&self) -> usize {
        self.slices.iter().map(|s| s.room).max().unwrap_or(0).next_multiple_of(ALIGN)
    }

    /// How many slices there are.
    pub fn count(&self) -> usize {
        self.slices.iter().map(|s| s.at.len()).sum()
    }
}

/// Slices of one shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Slices {
    /// The steps of the first one.
    pub steps: Vec<SliceStep>,
    /// Stretches of a thread's room: values of a slice, and scratch.
    pub buffers: Vec<Buffer>,
    /// Bytes that they take.
    pub room: usize,
    /// By slice: how far it lies from the first one along each dimension that is cut.
    pub at: Vec<Vec<usize>>,
}

/// A step of a band on a slice.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceStep {
    /// What to do.
    pub work: Work,
    /// Where it reads, in the work's order.
    pub inputs: Vec<At>,
    /// Where it writes.
    pub outputs: Vec<At>,
    /// Room for intermediate results: which of the slice's buffers.
    pub scratch: usize,
    /// By dimension that is cut: the loop of its nest that runs along it.
    pub loops: Vec<Option<usize>>,
    /// Name of the op.
    pub name: Name,
}

/// Where an operand of a step of a band lies.
#[derive(Clone, Debug, PartialEq)]
pub enum At {
    /// In one of the slice's buffers.
    Inside(usize),
    /// In an input or a result of the band.
    Outside {
        /// Which one.
        operand: usize,
        /// Bytes by which it lies further on, by dimension that is cut, for every index.
        strides: Vec<usize>,
    },
}

/// Copies of boxes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CopyWork {
    /// Bytes of an element.
    pub element: usize,
    /// The element (in its first `element` bytes) that fills the output first; None if the boxes cover everything.
    pub fill: Option<[u8; 4]>,
    /// Which input each box comes from, and the box.
    pub boxes: Vec<(usize, BoxCopy)>,
}

/// A box copied from one row-major array to another; offsets and strides in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoxCopy {
    /// Extents, outermost first.
    pub extents: Vec<usize>,
    /// First element read.
    pub from: usize,
    /// Strides read.
    pub from_strides: Vec<usize>,
    /// First element written.
    pub to: usize,
    /// Strides written.
    pub to_strides: Vec<usize>,
}

impl BoxCopy {
    /// Whether what is read is one stretch.
    pub fn is_contiguous(&self) -> bool {
        let mut next = 1;
        self.extents.iter().zip(&self.from_strides).rev().all(|(n, stride)| {
            let follows = *n == 1 || *stride == next;
            next *= n;
            follows
        })
    }
}

/// Boxes that move between devices: halo exchange, all-gather, all-to-all, permute, slice. One input, one output.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// What the pattern is called.
    pub kind: ExchangeKind,
    /// Bytes of an element.
    pub element: usize,
    /// Boxes that stay on the device: input to output.
    pub local: Vec<BoxCopy>,
    /// Messages to others, by peer. Both sides list the messages between a pair in the same order.
    pub sends: Vec<Message>,
    /// Messages from others, by peer.
    pub recvs: Vec<Message>,
    /// If it goes on while other steps are done: which of those under way at a time it is.
    pub under_way: Option<usize>,
}

/// The pattern of an exchange, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExchangeKind {
    /// Devices fetch the rim of their block from neighbours.
    Halo,
    /// Devices end up with more than they had, all of it along some dimension.
    AllGather,
    /// One dimension's split becomes another's.
    AllToAll,
    /// Blocks change owners.
    Permute,
    /// Nothing is sent: devices keep a part of what they have.
    Slice,
    /// Devices get what they had nothing of: from another stage of a pipeline.
    Send,
}

impl ExchangeKind {
    /// `halo`, `all-gather`.
    pub fn name(self) -> &'static str {
        match self {
            ExchangeKind::Halo => "halo",
            ExchangeKind::AllGather => "all-gather",
            ExchangeKind::AllToAll => "all-to-all",
            ExchangeKind::Permute => "permute",
            ExchangeKind::Slice => "slice",
            ExchangeKind::Send => "send",
        }
    }
}

/// A message: a box of the sender's input that becomes a box of the receiver's output.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The other device.
    pub peer: usize,
    /// Bytes on the wire.
    pub bytes: usize,
    /// Where the bytes lie.
    pub at: Wire,
}

/// Where a message's bytes lie.
#[derive(Clone, Debug, PartialEq)]
pub enum Wire {
    /// The box is contiguous in the tensor's buffer, from this byte on: sent from and received into its place.
    InPlace(usize),
    /// The box is packed into (or unpacked from) the step's scratch, from that byte on.
    Staged {
        /// First byte in the scratch.
        scratch: usize,
        /// Tensor to scratch for a send, scratch to tensor for a receive (offsets on the scratch side from its byte above).
        copy: BoxCopy,
    },
}

/// Who finishes which elements of an all-reduce. The bits are the same, since each element is combined by the same tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Segments {
    /// Everyone all of them: for small ones.
    All,
    /// Everyone an even share, whose results go to the others.
    Shared,
    /// Everyone what it is to have in the end, a box of what all hold parts of: a reduce-scatter. By participant, the
    /// copy of the box into a place of its own.
    Boxes(Vec<BoxCopy>),
}

/// An all-reduce along the summation tree, or a reduce-scatter.
///
/// Participant `p` holds `[nodes[p], elements]`, and finishes a segment of that ([`AllReduce::segment_elements`]),
/// combined by `order`. Everyone gets `[elements]`, or its own segment.
#[derive(Clone, Debug, PartialEq)]
pub struct AllReduce {
    /// How parts are combined.
    pub f: ReduceFn,
    /// Element type (`f32`, `i32` or `bool`).
    pub dtype: DType,
    /// Elements of a node.
    pub elements: usize,
    /// Devices that take part, in order.
    pub devices: Arc<[usize]>,
    /// Nodes that each holds.
    pub nodes: Arc<[usize]>,
    /// Which participant this device is.
    pub me: usize,
    /// The combination: a stack machine over (participant, node).
    pub order: Arc<[chunk::Finish]>,
    /// Who finishes what.
    pub segments: Segments,
    /// If it goes on while other steps are done: which of those under way at a time it is.
    pub under_way: Option<usize>,
}

impl AllReduce {
    /// `all-reduce`, or `reduce-scatter`.
    pub fn name(&self) -> &'static str {
        match self.segments {
            Segments::All | Segments::Shared => "all-reduce",
            Segments::Boxes(_) => "reduce-scatter",
        }
    }

    /// Elements that participant `p` finishes.
    pub fn segment_elements(&self, p: usize) -> usize {
        match &self.segments {
            Segments::All => self.elements,
            Segments::Shared => chunk::chunk_range(self.elements, self.devices.len(), p).len(),
            Segments::Boxes(boxes) => boxes[p].extents.iter().product(),
        }
    }

    /// The first element of what participant `p` finishes, if it is one stretch of a node.
    pub fn segment_start(&self, p: usize) -> Option<usize> {
        match &self.segments {
            Segments::All => Some(0),
            Segments::Shared => Some(chunk::chunk_range(self.elements, self.devices.len(), p).start),
            Segments::Boxes(boxes) => boxes[p].is_contiguous().then_some(boxes[p].from),
        }
    }

    /// The first element in the scratch, behind what is received, of this device's nodes of what participant `p`
    /// finishes, one after the other: where that is no stretch of a node it is put together there.
    pub fn packed_start(&self, p: usize) -> usize {
        let packed = (0..p).filter(|q| self.segment_start(*q).is_none()).map(|q| self.segment_elements(q));
        self.received() + self.nodes[self.me] * packed.sum::<usize>()
    }

    /// Elements that are received to be combined.
    fn received(&self) -> usize {
        let others: usize = (0..self.devices.len()).filter(|p| *p != self.me).map(|p| self.nodes[p]).sum();
        others * self.segment_elements(self.me)
    }

    /// Bytes of scratch: what is received from the others, participant after participant, node after node; and what is
    /// put together for them.
    pub fn scratch_bytes(&self) -> usize {
        self.packed_start(self.devices.len()) * self.dtype.bytes()
    }

    /// Bytes that this device sends.
    pub fn sent_bytes(&self) -> usize {
        let others = (0..self.devices.len()).filter(|p| *p != self.me);
        let parts: usize = others.clone().map(|p| self.nodes[self.me] * self.segment_elements(p)).sum();
        let results = match self.segments {
            Segments::Shared => others.count() * self.segment_elements(self.me),
            Segments::All | Segments::Boxes(_) => 0,
        };
        (parts + results) * self.dtype.bytes()
    }
}

/// Nodes of a summation tree that are joined as far as they make larger ones. Input `i` is `[nodes, elements]`; the result
/// is `[places, elements]`, first what is left, and may lie in the place of an input that is as large.
#[derive(Clone, Debug, PartialEq)]
pub struct Join {
    /// How nodes are combined.
    pub f: ReduceFn,
    /// Element type (`f32`, `i32` or `bool`).
    pub dtype: DType,
    /// Elements of a node.
    pub elements: usize,
    /// The combination: a stack machine over (input, node). What lies on the stack in the end is the result.
    pub order: Arc<[chunk::Finish]>,
    /// Places for nodes in the result; those that are left over are zero.
    pub places: usize,
}

impl Join {
    /// Nodes that are read, and those that are left.
    pub fn nodes(&self) -> (usize, usize) {
        let taken = self.order.iter().filter(|f| matches!(f, chunk::Finish::Take { .. })).count();
        (taken, taken - (self.order.len() - taken))
    }
}

/// What the planner asks of a backend.
pub trait Backend: Sync {
    /// Scratch bytes that the backend needs for an op, a map or a reduction on a device.
    fn scratch_bytes(&self, work: &Work) -> usize;
    /// Bytes of the workspaces that a device keeps for its threads, whatever it runs.
    fn workspace_bytes(&self) -> usize;
    /// Threads of a device, which share out the slices of a band.
    fn threads(&self) -> usize {
        1
    }
}

/// The plan of one device for one function.
#[derive(Clone, Debug, Default)]
pub struct DevicePlan {
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Bytes of the arena that the function uses, from its start: variables, feeds, values and scratch.
    pub arena_bytes: usize,
    /// Feeds: name, part held and buffer.
    pub inputs: Vec<(Name, Part, Buffer)>,
    /// Fetches: name, part held and buffer.
    pub outputs: Vec<(Name, Part, Buffer)>,
}
