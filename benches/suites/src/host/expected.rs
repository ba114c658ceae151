//! What is waited for by name: the first words of processes, the ends of jobs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

/// Those who wait, by what they wait for.
pub(super) struct Expected<T>(Arc<Mutex<HashMap<String, oneshot::Sender<T>>>>);

impl<T> Clone for Expected<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Expected<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Expected<T> {
    /// Waits for `name` from now on.
    pub(super) fn expect(&self, name: &str) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(name.to_owned(), sender);
        receiver
    }

    /// It has come. Whether anybody waited.
    pub(super) fn came(&self, name: &str, what: T) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(name).is_some_and(|sender| sender.send(what).is_ok())
    }
}

/// What processes say, each line with the moment in which it was read. A thread of its own reads, so that nothing else
/// that goes on here delays that.
pub(super) struct Words {
    expected: Expected<Instant>,
    fifo: File,
}

impl Words {
    /// What last said in the FIFO ends its reading.
    const END: &str = "end";

    /// Listens at a FIFO.
    pub(super) fn listen(fifo: &Path) -> Result<Self> {
        // For both: so that opening does not wait for a writer, and reading does not end with the last one.
        let file = File::options()
            .read(true)
            .write(true)
            .open(fifo)
            .with_context(|| format!("cannot open {}", fifo.display()))?;
        let expected = Expected::<Instant>::default();
        let (there, mut lines) = (expected.clone(), BufReader::new(file.try_clone()?));
        std::thread::Builder::new().name("words".into()).spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|length| length > 0) && line.trim_end() != Self::END {
                there.came(line.trim_end(), Instant::now());
                line.clear();
            }
        })?;
        Ok(Self { expected, fifo: file })
    }

    /// Waits for a word, which must not have been said yet.
    pub(super) fn expect(&self, word: &str) -> oneshot::Receiver<Instant> {
        self.expected.expect(word)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        let _ = writeln!(self.fifo, "{}", Self::END);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_word_reaches_who_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let words = Words::listen(&fifo).unwrap();
        let (one, two) = (words.expect("one"), words.expect("two"));
        let begun = Instant::now();
        std::fs::write(&fifo, "nobody's\ntwo\none\n").unwrap();
        let (one, two) = (one.await.unwrap(), two.await.unwrap());
        assert!(begun <= two && two <= one);
    }
}
