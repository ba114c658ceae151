//! What the images are made of. Whatever is changed here changes a key, and with it what is made again.

/// Raised when the way in which layers are made changes.
pub(super) const VERSION: u32 = 1;

/// The Debian release of all images.
pub(super) const SUITE: &str = "bookworm";

/// The time that all files of a layer bear: layers of the same content are the same.
pub(super) const EPOCH: u64 = 1_767_225_600;

/// A set of packages.
pub(super) struct Recipe {
    pub(super) name: &'static str,
    pub(super) packages: &'static [&'static str],
    /// What the packages' scripts made and nobody wants, relative to the root.
    pub(super) remove: &'static [&'static str],
}

pub(super) const BASE: Recipe = Recipe {
    name: "base",
    packages: &["ca-certificates"],
    remove: &[],
};

/// PostgreSQL without the cluster that its package makes of its own accord.
pub(super) const POSTGRES: Recipe = Recipe {
    name: "postgres",
    packages: &["postgresql-15"],
    remove: &["etc/postgresql/15", "var/lib/postgresql/15"],
};

pub(super) const IMAGING: Recipe = Recipe {
    name: "imaging",
    packages: &["squashfs-tools"],
    remove: &[],
};

pub(super) const EXAMPLE: Recipe = Recipe {
    name: "example",
    packages: &["nginx-light"],
    remove: &[],
};

impl Recipe {
    /// All that the recipe's outcome depends on, as far as it is ours to know.
    pub(super) fn key(&self) -> String {
        let Self {
            name,
            packages,
            remove,
        } = self;
        format!("{name} {VERSION} {SUITE} {EPOCH} {packages:?} {remove:?}")
    }
}
