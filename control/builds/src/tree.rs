//! The names in a layer, as overlayfs is to see them: one node per path, whiteouts and opaque directories in
//! overlayfs' own form, nothing that leads out of the layer.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek};

use tar::EntryType;

use crate::limits::{MAX_ENTRIES, MAX_NAME, MAX_NAMES, MAX_PATH};
use crate::tar_format::{Entries, Entry, TarError};

/// Begins the names of docker's markers for what a layer removes.
const WHITEOUT: &[u8] = b".wh.";
/// In a directory: nothing of it in the layers below is to be seen. Others that begin with two markers are left-overs
/// of a file system that docker once used.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("the layer's entry {path:?}, at byte {at}: {why}")]
    Entry { path: String, at: u64, why: String },
    #[error("the layer has more than {MAX_ENTRIES} entries, or names of more than {} MiB", MAX_NAMES >> 20)]
    TooLarge,
}

/// Owner, permissions, time and extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u32,
    pub(crate) extended: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Where a file's content lies in the tar. Nodes with an equal one are one file with several names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Content {
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Directory {
        attributes: Attributes,
        /// Hides what lower layers have in it.
        opaque: bool,
    },
    File {
        attributes: Attributes,
        content: Content,
    },
    Symlink {
        attributes: Attributes,
        target: Vec<u8>,
    },
    Fifo {
        attributes: Attributes,
    },
    /// Hides what lower layers have here.
    Whiteout,
}

/// A layer.
#[derive(Debug)]
pub(crate) struct Tree {
    /// By path, without a leading `/`; a directory comes before what is in it.
    pub(crate) nodes: BTreeMap<Vec<u8>, Node>,
    /// Of the root directory.
    pub(crate) root: Attributes,
    /// Hides all lower layers.
    pub(crate) opaque: bool,
}

impl Tree {
    /// Reads a tar of `length` bytes.
    pub(crate) fn read(file: impl Read + Seek, length: u64) -> Result<Self, TreeError> {
        let mut reader = Reader {
            tree: Self {
                nodes: BTreeMap::new(),
                root: directory_attributes(),
                opaque: false,
            },
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
        };
        let mut entries = Entries::new(file, length);
        let mut names = 0;
        let mut count = 0;
        while let Some(entry) = entries.next()? {
            count += 1;
            names += entry.path.len() + entry.link.len();
            names += entry
                .attributes
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>();
            if count > MAX_ENTRIES || names > MAX_NAMES {
                return Err(TreeError::TooLarge);
            }
            let (at, shown) = (
                entry.at,
                String::from_utf8_lossy(&entry.path[..entry.path.len().min(200)]).into_owned(),
            );
            reader
                .take(entry)
                .map_err(|why| TreeError::Entry { path: shown, at, why })?;
        }
        Ok(reader.finish())
    }

    /// The latest time of anything in it.
    pub(crate) fn latest(&self) -> u32 {
        let times = self.nodes.values().map(|node| match node {
            Node::Directory { attributes, .. }
            | Node::File { attributes, .. }
            | Node::Symlink { attributes, .. }
            | Node::Fifo { attributes } => attributes.mtime,
            Node::Whiteout => 0,
        });
        times.chain([self.root.mtime]).max().unwrap_or(0)
    }

    /// A file's place in the tar, if there is a plain file of this path.
    pub(crate) fn content(&self, path: &[u8]) -> Option<Content> {
        match self.nodes.get(path)? {
            Node::File { content, .. } => Some(*content),
            _ => None,
        }
    }
}

/// Collects entries. Markers apply to lower layers only, wherever in the tar they stand, so they are kept apart until
/// the end.
struct Reader {
    tree: Tree,
    whiteouts: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
}

