//! Which names, instances and metadata are taken.

use std::net::{IpAddr, SocketAddr};

use flynn_api::discovery::{Instance, ServiceMeta};
use flynn_api::{Digest, Error, IDEMPOTENCY_KEY};
use http::HeaderMap;

/// Labels of an instance.
const MAX_LABELS: usize = 64;
/// Bytes of all labels together.
const MAX_LABEL_BYTES: usize = 16 << 10;
/// Bytes of a key that names a write.
const MAX_KEY: usize = 255;
/// Levels of a service's metadata: what can be read in a request must be readable in a log entry as well, where it is further in.
const MAX_META_DEPTH: usize = 64;
/// What names begin with that the JSON library gives another meaning.
const RESERVED: &str = "$serde_json::private::";
/// Bytes of a service's metadata.
const MAX_META_BYTES: usize = 1 << 20;

/// A service's name must be usable in DNS.
pub(super) fn service(name: &str) -> Result<(), Error> {
    let fits = (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fits {
        return Ok(());
    }
    Err(Error::invalid_field(
        "service",
        "a name has 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -",
    ))
}

/// Checks an instance, and gives its address.
pub(super) fn instance(path_id: &str, instance: &Instance) -> Result<IpAddr, Error> {
    id(path_id)?;
    if instance.id != path_id {
        return Err(Error::invalid_field("id", "it is not the one in the path"));
    }
    let proto = &instance.proto;
    if !(1..=16).contains(&proto.len())
        || !proto
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    {
        return Err(Error::invalid_field(
            "proto",
            "a protocol has 1 to 16 of a-z and 0-9, like tcp",
        ));
    }
    let bytes: usize = instance
        .meta
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if instance.meta.len() > MAX_LABELS || bytes > MAX_LABEL_BYTES {
        return Err(Error::invalid_field(
            "meta",
            format!("no more than {MAX_LABELS} labels of 16 KiB together"),
        ));
    }
    let addr: SocketAddr = instance
        .addr
        .parse()
        .map_err(|_| Error::invalid_field("addr", "it must be address:port, with an IP address"))?;
    if addr.port() == 0 || addr.ip().is_unspecified() || addr.ip().is_multicast() {
        return Err(Error::invalid_field("addr", "nobody can connect there"));
    }
    Ok(addr.ip().to_canonical())
}

/// An instance's id must be usable in DNS.
pub(super) fn id(id: &str) -> Result<(), Error> {
    let fits = (1..=63).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if fits {
        Ok(())
    } else {
        Err(Error::invalid_field(
            "id",
            "an id has 1 to 63 letters, digits and -",
        ))
    }
}

/// The name of a write: that which the caller gives it, so that it can be repeated at any host, or a new one.
pub(super) fn request(headers: &HeaderMap) -> Result<u64, Error> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(rand::random_range(1..=u64::MAX));
    };
    if !(16..=MAX_KEY).contains(&key.len()) {
        return Err(Error::invalid_field(
            IDEMPOTENCY_KEY,
            "a key has 16 to 255 characters, like a random UUID",
        ));
    }
    let digest = Digest::of(key.as_bytes());
    let number = digest.as_bytes().first_chunk().copied().unwrap_or_default();
    Ok(u64::from_be_bytes(number).max(1))
}

/// Whether a value is no deeper than `levels`, and can be read as it was written.
fn is_plain(value: &serde_json::Value, levels: usize) -> bool {
    use serde_json::Value;
    match value {
        Value::Array(values) => levels > 0 && values.iter().all(|value| is_plain(value, levels - 1)),
        Value::Object(values) => {
            levels > 0
                && values
                    .iter()
                    .all(|(key, value)| !key.starts_with(RESERVED) && is_plain(value, levels - 1))
        }
        _ => true,
    }
}

/// Metadata must not be too long or too deep.
pub(super) fn meta(meta: &ServiceMeta) -> Result<(), Error> {
    let length = serde_json::to_vec(&meta.data).map_or(usize::MAX, |data| data.len());
    if length > MAX_META_BYTES {
        return Err(Error::invalid_field(
            "data",
            "metadata may be no longer than 1 MiB",
        ));
    }
    if !is_plain(&meta.data, MAX_META_DEPTH) {
        let message =
            format!("no more than {MAX_META_DEPTH} levels, and no name that begins with {RESERVED}");
        return Err(Error::invalid_field("data", message));
    }
    meta.leader_id.as_deref().map_or(Ok(()), id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_is_no_deeper_than_it_can_be_read_again() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        let of = |data| ServiceMeta {
            data,
            index: 0,
            leader_id: None,
        };
        meta(&of(nested(MAX_META_DEPTH))).unwrap();
        meta(&of(nested(MAX_META_DEPTH + 1))).unwrap_err();
        meta(&of(json!({"a": {"$serde_json::private::RawValue": 1}}))).unwrap_err();
        meta(&of(json!({"a": {"$": [1, 2.5, null, "x"]}}))).unwrap();
    }
}
