//! What maps of an older layout hold is carried over to today's.
//!
//! A map that still has its shape moves as it is: older and newer programs share it, so that nothing of it is lost, and
//! not one packet is counted or sent by what is half there. (A map whose entries come to mean something else gets
//! another name.) A map of another shape is filled from the older one while the older programs still run over that:
//! before the first link is switched, so that no packet meets an empty one. The older go after the last. A process that
//! dies in between leaves both, and the next one does it again.

use std::{
    fs::{self, DirEntry},
    io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData, MapError, MapInfo, MapType};
use aya_obj::generated::bpf_map_type;
use flynn_abi::v1;
use tracing::{info, warn};

use crate::{
    error::{Error, Refusal, Result},
    maps::Maps,
    pins::Pins,
};

/// A part of the data plane, by what the names of its maps begin with. The overlay has all that no other has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Overlay,
    Balancer,
    Services,
    Steer,
}

impl Part {
    fn of(map: &str) -> Self {
        match map.split_once('_') {
            Some(("lb", _)) => Self::Balancer,
            Some(("service", _)) => Self::Services,
            Some(("steer", _)) => Self::Steer,
            _ => Self::Overlay,
        }
    }
}

/// Puts the maps of the newest older layout in the place of those that an object is going to make, where they are of the
/// same shape.
pub(crate) fn adopt(pins: &Pins, object: &[u8]) -> Result<()> {
    let Some((layout, older)) = pins.other_layouts()?.pop() else {
        return Ok(());
    };
    let wanted = aya_obj::Object::parse(object)
        .map_err(|error| Error::kernel("reading an eBPF object")(error.into()))?
        .maps;
    for (name, wanted) in wanted {
        let (from, to) = (older.join(&name), pins.maps().join(&name));
        if to.exists() || !from.exists() {
            continue;
        }
        let failed = || Error::kernel(format!("taking over the older eBPF map {name}"));
        let map = MapData::from_pin(&from).map_err(|error| failed()(error.into()))?;
        let shape = map.info().map_err(|error| failed()(error.into()))?;
        if has_shape(&shape, &wanted) {
            match map.pin(&to) {
                // Another process was faster.
                Err(_) if to.exists() => {}
                pinned => pinned.map_err(|error| failed()(error.into()))?,
            }
        } else {
            info!(map = name, layout, "the eBPF map had another shape");
        }
    }
    Ok(())
}

/// How many entries it has room for may differ: that is the machine's choice.
fn has_shape(map: &MapInfo, wanted: &aya_obj::Map) -> bool {
    let kind = bpf_map_type::try_from(wanted.map_type()).ok();
    let kind = kind.and_then(|kind| MapType::try_from(kind).ok());
    map.map_type().ok() == kind
        && map.key_size() == wanted.key_size()
        && map.value_size() == wanted.value_size()
        && map.map_flags() == wanted.map_flags()
}

/// Fills the overlay's maps that have another shape than in the newest older layout, if there is one.
pub(crate) fn carry_over(pins: &Pins, maps: &mut Maps) -> Result<()> {
    match pins.other_layouts()?.pop() {
        // Nothing of the overlay's has changed since layout 2.
        None | Some((2, _)) => Ok(()),
        Some((1, old)) => {
            info!(
                from = 1,
                to = flynn_abi::LAYOUT,
                "the eBPF maps have another layout: carrying them over"
            );
            from_1(&old, maps)
        }
        Some((layout, _)) => {
            warn!(
                layout,
                "the eBPF maps have a layout that is not known here: what has another shape begins empty"
            );
            Ok(())
        }
    }
}

/// Removes the older maps of a part, once none of its programs uses them any more.
pub(crate) fn remove(pins: &Pins, part: Part) -> Result<()> {
    for (_, directory) in pins.other_layouts()? {
        let failed = |source| Error::Pins {
            what: "listing",
            path: directory.clone(),
            source,
        };
        let entries = match fs::read_dir(&directory) {
            // Another process has opened another part meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.and_then(Iterator::collect::<Result<Vec<_>, _>>),
        };
        let is_of_part = |entry: &DirEntry| Part::of(&entry.file_name().to_string_lossy()) == part;
        let entries = entries.map_err(failed)?;
        let maps: Vec<PathBuf> = entries
            .iter()
            .filter(|entry| is_of_part(entry))
            .map(DirEntry::path)
            .collect();
        Pins::remove_layout(&directory, &maps)?;
    }
    Ok(())
}

fn from_1(old: &Path, maps: &mut Maps) -> Result<()> {
    let config: Array<_, v1::Config> = open(old, "config", Map::Array)?;
    let config = config.get(&0, 0).map_err(Refusal::from);
    maps.carry_config(
        config
            .map_err(Error::kernel("carrying over the eBPF map config"))?
            .into(),
    )
}

fn open<M>(directory: &Path, name: &str, kind: fn(MapData) -> Map) -> Result<M>
where
    M: TryFrom<Map, Error = MapError>,
{
    let open = || -> Result<M, Refusal> { Ok(M::try_from(kind(MapData::from_pin(directory.join(name))?))?) };
    open().map_err(Error::kernel(format!("opening the older eBPF map {name}")))
}
