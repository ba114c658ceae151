//! Layers that are damaged, cut off, collected and fetched again while jobs run.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::Router;
use flynn_api::Digest;
use flynn_api::host::{Job, JobState, Updated};
use flynn_api::image::LayerGc;
use flynn_api::server::{Listener, serve};
use http::{HeaderMap, StatusCode, Uri};
use rustix::mount::{MountFlags, mount};

use crate::host::{Host, kill, lives};

const BINARY: &str = env!("CARGO_BIN_EXE_flynn-host");

/// Status, headers, body.
type Answer = (StatusCode, Vec<(&'static str, String)>, Vec<u8>);

/// Serves what `answer` gives, on the host's own address. Gives the URL.
async fn server(answer: impl Fn(&str, u64) -> Answer + Clone + Send + Sync + 'static) -> String {
    let respond = async move |uri: Uri, headers: HeaderMap| {
        let from = headers.get("range").and_then(|range| {
            let range = range.to_str().ok()?;
            range.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok()
        });
        let (status, headers, body) = answer(uri.path(), from.unwrap_or(0));
        let mut response = http::Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(name, value);
        }
        response.body(axum::body::Body::from(body)).unwrap()
    };
    let listener = Listener::tcp(([192, 0, 2, 1], 0).into()).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(
        listener,
        Router::new().fallback(respond),
        std::future::pending(),
    ));
    url
}

fn whole(bytes: Vec<u8>) -> Answer {
    (StatusCode::OK, Vec::new(), bytes)
}

fn layer_path(host: &Host) -> PathBuf {
    host.state
        .join("layers")
        .join(format!("{}.squashfs", host.layer.id))
}

fn fetched_from(job: &mut Job, url: &str) {
    job.artifacts[0].layer_url_template = Some(format!("{url}/{{id}}"));
}

/// Changes the last byte of a file: what pads a squashfs to whole blocks.
fn damage(path: &Path) {
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    let mut last = [0];
    file.seek(SeekFrom::End(-1)).unwrap();
    file.read_exact(&mut last).unwrap();
    file.seek(SeekFrom::End(-1)).unwrap();
    file.write_all(&[!last[0]]).unwrap();
    file.sync_all().unwrap();
}

pub(crate) async fn damaged_layers_are_set_aside_and_fetched_again() {
    let host = Host::boot().await;
    let bytes = fs::read(&host.layer_file).unwrap();
    let url = server(move |_, _| whole(bytes.clone())).await;
    let mut running = host.job("while :; do sleep 0.05; echo tick; done");
    fetched_from(&mut running, &url);
    let before = host.run(&running).await;

    damage(&layer_path(&host));
    let verified = host.api.verify_layers().await.unwrap();
    assert_eq!(
        (verified.damaged, verified.fetched),
        (vec![host.layer.id], vec![host.layer.id])
    );
    assert_eq!(Digest::of(&fs::read(layer_path(&host)).unwrap()), host.layer.id);
    let notices = host.api.status().await.unwrap().notices;
    assert!(
        notices.iter().any(|notice| notice.contains("set aside")),
        "{notices:?}"
    );
    // Nobody noticed, and who comes now has the new one.
    let ticks = host.lines(&running.id).await.len();
    assert!(
        host.until(async || (host.lines(&running.id).await.len() > ticks).then_some(()))
            .await
            .is_some()
    );
    let after = host.api.job(&running.id).await.unwrap();
    assert_eq!((after.status, after.pid), (JobState::Running, before.pid));
    assert_eq!(host.script("echo new").await.1, ["new"]);
    assert!(host.api.verify_layers().await.unwrap().damaged.is_empty());

    // One that cannot be mounted is looked at, and one of the wrong length does not get that far.
    host.api.stop_job(&running.id).await.unwrap();
    host.end(&running.id).await;
    for damage in [zero_the_start as fn(&Path), |path| {
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(5000)
            .unwrap();
    }] {
        unmounted(&host).await;
        damage(&layer_path(&host));
        let mut job = host.job("echo again");
        fetched_from(&mut job, &url);
        assert_eq!(host.finish(&job).await.1, ["again"]);
        assert_eq!(Digest::of(&fs::read(layer_path(&host)).unwrap()), host.layer.id);
    }
    // Without a place to fetch it from it is said, and nothing else is harmed.
    unmounted(&host).await;
    zero_the_start(&layer_path(&host));
    let error = host.api.add_job(&host.job("true")).await.unwrap_err();
    assert!(error.message.contains("not on this host"), "{error}");
    host.put_layer(&host.layer_file).await.unwrap();
    assert_eq!(host.script("echo back").await.1, ["back"]);
}