impl Reader {
    fn take(&mut self, entry: Entry) -> Result<(), String> {
        let path = normalise(&entry.path)?;
        let (parent, name) = split(&path);
        if parent
            .split(|byte| *byte == b'/')
            .any(|name| name.starts_with(WHITEOUT))
        {
            return Err("it lies below a marker, which is no directory".into());
        }
        if name.starts_with(WHITEOUT) {
            self.make_parents(parent)?;
            if name == OPAQUE {
                self.opaque.insert(parent.to_vec());
            } else if !name[WHITEOUT.len()..].starts_with(WHITEOUT) {
                let hidden = &name[WHITEOUT.len()..];
                if hidden.is_empty() || hidden == b"." || hidden == b".." {
                    return Err("it removes nothing that can be named".into());
                }
                self.whiteouts.insert(join(parent, hidden));
            }
            return Ok(());
        }
        let attributes = Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            extended: extended(entry.attributes),
        };
        // Tars from before ustar mark directories by the end of their names.
        let plain = entry.kind.is_file() || entry.kind == EntryType::Continuous;
        let directory = entry.kind.is_dir() || (plain && entry.path.ends_with(b"/"));
        if path.is_empty() {
            if !directory {
                return Err("the root is a directory".into());
            }
            self.tree.root = attributes;
            return Ok(());
        }
        let node = match entry.kind {
            _ if directory => Node::Directory {
                attributes,
                opaque: false,
            },
            _ if plain => Node::File {
                attributes,
                content: Content {
                    offset: entry.offset,
                    size: entry.size,
                },
            },
            EntryType::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_PATH {
                    return Err(format!("a symbolic link's target has 1 to {MAX_PATH} bytes"));
                }
                Node::Symlink {
                    attributes,
                    target: entry.link,
                }
            }
            EntryType::Link => self.linked(&entry.link)?,
            EntryType::Fifo => Node::Fifo { attributes },
            EntryType::Char if entry.device == (0, 0) => {
                self.make_parents(parent)?;
                self.whiteouts.insert(path);
                return Ok(());
            }
            // Containers get their devices from the host; those of an image could reach its disks.
            EntryType::Char | EntryType::Block => return Ok(()),
            kind => {
                return Err(format!(
                    "entries of the type {:?} are not understood",
                    char::from(kind.as_byte())
                ));
            }
        };
        self.make_parents(parent)?;
        self.insert(path, node);
        Ok(())
    }

    /// What a hard link's target is, which is another name for it from now on.
    fn linked(&self, target: &[u8]) -> Result<Node, String> {
        let target = normalise(target)?;
        match self.tree.nodes.get(&target) {
            Some(node @ (Node::File { .. } | Node::Symlink { .. } | Node::Fifo { .. })) => Ok(node.clone()),
            Some(_) => Err("it is a hard link to a directory".into()),
            None => Err(format!(
                "it is a hard link to {:?}, which is not before it in the layer",
                String::from_utf8_lossy(&target)
            )),
        }
    }

    /// A later entry replaces an earlier one of the same path; a directory keeps what is in it.
    fn insert(&mut self, path: Vec<u8>, node: Node) {
        let both_directories = matches!(
            (self.tree.nodes.get(&path), &node),
            (Some(Node::Directory { .. }), Node::Directory { .. })
        );
        if !both_directories && matches!(self.tree.nodes.get(&path), Some(Node::Directory { .. })) {
            let below = join(&path, b"");
            let inside: Vec<_> = self
                .tree
                .nodes
                .range(below.clone()..)
                .take_while(|(name, _)| name.starts_with(&below))
                .map(|(name, _)| name.clone())
                .collect();
            for name in inside {
                self.tree.nodes.remove(&name);
            }
        }
        self.tree.nodes.insert(path, node);
    }

    /// Makes the directories that the tar takes for granted.
    fn make_parents(&mut self, directory: &[u8]) -> Result<(), String> {
        let mut end = directory.len();
        let mut missing = Vec::new();
        while end > 0 {
            match self.tree.nodes.get(&directory[..end]) {
                Some(Node::Directory { .. }) => break,
                Some(_) => {
                    let name = String::from_utf8_lossy(&directory[..end]).into_owned();
                    return Err(format!("it lies below {name:?}, which is not a directory"));
                }
                None => missing.push(directory[..end].to_vec()),
            }
            end = directory[..end]
                .iter()
                .rposition(|byte| *byte == b'/')
                .unwrap_or(0);
        }
        for path in missing {
            self.tree.nodes.insert(
                path,
                Node::Directory {
                    attributes: directory_attributes(),
                    opaque: false,
                },
            );
        }
        Ok(())
    }

    fn finish(mut self) -> Tree {
        for path in self.opaque {
            match self.tree.nodes.get_mut(&path) {
                _ if path.is_empty() => self.tree.opaque = true,
                Some(Node::Directory { opaque, .. }) => *opaque = true,
                _ => {}
            }
        }
        for path in self.whiteouts {
            let parent = split(&path).0;
            let has_parent =
                parent.is_empty() || matches!(self.tree.nodes.get(parent), Some(Node::Directory { .. }));
            match self.tree.nodes.get_mut(&path) {
                // Removed below and made anew here: only a directory would let the old one shine through.
                Some(Node::Directory { opaque, .. }) => *opaque = true,
                None if has_parent => {
                    self.tree.nodes.insert(path, Node::Whiteout);
                }
                _ => {}
            }
        }
        self.tree
    }
}

