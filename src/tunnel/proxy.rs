//! The HTTP proxy: which requests it takes, and what it answers.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::{Either, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use log::Level;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::interval;

use crate::metrics_registry;
use crate::net::server::{Limits, MAX_HEADERS, TEXT, reply, serve};
use crate::net::{
    DEFAULT_TIMEOUT, Deadline, Guard, MAX_HEAD, ScrapeError, ScrapeReason, TIMEOUT_SHARE, access, check_destination,
};
use crate::systemd;
use crate::tunnel::allowed_targets::AllowedTargets;
use crate::tunnel::answer_body::AnswerBody;
use crate::tunnel::capacity::busy;
use crate::tunnel::exchange::Tunnel;
use crate::tunnel::kept_tunnels::{IDLE_TIMEOUT, Transport};
use crate::tunnel::metrics::{Outcome, Scrape, TunnelMetrics};
use crate::tunnel::relay::{End, Relay};
use crate::tunnel::target_list::Destination;

/// The longest time-out of a scrape, in seconds.
const LONGEST_TIMEOUT: f64 = 86400.0;

/// What Prometheus gets.
type Reply = Response<Either<Full<Bytes>, AnswerBody>>;

pub struct Proxy {
    transport: Arc<Transport>,
    allowed: AllowedTargets,
    metrics: Arc<TunnelMetrics>,
    guard: Guard,
    /// A permit for each scrape at once.
    scrapes: Arc<Semaphore>,
    /// Whether a request that cannot be read has been logged at warn.
    warned: AtomicBool,
}

impl Proxy {
    pub fn new(
        transport: Transport, allowed: AllowedTargets, metrics: Arc<TunnelMetrics>, guard: Guard, scrapes: usize,
    ) -> Self {
        Proxy {
            transport: Arc::new(transport),
            allowed,
            metrics,
            guard,
            scrapes: Arc::new(Semaphore::new(scrapes)),
            warned: AtomicBool::new(false),
        }
    }

    /// Answers requests, on up to this many connections at once.
    pub async fn serve(self, listener: TcpListener, connections: usize) -> io::Result<Infallible> {
        self.allowed.find("").await; // reads the target file before the first scrape
        let transport = self.transport.clone();
        tokio::spawn(async move {
            // A timer that is due before all others costs a system call. So this one is due before that of a scrape.
            let most = DEFAULT_TIMEOUT / 2;
            let mut ticks = interval(systemd::watchdog_interval().unwrap_or(most).min(most));
            loop {
                ticks.tick().await;
                systemd::alive(); // here, so that systemd hears nothing if this thread hangs
                transport.kept.expire();
                transport.offline.expire();
            }
        });
        let limits =
            Limits { connections, head_timeout: IDLE_TIMEOUT + DEFAULT_TIMEOUT, max_head: MAX_HEAD, single: None };
        let proxy = Arc::new(self);
        let answering = proxy.clone();
        let answer = move |request| answering.clone().answer(request);
        serve(listener, limits, answer, move |error: &hyper::Error| proxy.failed(error)).await
    }

