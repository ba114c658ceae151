//! What the platform's TCP connections are set to.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// How long a connection may be idle before the other side is asked whether it is still there.
const IDLE: Duration = Duration::from_secs(30);
/// Between such questions.
const INTERVAL: Duration = Duration::from_secs(10);
/// Questions without an answer, after which the connection is given up.
const QUESTIONS: u32 = 3;

/// Has small pieces sent at once, and [`keep_alive`]: both ends of what the platform's APIs are called by.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    keep_alive(stream)
}

/// Notices within a minute that the other side's host has gone without a word: an attached terminal, a download, a tunnel or a
/// server waiting for its client would wait for ever. What a listener is set to, the connections that it accepts are.
///
/// Where bytes wait to be acknowledged, the kernel gives up by itself, after a quarter of an hour. `TCP_USER_TIMEOUT`
/// would be sooner, but also end peers that are there and only do not read for a while.
pub fn keep_alive(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, IDLE)?;
    sockopt::set_tcp_keepintvl(socket, INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, QUESTIONS)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_host_that_has_gone_is_noticed_within_a_minute() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        tune(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap() && stream.nodelay().unwrap());
        let patience = sockopt::tcp_keepidle(&stream).unwrap()
            + sockopt::tcp_keepintvl(&stream).unwrap() * sockopt::tcp_keepcnt(&stream).unwrap();
        assert!(patience <= Duration::from_mins(1), "{patience:?}");
    }
}
