//! Bytes both ways: connections that have changed their protocol, and TCP routes.

use std::io;
use std::sync::Arc;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};

use crate::backend::InFlight;
use crate::router::Router;
use crate::slots::Slot;

/// The buffer of each direction.
const BUFFER: usize = 16 << 10;

/// Carries bytes between both sides of an upgrade until one of them is done or the router has drained; what is held is
/// held as long.
pub fn start(router: &Arc<Router>, client: OnUpgrade, backend: OnUpgrade, held: (InFlight, Slot)) {
    let stop = router.stop.clone();
    let busy = router.metrics.tunnel();
    router.tasks.spawn(async move {
        let _counted = (busy, held);
        let carry = async {
            let (client, backend) = tokio::try_join!(client, backend).map_err(io::Error::other)?;
            carry(TokioIo::new(client), TokioIo::new(backend)).await
        };
        tokio::select! {
            result = carry => if let Err(error) = result {
                tracing::debug!(%error, "a tunnel broke off");
            },
            () = stop.cancelled() => {}
        }
    });
}

/// Carries bytes both ways until both sides have ended.
pub async fn carry(
    mut client: impl AsyncRead + AsyncWrite + Unpin,
    mut backend: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut client, &mut backend, BUFFER, BUFFER)
        .await
        .map(drop)
}
