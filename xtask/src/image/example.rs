//! The example app: an nginx of Debian's, as a docker-archive of two layers.
//!
//! It listens on `$PORT` and answers with the name of its host, so that one sees which instance answers, and with
//! `$GREETING`, so that one sees which release. Nothing in it knows of Flynn.

use super::store::{self, Store};
use super::{recipes, root};
use crate::exec;
use anyhow::{Context, Result};
use flynn_api::image::Layer;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// The docker-archive's name.
pub(crate) const ARCHIVE: &str = "example.docker.tar";

/// How nginx is to be set up; @…@ is filled in at the start.
const CONFIG: &str = "\
# Filled in by /usr/local/bin/serve.
daemon off;
user www-data;
worker_processes 1;
error_log stderr notice;
pid /run/nginx.pid;
events { worker_connections 1024; }
http {
    access_log /dev/stdout combined;
    keepalive_requests 100000;
    server {
        listen @PORT@ backlog=1024;
        listen [::]:@PORT@ backlog=1024;
        default_type text/plain;
        location / { return 200 \"@GREETING@ from $hostname at $server_addr\\n\"; }
        location = /healthy { access_log off; return 200 \"ok\\n\"; }
    }
}
";

/// The image's command.
const SERVE: &str = "\
#!/bin/sh
# Fills in nginx's configuration from the environment and becomes nginx.
set -eu
greeting=$(printf %s \"${GREETING:-Hello}\" | tr -cd '[:alnum:] .,:!?_-')
sed -e \"s/@PORT@/${PORT:-8080}/\" -e \"s/@GREETING@/$greeting/\" /etc/nginx/example.conf >/run/nginx.conf
exec nginx -c /run/nginx.conf
";

/// Makes the docker-archive.
pub(super) fn make(store: &Store, base: &Layer) -> Result<()> {
    let key = format!(
        "{} {CONFIG} {SERVE} {} base {}",
        recipes::EXAMPLE.key(),
        store::versioned(ARCHIVE),
        base.id
    );
    let archive = store.file(ARCHIVE);
    if archive.exists() && store.recall("example", &key).is_some() {
        return Ok(());
    }
    let below = store.unpacked(base)?;
    let full = store.scratch("example.root")?;
    root::debian(full.path(), &[&recipes::BASE, &recipes::EXAMPLE])?;
    put(full.path(), "etc/nginx/example.conf", CONFIG, 0o644)?;
    put(full.path(), "usr/local/bin/serve", SERVE, 0o755)?;
    root::subtract(full.path(), below.path())?;

    let work = store.scratch("example.work")?;
    let layout = work.path().join("layout");
    let image = format!("{}:latest", layout.display());
    umoci(&["init", "--layout", &layout.display().to_string()])?;
    umoci(&["new", "--image", &image])?;
    for (name, dir) in [("base.tar", below.path()), ("example.tar", full.path())] {
        let layer = work.path().join(name);
        tar(dir, &layer)?;
        umoci(&[
            "raw",
            "add-layer",
            "--image",
            &image,
            &layer.display().to_string(),
        ])?;
    }
    umoci(&[
        "config",
        "--image",
        &image,
        "--author",
        "Flynn",
        "--created",
        "2026-01-01T00:00:00Z",
        "--architecture",
        "amd64",
        "--os",
        "linux",
        "--config.workingdir",
        "/",
        "--config.env",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "--config.exposedports",
        "8080/tcp",
        "--config.cmd",
        "/usr/local/bin/serve",
    ])?;
    let made = work.path().join(ARCHIVE);
    exec::quiet(
        Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet"])
            .arg(format!("oci:{image}"))
            .arg(format!("docker-archive:{}:flynn-example:latest", made.display())),
    )?;
    fs::rename(&made, &archive).context("cannot move the docker-archive")?;
    store.remember("example", &key, ARCHIVE)?;
    crate::ui::note(&format!("docker-archive {}", archive.display()));
    Ok(())
}

fn put(root: &Path, path: &str, text: &str, mode: u32) -> Result<()> {
    let path = root.join(path);
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn umoci(args: &[&str]) -> Result<()> {
    exec::quiet(Command::new("umoci").args(args)).map(drop)
}

/// A layer as docker has them.
fn tar(dir: &Path, file: &Path) -> Result<()> {
    exec::quiet(
        Command::new("tar")
            .args([
                "--create",
                "--sort=name",
                "--numeric-owner",
                "--xattrs",
                "--format=pax",
            ])
            .arg(format!("--mtime=@{}", recipes::EPOCH))
            .args(["--pax-option=delete=atime,delete=ctime", "--file"])
            .arg(file)
            .arg("--directory")
            .arg(dir)
            .arg("."),
    )
    .map(drop)
}
