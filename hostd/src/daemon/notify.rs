//! What systemd is told, where it is what has started this daemon (`sd_notify(3)`).

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Where it listens.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Whether it is what has started this daemon, or the one before.
pub(super) fn is_there() -> bool {
    std::env::var_os(SOCKET).is_some()
}

/// This process is the daemon, and serves.
pub(super) fn ready() {
    tell(&format!("READY=1\nMAINPID={}\n", std::process::id()));
}

/// This daemon ends, and no other follows.
pub(super) fn stopping() {
    tell("STOPPING=1\n");
}

fn tell(state: &str) {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let told = || -> io::Result<()> {
        let address = match socket.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&socket)?,
        };
        UnixDatagram::unbound()?
            .send_to_addr(state.as_bytes(), &address)
            .map(drop)
    };
    if let Err(error) = told() {
        tracing::warn!(%error, "systemd cannot be told how the daemon does");
    }
}
