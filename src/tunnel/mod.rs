//! `baletheus tunnel`: the proxy by which Prometheus scrapes any device through balena's VPN, as its `proxy_url`.
//!
//! For plain targets Prometheus sends `GET http://<uuid>.balena:<port>/<path>`, which balena's own proxy does not take:
//! here it becomes a request within a tunnel. For https targets Prometheus sends `CONNECT` itself, and the two are joined.
//! It goes nowhere but to the targets of the target file.

pub mod allowed_targets;
pub mod pool;

use std::convert::Infallible;
use std::ffi::OsString;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::Duration;

use clap::{ArgMatches, Command};
use http_body_util::{Either, Empty, Full};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1 as client;
use hyper::ext::ReasonPhrase;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, UPGRADE,
};
use hyper::header::{PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TRANSFER_ENCODING};
use hyper::http::uri::PathAndQuery;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use reqwest::Url;
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::pki_types::CertificateDer;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, interval, sleep, sleep_until, timeout};

use crate::balena::key::ApiKey;
use crate::check::probe::broken;
use crate::config;
use crate::config::options::{self, Values};
use crate::logging::{self, cannot_start, misconfigured};
use crate::net::connector::{Connector, Deadline, PATIENCE, Refused, Stream, Traffic, Tunnel};
use crate::net::server::{self as endpoint, METRICS, TEXT, addresses, register, reply};
use crate::tunnel::allowed_targets::Allowed;
use crate::tunnel::pool::{Kept, Pool};

/// How long a tunnel is kept without a request, and a connection of Prometheus' or a joined pair without a byte.
/// Balena's proxy lets a tunnel idle for 320 s at least; Prometheus keeps a connection for 5 min.
const IDLE: Duration = Duration::from_secs(300);
/// How long an answer may wait for Prometheus to read it, in milliseconds.
#[cfg(target_os = "linux")]
const UNREAD: u32 = 60_000;
/// The part of a scrape's time-out within which its answer has to be here, so that there is time to say that it is not.
const PART: f64 = 0.9;
/// The largest answer of an exporter, in bytes, as it comes. A `node_exporter`'s has 60 KB.
const LARGEST_ANSWER: usize = 64 << 20;
/// Of a request, an answer's head, or what is in flight within a tunnel, in bytes.
const BUFFER: usize = 16 << 10;
/// Tunnels at once, where the limit for open files does not set a lower one.
const MOST_TUNNELS: usize = 30_000;
/// More connections to it than tunnels, so that one too many is told so, and health can be asked for.
const MORE_CLIENTS: usize = 16;
/// Files that are open for anything else, these among them.
const OTHER_FILES: usize = 64;
/// The host's SSH, which the key opens too. No scrape goes there.
const SSH: u64 = 22222;
/// Threads that look up names: one that hangs must not hold up the rest for long.
const MOST_LOOK_UPS: usize = 16;

/// Its options.
const TAKES: &[&str] =
    &["TUNNEL_LISTEN_ADDRESS", "tunnel-url", "sd-file", "api-key-file", "ca-file", "log-level", "log-format"];

/// Its command line.
pub fn command() -> Command {
    Command::new("tunnel")
        .about("The way to vpn targets: a proxy that Prometheus has as its proxy_url")
        .after_help(
            "API_KEY is taken as by discovery, and so is RUST_LOG. It goes only to targets in the target file.\n\
             Exit codes: 0 ended by a signal, 2 configuration.\n",
        )
        .next_line_help(true)
        .args(TAKES.iter().map(|name| options::arg(options::option(name))))
}

/// All that it is told from outside, checked.
struct Settings {
    key: ApiKey,
    key_file: Option<PathBuf>,
    roots: Vec<CertificateDer<'static>>,
    url: Url,
    sd_file: PathBuf,
    listen: Vec<SocketAddr>,
    log: logging::Settings,
}

