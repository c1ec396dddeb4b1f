//! Readers and writers of data.
//!
//! | module | what it is |
//! |---|---|
//! | [`fetch`] | files out of packages |
//! | [`tokens`] | text as tokens, mapped into memory |
//! | [`nifti`] | NIfTI-1 files in and out |
//! | [`ct`] | a CT with organ masks, fetched from a package |
//! | [`phantom`] | a CT-like volume made from a seed |
//! | [`volume`] | resampling, cropping, augmentation |
//! | [`picture`] | slices as PNG |
//! | [`weights`] | folders of safetensors in and out |

pub mod ct;
pub mod fetch;
pub mod nifti;
pub mod phantom;
pub mod picture;
pub mod tokens;
pub mod volume;
pub mod weights;

use std::path::{Path, PathBuf};

/// What is wrong with data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file that cannot be read or written.
    #[error("D0001: cannot {what} {}: {why}", path.display())]
    File {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A file that is not what it should be.
    #[error("D0002: {} is not usable: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why, and what would be.
        why: String,
    },
    /// A package that cannot be fetched.
    #[error("D0003: {0}")]
    Fetch(String),
}

pub(crate) fn file(what: &'static str, path: &Path, why: impl std::fmt::Display) -> DataError {
    DataError::File { what, path: path.into(), why: why.to_string() }
}

pub(crate) fn format(path: &Path, why: impl Into<String>) -> DataError {
    DataError::Format { path: path.into(), why: why.into() }
}
