//! Does what the planner decides, and sees when scale requests are fulfilled.
//!
//! Each round takes every app with something unfinished and brings it one transaction further. A row lock keeps
//! other controllers away for as long as that takes; nothing else is held, so nothing is lost when this one dies.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Transaction;
use flynn_api::controller::{DeploymentEvent, EventKind, JobState, Processes, Tags};
use flynn_api::{Error, Meta, Result};
use serde_json::json;
use tokio::sync::broadcast;
use uuid::Uuid;

use super::planner::{self, Action, MAX_FAILURES, Seen, Side, Step, Strategy};
use crate::data::deployments::Unfinished;
use crate::data::{self, Change, apps, deployments, formations, jobs, releases, scales};
use crate::rules;
use crate::service::Shared;

/// Between rounds while something is unfinished: its time may run out.
const BUSY: Duration = Duration::from_secs(1);
/// Between rounds otherwise.
const IDLE: Duration = Duration::from_secs(10);
/// How long events are gathered before a round.
const GATHER: Duration = Duration::from_millis(20);

/// Works for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut changes = shared.feed.changes();
    while let Err(why) = restart_clocks(&shared).await {
        tracing::warn!(%why, "deployments cannot be taken up yet");
        tokio::time::sleep(BUSY).await;
    }
    loop {
        let pause = match round(&shared).await {
            Ok(0) => IDLE,
            Ok(_) => BUSY,
            Err(why) => {
                tracing::warn!(%why, "a round of the deployment worker failed; trying again");
                BUSY
            }
        };
        match tokio::time::timeout(pause, changes.recv()).await {
            Ok(Err(broadcast::error::RecvError::Closed)) => return,
            Ok(_) => tokio::time::sleep(GATHER).await,
            Err(_) => {}
        }
        // Whatever else has happened is seen by the same round.
        while !matches!(
            changes.try_recv(),
            Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed)
        ) {}
    }
}

async fn restart_clocks(shared: &Shared) -> Result<()> {
    let taken_up = deployments::restart_clocks(&shared.database.client().await?).await?;
    if taken_up > 0 {
        tracing::info!(taken_up, "going on with unfinished deployments");
    }
    Ok(())
}

/// Brings everything unfinished one step further; says how many apps that were.
async fn round(shared: &Shared) -> Result<usize> {
    let mut unfinished = {
        let client = shared.database.client().await?;
        let mut unfinished = deployments::unfinished_apps(&client).await?;
        unfinished.extend(scales::pending_apps(&client).await?);
        unfinished
    };
    unfinished.sort_unstable();
    unfinished.dedup();
    if unfinished.is_empty() {
        return Ok(0);
    }
    let hosts: Option<Vec<Meta>> = shared.hosts.list().await.ok().map(|hosts| {
        hosts
            .into_iter()
            .filter(|host| !host.leaving)
            .map(|host| host.tags)
            .collect()
    });
    for app in &unfinished {
        if let Err(why) = advance(shared, *app, hosts.as_deref()).await {
            tracing::warn!(%app, %why, "an app's deployment could not be advanced; trying again");
        }
    }
    Ok(unfinished.len())
}

async fn advance(shared: &Shared, app: Uuid, hosts: Option<&[Meta]>) -> Result<()> {
    let mut client = shared.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    apps::lock(change.tx(), app).await?;
    if let Some(deployment) = deployments::claim(change.tx(), app).await? {
        deploy(&mut change, &deployment, hosts).await?;
    }
    for request in scales::claim(change.tx(), app).await? {
        let release = data::id_of("release", &request.release_id)?;
        // A deleted release has had its requests cancelled; at worst this one waits for that.
        let Some(release) = releases::get_by_id(change.tx(), release).await? else {
            continue;
        };
        let processes = request.new_processes.clone().unwrap_or_default();
        let tags = request.new_tags.clone().unwrap_or_default();
        let Some(expected) = expected(&release.release, &processes, &tags, hosts) else {
            continue;
        };
        let counts = jobs::count(change.tx(), app, release.id).await?;
        if rules::formation::is_reached(&expected, &counts) {
            let request = scales::complete(change.tx(), &request.id).await?;
            change.tell(
                EventKind::ScaleRequest,
                Some(&request.app_id),
                &request.id,
                &request,
            )?;
        }
    }
    change.commit().await
}

