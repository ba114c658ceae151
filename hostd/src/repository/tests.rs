//! Hosts and a repository's keeper, and whoever stands between them.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::Digest;
use flynn_api::image::{Entrypoint, ImageManifest, Layer};
use jiff::Timestamp;
use proptest::prelude::*;

use super::download::{Event, bring_in};
use super::maker::{Beginning, Days, Maker, Publication};
use super::trust::{Repository, Wanted};
use super::*;
use crate::download::Patience;
use crate::layers::Store;
use crate::paths::Paths;
use crate::testing::{Fault, Server};

const QUICK: Patience = Patience {
    idle: Duration::from_millis(500),
    pause: Duration::from_millis(5),
};

/// A keeper with a repository, a server of it, and a host.
struct Ground {
    dir: tempfile::TempDir,
    server: Server,
    layers: Vec<Vec<u8>>,
}

impl Ground {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let beginning = Beginning {
            channels: vec!["stable".into(), "nightly".into()],
            root_keys: 2,
            threshold: 2,
        };
        let (repository, keys) = (dir.path().join("repository"), dir.path().join("keys"));
        let root = Maker::init(&repository, &keys, &beginning, Days::default())
            .await
            .unwrap();
        fs::copy(root, dir.path().join("root.json")).unwrap();
        let server = Server::start(&repository).await;
        let layers = vec![
            vec![1; 200_000],
            (0..=255).cycle().take(50_000).collect(),
            b"small".to_vec(),
        ];
        let ground = Self { dir, server, layers };
        ground.make_images(&[("base", &[0]), ("system", &[0, 1, 2])]);
        ground
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn state(&self) -> PathBuf {
        let state = self.path("state");
        fs::create_dir_all(&state).unwrap();
        state
    }

    fn layer(&self, index: usize) -> Layer {
        let bytes = &self.layers[index];
        Layer::squashfs(Digest::of(bytes), bytes.len() as u64)
    }

