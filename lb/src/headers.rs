//! What happens to a message's head on its way through. Pure.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, Request, StatusCode, Version};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_REQUEST_START: HeaderName = HeaderName::from_static("x-request-start");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What concerns one connection only.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    PROXY_CONNECTION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Where a request came from and when.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// The client.
    pub client: IpAddr,
    /// Over TLS.
    pub tls: bool,
    /// The port that it came in on.
    pub port: u16,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

/// A request that must not be passed on, with the reason as its sender shall read it.
pub type Refusal = (StatusCode, &'static str);

/// The host that a request is for, if the request is one that can be passed on without two readings.
pub fn check<B>(request: &Request<B>) -> Result<String, Refusal> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return Err((
            StatusCode::METHOD_NOT_ALLOWED,
            "this is not a forward proxy: CONNECT is not served",
        ));
    }
    // hyper has already dropped the length that loses (RFC 9112, §6.3); another server might not.
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        return Err((
            StatusCode::BAD_REQUEST,
            "Content-Length and Transfer-Encoding exclude one another",
        ));
    }
    let mut hosts = headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err((StatusCode::BAD_REQUEST, "there is more than one Host header"));
    }
    let header = header.map(HeaderValue::to_str).transpose();
    let header = header.map_err(|_| (StatusCode::BAD_REQUEST, "the Host header is not text"))?;
    // RFC 9112, §3.2.2: the target's authority, where there is one, overrides the header.
    match (request.uri().authority(), header) {
        (Some(authority), _) => Ok(authority.as_str().to_owned()),
        (None, Some(host)) => Ok(host.to_owned()),
        (None, None) if request.version() == Version::HTTP_10 => Ok(String::new()),
        (None, None) => Err((StatusCode::BAD_REQUEST, "there is no Host header")),
    }
}

/// The protocol that a request asks to change to.
pub fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| asked).cloned()
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// Removes what concerns one connection only (RFC 9110, §7.6.1).
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| HeaderName::try_from(token).ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Makes a backend's headers those of the answer to the client.
pub fn give_back(headers: &mut HeaderMap) {
    // The length that loses (RFC 9112, §6.3) is not the body's, and would be the only one that is left.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    strip_hop_by_hop(headers);
}

/// Makes a client's headers those of the request to the backend. `host` is what [`check`] found.
pub fn forward(headers: &mut HeaderMap, host: &str, origin: &Origin) {
    // `Trailer` names fields that we pass on only if both sides speak chunked; without it a backend ignores them.
    strip_hop_by_hop(headers);
    // Our server has said 100 or will; a backend's would not be waited for.
    headers.remove(EXPECT);
    join_cookies(headers);
    if let Ok(host) = HeaderValue::from_str(host) {
        headers.insert(HOST, host);
    }
    append(
        headers,
        X_FORWARDED_FOR,
        &origin.client.to_canonical().to_string(),
    );
    append(
        headers,
        X_FORWARDED_PROTO,
        if origin.tls { "https" } else { "http" },
    );
    append(headers, X_FORWARDED_PORT, &origin.port.to_string());
    headers.insert(X_REQUEST_START, HeaderValue::from(origin.at_ms));
    let kept = headers
        .get(X_REQUEST_ID)
        .is_some_and(|id| is_request_id(id.as_bytes()));
    if !kept {
        let id = uuid::Uuid::new_v4().to_string();
        if let Ok(id) = HeaderValue::try_from(id) {
            headers.insert(X_REQUEST_ID, id);
        }
    }
}

/// HTTP/2 clients may split their cookies over several fields, HTTP/1.1 knows only one (RFC 9113, §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let fields: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if fields.len() > 1
        && let Ok(all) = HeaderValue::from_bytes(&fields.join(&b"; "[..]))
    {
        headers.insert(COOKIE, all);
    }
}

fn is_request_id(id: &[u8]) -> bool {
    (20..=200).contains(&id.len())
        && id
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-_=./".contains(byte))
}

