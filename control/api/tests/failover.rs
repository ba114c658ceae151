//! A client of several hosts goes on with the next, and says of nothing that it was not done when it may have been.
#![cfg(all(feature = "client", feature = "server"))]
#![expect(clippy::unwrap_used, reason = "the helpers of a test panic as the test does")]

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::IntoResponse as _;
use axum::response::sse::{Event as Sent, Sse};
use axum::routing::get;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Event, EventKind, Instance, ServiceConfig, ServiceMeta};
use flynn_api::{Error, ErrorCode, Meta};
use futures::StreamExt as _;
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const DONE: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n[]";
const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
const MISSING: &str = "HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
const OTHERS: &str = "HTTP/1.1 412 Precondition Failed\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// A host that reads each request and gives the same answer, or none, or says nothing at all.
struct Host {
    http: Http,
    asked: Arc<AtomicUsize>,
    /// What it was asked.
    heads: Arc<Mutex<Vec<String>>>,
}

impl Host {
    async fn new(answer: Option<&'static str>) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap(), answer)
    }

    fn at(listener: TcpListener, answer: Option<&'static str>) -> Self {
        let host = Self {
            http: Http::new(&format!("http://{}", listener.local_addr().unwrap())).unwrap(),
            asked: Arc::default(),
            heads: Arc::default(),
        };
        let (asked, heads) = (Arc::clone(&host.asked), Arc::clone(&host.heads));
        tokio::spawn(async move {
            let mut silent = Vec::new();
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let mut bytes = [0; 4096];
                let length = connection.read(&mut bytes).await.unwrap_or(0);
                if length == 0 {
                    continue;
                }
                asked.fetch_add(1, Ordering::SeqCst);
                heads
                    .lock()
                    .unwrap()
                    .push(String::from_utf8_lossy(&bytes[..length]).to_lowercase());
                match answer {
                    Some(answer) => connection.write_all(answer.as_bytes()).await.unwrap(),
                    None => silent.push(connection),
                }
            }
        });
        host
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// A host that refuses connections.
async fn refuses() -> Http {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    Http::new(&format!("http://{}", closed.local_addr().unwrap())).unwrap()
}

fn one() -> Instance {
    Instance::new("tcp", "10.0.0.1:80", Meta::new())
}

async fn create(client: &DiscoveryClient) -> Result<(), Error> {
    client.create_service("web", &ServiceConfig::default()).await
}

#[tokio::test]
async fn what_was_not_done_is_done_elsewhere() {
    let (busy, done) = (Host::new(Some(BUSY)).await, Host::new(Some(DONE)).await);
    let client = DiscoveryClient::over(refuses().await, vec![busy.http.clone(), done.http.clone()]);
    create(&client).await.unwrap();
    // Those that failed are asked last for a while.
    client.deregister("web", &one().id).await.unwrap();
    client.join_token().await.unwrap_err();
    assert_eq!((busy.asked(), done.asked()), (1, 3));

    // An answer is an answer: nobody else is asked.
    let (missing, done) = (Host::new(Some(MISSING)).await, Host::new(Some(DONE)).await);
    let client = DiscoveryClient::over(missing.http.clone(), vec![done.http.clone()]);
    assert_eq!(client.leader("web").await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!((missing.asked(), done.asked()), (1, 0));
}

#[tokio::test]
async fn what_may_have_been_done_is_repeated_only_where_twice_is_once() {
    let (breaks, done) = (Host::new(Some("")).await, Host::new(Some(DONE)).await);
    let client = |next: &Host| DiscoveryClient::over(breaks.http.clone(), vec![next.http.clone()]);
    for error in [
        create(&client(&done)).await.unwrap_err(),
        client(&done).remove_service("web").await.unwrap_err(),
        client(&done).join_token().await.unwrap_err(),
    ] {
        assert!(error.may_be_done(), "{error}");
    }
    assert_eq!((breaks.asked(), done.asked()), (3, 0));
    client(&done).register("web", &one()).await.unwrap();
    client(&done).deregister("web", &one().id).await.unwrap();
    assert!(client(&done).instances("web").await.unwrap().is_empty());
    assert_eq!((breaks.asked(), done.asked()), (6, 3));

    // What stands in the way of the second attempt may be the first.
    let (missing, others) = (Host::new(Some(MISSING)).await, Host::new(Some(OTHERS)).await);
    client(&missing).deregister("web", &one().id).await.unwrap();
    let error = client(&others)
        .set_meta("web", &ServiceMeta::default())
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::PreconditionFailed);
    assert!(error.may_be_done(), "{error}");
    // Both were made under the same name.
    let name = |host: &Host| {
        let heads = host.heads.lock().unwrap();
        let line = heads
            .last()
            .unwrap()
            .lines()
            .find(|line| line.starts_with("idempotency-key:"));
        line.unwrap().to_owned()
    };
    assert_eq!(name(&breaks), name(&others));

    // Nobody else did it, and that says nothing of the first.
    let client = DiscoveryClient::over(breaks.http.clone(), vec![refuses().await]);
    assert!(client.register("web", &one()).await.unwrap_err().may_be_done());
    let client = DiscoveryClient::over(refuses().await, vec![refuses().await]);
    assert!(!client.register("web", &one()).await.unwrap_err().may_be_done());
}

#[tokio::test]
async fn a_host_that_says_nothing_is_waited_for_once() {
    let (silent, done) = (Host::new(None).await, Host::new(Some(DONE)).await);
    let first = silent.http.clone().timeout(Duration::from_secs(3));
    let client = DiscoveryClient::over(first, vec![done.http.clone()]);
    let began = Instant::now();
    client.register("web", &one()).await.unwrap();
    for _ in 0..20 {
        client.instances("web").await.unwrap();
    }
    assert!(silent.asked() <= 1 + usize::try_from(began.elapsed().as_secs()).unwrap());
    assert_eq!(done.asked(), 21);
}

#[tokio::test]
async fn the_chosen_host_is_asked_again_when_it_is_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let (chosen, done) = (
        Http::new(&format!("http://{addr}")).unwrap(),
        Host::new(Some(DONE)).await,
    );
    let client = DiscoveryClient::over(chosen, vec![done.http.clone()]);
    client.register("web", &one()).await.unwrap();
    assert_eq!(done.asked(), 1);
    let back = Host::at(TcpListener::bind(addr).await.unwrap(), Some(DONE));
    let began = Instant::now();
    while back.asked() == 0 {
        client.register("web", &one()).await.unwrap();
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "it is never asked again"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A host that tells `told` to whoever resumes behind `since` (`None`: begins), and then closes the stream or leaves it open.
/// To others it says `gone`.
async fn tells(
    since: Option<&'static str>,
    told: &[(&'static str, EventKind)],
    open: bool,
) -> (Http, Arc<AtomicUsize>) {
    let told: Vec<_> = told.to_vec();
    let begun = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&begun);
    let stream = move |headers: HeaderMap| {
        let told = told.clone();
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            let last = headers.get("last-event-id").map(|last| last.to_str().unwrap());
            if last != since {
                let gone = Error::new(ErrorCode::Gone, format!("{last:?} is not {since:?}"));
                return (gone.code.status(), serde_json::to_string(&gone).unwrap()).into_response();
            }
            let events = told.into_iter().map(|(id, kind)| {
                let event = serde_json::to_string(&Event::new("web", kind, 0)).unwrap();
                Ok::<_, Infallible>(Sent::default().id(id).data(event))
            });
            let events = futures::stream::iter(events);
            if open {
                Sse::new(events.chain(futures::stream::pending())).into_response()
            } else {
                Sse::new(events).into_response()
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = Http::new(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    // It does not answer pings.
    let routes = Router::new()
        .route("/services/web", get(stream))
        .route("/ping", get(futures::future::pending::<()>));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (http, begun)
}

use EventKind::{Current, Down, Up, Update};

#[tokio::test]
async fn a_watch_goes_on_at_another_host() {
    // The first tells two events and ends, and has forgotten them when it is asked again. The second goes on.
    let (first, begun) = tells(None, &[("5", Current), ("6", Up)], false).await;
    let (second, resumed) = tells(Some("6"), &[("7", Update), ("8", Current), ("9", Down)], true).await;
    let client = DiscoveryClient::over(first, vec![second]);
    let mut watch = client.watch("web").await.unwrap();
    let mut told = Vec::new();
    while told.len() < 4 {
        let (id, event) = watch.next().await.unwrap().unwrap();
        told.push((id.unwrap(), event.kind));
    }
    let want = [("5", Current), ("6", Up), ("7", Update), ("9", Down)];
    assert_eq!(told, want.map(|(id, kind)| (id.to_owned(), kind)));
    assert_eq!(watch.last_id(), Some("9"));
    assert_eq!(
        (begun.load(Ordering::SeqCst), resumed.load(Ordering::SeqCst)),
        (2, 1)
    );
}

#[tokio::test]
async fn a_watch_leaves_a_host_that_has_gone_silent() {
    let (first, _) = tells(None, &[("5", Current)], true).await;
    let (second, _) = tells(Some("5"), &[("6", Current), ("7", Up)], true).await;
    let client = DiscoveryClient::over(first, vec![second]);
    let mut watch = client.watch("web").await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().1.kind, Current);
    let told = tokio::time::timeout(Duration::from_secs(20), watch.next()).await;
    assert_eq!(told.unwrap().unwrap().unwrap().1.kind, Up);
}

#[tokio::test]
async fn a_watch_that_cannot_go_on_says_so_and_ends() {
    let (first, _) = tells(None, &[("5", Current)], false).await;
    let mut watch = DiscoveryClient::new(first).watch("web").await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().1.kind, Current);
    assert_eq!(watch.next().await.unwrap().unwrap_err().code, ErrorCode::Gone);
    assert!(watch.next().await.is_none());

    // In the midst of what is told first, nobody can resume.
    let (first, begun) = tells(None, &[], false).await;
    let mut watch = DiscoveryClient::new(first).watch("web").await.unwrap();
    assert!(watch.next().await.is_none());
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}
