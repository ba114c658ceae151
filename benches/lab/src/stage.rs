//! The lab's processes: this program executed again under another name.

mod exec;
mod forward;
mod host;
mod init;

use anyhow::{Context, Result};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command};

pub(crate) use forward::ForwardPlan;
pub(crate) use host::HostPlan;

/// What process 0 of a command line says when it is one of ours.
const MARK: &str = "flynn-lab:";

/// What this program can be executed again as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Keeps a lab.
    Keeper,
    /// Makes a host's namespaces and waits for its end.
    Monitor,
    /// Process 1 of a host.
    Init,
    /// Runs a command in a host.
    Exec,
    /// Carries connections from the machine to hosts.
    Forward,
}

impl Stage {
    const ALL: [Self; 5] = [Self::Keeper, Self::Monitor, Self::Init, Self::Exec, Self::Forward];

    fn word(self) -> &'static str {
        match self {
            Self::Keeper => "keeper",
            Self::Monitor => "monitor",
            Self::Init => "init",
            Self::Exec => "exec",
            Self::Forward => "forward",
        }
    }

    /// A command that executes `program`, which calls [`reexec`] first thing, as this.
    pub(crate) fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg0(format!("{MARK}{}", self.word()));
        command
    }
}

/// Must be called first thing in `main` by each program that starts labs: when the program was executed as one of the
/// lab's processes, it becomes that and never returns.
#[expect(clippy::exit, reason = "the process is another one from here on")]
pub fn reexec() {
    let mut args = std::env::args_os();
    let Some(stage) = args.next().and_then(|name| named(&name)) else {
        return;
    };
    let outcome = match stage {
        Stage::Keeper => crate::keeper::main(),
        Stage::Monitor => host::main(),
        Stage::Init => init::main(),
        Stage::Exec => exec::main(&args.collect::<Vec<OsString>>()),
        Stage::Forward => forward::main(),
    };
    std::process::exit(match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("flynn-lab {}: {error:#}", stage.word());
            125
        }
    })
}

fn named(name: &OsStr) -> Option<Stage> {
    let word = name.to_str()?.strip_prefix(MARK)?;
    Stage::ALL.into_iter().find(|stage| stage.word() == word)
}

/// Hands a process of ours its plan, on stdin, where no other user can read it.
pub(crate) fn hand(stdin: &mut ChildStdin, plan: &impl serde::Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(plan)?;
    line.push(b'\n');
    stdin
        .write_all(&line)
        .context("a process of the lab does not listen")
}

/// The plan that this process was handed.
pub(crate) fn plan<T: serde::de::DeserializeOwned>() -> Result<T> {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot hear the plan")?;
    serde_json::from_str(&line).context("the plan cannot be read")
}

/// Has the kernel kill this process when the one that started it dies; it may be dead already.
pub(crate) fn die_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("cannot ask to die with the parent")
}
