//! The process around a service: its log and its end.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What is logged by default. openraft warns of each heartbeat that has no answer, ten times a second: discoverd leaves
/// some out, and says itself who is not heard.
const FILTER: &str = "info,openraft::core::heartbeat=error";

/// Logs to standard error: `RUST_LOG`'s filter, `info` without it. Repeated calls change nothing.
pub fn init_logging(component: &'static str) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(FILTER));
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would say on stderr that stderr, a file on a full disk, takes nothing, and panic since it cannot.
        .log_internal_errors(false)
        .with_ansi(false);
    // An error says that a logger is installed already.
    if logger.try_init().is_ok() {
        tracing::info!(component, version = env!("CARGO_PKG_VERSION"), "starting");
    }
}

/// A token that is cancelled on SIGTERM or SIGINT. Call it inside a runtime.
pub fn shutdown() -> CancellationToken {
    let token = CancellationToken::new();
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = (terminate, interrupt) else {
        tracing::error!("signals cannot be handled: a stop will not be clean");
        return token;
    };
    let cancelled = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancelled.cancel();
    });
    token
}
