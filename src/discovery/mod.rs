//! The loop: fetch, map, write, wait. It knows nothing of HTTP, files or clocks.

pub mod changes;
pub mod exporter;
pub mod inventory;
pub mod steering;
pub mod target;
pub mod target_file;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::balena::failure::{Failure, Published};
use crate::balena::query::FleetRef;
use crate::discovery::changes::Journal;
use crate::discovery::inventory::{Entry, Inventory, Source};
use crate::discovery::target::Rules;

/// The wait after the first failure; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// The longest wait, unless the interval is longer still.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Where the list goes.
pub trait Sink {
    /// What people know it by.
    fn name(&self) -> String;
    /// The devices in the list that stands there, if it can be read.
    fn held(&self) -> Option<Vec<Arc<Entry>>>;
    /// Puts the list there, unless it is there already.
    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure>;
}

/// Who is told of each refresh: how long it took, and how it ended.
pub type Observer<'a> = &'a mut dyn FnMut(Duration, &Result<Published, Failure>, &Inventory);

/// The passing of time.
pub trait Clock {
    /// The time now, on a clock that nobody sets.
    fn now(&self) -> Instant;
    /// Waits until then, or until it is told otherwise; false means that it is time to stop.
    fn wait(&mut self, until: Instant) -> bool;
}

/// Keeps a sink true to a source.
pub struct Discovery<'a> {
    source: &'a mut dyn Source,
    sink: &'a mut dyn Sink,
    observer: Observer<'a>,
    rules: Rules,
    inventory: Inventory,
    journal: Journal,
}

impl<'a> Discovery<'a> {
    /// Nothing is fetched yet.
    pub fn new(
        source: &'a mut dyn Source, sink: &'a mut dyn Sink, observer: Observer<'a>, rules: Rules, fleets: Vec<FleetRef>,
    ) -> Self {
        let (inventory, journal) = (Inventory::default(), Journal::new(fleets));
        Discovery { source, sink, observer, rules, inventory, journal }
    }

    /// Refreshes at this interval, counted from start to start, until the clock says so; without one, once. Tells
    /// whether the last refresh did what it should.
    pub fn run(mut self, interval: Option<Duration>, clock: &mut dyn Clock) -> bool {
        let mut failures = 0;
        loop {
            let start = clock.now();
            let refreshed = self.refresh();
            (self.observer)(clock.now() - start, &refreshed, &self.inventory);
            let stays = format!("{} stays as it is", self.sink.name());
            let next = match (refreshed, interval) {
                (Ok(published), None) => return published != Published::Refused,
                (Err(failure), None) => {
                    failure.tell(&stays);
                    return false;
                }
                (Ok(_), Some(interval)) => {
                    failures = 0;
                    start + interval
                }
                (Err(failure), Some(interval)) => {
                    let wait = failure.retry_after.unwrap_or_else(|| backoff(failures, interval));
                    failures += 1;
                    let shown = humantime::format_duration(Duration::from_secs(wait.as_secs()));
                    failure.tell(&format!("{stays}, next try in {shown}"));
                    clock.now() + wait
                }
            };
            if !clock.wait(next) {
                return true;
            }
        }
    }

    /// One refresh: all pages or nothing.
    pub fn refresh(&mut self) -> Result<Published, Failure> {
        self.inventory.refresh(self.source, &self.rules)?;
        self.journal.begin(|| self.sink.held().unwrap_or_default());
        let published = self.sink.publish(&self.inventory)?;
        self.journal.tell(&self.inventory, published, &self.sink.name());
        Ok(published)
    }
}

/// The wait after that many failures before: doubling, and at random in its upper half, so that many sidecars do not
/// come back at once.
pub fn backoff(failures: u32, interval: Duration) -> Duration {
    let doubled = FIRST_WAIT.min(interval).saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(LONGEST_WAIT.max(interval)).mul_f64(0.5 + fastrand::f64() / 2.0)
}
