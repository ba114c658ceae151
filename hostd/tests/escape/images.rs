//! Images, volumes and directories that lead elsewhere.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use flynn_hostd::launch::Bind;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::ground::Ground;

/// Tests by their names.
pub(crate) const TESTS: &[(&str, fn())] = &[
    ("files_that_are_links", files_that_are_links),
    ("directories_that_are_links", directories_that_are_links),
    (
        "kernel_directories_that_are_links",
        kernel_directories_that_are_links,
    ),
    ("volumes_at_links", volumes_at_links),
    (
        "volumes_at_links_to_what_the_kernel_shows",
        volumes_at_links_to_what_the_kernel_shows,
    ),
    (
        "working_directory_of_a_descriptor",
        working_directory_of_a_descriptor,
    ),
    ("descriptors", descriptors),
    ("devices_in_the_image", devices_in_the_image),
    ("setuid_programs", setuid_programs),
];

/// Enough to leave any root, from anywhere in it.
const UP: &str = "../../../../../../../../../../../..";

const SECRET: &str = "of the host";

/// That path of the host, from below some directory.
fn climbing(path: &Path) -> String {
    format!("{UP}{}", path.display())
}

/// Nothing of the host's was written or is seen.
fn untouched(ground: &Ground, said: &[String]) {
    let host = ground.host();
    assert_eq!(fs::read_to_string(host.join("secret")).unwrap(), SECRET);
    let names: Vec<_> = fs::read_dir(&host)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        names.iter().all(|name| name == "secret" || name == "socket"),
        "{names:?}"
    );
    assert!(!said.iter().any(|line| line.contains(SECRET)), "{said:?}");
}

/// The files that are written into every container.
fn files_that_are_links() {
    let ground = Ground::new(&[
        "--look",
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/passwd",
    ]);
    let (etc, secret) = (ground.layer().join("etc"), ground.host().join("secret"));
    fs::create_dir(&etc).unwrap();
    symlink(&secret, etc.join("resolv.conf")).unwrap();
    symlink(climbing(&secret), etc.join("hosts")).unwrap();
    symlink(ground.host().join("new"), etc.join("hostname")).unwrap();
    symlink(climbing(&secret), etc.join("passwd")).unwrap();
    for link in ["resolv.conf", "hosts"] {
        assert_eq!(
            fs::read_to_string(etc.join(link)).unwrap(),
            SECRET,
            "a link that leads nowhere"
        );
    }
    let said = ground.contain();
    untouched(&ground, &said);
    assert!(
        said[2].contains("\"escape\\n\"") && said[3].contains("refused"),
        "{said:?}"
    );
}

fn directories_that_are_links() {
    for (name, link) in [("etc", false), ("etc", true), ("tmp", false), ("tmp", true)] {
        let ground = Ground::new(&["--look", "/etc/hostname", "/tmp/secret", "/etc/secret"]);
        let host = ground.host();
        let to = if link { climbing(&host).into() } else { host };
        symlink(to, ground.layer().join(name)).unwrap();
        assert!(
            ground.layer().join(name).join("secret").exists(),
            "a link that leads nowhere"
        );
        let said = ground.contain();
        untouched(&ground, &said);
        assert!(!said.is_empty());
    }
}

/// What the kernel shows is where it is looked for, and what is hidden of it is hidden there.
fn kernel_directories_that_are_links() {
    for name in ["proc", "sys", "dev"] {
        let ground = Ground::new(&["--look", "/etc/hostname"]);
        fs::create_dir(ground.layer().join("elsewhere")).unwrap();
        symlink("elsewhere", ground.layer().join(name)).unwrap();
        let said = ground.contain();
        assert!(
            said.len() == 1 && said[0].contains(&format!("/{name} is a link")),
            "{said:?}"
        );
    }
}

