//! Tunnels that are open: places for them, those that are kept between scrapes, and the relays that idle. A kept tunnel saves
//! the handshake of the next scrape.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::net::connector::Stream;
use crate::tunnel::target_list::device_of;

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

/// The tunnels and relays that wait for their next request.
pub struct KeptTunnels {
    /// A permit for each tunnel that may be open.
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    next: u64,
    /// All tunnels by number, from the one that has waited longest.
    tunnels: BTreeMap<u64, (Arc<str>, Instant, Tunnel)>,
    /// The numbers of each target's tunnels, from the one that has waited longest.
    by_target: HashMap<Arc<str>, Vec<u64>>,
    /// All relays by number, from the one that has waited longest: the place of each, and how it learns that it has lost it.
    relays: BTreeMap<u64, (OwnedSemaphorePermit, Arc<Notify>)>,
}

impl Idle {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn remove(&mut self, number: u64) -> Option<Tunnel> {
        let (target, _, kept) = self.tunnels.remove(&number)?;
        if let Some(numbers) = self.by_target.get_mut(&target) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_target.remove(&target);
            }
        }
        Some(kept)
    }
}

impl KeptTunnels {
    /// Places for so many tunnels, idle or in use.
    pub fn new(places: usize) -> Self {
        KeptTunnels { places: Arc::new(Semaphore::new(places)), idle: Mutex::default() }
    }

    /// A kept tunnel to this target. Whether it is dead shows when it is used: see [`Transport::exchange`](super::transport::Transport::exchange).
    pub fn take(&self, target: &str) -> Option<Tunnel> {
        let mut idle = self.idle.lock();
        let number = *idle.by_target.get(target)?.last()?;
        idle.remove(number)
    }

    /// Keeps a tunnel for the next request, unless it is too old.
    pub fn keep(&self, target: Arc<str>, kept: Tunnel) {
        if kept.until <= Instant::now() {
            return;
        }
        let mut idle = self.idle.lock();
        let number = idle.number();
        idle.by_target.entry(target.clone()).or_default().push(number);
        idle.tunnels.insert(number, (target, Instant::now(), kept));
    }

    /// A relay idles: it leaves its place here, and learns by `lost` if the place is given away. Returns a number for
    /// [`KeptTunnels::relay_works`].
    pub fn relay_idles(&self, place: OwnedSemaphorePermit, lost: Arc<Notify>) -> u64 {
        let mut idle = self.idle.lock();
        let number = idle.number();
        idle.relays.insert(number, (place, lost));
        number
    }

    /// The place of a relay that has work; none if it was given away.
    pub fn relay_works(&self, number: u64) -> Option<OwnedSemaphorePermit> {
        self.idle.lock().relays.remove(&number).map(|(place, _)| place)
    }

    /// A place for a new tunnel; none if all are in use. If necessary it is that of the kept tunnel that was used last: targets
    /// are scraped in turns, so it would be needed last. Without kept tunnels it is that of the relay that has idled longest.
    pub fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            return Some(place);
        }
        let mut idle = self.idle.lock();
        if let Some(latest) = idle.tunnels.last_key_value().map(|(number, _)| *number) {
            return idle.remove(latest).map(|kept| kept.place);
        }
        let (_, (place, lost)) = idle.relays.pop_first()?;
        lost.notify_one();
        Some(place)
    }

    /// Closes the kept tunnels to a device: one of them has died in silence, so the device has lost its VPN connection.
    pub fn close_device(&self, device: &str) {
        self.close(|target, _| device_of(target) == device);
    }

    /// Closes the tunnels that have waited for `IDLE_TIMEOUT`.
    pub fn expire(&self) {
        self.close(|_, since| since.elapsed() > IDLE_TIMEOUT);
    }

    fn close(&self, ends: impl Fn(&str, &Instant) -> bool) {
        let mut idle = self.idle.lock();
        let ended: Vec<_> =
            idle.tunnels.iter().filter(|(_, (target, since, _))| ends(target, since)).map(|(n, _)| *n).collect();
        for number in ended {
            idle.remove(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_kept_until_its_greatest_age() {
        let kept = KeptTunnels::new(2);
        let tunnel = || Tunnel::new(Box::new(tokio::io::empty()), kept.place().expect("a place"));
        let age = tunnel().until - Instant::now();
        assert!((45 * 60 - 1..=60 * 60).contains(&age.as_secs()), "{age:?}");
        kept.keep("a".into(), tunnel());
        assert!(kept.take("a").is_some());
        kept.keep("a".into(), Tunnel { until: Instant::now(), ..tunnel() });
        assert!(kept.take("a").is_none());
    }
}
