//! From init's child to the job's program.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use flynn_api::Env;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, makedev};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::init::{Attempt, Failure};
use super::{Stdio, seccomp};
use crate::caps::Set;
use crate::launch::Launch;
use crate::sys;

/// The last capability that the kernel is asked about; unknown ones are refused, which is as good as dropped.
const LAST_CAPABILITY: u32 = 63;

/// Becomes the program. What goes wrong is written into `errors`, which exec closes.
pub(super) fn run(
    launch: &Launch,
    env: &Env,
    stdio: Option<&Stdio>,
    terminal: Option<&OwnedFd>,
    errors: &OwnedFd,
    filters: &seccomp::Filters,
) -> ! {
    let failure = match become_program(launch, env, stdio, terminal, errors, filters) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let _ = rustix::io::write(errors, failure.as_bytes());
    sys::exit_now(127)
}

fn become_program(
    launch: &Launch,
    env: &Env,
    stdio: Option<&Stdio>,
    terminal: Option<&OwnedFd>,
    errors: &OwnedFd,
    filters: &seccomp::Filters,
) -> Result<std::convert::Infallible, Failure> {
    sys::reset_signals();
    rustix::process::setsid().attempt("start a session")?;
    streams(launch, stdio, terminal)?;
    sys::close_on_exec_from(3);
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    limits(launch)?;
    privileges(launch)?;
    die_with_parent(errors)?;
    if stdio.is_some_and(|stdio| stdio.stdin.is_none()) {
        no_input()?;
    }
    rustix::process::chdir(&launch.working_dir).attempt(format_args!("enter {}", launch.working_dir))?;

    let text = |text: &str| CString::new(text).attempt("pass a zero byte to a program");
    let args = launch
        .args
        .iter()
        .map(|arg| text(arg))
        .collect::<Result<Vec<_>, _>>()?;
    let variables = env
        .iter()
        .map(|(name, value)| text(&format!("{name}={value}")))
        .collect::<Result<Vec<_>, _>>()?;
    let name = launch
        .args
        .first()
        .ok_or("there is no program to start: the job and its image name none")?;
    let path = env.get("PATH").map_or("", String::as_str);
    let program = find(name, path, Path::is_file)
        .ok_or_else(|| format!("cannot start {name}: there is no such program in the image"))?;
    let program_text = CString::new(program.as_os_str().as_bytes()).attempt("start a program")?;
    rustix::thread::set_no_new_privs(true).attempt("give up new privileges")?;
    filters.apply().attempt("filter system calls")?;
    let error = sys::exec(&program_text, &args, &variables);
    Err(format!("cannot start {}: {error}", program.display()))
}

fn streams(launch: &Launch, stdio: Option<&Stdio>, terminal: Option<&OwnedFd>) -> Result<(), Failure> {
    let own = |fd: &OwnedFd| {
        rustix::fs::fchown(
            fd,
            Some(Uid::from_raw(launch.uid)),
            Some(Gid::from_raw(launch.gid)),
        )
        .attempt("hand the standard streams over")
    };
    if let Some(terminal) = terminal {
        own(terminal)?;
        rustix::process::ioctl_tiocsctty(terminal).attempt("take the terminal")?;
        return dup([terminal, terminal, terminal]);
    }
    let stdio = stdio.ok_or("neither pipes nor a terminal")?;
    if let Some(stdin) = &stdio.stdin {
        own(stdin)?;
    }
    own(&stdio.stdout)?;
    own(&stdio.stderr)?;
    // Where there is no input, anything will do for a moment.
    let stdin = stdio.stdin.as_ref().unwrap_or(&stdio.stdout);
    dup([stdin, &stdio.stdout, &stdio.stderr])
}

/// Has the program end with the process that keeps it: a change of who it is, before, would undo this.
fn die_with_parent(errors: &OwnedFd) -> Result<(), Failure> {
    let signal = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(signal).attempt("bind to its keeper")?;
    // One that has died before reads this no more.
    let mut reader = [PollFd::new(errors, PollFlags::empty())];
    poll(&mut reader, Some(&Timespec::default())).attempt("look for its keeper")?;
    if reader[0].revents().contains(PollFlags::ERR) {
        sys::exit_now(125);
    }
    Ok(())
}