    fn make_images(&self, images: &[(&str, &[usize])]) {
        let dir = self.path("images");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("layers")).unwrap();
        for bytes in &self.layers {
            fs::write(
                dir.join("layers").join(format!("{}.squashfs", Digest::of(bytes))),
                bytes,
            )
            .unwrap();
        }
        for (name, layers) in images {
            let layers = layers.iter().map(|index| self.layer(*index)).collect();
            let manifest = ImageManifest::new(Entrypoint::default(), layers);
            fs::write(dir.join(format!("{name}.json")), manifest.canonical_json()).unwrap();
        }
        fs::write(self.path("flynn-host"), "a program").unwrap();
    }

    fn maker(&self) -> Maker {
        Maker::open(&self.path("repository"), &[self.path("keys")]).unwrap()
    }

    async fn publish(&self, version: &str) {
        self.publish_with(version, Days::default()).await;
    }

    async fn publish_with(&self, version: &str, days: Days) {
        let mut maker = self.maker();
        maker.days = days;
        let publication = Publication {
            channel: "stable",
            version,
            images: &self.path("images"),
            programs: &[self.path("flynn-host")],
        };
        maker.publish(&publication).await.unwrap();
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            repository: Some(self.server.url.clone()),
            root: Some(self.path("root.json")),
            ..Wanted::default()
        }
    }

    async fn open(&self, wanted: &Wanted) -> anyhow::Result<Repository> {
        Repository::open_with(&self.state(), wanted, QUICK).await
    }

    async fn download(&self, version: Option<&str>) -> anyhow::Result<Release> {
        let repository = self.open(&self.wanted()).await?;
        bring_in(&repository, &self.state(), version, &[], |_| ()).await
    }

    /// Sees that a host refuses what is served now, for this reason, and has what it had.
    async fn refuses(&self, why: &str) {
        let before = snapshot(&self.state());
        let error = self
            .download(None)
            .await
            .map(|release| release.version)
            .unwrap_err();
        let shown = format!("{error:#}");
        assert!(shown.contains(why), "{shown}");
        assert_eq!(snapshot(&self.state()), before, "{shown}");
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        copy(&self.path("repository"), &to);
        to
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// What a host has that counts: images, whole layers, what it trusts and has seen.
fn snapshot(state: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for sub in ["images", "layers", "repository/metadata"] {
        for entry in fs::read_dir(state.join(sub)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let known = matches!(extension, Some("json" | "squashfs"));
            if known && !path.ends_with("latest_known_time.json") {
                files.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

fn images(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(state.join("images")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The newest file of a role in a repository.
fn newest(repository: &Path, role: &str) -> PathBuf {
    let version = |version: &u32| repository.join(format!("metadata/{version}.{role}.json"));
    (1..1000)
        .map(|number| version(&number))
        .take_while(|path| path.exists())
        .last()
        .unwrap()
}

#[tokio::test]
async fn a_release_comes_from_a_server_and_from_a_directory() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    let events = Cell::new(0);
    let repository = ground.open(&ground.wanted()).await.unwrap();
    let tell = |event: Event<'_>| {
        if let Event::Layer { have, length, .. } = event {
            assert!(have <= length);
            events.set(events.get() + 1);
        }
    };
    let release = bring_in(&repository, &ground.state(), None, &[], tell)
        .await
        .unwrap();
    assert_eq!(
        (release.version.as_str(), images(&ground.state())),
        ("0.1.0", vec!["base.json".into(), "system.json".into()])
    );
    assert!(events.get() >= 3);
    let store = Store::beside_daemon(&Paths::at(&ground.state()));
    for index in 0..3 {
        assert!(store.verify(ground.layer(index).id).unwrap());
    }
    drop(repository);

    // The next time the host knows where, and fetches what it has not got.
    ground.make_images(&[("base", &[0]), ("system", &[1, 2])]);
    ground.publish("0.2.0").await;
    let asked = ground.server.requests().len();
    let repository = ground.open(&Wanted::default()).await.unwrap();
    let release = bring_in(&repository, &ground.state(), None, &[], |_| ())
        .await
        .unwrap();
    assert_eq!(release.version, "0.2.0");
    let layers = ground.server.requests().split_off(asked);
    assert!(
        !layers.iter().any(|(path, _)| path.contains("layers/")),
        "{layers:?}"
    );
    // An earlier release is to be had by its version, and an image by its name.
    let first = bring_in(
        &repository,
        &ground.state(),
        Some("0.1.0"),
        &["base".into()],
        |_| (),
    )
    .await
    .unwrap();
    assert_eq!(first.version, "0.1.0");
    assert!(
        bring_in(&repository, &ground.state(), Some("0.3.0"), &[], |_| ())
            .await
            .is_err()
    );
    assert!(
        bring_in(&repository, &ground.state(), Some("../stable"), &[], |_| ())
            .await
            .is_err()
    );
    drop(repository);

    // A mirror that is a directory, by the same trust; what was seen at the server counts there as well.
    let mirror = Wanted {
        repository: Some(ground.path("repository").to_str().unwrap().into()),
        ..Wanted::default()
    };
    fs::remove_dir_all(ground.state().join("layers")).unwrap();
    let repository = ground.open(&mirror).await.unwrap();
    bring_in(&repository, &ground.state(), None, &[], |_| ())
        .await
        .unwrap();
    assert!(store.verify(ground.layer(0).id).unwrap());
    let program = ground.path("fetched");
    let release = repository.release(None).await.unwrap();
    let fetch = async |name| repository.fetch_program(&release, name, &program, |_| ()).await;
    fetch("flynn-host").await.unwrap();
    assert_eq!(
        (release.version.as_str(), fs::read(&program).unwrap().as_slice()),
        ("0.2.0", b"a program".as_slice())
    );
    assert!(fetch("flynn").await.is_err());
}

#[tokio::test]
async fn a_program_that_was_cut_off_is_gone_on_with() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    let program = ground.path("fetched");
    let begun = tokio::sync::Notify::new();
    let fetch = async || {
        let repository = ground.open(&ground.wanted()).await?;
        let release = repository.release(None).await?;
        let progress = |have: u64| {
            if have >= 4 {
                begun.notify_one();
            }
        };
        repository
            .fetch_program(&release, "flynn-host", &program, progress)
            .await
    };
    // As when it is killed in the midst.
    ground.server.fault("flynn-host", Fault::Stall(4), u32::MAX);
    tokio::select! {
        done = fetch() => panic!("{done:?}"),
        () = begun.notified() => {}
    }
    ground.server.fault("flynn-host", Fault::None, 1);
    fetch().await.unwrap();
    let (path, from) = ground.server.requests().pop().unwrap();
    assert!(path.ends_with("flynn-host") && from > 0, "{path} from {from} on");
    assert_eq!(fs::read(&program).unwrap(), b"a program");
}

#[tokio::test]
async fn expired_metadata_is_refused() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let good = Days::default();
    let cases = [
        (
            Days {
                timestamp: -1,
                ..good
            },
            "timestamp metadata has expired",
        ),
        (Days { snapshot: -1, ..good }, "snapshot metadata has expired"),
        (Days { channel: -1, ..good }, "targets metadata has expired"),
    ];
    for (index, (days, why)) in cases.into_iter().enumerate() {
        ground.publish_with(&format!("0.2.{index}"), days).await;
        let error = ground
            .download(None)
            .await
            .map(|release| release.version)
            .unwrap_err();
        assert!(format!("{error:#}").contains(why), "{error:#}");
        assert_eq!(images(&ground.state()), ["base.json", "system.json"]);
    }
    // Its keeper signs it anew.
    ground.publish("0.3.0").await;
    assert_eq!(ground.download(None).await.unwrap().version, "0.3.0");
    let mut maker = ground.maker();
    maker.days.timestamp = 1;
    let ends = maker.refresh().await.unwrap();
    assert!(ends > Timestamp::now() && ground.download(None).await.is_ok());
}

#[tokio::test]
async fn an_old_state_is_not_taken_for_a_new_one() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    let old = ground.copy("old");
    ground.publish("0.2.0").await;
    ground.download(None).await.unwrap();
    ground.server.serve(&old);
    ground
        .refuses("timestamp metadata has gone back from version 3 to 2")
        .await;

    // A snapshot of before under the name of the newest.
    let mixed = ground.copy("mixed");
    fs::copy(
        mixed.join("metadata/2.snapshot.json"),
        mixed.join("metadata/3.snapshot.json"),
    )
    .unwrap();
    ground.server.serve(&mixed);
    ground
        .refuses("its snapshot metadata has version 2 where 3 was announced")
        .await;

    // Who has stolen the online keys cannot take a release back: the keeper's copy with an older channel in it.
    let newest_channel = newest(&ground.path("repository"), "stable");
    let other = Ground {
        dir: tempfile::tempdir().unwrap(),
        server: Server::start(&old).await,
        layers: Vec::new(),
    };
    copy(&old, &other.path("repository"));
    copy(&ground.path("keys"), &other.path("keys"));
    for _ in 0..3 {
        let mut maker = other.maker();
        // Half of its time is over, whatever it is: the snapshot is signed as well.
        maker.days.snapshot = 10_000;
        maker.refresh().await.unwrap();
    }
    assert_ne!(
        newest(&other.path("repository"), "stable").file_name(),
        newest_channel.file_name()
    );
    ground.server.serve(&other.path("repository"));
    ground
        .refuses("stable.json has gone back from version 3 to 2")
        .await;

    // And dates are not believed when the clock goes back.
    ground.server.serve(&ground.path("repository"));
    let later = Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let time = ground.state().join("repository/metadata/latest_known_time.json");
    let before = fs::read(&time).unwrap();
    fs::write(&time, serde_json::to_vec(&later).unwrap()).unwrap();
    ground.refuses("clock was set back").await;
    fs::write(&time, before).unwrap();
    assert_eq!(ground.download(None).await.unwrap().version, "0.2.0");
}

#[tokio::test]
async fn what_others_signed_or_changed_is_refused() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let stranger = Ground::new().await;
    stranger.publish("6.6.6").await;
    ground.server.serve(&stranger.path("repository"));
    ground
        .refuses("is not signed by keys that this host trusts")
        .await;
    // Their root is another, and is not taken without being asked.
    let mut wanted = Wanted {
        root: Some(stranger.path("root.json")),
        ..Wanted::default()
    };
    let error = ground.open(&wanted).await.err().unwrap();
    assert!(error.to_string().contains("--replace-root"), "{error}");
    wanted.replace_root = true;
    let repository = ground.open(&wanted).await.unwrap();
    assert_eq!(repository.release(None).await.unwrap().version, "6.6.6");
    drop(repository);
    wanted.root = Some(ground.path("root.json"));
    ground.server.serve(&ground.path("repository"));
    ground.open(&wanted).await.unwrap();

    // A byte changed, wherever it is, is noticed.
    for role in ["targets", "stable", "snapshot"] {
        let changed = ground.copy(&format!("changed-{role}"));
        let path = newest(&changed, role);
        let text = fs::read_to_string(&path).unwrap();
        let later = text.replacen("\"expires\": \"202", "\"expires\": \"203", 1);
        assert_ne!(later, text);
        fs::write(&path, later).unwrap();
        ground.server.serve(&changed);
        ground
            .refuses("metadata is not signed by keys that this host trusts")
            .await;
    }
    let changed = ground.copy("changed");
    fs::write(changed.join("metadata/timestamp.json"), "{\"signed\":").unwrap();
    ground.server.serve(&changed);
    ground.refuses("timestamp metadata cannot be read").await;

    // A host without a root trusts nobody.
    fs::remove_dir_all(ground.state()).unwrap();
    let mut wanted = ground.wanted();
    wanted.root = None;
    let error = ground.open(&wanted).await.err().unwrap();
    assert!(error.to_string().contains("--root FILE"), "{error}");
    wanted.root = Some(ground.path("flynn-host"));
    let error = ground.open(&wanted).await.err().unwrap();
    assert!(format!("{error:#}").contains("no root of trust"), "{error:#}");
}

#[tokio::test]
async fn a_changed_or_missing_layer_leaves_what_is_there() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let mut ground = ground;
    ground.layers.push(vec![9; 30_000]);
    ground.make_images(&[("system", &[3])]);
    ground.publish("0.2.0").await;
    let before = snapshot(&ground.state());
    let layers = ground.path("repository/targets/stable/layers");
    let id = ground.layer(3).id.to_string();
    let file = fs::read_dir(&layers).unwrap().map(|entry| entry.unwrap().path());
    let file = file
        .into_iter()
        .find(|path| path.to_str().unwrap().contains(&id))
        .unwrap();
    for (content, why) in [
        (Some(vec![8; 30_000]), "something else"),
        (Some(vec![9; 20_000]), "must have 30000"),
        (Some(vec![9; 40_000]), "must have 30000"),
        (None, "there is no"),
    ] {
        match content {
            Some(content) => fs::write(&file, content).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let error = ground
            .download(None)
            .await
            .map(|release| release.version)
            .unwrap_err();
        assert!(format!("{error:#}").contains(why), "{error:#}");
        // The metadata is newer, images and layers are as they were.
        let mut after = snapshot(&ground.state());
        after.retain(|(path, _)| !path.to_str().unwrap().contains("repository/"));
        assert!(after.iter().all(|file| before.contains(file)), "{why}");
    }
    fs::write(&file, vec![9; 30_000]).unwrap();
    assert_eq!(ground.download(None).await.unwrap().version, "0.2.0");
}

#[tokio::test]
async fn servers_without_end_or_without_a_word_are_left() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    for (path, fault, why) in [
        ("timestamp.json", Fault::Endless, "larger than such a file may be"),
        ("timestamp.json", Fault::Stall(10), "has said nothing"),
        ("2.snapshot.json", Fault::Stall(0), "has said nothing"),
        ("2.stable.json", Fault::Endless, "larger than such a file may be"),
        ("timestamp.json", Fault::Status(404), "is it a repository"),
        ("release.json", Fault::Stall(10), "said nothing"),
        ("release.json", Fault::Endless, "longer than"),
    ] {
        ground.server.fault(path, fault, u32::MAX);
        let error = ground
            .download(None)
            .await
            .map(|release| release.version)
            .unwrap_err();
        assert!(format!("{error:#}").contains(why), "{path} {fault:?}: {error:#}");
        ground.server.fault(path, Fault::None, 1);
    }
    // One that is cut off again and again, everywhere, gets there.
    ground.server.fault("layers/", Fault::Cut(60_000), 5);
    ground.server.fault("release.json", Fault::Cut(100), 2);
    ground.download(None).await.unwrap();
    assert_eq!(images(&ground.state()), ["base.json", "system.json"]);
}

