//! A host with the balancer's programs, and what there is around it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use flynn_dataplane::{
    Attachment, Container, Dataplane, DropReason, Host, Network, Outcome, Prefix, Program, Protocol, Way,
    lb::{Backend, Balancer, Event, Limits, Mode, Service, Uplink, Vip},
};

use crate::{
    frames::{Kind, check, inner, question4},
    support::pins,
};

pub(crate) const UPLINK: u32 = 1;
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];
pub(crate) const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const LOCAL: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 2),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x102)),
    mac: [2, 0, 0, 0, 0, 2],
    ifindex: UPLINK,
};
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(100, 100, 2, 2);
pub(crate) const US: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub(crate) const VIP4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub(crate) const CLIENT4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub(crate) const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 7);
pub(crate) const PORT: u16 = 3000;
pub(crate) const BACKEND_PORT: u16 = 8080;

pub(crate) struct Bench {
    pub(crate) dataplane: Dataplane,
    pub(crate) balancer: Balancer,
}

pub(crate) fn uplink() -> Uplink {
    Uplink {
        name: "lo".into(),
        index: UPLINK,
        mtu: 1500,
        mac: UPLINK_MAC,
        is_device: false,
    }
}

pub(crate) fn vip(address: impl Into<IpAddr>, protocol: Protocol) -> Vip {
    Vip {
        address: address.into(),
        port: PORT,
        protocol,
    }
}

pub(crate) fn vips() -> Vec<Vip> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| [vip(VIP4, protocol), vip(VIP6, protocol)])
        .collect()
}

pub(crate) fn service(backends: &[Ipv4Addr]) -> Service {
    Service {
        vips: vips(),
        backends: backends
            .iter()
            .map(|address| Backend::new(*address, BACKEND_PORT))
            .collect(),
        ..Service::default()
    }
}

pub(crate) fn host(ifindex: u32, direct: bool) -> Host {
    Host {
        subnet: Ipv4Addr::new(100, 100, 2, 0),
        address: OTHER,
        direct,
        encrypted: false,
        only_encrypted: false,
        way: Some(Way {
            ifindex,
            next_hop: OTHER,
            source: US,
        }),
    }
}

impl Bench {
    pub(crate) fn new(bpffs: &Path) -> Self {
        Self::with(bpffs, uplink(), Mode::Auto, 1000)
    }

    pub(crate) fn with(bpffs: &Path, uplink: Uplink, mode: Mode, flood: u32) -> Self {
        let ifindex = uplink.index;
        let mut dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        dataplane
            .configure(&Network {
                cluster4: Prefix {
                    address: Ipv4Addr::new(100, 100, 0, 0),
                    length: 16,
                },
                cluster6: Some(Prefix {
                    address: Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0),
                    length: 64,
                }),
                gateway4: Ipv4Addr::new(100, 100, 1, 1),
                gateway6: None,
                subnet_length: 24,
                address: Some(US),
                tunnel_mtu: 1450,
                device: None,
                gateway_mac: GATEWAY,
            })
            .unwrap();
        dataplane.add(&LOCAL, &Attachment::default()).unwrap();
        dataplane.set_hosts(&[host(ifindex, false)]).unwrap();
        let limits = Limits {
            flows: 1 << 12,
            flood,
        };
        let balancer = Balancer::open(&pins(bpffs), uplink, mode, &limits).unwrap();
        Self { dataplane, balancer }
    }

    pub(crate) fn set(&mut self, service: Service) {
        self.balancer.set(&[service]).unwrap();
    }

    pub(crate) fn uplink(&self, frame: &[u8]) -> Outcome {
        self.balancer.dry_run(Program::LbUplink, UPLINK, frame).unwrap()
    }

    pub(crate) fn answer(&self, frame: &[u8]) -> Outcome {
        self.balancer.dry_run(Program::LbAnswer, UPLINK, frame).unwrap()
    }

    /// What comes out, which must go to another interface with all checksums right.
    pub(crate) fn sent(&self, frame: &[u8]) -> Vec<u8> {
        let outcome = self.uplink(frame);
        assert_eq!(outcome.action, Outcome::REDIRECT, "{:?}", self.reasons());
        check(&outcome.frame);
        outcome.frame
    }

    pub(crate) fn answered(&self, frame: &[u8]) -> Vec<u8> {
        let outcome = self.answer(frame);
        assert_eq!(outcome.action, Outcome::REDIRECT, "{:?}", self.reasons());
        check(&outcome.frame);
        outcome.frame
    }

    pub(crate) fn drops(&self, reason: DropReason, frame: &[u8]) {
        let before = self.reasons();
        assert_eq!(self.uplink(frame).action, Outcome::DROP);
        let after = self.reasons();
        let count = |all: &[(DropReason, u64)]| all.iter().find(|(r, _)| *r == reason).unwrap().1;
        assert_eq!(count(&after), count(&before) + 1, "{}", reason.name());
    }

    pub(crate) fn reasons(&self) -> Vec<(DropReason, u64)> {
        self.dataplane.drops().unwrap()
    }

    pub(crate) fn event(&self, event: Event) -> u64 {
        let events = self.balancer.events().unwrap();
        events.iter().find(|(other, _)| *other == event).unwrap().1
    }
}

/// Backends of many flows, by where they are tunnelled to.
pub(crate) fn backends(bench: &Bench, kind: Kind, ports: std::ops::Range<u16>) -> Vec<Ipv4Addr> {
    let backend = |port| {
        let (header, _) = inner(&bench.sent(&question4(kind, port)));
        Ipv4Addr::new(header[4], header[5], header[6], header[7])
    };
    ports.map(backend).collect()
}
