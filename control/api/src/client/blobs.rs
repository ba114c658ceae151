//! Client of the blobstore.

use http::Request;
use hyper::body::Incoming;

use super::{Body, Http};
use crate::Result;

/// Talks to the blobstore.
#[derive(Clone, Debug)]
pub struct BlobClient {
    http: Http,
}

impl BlobClient {
    /// Over this transport.
    pub fn new(http: Http) -> Self {
        Self { http }
    }

    /// A blob's content, streamed.
    pub async fn get(&self, path: &str) -> Result<Incoming> {
        let request = request("GET", path, super::transport::empty())?;
        Ok(self.http.send(request).await?.into_body())
    }

    /// Whether a blob is there.
    pub async fn exists(&self, path: &str) -> Result<bool> {
        let request = request("HEAD", path, super::transport::empty())?;
        let status = self.http.send_raw(request).await?.status();
        match status {
            status if status.is_success() => Ok(true),
            http::StatusCode::NOT_FOUND => Ok(false),
            status => Err(crate::Error::from_response(status, b"")),
        }
    }

    /// Stores a blob.
    pub async fn put(&self, path: &str, body: Body) -> Result<()> {
        let request = request("PUT", path, body)?;
        self.http.send(request).await.map(drop)
    }

    /// Removes a blob.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.http.delete(path).await
    }
}

fn request(method: &str, path: &str, body: Body) -> Result<Request<Body>> {
    Request::builder()
        .method(method)
        .uri(path)
        .body(body)
        .map_err(|why| crate::Error::validation(format!("{path:?} is not a blob's path: {why}")))
}
