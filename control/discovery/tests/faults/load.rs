//! Clients that read and write, and write down what they are told.

use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::ServiceMeta;
use flynn_api::{Error, ErrorCode};
use flynn_linearizability::Action;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use crate::history::Value;
use crate::world::{Phase, World, register};

/// A register as it was seen last.
type Seen = Option<(Value, u64)>;

/// Reads and writes until the load is over. The members are asked in this order, the next when one fails.
pub(crate) async fn client(world: &World, id: u32, members: &[DiscoveryClient]) {
    let mut random = StdRng::seed_from_u64(u64::from(id));
    let mut seen: Vec<Option<Seen>> = vec![None; world.history.registers()];
    let mut at = 0;
    while *world.phase.borrow() == Phase::Load {
        let number = random.random_range(0..seen.len());
        let member = &members[at % members.len()];
        let went_well = match seen[number] {
            Some(known) if random.random_bool(0.6) => {
                let after = swap(world, id, member, number, known).await;
                seen[number] = after.ok().flatten().map(Some);
                after.is_ok()
            }
            _ => {
                let read = read(world, id, member, number).await;
                seen[number] = read.ok();
                read.is_ok()
            }
        };
        let pause = if went_well { 5..60 } else { 50..150 };
        at += usize::from(!went_well);
        tokio::time::sleep(Duration::from_millis(random.random_range(pause))).await;
    }
}

/// Nothing can be said of the register now.
#[derive(Clone, Copy)]
pub(crate) struct Failed;

/// Reads linearizably.
pub(crate) async fn read(
    world: &World,
    id: u32,
    member: &DiscoveryClient,
    number: usize,
) -> Result<Seen, Failed> {
    let pending = world.history.begin(number, id, None);
    match member.find_meta(&register(number)).await {
        Ok(None) => {
            pending.did(Action::Read(None), None);
            Ok(None)
        }
        Ok(Some(meta)) => {
            let Some(value) = meta.data.as_u64() else {
                world.wrong(&format!("key-{number} holds {}", meta.data));
                return Err(Failed);
            };
            pending.did(Action::Read(Some(value)), Some(meta.index));
            Ok(Some((value, meta.index)))
        }
        Err(error) => {
            report(world, &error);
            Err(Failed)
        }
    }
}

/// Writes a new value in the place of what was seen. Gives what is there now, if that is known.
pub(crate) async fn swap(
    world: &World,
    id: u32,
    member: &DiscoveryClient,
    number: usize,
    seen: Seen,
) -> Result<Option<(Value, u64)>, Failed> {
    let to = world.value();
    let from = seen.map(|(value, _)| value);
    let meta = ServiceMeta {
        data: json!(to),
        index: seen.map_or(0, |(_, index)| index),
        leader_id: None,
    };
    let action = Action::Swap { from, to };
    let pending = world.history.begin(number, id, Some(action.clone()));
    match member.set_meta(&register(number), &meta).await {
        Ok(meta) => {
            pending.did(action, Some(meta.index));
            Ok(Some((to, meta.index)))
        }
        Err(error)
            if matches!(
                error.code,
                ErrorCode::PreconditionFailed | ErrorCode::ObjectExists
            ) =>
        {
            pending.did(Action::Refused { from }, None);
            Ok(None)
        }
        Err(error) => {
            report(world, &error);
            // What discoverd says that it has not done, it has not.
            if matches!(error.code, ErrorCode::Unavailable | ErrorCode::LimitExceeded) && !error.may_be_done()
            {
                pending.did_nothing();
            }
            Err(Failed)
        }
    }
}

/// Without a majority, or when the one who is asked is away, calls fail; but not in other ways.
fn report(world: &World, error: &Error) {
    let may = [
        ErrorCode::Unavailable,
        ErrorCode::Timeout,
        ErrorCode::LimitExceeded,
    ];
    if !may.contains(&error.code) {
        world.wrong(&format!("a call failed by {}: {error}", error.code));
    }
}
