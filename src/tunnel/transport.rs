//! One request to a target, as Go's `http.Transport` sends it: in a kept tunnel, or else in a new one.

use std::sync::Arc;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::http::response::Parts;
use prometheus::IntCounter;

use crate::net::scrape::Deadline;
use crate::net::scrape_error::ScrapeError;
use crate::net::vpn::Vpn;
use crate::tunnel::capacity::busy;
use crate::tunnel::exchange::{Exchange, NoAnswer};
use crate::tunnel::kept_tunnels::{KeptTunnels, Tunnel};
use crate::tunnel::offline::Offline;
use crate::tunnel::target_list::Target;

/// Opens tunnels, and uses those that are kept.
pub struct Transport {
    vpn: Vpn,
    /// The tunnels that are kept.
    pub kept: Arc<KeptTunnels>,
    /// The devices that are not connected.
    pub offline: Offline,
    handshakes: IntCounter,
}

impl Transport {
    /// Counts the tunnels that it opens.
    pub fn new(vpn: Vpn, kept: KeptTunnels, offline: Offline, handshakes: IntCounter) -> Self {
        Transport { vpn, kept: Arc::new(kept), offline, handshakes }
    }

    /// Opens a tunnel to a target.
    pub async fn open(&self, target: &Target, deadline: Deadline) -> Result<Tunnel, ScrapeError> {
        if let Some(error) = self.offline.find(target) {
            return Err(error);
        }
        let place = self.kept.place().ok_or_else(busy)?;
        self.handshakes.inc();
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
        &self, target: &Target, request: Request<Empty<Bytes>>, deadline: Deadline,
    ) -> Result<(Parts, Exchange), ScrapeError> {
        if let Some(tunnel) = self.kept.take(&target.address) {
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
