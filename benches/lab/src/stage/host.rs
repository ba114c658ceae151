//! The monitor of a host: makes its namespaces and file systems, then starts its process 1 and waits for its end.
//!
//! It tells the keeper `ready` once there is a network namespace to plug a cable into, goes on when it gets a line,
//! and tells `init <pid>` when the host is up.

use super::Stage;
use crate::cgroup::Group;
use crate::config::{Bind, host_address, host_name};
use crate::tool;
use anyhow::{Context, Result, bail};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where a host has the lab's program.
pub(super) const PROGRAM: &str = "/run/flynn-lab/program";
/// Where a host has the id of its boot, to be laid over the kernel's.
pub(super) const BOOT_ID: &str = "/run/flynn-lab/boot_id";

/// A host that is to boot.
#[derive(Serialize, Deserialize)]
pub(crate) struct HostPlan {
    pub(crate) lab: String,
    pub(crate) number: u8,
    pub(crate) hosts: u8,
    pub(crate) group: Group,
    /// An empty directory to put the root file system together at.
    pub(crate) stage: PathBuf,
    /// The image of its disk.
    pub(crate) disk: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) binds: Vec<Bind>,
}

pub(super) fn main() -> Result<i32> {
    let plan: HostPlan = super::plan()?;
    super::die_with_parent()?;
    plan.group.enter()?;
    crate::unshare(
        UnshareFlags::NEWCGROUP
            | UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWIPC,
    )
    .context("cannot make the host's namespaces; is this root?")?;
    plan.group.enter_v2_leaf()?;
    rustix::system::sethostname(host_name(plan.number).as_bytes()).context("cannot set the host's name")?;

    println!("ready");
    let mut go = String::new();
    std::io::stdin().lock().read_line(&mut go)?;
    if go.is_empty() {
        bail!("the keeper is gone");
    }

    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot go private")?;
    let root = root(&plan)?;
    furnish(&plan, &root)?;
    enter(&root)?;

    crate::unshare(UnshareFlags::NEWPID).context("cannot make a pid namespace")?;
    let mut init = Stage::Init
        .command(Path::new(PROGRAM))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .current_dir("/")
        .spawn()
        .context("cannot start the host's process 1")?;
    let mut up = String::new();
    std::io::BufReader::new(init.stdout.take().context("no stdout")?).read_line(&mut up)?;
    if up.trim() != "up" {
        bail!("the host's process 1 failed: {}", init.wait()?);
    }
    println!("init {}", init.id());
    std::io::stdout().flush()?;
    let status = init.wait()?;
    Ok(status.code().unwrap_or(137))
}

/// The machine's root file system below an overlay in memory.
fn root(plan: &HostPlan) -> Result<PathBuf> {
    tmpfs(&plan.stage, "mode=755")?;
    for dir in ["upper", "work", "root"] {
        fs::create_dir(plan.stage.join(dir))?;
    }
    // Relative, so that no letter in the checkout's path can be mistaken for an option.
    std::env::set_current_dir(&plan.stage)?;
    let options = c"lowerdir=/,upperdir=upper,workdir=work";
    mount("overlay", "root", "overlay", MountFlags::empty(), Some(options))
        .context("cannot mount the root overlay")?;
    std::env::set_current_dir("/")?;
    Ok(plan.stage.join("root"))
}

/// Everything that a host has of its own.
fn furnish(plan: &HostPlan, root: &Path) -> Result<()> {
    devices(root)?;
    let sys = root.join("sys");
    mount("sysfs", &sys, "sysfs", safe(), None).context("cannot mount /sys")?;
    mount("bpf", sys.join("fs/bpf"), "bpf", safe(), Some(c"mode=700")).context("cannot mount /sys/fs/bpf")?;
    cgroups(plan, root)?;
    tmpfs(&root.join("run"), "mode=755")?;
    tmpfs(&root.join("tmp"), "mode=1777")?;
    tmpfs(&root.join("var/tmp"), "mode=1777")?;
    fs::create_dir_all(root.join("run/lock"))?;

    // A disk that has taken a write has it, as far as a power cut goes, so it needs no flushes to be told to.
    let state = root.join("var/lib/flynn");
    fs::create_dir_all(&state)?;
    tool::run(
        Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,noatime"])
            .args([&plan.disk, &state]),
    )?;

    let lab = root.join("run/flynn-lab");
    fs::create_dir(&lab)?;
    bind_file(&plan.program, &root.join(&PROGRAM[1..]))?;
    fs::write(root.join(&BOOT_ID[1..]), format!("{}\n", uuid::Uuid::new_v4()))?;
    identity(plan, root)?;
    plan.binds.iter().try_for_each(|bind| show(bind, root))
}