/// Runs until a signal ends it.
pub fn run(matches: ArgMatches, var: &dyn Fn(&str) -> Option<OsString>) -> ExitCode {
    let mut from = Values { matches, var, errors: Vec::new() };
    let (key, key_file) = config::key(&mut from);
    let settings = Settings {
        key,
        key_file,
        roots: from.list("ca-file", config::certificates),
        url: from.one("tunnel-url", config::api_url),
        sd_file: from.one("sd-file", config::file_path),
        listen: from.list("TUNNEL_LISTEN_ADDRESS", addresses),
        log: logging::Settings::read(&mut from),
    };
    if !from.errors.is_empty() {
        return misconfigured(&from.errors);
    }
    logging::init(&settings.log);
    match start(settings) {
        Ok(never) => match never {},
        Err(error) => cannot_start(&error),
    }
}

fn start(settings: Settings) -> Result<Infallible, String> {
    let address = |listener: &std::net::TcpListener| listener.local_addr().map_err(|error| error.to_string());
    if let Some(warning) = config::unencrypted(&settings.url) {
        log::warn!("{warning}");
    }
    let metrics = Metrics::new().map_err(|error| format!("metrics: {error}"))?;
    let mut connector = Connector::new(settings.roots).map_err(|error| format!("TLS: {error}"))?;
    connector.traffic = Some(metrics.traffic.clone());
    let url = settings.url.as_str().parse().map_err(|_| "the tunnel's URL has no use")?;
    let listener = endpoint::listen(&settings.listen)
        .map_err(|error| format!("{error}; set another --listen (TUNNEL_LISTEN_ADDRESS)"))?;
    // a tunnel and its scrape, or the two ends of a joined pair and whoever comes next
    let places = (open_files().saturating_sub(OTHER_FILES) / 3).clamp(1, MOST_TUNNELS);
    let list = settings.sd_file.display().to_string();
    let proxy = Arc::new(Proxy {
        tunnel: Tunnel::new(connector, url, settings.key, settings.key_file),
        allowed: Allowed::new(settings.sd_file, metrics.targets.clone()),
        pool: Arc::new(Pool::new(places)),
        metrics,
        lost: AtomicBool::new(false),
    });
    let (version, url) = (env!("CARGO_PKG_VERSION"), &settings.url);
    let at = address(&listener)?;
    log::info!("baletheus {version}: tunnel on http://{at} to the targets of {list}, through {url}, {places} at once");
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("signals: {error}"))?;
    thread::spawn(move || {
        // the list needs no SIGHUP, which must not end it either
        if let Some(signal) = signals.forever().find(|signal| *signal != SIGHUP) {
            log::info!("stopped by {}", signal_name(signal).unwrap_or("a signal"));
            process::exit(0);
        }
    });
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(MOST_LOOK_UPS).build();
    let served = runtime.and_then(|runtime| runtime.block_on(proxy.serve(listener, places)));
    served.map_err(|error| error.to_string())
}

/// The limit for open files, made as high as it may be.
fn open_files() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit); // then it stays as it is
    getrlimit(Resource::Nofile).current.and_then(|most| most.try_into().ok()).unwrap_or(usize::MAX)
}

struct Metrics {
    registry: Registry,
    scrapes: IntCounterVec,
    duration: Histogram,
    handshakes: IntCounter,
    traffic: Traffic,
    targets: IntGauge,
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let registry = endpoint::registry()?;
        let scrapes = Opts::new(
            "baletheus_tunnel_scrapes_total",
            "Scrapes through the tunnel, by result; of https targets, connections.",
        );
        let duration = HistogramOpts::new(
            "baletheus_tunnel_duration_seconds",
            "How long a scrape through the tunnel took, without those of https targets.",
        );
        let buckets = vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 9.0];
        let bytes =
            Opts::new("baletheus_tunnel_bytes_total", "Bytes to and from the tunnel host, those of TLS among them.");
        let bytes = register(&registry, IntCounterVec::new(bytes, &["direction"]))?;
        let [sent, received] = ["sent", "received"].map(|direction| bytes.with_label_values(&[direction]));
        let open = IntGauge::new("baletheus_tunnel_open", "Connections to the tunnel host that are open.");
        let handshakes = IntCounter::new(
            "baletheus_tunnel_handshakes_total",
            "Tunnels asked for; the rest of the scrapes used a kept one.",
        );
        let targets = IntGauge::new("baletheus_tunnel_targets", "Targets that the tunnel may go to.");
        let scrapes = register(&registry, IntCounterVec::new(scrapes, &["result"]))?;
        scrapes.with_label_values(&["ok"]); // there from the start, so that a rate has something to start from
        Ok(Metrics {
            scrapes,
            duration: register(&registry, Histogram::with_opts(duration.buckets(buckets)))?,
            handshakes: register(&registry, handshakes)?,
            traffic: Traffic { open: register(&registry, open)?, sent, received },
            targets: register(&registry, targets)?,
            registry,
        })
    }
}

