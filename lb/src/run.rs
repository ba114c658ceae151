//! The service: options from the environment, its tasks, its end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::routing::get;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::route::Certificate;
use flynn_api::server::{Json, Listener};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::l4::{self, L4};
use crate::listen;
use crate::router::Router;
use crate::serve::{self, Door};
use crate::store::Store;
use crate::sync::Sync;
use crate::tcp;
use crate::tls::{self, Certificates};

/// How long requests under way may take once the router stops: less than a job's patience.
const DRAIN: Duration = Duration::from_secs(25);

/// How long requests may wait at the start for what is to be known.
const INFORMED: Duration = Duration::from_secs(5);

/// What the router must be told.
#[derive(Clone)]
pub struct Options {
    /// HTTP's port.
    pub http_port: u16,
    /// HTTPS's port.
    pub https_port: u16,
    /// Where status and metrics are served.
    pub api: SocketAddr,
    /// discoverd's URL.
    pub discoverd: String,
    /// The directory of the router's certificate, by which it asks other hosts' discoverd.
    pub tls: PathBuf,
    /// A key of the controller.
    pub controller_key: String,
    /// Where the state is kept.
    pub data: PathBuf,
    /// Where eBPF programs and maps are pinned, where the router may use them.
    pub pins: Option<PathBuf>,
    /// The domain of routes that name none of their own: what our own certificate is for.
    pub domain: Option<String>,
    /// Routes by port in the kernel.
    pub l4: l4::Options,
    /// The certificate of names that have none.
    pub certificate: Option<Certificate>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("http_port", &self.http_port)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// From the job's environment: `HTTP_PORT`, `HTTPS_PORT`, `HOST_IP`, `DISCOVERD`, `CONTROLLER_KEY`, `ROUTER_DATA`,
    /// `BPF_PINS`, `DEFAULT_ROUTE_DOMAIN`, `TLSCERT`, `TLSKEY`.
    pub fn from_env() -> anyhow::Result<Self> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let need = |name: &str| get(name).with_context(|| format!("{name} is not set: the router needs it"));
        let port = |name: &str, default: u16| match get(name) {
            None => Ok(default),
            Some(value) => value
                .parse()
                .with_context(|| format!("{name} is not a port number: {value:?}")),
        };
        let host: IpAddr = get("HOST_IP").map_or(Ok(Ipv4Addr::LOCALHOST.into()), |ip| ip.parse())?;
        let certificate = get("TLSCERT").zip(get("TLSKEY"));
        Ok(Self {
            http_port: port("HTTP_PORT", 80)?,
            https_port: port("HTTPS_PORT", 443)?,
            api: (host, 5000).into(),
            discoverd: need("DISCOVERD")?,
            tls: "/etc/flynn/tls".into(),
            controller_key: need("CONTROLLER_KEY")?,
            data: get("ROUTER_DATA").unwrap_or_else(|| "/data".into()).into(),
            pins: get("BPF_PINS").map(PathBuf::from),
            domain: get("DEFAULT_ROUTE_DOMAIN"),
            l4: l4::Options::from_env()?,
            certificate: certificate.map(|(cert, key)| Certificate {
                id: String::new(),
                cert,
                key,
            }),
        })
    }
}

/// The router's sockets.
#[derive(Debug)]
pub struct Sockets {
    /// For HTTP.
    pub http: TcpListener,
    /// For HTTPS.
    pub https: TcpListener,
    /// For status and metrics.
    pub api: TcpListener,
}

/// Runs until `shutdown`.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let why = |port| format!("cannot listen on port {port}: does something else, or is this not root?");
    let sockets = Sockets {
        http: listen::everywhere(options.http_port).with_context(|| why(options.http_port))?,
        https: listen::everywhere(options.https_port).with_context(|| why(options.https_port))?,
        api: listen::on(options.api).with_context(|| why(options.api.port()))?,
    };
    serve(options, sockets, shutdown).await
}