/// The machine's devices, since loop devices cannot be had otherwise, with terminals and shared memory of its own.
fn devices(root: &Path) -> Result<()> {
    let dev = root.join("dev");
    mount_bind_recursive("/dev", &dev).context("cannot bind /dev")?;
    if dev.join("pts").exists() {
        mount(
            "devpts",
            dev.join("pts"),
            "devpts",
            safe(),
            Some(c"newinstance,ptmxmode=666,mode=600"),
        )
        .context("cannot mount /dev/pts")?;
        if fs::symlink_metadata(dev.join("ptmx")).is_ok_and(|meta| meta.is_file()) {
            bind_file(&dev.join("pts/ptmx"), &dev.join("ptmx"))?;
        }
    }
    if dev.join("shm").exists() {
        tmpfs(&dev.join("shm"), "mode=1777")?;
    }
    Ok(())
}

/// The host's cgroup subtree at the place where the machine has the whole: within the host's cgroup namespace, a
/// hierarchy mounted anew has the host's own group as its root.
fn cgroups(plan: &HostPlan, root: &Path) -> Result<()> {
    let top = root.join("sys/fs/cgroup");
    if plan
        .group
        .hierarchies()
        .iter()
        .any(|hierarchy| hierarchy.mount != Path::new("/sys/fs/cgroup"))
    {
        tmpfs(&top, "mode=755")?;
    }
    for hierarchy in plan.group.hierarchies() {
        let at = root.join(hierarchy.mount.strip_prefix("/")?);
        if !at.exists() {
            fs::create_dir(&at)?;
        }
        let (kind, options) = match &hierarchy.v1 {
            None => ("cgroup2", None),
            Some(options) if options.contains("name=") => {
                ("cgroup", Some(CString::new(format!("none,{options}"))?))
            }
            Some(options) => ("cgroup", Some(CString::new(options.as_str())?)),
        };
        mount(kind, &at, kind, safe(), options.as_deref())
            .with_context(|| format!("cannot mount {} for the host", hierarchy.mount.display()))?;
    }
    // Where the machine names a hierarchy twice (`cpu` for `cpu,cpuacct`), so does the host.
    for entry in fs::read_dir("/sys/fs/cgroup")? {
        let entry = entry?;
        if entry.file_type()?.is_symlink() {
            symlink(fs::read_link(entry.path())?, top.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Names and ids: those of a host that was installed once and boots often.
fn identity(plan: &HostPlan, root: &Path) -> Result<()> {
    let name = host_name(plan.number);
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for number in 1..=plan.hosts {
        hosts.push_str(&format!("{} {}\n", host_address(number), host_name(number)));
    }
    let id = uuid::Uuid::new_v5(
        &uuid::Uuid::NAMESPACE_OID,
        format!("{}/{name}", plan.lab).as_bytes(),
    );
    for (file, text) in [
        ("etc/hostname", format!("{name}\n")),
        ("etc/hosts", hosts),
        ("etc/machine-id", format!("{}\n", id.simple())),
        // Nothing answers there: hosts have no way out.
        ("etc/resolv.conf", "nameserver 192.0.2.1\n".to_owned()),
    ] {
        let path = root.join(file);
        // It may be a link out of /etc.
        let _ = fs::remove_file(&path);
        fs::write(&path, text).with_context(|| format!("cannot write the host's /{file}"))?;
    }
    Ok(())
}

/// Lays a file or directory of the machine over what the host has, read-only.
fn show(bind: &Bind, root: &Path) -> Result<()> {
    let to = root.join(bind.to.strip_prefix("/")?);
    let context = || format!("cannot show {} to the host", bind.from.display());
    if fs::metadata(&bind.from).with_context(context)?.is_dir() {
        fs::create_dir_all(&to).with_context(context)?;
        mount_bind(&bind.from, &to).with_context(context)?;
    } else {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        bind_file(&bind.from, &to)?;
    }
    rustix::mount::mount_remount(&to, MountFlags::BIND | MountFlags::RDONLY, c"").with_context(context)
}

fn bind_file(from: &Path, to: &Path) -> Result<()> {
    if !to.exists() {
        File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
    }
    mount_bind(from, to).with_context(|| format!("cannot bind {}", from.display()))
}

/// Makes `root` the root and lets go of the machine's.
fn enter(root: &Path) -> Result<()> {
    // /proc of the machine stays in reach until process 1 has mounted its own.
    mount_bind("/proc", root.join("proc")).context("cannot bind /proc")?;
    std::env::set_current_dir(root)?;
    rustix::process::pivot_root(".", ".").context("cannot change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("cannot let go of the machine's root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn tmpfs(at: &Path, options: &str) -> Result<()> {
    let options = CString::new(options)?;
    mount("tmpfs", at, "tmpfs", MountFlags::NODEV, Some(options.as_c_str())).with_context(|| {
        format!(
            "cannot mount a tmpfs at {}",
            String::from_utf8_lossy(at.as_os_str().as_bytes())
        )
    })
}

fn safe() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}
