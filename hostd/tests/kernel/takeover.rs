//! A daemon that takes over from one that dies at the last moment; that one is played here.

use std::fs::{self, File};
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Child;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use serde_json::{Value, json};

use crate::host::{BINARY, Host};

/// What a daemon hands over.
struct Predecessor {
    locks: [File; 2],
    unix: UnixListener,
}

impl Predecessor {
    fn of(host: &Host) -> Self {
        let _ = fs::remove_file(flynn_api::host::SOCKET);
        Self {
            locks: [
                File::create(host.state.join("lock")).unwrap(),
                File::create("/run/flynn/lock").unwrap(),
            ],
            unix: UnixListener::bind(flynn_api::host::SOCKET).unwrap(),
        }
    }

    /// Hands it over to a daemon that it starts, and is gone with the last word.
    fn hand_over_and_die(self, host: &Host, notify: Option<&Path>) -> Child {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut command = host.command(Path::new(BINARY));
        command.arg("--takeover").stdin(theirs);
        if let Some(socket) = notify {
            command.env("NOTIFY_SOCKET", socket);
        }
        let successor = command.spawn().unwrap();
        // It has its end; with this one's copy the other one's would not be seen.
        drop(command);
        let mut ours = Packets(ours.into());
        let hello = ours.hear();
        assert_eq!(hello["say"], "hello", "{hello}");
        let offer = json!({
            "say": "offer",
            "version": "0",
            "descriptors": ["lock of the state", "lock of the host", "unix"],
        });
        let [state, run] = &self.locks;
        ours.say(&offer, &[state.as_fd(), run.as_fd(), self.unix.as_fd()]);
        assert_eq!(ours.hear(), json!({"say": "prepared"}));
        ours.say(&json!({"say": "commit"}), &[]);
        successor
    }
}

/// An end of the pair.
struct Packets(File);

impl Packets {
    fn hear(&mut self) -> Value {
        let mut packet = vec![0; 16 << 10];
        let length = self.0.read(&mut packet).unwrap();
        serde_json::from_slice(&packet[..length]).unwrap()
    }

    fn say(&self, message: &Value, descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let text = message.to_string();
        let text = [IoSlice::new(text.as_bytes())];
        sendmsg(&self.0, &text, &mut ancillary, SendFlags::empty()).unwrap();
    }
}

/// systemd starts one in place of the one that has died: who has taken over leaves, for it would be in that one's way.
pub(crate) async fn nobody_is_in_the_way_of_systemd_s_next() {
    let host = Host::boot().await;
    let job = host.job("sleep 1000");
    let before = host.run(&job).await;
    host.kill_daemon();
    let notify = host.state.join("notify");
    let systemd = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    systemd.set_nonblocking(true).unwrap();
    let mut successor = Predecessor::of(&host).hand_over_and_die(&host, Some(&notify));
    let ended = host.until(async || successor.try_wait().unwrap());
    let ended = ended.await.unwrap_or_else(|| panic!("{}", host.log()));
    assert!(
        !ended.success() && host.log().contains("systemd starts one"),
        "{ended}: {}",
        host.log()
    );
    assert!(
        systemd.recv(&mut [0; 256]).is_err(),
        "it said that it is the daemon"
    );
    host.start().await;
    assert_eq!(host.api.job(&job.id).await.unwrap().pid, before.pid);
    host.kill_daemon();

    // Where nobody starts another, it is the daemon.
    let mut successor = Predecessor::of(&host).hand_over_and_die(&host, None);
    let answered = host.until(async || host.api.job(&job.id).await.ok());
    let answered = answered.await.unwrap_or_else(|| panic!("{}", host.log()));
    assert_eq!(answered.pid, before.pid);
    successor.kill().unwrap();
    successor.wait().unwrap();
    host.start().await;
}
