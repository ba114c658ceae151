//! `cargo xtask dist`: builds a release and publishes it in a repository, made with `flynn-host repository init`.

use crate::setup::{self, Need};
use crate::{build, exec, image, ui, workspace};
use anyhow::Result;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

/// The programs that a release has beside its images.
const PROGRAMS: [&str; 2] = ["flynn-host", "flynn"];

/// What to publish, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The repository
    repository: PathBuf,
    /// Where the keys of the channel, snapshot and timestamp are
    #[arg(long, value_name = "DIR", required = true)]
    keys: Vec<PathBuf>,
    /// The channel
    #[arg(long, default_value = "stable")]
    channel: String,
    /// The release's version
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    release: String,
}

/// Builds binaries and images, always optimised, and publishes them.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::check(&[Need::Build, Need::Images])?;
    let profile = build::Profile::default();
    build::run(profile)?;
    image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    ui::timed("Publishing the release", || {
        let mut publish = Command::new(profile.binary("flynn-host"));
        publish
            .args(["repository", "publish"])
            .arg(&args.repository)
            .args(["--channel", &args.channel, "--release", &args.release])
            .arg("--images")
            .arg(workspace::images());
        for keys in &args.keys {
            publish.arg("--keys").arg(keys);
        }
        for program in PROGRAMS {
            publish.arg("--program").arg(profile.binary(program));
        }
        exec::run(&mut publish)
    })
}
