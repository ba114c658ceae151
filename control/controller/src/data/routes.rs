//! Routes.

use deadpool_postgres::GenericClient;
use flynn_api::route::{Certificate, Route, RouteKind};
use flynn_api::{Error, Result};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{get, id, of_word, one, optional_id, rows, run, word};

/// Whether the keys of certificates are wanted: the router serves them, people do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    /// With them.
    Shown,
    /// Without.
    Hidden,
}

const COLUMNS: &str = "r.id, r.app_id, r.kind, r.service, r.port, r.leader, r.domain, r.path, r.sticky,
    r.drain_backends, r.disable_keep_alives, r.created_at, r.updated_at, r.certificate_id, c.cert, c.key";
const TABLES: &str = "routes r LEFT JOIN certificates c ON c.id = r.certificate_id";

/// The parent of an app's routes.
pub(crate) fn parent_ref(app_id: &str) -> String {
    format!("controller/apps/{app_id}")
}

fn read(row: &Row, keys: Keys) -> Result<Route> {
    let kind: String = get(row, "kind")?;
    let certificate = optional_id(row, "certificate_id")?
        .map(|id| {
            let key = if keys == Keys::Shown {
                get(row, "key")?
            } else {
                String::new()
            };
            Ok::<_, Error>(Certificate {
                id,
                cert: get(row, "cert")?,
                key,
            })
        })
        .transpose()?;
    Ok(Route {
        id: format!("{kind}/{}", id(row, "id")?),
        kind: of_word(&kind)?,
        parent_ref: parent_ref(&id(row, "app_id")?),
        service: get(row, "service")?,
        port: u16::try_from(get::<i32>(row, "port")?).unwrap_or_default(),
        leader: get(row, "leader")?,
        domain: get(row, "domain")?,
        path: get(row, "path")?,
        certificate,
        sticky: get(row, "sticky")?,
        drain_backends: get(row, "drain_backends")?,
        disable_keep_alives: get(row, "disable_keep_alives")?,
        created_at: get(row, "created_at")?,
        updated_at: get(row, "updated_at")?,
    })
}

/// All routes.
pub(crate) async fn list(c: &impl GenericClient, keys: Keys) -> Result<Vec<Route>> {
    let sql =
        format!("SELECT {COLUMNS} FROM {TABLES} WHERE r.deleted_at IS NULL ORDER BY r.created_at, r.id");
    rows(c, &sql, &[])
        .await?
        .iter()
        .map(|row| read(row, keys))
        .collect()
}

/// An app's routes, without keys.
pub(crate) async fn of_app(c: &impl GenericClient, app: Uuid) -> Result<Vec<Route>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM {TABLES} WHERE r.app_id = $1 AND r.deleted_at IS NULL ORDER BY r.created_at, r.id"
    );
    rows(c, &sql, &[&app])
        .await?
        .iter()
        .map(|row| read(row, Keys::Hidden))
        .collect()
}

/// One route of an app, without its key.
pub(crate) async fn find(c: &impl GenericClient, app: Uuid, kind: RouteKind, key: Uuid) -> Result<Route> {
    let sql = format!(
        "SELECT {COLUMNS} FROM {TABLES} WHERE r.id = $1 AND r.app_id = $2 AND r.kind = $3 AND r.deleted_at IS NULL"
    );
    let row = one(c, &sql, &[&key, &app, &word(&kind)?]).await?;
    row.as_ref()
        .map(|row| read(row, Keys::Hidden))
        .transpose()?
        .ok_or_else(|| Error::not_found("route", key))
}

/// A route on a domain, as rules look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OnDomain {
    pub(crate) id: Uuid,
    pub(crate) app_name: String,
    pub(crate) path: String,
}

/// All routes of a domain.
pub(crate) async fn on_domain(c: &impl GenericClient, domain: &str) -> Result<Vec<OnDomain>> {
    let sql = "SELECT r.id, r.path, a.name FROM routes r JOIN apps a ON a.id = r.app_id
               WHERE r.kind = 'http' AND r.domain = $1 AND r.deleted_at IS NULL ORDER BY r.path";
    let read = |row: &Row| {
        Ok(OnDomain {
            id: get(row, "id")?,
            app_name: get(row, "name")?,
            path: get(row, "path")?,
        })
    };
    rows(c, sql, &[&domain]).await?.iter().map(read).collect()
}

/// Ports in use by routes of a kind, with the app and the route that use each.
pub(crate) async fn ports(c: &impl GenericClient, kind: RouteKind) -> Result<Vec<(u16, String, Uuid)>> {
    let sql = "SELECT r.port, a.name, r.id FROM routes r JOIN apps a ON a.id = r.app_id
               WHERE r.kind = $1 AND r.deleted_at IS NULL ORDER BY r.port";
    let read = |row: &Row| {
        let port: i32 = get(row, "port")?;
        Ok((
            u16::try_from(port).unwrap_or_default(),
            get(row, "name")?,
            get(row, "id")?,
        ))
    };
    rows(c, sql, &[&word(&kind)?]).await?.iter().map(read).collect()
}

/// Adds a route whose rules have been checked under [`super::Lock::Routes`].
pub(crate) async fn add(
    c: &impl GenericClient,
    app: Uuid,
    route: &Route,
    certificate: Option<Uuid>,
) -> Result<Route> {
    let key = Uuid::new_v4();
    let sql = "INSERT INTO routes (id, app_id, kind, service, port, leader, domain, path, certificate_id, sticky,
               drain_backends, disable_keep_alives) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
    let params: super::Params<'_> = &[
        &key,
        &app,
        &word(&route.kind)?,
        &route.service,
        &i32::from(route.port),
        &route.leader,
        &route.domain,
        &route.path,
        &certificate,
        &route.sticky,
        &route.drain_backends,
        &route.disable_keep_alives,
    ];
    run(c, sql, params).await?;
    find(c, app, route.kind, key).await
}

/// What becomes of a route's certificate.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NewCertificate {
    /// It stays.
    Keep,
    /// This one, or none.
    Set(Option<Uuid>),
}

/// Changes what can be changed: the service, the certificate and how requests are treated.
pub(crate) async fn update(
    c: &impl GenericClient,
    app: Uuid,
    key: Uuid,
    route: &Route,
    certificate: NewCertificate,
) -> Result<Route> {
    let (keep, certificate) = match certificate {
        NewCertificate::Keep => (true, None),
        NewCertificate::Set(certificate) => (false, certificate),
    };
    let sql = "UPDATE routes SET service = $2, leader = $3, sticky = $4, drain_backends = $5,
               disable_keep_alives = $6, certificate_id = CASE WHEN $7 THEN certificate_id ELSE $8::uuid END,
               updated_at = now() WHERE id = $1";
    let params: super::Params<'_> = &[
        &key,
        &route.service,
        &route.leader,
        &route.sticky,
        &route.drain_backends,
        &route.disable_keep_alives,
        &keep,
        &certificate,
    ];
    run(c, sql, params).await?;
    find(c, app, route.kind, key).await
}

/// Deletes a route, softly. Its certificate is let go.
pub(crate) async fn delete(c: &impl GenericClient, key: Uuid) -> Result<()> {
    let sql = "UPDATE routes SET deleted_at = now(), updated_at = now(), certificate_id = NULL WHERE id = $1";
    run(c, sql, &[&key]).await.map(drop)
}
