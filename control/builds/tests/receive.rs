//! Image receiving as its clients see it, with `mksquashfs` itself, and with the kernel's overlayfs over what comes out.

#![expect(
    clippy::unwrap_used,
    reason = "what fails in a helper of a test fails the test"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use flynn_api::client::blobs::BlobClient;
use flynn_api::client::controller::ControllerClient;
use flynn_api::client::receive::ReceiveClient;
use flynn_api::client::{Http, full};
use flynn_api::image::{Artifact, Layer};
use flynn_api::receive::{DockerImage, NewImage};
use flynn_api::server::{Json, Keys, Listener, serve};
use flynn_api::{Digest, Error, ErrorCode};
use flynn_builds::Receiver;
use http::{Method, StatusCode};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sha2::Digest as _;
use tar::{EntryType, Header};

/// Set in the process that runs inside a mount namespace.
const INSIDE: &str = "FLYNN_TEST_INSIDE_NAMESPACE";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let tool = Command::new("mksquashfs")
        .arg("-version")
        .stdin(Stdio::null())
        .output()
        .is_ok();
    let no_tool = (!tool).then_some("there is no mksquashfs here (squashfs-tools 4.5)");
    let namespaces = Command::new("unshare").args(["--mount", "true"]).output();
    let namespaces = namespaces.is_ok_and(|output| output.status.success());
    let no_mounts = no_tool.or((!namespaces).then_some("mount namespaces cannot be made here (needs root)"));
    let trial = |name: &str, skip: Option<&'static str>, test: fn() -> Result<(), Failed>| {
        Trial::ignorable_test(name, move || match skip {
            Some(why) => Ok(Completion::ignored_with(why)),
            None => test().map(|()| Completion::Completed),
        })
    };
    let trials = vec![
        trial("layers_are_converted_once_and_become_artifacts", no_tool, || {
            run(layers_become_artifacts())
        }),
        trial("bad_layers_are_refused_and_leave_nothing", no_tool, || {
            run(bad_layers())
        }),
        trial("overlayfs_sees_what_docker_meant", no_mounts, || {
            in_namespace("overlayfs_sees_what_docker_meant", mount_layers)
        }),
        trial("a_full_disk_is_told_and_leaves_nothing", no_mounts, || {
            in_namespace("a_full_disk_is_told_and_leaves_nothing", full_disk)
        }),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run(test: impl Future<Output = ()>) -> Result<(), Failed> {
    tokio::runtime::Runtime::new()?.block_on(test);
    Ok(())
}

/// What a blobstore holds, in memory.
type Blobs = Arc<Mutex<BTreeMap<String, Bytes>>>;

async fn blob(State(blobs): State<Blobs>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if method == Method::PUT {
        let bytes = axum::body::to_bytes(request.into_body(), 1 << 30).await.unwrap();
        blobs.lock().unwrap().insert(path, bytes);
        return StatusCode::OK.into_response();
    }
    let found = blobs.lock().unwrap().get(&path).cloned();
    found.map_or_else(
        || Error::not_found("object", path).into_response(),
        Bytes::into_response,
    )
}

async fn artifact(Json(mut artifact): Json<Artifact>) -> Json<Artifact> {
    artifact.id = "artifact-1".into();
    Json(artifact)
}

struct Bench {
    blobs: Blobs,
    client: ReceiveClient,
    stranger: ReceiveClient,
    scratch: tempfile::TempDir,
}

async fn start(router: Router) -> String {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, router, std::future::pending()));
    url
}

impl Bench {
    async fn new() -> Self {
        Self::in_scratch(tempfile::tempdir().unwrap()).await
    }

    async fn in_scratch(scratch: tempfile::TempDir) -> Self {
        let blobs = Blobs::default();
        let store = start(Router::new().fallback(blob).with_state(Arc::clone(&blobs))).await;
        let controller = start(Router::new().route("/artifacts", post(artifact))).await;
        let receiver = Receiver::new(
            Keys::parse("AUTH_KEY", "key").unwrap(),
            BlobClient::new(Http::new(&store).unwrap()),
            ControllerClient::new(Http::new(&controller).unwrap()),
            scratch.path().to_owned(),
        );
        let url = start(receiver.router()).await;
        let client = ReceiveClient::new(Http::new(&url).unwrap().password("key"));
        let stranger = ReceiveClient::new(Http::new(&url).unwrap().password("other"));
        Self {
            blobs,
            client,
            stranger,
            scratch,
        }
    }

    fn stored(&self) -> Vec<String> {
        self.blobs.lock().unwrap().keys().cloned().collect()
    }

    fn content(&self, layer: &Layer) -> Bytes {
        self.blobs.lock().unwrap()[&format!("/layers/{}.squashfs", layer.id)].clone()
    }

