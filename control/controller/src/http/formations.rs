//! `/formations`, `/apps/{app}/formations` and `/apps/{app}/scale`.

use std::collections::VecDeque;

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use flynn_api::controller::{EventKind, ExpandedFormation, Formation, Processes, ScaleRequest, Tags};
use flynn_api::server::{Json, StrictJson, wants_events};
use flynn_api::{Error, Result};
use futures::Stream;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use uuid::Uuid;

use super::State;
use super::query::Query;
use super::releases::usable;
use crate::data::events::Filter;
use crate::data::{Change, apps, deployments, formations, id_of, releases, scales, snapshot};
use crate::feed::Subscription;
use crate::{database::Database, rules};

/// What `GET /formations` takes.
#[derive(Deserialize)]
pub(crate) struct Listing {
    /// Only formations that want something.
    #[serde(default)]
    active: bool,
    /// In a stream: mark the end of what was there at its beginning by a formation without an app.
    #[serde(default)]
    current: bool,
}

/// `GET /formations`: as a stream, all formations and then each one that changes; as a list, with `?active=true`.
pub(crate) async fn list(state: State, Query(query): Query<Listing>, headers: HeaderMap) -> Result<Response> {
    if wants_events(&headers) {
        // The position is taken first: what changes meanwhile is sent twice rather than never.
        let from = state.feed.newest().await?;
        let kinds = vec![
            EventKind::Scale,
            EventKind::App,
            EventKind::AppRelease,
            EventKind::AppDeletion,
        ];
        let changes = state.feed.subscribe(
            from,
            Filter {
                kinds,
                ..Filter::default()
            },
            Vec::new(),
        );
        let keys = formations::keys(&state.database.client().await?, query.active).await?;
        let stream = Expanding {
            database: state.database.clone(),
            keys: keys.into(),
            marker: query.current,
            changes,
        };
        return Ok(flynn_api::server::events(stream.into_stream()));
    }
    if !query.active {
        let why = "a list of all formations is not given: ask for ?active=true, or for a stream of events";
        return Err(Error::validation(why));
    }
    // A deployment changes two formations at once: nobody shall see one of them alone.
    let mut client = state.database.client().await?;
    let snapshot = snapshot(&mut client).await?;
    let mut list = Vec::new();
    for (app, release) in formations::keys(&snapshot, true).await? {
        list.push(formations::expand(&snapshot, app, release).await?);
    }
    Ok(Json(list).into_response())
}

/// Formations as a stream: those that are there, then those that change.
struct Expanding {
    database: Database,
    keys: VecDeque<(Uuid, Uuid)>,
    marker: bool,
    changes: Subscription,
}

impl Expanding {
    async fn next(&mut self) -> Option<ExpandedFormation> {
        loop {
            if let Some((app, release)) = self.keys.front().copied() {
                let expanded =
                    async { formations::expand(&self.database.client().await?, app, release).await };
                match expanded.await {
                    Ok(formation) => {
                        self.keys.pop_front();
                        return Some(formation);
                    }
                    Err(why) if why.retry => tokio::time::sleep(std::time::Duration::from_secs(1)).await,
                    // A hole would go unnoticed: the reader begins anew instead.
                    Err(_) => return None,
                }
                continue;
            }
            if std::mem::take(&mut self.marker) {
                return Some(ExpandedFormation::default());
            }
            let event = self.changes.next().await?;
            let app = Uuid::try_parse(event.app_id.as_deref()?).ok()?;
            if event.object_type == EventKind::Scale {
                self.keys
                    .push_back((app, Uuid::try_parse(&event.object_id).ok()?));
                continue;
            }
            // The app is part of each of its formations.
            while let Err(why) = self.all_of(app).await {
                if !why.retry {
                    return None;
                }
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    async fn all_of(&mut self, app: Uuid) -> Result<()> {
        for formation in formations::of_app(&self.database.client().await?, app).await? {
            self.keys
                .push_back((app, id_of("release", &formation.release_id)?));
        }
        Ok(())
    }

    fn into_stream(self) -> impl Stream<Item = (Option<String>, ExpandedFormation)> + Send {
        futures::stream::unfold(self, |mut this| async move {
            this.next().await.map(|formation| ((None, formation), this))
        })
    }
}

/// `GET /apps/{app}/formations`.
pub(crate) async fn of_app(state: State, Path(app): Path<String>) -> Result<Json<Vec<Formation>>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(formations::of_app(&client, app.id).await?))
}

/// `GET /apps/{app}/formations/{release}`.
pub(crate) async fn get(
    state: State,
    Path((app, release)): Path<(String, String)>,
) -> Result<Json<Formation>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    let key = id_of("release", &release)?;
    let found = formations::find(&client, app.id, key).await?;
    found
        .map(Json)
        .ok_or_else(|| Error::not_found("formation of the release", release))
}