/// Has standard input be empty. With the program's own rights: what is in a container that runs may be the job's doing.
fn no_input() -> Result<(), Failure> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty()).attempt("open /dev/null")?;
    let stat = rustix::fs::fstat(&null).attempt("open /dev/null")?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    if !is_device || stat.st_rdev != makedev(1, 3) {
        return Err("/dev/null is not what it should be: the job has put something else there".into());
    }
    rustix::fs::fcntl_setfl(&null, OFlags::empty()).attempt("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).attempt("set standard input")
}

fn dup(streams: [&OwnedFd; 3]) -> Result<(), Failure> {
    let [stdin, stdout, stderr] = streams.map(|fd| fd.as_fd());
    rustix::stdio::dup2_stdin(stdin).attempt("set standard input")?;
    rustix::stdio::dup2_stdout(stdout).attempt("set standard output")?;
    rustix::stdio::dup2_stderr(stderr).attempt("set standard error")
}

/// Sees that as many files may be open as the job is to have: in a user namespace nobody may lift a hard limit.
pub(super) fn raise_file_limit(launch: &Launch) {
    let there = rustix::process::getrlimit(Resource::Nofile);
    if there.maximum.is_some_and(|maximum| maximum < launch.max_files) {
        let maximum = Some(launch.max_files);
        // Where even this process may not, the job gets what there is.
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { maximum, ..there });
    }
}

fn limits(launch: &Launch) -> Result<(), Failure> {
    // A process may not lift its hard limit everywhere: then it gets what there is.
    let highest = rustix::process::getrlimit(Resource::Nofile).maximum;
    let wanted = Some(launch.max_files);
    let limit = |value| Rlimit {
        current: value,
        maximum: value,
    };
    rustix::process::setrlimit(Resource::Nofile, limit(wanted))
        .or_else(|_| rustix::process::setrlimit(Resource::Nofile, limit(highest)))
        .attempt("limit open files")?;
    // Not 0: the kernel would still start the program of the host's to which dumps are piped, if there is one.
    rustix::process::setrlimit(Resource::Core, limit(Some(1))).attempt("limit core dumps")
}

fn privileges(launch: &Launch) -> Result<(), Failure> {
    let what = "drop privileges";
    for number in (0..=LAST_CAPABILITY).filter(|number| !launch.capabilities.contains(*number)) {
        if let Some(one) = capability(number) {
            let held = rustix::thread::capability_is_in_bounding_set(one).unwrap_or(false);
            if held {
                rustix::thread::remove_capability_from_bounding_set(one).attempt(what)?;
            }
        }
    }
    let (uid, gid) = (Uid::from_raw(launch.uid), Gid::from_raw(launch.gid));
    rustix::thread::set_thread_groups(&[gid]).attempt(what)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).attempt(what)?;
    rustix::thread::set_keep_capabilities(true).attempt(what)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).attempt(what)?;
    let held = CapabilitySet::from_bits_retain(
        rustix::thread::capabilities(None).attempt(what)?.permitted.bits() & launch.capabilities.0,
    );
    let ambient = CapabilitySet::from_bits_retain(held.bits() & launch.ambient.0);
    let kept = if launch.uid == 0 { held } else { ambient };
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: ambient,
        },
    )
    .attempt(what)?;
    for one in ambient.iter() {
        rustix::thread::configure_capability_in_ambient_set(one, true).attempt(what)?;
    }
    rustix::thread::set_keep_capabilities(false).attempt(what)
}

fn capability(number: u32) -> Option<CapabilitySet> {
    1_u64.checked_shl(number).map(CapabilitySet::from_bits_retain)
}

/// Keeps nothing but the right to signal other users' processes.
pub(super) fn keep_only_kill() -> rustix::io::Result<()> {
    let kill = Set::of_names(&["KILL"]).unwrap_or_default();
    let kept = CapabilitySet::from_bits_retain(kill.0) & rustix::thread::capabilities(None)?.permitted;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: none,
        },
    )
}

/// Finds a program as a shell does.
fn find(name: &str, path: &str, is_there: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    if name.contains('/') {
        // The kernel says best what is wrong with it.
        return Some(PathBuf::from(name));
    }
    path.split(':')
        .map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name))
        .find(|path| is_there(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_path_or_taken_as_given() {
        let there = |path: &Path| path == Path::new("/bin/sh");
        assert_eq!(find("sh", "/usr/bin:/bin", there), Some("/bin/sh".into()));
        assert_eq!(find("bash", "/usr/bin:/bin", there), None);
        assert_eq!(find("./run", "/bin", there), Some("./run".into()));
    }
}
