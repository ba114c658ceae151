//! Where a repository is: a directory, or below a URL.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use flynn_api::client::Http;
use flynn_api::{Error, ErrorCode, Result};
use futures::StreamExt as _;
use http::header::RANGE;
use tokio::time::timeout;
use tough::{Transport, TransportError, TransportErrorKind, TransportStream};
use url::Url;

use crate::download::{self, Opened};
use crate::web;

/// The most that is read of metadata.
const MAX: usize = 8 << 20;

/// A place that a repository can be read from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A directory of this machine.
    Dir(PathBuf),
    /// A server, and a path there.
    Http(Box<Http>),
}

impl Source {
    /// The place that a text names: `http://…`, `https://…`, or a directory.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        if text.starts_with("http://") || text.starts_with("https://") {
            let url = Url::parse(text)?;
            anyhow::ensure!(
                url.username().is_empty() && url.password().is_none() && url.query().is_none(),
                "a repository's URL has neither a password nor a query: it is kept, and shown"
            );
            let http = web::client(text.trim_end_matches('/'))?;
            return Ok(Self::Http(Box::new(http)));
        }
        anyhow::ensure!(
            !text.contains("://"),
            "{text:?} is no repository: http://…, https://… or a directory is wanted"
        );
        let dir = std::path::absolute(text)?;
        anyhow::ensure!(dir.is_dir(), "there is no directory {}", dir.display());
        Ok(Self::Dir(dir))
    }

    /// The place as a URL that ends with a slash.
    pub(super) fn url(&self) -> anyhow::Result<Url> {
        match self {
            Self::Dir(dir) => {
                Url::from_directory_path(dir).map_err(|()| anyhow::anyhow!("{} is no URL", dir.display()))
            }
            Self::Http(http) => Ok(Url::parse(&format!("{}/", http.base()))?),
        }
    }

    /// Opens a file below it, from a byte on.
    pub(super) async fn open(&self, path: &str, from: u64) -> Result<Opened> {
        match self {
            Self::Dir(dir) => {
                let plain = |part| matches!(part, Component::Normal(_));
                if !Path::new(path).components().all(plain) {
                    return Err(Error::validation(format!("{path:?} leads out of the repository")));
                }
                download::open_file(&dir.join(path), from).await
            }
            Self::Http(http) => {
                let mut request = http::Request::get(format!("/{path}"));
                if from > 0 {
                    request = request.header(RANGE, format!("bytes={from}-"));
                }
                let request = request.body(flynn_api::client::full(""));
                let request = request.map_err(|why| Error::validation(format!("{path:?}: {why}")))?;
                let answer = http.send(request).await.map_err(|mut error| {
                    // A server of files says little of its own.
                    if error.code == ErrorCode::NotFound {
                        error.message = format!("there is no {}/{path}", http.base());
                    }
                    error
                })?;
                download::opened(answer)
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(dir) => write!(f, "{}", dir.display()),
            Self::Http(http) => f.write_str(http.base()),
        }
    }
}

/// How tough reads metadata: from a source, for as long as that says something.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub(super) source: Source,
    pub(super) base: Url,
    pub(super) idle: Duration,
}

#[async_trait]
impl Transport for Metadata {
    async fn fetch(&self, url: Url) -> std::result::Result<TransportStream, TransportError> {
        let failed = {
            let url = url.clone();
            move |error: Error| {
                let kind = match error.code {
                    ErrorCode::NotFound => TransportErrorKind::FileNotFound,
                    _ => TransportErrorKind::Other,
                };
                TransportError::new_with_cause(kind, url.as_str(), error)
            }
        };
        let idle = self.idle;
        let silent = move || {
            Error::new(
                ErrorCode::Timeout,
                format!("the server has said nothing for {} s", idle.as_secs_f32()),
            )
        };
        let Some(path) = url.as_str().strip_prefix(self.base.as_str()) else {
            return Err(TransportError::new(
                TransportErrorKind::UnsupportedUrlScheme,
                url.as_str(),
            ));
        };
        let read = async {
            let mut body = timeout(idle, self.source.open(path, 0))
                .await
                .map_err(|_| silent())??
                .body;
            let mut bytes = Vec::new();
            // More than tough takes is for tough to refuse.
            while bytes.len() <= MAX {
                match timeout(idle, body.next()).await.map_err(|_| silent())? {
                    Some(piece) => bytes.extend(piece?),
                    None => break,
                }
            }
            Ok(bytes)
        };
        let bytes = read.await.map_err(&failed)?;
        Ok(Box::pin(futures::stream::iter([Ok(bytes.into())])))
    }
}
