//! The layers that the images of this host name: they stay, whether jobs run or not.
//!
//! An image is `<name>.json` in the directory of images. Before its layers are looked for it is `<name>.arriving`
//! there: so they are not collected while the last of them comes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use flynn_api::Digest;
use flynn_api::image::ImageManifest;

use crate::files;
use crate::paths::Paths;

const ARRIVING: &str = "arriving";

/// Which layers are named, and by which images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins(BTreeMap<Digest, Vec<String>>);

impl Pins {
    /// Those of the images that are there. A manifest that cannot be read is an error: nobody knows what it names.
    pub fn read(paths: &Paths) -> io::Result<Self> {
        let mut pins = Self::default();
        for entry in fs::read_dir(paths.images())? {
            let path = entry?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if !matches!(extension, Some("json" | ARRIVING)) {
                continue;
            }
            // One that is replaced in this moment is there under its other name.
            let Some(manifest) = files::read_json::<ImageManifest>(&path)? else {
                continue;
            };
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            for layer in manifest.layers() {
                let names = pins.0.entry(layer.id).or_default();
                if !names.iter().any(|there| *there == name) {
                    names.push(name.clone().into_owned());
                }
            }
        }
        Ok(pins)
    }

    /// The images that name a layer.
    pub fn of(&self, layer: Digest) -> &[String] {
        self.0.get(&layer).map_or(&[], Vec::as_slice)
    }
}

/// An image whose layers are being brought in.
#[must_use]
pub struct Arriving {
    from: PathBuf,
    to: PathBuf,
    /// The file whose lock is held while layers are collected.
    lock: File,
}

impl Arriving {
    /// Pins an image's layers. After this a layer that is there stays.
    pub fn begin(paths: &Paths, name: &str, manifest: &ImageManifest) -> io::Result<Self> {
        files::private_dir(&paths.images())?;
        files::private_dir(&paths.layers())?;
        let arrived = paths.images().join(format!("{name}.json"));
        let arriving = arrived.with_extension(ARRIVING);
        files::write_atomic(&arriving, &manifest.canonical_json())?;
        // Who collects in this moment, and has not seen the pin, is waited for.
        let lock = lock(paths.state())?;
        lock.lock_shared()?;
        lock.unlock()?;
        Ok(Self {
            from: arriving,
            to: arrived,
            lock,
        })
    }

    /// Gives the image its name: all its layers are there.
    pub fn finish(self) -> io::Result<()> {
        // Who lists the images in this moment would see it under neither name.
        self.lock.lock_shared()?;
        fs::rename(&self.from, &self.to)?;
        self.to.parent().map_or(Ok(()), files::sync_dir)
    }
}

/// The file whose lock is held while layers are collected.
pub(super) fn lock(state: &Path) -> io::Result<File> {
    File::create(state.join("layers.lock"))
}