/// Waits until the last job that used the layer is cleaned up.
async fn unmounted(host: &Host) {
    let mount = PathBuf::from("/run/flynn/layers").join(host.layer.id.to_string());
    assert!(
        host.until(async || (!mount.exists()).then_some(()))
            .await
            .is_some()
    );
}

fn zero_the_start(path: &Path) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .write_all(&[0; 512])
        .unwrap();
}

pub(crate) async fn fetches_go_on_after_the_daemon_s_end() {
    let host = Host::new(|_| {});
    host.start().await;
    let bytes = fs::read(&host.layer_file).unwrap();
    let half = bytes.len() / 2;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (noted, served) = (Arc::clone(&asked), bytes.clone());
    // First a half, and then no more of it.
    let stalled = Arc::new(Mutex::new(true));
    let stalls = Arc::clone(&stalled);
    let respond = async move |headers: HeaderMap| {
        let range = headers
            .get("range")
            .map(|range| range.to_str().unwrap().to_owned());
        let from: usize = range.map_or(0, |range| {
            range["bytes=".len()..].trim_end_matches('-').parse().unwrap()
        });
        noted.lock().unwrap().push(from);
        let response = http::Response::builder();
        let length = served.len();
        if *stalls.lock().unwrap() {
            use futures::StreamExt as _;
            let begun = futures::stream::iter([Ok::<_, std::io::Error>(bytes::Bytes::from(
                served[..half].to_vec(),
            ))]);
            let body = axum::body::Body::from_stream(begun.chain(futures::stream::pending()));
            return response.header("content-length", length).body(body).unwrap();
        }
        response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {from}-{}/{length}", length - 1))
            .body(axum::body::Body::from(served[from..].to_vec()))
            .unwrap()
    };
    let listener = Listener::tcp(([192, 0, 2, 1], 0).into()).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(
        listener,
        Router::new().fallback(respond),
        std::future::pending(),
    ));

    let mut job = host.job("echo here");
    job.resurrect = true;
    fetched_from(&mut job, &url);
    let part = host.state.join("layers").join(format!(".part-{}", host.layer.id));
    let came = async || (fs::metadata(&part).ok()?.len() == half as u64).then_some(());
    let (_, waited) = tokio::join!(
        tokio::time::timeout(Duration::from_secs(5), host.api.add_job(&job)),
        async {
            let came = host.until(came).await;
            host.kill_daemon();
            came
        }
    );
    assert!(waited.is_some());
    *stalled.lock().unwrap() = false;
    host.start().await;
    host.says(&job.id, "here").await;
    assert_eq!(*asked.lock().unwrap(), [0, half]);
    assert!(!part.exists());
    host.api.stop_job(&job.id).await.unwrap();
}

/// Puts a layer that nobody uses into the store, last used so long ago.
async fn unused(host: &Host, byte: u8, length: usize, age: Duration) -> Digest {
    let bytes = vec![byte; length];
    let id = Digest::of(&bytes);
    host.put_layer_as(id, bytes).await.unwrap();
    let path = host.state.join("layers").join(format!("{id}.squashfs"));
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
    id
}

fn metric(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .unwrap()
}

