//! The blobstore over HTTP, as its clients see it.

#![expect(
    clippy::unwrap_used,
    reason = "what fails in a helper of a test fails the test"
)]

use axum::body::Body;
use flynn_api::server::Keys;
use flynn_api::{Digest, Error, ErrorCode};
use flynn_blobs::{Blobstore, Store};
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use tower::ServiceExt as _;

// `:key` in base64.
const KEY: &str = "Basic OmtleQ==";

struct Bench {
    root: tempfile::TempDir,
    router: axum::Router,
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let router = router(root.path());
        Self { root, router }
    }

    async fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.router
            .clone()
            .oneshot(request.body(body.into()).unwrap())
            .await
            .unwrap()
    }

    async fn put(&self, path: &str, body: impl Into<Body>) -> StatusCode {
        self.call("PUT", path, &[("authorization", KEY)], body)
            .await
            .status()
    }

    fn half_written(&self) -> usize {
        std::fs::read_dir(self.root.path().join("incoming"))
            .unwrap()
            .count()
    }
}

fn router(root: &std::path::Path) -> axum::Router {
    Blobstore::new(
        Store::open(root).unwrap(),
        Keys::parse("BLOBSTORE_KEY", "key").unwrap(),
    )
    .router()
}

async fn body(response: Response<Body>) -> Vec<u8> {
    response.into_body().collect().await.unwrap().to_bytes().to_vec()
}

async fn error(response: Response<Body>) -> Error {
    serde_json::from_slice(&body(response).await).unwrap()
}

#[tokio::test]
async fn objects_are_stored_read_listed_and_deleted() {
    let bench = Bench::new();
    assert_eq!(bench.put("/a/b", "hello world").await, StatusCode::OK);
    let response = bench.call("GET", "/a/b", &[], Body::empty()).await;
    let etag = response.headers()["etag"].to_str().unwrap().to_owned();
    assert_eq!(etag, format!("\"{}\"", Digest::of(b"hello world")));
    assert_eq!(body(response).await, b"hello world");

    let response = bench.call("HEAD", "/a/b", &[], Body::empty()).await;
    assert_eq!(response.headers()["content-length"], "11");
    assert!(body(response).await.is_empty());
    let response = bench
        .call("GET", "/a/b", &[("if-none-match", &etag)], Body::empty())
        .await;
    assert_eq!(response.status(), StatusCode::NOT_MODIFIED);

    let response = bench
        .call("GET", "/a/b", &[("range", "bytes=6-")], Body::empty())
        .await;
    assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(response.headers()["content-range"], "bytes 6-10/11");
    assert_eq!(body(response).await, b"world");
    let stale = [("range", "bytes=6-"), ("if-range", "\"other\"")];
    assert_eq!(
        body(bench.call("GET", "/a/b", &stale, Body::empty()).await).await,
        b"hello world"
    );
    let response = bench
        .call("GET", "/a/b", &[("range", "bytes=11-")], Body::empty())
        .await;
    assert_eq!(response.status(), StatusCode::RANGE_NOT_SATISFIABLE);

    let names = body(bench.call("GET", "/?dir=%2Fa", &[], Body::empty()).await).await;
    assert_eq!(names, br#"["/a/b"]"#);
    let delete = || bench.call("DELETE", "/a/b", &[("authorization", KEY)], Body::empty());
    assert_eq!(delete().await.status(), StatusCode::OK);
    assert_eq!(delete().await.status(), StatusCode::NOT_FOUND);
    assert_eq!(
        bench.call("GET", "/a/b", &[], Body::empty()).await.status(),
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn writes_need_a_key() {
    let bench = Bench::new();
    bench.put("/a", "x").await;
    for method in ["PUT", "DELETE"] {
        for headers in [&[][..], &[("authorization", "Basic Om90")]] {
            let response = bench.call(method, "/a", headers, "y").await;
            assert_eq!(error(response).await.code, ErrorCode::Unauthorized);
        }
    }
    assert_eq!(
        body(bench.call("GET", "/a", &[], Body::empty()).await).await,
        b"x"
    );
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let bench = Bench::new();
    let pieces = futures::stream::iter([Ok("half"), Err(std::io::Error::other("gone"))]);
    let headers = [("authorization", KEY)];
    let response = bench.call("PUT", "/a", &headers, Body::from_stream(pieces)).await;
    assert_eq!(error(response).await.code, ErrorCode::Validation);
    assert_eq!(
        bench.call("GET", "/a", &[], Body::empty()).await.status(),
        StatusCode::NOT_FOUND
    );

    // The same when the caller goes away and the call is dropped half way.
    let endless = futures::stream::iter([Ok::<_, std::io::Error>("half")]).chain(futures::stream::pending());
    let call = bench.call("PUT", "/a", &headers, Body::from_stream(endless));
    assert!(
        tokio::time::timeout(std::time::Duration::from_millis(50), call)
            .await
            .is_err()
    );
    for _ in 0..500 {
        if bench.half_written() == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(bench.half_written(), 0);
}

#[tokio::test]
async fn wrong_digests_and_paths_are_refused() {
    let bench = Bench::new();
    let path = format!("/layers/{}.squashfs", Digest::of(b"layer"));
    assert_eq!(bench.put(&path, "other").await, StatusCode::BAD_REQUEST);
    assert_eq!(
        bench.call("GET", &path, &[], Body::empty()).await.status(),
        StatusCode::NOT_FOUND
    );
    assert_eq!(bench.put(&path, "layer").await, StatusCode::OK);
    for path in ["/a//b", "/a/..", "/%2e%2e/x", "/a/%2F..%2F..%2Fx", "/x%00"] {
        assert_eq!(bench.put(path, "x").await, StatusCode::BAD_REQUEST, "{path}");
    }
    assert_eq!(bench.put("/layers", "x").await, StatusCode::CONFLICT);
    assert_eq!(bench.half_written(), 0);
}

#[tokio::test]
async fn what_is_stored_is_there_after_a_restart() {
    let bench = Bench::new();
    bench.put("/kept", "content").await;
    let again = Bench {
        router: router(bench.root.path()),
        root: bench.root,
    };
    assert_eq!(
        body(again.call("GET", "/kept", &[], Body::empty()).await).await,
        b"content"
    );
}
