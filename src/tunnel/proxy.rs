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
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::time::interval;

use crate::net::refused::{Reason, Refused};
use crate::net::scrape::{DEFAULT_TIMEOUT, Deadline, check_destination};
use crate::net::server::{Full as WhenFull, Limits, METRICS, TEXT, reply, serve};
use crate::net::vpn::Vpn;
use crate::tunnel::allowed_targets::AllowedTargets;
use crate::tunnel::exchange::{Exchange, Passing};
use crate::tunnel::metrics::{Metrics, Outcome, Scrape};
use crate::tunnel::pool::{IDLE_TIMEOUT, Pool, Tunnel};
use crate::tunnel::relay::relay;

/// The share of a scrape's time-out within which the device has to answer: the rest is for answering with the reason.
const TIMEOUT_SHARE: f64 = 0.9;
/// Connections beyond the number of tunnels, so that overload is answered with 503 and health checks are answered too.
const SPARE_CONNECTIONS: usize = 16;
/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 16 << 10;

type Answer = Response<Either<Full<Bytes>, Passing>>;

/// The state of the proxy.
pub struct Proxy {
    vpn: Vpn,
    allowed: AllowedTargets,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
    /// Whether the tunnel host could not be reached the last time.
    host_lost: AtomicBool,
}

impl Proxy {
    /// Puts the parts together.
    pub fn new(vpn: Vpn, allowed: AllowedTargets, pool: Pool, metrics: Metrics) -> Self {
        let (pool, metrics) = (Arc::new(pool), Arc::new(metrics));
        Proxy { vpn, allowed, pool, metrics, host_lost: AtomicBool::new(false) }
    }

    /// Answers requests, of which so many may use a tunnel at once.
    pub async fn serve(self, listener: TcpListener, tunnels: usize) -> io::Result<Infallible> {
        self.allowed.contains("").await; // reads the target file before the first scrape
        let pool = self.pool.clone();
        tokio::spawn(async move {
            let mut ticks = interval(IDLE_TIMEOUT / 10);
            loop {
                ticks.tick().await;
                pool.expire();
            }
        });
        let limits = Limits {
            connections: tunnels + SPARE_CONNECTIONS,
            full: WhenFull::CloseIdle,
            head_timeout: IDLE_TIMEOUT + DEFAULT_TIMEOUT,
            max_head: MAX_HEAD,
            single: None,
        };
        let proxy = Arc::new(self);
        serve(listener, limits, move |request| proxy.clone().answer(request)).await
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let (method, url) = (request.method().clone(), request.uri().clone());
        if method == Method::GET && url.authority().is_none() {
            return self.own_page(url.path());
        }
        let answer = match self.target(&method, &url).await {
            Ok(target) if method == Method::CONNECT => self.connect(target, request).await,
            Ok(target) => self.scrape(target, request).await,
            Err(refused) => {
                self.metrics.count(Outcome::Refused(refused.reason));
                Err(refused)
            }
        };
        answer.unwrap_or_else(|refused| {
            log::debug!("{method} {url}: {refused}");
            failure(refused)
        })
    }

    fn own_page(&self, path: &str) -> Answer {
        let answer = match path {
            "/metrics" => reply(StatusCode::OK, METRICS, self.metrics.text()),
            "/-/healthy" => reply(StatusCode::OK, TEXT, "healthy\n"),
            _ => {
                let text = "this is a proxy for Prometheus (proxy_url); there are /metrics and /-/healthy\n";
                reply(StatusCode::NOT_FOUND, TEXT, text)
            }
        };
        answer.map(Either::Left)
    }

    /// The target of a request, as `host:port`.
    async fn target(&self, method: &Method, url: &Uri) -> Result<String, Refused> {
        let refuse = |why: &str| Err(Refused::new(Reason::NotTarget, format!("refused: {why}")));
        match (method.as_str(), url.scheme_str()) {
            ("GET", Some("http")) | ("CONNECT", None) => {}
            ("GET" | "CONNECT", _) => return refuse("GET of http URLs and CONNECT only"),
            _ => return refuse("GET and CONNECT only"),
        }
        let authority = url.authority().map(|authority| authority.as_str().to_ascii_lowercase()).unwrap_or_default();
        let target = if authority.contains(':') { authority } else { authority + ":80" };
        check_destination(&target, self.allowed.contains(&target).await)?;
        Ok(target)
    }

