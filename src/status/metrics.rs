//! The metrics of the sidecar itself.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use prometheus::{Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, Result};

use crate::balena::{Failure, NO_ANSWER, Reason};
use crate::device_state::listed_devices::FleetState;
use crate::discovery::Published;
use crate::discovery::inventory::Inventory;
use crate::discovery::left_out::LeftOutReason;
use crate::discovery::muting::QuietTimes;
use crate::metrics_registry::Registry;

/// Statuses that are there with 0 from the start, so that `increase()` sees the first one.
const KNOWN_STATUSES: [&str; 9] = ["200", "304", "401", "403", "429", "500", "502", "503", NO_ANSWER];

/// Upper bounds of the histogram of durations, in seconds.
const BUCKETS: [f64; 11] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// The sidecar's metrics.
pub struct SidecarMetrics {
    registry: Registry,
    refreshes: IntCounter,
    failures: IntCounterVec,
    duration: Histogram,
    last: Gauge,
    last_state: Gauge,
    /// None unless services are asked for.
    last_services: GaugeVec,
    writes: IntCounter,
    write_failures: IntCounter,
    devices: Gauge,
    targets: Gauge,
    held_back: Gauge,
    left_out: GaugeVec,
    pub requests: IntCounterVec,
    quiet: GaugeVec,
    /// The fleets by their slugs, with the times at which they are switched off.
    fleets: Mutex<BTreeMap<String, QuietTimes>>,
}

impl SidecarMetrics {
    /// All metrics, with each known reason and status at 0. `services` are asked for, or not.
    #[rustfmt::skip] // a table
    pub fn new(services: bool) -> Result<Self> {
        let registry = Registry::new()?;
        let metrics = SidecarMetrics {
            refreshes: registry.counter("baletheus_refreshes_total", "Refreshes, successful or not.")?,
            failures: registry.counters("baletheus_refresh_failures_total", "Refreshes that failed, by reason.", "reason")?,
            duration: registry.histogram("baletheus_refresh_duration_seconds", "How long a refresh took.", &BUCKETS)?,
            last: registry.gauge("baletheus_last_refresh_timestamp_seconds", "When the last successful refresh ended.")?,
            last_state: registry.gauge("baletheus_last_device_refresh_timestamp_seconds", "When the state of the devices was last known; 0 before the first time.")?,
            last_services: registry.gauges("baletheus_last_services_refresh_timestamp_seconds", "Time of the last successful read of the devices' services; 0 before the first time, absent with --device-services=false.", &[])?,
            writes: registry.counter("baletheus_file_writes_total", "Times that the target file was replaced.")?,
            write_failures: registry.counter("baletheus_file_write_failures_total", "Times that the target file could not be replaced.")?,
            devices: registry.gauge("baletheus_devices", "Devices that the API lists, left out or not.")?,
            targets: registry.gauge("baletheus_targets", "Targets in the list that is published.")?,
            held_back: registry.gauge("baletheus_list_held_back", "1 while a list without targets is held back and the one before stays, else 0.")?,
            left_out: registry.gauges("baletheus_devices_left_out", "Devices without a target, by reason.", &["reason"])?,
            quiet: registry.gauges("balena_fleet_quiet", "Whether the fleet is switched off on purpose now, by its tag prometheus.io/quiet.", &["fleet"])?,
            requests: registry.counters("baletheus_api_requests_total", "Requests to the API, by status; none: without an answer.", "code")?,
            fleets: Mutex::default(),
            registry,
        };
        for reason in Reason::ALL {
            metrics.failures.with_label_values(&[reason.as_str()]);
        }
        for status in KNOWN_STATUSES {
            metrics.requests.with_label_values(&[status]);
        }
        if services {
            metrics.last_services.with_label_values::<&str>(&[]);
        }
        metrics.listed(&Inventory::default());
        Ok(metrics)
    }

    pub fn refreshed(&self, took: Duration, outcome: &std::result::Result<Published, Failure>) {
        self.refreshes.inc();
        self.duration.observe(took.as_secs_f64());
        match outcome {
            Ok(published) => {
                self.last.set(seconds(SystemTime::now()));
                self.held_back.set(f64::from(u8::from(*published == Published::HeldBack)));
                self.writes.inc_by(u64::from(*published == Published::Written));
            }
            Err(failure) => {
                self.failures.with_label_values(&[failure.reason.as_str()]).inc();
                self.write_failures.inc_by(u64::from(failure.reason == Reason::Write));
            }
        }
    }

    /// Shows when the state of the devices and their services were read last.
    pub fn known(&self, known: &FleetState) {
        self.last_state.set(known.states_read.map_or(0.0, seconds));
        if let Some(read) = known.installs_read {
            self.last_services.with_label_values::<&str>(&[]).set(seconds(read));
        }
    }

    pub fn listed(&self, list: &Inventory) {
        self.devices.set(number(list.entries().count()));
        let left_out = list.left_out();
        for reason in LeftOutReason::ALL {
            let count = left_out.get(reason).copied().unwrap_or_default();
            self.left_out.with_label_values(&[reason.as_str()]).set(number(count));
        }
        let fleets = list.entries().filter_map(|entry| entry.common.fleet.as_ref());
        let fleets = fleets.filter(|fleet| !fleet.slug.is_empty());
        *self.fleets.lock() = fleets.map(|fleet| (fleet.slug.clone(), fleet.quiet.clone())).collect();
    }

    pub fn published(&self, targets: usize) {
        self.targets.set(number(targets));
    }

    /// All of them in the text format 0.0.4.
    pub fn text(&self) -> String {
        self.quiet.reset();
        for (fleet, quiet) in &*self.fleets.lock() {
            self.quiet.with_label_values(&[fleet]).set(f64::from(u8::from(quiet.has(SystemTime::now()))));
        }
        self.registry.text()
    }
}

/// A moment in seconds since 1970.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[allow(clippy::cast_precision_loss)] // there are not so many devices
pub fn number(number: usize) -> f64 {
    number as f64
}
