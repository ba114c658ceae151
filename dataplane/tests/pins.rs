//! What outlives a process, and how the next one takes it over.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::Path,
    time::Duration,
};

use flynn_dataplane::{Attachment, Container, Dataplane, DropReason, Error, Hook, Program};
use support::{alone, ip, pins};

const CONTAINER: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 2),
    ipv6: None,
    mac: [2, 0, 0, 0, 0, 2],
    ifindex: 1,
};

fn main() {
    support::main(
        &["ip"],
        |name| (name.ends_with("by_tcx") && Hook::detect() != Hook::Tcx).then_some("a kernel with tcx"),
        &[
            ("programs_outlive_the_process_by_tcx", || {
                programs_outlive_the_process(Hook::Tcx);
            }),
            ("programs_outlive_the_process_by_clsact", || {
                programs_outlive_the_process(Hook::Clsact);
            }),
            ("an_interface_that_vanished_is_forgotten_by_tcx", || {
                a_vanished_interface_is_forgotten(Hook::Tcx);
            }),
            ("an_interface_that_vanished_is_forgotten_by_clsact", || {
                a_vanished_interface_is_forgotten(Hook::Clsact);
            }),
            (
                "attaching_twice_is_attaching_once",
                attaching_twice_is_attaching_once,
            ),
            (
                "a_filter_without_a_pin_is_taken_over",
                a_filter_without_a_pin_is_taken_over,
            ),
            ("containers_outlive_the_process", containers_outlive_the_process),
            (
                "counters_begin_at_zero_for_each_container",
                counters_begin_at_zero_for_each_container,
            ),
            (
                "as_many_containers_as_there_is_room_for",
                as_many_containers_as_there_is_room_for,
            ),
            ("pins_need_a_bpf_file_system", pins_need_a_bpf_file_system),
            ("unpinning_leaves_nothing", unpinning_leaves_nothing),
        ],
    )
}

/// Whether a datagram over the loopback device arrives. The program at its ingress drops every packet.
fn passes() -> bool {
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    receiver
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"?", receiver.local_addr().unwrap()).unwrap();
    receiver.recv(&mut [0; 1]).is_ok()
}

/// The kernel detaches a program some time after its pin is gone, and a slow machine takes its time.
fn passes_soon() -> bool {
    (0..100).any(|_| passes())
}

fn dropped(dataplane: &Dataplane) -> u64 {
    let drops = dataplane.drops().unwrap();
    drops
        .into_iter()
        .find_map(|(reason, count)| (reason == DropReason::UnknownHost).then_some(count))
        .unwrap()
}

fn open(bpffs: &Path, hook: Hook) -> Dataplane {
    Dataplane::open_with(&pins(bpffs), hook).unwrap()
}

fn programs_outlive_the_process(hook: Hook) {
    alone(move |bpffs| {
        assert!(passes_soon());
        let mut dataplane = open(bpffs, hook);
        dataplane.attach(Program::FromTunnel, "lo").unwrap();
        assert!(!passes());
        assert_eq!(dropped(&dataplane), 1);

        drop(dataplane);
        assert!(!passes(), "the program went with the process");

        let mut dataplane = open(bpffs, hook);
        assert_eq!(dropped(&dataplane), 2);
        assert_eq!(
            dataplane.attached().unwrap(),
            [(Program::FromTunnel, "lo".to_owned())]
        );
        assert!(!passes(), "the program was not replaced but lost");
        assert_eq!(dropped(&dataplane), 3, "one program, and one alone");

        dataplane.detach(Program::FromTunnel, "lo").unwrap();
        assert!(passes_soon());
        assert_eq!(dataplane.attached().unwrap(), []);
        dataplane.detach(Program::FromTunnel, "lo").unwrap();
    });
}

fn a_vanished_interface_is_forgotten(hook: Hook) {
    alone(move |bpffs| {
        ip(&[
            "link", "add", "name", "one", "type", "veth", "peer", "name", "two",
        ]);
        let mut dataplane = open(bpffs, hook);
        dataplane.attach(Program::FromContainer, "one").unwrap();
        ip(&["link", "delete", "one"]);
        dataplane = open(bpffs, hook);
        assert_eq!(dataplane.attached().unwrap(), []);

        // Under the same name again, while the pin of the one before is there.
        ip(&[
            "link", "add", "name", "one", "type", "veth", "peer", "name", "two",
        ]);
        dataplane.attach(Program::FromContainer, "one").unwrap();
        ip(&["link", "delete", "one"]);
        ip(&[
            "link", "add", "name", "one", "type", "veth", "peer", "name", "two",
        ]);
        dataplane.attach(Program::FromContainer, "one").unwrap();
        assert_eq!(
            dataplane.attached().unwrap(),
            [(Program::FromContainer, "one".to_owned())]
        );
        let error = dataplane.attach(Program::FromContainer, "three").unwrap_err();
        assert!(error.to_string().contains("from_container to three"), "{error}");
        assert_eq!(dataplane.attached().unwrap().len(), 1);
    });
}

