//! The cluster's certificates: one CA, and an identity for each host and each system job.
//!
//! Inside the cluster both ends show a certificate of the CA. A server is verified by the name or address that was
//! dialled (subject alternative names), a client by its common name: `host:<id>` or `job:<app>` ([`PeerIdentity`]).

mod certificate;
mod live;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig};

use crate::Digest;
pub use certificate::{Certificate, Late, late, roots};
pub use live::{Live, Use};

/// How long an identity lives.
pub const IDENTITY_DAYS: i64 = 90;
/// When it is renewed.
pub const RENEW_AFTER_DAYS: i64 = 30;
/// How long a cluster CA lives.
const CA_DAYS: i64 = 3650;

/// Why a certificate could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Making or signing failed.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// The PEM is not what it should be.
    #[error("{what} is not valid PEM: {why}")]
    Pem {
        /// Which of the parts.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The parts do not fit together.
    #[error("cannot use the certificate: {0}")]
    Use(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Makes aws-lc-rs the process's one cryptographic provider. Called first in each `main`; later calls change nothing.
pub fn install_provider() {
    // An error says that a provider is installed already, which is what is wanted.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Who is at the other end of a mutual TLS connection, by its certificate's common name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerIdentity {
    /// A host's daemon.
    Host(String),
    /// A job of this system app.
    Job(String),
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(id) => write!(f, "host:{id}"),
            Self::Job(app) => write!(f, "job:{app}"),
        }
    }
}

impl PeerIdentity {
    /// Reads a common name.
    pub fn parse(common_name: &str) -> Option<Self> {
        let (kind, name) = common_name.split_once(':')?;
        match kind {
            _ if name.is_empty() => None,
            "host" => Some(Self::Host(name.to_owned())),
            "job" => Some(Self::Job(name.to_owned())),
            _ => None,
        }
    }

    /// The identity in a certificate that has been verified.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
        Self::parse(name)
    }

    /// Whether it is a host.
    pub fn is_host(&self) -> bool {
        matches!(self, Self::Host(_))
    }

    /// Whether it is a job of this app.
    pub fn is_job(&self, app: &str) -> bool {
        matches!(self, Self::Job(name) if name == app)
    }
}

fn validity(params: &mut CertificateParams, from: jiff::Timestamp, days: i64) {
    let from = from.as_second();
    // An hour back, so that hosts whose clocks differ a little agree that it is valid.
    let (from, to) = (from - 3600, from + days * 86_400);
    let date = |seconds: i64| {
        let day = jiff::Timestamp::from_second(seconds)
            .unwrap_or_default()
            .to_zoned(jiff::tz::TimeZone::UTC);
        rcgen::date_time_ymd(
            i32::from(day.year()),
            day.month().unsigned_abs(),
            day.day().unsigned_abs(),
        )
    };
    params.not_before = date(from);
    params.not_after = date(to + 86_400);
}

fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

/// The cluster's certificate authority.
pub struct Ca {
    cert_pem: String,
    key_pem: String,
}

