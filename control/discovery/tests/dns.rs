//! DNS and the plain API on the gateway address, asked over real sockets.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Cluster, block_on, create, eventually, instance};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{HOST_SERVICE, Instance, ServiceConfig, ServiceMeta};
use flynn_api::network::{IDENTITIES_SERVICE, endpoints_service};
use flynn_api::{ErrorCode, Meta};
use flynn_discovery::dns::zone::{Reaction, Transport, react};
use flynn_discovery::dns::{Server, Upstreams, read_framed, write_framed};
use flynn_discovery::state::State;
use flynn_discovery::view::View;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use proptest::prelude::*;
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

/// A cluster of one with a lease, so that its gateway is open, and the gateway's address.
async fn with_gateway() -> (Cluster, Ipv4Addr) {
    let cluster = Cluster::one();
    cluster.ready(0).await;
    let [_, a, b, _] = cluster.members[0].options.host_ip.octets();
    // Next to the host's own address, which ends with 1: the subnet begins at 128.
    lease(&cluster, &format!("127.{a}.{b}.128/25"), 0).await;
    let gateway = Ipv4Addr::new(127, a, b, 129);
    open(&cluster, gateway).await;
    (cluster, gateway)
}

async fn lease(cluster: &Cluster, subnet: &str, index: u64) -> u64 {
    let client = cluster.client(0);
    client
        .ensure_service(HOST_SERVICE, &ServiceConfig::default())
        .await
        .unwrap();
    let leases = json!({ "network": "127.0.0.0/8", "leases": {
        "h0": { "subnet": subnet, "address": cluster.members[0].options.host_ip } } });
    let meta = ServiceMeta {
        data: leases,
        index,
        leader_id: None,
    };
    client.set_meta(HOST_SERVICE, &meta).await.unwrap().index
}

async fn open(cluster: &Cluster, gateway: Ipv4Addr) {
    let dns = SocketAddr::from((gateway, cluster.members[0].options.dns_port));
    eventually("DNS at the gateway address", async || {
        let answer = tokio::time::timeout(
            Duration::from_millis(200),
            ask(dns, "discoverd.", RecordType::SOA),
        );
        answer.await.ok()
    })
    .await;
    let plain = plain(cluster, gateway);
    eventually("the API at the gateway address", async || plain.ping().await.ok()).await;
}

