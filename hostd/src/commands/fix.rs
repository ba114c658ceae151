//! `flynn-host fix`: looks at what a host needs, in the order in which one thing needs another, and mends what it can.
//!
//! Nothing is lost by it: a process that hangs is ended, whom its supervisor or the daemon starts again, and a layer that
//! is damaged is set aside, not removed.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::host::HostClient;
use flynn_api::digest::Digester;
use flynn_api::host::{ActiveJob, JobState, label};
use flynn_api::{Digest, ErrorCode};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::show::table;
use super::{print_json, reach};
use crate::config::HostConfig;
use crate::control::Connection;
use crate::paths::Paths;
use crate::status::Status;
use crate::{files, identities};

/// How long a supervisor, or discoverd, may take to answer before it is taken for one that hangs.
const ANSWER: Duration = Duration::from_secs(5);

/// How long what was started again may take.
const AGAIN: Duration = Duration::from_mins(1);

/// What the names of layers begin with that were set aside.
const DAMAGED: &str = ".damaged-";

/// `flynn-host fix`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only look
    #[arg(long)]
    dry_run: bool,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    /// It is well, by now.
    well: bool,
    found: String,
    /// What was done, or would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<String>,
}

impl Step {
    fn well(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            well: true,
            found: found.into(),
            done: None,
        }
    }

    fn ill(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            well: false,
            ..Self::well(name, found)
        }
    }

    fn mended(name: &'static str, found: impl Into<String>, done: impl Into<String>) -> Self {
        Self {
            done: Some(done.into()),
            ..Self::well(name, found)
        }
    }
}

/// What the steps share.
struct Fix<'a> {
    host: &'a HostClient,
    state: &'a Path,
    dry_run: bool,
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    reach(host.status().await)?;
    let fix = Fix {
        host,
        state: &args.state,
        dry_run: args.dry_run,
    };
    let mut steps = vec![Step::well("daemon", "it answers")];
    // Others are found, and kept, through supervisors.
    steps.extend(fix.supervisors().await?);
    steps.push(fix.discoverd().await?);
    steps.push(fix.network().await?);
    steps.extend(fix.layers().await?);
    steps.push(fix.database().await);
    if args.json {
        print_json(&steps)?;
    } else {
        println!("{}", show(&steps));
    }
    let ill: Vec<&str> = steps
        .iter()
        .filter(|step| !step.well)
        .map(|step| step.name)
        .collect();
    anyhow::ensure!(
        ill.is_empty(),
        "not well: {}. flynn-host collect-debug-info collects what there is to know",
        ill.join(", ")
    );
    Ok(())
}

fn show(steps: &[Step]) -> String {
    let mut table = table(&["WHAT", "", "FOUND"]);
    for step in steps {
        let outcome = match (step.well, &step.done) {
            (true, None) => "ok",
            (true, Some(_)) => "fixed",
            (false, _) => "ILL",
        };
        table.add_row([step.name, outcome, &step.found]);
        if let Some(done) = &step.done {
            table.add_row(["", "", &format!("→ {done}")]);
        }
    }
    table.trim_fmt()
}

