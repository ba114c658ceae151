//! Counters, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use flynn_dataplane::Steered;
use http::StatusCode;

/// What is counted. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    answers: [AtomicU64; 5],
    retries: AtomicU64,
    connect_failures: AtomicU64,
    handshake_failures: AtomicU64,
    requests: AtomicI64,
    connections: AtomicI64,
    tunnels: AtomicI64,
    routes: AtomicU64,
    bad_certificates: AtomicU64,
    refused_routes: AtomicU64,
    steered: [AtomicU64; Steered::ALL.len()],
}

/// Something that is under way, until it is dropped.
#[derive(Debug)]
pub struct Busy(Arc<Counters>, fn(&Counters) -> &AtomicI64);

impl Drop for Busy {
    fn drop(&mut self) {
        self.1(&self.0).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    fn busy(&self, gauge: fn(&Counters) -> &AtomicI64) -> Busy {
        gauge(&self.0).fetch_add(1, Ordering::Relaxed);
        Busy(Arc::clone(&self.0), gauge)
    }

    /// A request has come.
    pub fn begin(&self) -> Busy {
        self.busy(|counters| &counters.requests)
    }

    /// A client has connected.
    pub fn connection(&self) -> Busy {
        self.busy(|counters| &counters.connections)
    }

    /// A connection has changed its protocol.
    pub fn tunnel(&self) -> Busy {
        self.busy(|counters| &counters.tunnels)
    }

    /// A request has been answered.
    pub fn answered(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.0.answers[class].fetch_add(1, Ordering::Relaxed);
    }

    /// A request is tried again.
    pub fn retried(&self) {
        self.0.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// A backend refused a connection.
    pub fn connect_failed(&self) {
        self.0.connect_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A TLS handshake failed.
    pub fn handshake_failed(&self) {
        self.0.handshake_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// There are so many routes.
    pub fn routes(&self, count: usize) {
        self.0.routes.store(count as u64, Ordering::Relaxed);
    }

    /// So many routes' certificates cannot be used.
    pub fn bad_certificates(&self, count: usize) {
        self.0.bad_certificates.store(count as u64, Ordering::Relaxed);
    }

    /// So many TCP routes cannot be served.
    pub fn refused_routes(&self, count: usize) {
        self.0.refused_routes.store(count as u64, Ordering::Relaxed);
    }

    /// So many connections to routed ports has the kernel steered, by what became of them.
    pub fn steered(&self, counts: [(Steered, u64); Steered::ALL.len()]) {
        for (outcome, count) in counts {
            self.0.steered[outcome as usize].store(count, Ordering::Relaxed);
        }
    }

    /// All of it, as Prometheus reads it.
    pub fn text(&self) -> String {
        let counters = &self.0;
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        head(
            &mut text,
            "flynn_router_responses_total",
            "counter",
            "Answers, by class of status.",
        );
        for (class, count) in counters.answers.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            let _ = writeln!(
                text,
                "flynn_router_responses_total{{class=\"{}xx\"}} {count}",
                class + 1
            );
        }
        head(
            &mut text,
            "flynn_router_steered_total",
            "counter",
            "Connections to ports of TCP routes that the kernel has steered.",
        );
        for (outcome, count) in Steered::ALL.iter().zip(&counters.steered) {
            let _ = writeln!(
                text,
                "flynn_router_steered_total{{outcome=\"{}\"}} {}",
                outcome.name(),
                count.load(Ordering::Relaxed)
            );
        }
        let counts = [
            (
                "flynn_router_retries_total",
                &counters.retries,
                "counter",
                "Requests tried again.",
            ),
            (
                "flynn_router_connect_failures_total",
                &counters.connect_failures,
                "counter",
                "Connections that backends refused.",
            ),
            (
                "flynn_router_handshake_failures_total",
                &counters.handshake_failures,
                "counter",
                "TLS handshakes that failed.",
            ),
            ("flynn_router_routes", &counters.routes, "gauge", "Routes."),
            (
                "flynn_router_bad_certificates",
                &counters.bad_certificates,
                "gauge",
                "Certificates of routes that cannot be used.",
            ),
            (
                "flynn_router_refused_routes",
                &counters.refused_routes,
                "gauge",
                "TCP routes that cannot be served.",
            ),
        ];
        for (name, value, kind, help) in counts {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "{name} {}", value.load(Ordering::Relaxed));
        }
        let gauges = [
            ("flynn_router_requests", &counters.requests, "Requests under way."),
            (
                "flynn_router_connections",
                &counters.connections,
                "Clients' connections.",
            ),
            (
                "flynn_router_tunnels",
                &counters.tunnels,
                "Connections that have changed their protocol.",
            ),
        ];
        for (name, value, help) in gauges {
            head(&mut text, name, "gauge", help);
            let _ = writeln!(text, "{name} {}", value.load(Ordering::Relaxed));
        }
        text
    }
}
