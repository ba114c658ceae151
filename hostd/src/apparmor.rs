//! AppArmor, where the host has it: one profile confines the jobs of apps.

use std::fs;
use std::io;
use std::path::Path;

use flynn_api::host::KernelFeature;
use rustix::fs::{CWD, Mode, OFlags};

use crate::paths::RUN;
use crate::tool::{SHORT, Tool};

/// The profile's name.
const PROFILE: &str = "flynn-job";

const TEXT: &str = include_str!("apparmor.profile");

const PARSER: Tool = Tool {
    program: "apparmor_parser",
    package: "apparmor",
};

/// The kernel's mark of a procfs.
const PROC_MAGIC: i64 = 0x9fa0;

/// Whether jobs are confined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Apparmor {
    /// The host has no AppArmor.
    Missing,
    /// It has, and the profile is not loaded: why.
    Refused(String),
    /// The profile is loaded.
    Loaded,
}

impl Apparmor {
    /// Loads the profile, in place of one that an earlier daemon has loaded.
    pub(crate) fn load() -> Self {
        let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if !enabled.is_ok_and(|enabled| enabled.starts_with('Y')) {
            return Self::Missing;
        }
        match replace() {
            Ok(()) => Self::Loaded,
            Err(error) => Self::Refused(error.to_string()),
        }
    }

    /// What this comes to, for the host's status.
    pub(crate) fn feature(&self) -> KernelFeature {
        KernelFeature {
            name: "apparmor".into(),
            present: *self == Self::Loaded,
            detail: match self {
                Self::Loaded => format!("jobs of apps are confined by the profile {PROFILE}"),
                Self::Missing => "jobs are confined without AppArmor, which this host has not".into(),
                Self::Refused(why) => format!("jobs are confined without AppArmor: {why}"),
            },
        }
    }

    /// What the operator misses.
    pub(crate) fn notice(&self) -> Option<String> {
        let Self::Refused(why) = self else { return None };
        Some(format!(
            "the host has AppArmor, but not the profile for jobs: {why}"
        ))
    }
}

/// Loads the profile. It takes the place of a profile of this name, and is not kept for the next boot, which may be of
/// another version.
fn replace() -> io::Result<()> {
    let file = Path::new(RUN).join("apparmor.profile");
    fs::write(&file, TEXT)?;
    let options = ["--replace", "--skip-cache"].map(AsRef::as_ref);
    let all = [&options[..], &[file.as_os_str()]].concat();
    PARSER.run(&all, SHORT).map(drop)
}

/// Loads the profile again where it was removed: operators do that with all that /etc/apparmor.d does not have
/// (`aa-remove-unknown(8)`).
pub(crate) fn keep() -> io::Result<()> {
    // The kernel is asked, and changes nothing.
    match set("current", &format!("permprofile {PROFILE}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        _ => return Ok(()),
    }
    tracing::warn!("the AppArmor profile {PROFILE} was removed: it is loaded again");
    tokio::task::block_in_place(replace)
}

/// Has the program that this process starts next be confined by the profile.
pub(crate) fn confine_next_program() -> io::Result<()> {
    set("exec", &format!("exec {PROFILE}"))
}

/// Writes one of this thread's attributes.
fn set(attribute: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/thread-self/attr/apparmor/{attribute}");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let attribute = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    // A file of the container's in this place would say yes to everything.
    if rustix::fs::fstatfs(&attribute)?.f_type != PROC_MAGIC {
        return Err(io::Error::other("/proc is not the kernel's"));
    }
    rustix::io::write(&attribute, value.as_bytes())?;
    Ok(())
}
