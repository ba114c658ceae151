//! Members, join tokens and certificates.

use std::time::Duration;

use axum::Extension;
use axum::extract::{Path, State};
use flynn_api::discovery::{
    self, ClusterCa, HOST_SERVICE, JoinRequest, JoinToken, MemberStatus, NetworkLeases, OwnStatus,
    RenewRequest, SignedIdentity, Voting,
};
use flynn_api::server::{Json, Peer, StrictJson};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Digest, Error, ErrorCode};

use super::auth::{Action, Door};
use super::input;
use crate::ca;
use crate::command::Command;
use crate::members::{self, MemberChange};
use crate::node::{Node, wall_clock};

/// How long a join token is good for.
const TOKEN_LIFE: Duration = Duration::from_hours(1);
/// The longest signing request.
pub(super) const MAX_CSR: usize = 16 << 10;

type App = State<(Node, Door)>;
type From = Extension<Peer>;

pub(super) async fn peers(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<Vec<discovery::Peer>>, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    Ok(Json(node.peers()))
}

pub(super) async fn leader(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<discovery::Peer>, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    let leader = node.peers().into_iter().find(|peer| peer.leader);
    leader
        .map(Json)
        .ok_or_else(|| Error::unavailable("discoverd has no leader at present"))
}

pub(super) async fn members(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<Vec<MemberStatus>>, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    Ok(Json(members::status(&node).await))
}

pub(super) async fn own_status(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<OwnStatus>, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    Ok(Json(node.own_status()))
}

pub(super) async fn set_vote(
    State((node, door)): App,
    Extension(from): From,
    Path(peer): Path<String>,
    Json(vote): Json<Voting>,
) -> Result<(), Error> {
    door.check(&from, &Action::ChangeMembers)?;
    members::change(&node, &MemberChange::Vote { peer, vote }).await
}

pub(super) async fn remove(
    State((node, door)): App,
    Extension(from): From,
    Path(peer): Path<String>,
) -> Result<(), Error> {
    door.check(&from, &Action::ChangeMembers)?;
    members::change(&node, &MemberChange::Remove { peer }).await
}

pub(super) async fn make_token(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<JoinToken>, Error> {
    door.check(&peer, &Action::MakeToken)?;
    let (_, ca) = ca::current(&node).await?;
    let fingerprint = ca::known_by(&node, &ca)?;
    let (high, low): (u128, u128) = rand::random();
    let secret = format!("{high:032x}{low:032x}");
    let now = wall_clock();
    let expires = now + u64::try_from(TOKEN_LIFE.as_millis()).unwrap_or(u64::MAX);
    node.write(Command::AddToken {
        digest: digest(&secret),
        now,
        expires,
    })
    .await?;
    Ok(Json(JoinToken {
        token: format!("{secret}.{fingerprint}"),
    }))
}

pub(super) async fn join(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(request): StrictJson<JoinRequest>,
) -> Result<Json<SignedIdentity>, Error> {
    door.check(&peer, &Action::Join)?;
    check_host_id(&request.host_id)?;
    let (_, ca) = ca::current(&node).await?;
    if let Some(other) = lease_address(&node, &request.host_id).filter(|address| *address != request.address)
    {
        let message = format!(
            "the cluster has a host {} at {other} already: choose another id, or remove that host first",
            request.host_id
        );
        return Err(Error::conflict(message));
    }
    let secret = digest(&request.secret);
    // The state is fresh by now: what can be told to be in vain is not written.
    node.view.read(|state| state.knows_token(&secret, wall_clock()))?;
    let identity = PeerIdentity::Host(request.host_id.clone());
    let cert = sign(&ca, &request.csr, &identity, &[request.address.to_string()])?;
    // The token is used up last: a request that cannot be signed does not cost one.
    let asked = format!("{} {} {}", request.host_id, request.address, request.csr);
    let command = Command::UseToken {
        digest: secret,
        request: digest(&asked),
        now: wall_clock(),
    };
    node.write(command).await?;
    tracing::info!(host = request.host_id, address = %request.address, "a host has joined");
    Ok(Json(signed(&node, &ca, cert)))
}

pub(super) async fn renew(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(request): StrictJson<RenewRequest>,
) -> Result<Json<SignedIdentity>, Error> {
    door.check(&peer, &Action::Renew)?;
    let nobody = || {
        Error::new(
            ErrorCode::Unauthorized,
            "a renewal needs the certificate that is renewed",
        )
    };
    let caller = peer.identity.ok_or_else(nobody)?;
    // After this the state is fresh.
    let (_, ca) = ca::current(&node).await?;
    let address = peer.addr.map(|addr| addr.ip().to_canonical().to_string());
    let address = match &caller {
        PeerIdentity::Host(id) => {
            let leases = ca::metadata::<NetworkLeases>(&node, HOST_SERVICE)
                .unwrap_or_default()
                .leases;
            let leased = leases.get(id).map(|lease| lease.address.to_string());
            // Bootstrap asks before there is any.
            if leased.is_none() && !leases.is_empty() {
                let message = format!("the cluster has no host {id}: it was removed");
                return Err(Error::new(ErrorCode::Forbidden, message));
            }
            leased.or(address)
        }
        PeerIdentity::Job(_) => address,
    };
    let identity = match (caller, request.job) {
        (caller, None) => caller,
        (PeerIdentity::Host(_), Some(app)) => {
            input::service(&app)?;
            PeerIdentity::Job(app)
        }
        (PeerIdentity::Job(_), Some(_)) => {
            let message = "only a host may ask for a certificate of another: leave job out to renew your own";
            return Err(Error::new(ErrorCode::Forbidden, message));
        }
    };
    let mut names: Vec<String> = address.into_iter().collect();
    if let PeerIdentity::Job(app) = &identity {
        names.extend([format!("{app}.discoverd"), format!("leader.{app}.discoverd")]);
    }
    let cert = sign(&ca, &request.csr, &identity, &names)?;
    Ok(Json(signed(&node, &ca, cert)))
}

/// A certificate for the request's key, and what goes along with it.
pub(super) fn sign(
    ca: &ClusterCa,
    csr: &str,
    identity: &PeerIdentity,
    names: &[String],
) -> Result<String, Error> {
    if csr.len() > MAX_CSR {
        return Err(Error::invalid_field("csr", "it is longer than 16 KiB"));
    }
    let cert = ca::signer(ca)?.sign(csr, identity, names).map_err(|why| {
        Error::invalid_field(
            "csr",
            format!("it cannot be signed ({why}): send a PKCS #10 request as PEM"),
        )
    })?;
    Ok(cert + &ca.links())
}

pub(super) fn signed(node: &Node, ca: &ClusterCa, cert: String) -> SignedIdentity {
    let peers = node.peers().into_iter().map(|peer| peer.addr).collect();
    SignedIdentity {
        ca: ca.cert.clone(),
        cert,
        peers,
    }
}

fn digest(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string()
}

fn check_host_id(id: &str) -> Result<(), Error> {
    let fits = (1..=63).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if fits {
        Ok(())
    } else {
        Err(Error::invalid_field(
            "host_id",
            "an id has 1 to 63 letters, digits and underscores",
        ))
    }
}

fn lease_address(node: &Node, host: &str) -> Option<std::net::Ipv4Addr> {
    ca::metadata::<NetworkLeases>(node, HOST_SERVICE)?
        .leases
        .get(host)
        .map(|lease| lease.address)
}
