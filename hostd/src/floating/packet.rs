//! A heartbeat on the wire: its fields in network byte order, and an HMAC-SHA-256 over them.
//!
//! The key is made by the first `flynn-host floating add` and kept beside the addresses in discoverd, in a document
//! that only hosts' certificates may read. Heartbeats are no secret: they are authenticated and not encrypted.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::core::{AddressKey, Beat, Claim, HostKey, MAX_ADDRESSES, MAX_HOSTS, Number, Standing};

/// The length of keys.
pub(crate) const KEY: usize = 32;
/// Longer packets are none of ours.
pub(crate) const MAX: usize = FIXED + 8 * MAX_HOSTS + CLAIM * MAX_ADDRESSES + TAG;

const MAGIC: [u8; 4] = *b"flyb";
const VERSION: u8 = 3;
const ELIGIBLE: u8 = 1;
/// Magic, version, flags, how many are heard, how many claims there are, and six numbers.
const FIXED: usize = 8 + 6 * 8;
const TAG: usize = 32;
/// Three numbers.
const CLAIM: usize = 24;

fn mac(key: &[u8; KEY], bytes: &[u8]) -> Option<Hmac<Sha256>> {
    // Keys of any length will do.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(bytes);
    Some(mac)
}

/// Epoch and standing in one number, in the order of claims of one epoch.
fn take(claim: &Claim) -> u64 {
    let standing = match claim.standing {
        Standing::Alone => 0,
        Standing::Lost => 1,
        Standing::Majority => 2,
    };
    claim.epoch << 2 | standing
}

fn claim([address, host, take]: [u64; 3]) -> Option<Claim> {
    let standing = match take & 3 {
        0 => Standing::Alone,
        1 => Standing::Lost,
        2 => Standing::Majority,
        _ => return None,
    };
    Some(Claim {
        address: AddressKey(address),
        host: HostKey(host),
        epoch: take >> 2,
        standing,
    })
}

/// The packet of a heartbeat.
pub(crate) fn encode(key: &[u8; KEY], beat: &Beat) -> Vec<u8> {
    let hears = &beat.hears[..beat.hears.len().min(MAX_HOSTS)];
    let mut bytes = MAGIC.to_vec();
    let flags = if beat.eligible { ELIGIBLE } else { 0 };
    let claims = &beat.claims[..beat.claims.len().min(MAX_ADDRESSES)];
    let count = |length: usize| u8::try_from(length).unwrap_or(0);
    bytes.extend([VERSION, flags, count(hears.len()), count(claims.len())]);
    let numbers = [
        beat.from.0,
        beat.to.0,
        beat.number.incarnation,
        beat.number.sequence,
        beat.echo.incarnation,
        beat.echo.sequence,
    ];
    let claims = claims
        .iter()
        .flat_map(|claim| [claim.address.0, claim.host.0, take(claim)]);
    let numbers = numbers.into_iter().chain(hears.iter().map(|host| host.0));
    for number in numbers.chain(claims) {
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
    let [a, b, c, d, VERSION, flags, heard, claims, numbers @ ..] = bytes else {
        return None;
    };
    let (heard, claims) = (usize::from(*heard), usize::from(*claims));
    if [*a, *b, *c, *d] != MAGIC || numbers.len() != 8 * (6 + heard) + CLAIM * claims {
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
        hears: numbers.by_ref().take(heard).map(HostKey).collect(),
        claims: numbers
            .collect::<Vec<_>>()
            .as_chunks::<3>()
            .0
            .iter()
            .map(|numbers| claim(*numbers))
            .collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn beats()(
            n in any::<[u64; 6]>(), eligible in any::<bool>(), hears in prop::collection::vec(any::<u64>(), 0..=MAX_HOSTS),
            claims in prop::collection::vec(any::<[u64; 3]>(), 0..=MAX_ADDRESSES),
        ) -> Beat {
            Beat {
                from: HostKey(n[0]),
                to: HostKey(n[1]),
                number: Number { incarnation: n[2], sequence: n[3] },
                echo: Number { incarnation: n[4], sequence: n[5] },
                eligible,
                hears: hears.into_iter().map(HostKey).collect(),
                claims: claims
                    .into_iter()
                    .map(|[address, host, take]| [address, host, take - u64::from(take % 4 == 3)])
                    .filter_map(claim)
                    .collect(),
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
        fn no_bytes_are_too_odd(packet in prop::collection::vec(any::<u8>(), 0..1500)) {
            prop_assert_eq!(decode(&[0; KEY], &packet), None);
        }
    }
}
