//! Sessions that model programs run in, and checkpoints of their variables.
//!
//! | module | what it is |
//! |---|---|
//! | [`session`] | a program running on a mesh: in this process, or on workers behind a coordinator |
//! | [`source`] | where feeds come from, box by box |
//! | [`drive`] | a run: steps, checkpoints when they are due, going on after a loss |
//! | [`checkpoint`] | the catalogue of checkpoints in a store |
//! | `keeper` | the checkpoints of a session in this process |
//! | `remote` | the client's side of a session on workers |
//! | [`server`] | the coordinator: knows which workers there are |
//! | `crew` | the coordinator's side of a session: its workers, and what they are asked to do together |
//! | [`recorder`] | who kept whom waiting, and traces: made of what the devices did last |
//! | [`profile`] | where the time of steps went: made of what the devices measured and what the plan says |
//! | [`calibrate`] | how fast this machine is: made of profiles |
//! | `control` | what model programs and operators call |
//! | [`journal`] | what a coordinator remembers when it is started again |
//! | [`certs`] | a cluster's certificates: an authority of its own, a role each |
//! | [`cli`] | a coordinator's command line |
//! | [`status`] | the status port: read-only, for browsers, probes and monitoring |
//! | [`launch`] | a coordinator in this process and workers beside it |
//! | [`interrupt`] | being asked to stop |

pub mod calibrate;
pub mod certs;
pub mod checkpoint;
pub mod cli;
mod control;
mod crew;
pub mod drive;
pub mod error;
pub mod interrupt;
pub mod journal;
mod keeper;
pub mod launch;
pub mod profile;
pub mod recorder;
mod remote;
pub mod server;
pub mod session;
pub mod source;
pub mod status;

pub use checkpoint::{Checkpoints, Position};
pub use error::Failure;
pub use session::{Options, Session};
pub use source::Source;
