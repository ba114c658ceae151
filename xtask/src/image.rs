//! `cargo xtask image`: squashfs layers and manifests in `target/images`, from Debian packages and our binary.
//!
//! | image | layers, lowest first |
//! | --- | --- |
//! | `base` | Debian's smallest root file system |
//! | `postgres` | base, PostgreSQL, the binary |
//! | `imaging` | base, squashfs-tools, the binary |
//! | `system` | a skeleton of a root file system, the binary |
//!
//! `<name>.json` is the manifest (its canonical JSON, so that its digest is its id), `layers/<id>.squashfs` a
//! layer. `example.docker.tar` is a docker-archive to deploy. Each is made again only when what it is made of has
//! changed; `cargo clean` has all made anew, with the newest packages.

mod example;
mod recipes;
mod root;
mod squash;
mod store;

use crate::setup::{self, Need};
use crate::{build, ui, workspace};
use anyhow::{Context, Result};
pub(crate) use example::ARCHIVE;
use flynn_api::image::{Entrypoint, ImageManifest, Layer};
use std::collections::BTreeSet;
use store::Store;

/// Which images to make.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Which images; all unless named
    names: Vec<Name>,
    #[command(flatten)]
    profile: build::Profile,
}

/// The images there are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Name {
    /// Debian's smallest root file system
    Base,
    /// PostgreSQL, with our binary as its keeper
    Postgres,
    /// What turns docker layers into squashfs
    Imaging,
    /// Our binary alone
    System,
    /// An nginx from Debian's packages as a docker-archive
    Example,
}

impl Name {
    /// The names in the order of making.
    pub(crate) const ALL: [Self; 5] = [
        Self::Base,
        Self::Postgres,
        Self::Imaging,
        Self::System,
        Self::Example,
    ];

    fn wants_binary(self) -> bool {
        matches!(self, Self::Postgres | Self::Imaging | Self::System)
    }
}

/// Makes images.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::check(&[Need::Build, Need::Images])?;
    let names: BTreeSet<Name> = if args.names.is_empty() {
        Name::ALL.into()
    } else {
        args.names.iter().copied().collect()
    };
    if names.iter().any(|name| name.wants_binary()) {
        build::run(args.profile)?;
    }
    make(&names, args.profile)
}

/// Makes images of binaries that are built.
pub(crate) fn make(names: &BTreeSet<Name>, profile: build::Profile) -> Result<()> {
    let dir = workspace::images();
    let _lock = workspace::lock(&dir.join("lock"))?;
    let store = Store::open(dir)?;
    ui::timed("Making the images", || {
        let base = base(&store)?;
        for name in names {
            match name {
                Name::Base => store.manifest(
                    "base",
                    &ImageManifest::new(entrypoint(&["/bin/sh"]), vec![base.clone()]),
                )?,
                Name::Postgres => {
                    let layers = vec![
                        base.clone(),
                        packages(&store, &recipes::POSTGRES, &base)?,
                        binary(&store, profile)?,
                    ];
                    store.manifest(
                        "postgres",
                        &ImageManifest::new(entrypoint(&["/bin/flynn-system", "postgres"]), layers),
                    )?;
                }
                Name::Imaging => {
                    let layers = vec![
                        base.clone(),
                        packages(&store, &recipes::IMAGING, &base)?,
                        binary(&store, profile)?,
                    ];
                    store.manifest(
                        "imaging",
                        &ImageManifest::new(entrypoint(&["/bin/flynn-system", "tarreceive"]), layers),
                    )?;
                }
                Name::System => {
                    let layers = vec![skeleton(&store, &base)?, binary(&store, profile)?];
                    store.manifest(
                        "system",
                        &ImageManifest::new(entrypoint(&["/bin/flynn-system"]), layers),
                    )?;
                }
                Name::Example => example::make(&store, &base)?,
            }
        }
        store.sweep()
    })
}

fn entrypoint(args: &[&str]) -> Entrypoint {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Entrypoint {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: [("PATH".to_owned(), path.to_owned())].into(),
        ..Entrypoint::default()
    }
}

/// The layer below all that is made of Debian's packages.
fn base(store: &Store) -> Result<Layer> {
    store.layer("base", &recipes::BASE.key(), |dir| {
        root::debian(dir, &[&recipes::BASE])
    })
}

/// What a recipe adds to the base.
fn packages(store: &Store, recipe: &recipes::Recipe, base: &Layer) -> Result<Layer> {
    let key = format!("{}\nbase {}", recipe.key(), base.id);
    store.layer(recipe.name, &key, |dir| {
        let below = store.unpacked(base)?;
        root::debian(dir, &[&recipes::BASE, recipe])?;
        root::subtract(dir, below.path())
    })
}

/// The static binary. `/bin` is a link, as Debian has it, so that the layer can lie over Debian's.
fn binary(store: &Store, profile: build::Profile) -> Result<Layer> {
    let path = profile.binary("flynn-system");
    let digest = store::digest_of(&path).context("the binary is not built; run `cargo xtask build`")?;
    store.layer("binary", &format!("binary {digest}"), |dir| {
        root::binary(dir, &path)
    })
}

/// The rest of the system image's root file system.
fn skeleton(store: &Store, base: &Layer) -> Result<Layer> {
    store.layer(
        "skeleton",
        &format!("skeleton {} base {}", recipes::VERSION, base.id),
        |dir| {
            let below = store.unpacked(base)?;
            root::skeleton(dir, below.path())
        },
    )
}
