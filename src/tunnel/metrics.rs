//! The tunnel's metrics, and the count of each scrape.

use std::sync::Arc;

use hyper::StatusCode;
use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec};
use tokio::time::Instant;

use crate::metrics_registry::Registry;
use crate::net::{ScrapeReason, Traffic};
use crate::tunnel::failures::Failures;
use crate::tunnel::target_list::{Destination, TargetList};

/// Upper bounds of the histogram of durations, in seconds.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 9.0];

pub struct TunnelMetrics {
    registry: Registry,
    scrapes: IntCounterVec,
    duration: Histogram,
    /// Tunnels asked for.
    pub handshakes: IntCounter,
    /// Scrapes of devices that are not connected, answered from memory.
    pub remembered: IntCounter,
    pub traffic: Traffic,
    /// Targets that the tunnel may go to.
    targets: Gauge,
    pub failures: Failures,
}

impl TunnelMetrics {
    /// All metrics at 0.
    #[rustfmt::skip] // a table
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new()?;
        let scrapes = registry.counters("baletheus_tunnel_scrapes_total", "Scrapes through the tunnel, by result; of https targets, connections.", "result")?;
        for outcome in Outcome::all() {
            // from 0, so that `increase()` sees the first one
            scrapes.with_label_values(&[outcome.as_str()]);
        }
        let bytes = registry.counters("baletheus_tunnel_bytes_total", "Bytes to and from the tunnel host, including TLS.", "direction")?;
        let [sent, received] = ["sent", "received"].map(|direction| bytes.with_label_values(&[direction]));
        let open = registry.gauge("baletheus_tunnel_open", "Connections to the tunnel host that are open.")?;
        Ok(TunnelMetrics {
            scrapes,
            duration: registry.histogram("baletheus_tunnel_duration_seconds", "How long a scrape through the tunnel took, without those of https targets.", &BUCKETS)?,
            handshakes: registry.counter("baletheus_tunnel_handshakes_total", "CONNECT requests to the tunnel host. The other scrapes used a kept one, or were answered from memory.")?,
            remembered: registry.counter("baletheus_tunnel_remembered_total", "Scrapes of devices that are not connected, answered without asking for a tunnel again.")?,
            traffic: Traffic { open, sent, received },
            targets: registry.gauge("baletheus_tunnel_targets", "Targets that the tunnel may go to.")?,
            failures: Failures::new(registry.gauges("baletheus_tunnel_target_failure", "1 for each target whose last scrape failed, with the reason; nothing for the others.", &["uuid", "job", "instance", "reason"])?),
            registry,
        })
    }

    /// All metrics, in Prometheus' text format.
    pub fn text(&self) -> String {
        self.failures.publish();
        self.registry.text()
    }

    /// The target file has been read.
    pub fn listed(&self, list: &Arc<TargetList>) {
        #[allow(clippy::cast_precision_loss)] // there are not so many
        self.targets.set(list.len() as f64);
        self.failures.retain(list);
    }

    /// Counts a request that is no scrape of a target.
    pub fn refused(&self, reason: ScrapeReason) {
        self.count(Outcome::Failed(reason));
    }

    /// Counts a scrape without a duration, and notes whether it failed. Without a path it is one of all exporters of the target.
    pub fn ended(&self, target: &Destination, path: Option<&str>, outcome: Outcome) {
        self.count(outcome);
        let failure = match outcome {
            Outcome::Passed(StatusCode::OK) => None,
            Outcome::Passed(_) => Some(ScrapeReason::Http),
            Outcome::Failed(reason) => Some(reason),
            Outcome::Abandoned => return, // Prometheus knows why
        };
        for exporter in target.exporters_at(path) {
            self.failures.ended(exporter, failure);
        }
    }

    fn count(&self, outcome: Outcome) {
        self.scrapes.with_label_values(&[outcome.as_str()]).inc();
    }
}

#[derive(Clone, Copy)]
pub enum Outcome {
    /// The whole answer passed, with this status.
    Passed(StatusCode),
    /// Prometheus closed the connection first.
    Abandoned,
    /// The tunnel or the device failed it.
    Failed(ScrapeReason),
}

impl Outcome {
    /// The value of the label `result`.
    fn as_str(self) -> &'static str {
        match self {
            Outcome::Passed(_) => "ok",
            Outcome::Abandoned => "gone",
            Outcome::Failed(reason) => reason.as_str(),
        }
    }

    /// All outcomes that the tunnel knows; it does not look into answers, as `check` does.
    fn all() -> impl Iterator<Item = Self> {
        let reasons = ScrapeReason::ALL.iter().filter(|reason| !reason.is_of_check());
        [Outcome::Passed(StatusCode::OK), Outcome::Abandoned]
            .into_iter()
            .chain(reasons.map(|reason| Outcome::Failed(*reason)))
    }
}

/// A scrape in progress. It is counted when it ends.
pub struct Scrape {
    metrics: Arc<TunnelMetrics>,
    pub target: Arc<Destination>,
    path: Box<str>,
    start: Instant,
    /// How it ends, if it ends now.
    pub outcome: Outcome,
}

impl Scrape {
    pub fn start(metrics: Arc<TunnelMetrics>, target: Arc<Destination>, path: &str) -> Self {
        Scrape { metrics, target, path: path.into(), start: Instant::now(), outcome: Outcome::Abandoned }
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.metrics.ended(&self.target, Some(&self.path), self.outcome);
        self.metrics.duration.observe(self.start.elapsed().as_secs_f64());
    }
}