/// The jobs that are to be there; unknown when that depends on hosts which cannot be seen now.
fn expected(
    release: &flynn_api::controller::Release,
    processes: &Processes,
    tags: &Tags,
    hosts: Option<&[Meta]>,
) -> Option<Processes> {
    if hosts.is_none() && rules::formation::depends_on_hosts(release, processes) {
        return None;
    }
    Some(rules::formation::expected(
        release,
        processes,
        tags,
        hosts.unwrap_or_default(),
    ))
}

async fn deploy(change: &mut Change<'_>, unfinished: &Unfinished, hosts: Option<&[Meta]>) -> Result<()> {
    let deployment = &unfinished.deployment;
    let strategy: Strategy = deployment.strategy.parse()?;
    let Some(new) = releases::get_by_id(change.tx(), unfinished.new_release).await? else {
        return fail(change, unfinished, "the new release has been deleted", true).await;
    };
    let Some(new_side) = side(change.tx(), unfinished.app, &new, hosts).await? else {
        return Ok(());
    };
    let old = match unfinished.old_release {
        Some(old) => releases::get_by_id(change.tx(), old).await?,
        None => None,
    };
    let old_side = match &old {
        Some(old) => side(change.tx(), unfinished.app, old, hosts).await?,
        None => Some(Side::default()),
    };
    let Some(old_side) = old_side else {
        return Ok(());
    };
    let limit = i64::try_from(MAX_FAILURES).unwrap_or_default() + 1;
    let failures = jobs::down_since(
        change.tx(),
        unfinished.app,
        unfinished.new_release,
        unfinished.id,
        limit,
    )
    .await?;
    let action = planner::next(&Seen {
        step: unfinished.step,
        step_age: unfinished.step_age,
        timeout: Duration::from_secs(u64::try_from(deployment.deploy_timeout).unwrap_or_default()),
        target: &deployment.processes,
        turns: &planner::turns(strategy, &new.release, &deployment.processes),
        old: &old_side,
        new: &new_side,
        failures: &failures,
    });
    match action {
        Action::Wait => Ok(()),
        Action::Scale {
            old: old_wanted,
            new: new_wanted,
            step,
            failure,
        } => {
            if let Some(old) = old {
                put(change, unfinished.app, old.id, &old_wanted, None).await?;
            }
            put(
                change,
                unfinished.app,
                new.id,
                &new_wanted,
                Some(&deployment.tags),
            )
            .await?;
            deployments::enter(change.tx(), unfinished.id, step, failure.as_deref()).await?;
            tell(change, unfinished, "running", failure.as_deref())
        }
        Action::Switch => {
            switch(change, unfinished).await?;
            deployments::enter(change.tx(), unfinished.id, Step::Drain, None).await?;
            tell(change, unfinished, "running", None)
        }
        Action::Complete => {
            deployments::finish(change.tx(), unfinished.id, None).await?;
            tracing::info!(deployment = %unfinished.id, "a deployment is complete");
            tell(change, unfinished, "complete", None)
        }
        Action::Fail { why, restore } => {
            let why = why.or_else(|| deployment.error.clone());
            let why = why.as_deref().unwrap_or("the new release did not come up");
            fail(change, unfinished, why, restore).await
        }
    }
}

/// What is seen of one release; none when that depends on hosts which cannot be seen now.
async fn side(
    tx: &Transaction<'_>,
    app: Uuid,
    release: &releases::Found,
    hosts: Option<&[Meta]>,
) -> Result<Option<Side>> {
    let formation = formations::find(tx, app, release.id).await?.unwrap_or_default();
    let Some(expected) = expected(&release.release, &formation.processes, &formation.tags, hosts) else {
        return Ok(None);
    };
    let counts = jobs::count(tx, app, release.id).await?;
    Ok(Some(Side {
        wanted: formation.processes,
        expected,
        up: rules::formation::in_state(&counts, JobState::Up),
        alive: rules::formation::alive(&counts),
    }))
}

