//! Who may do what at which door.
//!
//! There are two: the cluster listener, where callers show a certificate, and the gateway listener, plain, which only
//! this host and its containers reach. One pure function decides; every handler asks it.

use std::net::{IpAddr, Ipv4Addr};

use flynn_api::discovery::{CA_SERVICE, FLOATING_SERVICE, HOST_SERVICE};
use flynn_api::network::{ENDPOINTS_PREFIX, IDENTITIES_SERVICE, POLICY_SERVICE};
use flynn_api::server::Peer;
use flynn_api::tls::PeerIdentity;
use flynn_api::{Error, ErrorCode};

use crate::gateway::Subnet;

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The cluster listener.
    Cluster,
    /// The gateway listener.
    Gateway {
        /// This host's containers.
        subnet: Subnet,
        /// This host's own address.
        host: Ipv4Addr,
    },
}

/// What a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// See whether discoverd is there.
    Status,
    /// Join with a token.
    Join,
    /// Call as one member to another.
    Raft,
    /// Make a token.
    MakeToken,
    /// Take a copy of everything, or use another last resort.
    Recover,
    /// Have the certificate authority take another root.
    RotateCa,
    /// Have the own certificate renewed.
    Renew,
    /// See the members.
    ReadMembers,
    /// Change the members.
    ChangeMembers,
    /// Read a service, or all names (the empty service).
    Read(&'a str),
    /// Make a service.
    CreateService(&'a str),
    /// Remove a service.
    DeleteService(&'a str),
    /// Change a service's metadata or leader.
    Govern(&'a str),
    /// Register or deregister an instance at these addresses (the new one's and the present one's).
    Register(&'a str, &'a [IpAddr]),
}

impl Door {
    /// Whether `peer` may do `action` here.
    pub fn check(&self, peer: &Peer, action: &Action<'_>) -> Result<(), Error> {
        match self {
            Self::Cluster => at_cluster(peer.identity.as_ref(), action),
            Self::Gateway { subnet, host } => {
                let caller = peer.addr.map(|addr| addr.ip().to_canonical());
                at_gateway(caller, *subnet, *host, action)
            }
        }
    }
}

fn at_cluster(identity: Option<&PeerIdentity>, action: &Action<'_>) -> Result<(), Error> {
    if matches!(action, Action::Status | Action::Join) {
        return Ok(());
    }
    let Some(identity) = identity else {
        let message = "this call needs a certificate of the cluster: use mutual TLS";
        return Err(Error::new(ErrorCode::Unauthorized, message));
    };
    let of_cluster = identity.is_host() || identity.is_job("discoverd");
    // Who may speak to whom follows from the apps' labels, which the scheduler reads.
    let decides = |service: &str| service == POLICY_SERVICE && identity.is_job("scheduler");
    let allowed = match action {
        Action::MakeToken | Action::Recover | Action::RotateCa => identity.is_host(),
        Action::Raft | Action::ChangeMembers => of_cluster,
        Action::Read(service) if is_secret(service) => of_cluster,
        Action::CreateService(service) | Action::Govern(service) if decides(service) => true,
        Action::CreateService(service)
        | Action::DeleteService(service)
        | Action::Govern(service)
        | Action::Register(service, _) => of_cluster || !is_of_platform(service),
        Action::Status | Action::Join | Action::Renew | Action::ReadMembers | Action::Read(_) => true,
    };
    if allowed {
        Ok(())
    } else {
        forbidden(&format!("{identity} may not do this; a host's certificate may"))
    }
}

fn at_gateway(
    caller: Option<IpAddr>,
    subnet: Subnet,
    host: Ipv4Addr,
    action: &Action<'_>,
) -> Result<(), Error> {
    match action {
        Action::Status | Action::ReadMembers => Ok(()),
        Action::Read(service) if !is_secret(service) => Ok(()),
        Action::CreateService(service) if !is_of_platform(service) => Ok(()),
        Action::Register(service, addrs) if !is_of_platform(service) => {
            let from_host = caller == Some(IpAddr::V4(host)) || caller == Some(IpAddr::V4(subnet.gateway()));
            let may = |addr: &IpAddr| match addr {
                // The host registers for itself and for its containers.
                IpAddr::V4(addr) if from_host => *addr == host || subnet.contains(*addr),
                addr => caller == Some(*addr),
            };
            if addrs.iter().all(may) {
                return Ok(());
            }
            forbidden("a job may register its own address alone: use $EXTERNAL_IP, and the protocol's own id")
        }
        _ => forbidden(
            "this is not possible at the gateway address: use the cluster listener with a certificate",
        ),
    }
}

/// Services that hold the platform together: nobody but hosts and discoverd changes them.
fn is_of_platform(service: &str) -> bool {
    is_secret(service)
        || [HOST_SERVICE, IDENTITIES_SERVICE, POLICY_SERVICE].contains(&service)
        || service.starts_with(ENDPOINTS_PREFIX)
}

/// Services whose metadata holds keys: nobody but hosts and discoverd reads them.
fn is_secret(service: &str) -> bool {
    service == CA_SERVICE || service == FLOATING_SERVICE
}

fn forbidden(why: &str) -> Result<(), Error> {
    Err(Error::new(ErrorCode::Forbidden, why))
}