    fn under_way(&self) -> usize {
        std::fs::read_dir(self.scratch.path()).unwrap().count()
    }
}

/// An entry of a tar: name, type, content or target.
type Given<'a> = (&'a str, EntryType, &'a str);
const F: EntryType = EntryType::Regular;
const D: EntryType = EntryType::Directory;

fn tar_of(entries: &[Given<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, kind, text) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_mtime(1_000_000);
        header.set_size(if kind.is_file() { text.len() as u64 } else { 0 });
        if kind.is_file() || kind.is_dir() {
            tar.append_data(&mut header, name, text.as_bytes()).unwrap();
        } else {
            tar.append_link(&mut header, name, text).unwrap();
        }
    }
    tar.into_inner().unwrap()
}

fn id_of(tar: &[u8]) -> String {
    let digest: Vec<String> = sha2::Sha256::digest(tar)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{}", digest.concat())
}

fn image(layers: &[&[u8]]) -> NewImage {
    let config: DockerImage = serde_json::from_value(serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/app"], "User": "web"},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|tar| id_of(tar)).collect::<Vec<_>>()},
    }))
    .unwrap();
    NewImage {
        config,
        ..NewImage::default()
    }
}

async fn layers_become_artifacts() {
    let bench = Bench::new().await;
    let tar = tar_of(&[
        ("etc/", D, ""),
        ("etc/passwd", F, "web:x:33:34:::\n"),
        ("bin/app", F, "#!/bin/sh\n"),
    ]);
    let top = tar_of(&[("x", F, "")]);
    let id = id_of(&tar);

    assert!(bench.client.layer(&id).await.unwrap().is_none());
    let missing = bench.client.create_artifact(&image(&[&tar])).await.unwrap_err();
    assert!(
        missing.code == ErrorCode::NotFound && missing.message.contains(&id),
        "{missing}"
    );
    let refused = bench.stranger.layer(&id).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unauthorized);
    let refused = bench
        .stranger
        .put_layer(&id, full(tar.clone()))
        .await
        .unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unauthorized);

    let compressed = zstd::encode_all(tar.as_slice(), 0).unwrap();
    let layer = bench.client.put_layer(&id, full(compressed)).await.unwrap();
    let content = bench.content(&layer);
    assert_eq!(
        (Digest::of(&content), content.len() as u64),
        (layer.id, layer.length)
    );
    assert_eq!(bench.client.layer(&id).await.unwrap(), Some(layer.clone()));
    assert_eq!(
        bench.client.put_layer(&id, full(tar.clone())).await.unwrap(),
        layer,
        "sent again, it stays"
    );
    bench
        .client
        .put_layer(&id_of(&top), full(top.clone()))
        .await
        .unwrap();

    let artifact = bench.client.create_artifact(&image(&[&tar, &top])).await.unwrap();
    let manifest = artifact.manifest.as_ref().unwrap();
    let entrypoint = manifest.default_entrypoint().unwrap();
    assert_eq!(
        (artifact.id.as_str(), entrypoint.uid, entrypoint.gid),
        ("artifact-1", Some(33), Some(34))
    );
    assert_eq!(manifest.layers().len(), 2);
    assert!(
        bench
            .stored()
            .contains(&format!("/images/{}.json", manifest.id()))
    );
    assert_eq!(bench.under_way(), 0);

    // A layer that the blobstore has lost must be sent again, and becomes the same file.
    bench
        .blobs
        .lock()
        .unwrap()
        .remove(&format!("/layers/{}.squashfs", layer.id));
    assert!(bench.client.layer(&id).await.unwrap().is_none());
    let again = bench.client.put_layer(&id, full(tar)).await.unwrap();
    assert_eq!(again.id, layer.id, "equal tars make equal layers");
}

async fn bad_layers() {
    let bench = Bench::new().await;
    let tar = tar_of(&[("file", F, &"content".repeat(2000))]);
    let id = id_of(&tar);
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        encoder.finish().unwrap()
    };
    let dangling = tar_of(&[("link", EntryType::Link, "nowhere")]);
    let below_file = tar_of(&[("f", F, ""), ("f/x", F, "")]);
    let cut = tar[..tar.len() - 4096].to_vec();
    let junk = vec![7; 5000];
    for (id, body, word) in [
        (id.clone(), cut.clone(), "digest"),
        (id.clone(), gzip[..gzip.len() - 9].to_vec(), "uncompressed"),
        (id.clone(), b"other".to_vec(), "digest"),
        (id_of(&cut), cut.clone(), "cut short"),
        (id_of(&junk), junk.clone(), "checksum"),
        (id_of(&dangling), dangling.clone(), "hard link"),
        (id_of(&below_file), below_file.clone(), "not a directory"),
        ("sha256:../../x".into(), tar.clone(), "docker layer"),
    ] {
        let error = bench.client.put_layer(&id, full(body)).await.unwrap_err();
        assert!(
            error.code == ErrorCode::Validation && error.message.contains(word),
            "{word}: {error}"
        );
    }
    assert!(bench.stored().is_empty(), "{:?}", bench.stored());
    assert_eq!(bench.under_way(), 0);
}

