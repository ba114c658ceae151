//! The certificates of this host and of the platform's jobs on it: where they are kept, and how they are had.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{self, HOST_SERVICE, NetworkLeases, RenewRequest, ServiceMeta};
use flynn_api::tls::{Identity, KeyRequest, TlsError};
use flynn_api::{Error, Result};
use serde::Deserialize as _;

use crate::config::{HostConfig, Overrides};
use crate::paths::Paths;
use crate::{files, leases};

/// The host's own, below its state directory: `ca.pem`, `cert.pem`, `key.pem` ([`Identity`]).
pub fn host_dir(state: &Path) -> PathBuf {
    state.join("tls")
}

/// Those of a system app's jobs, mounted read-only into them as `/etc/flynn/tls`.
pub fn app_dir(state: &Path, app: &str) -> PathBuf {
    host_dir(state).join("apps").join(app)
}

/// Discoverd, spoken to as this host: at this host, or where that one does not answer at those that have a lease.
///
/// # Errors
/// The host has no configuration that can be read, or no certificate.
pub(crate) fn discoverd(state: &Path) -> anyhow::Result<DiscoveryClient> {
    discoverd_within(state, Duration::from_secs(10))
}

/// [`discoverd`] with calls that may take so long.
pub(crate) fn discoverd_within(state: &Path, timeout: Duration) -> anyhow::Result<DiscoveryClient> {
    let config = HostConfig::load(state, &Overrides::default())?;
    let identity = Identity::load(&host_dir(state))
        .context("this host is in no cluster yet: run flynn-host bootstrap or flynn-host join")?;
    let own = Http::new(&format!("https://{}:{}", config.address, discovery::PORT))?;
    // What the daemon saw last of it. Without, this host's alone is asked.
    let document = Paths::network_of(state).join(format!("{HOST_SERVICE}.json"));
    let leases = files::read_json::<ServiceMeta>(&document).ok().flatten();
    let leases = leases.and_then(|meta| NetworkLeases::deserialize(&meta.data).ok());
    Ok(DiscoveryClient::new(own.identity(&identity)?.timeout(timeout))
        .learning(host_dir(state))
        .knowing(leases.iter().flat_map(leases::members)))
}

/// Sees to it that a system app's certificate is there: discoverd's leader signs it when it is not.
pub async fn ensure_app(state: &Path, app: &str, discoverd: &DiscoveryClient) -> Result<PathBuf> {
    let dir = app_dir(state, app);
    if Identity::load(&dir).is_ok() {
        return Ok(dir);
    }
    let request = KeyRequest::generate().map_err(|why| fault(app, &why))?;
    let signed = discoverd
        .renew(&RenewRequest {
            csr: request.csr_pem,
            job: Some(app.to_owned()),
        })
        .await
        .map_err(|why| Error {
            message: format!("{app} gets no certificate: {}", why.message),
            ..why
        })?;
    let identity = Identity {
        ca_pem: signed.ca,
        cert_pem: signed.cert,
        key_pem: request.key_pem,
    };
    identity.save(&dir).map_err(|why| fault(app, &why))?;
    Ok(dir)
}

/// Has those of this host renewed that `due` says: its own, and those of its system apps' jobs. Names what was renewed,
/// and what failed with it; a failure of one is none of the others.
///
/// The key stays: the files are replaced one after the other, and whoever reads between finds a pair that fits.
pub async fn renew(
    state: &Path,
    discoverd: &DiscoveryClient,
    due: impl Fn(&Identity) -> bool,
) -> (Vec<String>, Vec<Error>) {
    let mut kept = vec![None];
    // There are none before the first system job.
    for entry in std::fs::read_dir(host_dir(state).join("apps"))
        .into_iter()
        .flatten()
    {
        kept.extend(
            entry
                .ok()
                .and_then(|entry| entry.file_name().into_string().ok())
                .map(Some),
        );
    }
    let (mut renewed, mut failed) = (Vec::new(), Vec::new());
    for app in kept {
        let (name, dir) = match &app {
            None => ("this host".to_owned(), host_dir(state)),
            Some(app) => (app.clone(), app_dir(state, app)),
        };
        let Ok(identity) = Identity::load(&dir) else {
            continue;
        };
        if !due(&identity) {
            continue;
        }
        match renew_one(&dir, &name, identity, app, discoverd).await {
            Ok(()) => renewed.push(name),
            Err(error) => failed.push(error),
        }
    }
    (renewed, failed)
}

async fn renew_one(
    dir: &Path,
    name: &str,
    identity: Identity,
    job: Option<String>,
    discoverd: &DiscoveryClient,
) -> Result<()> {
    let csr = KeyRequest::of(&identity.key_pem)
        .map_err(|why| fault(name, &why))?
        .csr_pem;
    let signed = discoverd
        .renew(&RenewRequest { csr, job })
        .await
        .map_err(|why| Error {
            message: format!("the certificate of {name} is not renewed: {}", why.message),
            ..why
        })?;
    let renewed = Identity {
        ca_pem: signed.ca,
        cert_pem: signed.cert,
        ..identity
    };
    renewed.save(dir).map_err(|why| fault(name, &why))
}

fn fault(app: &str, why: &TlsError) -> Error {
    Error::internal(format!("cannot get a certificate for {app}: {why}"))
}
