//! A heartbeat on the wire: its fields in network byte order, and an HMAC-SHA-256 over them.
//!
//! The key is made by the first `flynn-host floating add` and kept beside the addresses in discoverd, in a document
//! that only hosts' certificates may read. Heartbeats are no secret: they are authenticated and not encrypted.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::core::{Beat, HostKey, MAX_HOSTS, Number};

/// The length of keys.
pub(crate) const KEY: usize = 32;
/// Longer packets are none of ours.
pub(crate) const MAX: usize = FIXED + 8 * MAX_HOSTS + TAG;

const MAGIC: [u8; 4] = *b"flyb";
const VERSION: u8 = 1;
const ELIGIBLE: u8 = 1;
/// Magic, version, flags, count, a byte of zeros, and six numbers.
const FIXED: usize = 8 + 6 * 8;
const TAG: usize = 32;

fn mac(key: &[u8; KEY], bytes: &[u8]) -> Option<Hmac<Sha256>> {
    // Keys of any length will do.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(bytes);
    Some(mac)
}

/// The packet of a heartbeat.
pub(crate) fn encode(key: &[u8; KEY], beat: &Beat) -> Vec<u8> {
    let hears = &beat.hears[..beat.hears.len().min(MAX_HOSTS)];
    let mut bytes = MAGIC.to_vec();
    let flags = if beat.eligible { ELIGIBLE } else { 0 };
    bytes.extend([VERSION, flags, u8::try_from(hears.len()).unwrap_or(0), 0]);
    let numbers = [
        beat.from.0,
        beat.to.0,
        beat.number.incarnation,
        beat.number.sequence,
        beat.echo.incarnation,
        beat.echo.sequence,
    ];
    for number in numbers.into_iter().chain(hears.iter().map(|host| host.0)) {
        bytes.extend(number.to_be_bytes());
    }
    if let Some(mac) = mac(key, &bytes) {
        bytes.extend(mac.finalize().into_bytes());
    }
    bytes
}

/// The heartbeat in a packet, if there is one that a host of the cluster has sent.
pub(crate) fn decode(key: &[u8; KEY], packet: &[u8]) -> Option<Beat> {
    if packet.len() > MAX {
        return None;
    }
    let (bytes, tag) = packet.split_at_checked(packet.len().checked_sub(TAG)?)?;
    let [a, b, c, d, VERSION, flags, count, 0, numbers @ ..] = bytes else {
        return None;
    };
    if [*a, *b, *c, *d] != MAGIC || numbers.len() != 8 * (6 + usize::from(*count)) {
        return None;
    }
    // Compares in the same time whatever differs.
    mac(key, bytes)?.verify_slice(tag).ok()?;
    let mut numbers = numbers
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_be_bytes(*bytes));
    let mut next = || numbers.next();
    Some(Beat {
        from: HostKey(next()?),
        to: HostKey(next()?),
        number: Number {
            incarnation: next()?,
            sequence: next()?,
        },
        echo: Number {
            incarnation: next()?,
            sequence: next()?,
        },
        eligible: flags & ELIGIBLE != 0,
        hears: numbers.map(HostKey).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn beats()(
            n in any::<[u64; 6]>(), eligible in any::<bool>(), hears in prop::collection::vec(any::<u64>(), 0..=MAX_HOSTS),
        ) -> Beat {
            Beat {
                from: HostKey(n[0]),
                to: HostKey(n[1]),
                number: Number { incarnation: n[2], sequence: n[3] },
                echo: Number { incarnation: n[4], sequence: n[5] },
                eligible,
                hears: hears.into_iter().map(HostKey).collect(),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_is_read(beat in beats(), key in any::<[u8; KEY]>()) {
            let packet = encode(&key, &beat);
            prop_assert!(packet.len() <= MAX);
            prop_assert_eq!(decode(&key, &packet), Some(beat));
        }

        #[test]
        fn a_changed_packet_is_none(
            beat in beats(), key in any::<[u8; KEY]>(), at in any::<prop::sample::Index>(), by in 1_u8..,
        ) {
            let mut packet = encode(&key, &beat);
            let at = at.index(packet.len());
            packet[at] ^= by;
            prop_assert_eq!(decode(&key, &packet), None);
            packet[at] ^= by;
            prop_assert_eq!(decode(&key, &packet[..at]), None);
            let mut other = key;
            other[0] ^= by;
            prop_assert_eq!(decode(&other, &packet), None);
        }

        #[test]
        fn no_bytes_are_too_odd(packet in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(decode(&[0; KEY], &packet), None);
        }
    }
}
