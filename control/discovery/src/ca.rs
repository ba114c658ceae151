//! The cluster's certificate authority: who signs, who is trusted, and how the one changes without the other being missed.
//!
//! The authority is the metadata of the service `flynn-ca` ([`ClusterCa`]), its key included; the instances of that
//! service are what hosts say that they hold ([`Held`]). Any member signs. The leader takes the steps of a change of roots
//! ([`rotation`]), one by one, each a compare-and-swap of the metadata: whoever leads next goes on from there.

pub mod rotation;

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::discovery::{
    CA_SERVICE, CaStatus, ClusterCa, Consistency, HOST_SERVICE, Held, NetworkLeases, RootStatus,
    RotationStatus, ServiceMeta,
};
use flynn_api::tls::{self, Ca, Identity};
use flynn_api::{Digest, Error, ErrorCode};
use jiff::Timestamp;
use serde::de::DeserializeOwned;

use self::rotation::{Next, Standing, Step};
use crate::command::{Command, Outcome};
use crate::node::{Forwarded, Node};
use crate::state::State;

/// How long a step is let sink in, unless [`crate::raft::Timing`] says otherwise.
pub const SETTLE: Duration = Duration::from_secs(30);

/// What a service's metadata holds here, if it can be read as `T`.
pub(crate) fn metadata<T: DeserializeOwned>(node: &Node, service: &str) -> Option<T> {
    node.view
        .read(|state| T::deserialize(&state.service(service)?.meta.as_ref()?.data).ok())
}

/// The authority as it is known here, and the index of that. An earlier release's has no facts beside it: they are read.
fn stored(node: &Node) -> Result<Option<(u64, ClusterCa)>, Error> {
    let read = |state: &State| {
        let meta = state.service(CA_SERVICE)?.meta.as_ref()?;
        Some((
            meta.index,
            <ClusterCa as serde::Deserialize>::deserialize(&meta.data),
        ))
    };
    let Some((index, ca)) = node.view.read(read) else {
        return Ok(None);
    };
    let mut ca = ca.map_err(|why| fault(&why))?;
    if ca.roots.is_empty() {
        ca.roots = tls::roots(&ca.cert).map_err(|why| fault(&why))?;
    }
    Ok(Some((index, ca)))
}

/// The authority as it is now, wherever the leader is.
pub async fn current(node: &Node) -> Result<(u64, ClusterCa), Error> {
    node.ready_for(Consistency::Linearizable).await?;
    let none = || Error::unavailable("the cluster has no CA yet: bootstrap has not come that far");
    stored(node)?.ok_or_else(none)
}

/// Who signs.
pub fn signer(ca: &ClusterCa) -> Result<Ca, Error> {
    Ca::from_pem(&*ca.cert, &*ca.key).map_err(|why| fault(&why))
}

/// By which root a host that joins here can know that it speaks to this cluster: the one that this member's own
/// certificate is of.
pub fn known_by(node: &Node, ca: &ClusterCa) -> Result<Digest, Error> {
    let held = node.dialer().identity().identity.held().unwrap_or_default();
    let own = ca
        .roots
        .iter()
        .find(|root| held.holds.contains(&root.fingerprint));
    let root = own.or(ca.roots.first()).ok_or_else(|| fault(&"it has no root"))?;
    Ok(root.fingerprint)
}

fn fault(why: &dyn std::fmt::Display) -> Error {
    Error::internal(format!("the cluster's CA cannot be used: {why}"))
}

/// A certificate for this member itself, if its own has run out: signed with what is on its disk, and for nobody else.
///
/// When all hosts were away for so long, no certificate of any is good for anything, and nobody could be asked for
/// another: without this they would never be a cluster again. A member that has missed a change of roots makes one that
/// nobody takes; its host finds the way back by the others.
pub fn sign_own(node: &Node, names: &[String]) -> Result<Option<Identity>, Error> {
    let in_use = node.dialer().identity();
    let own = in_use.identity.certificate().map_err(|why| fault(&why))?;
    if own.not_after > Timestamp::now() {
        return Ok(None);
    }
    let (Some((_, ca)), Some(name)) = (stored(node)?, in_use.identity.name()) else {
        return Ok(None);
    };
    let issued = signer(&ca)?.issue(&name, names).map_err(|why| fault(&why))?;
    Ok(Some(Identity {
        cert_pem: issued.cert_pem + &ca.links(),
        ca_pem: ca.cert,
        key_pem: issued.key_pem,
    }))
}

