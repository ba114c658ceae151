//! A data plane that a test puts frames into, one at a time.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

use etherparse::PacketBuilder;
use flynn_dataplane::{
    Attachment, Container, Dataplane, DropReason, Host, Network, Outcome, Prefix, Program, Traffic, Way,
};

use crate::support::pins;

/// The loopback device's: packets under test come by it unless they say otherwise.
pub(crate) const IFINDEX: u32 = 1;
pub(crate) const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub(crate) const A: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 2),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x102)),
    mac: [2, 0, 0, 0, 0, 2],
    ifindex: IFINDEX,
};
pub(crate) const B: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 3),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x103)),
    mac: [2, 0, 0, 0, 0, 3],
    ifindex: 77,
};
pub(crate) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(100, 100, 1, 1);
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x101);
pub(crate) const NOBODY4: Ipv4Addr = Ipv4Addr::new(100, 100, 9, 9);
pub(crate) const NOBODY6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 9, 9);
pub(crate) const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// This host's own address, and another host with its subnet and a container there.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
pub(crate) const FAR_HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 102);
pub(crate) const FAR_GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 100, 2, 1);
pub(crate) const FAR4: Ipv4Addr = Ipv4Addr::new(100, 100, 2, 5);
pub(crate) const FAR6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x0205);
pub(crate) const FAR: Host = Host {
    subnet: Ipv4Addr::new(100, 100, 2, 0),
    address: FAR_HOST,
    direct: false,
    encrypted: false,
    only_encrypted: false,
    way: Some(Way {
        ifindex: IFINDEX,
        next_hop: FAR_HOST,
        source: HOST,
    }),
};

/// A data plane with both containers, and what its counters were.
pub(crate) struct Bench(pub(crate) Dataplane);

impl Bench {
    pub(crate) fn new(bpffs: &Path) -> Self {
        let mut dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        dataplane.configure(&network()).unwrap();
        for container in [A, B] {
            dataplane.add(&container, &Attachment::default()).unwrap();
        }
        Self(dataplane)
    }

    /// The same, and another host.
    pub(crate) fn of_two(bpffs: &Path) -> Self {
        let mut bench = Self::new(bpffs);
        bench.0.set_hosts(&[FAR]).unwrap();
        bench
    }

    pub(crate) fn passes(&self, program: Program, frame: &[u8]) {
        let outcome = self.not_dropped(program, frame);
        assert_eq!(
            outcome,
            Outcome {
                action: if matches!(program, Program::FromContainer | Program::FromUplink) {
                    Outcome::NEXT
                } else {
                    Outcome::PASS
                },
                frame: frame.to_vec()
            }
        );
    }

    /// The frame leaves for a container, with nothing changed but its Ethernet addresses, and those only where the
    /// kernel will look at them.
    pub(crate) fn goes_to(&self, container: &Container, program: Program, frame: &[u8]) {
        let expected = match program {
            Program::ToOverlay => [&container.mac, &GATEWAY, &frame[12..]].concat(),
            _ => frame.to_vec(),
        };
        let outcome = self.not_dropped(program, frame);
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::REDIRECT,
                frame: expected
            }
        );
    }

    pub(crate) fn drops(&self, reason: DropReason, program: Program, frame: &[u8]) {
        self.drops_from(IFINDEX, reason, program, frame);
    }

    pub(crate) fn drops_from(&self, ifindex: u32, reason: DropReason, program: Program, frame: &[u8]) {
        let mut expected = self.0.drops().unwrap();
        for (found, count) in &mut expected {
            *count += u64::from(*found == reason);
        }
        let traffic = self.traffic();
        let outcome = self.0.dry_run(program, ifindex, frame).unwrap();
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::DROP,
                frame: frame.to_vec()
            },
            "{}",
            reason.name()
        );
        assert_eq!(self.0.drops().unwrap(), expected);
        assert_eq!(self.traffic(), traffic, "what is dropped is no traffic");
    }

    /// What the program does, which is not to drop the frame.
    pub(crate) fn not_dropped(&self, program: Program, frame: &[u8]) -> Outcome {
        let drops = self.0.drops().unwrap();
        let outcome = self.0.dry_run(program, IFINDEX, frame).unwrap();
        assert_eq!(self.0.drops().unwrap(), drops);
        outcome
    }

    pub(crate) fn traffic(&self) -> [Traffic; 2] {
        let containers = self.0.containers().unwrap();
        assert_eq!(
            containers
                .iter()
                .map(|(container, _)| container.ipv4)
                .collect::<Vec<_>>(),
            [A.ipv4, B.ipv4]
        );
        [containers[0].1, containers[1].1]
    }
}

pub(crate) fn network() -> Network {
    Network {
        cluster4: Prefix {
            address: Ipv4Addr::new(100, 100, 0, 0),
            length: 16,
        },
        cluster6: Some(Prefix {
            address: Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0),
            length: 64,
        }),
        gateway4: GATEWAY4,
        gateway6: Some(GATEWAY6),
        subnet_length: 24,
        address: Some(HOST),
        tunnel_mtu: 1450,
        device: None,
        gateway_mac: GATEWAY,
    }
}

pub(crate) fn frame4(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    frame(PacketBuilder::ethernet2(A.mac, GATEWAY).ipv4(from.octets(), to.octets(), 64))
}

pub(crate) fn frame6(from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    frame(PacketBuilder::ethernet2(A.mac, GATEWAY).ipv6(from.octets(), to.octets(), 64))
}

pub(crate) fn frame(headers: etherparse::PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8> {
    let payload = b"payload";
    let headers = headers.udp(1000, 2000);
    let mut bytes = Vec::with_capacity(headers.size(payload.len()));
    headers.write(&mut bytes, payload).unwrap();
    bytes
}

/// The frame with some of its bytes changed.
pub(crate) fn with(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

pub(crate) fn six(container: Container) -> Ipv6Addr {
    container.ipv6.unwrap()
}
