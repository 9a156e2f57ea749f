//! What the sidecar tells of itself and of the fleet over HTTP: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a
//! page for people. It has a thread of its own, which only reads what the loop has put down: nobody waits for anybody.

pub mod device_metrics;
pub mod health;
pub mod liveness;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use flate2::Compression;
use flate2::write::GzEncoder;
use html_escape::encode_text;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, HeaderValue, VARY};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use serde::Deserialize;
use tokio::task::JoinHandle;

use crate::balena::client::Balena;
use crate::balena::device::{self, Device, one};
use crate::balena::failure::{Failure, Published};
use crate::config::options::{Values, boolean, refresh};
use crate::discovery::inventory::{Answer, Entry, Inventory, Source};
use crate::discovery::target::DEVICE_ID;
use crate::discovery::target_file as registry;
use crate::net::server::{self as endpoint, METRICS, TEXT, addresses, register, reply};
use crate::status::device_metrics::{self as vitals, escape};
use crate::status::liveness::Pulse;

/// Connections beyond this push out the oldest: each answer is made at once, so the oldest is an idle one.
const MOST_CONNECTIONS: usize = 32;
/// For the head of a request, and again for the whole of it and its answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest head of a request, in bytes.
const LARGEST_HEAD: usize = 16 << 10;

/// What the endpoint is told from outside.
#[derive(Debug)]
pub struct Settings {
    /// Where it listens: the first that can be had; none: nowhere.
    pub listen: Vec<SocketAddr>,
    /// From one request for the state of the devices to the next.
    pub device_refresh: Duration,
    /// Whether what the supervisors report is asked for as well.
    pub device_metrics: bool,
}

impl Settings {
    /// Reads its options.
    pub fn read(from: &mut Values) -> Self {
        Settings {
            listen: from.list("listen", addresses),
            device_refresh: from.one("device-refresh", refresh),
            device_metrics: from.one("device-metrics", boolean),
        }
    }
}

/// What is shown.
pub struct Status {
    pulse: Arc<Pulse>,
    metrics: Metrics,
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
struct Shown {
    /// The last list that was good.
    list: Option<Arc<List>>,
    vitals: Vec<Arc<vitals::Page>>,
    /// When the last refresh that succeeded ended.
    refreshed: Option<SystemTime>,
    /// Why the last one failed, if it did.
    failure: Option<String>,
}

/// A list as it was published.
#[derive(Default)]
struct List {
    version: u64,
    entries: Vec<Arc<Entry>>,
    /// By id.
    facts: BTreeMap<u64, Fact>,
    /// The list as JSON, once it was asked for, and packed.
    json: OnceLock<Bytes>,
    packed: OnceLock<Bytes>,
}

/// What stays in mind of a device, whether it is listed or not.
#[derive(Clone)]
struct Fact {
    uuid: Arc<str>,
    /// Its `balena_device_info`.
    info: Arc<str>,
}

struct Metrics {
    registry: Registry,
    refreshes: IntCounter,
    failures: IntCounterVec,
    duration: Histogram,
    last: Gauge,
    writes: IntCounter,
    write_failures: IntCounter,
    devices: IntGauge,
    targets: IntGauge,
    left_out: IntGaugeVec,
    requests: IntCounterVec,
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let registry = endpoint::registry()?;
        let buckets = vec![0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
        let duration = HistogramOpts::new("baletheus_refresh_duration_seconds", "How long a refresh took.");
        Ok(Metrics {
            refreshes: register(
                &registry,
                IntCounter::new("baletheus_refreshes_total", "Refreshes, successful or not."),
            )?,
            failures: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("baletheus_refresh_failures_total", "Refreshes that failed, by reason."),
                    &["reason"],
                ),
            )?,
            duration: register(&registry, Histogram::with_opts(duration.buckets(buckets)))?,
            last: register(
                &registry,
                Gauge::new("baletheus_last_refresh_timestamp_seconds", "When the last successful refresh ended."),
            )?,
            writes: register(
                &registry,
                IntCounter::new("baletheus_file_writes_total", "Times that the target file was replaced."),
            )?,
            write_failures: register(
                &registry,
                IntCounter::new(
                    "baletheus_file_write_failures_total",
                    "Times that the target file could not be replaced.",
                ),
            )?,
            devices: register(
                &registry,
                IntGauge::new("baletheus_devices", "Devices that the API lists, left out or not."),
            )?,
            targets: register(&registry, IntGauge::new("baletheus_targets", "Targets in the list."))?,
            left_out: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("baletheus_devices_left_out", "Devices without a target, by reason."),
                    &["reason"],
                ),
            )?,
            requests: register(
                &registry,
                IntCounterVec::new(
                    Opts::new(
                        "baletheus_api_requests_total",
                        "Requests to the API, by status; none: without an answer.",
                    ),
                    &["code"],
                ),
            )?,
            registry,
        })
    }
}

