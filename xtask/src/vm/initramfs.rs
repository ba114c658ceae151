//! The file system of a machine: test programs, which are linked statically, what they call, and its libraries.

use super::plan::{Run, SLOW};
use super::{Kernel, Selection, kernel};
use crate::exec;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const INIT: &str = include_str!("init.sh");
/// What tests and the host's daemon call, and the kernel for its modules.
const TOOLS: [&str; 8] = [
    "ip",
    "nft",
    "modprobe",
    "mksquashfs",
    "mkfs.ext4",
    "mkfs.btrfs",
    "btrfs",
    "apparmor_parser",
];
/// How long one test program may take, in seconds.
const LIMIT: u32 = 900;
const LIMIT_LONG: u32 = 2400;

/// Makes the initramfs in a directory and returns its path.
pub(super) fn make(
    directory: &Path,
    kernel: &Kernel,
    runs: &[Run<'_>],
    own_programs: &[PathBuf],
    selection: &Selection<'_>,
) -> Result<PathBuf> {
    let root = directory.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    for path in [
        "bin", "sbin", "usr/sbin", "dev", "proc", "sys", "tmp", "run", "root", "etc", "mnt", "tests",
    ] {
        std::fs::create_dir_all(root.join(path))?;
    }
    put(INIT.as_bytes(), &root.join("init"))?;
    let busybox = exec::find("busybox").context("no busybox; `cargo xtask setup` installs it")?;
    let mut programs = vec![(busybox, PathBuf::from("bin/busybox"))];
    for tool in TOOLS {
        let path = exec::find(tool).with_context(|| format!("no {tool}; `cargo xtask setup` installs it"))?;
        programs.push((path, Path::new("usr/sbin").join(tool)));
    }
    // Where the kernel looks for it.
    symlink("/usr/sbin/modprobe", root.join("sbin/modprobe"))?;
    let mut libraries = BTreeSet::new();
    for (from, to) in &programs {
        std::fs::copy(from, root.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
        libraries.extend(libraries_of(from));
    }
    // The C library opens it when a thread ends before its time, and names it nowhere.
    let unwinder = |library: &PathBuf| {
        library
            .ends_with("libc.so.6")
            .then(|| library.with_file_name("libgcc_s.so.1"))
    };
    let unwinder: Vec<PathBuf> = libraries.iter().filter_map(unwinder).collect();
    libraries.extend(unwinder.into_iter().filter(|library| library.exists()));
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let tests: BTreeMap<&Path, PathBuf> = runs
        .iter()
        .map(|run| (run.test.path.as_path(), root.join("tests").join(&run.test.name)))
        .collect();
    let own = own_programs.iter().map(|path| (path.as_path(), below(path)));
    for (from, to) in tests.into_iter().chain(own) {
        parents(&to)?;
        // Without what debuggers read, which is nine tenths of it.
        exec::quiet(Command::new("strip").arg("-o").args([&to, from]))?;
    }
    for library in libraries {
        let to = below(&library);
        parents(&to)?;
        std::fs::copy(&library, &to).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    kernel::stage_modules(kernel, &root)?;
    put(settings(selection).as_bytes(), &root.join("tests/settings"))?;
    let plan: Vec<String> = runs.iter().map(Run::to_string).collect();
    put((plan.join("\n") + "\n").as_bytes(), &root.join("tests/plan"))?;
    pack(&root, &directory.join("initramfs"))
}

/// What `init.sh` reads.
fn settings(selection: &Selection<'_>) -> String {
    let mut text = String::new();
    let limit = if selection.long { LIMIT_LONG } else { LIMIT };
    // Writing to a string does not fail.
    let _ = writeln!(text, "LIMIT={limit}");
    let mut arguments = selection.filter.unwrap_or_default().to_owned();
    for slow in SLOW.iter().filter(|_| !selection.long) {
        let _ = write!(arguments, " --skip {slow}");
    }
    let _ = writeln!(text, "ARGUMENTS='{arguments}'");
    let _ = writeln!(text, "export FLYNN_TEST_LONG={}", u8::from(selection.long));
    text
}

/// The shared libraries of a program, with the linker: none of one that is static.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = exec::quiet(Command::new("ldd").arg(program)).unwrap_or_default();
    String::from_utf8_lossy(&output)
        .lines()
        .filter_map(|line| {
            let line = line.split(" (").next()?.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

fn parents(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
    Ok(())
}

fn put(content: &[u8], to: &Path) -> Result<()> {
    std::fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Packs a tree as the kernel reads it.
fn pack(root: &Path, to: &Path) -> Result<PathBuf> {
    let file = std::fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut find = Command::new("find")
        .args([".", "-print0"])
        .current_dir(root)
        .stdout(Stdio::piped())
        .spawn()?;
    let names = find.stdout.take().context("no stdout")?;
    let mut cpio = Command::new("cpio");
    cpio.args(["--create", "--null", "--format=newc", "--quiet", "--owner=0:0"])
        .current_dir(root)
        .stdin(names)
        .stdout(file);
    let status = cpio
        .status()
        .context("cannot start cpio; `cargo xtask setup` installs it")?;
    find.wait()?;
    anyhow::ensure!(status.success(), "cpio failed: {status}");
    Ok(to.to_owned())
}
