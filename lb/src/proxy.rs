//! One request: its route, its backend, its answer.
//!
//! A request is tried again only where that is safe: when a backend refused the connection, when nothing of the
//! request had left, or, for idempotent requests without a body, when the backend hung up before it answered. What may
//! have arrived is sent again on new connections only, and each time is paid for: it may be what ends its backends.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue, SET_COOKIE, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use crate::backend::{Backend, InFlight};
use crate::balance;
use crate::body::Noted;
use crate::headers::{self, Origin};
use crate::router::{Router, Target};
use crate::slots::Slot;
use crate::tunnel;
use crate::upload::Progress;
use crate::upstream::{self, Body, Connection};

/// Backends that one request is tried at.
const MAX_ATTEMPTS: usize = 4;
/// How long a backend may take to begin its answer, from when something of the request has last come.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(10);
/// The cookie of sticky routes.
const STICKY: &str = "_backend";

/// How a client's connection came in.
#[derive(Clone, Debug)]
pub struct Client {
    /// The other end.
    pub addr: SocketAddr,
    /// Over TLS.
    pub tls: bool,
    /// Our port.
    pub port: u16,
    /// Its place among all.
    pub slot: Slot,
}

/// Answers a request. Whatever goes wrong becomes an answer too.
pub async fn handle(
    router: Arc<Router>,
    client: Client,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let _busy = router.metrics.begin();
    let head = *request.method() == Method::HEAD;
    let response = match route(&router, client, request).await {
        Ok(response) => response,
        Err((status, why)) => refusal(status, why, head),
    };
    router.metrics.answered(response.status());
    Ok(response)
}

