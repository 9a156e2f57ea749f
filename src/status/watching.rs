//! Asks for the state of the devices, and for the reports of their supervisors.
//!
//! These values change all the time, so they have their own requests, interval and thread. A failure here does not affect discovery.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::Level;

use super::device_metrics::{Devices, Kept, Record, Report, State};
use crate::backoff::Backoff;
use crate::balena::device;
use crate::balena::pages::{Pages, Place, Read, Reader};
use crate::balena::{Answer, Client, Failure, Reason};
use crate::net::threads::{self, NoThread};

/// A supervisor reports no more often than this: <https://github.com/balena-os/balena-supervisor/blob/master/src/api-binder/report.ts>.
const REPORT_INTERVAL: Duration = Duration::from_secs(300);
/// The most requests for the state from one request for the reports to the next.
const MAX_STATES_TO_REPORT: u32 = 5;
/// How to go on without reports.
const WITHOUT_REPORTS: &str = "; --device-metrics=false (DEVICE_METRICS=false) turns this request off";

/// What is known of the devices, page by page.
#[derive(Clone, Default)]
pub struct Watched {
    /// Their state.
    pub states: Vec<Arc<Devices<State>>>,
    /// What their supervisors report.
    pub reports: Vec<Arc<Devices<Report>>>,
}

/// What a request has brought.
pub enum Known {
    /// The state of all devices.
    States(Vec<Arc<Devices<State>>>),
    /// What the supervisors of all devices report.
    Reports(Vec<Arc<Devices<Report>>>),
}

/// Starts a thread that asks for the state of all devices at this interval, and for the reports as well if `reported`. `publish` gets
/// each as soon as it is known: a failure of one does not affect the other.
///
/// # Errors
/// The thread cannot be started.
pub fn watch(
    client: Client, interval: Duration, reported: bool, publish: impl Fn(Known) + Send + 'static,
) -> Result<(), NoThread> {
    let run = move || {
        let mut states = Kind::<State>::new(&client, interval, "the state of the devices", "");
        let mut reports = Kind::<Report>::new(&client, interval, "the reports of the devices", WITHOUT_REPORTS);
        let between_reports = interval.saturating_mul(states_to_report(interval));
        let mut report_due = Instant::now();
        loop {
            let (wait, can_go_on) = match states.refresh() {
                Ok(pages) => {
                    publish(Known::States(pages));
                    (interval, true)
                }
                Err(failed) => (failed.wait, failed.is_of_this_request),
            };
            if reported && can_go_on && Instant::now() >= report_due {
                let wait = match reports.refresh() {
                    Ok(pages) => {
                        publish(Known::Reports(pages));
                        between_reports
                    }
                    Err(failed) => failed.wait,
                };
                report_due = Instant::now() + wait;
            }
            thread::sleep(wait);
        }
    };
    threads::spawn("device-metrics", run)
}

/// Requests for the state from one for the reports to the next.
fn states_to_report(interval: Duration) -> u32 {
    let fitting = REPORT_INTERVAL.as_secs() / interval.as_secs().max(1);
    u32::try_from(fitting).unwrap_or(u32::MAX).clamp(1, MAX_STATES_TO_REPORT)
}

/// A request that failed.
struct Failed {
    /// Until the next try.
    wait: Duration,
    /// Whether another request can succeed.
    is_of_this_request: bool,
}

/// One kind of what is known, and its pages so far.
struct Kind<V> {
    reader: PageReader,
    pages: Pages<Arc<Devices<V>>>,
    backoff: Backoff,
    /// What it is, for the log.
    about: &'static str,
    /// What to do if the API refuses this request and no other.
    hint: &'static str,
}

impl<V: Kept> Kind<V> {
    fn new(client: &Client, interval: Duration, about: &'static str, hint: &'static str) -> Self {
        let reader = PageReader { client: client.clone() };
        Kind { reader, pages: Pages::default(), backoff: Backoff::new(interval), about, hint }
    }

    /// Asks for it. The log has the first of several failures, and the success after them.
    fn refresh(&mut self) -> Result<Vec<Arc<Devices<V>>>, Failed> {
        if let Err(failure) = self.pages.refresh(&mut self.reader, || ()) {
            let is_of_this_request = failure.is_of_this_request();
            let level = if self.backoff.failures() == 0 { Level::Warn } else { Level::Debug };
            let hint = if is_of_this_request { self.hint } else { "" };
            log::log!(level, "cannot renew {}: {failure}{hint}", self.about);
            return Err(Failed { wait: self.backoff.failed(failure.retry_after), is_of_this_request });
        }
        if self.backoff.failures() > 0 {
            log::info!("{} can be renewed again", self.about);
        }
        self.backoff.succeeded();
        Ok(self.pages.contents().cloned().collect())
    }
}

struct PageReader {
    client: Client,
}

impl<V: Kept> Reader<Arc<Devices<V>>> for PageReader {
    fn ask(&mut self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.client.ask(V::QUERY, after, limit, etag)
    }

    /// A device that cannot be read is skipped: discovery reports it. If none of a full page or of the first one can be read, that is a
    /// failure: no value would look like a state that is known.
    fn read(&mut self, body: &[u8], place: Place<'_, Arc<Devices<V>>>) -> Result<Read<Arc<Devices<V>>>, Failure> {
        let records = device::records(body).map_err(|error| self.failure(&device::describe(&error)))?;
        let is_full = records.len() >= place.limit;
        let mut page = Devices::default();
        let mut unreadable = None;
        for raw in records {
            match serde_json::from_str::<Record>(raw.get()) {
                Ok(record) => page.add(&record),
                Err(error) => unreadable = Some(error),
            }
        }
        if let Some(error) = unreadable.filter(|_| page.devices.is_empty() && (is_full || place.after == 0)) {
            return Err(self.failure(&format!("none of the devices can be read: {}", device::describe(&error))));
        }
        let end = page.devices.last().map(|(id, _)| *id).filter(|_| is_full);
        let size = page.devices.len() * size_of::<(u64, V)>();
        Ok(Read { content: page.into(), end, size })
    }

    fn too_large(&mut self, after: u64) -> Result<Read<Arc<Devices<V>>>, Failure> {
        Err(self.failure(&format!("the device after id {after} is too large")))
    }

    fn invalid(&self, why: &str) -> Failure {
        self.failure(why)
    }
}

impl PageReader {
    fn failure(&self, why: &str) -> Failure {
        let message = format!("the answer of {} is no page of devices: {why}", self.client.url());
        Failure::new(Reason::BadAnswer, message)
    }
}