impl Status {
    /// Answers at the first of these addresses that can be had, on a thread of its own; nothing is known yet.
    pub fn listen(addresses: &[SocketAddr], pulse: Arc<Pulse>) -> Result<Arc<Self>, String> {
        let metrics = Metrics::new().map_err(|error| format!("metrics: {error}"))?;
        let status = Arc::new(Status { pulse, metrics, shown: Mutex::default() });
        let listener = endpoint::listen(addresses)?;
        let start = || -> io::Result<()> {
            log::info!("status on http://{}", listener.local_addr()?);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let status = status.clone();
            thread::Builder::new().name("status".into()).spawn(move || runtime.block_on(serve(listener, status)))?;
            Ok(())
        };
        start().map_err(|error| format!("cannot listen on {addresses:?}: {error}"))?;
        Ok(status)
    }

    /// The pulse of the loop.
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// What is known of the devices' state.
    pub fn set_vitals(&self, vitals: Vec<Arc<vitals::Page>>) {
        self.shown().vitals = vitals;
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the two sides of the loop share: its source notes devices as they pass, and its observer puts them down.
type Facts = Rc<RefCell<BTreeMap<u64, Fact>>>;

/// A source whose devices are noted on their way to the inventory.
pub struct Noting<'s> {
    source: &'s mut Balena,
    pulse: Arc<Pulse>,
    facts: Facts,
}

/// Puts down what became of each refresh.
pub struct Recorder(Arc<Status>, Facts);

/// Both sides of the loop.
pub fn around(source: &mut Balena, status: Arc<Status>) -> (Noting<'_>, Recorder) {
    let facts = Facts::default();
    (Noting { source, pulse: status.pulse.clone(), facts: facts.clone() }, Recorder(status, facts))
}

impl Noting<'_> {
    fn ask(&mut self, ask: impl FnOnce(&mut Balena) -> Result<Answer, Failure>) -> Result<Answer, Failure> {
        self.pulse.expect(Instant::now() + self.source.api.timeout);
        let answer = ask(self.source);
        self.pulse.count(&answer);
        answer
    }
}

impl Source for Noting<'_> {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn page(&mut self, after: u64, top: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        let answer = self.ask(|source| source.page(after, top, etag))?;
        if let Answer::Devices(_, body) = &answer {
            let mut facts = self.facts.borrow_mut();
            for device in device::parse_page(body).unwrap_or_default() {
                if let (Some(id), Some(uuid)) = (device.id, device.uuid()) {
                    facts.insert(id, Fact { uuid: uuid.into(), info: info(uuid, &device).into() });
                }
            }
        }
        Ok(answer)
    }

    fn identity(&mut self, after: u64) -> Result<Answer, Failure> {
        self.ask(|source| source.identity(after))
    }
}

/// The name and the meaning of the metric whose value is its labels.
pub const INFO: (&str, &str) = ("balena_device_info", "What the device is, for joining into other series");

fn info(uuid: &str, device: &Device) -> String {
    let (fleet, release) = (one(&device.fleet), one(&device.release));
    let labels = [
        ("uuid", Some(uuid)),
        ("device_name", device.device_name.as_deref()),
        ("fleet", fleet.and_then(|fleet| fleet.slug.as_deref())),
        ("device_type", one(&device.device_type).and_then(|device_type| device_type.slug.as_deref())),
        ("commit", release.and_then(|release| release.commit.as_deref())),
        ("release", release.and_then(|release| release.raw_version.as_deref())),
        ("os_version", device.os_version.as_deref()),
        ("os_variant", device.os_variant.as_deref()),
        ("supervisor_version", device.supervisor_version.as_deref()),
    ];
    let labels = labels.map(|(name, value)| format!("{name}=\"{}\"", escape(value.unwrap_or_default())));
    format!("{}{{{}}} 1\n", INFO.0, labels.join(","))
}

