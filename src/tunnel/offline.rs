//! Devices that are not connected to the VPN: after such an answer, further scrapes are refused from memory for a while. Otherwise
//! each scrape of an offline device costs a connection to the tunnel host, with its TLS.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::time::Instant;

use crate::net::scrape_error::{ScrapeError, ScrapeReason};

/// How long the first answer holds. Until then no scrape of the device asks the tunnel host.
const FIRST_PAUSE: Duration = Duration::from_secs(4);
/// The longest pause, whatever the interval between scrapes. Longer intervals do not suit Prometheus.
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// The devices that were not connected when they were asked for.
pub struct Offline {
    devices: Mutex<HashMap<Box<str>, Device>>,
    /// Scrapes that are answered from memory.
    remembered: IntCounter,
}

struct Device {
    refused: ScrapeError,
    /// When the tunnel host gave this answer.
    answered: Instant,
    /// The answer holds until then.
    until: Instant,
    pause: Duration,
    /// The target by which the interval between scrapes is measured. A device may have several.
    target: Box<str>,
    /// When this target was scraped last.
    scraped: Instant,
    /// From one scrape of this target to the next, once there were two.
    interval: Option<Duration>,
}

impl Device {
    fn scraped(&mut self, target: &str, now: Instant) {
        if *self.target == *target {
            self.interval = Some(now - self.scraped);
            self.scraped = now;
        }
    }
}

impl Offline {
    /// Counts the answers from memory.
    pub fn new(remembered: IntCounter) -> Self {
        Offline { devices: Mutex::default(), remembered }
    }

    /// The remembered answer for a target that the list has had since `listed`, if the answer still holds.
    pub fn find(&self, target: &str, listed: Instant) -> Option<ScrapeError> {
        let now = Instant::now();
        let mut devices = self.lock();
        let device = devices.get_mut(host(target))?;
        device.scraped(target, now);
        // a target that is new in the list may be there because its device is back
        let holds = now < device.until && device.answered > listed;
        holds.then(|| {
            self.remembered.inc();
            device.refused.clone()
        })
    }

    /// Remembers the answer of the tunnel host if the device is not connected. Each time in a row it holds twice as long, up to the
    /// interval between scrapes.
    pub fn failed(&self, target: &str, refused: &ScrapeError) {
        if refused.reason != ScrapeReason::NotConnected {
            return;
        }
        let now = Instant::now();
        // An answer from memory says nothing about the tunnel host, so it has no status.
        let refused = ScrapeError { status: None, ..refused.clone() };
        let mut devices = self.lock();
        let device = devices.entry(host(target).into()).or_insert_with(|| Device {
            refused: refused.clone(),
            answered: now,
            until: now,
            pause: FIRST_PAUSE / 2,
            target: target.into(),
            scraped: now,
            interval: None,
        });
        device.pause = (device.pause * 2).min(device.interval.unwrap_or(FIRST_PAUSE)).min(MAX_PAUSE);
        device.refused = refused;
        device.answered = now;
        device.until = now + device.pause;
    }

    /// A tunnel to the target opens: its device is connected.
    pub fn succeeded(&self, target: &str) {
        self.lock().remove(host(target));
    }

    /// Forgets devices that are scraped no more.
    pub fn expire(&self) {
        let now = Instant::now();
        self.lock().retain(|_, device| device.until + MAX_PAUSE > now);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Device>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device of a target `<uuid>.balena:<port>`.
fn host(target: &str) -> &str {
    target.rsplit_once(':').map_or(target, |(host, _)| host)
}
