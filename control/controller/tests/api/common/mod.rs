//! What the tests share: a PostgreSQL of their own, a controller on it, and hosts that only pretend.

pub(crate) mod cluster;
pub(crate) mod controller;
pub(crate) mod gate;
pub(crate) mod host;

use std::time::Duration;

use flynn_api::client::EventStream;
use futures::StreamExt as _;
use serde::de::DeserializeOwned;

/// The test, or the reason why this machine cannot run it.
pub(crate) fn trial<F>(name: &str, test: fn() -> F) -> libtest_mimic::Trial
where
    F: Future<Output = ()> + 'static,
{
    let name = name.to_owned();
    libtest_mimic::Trial::ignorable_test(name, move || {
        if let Some(reason) = cluster::missing() {
            return Ok(libtest_mimic::Completion::ignored_with(reason));
        }
        flynn_api::tls::install_provider();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        runtime.block_on(async {
            // Each wait has a limit of its own, which says what it waits for.
            tokio::time::timeout(Duration::from_mins(3), test())
                .await
                .expect("the test hangs");
        });
        runtime.shutdown_background();
        Ok(libtest_mimic::Completion::Completed)
    })
}

/// Waits until `probe` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut probe: impl FnMut() -> F,
) -> T {
    for _ in 0..1000 {
        if let Some(found) = probe().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited in vain: {what}");
}

/// Waits for what must come.
pub(crate) async fn soon<T>(what: &str, coming: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), coming)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

/// The next event of a stream.
pub(crate) async fn next<T: DeserializeOwned>(
    stream: &mut EventStream<T>,
    what: &str,
) -> (Option<String>, T) {
    let event = soon(what, stream.next()).await;
    event
        .unwrap_or_else(|| panic!("the stream ended: {what}"))
        .unwrap_or_else(|why| panic!("{why}: {what}"))
}
