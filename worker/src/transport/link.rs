//! What a switchboard asks of a link.

use super::TransportError;

/// The most bytes that one call of [`Link::write`] or [`Link::read`] moves between a message's memory and a ring, so
/// that both sides of a large message work at once. Measured: less wakes too often, more keeps the peer waiting.
pub const PIECE: usize = 256 << 10;

/// One device's end of a pair of ordered pipes of bytes, to and from one peer. Nothing here waits for the peer.
///
/// Whenever the peer has done something that may matter, the device's [`Bell`](super::bell::Bell) rings.
pub trait Link: Send {
    /// What it is, for people.
    fn kind(&self) -> &'static str;

    /// Takes as many of the bytes as there is room for now, and says how many.
    ///
    /// # Safety
    /// The bytes are readable, and stay so and unchanged until [`Link::settled`] says true of the message or
    /// [`Link::release`] has returned.
    unsafe fn write(&mut self, from: *const u8, bytes: usize) -> Result<usize, TransportError>;

    /// Gives as many of the next bytes as are there now, `bytes` at most, and says how many.
    ///
    /// # Safety
    /// `bytes` bytes are writable.
    unsafe fn read(&mut self, to: *mut u8, bytes: usize) -> Result<usize, TransportError>;

    /// Lends a message to the peer instead of writing it: the place to name in its envelope. None if the link has to
    /// carry the bytes.
    ///
    /// # Safety
    /// As for [`Link::write`].
    unsafe fn lend(&mut self, _from: *const u8, _bytes: usize) -> Result<Option<u64>, TransportError> {
        Ok(None)
    }

    /// Where the bytes lie that the peer lends at that place; None if there are no such bytes. They stay readable while
    /// the link lives, and are what the peer sent until [`Link::give_back`].
    fn borrow(&self, _place: u64, _bytes: usize) -> Option<*const u8> {
        None
    }

    /// Tells the peer that a message that it has lent is not looked at any more: the loan of that number, counted from 0 in
    /// the order in which they came.
    fn give_back(&mut self, _loan: u64) {}

    /// Makes sure that the peer learns of what was written, read and given back.
    fn flush(&mut self);

    /// A message ends here, whose last byte (or if it is lent, its envelope's) was written: a number to ask
    /// [`Link::settled`] by, or None if nobody looks at its bytes any more.
    fn end(&mut self) -> Option<u64>;

    /// Whether the bytes of the message of that number are not looked at any more.
    fn settled(&self, message: u64) -> bool;

    /// Stops looking at anything that was written, sent or not. (A peer may still look at what was lent to it, for memory
    /// that is lent outlives the link.)
    fn release(&mut self);

    /// Whether the peer has given up: the device that was the first, and its reason.
    fn aborted(&self) -> Option<(usize, String)>;

    /// How it is known that the peer is gone, if it is. What it had sent before may still be read.
    fn lost(&mut self) -> Option<String>;

    /// Leaves word that device `device` has given up.
    fn abort(&mut self, device: usize, reason: &str);

    /// Says that nothing more will be written; true once what was written is with the peer, or never will be. Called
    /// again until then.
    fn close(&mut self) -> bool;
}

/// What stands before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The sender's epoch.
    pub epoch: u64,
    /// Messages that the sender sent to this receiver before.
    pub sequence: u64,
    /// Bytes of the message.
    pub length: u64,
    /// The place at which the sender lends the bytes; None if they follow.
    pub lent: Option<u64>,
}

/// In the place of none.
const CARRIED: u64 = u64::MAX;

impl Envelope {
    /// Bytes on the wire.
    pub const BYTES: usize = 32;

    /// On the wire.
    pub fn encode(self) -> [u8; Envelope::BYTES] {
        let mut out = [0; Envelope::BYTES];
        let words = [self.epoch, self.sequence, self.length, self.lent.unwrap_or(CARRIED)];
        for (to, word) in out.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// From the wire. Whatever the bytes are, they are some envelope; the receiver knows which one must come.
    pub fn decode(bytes: &[u8; Envelope::BYTES]) -> Envelope {
        let word = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
            u64::from_le_bytes(word)
        };
        Envelope { epoch: word(0), sequence: word(1), length: word(2), lent: Some(word(3)).filter(|w| *w != CARRIED) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn envelopes_survive_the_wire(epoch: u64, sequence: u64, length: u64, lent in prop::option::of(0..u64::MAX)) {
            let envelope = Envelope { epoch, sequence, length, lent };
            prop_assert_eq!(Envelope::decode(&envelope.encode()), envelope);
        }
    }
}
