//! Sessions that model programs run in, and checkpoints of their variables.

pub mod checkpoint;
pub mod error;
pub mod session;

pub use error::Failure;
pub use session::{Options, Session};
