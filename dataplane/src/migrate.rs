//! What maps of an older layout hold is carried over to today's.
//!
//! It happens while the older programs still run, over their own maps: today's are filled before the first link is
//! switched, so that no packet meets an empty one, and the older ones go after the last. A process that dies in between
//! leaves both, and the next one does it again. What the older programs count meanwhile is lost.

use std::path::{Path, PathBuf};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use flynn_abi::{Counters, DropReason, Endpoint, Ipv4, Ipv6, v1};
use tracing::{info, warn};

use crate::{
    error::{Error, Refusal, Result},
    maps::Maps,
    pins::Pins,
};

/// Fills the maps from those of the newest older layout, if there are any.
pub(crate) fn carry_over(older: &[(u32, PathBuf)], maps: &mut Maps) -> Result<()> {
    match older.last() {
        None => Ok(()),
        Some((1, old)) => {
            info!(
                from = 1,
                to = flynn_abi::LAYOUT,
                "the eBPF maps have another layout: carrying them over"
            );
            from_1(old, maps)
        }
        Some((layout, _)) => {
            warn!(
                layout,
                "the eBPF maps have a layout that is not known here: beginning with empty ones"
            );
            Ok(())
        }
    }
}

/// Removes the older maps, once no program uses them any more. Those of other parts of the data plane stay for them.
pub(crate) fn remove(older: &[(u32, PathBuf)]) -> Result<()> {
    older
        .iter()
        .try_for_each(|(_, path)| Pins::remove_layout(path, &OVERLAY))
}

/// The overlay's maps, of all layouts.
const OVERLAY: [&str; 13] = [
    "config",
    "endpoints4",
    "endpoints6",
    "local",
    "hosts4",
    "peers",
    "host_addresses",
    "identities",
    "pairs",
    "open_ports",
    "limits",
    "counters",
    "drops",
];

fn from_1(old: &Path, maps: &mut Maps) -> Result<()> {
    let config: Array<_, v1::Config> = open(old, "config", Map::Array)?;
    let endpoints4: HashMap<_, Ipv4, Endpoint> = open(old, "endpoints4", Map::HashMap)?;
    let endpoints6: HashMap<_, Ipv6, Endpoint> = open(old, "endpoints6", Map::HashMap)?;
    let counters: PerCpuArray<_, Counters> = open(old, "counters", Map::PerCpuArray)?;
    let drops: PerCpuArray<_, u64> = open(old, "drops", Map::PerCpuArray)?;
    let failed = |what: &str| Error::kernel(format!("carrying over the eBPF map {what}"));
    let endpoints4 = all(&endpoints4).map_err(failed("endpoints4"))?;
    for (_, endpoint) in &endpoints4 {
        let values = counters.get(&endpoint.slot, 0);
        maps.carry_counters(
            endpoint.slot,
            values.map_err(Refusal::from).map_err(failed("counters"))?,
        )?;
    }
    for reason in DropReason::ALL {
        let values = drops.get(&(*reason as u32), 0);
        maps.carry_drops(*reason, values.map_err(Refusal::from).map_err(failed("drops"))?)?;
    }
    let endpoints6 = all(&endpoints6).map_err(failed("endpoints6"))?;
    maps.carry_endpoints(&endpoints4, &endpoints6)?;
    let config = config
        .get(&0, 0)
        .map_err(Refusal::from)
        .map_err(failed("config"))?;
    maps.carry_config(config.into())
}

fn all<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>) -> Result<Vec<(K, V)>, Refusal> {
    Ok(map.iter().collect::<Result<_, _>>()?)
}

fn open<M>(directory: &Path, name: &str, kind: fn(MapData) -> Map) -> Result<M>
where
    M: TryFrom<Map, Error = MapError>,
{
    let open = || -> Result<M, Refusal> { Ok(M::try_from(kind(MapData::from_pin(directory.join(name))?))?) };
    open().map_err(Error::kernel(format!("opening the older eBPF map {name}")))
}
