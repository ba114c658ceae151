//! Manifests and layers of a job's images, from here or from where the artifact says.

use bytes::Bytes;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::image::{Artifact, ImageManifest, Layer};
use flynn_api::{Digest, Error, Result};
use futures::{Stream, TryStreamExt};
use http_body_util::{BodyExt, BodyStream, Limited};

use super::Daemon;
use crate::files;

/// The longest manifest.
const MAX_MANIFEST: usize = 4 << 20;

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
        let body = self.get(&artifact.uri).await?.into_body();
        let bytes = Limited::new(body, MAX_MANIFEST)
            .collect()
            .await
            .map_err(|error| Error::unavailable(format!("cannot read {what}: {error}")))?
            .to_bytes();
        if digest.is_some_and(|digest| digest != Digest::of(&bytes)) {
            return Err(Error::validation(format!(
                "{what} is not the one that the artifact names by its digest"
            )));
        }
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::validation(format!("{what} is no manifest: {error}")))
    }

    /// Sees to it that a layer is in the store.
    pub(super) async fn layer(&self, layer: &Layer, template: Option<&str>) -> Result<()> {
        let fetch = async || {
            let template = template.ok_or_else(|| {
                Error::validation(format!(
                    "layer {} is not on this host and its artifact does not say where to get it: put it here with \
                     flynn-host download, or give the artifact a layer_url_template",
                    layer.id
                ))
            })?;
            flynn_api::server::disk::check(self.paths.state())?;
            let body = self
                .get(&template.replace("{id}", &layer.id.to_string()))
                .await?
                .into_body();
            Ok(pieces(body))
        };
        self.store.ensure(layer.id, layer.length, fetch).await
    }

    /// GETs a URL; a host name of discoverd's is looked up there, since this host's own resolver does not know it.
    async fn get(&self, url: &str) -> Result<http::Response<hyper::body::Incoming>> {
        let refuse =
            |why: &dyn std::fmt::Display| Error::validation(format!("{url:?} cannot be fetched: {why}"));
        let uri: http::Uri = url
            .parse()
            .map_err(|error: http::uri::InvalidUri| refuse(&error))?;
        let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.host()) else {
            return Err(refuse(&"it has no scheme or no host"));
        };
        let base = match host.strip_suffix(".discoverd") {
            Some(service) => format!("{scheme}://{}", self.instance_of(service).await?),
            None => format!(
                "{scheme}://{}",
                uri.authority()
                    .map(http::uri::Authority::as_str)
                    .unwrap_or_default()
            ),
        };
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let request = http::Request::get(path)
            .header(http::header::HOST, host)
            .body(flynn_api::client::full(""))
            .map_err(|error| refuse(&error))?;
        Http::new(&base)?.send(request).await
    }

    async fn instance_of(&self, service: &str) -> Result<String> {
        let gateway = self.network.get()?.gateway();
        let http = Http::new(&format!("http://{gateway}:{}", flynn_api::discovery::PORT))?;
        let instances = DiscoveryClient::new(http).instances(service).await?;
        let first = instances.into_iter().next().map(|instance| instance.addr);
        first.ok_or_else(|| Error::unavailable(format!("service {service} has no instances now")))
    }
}

/// A body as a stream of its bytes.
pub(super) fn pieces<B>(body: B) -> impl Stream<Item = Result<Bytes, B::Error>>
where
    B: http_body::Body<Data = Bytes>,
{
    BodyStream::new(body).try_filter_map(|frame| async move { Ok(frame.into_data().ok()) })
}
