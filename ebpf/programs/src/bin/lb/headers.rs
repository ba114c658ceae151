//! Headers as they are on the wire. All are made of bytes, because packets are not aligned.

use flynn_abi::{
    Ipv4, Ipv6,
    lb::{Port, Tunnelled},
};

pub(crate) const ETHERNET: usize = size_of::<Ethernet>();
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

#[repr(C)]
pub(crate) struct Ethernet {
    pub(crate) to: [u8; 6],
    pub(crate) from: [u8; 6],
    pub(crate) kind: [u8; 2],
}

impl Ethernet {
    pub(crate) const IPV4: [u8; 2] = [0x08, 0x00];
    pub(crate) const IPV6: [u8; 2] = [0x86, 0xdd];
}

#[repr(C)]
pub(crate) struct Ip4 {
    pub(crate) version_and_length: u8,
    pub(crate) service: u8,
    pub(crate) total_length: [u8; 2],
    pub(crate) identification: [u8; 2],
    pub(crate) fragment: [u8; 2],
    pub(crate) time_to_live: u8,
    pub(crate) protocol: u8,
    pub(crate) checksum: [u8; 2],
    pub(crate) source: Ipv4,
    pub(crate) destination: Ipv4,
}

#[repr(C)]
pub(crate) struct Ip6 {
    pub(crate) version_and_class: [u8; 4],
    pub(crate) payload_length: [u8; 2],
    pub(crate) next_header: u8,
    pub(crate) hop_limit: u8,
    pub(crate) source: Ipv6,
    pub(crate) destination: Ipv6,
}

/// What TCP and UDP begin with.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) source: Port,
    pub(crate) destination: Port,
}

/// The fixed part of TCP's header up to its flags.
#[repr(C)]
pub(crate) struct Tcp {
    pub(crate) ports: Ports,
    sequence: [u8; 4],
    acknowledgement: [u8; 4],
    offset: u8,
    pub(crate) flags: u8,
}

impl Tcp {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const ACK: u8 = 0x10;
    /// Where options begin.
    pub(crate) const OPTIONS: usize = 20;
}

/// UDP's header.
#[repr(C)]
pub(crate) struct Udp {
    pub(crate) ports: Ports,
    pub(crate) length: [u8; 2],
    pub(crate) checksum: [u8; 2],
}

/// The head of an ICMP message, with the beginning of the packet that it is about behind it.
#[repr(C)]
pub(crate) struct Icmp {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) checksum: [u8; 2],
    pub(crate) rest: [u8; 4],
}

pub(crate) const ICMP: usize = size_of::<Icmp>();

/// What a packet between hosts has in front of the frame that it carries.
#[repr(C)]
pub(crate) struct Outer {
    pub(crate) ip: Ip4,
    pub(crate) udp: Udp,
    pub(crate) tunnelled: Tunnelled,
}

/// What a tunnel adds to a packet: the headers above and an Ethernet header.
pub(crate) const OVERHEAD: usize = size_of::<Outer>() + ETHERNET;

const _: () = assert!(OVERHEAD == 50);