impl Ca {
    /// Makes a new one.
    pub fn create(name: &str) -> Result<Self, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        Self::of_key(name, &key, CA_DAYS)
    }

    fn of_key(name: &str, key: &KeyPair, days: i64) -> Result<Self, TlsError> {
        Ok(Self {
            cert_pem: root(name, days).self_signed(key)?.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Makes the root that comes after this one, and gives it with the link: its certificate by this one, PEM.
    ///
    /// Its name differs from those of the others, so that verifiers find the one that signed without trying them all.
    pub fn successor(&self) -> Result<(Self, String), TlsError> {
        let key = KeyPair::generate()?;
        let name = format!(
            "flynn cluster {:.16}",
            Digest::of(key.public_key_raw()).to_string()
        );
        let link = root(&name, CA_DAYS).signed_by(&key, &self.issuer()?)?;
        Ok((Self::of_key(&name, &key, CA_DAYS)?, link.pem()))
    }

    /// Takes one that is there; fails when certificate and key are not PEM.
    pub fn from_pem(cert_pem: impl Into<String>, key_pem: impl Into<String>) -> Result<Self, TlsError> {
        let ca = Self {
            cert_pem: cert_pem.into(),
            key_pem: key_pem.into(),
        };
        ca.issuer()?;
        Ok(ca)
    }

    /// The certificate.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The key. Secret.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The digest of the certificate's DER, by which a joining host knows the CA.
    pub fn fingerprint(&self) -> Result<Digest, TlsError> {
        fingerprint(&self.cert_pem)
    }

    fn issuer(&self) -> Result<Issuer<'_, KeyPair>, TlsError> {
        Ok(Issuer::from_ca_cert_pem(
            &self.cert_pem,
            KeyPair::from_pem(&self.key_pem)?,
        )?)
    }

    /// Makes a key and signs a certificate for it. `sans` are DNS names and addresses.
    pub fn issue(&self, identity: &PeerIdentity, sans: &[String]) -> Result<Identity, TlsError> {
        self.issue_for(identity, sans, jiff::Timestamp::now(), IDENTITY_DAYS)
    }

    /// [`Ca::issue`] for so many days from then on.
    pub fn issue_for(
        &self,
        identity: &PeerIdentity,
        sans: &[String],
        from: jiff::Timestamp,
        days: i64,
    ) -> Result<Identity, TlsError> {
        let key = KeyPair::generate()?;
        let cert = leaf(identity, sans, from, days)?.signed_by(&key, &self.issuer()?)?;
        Ok(Identity {
            ca_pem: self.cert_pem.clone(),
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Signs a request: its key is taken, its wishes are not. Returns the certificate's PEM.
    pub fn sign(&self, csr_pem: &str, identity: &PeerIdentity, sans: &[String]) -> Result<String, TlsError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
        let leaf = leaf(identity, sans, jiff::Timestamp::now(), IDENTITY_DAYS)?;
        let cert = leaf.signed_by(&request.public_key, &self.issuer()?)?;
        Ok(cert.pem())
    }
}

fn root(name: &str, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    // Nothing about the path's length: a root certifies the one that comes after it.
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params, jiff::Timestamp::now(), days);
    params
}

fn leaf(
    identity: &PeerIdentity,
    sans: &[String],
    from: jiff::Timestamp,
    days: i64,
) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::new(sans)?;
    params.distinguished_name = common_name(&identity.to_string());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params, from, days);
    Ok(params)
}

/// The digest of the DER of the first certificate in `cert_pem`.
pub fn fingerprint(cert_pem: &str) -> Result<Digest, TlsError> {
    let der =
        CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|why| pem("the CA certificate", &why))?;
    Ok(Digest::of(&der))
}

fn pem(what: &'static str, why: &impl fmt::Display) -> TlsError {
    TlsError::Pem {
        what,
        why: why.to_string(),
    }
}

/// A key with a request to sign it.
pub struct KeyRequest {
    /// The key. Secret.
    pub key_pem: String,
    /// The request.
    pub csr_pem: String,
}

impl KeyRequest {
    /// Makes a key and a request for it.
    pub fn generate() -> Result<Self, TlsError> {
        Self::with(&KeyPair::generate()?)
    }

    /// A request for a key that is there.
    pub fn of(key_pem: &str) -> Result<Self, TlsError> {
        Self::with(&KeyPair::from_pem(key_pem)?)
    }

    fn with(key: &KeyPair) -> Result<Self, TlsError> {
        let csr = CertificateParams::default().serialize_request(key)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            csr_pem: csr.pem()?,
        })
    }
}

/// Whether a server insists on a client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Connections without one are refused.
    Required,
    /// Handlers decide.
    Optional,
}

