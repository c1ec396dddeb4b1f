//! What can go wrong in a session.

use mesh::error::{Cause, Error};
use worker::device::DeviceError;

/// A failure of a session.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// A mistake in program, layout, plan or feed.
    #[error(transparent)]
    Program(#[from] Error),
    /// A device that cannot be set up.
    #[error("{0}")]
    Device(String),
    /// A step that could not be finished.
    #[error("C0001: the mesh has failed: {0}")]
    Mesh(String),
    /// Workers or the coordinator are gone: a session that is opened anew may go on.
    #[error("C0002: the session is lost: {0}")]
    Lost(String),
    /// A coordinator that does not let this program in, or is not one: another attempt would not help.
    #[error("C0035: the coordinator {coordinator} does not let this program in: {reason}")]
    Refused {
        /// Who.
        coordinator: String,
        /// Why.
        reason: String,
    },
    /// A source that cannot give a box of what is fed.
    #[error("C0043: {what} cannot be had: {why}")]
    Source {
        /// What, and which box of it.
        what: String,
        /// Why.
        why: String,
    },
    /// Certificates that are not good, or an address that contradicts them.
    #[error(transparent)]
    Tls(#[from] worker::tls::TlsError),
    /// A checkpoint that cannot be written or read.
    #[error("{0}")]
    Checkpoint(String),
}

impl From<DeviceError> for Failure {
    fn from(e: DeviceError) -> Failure {
        Failure::Device(e.to_string())
    }
}

impl Failure {
    /// The exit code of a program that ends with it: 1 internal, 2 configuration, 3 data, 4 no good checkpoint, 75
    /// try again.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Program(_) | Failure::Refused { .. } | Failure::Tls(_) => 2,
            Failure::Source { .. } => 3,
            Failure::Device(_) | Failure::Mesh(_) => 1,
            Failure::Checkpoint(_) => 4,
            Failure::Lost(_) => 75,
        }
    }
}

/// A mistake in what is given to a session.
pub(crate) fn feed(what: impl Into<String>, help: impl Into<String>) -> Failure {
    Failure::Program(Error::new(Cause::Feed { what: what.into(), help: help.into() }))
}