/// Adds to what proxies before us have said.
fn append(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    let mut all: Vec<u8> = Vec::new();
    for before in headers.get_all(&name) {
        all.extend_from_slice(before.as_bytes());
        all.extend_from_slice(b", ");
    }
    all.extend_from_slice(value.as_bytes());
    if let Ok(all) = HeaderValue::from_bytes(&all) {
        headers.insert(name, all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin() -> Origin {
        Origin {
            client: "::ffff:10.0.0.7".parse().unwrap(),
            tls: true,
            port: 443,
            at_ms: 1234,
        }
    }

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn what_concerns_one_hop_stays_there() {
        let mut map = headers(&[
            ("connection", "close, X-Secret"),
            ("connection", "keep-alive"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("cookie", "kept"),
        ]);
        forward(&mut map, "h:8080", &origin());
        let mut names: Vec<_> = map.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let wanted = [
            "cookie",
            "host",
            "x-forwarded-for",
            "x-forwarded-port",
            "x-forwarded-proto",
            "x-request-id",
            "x-request-start",
        ];
        assert_eq!(names, wanted);
        assert_eq!(map["host"], "h:8080");
    }

    #[test]
    fn forwarding_is_appended_and_ids_are_kept() {
        let id = "0123456789abcdef0123";
        let mut map = headers(&[
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "http"),
            ("x-request-id", id),
        ]);
        forward(&mut map, "h", &origin());
        assert_eq!(map["x-forwarded-for"], "1.1.1.1, 2.2.2.2, 10.0.0.7");
        assert_eq!(map["x-forwarded-proto"], "http, https");
        assert_eq!(map["x-request-id"], id);
        let mut map = headers(&[("x-request-id", "short")]);
        forward(&mut map, "h", &origin());
        assert_eq!(map["x-request-id"].len(), 36);
    }

    #[test]
    fn cookies_are_one_field() {
        let mut map = headers(&[
            ("cookie", "a=b"),
            ("x", "y"),
            ("cookie", "c=d; e=f"),
            ("cookie", "g=h"),
        ]);
        forward(&mut map, "h", &origin());
        let cookies: Vec<_> = map.get_all(COOKIE).iter().collect();
        assert_eq!(cookies, ["a=b; c=d; e=f; g=h"]);
    }

    #[test]
    fn requests_with_two_readings_are_refused() {
        let request = |uri: &str, list: &[(&'static str, &'static str)]| {
            let mut request = Request::builder().uri(uri).body(()).unwrap();
            *request.headers_mut() = headers(list);
            check(&request).map_err(|(status, _)| status.as_u16())
        };
        assert_eq!(request("/", &[("host", "a")]), Ok("a".into()));
        assert_eq!(request("http://b/x", &[("host", "a")]), Ok("b".into()));
        assert_eq!(request("/", &[]), Err(400));
        assert_eq!(request("/", &[("host", "a"), ("host", "b")]), Err(400));
        let both = [
            ("host", "a"),
            ("content-length", "1"),
            ("transfer-encoding", "chunked"),
        ];
        assert_eq!(request("/", &both), Err(400));
    }

    #[test]
    fn upgrades_must_be_asked_for_twice() {
        assert!(
            upgrade_of(&headers(&[
                ("connection", "keep-alive, Upgrade"),
                ("upgrade", "websocket")
            ]))
            .is_some()
        );
        assert!(upgrade_of(&headers(&[("upgrade", "websocket")])).is_none());
        assert!(upgrade_of(&headers(&[("connection", "upgrade")])).is_none());
    }

    proptest! {
        #[test]
        fn any_connection_header_is_survived(value in "[ -~]{0,60}") {
            let mut map = HeaderMap::new();
            map.insert(CONNECTION, HeaderValue::from_str(&value).unwrap());
            forward(&mut map, "h", &origin());
            prop_assert!(!map.contains_key(CONNECTION));
        }
    }
}