    /// Passes a scrape through a tunnel.
    async fn scrape(&self, target: String, request: Request<Incoming>) -> Result<Answer, Refused> {
        let mut scrape = Scrape::start(self.metrics.clone());
        let deadline = Deadline::after(scrape_timeout(request.headers()));
        let answered = match request_to(&target, &request) {
            Ok(request) => deadline.wait(self.exchange(&target, request, deadline)).await.flatten(),
            Err(refused) => Err(refused),
        };
        let (exchange, answer) = answered.inspect_err(|refused| scrape.outcome = Outcome::Refused(refused.reason))?;
        let (head, body) = answer.into_parts();
        let passing = Passing::new(target, exchange, body, self.pool.clone(), deadline, scrape);
        let mut answer = Response::new(Either::Right(passing));
        *answer.status_mut() = head.status;
        *answer.headers_mut() = end_to_end(&head.headers);
        if head.headers.contains_key(TRANSFER_ENCODING) {
            answer.headers_mut().remove(CONTENT_LENGTH); // chunks overrule it (RFC 9112, 6.3)
        }
        if let Some(phrase) = head.extensions.get::<ReasonPhrase>() {
            answer.extensions_mut().insert(phrase.clone());
        }
        Ok(answer)
    }

    /// Sends a request in a kept tunnel, or else in a new one. A kept tunnel that was closed in the meantime is no failure.
    async fn exchange(
        &self, target: &str, request: Request<Empty<Bytes>>, deadline: Deadline,
    ) -> Result<(Exchange, Response<Incoming>), Refused> {
        if let Some(kept) = self.pool.take(target)
            && let Ok(answered) = Exchange::start(kept, request.clone()).await
        {
            return Ok(answered);
        }
        Exchange::start(self.open(target, deadline).await?, request).await
    }

    /// Answers Prometheus' CONNECT, and relays what follows.
    async fn connect(&self, target: String, request: Request<Incoming>) -> Result<Answer, Refused> {
        let opened = self.open(&target, Deadline::after(DEFAULT_TIMEOUT)).await;
        let outcome = |refused: &Refused| Outcome::Refused(refused.reason);
        self.metrics.count(opened.as_ref().map_or_else(outcome, |_| Outcome::Passed));
        let Tunnel { stream, place } = opened?;
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(request).await {
                relay(TokioIo::new(upgraded), stream).await;
            }
            drop(place);
        });
        Ok(Response::new(Either::Left(Full::default())))
    }

    /// Opens a new tunnel. A tunnel host that cannot be reached is logged once, and not for each device.
    async fn open(&self, target: &str, deadline: Deadline) -> Result<Tunnel, Refused> {
        let place = self.pool.place().ok_or_else(|| Refused::new(Reason::Busy, "too many tunnels at once"))?;
        self.metrics.handshakes.inc();
        let opened = self.vpn.open(target, deadline).await;
        match &opened {
            Err(refused) if refused.reason == Reason::NoTunnel => {
                if !self.host_lost.swap(true, Ordering::Relaxed) {
                    log::warn!("{refused}");
                }
            }
            // without an answer of the proxy, nothing is known about it
            Err(Refused { status: None, .. }) => {}
            Ok(_) | Err(_) => {
                if self.host_lost.swap(false, Ordering::Relaxed) {
                    log::info!("tunnel host reachable again");
                }
            }
        }
        Ok(Tunnel { stream: opened?, place })
    }
}

/// The time within which a scrape has to be answered. Prometheus sends its time-out in seconds.
fn scrape_timeout(headers: &HeaderMap) -> Duration {
    let header = headers.get("X-Prometheus-Scrape-Timeout-Seconds").and_then(|value| value.to_str().ok());
    let seconds = header.and_then(|text| text.parse::<f64>().ok()).filter(|seconds| (0.001..=3600.0).contains(seconds));
    seconds.map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs_f64(seconds * TIMEOUT_SHARE))
}

/// Prometheus' request, as the target gets it.
fn request_to(target: &str, request: &Request<Incoming>) -> Result<Request<Empty<Bytes>>, Refused> {
    let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let no_path = |_| Refused::new(Reason::NotTarget, "refused: the path is invalid");
    let mut passed = Request::get(path).body(Empty::new()).map_err(no_path)?;
    *passed.headers_mut() = end_to_end(request.headers());
    // the body is not passed
    passed.headers_mut().remove(CONTENT_LENGTH);
    passed.headers_mut().remove(EXPECT);
    if let Ok(host) = HeaderValue::from_str(target) {
        passed.headers_mut().insert(HOST, host);
    }
    Ok(passed)
}

/// The headers without those for the next hop only (RFC 9110, 7.6.1).
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut kept = headers.clone();
    let named = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named = named.flat_map(|names| names.split(',')).filter_map(|name| name.trim().parse::<HeaderName>().ok());
    let always = [CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    let older = ["keep-alive", "proxy-connection"].map(HeaderName::from_static);
    for name in always.into_iter().chain(older).chain(named) {
        kept.remove(name);
    }
    kept
}

/// The answer to a failed scrape. Prometheus shows the reason phrase, and people read the body.
fn failure(refused: Refused) -> Answer {
    let status = match refused.reason {
        Reason::NotTarget => StatusCode::FORBIDDEN,
        Reason::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Reason::Busy => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    };
    let mut answer = reply(status, TEXT, format!("{refused}\n")).map(Either::Left);
    if let Ok(phrase) = ReasonPhrase::try_from(refused.message.into_bytes()) {
        answer.extensions_mut().insert(phrase);
    }
    answer
}
