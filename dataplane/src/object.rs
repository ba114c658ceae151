//! The objects that `build.rs` made.

use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use crate::{
    error::{Error, Result},
    pins::Pins,
};

static OVERLAY: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay"));

static SERVICE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/service"));

static LB: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb"));

/// The same for the load balancer, with these sizes of maps in the place of the object's own.
pub(crate) fn load_lb(pins: &Pins, sizes: &[(&'static str, u32)]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for (map, size) in sizes {
        loader.map_max_entries(map, *size);
    }
    loader
        .default_map_pin_directory(pins.maps())
        .load(LB)
        .map_err(|error| Error::kernel("loading the load balancer's eBPF maps")(error.into()))
}

/// The router's ports.
pub(crate) static STEER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer"));

/// Loads the overlay's over the maps that are pinned; those which are missing are made and pinned.
pub(crate) fn load(pins: &Pins) -> Result<Ebpf> {
    EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .load(OVERLAY)
        .map_err(|error| Error::kernel("loading the eBPF maps")(error.into()))
}

/// Loads the services' object in the same way. The map that hangs on sockets cannot say of itself that it is pinned.
pub(crate) fn load_service(pins: &Pins) -> Result<Ebpf> {
    EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .map_pin_path("service_flows", pins.maps().join("service_flows"))
        .load(SERVICE)
        .map_err(|error| Error::kernel("loading the services' eBPF maps")(error.into()))
}
