//! Waits until what was asked for is so: jobs are up, a deployment is over. What happens meanwhile is told.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use flynn_api::client::controller::ControllerClient;
use flynn_api::controller::{App, Deployment, Job, JobState, Processes, Release};
use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;

use crate::failure::Result;
use crate::output::note;

/// Between looks. Events would tell sooner, but a look tells the truth, and costs one call.
const PERIOD: Duration = Duration::from_millis(300);

/// Seconds for an app that names no timeout.
const TIMEOUT: u64 = 120;

fn timeout(app: &App) -> Duration {
    Duration::from_secs(
        u64::try_from(app.deploy_timeout)
            .ok()
            .filter(|seconds| *seconds > 0)
            .unwrap_or(TIMEOUT),
    )
}

/// Waits until as many jobs of each type of `release` run as `wanted` says.
pub(crate) async fn jobs(
    controller: &ControllerClient,
    app: &App,
    release: &Release,
    wanted: &Processes,
) -> Result<()> {
    let (start, limit) = (Instant::now(), timeout(app));
    let mut seen: HashMap<String, JobState> = HashMap::new();
    // What was over before is no news.
    let mut first = true;
    loop {
        let jobs = controller.jobs(&app.id).await?;
        let jobs: Vec<_> = jobs
            .into_iter()
            .filter(|job| job.release_id == release.id)
            .collect();
        for job in &jobs {
            let before = seen.insert(job.uuid.clone(), job.state);
            if before != Some(job.state) && !(first && matches!(job.state, JobState::Down | JobState::Up)) {
                note(describe(job));
            }
        }
        first = false;
        if wanted
            .iter()
            .all(|(kind, count)| settled(&jobs, release, kind, *count))
        {
            return Ok(());
        }
        if start.elapsed() > limit {
            let message = format!(
                "not all jobs of {} are as wanted after {} s. See what holds them: flynn -a {0} ps -a; flynn -a {0} log",
                app.name,
                limit.as_secs()
            );
            return Err(Error::new(ErrorCode::Timeout, message).into());
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Whether `count` jobs of a type run and none comes or goes.
fn settled(jobs: &[Job], release: &Release, kind: &str, count: u32) -> bool {
    let of_kind = || jobs.iter().filter(|job| job.process_type == kind);
    let up = of_kind().filter(|job| job.state == JobState::Up).count();
    let moving = of_kind().any(|job| !matches!(job.state, JobState::Up | JobState::Down));
    let omni = release.processes.get(kind).is_some_and(|process| process.omni);
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    // The count of an omnipresent type is one for each host, of which there may be any number.
    !moving
        && if omni && count > 0 {
            up >= count
        } else {
            up == count
        }
}

fn describe(job: &Job) -> String {
    let id = if job.id.is_empty() { &job.uuid } else { &job.id };
    let mut text = format!("{} {id} is {}", job.process_type, state(job.state));
    if let Some(status) = job.exit_status {
        text.push_str(&format!(" (exit status {status})"));
    }
    if let Some(why) = &job.host_error {
        text.push_str(&format!(": {why}"));
    }
    text
}

/// A state as people read it.
pub(crate) fn state(state: JobState) -> &'static str {
    match state {
        JobState::Pending => "pending",
        JobState::Blocked => "blocked",
        JobState::Starting => "starting",
        JobState::Up => "up",
        JobState::Stopping => "stopping",
        JobState::Down => "down",
    }
}

/// Deploys a release and waits until that is over.
pub(crate) async fn deploy(
    controller: &ControllerClient,
    app: &App,
    release: &Release,
) -> Result<Deployment> {
    let deployment = controller.deploy(&app.id, &release.id).await?;
    if deployment.id.is_empty() {
        // Nothing ran, so there was nothing to go over from.
        return Ok(deployment);
    }
    let limit = timeout(app)
        .saturating_mul(2)
        .saturating_add(Duration::from_secs(30));
    let over = async {
        loop {
            if let Some(done) = follow(controller, &deployment.id).await? {
                return Ok(done);
            }
            tokio::time::sleep(PERIOD).await;
        }
    };
    tokio::time::timeout(limit, over).await.unwrap_or_else(|_| {
        let message = format!(
            "the deployment {} is not over after {} s; look again: flynn deployment",
            deployment.id,
            limit.as_secs()
        );
        Err(Error::new(ErrorCode::Timeout, message).into())
    })
}

/// Tells of a deployment's steps while its stream lasts; what became of it once it is over.
async fn follow(controller: &ControllerClient, id: &str) -> Result<Option<Deployment>> {
    if let Ok(mut events) = controller.deployment_events(id).await {
        while let Some(Ok((_, event))) = events.next().await {
            if let (Some(kind), Some(job)) = (&event.job_type, event.job_state) {
                note(format!(
                    "{kind} job of release {} is {}",
                    short(&event.release_id),
                    state(job)
                ));
            }
            match event.status.as_str() {
                "failed" => return Err(failed(event.error.as_deref())),
                "complete" => break,
                _ => {}
            }
        }
    }
    let deployment = match controller.deployment(id).await {
        // The controller, or its database, may be what is being deployed.
        Err(why) if why.retry => return Ok(None),
        deployment => deployment?,
    };
    match deployment.status.as_str() {
        "complete" => Ok(Some(deployment)),
        "failed" => Err(failed(deployment.error.as_deref())),
        _ => Ok(None),
    }
}

fn failed(why: Option<&str>) -> crate::failure::Failure {
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    Error::conflict(format!(
        "the deployment failed{why}. The old release goes on; see flynn log and flynn ps -a"
    ))
    .into()
}

/// The start of an id, enough for people.
pub(crate) fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::controller::ProcessType;

    #[test]
    fn jobs_are_settled_when_none_comes_or_goes() {
        let job = |state| Job {
            process_type: "web".into(),
            state,
            ..Job::default()
        };
        let mut release = Release::default();
        let settled = |jobs: &[Job], release: &Release, count| super::settled(jobs, release, "web", count);
        assert!(settled(&[], &release, 0) && !settled(&[], &release, 1));
        assert!(settled(&[job(JobState::Up), job(JobState::Down)], &release, 1));
        assert!(!settled(
            &[job(JobState::Up), job(JobState::Stopping)],
            &release,
            1
        ));
        assert!(!settled(&[job(JobState::Up), job(JobState::Up)], &release, 1));
        release.processes.insert(
            "web".into(),
            ProcessType {
                omni: true,
                ..ProcessType::default()
            },
        );
        assert!(settled(&[job(JobState::Up), job(JobState::Up)], &release, 1));
        assert!(!settled(&[job(JobState::Up)], &release, 0));
    }
}
