//! The objects that `build.rs` made.

use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use crate::{
    error::{Error, Result},
    migrate,
    pins::Pins,
};

static OVERLAY: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay"));

static SERVICE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/service"));

static LB: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb"));

/// The router's ports.
static STEER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer"));

/// Loads the overlay's over the maps that are pinned; those which are missing are taken over from an older layout, or
/// made and pinned.
pub(crate) fn load(pins: &Pins) -> Result<Ebpf> {
    load_with(pins, OVERLAY, "overlay", EbpfLoader::new())
}

/// The same for the load balancer, with these sizes of maps in the place of the object's own.
pub(crate) fn load_lb(pins: &Pins, sizes: &[(&'static str, u32)]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for (map, size) in sizes {
        loader.map_max_entries(map, *size);
    }
    load_with(pins, LB, "load balancer", loader)
}

/// The same for the services. The map that hangs on sockets cannot say of itself that it is pinned.
pub(crate) fn load_service(pins: &Pins) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.map_pin_path("service_flows", pins.maps().join("service_flows"));
    load_with(pins, SERVICE, "services", loader)
}

/// The same for the router's ports.
pub(crate) fn load_steer(pins: &Pins) -> Result<Ebpf> {
    load_with(pins, STEER, "router's ports", EbpfLoader::new())
}

fn load_with(pins: &Pins, object: &[u8], what: &str, mut loader: EbpfLoader<'_>) -> Result<Ebpf> {
    migrate::adopt(pins, object)?;
    let loaded = loader.default_map_pin_directory(pins.maps()).load(object);
    loaded.map_err(|error| Error::kernel(format!("loading the eBPF maps of the {what}"))(error.into()))
}
