//! Trust in a server by the digest of its certificate: with a pin, only the pin matters; without, the system's roots do.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flynn_api::Error;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};

/// Accepts the one certificate whose DER has this SHA-256 digest.
#[derive(Debug)]
struct Pinned {
    digest: [u8; 32],
    provider: Arc<CryptoProvider>,
}

/// Reads a pin: base64 of 32 bytes.
pub(crate) fn parse(pin: &str) -> Result<[u8; 32], Error> {
    STANDARD
        .decode(pin)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| {
            Error::validation(format!(
                "{pin:?} is not a TLS pin: base64 of a certificate's SHA-256 digest is wanted (44 characters)"
            ))
        })
}

/// The pin of a certificate.
pub(crate) fn of(certificate: &[u8]) -> String {
    STANDARD.encode(Sha256::digest(certificate))
}

/// A client's configuration: pinned, or with the system's roots when there is no pin.
pub(crate) fn client_config(pin: Option<[u8; 32]>) -> Result<Arc<ClientConfig>, Error> {
    let builder = ClientConfig::builder();
    let config = if let Some(digest) = pin {
        let verifier = Pinned {
            digest,
            provider: Arc::clone(builder.crypto_provider()),
        };
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth()
    } else {
        let mut roots = RootCertStore::empty();
        // Some systems carry certificates that cannot be read; the others will do.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(Error::validation(
                "this system trusts no certificate authority (install the package ca-certificates), and the cluster has \
                 no TLS pin; add it again with -p <pin>",
            ));
        }
        builder.with_root_certificates(roots).with_no_client_auth()
    };
    Ok(Arc::new(config))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Sha256::digest(end_entity).as_slice() == self.digest {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(format!(
            "the server's certificate does not fit the cluster's TLS pin (its own would be {}); either the certificate was \
             replaced, or this is another server. If you know which, add the cluster again with -f and the right pin",
            of(end_entity)
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_certificate_passes() {
        flynn_api::tls::install_provider();
        let certificate = CertificateDer::from(b"certificate".to_vec());
        let provider = Arc::clone(ClientConfig::builder().crypto_provider());
        let pinned = Pinned {
            digest: parse(&of(&certificate)).unwrap(),
            provider,
        };
        let name = ServerName::try_from("any.name").unwrap();
        let verify = |certificate: &CertificateDer<'_>| {
            pinned.verify_server_cert(certificate, &[], &name, &[], UnixTime::now())
        };
        assert!(verify(&certificate).is_ok());
        let other = verify(&CertificateDer::from(b"other".to_vec())).unwrap_err();
        assert!(other.to_string().contains("TLS pin"));
    }

    #[test]
    fn pins_are_checked() {
        for pin in ["", "abc", "AAAA", &"A".repeat(44)] {
            assert!(parse(pin).is_err(), "{pin}");
        }
    }
}