/// Runs a test in a mount namespace of its own.
fn in_namespace<F: Future<Output = ()>>(name: &str, test: fn() -> F) -> Result<(), Failed> {
    if std::env::var_os(INSIDE).is_some() {
        return run(test());
    }
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe()?)
        .args([name, "--exact"])
        .env(INSIDE, "1")
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err("the test failed inside its namespace".into())
    }
}

async fn full_disk() {
    let scratch = tempfile::tempdir().unwrap();
    mount(
        &["-t", "tmpfs", "-o", "size=1m"],
        Path::new("tmpfs"),
        scratch.path(),
    );
    let path = scratch.path().to_owned();
    let bench = Bench::in_scratch(scratch).await;
    // The first does not fit while it is received, the second not while it is converted.
    let noise = |length: u32| -> Vec<u8> {
        let mut state = 1u32;
        let bytes = (0..length).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        });
        bytes.collect()
    };
    for length in [2 << 20, 600 << 10] {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(length.into());
        tar.append_data(&mut header, "file", noise(length).as_slice())
            .unwrap();
        let tar = tar.into_inner().unwrap();
        let error = bench.client.put_layer(&id_of(&tar), full(tar)).await.unwrap_err();
        assert!(
            error.code == ErrorCode::LimitExceeded && error.message.contains("full"),
            "{error:?}"
        );
        assert_eq!(bench.under_way(), 0);
    }
    assert!(bench.stored().is_empty());
    let small = tar_of(&[("file", F, "fits")]);
    bench.client.put_layer(&id_of(&small), full(small)).await.unwrap();
    assert!(Command::new("umount").arg(path).status().unwrap().success());
}

async fn mount_layers() {
    let bench = Bench::new().await;
    let low = tar_of(&[
        ("kept", F, "low"),
        ("gone", F, "low"),
        ("opaque/old", F, "low"),
        ("replaced/old", F, "low"),
        ("merged/old", F, "low"),
    ]);
    let long = format!("merged/{}", "long".repeat(50));
    let high = tar_of(&[
        (".wh.gone", F, ""),
        ("opaque/", D, ""),
        ("opaque/.wh..wh..opq", F, ""),
        ("opaque/new", F, "high"),
        (".wh.replaced", F, ""),
        ("replaced/new", F, "high"),
        (&long, F, "high"),
        ("hard", EntryType::Link, &long),
        ("soft", EntryType::Symlink, "kept"),
    ]);
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    for (name, tar) in [("low", &low), ("high", &high)] {
        let layer = bench
            .client
            .put_layer(&id_of(tar), full(tar.clone()))
            .await
            .unwrap();
        std::fs::write(at(&format!("{name}.squashfs")), bench.content(&layer)).unwrap();
        std::fs::create_dir(at(name)).unwrap();
        mount(
            &["-t", "squashfs", "-o", "loop,ro"],
            &at(&format!("{name}.squashfs")),
            &at(name),
        );
    }
    std::fs::create_dir(at("merged")).unwrap();
    let options = format!("lowerdir={}:{}", at("high").display(), at("low").display());
    mount(
        &["-t", "overlay", "-o", &options],
        Path::new("overlay"),
        &at("merged"),
    );
    let read = |path: &str| std::fs::read_to_string(at("merged").join(path)).ok();
    let seen = |path: &str| read(path).is_some();
    let results = [
        read("kept").as_deref() == Some("low"),
        !seen("gone"),
        !seen("opaque/old") && seen("opaque/new"),
        !seen("replaced/old") && seen("replaced/new"),
        seen("merged/old") && read(&long).as_deref() == Some("high"),
        read("hard").as_deref() == Some("high"),
        read("soft").as_deref() == Some("low"),
    ];
    for name in ["merged", "high", "low"] {
        assert!(Command::new("umount").arg(at(name)).status().unwrap().success());
    }
    assert_eq!(results, [true; 7]);
}

fn mount(options: &[&str], source: &Path, target: &Path) {
    let status = Command::new("mount")
        .args(options)
        .arg(source)
        .arg(target)
        .status()
        .unwrap();
    assert!(status.success(), "{} cannot be mounted", source.display());
}
