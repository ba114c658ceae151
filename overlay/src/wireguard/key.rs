//! Keys, written as everywhere with WireGuard: 32 bytes in base64.

use std::{fmt, fs::File, io::Read, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::error::{Error, Result};

const LENGTH: usize = 32;

/// By which others know a host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub(super) [u8; LENGTH]);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Key {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).map(Self)
    }
}

/// By which a host is the one that others know. It is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(pub(super) [u8; LENGTH]);

impl PrivateKey {
    /// A new one.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0; LENGTH];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        // What Curve25519 asks of a private key; the kernel would see to it as well.
        bytes[0] &= 0b1111_1000;
        bytes[LENGTH - 1] = bytes[LENGTH - 1] & 0b0111_1111 | 0b0100_0000;
        Ok(Self(bytes))
    }

    /// As it is kept in a file.
    pub fn to_text(&self) -> String {
        STANDARD.encode(self.0)
    }
}

impl FromStr for PrivateKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).map(Self)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey")
    }
}

/// Says nothing of what the text was: it may have been a secret.
fn parse(text: &str) -> Result<[u8; LENGTH]> {
    let bytes = STANDARD.decode(text.trim()).ok();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::Config("a WireGuard key is 32 bytes in base64".into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_survive_their_text(bytes: [u8; LENGTH]) {
            prop_assert_eq!(Key(bytes).to_string().parse::<Key>().unwrap(), Key(bytes));
        }

        #[test]
        fn what_is_no_key_is_refused(text in "[A-Za-z0-9+/=]{0,60}") {
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn private_keys_are_new_and_not_shown() {
        let [one, other] = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
        assert_ne!(one, other);
        assert_eq!(one.to_text().parse::<PrivateKey>().unwrap(), one);
        assert!(!format!("{one:?}").contains(&one.to_text()));
        assert_eq!((one.0[0] & 7, one.0[31] >> 6), (0, 1));
    }
}
