//! The certificates of this host and of the platform's jobs on it: where they are kept, and how they are had.
//!
//! They follow the cluster's CA: what is trusted, and who signs, is as discoverd says ([`CaStatus`]), and discoverd is
//! told what is held here ([`Held`]), before it takes the next step of a change of roots.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{
    self, CA_SERVICE, CaStatus, HOST_SERVICE, Held, Instance, LateRequest, NetworkLeases, RenewRequest,
    ServiceMeta,
};
use flynn_api::tls::{Certificate, Identity, KeyRequest, TlsError};
use flynn_api::{Error, ErrorCode, Result};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize as _;

use crate::config::{HostConfig, Overrides};
use crate::paths::Paths;
use crate::{files, leases};

/// How long a call may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Days before its end from which a certificate that was not renewed is spoken of. It should have been a month before.
pub const WARN_DAYS: i64 = 30;

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
    discoverd_within(state, TIMEOUT)
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

/// A certificate that is kept on this host.
pub struct Kept {
    /// The system app whose jobs have it; `None` for the host's own.
    pub app: Option<String>,
    /// Where it is.
    pub dir: PathBuf,
    /// It, with its key and what it trusts.
    pub identity: Identity,
}

impl Kept {
    /// Whose it is.
    pub fn name(&self) -> &str {
        self.app.as_deref().unwrap_or("this host")
    }
}

/// Those that there are; the host's own is the first.
pub fn kept(state: &Path) -> Vec<Kept> {
    // There are none before the first system job.
    let apps = std::fs::read_dir(host_dir(state).join("apps"))
        .into_iter()
        .flatten();
    let mut apps: Vec<String> = apps
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    apps.sort_unstable();
    let all = std::iter::once(None).chain(apps.into_iter().map(Some));
    all.filter_map(|app| {
        let dir = app
            .as_ref()
            .map_or_else(|| host_dir(state), |app| app_dir(state, app));
        let identity = Identity::load(&dir).ok()?;
        Some(Kept { app, dir, identity })
    })
    .collect()
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
    let (mut renewed, mut failed) = (Vec::new(), Vec::new());
    for kept in kept(state).into_iter().filter(|kept| due(&kept.identity)) {
        let name = kept.name().to_owned();
        match renew_one(&kept.dir, &name, kept.identity, kept.app, discoverd).await {
            Ok(()) => renewed.push(name),
            Err(error) => failed.push(error),
        }
    }
    (renewed, failed)
}

/// What came of a look at the certificates.
#[derive(Debug, Default)]
pub struct Looked {
    /// Whose were renewed.
    pub renewed: Vec<String>,
    /// What went wrong.
    pub failed: Vec<Error>,
    /// What all on this host hold, as far as that is known.
    pub held: Option<Held>,
}

/// Renews what is due by its age, or because of a change of the CA's roots, and finds out what is held here. `daemon` is
/// the identity that the daemon uses.
pub async fn look(state: &Path, discoverd: &DiscoveryClient, daemon: Option<&Identity>) -> Looked {
    // An earlier release has no such call: then only the age counts.
    let ca = discoverd.ca().await.ok();
    let now = Timestamp::now();
    let due = |identity: &Identity| identity.is_due(now) || ca.as_ref().is_some_and(|ca| !fits(identity, ca));
    let (renewed, failed) = renew(state, discoverd, due).await;
    let in_use = ca.and_then(|ca| ca.loaded?.held);
    let held = in_use.and_then(|mut held| {
        for kept in kept(state) {
            held.join(&kept.identity.held()?);
        }
        held.join(&daemon?.held()?);
        Some(held)
    });
    Looked {
        renewed,
        failed,
        held,
    }
}

fn fits(identity: &Identity, ca: &CaStatus) -> bool {
    identity.held().is_some_and(|held| ca.fits(&held))
}

/// Tells discoverd what is held on this host. An instance: it is to be told again and again.
pub async fn tell(discoverd: &DiscoveryClient, host: &str, address: &str, held: &Held) -> Result<()> {
    let instance = Instance::new("https", address, held.to_meta(host));
    match discoverd.register(CA_SERVICE, &instance).await {
        // The cluster is being made.
        Err(error) if error.code == ErrorCode::NotFound => Ok(()),
        result => result,
    }
}

/// Whether this host's own certificate has run out: no other host listens to it then.
pub fn is_over(state: &Path, now: Timestamp) -> bool {
    Identity::load(&host_dir(state))
        .and_then(|identity| identity.certificate())
        .is_ok_and(|certificate| certificate.not_after <= now)
}