/// Counts a scrape when it ends, in whatever way.
struct Scrape {
    proxy: Arc<Proxy>,
    start: Instant,
    result: &'static str,
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.proxy.metrics.scrapes.with_label_values(&[self.result]).inc();
        self.proxy.metrics.duration.observe(self.start.elapsed().as_secs_f64());
    }
}

type Answer = Response<Either<Full<Bytes>, Passing>>;

struct Proxy {
    tunnel: Tunnel,
    allowed: Allowed,
    pool: Arc<Pool>,
    metrics: Metrics,
    /// Whether the tunnel host did not answer last time.
    lost: AtomicBool,
}

impl Proxy {
    async fn serve(self: Arc<Self>, listener: std::net::TcpListener, most: usize) -> io::Result<Infallible> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        self.allowed.has("").await;
        let (pool, places) = (self.pool.clone(), Arc::new(Semaphore::new(most + MORE_CLIENTS)));
        tokio::spawn(async move {
            let mut ticks = interval(IDLE / 10);
            loop {
                ticks.tick().await;
                pool.expire(IDLE);
            }
        });
        loop {
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            let Ok((stream, _)) = listener.accept().await else {
                // out of file descriptors, most likely
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let _ = stream.set_nodelay(true); // it may be slower without
            // one that does not read holds its tunnel no longer than this
            #[cfg(target_os = "linux")]
            let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD);
            let proxy = self.clone();
            tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let proxy = proxy.clone();
                    async { Ok::<_, Infallible>(proxy.answer(request).await) }
                });
                let mut http = server::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(IDLE + PATIENCE).max_buf_size(BUFFER);
                // An error is Prometheus' going away, or not HTTP.
                let _ = http.serve_connection(TokioIo::new(stream), answer).with_upgrades().await;
                drop(place);
            });
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let (method, url) = (request.method().clone(), request.uri().clone());
        if method == Method::GET && url.authority().is_none() {
            return self.own(url.path());
        }
        let answer = match self.target(&method, &url).await {
            Ok(target) if method == Method::CONNECT => self.clone().join(target, request).await,
            Ok(target) => self.clone().scrape(target, request).await,
            Err(refused) => {
                self.metrics.scrapes.with_label_values(&[refused.reason]).inc();
                Err(refused)
            }
        };
        answer.unwrap_or_else(|refused| {
            log::debug!("{method} {url}: {}", refused.message);
            refusal(refused)
        })
    }

    fn own(&self, path: &str) -> Answer {
        match path {
            "/metrics" => reply(StatusCode::OK, METRICS, endpoint::metrics(&self.metrics.registry)).map(Either::Left),
            "/-/healthy" => reply(StatusCode::OK, TEXT, "healthy\n").map(Either::Left),
            _ => {
                let text = "this is a proxy for Prometheus (proxy_url); there are /metrics and /-/healthy\n";
                reply(StatusCode::NOT_FOUND, TEXT, text).map(Either::Left)
            }
        }
    }

    /// The target that is asked for, as `host:port`, if it is one.
    async fn target(&self, method: &Method, url: &Uri) -> Result<String, Refused> {
        let not = |why: &str| Err(Refused::new("not_target", format!("refused: {why}")));
        let authority = url.authority().map(|authority| authority.as_str().to_ascii_lowercase()).unwrap_or_default();
        match (method.as_str(), url.scheme_str()) {
            ("GET", Some("http")) | ("CONNECT", None) => {}
            ("GET" | "CONNECT", _) => return not("GET of http URLs and CONNECT only"),
            _ => return not("GET and CONNECT only"),
        }
        let target = if authority.contains(':') { authority } else { authority + ":80" };
        if target.rsplit(':').next().and_then(|port| port.parse().ok()) == Some(SSH) {
            return not("port 22222 is the SSH of the host");
        }
        if !self.allowed.has(&target).await {
            return not(&format!("{target} is no target in the target file"));
        }
        Ok(target)
    }

    /// Passes a scrape through a tunnel.
    async fn scrape(self: Arc<Self>, target: String, request: Request<Incoming>) -> Result<Answer, Refused> {
        let mut scrape = Scrape { proxy: self.clone(), start: Instant::now(), result: "gone" };
        let deadline = Deadline::within(patience(request.headers()));
        let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let mut within = Request::get(path).body(Empty::new()).map_err(|_| Refused::new("http", "no such path"))?;
        *within.headers_mut() = end_to_end(request.headers());
        // there is no body
        within.headers_mut().remove(CONTENT_LENGTH);
        within.headers_mut().remove(EXPECT);
        if let Ok(host) = HeaderValue::from_str(&target) {
            within.headers_mut().insert(HOST, host);
        }
        let (exchange, answer) =
            deadline.wait(self.exchange(&target, within, deadline)).await.flatten().inspect_err(|why| {
                scrape.result = why.reason;
            })?;
        let (head, body) = answer.into_parts();
        let mut passing = Passing {
            exchange: Some((target.into(), exchange)),
            deadline: Box::pin(sleep_until(deadline.at)),
            left: LARGEST_ANSWER,
            body,
            scrape,
        };
        if passing.body.is_end_stream() {
            passing.end();
        }
        let mut answer = Response::new(Either::Right(passing));
        *answer.status_mut() = head.status;
        *answer.headers_mut() = end_to_end(&head.headers);
        if head.headers.contains_key(TRANSFER_ENCODING) {
            answer.headers_mut().remove(CONTENT_LENGTH); // it does not count beside chunks (RFC 9112, 6.3)
        }
        if let Some(phrase) = head.extensions.get::<ReasonPhrase>() {
            answer.extensions_mut().insert(phrase.clone());
        }
        Ok(answer)
    }

    /// In a kept tunnel, or else in a new one; one that was closed in the meantime fails nothing.
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

    /// Takes Prometheus' own CONNECT further.
    async fn join(self: Arc<Self>, target: String, request: Request<Incoming>) -> Result<Answer, Refused> {
        let opened = self.open(&target, Deadline::within(PATIENCE)).await;
        let result = opened.as_ref().map_or_else(|refused| refused.reason, |_| "ok");
        self.metrics.scrapes.with_label_values(&[result]).inc();
        let Kept { stream, place } = opened?;
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(request).await {
                join(TokioIo::new(upgraded), stream).await;
            }
            drop(place);
        });
        Ok(Response::new(Either::Left(Full::default())))
    }

    /// A new tunnel.
    async fn open(&self, target: &str, deadline: Deadline) -> Result<Kept, Refused> {
        let place = self.pool.place().ok_or_else(|| Refused::new("busy", "too many tunnels at once"))?;
        self.metrics.handshakes.inc();
        let opened = self.tunnel.open(target, deadline).await;
        // told once, and not for each device
        match &opened {
            Err(refused) if refused.reason == "no_tunnel" => {
                if !self.lost.swap(true, Ordering::Relaxed) {
                    log::warn!("{}", refused.message);
                }
            }
            // that tells neither way
            Err(Refused { status: None, .. }) => {}
            Ok(_) | Err(_) => {
                if self.lost.swap(false, Ordering::Relaxed) {
                    log::info!("tunnel host reachable again");
                }
            }
        }
        Ok(Kept { stream: opened?, place })
    }
}