#[tokio::test]
async fn keys_are_rotated_and_hosts_follow() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let stolen = ground.copy("stolen");
    let roles = ["root", "targets", "snapshot", "timestamp", "stable"].map(str::to_owned);
    let mut maker = ground.maker();
    maker.rotate(&roles, &ground.path("keys")).await.unwrap();
    assert!(
        maker
            .rotate(&["nobody".into()], &ground.path("keys"))
            .await
            .is_err()
    );
    ground.publish("0.2.0").await;
    assert_eq!(ground.download(None).await.unwrap().version, "0.2.0");
    // What the old keys signed is of no use any more.
    ground.server.serve(&stolen);
    ground.refuses("not signed by keys that this host trusts").await;
    // A host that begins with the first root follows to the newest.
    ground.server.serve(&ground.path("repository"));
    fs::remove_dir_all(ground.state()).unwrap();
    assert_eq!(ground.download(None).await.unwrap().version, "0.2.0");

    // A channel's keeper can do this without the root's keys.
    let online = ground.path("online");
    fs::create_dir(&online).unwrap();
    for entry in fs::read_dir(ground.path("keys")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("root") && !name.starts_with("targets") {
            fs::copy(&path, online.join(name)).unwrap();
        }
    }
    let mut maker = Maker::open(&ground.path("repository"), std::slice::from_ref(&online)).unwrap();
    maker.refresh().await.unwrap();
    assert!(maker.rotate(&["timestamp".into()], &online).await.is_err());
    // And keys that others can read are refused.
    let key = fs::read_dir(&online).unwrap().next().unwrap().unwrap().path();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = Maker::open(&ground.path("repository"), &[online]).err().unwrap();
    assert!(error.to_string().contains("others can read"), "{error}");
}

