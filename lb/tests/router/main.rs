//! The whole router against real backends and fakes of those that tell it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod backends;
mod fake;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use fake::{Backend, Control, PATIENCE, Running, route, until};
use flynn_api::discovery::Instance;
use flynn_api::route::{Certificate, Route, RouteKind};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A router with one route, `a.test`, to one backend.
async fn simple() -> (Arc<Control>, Running, Backend) {
    let control = Control::start().await;
    let backend = Backend::start("one").await;
    control.set_backends("web", &[&backend]);
    control.set_routes(vec![route("a.test")]);
    let router = Running::start(&control).await;
    router.until("a.test", 200).await;
    (control, router, backend)
}

#[tokio::test]
async fn requests_arrive_as_they_were_sent() {
    let (_control, router, _backend) = simple().await;
    let request = "GET /a//b/%2F;c?x=%20y&z HTTP/1.1\r\nHost: A.Test:80\r\nConnection: close, X-Hop\r\n\
                   X-Hop: 1\r\nX-Forwarded-For: 9.9.9.9\r\nTE: trailers\r\nCookie: a=b\r\n\r\n";
    let answer = router.raw(request.as_bytes()).await.unwrap();
    let said = answer.json();
    let headers = &said["headers"];
    assert_eq!(
        (answer.status, said["uri"].as_str()),
        (200, Some("/a//b/%2F;c?x=%20y&z"))
    );
    assert_eq!(headers["host"][0], "A.Test:80");
    assert_eq!(headers["x-forwarded-for"][0], "9.9.9.9, 127.0.0.1");
    assert_eq!(headers["x-forwarded-proto"][0], "http");
    assert_eq!(headers["x-forwarded-port"][0], router.http.port().to_string());
    assert_eq!(headers["cookie"][0], "a=b");
    assert_eq!(headers["x-request-id"][0].as_str().unwrap().len(), 36);
    assert!(
        headers["x-request-start"][0]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 1_700_000_000_000
    );
    for gone in ["x-hop", "te", "connection", "transfer-encoding"] {
        assert!(headers.get(gone).is_none(), "{gone} concerns one hop");
    }
    let answer = router.get("a.test", "/hops").await.unwrap();
    assert!(
        !answer.head.contains("x-hop") && answer.head.contains("x-kept"),
        "{}",
        answer.head
    );
}

#[tokio::test]
async fn what_is_not_there_is_said_cleanly() {
    let (control, router, backend) = simple().await;
    let answer = router.get("unknown.test", "/").await.unwrap();
    assert_eq!(
        (answer.status, answer.body.starts_with("404 no route")),
        (404, true)
    );
    backend.kill();
    router.until("a.test", 503).await;
    let answer = router.get("a.test", "/").await.unwrap();
    assert!(
        answer
            .body
            .starts_with("503 what should answer here cannot be reached"),
        "{}",
        answer.body
    );
    control.set_instances("web", Vec::new());
    until("nothing runs here", async || {
        let answer = router.get("a.test", "/").await.unwrap();
        answer.body.starts_with("503 nothing runs here")
    })
    .await;
    let request = b"HEAD / HTTP/1.1\r\nhost: unknown.test\r\nconnection: close\r\n\r\n";
    assert_eq!(router.raw(request).await.unwrap().body, "");
}

#[tokio::test]
async fn requests_with_two_readings_do_not_pass() {
    let (_control, router, backend) = simple().await;
    let before = backend.served.load(Ordering::Relaxed);
    let refused = [
        "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
        "POST / HTTP/1.1\r\nhost: a.test\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\nconnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a.test\r\nhost: b.test\r\nconnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a.test\r\nx : y\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a.test\r\n folded: y\r\n\r\n",
        "GET / HTTP/9.1\r\nhost: a.test\r\n\r\n",
        "\x16\x03\x01 garbage\r\n\r\n",
    ];
    for request in refused {
        let answer = router.raw(request.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 400, "{request:?}");
    }
    let connect = router
        .raw(b"CONNECT a.test:80 HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
        .await;
    assert_eq!(connect.unwrap().status, 405);
    let long = format!(
        "GET / HTTP/1.1\r\nhost: a.test\r\nx: {}\r\n\r\n",
        "y".repeat(300 << 10)
    );
    // The router hangs up while the client still sends: it may not see the answer.
    assert!(
        router
            .raw(long.as_bytes())
            .await
            .map_or(true, |answer| answer.status == 431)
    );
    assert_eq!(
        backend.served.load(Ordering::Relaxed),
        before,
        "nothing of it reached the backend"
    );

    // Both lengths: the one that RFC 9112 lets win is the only one that the backend ever sees.
    for lengths in [
        "content-length: 6\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 6",
    ] {
        let both =
            format!("POST /x HTTP/1.1\r\nhost: a.test\r\n{lengths}\r\nconnection: close\r\n\r\n0\r\n\r\nX");
        let said = router.raw(both.as_bytes()).await.unwrap().json();
        assert!(
            said["headers"]
                .get("content-length")
                .is_none_or(|length| length[0] == "0"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn bodies_of_unknown_length_arrive() {
    let (_control, router, _backend) = simple().await;
    for method in ["GET", "POST"] {
        let request = format!(
            "{method} /echo HTTP/1.1\r\nhost: a.test\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n\
             5\r\nhello\r\n0\r\n\r\n"
        );
        let answer = router.raw(request.as_bytes()).await.unwrap();
        assert!(answer.body.contains("hello"), "{method}: {answer:?}");
    }
}

#[tokio::test]
async fn protocols_can_change() {
    let (_control, router, _backend) = simple().await;
    let mut stream = TcpStream::connect(router.http).await.unwrap();
    let request = "POST /attach HTTP/1.1\r\nhost: a.test\r\nconnection: Upgrade\r\nupgrade: echo\r\n\
                   content-length: 5\r\n\r\nhello";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"hello") {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        read.push(byte[0]);
    }
    let head = String::from_utf8(read).unwrap().to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 101") && head.contains("upgrade: echo"),
        "{head}"
    );
    for round in 0..3 {
        let sent = format!("round {round}");
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(back, sent.as_bytes());
    }
    let metrics = TcpStream::connect(router.api).await.unwrap();
    assert!(text(metrics, "/metrics").await.contains("flynn_router_tunnels 1"));
}

async fn text(mut stream: TcpStream, target: &str) -> String {
    let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = String::new();
    stream.read_to_string(&mut read).await.unwrap();
    read
}

/// Connects with TLS, trusting anyone; gives the leaf and the protocol agreed on.
async fn tls(router: &Running, name: &str, alpn: &[&[u8]]) -> tokio_rustls::client::TlsStream<TcpStream> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trust::Anyone))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let stream = TcpStream::connect(router.https).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .unwrap()
}