pub(crate) async fn layers_are_collected_before_the_disk_is_full() {
    let host = Host::new(|state| {
        mount("tmpfs", state, "tmpfs", MountFlags::empty(), Some(c"size=64m")).unwrap();
    });
    host.start().await;
    host.put_layer(&host.layer_file).await.unwrap();
    let job = host.job("sleep 1000");
    let running = host.run(&job).await;
    let hour = Duration::from_hours(1);
    // Named by an image, so it stays, however old.
    let pinned = unused(&host, 1, 8 << 20, hour * 9).await;
    let manifest = flynn_api::image::ImageManifest::new(
        flynn_api::image::Entrypoint::default(),
        vec![flynn_api::image::Layer::squashfs(pinned, 8 << 20)],
    );
    fs::write(host.state.join("images/pinned.json"), manifest.canonical_json()).unwrap();
    // The job's layer is older than all others by its date, and stays since the job uses it.
    File::options()
        .write(true)
        .open(layer_path(&host))
        .unwrap()
        .set_modified(SystemTime::now() - hour * 99)
        .unwrap();
    let mut old = VecDeque::new();
    for age in (1..6).rev() {
        old.push_back(unused(&host, 10 + age, 7 << 20, hour * age.into()).await);
    }
    let has = |id: Digest| host.state.join("layers").join(format!("{id}.squashfs")).exists();
    // What is put in next finds room, and the longest unused went for it.
    for byte in 100..103_u8 {
        unused(&host, byte, 8 << 20, Duration::ZERO).await;
    }
    assert!(!has(old[0]) && has(pinned) && has(host.layer.id));
    let kept: Vec<bool> = old.iter().map(|id| has(*id)).collect();
    assert!(kept.is_sorted(), "the longest unused goes first: {kept:?}");
    assert_eq!(host.api.job(&job.id).await.unwrap().pid, running.pid);
    assert!(lives(running.pid.unwrap()));

    // And what an operator asks for, first only to be told.
    let gc = |dry_run| LayerGc {
        dry_run,
        ..LayerGc::default()
    };
    let would = host.api.collect_layers(&gc(true)).await.unwrap();
    assert!(would.layers.iter().all(|id| has(*id)) && !would.layers.is_empty());
    let done = host.api.collect_layers(&gc(false)).await.unwrap();
    assert_eq!(would, done);
    let left = host.api.layers().await.unwrap();
    let mut ids: Vec<Digest> = left.iter().map(|layer| layer.id).collect();
    ids.sort();
    let mut wanted = vec![pinned, host.layer.id];
    wanted.sort();
    assert_eq!(ids, wanted);
    let shown = left.iter().find(|layer| layer.id == host.layer.id).unwrap();
    assert_eq!(shown.jobs, std::slice::from_ref(&job.id));
    assert_eq!(
        left.iter().find(|layer| layer.id == pinned).unwrap().images,
        ["pinned"]
    );
    let text = host.metrics().await;
    let bytes: u64 = left.iter().map(|layer| layer.length).sum();
    assert_eq!(metric(&text, "flynn_host_layers_bytes"), bytes);
    assert!(metric(&text, "flynn_host_layers_collected_total") > done.layers.len() as u64);
    // Jobs that were there before the daemon keep theirs as well.
    host.kill_daemon();
    host.start().await;
    assert!(
        host.api
            .collect_layers(&gc(false))
            .await
            .unwrap()
            .layers
            .is_empty()
    );
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    // Once nobody uses it, it goes.
    let gone = host.until(async || {
        host.api.collect_layers(&gc(false)).await.unwrap();
        (!has(host.layer.id)).then_some(())
    });
    assert!(gone.await.is_some());
}