fn directory_attributes() -> Attributes {
    Attributes {
        mode: 0o755,
        ..Attributes::default()
    }
}

/// Keeps what means something in a container: a user's own attributes and file capabilities. Those of overlayfs are
/// ours alone to set.
fn extended(attributes: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut kept: Vec<_> = attributes
        .into_iter()
        .filter(|(name, _)| {
            name == b"security.capability"
                || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        })
        .collect();
    kept.sort();
    kept.dedup_by(|a, b| a.0 == b.0);
    kept
}

/// A path without a leading `/`, `.` and empty parts; empty for the root. Paths that climb are refused.
fn normalise(path: &[u8]) -> Result<Vec<u8>, String> {
    if path.len() > MAX_PATH {
        return Err(format!("its path is longer than {MAX_PATH} bytes"));
    }
    if path.contains(&0) {
        return Err("its path has a zero byte".into());
    }
    let mut normal = Vec::with_capacity(path.len());
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("its path leads out of the layer".into()),
            _ if part.len() > MAX_NAME => {
                return Err(format!("a name in its path is longer than {MAX_NAME} bytes"));
            }
            _ => {
                if !normal.is_empty() {
                    normal.push(b'/');
                }
                normal.extend_from_slice(part);
            }
        }
    }
    Ok(normal)
}

