//! Tunnels that are kept between scrapes, which saves a handshake: a request goes into a kept tunnel or else into a new one, as
//! with Go's `http.Transport`. A kept tunnel that is dead is found and closed here. Tunnels and idle relays have their places here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::http::response::Parts;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::net::{Deadline, ScrapeError, Vpn};
use crate::tunnel::capacity::busy;
use crate::tunnel::exchange::{Exchange, NoAnswer, Tunnel};
use crate::tunnel::metrics::TunnelMetrics;
use crate::tunnel::offline::Offline;
use crate::tunnel::target_list::{Destination, device_of};

/// How long a tunnel is kept without a request, a connection of Prometheus without a scrape, and a relay without a byte.
/// balena's proxy lets a tunnel idle for at least 320 s; Prometheus keeps a connection for 300 s.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// The tunnels and relays that wait for their next request.
pub struct KeptTunnels {
    /// A permit for each tunnel that may be open.
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The tunnels to each target, from the one that has waited longest.
    tunnels: HashMap<Arc<str>, Vec<(Instant, Tunnel)>>,
    /// The number of the last relay that idled.
    last_relay: u64,
    /// All relays by number, from the one that has waited longest: the place of each, and how it learns that it has lost it.
    relays: BTreeMap<u64, (OwnedSemaphorePermit, Arc<Notify>)>,
}

impl KeptTunnels {
    /// Places for so many tunnels, idle or in use.
    pub fn new(places: usize) -> Self {
        KeptTunnels { places: Arc::new(Semaphore::new(places)), idle: Mutex::default() }
    }

    /// A kept tunnel to this target. Whether it is dead shows when it is used: see [`Transport::exchange`].
    pub fn take(&self, target: &str) -> Option<Tunnel> {
        self.idle.lock().tunnels.get_mut(target)?.pop().map(|(_, tunnel)| tunnel)
    }

    /// Keeps a tunnel for the next request, unless it is too old.
    pub fn keep(&self, target: Arc<str>, tunnel: Tunnel) {
        let now = Instant::now();
        if tunnel.until > now {
            self.idle.lock().tunnels.entry(target).or_default().push((now, tunnel));
        }
    }

    /// A relay idles: it leaves its place here, and learns by `lost` if the place is given away. Returns a number for
    /// [`KeptTunnels::relay_works`].
    pub fn relay_idles(&self, place: OwnedSemaphorePermit, lost: Arc<Notify>) -> u64 {
        let mut idle = self.idle.lock();
        idle.last_relay += 1;
        let number = idle.last_relay;
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
        let latest = idle.tunnels.values_mut().max_by_key(|kept| kept.last().map(|(since, _)| *since));
        if let Some((_, tunnel)) = latest.and_then(Vec::pop) {
            return Some(tunnel.place);
        }
        let (_, (place, lost)) = idle.relays.pop_first()?;
        lost.notify_one();
        Some(place)
    }

    /// Closes the kept tunnels to a device: one of them has died in silence, so the device has lost its VPN connection.
    pub fn close_device(&self, device: &str) {
        self.idle.lock().tunnels.retain(|target, _| device_of(target) != device);
    }

    /// Closes the tunnels that have waited for `IDLE_TIMEOUT`.
    pub fn expire(&self) {
        self.idle.lock().tunnels.retain(|_, kept| {
            kept.retain(|(since, _)| since.elapsed() <= IDLE_TIMEOUT);
            !kept.is_empty()
        });
    }
}

/// Opens tunnels, and uses those that are kept.
pub struct Transport {
    vpn: Vpn,
    pub kept: Arc<KeptTunnels>,
    pub offline: Offline,
    metrics: Arc<TunnelMetrics>,
}

impl Transport {
    pub fn new(vpn: Vpn, places: usize, metrics: Arc<TunnelMetrics>) -> Self {
        Transport { vpn, kept: Arc::new(KeptTunnels::new(places)), offline: Offline::default(), metrics }
    }

    pub async fn open(&self, target: &Destination, deadline: Deadline) -> Result<Tunnel, ScrapeError> {
        if let Some(error) = self.offline.find(target) {
            self.metrics.remembered.inc();
            return Err(error);
        }
        let place = self.kept.place().ok_or_else(busy)?;
        self.metrics.handshakes.inc();
        // the key may be read again from a file system that hangs
        let opened = deadline.wait(self.vpn.open(&target.address, deadline)).await.flatten();
        match &opened {
            Ok(_) => self.offline.succeeded(target),
            Err(error) => self.offline.failed(target, error),
        }
        Ok(Tunnel::new(opened?, place))
    }

    /// Sends a request in a kept tunnel, or else in a new one. Like Go's HTTP client, it repeats the request only if a kept
    /// tunnel ends before the first byte of the answer. A kept tunnel without an answer fails the scrape: the device may have
    /// lost its VPN connection in silence, or its exporter may hang. So all kept tunnels to the device close, and the next
    /// scrape opens one.
    pub async fn exchange(
        &self, target: &Destination, request: Request<Empty<Bytes>>, deadline: Deadline,
    ) -> Result<(Parts, Exchange), ScrapeError> {
        if let Some(mut tunnel) = self.kept.take(&target.address)
            && tunnel.is_quiet()
        {
            let answered = deadline.wait(Exchange::start(tunnel, request.clone())).await;
            match answered.inspect_err(|_| self.kept.close_device(target.device()))? {
                Err(NoAnswer { is_closed: true, .. }) => {}
                answered => return answered.map_err(|no_answer| no_answer.error),
            }
        }
        let tunnel = self.open(target, deadline).await?;
        deadline.wait(Exchange::start(tunnel, request)).await?.map_err(|no_answer| no_answer.error)
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
