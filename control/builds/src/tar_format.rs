//! Reads the entries of a tar (ustar, GNU and PAX) from a file, with every size checked before it is believed.

use std::io::{self, Read, Seek, SeekFrom};

use tar::{EntryType, Header};

use crate::limits::MAX_EXTENSION;

const BLOCK: u64 = 512;

/// Why a tar cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The tar breaks a rule.
    #[error("the layer's tar is broken at byte {at}: {why}")]
    Broken { at: u64, why: String },
    /// The file under it failed.
    #[error("cannot read the layer: {0}")]
    Io(#[from] io::Error),
}

/// One entry: what it is called, what it is, where its content lies.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) at: u64,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryType,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u32,
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// Extended attributes, by name.
    pub(crate) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after the other.
pub(crate) struct Entries<R> {
    file: R,
    length: u64,
    at: u64,
}

/// What extended headers say about the entry that follows them.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read + Seek> Entries<R> {
    /// Reads a tar of `length` bytes.
    pub(crate) fn new(file: R, length: u64) -> Self {
        Self { file, length, at: 0 }
    }

    /// The next entry; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            let at = self.at;
            let broken = |why: String| TarError::Broken { at, why };
            let Some(header) = self.header()? else {
                return if extended {
                    Err(broken("it ends after an extended header".into()))
                } else {
                    Ok(None)
                };
            };
            let kind = header.entry_type();
            let mut size = header
                .entry_size()
                .map_err(|why| broken(format!("its size cannot be read: {why}")))?;
            match kind {
                EntryType::XHeader
                | EntryType::GNULongName
                | EntryType::GNULongLink
                | EntryType::XGlobalHeader => {
                    if size > MAX_EXTENSION {
                        return Err(broken(format!(
                            "an extended header has {size} bytes; {MAX_EXTENSION} are allowed"
                        )));
                    }
                    let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
                    self.content(size)?;
                    self.file.seek(SeekFrom::Start(at + BLOCK))?;
                    self.file.read_exact(&mut content)?;
                    match kind {
                        EntryType::XHeader => {
                            extensions.records = records(&content)
                                .ok_or_else(|| broken("an extended header is malformed".into()))?;
                        }
                        EntryType::GNULongName => extensions.path = Some(until_nul(&content).to_vec()),
                        EntryType::GNULongLink => extensions.link = Some(until_nul(&content).to_vec()),
                        // Global headers carry comments of the tool that wrote them.
                        _ => {}
                    }
                    extended = kind != EntryType::XGlobalHeader;
                }
                _ => {
                    let mut entry = entry(&header, at, kind)
                        .map_err(|why| broken(format!("a field cannot be read: {why}")))?;
                    if let Some(path) = extensions.path {
                        entry.path = path;
                    }
                    if let Some(link) = extensions.link {
                        entry.link = link;
                    }
                    apply(&mut entry, extensions.records, &mut size).map_err(broken)?;
                    // Links and directories have no content, whatever their size says.
                    entry.size = if kind.is_file() || kind == EntryType::Continuous {
                        size
                    } else {
                        0
                    };
                    entry.offset = at + BLOCK;
                    self.content(if kind.is_hard_link() || kind.is_symlink() || kind.is_dir() {
                        0
                    } else {
                        size
                    })?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The header at the present place, moving past it; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let at = self.at;
        let broken = |why: &str| TarError::Broken {
            at,
            why: why.to_owned(),
        };
        if at == self.length {
            return Ok(None);
        }
        if self.length - at < BLOCK {
            return Err(broken("it is cut short in a header"));
        }
        let mut header = Header::new_old();
        self.file.seek(SeekFrom::Start(at))?;
        self.file.read_exact(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = header
            .as_bytes()
            .iter()
            .enumerate()
            .map(|(i, byte)| {
                if (148..156).contains(&i) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(broken(
                "a header's checksum is wrong; this is not a tar, or it is damaged",
            ));
        }
        self.at += BLOCK;
        Ok(Some(header))
    }

    /// Moves past content of `size` bytes and its padding, which must be there.
    fn content(&mut self, size: u64) -> Result<(), TarError> {
        let broken = || TarError::Broken {
            at: self.at,
            why: "it is cut short in a file".into(),
        };
        let end = self
            .at
            .checked_add(size)
            .filter(|end| *end <= self.length)
            .ok_or_else(broken)?;
        self.at = end.next_multiple_of(BLOCK).min(self.length);
        Ok(())
    }
}

fn entry(header: &Header, at: u64, kind: EntryType) -> io::Result<Entry> {
    let old = header.as_old();
    // Tools may leave a field blank that means nothing to them.
    let blank = |field: &[u8]| field.iter().all(|byte| matches!(byte, 0 | b' '));
    let id = |field: &[u8], value: io::Result<u64>| {
        if blank(field) {
            Ok(0)
        } else {
            value.map(|value| u32::try_from(value).unwrap_or(u32::MAX))
        }
    };
    let device = if kind.is_character_special() || kind.is_block_special() {
        let number = |value: io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
        (number(header.device_major()), number(header.device_minor()))
    } else {
        (0, 0)
    };
    Ok(Entry {
        at,
        path: header.path_bytes().into_owned(),
        link: header
            .link_name_bytes()
            .map(std::borrow::Cow::into_owned)
            .unwrap_or_default(),
        kind,
        mode: if blank(&old.mode) {
            0
        } else {
            header.mode()? & 0o7777
        },
        uid: id(&old.uid, header.uid())?,
        gid: id(&old.gid, header.gid())?,
        // Times before 1970 are written as huge numbers by some tools.
        mtime: header
            .mtime()
            .ok()
            .and_then(|time| u32::try_from(time).ok())
            .unwrap_or(0),
        device,
        offset: 0,
        size: 0,
        attributes: Vec::new(),
    })
}

/// Applies PAX records to an entry.
fn apply(entry: &mut Entry, records: Vec<(Vec<u8>, Vec<u8>)>, size: &mut u64) -> Result<(), String> {
    const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";
    for (key, value) in records {
        let number = || {
            std::str::from_utf8(&value)
                .ok()
                .and_then(|text| text.parse::<u64>().ok())
                .ok_or_else(|| format!("{} is not a number", String::from_utf8_lossy(&key)))
        };
        match key.as_slice() {
            b"path" => entry.path = value,
            b"linkpath" => entry.link = value,
            b"size" => *size = number()?,
            b"uid" => entry.uid = u32::try_from(number()?).map_err(|_| "a user id is too large")?,
            b"gid" => entry.gid = u32::try_from(number()?).map_err(|_| "a group id is too large")?,
            b"mtime" => {
                let seconds = value.split(|byte| *byte == b'.').next().unwrap_or_default();
                let seconds = std::str::from_utf8(seconds)
                    .ok()
                    .and_then(|text| text.parse::<i64>().ok());
                let seconds = seconds.ok_or("a time is not a number")?;
                entry.mtime = u32::try_from(seconds.max(0)).unwrap_or(u32::MAX);
            }
            key if key.starts_with(b"GNU.sparse.") => {
                return Err("a file is stored sparse, which layers are not".into());
            }
            key if key.starts_with(ATTRIBUTE) => {
                entry.attributes.push((key[ATTRIBUTE.len()..].to_vec(), value));
            }
            // Access and change times, names of users: nothing that squashfs keeps.
            _ => {}
        }
    }
    Ok(())
}

/// Reads PAX records: `<length> <key>=<value>\n`, the length counting all of it.
fn records(mut content: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !content.is_empty() {
        let space = content.iter().take(20).position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&content[..space]).ok()?.parse().ok()?;
        if length > content.len() || length < space + 3 || content[length - 1] != b'\n' {
            return None;
        }
        let record = &content[space + 1..length - 1];
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        content = &content[length..];
    }
    Some(records)
}

/// Writes a PAX record.
pub(crate) fn write_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    // The length counts its own digits.
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    fn read(bytes: &[u8]) -> Result<Vec<Entry>, TarError> {
        let mut entries = Entries::new(Cursor::new(bytes), bytes.len() as u64);
        let mut all = Vec::new();
        while let Some(entry) = entries.next()? {
            all.push(entry);
        }
        Ok(all)
    }

    fn sample() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let long = format!("{}/file", "d".repeat(150));
        for (path, content) in [("a", &b"one"[..]), (&long, &[7; 600])] {
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, content).unwrap();
        }
        tar.append_pax_extensions([("SCHILY.xattr.user.x", &b"a\nb=c"[..]), ("mtime", b"12.5")])
            .unwrap();
        let mut header = Header::new_ustar();
        header.set_size(0);
        tar.append_data(&mut header, "x", &b""[..]).unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn names_contents_and_attributes_are_read() {
        let bytes = sample();
        let entries = read(&bytes).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!((entries[0].path.as_slice(), entries[0].size), (&b"a"[..], 3));
        let at = usize::try_from(entries[0].offset).unwrap();
        assert_eq!(&bytes[at..at + 3], b"one");
        assert_eq!(entries[1].path.len(), 155);
        assert_eq!(entries[2].attributes, [(b"user.x".to_vec(), b"a\nb=c".to_vec())]);
        assert_eq!(entries[2].mtime, 12);
    }

    proptest! {
        #[test]
        fn every_cut_is_an_error_or_fewer_whole_entries(cut in 0usize..sample().len()) {
            let bytes = sample();
            if let Ok(entries) = read(&bytes[..cut]) {
                for entry in entries {
                    prop_assert!(entry.offset + entry.size <= cut as u64);
                }
            }
        }

        #[test]
        fn damage_never_panics(at in 0usize..sample().len(), bytes in proptest::collection::vec(any::<u8>(), 1..40)) {
            let mut tar = sample();
            for (i, byte) in bytes.into_iter().enumerate() {
                if let Some(place) = tar.get_mut(at + i) {
                    *place = byte;
                }
            }
            let _ = read(&tar);
        }

        #[test]
        fn records_come_back(all in proptest::collection::vec(("[a-zA-Z.]{1,20}", proptest::collection::vec(any::<u8>(), 0..120)), 0..5)) {
            let mut content = Vec::new();
            for (key, value) in &all {
                write_record(&mut content, key.as_bytes(), value);
            }
            let all: Vec<_> = all.into_iter().map(|(key, value)| (key.into_bytes(), value)).collect();
            prop_assert_eq!(records(&content), Some(all));
        }

        #[test]
        fn any_records_are_read_or_refused(content in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = records(&content);
        }
    }
}