/// The directory above a path, and its name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() {
        name.to_vec()
    } else {
        [directory, b"/", name].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;
    use tar::Header;

    /// An entry as a test writes it: name, type, target.
    type Given<'a> = (&'a str, EntryType, &'a str);

    fn tar_of(entries: &[Given<'_>]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, kind, link) in entries {
            let mut header = Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            let content = if kind.is_file() { name.as_bytes() } else { b"" };
            header.set_size(content.len() as u64);
            let bytes = header.as_mut_bytes();
            // Names as an attacker writes them, without the builder's checks.
            bytes[..name.len()].copy_from_slice(name.as_bytes());
            bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            tar.append(&header, content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn read(entries: &[Given<'_>]) -> Result<Tree, TreeError> {
        let bytes = tar_of(entries);
        Tree::read(Cursor::new(&bytes), bytes.len() as u64)
    }

    const F: EntryType = EntryType::Regular;
    const D: EntryType = EntryType::Directory;

    fn opaque(tree: &Tree, path: &str) -> bool {
        matches!(
            tree.nodes.get(path.as_bytes()),
            Some(Node::Directory { opaque: true, .. })
        )
    }

    #[test]
    fn markers_hide_lower_layers_and_nothing_else() {
        let tree = read(&[
            ("d/", D, ""),
            ("d/new", F, ""),
            ("d/.wh..wh..opq", F, ""),
            (".wh.gone", F, ""),
            ("e/.wh.gone", F, ""),
            (".wh.f", F, ""),
            ("f", F, ""),
            (".wh.g", F, ""),
            ("g/x", F, ""),
            (".wh..wh.aufs", F, ""),
        ])
        .unwrap();
        assert!(opaque(&tree, "d") && opaque(&tree, "g") && !opaque(&tree, "e"));
        assert!(tree.nodes.contains_key(&b"d/new"[..]));
        assert_eq!(tree.nodes[&b"gone"[..]], Node::Whiteout);
        assert_eq!(tree.nodes[&b"e/gone"[..]], Node::Whiteout);
        assert!(matches!(tree.nodes[&b"f"[..]], Node::File { .. }));
        assert_eq!(tree.nodes.len(), 8, "{:?}", tree.nodes.keys());
        assert!(!tree.opaque && read(&[(".wh..wh..opq", F, "")]).unwrap().opaque);
    }

    #[test]
    fn later_entries_replace_earlier_ones() {
        let tree = read(&[
            ("a", F, ""),
            ("a/", D, ""),
            ("a/b", F, ""),
            ("a-c", F, ""),
            ("a", F, ""),
        ])
        .unwrap();
        assert_eq!(
            tree.nodes.len(),
            2,
            "a directory that becomes a file loses what is in it"
        );
        let tree = read(&[("./a/", D, ""), ("/a/b", F, ""), ("a/", D, "")]).unwrap();
        assert_eq!(tree.nodes.len(), 2, "a directory named twice keeps what is in it");
    }

    #[test]
    fn hard_links_are_names_of_one_file() {
        let tree = read(&[("a", F, ""), ("b", EntryType::Link, "/a"), ("a", F, "")]).unwrap();
        let content = |path: &[u8]| tree.content(path).unwrap();
        assert_ne!(
            content(b"a"),
            content(b"b"),
            "a name that is replaced leaves the other"
        );
        for (target, word) in [
            ("nope", "not before it"),
            ("../../etc/shadow", "leads out"),
            ("d", "directory"),
        ] {
            let why = read(&[("d/", D, ""), ("b", EntryType::Link, target)])
                .unwrap_err()
                .to_string();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn what_leads_out_or_makes_no_sense_is_refused() {
        for entries in [
            &[("../x", F, "")][..],
            &[("a/../../x", F, "")],
            &[("l", EntryType::Symlink, "/etc"), ("l/passwd", F, "")],
            &[("f", F, ""), ("f/x", F, "")],
            &[(".wh..", F, "")],
            &[("s", EntryType::GNUSparse, "")],
        ] {
            let why = read(entries).unwrap_err().to_string();
            assert!(why.contains("entry"), "{why}");
        }
        let devices = read(&[("dev/sda", EntryType::Block, ""), ("p", EntryType::Fifo, "")]).unwrap();
        assert_eq!(devices.nodes.len(), 1);
    }

    proptest! {
        #[test]
        fn every_tree_is_well_formed(entries in proptest::collection::vec((
            "(\\.\\./|\\./|/|a|b|\\.wh\\.|\\.wh\\.\\.wh\\.\\.opq|\\.\\.){1,6}",
            prop_oneof![Just(F), Just(D), Just(EntryType::Link), Just(EntryType::Symlink), Just(EntryType::Char), Just(EntryType::Fifo)],
            "(\\.\\./|/|a|b){1,4}",
        ), 0..12)) {
            let given: Vec<Given<'_>> = entries.iter().map(|(name, kind, link)| (name.as_str(), *kind, link.as_str())).collect();
            if let Ok(tree) = read(&given) {
                for path in tree.nodes.keys() {
                    prop_assert!(!path.is_empty());
                    prop_assert!(path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b"..") && !part.starts_with(WHITEOUT)));
                    let parent = split(path).0;
                    let has_parent = parent.is_empty() || matches!(tree.nodes.get(parent), Some(Node::Directory { .. }));
                    prop_assert!(has_parent);
                }
            }
        }
    }
}
