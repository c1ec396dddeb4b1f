//! What operations, bytes and messages cost in time: what findings of unlike kinds are compared by.

use super::finding::Lost;
use crate::machine::Machine;

/// Time of an operation, of a byte sent and of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prices {
    flop: f64,
    byte: f64,
    message: f64,
}

impl Default for Prices {
    /// Where nothing is known of the machine, in operations: so many are made in the time of sending a byte, and 4 KiB are
    /// sent in the time of a message.
    fn default() -> Prices {
        Prices { flop: 1.0, byte: 100.0, message: 100.0 * 4096.0 }
    }
}

impl Prices {
    /// In seconds, for a device of a mesh of so many: operations of products, and the slowest link between them. Messages to
    /// all others are on their way together.
    pub fn on(machine: &Machine, devices: usize) -> Prices {
        let (each, share) = machine.share(devices);
        let link = if devices > each { machine.between } else { machine.within };
        let flop = 1.0 / machine.rate("product", "product").flops;
        Prices {
            flop: flop * share,
            byte: 1.0 / link.bytes,
            message: link.latency / devices.saturating_sub(1).max(1) as f64,
        }
    }
    /// The time that is lost.
    pub fn of(&self, lost: &Lost) -> f64 {
        self.flop * lost.flops + self.byte * lost.sent_bytes + self.message * lost.messages
    }
}