/// Puts a formation, and tells of it if that changed it. Without `tags` it keeps its own.
async fn put(
    change: &mut Change<'_>,
    app: Uuid,
    release: Uuid,
    processes: &Processes,
    tags: Option<&Tags>,
) -> Result<()> {
    let there = formations::find(change.tx(), app, release).await?;
    let generation = there.as_ref().map(|there| there.generation);
    let own = there.map(|there| there.tags).unwrap_or_default();
    let formation = formations::put(change.tx(), app, release, processes, tags.unwrap_or(&own), None).await?;
    if generation == Some(formation.generation) {
        return Ok(());
    }
    change.tell(
        EventKind::Scale,
        Some(&formation.app_id),
        &formation.release_id,
        &formation,
    )
}

/// The new release becomes current, and nothing more is wanted of the old one.
async fn switch(change: &mut Change<'_>, unfinished: &Unfinished) -> Result<()> {
    if let Some(old) = unfinished.old_release {
        put(change, unfinished.app, old, &Processes::new(), None).await?;
    }
    set_release(
        change,
        unfinished.app,
        unfinished.old_release,
        unfinished.new_release,
    )
    .await
}

/// Makes a release the app's current one, and tells of it.
pub(crate) async fn set_release(
    change: &mut Change<'_>,
    app: Uuid,
    before: Option<Uuid>,
    release: Uuid,
) -> Result<()> {
    let shown = |found: Option<releases::Found>| found.map(|found| rules::release::redacted(&found.release));
    let previous = match before {
        Some(before) => shown(releases::get_by_id(change.tx(), before).await?),
        None => None,
    };
    let current = shown(releases::get_by_id(change.tx(), release).await?);
    let app = apps::set_release(change.tx(), app, release).await?;
    let data = json!({ "prev_release": previous, "release": current });
    change.tell(EventKind::AppRelease, Some(&app.id), &release.to_string(), &data)
}

async fn fail(change: &mut Change<'_>, unfinished: &Unfinished, why: &str, restore: bool) -> Result<()> {
    if restore {
        // The old formation gets back what it gave; the new one goes.
        let given = &unfinished.deployment.processes;
        if let Some(old) = unfinished.old_release
            && let Some(there) = formations::find(change.tx(), unfinished.app, old).await?
        {
            let restored = planner::restored(&there.processes, given);
            put(change, unfinished.app, old, &restored, None).await?;
        }
        let gone = formations::delete(change.tx(), unfinished.app, unfinished.new_release).await?;
        if let Some(formation) = gone {
            change.tell(
                EventKind::Scale,
                Some(&formation.app_id),
                &formation.release_id,
                &formation,
            )?;
        }
    }
    deployments::finish(change.tx(), unfinished.id, Some(why)).await?;
    tracing::warn!(deployment = %unfinished.id, why, "a deployment has failed");
    tell(change, unfinished, "failed", Some(why))
}

fn tell(change: &mut Change<'_>, unfinished: &Unfinished, status: &str, error: Option<&str>) -> Result<()> {
    let deployment = &unfinished.deployment;
    let event = DeploymentEvent {
        app_id: deployment.app_id.clone(),
        deployment_id: deployment.id.clone(),
        release_id: deployment.new_release_id.clone(),
        status: status.to_owned(),
        error: error.map(ToOwned::to_owned),
        ..DeploymentEvent::default()
    };
    change.tell(
        EventKind::Deployment,
        Some(&deployment.app_id),
        &deployment.id,
        &event,
    )
}

/// The first event of a deployment, or its only one when there is nothing to do.
pub(crate) fn begun(change: &mut Change<'_>, deployment: &flynn_api::controller::Deployment) -> Result<()> {
    let event = DeploymentEvent {
        app_id: deployment.app_id.clone(),
        deployment_id: deployment.id.clone(),
        release_id: deployment.new_release_id.clone(),
        status: deployment.status.clone(),
        ..DeploymentEvent::default()
    };
    change.tell(
        EventKind::Deployment,
        Some(&deployment.app_id),
        &deployment.id,
        &event,
    )
}

/// Fails an app's unfinished deployment, if there is one: the app is being deleted.
pub(crate) async fn abandon(change: &mut Change<'_>, app: Uuid) -> Result<()> {
    match deployments::claim(change.tx(), app).await? {
        Some(unfinished) => fail(change, &unfinished, "the app was deleted", false).await,
        None if deployments::under_way(change.tx(), app).await?.is_some() => Err(Error::conflict(
            "a deployment of this app is taking a step just now: try again",
        )),
        None => Ok(()),
    }
}
