//! The cluster network's documents as this host saw them last: in memory, and on the disk for the time when discoverd
//! is away.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flynn_api::discovery::ServiceMeta;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::files;

/// The last good state. One file for each document, named after its service.
pub(crate) struct Documents {
    dir: PathBuf,
    known: Mutex<BTreeMap<String, ServiceMeta>>,
    changes: watch::Sender<u64>,
}

impl Documents {
    /// Those that were seen by earlier daemons. What cannot be read is left out and said: it comes anew from discoverd.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        files::private_dir(dir)?;
        let mut known = BTreeMap::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let Some(service) = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".json"))
            else {
                continue;
            };
            match files::read_json::<ServiceMeta>(&path) {
                Ok(Some(meta)) => drop(known.insert(service.to_owned(), meta)),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "a document of the cluster network cannot be read"),
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            known: Mutex::new(known),
            changes: watch::Sender::new(0),
        })
    }

    /// Takes a document in, unless one as new is known. It counts at once; that it cannot be kept is said.
    pub(crate) fn put(&self, service: &str, meta: &ServiceMeta) {
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.get(service).is_some_and(|known| known.index >= meta.index) {
                return;
            }
            known.insert(service.to_owned(), meta.clone());
            // Under the lock: the file is never older than what is known.
            if let Err(error) = files::write_json(&self.file(service), meta) {
                tracing::error!(service, %error, "a document of the cluster network cannot be kept");
            }
        }
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Forgets a document whose service is nobody's any more.
    pub(crate) fn forget(&self, service: &str) {
        let removed = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(service);
        if removed.is_some() {
            let _ = files::remove_all(&self.file(service));
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// A document; `None` when it was never seen or has a form that this build cannot read.
    pub(crate) fn get<D: DeserializeOwned>(&self, service: &str) -> Option<D> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        D::deserialize(&known.get(service)?.data)
            .inspect_err(|error| tracing::error!(service, %error, "a document of the cluster network"))
            .ok()
    }

    /// The services of which there are documents.
    pub(crate) fn services(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.keys().cloned().collect()
    }

    /// Tells of every later change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn file(&self, service: &str) -> PathBuf {
        self.dir.join(format!("{service}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(data: u64, index: u64) -> ServiceMeta {
        ServiceMeta {
            data: data.into(),
            index,
            leader_id: None,
        }
    }

    #[test]
    fn the_newest_is_kept_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Documents::open(dir.path()).unwrap();
        let changes = documents.subscribe();
        documents.put("a", &meta(1, 5));
        documents.put("a", &meta(0, 4));
        documents.put("b", &meta(2, 7));
        assert_eq!(*changes.borrow(), 2, "an older one changes nothing");
        std::fs::write(dir.path().join("c.json"), "{").unwrap();
        let again = Documents::open(dir.path()).unwrap();
        assert_eq!(again.get::<u64>("a"), Some(1));
        assert_eq!(again.services(), ["a", "b"]);
        assert_eq!(again.get::<String>("a"), None, "not of this form");
        again.forget("a");
        assert_eq!(Documents::open(dir.path()).unwrap().services(), ["b"]);
    }
}
