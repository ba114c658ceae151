//! Backends that do not behave, each played by the test itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flynn_api::Meta;
use flynn_api::discovery::Instance;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Barrier;

use super::fake::{Control, PATIENCE, Running, route};
use super::text;

const EMPTY: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// A router with one route, `a.test`, to a backend of which each connection is served so. Counts the connections.
async fn played<F>(
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> (Arc<Control>, Running, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let control = Control::start().await;
    control.set_instances("web", vec![Instance::new("http", addr, Meta::new())]);
    control.set_routes(vec![route("a.test")]);
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(stream));
        }
    });
    let router = Running::start(&control).await;
    (control, router, accepted)
}

/// A message's head, as it was sent; nothing when the connection ends before.
async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        read.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(read).ok()
}

/// What the router answers to this on a connection of its own.
async fn ask(router: &Running, request: &[u8]) -> String {
    let asked = async {
        let mut client = TcpStream::connect(router.http).await.unwrap();
        client.write_all(request).await.unwrap();
        head(&mut client).await.expect("the router hung up")
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await;
    answer.unwrap_or_else(|_| panic!("no answer to {:?}", String::from_utf8_lossy(request)))
}

#[tokio::test]
async fn nobody_waits_for_anothers_upload() {
    let (_control, router, _) = played(|mut stream| async move {
        while let Some(head) = head(&mut stream).await {
            let answer: &[u8] = if head.starts_with("POST") {
                b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"
            } else {
                EMPTY
            };
            stream.write_all(answer).await.unwrap();
        }
    })
    .await;
    // It is answered though most of it is still to come.
    let mut uploading = TcpStream::connect(router.http).await.unwrap();
    let request = b"POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 1000000\r\n\r\nfirst";
    uploading.write_all(request).await.unwrap();
    let answer = head(&mut uploading).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let answer = ask(&router, b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Answers `/together` once as many clients ask for it as the barrier holds, everything else but `/kill` at once; by
/// `/kill` it ends, which is counted.
async fn mortal(mut stream: TcpStream, together: Arc<Barrier>, kills: Arc<AtomicUsize>) {
    while let Some(head) = head(&mut stream).await {
        match head.split(' ').nth(1).unwrap_or_default() {
            "/kill" => {
                kills.fetch_add(1, Ordering::SeqCst);
                return;
            }
            "/together" => {
                together.wait().await;
            }
            _ => {}
        }
        if stream.write_all(EMPTY).await.is_err() {
            return;
        }
    }
}

/// A router that keeps this many connections to a backend that some requests kill; with who counts those.
async fn keeping(connections: usize) -> (Arc<Control>, Running, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (together, kills) = (Arc::new(Barrier::new(connections)), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&kills);
    let (control, router, accepted) =
        played(move |stream| mortal(stream, Arc::clone(&together), Arc::clone(&count))).await;
    let request = b"GET /together HTTP/1.1\r\nhost: a.test\r\n\r\n";
    let asked = (0..connections).map(|_| ask(&router, request));
    for answer in futures::future::join_all(asked).await {
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    (control, router, accepted, kills)
}

#[tokio::test]
async fn a_deadly_request_is_not_repeated_on_each_connection() {
    let (_control, router, _, kills) = keeping(8).await;
    let answer = ask(&router, b"GET /kill HTTP/1.1\r\nhost: a.test\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(
        kills.load(Ordering::SeqCst),
        2,
        "on a connection that was kept, and on a new one"
    );
    let metrics = text(TcpStream::connect(router.api).await.unwrap(), "/metrics").await;
    assert!(metrics.contains("flynn_router_retries_total 1"), "{metrics}");
}

#[tokio::test]
async fn a_kept_connection_that_ends_is_no_fault_of_the_backend() {
    let (_control, router, accepted, kills) = keeping(8).await;
    let request = b"POST /kill HTTP/1.1\r\nhost: a.test\r\ncontent-length: 0\r\n\r\n";
    let answer = ask(&router, request).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(
        kills.load(Ordering::SeqCst),
        1,
        "what may not be sent twice is not"
    );
    let before = accepted.load(Ordering::SeqCst);
    let answer = ask(&router, b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(accepted.load(Ordering::SeqCst), before, "the others are kept");
}

#[tokio::test]
async fn of_two_lengths_of_an_answer_the_true_one_counts() {
    let (_control, router, _) = played(|mut stream| async move {
        while head(&mut stream).await.is_some() {
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n\
                5\r\nhello\r\n0\r\n\r\n";
            stream.write_all(answer).await.unwrap();
        }
    })
    .await;
    let answer = router.get("a.test", "/").await.unwrap();
    assert!(!answer.head.contains("content-length"), "{answer:?}");
    assert!(answer.body.contains("hello"), "{answer:?}");
}
