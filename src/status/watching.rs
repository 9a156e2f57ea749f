//! Asks for the state of the devices, and for the reports of their supervisors.
//!
//! These values change all the time, so they have their own requests, interval and thread. A failure here does not affect discovery.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::Level;

use super::device_metrics::{Devices, Kept, Record, Report, State};
use crate::backoff::Backoff;
use crate::balena::device;
use crate::balena::pages::{Pages, Place, Read, Reader};
use crate::balena::{Answer, Client, Failure, Reason};
use crate::net::threads;

/// A supervisor reports no more often than this: <https://github.com/balena-os/balena-supervisor/blob/master/src/api-binder/report.ts>.
const REPORT_INTERVAL: Duration = Duration::from_secs(300);
/// The most requests for the state from one request for the reports to the next.
const MAX_STATES_TO_REPORT: u64 = 5;

/// What is known of the devices, page by page.
#[derive(Clone, Default)]
pub struct Watched {
    /// Their state.
    pub states: Vec<Arc<Devices<State>>>,
    /// What their supervisors report.
    pub reports: Vec<Arc<Devices<Report>>>,
}

/// Starts a thread that asks for the state of all devices at this interval, and for the reports as well if `reported`. `publish` gets
/// both after each success.
///
/// # Errors
/// The thread cannot be started. The text is for the user.
pub fn watch(
    client: Client, interval: Duration, reported: bool, publish: impl Fn(Watched) + Send + 'static,
) -> Result<(), String> {
    let run = move || {
        let mut states = Kind::<State>::new(&client);
        let mut reports = Kind::<Report>::new(&client);
        let states_to_report = states_to_report(interval);
        let mut until_report = 0;
        let mut backoff = Backoff::new(interval);
        loop {
            let mut refresh = || {
                states.refresh()?;
                if reported && until_report == 0 {
                    reports.refresh().map_err(without_reports)?;
                    until_report = states_to_report;
                }
                until_report = until_report.saturating_sub(1);
                Ok(Watched { states: states.pages(), reports: reports.pages() })
            };
            let wait = match refresh() {
                Ok(watched) => {
                    if backoff.failures() > 0 {
                        log::info!("the state of the devices is known again");
                    }
                    backoff.succeeded();
                    publish(watched);
                    interval
                }
                Err(failure) => report(&failure, &mut backoff),
            };
            thread::sleep(wait);
        }
    };
    threads::spawn("device-metrics", run).map_err(|error| error.to_string())
}

/// Requests for the state from one for the reports to the next.
fn states_to_report(interval: Duration) -> u64 {
    (REPORT_INTERVAL.as_secs() / interval.as_secs().max(1)).clamp(1, MAX_STATES_TO_REPORT)
}

/// Says how to go on without reports where that may help: the state of the devices was read just before.
fn without_reports(failure: Failure) -> Failure {
    if !failure.is_of_this_request() {
        return failure;
    }
    let message = format!("{}; --device-metrics=false (DEVICE_METRICS=false) turns this request off", failure.message);
    Failure { message, ..failure }
}

/// Logs a failure, and gives the wait until the next try.
fn report(failure: &Failure, backoff: &mut Backoff) -> Duration {
    let level = if backoff.failures() == 0 { Level::Warn } else { Level::Debug };
    log::log!(level, "cannot renew the state of the devices: {failure}");
    backoff.failed(failure.retry_after)
}

/// One kind of what is known, and its pages so far.
struct Kind<V> {
    reader: PageReader,
    pages: Pages<Arc<Devices<V>>>,
}

impl<V: Kept + 'static> Kind<V> {
    fn new(client: &Client) -> Self {
        Kind { reader: PageReader { client: client.clone() }, pages: Pages::default() }
    }

    fn refresh(&mut self) -> Result<(), Failure> {
        self.pages.refresh(&mut self.reader, || ())
    }

    fn pages(&self) -> Vec<Arc<Devices<V>>> {
        self.pages.contents().cloned().collect()
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
