//! Sockets in a job's network.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::status::ProcessId;

/// How long one address may take: they are all on this host.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects to a port in the network of a process: on its loopback device, else at its own address.
pub(super) async fn connect(
    process: ProcessId,
    address: Option<Ipv4Addr>,
    port: u16,
) -> io::Result<TcpStream> {
    let namespace = File::open(format!("/proc/{}/ns/net", process.pid))?;
    // Had it gone before the file was opened, this might be another's.
    if !process.is_alive() {
        return Err(io::Error::other("the job's supervisor is gone"));
    }
    let candidates = [
        Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        address.map(IpAddr::V4),
        Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ];
    let (sender, receiver) = oneshot::channel();
    // A socket stays where it was made. None of the runtime's threads may ever be in a network that is not the host's.
    thread::Builder::new().name("forward".into()).spawn(move || {
        let connect = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let mut refused = io::Error::from(io::ErrorKind::ConnectionRefused);
            for address in candidates.into_iter().flatten() {
                match StdTcpStream::connect_timeout(&SocketAddr::new(address, port), PATIENCE) {
                    Ok(stream) => return Ok(stream),
                    // A network without IPv6 has nothing to say about a port.
                    Err(error) if address.is_ipv6() && error.kind() != io::ErrorKind::ConnectionRefused => {}
                    Err(error) => refused = error,
                }
            }
            Err(refused)
        };
        // Nobody waits any more when the caller has gone.
        let _ = sender.send(connect());
    })?;
    let stream = receiver
        .await
        .map_err(|_| io::Error::other("the thread that enters the job's network died"))??;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    TcpStream::from_std(stream)
}
