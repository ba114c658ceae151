//! Clients and servers of this crate against each other, over each transport.
#![cfg(all(feature = "client", feature = "server"))]
#![expect(clippy::unwrap_used, reason = "the helpers of a test panic as the test does")]

use axum::routing::{get, post, put};
use axum::{Extension, Router};
use flynn_api::client::{Http, attach, host::HostClient};
use flynn_api::host::{AttachRequest, Job, attach as kinds};
use flynn_api::server::{CancellationToken, Json, Listener, Peer, StrictJson, events, serve};
use flynn_api::tls::{Ca, ClientAuth, PeerIdentity, install_provider, joining_client_config};
use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn echo(mut request: axum::extract::Request) -> axum::response::Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        while let Some(frame) = attach::read_frame(&mut stream).await.unwrap() {
            attach::write_frame(&mut stream, kinds::STDOUT, &frame.payload)
                .await
                .unwrap();
        }
        stream.shutdown().await.unwrap();
    });
    let headers = [("connection", "Upgrade"), ("upgrade", "flynn-attach/0")];
    axum::response::IntoResponse::into_response((http::StatusCode::SWITCHING_PROTOCOLS, headers))
}

fn router() -> Router {
    Router::new()
        .route(
            "/who",
            get(|Extension(peer): Extension<Peer>| async move {
                let who = peer
                    .identity
                    .map_or("nobody".into(), |identity| identity.to_string());
                Json(if peer.unix { "unix".into() } else { who })
            }),
        )
        .route("/host/jobs/{id}", put(|StrictJson(_): StrictJson<Job>| async {}))
        .route(
            "/missing",
            get(|| async { Err::<(), _>(Error::not_found("thing", "x")) }),
        )
        .route(
            "/numbers",
            get(|| async { events(futures::stream::iter((0..1000).map(|n| (Some(n.to_string()), n)))) }),
        )
        .route("/attach", post(echo))
}

async fn exercise(http: Http, who: &str) {
    assert_eq!(http.get::<String>("/who").await.unwrap(), who);
    let error = http.get::<()>("/missing").await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::NotFound, "there is no thing x")
    );
    let host = HostClient::new(http.clone());
    host.add_job(&Job {
        id: "h-1".into(),
        ..Job::default()
    })
    .await
    .unwrap();
    let error = http
        .put::<()>("/host/jobs/x", &serde_json::json!({"id": "x", "congif": {}}))
        .await
        .unwrap_err();
    assert!(error.message.contains("congif"), "{error}");
    let numbers: Vec<_> = http
        .events::<u32>("/numbers")
        .await
        .unwrap()
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(numbers.len(), 1000);
    assert_eq!(numbers[999], (Some("999".into()), 999));
    let stream = host.attach(&AttachRequest::default()).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write =
        tokio::spawn(async move { attach::write_frame(&mut writer, kinds::STDIN, &vec![7; 3 << 20]).await });
    let mut echoed = 0;
    while echoed < 3 << 20 {
        echoed += attach::read_frame(&mut reader)
            .await
            .unwrap()
            .unwrap()
            .payload
            .len();
    }
    write.await.unwrap().unwrap();
}

#[tokio::test]
async fn plain() {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve(listener, router(), stop.clone().cancelled_owned()));
    exercise(Http::new(&base).unwrap(), "nobody").await;
    stop.cancel();
    server.await.unwrap().unwrap();
    let error = Http::new(&base).unwrap().get::<()>("/who").await.unwrap_err();
    assert!(error.retry && error.message.contains("refused"), "{error}");
}

/// A body that is refused unread ends its connection, and the answer says so: the next request goes by another one.
#[tokio::test]
async fn refused_bodies() {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let refuse = || async { Err::<(), _>(Error::conflict("not now")) };
    let router = router().route("/refuse", put(refuse));
    let server = tokio::spawn(serve(listener, router, std::future::pending()));
    let http = Http::new(&base).unwrap();
    for (length, ends) in [(100, false), (100_000, true)] {
        let body = flynn_api::client::full(vec![b'x'; length]);
        let request = http::Request::put("/refuse").body(body).unwrap();
        let answer = http.send_raw(request).await.unwrap();
        assert_eq!(answer.status(), http::StatusCode::CONFLICT);
        assert_eq!(
            answer.headers().contains_key("connection"),
            ends,
            "{length} bytes"
        );
        assert_eq!(http.get::<String>("/who").await.unwrap(), "nobody");
    }
    server.abort();
}

/// Whether a request from this address is answered; the connection is kept in `held`.
async fn answered(from: &str, server: std::net::SocketAddr, held: &mut Vec<tokio::net::TcpStream>) -> bool {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    let mut connection = socket.connect(server).await.unwrap();
    let request = b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n";
    // One that is closed may not even take it.
    let sent = connection.write_all(request).await.is_ok();
    let answered = sent && connection.read_u8().await.is_ok();
    held.push(connection);
    answered
}

