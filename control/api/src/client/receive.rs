//! Client of image receiving ([`crate::receive`]).

use http::{Method, Request};
use http_body_util::{BodyExt as _, Limited};
use serde::de::DeserializeOwned;

use super::{Body, Http, encode};
use crate::image::{Artifact, Layer};
use crate::receive::NewImage;
use crate::{Error, ErrorCode, Result};

/// The longest answer.
const MAX_ANSWER: usize = 16 << 20;

/// Talks to the image receiving service.
#[derive(Clone, Debug)]
pub struct ReceiveClient {
    http: Http,
}

impl ReceiveClient {
    /// Over this transport, which carries the key ([`Http::password`]).
    pub fn new(http: Http) -> Self {
        Self { http }
    }

    /// The layer made from a docker layer, if it has been sent before.
    pub async fn layer(&self, id: &str) -> Result<Option<Layer>> {
        match self.http.get(&format!("/layer/{}", encode(id))).await {
            Ok(layer) => Ok(Some(layer)),
            Err(error) if error.code == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a docker layer. It takes as long as it takes.
    pub async fn put_layer(&self, id: &str, body: Body) -> Result<Layer> {
        let path = format!("/layer/{}", encode(id));
        let request = Request::builder()
            .method(Method::POST)
            .uri(&path)
            .header(http::header::CONTENT_TYPE, "application/x-tar")
            .body(body)
            .map_err(|why| Error::validation(format!("{path:?} cannot be called: {why}")))?;
        answer(self.http.send(request).await?).await
    }

    /// Makes an artifact of layers that are there.
    pub async fn create_artifact(&self, image: &NewImage) -> Result<Artifact> {
        self.http.post("/artifact", image).await
    }
}

async fn answer<T: DeserializeOwned>(response: http::Response<hyper::body::Incoming>) -> Result<T> {
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|why| Error::unavailable(format!("the answer broke off: {why}")))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|why| Error::internal(format!("an answer cannot be read: {why}")))
}
