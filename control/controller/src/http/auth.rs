//! Who may call: HTTP basic authentication, any user name, one of the keys as the password.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use flynn_api::{Digest, Error, ErrorCode};
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use std::sync::Arc;

use crate::service::Shared;

/// Lets a request through if it carries a key.
pub(crate) async fn check(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if password(request.headers()).is_some_and(|password| is_key(&shared.keys, &password)) {
        return next.run(request).await;
    }
    let message = "a key of the cluster is needed, as the password of HTTP basic authentication. \
                   `flynn cluster add` stores it";
    let mut response = Error::new(ErrorCode::Unauthorized, message).into_response();
    response.headers_mut().insert(
        WWW_AUTHENTICATE,
        HeaderValue::from_static("Basic realm=\"flynn\""),
    );
    response
}

fn password(headers: &HeaderMap) -> Option<Vec<u8>> {
    let (scheme, credentials) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(credentials.trim())
        .ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(decoded[colon + 1..].to_vec())
}

/// Compares digests, all of them and to the end: the time taken says nothing about any key.
fn is_key(keys: &[String], password: &[u8]) -> bool {
    let given = Digest::of(password);
    let same = |key: &String| {
        let key = Digest::of(key.as_bytes());
        let difference = key
            .as_bytes()
            .iter()
            .zip(given.as_bytes())
            .fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(difference) == 0
    };
    keys.iter().fold(false, |found, key| same(key) | found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn any_user_with_one_of_the_keys() {
        let keys = ["old".to_owned(), "new".to_owned()];
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        for (text, lets_in) in [
            (":old", true),
            ("me:new", true),
            ("new:", false),
            ("me:ne", false),
            ("new", false),
        ] {
            let given = password(&headers(&format!("Basic {}", encode(text))));
            assert_eq!(
                given.is_some_and(|given| is_key(&keys, &given)),
                lets_in,
                "{text}"
            );
        }
        assert!(password(&headers("Bearer new")).is_none());
    }

    proptest! {
        #[test]
        fn nothing_else_gets_in(bytes in proptest::collection::vec(0x20u8..0x7f, 0..60)) {
            let value = String::from_utf8(bytes).unwrap();
            let let_in = password(&headers(&value)).is_some_and(|given| is_key(&["k3y".into()], &given));
            prop_assert!(!let_in);
        }
    }
}