pub(crate) async fn collecting_takes_nothing_from_starting_jobs() {
    let host = Host::new(|_| {});
    host.start().await;
    let bytes = fs::read(&host.layer_file).unwrap();
    let url = server(move |_, _| whole(bytes.clone())).await;
    let (done, collected) = (Cell::new(false), Cell::new(0));
    let starts = async {
        // On until there was something to collect, which is between one job's end and the next one's beginning.
        let mut rounds = 0;
        while rounds < 20 || collected.get() == 0 && rounds < 1000 {
            rounds += 1;
            // Two at once: one's end is the other's beginning.
            let (mut one, mut two) = (host.job("echo one"), host.job("echo two"));
            fetched_from(&mut one, &url);
            fetched_from(&mut two, &url);
            let (one, two) = tokio::join!(host.finish(&one), host.finish(&two));
            assert_eq!((one.1, two.1), (vec!["one".to_owned()], vec!["two".to_owned()]));
        }
        done.set(true);
    };
    let collects = async {
        while !done.get() {
            let gone = host.api.collect_layers(&LayerGc::default()).await.unwrap();
            collected.set(collected.get() + gone.layers.len());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::join!(starts, collects);
    assert!(collected.get() > 0, "nothing was collected, so nothing was tried");
}

fn flynn_host(args: &[&str], paths: &[(&str, &Path)]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(args);
    for (name, path) in paths {
        command.arg(name).arg(path);
    }
    command
}

fn done(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A repository with the release 1.2.3, of the test image and this program.
fn published(host: &Host, program: &Path) -> PathBuf {
    let [images, keys, repository] =
        ["images", "keys", "repository"].map(|name| host.state.with_file_name(name));
    fs::create_dir_all(images.join("layers")).unwrap();
    fs::copy(
        &host.layer_file,
        images.join("layers").join(format!("{}.squashfs", host.layer.id)),
    )
    .unwrap();
    let manifest = host.artifact().manifest.unwrap();
    fs::write(images.join("busybox.json"), manifest.canonical_json()).unwrap();
    let shown = repository.to_str().unwrap();
    let keeps = |args: &[&str], paths: &[(&str, &Path)]| {
        let keys = [("--keys", keys.as_path())];
        let args = [&["repository"], args, &[shown]].concat();
        done(&mut flynn_host(&args, &[&keys, paths].concat()));
    };
    keeps(&["init"], &[]);
    keeps(
        &["publish", "--release", "1.2.3"],
        &[("--images", &images), ("--program", program)],
    );
    keeps(&["refresh"], &[]);
    repository
}

pub(crate) async fn a_release_s_program_takes_over() {
    let host = Host::new(|_| {});
    let place = host.state.join("bin");
    fs::create_dir(&place).unwrap();
    let own = place.join("flynn-host");
    fs::copy(BINARY, &own).unwrap();
    host.start_program(&own).await;
    host.put_layer(&host.layer_file).await.unwrap();
    let standing = host.job("sleep 1000");
    let before = host.run(&standing).await;

    let released = host.state.with_file_name("flynn-host");
    fs::copy(BINARY, &released).unwrap();
    // Another end, by which it is known again.
    let end = fs::OpenOptions::new().append(true).open(&released).unwrap();
    std::io::Write::write_all(&mut &end, b"released").unwrap();
    drop(end);
    let repository = published(&host, &released);
    let update = |args: &[&str], paths: &[(&str, &Path)]| {
        let state = [("--state", host.state.as_path())];
        let args = [&["update", "--json"], args].concat();
        flynn_host(&args, &[&state, paths].concat()).output().unwrap()
    };
    // Without a root nothing is trusted, and what is not what its keeper has signed is not taken.
    let root = repository.join("metadata/1.root.json");
    let from: [(&str, &Path); 2] = [("--repository", &repository), ("--root", &root)];
    assert!(!update(&[], &from[..1]).status.success());
    let programs = repository.join("targets/stable/1.2.3");
    let signed = fs::read_dir(&programs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().ends_with(".flynn-host"))
        .unwrap();
    let good = fs::read(&signed).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&signed, bad).unwrap();
    let refused = update(&[], &from);
    assert!(!refused.status.success(), "{refused:?}");
    assert_eq!(host.api.status().await.unwrap().pid, host.daemon_pid());
    assert!(!fs::read(&own).unwrap().ends_with(b"released"));

    fs::write(&signed, good).unwrap();
    // One at a time; and what one left that was killed is no obstacle.
    let works = host.state.join("update");
    let other = fs::File::open(works.join("lock")).unwrap();
    other.lock().unwrap();
    let refused = update(&[], &[]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("another update is under way"),
        "{refused:?}"
    );
    drop(other);
    fs::write(works.join("flynn-host"), "a beginning").unwrap();
    let output = update(&[], &[]);
    assert!(output.status.success(), "{output:?}\n{}", host.log());
    let updated: Updated = serde_json::from_slice(&output.stdout).unwrap();
    host.follow(&updated);
    assert_eq!(host.api.status().await.unwrap().pid, updated.pid);
    assert!(fs::read(&own).unwrap().ends_with(b"released"));
    let left = fs::read_dir(&works).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
    assert_eq!(host.api.job(&standing.id).await.unwrap().pid, before.pid);
    // What is installed is taken as it is.
    let output = update(&["--installed"], &[]);
    assert!(output.status.success(), "{output:?}");
    host.follow(&serde_json::from_slice(&output.stdout).unwrap());
    host.finish(&host.job("true")).await;
}

/// The whole way: a keeper publishes, a host downloads over HTTP, is killed again and again, and runs a job of it.
pub(crate) async fn releases_survive_kills_of_the_downloader() {
    let host = Host::new(|_| {});
    host.start().await;
    let program = host.state.with_file_name("flynn-host");
    fs::write(&program, "a program").unwrap();
    let repository = published(&host, &program);

    // Each request brings a few bytes more of the layer before it is cut off by the client's end.
    let served = repository.clone();
    let url = server(move |path, from| {
        let Ok(bytes) = fs::read(served.join(path.trim_start_matches('/'))) else {
            return (StatusCode::NOT_FOUND, Vec::new(), Vec::new());
        };
        if from == 0 {
            return whole(bytes);
        }
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        let rest = bytes[usize::try_from(from).unwrap()..].to_vec();
        (StatusCode::PARTIAL_CONTENT, vec![("content-range", range)], rest)
    })
    .await;
    let root = repository.join("metadata/1.root.json");
    let download = || {
        let mut command = flynn_host(
            &["download", "--json", "--repository", &url],
            &[("--root", &root), ("--state", &host.state)],
        );
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    // Killed ever later: while metadata, the description, the layer come, and while it is put in its place.
    let mut killed = 0;
    for wait in (0..30).map(|step| Duration::from_millis(step * 8)) {
        let mut child = download().spawn().unwrap();
        tokio::time::sleep(wait).await;
        if child.try_wait().unwrap().is_none() {
            kill(child.id(), 9);
            killed += 1;
        }
        child.wait().unwrap();
        let stored = layer_path(&host);
        assert!(!stored.exists() || Digest::of(&fs::read(&stored).unwrap()) == host.layer.id);
        let named = host.state.join("images/busybox.json");
        assert!(
            !named.exists() || stored.exists(),
            "an image is there before its layers"
        );
    }
    assert!(killed > 3, "{killed}");
    // From this thread: only it is in the host's network.
    let mut child = download().spawn().unwrap();
    assert!(host.until(async || child.try_wait().unwrap()).await.is_some());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let last = String::from_utf8(output.stdout).unwrap();
    let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert_eq!(
        (last["event"].as_str(), last["name"].as_str()),
        (Some("image"), Some("busybox"))
    );
    // Nothing unfinished is left, and a job runs from it.
    let left: Vec<_> = fs::read_dir(host.state.join("layers"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(
        host.api
            .collect_layers(&LayerGc::default())
            .await
            .unwrap()
            .layers
            .is_empty()
    );
    assert_eq!(
        host.script("echo from a repository").await.1,
        ["from a repository"]
    );
}

pub(crate) async fn a_full_disk_in_the_middle_leaves_what_came() {
    let host = Host::new(|state| {
        mount("tmpfs", state, "tmpfs", MountFlags::empty(), Some(c"size=16m")).unwrap();
    });
    host.start().await;
    // Half of it comes, then the disk is filled by somebody else, then the rest.
    let bytes: Vec<u8> = (0..6_u32 << 20)
        .map(|index| u8::try_from(index % 253).unwrap())
        .collect();
    let layer = flynn_api::image::Layer::squashfs(Digest::of(&bytes), bytes.len() as u64);
    let filler = host.state.join("filler");
    let part = host.state.join("layers").join(format!(".part-{}", layer.id));
    let (served, filling, came) = (bytes.clone(), filler.clone(), part.clone());
    let fill = Arc::new(Mutex::new(true));
    let fills = Arc::clone(&fill);
    let respond = async move |headers: HeaderMap| {
        use futures::StreamExt as _;
        let range = headers
            .get("range")
            .map(|range| range.to_str().unwrap().to_owned());
        let from: usize = range.map_or(0, |range| {
            range["bytes=".len()..].trim_end_matches('-').parse().unwrap()
        });
        let (first, rest) = (served[from..from + 1000].to_vec(), served[from + 1000..].to_vec());
        let (fills, filling, came) = (Arc::clone(&fills), filling.clone(), came.clone());
        let rest = futures::stream::once(async move {
            if *fills.lock().unwrap() {
                while fs::metadata(&came).map_or(0, |part| part.len()) < 1000 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                // tmpfs: until there is no room at all.
                let mut file = File::create(&filling).unwrap();
                while file.write_all(&[1; 4096]).is_ok() {}
            }
            rest
        });
        let body = futures::stream::iter([first])
            .chain(rest)
            .map(|piece| Ok::<_, std::io::Error>(bytes::Bytes::from(piece)));
        let length = served.len();
        let response = http::Response::builder().header("content-length", length - from);
        let response = match from {
            0 => response,
            _ => response
                .status(StatusCode::PARTIAL_CONTENT)
                .header("content-range", format!("bytes {from}-{}/{length}", length - 1)),
        };
        response.body(axum::body::Body::from_stream(body)).unwrap()
    };
    let listener = Listener::tcp(([192, 0, 2, 1], 0).into()).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(
        listener,
        Router::new().fallback(respond),
        std::future::pending(),
    ));
    let mut job = host.job("true");
    job.artifacts[0].manifest.as_mut().unwrap().rootfs[0].layers = vec![layer.clone()];
    fetched_from(&mut job, &url);
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(error.message.contains("disk is full"), "{error}");
    let kept = fs::metadata(&part).unwrap().len();
    assert!((1000..6 << 20).contains(&kept), "{kept}");
    fs::remove_file(&filler).unwrap();
    *fill.lock().unwrap() = false;
    let mut again = host.job("true");
    again.artifacts.clone_from(&job.artifacts);
    // It is no squashfs, but it is there.
    let error = host.api.add_job(&again).await.unwrap_err();
    assert!(error.message.contains("cannot mount layer"), "{error}");
    let stored = host.state.join("layers").join(format!("{}.squashfs", layer.id));
    assert_eq!(Digest::of(&fs::read(stored).unwrap()), layer.id);
}
