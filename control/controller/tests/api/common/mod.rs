//! What the tests share: a PostgreSQL of their own, a controller on it, and hosts that only pretend.

pub(crate) mod cluster;
pub(crate) mod controller;
pub(crate) mod host;

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
            let timeout = std::time::Duration::from_mins(1);
            tokio::time::timeout(timeout, test())
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
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("waited in vain: {what}");
}
