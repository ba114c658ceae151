//! Peers that have gone without a word.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

/// How long a connection may be idle before the other side is asked whether it is still there.
const IDLE: Duration = Duration::from_mins(1);
/// Between such questions.
const INTERVAL: Duration = Duration::from_secs(15);
/// Questions without an answer, after which the connection is given up.
const QUESTIONS: u32 = 4;

/// Has an idle connection end two minutes after its peer has vanished: a tunnel or a stream would stay for ever. What a
/// listener is set to, the connections that it accepts are.
///
/// Where bytes wait to be acknowledged, the kernel gives up by itself, after a quarter of an hour. `TCP_USER_TIMEOUT`
/// would be sooner, but also end peers that are there and only do not read for a while.
pub(crate) fn set(socket: impl AsFd) -> io::Result<()> {
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
    use crate::{listen, upstream};

    fn patience(socket: impl AsFd) -> Option<Duration> {
        let socket = socket.as_fd();
        let questions = sockopt::tcp_keepintvl(socket).unwrap() * sockopt::tcp_keepcnt(socket).unwrap();
        let patience = sockopt::tcp_keepidle(socket).unwrap() + questions;
        sockopt::socket_keepalive(socket).unwrap().then_some(patience)
    }

    #[tokio::test]
    async fn clients_and_backends_that_vanish_are_noticed() {
        let listener = listen::on("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr().unwrap();
        let (backend, client) = tokio::join!(upstream::connect(addr), listener.accept());
        let two_minutes = Some(Duration::from_mins(2));
        assert_eq!(patience(&client.unwrap().0), two_minutes);
        assert_eq!(patience(backend.unwrap()), two_minutes);
    }
}
