//! The certificate authority: how it is, another root, and hosts whose certificate has run out.

use axum::Extension;
use axum::extract::State;
use flynn_api::discovery::{CaStatus, HOST_SERVICE, LateRequest, NetworkLeases, SignedIdentity};
use flynn_api::server::{Json, Peer, StrictJson};
use flynn_api::tls::{self, PeerIdentity};
use flynn_api::{Error, ErrorCode};
use jiff::{SignedDuration, Timestamp};

use super::auth::{Action, Door};
use super::cluster::{MAX_CSR, sign, signed};
use crate::ca::{self, rotation};
use crate::node::Node;

type App = State<(Node, Door)>;
type From = Extension<Peer>;

pub(super) async fn show(State((node, door)): App, Extension(peer): From) -> Result<Json<CaStatus>, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    shown(&node)
}

fn shown(node: &Node) -> Result<Json<CaStatus>, Error> {
    let none = || Error::not_found("cluster CA", "here: bootstrap has not come that far");
    ca::status(node)?.map(Json).ok_or_else(none)
}

pub(super) async fn rotate(State((node, door)): App, Extension(peer): From) -> Result<Json<CaStatus>, Error> {
    door.check(&peer, &Action::RotateCa)?;
    ca::request(&node).await?;
    shown(&node)
}

/// Signs anew for a host whose certificate has run out. The key is what it was known by all along, so that this tells
/// no more about a caller than a renewal in time; a host that was removed has no lease, and one in whose place there is another
/// machine has its lease no more: both are refused.
pub(super) async fn renew_late(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(request): StrictJson<LateRequest>,
) -> Result<Json<SignedIdentity>, Error> {
    door.check(&peer, &Action::Join)?;
    let refused = |why: String| Error::new(ErrorCode::Unauthorized, format!("{why}. {ANEW}"));
    if request.cert.len() > MAX_CSR {
        return Err(Error::invalid_field("cert", "it is longer than 16 KiB"));
    }
    let (_, ca) = ca::current(&node).await?;
    let retired = ca.retired.iter().map(|retired| retired.root.cert.as_str());
    let known: String = std::iter::once(ca.cert.as_str()).chain(retired).collect();
    let late = tls::late(&request.cert, &request.csr, &known)
        .map_err(|why| refused(format!("this certificate proves nothing ({why})")))?;
    let (identity, ended) = (late.identity, late.ended);
    let PeerIdentity::Host(id) = &identity else {
        return Err(refused(format!("{identity} is no host")));
    };
    if Timestamp::now().duration_since(ended) > SignedDuration::from_hours(24 * rotation::LATE) {
        return Err(refused(format!(
            "the certificate of {id} ran out on {ended}, too long ago"
        )));
    }
    let leases: NetworkLeases = ca::metadata(&node, HOST_SERVICE).unwrap_or_default();
    let Some(lease) = leases.leases.get(id) else {
        return Err(refused(format!("the cluster has no host {id}: it was removed")));
    };
    if !late.addresses.contains(&lease.address.into()) {
        return Err(refused(format!("the host {id} is another machine by now")));
    }
    let cert = sign(&ca, &request.csr, &identity, &[lease.address.to_string()])?;
    tracing::info!(host = id, %ended, "a host is back whose certificate had run out");
    Ok(Json(signed(&node, &ca, cert)))
}

const ANEW: &str = "Join anew: run `flynn-host token` on a host of the cluster, and here what it prints";
