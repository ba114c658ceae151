//! What can go wrong.

use std::io;
use std::path::PathBuf;

/// Why the appliance, or its database, cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The environment.
    #[error("the environment is not usable: {}", .0.join("; "))]
    Options(Vec<String>),
    /// A file or directory.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The volume's own record.
    #[error("{path} cannot be read: {why}. It names this peer; restore it from a backup of the volume")]
    Record {
        /// Where.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// No user to run the server as.
    #[error(
        "there is no user `postgres` to run the server as; use an image with Debian's PostgreSQL package"
    )]
    NoUser,
    /// A program of PostgreSQL's.
    #[error("{program} failed: {why}")]
    Program {
        /// Which.
        program: &'static str,
        /// Why.
        why: String,
    },
    /// A statement.
    #[error("the database refuses to be set up: {0}")]
    Sql(#[from] tokio_postgres::Error),
    /// The identity for mutual TLS.
    #[error(transparent)]
    Tls(#[from] flynn_api::tls::TlsError),
    /// Another component.
    #[error(transparent)]
    Api(#[from] flynn_api::Error),
    /// Stopped while it was at work.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// Wraps an error about a file.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            what,
            path: path.into(),
            source,
        }
    }
}