/// A request and its answer in a tunnel, which is closed when this is dropped, whatever goes on in it.
struct Exchange {
    sender: client::SendRequest<Empty<Bytes>>,
    /// Moves the bytes, and gives the tunnel back.
    connection: JoinSet<Option<Stream>>,
    place: OwnedSemaphorePermit,
}

impl Exchange {
    async fn start(kept: Kept, request: Request<Empty<Bytes>>) -> Result<(Self, Response<Incoming>), Refused> {
        let mut http = client::Builder::new();
        http.read_buf_exact_size(Some(BUFFER));
        let io = TokioIo::new(kept.stream);
        let (mut sender, mut moves) = http.handshake(io).await.map_err(|error| broken(&error))?;
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            // an error reaches the request
            poll_fn(|cx| moves.poll_without_shutdown(cx)).await.ok()?;
            let parts = moves.into_parts();
            parts.read_buf.is_empty().then(|| parts.io.into_inner())
        });
        let answer = sender.send_request(request).await.map_err(|error| broken(&error))?;
        if answer.status().is_informational() {
            return Err(Refused::new("not_http", format!("not HTTP: {} was not asked for", answer.status())));
        }
        Ok((Exchange { sender, connection, place: kept.place }, answer))
    }

    /// The tunnel, if it can be used again.
    async fn end(mut self) -> Option<Kept> {
        self.sender.ready().await.ok()?;
        drop(self.sender);
        let stream = self.connection.join_next().await?.ok()??;
        Some(Kept { stream, place: self.place })
    }
}

