//! Carries connections from the machine's loopback to hosts.
//!
//! Its listeners are the machine's, for they were made before it went over to the switch's network namespace; what it
//! connects with is the switch's.

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a host has to take a connection before the next one is asked.
const PATIENCE: Duration = Duration::from_secs(2);

/// One forward.
#[derive(Serialize, Deserialize)]
pub(crate) struct ForwardPlan {
    /// Where to listen, on the machine.
    pub(crate) listen: SocketAddr,
    /// Where to connect, in the order of preference.
    pub(crate) to: Vec<SocketAddr>,
    /// The switch's network namespace.
    pub(crate) namespace: PathBuf,
}

pub(super) fn main() -> Result<i32> {
    let plan: ForwardPlan = super::plan()?;
    super::die_with_parent()?;
    let listener = TcpListener::bind(plan.listen).with_context(|| {
        format!(
            "cannot listen on {}; something else does, or choose another port",
            plan.listen
        )
    })?;
    listener.set_nonblocking(true)?;
    let namespace = File::open(&plan.namespace).context("cannot open the switch's namespace")?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("cannot enter the switch")?;
    println!("{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    // One thread, as the namespace is this thread's.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(listener, plan.to.leak()))
}

async fn serve(listener: TcpListener, to: &'static [SocketAddr]) -> Result<i32> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(carry(client, to));
            }
            // Too many open files, most likely: some will close.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Connects to the first host that takes it. When none does, the client's connection is closed, as it would be by a
/// machine on which nothing listens.
async fn carry(mut client: TcpStream, to: &[SocketAddr]) {
    for address in to {
        if let Ok(Ok(mut host)) = tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await {
            let _ = client.set_nodelay(true);
            let _ = host.set_nodelay(true);
            // Either side may go at any time; that is what connections do.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut host).await;
            return;
        }
    }
}
