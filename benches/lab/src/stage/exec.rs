//! Runs a command in a host, as `flynn-lab:exec [--log FILE] LAB HOST INIT PROGRAM ARGS...`.
//!
//! The process itself stays in the machine's pid namespace, since only what it starts can be in the host's; it waits
//! and exits as the command did. With `--log` it says the machine's id of the command's process first, and the
//! command's output goes to the file.

use crate::cgroup::Group;
use crate::config::host_name;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use rustix::thread::{ThreadNameSpaceType as Namespace, move_into_thread_name_spaces};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

pub(super) fn main(args: &[OsString]) -> Result<i32> {
    let (log, args) = match args {
        [option, file, rest @ ..] if option == "--log" => (Some(file), rest),
        args => (None, args),
    };
    let [lab, host, init, program, args @ ..] = args else {
        bail!("too few arguments")
    };
    let log = log
        .map(|file| File::options().create(true).append(true).open(file))
        .transpose()
        .context("cannot open the log")?;
    let text = |arg: &OsString| {
        arg.to_str()
            .map(str::to_owned)
            .context("an argument is not UTF-8")
    };
    let (lab, host, init) = (
        text(lab)?,
        text(host)?.parse::<u8>()?,
        text(init)?.parse::<i32>()?,
    );

    let group = Group::lab(&lab)?.child(&host_name(host));
    let pid = Pid::from_raw(init).context("process 0 is no host")?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).context("the host is off")?;
    if !group.holds(init) {
        bail!("the host is off: process {init} is none of its");
    }
    group.enter_leaf()?;
    move_into_thread_name_spaces(
        handle.as_fd(),
        Namespace::MOUNT
            | Namespace::CONTROL_GROUP
            | Namespace::HOST_NAME_AND_NIS_DOMAIN_NAME
            | Namespace::INTER_PROCESS_COMMUNICATION
            | Namespace::PROCESS_ID
            | Namespace::NETWORK,
    )
    .context("cannot enter the host")?;
    std::env::set_current_dir("/")?;

    let mut command = Command::new(program);
    command.args(args);
    if let Some(log) = &log {
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
    }
    // Whoever kills this process means the command.
    let die = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: it makes one system call and touches no memory; this process has one thread.
    #[expect(unsafe_code, reason = "there is no safe form")]
    unsafe {
        command.pre_exec(die);
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if log.is_some() {
        println!("{}", child.id());
        std::io::stdout().flush()?;
    }
    let status = child.wait()?;
    Ok(status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1))
}