/// Prometheus tells how long it waits, in seconds.
fn patience(headers: &HeaderMap) -> Duration {
    let told = headers.get("X-Prometheus-Scrape-Timeout-Seconds").and_then(|value| value.to_str().ok());
    let told = told.and_then(|text| text.parse::<f64>().ok()).filter(|told| (0.001..=3600.0).contains(told));
    told.map_or(PATIENCE, |told| Duration::from_secs_f64(told * PART))
}

/// Headers but those that are for the next hop only (RFC 9110, 7.6.1).
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

/// Prometheus shows the reason phrase, and people the body.
fn refusal(refused: Refused) -> Answer {
    let status = match refused.reason {
        "not_target" => StatusCode::FORBIDDEN,
        "timeout" => StatusCode::GATEWAY_TIMEOUT,
        "busy" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    };
    let mut answer = reply(status, TEXT, format!("{}\n", refused.message)).map(Either::Left);
    if let Ok(phrase) = ReasonPhrase::try_from(refused.message.into_bytes()) {
        answer.extensions_mut().insert(phrase);
    }
    answer
}

/// The body of an answer on its way; its tunnel is kept if all of it passes.
struct Passing {
    body: Incoming,
    exchange: Option<(Arc<str>, Exchange)>,
    deadline: Pin<Box<Sleep>>,
    /// Bytes that may still come.
    left: usize,
    scrape: Scrape,
}

impl Passing {
    fn end(&mut self) {
        self.scrape.result = "ok";
        if let Some((target, exchange)) = self.exchange.take() {
            let pool = self.scrape.proxy.pool.clone();
            tokio::spawn(async move {
                if let Some(kept) = exchange.end().await {
                    pool.keep(target, kept);
                }
            });
        }
    }

    fn fail(&mut self, result: &'static str, why: &str) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.scrape.result = result;
        self.exchange = None;
        Poll::Ready(Some(Err(io::Error::other(why))))
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return self.fail("timeout", "it takes too long");
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(left) = self.left.checked_sub(length) else {
                    return self.fail("too_large", "it is too large");
                };
                self.left = left;
                if self.body.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => self.fail("broke_off", &error.to_string()),
            None => {
                self.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Joins two connections until either ends, or nothing comes from one of them for long. Neither is half-closed, which would lose the answer.
async fn join(prometheus: impl AsyncRead + AsyncWrite + Send + 'static, device: Stream) {
    let (from_prometheus, to_prometheus) = tokio::io::split(prometheus);
    let (from_device, to_device) = tokio::io::split(device);
    let mut ways = JoinSet::new();
    ways.spawn(pass(from_prometheus, to_device));
    ways.spawn(pass(from_device, to_prometheus));
    ways.join_next().await;
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = timeout(IDLE, from.read(&mut buffer)).await??;
        if length == 0 {
            return Ok(());
        }
        timeout(IDLE, to.write_all(&buffer[..length])).await??;
        timeout(IDLE, to.flush()).await??;
    }
}
