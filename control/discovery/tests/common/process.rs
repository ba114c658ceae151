//! A discoverd as a process: the test binary itself, started again. Its `main` calls [`child`] first.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use flynn_api::server::CancellationToken;
use flynn_discovery::Options;
use flynn_discovery::raft::Timing;

/// How a process is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Apart {
    /// The size of a small file system of its own for its data.
    pub disk: Option<&'static str>,
    /// It waits until its system calls are watched.
    pub watched: bool,
}

/// Starts a process with these options.
pub fn spawn(options: &Options, apart: Apart) -> Child {
    let this = std::env::current_exe().unwrap();
    let mut command = Command::new(&this);
    if let Some(size) = apart.disk {
        // A mount namespace for the file system.
        command = Command::new("unshare");
        command.arg("--mount").arg(this).env("DISCOVERD_TEST_DISK", size);
    }
    if apart.watched {
        command.env("DISCOVERD_TEST_WATCHED", "1");
    }
    if std::env::var_os("DISCOVERD_TEST_STDERR").is_none() {
        command.stderr(Stdio::null());
    }
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    command
        .env("DISCOVERD_TEST_TLS", path(&options.tls))
        .env(
            "DISCOVERD_TEST_PORTS",
            format!("{} {}", options.api_port, options.dns_port),
        )
        .env("DISCOVERD_TEST_TIMING", write_timing(options.timing))
        .env("DISCOVERD_DATA", path(&options.data))
        .env("DISCOVERD_INIT", options.init.to_string())
        .env("DISCOVERD_JOIN", options.join.join(","))
        .env("HOST_ID", &options.host_id)
        .env("HOST_IP", options.host_ip.to_string())
        .spawn()
        .unwrap()
}

/// Runs discoverd if this is such a process. `watch` is called first if it is to be watched.
pub fn child(watch: impl FnOnce()) -> Option<ExitCode> {
    let ports = std::env::var("DISCOVERD_TEST_PORTS").ok()?;
    // A test that is killed leaves nothing behind.
    let end = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(end).unwrap();
    if std::env::var_os("DISCOVERD_TEST_WATCHED").is_some() {
        watch();
    }
    flynn_api::server::init_logging("discoverd");
    let mut options = Options::from_env().unwrap();
    if let Ok(size) = std::env::var("DISCOVERD_TEST_DISK") {
        // It goes with the process.
        let size = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", &options.data, "tmpfs", flags, Some(size.as_c_str())).unwrap();
    }
    let (api, dns) = ports.split_once(' ').unwrap();
    (options.api_port, options.dns_port) = (api.parse().unwrap(), dns.parse().unwrap());
    options.tls = std::env::var_os("DISCOVERD_TEST_TLS").unwrap().into();
    options.timing = read_timing(&std::env::var("DISCOVERD_TEST_TIMING").unwrap());
    let shutdown = CancellationToken::new();
    super::block_on(async {
        tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                let mut terminated =
                    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
                terminated.recv().await;
                shutdown.cancel();
            }
        });
        flynn_discovery::run(options, shutdown.clone()).await.unwrap();
    });
    Some(ExitCode::SUCCESS)
}

fn write_timing(timing: Timing) -> String {
    let Timing {
        heartbeat,
        election,
        snapshot_after,
        lease,
        beat,
        silence,
        replace,
        settle,
        ca_settle,
    } = timing;
    let durations = [
        heartbeat, election, lease, beat, silence, replace, settle, ca_settle,
    ]
    .map(|duration| duration.as_millis());
    let mut numbers: Vec<String> = durations.iter().map(ToString::to_string).collect();
    numbers.push(snapshot_after.to_string());
    numbers.join(" ")
}

fn read_timing(text: &str) -> Timing {
    let numbers: Vec<u64> = text.split(' ').map(|number| number.parse().unwrap()).collect();
    let duration = |at: usize| Duration::from_millis(numbers[at]);
    Timing {
        heartbeat: duration(0),
        election: duration(1),
        lease: duration(2),
        beat: duration(3),
        silence: duration(4),
        replace: duration(5),
        settle: duration(6),
        ca_settle: duration(7),
        snapshot_after: numbers[8],
    }
}
