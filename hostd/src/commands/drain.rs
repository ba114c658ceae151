//! `flynn-host drain`: the host's jobs go to other hosts.

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::client::host::HostClient;
use flynn_api::host::{ActiveJob, label};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::{print_json, reach};

/// Between looks at what is left.
const LOOK: Duration = Duration::from_secs(1);

/// `flynn-host drain`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Give the host jobs again
    #[arg(long)]
    undo: bool,
    /// Do not wait until the jobs have gone
    #[arg(long, conflicts_with = "undo")]
    no_wait: bool,
    /// How long to wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "undo")]
    timeout: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What has become of the host's jobs.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Drained {
    draining: bool,
    /// Jobs that still have to go.
    left: Vec<String>,
    /// Jobs that stay, and why.
    stays: BTreeMap<String, &'static str>,
}

impl Drained {
    fn of<'a>(jobs: impl Iterator<Item = &'a ActiveJob>) -> Self {
        let mut drained = Self {
            draining: true,
            ..Self::default()
        };
        for job in jobs.filter(|job| !job.status.is_terminal()) {
            match stays(job) {
                Some(why) => drop(drained.stays.insert(job.job.id.clone(), why)),
                None => drained.left.push(job.job.id.clone()),
            }
        }
        drained
    }
}

/// Why nobody takes this job to another host, if so.
fn stays(job: &ActiveJob) -> Option<&'static str> {
    let has = |name: &str| job.job.metadata.get(name).is_some_and(|value| !value.is_empty());
    if !has(label::APP_ID) {
        return Some("it was started on this host by hand");
    }
    if !has(label::PROCESS_TYPE) {
        return Some("it runs once: it ends by itself, or by flynn-host stop");
    }
    if has(label::OMNI) {
        return Some("every host has its own");
    }
    let keeps = job.job.config.volumes.iter().any(|volume| !volume.delete_on_stop);
    keeps.then_some("its data are on this host: see flynn-host volume list")
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    reach(host.drain(!args.undo).await)?;
    if args.undo {
        if args.json {
            return print_json(&Drained::default());
        }
        println!("this host is given jobs again; those that have gone stay where they are");
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut said = None;
    let drained = loop {
        let drained = Drained::of(host.jobs().await?.values());
        if drained.left.is_empty() || args.no_wait || Instant::now() > deadline {
            break drained;
        }
        if said != Some(drained.left.len()) {
            said = Some(drained.left.len());
            eprintln!(
                "{} jobs have to go; others come up elsewhere first",
                drained.left.len()
            );
        }
        sleep(LOOK).await;
    };
    if args.json {
        print_json(&drained)?;
    } else {
        for (job, why) in &drained.stays {
            println!("{job} stays: {why}");
        }
    }
    if drained.left.is_empty() || args.no_wait {
        if !args.json {
            println!("this host is given no jobs; `flynn-host drain --undo` gives it some again");
        }
        return Ok(());
    }
    anyhow::bail!(
        "{} jobs have not gone within {} s: {}. Others cannot take their place: is there another host with room, and with \
         the tags that they want (flynn-host status there)? The host stays drained; `flynn-host drain --undo` ends that",
        drained.left.len(),
        args.timeout,
        drained.left.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use flynn_api::host::{Job, JobState, VolumeBinding};
    use jiff::Timestamp;

    use super::*;

    fn job(id: &str, labels: &[(&str, &str)], volume: Option<bool>) -> ActiveJob {
        let mut job = Job {
            id: id.into(),
            ..Job::default()
        };
        let labels = labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        job.metadata = labels.collect();
        job.config.volumes = volume
            .map(|delete_on_stop| VolumeBinding {
                delete_on_stop,
                ..VolumeBinding::default()
            })
            .into_iter()
            .collect();
        ActiveJob {
            job,
            status: JobState::Running,
            host_id: "a".into(),
            internal_ip: None,
            ports: Vec::new(),
            user_namespace: None,
            pid: None,
            supervisor_pid: None,
            paused: false,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            ended_at: None,
            exit_status: None,
            error: None,
            restarts: 0,
            oom_killed: false,
            healthy: true,
        }
    }

    #[test]
    fn what_the_scheduler_moves_has_to_go() {
        let web = [(label::APP_ID, "x"), (label::PROCESS_TYPE, "web")];
        let omni = [web[0], web[1], (label::OMNI, "true")];
        let over = ActiveJob {
            status: JobState::Done,
            ..job("a-6", &web, None)
        };
        let jobs = [
            job("a-1", &web, None),
            job("a-2", &web, Some(true)),
            job("a-3", &web, Some(false)),
            job("a-4", &omni, None),
            job("a-5", &[], None),
            over,
            job("a-7", &web[..1], None),
        ];
        let drained = Drained::of(jobs.iter());
        assert_eq!(drained.left, ["a-1", "a-2"]);
        assert_eq!(
            drained.stays.keys().collect::<Vec<_>>(),
            ["a-3", "a-4", "a-5", "a-7"]
        );
    }
}
