//! Volumes of a host: the `/storage` part of the host API ([`crate::host`]).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Meta;

/// The least limit that a volume can have: smaller filesystems have no room for themselves.
pub const MIN_LIMIT: u64 = 16 << 20;

/// The provider that every host has: `volumes/` in its state directory.
pub const DEFAULT_PROVIDER: &str = "default";

/// What a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum VolumeType {
    /// Jobs write to it.
    #[default]
    Data,
    /// Another volume as it was at one moment. It never changes.
    Snapshot,
}

impl VolumeType {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Snapshot => "snapshot",
        }
    }
}

/// A volume of a host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// What it is.
    #[serde(rename = "type", default)]
    pub kind: VolumeType,
    /// Whose it is: the labels of the job that it was made for ([`label`](crate::host::label)).
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// Which of the host's providers has it.
    pub provider: String,
    /// How many bytes it may hold; as many as its disk when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// How many bytes it holds, where that is known without reading all of it. Only of one volume, not in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<u64>,
    /// The volume that a snapshot or a fork was made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Since when no job gets it any more. `flynn-host volume gc` removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decommissioned_at: Option<Timestamp>,
    /// Jobs that have it mounted.
    #[serde(default)]
    pub jobs: Vec<String>,
}

/// How a provider keeps volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    /// As directories, or, with a limit, as ext4 filesystems in files that take all their room at once. No snapshots.
    #[default]
    Dir,
    /// As subvolumes of a btrfs.
    Btrfs,
    /// As datasets of a ZFS.
    Zfs,
}

impl ProviderKind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Btrfs => "btrfs",
            Self::Zfs => "zfs",
        }
    }
}

/// Where a host keeps volumes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Provider {
    /// Its name on this host.
    pub id: String,
    /// How it keeps volumes.
    pub kind: ProviderKind,
    /// The directory where they are.
    pub path: String,
    /// The dataset that is mounted there, of a ZFS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Volumes that jobs ask for, and that are not there, are made here.
    #[serde(default)]
    pub default: bool,
    /// Bytes that its disk has left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// Why its volumes cannot be had now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A provider to be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NewProvider {
    /// Its name on this host.
    pub id: String,
    /// How it shall keep volumes.
    pub kind: ProviderKind,
    /// An empty directory, or one that was a provider before.
    pub path: String,
    /// Of a ZFS: the dataset that is, or shall be, mounted there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Of a ZFS, in place of a dataset: a disk, or a file, of which a pool `flynn-<id>` is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How many bytes that file has, if it is not there: a pool has at least 64 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Whether the volumes that jobs ask for are made here from now on.
    #[serde(default)]
    pub default: bool,
}

/// A volume to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NewVolume {
    /// Its id; one is made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How many bytes it may hold; at least [`MIN_LIMIT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
}

/// A snapshot or a fork to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Copy {
    /// Its id; one is made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// What a volume shall be again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Rollback {
    /// One of its snapshots.
    pub snapshot: String,
}

/// What a volume shall hold from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Resize {
    /// How many bytes; at least [`MIN_LIMIT`].
    pub limit: u64,
}

/// Which decommissioned volumes shall be removed for good.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Gc {
    /// Those that have been decommissioned for so many seconds.
    #[serde(default)]
    pub older_than: u64,
    /// Only say which.
    #[serde(default)]
    pub dry_run: bool,
}