fn plain(cluster: &Cluster, gateway: Ipv4Addr) -> DiscoveryClient {
    let port = cluster.members[0].options.api_port;
    DiscoveryClient::new(Http::new(&format!("http://{gateway}:{port}")).unwrap())
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn exchange(server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    let mut buffer = vec![0; 65_535];
    loop {
        // Nothing may listen yet.
        if socket.send(bytes).await.is_ok()
            && let Ok(Ok(length)) =
                tokio::time::timeout(Duration::from_secs(6), socket.recv(&mut buffer)).await
        {
            buffer.truncate(length);
            return buffer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask(server: SocketAddr, name: &str, kind: RecordType) -> Message {
    let query = query(name, kind);
    let answer = Message::from_vec(&exchange(server, &query.to_vec().unwrap()).await).unwrap();
    assert_eq!(answer.metadata.id, query.metadata.id);
    assert_eq!(answer.queries, query.queries);
    answer
}

async fn ask_tcp(stream: &mut TcpStream, name: &str, kind: RecordType) -> Message {
    write_framed(stream, &query(name, kind).to_vec().unwrap())
        .await
        .unwrap();
    Message::from_vec(&read_framed(stream).await.unwrap().unwrap()).unwrap()
}

fn addresses(message: &Message) -> BTreeSet<IpAddr> {
    message
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .collect()
}

#[test]
fn names_of_services_leaders_and_instances() {
    block_on(async {
        let (cluster, gateway) = with_gateway().await;
        let client = cluster.client(0);
        create(&client, "web").await;
        create(&client, "empty").await;
        for addr in [
            "10.0.0.1:80",
            "10.0.0.2:80",
            "10.0.0.3:80",
            "10.0.0.4:80",
            "10.0.0.4:81",
            "[fd00::1]:80",
        ] {
            client.register("web", &instance(addr)).await.unwrap();
        }
        let dns = SocketAddr::from((gateway, cluster.members[0].options.dns_port));
        // Three of four over UDP, shuffled, living zero seconds; all over TCP.
        let mut seen = BTreeSet::new();
        let began = Instant::now();
        while seen.len() < 4 && began.elapsed() < Duration::from_secs(10) {
            let answer = ask(dns, "web.discoverd.", RecordType::A).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
            assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
            assert_eq!((answer.answers.len(), addresses(&answer).len()), (3, 3));
            assert!(answer.answers.iter().all(|record| record.ttl == 0));
            seen.extend(addresses(&answer));
        }
        assert_eq!(seen.len(), 4);
        let mut tcp = TcpStream::connect(dns).await.unwrap();
        let answer = ask_tcp(&mut tcp, "web.discoverd.", RecordType::A).await;
        assert_eq!((answer.answers.len(), addresses(&answer)), (4, seen));
        let answer = ask_tcp(&mut tcp, "WEB.Discoverd.", RecordType::AAAA).await;
        assert_eq!(addresses(&answer), BTreeSet::from(["fd00::1".parse().unwrap()]));
        assert_eq!(
            answer.queries[0].name().to_string(),
            "WEB.Discoverd.",
            "the case is kept"
        );

        let leader = ask(dns, "leader.web.discoverd.", RecordType::A).await;
        assert_eq!(addresses(&leader), BTreeSet::from(["10.0.0.1".parse().unwrap()]));
        let id = Instance::id_of("http", "10.0.0.2:80");
        let one = ask(dns, &format!("{id}.web._i.discoverd."), RecordType::A).await;
        assert_eq!(addresses(&one), BTreeSet::from(["10.0.0.2".parse().unwrap()]));

        let places = ask_tcp(&mut tcp, "_web._tcp.discoverd.", RecordType::SRV).await;
        assert_eq!((places.answers.len(), places.additionals.len()), (6, 6));
        for record in &places.answers {
            let RData::SRV(place) = &record.data else {
                panic!("{record}")
            };
            assert!((80..=81).contains(&place.port) && place.priority == 1 && place.weight == 1);
            assert!(
                places
                    .additionals
                    .iter()
                    .any(|additional| additional.name == place.target)
            );
            let kinds = [RecordType::A, RecordType::AAAA];
            let mut found = 0;
            for kind in kinds {
                found += ask(dns, &place.target.to_string(), kind).await.answers.len();
            }
            assert_eq!(found, 1);
        }
        assert_eq!(
            ask(dns, "_web._http.discoverd.", RecordType::SRV)
                .await
                .answers
                .len(),
            3
        );
        assert!(
            ask(dns, "_web._udp.discoverd.", RecordType::SRV)
                .await
                .answers
                .is_empty()
        );

        // Virtual addresses are there whether anybody serves them or not.
        for service in ["web", "empty"] {
            let of = client.service(service).await.unwrap().addresses.unwrap();
            let names = [
                (format!("vip.{service}.discoverd."), of.ipv4, of.ipv6),
                (
                    format!("VIP.Leader.{service}.discoverd."),
                    of.leader_ipv4,
                    of.leader_ipv6,
                ),
            ];
            for (name, ipv4, ipv6) in names {
                let answer = ask(dns, &name, RecordType::A).await;
                assert_eq!(addresses(&answer), BTreeSet::from([ipv4.into()]), "{name}");
                let answer = ask(dns, &name, RecordType::AAAA).await;
                assert_eq!(addresses(&answer), BTreeSet::from([ipv6.into()]), "{name}");
                assert!(ask(dns, &name, RecordType::TXT).await.answers.is_empty());
            }
        }

        // There, but without such records; and not there.
        for (name, kind) in [
            ("empty.discoverd.", RecordType::A),
            ("leader.empty.discoverd.", RecordType::A),
            ("web.discoverd.", RecordType::TXT),
            ("discoverd.", RecordType::A),
            ("_i.discoverd.", RecordType::A),
            ("web._i.discoverd.", RecordType::A),
        ] {
            let answer = ask(dns, name, kind).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
            assert!(
                answer.answers.is_empty() && answer.authorities[0].record_type() == RecordType::SOA,
                "{name}"
            );
        }
        for name in [
            "nobody.discoverd.",
            "leader.nobody.discoverd.",
            "vip.nobody.discoverd.",
            "vip.leader.nobody.discoverd.",
            "vip.discoverd.",
            "x.web._i.discoverd.",
            "a.b.c.d.discoverd.",
        ] {
            let answer = ask(dns, name, RecordType::A).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
            assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
        }
        // What is not ours fails when there is nobody to ask.
        assert_eq!(
            ask(dns, "example.com.", RecordType::A)
                .await
                .metadata
                .response_code,
            ResponseCode::ServFail
        );

        // Gone at once.
        client
            .deregister("web", &instance("10.0.0.1:80").id)
            .await
            .unwrap();
        let leader = ask(dns, "leader.web.discoverd.", RecordType::A).await;
        assert_eq!(addresses(&leader), BTreeSet::from(["10.0.0.2".parse().unwrap()]));
    });
}

#[test]
fn a_restart_answers_at_once_by_the_last_good_view() {
    block_on(async {
        let (mut cluster, gateway) = with_gateway().await;
        let client = cluster.client(0);
        create(&client, "web").await;
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        // With a second voter that is gone for good, nobody can lead.
        cluster.add();
        cluster.add();
        eventually("three voters", async || {
            let peers = client.peers().await.ok()?;
            (peers.iter().filter(|peer| peer.voter).count() == 3).then_some(())
        })
        .await;
        for member in &mut cluster.members {
            member.kill();
        }
        cluster.members[0].start();
        let dns = SocketAddr::from((gateway, cluster.members[0].options.dns_port));
        let answer = ask(dns, "web.discoverd.", RecordType::A).await;
        assert_eq!(addresses(&answer), BTreeSet::from(["10.0.0.1".parse().unwrap()]));
        assert_eq!(plain(&cluster, gateway).instances("web").await.unwrap().len(), 1);
    });
}

#[test]
fn the_gateway_takes_only_what_is_the_callers_own() {
    block_on(async {
        let (cluster, gateway) = with_gateway().await;
        let plain = plain(&cluster, gateway);
        create(&plain, "web").await;
        // On loopback this process calls from 127.0.0.1, as a container calls from its own address.
        let host = cluster.members[0].options.host_ip;
        plain.register("web", &instance("127.0.0.1:80")).await.unwrap();
        plain.register("web", &instance("127.0.0.1:81")).await.unwrap();
        plain
            .deregister("web", &instance("127.0.0.1:81").id)
            .await
            .unwrap();
        let of_host = plain
            .register("web", &instance(&format!("{host}:80")))
            .await
            .unwrap_err();
        assert_eq!(of_host.code, ErrorCode::Forbidden);
        let foreign = instance("10.9.9.9:80");
        assert_eq!(
            plain.register("web", &foreign).await.unwrap_err().code,
            ErrorCode::Forbidden
        );
        cluster.client(0).register("web", &foreign).await.unwrap();
        assert_eq!(
            plain.deregister("web", &foreign.id).await.unwrap_err().code,
            ErrorCode::Forbidden
        );
        let stolen = Instance {
            id: foreign.id,
            ..instance(&format!("{host}:80"))
        };
        assert_eq!(
            plain.register("web", &stolen).await.unwrap_err().code,
            ErrorCode::Forbidden
        );
        assert_eq!(plain.instances("web").await.unwrap().len(), 2);
        let meta = ServiceMeta {
            data: json!(1),
            index: 0,
            leader_id: None,
        };
        assert_eq!(
            plain.set_meta("web", &meta).await.unwrap_err().code,
            ErrorCode::Forbidden
        );
        assert_eq!(
            plain.remove_service("web").await.unwrap_err().code,
            ErrorCode::Forbidden
        );
        assert_eq!(
            plain.join_token().await.unwrap_err().code,
            ErrorCode::NotFound,
            "not even routed"
        );
        plain.meta(HOST_SERVICE).await.unwrap();
    });
}

#[test]
fn containers_of_apps_are_not_where_the_platform_is() {
    block_on(async {
        let (cluster, gateway) = with_gateway().await;
        let (plain, client) = (plain(&cluster, gateway), cluster.client(0));
        let own = instance("127.0.0.1:80");
        create(&client, "controller").await;
        let refusal = async || plain.register("controller", &own).await.unwrap_err().code;
        assert_eq!(
            refusal().await,
            ErrorCode::Unavailable,
            "nobody knows whose it is"
        );
        let config = ServiceConfig::default();
        let unknown = plain.create_service("scheduler", &config).await.unwrap_err();
        assert_eq!(unknown.code, ErrorCode::Unavailable);

        let [_, a, b, _] = gateway.octets();
        let of_host = endpoints_service(&format!("127.{a}.{b}.128/25"));
        let put = async |service: &str, data: serde_json::Value| {
            client.ensure_service(service, &config).await.unwrap();
            let index = client.meta(service).await.map_or(0, |meta| meta.index);
            let meta = ServiceMeta {
                data,
                index,
                leader_id: None,
            };
            client.set_meta(service, &meta).await.unwrap();
        };
        let endpoints = json!({ "version": 1, "host": "h0", "identities": { "127.0.0.1": 20 } });
        put(&of_host, endpoints).await;
        let identities =
            |system: &[&str]| json!({ "version": 1, "next": 21, "apps": { "shop": 20 }, "system": system });
        put(IDENTITIES_SERVICE, identities(&[])).await;
        assert_eq!(refusal().await, ErrorCode::Forbidden);
        assert!(client.instances("controller").await.unwrap().is_empty());
        create(&plain, "web").await;
        plain.register("web", &own).await.unwrap();
        put(IDENTITIES_SERVICE, identities(&["shop"])).await;
        plain.register("controller", &own).await.unwrap();
    });
}

#[test]
fn the_gateway_follows_the_lease() {
    block_on(async {
        let (cluster, gateway) = with_gateway().await;
        let index = cluster.client(0).meta(HOST_SERVICE).await.unwrap().index;
        let [_, a, b, _] = gateway.octets();
        lease(&cluster, &format!("127.{a}.{b}.64/26"), index).await;
        let moved = Ipv4Addr::new(127, a, b, 65);
        open(&cluster, moved).await;
        let port = cluster.members[0].options.api_port;
        eventually("the old address is closed", async || {
            TcpStream::connect((gateway, port)).await.is_err().then_some(())
        })
        .await;
    });
}

/// Both at one port: the one that the kernel gives for UDP may be somebody's for TCP.
async fn udp_and_tcp() -> (UdpSocket, TcpListener) {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        match TcpListener::bind(udp.local_addr().unwrap()).await {
            Ok(tcp) => return (udp, tcp),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse),
        }
    }
}

/// An upstream that answers over UDP what `udp` makes of a query, over TCP with 40 addresses.
async fn upstream(udp: impl Fn(&Message) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let (socket, listener) = udp_and_tcp().await;
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
            for answer in udp(&Message::from_vec(&buffer[..length]).unwrap()) {
                socket.send_to(&answer, client).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            while let Ok(Some(query)) = read_framed(&mut stream).await {
                let answer = reply(&Message::from_vec(&query).unwrap(), 40);
                write_framed(&mut stream, &answer.to_vec().unwrap())
                    .await
                    .unwrap();
            }
        }
    });
    addr
}

