//! Sessions that model programs run in, and checkpoints of their variables.
//!
//! | module | what it is |
//! |---|---|
//! | [`session`] | a program running on a mesh: in this process, or on workers behind a coordinator |
//! | [`checkpoint`] | a session's variables on disk |
//! | [`server`] | the coordinator: knows the workers and drives them in step |
//! | [`certs`] | a cluster's certificates: an authority of its own, a role each |
//! | [`cli`] | a coordinator's command line |
//! | [`launch`] | a coordinator in this process and workers beside it |

pub mod certs;
pub mod checkpoint;
pub mod cli;
pub mod error;
pub mod launch;
mod remote;
pub mod server;
pub mod session;

pub use error::Failure;
pub use session::{Options, Session};
