//! Tunnels that are kept between scrapes, so that a device needs one handshake and not one for each scrape.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::net::connector::Stream;

/// How long a tunnel is kept without a request, a connection of Prometheus without a scrape, and a relay without a byte.
/// balena's proxy lets a tunnel idle for at least 320 s; Prometheus keeps a connection for 300 s.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// The greatest age of a tunnel, after which a scrape opens a new one: so a revoked key is noticed, and tunnels follow when
/// balena moves a device to another VPN host.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// A tunnel's greatest age is less than [`MAX_AGE`] by up to this share of it, so that tunnels do not all end at once.
const AGE_SPREAD: f64 = 0.25;

/// A tunnel and its place. A kept tunnel has no HTTP state, which would take several times its memory.
pub struct Tunnel {
    /// The connection, in which no byte is in flight.
    pub stream: Stream,
    /// The place, which is free again when this is dropped.
    pub place: OwnedSemaphorePermit,
    /// The end of its greatest age.
    pub until: Instant,
}

impl Tunnel {
    /// A tunnel that has just been opened.
    pub fn new(stream: Stream, place: OwnedSemaphorePermit) -> Self {
        let age = MAX_AGE.mul_f64(1.0 - AGE_SPREAD * fastrand::f64());
        Tunnel { stream, place, until: Instant::now() + age }
    }
}

/// The tunnels that wait for their next request.
pub struct Pool {
    /// A permit for each tunnel that may be open.
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    next: u64,
    /// All tunnels by number, from the one that has waited longest.
    all: BTreeMap<u64, (Arc<str>, Instant, Tunnel)>,
    /// The numbers of each target's tunnels, from the one that has waited longest.
    by_target: HashMap<Arc<str>, Vec<u64>>,
}

impl Idle {
    fn remove(&mut self, number: u64) -> Option<Tunnel> {
        let (target, _, kept) = self.all.remove(&number)?;
        if let Some(numbers) = self.by_target.get_mut(&target) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_target.remove(&target);
            }
        }
        Some(kept)
    }
}

impl Pool {
    /// A pool with places for so many tunnels, idle or in use.
    pub fn new(places: usize) -> Self {
        Pool { places: Arc::new(Semaphore::new(places)), idle: Mutex::default() }
    }

    /// A kept tunnel to this target, which may turn out to be closed.
    pub fn take(&self, target: &str) -> Option<Tunnel> {
        let mut idle = self.idle();
        let number = *idle.by_target.get(target)?.last()?;
        idle.remove(number)
    }

    /// Keeps a tunnel for the next request, unless it is too old.
    pub fn keep(&self, target: Arc<str>, kept: Tunnel) {
        if kept.until <= Instant::now() {
            return;
        }
        let mut idle = self.idle();
        let number = idle.next;
        idle.next += 1;
        idle.by_target.entry(target.clone()).or_default().push(number);
        idle.all.insert(number, (target, Instant::now(), kept));
    }

    /// A place for a new tunnel, if necessary that of the tunnel that was used last; none if all are in use. Targets are scraped in
    /// turns: this tunnel would be needed last, and the one that has waited longest would be needed next.
    pub fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok().or_else(|| {
            let mut idle = self.idle();
            let latest = *idle.all.last_key_value()?.0;
            idle.remove(latest).map(|kept| kept.place)
        })
    }

    /// Closes the tunnels that have waited for `IDLE_TIMEOUT`.
    pub fn expire(&self) {
        let mut idle = self.idle();
        while let Some((number, (_, since, _))) = idle.all.first_key_value()
            && since.elapsed() > IDLE_TIMEOUT
        {
            let number = *number;
            idle.remove(number);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_kept_until_its_greatest_age() {
        let pool = Pool::new(2);
        let tunnel = || Tunnel::new(Box::new(tokio::io::empty()), pool.place().expect("a place"));
        let age = tunnel().until - Instant::now();
        assert!((45 * 60 - 1..=60 * 60).contains(&age.as_secs()), "{age:?}");
        pool.keep("a".into(), tunnel());
        assert!(pool.take("a").is_some());
        pool.keep("a".into(), Tunnel { until: Instant::now(), ..tunnel() });
        assert!(pool.take("a").is_none());
    }
}
