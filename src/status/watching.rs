//! Asks for the state of the devices, and for the reports of their supervisors.
//!
//! These values change all the time, so they have their own requests, interval and thread. A failure here does not affect discovery.

use std::marker::PhantomData;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::Level;
use serde_json::value::RawValue;

use super::device_metrics::{Devices, Kept, Record, Report, State};
use crate::backoff::Backoff;
use crate::balena::device;
use crate::balena::pages::{List, Pages, Place, WithId};
use crate::balena::{Client, Failure, Request, Source};
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
    client: Client,
    pages: Pages<Arc<Devices<V>>>,
    backoff: Backoff,
    /// What it is, for the log.
    about: &'static str,
    /// What to do if the API refuses this request and no other.
    hint: &'static str,
}

impl<V: Kept> Kind<V> {
    fn new(client: &Client, interval: Duration, about: &'static str, hint: &'static str) -> Self {
        Kind { client: client.clone(), pages: Pages::default(), backoff: Backoff::new(interval), about, hint }
    }

    /// Asks for it. The log has the first of several failures, and the success after them.
    fn refresh(&mut self) -> Result<Vec<Arc<Devices<V>>>, Failed> {
        let mut list = DeviceList { client: &mut self.client, kept: PhantomData::<V> };
        if let Err(failure) = self.pages.refresh(&mut list, || ()) {
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

struct DeviceList<'a, V> {
    client: &'a mut Client,
    kept: PhantomData<V>,
}

impl<V: Kept> List for DeviceList<'_, V> {
    type Page = Arc<Devices<V>>;
    type Record<'a> = Record<'a>;
    const WHAT: &'static str = "devices";

    fn source(&mut self) -> &mut dyn Source {
        self.client
    }

    fn request(after: u64, limit: usize) -> Request<'static> {
        Request::DevicesWith { what: V::QUERY, after, limit }
    }

    fn next_id(after: u64) -> Request<'static> {
        Request::DevicesWith { what: "$select=id", after, limit: 1 }
    }

    /// A device that cannot be read is skipped: discovery reports it. If none of a full page or of the first one can be read, that is a
    /// failure: no value would look like a state that is known.
    fn read<'a>(
        &mut self, records: Vec<&'a RawValue>, place: &Place<'_, Self::Page>,
    ) -> Result<Vec<WithId<Record<'a>>>, Failure> {
        let mut read = Vec::with_capacity(records.len());
        let mut unreadable = None;
        for raw in records {
            match serde_json::from_str::<Record>(raw.get()) {
                Ok(record) => read.push((Some(record.id), record)),
                Err(error) => unreadable = Some(error),
            }
        }
        if let Some(error) = unreadable.filter(|_| read.is_empty() && (place.is_full || place.after == 0)) {
            return Err(self.invalid(&format!("none of the devices can be read: {}", device::describe(&error))));
        }
        Ok(read)
    }

    fn page(&mut self, records: Vec<WithId<Record<'_>>>) -> Result<(Self::Page, usize), Failure> {
        let mut page = Devices::default();
        for (_, record) in &records {
            page.add(record);
        }
        let size = page.devices.len() * size_of::<(u64, V)>();
        Ok((page.into(), size))
    }
}