#[tokio::test]
async fn releases_do_not_change_and_channels_keep_to_themselves() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    let again = Publication {
        channel: "stable",
        version: "0.1.0",
        images: &ground.path("images"),
        programs: &[],
    };
    let error = ground
        .maker()
        .publish(&again)
        .await
        .map(|release| release.version)
        .unwrap_err();
    assert!(error.to_string().contains("releases never change"), "{error}");
    let elsewhere = Publication {
        channel: "testing",
        version: "0.2.0",
        ..again
    };
    assert!(ground.maker().publish(&elsewhere).await.is_err());
    // An empty channel has nothing to offer, one that is not there says so.
    for (channel, why) in [
        ("nightly", "has no nightly/release.json"),
        ("testing", "has no channel testing"),
    ] {
        let wanted = Wanted {
            channel: Some(channel.into()),
            ..ground.wanted()
        };
        let error = match ground.open(&wanted).await {
            Ok(repository) => repository
                .release(None)
                .await
                .map(|release| release.version)
                .unwrap_err(),
            Err(error) => error,
        };
        assert!(format!("{error:#}").contains(why), "{error:#}");
    }
    // What was mistyped is not remembered.
    let plain = Wanted {
        channel: None,
        ..ground.wanted()
    };
    assert_eq!(ground.open(&plain).await.unwrap().channel(), "nightly");
}

