//! Routers whose TCP routes the kernel steers to one listener: each test in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../../dataplane/tests/support/mod.rs"]
mod alone;
#[expect(dead_code, reason = "it has more than is needed here")]
#[path = "../router/fake.rs"]
mod fake;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fake::{Backend, Control, Running};
use flynn_api::route::{Route, RouteKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    alone::main(
        &["ip"],
        |_| None,
        &[
            (
                "five_hundred_routes_bind_no_port",
                five_hundred_routes_bind_no_port,
            ),
            ("who_listens_on_a_port_keeps_it", who_listens_on_a_port_keeps_it),
            (
                "a_new_router_takes_over_under_load",
                a_new_router_takes_over_under_load,
            ),
        ],
    )
}

fn run<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F + Send + 'static) {
    alone::alone(move |bpffs| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(alone::pins(bpffs)));
    });
}

async fn start(control: &Control, pins: &Path) -> Running {
    Running::with(control, Arc::new(tempfile::tempdir().unwrap()), Some(pins)).await
}

fn tcp(port: u16) -> Route {
    Route {
        kind: RouteKind::Tcp,
        id: format!("tcp/{port}"),
        service: "web".into(),
        port,
        ..Route::default()
    }
}

async fn ask(address: IpAddr, port: u16) -> std::io::Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect((address, port)).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}

async fn answers(port: u16) -> bool {
    ask([127, 0, 0, 1].into(), port)
        .await
        .is_ok_and(|answer| answer.contains("200 OK"))
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn status(router: &Running, path: &str) -> String {
    let mut stream = TcpStream::connect(router.api).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// The ports that this namespace's sockets listen on.
fn listening() -> BTreeSet<u16> {
    ["tcp", "tcp6"]
        .iter()
        .flat_map(|table| {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            flynn_lb::ports::listening(text.lines()).collect::<Vec<_>>()
        })
        .collect()
}

fn five_hundred_routes_bind_no_port() {
    run(|pins| async move {
        let control = Control::start().await;
        let backend = Backend::start("one").await;
        control.set_backends("web", &[&backend]);
        let router = start(&control, &pins).await;
        control.set_routes(vec![tcp(3000)]);
        until("the route is served", || answers(3000)).await;
        let before = listening();
        control.set_routes((3000..3500).map(tcp).collect());
        for port in [3000, 3250, 3499] {
            until("the route is served", || answers(port)).await;
        }
        assert_eq!(listening(), before);
        let answer = ask("::1".parse().unwrap(), 3100).await.unwrap();
        assert!(answer.contains("200 OK"), "{answer}");
        // A route that is gone is gone.
        control.set_routes((3000..3100).map(tcp).collect());
        until("the route is gone", async || {
            ask([127, 0, 0, 1].into(), 3100).await.is_err()
        })
        .await;
        assert!(answers(3099).await);
        drop(router);
    });
}

fn who_listens_on_a_port_keeps_it() {
    run(|pins| async move {
        let control = Control::start().await;
        let backend = Backend::start("one").await;
        control.set_backends("web", &[&backend]);
        let other = TcpListener::bind("127.0.0.1:3000").await.unwrap();
        let router = start(&control, &pins).await;
        control.set_routes([22, 3000, 3001].map(tcp).to_vec());
        until("the free port is served", || answers(3001)).await;
        let others = || async {
            let client = TcpStream::connect("127.0.0.1:3000").await.unwrap();
            let (_, peer) = tokio::time::timeout(PATIENCE, other.accept())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
        };
        others().await;
        let said = status(&router, "/.well-known/status").await;
        assert!(said.contains("\"3000\":\"something else"), "{said}");
        assert!(said.contains("\"22\":\"the port belongs to the system"), "{said}");
        let metrics = status(&router, "/metrics").await;
        assert!(metrics.contains("flynn_router_refused_routes 2"), "{metrics}");

        // Who comes later gets its port within a look or two.
        let late = TcpListener::bind("127.0.0.1:3001").await.unwrap();
        until("the port is given up", async || !answers_with(3001, &late).await).await;
        others().await;
        // And once it is gone, the route is served.
        drop((other, late));
        until("the port is served", || answers(3000)).await;
        until("the other one as well", || answers(3001)).await;
        let metrics = status(&router, "/metrics").await;
        assert!(
            metrics.contains("flynn_router_steered_total{outcome=\"taken\"}"),
            "{metrics}"
        );
    });
}

/// Whether the router answers, though another listens: what that gets instead is dropped.
async fn answers_with(port: u16, other: &TcpListener) -> bool {
    tokio::select! {
        answered = answers(port) => answered,
        accepted = other.accept() => {
            drop(accepted);
            false
        }
    }
}

/// A router stops while its successor starts, as when it is deployed: no client sees any of it.
fn a_new_router_takes_over_under_load() {
    run(|pins| async move {
        let control = Control::start().await;
        let backend = Backend::start("one").await;
        control.set_backends("web", &[&backend]);
        control.set_routes(vec![tcp(3000)]);
        let mut router = start(&control, &pins).await;
        until("the route is served", || answers(3000)).await;
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients: Vec<_> = [IpAddr::from([127, 0, 0, 1]), "::1".parse().unwrap()]
            .into_iter()
            .map(|address| {
                let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
                tokio::spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        let answer = ask(address, 3000).await.unwrap();
                        assert!(answer.contains("200 OK"), "{answer}");
                        asked.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..5 {
            let next = start(&control, &pins).await;
            // It has taken over, and knows its backends, once it has served some.
            let target = asked.load(Ordering::SeqCst) + 50;
            until("clients go on", async || {
                assert!(
                    clients.iter().all(|client| !client.is_finished()),
                    "a client has failed"
                );
                asked.load(Ordering::SeqCst) >= target
            })
            .await;
            let mut old = std::mem::replace(&mut router, next);
            old.stop.cancel();
            tokio::time::timeout(PATIENCE, &mut old.task)
                .await
                .unwrap()
                .unwrap()
                .unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        for client in clients {
            client.await.unwrap();
        }
    });
}
