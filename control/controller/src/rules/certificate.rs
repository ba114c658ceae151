//! Certificates of routes: read, and matched against their keys, before anything serves them.

use flynn_api::route::Certificate;
use flynn_api::{Error, Result};
use rustls::crypto::aws_lc_rs;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Certificates of a chain at most.
const MAX_CHAIN: usize = 10;

/// Checks that a certificate chain can be read and belongs to its key. Messages never quote the key.
pub(crate) fn check(certificate: &Certificate) -> Result<()> {
    let refuse = |name: &str, why: String| Err(Error::invalid_field(&format!("certificate.{name}"), why));
    if certificate.cert.len() + certificate.key.len() > 256 * 1024 {
        return refuse("cert", "is longer than 256 KiB".into());
    }
    let chain: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(certificate.cert.as_bytes()).collect();
    let chain = match chain {
        Err(why) => return refuse("cert", format!("is not PEM: {why}")),
        Ok(chain) if chain.is_empty() => return refuse("cert", "holds no CERTIFICATE block of PEM".into()),
        Ok(chain) if chain.len() > MAX_CHAIN => {
            return refuse("cert", "holds more than 10 certificates".into());
        }
        Ok(chain) => chain,
    };
    for (at, der) in chain.iter().enumerate() {
        if let Err(why) = x509_parser::parse_x509_certificate(der) {
            return refuse(
                "cert",
                format!("certificate {} of the chain cannot be read: {why}", at + 1),
            );
        }
    }
    if certificate.key.is_empty() {
        return refuse(
            "key",
            "is missing: a certificate cannot be served without its key".into(),
        );
    }
    let Ok(key) = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()) else {
        return refuse(
            "key",
            "is not a private key in PEM (PKCS #8, PKCS #1 or SEC 1), or is encrypted".into(),
        );
    };
    match CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => refuse(
            "key",
            "does not belong to the certificate: the leaf must come first in `cert`".into(),
        ),
        Err(_) => refuse(
            "key",
            "is of a kind that cannot be served: use RSA, ECDSA P-256/P-384 or Ed25519".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn made() -> Certificate {
        let made = rcgen::generate_simple_self_signed(vec!["a.example".into()]).unwrap();
        Certificate {
            id: String::new(),
            cert: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
        }
    }

    #[test]
    fn a_pair_passes_and_a_mixed_one_does_not() {
        let (one, two) = (made(), made());
        check(&one).unwrap();
        let mixed = Certificate {
            key: two.key,
            ..one.clone()
        };
        let error = check(&mixed).unwrap_err();
        assert!(error.message.contains("does not belong"), "{error}");
        assert!(!error.message.contains("PRIVATE"));
        for (cert, key) in [
            ("", one.key.as_str()),
            (one.cert.as_str(), ""),
            (one.cert.as_str(), "x"),
        ] {
            assert!(
                check(&Certificate {
                    id: String::new(),
                    cert: cert.into(),
                    key: key.into()
                })
                .is_err()
            );
        }
    }

    proptest! {
        #[test]
        fn damage_is_an_error_not_a_panic(at in 0usize..400, byte: u8) {
            let mut certificate = made();
            let mut bytes = certificate.cert.into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte & 0x7f;
            certificate.cert = String::from_utf8(bytes).unwrap();
            let _ = check(&certificate);
        }
    }
}