impl Recorder {
    /// Takes down how a refresh ended.
    pub fn refreshed(&mut self, took: Duration, outcome: &Result<Published, Failure>, list: &Inventory) {
        let metrics = &self.0.metrics;
        metrics.refreshes.inc();
        metrics.duration.observe(took.as_secs_f64());
        match outcome {
            Ok(Published::Written) => metrics.writes.inc(),
            Ok(Published::Unchanged | Published::Refused) => {}
            Err(failure) => {
                metrics.failures.with_label_values(&[failure.reason]).inc();
                metrics.write_failures.inc_by(u64::from(failure.reason == registry::WRITE_FAILURE));
                self.0.shown().failure = Some(failure.message.clone());
                return;
            }
        }
        let now = SystemTime::now();
        metrics.last.set(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let known = self.0.shown().list.as_ref().map(|known| known.version);
        let list = (known != Some(list.version)).then(|| self.list(list));
        let mut shown = self.0.shown();
        (shown.refreshed, shown.failure) = (Some(now), None);
        if *outcome == Ok(Published::Refused) {
            shown.failure = Some("the API lists no device that makes a target; the list stays as it was".into());
        } else if let Some(list) = list {
            shown.list = Some(Arc::new(list));
        }
    }

    fn list(&self, list: &Inventory) -> List {
        let entries: Vec<Arc<Entry>> = list.entries().cloned().collect();
        let metrics = &self.0.metrics;
        metrics.devices.set(number(entries.len()));
        metrics.targets.set(number(entries.iter().map(|entry| entry.targets).sum()));
        metrics.left_out.reset();
        for left_out in entries.iter().filter_map(|entry| entry.left_out.as_ref()) {
            metrics.left_out.with_label_values(&[left_out.reason]).inc();
        }
        let mut facts = self.1.borrow_mut();
        let ids: BTreeSet<u64> = entries.iter().map(|entry| entry.id).collect();
        facts.retain(|id, _| ids.contains(id));
        List { version: list.version, entries, facts: facts.clone(), ..List::default() }
    }
}

fn number(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

async fn serve(listener: TcpListener, status: Arc<Status>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut connections: VecDeque<JoinHandle<()>> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // out of file descriptors, most likely
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= MOST_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        let status = status.clone();
        connections.push_back(tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let answer = status.answer(&request);
                async { Ok::<_, Infallible>(answer) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(LARGEST_HEAD)
                .keep_alive(false);
            // An error is the other side's: it went away, was too slow, or did not speak HTTP.
            let _ = tokio::time::timeout(ANSWER_TIMEOUT, http.serve_connection(TokioIo::new(stream), answer)).await;
        }));
    }
}

