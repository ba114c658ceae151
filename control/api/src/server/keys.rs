//! The cluster's keys: HTTP basic authentication, any user name, the password one of them.

use base64::Engine as _;
use http::HeaderMap;
use http::header::AUTHORIZATION;

use crate::{Digest, Error, ErrorCode, Result};

/// Keys that let a caller in. Only their digests are held, so that comparing takes the same time wherever they differ
/// and nothing can print them.
#[derive(Clone, Debug)]
pub struct Keys(Vec<Digest>);

impl Keys {
    /// Reads the keys in the variable `name`, separated by commas; there must be one.
    pub fn parse(name: &str, keys: &str) -> Result<Self> {
        let keys: Vec<_> = keys
            .split(',')
            .map(str::trim)
            .filter(|key| !key.is_empty())
            .map(|key| Digest::of(key.as_bytes()))
            .collect();
        if keys.is_empty() {
            return Err(Error::invalid_field(
                name,
                "no key is set; set one or more, separated by commas",
            ));
        }
        Ok(Self(keys))
    }

    /// Lets a request with one of the keys pass.
    pub fn check(&self, headers: &HeaderMap) -> Result<()> {
        let refuse = |why: &str| Error::new(ErrorCode::Unauthorized, why);
        let password = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
            .and_then(|(_, value)| {
                base64::engine::general_purpose::STANDARD
                    .decode(value.trim())
                    .ok()
            })
            .and_then(|value| {
                let colon = value.iter().position(|byte| *byte == b':')?;
                Some(Digest::of(&value[colon + 1..]))
            })
            .ok_or_else(|| {
                refuse("a key of the cluster is needed: HTTP basic authentication, the key as the password")
            })?;
        // Every key is compared, whichever fits.
        let fits = self.0.iter().filter(|key| **key == password).count() > 0;
        if fits {
            Ok(())
        } else {
            Err(refuse(
                "the key is not one of the cluster's; check the key that was configured for it",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_keys_pass() {
        let keys = Keys::parse("AUTH_KEY", "one, two:2").unwrap();
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            headers
        };
        let basic = |text: &str| {
            with(&format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(text)
            ))
        };
        assert!(keys.check(&basic(":one")).is_ok() && keys.check(&basic("user:two:2")).is_ok());
        for headers in [
            HeaderMap::new(),
            basic("one"),
            basic(":"),
            basic(":three"),
            with("Bearer one"),
            with("Basic ***"),
        ] {
            assert_eq!(keys.check(&headers).unwrap_err().code, ErrorCode::Unauthorized);
        }
        assert!(Keys::parse("AUTH_KEY", " ,").is_err_and(|why| why.message.contains("AUTH_KEY")));
    }
}
