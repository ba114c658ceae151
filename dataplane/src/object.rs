//! The objects that `build.rs` made.

use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use crate::{
    error::{Error, Result},
    pins::Pins,
};

static OVERLAY: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay"));

/// Loads it over the maps that are pinned; those which are missing are made and pinned.
pub(crate) fn load(pins: &Pins) -> Result<Ebpf> {
    EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .load(OVERLAY)
        .map_err(|error| Error::kernel("loading the eBPF maps")(error.into()))
}
