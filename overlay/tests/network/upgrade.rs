//! What an older build left is taken over without a gap.

use std::{fs, path::Path};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, PerCpuArray},
    programs::{
        SchedClassifier,
        links::{FdLink, PinnedLink},
    },
};
use flynn_abi::{Config, Counters, Endpoint, Ipv4, Ipv6, v1};
use flynn_overlay::Traffic;

use crate::support::{Container, Datagrams, Host, tcp_echo};

/// The programs of the last build with layout 1.
static V1: &[u8] = include_bytes_aligned!("fixtures/overlay-v1.o");

pub(crate) fn from_layout_1() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        drop(network);
        go_back(&host.pins);
        let stream = Datagrams::start(&a.namespace, &b.namespace, b.ipv4.into());
        tcp_echo(&a.namespace, &b.namespace, b.ipv6, 1 << 16);
        let before = counted(&host.pins);
        assert!(before.sent_packets > 0);

        let network = host.network().await;
        assert!(!fs::exists(host.pins.join("v1")).unwrap());
        let endpoints = network.endpoints().unwrap();
        let sent: u64 = endpoints
            .iter()
            .map(|(_, traffic): &(_, Traffic)| traffic.sent_packets)
            .sum();
        assert!(sent >= before.sent_packets, "{sent} of {before:?} are left");
        for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
            assert_eq!(tcp_echo(&a.namespace, &b.namespace, to, 1 << 16), from);
        }
        tcp_echo(&Host::namespace(), &b.namespace, b.ipv4.into(), 1 << 16);
        let c = Container::attach(&network, 4).await;
        tcp_echo(&c.namespace, &b.namespace, b.ipv4.into(), 1 << 16);
        stream.arrive();
    });
}

/// Puts programs and maps of layout 1 in the place of what is there.
fn go_back(pins: &Path) {
    let (old, new) = (pins.join("v1"), pins.join(format!("v{}", flynn_abi::LAYOUT)));
    fs::create_dir(&old).unwrap();
    let mut object = EbpfLoader::new()
        .default_map_pin_directory(&old)
        .load(V1)
        .unwrap();
    copy::<Ipv4>(&mut object, &new, "endpoints4");
    copy::<Ipv6>(&mut object, &new, "endpoints6");
    let config: Array<_, Config> = Map::Array(pinned(&new, "config")).try_into().unwrap();
    let config = config.get(&0, 0).unwrap();
    let config = v1::Config {
        network4: config.network4,
        mask4: config.mask4,
        network6: config.network6,
        mask6: config.mask6,
        gateway: config.gateway,
        flags: Config::READY,
    };
    let mut old_config: Array<_, v1::Config> = object.map_mut("config").unwrap().try_into().unwrap();
    old_config.set(0, config, 0).unwrap();

    for pin in fs::read_dir(pins.join("links")).unwrap() {
        let pin = pin.unwrap();
        let name = pin.file_name().into_string().unwrap();
        let program = name.split_once('@').unwrap().0;
        let Some(program) = object.program_mut(program) else {
            fs::remove_file(pin.path()).unwrap();
            continue;
        };
        let program: &mut SchedClassifier = program.try_into().unwrap();
        if program.fd().is_err() {
            program.load().unwrap();
        }
        let link = FdLink::from(PinnedLink::from_pin(pin.path()).unwrap());
        let id = program.attach_to_link(link.try_into().unwrap()).unwrap();
        drop(FdLink::try_from(program.take_link(id).unwrap()).unwrap());
    }
    fs::remove_dir_all(new).unwrap();
}

fn copy<K: aya::Pod>(object: &mut Ebpf, new: &Path, name: &str) {
    let entries: HashMap<_, K, Endpoint> = Map::HashMap(pinned(new, name)).try_into().unwrap();
    let mut old: HashMap<_, K, Endpoint> = object.map_mut(name).unwrap().try_into().unwrap();
    for entry in &entries {
        let (key, endpoint) = entry.unwrap();
        let endpoint = Endpoint {
            identity: 0,
            ..endpoint
        };
        old.insert(key, endpoint, 0).unwrap();
    }
}

fn pinned(directory: &Path, name: &str) -> MapData {
    MapData::from_pin(directory.join(name)).unwrap()
}

/// What the older programs have counted for all containers.
fn counted(pins: &Path) -> Counters {
    let counters: PerCpuArray<_, Counters> = Map::PerCpuArray(pinned(&pins.join("v1"), "counters"))
        .try_into()
        .unwrap();
    let slots = [counters.get(&0, 0).unwrap(), counters.get(&1, 0).unwrap()];
    let values = slots.iter().flat_map(|slot| slot.iter());
    values.fold(Counters::default(), |all, one| Counters {
        sent_packets: all.sent_packets + one.sent_packets,
        ..all
    })
}
