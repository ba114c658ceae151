//! What of a directory is on disk: file contents that were synced, names in directories that were synced.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rand::Rng as _;
use rand::rngs::StdRng;

const SECTOR: usize = 512;

/// What a power cut does to what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing of it was written.
    Clean,
    /// All names were written, and of the contents some sectors.
    Torn,
}

/// A directory tree as it would be after a power cut.
#[derive(Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    top: u64,
    inodes: HashMap<u64, Inode>,
}

#[derive(Debug)]
struct Inode {
    /// Keeps the kernel from giving its number to another.
    handle: File,
    directory: bool,
    content: Vec<u8>,
    names: BTreeMap<OsString, u64>,
}

impl Disk {
    /// All that is in `root` is on disk.
    pub(crate) fn new(root: &Path) -> io::Result<Self> {
        let mut disk = Self {
            root: root.to_owned(),
            top: 0,
            inodes: HashMap::new(),
        };
        disk.top = disk.all_synced(root)?;
        Ok(disk)
    }

    fn all_synced(&mut self, path: &Path) -> io::Result<u64> {
        let number = self.synced(path)?;
        let names: Vec<OsString> = self.inodes[&number].names.keys().cloned().collect();
        for name in names {
            self.all_synced(&path.join(name))?;
        }
        Ok(number)
    }

    fn learn(&mut self, path: &Path) -> io::Result<u64> {
        let handle = File::open(path)?;
        let meta = handle.metadata()?;
        self.inodes.entry(meta.ino()).or_insert(Inode {
            handle,
            directory: meta.is_dir(),
            content: Vec::new(),
            names: BTreeMap::new(),
        });
        Ok(meta.ino())
    }

    /// The file or directory at `path` was synced.
    pub(crate) fn synced(&mut self, path: &Path) -> io::Result<u64> {
        let number = self.learn(path)?;
        let mut names = BTreeMap::new();
        let mut content = Vec::new();
        if self.inodes[&number].directory {
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                names.insert(entry.file_name(), self.learn(&entry.path())?);
            }
        } else {
            File::open(path)?.read_to_end(&mut content)?;
        }
        let inode = self.inodes.get_mut(&number).unwrap();
        (inode.content, inode.names) = (content, names);
        Ok(number)
    }

    /// Has the power cut happen: nobody uses the directory any more.
    pub(crate) fn cut(&mut self, how: Cut, rng: &mut StdRng) -> io::Result<()> {
        let mut tree = Vec::new();
        match how {
            Cut::Clean => self.clean(self.top, &self.root, &mut tree),
            Cut::Torn => self.torn(&self.root.clone(), rng, &mut tree)?,
        }
        for entry in fs::read_dir(&self.root)? {
            let path = entry?.path();
            if path.is_dir() {
                fs::remove_dir_all(path)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        for (path, content) in tree {
            match content {
                None => fs::create_dir_all(path)?,
                Some(content) => fs::write(path, content)?,
            }
        }
        Ok(())
    }

    fn clean(&self, number: u64, path: &Path, tree: &mut Vec<(PathBuf, Option<Vec<u8>>)>) {
        let inode = &self.inodes[&number];
        tree.push((path.to_owned(), (!inode.directory).then(|| inode.content.clone())));
        for (name, number) in &inode.names {
            self.clean(*number, &path.join(name), tree);
        }
    }

    fn torn(
        &mut self,
        path: &Path,
        rng: &mut StdRng,
        tree: &mut Vec<(PathBuf, Option<Vec<u8>>)>,
    ) -> io::Result<()> {
        let number = self.learn(path)?;
        let inode = &self.inodes[&number];
        if inode.directory {
            tree.push((path.to_owned(), None));
            for entry in fs::read_dir(path)? {
                self.torn(&entry?.path(), rng, tree)?;
            }
        } else {
            let mut new = Vec::new();
            let mut handle = &inode.handle;
            io::Seek::rewind(&mut handle)?;
            handle.read_to_end(&mut new)?;
            tree.push((path.to_owned(), Some(mix(&inode.content, new, rng))));
        }
        Ok(())
    }
}

/// Sectors that changed are new or as they were; where nothing was, they are zeros.
fn mix(old: &[u8], mut new: Vec<u8>, rng: &mut StdRng) -> Vec<u8> {
    // That it became shorter was written, or not.
    if new.len() < old.len() && rng.random() {
        return old.to_vec();
    }
    for (at, sector) in new.chunks_mut(SECTOR).enumerate() {
        let before = old.get(at * SECTOR..).unwrap_or(&[]);
        let before = &before[..before.len().min(sector.len())];
        if rng.random() {
            sector[..before.len()].copy_from_slice(before);
            sector[before.len()..].fill(0);
        }
    }
    new
}
