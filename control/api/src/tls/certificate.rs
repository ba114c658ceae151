//! What certificates say, and who is who by one that has run out.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{CertificateSigningRequestParams, PublicKeyData as _};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::extensions::{GeneralName, ParsedExtension};

use super::{Identity, PeerIdentity, TlsError, pem};
use crate::Digest;
use crate::discovery::{Held, Loaded, Root};

/// What there is to know of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The digest of its DER.
    pub fingerprint: Digest,
    /// Its common name.
    pub name: String,
    /// From when it is valid.
    pub not_before: Timestamp,
    /// Until when.
    pub not_after: Timestamp,
    /// Names its key.
    key: Option<Vec<u8>>,
    /// Names the key that signed it.
    signer: Option<Vec<u8>>,
}

impl Certificate {
    /// The first in a PEM text.
    pub fn first(text: &str) -> Result<Self, TlsError> {
        let der =
            CertificateDer::from_pem_slice(text.as_bytes()).map_err(|why| pem("the certificate", &why))?;
        Self::of_der(&der)
    }

    /// All in a PEM text.
    pub fn all(text: &str) -> Result<Vec<Self>, TlsError> {
        certificates(text)?.iter().map(Self::of_der).collect()
    }

    fn of_der(der: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let unreadable = |why: &dyn std::fmt::Display| TlsError::Use(format!("it cannot be read: {why}"));
        let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|why| unreadable(&why))?;
        let time = |time: x509_parser::time::ASN1Time| {
            Timestamp::from_second(time.timestamp()).map_err(|why| unreadable(&why))
        };
        let (mut key, mut signer) = (None, None);
        for extension in parsed.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => key = Some(id.0.to_vec()),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    signer = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                _ => {}
            }
        }
        let name = parsed
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok());
        Ok(Self {
            fingerprint: Digest::of(der),
            name: name.unwrap_or_default().to_owned(),
            not_before: time(parsed.validity().not_before)?,
            not_after: time(parsed.validity().not_after)?,
            key,
            signer,
        })
    }

    /// Whether `root` is the one that says it has signed this.
    pub fn is_of(&self, root: &Self) -> bool {
        self.signer.is_some() && self.signer == root.key
    }
}

impl Identity {
    /// What there is to know of its certificate.
    pub fn certificate(&self) -> Result<Certificate, TlsError> {
        Certificate::first(&self.cert_pem)
    }

    /// What it trusts, and who signed it; `None` when it does not trust whoever signed it, or cannot be read.
    pub fn held(&self) -> Option<Held> {
        let (own, roots) = (self.certificate().ok()?, Certificate::all(&self.ca_pem).ok()?);
        let signer = roots.iter().find(|root| own.is_of(root))?;
        Some(Held {
            trusts: roots.iter().map(|root| root.fingerprint).collect(),
            holds: [signer.fingerprint].into(),
        })
    }

    /// What there is to say of it when it is in use.
    pub fn loaded(&self) -> Option<Loaded> {
        let own = self.certificate().ok()?;
        Some(Loaded {
            certificate: own.fingerprint,
            not_after: own.not_after,
            held: self.held(),
        })
    }
}

/// The roots in a PEM text.
pub fn roots(text: &str) -> Result<Vec<Root>, TlsError> {
    const END: &str = "-----END CERTIFICATE-----";
    let one = |cert: &str| {
        let certificate = Certificate::first(cert)?;
        Ok(Root {
            fingerprint: certificate.fingerprint,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            cert: format!("{}\n", cert.trim_start()),
        })
    };
    let parts = text.split_inclusive(END).filter(|part| part.ends_with(END));
    parts.map(one).collect()
}

fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|why| pem("the certificate", &why))
}

/// Who asks by a certificate that may have run out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// Whose the certificate is.
    pub identity: PeerIdentity,
    /// When it ran out.
    pub ended: Timestamp,
    /// The addresses that it is for.
    pub addresses: Vec<IpAddr>,
}

/// Who asks by a certificate that may have run out: `trusted` (roots, PEM) verify it as of its last second, and the request
/// is signed by its key.
pub fn late(cert_pem: &str, csr_pem: &str, trusted: &str) -> Result<Late, TlsError> {
    let refuse = |why: &str| TlsError::Use(why.to_owned());
    let chain = certificates(cert_pem)?;
    let (own, links) = chain.split_first().ok_or_else(|| refuse("there is none"))?;
    let certificate = Certificate::of_der(own)?;
    let roots = super::root_store(trusted)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
        .build()
        .map_err(|why| TlsError::Use(why.to_string()))?;
    let last = u64::try_from(certificate.not_after.as_second() - 1).unwrap_or_default();
    let then = UnixTime::since_unix_epoch(Duration::from_secs(last));
    verifier
        .verify_client_cert(own, links, then)
        .map_err(|why| TlsError::Use(why.to_string()))?;
    // Reading a request checks that it is signed by its own key.
    let request = CertificateSigningRequestParams::from_pem(csr_pem)?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(own).map_err(|why| TlsError::Use(why.to_string()))?;
    if parsed.public_key().raw != request.public_key.subject_public_key_info() {
        return Err(refuse("the request is by another key than the certificate's"));
    }
    let names = parsed
        .subject_alternative_name()
        .map_err(|why| TlsError::Use(why.to_string()))?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let addresses = names.filter_map(|name| match name {
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(IpAddr::from),
        },
        _ => None,
    });
    Ok(Late {
        identity: PeerIdentity::of_certificate(own).ok_or_else(|| refuse("it names nobody"))?,
        ended: certificate.not_after,
        addresses: addresses.collect(),
    })
}
