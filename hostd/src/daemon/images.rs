//! Manifests and layers of a job's images, from here or from where the artifact says.

use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::host::Job;
use flynn_api::image::{Artifact, ImageManifest, Layer};
use flynn_api::{Digest, Error, Result};
use futures::{Stream, StreamExt as _, TryStreamExt};
use http_body_util::{BodyExt, BodyStream, Limited};
use tokio::time::timeout;

use super::Daemon;
use crate::download::{self, Patience};
use crate::{files, web};

/// The longest manifest.
const MAX_MANIFEST: usize = 4 << 20;

/// How long one may take to come.
const MANIFEST: Duration = Duration::from_secs(30);

/// Layers of a job that are fetched at once.
const AT_ONCE: usize = 4;

impl Daemon {
    /// An artifact's manifest: its own, one that is here, or the one that its URI has.
    pub(super) async fn manifest(&self, artifact: &Artifact) -> Result<ImageManifest> {
        if let Some(manifest) = &artifact.manifest {
            return Ok(manifest.clone());
        }
        let digest = artifact.hashes.map(|hashes| hashes.sha512_256);
        if let Some(digest) = digest {
            let path = self.paths.images().join(format!("{digest}.json"));
            if let Some(manifest) =
                files::read_json(&path).map_err(|error| Error::internal(error.to_string()))?
            {
                return Ok(manifest);
            }
        }
        if artifact.uri.is_empty() {
            return Err(Error::invalid_field(
                "artifacts",
                "an image without a manifest, and without a URI to get it",
            ));
        }
        let what = format!("the manifest at {}", artifact.uri);
        let get = async {
            let body = self.get(&artifact.uri, 0, 0).await?.into_body();
            let body = Limited::new(body, MAX_MANIFEST).collect().await;
            body.map_err(|error| Error::unavailable(format!("cannot read {what}: {error}")))
        };
        let bytes = timeout(MANIFEST, get)
            .await
            .map_err(|_| Error::unavailable(format!("{what} does not come")))??
            .to_bytes();
        if digest.is_some_and(|digest| digest != Digest::of(&bytes)) {
            return Err(Error::validation(format!(
                "{what} is not the one that the artifact names by its digest"
            )));
        }
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::validation(format!("{what} is no manifest: {error}")))
    }

    /// The manifests of a job's images, with all of their layers in the store, where they stay as long as the job.
    pub(super) async fn images(&self, job: &Job) -> Result<Vec<ImageManifest>> {
        let mut manifests = Vec::new();
        for artifact in &job.artifacts {
            manifests.push(self.manifest(artifact).await?);
        }
        let wanted = wanted(&job.artifacts, &manifests);
        self.mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .hold(&job.id, wanted.iter().map(|(layer, _)| layer.id));
        let fetches: Vec<_> = wanted
            .into_iter()
            .map(|(layer, template)| self.layer(layer, template))
            .collect();
        futures::stream::iter(fetches)
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
        Ok(manifests)
    }

    /// Sees to it that a layer is in the store.
    pub(super) async fn layer(&self, layer: &Layer, template: Option<&str>) -> Result<()> {
        if self.store.has_whole(layer)? {
            return Ok(());
        }
        let template = template.ok_or_else(|| {
            Error::validation(format!(
                "layer {} is not on this host and its artifact does not say where to get it: put it here with \
                 flynn-host download, or give the artifact a layer_url_template",
                layer.id
            ))
        })?;
        self.make_room(layer.length)?;
        let url = template.replace("{id}", &layer.id.to_string());
        let url = url.as_str();
        let open =
            download::opener(
                |from, attempt| async move { download::opened(self.get(url, from, attempt).await?) },
            );
        self.store.fetch(layer, Patience::default(), open, |_| ()).await
    }

    /// GETs a URL, from a byte on. A host name of discoverd's is looked up there, since this host's own resolver does not
    /// know it; each attempt asks another instance.
    async fn get(&self, url: &str, from: u64, attempt: u32) -> Result<http::Response<hyper::body::Incoming>> {
        let refuse =
            |why: &dyn std::fmt::Display| Error::validation(format!("{url:?} cannot be fetched: {why}"));
        let uri: http::Uri = url
            .parse()
            .map_err(|error: http::uri::InvalidUri| refuse(&error))?;
        let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.host()) else {
            return Err(refuse(&"it has no scheme or no host"));
        };
        let base = match host.strip_suffix(".discoverd") {
            Some(service) => format!("{scheme}://{}", self.instance_of(service, attempt).await?),
            None => format!(
                "{scheme}://{}",
                uri.authority()
                    .map(http::uri::Authority::as_str)
                    .unwrap_or_default()
            ),
        };
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let mut request = http::Request::get(path).header(http::header::HOST, host);
        if from > 0 {
            request = request.header(http::header::RANGE, format!("bytes={from}-"));
        }
        let request = request
            .body(flynn_api::client::full(""))
            .map_err(|error| refuse(&error))?;
        web::client(&base)?.send(request).await
    }

    async fn instance_of(&self, service: &str, attempt: u32) -> Result<String> {
        let gateway = self.network.get()?.gateway();
        let http = Http::new(&format!("http://{gateway}:{}", flynn_api::discovery::PORT))?;
        let instances = DiscoveryClient::new(http).instances(service).await?;
        let chosen = (attempt as usize).checked_rem(instances.len());
        let chosen = chosen.and_then(|index| instances.into_iter().nth(index));
        chosen
            .map(|instance| instance.addr)
            .ok_or_else(|| Error::unavailable(format!("service {service} has no instances now")))
    }
}

/// The layers of images, each once, and where they are to be had.
fn wanted<'a>(
    artifacts: &'a [Artifact],
    manifests: &'a [ImageManifest],
) -> Vec<(&'a Layer, Option<&'a str>)> {
    let mut wanted: Vec<(&Layer, Option<&str>)> = Vec::new();
    for (artifact, manifest) in artifacts.iter().zip(manifests) {
        for layer in manifest.layers() {
            if !wanted.iter().any(|(there, _)| there.id == layer.id) {
                wanted.push((layer, artifact.layer_url_template.as_deref()));
            }
        }
    }
    wanted
}

/// A body as a stream of its bytes.
pub(super) fn pieces<B>(body: B) -> impl Stream<Item = Result<Bytes, B::Error>>
where
    B: http_body::Body<Data = Bytes>,
{
    BodyStream::new(body).try_filter_map(|frame| async move { Ok(frame.into_data().ok()) })
}
