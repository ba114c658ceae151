//! Each command against a cluster in memory: what it asks for, what it prints, how it fails.

#![expect(
    clippy::unwrap_used,
    reason = "what fails in a helper of a test fails the test"
)]

mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use flynn_api::controller::JobState;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Cluster, stderr};

/// A cluster with the app `shop`, which has had an image.
fn with_app() -> Cluster {
    let cluster = Cluster::start();
    assert_eq!(cluster.ok(&["create", "shop"]), "Created shop\n");
    let archive = archive(&cluster);
    cluster.ok(&["-a", "shop", "docker", "push", "--archive", &archive]);
    cluster
}

fn sha256(bytes: &[u8]) -> String {
    let digest: Vec<_> = <sha2::Sha256 as sha2::Digest>::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{}", digest.concat())
}

/// A docker-archive with two layers, one of which is there twice.
fn archive(cluster: &Cluster) -> String {
    let (low, high) = (vec![1; 100_000], vec![2; 10]);
    let ids = [sha256(&low), sha256(&high), sha256(&low)];
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": ids}}).to_string();
    let manifest =
        json!([{"Config": "c.json", "RepoTags": ["shop:1"], "Layers": ["low", "high", "low"]}]).to_string();
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("c.json", config.as_bytes()),
        ("low", &low),
        ("high", &high),
        ("manifest.json", manifest.as_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    let path = cluster.home.path().join("image.tar");
    std::fs::write(&path, tar.into_inner().unwrap()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn clusters_are_known_by_their_pin() {
    let cluster = Cluster::unknown();
    let domain = format!("flynn.localhost:{}", cluster.address.port());
    let other = format!("{}=", "A".repeat(43));
    cluster.ok(&["cluster", "add", "-p", &other, "test", &domain, "key"]);
    let said = cluster.fails(75, &["apps"]);
    assert!(said.contains("TLS pin") && said.contains(&cluster.pin), "{said}");
    assert!(!said.contains("key "), "{said}");
    let said = cluster.fails(5, &["cluster", "add", "test", &domain, "key"]);
    assert!(said.contains("-f"), "{said}");
    let said = cluster.fails(
        2,
        &["cluster", "add", "-f", "-p", "nonsense", "test", &domain, "key"],
    );
    assert!(said.contains("44 characters"), "{said}");

    let mut child = cluster
        .command(&[
            "cluster",
            "add",
            "-f",
            "-d",
            "-p",
            &cluster.pin,
            "test",
            &domain,
            "-",
        ])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"key\n").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(cluster.ok(&["apps"]), "ID  NAME\n");
    let mode = std::fs::metadata(cluster.rc()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(
        !cluster.ok(&["cluster", "--json"]).contains("\"key\""),
        "keys are not listed"
    );

    cluster.ok(&[
        "cluster",
        "add",
        "-f",
        "-p",
        &cluster.pin,
        "test",
        &domain,
        "wrong",
    ]);
    let said = cluster.fails(4, &["apps"]);
    assert!(
        said.starts_with("flynn: error[unauthorized]:") && !said.contains("wrong"),
        "{said}"
    );
    cluster.ok(&["cluster", "remove", "test"]);
    assert!(cluster.fails(2, &["apps"]).contains("flynn cluster add"));
}

#[test]
fn apps_are_made_shown_and_deleted() {
    let cluster = Cluster::start();
    cluster.ok(&["create", "shop"]);
    assert!(
        cluster
            .fails(5, &["create", "shop"])
            .contains("error[object_exists]")
    );
    assert!(
        cluster.ok(&["create"]).starts_with("Created "),
        "a name is made up"
    );
    assert_eq!(cluster.ok(&["apps"]).lines().count(), 3);
    let apps: Value = serde_json::from_str(&cluster.ok(&["--json", "apps"])).unwrap();
    assert_eq!(apps.as_array().unwrap().len(), 2);
    assert!(cluster.ok(&["-a", "shop", "info"]).starts_with("=== shop\n"));
    assert!(cluster.fails(2, &["info"]).contains("FLYNN_APP"));
    let said = cluster.fails(3, &["-a", "nowhere", "info"]);
    assert!(
        said.contains("there is no app nowhere") && said.contains("flynn apps"),
        "{said}"
    );
    cluster.ok(&["-a", "shop", "meta", "set", "team=a"]);
    assert!(cluster.ok(&["-a", "shop", "meta"]).contains("team"));
    // The last one goes as well.
    cluster.ok(&["-a", "shop", "meta", "unset", "team"]);
    assert!(!cluster.ok(&["-a", "shop", "meta"]).contains("team"));
    cluster.ok(&["-a", "shop", "deployment", "timeout", "30"]);
    assert_eq!(cluster.ok(&["-a", "shop", "deployment", "timeout"]), "30\n");
    assert!(
        cluster.fails(2, &["-a", "shop", "delete"]).contains("--yes"),
        "nothing is deleted without a yes"
    );
    cluster.ok(&["-a", "shop", "delete", "-y"]);
    assert_eq!(cluster.ok(&["apps"]).lines().count(), 2);
    assert!(cluster.fails(2, &["-a", "shop"]).contains("Usage"));
}

#[test]
fn apps_are_isolated_and_opened() {
    let cluster = Cluster::start();
    cluster.ok(&["create", "--remote", "", "shop"]);
    cluster.ok(&["create", "--remote", "", "db"]);
    let network = |args: &[&str]| cluster.ok(&[&["-a", "shop", "network"], args].concat());
    assert!(network(&[]).contains("shop is open"));
    assert!(
        cluster
            .fails(2, &["-a", "shop", "network", "allow", "db"])
            .contains("isolate --allow db")
    );
    assert!(network(&["isolate"]).contains("only the router reaches it"));
    assert!(network(&["allow", "db"]).contains("the router and db reach it"));
    let shown: serde_json::Value = serde_json::from_str(&network(&["show", "--json"])).unwrap();
    assert_eq!(
        shown,
        serde_json::json!({"app": "shop", "isolated": true, "allow": ["db"]})
    );
    assert!(
        cluster
            .fails(3, &["-a", "shop", "network", "allow", "nobody"])
            .contains("flynn apps")
    );
    assert!(network(&["deny", "db"]).contains("only the router reaches it"));
    assert!(network(&["open"]).contains("shop is open"));
    assert!(
        !cluster.ok(&["-a", "shop", "meta"]).contains("network"),
        "no label is left"
    );
}

#[test]
fn git_remotes_name_the_app() {
    let cluster = Cluster::start();
    let git = |arguments: &[&str]| {
        let status = std::process::Command::new("git")
            .args(arguments)
            .current_dir(cluster.home.path())
            .output();
        assert!(status.unwrap().status.success());
    };
    git(&["init", "-q"]);
    cluster.ok(&["create", "shop"]);
    assert!(cluster.ok(&["info"]).starts_with("=== shop"));
    cluster.ok(&["create", "-r", "staging", "shop-2"]);
    assert!(cluster.ok(&["-a", "staging", "info"]).starts_with("=== shop-2"));
    assert!(cluster.fails(2, &["create", "third"]).contains("--yes"));
    cluster.ok(&["delete", "-y"]);
    assert!(
        cluster.ok(&["info"]).starts_with("=== shop-2"),
        "the only remote that is left"
    );
}

#[test]
fn an_image_is_pushed_deployed_and_started() {
    let cluster = Cluster::start();
    cluster.ok(&["create", "shop"]);
    let archive = archive(&cluster);
    let output = cluster.run(&["-a", "shop", "docker", "push", "--archive", &archive]);
    assert!(output.status.success(), "{}", stderr(&output));
    {
        let held = cluster.held();
        let sent: Vec<_> = held.layers.values().copied().collect();
        assert_eq!(sent.iter().sum::<usize>(), 100_010, "each layer once: {sent:?}");
        assert_eq!(held.images[0].meta["docker.image"], "shop:1");
        assert_eq!(held.images[0].config.rootfs.diff_ids.len(), 3);
        let release = &held.releases[0];
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{}\n", release.id)
        );
        let port = &release.processes["web"].ports[0];
        assert_eq!(
            (port.port, port.service.as_ref().unwrap().name.as_str()),
            (8080, "shop-web")
        );
        assert_eq!(held.formations[0].processes["web"], 1);
    }
    // Pushed again: nothing is sent, configuration and scale stay.
    cluster.ok(&["-a", "shop", "env", "set", "A=1"]);
    cluster.ok(&["-a", "shop", "scale", "web=2"]);
    let output = cluster.run(&["-a", "shop", "docker", "push", "--archive", &archive]);
    assert_eq!(
        stderr(&output).matches("already there").count(),
        2,
        "{}",
        stderr(&output)
    );
    let held = cluster.held();
    let newest = held.releases.last().unwrap();
    assert_eq!(newest.env["A"], "1");
    assert_eq!(
        (
            held.formations[0].release_id.as_str(),
            held.formations[0].processes["web"]
        ),
        (newest.id.as_str(), 2)
    );
}

#[test]
fn images_that_cannot_be_used_change_nothing() {
    let cluster = Cluster::start();
    cluster.ok(&["create", "shop"]);
    let archive = archive(&cluster);
    let whole = std::fs::read(&archive).unwrap();
    for (bytes, word) in [
        (&whole[..whole.len() / 2], "cut short"),
        (&[], "docker save"),
        (&[7; 10_000], "cut short"),
    ] {
        std::fs::write(&archive, bytes).unwrap();
        let said = cluster.fails(2, &["-a", "shop", "docker", "push", "--archive", &archive]);
        assert!(said.contains(word), "{said}");
    }
    assert!(
        cluster
            .fails(3, &["-a", "shop", "docker", "push", "--archive", "nowhere"])
            .contains("no such file")
    );
    assert!(
        cluster
            .fails(3, &["-a", "nowhere", "docker", "push", "--archive", &archive])
            .contains("nowhere")
    );
    let output = cluster
        .command(&["-a", "shop", "docker", "push", "shop:1"])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    assert!(stderr(&output).contains("--archive"), "{}", stderr(&output));
    assert!(cluster.held().layers.is_empty() && cluster.held().releases.is_empty());
}

#[test]
fn jobs_are_scaled_listed_and_killed() {
    let cluster = with_app();
    let app = |arguments: &[&str]| cluster.ok(&[&["-a", "shop"], arguments].concat());
    let output = cluster.run(&["-a", "shop", "scale", "web=3,ssd=true"]);
    assert!(stderr(&output).contains("scaling web: 1 => 3") && output.stdout.is_empty());
    assert_eq!(app(&["scale"]), "web=3,ssd=true\n");
    let ids = app(&["ps", "-q"]);
    assert_eq!(ids.lines().count(), 3);
    app(&["kill", ids.lines().next().unwrap()]);
    assert_eq!(app(&["ps", "-q"]).lines().count(), 2);
    assert_eq!(app(&["ps", "-a"]).lines().count(), 4);
    assert_eq!(app(&["ps", "-q", "-t", "worker"]), "");
    assert!(
        cluster
            .fails(3, &["-a", "shop", "kill", "h1-nothing"])
            .contains("flynn ps")
    );
    assert!(
        cluster
            .fails(2, &["-a", "shop", "scale", "worker=1"])
            .contains("it has: web")
    );
    assert!(
        cluster
            .fails(2, &["-a", "shop", "scale", "web=many"])
            .contains("not a count")
    );
    for job in &mut cluster.held().jobs {
        job.state = JobState::Down;
    }
    let jobs: Value = serde_json::from_str(&app(&["--json", "ps", "-a"])).unwrap();
    assert_eq!(jobs[0]["state"], "down");
}

#[test]
fn what_is_not_up_in_time_is_told() {
    let cluster = with_app();
    cluster.ok(&["-a", "shop", "deployment", "timeout", "1"]);
    cluster.held().stuck = true;
    let said = cluster.fails(75, &["-a", "shop", "scale", "web=2"]);
    assert!(said.contains("is pending") && said.contains("ps -a"), "{said}");
    cluster.ok(&["-a", "shop", "scale", "-n", "web=2"]);
}

#[test]
fn the_environment_makes_releases() {
    let cluster = with_app();
    let app = |arguments: &[&str]| cluster.ok(&[&["-a", "shop"], arguments].concat());
    let secret = cluster.home.path().join("secret");
    std::fs::write(&secret, "s3cr3t\n").unwrap();
    app(&["env", "set", "A=1", &format!("API_KEY=@{}", secret.display())]);
    app(&["env", "-t", "web", "set", "B=2=3"]);
    assert_eq!(app(&["env"]), "A=1\nAPI_KEY=s3cr3t\n");
    assert_eq!(app(&["env", "get", "-t", "web", "B"]), "2=3\n");
    let shown = app(&["release", "show"]);
    assert!(
        shown.contains("ENV[A]: 1") && !shown.contains("s3cr3t"),
        "{shown}"
    );
    let before = cluster.held().releases.len();
    let same = cluster.run(&["-a", "shop", "env", "set", "A=1"]);
    assert!(stderr(&same).contains("Nothing changes") && cluster.held().releases.len() == before);
    app(&["env", "unset", "A"]);
    assert!(
        cluster
            .fails(3, &["-a", "shop", "env", "get", "A"])
            .contains("there is no variable A")
    );
    assert!(
        cluster
            .fails(3, &["-a", "shop", "env", "-t", "none", "set", "A=1"])
            .contains("process type none")
    );
    assert!(
        cluster
            .fails(2, &["-a", "shop", "env", "set", "A"])
            .contains("NAME=value")
    );
    app(&["limit", "set", "web", "memory=512MB"]);
    assert!(app(&["limit"]).contains("web: memory=512MB cpu=1000"));

    let mut child = cluster
        .command(&["-a", "shop", "env", "set", "C=@-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(app(&["env", "get", "C"]), "from stdin\n");
}

#[test]
fn releases_are_rolled_back_and_deleted() {
    let cluster = with_app();
    let app = |arguments: &[&str]| cluster.ok(&[&["-a", "shop"], arguments].concat());
    app(&["env", "set", "A=1"]);
    let releases = app(&["release", "-q"]);
    let (new, old) = releases.trim().split_once('\n').unwrap();
    assert!(app(&["release"]).lines().nth(1).unwrap().ends_with("current"));
    assert!(
        cluster
            .fails(2, &["-a", "shop", "release", "rollback"])
            .contains("--yes")
    );
    app(&["release", "rollback", "-y"]);
    assert_eq!(app(&["env"]), "");
    assert!(
        cluster
            .fails(2, &["-a", "shop", "release", "rollback", "-y", old])
            .contains("already")
    );
    app(&["release", "delete", "-y", new]);
    assert_eq!(app(&["release", "-q"]).lines().count(), 1);
    let file = cluster.home.path().join("release.json");
    std::fs::write(&file, r#"{"processes": {"worker": {"args": ["/worker"]}}}"#).unwrap();
    app(&["release", "update", file.to_str().unwrap()]);
    let shown: Value = serde_json::from_str(&app(&["--json", "release", "show"])).unwrap();
    assert!(shown["processes"]["web"].is_object() && shown["processes"]["worker"]["args"][0] == "/worker");
    assert!(app(&["deployment"]).contains("complete"));

    cluster.held().failure = Some("web job crashed".into());
    let said = cluster.fails(5, &["-a", "shop", "env", "set", "A=2"]);
    assert!(
        said.contains("web job crashed") && said.contains("flynn log"),
        "{said}"
    );
}

#[test]
fn routes_are_added_changed_and_removed() {
    let cluster = with_app();
    let app = |arguments: &[&str]| cluster.ok(&[&["-a", "shop"], arguments].concat());
    let id = app(&["route", "add", "http", "--sticky", "example.com/api"]);
    let id = id.trim();
    app(&["route", "add", "tcp", "-s", "db", "--leader"]);
    {
        let held = cluster.held();
        assert_eq!(
            (held.routes[0].domain.as_str(), held.routes[0].path.as_str()),
            ("example.com", "/api/")
        );
        assert!(held.routes[0].sticky && held.routes[0].drain_backends && held.routes[1].leader);
        assert_eq!(
            (held.routes[0].service.as_str(), held.routes[1].service.as_str()),
            ("shop-web", "db")
        );
    }
    let listed = app(&["route"]);
    assert!(
        listed.contains("http://example.com/api/") && listed.contains("tcp://:0"),
        "{listed}"
    );
    let (cert, key) = (cluster.home.path().join("cert"), cluster.home.path().join("key"));
    std::fs::write(&cert, "-----BEGIN CERTIFICATE-----\n").unwrap();
    std::fs::write(&key, "-----BEGIN PRIVATE KEY-----\n").unwrap();
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let said = cluster.fails(2, &["-a", "shop", "route", "update", id, "-c", key, "-k", cert]);
    assert!(said.contains("swap"), "{said}");
    app(&["route", "update", id, "--no-sticky", "-c", cert, "-k", key]);
    assert!(
        !app(&["--json", "route"]).contains("PRIVATE KEY"),
        "keys are not listed"
    );
    assert!(
        cluster
            .fails(2, &["-a", "shop", "route", "update", id])
            .contains("nothing to change")
    );
    app(&["route", "remove", id]);
    assert!(
        cluster
            .fails(3, &["-a", "shop", "route", "remove", id])
            .contains("flynn route")
    );
}

#[test]
fn logs_are_shown() {
    let cluster = with_app();
    let app = |arguments: &[&str]| cluster.ok(&[&["-a", "shop"], arguments].concat());
    assert_eq!(app(&["log", "-r", "-n", "2"]), "line 0\nline 1\n");
    assert_eq!(
        app(&["log", "-n", "1"]),
        "2027-01-15T08:00:00.000Z app[web.h1-1]: line 0\n"
    );
    let split = cluster.run(&["-a", "shop", "log", "-s", "-r", "-n", "2"]);
    assert_eq!(
        (split.stdout.as_slice(), stderr(&split).as_str()),
        (&b"line 0\n"[..], "line 1\n")
    );
    assert_eq!(app(&["--json", "log", "-n", "3"]).lines().count(), 3);
    // A reader that has had enough is no failure.
    let mut child = cluster
        .command(&["-a", "shop", "log"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        stderr(&output)
    );
}

#[test]
fn programs_run_with_pipes() {
    let cluster = with_app();
    let mut child = cluster
        .command(&[
            "-a",
            "shop",
            "run",
            "-e",
            "A=1",
            "--limits",
            "memory=64MB,cpu=100",
            "--",
            "cat",
            "-n",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"piped\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7), "the status of what ran");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "size none\r\npiped\n");
    assert_eq!(stderr(&output), "to stderr\r\n");
    assert_eq!(cluster.ok(&["-a", "shop", "run", "-d", "true"]), "h1-detached\n");
    let held = cluster.held();
    let run = &held.runs[0];
    assert_eq!(
        (run.args.as_slice(), run.env["A"].as_str(), run.tty),
        (&["cat".to_owned(), "-n".to_owned()][..], "1", false)
    );
    assert_eq!(run.resources.0["memory"].limit, Some(64 << 20));
    assert!(run.release_env && run.disable_log && !held.runs[1].disable_log);
}

/// A signal reaches a program that reads none of its input, however much of that there is.
#[test]
fn programs_that_read_nothing_hear_signals() {
    let cluster = with_app();
    let mut child = cluster
        .command(&["-a", "shop", "run", "deaf"])
        .stdin(std::fs::File::open("/dev/zero").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = || output.next().unwrap().unwrap();
    while said() != "a window is full" {}
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(said(), "signal 2");
    assert_eq!(said(), format!("{} bytes", flynn_api::host::attach::WINDOW));
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn a_terminal_is_a_terminal_there_too() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

    let cluster = with_app();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = || {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(
            options.read(true).write(true),
            rustix::fs::OFlags::NOCTTY.bits().cast_signed(),
        );
        options.open(name.to_str().unwrap()).unwrap()
    };
    let size = |columns, rows| Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = slave();
    tcsetwinsize(&terminal, size(100, 40)).unwrap();
    let mut child = cluster
        .command(&["-a", "shop", "run", "sh"])
        .env("TERM", "xterm")
        .stdin(slave())
        .stdout(slave())
        .stderr(slave())
        .spawn()
        .unwrap();
    let mut screen = Screen::new(std::fs::File::from(master));
    screen.wait_for("size 100x40");
    assert!(
        !tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO),
        "raw while it runs"
    );
    screen.type_keys(b"\x03hello");
    screen.wait_for("\u{3}hello");

    let pid = rustix::process::Pid::from_child(&child);
    tcsetwinsize(&terminal, size(80, 25)).unwrap();
    rustix::process::kill_process(pid, Signal::WINCH).unwrap();
    screen.wait_for("resized 80x25");
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    screen.wait_for("signal 15");
    screen.type_keys(b"q");
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(
        tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO),
        "as it was, afterwards"
    );
    let held = cluster.held();
    assert!(held.runs[0].tty && held.runs[0].env["TERM"] == "xterm");
}

/// What has been written to a terminal.
struct Screen {
    master: std::fs::File,
    pieces: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Screen {
    fn new(master: std::fs::File) -> Self {
        let (sender, pieces) = std::sync::mpsc::channel();
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read) = reader.read(&mut buffer) {
                if read == 0 || sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            master,
            pieces,
            text: String::new(),
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn wait_for(&mut self, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.text.contains(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(piece) = self.pieces.recv_timeout(left) else {
                panic!("{wanted:?} did not come; there was {:?}", self.text)
            };
            self.text.push_str(&String::from_utf8_lossy(&piece));
        }
    }
}
