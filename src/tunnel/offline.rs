//! Devices that are not connected to the VPN. Without this memory, each scrape of each target of an offline device costs a
//! connection to the tunnel host, with its TLS.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::net::{ScrapeError, ScrapeReason};
use crate::tunnel::target_list::Destination;

/// How long an answer holds at most. Longer intervals between scrapes do not suit Prometheus.
const MAX_AGE: Duration = Duration::from_secs(300);

/// The devices that were not connected when they were asked for.
///
/// The tunnel host is asked once for each interval of the device's fastest target: an answer holds until a target that has had
/// it is scraped again.
#[derive(Default)]
pub struct Offline(Mutex<HashMap<Box<str>, NotConnected>>);

struct NotConnected {
    error: ScrapeError,
    /// When the tunnel host gave this answer.
    answered: Instant,
    /// The targets that have had this answer.
    told: HashSet<Arc<str>>,
}

impl Offline {
    /// The remembered answer for a target, if it holds.
    pub fn find(&self, target: &Destination) -> Option<ScrapeError> {
        let mut devices = self.0.lock();
        let device = devices.get_mut(target.device())?;
        // A target that is new in the list may be there because its device is back.
        let holds = device.answered > target.listed && device.answered.elapsed() < MAX_AGE;
        (holds && device.told.insert(target.address.clone())).then(|| device.error.clone())
    }

    /// Remembers the answer of the tunnel host if the device is not connected.
    pub fn failed(&self, target: &Destination, error: &ScrapeError) {
        if error.reason != ScrapeReason::NotConnected {
            return;
        }
        // An answer from memory says nothing about the tunnel host, so it has no status.
        let error = ScrapeError { status: None, ..error.clone() };
        let device = NotConnected { error, answered: Instant::now(), told: [target.address.clone()].into() };
        self.0.lock().insert(target.device().into(), device);
    }

    /// A tunnel to the target opens: its device is connected.
    pub fn succeeded(&self, target: &Destination) {
        self.0.lock().remove(target.device());
    }

    pub fn expire(&self) {
        self.0.lock().retain(|_, device| device.answered.elapsed() < MAX_AGE);
    }
}
