//! Status over HTTP, one port above the database's.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use base64::Engine as _;
use flynn_api::server::{Json, Listener};
use flynn_api::sirenia::{PeerStatus, Status};
use flynn_api::{Error as ApiError, ErrorCode};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::database::Handle;
use crate::{Error, Options};

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct Board {
    peer: watch::Receiver<PeerStatus>,
    database: Handle,
    /// The `Authorization` that may stop the database.
    key: Arc<str>,
    stop: CancellationToken,
}

impl Board {
    pub(crate) fn new(
        peer: watch::Receiver<PeerStatus>,
        database: Handle,
        password: &str,
        stop: CancellationToken,
    ) -> Self {
        let key = base64::engine::general_purpose::STANDARD.encode(format!(":{password}"));
        Self {
            peer,
            database,
            key: format!("Basic {key}").into(),
            stop,
        }
    }

    async fn status(&self) -> Status {
        let peer = self.peer.borrow().clone();
        Status {
            peer,
            database: self.database.status().await,
        }
    }
}

/// Binds the port.
pub(crate) async fn listen(options: &Options) -> Result<Listener, Error> {
    let addr = std::net::SocketAddr::new(options.address, options.port + 1);
    Listener::tcp(addr)
        .await
        .map_err(Error::file("cannot listen for status on", addr.to_string()))
}

/// Serves until `stop`.
pub(crate) async fn serve(listener: Listener, board: Board, stop: CancellationToken) {
    let router = Router::new()
        .route("/status", get(status))
        .route("/.well-known/status", get(healthy))
        .route("/stop", post(end))
        .with_state(board);
    if let Err(error) = flynn_api::server::serve(listener, router, stop.cancelled_owned()).await {
        tracing::error!(%error, "status is not served any more");
    }
}

async fn status(State(board): State<Board>) -> Json<Status> {
    Json(board.status().await)
}

async fn healthy(State(board): State<Board>) -> Result<Json<Status>, ApiError> {
    let status = board.status().await;
    if status.database.read_write {
        return Ok(Json(status));
    }
    let why = status
        .peer
        .problem
        .or(status.database.error)
        .unwrap_or_else(|| "it takes no writes".into());
    Err(ApiError::unavailable(format!(
        "the database is of no use now: {why}"
    )))
}

async fn end(State(board): State<Board>, headers: HeaderMap) -> Result<(), ApiError> {
    let given = headers
        .get(AUTHORIZATION)
        .map_or(&b""[..], |value| value.as_bytes());
    if !same(given, board.key.as_bytes()) {
        return Err(ApiError::new(
            ErrorCode::Unauthorized,
            "stopping the database takes the administrator's password, by HTTP basic authentication",
        ));
    }
    board.stop.cancel();
    Ok(())
}

/// Compares in a time that does not tell where the two differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}