mod trust {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub(crate) struct Anyone;

    impl ServerCertVerifier for Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            rustls::crypto::aws_lc_rs::default_provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}

#[tokio::test]
async fn certificates_go_by_name_and_http2_by_agreement() {
    let (control, router, _backend) = simple().await;
    let made = rcgen::generate_simple_self_signed(["b.test".to_owned()]).unwrap();
    let certificate = Certificate {
        id: String::new(),
        cert: made.cert.pem(),
        key: made.signing_key.serialize_pem(),
    };
    let broken = Certificate {
        cert: "nonsense".into(),
        ..Certificate::default()
    };
    control.set_routes(vec![
        Route {
            certificate: Some(broken),
            ..route("a.test")
        },
        Route {
            certificate: Some(certificate),
            ..route("b.test")
        },
    ]);
    router.until("b.test", 200).await;
    let leaf = |stream: &tokio_rustls::client::TlsStream<TcpStream>| {
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let (b, a) = (
        tls(&router, "b.test", &[b"h2"]).await,
        tls(&router, "a.test", &[]).await,
    );
    assert_eq!(leaf(&b), *made.cert.der());
    assert_ne!(
        leaf(&a),
        *made.cert.der(),
        "the default, as its own cannot be used"
    );
    assert_eq!(b.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));

    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(b))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://b.test/x?y")
        .body(Full::new(bytes::Bytes::from("body")))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let said: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (said["uri"].as_str(), said["headers"]["host"][0].as_str()),
        (Some("/x?y"), Some("b.test"))
    );
    assert_eq!(said["headers"]["x-forwarded-proto"][0], "https");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_instance_costs_no_request() {
    let control = Control::start().await;
    let mut backends = vec![
        Backend::start("a").await,
        Backend::start("b").await,
        Backend::start("c").await,
    ];
    control.set_backends("web", &backends.iter().collect::<Vec<_>>());
    control.set_routes(vec![route("a.test")]);
    let router = Running::start(&control).await;
    router.until("a.test", 200).await;

    let (done, failed, served) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (done, failed, served) = (Arc::clone(&done), Arc::clone(&failed), Arc::clone(&served));
        let addr = router.http;
        clients.spawn(async move {
            let stream = TcpStream::connect(addr).await.unwrap();
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .unwrap();
            tokio::spawn(connection);
            while !done.load(Ordering::Relaxed) {
                sender.ready().await.unwrap();
                let request = http::Request::get("/").header("host", "a.test");
                let request = request
                    .body(http_body_util::Empty::<bytes::Bytes>::new())
                    .unwrap();
                let response = sender.send_request(request).await.unwrap();
                if response.status() != 200 {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
                response.into_body().collect().await.unwrap();
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    // Killed without a word to discoverd, replaced, three times.
    for _ in 0..3 {
        go_on(&served).await;
        backends.remove(0).kill();
        go_on(&served).await;
        let new = Backend::start("new").await;
        let known = Arc::clone(&new.served);
        backends.push(new);
        control.set_backends("web", &backends.iter().collect::<Vec<_>>());
        // The next kill must leave somebody whom the router knows.
        until("the new one serves", async || known.load(Ordering::Relaxed) > 0).await;
    }
    done.store(true, Ordering::Relaxed);
    let ended = async {
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await;
    ended.expect("a client waits for its answer");
    assert_eq!(
        failed.load(Ordering::Relaxed),
        0,
        "of {}",
        served.load(Ordering::Relaxed)
    );
}

/// Waits until clients have had five hundred more answers.
async fn go_on(served: &AtomicUsize) {
    let target = served.load(Ordering::Relaxed) + 500;
    until("the clients go on", async || {
        served.load(Ordering::Relaxed) >= target
    })
    .await;
}

/// Whoever comes before the router knows its routes waits until it does.
#[tokio::test]
async fn the_first_request_is_answered_like_any_other() {
    let control = Control::start().await;
    let backend = Backend::start("one").await;
    control.set_backends("web", &[&backend]);
    control.set_routes(vec![route("a.test")]);
    for _ in 0..5 {
        let router = Running::start(&control).await;
        assert_eq!(router.get("a.test", "/").await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn without_those_who_tell_it_the_router_goes_on() {
    let (control, router, _backend) = simple().await;
    until("what is known is on the disk", async || {
        let saved = std::fs::read_to_string(router.data.path().join("state.json")).unwrap_or_default();
        saved.contains("a.test") && saved.contains("127.0.0.1")
    })
    .await;
    control.away.cancel();
    until("they are away", async || {
        TcpStream::connect(control.discoverd).await.is_err()
    })
    .await;
    assert_eq!(router.get("a.test", "/").await.unwrap().status, 200);
    let data = Arc::clone(&router.data);
    drop(router);
    let again = Running::with_data(&control, data).await;
    assert_eq!(
        again.get("a.test", "/").await.unwrap().status,
        200,
        "at once, from the disk"
    );
}

#[tokio::test]
async fn requests_under_way_finish_when_the_router_stops() {
    let (_control, mut router, backend) = simple().await;
    let (http, before) = (router.http, backend.served.load(Ordering::Relaxed));
    let slow = tokio::spawn(async move {
        let stream = TcpStream::connect(http).await.unwrap();
        text_of(stream, "a.test", "/slow").await
    });
    until("the backend has the request", async || {
        backend.served.load(Ordering::Relaxed) > before
    })
    .await;
    router.stop.cancel();
    until("nobody listens any more", async || {
        TcpStream::connect(http).await.is_err()
    })
    .await;
    backend.release.notify_one();
    assert!(slow.await.unwrap().ends_with("at last"));
    (&mut router.task).await.unwrap().unwrap();
}

async fn text_of(mut stream: TcpStream, host: &str, target: &str) -> String {
    let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = String::new();
    stream.read_to_string(&mut read).await.unwrap();
    read
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let (_control, router, _backend) = simple().await;
    let stream = TcpStream::connect(router.http).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let body: Vec<u8> = (0..16u32 << 20)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    let request = http::Request::post("/echo").header("host", "a.test");
    let request = request.body(Full::new(bytes::Bytes::from(body.clone()))).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let back = response.into_body().collect().await.unwrap().to_bytes();
    assert!(back == body, "{} of {} bytes came back", back.len(), body.len());
}

#[tokio::test]
async fn clients_stay_where_they_were_and_leaders_lead() {
    let control = Control::start().await;
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    control.set_backends("web", &[&one, &two]);
    control.set_routes(vec![
        Route {
            sticky: true,
            ..route("sticky.test")
        },
        Route {
            leader: true,
            ..route("leader.test")
        },
    ]);
    let router = Running::start(&control).await;
    router.until("sticky.test", 200).await;
    let first = router.get("sticky.test", "/").await.unwrap();
    let cookie = first
        .head
        .split("set-cookie: ")
        .nth(1)
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    assert!(
        !cookie.contains("127.0.0.1"),
        "the cookie says nothing about the backend: {cookie}"
    );
    for _ in 0..20 {
        let request =
            format!("GET / HTTP/1.1\r\nhost: sticky.test\r\ncookie: {cookie}\r\nconnection: close\r\n\r\n");
        let answer = router.raw(request.as_bytes()).await.unwrap();
        assert_eq!(answer.json()["name"], first.json()["name"]);
        assert!(!answer.head.contains("set-cookie"));
        assert_eq!(
            router.get("leader.test", "/").await.unwrap().json()["name"],
            "one"
        );
    }
}

#[tokio::test]
async fn tcp_routes_carry_bytes() {
    let (control, router, backend) = simple().await;
    let port = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    control.set_instances(
        "raw",
        vec![Instance::new(
            "tcp",
            backend.addr.to_string(),
            flynn_api::Meta::new(),
        )],
    );
    let tcp = |port: u16| Route {
        kind: RouteKind::Tcp,
        id: format!("tcp/{port}"),
        service: "raw".into(),
        port,
        ..Route::default()
    };
    control.set_routes(vec![route("a.test"), tcp(port), tcp(22)]);
    until("the route's port is served", async || {
        TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    assert!(text(stream, "/").await.contains("200 OK"));
    let metrics = text(TcpStream::connect(router.api).await.unwrap(), "/metrics").await;
    assert!(
        metrics.contains("flynn_router_refused_routes 1"),
        "a route must not take ssh's port"
    );
}