    /// A connection failed. The server has answered 431 to a head that is too large, and 400 to what is not HTTP.
    fn failed(&self, error: &hyper::Error) {
        if !error.is_parse() {
            return; // the client went away
        }
        self.metrics.refused(ScrapeReason::BadRequest);
        let why = if error.is_parse_too_large() {
            let bound = format!("the bound is {} KiB and {MAX_HEADERS} headers", MAX_HEAD >> 10);
            format!("{error}: {bound}; are there too many http_headers in the scrape config?")
        } else {
            format!("{error}; does proxy_url in the scrape config begin with http://?")
        };
        let level = if self.warned.swap(true, Ordering::Relaxed) { Level::Debug } else { Level::Warn };
        log::log!(level, "refused a request: {why}");
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Reply {
        let (method, url) = (request.method().clone(), request.uri().clone());
        if matches!(method, Method::GET | Method::HEAD) && url.authority().is_none() {
            return self.own_page(&request).await.map(Either::Left);
        }
        // The time runs from here, since the target file may be slow to read.
        let deadline = Deadline::after(scrape_timeout(request.headers()));
        let answer = match self.target(&method, &url).await {
            Ok(target) if method == Method::CONNECT => self.connect(target, request, deadline).await,
            Ok(target) => self.scrape(target, request, deadline).await,
            Err(error) => {
                self.metrics.refused(error.reason);
                Err(error)
            }
        };
        match &answer {
            Ok(_) => self.metrics.failures.log_success(),
            Err(error) => self.metrics.failures.log_failure(error),
        }
        answer.unwrap_or_else(|error| {
            log::debug!("{method} {url}: {error}");
            failure(error)
        })
    }

    async fn own_page(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let mut answer = match (self.guard.check(request), request.uri().path()) {
            (Err((status, text)), _) => reply(status, TEXT, text),
            (Ok(()), page @ ("/metrics" | "/")) => {
                self.allowed.check().await; // a target that has left the list has no failure
                let (kind, text) = match page {
                    "/" => (TEXT, self.metrics.failures.text()),
                    _ => (metrics_registry::CONTENT_TYPE, self.metrics.text()),
                };
                reply(StatusCode::OK, kind, text)
            }
            (Ok(()), "/-/healthy") => reply(StatusCode::OK, TEXT, "healthy\n"),
            _ => {
                let text = "this is a proxy for Prometheus (proxy_url); there are /metrics, /-/healthy and /\n";
                reply(StatusCode::NOT_FOUND, TEXT, text)
            }
        };
        access::protect(&mut answer);
        answer
    }

    async fn target(&self, method: &Method, url: &Uri) -> Result<Arc<Destination>, ScrapeError> {
        let refuse = |why: &str| Err(ScrapeError::new(ScrapeReason::NotTarget, format!("refused: {why}")));
        match (method.as_str(), url.scheme_str()) {
            ("GET", Some("http")) | ("CONNECT", None) => {}
            ("GET" | "CONNECT", _) => return refuse("GET of http URLs and CONNECT only"),
            _ => return refuse("GET and CONNECT only"),
        }
        let authority = url.authority().map(|authority| authority.as_str().to_ascii_lowercase()).unwrap_or_default();
        let target = if authority.contains(':') { authority } else { authority + ":80" };
        let target = check_destination(&target, self.allowed.find(&target).await)?;
        if method == Method::CONNECT && !target.is_https {
            return refuse("CONNECT is for targets with the scheme https only (tag prometheus.io/scheme)");
        }
        Ok(target)
    }

    async fn scrape(
        &self, target: Arc<Destination>, request: Request<Incoming>, deadline: Deadline,
    ) -> Result<Reply, ScrapeError> {
        let mut scrape = Scrape::start(self.metrics.clone(), target.clone(), request.uri().path());
        let answered = async {
            let place = self.place()?;
            let request = request_to(&target.address, request)?;
            let (head, exchange) = self.transport.exchange(&target, request, deadline).await?;
            Ok::<_, ScrapeError>((place, head, exchange))
        };
        let (place, mut head, exchange) =
            answered.await.inspect_err(|error| scrape.outcome = Outcome::Failed(error.reason))?;
        let kept = self.transport.kept.clone();
        let body = AnswerBody::new(head.status, exchange, kept, deadline, scrape, place);
        if head.headers.contains_key(TRANSFER_ENCODING) {
            head.headers.remove(CONTENT_LENGTH); // chunks overrule it (RFC 9112, 6.3)
        }
        end_to_end(&mut head.headers);
        head.version = Version::HTTP_11; // the exporter's may be older
        Ok(Response::from_parts(head, Either::Right(body)))
    }

    /// Answers Prometheus' CONNECT, and relays what follows.
    async fn connect(
        self: &Arc<Self>, target: Arc<Destination>, request: Request<Incoming>, deadline: Deadline,
    ) -> Result<Reply, ScrapeError> {
        let opened = async { Ok((self.place()?, self.transport.open(&target, deadline).await?)) }.await;
        let failed = |error: &ScrapeError| Outcome::Failed(error.reason);
        let outcome = opened.as_ref().map_or_else(failed, |_| Outcome::Passed(StatusCode::OK));
        self.metrics.ended(&target, None, outcome);
        let (scrape, Tunnel { stream, place, .. }) = opened?;
        let relay = Relay::new(
            self.transport.kept.clone(),
            place,
            self.scrapes.clone(),
            scrape,
            target.timeout.unwrap_or(DEFAULT_TIMEOUT),
        );
        let proxy = self.clone();
        tokio::spawn(async move {
            let Ok(prometheus) = hyper::upgrade::on(request).await else { return };
            if relay.run(TokioIo::new(prometheus), stream).await == End::Busy {
                proxy.metrics.ended(&target, None, Outcome::Failed(ScrapeReason::Busy));
                proxy.metrics.failures.log_failure(&busy());
            }
        });
        Ok(Response::new(Either::Left(Full::default())))
    }

    fn place(&self) -> Result<OwnedSemaphorePermit, ScrapeError> {
        self.scrapes.clone().try_acquire_owned().map_err(|_| busy())
    }
}

/// The time within which a scrape has to be answered. Prometheus sends its time-out in seconds.
fn scrape_timeout(headers: &HeaderMap) -> Duration {
    let header = headers.get("X-Prometheus-Scrape-Timeout-Seconds").and_then(|value| value.to_str().ok());
    let seconds = header.and_then(|text| text.parse::<f64>().ok()).filter(|seconds| *seconds >= 0.001);
    seconds.map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs_f64(seconds.min(LONGEST_TIMEOUT) * TIMEOUT_SHARE))
}

