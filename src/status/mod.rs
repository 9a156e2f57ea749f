//! The status endpoint: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a page for people. It has its own thread, which
//! reads what the loop has published: neither waits for the other.

pub mod device_metrics;
mod exposition;
mod gzip_stream;
pub mod health_command;
mod metrics;
mod page;
mod routes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;

use crate::balena::{Client, Failure, Reason};
use crate::device_state::listed_devices::{DeviceList, FleetState};
use crate::device_state::polling;
use crate::discovery::earlier_list::StoredList;
use crate::discovery::inventory::Inventory;
use crate::discovery::{HELD_BACK, Published};
use crate::liveness::Liveness;
use crate::net::{CannotStart, Guard, server, threads};
use gzip_stream::MAX_PACKED;
use metrics::SidecarMetrics;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

#[derive(Debug)]
pub struct Settings {
    /// Addresses to listen on: the first one that is available is used. Without any there is no endpoint.
    pub listen: Vec<SocketAddr>,
    pub guard: Guard,
    pub watch: polling::Settings,
    /// The dashboard with a page for each device, if there is one.
    pub dashboard: Option<&'static str>,
}

pub struct Status {
    liveness: Arc<Liveness>,
    metrics: SidecarMetrics,
    settings: Settings,
    started: SystemTime,
    packing: Arc<Semaphore>,
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
struct Shown {
    /// The devices that the API lists.
    list: Option<DeviceList>,
    /// The version of the inventory that they are from.
    version: Option<u64>,
    /// The last list that was published: another one while a list is held back.
    published: Option<DeviceList>,
    /// Until there is one: the list that the target file had at the start.
    stored: Option<StoredList>,
    known: FleetState,
    /// When the last successful refresh ended.
    refreshed: Option<SystemTime>,
    /// When the list was last equal to that of the API.
    confirmed: Option<SystemTime>,
    /// What became of the last refresh.
    outcome: Option<Result<Published, Failure>>,
}

impl Status {
    /// Starts the endpoint, and the requests for the state of the devices, which `woken` makes at once. Nothing is known yet but
    /// the list that the target file has.
    pub fn start(
        settings: Settings, client: &mut Client, liveness: Arc<Liveness>, stored: Option<StoredList>,
        woken: Receiver<()>,
    ) -> Result<Arc<Self>, CannotStart> {
        let status = Arc::new(Status {
            liveness,
            metrics: SidecarMetrics::new(settings.watch.services)?,
            settings,
            started: SystemTime::now(),
            packing: Arc::new(Semaphore::new(MAX_PACKED)),
            shown: Mutex::default(),
        });
        client.requests = Some(status.metrics.requests.clone());
        status.shown.lock().stored = stored;
        status.metrics.published(status.shown.lock().targets());
        let listener = server::listen(&status.settings.listen, "LISTEN_ADDRESS")?;
        log::info!("status on http://{}", listener.local_addr()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let served = status.clone();
        threads::spawn("status", move || _ = runtime.block_on(routes::serve(listener, served)))?;
        let shown = status.clone();
        let limited = status.clone();
        polling::watch(
            client,
            status.settings.watch,
            woken,
            move || limited.is_limited(),
            move |known| shown.learn(known),
        )?;
        Ok(status)
    }

    /// Whether the API has refused the last refresh for too many requests.
    fn is_limited(&self) -> bool {
        matches!(&self.shown.lock().outcome, Some(Err(failure)) if failure.reason == Reason::RateLimited)
    }

    fn learn(&self, known: &FleetState) {
        self.metrics.known(known);
        self.shown.lock().known = known.clone();
    }

    /// Shows a refresh that has ended after so long.
    pub fn refreshed(&self, took: Duration, outcome: &Result<Published, Failure>, list: &Inventory) {
        // Locked before the metrics change: who sees those of this refresh finds its list, too.
        let mut shown = self.shown.lock();
        self.metrics.refreshed(took, outcome);
        shown.outcome = Some(outcome.clone());
        // A list that no disk takes is right all the same for those who read it here.
        if matches!(outcome, Err(failure) if failure.reason != Reason::Write) {
            return;
        }
        let is_held_back = matches!(outcome, Ok(Published::HeldBack));
        if shown.version != Some(list.version()) {
            self.metrics.listed(list);
            // A list of no device is held back because it may be wrong: the devices of before stay under watch.
            if !is_held_back || list.entries().next().is_some() {
                (shown.list, shown.version) = (Some(list.pages().clone()), Some(list.version()));
            }
        }
        let now = Some(SystemTime::now());
        shown.refreshed = if outcome.is_ok() { now } else { shown.refreshed };
        if is_held_back {
            return;
        }
        shown.confirmed = now;
        (shown.published, shown.stored) = (shown.list.clone(), None);
        if outcome.is_ok() {
            self.metrics.published(shown.targets());
        }
    }
}

impl Shown {
    /// How many targets `/targets` has.
    fn targets(&self) -> usize {
        match (&self.published, &self.stored) {
            (Some(list), _) => list.iter().flat_map(|page| &page.entries).map(|entry| entry.targets().len()).sum(),
            (None, stored) => stored.as_ref().map_or(0, |stored| stored.targets),
        }
    }

    /// Why the last refresh has not published its list, if it has not: what is wrong, and the cause.
    fn trouble(&self) -> Option<(&'static str, &str)> {
        match self.outcome.as_ref()? {
            Ok(Published::HeldBack) => Some(("The new list is held back", HELD_BACK)),
            Ok(_) => None,
            Err(failure) => Some(("The last refresh failed", &failure.message)),
        }
    }

    /// What `/-/ready` says. An old list is ready as well, with its age in the text: `http_sd` needs it.
    fn readiness(&self) -> (StatusCode, String) {
        let age = |time: SystemTime| {
            let age = SystemTime::now().duration_since(time).unwrap_or_default();
            humantime::format_duration(Duration::from_secs(age.as_secs()))
        };
        let why = self.trouble().map_or("the first refresh has not ended", |(_, why)| why);
        let text = match (&self.published, &self.stored, self.confirmed) {
            (None, None, _) => return (StatusCode::SERVICE_UNAVAILABLE, format!("there is no list yet: {why}\n")),
            (None, Some(stored), _) => {
                format!("ready; the list is the file's, written {} ago: {why}\n", age(stored.changed))
            }
            (Some(_), _, Some(confirmed)) if self.trouble().is_some() => {
                format!("ready; the list was right {} ago: {why}\n", age(confirmed))
            }
            _ => "ready\n".into(),
        };
        (StatusCode::OK, text)
    }
}
