//! Tunnels to targets: kept ones first, new ones otherwise, and a new one beside a kept one that does not answer.

use std::sync::Arc;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::http::response::Parts;
use prometheus::IntCounter;
use tokio::task::JoinSet;
use tokio::time::{timeout, timeout_at};

use crate::net::scrape::Deadline;
use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::vpn::Vpn;
use crate::tunnel::exchange::Exchange;
use crate::tunnel::offline::Offline;
use crate::tunnel::pool::{Pool, Tunnel};
use crate::tunnel::target_list::Target;

/// A kept tunnel has the time left, divided by this, to answer. Then a new tunnel races it: the device may have another address in the
/// VPN.
const RACE_DIVISOR: u32 = 3;

/// The failure of a scrape that has no place.
pub fn busy() -> ScrapeError {
    ScrapeError::new(ScrapeReason::Busy, "too many scrapes at once")
}

/// Opens tunnels, and finds those that are kept.
pub struct Tunnels {
    vpn: Vpn,
    /// The tunnels that are kept.
    pub pool: Arc<Pool>,
    /// The devices that are not connected.
    pub offline: Offline,
    handshakes: IntCounter,
}

type Answered = (Parts, Exchange);

impl Tunnels {
    /// Counts the tunnels that it opens.
    pub fn new(vpn: Vpn, pool: Pool, offline: Offline, handshakes: IntCounter) -> Self {
        Tunnels { vpn, pool: Arc::new(pool), offline, handshakes }
    }

    /// Opens a tunnel to a target.
    pub async fn open(&self, target: &Target, deadline: Deadline) -> Result<Tunnel, ScrapeError> {
        if let Some(refused) = self.offline.find(target) {
            return Err(refused);
        }
        let place = self.pool.place().ok_or_else(busy)?;
        self.handshakes.inc();
        let opened = self.vpn.open(&target.address, deadline).await;
        match &opened {
            Ok(_) => self.offline.succeeded(target),
            Err(refused) => self.offline.failed(target, refused),
        }
        Ok(Tunnel::new(opened?, place))
    }

    /// Sends a request in a kept tunnel, or else in a new one. A kept tunnel that was closed is no failure. If it does not
    /// answer in a third of the time, a new tunnel gets the same request, and the first answer wins.
    pub async fn exchange(
        self: &Arc<Self>, target: &Arc<Target>, request: Request<Empty<Bytes>>, deadline: Deadline,
    ) -> Result<Answered, ScrapeError> {
        let mut attempts = JoinSet::new();
        if let Some(kept) = self.pool.take(&target.address) {
            let mut attempt = Box::pin(Exchange::start(kept, request.clone()));
            match timeout(deadline.left() / RACE_DIVISOR, &mut attempt).await {
                Ok(Ok(answered)) => return Ok(answered),
                Ok(Err(_)) => {}
                Err(_) => drop(attempts.spawn(attempt)),
            }
        }
        let (tunnels, target) = (self.clone(), target.clone());
        attempts.spawn(async move {
            let tunnel = tunnels.open(&target, deadline).await?;
            Exchange::start(tunnel, request).await
        });
        let mut failure = None;
        while let Ok(Some(ended)) = timeout_at(deadline.at, attempts.join_next()).await {
            match ended {
                Ok(Ok(answered)) => return Ok(answered),
                Ok(Err(refused)) => failure = Some(refused),
                Err(_) => {} // a task neither panics nor is it aborted here
            }
        }
        Err(failure.unwrap_or_else(|| deadline.missed()))
    }
}
