//! Who may register where the platform's parts find each other.
//!
//! A container registers its own address anywhere, which is how it comes into its app's services. In those of the platform it would get
//! what is meant for the platform: requests with the controller's key, or the scheduler's lead. There the hosts' documents tell whose a
//! container is.

use std::net::IpAddr;

use flynn_api::discovery::PLATFORM_SERVICES;
use flynn_api::network::{HostEndpoints, IDENTITIES_SERVICE, NetworkIdentities, OPERATOR, endpoints_service};
use flynn_api::server::Peer;
use flynn_api::{Error, ErrorCode};

use super::auth::Door;
use crate::ca;
use crate::node::Node;

/// Refuses a container that is none of the platform's, where `service` is.
pub(super) fn check(node: &Node, door: &Door, peer: &Peer, service: &str) -> Result<(), Error> {
    let Door::Gateway { subnet, host } = door else {
        return Ok(());
    };
    let caller = match peer.addr.map(|addr| addr.ip().to_canonical()) {
        Some(IpAddr::V4(caller)) if caller != *host && caller != subnet.gateway() => caller,
        _ => return Ok(()),
    };
    if !PLATFORM_SERVICES.contains(&service) {
        return Ok(());
    }
    let endpoints: HostEndpoints =
        ca::metadata(node, &endpoints_service(&subnet.to_string())).unwrap_or_default();
    let identities: NetworkIdentities = ca::metadata(node, IDENTITIES_SERVICE).unwrap_or_default();
    let Some(identity) = endpoints.identities.get(&caller) else {
        let message =
            format!("it is not known yet whose container has the address {caller}: try again in a moment");
        return Err(Error::unavailable(message));
    };
    let of_platform = identities
        .system
        .iter()
        .any(|app| identities.apps.get(app) == Some(identity));
    if of_platform || *identity == OPERATOR {
        return Ok(());
    }
    let message = format!("{service} is a service of the platform: choose another name");
    Err(Error::new(ErrorCode::Forbidden, message))
}
