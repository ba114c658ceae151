//! `/apps/{app}/jobs` and `/active-jobs`; one-off jobs are started in [`super::run`].

use axum::extract::Path;
use flynn_api::controller::{DeploymentEvent, EventKind, Job, JobState};
use flynn_api::server::Json;
use flynn_api::{Error, ErrorCode, Result};
use http::StatusCode;

use super::State;
use crate::data::{Change, apps, deployments, id_of, jobs, releases};
use crate::rules;

/// `GET /active-jobs`.
pub(crate) async fn active(state: State) -> Result<Json<Vec<Job>>> {
    Ok(Json(jobs::active(&state.database.client().await?).await?))
}

/// `GET /apps/{app}/jobs`: the newest.
pub(crate) async fn of_app(state: State, Path(app): Path<String>) -> Result<Json<Vec<Job>>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(jobs::of_app(&client, app.id).await?))
}

/// `GET /apps/{app}/jobs/{id}`.
pub(crate) async fn get(state: State, Path((app, id)): Path<(String, String)>) -> Result<Json<Job>> {
    let client = state.database.client().await?;
    let app = apps::find_any(&client, &app).await?;
    Ok(Json(find(&client, &app, &id).await?))
}

pub(super) async fn find(
    c: &impl deadpool_postgres::GenericClient,
    app: &apps::Found,
    id: &str,
) -> Result<Job> {
    let (host, uuid) = rules::job::split_id(id)?;
    let job = jobs::find(c, uuid).await?;
    let fits = |job: &Job| job.app_id == app.app.id && (host.is_empty() || job.host_id == host);
    job.filter(fits)
        .ok_or_else(|| Error::not_found("job", format!("{id} of the app {}", app.app.name)))
}

/// `PUT /apps/{app}/jobs/{id}`: how the scheduler reports. The app may be deleted: its jobs still end.
///
/// Repeated, a report changes nothing. A state that goes backward is refused (409), unless `restarts` has grown: a job
/// that its host brings back keeps its id.
pub(crate) async fn put(
    state: State,
    Path((app, id)): Path<(String, String)>,
    Json(job): Json<Job>,
) -> Result<Json<Job>> {
    let job = rules::job::prepare(job, &id)?;
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let app = apps::find_any(change.tx(), &app).await?;
    if !job.app_id.is_empty() && job.app_id != app.app.id {
        return Err(Error::invalid_field(
            "app",
            "is not that of the path: leave it out",
        ));
    }
    let unknown = || Error::invalid_field("release", format!("there is no release {:?}", job.release_id));
    let release = id_of("release", &job.release_id).map_err(|_| unknown())?;
    if !releases::is_known(change.tx(), release).await? {
        return Err(unknown());
    }
    let there = jobs::find(change.tx(), id_of("job", &job.uuid)?).await?;
    if there
        .as_ref()
        .is_some_and(|there| there.app_id != app.app.id || there.release_id != job.release_id)
    {
        let message = format!("the job {} belongs to another app or release", job.uuid);
        return Err(Error::new(ErrorCode::Conflict, message));
    }
    if let Some(there) = there.filter(|there| says_nothing_new(there, &job)) {
        return Ok(Json(there));
    }
    let job = jobs::put(change.tx(), app.id, release, &job).await?;
    tell(&mut change, &app, &job).await?;
    change.commit().await?;
    Ok(Json(job))
}

fn says_nothing_new(there: &Job, report: &Job) -> bool {
    fn same<T: PartialEq>(report: Option<&T>, there: Option<&T>) -> bool {
        report.is_none() || report == there
    }
    there.state == report.state
        && (report.host_id.is_empty() || report.host_id == there.host_id)
        && same(report.exit_status.as_ref(), there.exit_status.as_ref())
        && same(report.host_error.as_ref(), there.host_error.as_ref())
        && same(report.restarts.as_ref(), there.restarts.as_ref())
        && report.run_at == there.run_at
}

/// Tells of a job that changed, also those who follow the deployment that it is part of.
pub(crate) async fn tell(change: &mut Change<'_>, app: &apps::Found, job: &Job) -> Result<()> {
    let object = if job.id.is_empty() { &job.uuid } else { &job.id };
    change.tell(EventKind::Job, Some(&app.app.id), object, job)?;
    if job.process_type.is_empty() {
        return Ok(());
    }
    let Some(deployment) = deployments::under_way(change.tx(), app.id).await? else {
        return Ok(());
    };
    if job.release_id == deployment.new_release_id
        || Some(&job.release_id) == deployment.old_release_id.as_ref()
    {
        let event = DeploymentEvent {
            app_id: deployment.app_id,
            deployment_id: deployment.id,
            release_id: job.release_id.clone(),
            status: deployment.status,
            job_type: Some(job.process_type.clone()),
            job_state: Some(job.state),
            error: None,
        };
        change.tell(
            EventKind::Deployment,
            Some(&app.app.id),
            &event.deployment_id,
            &event,
        )?;
    }
    Ok(())
}

/// `DELETE /apps/{app}/jobs/{id}`: stops it on its host. The scheduler reports what comes of it.
pub(crate) async fn stop(state: State, Path((app, id)): Path<(String, String)>) -> Result<StatusCode> {
    let job = {
        let client = state.database.client().await?;
        let app = apps::find_any(&client, &app).await?;
        find(&client, &app, &id).await?
    };
    if job.state == JobState::Down {
        return Ok(StatusCode::OK);
    }
    if job.id.is_empty() {
        let message =
            "the job has no host yet, so there is nothing to stop: scale its process type down instead";
        return Err(Error::conflict(message));
    }
    let host = state.hosts.find(&job.host_id).await?;
    state.hosts.client(&host)?.stop_job(&job.id).await?;
    Ok(StatusCode::OK)
}
