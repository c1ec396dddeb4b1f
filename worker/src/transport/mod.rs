//! How bytes move between devices.
//!
//! A [`Transport`] is one device's end. Sends and receives are posted in batches, each of which is finished as a whole, so
//! that an implementation may move them in any order and overlap them. Several batches may be under way, and what the device
//! does between posting and finishing overlaps with the moving. Between a pair of devices messages arrive in the order
//! in which they were posted, of whatever batches they are, and both sides know every message's length from the plan.
//!
//! | module | what it is |
//! |---|---|
//! | [`in_process`] | devices of one process, which read each other's memory |
//! | [`connector`] | finds the peers of an epoch and makes a switchboard for each device of this process |
//! | [`switchboard`] | one device's end, over one link a peer: headers, order, abort, waiting |
//! | [`link`](mod@link) | what a switchboard asks of a link: an ordered pipe of bytes that never blocks |
//! | [`ring`] | the link between processes of one host: rings in shared memory |
//! | [`grpc`] | the link between hosts: a gRPC stream with credits |
//! | [`bell`] | what a device sleeps on, and the word that ends an epoch |
//! | `lobby` | where those who have dialled wait for their epoch |
//! | `meeting` | the devices of an epoch on their way to each other |
//! | `memory` | memory that processes share, or lend to be looked at |
//! | `socket` | messages with file descriptors, between processes that meet |

#[cfg(target_os = "linux")]
pub mod bell;
#[cfg(target_os = "linux")]
pub mod connector;
#[cfg(target_os = "linux")]
pub mod grpc;
pub mod in_process;
#[cfg(target_os = "linux")]
pub mod link;
#[cfg(target_os = "linux")]
mod lobby;
#[cfg(target_os = "linux")]
mod meeting;
#[cfg(target_os = "linux")]
pub(crate) mod memory;
#[cfg(target_os = "linux")]
pub mod ring;
#[cfg(target_os = "linux")]
mod socket;
#[cfg(target_os = "linux")]
pub mod switchboard;

pub use in_process::InProcess;

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
    /// A message of another epoch.
    #[error(
        "W0005: device {me} is in epoch {expected} and was sent a message of epoch {sent} by device {peer}; whoever is in the older epoch must stop"
    )]
    StaleEpoch {
        /// The receiver.
        me: usize,
        /// The sender.
        peer: usize,
        /// The receiver's epoch.
        expected: u64,
        /// The message's epoch.
        sent: u64,
    },
    /// A message was lost, or came twice.
    #[error("W0006: device {me} expects message {expected} of device {peer} and was sent message {sent}")]
    OutOfOrder {
        /// The receiver.
        me: usize,
        /// The sender.
        peer: usize,
        /// The number that comes next.
        expected: u64,
        /// The number in the header.
        sent: u64,
    },
    /// A peer breaks the rules of the link.
    #[error("W0007: what device {me} shares with device {peer} is corrupt: {what}")]
    Corrupt {
        /// Who noticed.
        me: usize,
        /// The other side.
        peer: usize,
        /// What was found.
        what: String,
    },
    /// A peer is gone.
    #[error("W0008: device {me} has lost device {peer}: {detail}")]
    Lost {
        /// Who noticed.
        me: usize,
        /// Who is gone.
        peer: usize,
        /// How it was noticed.
        detail: String,
    },
    /// The plan wants to talk to a device that there is no link to.
    #[error("W0009: device {me} has no link to device {peer}; the plan is for another mesh than the connections")]
    Unconnected {
        /// The device.
        me: usize,
        /// The other one.
        peer: usize,
    },
    /// This process was told to stop its devices.
    #[error("W0010: device {me} was told to stop: {reason}")]
    Doomed {
        /// The device.
        me: usize,
        /// Why.
        reason: String,
    },
}

/// What is posted and finished together: a number that the caller chooses. Transports keep lists by it, so it is small. Both
/// ends of a message may choose different ones.
pub type Batch = usize;

/// One device's end of the data plane.
pub trait Transport: Send {
    /// Posts the sending of `bytes` bytes to device `to`.
    ///
    /// # Safety
    /// The bytes stay readable and unchanged until [`Transport::finish`] of the batch returns; the transport says what holds
    /// after an error.
    unsafe fn send(&mut self, batch: Batch, to: usize, from: *const u8, bytes: usize) -> Result<(), TransportError>;

    /// Posts the receiving of `bytes` bytes from device `from`.
    ///
    /// # Safety
    /// The bytes stay writable, and nobody else touches them, until [`Transport::finish`] of the batch returns.
    unsafe fn recv(&mut self, batch: Batch, from: usize, to: *mut u8, bytes: usize) -> Result<(), TransportError>;

    /// Posts the receiving of `bytes` bytes from device `from` that are only looked at until [`Transport::finish`] of the
    /// batch: they may stay where the sender has them. `scratch` takes them where they cannot.
    ///
    /// # Safety
    /// As for [`Transport::recv`].
    unsafe fn borrow(
        &mut self,
        batch: Batch,
        from: usize,
        scratch: *mut u8,
        bytes: usize,
    ) -> Result<(), TransportError>;

    /// Waits until all that was posted in a batch with [`Transport::borrow`] is there, and says where each lies, in the order
    /// of posting. It stays there, readable and unchanged, until [`Transport::finish`] of the batch is called.
    fn borrowed(&mut self, batch: Batch) -> Result<&[*const u8], TransportError>;

    /// Gives back what was borrowed in a batch, and waits until all that was posted in it is done. Other batches stay under
    /// way; all devices that have messages in several finish these in the same order.
    fn finish(&mut self, batch: Batch) -> Result<(), TransportError>;

    /// Moves what can be moved now, of any batch, and waits for nothing.
    fn progress(&mut self) -> Result<(), TransportError>;

    /// Nanoseconds so far in which there was nothing to move: others were late, took their time to read what they were
    /// sent, or had bytes on their way.
    fn waited_ns(&self) -> u64;

    /// Tells everyone that this device cannot go on; whoever waits is woken with [`TransportError::Aborted`].
    fn abort(&mut self, reason: &str);
}
