//! The status endpoint: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a page for people. It has its own thread, which
//! reads what the loop has published: neither waits for the other.

pub mod device_metrics;
pub mod liveness;
mod metrics;
mod page;

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::Full as Whole;
use hyper::body::Bytes;
use hyper::header::{ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, HeaderValue, VARY};
use hyper::{Method, Request, Response, StatusCode};

use crate::balena::client::Requests;
use crate::balena::{Client, Failure};
use crate::discovery::inventory::{Entry, Inventory};
use crate::discovery::{Observer, Published, target_file};
use crate::net::server::{self, Full, Limits, METRICS, TEXT, reply};
use device_metrics::States;
use liveness::Liveness;
use metrics::Metrics;
use page::View;

/// The name and the meaning of the metric whose value is its labels.
pub const INFO: (&str, &str) = ("balena_device_info", "What the device is, for joining into other series");

/// Further connections close the oldest one. Each answer is made at once, so the oldest connection is idle.
const MAX_CONNECTIONS: usize = 32;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For a whole request and its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest head of a request, in bytes.
const MAX_HEAD_SIZE: usize = 16 << 10;

/// The settings of the endpoint.
#[derive(Debug)]
pub struct Settings {
    /// Addresses to listen on: the first one that is available is used. Without any there is no endpoint.
    pub listen: Vec<SocketAddr>,
    /// From one request for the state of the devices to the next.
    pub device_refresh: Duration,
    /// Whether to ask for what the supervisors report, too.
    pub device_metrics: bool,
}

