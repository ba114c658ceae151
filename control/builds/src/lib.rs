//! Image receiving: docker layers to squashfs layers, docker images to artifacts (`flynn-system tarreceive`).
//!
//! In, with a key of the cluster: `GET /layer/{id}`, `POST /layer/{id}`, `POST /artifact` ([`flynn_api::receive`]).
//! Out: squashfs layers and image manifests to the blobstore, artifacts to the controller.
//!
//! A layer's way: the upload is uncompressed into a temporary file while its SHA-256 digest is computed ([`upload`]);
//! only when that is the layer's id is the tar read into a tree of names ([`tree`]); the tree is written as a clean
//! tar to `mksquashfs` ([`squash`]); the squashfs file goes to the blobstore under its digest ([`library`]), followed by a
//! record that maps the docker id to it, so that an equal layer is never sent twice.
//!
//! Invariants:
//! - What is stored under an id has been made from a tar with that digest. A failure stores no record.
//! - Equal tars make equal squashfs files: names sorted, times from the tar, nothing of this machine.
//! - No name leads out of the layer, no device node gets in, whiteouts become what overlayfs understands.
//! - Everything is bounded: bytes, entries, header sizes, conversions at a time.
//!
//! Artifacts carry the layer URL template `http://blobstore.discoverd/layers/{id}.squashfs`. Hosts do not resolve
//! `*.discoverd` by DNS: they ask discoverd for an instance of the service and put its `address:port` in place of the
//! name; containers with DNS use the URL as it is.
//!
//! Why `mksquashfs` and not a squashfs writer in Rust: the one there is (backhand) keeps no extended attributes, which
//! opaque directories and file capabilities need.

mod image;
mod library;
mod limits;
mod server;
mod squash;
mod tar_format;
mod tree;
mod upload;
mod users;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use flynn_api::client::Http;
use flynn_api::client::blobs::BlobClient;
use flynn_api::client::controller::ControllerClient;
use flynn_api::server::{Keys, Listener};
use flynn_api::{Error, Result};

pub use crate::server::Receiver;

/// How image receiving is run.
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The keys that let callers in.
    pub keys: Keys,
    /// The blobstore, with a key that may write.
    pub blobstore: BlobClient,
    /// The controller.
    pub controller: ControllerClient,
    /// For files under way.
    pub scratch: PathBuf,
}

impl Options {
    /// From `PORT` (80), `AUTH_KEY`, `BLOBSTORE_URL` (`http://blobstore.discoverd`), `BLOBSTORE_KEY`, `CONTROLLER_URL`
    /// (`http://controller.discoverd`), `CONTROLLER_KEY` and `TMPDIR`.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let needed = |name: &str| {
            variable(name)
                .filter(|value| !value.is_empty())
                .ok_or_else(|| Error::invalid_field(name, "it is not set; set it to a key of that service"))
        };
        let or = |name: &str, default: &str| variable(name).unwrap_or_else(|| default.to_owned());
        let port = or("PORT", "80");
        let port: u16 = port.parse().map_err(|_| {
            Error::invalid_field(
                "PORT",
                format!("{port:?} is not a port; set it to a number up to 65535"),
            )
        })?;
        let blobstore = Http::new(&or("BLOBSTORE_URL", "http://blobstore.discoverd"))?;
        let controller = Http::new(&or("CONTROLLER_URL", "http://controller.discoverd"))?;
        // A component may be given several keys during a rotation; any of them will do.
        let first = |keys: String| keys.split(',').next().unwrap_or_default().trim().to_owned();
        Ok(Self {
            listen: SocketAddr::from(([0, 0, 0, 0], port)),
            keys: Keys::parse("AUTH_KEY", &needed("AUTH_KEY")?)?,
            blobstore: BlobClient::new(blobstore.password(&first(needed("BLOBSTORE_KEY")?))),
            controller: ControllerClient::new(controller.password(&first(needed("CONTROLLER_KEY")?))),
            scratch: variable("TMPDIR").map_or_else(std::env::temp_dir, PathBuf::from),
        })
    }
}

/// Serves until `shutdown`, then lets calls that are under way finish.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    squash::check_tool().await?;
    server::clear(&options.scratch)?;
    let listener = Listener::tcp(options.listen).await?;
    tracing::info!(listen = %options.listen, "image receiving is up");
    let receiver = Receiver::new(
        options.keys,
        options.blobstore,
        options.controller,
        options.scratch,
    );
    flynn_api::server::serve(listener, receiver.router(), shutdown).await
}
