//! Root file systems: from Debian's packages, as what one has more than another, and by hand.

use super::recipes::{self, Recipe};
use crate::exec;
use anyhow::{Context, Result};
use std::fs::{self, Metadata, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// What a Debian root holds of the machine that made it, or of the making.
const EMPTIED: &[&str] = &[
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "var/log",
    "var/cache",
    "var/lib/apt/lists",
    "var/tmp",
];
const REMOVED: &[&str] = &[
    "etc/hostname",
    "etc/hosts",
    "etc/resolv.conf",
    "etc/machine-id",
    "etc/.pwd.lock",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd",
];

/// Makes a Debian root with the packages of these recipes in an empty directory.
pub(super) fn debian(dir: &Path, recipes: &[&Recipe]) -> Result<()> {
    let packages: Vec<&str> = recipes
        .iter()
        .flat_map(|recipe| recipe.packages)
        .copied()
        .collect();
    exec::quiet(
        // Namespaces of its own: whatever mmdebstrap mounts or starts goes with it, however it ends.
        Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "mmdebstrap",
            ])
            .args([
                "--quiet",
                "--mode=root",
                "--format=directory",
                "--variant=minbase",
            ])
            .arg(format!("--include={}", packages.join(",")))
            .args(
                ["doc", "man", "locale", "info", "lintian"]
                    .map(|dir| format!("--dpkgopt=path-exclude=/usr/share/{dir}/*")),
            )
            .arg(recipes::SUITE)
            .arg(dir)
            .env("SOURCE_DATE_EPOCH", recipes::EPOCH.to_string()),
    )?;
    for path in EMPTIED {
        empty(&dir.join(path))?;
    }
    for path in REMOVED
        .iter()
        .chain(recipes.iter().flat_map(|recipe| recipe.remove))
    {
        remove(&dir.join(path))?;
    }
    Ok(())
}

/// Takes away from `dir` all that is the same in `below`. What is only in `below` shines through, as it would if
/// `dir` had been an overlay's upper directory in which nothing was deleted.
pub(super) fn subtract(dir: &Path, below: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let upper = entry?.path();
        let Some(name) = upper.file_name() else { continue };
        let lower = below.join(name);
        let Ok(theirs) = lower.symlink_metadata() else {
            continue;
        };
        let ours = upper.symlink_metadata()?;
        if ours.is_dir() && theirs.is_dir() {
            subtract(&upper, &lower)?;
            if alike(&ours, &theirs) {
                // Succeeds only if nothing is left in it.
                let _ = fs::remove_dir(&upper);
            }
        } else if alike(&ours, &theirs) && same_content(&upper, &lower, &ours)? {
            fs::remove_file(&upper).with_context(|| format!("cannot remove {}", upper.display()))?;
        }
    }
    Ok(())
}

/// The root of the binary's layer.
pub(super) fn binary(dir: &Path, binary: &Path) -> Result<()> {
    directories(dir, &[("usr", 0o755), ("usr/bin", 0o755)])?;
    symlink("usr/bin", dir.join("bin"))?;
    let target = dir.join("usr/bin/flynn-system");
    fs::copy(binary, &target).with_context(|| format!("cannot copy {}", binary.display()))?;
    fs::set_permissions(&target, Permissions::from_mode(0o755))?;
    Ok(())
}

/// The root of the layer that the system image has in place of Debian. The authorities are Debian's.
pub(super) fn skeleton(dir: &Path, debian: &Path) -> Result<()> {
    let plain = [
        "etc",
        "etc/ssl",
        "etc/ssl/certs",
        "dev",
        "proc",
        "sys",
        "run",
        "var",
        "var/lib",
        "var/log",
        "data",
    ];
    directories(dir, &plain.map(|path| (path, 0o755)))?;
    directories(dir, &[("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700)])?;
    for (path, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\n",
        ),
    ] {
        fs::write(dir.join(path), text)?;
    }
    let authorities = "etc/ssl/certs/ca-certificates.crt";
    fs::copy(debian.join(authorities), dir.join(authorities)).context("the base image has no authorities")?;
    Ok(())
}

fn directories(dir: &Path, paths: &[(&str, u32)]) -> Result<()> {
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    for (path, mode) in paths {
        let path = dir.join(path);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(*mode))?;
    }
    Ok(())
}

/// Same kind, rights and owner; times do not count, for all files of a layer bear the same.
fn alike(ours: &Metadata, theirs: &Metadata) -> bool {
    (ours.mode(), ours.uid(), ours.gid(), ours.rdev())
        == (theirs.mode(), theirs.uid(), theirs.gid(), theirs.rdev())
}

fn same_content(upper: &Path, lower: &Path, ours: &Metadata) -> Result<bool> {
    if ours.is_symlink() {
        return Ok(fs::read_link(upper)? == fs::read_link(lower)?);
    }
    if !ours.is_file() {
        return Ok(true);
    }
    if ours.len() != lower.metadata()?.len() {
        return Ok(false);
    }
    let (mut ours, mut theirs) = (fs::File::open(upper)?, fs::File::open(lower)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let read = ours.read(&mut left)?;
        if read == 0 {
            return Ok(true);
        }
        theirs.read_exact(&mut right[..read])?;
        if left[..read] != right[..read] {
            return Ok(false);
        }
    }
}

/// Removes what is in a directory, or in the tree below `var/log` and its like, and keeps the directory.
fn empty(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        remove(&entry?.path())?;
    }
    Ok(())
}

/// Removes a file or a tree, if it is there.
fn remove(path: &Path) -> Result<()> {
    let Ok(meta) = path.symlink_metadata() else {
        return Ok(());
    };
    if meta.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
    .with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtraction_leaves_what_differs() {
        let tmp = tempfile::tempdir().unwrap();
        let (upper, lower) = (tmp.path().join("upper"), tmp.path().join("lower"));
        for root in [&upper, &lower] {
            fs::create_dir_all(root.join("same/deep")).unwrap();
            fs::create_dir_all(root.join("mixed")).unwrap();
            fs::write(root.join("same/deep/file"), "equal").unwrap();
            fs::write(root.join("mixed/equal"), "equal").unwrap();
            symlink("target", root.join("link")).unwrap();
            fs::write(root.join("mode"), "equal").unwrap();
        }
        fs::write(upper.join("mixed/changed"), "one").unwrap();
        fs::write(lower.join("mixed/changed"), "two").unwrap();
        fs::write(upper.join("new"), "new").unwrap();
        fs::write(lower.join("gone"), "gone").unwrap();
        fs::set_permissions(upper.join("mode"), Permissions::from_mode(0o600)).unwrap();

        subtract(&upper, &lower).unwrap();

        let mut left: Vec<_> = fs::read_dir(&upper)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["mixed", "mode", "new"]);
        let mixed: Vec<_> = fs::read_dir(upper.join("mixed"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(mixed, ["changed"]);
    }
}
