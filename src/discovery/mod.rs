//! The loop: fetch, map, write, wait. It knows nothing of HTTP, files or clocks: they come from outside.

pub mod changes;
pub mod device_exporters;
pub mod earlier_list;
pub mod entry;
pub mod exporter;
pub mod inventory;
pub mod key_warnings;
mod label_prefix;
pub mod labels;
pub mod lan;
pub mod left_out;
mod mapper;
pub mod muting;
pub mod releases;
pub mod service_labels;
mod sink;
pub mod tags;
pub mod target;
pub mod target_file;
pub mod target_groups;

use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::balena::{Failure, FleetRef, Source};
use crate::liveness::Liveness;
use crate::text::count;
use changes::Changes;
use inventory::Inventory;
use key_warnings::KeyOwner;
pub use sink::{HELD_BACK, Published, Sink, StandardOutput};
use target::{Address, Rules};

/// What a refresh is reported to: how long it took, what became of its list, and what the API lists.
pub type Reporter<'a> = &'a dyn Fn(Duration, &Result<Published, Failure>, &Inventory);

pub trait Clock {
    /// The time now, on a monotonic clock.
    fn now(&self) -> Instant;
    /// Waits until then, or until somebody asks for a refresh. False ends the loop.
    fn wait(&mut self, until: Instant) -> bool;
}

/// Keeps a sink up to date with a source.
pub struct Discovery<'a> {
    source: &'a mut dyn Source,
    sink: &'a mut dyn Sink,
    report: Reporter<'a>,
    liveness: &'a Liveness,
    rules: Rules,
    inventory: Inventory,
    key_owner: KeyOwner,
    changes: Changes,
}

impl<'a> Discovery<'a> {
    /// Fetches nothing yet. `fleets` are those that were asked for.
    pub fn new(
        source: &'a mut dyn Source, sink: &'a mut dyn Sink, report: Reporter<'a>, liveness: &'a Liveness, rules: Rules,
        fleets: Vec<FleetRef>,
    ) -> Self {
        let (inventory, key_owner) = (Inventory::default(), KeyOwner::default());
        Discovery { source, sink, report, liveness, rules, inventory, key_owner, changes: Changes::new(fleets) }
    }

    /// Refreshes at this interval, counted from start to start, until the clock ends it; without an interval, once. Returns
    /// whether the last refresh succeeded.
    pub fn run(mut self, interval: Option<Duration>, clock: &mut dyn Clock) -> bool {
        let Some(interval) = interval else {
            return match self.refresh(clock) {
                Ok(published) => published != Published::HeldBack,
                Err(failure) => {
                    self.log(&failure, "");
                    false
                }
            };
        };
        let mut backoff = Backoff::new(interval);
        loop {
            let start = clock.now();
            let next = match self.refresh(clock) {
                Ok(_) => {
                    if backoff.failures() > 0 {
                        let failures = count(backoff.failures() as usize, "failure");
                        log::info!("the refresh has succeeded again, after {failures}");
                    }
                    backoff.succeeded();
                    start + interval
                }
                Err(failure) => {
                    let wait = backoff.failed(failure.retry_after);
                    // Less than a second is shown as one: "0s" would read as a mistake.
                    let shown = humantime::format_duration(Duration::from_secs(wait.as_secs().max(1)));
                    self.log(&failure, &format!(", next try in {shown}"));
                    clock.now() + wait
                }
            };
            self.liveness.expect(next);
            if !clock.wait(next) {
                return true;
            }
        }
    }

    /// One refresh: all pages or nothing.
    fn refresh(&mut self, clock: &dyn Clock) -> Result<Published, Failure> {
        let start = clock.now();
        let outcome = self.fetch_and_publish(clock);
        (self.report)(clock.now() - start, &outcome, &self.inventory);
        outcome
    }

    fn fetch_and_publish(&mut self, clock: &dyn Clock) -> Result<Published, Failure> {
        let start = clock.now();
        if self.rules.address == Address::Lan && self.rules.lan.renew_own() {
            self.inventory.forget();
        }
        let refreshed = self.inventory.refresh(self.source, &self.rules);
        let devices = self.inventory.entries().count();
        self.key_owner.check(self.source, &refreshed, devices, &|| clock.now() - start);
        refreshed?;
        self.changes.begin(|| self.sink.published().unwrap_or_default());
        if let Some(failure) = self.inventory.missing_releases()
            && self.changes.is_from_services()
        {
            return Err(failure);
        }
        let published = self.sink.publish(&self.inventory)?;
        self.changes.announce(&self.inventory, published, &self.sink.name(), clock.now());
        Ok(published)
    }

    /// One line for people, and the causes at debug.
    fn log(&self, failure: &Failure, next_try: &str) {
        log::warn!("refresh failed: {failure}{}{next_try}", self.sink.stays());
        if !failure.causes.is_empty() {
            log::debug!("all causes: {}", failure.causes);
        }
    }
}
