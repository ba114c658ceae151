//! The operator's commands: they speak to the daemon of this host over its socket.

mod attach;
pub mod ca;
mod debug_info;
mod destroy;
mod discoverd;
pub mod download;
mod drain;
mod each;
mod exec;
mod fix;
mod image;
pub mod install;
mod limit;
mod log_sink;
pub mod members;
mod network;
mod port_forward;
pub mod preflight;
mod run;
mod show;
pub mod tags;
mod update;
mod volume;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use flynn_api::client::Http;
use flynn_api::client::host::HostClient;
use flynn_api::host::{self, LogStream};
use futures::StreamExt as _;

pub use exec::ExecArgs;
pub use run::RunArgs;

/// What an operator can ask.
#[derive(clap::Subcommand, Debug)]
pub enum Operator {
    /// List jobs
    Ps {
        /// Those that are over as well
        #[arg(short, long)]
        all: bool,
        /// Only their ids
        #[arg(short, long)]
        quiet: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that is known of a job, secrets left out
    Inspect {
        /// The job's id, or the start of it
        job: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a job's output
    Log {
        /// The job's id, or the start of it
        job: String,
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// Only the last lines
        #[arg(short = 'n', long)]
        lines: Option<u32>,
        /// Each line as JSON
        #[arg(long)]
        json: bool,
    },
    /// Send the logs of this host's jobs to syslog servers and log aggregators
    LogSink(log_sink::Args),
    /// Stop jobs
    Stop(each::Jobs),
    /// Send a signal to a job's process
    Signal {
        /// The job's id, or the start of it
        job: String,
        /// Its number, or a name such as HUP
        signal: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Have jobs stand still, all their processes, out of discoverd
    Pause(each::Jobs),
    /// Have paused jobs go on
    Resume(each::Jobs),
    /// Show or change the limits of a running job
    Limit(limit::Args),
    /// Start a job from an image and stay attached to it
    Run(RunArgs),
    /// Start another program in a job's container
    Exec(ExecArgs),
    /// Have ports of this machine lead to a job's
    PortForward(port_forward::Args),
    /// Show what this host is and how it does
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the host's part of the cluster's network
    Network(network::Args),
    /// Look after volumes, and where they are kept
    Volume(volume::Args),
    /// Remove this host's volumes, which no job may use
    DestroyVolumes(destroy::Args),
    /// Look after the layers of images in this host's store
    Image(image::Args),
    /// Show or change the tags by which jobs are placed
    Tags(tags::Args),
    /// Give this host no more jobs, and have those that it has go to other hosts
    Drain(drain::Args),
    /// See whether supervisors, discoverd, network, layers and database are well, and mend what can be mended
    Fix(fix::Args),
    /// Collect what shows how this host does in one file: status, jobs, logs' ends, network, kernel
    CollectDebugInfo(debug_info::Args),
    /// Have another flynn-host go on with the daemon's work: no job notices, no call is refused
    Update(update::Args),
}

/// What a shell takes for a program that SIGPIPE has ended.
const NO_READER: u8 = 128 + 13;

/// Has a command end, and not panic, when whoever reads its output (`| head`) has read enough. The signal itself stays
/// ignored: it also comes of a connection that the other side has just closed, which is no reason to end.
#[expect(
    clippy::exit,
    reason = "a panic is what `println!` makes of it: there is nobody to return to"
)]
pub fn end_with_reader() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let what = panic.payload_as_str().unwrap_or_default();
        if what.starts_with("failed") && what.contains("Broken pipe") {
            std::process::exit(NO_READER.into());
        }
        before(panic);
    }));
}

/// How a command ends that an error has ended: with its message, unless it is that nobody reads any more.
pub fn end_with(error: &anyhow::Error) -> ExitCode {
    let written = error.downcast_ref::<std::io::Error>();
    if written.is_some_and(|why| why.kind() == std::io::ErrorKind::BrokenPipe) {
        return ExitCode::from(NO_READER);
    }
    eprintln!("flynn-host: {error:#}");
    ExitCode::FAILURE
}

