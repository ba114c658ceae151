//! What is known of a volume: `volume.json` beside its data.

use std::io;
use std::path::Path;

use flynn_api::Meta;
use flynn_api::volume::VolumeType;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::files;

const FILE: &str = "volume.json";

/// The form of the file that this release writes. Version 1 had no more than the time: a plain directory.
const VERSION: u32 = 2;

/// What the names of directories begin with that are not volumes (yet, or any more).
pub(super) const UNFINISHED: &str = ".unfinished-";

/// The same, of an older release.
pub(super) const REMOVED: &str = ".removed-";

/// The longest id.
const MAX_ID: usize = 100;

/// In what form a volume's data are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Form {
    /// A plain directory.
    #[default]
    Directory,
    /// An ext4 in a file.
    Image,
    /// A subvolume of a btrfs.
    Subvolume,
    /// A dataset of a ZFS.
    Dataset,
}

/// A volume's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    /// When the volume was made.
    pub(super) created_at: Timestamp,
    #[serde(default)]
    pub(super) form: Form,
    #[serde(rename = "type", default)]
    pub(super) kind: VolumeType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) limit: Option<u64>,
    /// The limit that it is about to get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) resizing: Option<u64>,
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub(super) meta: Meta,
    /// Which of the provider's datasets it is: `name`, or of a snapshot `name@name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) dataset: Option<String>,
    /// The volume of which this is a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) decommissioned_at: Option<Timestamp>,
}

impl Record {
    /// That of a new volume.
    pub(super) fn new(created_at: Timestamp, form: Form, limit: Option<u64>, meta: Meta) -> Self {
        Self {
            version: VERSION,
            created_at,
            form,
            limit,
            meta,
            ..Self::default()
        }
    }

    /// That of a volume made of this one, whose id is `id`.
    pub(super) fn copy(&self, id: &str, created_at: Timestamp, kind: VolumeType) -> Self {
        Self {
            kind,
            source: Some(id.to_owned()),
            ..Self::new(created_at, self.form, self.limit, self.meta.clone())
        }
    }

    /// Reads the record in a volume's directory; `None` when there is none.
    pub(super) fn read(dir: &Path) -> io::Result<Option<Self>> {
        let record: Option<Self> = files::read_json(&dir.join(FILE))?;
        match record {
            Some(record) if record.version > VERSION => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a later release of flynn-host has made it: use that one",
            )),
            record => Ok(record),
        }
    }

    /// Writes it there.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        files::write_json(&dir.join(FILE), self)
    }
}

/// Whether a text can be a volume's id: it is a directory's name.
pub fn is_volume_id(id: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !id.is_empty() && id.len() <= MAX_ID && !id.starts_with('.') && id.chars().all(fits)
}

/// The id of a volume once it is decommissioned, so that its own is free for another.
pub(super) fn aside(id: &str, at: Timestamp) -> String {
    let suffix = format!(".until-{}", at.as_millisecond());
    if id.ends_with(&suffix) {
        return id.to_owned();
    }
    let room = MAX_ID.saturating_sub(suffix.len());
    format!("{}{suffix}", &id[..id.len().min(room)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        let time = || (0_i64..4_000_000_000).prop_map(|second| Timestamp::from_second(second).unwrap());
        let form = prop_oneof![Just(Form::Directory), Just(Form::Image), Just(Form::Subvolume)];
        let meta = proptest::collection::btree_map(".{0,10}", ".{0,10}", 0..3);
        let copy = proptest::option::of("[a-z0-9-]{1,20}");
        let limit = proptest::option::of(any::<u64>());
        let parts = (time(), form, limit, meta, copy, proptest::option::of(time()));
        parts.prop_map(
            |(created_at, form, limit, meta, source, decommissioned_at)| Record {
                kind: if source.is_some() {
                    VolumeType::Snapshot
                } else {
                    VolumeType::Data
                },
                source,
                decommissioned_at,
                ..Record::new(created_at, form, limit, meta)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_written_is_read(record in record()) {
            let dir = tempfile::tempdir().unwrap();
            record.write(dir.path()).unwrap();
            prop_assert_eq!(Record::read(dir.path()).unwrap(), Some(record));
        }

        #[test]
        fn damage_is_an_error_or_a_record_and_never_a_panic(
            record in record(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()
        ) {
            let dir = tempfile::tempdir().unwrap();
            record.write(dir.path()).unwrap();
            let mut bytes = std::fs::read(dir.path().join(FILE)).unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            std::fs::write(dir.path().join(FILE), bytes).unwrap();
            let read = Record::read(dir.path());
            prop_assert!(!cut || read.is_err());
        }

        #[test]
        fn an_id_is_one_name_in_its_directory(id in ".{0,120}") {
            if is_volume_id(&id) {
                let path = Path::new("/volumes").join(&id);
                prop_assert_eq!(path.parent(), Some(Path::new("/volumes")));
                prop_assert_eq!(path.file_name().and_then(|name| name.to_str()), Some(id.as_str()));
                prop_assert!(!id.starts_with(UNFINISHED));
            }
        }

        #[test]
        fn a_decommissioned_volume_has_another_id(id in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,99}", second in 0_i64..4_000_000_000) {
            prop_assume!(is_volume_id(&id));
            let at = Timestamp::from_second(second).unwrap();
            let other = aside(&id, at);
            prop_assert!(is_volume_id(&other) && (other != id || id.contains(".until-")));
            prop_assert_eq!(aside(&other, at), other.clone());
        }
    }

    #[test]
    fn what_the_first_release_wrote_is_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"version":1,"created_at":"2026-01-02T03:04:05Z"}"#;
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let record = Record::read(dir.path()).unwrap().unwrap();
        assert_eq!((record.form, record.limit), (Form::Directory, None));
        std::fs::write(dir.path().join(FILE), text.replace(":1,", ":9,")).unwrap();
        assert!(Record::read(dir.path()).is_err());
    }
}