fn reply(query: &Message, count: u8) -> Message {
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.add_queries(query.queries.clone());
    for last in 0..count {
        let data = RData::A(hickory_proto::rr::rdata::A::new(192, 0, 2, last));
        let name = query.queries[0].name().clone();
        answer.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, data));
    }
    answer
}

async fn server(upstreams: Vec<SocketAddr>) -> SocketAddr {
    let server = Server::new(Arc::new(View::default()), Upstreams::new(upstreams));
    let (udp, tcp) = udp_and_tcp().await;
    let addr = tcp.local_addr().unwrap();
    tokio::spawn(server.clone().serve_tcp(tcp));
    tokio::spawn(server.serve_udp(udp.into_std().unwrap()));
    addr
}

#[test]
fn other_names_are_forwarded() {
    block_on(async {
        let good = upstream(|query| {
            // Forged answers first: of another id, to another question, no answer at all.
            let mut other_id = reply(query, 9);
            other_id.metadata.id = other_id.metadata.id.wrapping_add(1);
            let mut other_name = reply(query, 9);
            other_name.queries[0].set_name(Name::from_str("evil.example.").unwrap());
            [&other_id, &other_name, query, &reply(query, 1)]
                .map(|message| message.to_vec().unwrap())
                .into()
        })
        .await;
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dns = server(vec![silent.local_addr().unwrap(), good]).await;
        let answer = ask(dns, "example.com.", RecordType::A).await;
        assert_eq!(addresses(&answer), BTreeSet::from(["192.0.2.0".parse().unwrap()]));
        let mut tcp = TcpStream::connect(server(vec![good]).await).await.unwrap();
        assert_eq!(
            ask_tcp(&mut tcp, "example.com.", RecordType::A)
                .await
                .answers
                .len(),
            40
        );
    });
}

