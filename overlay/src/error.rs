//! What can go wrong, and what to do about it.

use std::io;

use thiserror::Error;

/// Why the network did not do something.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration contradicts itself, or an address is not one of this host's.
    #[error("{0}")]
    Config(String),
    /// Something about the eBPF programs and maps.
    #[error(transparent)]
    Dataplane(#[from] flynn_dataplane::Error),
    /// The kernel refused to change its network configuration, or a file of it.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A program that is needed is not installed or failed.
    #[error("{what}: {why}")]
    Tool {
        /// What was tried.
        what: String,
        /// Why not, and what to do.
        why: String,
    },
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }
}
