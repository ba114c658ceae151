//! Certificates: one per route by SNI, else the default.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use flynn_api::route::{Certificate, Route};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, Ticketer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::files;
use crate::table;

/// The file of a default certificate that we made ourselves: chain and key.
const OWN: &str = "default.pem";

/// Certificates by host name, with the default behind them.
#[derive(Debug)]
pub struct Certificates {
    default: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    by_name: RwLock<HashMap<String, Arc<CertifiedKey>>>,
    /// Routes whose certificates cannot be used, with the reason.
    bad: RwLock<Vec<(String, String)>>,
}

impl Certificates {
    /// With this default.
    pub fn new(default: &Certificate) -> anyhow::Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        Ok(Self {
            default: Arc::new(certified(default, &provider)?),
            provider,
            by_name: RwLock::default(),
            bad: RwLock::default(),
        })
    }

    /// Those of the routes, from now on. One that cannot be used leaves its route with the default.
    pub fn set(&self, routes: &[Route]) {
        let (mut by_name, mut bad) = (HashMap::new(), Vec::new());
        for route in routes {
            let Some(certificate) = &route.certificate else {
                continue;
            };
            match certified(certificate, &self.provider) {
                Ok(key) => {
                    by_name
                        .entry(table::normalize_host(&route.domain))
                        .or_insert_with(|| Arc::new(key));
                }
                Err(why) => {
                    tracing::warn!(
                        domain = route.domain,
                        "a route's certificate cannot be used: {why:#}"
                    );
                    bad.push((route.domain.clone(), format!("{why:#}")));
                }
            }
        }
        *self.by_name.write().unwrap_or_else(PoisonError::into_inner) = by_name;
        *self.bad.write().unwrap_or_else(PoisonError::into_inner) = bad;
    }

    /// Routes whose certificates cannot be used: domain and reason.
    pub fn bad(&self) -> Vec<(String, String)> {
        self.bad.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The certificate for a name.
    pub fn find(&self, name: &str) -> Arc<CertifiedKey> {
        let host = table::normalize_host(name);
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let found = table::candidates(&host).find_map(|name| by_name.get(&name).cloned());
        found.unwrap_or_else(|| Arc::clone(&self.default))
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(
            hello
                .server_name()
                .map_or_else(|| Arc::clone(&self.default), |name| self.find(name)),
        )
    }
}

/// TLS 1.2 and 1.3 with these certificates; HTTP/2 and HTTP/1.1.
pub fn server_config(certificates: Arc<Certificates>) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::clone(&certificates.provider);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = Ticketer::new()?;
    Ok(Arc::new(config))
}

fn certified(certificate: &Certificate, provider: &CryptoProvider) -> anyhow::Result<CertifiedKey> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate.cert.as_bytes()).collect();
    let chain = chain.context("the chain is not PEM")?;
    anyhow::ensure!(
        !chain.is_empty(),
        "the chain has no certificate: give PEM, the leaf first"
    );
    // The key itself must never show.
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes())
        .map_err(|_| anyhow::anyhow!("the key is not a private key in PEM"))?;
    CertifiedKey::from_der(chain, key, provider).context("chain and key do not go together")
}

/// A default certificate of our own: the one that was made before, else one that is made now.
pub fn default_certificate(dir: &Path, domain: Option<&str>) -> anyhow::Result<Certificate> {
    let path = dir.join(OWN);
    let provider = aws_lc_rs::default_provider();
    if let Ok(pem) = std::fs::read_to_string(&path) {
        let own = Certificate {
            id: String::new(),
            cert: pem.clone(),
            key: pem,
        };
        if certified(&own, &provider).is_ok() {
            return Ok(own);
        }
        tracing::warn!("the router's own certificate on disk cannot be used; making another");
    }
    let names = domain.map_or_else(
        || vec!["flynn".to_owned()],
        |domain| vec![domain.to_owned(), format!("*.{domain}")],
    );
    let made = rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
    let own = Certificate {
        id: String::new(),
        cert: made.cert.pem(),
        key: made.signing_key.serialize_pem(),
    };
    if let Err(why) = files::write(&path, format!("{}{}", own.cert, own.key).as_bytes()) {
        tracing::warn!(
            "the router's own certificate cannot be kept, and will be another after a restart: {why:#}"
        );
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str) -> Certificate {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        Certificate {
            id: String::new(),
            cert: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
        }
    }

    fn route(domain: &str, certificate: Certificate) -> Route {
        Route {
            domain: domain.into(),
            certificate: Some(certificate),
            ..Route::default()
        }
    }

    #[test]
    fn one_bad_certificate_stops_nobody() {
        let (default, own, wild) = (made("default"), made("a.example.com"), made("*.example.com"));
        let certificates = Certificates::new(&default).unwrap();
        let mismatched = Certificate {
            key: made("b").key,
            ..made("b")
        };
        certificates.set(&[
            route(
                "broken.test",
                Certificate {
                    cert: "nonsense".into(),
                    ..Certificate::default()
                },
            ),
            route("mismatched.test", mismatched),
            route("a.example.com", own.clone()),
            route("*.example.com", wild.clone()),
        ]);
        let leaf = |name: &str| certificates.find(name).cert[0].clone();
        let der =
            |certificate: &Certificate| CertificateDer::from_pem_slice(certificate.cert.as_bytes()).unwrap();
        assert_eq!(leaf("A.example.com"), der(&own));
        assert_eq!(leaf("b.example.com"), der(&wild));
        assert_eq!(leaf("broken.test"), der(&default));
        assert_eq!(certificates.bad().len(), 2);
    }

    #[test]
    fn our_own_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = default_certificate(dir.path(), Some("flynn.test")).unwrap();
        let second = default_certificate(dir.path(), Some("flynn.test")).unwrap();
        let provider = aws_lc_rs::default_provider();
        let leaf = |certificate: &Certificate| certified(certificate, &provider).unwrap().cert[0].clone();
        assert_eq!(leaf(&first), leaf(&second));
        std::fs::write(dir.path().join(OWN), "cut sho").unwrap();
        assert_ne!(
            leaf(&default_certificate(dir.path(), None).unwrap()),
            leaf(&first)
        );
    }
}
