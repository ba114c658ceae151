//! Virtual addresses and the watch of all services, over the wire.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;

use common::{Cluster, block_on, create, instance};
use flynn_api::ErrorCode;
use flynn_api::client::Watch;
use flynn_api::discovery::{Event, EventKind, ServiceMeta, VirtualNetworks};
use futures::StreamExt as _;

async fn until(stream: &mut Watch, kind: EventKind) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let (_, event) = stream.next().await.unwrap().unwrap();
        events.push(event);
        if events.last().unwrap().kind == kind {
            return events;
        }
    }
}

fn told(events: &[Event]) -> Vec<(&str, EventKind)> {
    events
        .iter()
        .map(|event| (event.service.as_str(), event.kind))
        .collect()
}

#[test]
fn all_services_are_watched_in_one_stream() {
    use EventKind::{Current, Down, Leader, Service, ServiceGone, Up};
    block_on(async {
        let cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        for service in ["web", "empty"] {
            create(&client, service).await;
        }
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        let secret = ServiceMeta {
            data: serde_json::json!("secret"),
            ..ServiceMeta::default()
        };
        client.set_meta("web", &secret).await.unwrap();
        let mut watch = client.watch_all().await.unwrap();
        let events = until(&mut watch, Current).await;
        assert_eq!(
            told(&events),
            [
                ("empty", Service),
                ("web", Service),
                ("web", Up),
                ("web", Leader),
                ("", Current)
            ]
        );
        let web = client.service("web").await.unwrap();
        assert_eq!(events[1].addresses, web.addresses);

        create(&client, "more").await;
        client.register("more", &instance("10.0.0.2:80")).await.unwrap();
        let events = until(&mut watch, Leader).await;
        assert_eq!(told(&events), [("more", Service), ("more", Up), ("more", Leader)]);
        assert_eq!(
            events[0].addresses,
            client.service("more").await.unwrap().addresses
        );
        client
            .deregister("more", &instance("10.0.0.2:80").id)
            .await
            .unwrap();
        let meta = client.meta("web").await.unwrap();
        client.set_meta("web", &meta).await.unwrap();
        client.remove_service("more").await.unwrap();
        let events = until(&mut watch, ServiceGone).await;
        assert_eq!(
            told(&events),
            [("more", Down), ("more", Leader), ("more", ServiceGone)]
        );
        assert!(!events[0].expired, "it has said goodbye");
        // One service's own stream is what it always was.
        let mut own = client.watch("web").await.unwrap();
        let events = until(&mut own, Current).await;
        assert_eq!(told(&events)[..2], [("web", Up), ("web", Leader)]);
    });
}

#[test]
fn heartbeats_that_stop_are_told_from_goodbyes() {
    block_on(async {
        let mut cluster = Cluster::new();
        cluster.add_with(|options| options.timing.lease = std::time::Duration::from_millis(1500));
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        let mut watch = client.watch_all().await.unwrap();
        let events = until(&mut watch, EventKind::Down).await;
        assert!(events.last().unwrap().expired);
    });
}

#[test]
fn addresses_outlive_restarts_and_snapshots() {
    block_on(async {
        let mut cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        let networks = VirtualNetworks {
            ipv4: "10.99.0.0/20".parse().unwrap(),
            ipv6: "fd00:1:2:3::/64".parse().unwrap(),
        };
        client.set_virtual_networks(&networks).await.unwrap();
        client.set_virtual_networks(&networks).await.unwrap();
        assert_eq!(client.virtual_networks().await.unwrap(), networks);
        let moved = client
            .set_virtual_networks(&VirtualNetworks::default())
            .await
            .unwrap_err();
        assert_eq!(moved.code, ErrorCode::Conflict);
        let small = VirtualNetworks {
            ipv4: "10.99.0.0/28".parse().unwrap(),
            ..networks
        };
        assert_eq!(
            client.set_virtual_networks(&small).await.unwrap_err().code,
            ErrorCode::Validation
        );

        let mut addresses = BTreeMap::new();
        // More commands than there are between two snapshots.
        for at in 0..70 {
            let service = format!("s{at}");
            create(&client, &service).await;
            if at % 3 == 0 {
                client.remove_service(&service).await.unwrap();
                continue;
            }
            let of = client.service(&service).await.unwrap().addresses.unwrap();
            assert!(networks.ipv4.contains(&of.ipv4) && networks.ipv6.contains(&of.leader_ipv6));
            addresses.insert(service, of);
        }
        cluster.members[0].stop();
        cluster.members[0].start();
        cluster.ready(0).await;
        let client = cluster.client(0);
        for (service, of) in &addresses {
            assert_eq!(client.service(service).await.unwrap().addresses, Some(*of));
        }
        assert_eq!(client.virtual_networks().await.unwrap(), networks);
        create(&client, "next").await;
        let next = client.service("next").await.unwrap().addresses.unwrap();
        assert!(
            addresses.values().all(|of| of.number < next.number),
            "numbers rest before they are given again"
        );
    });
}
