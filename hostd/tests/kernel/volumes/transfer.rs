//! Snapshots on their way to other hosts.

use std::fs;
use std::process::{Command, Stdio};

use flynn_api::volume::VolumeType;

use super::{Btrfs, MIB, copy, new, output};
use crate::host::Host;
use crate::streams::Stream;

/// Runs `flynn-host volume …` with such an input; gives whether it went well, and its output as bytes.
pub(super) fn piped(args: &[&str], input: &[u8]) -> (bool, Vec<u8>) {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .arg("volume")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // Whoever has seen enough does not read on.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let ok = output.status.success();
    (ok, if ok { output.stdout } else { output.stderr })
}

pub(crate) async fn snapshots_are_sent_and_received() {
    let host = Host::boot().await;
    let pool = Btrfs::of(&host).await;
    // Stands for another host's.
    let other = Btrfs::provide(&host, "other").await;
    host.api
        .create_volume("fast", &new("one", Some(64 * MIB)))
        .await
        .unwrap();
    let data = pool.data("one");
    let noise: Vec<u8> = (0..3 * MIB)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    fs::write(data.join("noise"), &noise).unwrap();
    fs::create_dir(data.join("dir")).unwrap();
    std::os::unix::fs::symlink("../noise", data.join("dir/link")).unwrap();
    host.api.snapshot_volume("one", &copy("first")).await.unwrap();
    fs::write(data.join("more"), "more").unwrap();
    fs::remove_file(data.join("dir/link")).unwrap();
    host.api.snapshot_volume("one", &copy("second")).await.unwrap();

    let (ok, error) = piped(&["send", "one"], b"");
    assert!(!ok && String::from_utf8_lossy(&error).contains("make a snapshot"));
    let (ok, first) = piped(&["send", "first"], b"");
    assert!(ok && first.len() > noise.len());
    let (ok, second) = piped(&["send", "second", "--from", "first"], b"");
    assert!(ok && second.len() < 64 << 10, "{}", second.len());

    // Both are here under these ids: as on another host, they are not.
    for id in ["first", "second", "one"] {
        host.api.delete_volume(id).await.unwrap();
    }
    let refused = |input: &[u8], wanted: &str| {
        let (ok, error) = piped(&["receive", "--provider", "other"], input);
        let error = String::from_utf8_lossy(&error).into_owned();
        assert!(!ok && error.contains(wanted), "{error}");
        other.is_empty();
    };
    refused(&second, "send that first");
    refused(&first[..first.len() - 40], "cut short");
    refused(&first[..100_000], "cut short");
    refused(b"something else", "no snapshot");
    let mut damaged = first.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    refused(&damaged, "");
    let (ok, text) = piped(&["receive"], &second);
    assert!(!ok && String::from_utf8_lossy(&text).contains("on btrfs"));

    for (input, id) in [(&first, "first"), (&second, "second")] {
        let (ok, text) = piped(&["receive", "--provider", "other"], input);
        assert!(
            ok && text == format!("{id}\n").into_bytes(),
            "{}",
            String::from_utf8_lossy(&text)
        );
    }
    assert!(fs::read(other.data("first").join("noise")).unwrap() == noise);
    assert_eq!(
        fs::read_to_string(other.data("second").join("more")).unwrap(),
        "more"
    );
    assert!(!other.data("second").join("dir/link").exists() && !other.data("first").join("more").exists());
    let volume = host.api.volume("second").await.unwrap();
    assert_eq!(
        (volume.kind, volume.source.as_deref(), volume.limit),
        (VolumeType::Snapshot, Some("one"), Some(64 * MIB))
    );
    assert!(fs::write(other.data("second").join("more"), "x").is_err());
    host.api.fork_volume("second", &copy("one")).await.unwrap();
    assert_eq!(
        output(
            &host,
            "one",
            "cat /data/more; echo; echo mine > /data/more; cat /data/more"
        )
        .await,
        ["more", "mine"]
    );
}

pub(crate) async fn streams_write_nowhere_else() {
    let host = Host::boot().await;
    let pool = Btrfs::of(&host).await;
    host.api.create_volume("fast", &new("one", None)).await.unwrap();
    let outside = host.state.with_file_name("outside");
    fs::create_dir(&outside).unwrap();
    let receive = |stream: Stream| piped(&["receive", "--provider", "fast"], &stream.sent_as("sent"));
    // It is a stream like any other where it does no harm.
    let (ok, text) = receive(Stream::new().file("file").link("link", &outside));
    assert!(ok, "{}", String::from_utf8_lossy(&text));
    assert_eq!(
        fs::read_to_string(pool.data("sent").join("file")).unwrap(),
        "written"
    );
    assert!(fs::write(pool.data("sent").join("file"), "x").is_err());
    host.api.delete_volume("sent").await.unwrap();
    for (stream, why) in [
        (
            Stream::new().link("link", &outside).file("link/file"),
            "Read-only",
        ),
        (
            Stream::new().link("link", &pool.0).file("link/one/data/file"),
            "Read-only",
        ),
        (Stream::new().file("../../one/data/file"), ""),
        // Whoever could open a device could write to a disk.
        (
            Stream::new().device("null", 1, 3).write("null"),
            "Permission denied",
        ),
        // Beside the one that becomes the volume.
        (Stream::new().file("../file"), ""),
    ] {
        let (ok, text) = receive(stream);
        let text = String::from_utf8_lossy(&text);
        assert!(!ok && text.contains(why), "{text}");
    }
    assert!(fs::read_dir(&outside).unwrap().next().is_none());
    assert!(fs::read_dir(pool.data("one")).unwrap().next().is_none());
    host.api.delete_volume("one").await.unwrap();
    pool.is_empty();
}
