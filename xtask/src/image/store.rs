//! `target/images`: what was made of what.
//!
//! A layer's key file (`keys/<name>`) holds the key that it was made for and its digest; it is written last, so a
//! run that was killed has made nothing as far as the next one can tell.

use super::{recipes, squash};
use crate::ui;
use anyhow::{Context, Result};
use flynn_api::Digest;
use flynn_api::digest::Digester;
use flynn_api::image::{ImageManifest, Layer};
use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The images that are made, and the keys they were made for.
pub(super) struct Store {
    dir: PathBuf,
}

/// A directory below `target/images/tmp`, removed when dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is removed by the next run.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Store {
    /// Opens the store, whose lock the caller holds, and removes what a killed run left.
    pub(super) fn open(dir: PathBuf) -> Result<Self> {
        let tmp = dir.join("tmp");
        if tmp.exists() {
            std::fs::remove_dir_all(&tmp).with_context(|| format!("cannot remove {}", tmp.display()))?;
        }
        for sub in ["tmp", "keys", "layers"] {
            std::fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(Self { dir })
    }

    /// A file below the store.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An empty directory for the time being.
    pub(super) fn scratch(&self, name: &str) -> Result<Scratch> {
        let path = self.dir.join("tmp").join(name);
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch(path))
    }

    /// The layer of this name, made by `make` in an empty directory unless it is there for the same key.
    pub(super) fn layer(
        &self,
        name: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Layer> {
        if let Some(layer) = self.known(name, key) {
            return Ok(layer);
        }
        let root = self.scratch(&format!("{name}.root"))?;
        make(root.path()).with_context(|| format!("cannot make the layer {name}"))?;
        let packed = self.dir.join("tmp").join(format!("{name}.squashfs"));
        squash::pack(root.path(), &packed)?;
        let length = packed.metadata().context("mksquashfs made no file")?.len();
        let layer = Layer::squashfs(digest_of(&packed)?, length);
        std::fs::rename(&packed, self.layer_path(&layer)).context("cannot move the layer")?;
        self.remember(name, key, &layer.id.to_string())?;
        ui::note(&format!("layer {name}: {} ({})", layer.id, ui::megabytes(length)));
        Ok(layer)
    }

    /// The layer that was made for this key, if it is there.
    fn known(&self, name: &str, key: &str) -> Option<Layer> {
        let id: Digest = self.recall(name, key)?.parse().ok()?;
        let length = self
            .dir
            .join("layers")
            .join(format!("{id}.squashfs"))
            .metadata()
            .ok()?
            .len();
        Some(Layer::squashfs(id, length))
    }

    /// Notes what was made for a key.
    pub(super) fn remember(&self, name: &str, key: &str, made: &str) -> Result<()> {
        self.write(
            &format!("keys/{name}"),
            format!("{}\n{made}\n", Digest::of(key.as_bytes())).as_bytes(),
        )
    }

    /// What was made for a key.
    pub(super) fn recall(&self, name: &str, key: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.join("keys").join(name)).ok()?;
        let (made_for, made) = text.trim_end().split_once('\n')?;
        (made_for == Digest::of(key.as_bytes()).to_string()).then(|| made.to_owned())
    }

    /// Writes an image's manifest.
    pub(super) fn manifest(&self, name: &str, manifest: &ImageManifest) -> Result<()> {
        ui::note(&format!("image {name}: {}", manifest.id()));
        self.write(&format!("{name}.json"), &manifest.canonical_json())
    }

    /// Replaces a file whole.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let staged = path.with_extension("new");
        std::fs::write(&staged, bytes)
            .and_then(|()| std::fs::rename(&staged, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// A layer's files.
    pub(super) fn unpacked(&self, layer: &Layer) -> Result<Scratch> {
        let scratch = Scratch(self.dir.join("tmp").join(layer.id.to_string()));
        squash::unpack(&self.layer_path(layer), scratch.path())?;
        Ok(scratch)
    }

    fn layer_path(&self, layer: &Layer) -> PathBuf {
        self.dir.join("layers").join(format!("{}.squashfs", layer.id))
    }

    /// Removes layers that no key and no manifest speaks of.
    pub(super) fn sweep(&self) -> Result<()> {
        let mut spoken_of = HashSet::new();
        for entry in std::fs::read_dir(self.dir.join("keys"))? {
            let text = std::fs::read_to_string(entry?.path())?;
            spoken_of.extend(text.lines().map(str::to_owned));
        }
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let bytes = std::fs::read(&path)?;
                // A manifest that cannot be read keeps no layer.
                if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&bytes) {
                    spoken_of.extend(manifest.layers().iter().map(|layer| layer.id.to_string()));
                }
            }
        }
        for entry in std::fs::read_dir(self.dir.join("layers"))? {
            let path = entry?.path();
            let id = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !spoken_of.contains(&id) {
                std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// The digest of a file.
pub(super) fn digest_of(path: &Path) -> Result<Digest> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut digester = Digester::default();
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = file
            .read(&mut piece)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            return Ok(digester.finish());
        }
        digester.update(&piece[..read]);
    }
}

/// A key that changes with the way in which layers are made.
pub(super) fn versioned(what: &str) -> String {
    format!("{what} {} {}", recipes::VERSION, recipes::EPOCH)
}