/// Has the certificate of a host renewed that has run out, and then those of its jobs, by the discoverd at one of these
/// addresses (`192.0.2.11:1111`). This host's own can do it only when it finds the others, or is alone.
pub async fn renew_late(state: &Path, addresses: &[String]) -> Result<Vec<String>> {
    let dir = host_dir(state);
    let fault = |why: TlsError| fault("this host", &why);
    let identity = Identity::load(&dir).map_err(fault)?;
    let request = LateRequest {
        cert: identity.cert_pem.clone(),
        csr: KeyRequest::of(&identity.key_pem).map_err(fault)?.csr_pem,
    };
    let config = identity.late_client_config().map_err(fault)?;
    let mut last =
        Error::unavailable("no other host is known here: name one, `flynn-host renew --at ADDRESS`");
    for address in addresses {
        let http = Http::new(&format!("https://{address}"))?.timeout(TIMEOUT);
        let asked = DiscoveryClient::new(http.clone().tls(Arc::clone(&config)));
        let signed = match asked.renew_late(&request).await {
            Ok(signed) => signed,
            Err(error) => {
                // A refusal says more than that somebody else does not answer.
                if last.code != ErrorCode::Unauthorized {
                    last = error;
                }
                continue;
            }
        };
        let renewed = Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            ..identity
        };
        renewed.save(&dir).map_err(fault)?;
        let discoverd = DiscoveryClient::new(http.identity(&renewed).map_err(fault)?);
        let (mut names, failed) = renew(state, &discoverd, |other| *other != renewed).await;
        names.insert(0, "this host".to_owned());
        return failed.into_iter().next().map_or(Ok(names), Err);
    }
    Err(last)
}

/// Where discoverds are, by what this host saw last of the cluster; its own is the last.
pub fn discoverds(state: &Path, host: &str) -> Vec<String> {
    let file = state.join("network").join(format!("{HOST_SERVICE}.json"));
    let meta: Option<ServiceMeta> = crate::files::read_json(&file).ok().flatten();
    let leases = meta.and_then(|meta| serde_json::from_value::<NetworkLeases>(meta.data).ok());
    let leases = leases.unwrap_or_default().leases;
    let mut leases: Vec<_> = leases.into_iter().collect();
    leases.sort_by_key(|(id, _)| id == host);
    let addr = |(_, lease): (_, discovery::SubnetLease)| format!("{}:{}", lease.address, discovery::PORT);
    leases.into_iter().map(addr).collect()
}

/// What `GET /metrics` shows of them.
pub fn metrics(state: &Path) -> String {
    const NAME: &str = "flynn_host_certificate_expiry_timestamp_seconds";
    let mut text = format!("# HELP {NAME} When a certificate on this host runs out.\n# TYPE {NAME} gauge\n");
    for kept in kept(state) {
        if let Ok(certificate) = kept.identity.certificate() {
            let whose = kept
                .app
                .as_deref()
                .map_or_else(|| "host".to_owned(), |app| format!("job:{app}"));
            let _ = writeln!(
                text,
                "{NAME}{{certificate=\"{whose}\"}} {}",
                certificate.not_after.as_second()
            );
        }
    }
    text
}

/// What operators have to know of the certificates here.
pub fn warnings(state: &Path, now: Timestamp) -> Vec<String> {
    let warn = |whose: &str, certificate: &Certificate| {
        let left = certificate.not_after.duration_since(now);
        if left > SignedDuration::from_hours(24 * WARN_DAYS) {
            return None;
        }
        let end = certificate.not_after;
        Some(if left.is_positive() {
            format!(
                "the certificate of {whose} runs out on {end}, in {} days, and was not renewed so far: see what the \
                 daemon logs, and `flynn-host renew`",
                left.as_hours() / 24
            )
        } else {
            format!(
                "the certificate of {whose} ran out on {end}: see what the daemon logs, and `flynn-host renew`"
            )
        })
    };
    let mut warnings = Vec::new();
    for kept in kept(state) {
        if let Ok(certificate) = kept.identity.certificate() {
            warnings.extend(warn(kept.name(), &certificate));
        }
        if kept.app.is_none() {
            for root in Certificate::all(&kept.identity.ca_pem).unwrap_or_default() {
                let left = root.not_after.duration_since(now);
                if left < SignedDuration::from_hours(24 * WARN_DAYS) {
                    warnings.push(format!(
                        "the root {:.16} of the cluster's CA runs out on {}: see `flynn-host ca status`",
                        root.fingerprint.to_string(),
                        root.not_after
                    ));
                }
            }
        }
    }
    warnings
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