/// What the endpoint shows.
pub struct Status {
    liveness: Liveness,
    metrics: Metrics,
    requests: Requests,
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
struct Shown {
    /// The last good list.
    list: Option<Arc<List>>,
    states: Vec<Arc<States>>,
    /// When the last successful refresh ended.
    refreshed: Option<SystemTime>,
    /// Why the last refresh failed, if it did.
    failure: Option<String>,
}

/// A list as it was published.
#[derive(Default)]
struct List {
    version: u64,
    entries: Vec<Arc<Entry>>,
    /// The list as JSON, once somebody has asked for it, and with gzip.
    json: OnceLock<Bytes>,
    gzip: OnceLock<Bytes>,
}

impl Status {
    /// Starts the endpoint, and the requests for the state of the devices. Nothing is known yet.
    ///
    /// # Errors
    /// The address cannot be used, or a thread cannot be started. The text is for the user.
    pub fn start(settings: &Settings, client: &Client) -> Result<Arc<Self>, String> {
        let status = Arc::new(Status {
            liveness: Liveness::start(),
            metrics: Metrics::new().map_err(|error| format!("metrics: {error}"))?,
            requests: client.requests(),
            shown: Mutex::default(),
        });
        let listener = server::listen(&settings.listen)
            .map_err(|error| format!("{error}; set another --listen (LISTEN_ADDRESS)"))?;
        let serve = || -> io::Result<()> {
            log::info!("status on http://{}", listener.local_addr()?);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let status = status.clone();
            thread::Builder::new().name("status".into()).spawn(move || runtime.block_on(serve(listener, status)))?;
            Ok(())
        };
        serve().map_err(|error| format!("cannot start the status endpoint: {error}"))?;
        let shown = status.clone();
        device_metrics::watch(client.clone(), settings.device_refresh, settings.device_metrics, move |states| {
            shown.shown().states = states;
            shown.metrics.states_known();
        })?;
        Ok(status)
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Status {
    fn waits(&self, until: Instant) {
        self.liveness.expect(until);
    }

    fn refreshed(&self, took: Duration, outcome: &Result<Published, Failure>, list: &Inventory) {
        self.metrics.refreshed(took, outcome);
        let published = match outcome {
            Ok(published) => *published,
            Err(failure) => {
                self.shown().failure = Some(failure.message.clone());
                return;
            }
        };
        let known = self.shown().list.as_ref().map(|known| known.version);
        let list = (known != Some(list.version())).then(|| {
            let entries: Vec<_> = list.entries().cloned().collect();
            self.metrics.listed(&entries);
            List { version: list.version(), entries, ..List::default() }
        });
        let mut shown = self.shown();
        (shown.refreshed, shown.failure) = (Some(SystemTime::now()), None);
        if published == Published::Refused {
            shown.failure = Some("the API lists no device that makes a target; the list stays as it was".into());
        } else if let Some(list) = list {
            shown.list = Some(Arc::new(list));
        }
    }
}

async fn serve(listener: TcpListener, status: Arc<Status>) -> io::Result<Infallible> {
    let limits = Limits {
        connections: MAX_CONNECTIONS,
        full: Full::CloseOldest,
        head_timeout: HEAD_TIMEOUT,
        max_head: MAX_HEAD_SIZE,
        single: Some(ANSWER_TIMEOUT),
    };
    let handler = move |request: Request<_>| {
        let answer = status.answer(&request);
        async { answer }
    };
    server::serve(listener, limits, handler, |_| ()).await
}

/// The routes.
impl Status {
    fn answer<B>(&self, request: &Request<B>) -> Response<Whole<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        let shown = self.shown().clone();
        match request.uri().path() {
            "/metrics" => reply(StatusCode::OK, METRICS, self.metrics(&shown)),
            "/-/healthy" => match self.liveness.overdue() {
                None => reply(StatusCode::OK, TEXT, "healthy\n"),
                Some(late) => {
                    let text = format!("the loop should have moved {} s ago\n", late.as_secs());
                    reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            "/-/ready" | "/targets" if shown.list.is_none() => {
                let why = shown.failure.unwrap_or_else(|| "the first refresh is not done".into());
                reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("there is no list yet: {why}\n"))
            }
            "/-/ready" => reply(StatusCode::OK, TEXT, "ready\n"),
            "/targets" => shown.list.unwrap_or_default().answer(request),
            "/" => reply(StatusCode::OK, "text/html; charset=utf-8", self.page(&shown)),
            _ => reply(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /-/healthy, /-/ready, /targets and /\n"),
        }
    }

    fn metrics(&self, shown: &Shown) -> String {
        let mut text = self.metrics.text(&self.requests);
        let Some(list) = &shown.list else { return text };
        let known: Vec<_> = list.entries.iter().filter_map(|entry| Some((entry.id, entry.uuid_label()?))).collect();
        let (name, about) = INFO;
        let _ = write!(text, "# HELP {name} {about}.\n# TYPE {name} gauge\n"); // into a String: cannot fail
        for entry in list.entries.iter().filter(|entry| !entry.info.is_empty()) {
            let _ = writeln!(text, "{name}{{{}}} 1", entry.info);
        }
        device_metrics::write(&mut text, &shown.states, |id| {
            known.binary_search_by_key(&id, |(id, _)| *id).ok().map(|index| known[index].1)
        });
        text
    }

    fn page(&self, shown: &Shown) -> String {
        let state = match (&shown.failure, self.liveness.overdue(), &shown.list) {
            (_, Some(_), _) => "stuck",
            (Some(_), _, _) => "failing",
            (None, None, None) => "starting",
            (None, None, Some(_)) => "well",
        };
        let entries = shown.list.as_ref().map(|list| &*list.entries).unwrap_or_default();
        View { state, refreshed: shown.refreshed, failure: shown.failure.as_deref(), entries }.html()
    }
}

impl List {
    /// The list for `http_sd`, made once for all who ask, with gzip if that is accepted.
    fn answer<B>(&self, request: &Request<B>) -> Response<Whole<Bytes>> {
        let texts = || self.entries.iter().map(|entry| &*entry.text).filter(|text| !text.is_empty());
        let json = self.json.get_or_init(|| target_file::parts(texts()).collect::<Vec<_>>().concat().into());
        let gzip = self.gzip.get_or_init(|| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            // into memory: cannot fail
            encoder.write_all(json).and_then(|()| encoder.finish()).unwrap_or_default().into()
        });
        let accepted = request.headers().get(ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
        let packs = accepted.is_some_and(|accepted| accepted.contains("gzip"));
        let mut answer = reply(StatusCode::OK, "application/json", if packs { gzip.clone() } else { json.clone() });
        answer.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
        if packs {
            answer.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        answer
    }
}