/// None takes back what another one signed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn keepers_at_once_lose_nothing() {
    let ground = Ground::new().await;
    let versions = ["0.1.0", "0.2.0", "0.3.0", "0.4.0"];
    let keepers = versions.map(|version| {
        let (maker, images) = (ground.maker(), ground.path("images"));
        tokio::task::spawn_blocking(move || {
            let publication = Publication {
                channel: "stable",
                version,
                images: &images,
                programs: &[],
            };
            let runtime = tokio::runtime::Handle::current();
            runtime.block_on(maker.publish(&publication)).unwrap();
            runtime.block_on(maker.refresh()).unwrap();
        })
    });
    for keeper in keepers {
        keeper.await.unwrap();
    }
    for version in versions {
        assert_eq!(ground.download(Some(version)).await.unwrap().version, version);
    }
}

#[tokio::test]
async fn a_change_of_keys_that_was_cut_off_is_named() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    let before = ground.copy("before");
    let mut maker = ground.maker();
    maker
        .rotate(&["targets".into()], &ground.path("keys"))
        .await
        .unwrap();
    // The root is signed first; of what follows nothing is there yet.
    for name in ["timestamp.json", "1.targets.json"] {
        let name = Path::new("metadata").join(name);
        fs::copy(before.join(&name), ground.path("repository").join(&name)).unwrap();
    }
    let error = ground.maker().refresh().await.unwrap_err();
    assert!(
        error.to_string().contains("rotate the role targets again"),
        "{error}"
    );
    maker
        .rotate(&["targets".into()], &ground.path("keys"))
        .await
        .unwrap();
    assert_eq!(ground.download(None).await.unwrap().version, "0.1.0");
}

