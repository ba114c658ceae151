//! The container's file system, made from inside its mount namespace.
//!
//! Images are not trusted: until the root has been changed no path of the image is resolved, and what the container
//! gets from the host (layers, volumes, mounts) is opened before and moved in by descriptor.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use flynn_api::Env;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, makedev, mknodat, openat2};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};

use super::init::{Around, Attempt, Failure, bind_to_supervisor};
use super::{Place, UserNamespace};
use crate::launch::{Bind, Launch};
use crate::sys;

/// What of `/proc` and `/sys` a container must not see.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/interrupts",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What of `/proc` it must not change.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// What is the kernel's: nothing is mounted there unless it is named.
const TAKEN: [&str; 6] = ["/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"];

/// Makes the root file system and moves into it. Gives the host's `resolv.conf`, which is out of sight then.
pub(super) fn set_up(around: &Around<'_>) -> Result<Vec<u8>, Failure> {
    let Around { launch, users, .. } = *around;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .attempt("separate the container's mounts")?;
    let hosts_resolver = fs::read("/etc/resolv.conf").unwrap_or_default();
    let binds = launch
        .binds
        .iter()
        .map(|bind| open_bind(bind, users))
        .collect::<Result<Vec<_>, _>>()?;
    let root = mount_root(around)?;
    enter(&root)?;
    drop(root);
    if let Some(users) = users {
        users.make_for_root().attempt("act for the container's root")?;
        bind_to_supervisor()?;
    }

    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("proc", "/proc", plain, "")?;
    mount_at("sysfs", "/sys", plain | MountFlags::RDONLY, "")?;
    devices(users)?;
    for (bind, mount) in launch.binds.iter().zip(&binds) {
        place_bind(bind, mount)?;
    }
    protect()?;
    directory(Path::new("/tmp"), 0o1777)?;
    rustix::system::sethostname(launch.hostname.as_bytes()).attempt("set the host name")?;
    directory(Path::new(&launch.working_dir), 0o755)?;
    Ok(hosts_resolver)
}

/// Does what depends on where the container is. Gives the program's whole environment.
pub(super) fn settle(launch: &Launch, place: &Place, hosts_resolver: &[u8]) -> Result<Env, Failure> {
    network_files(launch, place, hosts_resolver)?;
    Ok(environment(launch, place))
}

/// Opens a detached copy of a host directory or file, with the flags it gets in the container.
fn open_bind(bind: &Bind, users: Option<&UserNamespace>) -> Result<OwnedFd, Failure> {
    let what = || format!("open {} for the container", bind.source.display());
    let tree = if let Some(users) = users.filter(|_| bind.ids_of_container) {
        users.tree(&bind.source).attempt(what())?
    } else {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, &bind.source, flags).attempt(what())?
    };
    let mut attributes = libc::MOUNT_ATTR_NOSUID;
    if !bind.source.starts_with("/dev") {
        attributes |= libc::MOUNT_ATTR_NODEV;
    }
    if !bind.writable {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    sys::set_mount_attributes(tree.as_fd(), attributes, false).attempt(what())?;
    Ok(tree)
}

/// Mounts the layers and the writable directory over one another. All go in as descriptors: a mount takes one page of
/// options, which some forty digests would fill.
fn mount_root(around: &Around<'_>) -> Result<PathBuf, Failure> {
    let job_dir = around.job_dir;
    let open = |path: &Path| {
        rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(format_args!("open {}", path.display()))
    };
    let layer = |path: &PathBuf| {
        if let Some(users) = around.users {
            // An overlay takes no mount that is nowhere. This one is here, in the container's own namespace, until the root
            // is changed.
            let what = || format!("show {} to the container", path.display());
            let mapped = users.tree(path).attempt(what())?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(mapped, "", CWD, path, flags).attempt(what())?;
        }
        open(path)
    };
    let layers = around
        .launch
        .layers
        .iter()
        .rev()
        .map(layer)
        .collect::<Result<Vec<_>, _>>()?;
    let (upper, work) = around.own.show(job_dir).attempt("mount the temporary disk")?;
    let (upper, work) = (open(&upper)?, open(&work)?);
    let lower: Vec<String> = layers.iter().map(sys::fd_path).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        sys::fd_path(&upper),
        sys::fd_path(&work)
    );
    let options = std::ffi::CString::new(options).attempt("name the layers")?;
    let root = job_dir.join("root");
    mount(
        "overlay",
        &root,
        "overlay",
        MountFlags::NODEV,
        Some(options.as_c_str()),
    )
    .attempt("mount the image's layers")?;
    Ok(root)
}

/// Makes `root` the root and lets go of the old one.
fn enter(root: &Path) -> Result<(), Failure> {
    rustix::process::chdir(root).attempt("enter the root file system")?;
    rustix::process::pivot_root(".", ".").attempt("change the root")?;
    unmount(".", UnmountFlags::DETACH).attempt("let go of the host's root")?;
    rustix::process::chdir("/").attempt("enter the root file system")
}

fn mount_at(kind: &str, target: &str, flags: MountFlags, options: &str) -> Result<(), Failure> {
    // Programs, and what hides parts of it below, look for it where it belongs.
    if Path::new(target).is_symlink() {
        return Err(format!(
            "cannot mount {target}: in the image {target} is a link, not a directory"
        ));
    }
    directory(Path::new(target), 0o755)?;
    let options = std::ffi::CString::new(options).attempt("mount")?;
    mount(kind, target, kind, flags, Some(options.as_c_str())).attempt(format_args!("mount {target}"))
}

