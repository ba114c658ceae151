//! How a host tells its neighbours that an address is at its interface from now on. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The frame that announces an address: a gratuitous ARP request, or an unsolicited neighbour advertisement.
pub(crate) fn announcement(address: IpAddr, mac: [u8; 6]) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(address, mac),
        IpAddr::V6(address) => advertisement(address, mac),
    }
}

fn arp(address: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
    const EVERYBODY: [u8; 6] = [0xff; 6];
    // Ethernet, IPv4, their lengths, a request: those are heeded by more than answers are.
    const HEADER: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let protocol: &[u8] = &[0x08, 0x06];
    let address = &address.octets();
    [
        &EVERYBODY, &mac, protocol, &HEADER, &mac, address, &[0; 6], address,
    ]
    .concat()
}

fn advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ICMP: u8 = 58;
    const ADVERTISEMENT: u8 = 136;
    /// Take it in the place of what you know.
    const OVERRIDE: u8 = 0x20;
    /// The Ethernet address of the advertised one, in units of eight bytes.
    const TARGET: [u8; 2] = [2, 1];
    let address = address.octets();
    let mut body = [
        &[ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0],
        &address[..],
        &TARGET,
        &mac,
    ]
    .concat();
    let length = u8::try_from(body.len()).unwrap_or(u8::MAX);
    let pseudo = [
        &address[..],
        &ALL_NODES.octets(),
        &[0, 0, 0, length, 0, 0, 0, ICMP],
    ]
    .concat();
    let checksum = checksum(&[pseudo, body.clone()].concat());
    body[2..4].copy_from_slice(&checksum.to_be_bytes());
    let protocol: &[u8] = &[0x86, 0xdd];
    // Neighbours heed it only with the highest hop limit: nobody has passed it on.
    let header = [0x60, 0, 0, 0, 0, length, ICMP, 255];
    [
        &ALL_NODES_MAC,
        &mac,
        protocol,
        &header,
        &address,
        &ALL_NODES.octets(),
        &body,
    ]
    .concat()
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn arp_says_who_has_it() {
        let frame = announcement([192, 0, 2, 100].into(), MAC);
        assert_eq!(frame.len(), 42);
        assert_eq!(
            frame[..14],
            [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7, 8, 6]
        );
        assert_eq!(frame[22..28], MAC);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(frame[28..32], [192, 0, 2, 100]);
    }

    #[test]
    fn an_advertisement_adds_up() {
        let address: Ipv6Addr = "2001:db8::100".parse().unwrap();
        let frame = announcement(address.into(), MAC);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!((frame[20], frame[21]), (58, 255));
        assert_eq!(frame[22..38], address.octets());
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[80..86], MAC);
        // A checksum over what holds the right checksum is zero.
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        assert_eq!(checksum(&[&pseudo, &frame[54..]].concat()), 0);
    }
}
