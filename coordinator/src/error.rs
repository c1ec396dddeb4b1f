//! What can go wrong in a session.

use mesh::error::{Cause, Error};
use worker::device::DeviceError;

/// A failure of a session.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A mistake in program, layout, plan or feed.
    #[error(transparent)]
    Program(#[from] Error),
    /// A device that cannot be set up.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A step that could not be finished.
    #[error("C0001: the mesh has failed: {0}")]
    Mesh(String),
    /// A coordinator that cannot be reached: another attempt may help.
    #[error(
        "C0022: the coordinator {coordinator} is not there: {reason}\n  help: start it, name another one, or try again later"
    )]
    Unreachable {
        /// Who.
        coordinator: String,
        /// Why.
        reason: String,
    },
    /// A coordinator that does not let this program in, or is not one: another attempt would not help.
    #[error("C0023: the coordinator {coordinator} does not let this program in: {reason}")]
    Refused {
        /// Who.
        coordinator: String,
        /// Why.
        reason: String,
    },
    /// Certificates that are not good, or an address that contradicts them.
    #[error(transparent)]
    Tls(#[from] worker::tls::TlsError),
    /// A checkpoint that cannot be written or read.
    #[error("{0}")]
    Checkpoint(String),
}

/// A mistake in what is given to a session.
pub(crate) fn feed(what: impl Into<String>, help: impl Into<String>) -> Failure {
    Failure::Program(Error::new(Cause::Feed { what: what.into(), help: help.into() }))
}
