//! What the user namespace of a container is for: who gets past everything else is nobody.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use flynn_hostd::container::IDS;
use flynn_hostd::launch::Bind;

use crate::cases::CASES;
use crate::ground::Ground;

/// Tests by their names.
pub(crate) const TESTS: &[(&str, fn())] = &[
    ("root_is_nobody_outside", root_is_nobody_outside),
    ("user_namespace_as_the_only_wall", only_wall),
    ("files_of_root", files_of_root),
    ("processes_of_others", processes_of_others),
];

/// Tricks that work as root, of which a user namespace alone keeps the one who is root in it, with all rights.
const REFUSED_ALONE: &[&str] = &[
    "mount",
    "mount_cgroups",
    "remount_writable",
    "umount",
    "pivot_root",
    "open_tree",
    "mount_setattr",
    "swapon",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "kexec_file_load",
    "reboot",
    "iopl",
    "ioperm",
    "settimeofday",
    "acct",
    "sethostname",
    "open_by_handle_at",
    "sysrq",
    "core_pattern",
    "hostname_file",
    "modprobe_path",
    "ip_forward",
    "irq_affinity",
    "uevent_helper",
    "hugepages",
    "device_mtu",
    "kcore",
    "kmsg",
    "release_agent",
    "mknod_block",
    "mknod_memory",
    "raw_socket",
    "raw_socket_v6",
    "packet_socket",
    "interface_down",
    "socket_of_the_host",
    "file_of_the_host",
];

fn only_wall() {
    for name in REFUSED_ALONE {
        let case = CASES.iter().find(|case| case.name == *name).unwrap();
        if crate::lacks_for(case).is_some() {
            continue;
        }
        let said = Ground::new(&[]).with_users().in_users_alone(case);
        crate::is_refused(case, &said);
    }
}

/// Init, the program, and one that is started beside it.
fn root_is_nobody_outside() {
    let ground = Ground::new(&["--wait"]).with_users();
    let first = ground.launch.first_id().unwrap();
    let ids = [first; 4].map(|id| id.to_string()).join("\t");
    let said = ground.who();
    assert_eq!(said.len(), 2, "{said:?}");
    for line in &said {
        let wanted = format!("Uid:\t{ids} Gid:\t{ids} ");
        assert!(line.starts_with(&wanted), "{line:?}, not {wanted:?}");
    }
    let said = ground.execute(&["--look", "uid", "/proc/self/uid_map"]);
    let map = format!("{first}      {IDS}");
    assert!(said[0] == "uid: 0" && said[1].contains(&map), "{said:?}");
    // Without, root is root.
    let said = Ground::new(&["--wait"]).who();
    assert!(
        said.iter().all(|line| line.starts_with("Uid:\t0\t0\t0\t0 ")),
        "{said:?}"
    );
}

/// What root makes on its root file system belongs to nobody of the host's. On a volume it belongs to root, as whoever has
/// it mounted next knows it; it gives no rights where it is mounted, and nobody else gets there.
fn files_of_root() {
    let mut ground = Ground::new(&["--make-setuid", "/own"]).with_users();
    let first = ground.launch.first_id().unwrap();
    assert_eq!(ground.contain(), ["made"]);
    let own = fs::metadata(ground.job().join("upper/own")).unwrap();
    assert_eq!(
        (own.uid(), own.gid(), own.mode() & 0o7777),
        (first, first, 0o4755)
    );

    let volume = ground.layer().with_file_name("scratch");
    ground.launch.binds.push(Bind {
        source: volume.clone(),
        target: "/data".into(),
        writable: true,
        ids_of_container: true,
    });
    ground.launch.args[2] = "/data/program".into();
    assert_eq!(ground.contain(), ["made"]);
    let program = fs::metadata(volume.join("program")).unwrap();
    assert_eq!((program.uid(), program.gid()), (0, 0));
    assert_eq!(program.mode() & 0o7777, 0o4755);
    ground.launch.args = ["/data/program", "--look", "uid"].map(str::to_owned).into();
    ground.launch.uid = 1000;
    ground.launch.gid = 1000;
    assert_eq!(ground.contain(), ["uid: 1000"]);
}

/// One who is root in a container and got out of everything else is not who the processes and files of the host, or of
/// another container, belong to.
fn processes_of_others() {
    let (one, other) = (Ground::new(&[]).with_users(), Ground::new(&[]).with_users());
    let [one, of_other] = [one, other].map(|ground| ground.launch.first_id().unwrap());
    assert_ne!(one, of_other);
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let secret = dir.path().join("secret");
    for owner in [0, of_other] {
        fs::write(&secret, "of another").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&secret, Some(owner), Some(owner)).unwrap();
        let mut process = Command::new("/bin/sleep");
        let mut process = process.arg("1000").uid(owner).gid(owner).spawn().unwrap();
        let pid = process.id().to_string();
        let does = |id: u32, program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).uid(id).gid(id).output().unwrap();
            output.status.success()
        };
        let path = secret.to_str().unwrap();
        let signal = ["-c", "kill -0 \"$1\"", "sh", &pid];
        let environment = ["-c", "exec 3< \"/proc/$1/environ\"", "sh", &pid];
        for (id, can) in [(owner, true), (one, false)] {
            assert_eq!(does(id, "/bin/cat", &[path]), can, "read by {id}");
            assert_eq!(does(id, "/bin/sh", &signal), can, "signal by {id}");
            assert_eq!(does(id, "/bin/sh", &environment), can, "environment by {id}");
        }
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
