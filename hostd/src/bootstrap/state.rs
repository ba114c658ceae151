//! What bootstrap has made up and must find again when it is run anew: secrets and ids.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use flynn_api::Digest;
use flynn_api::tls::{Ca, PeerIdentity, TlsError};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::manifest::AppIds;
use crate::files;

/// The file's name in the host's state directory.
const FILE: &str = "bootstrap.json";

/// What was made up. Secret.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    /// The form of this file.
    pub version: u32,
    /// The cluster's domain.
    pub domain: String,
    /// Secrets by variable name.
    pub secrets: BTreeMap<String, String>,
    /// Ids by app name.
    pub apps: BTreeMap<String, AppIds>,
    /// The cluster CA's certificate, PEM.
    pub ca_cert: String,
    /// The cluster CA's key, PEM. Emptied once discoverd keeps it.
    pub ca_key: String,
    /// Everything has been done.
    pub done: bool,
}

impl State {
    /// What an earlier run made up, or something new for this domain.
    pub(super) fn open(dir: &Path, domain: Option<&str>) -> anyhow::Result<Self> {
        if let Some(state) = files::read_json::<Self>(&dir.join(FILE))? {
            if let Some(domain) = domain
                && domain != state.domain
            {
                anyhow::bail!(
                    "this cluster was begun with the domain {}; run bootstrap without --domain to go on with it",
                    state.domain
                );
            }
            return Ok(state);
        }
        let domain = domain.ok_or_else(|| {
            anyhow::anyhow!("which domain shall the cluster have? Give --domain example.com (and let *.example.com lead here)")
        })?;
        check_domain(domain)?;
        let state = Self::new(domain)?;
        state.save(dir)?;
        Ok(state)
    }

    fn new(domain: &str) -> Result<Self, TlsError> {
        let ca = Ca::create("flynn cluster")?;
        let (cert, key) = public_certificate(domain)?;
        let secret = || Uuid::new_v4().simple().to_string();
        let secrets = [
            ("CONTROLLER_KEY", secret()),
            ("POSTGRES_PASSWORD", secret()),
            ("BLOBSTORE_KEY", secret()),
            ("TLS_CERT", cert),
            ("TLS_KEY", key),
        ];
        Ok(Self {
            version: 1,
            domain: domain.to_owned(),
            secrets: secrets.map(|(name, value)| (name.to_owned(), value)).into(),
            apps: BTreeMap::new(),
            ca_cert: ca.cert_pem().to_owned(),
            ca_key: ca.key_pem().to_owned(),
            done: false,
        })
    }

    /// Writes it down, for root alone.
    pub(super) fn save(&self, dir: &Path) -> std::io::Result<()> {
        files::private_dir(dir)?;
        files::write_json(&dir.join(FILE), self)
    }

    /// The variables of the manifest.
    pub(super) fn variables(&self) -> BTreeMap<&str, String> {
        let secrets = self
            .secrets
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone()));
        secrets.chain([("DOMAIN", self.domain.clone())]).collect()
    }

    /// A secret by its variable's name.
    pub(super) fn secret(&self, name: &str) -> &str {
        self.secrets.get(name).map_or("", String::as_str)
    }

    /// The ids of an app, made up at the first call.
    pub(super) fn ids(&mut self, app: &str) -> &AppIds {
        self.apps.entry(app.to_owned()).or_insert_with(|| AppIds {
            app: Uuid::new_v4().to_string(),
            release: Uuid::new_v4().to_string(),
        })
    }

    /// By what the CLI knows the cluster: base64 of the SHA-256 of its certificate's DER.
    pub(super) fn tls_pin(&self) -> anyhow::Result<String> {
        let der = CertificateDer::from_pem_slice(self.secret("TLS_CERT").as_bytes())
            .map_err(|why| anyhow::anyhow!("the cluster's certificate in {FILE} cannot be read: {why}"))?;
        let digest = <sha2::Sha256 as sha2::Digest>::digest(&der);
        Ok(base64::engine::general_purpose::STANDARD.encode(digest))
    }

    /// By what a joining host knows the CA.
    pub(super) fn ca_fingerprint(&self) -> Result<Digest, TlsError> {
        flynn_api::tls::fingerprint(&self.ca_cert)
    }
}

/// The certificate of the cluster's own names, which the CLI pins: long-lived and its own CA.
fn public_certificate(domain: &str) -> Result<(String, String), TlsError> {
    let ca = Ca::create(&format!("{domain} (Flynn)"))?;
    let names = [domain.to_owned(), format!("*.{domain}")];
    let identity = ca.issue_for(
        &PeerIdentity::Job("router".into()),
        &names,
        jiff::Timestamp::now(),
        3650,
    )?;
    Ok((identity.cert_pem, identity.key_pem))
}

fn check_domain(domain: &str) -> anyhow::Result<()> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if domain.len() <= 200 && domain.split('.').all(label) {
        return Ok(());
    }
    anyhow::bail!("{domain:?} is not a domain: lower-case letters, digits and dashes between dots are wanted")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_up_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(State::open(dir.path(), None).is_err());
        assert!(State::open(dir.path(), Some("Example.com")).is_err());
        let mut state = State::open(dir.path(), Some("example.com")).unwrap();
        let ids = state.ids("router").clone();
        state.save(dir.path()).unwrap();
        let mut again = State::open(dir.path(), None).unwrap();
        assert_eq!(again.ids("router"), &ids);
        assert_eq!(again.variables(), state.variables());
        assert_eq!(again.tls_pin().unwrap().len(), 44);
        let error = State::open(dir.path(), Some("example.org"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("example.com"), "{error}");
    }
}