/// Prometheus' request, as the target gets it.
fn request_to(target: &str, request: Request<Incoming>) -> Result<Request<Empty<Bytes>>, ScrapeError> {
    let (Parts { uri, mut headers, .. }, _) = request.into_parts(); // the body is not passed
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let no_path = |_| ScrapeError::new(ScrapeReason::NotTarget, "refused: the path is invalid");
    let mut passed = Request::get(path).body(Empty::new()).map_err(no_path)?;
    // `Connection` names headers for the next hop (RFC 9110, 7.6.1)
    let named: Vec<_> = headers.get_all(CONNECTION).iter().cloned().collect();
    for name in named.iter().filter_map(|value| value.to_str().ok()).flat_map(|names| names.split(',')) {
        headers.remove(name.trim());
    }
    end_to_end(&mut headers);
    headers.remove(CONTENT_LENGTH);
    headers.remove(EXPECT);
    if let Ok(host) = HeaderValue::from_str(target) {
        headers.insert(HOST, host);
    }
    *passed.headers_mut() = headers;
    Ok(passed)
}

/// Removes the headers that are always for the next hop only. An answer has no others: Go's HTTP client, which Prometheus uses,
/// takes headers even if `Connection` names them.
fn end_to_end(headers: &mut HeaderMap) {
    let always = [CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    let older = ["keep-alive", "proxy-connection"].map(HeaderName::from_static);
    for name in always.into_iter().chain(older) {
        headers.remove(name);
    }
}

/// The answer to a failed scrape. Prometheus shows the reason phrase, and people read the body.
fn failure(error: ScrapeError) -> Reply {
    let status = match error.reason {
        ScrapeReason::NotTarget => StatusCode::FORBIDDEN,
        ScrapeReason::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ScrapeReason::Busy => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    };
    let mut answer = reply(status, TEXT, format!("{error}\n")).map(Either::Left);
    if let Ok(phrase) = ReasonPhrase::try_from(error.message.into_bytes()) {
        answer.extensions_mut().insert(phrase);
    }
    answer
}
