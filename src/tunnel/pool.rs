//! Tunnels that are kept: one handshake for a device, and not one for each scrape.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::net::connector::Stream;

/// A tunnel, and its place among all of them. Nothing more is kept: what HTTP needs takes several times the memory.
pub struct Kept {
    /// Where nothing is on its way.
    pub stream: Stream,
    /// Free again when it is dropped.
    pub place: OwnedSemaphorePermit,
}

/// The tunnels that wait for their next request.
pub struct Pool {
    /// One for each tunnel that may be open.
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    next: u64,
    /// From the one that has waited longest.
    all: BTreeMap<u64, (Arc<str>, Instant, Kept)>,
    /// Those of each target, by number; the last one has waited the shortest time.
    of: HashMap<Arc<str>, Vec<u64>>,
}

impl Idle {
    fn remove(&mut self, number: u64) -> Option<Kept> {
        let (target, _, kept) = self.all.remove(&number)?;
        if let Some(numbers) = self.of.get_mut(&target) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.of.remove(&target);
            }
        }
        Some(kept)
    }
}

impl Pool {
    /// With places for so many tunnels, idle or not.
    pub fn new(places: usize) -> Self {
        Pool { places: Arc::new(Semaphore::new(places)), idle: Mutex::default() }
    }

    /// A kept tunnel to this target, which may turn out to be closed.
    pub fn take(&self, target: &str) -> Option<Kept> {
        let mut idle = self.idle();
        let number = *idle.of.get(target)?.last()?;
        idle.remove(number)
    }

    /// Keeps a tunnel for the next request.
    pub fn keep(&self, target: Arc<str>, kept: Kept) {
        let mut idle = self.idle();
        let number = idle.next;
        idle.next += 1;
        idle.of.entry(target.clone()).or_default().push(number);
        idle.all.insert(number, (target, Instant::now(), kept));
    }

    /// A place for one more, if need be that of the tunnel that has waited longest; none if all are in use.
    pub fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok().or_else(|| {
            let mut idle = self.idle();
            let oldest = *idle.all.first_key_value()?.0;
            idle.remove(oldest).map(|kept| kept.place)
        })
    }

    /// Closes those that have waited longer than this.
    pub fn expire(&self, longest: Duration) {
        let mut idle = self.idle();
        while let Some((number, (_, since, _))) = idle.all.first_key_value()
            && since.elapsed() > longest
        {
            let number = *number;
            idle.remove(number);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
