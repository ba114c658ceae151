//! The user namespace of a container: its ids 0 to 65,535 are a range of the host's that nobody else has, so that who is
//! root inside is nobody outside.
//!
//! Layers and volumes keep the ids that a container knows, and are shown to it through mounts that map them: nothing is
//! chowned. What is written beside them, in the job's own directory, has the host's ids.
//!
//! The container's other namespaces are the host's to own: init makes all mounts as the host's root, and enters this one
//! last. So there is no capability in a container that could undo one of them.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, open_tree,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid, WaitId, WaitIdOptions, waitid};
use rustix::thread::CapabilitySets;

use crate::sys::{self, Cloned};

/// How many ids a container has.
pub const IDS: u32 = 1 << 16;

/// A user namespace with its ids.
#[derive(Debug)]
pub struct UserNamespace {
    namespace: OwnedFd,
    first: u32,
}

impl UserNamespace {
    /// Makes one whose ids are [`IDS`] of the host's from `first` on. Only for a process with one thread.
    ///
    /// It belongs to the host's user `first`: what the kernel counts of a user, it counts of this container alone.
    pub fn create(first: u32) -> io::Result<Self> {
        let (ready, is_ready) = pipe_with(PipeFlags::CLOEXEC)?;
        let (until, done) = pipe_with(PipeFlags::CLOEXEC)?;
        let (pid, pidfd) = match sys::clone(0, None)? {
            Cloned::Child => {
                drop((ready, done));
                hold(first, &is_ready, &until)
            }
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop((is_ready, until));
        let namespace = mapped(pid, first, &ready);
        drop(done);
        waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
        Ok(Self {
            namespace: namespace?,
            first,
        })
    }

    /// The host's id of root inside.
    pub fn first(&self) -> u32 {
        self.first
    }

    pub(super) fn as_raw(&self) -> i32 {
        self.namespace.as_raw_fd()
    }

    /// A detached mount of what is at `path` that shows the ids in it as this namespace's.
    pub fn tree(&self, path: &Path) -> io::Result<OwnedFd> {
        mapped_tree(self.namespace.as_fd(), path)
    }

    /// Has a detached mount show the ids in it as this namespace's.
    pub(super) fn map(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        sys::map_mount_ids(mount, self.namespace.as_fd())
    }

    /// Has what this process makes from now on belong to root inside. It keeps the rights that it has.
    pub(super) fn make_for_root(&self) -> io::Result<()> {
        sys::set_file_owner(self.first)?;
        raise_capabilities()
    }

    /// Enters it, as root: all rights that this process had outside are gone.
    pub fn enter(&self) -> io::Result<()> {
        let user = rustix::thread::LinkNameSpaceType::User;
        rustix::thread::move_into_link_name_space(self.namespace.as_fd(), Some(user))?;
        Ok(become_root()?)
    }
}

/// As root of the user namespace that this process is in.
pub(super) fn become_root() -> rustix::io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

/// A detached mount of what is at `path` that shows the ids in it as those of `namespace`. Fails where its filesystem
/// cannot do that.
pub fn mapped_tree(namespace: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    sys::map_mount_ids(tree.as_fd(), namespace)?;
    Ok(tree)
}

/// After a change of ids the rights that a process may have are not all in effect.
fn raise_capabilities() -> io::Result<()> {
    let held = rustix::thread::capabilities(None)?;
    let all = CapabilitySets {
        effective: held.permitted,
        ..held
    };
    Ok(rustix::thread::set_capabilities(None, all)?)
}

/// Holds a new namespace in being until the other end of `until` is closed.
fn hold(first: u32, is_ready: &OwnedFd, until: &OwnedFd) -> ! {
    let unshared = || -> io::Result<()> {
        rustix::thread::set_keep_capabilities(true)?;
        let (uid, gid) = (Uid::from_raw(first), Gid::from_raw(first));
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        // There are hosts where who is not root may make none.
        raise_capabilities()?;
        sys::unshare_users()
    };
    let error = unshared()
        .err()
        .map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
    let _ = rustix::io::write(is_ready, &error.to_ne_bytes());
    let _ = rustix::io::read(until, &mut [0_u8; 1]);
    sys::exit_now(0)
}

/// Gives the namespace that process `pid` makes its ids.
fn mapped(pid: i32, first: u32, ready: &OwnedFd) -> io::Result<OwnedFd> {
    let mut error = [0; 4];
    if rustix::io::read(ready, &mut error)? != error.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match i32::from_ne_bytes(error) {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{map}"), format!("0 {first} {IDS}\n"))?;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(
        format!("/proc/{pid}/ns/user"),
        flags,
        Mode::empty(),
    )?)
}

/// A squashfs of 144 bytes with nothing in it: `mksquashfs` of an empty directory without padding, compression, and
/// times.
const EMPTY: &[u8; 144] = include_bytes!("empty.squashfs");

/// Tries whether containers can have user namespaces, with ids from `first` on: makes one, and a mount of a squashfs with
/// its ids. Says on standard output which descriptor of this process is the namespace, or why there can be none, and
/// keeps it until standard input ends.
pub fn probe(first: u32) -> io::Result<()> {
    let tried = try_out(first);
    let word = match &tried {
        Ok(namespace) => namespace.as_raw().to_string(),
        Err(why) => why.clone(),
    };
    rustix::io::write(rustix::stdio::stdout(), format!("{word}\n").as_bytes())?;
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    drop(tried);
    Ok(())
}

fn try_out(first: u32) -> Result<UserNamespace, String> {
    let namespace = UserNamespace::create(first).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC) => {
            "this host allows no more user namespaces (sysctl user.max_user_namespaces)".into()
        }
        Some(libc::EINVAL) => "the kernel has no user namespaces".into(),
        _ => format!("a user namespace cannot be made ({error})"),
    })?;
    let squashfs = empty_squashfs().map_err(|error| format!("a squashfs cannot be mounted ({error})"))?;
    let mapped = namespace.map(squashfs.as_fd());
    mapped
        .map_err(|error| format!("this kernel cannot map the ids in image layers, a squashfs ({error})"))?;
    Ok(namespace)
}

/// A detached mount of one.
fn empty_squashfs() -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create("squashfs", rustix::fs::MemfdFlags::CLOEXEC)?;
    let image = fs::File::from(memory);
    (&image).write_all(EMPTY)?;
    // A device has whole blocks.
    image.set_len(4096)?;
    let (_device, path) = sys::loop_device(&image, false)?;
    let context = fsopen("squashfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", path)?;
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
