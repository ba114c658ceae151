//! The certificates of this host and of the platform's jobs on it: where they are kept, and how they are had.

use std::path::{Path, PathBuf};

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::RenewRequest;
use flynn_api::tls::{Identity, KeyRequest, TlsError};
use flynn_api::{Error, Result};

/// The host's own, below its state directory: `ca.pem`, `cert.pem`, `key.pem` ([`Identity`]).
pub fn host_dir(state: &Path) -> PathBuf {
    state.join("tls")
}

/// Those of a system app's jobs, mounted read-only into them as `/etc/flynn/tls`.
pub fn app_dir(state: &Path, app: &str) -> PathBuf {
    host_dir(state).join("apps").join(app)
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
        .await?;
    let identity = Identity {
        ca_pem: signed.ca,
        cert_pem: signed.cert,
        key_pem: request.key_pem,
    };
    identity.save(&dir).map_err(|why| fault(app, &why))?;
    Ok(dir)
}

fn fault(app: &str, why: &TlsError) -> Error {
    Error::internal(format!("cannot get a certificate for {app}: {why}"))
}