fn devices(users: Option<&UserNamespace>) -> Result<(), Failure> {
    mount_at(
        "tmpfs",
        "/dev",
        MountFlags::NOSUID | MountFlags::STRICTATIME,
        "mode=755,size=64k",
    )?;
    for (name, major, minor) in DEVICES {
        let path = format!("/dev/{name}");
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            Mode::empty(),
            makedev(major, minor),
        )
        .attempt(format_args!("make {path}"))?;
        // Not through mknod's mode, which the umask cuts.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).attempt(format_args!("make {path}"))?;
    }
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at(
        "devpts",
        "/dev/pts",
        plain,
        // The group `tty` of the container.
        &format!(
            "newinstance,ptmxmode=0666,mode=0620,gid={}",
            users.map_or(0, UserNamespace::first) + 5
        ),
    )?;
    mount_at(
        "tmpfs",
        "/dev/shm",
        plain | MountFlags::NODEV,
        "mode=1777,size=64m",
    )?;
    // Not every kernel has message queues.
    let _ = mount_at("mqueue", "/dev/mqueue", plain | MountFlags::NODEV, "");
    LINKS
        .iter()
        .try_for_each(|(target, link)| symlink(target, link).attempt(format_args!("make {link}")))
}

fn place_bind(bind: &Bind, mount: &OwnedFd) -> Result<(), Failure> {
    let what = || format!("mount {}", bind.target.display());
    let stat = rustix::fs::fstat(mount).attempt(what())?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        directory(&bind.target, 0o755)?;
    } else {
        directory(bind.target.parent().unwrap_or(Path::new("/")), 0o755)?;
        fs::File::options()
            .append(true)
            .create(true)
            .open(&bind.target)
            .attempt(what())?;
    }
    // The image, or a volume, may have a link there.
    let place = openat2(
        CWD,
        &bind.target,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
    .attempt(what())?;
    let there = rustix::fs::fstat(&place).attempt(what())?;
    let root = rustix::fs::stat("/").attempt(what())?;
    let is_taken = |path: &&str| {
        let is_meant = bind.target.starts_with(path);
        !is_meant && rustix::fs::stat(*path).is_ok_and(|taken| taken.st_dev == there.st_dev)
    };
    if (there.st_dev, there.st_ino) == (root.st_dev, root.st_ino) || TAKEN.iter().any(is_taken) {
        let target = bind.target.display();
        return Err(format!(
            "{target} leads where nothing may be mounted: is there a link in the image?"
        ));
    }
    move_mount(
        mount,
        "",
        &place,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .attempt(what())
}

fn protect() -> Result<(), Failure> {
    for path in READ_ONLY.iter().filter(|path| Path::new(path).exists()) {
        let flags = MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOEXEC;
        mount_bind(*path, *path).attempt(format_args!("protect {path}"))?;
        mount_remount(*path, flags, c"").attempt(format_args!("protect {path}"))?;
    }
    for path in MASKED {
        let hidden = match fs::metadata(path) {
            Err(_) => continue,
            Ok(metadata) if metadata.is_dir() => mount(
                "tmpfs",
                path,
                "tmpfs",
                MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
                None,
            ),
            Ok(_) => mount_bind("/dev/null", path),
        };
        hidden.attempt(format_args!("hide {path}"))?;
    }
    Ok(())
}

fn network_files(launch: &Launch, place: &Place, hosts_resolver: &[u8]) -> Result<(), Failure> {
    let resolver = match place.gateway {
        Some(gateway) => format!("nameserver {gateway}\n").into_bytes(),
        None => hosts_resolver.to_vec(),
    };
    let own = place
        .address
        .map(|address| format!("{address} {}\n", launch.hostname))
        .unwrap_or_default();
    let hosts = format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n{own}");
    directory(Path::new("/etc"), 0o755)?;
    let files: [(&str, &[u8]); 3] = [
        ("/etc/resolv.conf", &resolver),
        ("/etc/hosts", hosts.as_bytes()),
        (
            "/etc/hostname",
            format!("{}\n", launch.hostname).into_bytes().leak(),
        ),
    ];
    for (path, content) in files {
        // In images these may be links to what is not there.
        crate::files::remove_all(Path::new(path)).attempt(format_args!("replace {path}"))?;
        fs::write(path, content).attempt(format_args!("write {path}"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).attempt(format_args!("write {path}"))?;
    }
    Ok(())
}

/// Makes a directory unless it is there.
fn directory(path: &Path, mode: u32) -> Result<(), Failure> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).attempt(format_args!("make {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .attempt(format_args!("make {}", path.display()))
}

/// The launch's environment, what the network's start has told, and what programs take for granted.
pub(super) fn environment(launch: &Launch, place: &Place) -> Env {
    let mut env = launch.env.clone();
    env.insert(
        "EXTERNAL_IP".into(),
        place.address.unwrap_or(launch.host_ip).to_string(),
    );
    if let Some(gateway) = place.gateway {
        env.insert(
            "DISCOVERD".into(),
            format!("http://{gateway}:{}", flynn_api::discovery::PORT),
        );
    }
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    env.entry("PATH".into()).or_insert_with(|| path.into());
    env.entry("HOME".into()).or_insert_with(|| {
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        home_of(&users, launch.uid)
            .unwrap_or(if launch.uid == 0 { "/root" } else { "/" })
            .into()
    });
    env
}

/// A user's home directory by `/etc/passwd`.
fn home_of(users: &str, uid: u32) -> Option<&str> {
    users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid))
            .then(|| fields.get(5).copied())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_found_by_number() {
        let users =
            "root:x:0:0:root:/root:/bin/sh\nbroken\npostgres:x:101:103::/var/lib/postgresql:/bin/sh\n";
        assert_eq!(home_of(users, 101), Some("/var/lib/postgresql"));
        assert_eq!(home_of(users, 7), None);
    }
}