/// Does what the operator asks.
pub async fn operate(command: Operator) -> anyhow::Result<ExitCode> {
    let host = HostClient::new(Http::new(&format!("unix:{}", host::SOCKET))?);
    match command {
        Operator::Ps { all, quiet, json } => {
            let mut jobs = reach(host.jobs().await)?;
            jobs.retain(|_, job| all || !job.status.is_terminal());
            if json {
                print_json(&jobs)?;
            } else if quiet {
                for id in jobs.keys() {
                    println!("{id}");
                }
            } else {
                println!("{}", show::jobs(jobs.values(), jiff::Timestamp::now()));
            }
        }
        Operator::Inspect { job, json } => {
            let job = reach(host.job(&find(&host, &job).await?).await)?;
            if json {
                print_json(&job)?;
            } else {
                println!("{}", show::everything(&job)?);
            }
        }
        Operator::Log {
            job,
            follow,
            lines,
            json,
        } => {
            let mut log = host.log(&find(&host, &job).await?, lines, follow).await?;
            while let Some(line) = log.next().await {
                let (_, line) = line?;
                match line.stream {
                    _ if json => println!("{}", serde_json::to_string(&line)?),
                    LogStream::Stdout => println!("{}", line.msg),
                    LogStream::Stderr => eprintln!("{}", line.msg),
                    LogStream::Init => eprintln!("[flynn] {}", line.msg),
                }
            }
        }
        Operator::Stop(each::Jobs { jobs, json }) => {
            let stop = async |job: &str| {
                let id = find(&host, job).await?;
                host.stop_job(&id).await?;
                Ok(id)
            };
            each::each(&jobs, json, |id| format!("{id} is stopping"), stop).await?;
        }
        Operator::Signal { job, signal, json } => {
            let number = signal_number(&signal).with_context(|| format!("{signal:?} is no signal"))?;
            let send = async |job: &str| {
                let id = find(&host, job).await?;
                host.signal_job(&id, number).await?;
                Ok(id)
            };
            each::each(&[job], json, |id| format!("{id} has got {signal}"), send).await?;
        }
        Operator::Pause(each::Jobs { jobs, json }) => {
            let pause = async |job: &str| {
                let id = find(&host, job).await?;
                host.pause_job(&id).await?;
                Ok(id)
            };
            each::each(&jobs, json, |id| format!("{id} stands still"), pause).await?;
        }
        Operator::Resume(each::Jobs { jobs, json }) => {
            let resume = async |job: &str| {
                let id = find(&host, job).await?;
                host.resume_job(&id).await?;
                Ok(id)
            };
            each::each(&jobs, json, |id| format!("{id} goes on"), resume).await?;
        }
        Operator::Limit(args) => limit::run(&host, args).await?,
        Operator::Run(args) => return run::run(&host, args).await,
        Operator::Exec(args) => {
            let job = find(&host, &args.job).await?;
            return exec::exec(&host, &job, args).await;
        }
        Operator::PortForward(args) => {
            let job = find(&host, &args.job).await?;
            port_forward::run(&host, job, &args).await?;
        }
        Operator::Status { json } => {
            let status = reach(host.status().await)?;
            if json {
                print_json(&status)?;
            } else {
                println!("{}", show::status(&status));
            }
        }
        Operator::Network(args) => network::run(&host, &args).await?,
        Operator::LogSink(args) => log_sink::run(&host, args).await?,
        Operator::Volume(args) => volume::run(&host, args).await?,
        Operator::DestroyVolumes(args) => destroy::run(&host, &args).await?,
        Operator::Image(args) => image::run(&host, args).await?,
        Operator::Tags(args) => tags::run(&host, args).await?,
        Operator::Drain(args) => drain::run(&host, args).await?,
        Operator::Fix(args) => fix::run(&host, args).await?,
        Operator::CollectDebugInfo(args) => debug_info::run(&host, args).await?,
        Operator::Update(args) => update::run(&host, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what to do where nobody answers: the one failure that does not come from the daemon.
fn reach<T>(result: flynn_api::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| {
        if Path::new(host::SOCKET).exists() && !error.message.starts_with("no answer") {
            return error.into();
        }
        anyhow::anyhow!("{error}\nIs the daemon running? Start it with `flynn-host daemon` (as root)")
    })
}

/// A job by its id or the start of it, with or without the host's id in front.
async fn find(host: &HostClient, start: &str) -> anyhow::Result<String> {
    let jobs = reach(host.jobs().await)?;
    if jobs.contains_key(start) {
        return Ok(start.to_owned());
    }
    let short = |id: &str| {
        id.split_once('-')
            .is_some_and(|(_, uuid)| uuid.starts_with(start))
    };
    let mut found = jobs.into_keys().filter(|id| id.starts_with(start) || short(id));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => anyhow::bail!("there is no job {start} on this host; `flynn-host ps -a` lists all"),
        (Some(one), Some(other)) => anyhow::bail!("{start} may be {one} or {other}; give more of it"),
    }
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A signal by number or name, with or without `SIG`.
fn signal_number(text: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 14] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ABRT", libc::SIGABRT),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("WINCH", libc::SIGWINCH),
        ("CHLD", libc::SIGCHLD),
    ];
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let named = NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number);
    named.or_else(|| text.parse().ok().filter(|number| (1..=64).contains(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal_number("sighup"), Some(1));
        assert_eq!(signal_number("15"), Some(15));
        assert_eq!(signal_number("0"), None);
        assert_eq!(signal_number("FLY"), None);
    }
}
