//! A packet that came through the tunnel.

use flynn_abi::DropReason;

use crate::Decision;

/// A host that is alone has no peers: whoever sends to its tunnel's port is a stranger.
#[inline(always)]
pub(crate) fn decide() -> Decision {
    Err(DropReason::UnknownHost)
}
