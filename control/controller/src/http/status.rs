//! What anyone may ask: is it there, and which CA does the cluster have.

use flynn_api::Result;
use flynn_api::server::Json;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::State;
use crate::data;

/// `GET /ping`.
pub(crate) async fn ping() -> StatusCode {
    StatusCode::OK
}

/// `GET /.well-known/status`: healthy if the database answers.
pub(crate) async fn status(state: State) -> (StatusCode, Json<Value>) {
    let answer = async { data::events::newest(&state.database.client().await?).await };
    let version = env!("CARGO_PKG_VERSION");
    match answer.await {
        Ok(_) => (
            StatusCode::OK,
            Json(json!({ "data": { "status": "healthy", "version": version } })),
        ),
        Err(why) => {
            let body =
                json!({ "data": { "status": "unhealthy", "detail": why.message, "version": version } });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body))
        }
    }
}

/// `GET /ca-cert`.
pub(crate) async fn ca_cert(state: State) -> Result<([(http::HeaderName, &'static str); 1], String)> {
    Ok((
        [(CONTENT_TYPE, "application/x-pem-file")],
        state.hosts.ca().await?,
    ))
}
