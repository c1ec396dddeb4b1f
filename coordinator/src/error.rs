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
