//! Sessions that model programs run in, and checkpoints of their variables.
//!
//! | module | what it is |
//! |---|---|
//! | [`session`] | a program running on a mesh: in this process, or on workers behind a coordinator |
//! | [`checkpoint`] | a session's variables on disk |
//! | [`server`] | the coordinator: knows the workers and drives them in step |

pub mod checkpoint;
pub mod error;
mod remote;
pub mod server;
pub mod session;

pub use error::Failure;
pub use session::{Options, Session};