/// How the authority is, as far as it is known here; `None` before the cluster has one.
pub fn status(node: &Node) -> Result<Option<CaStatus>, Error> {
    let Some((_, ca)) = stored(node)? else {
        return Ok(None);
    };
    let next = next(node, &ca, Timestamp::now());
    let (waits, until) = match next {
        Next::Wait(waits, until) => (waits, until),
        Next::Rest | Next::Do(_) => (Vec::new(), None),
    };
    let root = |root: &flynn_api::discovery::Root, signs, trusted| RootStatus {
        fingerprint: root.fingerprint,
        not_before: root.not_before,
        not_after: root.not_after,
        signs,
        trusted,
    };
    let trusted = ca
        .roots
        .iter()
        .enumerate()
        .map(|(at, of)| root(of, at == 0, true));
    let retired = ca.retired.iter().map(|retired| &retired.root);
    let retired = retired.filter(|retired| !ca.roots.contains(retired));
    Ok(Some(CaStatus {
        roots: trusted.chain(retired.map(|of| root(of, false, false))).collect(),
        trusted: ca.cert,
        requested: ca.requested,
        rotation: ca.rotation.map(|rotation| RotationStatus {
            stage: rotation.stage,
            since: rotation.since,
            waits,
            until,
        }),
        loaded: node.dialer().identity().identity.loaded(),
    }))
}

/// Has another root taken, unless one is being taken. The leader does it.
pub async fn request(node: &Node) -> Result<(), Error> {
    loop {
        let (index, ca) = current(node).await?;
        if ca.requested || ca.rotation.is_some() {
            return Ok(());
        }
        let ca = ClusterCa {
            requested: true,
            ..ca
        };
        match node.write(write(index, &ca)?).await {
            // The leader, or another call, was faster.
            Err(error) if error.code == ErrorCode::PreconditionFailed => {}
            result => return result.map(drop),
        }
    }
}

/// If this member leads, takes the next step, if there is one. To be called each second.
pub async fn reconcile(node: &Node) -> Result<(), Error> {
    if node.leads().is_none() {
        return Ok(());
    }
    let Some((index, mut ca)) = stored(node)? else {
        return Ok(());
    };
    let now = Timestamp::now();
    let Next::Do(step) = next(node, &ca, now) else {
        return Ok(());
    };
    match step {
        Step::Begin => {
            let (new, link) = signer(&ca)?.successor().map_err(|why| fault(&why))?;
            let root = tls::roots(new.cert_pem()).map_err(|why| fault(&why))?.pop();
            let root = root.ok_or_else(|| fault(&"the new root is empty"))?;
            rotation::begin(&mut ca, root, new.key_pem().to_owned(), link, now);
        }
        Step::Switch => rotation::switch(&mut ca, now),
        Step::Drop => rotation::drop_old(&mut ca),
        Step::Forget => rotation::forget(&mut ca, now),
    }
    let written = node.write_here(&write(index, &ca)?).await?;
    if let Forwarded::Taken(Outcome::Done { .. }) = written {
        let roots: Vec<_> = ca.roots.iter().map(|root| root.fingerprint.to_string()).collect();
        match step {
            Step::Begin => tracing::info!(?roots, "the CA has a new root beside the old one"),
            Step::Switch => tracing::info!(?roots, "the CA's new root signs"),
            Step::Drop => tracing::info!(?roots, "the CA's old root is trusted no more"),
            Step::Forget => tracing::info!("a retired root of the CA is forgotten"),
        }
    }
    Ok(())
}

fn write(index: u64, ca: &ClusterCa) -> Result<Command, Error> {
    Ok(Command::SetMeta {
        service: CA_SERVICE.to_owned(),
        meta: ServiceMeta {
            data: serde_json::to_value(ca).map_err(|why| fault(&why))?,
            index,
            leader_id: None,
        },
        request: 0,
    })
}

fn next(node: &Node, ca: &ClusterCa, now: Timestamp) -> Next {
    // Without a change under way nobody is waited for.
    let hosts = ca.rotation.as_ref().map(|_| hosts(node)).unwrap_or_default();
    rotation::next(ca, &hosts, now, node.ca_settle())
}

/// The cluster's hosts: those with a lease, and those that are there without one yet.
fn hosts(node: &Node) -> BTreeMap<String, Standing> {
    let leases: NetworkLeases = metadata(node, HOST_SERVICE).unwrap_or_default();
    let away = leases.leases.into_keys().map(|id| (id, Standing::Away));
    let mut hosts: BTreeMap<String, Standing> = away.collect();
    node.view.read(|state| {
        let instances = |service| {
            state
                .service(service)
                .into_iter()
                .flat_map(|of| of.instances.values())
        };
        let there = instances(HOST_SERVICE).filter_map(|host| host.meta.get("id"));
        hosts.extend(there.map(|id| (id.clone(), Standing::Silent)));
        for (id, held) in instances(CA_SERVICE).filter_map(|says| Held::of_meta(&says.meta)) {
            match hosts.get_mut(&id) {
                Some(standing @ Standing::Silent) => *standing = Standing::Holds(held),
                // What it said at another address.
                Some(Standing::Holds(before)) => before.join(&held),
                // Nobody knows whether it still holds that.
                Some(Standing::Away) | None => {}
            }
        }
    });
    hosts
}