/// A certificate with its key, and the CA that signed it.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// The CA's certificate(s): during a rotation there are two.
    pub ca_pem: String,
    /// The certificate.
    pub cert_pem: String,
    /// Its key. Secret.
    pub key_pem: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("cert_pem", &self.cert_pem)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads `ca.pem`, `cert.pem` and `key.pem` from `dir`.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).map_err(|source| TlsError::File {
                path: path.display().to_string(),
                source,
            })
        };
        Ok(Self {
            ca_pem: read("ca.pem")?,
            cert_pem: read("cert.pem")?,
            key_pem: read("key.pem")?,
        })
    }

    /// Writes them into `dir`, each atomically; the key can be read by its owner alone.
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        let write = |name: &str, content: &str, mode: u32| {
            let path = dir.join(name);
            let file = |source| TlsError::File {
                path: path.display().to_string(),
                source,
            };
            std::fs::create_dir_all(dir).map_err(file)?;
            write_atomically(&path, content, mode).map_err(file)
        };
        write("ca.pem", &self.ca_pem, 0o644)?;
        write("key.pem", &self.key_pem, 0o600)?;
        write("cert.pem", &self.cert_pem, 0o644)
    }

    /// Whether it is time at `now` to have it renewed. One that cannot be read is due.
    pub fn is_due(&self, now: jiff::Timestamp) -> bool {
        let valid_from = || {
            let certificate = CertificateDer::from_pem_slice(self.cert_pem.as_bytes()).ok()?;
            let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).ok()?;
            Some(parsed.validity().not_before.timestamp())
        };
        valid_from().is_none_or(|from| now.as_second() - from >= RENEW_AFTER_DAYS * 86_400)
    }

    /// Who this is.
    pub fn name(&self) -> Option<PeerIdentity> {
        PeerIdentity::of_certificate(&CertificateDer::from_pem_slice(self.cert_pem.as_bytes()).ok()?)
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        root_store(&self.ca_pem)
    }

    fn chain(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let chain = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|why| pem("the certificate", &why))?;
        let key =
            PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|why| pem("the key", &why))?;
        Ok((chain, key))
    }

    /// A server's configuration that verifies clients against the CA.
    pub fn server_config(&self, auth: ClientAuth) -> Result<Arc<ServerConfig>, TlsError> {
        let verifier = WebPkiClientVerifier::builder(Arc::new(self.roots()?));
        let verifier = match auth {
            ClientAuth::Required => verifier,
            ClientAuth::Optional => verifier.allow_unauthenticated(),
        };
        let verifier = verifier.build().map_err(|why| TlsError::Use(why.to_string()))?;
        let (mut chain, key) = self.chain()?;
        // The CA is sent along, so that a host that joins can know it by its fingerprint.
        for ca in CertificateDer::pem_slice_iter(self.ca_pem.as_bytes()) {
            chain.push(ca.map_err(|why| pem("the CA certificate", &why))?);
        }
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|why| TlsError::Use(why.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// A client's configuration that shows no certificate, for one that has run out, and trusts the CA alone.
    pub fn late_client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let config = ClientConfig::builder().with_root_certificates(self.roots()?);
        Ok(Arc::new(config.with_no_client_auth()))
    }

    /// A client's configuration that shows this certificate and trusts the CA alone.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let (chain, key) = self.chain()?;
        let config = ClientConfig::builder()
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key)
            .map_err(|why| TlsError::Use(why.to_string()))?;
        Ok(Arc::new(config))
    }
}

fn root_store(text: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(text.as_bytes()) {
        let cert = cert.map_err(|why| pem("the CA certificate", &why))?;
        roots.add(cert).map_err(|why| TlsError::Use(why.to_string()))?;
    }
    Ok(roots)
}

/// A client's configuration for a host that joins: it shows no certificate, and trusts only servers that show the CA
/// with this fingerprint and a certificate that it has signed, or that a root has signed which it has certified.
pub fn joining_client_config(fingerprint: Digest) -> Arc<ClientConfig> {
    client_config(Trust::Ca(fingerprint))
}

/// A client's configuration that takes whoever answers: for health checks, which tell nothing.
pub fn probing_client_config() -> Arc<ClientConfig> {
    // Supervisors have no other use for TLS, and make no provider unless a job wants it.
    install_provider();
    client_config(Trust::Anyone)
}

fn client_config(trust: Trust) -> Arc<ClientConfig> {
    Arc::new(
        ClientConfig::builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(trust))
            .with_no_client_auth(),
    )
}

/// Who is trusted where it is not the cluster's known CA.
#[derive(Debug)]
enum Trust {
    /// A CA that the server itself has shown and that is known by its fingerprint; verified as usual with it.
    Ca(Digest),
    /// Whoever has the key of the certificate that is shown.
    Anyone,
}

impl Trust {
    fn provider() -> CryptoProvider {
        rustls::crypto::aws_lc_rs::default_provider()
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Self::Ca(fingerprint) = self else {
            return Ok(ServerCertVerified::assertion());
        };
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let ca = intermediates
            .iter()
            .find(|ca| Digest::of(ca) == *fingerprint)
            .ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(Self::provider()))
                .build()
                .map_err(|why| rustls::Error::General(why.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = Self::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = Self::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        Self::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn write_atomically(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    io::Write::write_all(&mut file, content.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}
