//! Settings below `/proc/sys/net`, of the network namespace that the process is in.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Makes a setting, unless it is made: some places let nobody write what is right already.
pub(crate) fn set(key: &str, value: &str) -> Result<()> {
    if get(key).as_deref() == Some(value) {
        return Ok(());
    }
    fs::write(path(key), value).map_err(Error::kernel(format!("setting net/{key} to {value}")))
}

/// What a setting is, where it can be read.
pub(crate) fn get(key: &str) -> Option<String> {
    fs::read_to_string(path(key))
        .ok()
        .map(|value| value.trim().to_owned())
}

/// Whether interfaces can have IPv6 addresses.
pub(crate) fn has_ipv6() -> bool {
    get("ipv6/conf/all/disable_ipv6").as_deref() == Some("0")
        && get("ipv6/conf/default/disable_ipv6").as_deref() == Some("0")
}

fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(key)
}