/// `PUT /apps/{app}/formations/{release}`. A `generation` other than 0 must be the present one.
pub(crate) async fn put(
    state: State,
    Path((app, release)): Path<(String, String)>,
    StrictJson(wanted): StrictJson<Formation>,
) -> Result<Json<Formation>> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let (app, release) = claim(&change, &app, &release).await?;
    same("app", &wanted.app_id, &[&app.app.id, &app.app.name])?;
    same("release", &wanted.release_id, &[&release.release.id])?;
    let expected = (wanted.generation != 0).then_some(wanted.generation);
    rules::formation::check(&release.release, &wanted.processes, &wanted.tags)?;
    let (_, formation) = set(
        &mut change,
        &app,
        &release,
        &wanted.processes,
        &wanted.tags,
        expected,
    )
    .await?;
    change.commit().await?;
    Ok(Json(formation))
}

/// `DELETE /apps/{app}/formations/{release}`.
pub(crate) async fn delete(state: State, Path((app, release)): Path<(String, String)>) -> Result<StatusCode> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let (app, release) = claim(&change, &app, &release).await?;
    let there = formations::find(change.tx(), app.id, release.id).await?;
    let there = there.ok_or_else(|| Error::not_found("formation of the release", &release.release.id))?;
    if total(&there.processes) > 0 {
        let elsewhere = total_elsewhere(&change, &app, &release).await?;
        rules::formation::keep_critical(&app.app, elsewhere)?;
    }
    cancel_scales(&mut change, &app, &release).await?;
    if let Some(gone) = formations::delete(change.tx(), app.id, release.id).await? {
        change.tell(EventKind::Scale, Some(&app.app.id), &gone.release_id, &gone)?;
    }
    change.commit().await?;
    Ok(StatusCode::OK)
}

/// `PUT /apps/{app}/scale/{release}`. Types that are not named keep their counts.
pub(crate) async fn scale(
    state: State,
    Path((app, release)): Path<(String, String)>,
    StrictJson(wanted): StrictJson<ScaleRequest>,
) -> Result<Json<ScaleRequest>> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let (app, release) = claim(&change, &app, &release).await?;
    same("app", &wanted.app_id, &[&app.app.id, &app.app.name])?;
    same("release", &wanted.release_id, &[&release.release.id])?;
    let there = formations::find(change.tx(), app.id, release.id)
        .await?
        .unwrap_or_default();
    let (mut processes, mut tags) = (there.processes, there.tags);
    let new_processes = wanted.new_processes.unwrap_or_default();
    let new_tags = wanted.new_tags.unwrap_or_default();
    rules::formation::check(&release.release, &new_processes, &new_tags)?;
    processes.extend(new_processes);
    tags.extend(new_tags);
    let (old, new) = set(&mut change, &app, &release, &processes, &tags, None).await?;
    let request = scales::add(change.tx(), app.id, release.id, &old, &new).await?;
    change.tell(EventKind::ScaleRequest, Some(&app.app.id), &request.id, &request)?;
    change.commit().await?;
    Ok(Json(request))
}

/// The app and one of its releases, while nobody else changes what is wanted of the app.
async fn claim(change: &Change<'_>, app: &str, release: &str) -> Result<(apps::Found, releases::Found)> {
    let app = apps::claim(change.tx(), app).await?;
    let release = usable(change.tx(), &app, release).await?;
    deployments::refuse_while_under_way(change.tx(), app.id, "scaling").await?;
    Ok((app, release))
}

fn same(field: &str, given: &str, there: &[&str]) -> Result<()> {
    if given.is_empty() || there.contains(&given) {
        return Ok(());
    }
    Err(Error::invalid_field(
        field,
        "is not that of the path: leave it out",
    ))
}

fn total(processes: &Processes) -> u64 {
    processes.values().map(|n| u64::from(*n)).sum()
}

async fn total_elsewhere(change: &Change<'_>, app: &apps::Found, release: &releases::Found) -> Result<u64> {
    let all = formations::of_app(change.tx(), app.id).await?;
    let others = all
        .iter()
        .filter(|formation| formation.release_id != release.release.id);
    Ok(others.map(|formation| total(&formation.processes)).sum())
}

async fn cancel_scales(change: &mut Change<'_>, app: &apps::Found, release: &releases::Found) -> Result<()> {
    for request in scales::cancel(change.tx(), app.id, release.id).await? {
        change.tell(EventKind::ScaleRequest, Some(&app.app.id), &request.id, &request)?;
    }
    Ok(())
}

/// Puts checked counts and tags; gives the formation before and after. Pending scale requests are overtaken by it.
async fn set(
    change: &mut Change<'_>,
    app: &apps::Found,
    release: &releases::Found,
    processes: &Processes,
    tags: &Tags,
    expected: Option<u64>,
) -> Result<(Formation, Formation)> {
    let old = formations::find(change.tx(), app.id, release.id).await?;
    if old.as_ref().is_some_and(|old| total(&old.processes) > 0) && total(processes) == 0 {
        let elsewhere = total_elsewhere(change, app, release).await?;
        rules::formation::keep_critical(&app.app, elsewhere)?;
    }
    let new = formations::put(change.tx(), app.id, release.id, processes, tags, expected).await?;
    cancel_scales(change, app, release).await?;
    if old.as_ref().is_none_or(|old| old.generation != new.generation) {
        change.tell(EventKind::Scale, Some(&app.app.id), &new.release_id, &new)?;
    }
    Ok((old.unwrap_or_default(), new))
}