/// Runs on these sockets until `shutdown`.
pub async fn serve(
    options: Options,
    sockets: Sockets,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.data)
        .with_context(|| format!("cannot make {}", options.data.display()))?;
    let certificates = Arc::new(certificates(&options)?);
    let tls = tls::server_config(Arc::clone(&certificates))?;
    let router = Arc::new(Router::new(certificates, options.controller_key.clone()));
    let store = Arc::new(Store::new(&options.data));
    store.load(&router);

    let doors = tcp::Doors::open(options.pins.as_deref());

    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let sync = Arc::new(Sync {
        router: Arc::clone(&router),
        store: Arc::clone(&store),
        discovery: DiscoveryClient::new(Http::new(&options.discoverd)?.timeout(Duration::from_secs(5)))
            .learning(&options.tls),
        controller_key: options.controller_key,
        routes_changed: Notify::new(),
    });
    let l4 = Arc::new(L4::default());
    let l4_metrics = Arc::clone(&l4);
    let tasks = async {
        tokio::join!(
            Arc::clone(&sync).follow_routes(),
            sync.follow_services(),
            store.keep(Arc::clone(&router)),
            tcp::follow(Arc::clone(&router), doors, stop.clone()),
            Arc::clone(&l4).follow(Arc::clone(&router), options.pins, options.l4, stop.clone()),
        )
    };
    let api = flynn_api::server::serve(
        Listener::from_tcp(sockets.api),
        api(Arc::clone(&router), l4_metrics),
        stop.clone().cancelled_owned(),
    );
    let doors = vec![
        Door {
            listener: sockets.http,
            tls: None,
        },
        Door {
            listener: sockets.https,
            tls: Some(tls),
        },
    ];
    let doors = async {
        informed(&router).await;
        serve::serve(Arc::clone(&router), doors, stop.clone(), DRAIN).await
    };
    let end = async {
        shutdown.await;
        tracing::info!("letting requests finish");
        stop.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        // It ends once all requests have.
        served = doors => served.context("cannot accept connections"),
        Err(error) = api => Err(error).context("cannot serve the status"),
        _ = tasks => anyhow::bail!("the router's tasks ended"),
        () = end => Ok(()),
    }
}

/// Waits until requests can be answered by what is so. Whoever comes before waits at the sockets: they would hear that no route leads
/// where one does. What does not come within a while may be long in coming.
async fn informed(router: &Router) {
    let look = async {
        while !router.is_informed() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(INFORMED, look).await.is_err() {
        tracing::warn!("not all routes and instances are known yet; serving those that are");
    }
}

fn certificates(options: &Options) -> anyhow::Result<Certificates> {
    if let Some(given) = &options.certificate {
        match Certificates::new(given) {
            Ok(certificates) => return Ok(certificates),
            Err(why) => {
                tracing::warn!("TLSCERT and TLSKEY cannot be used, a certificate of our own is: {why:#}");
            }
        }
    }
    Certificates::new(&tls::default_certificate(
        &options.data,
        options.domain.as_deref(),
    )?)
}

/// `GET /.well-known/status` and `GET /metrics`.
fn api(router: Arc<Router>, l4: Arc<L4>) -> axum::Router {
    let counted = Arc::clone(&router);
    let status = async move || {
        let services = router.services();
        let empty: Vec<&str> = services
            .iter()
            .filter(|service| service.members().backends(false).is_empty())
            .map(|service| service.name.as_str())
            .collect();
        Json(serde_json::json!({
            "status": "healthy",
            "detail": {
                "routes": router.routes().len(),
                "services_without_instances": empty,
                "bad_certificates": router.certificates.bad(),
                "refused_routes": router.refused(),
            },
        }))
    };
    let metrics = async move || {
        counted.metrics.bad_certificates(counted.certificates.bad().len());
        (
            [("content-type", "text/plain; version=0.0.4")],
            counted.metrics.text() + &l4.text(),
        )
    };
    axum::Router::new()
        .route("/.well-known/status", get(status))
        .route("/metrics", get(metrics))
}