#[tokio::test]
async fn one_address_has_a_part_of_the_connections() {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap()
        .each(2);
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, router(), std::future::pending()));
    let mut held = Vec::new();
    for (from, expected) in [
        ("127.0.0.2", true),
        ("127.0.0.2", true),
        ("127.0.0.2", false),
        ("127.0.0.3", true),
        ("127.0.0.1", true),
        ("127.0.0.1", true),
        ("127.0.0.1", true),
    ] {
        assert_eq!(answered(from, addr, &mut held).await, expected, "{from}");
    }

    // Who tells who they are is not counted.
    install_provider();
    let ca = Ca::create("cluster").unwrap();
    let server = ca
        .issue(&PeerIdentity::Host("h1".into()), &["127.0.0.2".into()])
        .unwrap();
    let client = ca.issue(&PeerIdentity::Host("h2".into()), &[]).unwrap();
    let config = server.server_config(ClientAuth::Optional).unwrap();
    let listener = Listener::tls("127.0.0.2:0".parse().unwrap(), config)
        .await
        .unwrap();
    let base = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(listener.each(1), router(), std::future::pending()));
    let mut known = Vec::new();
    for _ in 0..3 {
        let http = Http::new(&base).unwrap().identity(&client).unwrap();
        http.get::<String>("/who").await.unwrap();
        known.push(http);
    }
    let stranger = || {
        let config = joining_client_config(ca.fingerprint().unwrap());
        Http::new(&base).unwrap().tls(config)
    };
    let one = stranger();
    one.get::<String>("/who").await.unwrap();
    stranger().get::<String>("/who").await.unwrap_err();
    one.get::<String>("/who").await.unwrap();
}

/// A server that goes without a word (its host lost its power) is noticed; one with nothing to tell is not taken for it.
#[tokio::test]
async fn silence() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        connection.read_u8().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
        connection.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..10 {
            connection.write_all(b":\n\n").await.unwrap();
            tokio::time::sleep(std::time::Duration::from_secs(15)).await;
        }
        connection.write_all(b"data: 7\n\n").await.unwrap();
        connection
    });
    let mut events = Http::new(&base).unwrap().events::<u32>("/").await.unwrap();
    tokio::time::pause();
    assert_eq!(events.next().await.unwrap().unwrap(), (None, 7));
    let _open = server.await.unwrap();
    let gone = events.next().await.unwrap().unwrap_err();
    assert!(
        gone.retry && gone.message.contains("nothing came for 45 s"),
        "{gone}"
    );
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn unix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host.sock");
    drop(Listener::unix(&path).unwrap());
    let listener = Listener::unix(&path).unwrap();
    tokio::spawn(serve(listener, router(), std::future::pending()));
    exercise(Http::new(&format!("unix:{}", path.display())).unwrap(), "unix").await;
}

#[tokio::test]
async fn mutual_tls() {
    install_provider();
    let (ca, other) = (
        Ca::create("cluster").unwrap(),
        Ca::create("another cluster").unwrap(),
    );
    let server = ca
        .issue(&PeerIdentity::Host("h1".into()), &["127.0.0.1".into()])
        .unwrap();
    let client = ca.issue(&PeerIdentity::Job("controller".into()), &[]).unwrap();
    let stranger = other
        .issue(&PeerIdentity::Host("h1".into()), &["127.0.0.1".into()])
        .unwrap();
    let config = server.server_config(ClientAuth::Required).unwrap();
    let listener = Listener::tls("127.0.0.1:0".parse().unwrap(), config)
        .await
        .unwrap();
    let base = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, router(), std::future::pending()));
    exercise(
        Http::new(&base).unwrap().identity(&client).unwrap(),
        "job:controller",
    )
    .await;
    for config in [
        stranger.client_config().unwrap(),
        joining_client_config(ca.fingerprint().unwrap()),
    ] {
        // The one shows a foreign certificate, the other shows none.
        Http::new(&base)
            .unwrap()
            .tls(config)
            .get::<String>("/who")
            .await
            .unwrap_err();
    }
    let wrong_name = base.replace("127.0.0.1", "localhost");
    Http::new(&wrong_name)
        .unwrap()
        .identity(&client)
        .unwrap()
        .get::<String>("/who")
        .await
        .unwrap_err();
}

#[tokio::test]
async fn joining_by_fingerprint() {
    install_provider();
    let (ca, other) = (Ca::create("cluster").unwrap(), Ca::create("cluster").unwrap());
    let server = ca
        .issue(&PeerIdentity::Job("discoverd".into()), &["127.0.0.1".into()])
        .unwrap();
    let config = server.server_config(ClientAuth::Optional).unwrap();
    let listener = Listener::tls("127.0.0.1:0".parse().unwrap(), config)
        .await
        .unwrap();
    let base = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, router(), std::future::pending()));
    let get = async |base: &str, ca: &Ca| {
        let config = joining_client_config(ca.fingerprint().unwrap());
        Http::new(base).unwrap().tls(config).get::<String>("/who").await
    };
    assert_eq!(get(&base, &ca).await.unwrap(), "nobody");
    get(&base, &other).await.unwrap_err();
    get(&base.replace("127.0.0.1", "localhost"), &ca)
        .await
        .unwrap_err();
}