fn attaching_twice_is_attaching_once() {
    alone(|bpffs| {
        for hook in [Hook::detect(), Hook::Clsact] {
            let mut dataplane = open(bpffs, hook);
            dataplane.attach(Program::FromTunnel, "lo").unwrap();
            dataplane.attach(Program::FromTunnel, "lo").unwrap();
            let before = dropped(&dataplane);
            assert!(!passes());
            assert_eq!(dropped(&dataplane), before + 1);
            dataplane.detach(Program::FromTunnel, "lo").unwrap();
            assert!(passes_soon());
        }
    });
}

fn a_filter_without_a_pin_is_taken_over() {
    alone(|bpffs| {
        let mut dataplane = open(bpffs, Hook::Clsact);
        dataplane.attach(Program::FromTunnel, "lo").unwrap();
        fs::remove_file(pins(bpffs).join("links/from_tunnel@lo")).unwrap();
        let mut dataplane = open(bpffs, Hook::Clsact);
        dataplane.attach(Program::FromTunnel, "lo").unwrap();
        let before = dropped(&dataplane);
        assert!(!passes());
        assert_eq!(dropped(&dataplane), before + 1);
        dataplane.detach(Program::FromTunnel, "lo").unwrap();
        assert!(passes_soon());
    });
}

fn containers_outlive_the_process() {
    alone(|bpffs| {
        let other = Container {
            ipv4: Ipv4Addr::new(100, 100, 1, 3),
            ifindex: 9,
            ..CONTAINER
        };
        let mut dataplane = open(bpffs, Hook::detect());
        dataplane.add(&CONTAINER, &Attachment::default()).unwrap();
        drop(dataplane);

        let mut dataplane = open(bpffs, Hook::detect());
        dataplane.add(&other, &Attachment::default()).unwrap();
        let containers: Vec<_> = dataplane
            .containers()
            .unwrap()
            .into_iter()
            .map(|(container, _)| container)
            .collect();
        assert_eq!(containers, [CONTAINER, other]);
        assert!(dataplane.remove(CONTAINER.ipv4, None).unwrap());
        assert!(!dataplane.remove(CONTAINER.ipv4, None).unwrap());
    });
}

fn counters_begin_at_zero_for_each_container() {
    alone(|bpffs| {
        let mut dataplane = open(bpffs, Hook::detect());
        let network = flynn_dataplane::Network {
            cluster4: flynn_dataplane::Prefix {
                address: Ipv4Addr::new(100, 100, 0, 0),
                length: 16,
            },
            cluster6: None,
            gateway4: Ipv4Addr::new(100, 100, 1, 1),
            gateway6: None,
            subnet_length: 24,
            address: None,
            tunnel_mtu: 1450,
            device: None,
            gateway_mac: [2; 6],
        };
        dataplane.configure(&network).unwrap();
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [2; 6])
            .ipv4([192, 0, 2, 1], CONTAINER.ipv4.octets(), 64)
            .udp(1, 2)
            .write(&mut frame, &[])
            .unwrap();
        let received = |dataplane: &Dataplane| dataplane.containers().unwrap()[0].1.received_packets;
        for _ in 0..2 {
            dataplane.add(&CONTAINER, &Attachment::default()).unwrap();
            assert_eq!(received(&dataplane), 0);
            dataplane.dry_run(Program::ToOverlay, 1, &frame).unwrap();
            // The same again is no new one.
            dataplane.add(&CONTAINER, &Attachment::default()).unwrap();
            assert_eq!(received(&dataplane), 1);
            dataplane.remove(CONTAINER.ipv4, None).unwrap();
        }
    });
}

fn as_many_containers_as_there_is_room_for() {
    alone(|bpffs| {
        let mut dataplane = open(bpffs, Hook::detect());
        let container = |number: u32| Container {
            ipv4: Ipv4Addr::from_bits(0x6464_0000 + number),
            ..CONTAINER
        };
        for number in 0..flynn_abi::MAX_LOCAL_ENDPOINTS {
            dataplane.add(&container(number), &Attachment::default()).unwrap();
        }
        let one_more = container(flynn_abi::MAX_LOCAL_ENDPOINTS);
        assert!(matches!(
            dataplane.add(&one_more, &Attachment::default()),
            Err(Error::Full(_))
        ));
        dataplane.remove(container(7).ipv4, None).unwrap();
        dataplane.add(&one_more, &Attachment::default()).unwrap();
    });
}

fn pins_need_a_bpf_file_system() {
    alone(|_| {
        let directory = tempfile::tempdir().unwrap();
        let error = Dataplane::open(&directory.path().join("flynn")).err().unwrap();
        assert!(matches!(error, Error::NotBpffs(_)), "{error}");
    });
}

fn unpinning_leaves_nothing() {
    alone(|bpffs| {
        let mut dataplane = open(bpffs, Hook::detect());
        dataplane.attach(Program::FromTunnel, "lo").unwrap();
        dataplane.add(&CONTAINER, &Attachment::default()).unwrap();
        dataplane.unpin().unwrap();
        assert!(passes_soon());
        assert!(!fs::exists(pins(bpffs)).unwrap());
    });
}
