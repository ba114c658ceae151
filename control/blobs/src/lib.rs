//! The blobstore: immutable and other large objects by path, over HTTP, in a directory of the host's disk.
//!
//! In: `PUT /path` and `DELETE /path` with a key of the cluster (basic authentication). Out, for everyone in the
//! cluster: `GET`/`HEAD /path` with ranges and entity tags, and `GET /?dir=/path`, a JSON list of what is directly
//! below a path (directories end with `/`).
//!
//! Invariants:
//! - What has been acknowledged survives a power cut: an object is written beside its place, synced, renamed into it,
//!   and the directories are synced, before the answer goes out.
//! - A reader sees one whole object or none: never a part, never a mixture.
//! - An object whose path names its digest (`/layers/<digest>.squashfs`, `/images/<digest>.json`) has that digest.
//! - The entity tag is the SHA-512/256 digest of the content.
//! - No path leads out of the store.
//!
//! The directory backend is our own small one, because the ready-made ones do not sync what they acknowledge.

mod http;
mod path;
mod range;
mod store;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use flynn_api::server::{self, Keys, Listener};
use flynn_api::{Error, Result};

pub use crate::http::{Blobstore, MAX_OBJECT};
pub use crate::path::BlobPath;
pub use crate::store::{Object, Store, StoreError};

/// How a blobstore is run.
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where objects are kept.
    pub data: PathBuf,
    /// The keys that may write.
    pub keys: Keys,
}

impl Options {
    /// From `PORT` (80), `BLOBSTORE_DATA` (`/data`) and `BLOBSTORE_KEY` (comma-separated).
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let port = variable("PORT").unwrap_or_else(|| "80".into());
        let port: u16 = port.parse().map_err(|_| {
            Error::invalid_field(
                "PORT",
                format!("{port:?} is not a port; set it to a number up to 65535"),
            )
        })?;
        let keys = Keys::parse("BLOBSTORE_KEY", &variable("BLOBSTORE_KEY").unwrap_or_default())?;
        let data = variable("BLOBSTORE_DATA").unwrap_or_else(|| "/data".into());
        Ok(Self {
            listen: SocketAddr::from(([0, 0, 0, 0], port)),
            data: data.into(),
            keys,
        })
    }
}

/// Serves until `shutdown`, then lets calls that are under way finish.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    let store = Store::open(&options.data).map_err(|why| {
        let message = format!(
            "cannot use {} for blobs: {why}; is the volume mounted?",
            options.data.display()
        );
        io::Error::new(why.kind(), message)
    })?;
    let listener = Listener::tcp(options.listen).await?;
    tracing::info!(listen = %options.listen, data = %options.data.display(), "the blobstore is up");
    server::serve(listener, Blobstore::new(store, options.keys).router(), shutdown).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_checked() {
        let read = |port: &'static str, key: &'static str| {
            Options::read(move |name| match name {
                "PORT" => Some(port.to_owned()),
                "BLOBSTORE_KEY" => Some(key.to_owned()),
                _ => None,
            })
        };
        assert_eq!(read("8080", "a, b").unwrap().listen.port(), 8080);
        assert!(read("http", "a").is_err_and(|why| why.message.contains("PORT")));
        assert!(read("80", " ,").is_err_and(|why| why.message.contains("BLOBSTORE_KEY")));
    }
}
