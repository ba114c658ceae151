//! Ports of a job on this machine: each connection to a local port becomes one to the job's.

use std::io;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;

use super::Upgraded;
use crate::Result;

/// A local port and the job's that it leads to, written `LOCAL:REMOTE`, or `PORT` where they are the same. Local port 0
/// is any that is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Here.
    pub local: u16,
    /// At the job.
    pub remote: NonZeroU16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (local, remote) = text.split_once(':').unwrap_or((text, text));
        let wanted =
            || format!("{text:?} is no pair of ports: PORT or LOCAL:REMOTE is wanted, as in 8080:80");
        Ok(Self {
            local: local.parse().map_err(|_| wanted())?,
            remote: remote.parse().map_err(|_| wanted())?,
        })
    }
}

/// Serves a listener until it fails: `connect` is called for each connection, and `failed` hears why one could not be made.
/// One that fails harms no other.
pub async fn serve<C, F>(
    listener: TcpListener,
    connect: C,
    failed: impl Fn(&crate::Error) + Send + Sync + 'static,
) -> io::Result<()>
where
    C: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Result<Upgraded>> + Send,
{
    let shared = Arc::new((connect, failed));
    loop {
        let (mut local, _) = listener.accept().await?;
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let (connect, failed) = &*shared;
            match connect().await {
                // A connection that is cut ends the other one: there is nothing more to say.
                Ok(mut remote) => drop(copy_bidirectional(&mut local, &mut remote).await),
                Err(error) => failed(&error),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_or_two() {
        let ports = |text: &str| {
            text.parse::<Ports>()
                .ok()
                .map(|ports| (ports.local, ports.remote.get()))
        };
        assert_eq!(ports("5432"), Some((5432, 5432)));
        assert_eq!(ports("8080:80"), Some((8080, 80)));
        assert_eq!(ports("0:80"), Some((0, 80)));
        for wrong in ["", ":", "0", "80:0", "80:", ":80", "1:2:3", "65536", "-1", "http"] {
            assert_eq!(ports(wrong), None, "{wrong:?}");
        }
    }
}
