//! The objects that `build.rs` made.

use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use crate::{
    error::{Error, Result},
    pins::Pins,
};

static OVERLAY: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay"));

static SERVICE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/service"));

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