#[test]
fn an_upstream_that_does_not_know_is_not_the_last_word() {
    block_on(async {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let ill = upstream(move |query| {
            count.fetch_add(1, Ordering::Relaxed);
            let mut answer = reply(query, 0);
            answer.metadata.response_code = ResponseCode::ServFail;
            vec![answer.to_vec().unwrap()]
        })
        .await;
        let well = upstream(|query| vec![reply(query, 1).to_vec().unwrap()]).await;
        let dns = server(vec![ill, well]).await;
        for name in ["a.example.", "b.example."] {
            assert_eq!(ask(dns, name, RecordType::A).await.answers.len(), 1);
        }
        assert_eq!(
            asked.load(Ordering::Relaxed),
            1,
            "the one that knows is asked first then"
        );
        let alone = server(vec![ill]).await;
        let answer = ask(alone, "a.example.", RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    });
}

#[test]
fn who_asks_alike_is_asked_for_once() {
    block_on(async {
        let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dns = server(vec![upstream.local_addr().unwrap()]).await;
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let names = ["same.example."; 10].into_iter().chain(["last.example."]);
        let mut ids = BTreeSet::new();
        for (id, name) in (1..).zip(names) {
            let mut query = query(name, RecordType::A);
            query.metadata.id = id;
            ids.insert(id);
            client.send_to(&query.to_vec().unwrap(), dns).await.unwrap();
        }
        let mut buffer = [0; 512];
        for _ in 0..2 {
            let (length, from) = upstream.recv_from(&mut buffer).await.unwrap();
            let answer = reply(&Message::from_vec(&buffer[..length]).unwrap(), 1);
            upstream.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        }
        while !ids.is_empty() {
            let received = timeout(Duration::from_secs(20), client.recv_from(&mut buffer)).await;
            let (length, _) = received.unwrap().unwrap();
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            assert!(
                ids.remove(&answer.metadata.id) && answer.answers.len() == 1,
                "{answer:?}"
            );
        }
        assert!(upstream.try_recv_from(&mut buffer).is_err(), "a third was sent");
    });
}

#[test]
fn one_client_leaves_room_for_others_and_for_what_is_known() {
    block_on(async {
        let known = ["kept.example.", "other.example."].map(|name| Name::from_str(name).unwrap());
        let unknown = Arc::new(Mutex::new(BTreeSet::new()));
        let seen = Arc::clone(&unknown);
        let upstream = upstream(move |query| {
            let name = query.queries[0].name();
            if known.contains(name) {
                return vec![reply(query, 1).to_vec().unwrap()];
            }
            seen.lock().unwrap().insert(name.to_string());
            Vec::new()
        })
        .await;
        let dns = server(vec![upstream]).await;
        assert_eq!(ask(dns, "kept.example.", RecordType::A).await.answers.len(), 1);
        let busy = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        for number in 0..70 {
            let query = query(&format!("{number}.silent.example."), RecordType::A);
            busy.send_to(&query.to_vec().unwrap(), dns).await.unwrap();
        }
        let mut buffer = [0; 512];
        busy.recv_from(&mut buffer).await.unwrap();
        assert_eq!(ask(dns, "kept.example.", RecordType::A).await.answers.len(), 1);
        let other = UdpSocket::bind("127.0.0.2:0").await.unwrap();
        let query = query("other.example.", RecordType::A).to_vec().unwrap();
        other.send_to(&query, dns).await.unwrap();
        let received = timeout(Duration::from_secs(20), other.recv_from(&mut buffer)).await;
        let (length, _) = received.unwrap().unwrap();
        assert_eq!(Message::from_vec(&buffer[..length]).unwrap().answers.len(), 1);
        for _ in 1..70 {
            let answered = timeout(Duration::from_secs(20), busy.recv_from(&mut buffer)).await;
            answered.unwrap().unwrap();
        }
        assert_eq!(unknown.lock().unwrap().len(), 64);
    });
}

/// Connections that say nothing hold up nobody else.
#[test]
fn one_client_has_a_part_of_the_connections() {
    block_on(async {
        let dns = server(Vec::new()).await;
        let mut silent = Vec::new();
        for _ in 0..300 {
            silent.push(TcpStream::connect(dns).await.unwrap());
        }
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut other = socket.connect(dns).await.unwrap();
        let answer = timeout(
            Duration::from_secs(5),
            ask_tcp(&mut other, "none.discoverd.", RecordType::A),
        );
        assert_eq!(
            answer.await.unwrap().metadata.response_code,
            ResponseCode::NXDomain
        );
    });
}

#[test]
fn cut_answers_are_fetched_whole_and_cut_to_what_the_client_takes() {
    block_on(async {
        let cut = upstream(|query| vec![reply(query, 0).truncate().to_vec().unwrap()]).await;
        let dns = server(vec![cut]).await;
        let answer = ask(dns, "example.com.", RecordType::A).await;
        assert!(
            answer.metadata.truncation && answer.answers.is_empty(),
            "40 addresses are more than 512 bytes"
        );
        let mut roomy = query("example.com.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        roomy.set_edns(edns);
        let answer = Message::from_vec(&exchange(dns, &roomy.to_vec().unwrap()).await).unwrap();
        assert_eq!((answer.metadata.truncation, answer.answers.len()), (false, 40));
    });
}

#[test]
fn strange_queries() {
    let state = State::default();
    let mut rng = rand::rng();
    let mut code = |message: &[u8]| match react(message, Transport::Udp, &state, 1, &mut rng) {
        Reaction::Answer(answer) => Some(Message::from_vec(&answer).unwrap().metadata.response_code),
        Reaction::Drop | Reaction::Forward | Reaction::Reverse(_) => None,
    };
    assert_eq!(code(b"short"), None);
    let mut no_question = query("web.discoverd.", RecordType::A);
    no_question.queries.clear();
    assert_eq!(code(&no_question.to_vec().unwrap()), Some(ResponseCode::FormErr));
    let mut update = query("web.discoverd.", RecordType::A);
    update.metadata.op_code = OpCode::Status;
    assert_eq!(code(&update.to_vec().unwrap()), Some(ResponseCode::NotImp));
    let mut chaos = query("web.discoverd.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&chaos.to_vec().unwrap()), Some(ResponseCode::Refused));
    let mut future = query("web.discoverd.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    future.set_edns(edns);
    // BADVERS and BADSIG share a number.
    assert_eq!(
        code(&future.to_vec().unwrap()).map(u16::from),
        Some(u16::from(ResponseCode::BADVERS))
    );
    let whole = query("web.discoverd.", RecordType::A).to_vec().unwrap();
    assert_eq!(code(&whole[..whole.len() - 3]), Some(ResponseCode::FormErr));
    // A name that points at itself.
    let mut looped = whole[..12].to_vec();
    looped.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(code(&looped), Some(ResponseCode::FormErr));
    let response = reply(&query("web.discoverd.", RecordType::A), 1)
        .to_vec()
        .unwrap();
    assert_eq!(code(&response), None, "answers are not answered");
}

#[test]
fn addresses_have_names() {
    block_on(async {
        let (cluster, gateway) = with_gateway().await;
        let client = cluster.client(0);
        let dns = SocketAddr::from((gateway, cluster.members[0].options.dns_port));
        let config = ServiceConfig::default();
        client.create_service("web", &config).await.unwrap();
        for addr in ["100.100.7.9:80", "[fd00::1a]:80"] {
            client.register("web", &instance(addr)).await.unwrap();
        }
        let six = format!("a.1.{}d.f.ip6.arpa.", "0.".repeat(28));
        for (name, addr) in [
            ("9.7.100.100.IN-ADDR.arpa.", "100.100.7.9:80"),
            (&six, "[fd00::1a]:80"),
        ] {
            let answer = ask(dns, name, RecordType::PTR).await;
            let want = format!("{}.web._i.discoverd.", instance(addr).id);
            assert!(
                matches!(&answer.answers[..], [one] if one.data.to_string() == want),
                "{answer:?}"
            );
        }
        // There is no upstream to ask.
        let other = ask(dns, "9.7.100.192.in-addr.arpa.", RecordType::PTR).await;
        assert_eq!(other.metadata.response_code, ResponseCode::ServFail);
    });
}

proptest! {
    #[test]
    fn any_bytes_get_a_proper_answer_or_none(bytes: Vec<u8>) {
        check(&bytes)?;
    }

    #[test]
    fn a_damaged_query_gets_a_proper_answer_or_none(at in 0_usize..40, byte: u8, cut in 0_usize..40) {
        let mut bytes = query("leader.web.discoverd.", RecordType::SRV).to_vec().unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        check(&bytes)?;
    }
}

fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
    let view = View::default();
    let create = flynn_discovery::command::Command::CreateService {
        service: "web".into(),
        leader_type: flynn_api::discovery::LeaderType::Oldest,
    };
    view.apply(1, &create);
    let instance = Instance::new("tcp", "10.0.0.1:80", Meta::new());
    view.apply(
        2,
        &flynn_discovery::command::Command::PutInstance {
            service: "web".into(),
            instance: instance.into(),
            member: 1,
        },
    );
    let reaction = view.read(|state| react(bytes, Transport::Udp, state, 2, &mut rand::rng()));
    if let Reaction::Answer(answer) = reaction {
        prop_assert!(answer.len() <= 512.max(bytes.len()));
        let parsed = Message::from_vec(&answer);
        prop_assert!(parsed.is_ok(), "{parsed:?}");
        prop_assert_eq!(&answer[..2], &bytes[..2]);
        prop_assert!(answer[2] & 0x80 != 0);
    }
    Ok(())
}