/// An answer of our own.
fn refusal(status: StatusCode, why: &str, head: bool) -> Response<Body> {
    let text = if head {
        Bytes::new()
    } else {
        format!("{} {why}\n", status.as_u16()).into()
    };
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

async fn route(
    router: &Arc<Router>,
    client: Client,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, headers::Refusal> {
    let host = headers::check(&request)?;
    let Some(target) = router.find(&host, request.uri().path()) else {
        return Err((
            StatusCode::NOT_FOUND,
            "no route leads there: the host name or the path is not known here",
        ));
    };
    target.service.budget.deposit();
    // Only HTTP/1.1 can change its protocol so.
    let upgrade = headers::upgrade_of(request.headers()).filter(|_| request.version() == Version::HTTP_11);
    let client_side = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    let wanted = if target.sticky {
        cookie(request.headers())
    } else {
        None
    };
    let at_ms = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let origin = Origin {
        client: client.addr.ip(),
        tls: client.tls,
        port: client.port,
        at_ms: u64::try_from(at_ms).unwrap_or(0),
    };
    let close = target.disable_keep_alives && request.version() <= Version::HTTP_11;
    let progress = Progress::new();
    let request = outgoing(request, &host, &origin, upgrade, &progress);
    let (mut response, in_flight, connection) =
        send(router, &target, wanted.as_deref(), &progress, request).await?;

    let protocol = response.headers().get(UPGRADE).cloned();
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    headers::give_back(response.headers_mut());
    if target.sticky && wanted.as_deref() != Some(in_flight.backend().token.as_str()) {
        let secure = if client.tls { "; Secure" } else { "" };
        let value = format!(
            "{STICKY}={}; Path=/; HttpOnly; SameSite=Lax{secure}",
            in_flight.backend().token
        );
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().append(SET_COOKIE, value);
        }
    }
    if switched {
        return switch(router, response, protocol, client_side, (in_flight, client.slot));
    }
    if close {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    *response.version_mut() = Version::HTTP_11;
    Ok(response.map(|body| Passing::new(body, in_flight, connection).boxed_unsync()))
}

/// The client's request as the backend gets it: the target verbatim, without scheme and authority.
fn outgoing(
    request: Request<Incoming>,
    host: &str,
    origin: &Origin,
    upgrade: Option<HeaderValue>,
    progress: &Progress,
) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    headers::forward(&mut parts.headers, host, origin);
    if let Some(protocol) = upgrade {
        parts
            .headers
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    // `OPTIONS *` has no path.
    let target = parts.uri.path_and_query().cloned().map(http::Uri::from);
    parts.uri = target.unwrap_or_else(|| http::Uri::from_static("/"));
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    let body = if body.is_end_stream() {
        empty()
    } else {
        if body.size_hint().exact().is_none() {
            // Unless it is said, hyper takes GET and HEAD to bring nothing, and drops what they do bring.
            let chunked = HeaderValue::from_static("chunked");
            parts.headers.insert(TRANSFER_ENCODING, chunked);
        }
        let progress = progress.clone();
        Noted::new(body, move || progress.note()).boxed_unsync()
    };
    Request::from_parts(parts, body)
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Another request like this one, if sending it twice does no harm.
fn again(request: &Request<Body>) -> Option<Request<Body>> {
    let harmless = request.method().is_idempotent() && request.body().is_end_stream();
    harmless.then(|| {
        let mut copy = Request::new(empty());
        copy.method_mut().clone_from(request.method());
        copy.uri_mut().clone_from(request.uri());
        copy.headers_mut().clone_from(request.headers());
        copy
    })
}

type Sent = (Response<Incoming>, InFlight, Option<Connection>);

/// Sends a request to one backend after another until one answers.
async fn send(
    router: &Router,
    target: &Target,
    wanted: Option<&str>,
    progress: &Progress,
    request: Request<Body>,
) -> Result<Sent, headers::Refusal> {
    let members = target.service.told().await;
    let backends = members.backends(target.leader);
    let mut tried = Vec::new();
    let mut next = Some(request);
    let mut pool = Pool::Kept;
    while let Some(request) = next.take() {
        if tried.len() >= MAX_ATTEMPTS || !tried.is_empty() && !target.service.budget.withdraw() {
            break;
        }
        let Some(index) = choose(backends, &tried, wanted) else {
            break;
        };
        if !tried.is_empty() {
            router.metrics.retried();
        }
        tried.push(index);
        let in_flight = backends[index].begin();
        match attempt(router, target, &in_flight, &mut pool, progress, request).await? {
            Attempt::Answered(response, connection) => return Ok((*response, in_flight, connection)),
            Attempt::Failed(request) => next = request.map(|request| *request),
        }
    }
    if tried.is_empty() {
        return Err((
            StatusCode::SERVICE_UNAVAILABLE,
            "nothing runs here now that could answer",
        ));
    }
    Err((
        StatusCode::SERVICE_UNAVAILABLE,
        "what should answer here cannot be reached",
    ))
}

fn choose(backends: &[Arc<Backend>], tried: &[usize], wanted: Option<&str>) -> Option<usize> {
    if let Some(wanted) = wanted.filter(|_| tried.is_empty())
        && let Some(index) = backends.iter().position(|backend| backend.token == wanted)
    {
        return Some(index);
    }
    let loads: Vec<_> = backends.iter().map(|backend| backend.load()).collect();
    balance::pick(
        &loads,
        tried,
        rand::random::<u32>() as usize,
        rand::random::<u32>() as usize,
    )
}

enum Attempt {
    /// The answer's head, and its connection unless it has ended.
    Answered(Box<Response<Incoming>>, Option<Connection>),
    /// It failed; with the request, if it may be sent to another backend.
    Failed(Option<Box<Request<Body>>>),
}

/// Which connections a request may use.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// One that was kept, if there is one.
    Kept,
    /// It was lost on one that was kept: only new ones.
    New,
}

async fn attempt(
    router: &Router,
    target: &Target,
    in_flight: &InFlight,
    pool: &mut Pool,
    progress: &Progress,
    mut request: Request<Body>,
) -> Result<Attempt, headers::Refusal> {
    let backend = in_flight.backend();
    let mut repeated = false;
    loop {
        let Some((connection, kept)) = connect(router, backend, *pool).await? else {
            return Ok(Attempt::Failed(Some(Box::new(request))));
        };
        if repeated {
            if !target.service.budget.withdraw() {
                return Ok(Attempt::Failed(None));
            }
            router.metrics.retried();
        }
        let copy = again(&request);
        let answer = progress.within(ANSWER_TIMEOUT, connection.send(request)).await;
        let failure = match answer {
            Some(Ok((response, connection))) => return Ok(Attempt::Answered(Box::new(response), connection)),
            Some(Err(failure)) => failure,
            None => {
                return Err((
                    StatusCode::GATEWAY_TIMEOUT,
                    "there was no answer within ten minutes",
                ));
            }
        };
        if failure.error.is_user() {
            // The client's body broke off: nobody is to blame but the client, who is gone.
            return Err((StatusCode::BAD_REQUEST, "the request's body broke off"));
        }
        tracing::debug!(error = %failure.error, backend = %backend.addr, kept, "no answer");
        // A backend may close a connection that it has kept for long enough, just as we use it: no fault of its.
        match (failure.unsent, copy) {
            (Some(unsent), _) if kept => request = *unsent,
            (None, Some(copy)) if kept => {
                (request, *pool, repeated) = (copy, Pool::New, true);
            }
            (None, None) if kept => return Ok(Attempt::Failed(None)),
            (unsent, copy) => {
                backend.failed();
                return Ok(Attempt::Failed(unsent.or(copy.map(Box::new))));
            }
        }
    }
}

/// A connection to the backend, and whether it was kept; none where the backend takes none.
async fn connect(
    router: &Router,
    backend: &Backend,
    pool: Pool,
) -> Result<Option<(Connection, bool)>, headers::Refusal> {
    if pool == Pool::Kept
        && let Some(connection) = backend.take_idle()
    {
        return Ok(Some((connection, true)));
    }
    match Connection::open(backend.addr).await {
        Ok(connection) => Ok(Some((connection, false))),
        Err(error) if upstream::is_our_own(&error) => {
            tracing::warn!(%error, "no connection to a backend can be made");
            Err((
                StatusCode::SERVICE_UNAVAILABLE,
                "the router has too many connections",
            ))
        }
        Err(error) => {
            tracing::debug!(%error, backend = %backend.addr, "no connection");
            router.metrics.connect_failed();
            backend.failed();
            Ok(None)
        }
    }
}

/// Joins both sides of a connection that changes its protocol.
fn switch(
    router: &Arc<Router>,
    response: Response<Incoming>,
    protocol: Option<HeaderValue>,
    client_side: Option<OnUpgrade>,
    held: (InFlight, Slot),
) -> Result<Response<Body>, headers::Refusal> {
    let (Some(client_side), Some(protocol)) = (client_side, protocol) else {
        return Err((
            StatusCode::BAD_GATEWAY,
            "the backend changed the protocol unasked",
        ));
    };
    let (mut parts, body) = response.into_parts();
    parts
        .headers
        .insert(CONNECTION, HeaderValue::from_static("upgrade"));
    parts.headers.insert(UPGRADE, protocol);
    let answer = Response::from_parts(parts.clone(), empty());
    let backend_side = hyper::upgrade::on(Response::from_parts(parts, body));
    tunnel::start(router, client_side, backend_side, held);
    Ok(answer)
}

fn cookie(headers: &HeaderMap) -> Option<String> {
    let values = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == STICKY)
        .map(|(_, value)| value.to_owned())
}

/// An answer's body on its way. At its end the connection is kept; if it is dropped before, the connection is closed.
struct Passing {
    body: Incoming,
    in_flight: Option<InFlight>,
    connection: Option<Connection>,
}

impl Passing {
    fn new(body: Incoming, in_flight: InFlight, connection: Option<Connection>) -> Self {
        let mut passing = Self {
            body,
            in_flight: Some(in_flight),
            connection,
        };
        if passing.body.is_end_stream() {
            passing.end();
        }
        passing
    }

    fn end(&mut self) {
        if let (Some(in_flight), Some(connection)) = (self.in_flight.take(), self.connection.take()) {
            in_flight.backend().keep(connection);
        }
    }
}

impl http_body::Body for Passing {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(_)) if !self.body.is_end_stream() => {}
            Some(Err(_)) => {
                self.connection = None;
                self.in_flight = None;
            }
            Some(Ok(_)) | None => self.end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
