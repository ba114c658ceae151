//! What a layer may at most be.

/// Bytes of an uncompressed layer.
pub(crate) const MAX_LAYER: u64 = 32 << 30;
/// Names in a layer.
pub(crate) const MAX_ENTRIES: usize = 2_000_000;
/// Bytes of all names, link targets and attributes of a layer.
pub(crate) const MAX_NAMES: usize = 512 << 20;
/// Bytes of one entry's extended header.
pub(crate) const MAX_EXTENSION: u64 = 1 << 20;
/// Bytes of a path.
pub(crate) const MAX_PATH: usize = 4095;
/// Bytes of one name in a path: what squashfs takes.
pub(crate) const MAX_NAME: usize = 255;
/// Bytes of an `/etc/passwd` or `/etc/group` that is kept for finding users.
pub(crate) const MAX_ACCOUNTS: u64 = 256 << 10;
/// Layers of an image.
pub(crate) const MAX_LAYERS: usize = 500;
/// Conversions at a time; others wait.
pub(crate) const CONVERSIONS: usize = 2;
/// Uploads at a time, those that are received included; others are told to come back.
pub(crate) const UPLOADS: usize = 32;
