//! Servers outside the cluster: over TLS by the certificates that this machine trusts.

use std::sync::{Arc, OnceLock};

use flynn_api::client::Http;
use flynn_api::{Error, Result};
use rustls::{ClientConfig, RootCertStore};

/// A client of the server at `base`.
pub fn client(base: &str) -> Result<Http> {
    let http = Http::new(base)?;
    if base.starts_with("https:") {
        return Ok(http.tls(tls()?));
    }
    Ok(http)
}

/// Reading all certificates takes a while, and is done once.
fn tls() -> Result<Arc<ClientConfig>> {
    static TLS: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = TLS.get() {
        return Ok(Arc::clone(config));
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(Error::validation(
            "this machine trusts no certificates: install the package ca-certificates",
        ));
    }
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::clone(TLS.get_or_init(|| Arc::new(config))))
}