/// What a host has seen of the keys stays, though the rest did not come; what it does not need goes.
#[tokio::test]
async fn a_verified_root_is_kept() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let stolen = ground.copy("stolen");
    ground
        .maker()
        .rotate(&["timestamp".into(), "snapshot".into()], &ground.path("keys"))
        .await
        .unwrap();
    let timestamp = ground.path("repository").join("metadata/timestamp.json");
    let good = fs::read(&timestamp).unwrap();
    fs::write(&timestamp, "{}").unwrap();
    assert!(ground.download(None).await.is_err());
    // A mirror that hides the new root has nothing to say any more.
    ground.server.serve(&stolen);
    ground.refuses("not signed by keys that this host trusts").await;
    ground.server.serve(&ground.path("repository"));
    fs::write(&timestamp, good).unwrap();
    for version in ["0.2.0", "0.3.0", "0.4.0"] {
        ground.publish(version).await;
        assert_eq!(ground.download(None).await.unwrap().version, version);
    }
    let metadata = fs::read_dir(ground.state().join("repository/metadata")).unwrap();
    let names: Vec<_> = metadata.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() <= 5, "{names:?}");
}

#[tokio::test]
async fn a_download_that_is_ended_anywhere_goes_on() {
    let ground = Ground::new().await;
    ground.publish("0.1.0").await;
    ground.download(None).await.unwrap();
    let all = snapshot(&ground.state());
    fs::remove_dir_all(ground.state()).unwrap();
    // Ever later, until one gets to the end.
    let mut steps = 0;
    for patience in 0.. {
        let polls = Cell::new(0);
        let download = ground.download(None);
        let mut download = std::pin::pin!(download);
        let ended = std::future::poll_fn(|context| {
            polls.set(polls.get() + 1);
            match download.as_mut().poll(context) {
                std::task::Poll::Pending if polls.get() > patience => std::task::Poll::Ready(None),
                other => other.map(Some),
            }
        });
        steps += 1;
        match ended.await {
            Some(result) => {
                result.unwrap();
                break;
            }
            // Nothing is there under its name that is not right.
            None => assert!(snapshot(&ground.state()).iter().all(|file| {
                let meta = file.0.to_str().unwrap().contains("repository/");
                meta || all.contains(file)
            })),
        }
    }
    assert!(steps > 10, "{steps}");
    let layers = |files: &[(PathBuf, Vec<u8>)]| {
        files
            .iter()
            .filter(|(path, _)| path.extension().unwrap() == "squashfs")
            .count()
    };
    assert_eq!(layers(&snapshot(&ground.state())), layers(&all));
}

proptest! {
    #[test]
    fn any_description_of_a_release_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Release::read(&bytes).is_err());
    }

    #[test]
    fn no_name_leads_elsewhere(name in "\\PC{0,70}|[a-z./]{0,10}") {
        let release = serde_json::json!({"_type": RELEASE_V1, "version": "1", "images": {}, "programs": [name]});
        if Release::read(&serde_json::to_vec(&release).unwrap()).is_ok() {
            let path = Path::new("/dir").join(&name);
            prop_assert_eq!(path.parent(), Some(Path::new("/dir")));
            prop_assert_eq!(path.file_name().and_then(|file| file.to_str()), Some(name.as_str()));
        }
    }
}