impl Status {
    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        let shown = self.shown().clone();
        match request.uri().path() {
            "/metrics" => reply(StatusCode::OK, METRICS, self.metrics(&shown)),
            "/-/healthy" => match self.pulse.overdue() {
                None => reply(StatusCode::OK, TEXT, "healthy\n"),
                Some(late) => {
                    let text = format!("the loop should have moved {} s ago\n", late.as_secs());
                    reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            "/-/ready" | "/targets" if shown.list.is_none() => {
                let why = shown.failure.unwrap_or_else(|| "the first refresh goes on".into());
                reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("there is no list yet: {why}\n"))
            }
            "/-/ready" => reply(StatusCode::OK, TEXT, "ready\n"),
            "/targets" => shown.list.unwrap_or_default().answer(request),
            "/" => reply(StatusCode::OK, "text/html; charset=utf-8", self.page(&shown)),
            _ => reply(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /-/healthy, /-/ready, /targets and /\n"),
        }
    }

    fn metrics(&self, shown: &Shown) -> String {
        for (status, count) in self.pulse.answers() {
            let code = status.map_or("none".into(), |status| status.to_string());
            let counter = self.metrics.requests.with_label_values(&[&code]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        let mut text = endpoint::metrics(&self.metrics.registry);
        if let Some(list) = &shown.list {
            let (name, about) = INFO;
            let _ = write!(text, "# HELP {name} {about}.\n# TYPE {name} gauge\n");
            text.extend(list.facts.values().map(|fact| &*fact.info));
            vitals::write(&mut text, &shown.vitals, |id| list.facts.get(&id).map(|fact| &*fact.uuid));
        }
        text
    }

    /// For people, in plain HTML.
    fn page(&self, shown: &Shown) -> String {
        let time = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let state = match (&shown.failure, self.pulse.overdue(), &shown.list) {
            (_, Some(_), _) => "stuck",
            (Some(_), _, _) => "failing",
            (None, None, None) => "starting",
            (None, None, Some(_)) => "well",
        };
        let list = shown.list.clone().unwrap_or_default();
        let (listed, left_out): (Vec<_>, Vec<_>) = list.entries.iter().partition(|entry| entry.targets > 0);
        let targets: usize = listed.iter().map(|entry| entry.targets).sum();
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>baletheus: {state}</title>\n\
             <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style>\n<h1>Baletheus</h1>\n<table>\n\
             <tr><th>State<td>{state}\n<tr><th>Last refresh<td>{}\n<tr><th>Last error<td>{}\n\
             <tr><th>Devices<td>{}\n<tr><th>Targets<td>{targets}\n<tr><th>Left out<td>{}\n<tr><th>Version<td>{}\n</table>\n\
             <p><a href=\"/metrics\">metrics</a> <a href=\"/targets\">targets as JSON</a></p>\n",
            shown.refreshed.map_or("none yet".into(), time),
            encode_text(shown.failure.as_deref().unwrap_or("none")),
            list.entries.len(),
            left_out.len(),
            env!("CARGO_PKG_VERSION"),
        );
        let addresses = list.addresses();
        let tables = [("Left out", "Why", left_out), ("Listed", "Targets", listed)];
        for (title, column, entries) in tables.into_iter().filter(|(.., entries)| !entries.is_empty()) {
            let _ = write!(page, "<h2>{title}</h2>\n<table>\n<tr><th>Device<th>{column}\n");
            for entry in entries {
                let what = match &entry.left_out {
                    Some(left_out) => left_out.why.to_string(),
                    None => addresses.get(&entry.id).map(|all| all.join(" ")).unwrap_or_default(),
                };
                let _ = writeln!(page, "<tr><td>{}<td>{}", encode_text(&entry.name), encode_text(&what));
            }
            page.push_str("</table>\n");
        }
        page + "</html>\n"
    }
}

const STYLE: &str = "body{font:16px sans-serif;margin:2em;max-width:60em}table{border-collapse:collapse}\
    th,td{border-bottom:1px solid #ccc;padding:.3em 1em .3em 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}";

impl List {
    fn texts(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|entry| &*entry.text).filter(|text| !text.is_empty())
    }

    /// The addresses of the targets of each device.
    fn addresses(&self) -> BTreeMap<u64, Vec<String>> {
        #[derive(Deserialize)]
        struct Group {
            targets: Vec<String>,
            labels: BTreeMap<String, String>,
        }
        let mut addresses: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        let lines = self.texts().flat_map(|text| text.split(|byte| *byte == b'\n'));
        for line in lines.map(|line| line.strip_suffix(b",").unwrap_or(line)) {
            let Ok(Group { targets, labels }) = serde_json::from_slice(line) else { continue };
            let id = labels.get(DEVICE_ID).and_then(|id| id.parse().ok());
            addresses.entry(id.unwrap_or_default()).or_default().extend(targets);
        }
        addresses
    }

    /// Made once, whoever asks and how often; with gzip if that is taken.
    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let json = self.json.get_or_init(|| registry::parts(self.texts()).collect::<Vec<_>>().concat().into());
        let packed = self.packed.get_or_init(|| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            // into memory: it cannot fail
            encoder.write_all(json).and_then(|()| encoder.finish()).unwrap_or_default().into()
        });
        let takes = request.headers().get(ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
        let packs = takes.is_some_and(|takes| takes.contains("gzip"));
        let mut answer = reply(StatusCode::OK, "application/json", if packs { packed.clone() } else { json.clone() });
        answer.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
        if packs {
            answer.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        answer
    }
}