impl Fix<'_> {
    async fn jobs(&self) -> anyhow::Result<Vec<ActiveJob>> {
        let mut jobs: Vec<_> = self.host.jobs().await?.into_values().collect();
        jobs.retain(|job| !job.status.is_terminal());
        Ok(jobs)
    }

    /// Those that do not answer are ended: the daemon notes the end of their jobs, and starts those again that are to be
    /// kept.
    async fn supervisors(&self) -> anyhow::Result<Vec<Step>> {
        const NAME: &str = "supervisors";
        let jobs = self.jobs().await?;
        let mut steps = Vec::new();
        for job in &jobs {
            let id = &job.job.id;
            if answers(id).await {
                continue;
            }
            // One that has ended meanwhile, or is just being started, is the daemon's.
            let status = Status::read(&Paths::at(self.state).job(id)).ok().flatten();
            let supervisor = status.and_then(|status| status.supervisor);
            let Some(supervisor) = supervisor.filter(|supervisor| supervisor.is_alive()) else {
                continue;
            };
            let found = format!("that of job {id} does not answer");
            if self.dry_run {
                steps.push(Step::ill(NAME, found));
                continue;
            }
            supervisor.kill()?;
            let gone = self
                .until(async || {
                    let now = self.host.job(id).await.ok();
                    let now = now
                        .filter(|now| now.status.is_terminal() || now.supervisor_pid != job.supervisor_pid);
                    now.map(drop)
                })
                .await;
            let kept = if job.job.resurrect {
                "is started again"
            } else {
                "is over"
            };
            steps.push(match gone {
                Some(()) => Step::mended(NAME, found, format!("it was ended, and its job {kept}")),
                None => Step::ill(NAME, format!("{found}, and the daemon does not notice its end")),
            });
        }
        if steps.is_empty() {
            steps.push(Step::well(NAME, format!("{} answer", jobs.len())));
        }
        Ok(steps)
    }

    /// This host's discoverd, without which others do not find it.
    async fn discoverd(&self) -> anyhow::Result<Step> {
        const NAME: &str = "discoverd";
        let Some(client) = self.own_discoverd() else {
            return Ok(Step::well(NAME, "this host is in no cluster yet"));
        };
        let ping = async || matches!(timeout(ANSWER, client.ping()).await, Ok(Ok(()))).then_some(());
        if ping().await.is_some() {
            return Ok(Step::well(NAME, "it answers"));
        }
        let jobs = self.jobs().await?;
        let job = jobs.iter().find(|job| is_of(job, "discoverd"));
        let Some(job) = job else {
            let found = "there is no job of it on this host: the scheduler has to start one. On a host whose cluster has lost \
                         its majority, see flynn-host discoverd recover";
            return Ok(Step::ill(NAME, found));
        };
        let found = format!("it does not answer (job {}, {:?})", job.job.id, job.status).to_lowercase();
        if self.dry_run || job.status != JobState::Running {
            return Ok(Step::ill(NAME, found));
        }
        self.host.signal_job(&job.job.id, libc::SIGKILL).await?;
        Ok(match self.until(ping).await {
            Some(()) => Step::mended(NAME, found, "it was started again, and answers"),
            None => Step::ill(
                NAME,
                format!("{found}, and not when it was started again: see its log"),
            ),
        })
    }

    fn own_discoverd(&self) -> Option<DiscoveryClient> {
        identities::discoverd(self.state).ok()
    }

    /// The host's part of the cluster's network.
    async fn network(&self) -> anyhow::Result<Step> {
        const NAME: &str = "network";
        let wanted = HostConfig::peek(self.state).and_then(|config| config.network);
        let Some(wanted) = wanted else {
            return Ok(Step::well(NAME, "this host has none yet"));
        };
        if self.host.status().await?.subnet.is_some() {
            return Ok(Step::well(NAME, format!("{} is up", wanted.subnet)));
        }
        let found = format!("{} is not up", wanted.subnet);
        if self.dry_run {
            return Ok(Step::ill(NAME, found));
        }
        Ok(match self.host.configure_network(&wanted).await {
            Ok(()) => Step::mended(NAME, found, "it was brought up"),
            Err(error) => Step::ill(NAME, format!("{found}: {error}")),
        })
    }

    /// Layers are what their names say.
    async fn layers(&self) -> anyhow::Result<Vec<Step>> {
        const NAME: &str = "layers";
        let dir = Paths::at(self.state).layers();
        let damaged = tokio::task::spawn_blocking({
            let dir = dir.clone();
            move || damaged(&dir)
        });
        let (all, damaged) = damaged.await??;
        if damaged.is_empty() {
            return Ok(vec![Step::well(
                NAME,
                format!("{all} are what their digests say"),
            )]);
        }
        let mut steps = Vec::new();
        for name in damaged {
            let found = format!("{name} is damaged");
            if self.dry_run {
                steps.push(Step::ill(NAME, found));
                continue;
            }
            let aside = format!("{DAMAGED}{}", name.trim_end_matches(".squashfs"));
            fs::rename(dir.join(&name), dir.join(&aside))?;
            files::sync_dir(&dir)?;
            let done = "it was set aside: jobs that run keep it, the next one that needs it fetches it anew";
            steps.push(Step::mended(NAME, found, done));
        }
        Ok(steps)
    }

    /// The platform's own database.
    async fn database(&self) -> Step {
        const NAME: &str = "database";
        let Some(discoverd) = self.own_discoverd() else {
            return Step::well(NAME, "this host is in no cluster yet");
        };
        match timeout(ANSWER, discoverd.leader("postgres")).await {
            Ok(Ok(leader)) => match timeout(ANSWER, tokio::net::TcpStream::connect(&leader.addr)).await {
                Ok(Ok(_)) => Step::well(NAME, format!("its primary answers at {}", leader.addr)),
                _ => Step::ill(NAME, format!("its primary does not answer at {}", leader.addr)),
            },
            Ok(Err(error)) if error.code == ErrorCode::NotFound => Step::ill(
                NAME,
                "it has no primary: is one of its jobs running (flynn-host ps on each host)? Their logs say why not",
            ),
            Ok(Err(error)) => Step::ill(NAME, format!("nobody says which is its primary: {error}")),
            Err(_) => Step::ill(NAME, "nobody says in time which is its primary"),
        }
    }

    /// Waits for what was started again.
    async fn until<T>(&self, look: impl AsyncFn() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + AGAIN;
        while Instant::now() < deadline {
            if let Some(found) = look().await {
                return Some(found);
            }
            sleep(Duration::from_millis(200)).await;
        }
        None
    }
}

fn is_of(job: &ActiveJob, app: &str) -> bool {
    job.job
        .metadata
        .get(label::APP_NAME)
        .is_some_and(|name| name == app)
}

/// Whether a job's supervisor says how it does.
async fn answers(id: &str) -> bool {
    let asked = async {
        let mut connection = Connection::open(&Paths::socket(id)).await?;
        connection.watch().await?;
        connection.next_status().await
    };
    matches!(timeout(ANSWER, asked).await, Ok(Ok(Some(_))))
}

/// How many layers there are, and the names of those that are not what these say.
fn damaged(dir: &Path) -> io::Result<(usize, Vec<String>)> {
    let (mut all, mut damaged) = (0, Vec::new());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, damaged)),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let digest = name
            .strip_suffix(".squashfs")
            .and_then(|digest| digest.parse::<Digest>().ok());
        if let Some(digest) = digest {
            all += 1;
            if digest_of(&entry.path())? != digest {
                damaged.push(name);
            }
        }
    }
    Ok((all, damaged))
}

fn digest_of(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let (mut digester, mut piece) = (Digester::default(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(digester.finish()),
            count => digester.update(&piece[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_layers_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let name = |bytes: &[u8]| format!("{}.squashfs", Digest::of(bytes));
        fs::write(dir.path().join(name(b"good")), "good").unwrap();
        fs::write(dir.path().join(name(b"other")), "damaged").unwrap();
        fs::write(dir.path().join(".incoming-x"), "").unwrap();
        assert_eq!(damaged(dir.path()).unwrap(), (2, vec![name(b"other")]));
        assert_eq!(damaged(&dir.path().join("none")).unwrap().0, 0);
    }
}
