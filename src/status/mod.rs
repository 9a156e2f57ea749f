//! The status endpoint: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a page for people. It has its own thread, which
//! reads what the loop has published: neither waits for the other.

pub mod device_metrics;
pub mod guard;
mod list;
pub mod liveness;
mod metrics;
mod page;
mod series;
pub mod stream;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use hyper::header::{ALLOW, HeaderValue, REFRESH};
use hyper::{Method, Request, Response, StatusCode};

use crate::balena::client::Requests;
use crate::balena::{Client, Failure};
use crate::discovery::inventory::Inventory;
use crate::discovery::{Observer, Published};
use crate::net::server::{self, Full, Limits, METRICS, TEXT};
use device_metrics::States;
use guard::Guard;
use list::List;
use liveness::Liveness;
use metrics::Metrics;
use page::Page;
use page::view::{self, View};
use page::wanted::Wanted;
use series::{Series, Targets};
use stream::{Answer, Packing, whole};

/// Further connections close the oldest one, which is idle or slow.
const MAX_CONNECTIONS: usize = 32;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For a whole request and its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest head of a request, in bytes.
const MAX_HEAD_SIZE: usize = 16 << 10;

/// The state of the devices is late after three intervals, or three times this.
const MIN_STATE_AGE: Duration = Duration::from_secs(20);

/// The settings of the endpoint.
#[derive(Debug)]
pub struct Settings {
    /// Addresses to listen on: the first one that is available is used. Without any there is no endpoint.
    pub listen: Vec<SocketAddr>,
    /// Who may ask.
    pub guard: Guard,
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
    guard: Guard,
    started: SystemTime,
    /// From one request for the state of the devices to the next.
    device_refresh: Duration,
    packing: Packing,
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
struct Shown {
    /// The last good list.
    list: Option<Arc<List>>,
    states: Vec<Arc<States>>,
    /// When the state of the devices was known last.
    states_read: Option<SystemTime>,
    /// When the last successful refresh ended.
    refreshed: Option<SystemTime>,
    /// Why the last refresh failed, if it did.
    failure: Option<String>,
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
            guard: settings.guard.clone(),
            started: SystemTime::now(),
            device_refresh: settings.device_refresh,
            packing: Packing::default(),
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
            let mut shown = shown.shown();
            (shown.states, shown.states_read) = (states, Some(SystemTime::now()));
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
            let pages: Vec<_> = list.pages().cloned().collect();
            self.metrics.listed(&pages);
            List { version: list.version(), pages }
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
        let mut answer = status.answer(&request);
        guard::protect(&mut answer);
        async { answer }
    };
    server::serve(listener, limits, handler, |_| ()).await
}

/// The routes.
impl Status {
    fn answer<B>(&self, request: &Request<B>) -> Response<Answer> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = whole(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        if let Err(refused) = self.guard.check(request) {
            let (status, text) = refused.answer();
            return whole(status, TEXT, text);
        }
        let shown = self.shown().clone();
        let headers = request.headers();
        match (request.uri().path(), &shown.list) {
            ("/metrics", _) => {
                let own = self.metrics.text(&self.requests);
                let list = shown.list.unwrap_or_default();
                stream::answer(headers, &self.packing, METRICS, Series::new(own, list, shown.states))
            }
            ("/-/healthy", _) => match self.liveness.overdue() {
                None => whole(StatusCode::OK, TEXT, "healthy\n"),
                Some(late) => {
                    let text = format!("the loop should have moved {} s ago\n", late.as_secs());
                    whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            ("/-/ready" | "/targets", None) => {
                let why = shown.failure.unwrap_or_else(|| "the first refresh is not done".into());
                whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("there is no list yet: {why}\n"))
            }
            ("/-/ready", Some(_)) => whole(StatusCode::OK, TEXT, "ready\n"),
            ("/targets", Some(list)) => {
                stream::answer(headers, &self.packing, "application/json", Targets::new(list.clone()))
            }
            ("/", _) => {
                let wanted = Wanted::of(request.uri());
                let stays = wanted.stays;
                let page = Page::new(self.view(shown, wanted));
                let mut answer = stream::answer(headers, &self.packing, "text/html; charset=utf-8", page);
                if !stays {
                    answer.headers_mut().insert(REFRESH, HeaderValue::from_static(page::REFRESH));
                }
                answer
            }
            ("/style.css", _) => whole(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            _ => whole(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /-/healthy, /-/ready, /targets and /\n"),
        }
    }

    fn view(&self, shown: Shown, wanted: Wanted) -> View {
        let now = SystemTime::now();
        let since = |time: SystemTime| view::about(now.duration_since(time).unwrap_or_default());
        let state = match (&shown.failure, self.liveness.overdue(), &shown.list) {
            (_, Some(_), _) => "stuck",
            (Some(_), _, _) => "failing",
            (None, None, None) => "starting",
            (None, None, Some(_)) => "well",
        };
        let mut problems = Vec::new();
        if let Some(late) = self.liveness.overdue() {
            problems
                .push(format!("Discovery hangs: it is {} late. Restart it and look at its log.", view::about(late)));
        }
        if let Some(failure) = &shown.failure {
            problems.push(format!("The last refresh failed: {failure}"));
        }
        match &shown.list {
            None => problems.push("There is no list yet: no refresh has succeeded since the start.".into()),
            Some(list) if list.entries().next().is_none() => {
                problems.push("The API lists no device for this key and these options.".into());
            }
            Some(_) => {}
        }
        let read = shown.states_read.unwrap_or(self.started);
        if now.duration_since(read).is_ok_and(|age| age > 3 * self.device_refresh.max(MIN_STATE_AGE)) {
            let age = since(read);
            problems.push(format!("The state of the devices was read {age} ago for the last time: the log says why."));
        }
        let (refreshed, list) = (shown.refreshed, shown.list.unwrap_or_default());
        View { state, problems, refreshed, list, states: shown.states, wanted, now }
    }
}
