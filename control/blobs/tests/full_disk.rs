//! A disk that is full: 507, nothing half-written, and what was stored before stays. The disk is a small tmpfs in a mount
//! namespace of the test's own.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use axum::body::Body;
use flynn_api::server::Keys;
use flynn_blobs::{Blobstore, Store};
use http::{Request, StatusCode};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tower::ServiceExt as _;

/// Set in the process that runs inside the namespace.
const INSIDE: &str = "FLYNN_TEST_INSIDE_NAMESPACE";
const KEY: &str = "Basic OmtleQ==";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let skip = why_not();
    let trial = Trial::ignorable_test("a_full_disk_is_told_and_leaves_nothing", move || match skip {
        Some(why) => Ok(Completion::ignored_with(why)),
        None if std::env::var_os(INSIDE).is_some() => inside(),
        None => outside(),
    });
    libtest_mimic::run(&arguments, vec![trial]).exit_code()
}

/// Why this machine cannot run the test.
fn why_not() -> Option<&'static str> {
    let works = Command::new("unshare")
        .args(["--mount", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    (!works).then_some("mount namespaces cannot be made here (needs root)")
}

fn outside() -> Result<Completion, Failed> {
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe()?)
        .env(INSIDE, "1")
        .status()?;
    if status.success() {
        Ok(Completion::Completed)
    } else {
        Err("the test failed inside its namespace".into())
    }
}

fn inside() -> Result<Completion, Failed> {
    let disk = tempfile::tempdir()?;
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(disk.path())
        .status()?;
    if !mounted.success() {
        return Err("tmpfs cannot be mounted".into());
    }
    let result = tokio::runtime::Runtime::new()?.block_on(fill(disk.path()));
    Command::new("umount").arg(disk.path()).status()?;
    result.map(|()| Completion::Completed)
}

async fn fill(disk: &Path) -> Result<(), Failed> {
    let router = Blobstore::new(
        Store::open(disk)?,
        Keys::parse("BLOBSTORE_KEY", "key").map_err(|_| "keys")?,
    )
    .router();
    let call = |method: &str, path: &str, body: Vec<u8>| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", KEY);
        router
            .clone()
            .oneshot(request.body(Body::from(body)).expect("a request"))
    };
    assert_eq!(
        call("PUT", "/small", vec![1; 1000]).await?.status(),
        StatusCode::OK
    );
    assert_eq!(
        call("PUT", "/large", vec![2; 4 << 20]).await?.status(),
        StatusCode::INSUFFICIENT_STORAGE
    );
    assert_eq!(
        call("GET", "/large", vec![]).await?.status(),
        StatusCode::NOT_FOUND
    );
    assert_eq!(std::fs::read_dir(disk.join("incoming"))?.count(), 0);
    assert_eq!(call("GET", "/small", vec![]).await?.status(), StatusCode::OK);
    assert_eq!(
        call("PUT", "/fits", vec![3; 100_000]).await?.status(),
        StatusCode::OK
    );
    Ok(())
}