fn volumes_at_links() {
    for climbs in [false, true] {
        for target in ["/data", "/data/new", "/data/new/file"] {
            let mut ground = Ground::new(&["--look", "/data/secret", target]);
            let host = ground.host();
            let to = if climbs { climbing(&host).into() } else { host };
            symlink(to, ground.layer().join("data")).unwrap();
            let volume = ground.layer().with_file_name("scratch");
            let file = volume.join("file");
            fs::write(&file, "kept").unwrap();
            ground.launch.binds.push(Bind {
                source: if target.ends_with("file") { file } else { volume },
                target: target.into(),
                writable: true,
                ids_of_container: true,
            });
            let said = ground.contain();
            untouched(&ground, &said);
            assert!(!said.is_empty());
        }
    }
}

/// What is mounted there would be taken for the kernel's, by whoever sets the container up.
fn volumes_at_links_to_what_the_kernel_shows() {
    for (link, target) in [
        ("/", "/link"),
        ("/", "/link/dev"),
        (".", "/link/proc"),
        ("/proc", "/link/1/task/1/attr"),
        ("/proc/sys", "/link/kernel"),
        ("/sys", "/link/fs"),
        ("/dev/pts", "/link"),
        ("/proc/self/root", "/link/dev"),
        ("/proc/self/cwd", "/link"),
    ] {
        let mut ground = Ground::new(&["--look", "/dev/null"]);
        symlink(link, ground.layer().join("link")).unwrap();
        ground.launch.binds.push(Bind {
            source: ground.layer().with_file_name("scratch"),
            target: target.into(),
            writable: true,
            ids_of_container: true,
        });
        let said = ground.contain();
        let is_named = |line: &String| line.starts_with("failed: ") && line.contains(target);
        assert!(
            said.len() == 1 && said.iter().all(is_named),
            "{link}, {target}: {said:?}"
        );
    }
}

/// A directory that the runtime has left open would be a way out.
fn working_directory_of_a_descriptor() {
    let host = fs::File::open("/").unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&host);
    let first = Ground::new(&[]);
    let through = format!("/proc/self/fd/{descriptor}{}/secret", first.host().display());
    assert_eq!(fs::read_to_string(through).unwrap(), SECRET);
    for descriptor in 3..15 {
        for link in [false, true] {
            let climbing = climbing(&first.host().join("secret"));
            let mut ground = Ground::new(&["--look", "cwd", &climbing[3..], &climbing]);
            let dir = format!("/proc/self/fd/{descriptor}");
            if link {
                symlink(&dir, ground.layer().join("dir")).unwrap();
            }
            ground.launch.working_dir = if link { "/dir".into() } else { dir };
            let said = ground.contain();
            untouched(&first, &said);
            assert!(!said.is_empty());
        }
    }
}

/// Whether three streams are open, besides the directory that is being listed.
pub(crate) fn only_streams(said: &[String]) -> bool {
    said.len() == 1 && said[0].matches("pipe:").count() == 2 && said[0].matches(',').count() == 3
}

fn descriptors() {
    let said = Ground::new(&["--look", "fd"]).contain();
    assert!(only_streams(&said), "{said:?}");
}

fn devices_in_the_image() {
    let ground = Ground::new(&["--look", "/zero"]);
    let device = ground.layer().join("zero");
    mknodat(
        CWD,
        &device,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        makedev(1, 5),
    )
    .unwrap();
    assert!(
        fs::File::open(&device).is_ok(),
        "devices cannot be opened outside either"
    );
    assert_eq!(ground.contain(), ["/zero: refused 13"]);
}

fn setuid_programs() {
    let mut ground = Ground::new(&["--look", "uid"]);
    let program = ground.layer().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    open(&program, 0o4755);
    open(ground.layer().parent().unwrap(), 0o755);
    let outside = Command::new(&program)
        .args(["--look", "uid"])
        .uid(1000)
        .output()
        .unwrap();
    assert_eq!(outside.stdout, b"uid: 0\n", "outside");
    ground.launch.args[0] = "/program".into();
    ground.launch.uid = 1000;
    assert_eq!(ground.contain(), ["uid: 1000"]);
}
