//! The tunnel's metrics, and the count of each scrape.

use std::sync::Arc;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use tokio::time::Instant;

use crate::net::scrape_error::ScrapeReason;
use crate::net::traffic::Traffic;
use crate::registry::{self, register};

/// Upper bounds of the histogram of durations, in seconds.
const BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 9.0];

/// The metrics of the tunnel.
pub struct Metrics {
    registry: Registry,
    scrapes: IntCounterVec,
    duration: Histogram,
    /// Tunnels asked for.
    pub handshakes: IntCounter,
    /// Scrapes of devices that are not connected, answered from memory.
    pub remembered: IntCounter,
    /// Connections to the tunnel host.
    pub traffic: Traffic,
    /// Targets that the tunnel may go to.
    pub targets: IntGauge,
}

impl Metrics {
    /// All metrics at 0.
    pub fn new() -> prometheus::Result<Self> {
        let registry = registry::new()?;
        let scrapes = Opts::new(
            "baletheus_tunnel_scrapes_total",
            "Scrapes through the tunnel, by result; of https targets, connections.",
        );
        let duration = HistogramOpts::new(
            "baletheus_tunnel_duration_seconds",
            "How long a scrape through the tunnel took, without those of https targets.",
        );
        let bytes =
            Opts::new("baletheus_tunnel_bytes_total", "Bytes to and from the tunnel host, those of TLS among them.");
        let bytes = register(&registry, IntCounterVec::new(bytes, &["direction"]))?;
        let [sent, received] = ["sent", "received"].map(|direction| bytes.with_label_values(&[direction]));
        let open = IntGauge::new("baletheus_tunnel_open", "Connections to the tunnel host that are open.");
        let handshakes = IntCounter::new(
            "baletheus_tunnel_handshakes_total",
            "Tunnels asked for. The other scrapes used a kept one, or were answered from memory.",
        );
        let remembered = IntCounter::new(
            "baletheus_tunnel_remembered_total",
            "Scrapes of devices that are not connected, answered without asking for a tunnel again.",
        );
        let targets = IntGauge::new("baletheus_tunnel_targets", "Targets that the tunnel may go to.");
        let scrapes = register(&registry, IntCounterVec::new(scrapes, &["result"]))?;
        for outcome in Outcome::all() {
            // from 0, so that `increase()` sees the first one
            scrapes.with_label_values(&[outcome.as_str()]);
        }
        Ok(Metrics {
            scrapes,
            duration: register(&registry, Histogram::with_opts(duration.buckets(BUCKETS.to_vec())))?,
            handshakes: register(&registry, handshakes)?,
            remembered: register(&registry, remembered)?,
            traffic: Traffic { open: register(&registry, open)?, sent, received },
            targets: register(&registry, targets)?,
            registry,
        })
    }

    /// All metrics, in Prometheus' text format.
    pub fn text(&self) -> String {
        registry::text(&self.registry)
    }

    /// Counts a scrape without a duration.
    pub fn count(&self, outcome: Outcome) {
        self.scrapes.with_label_values(&[outcome.as_str()]).inc();
    }
}

/// How a scrape ends.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// The whole answer passed.
    Passed,
    /// Prometheus closed the connection first.
    Abandoned,
    /// The tunnel or the device failed it.
    Failed(ScrapeReason),
}

impl Outcome {
    /// The value of the label `result`.
    fn as_str(self) -> &'static str {
        match self {
            Outcome::Passed => "ok",
            Outcome::Abandoned => "gone",
            Outcome::Failed(reason) => reason.as_str(),
        }
    }

    /// All outcomes that the tunnel knows; it does not look into answers, as `check` does.
    fn all() -> impl Iterator<Item = Self> {
        let of_check = |reason: &&ScrapeReason| {
            matches!(reason, ScrapeReason::Http | ScrapeReason::Redirect | ScrapeReason::NotMetrics)
        };
        let reasons = ScrapeReason::ALL.iter().filter(move |reason| !of_check(reason));
        [Outcome::Passed, Outcome::Abandoned].into_iter().chain(reasons.map(|reason| Outcome::Failed(*reason)))
    }
}

/// A scrape in progress. It is counted when it ends.
pub struct Scrape {
    metrics: Arc<Metrics>,
    start: Instant,
    /// How it ends, if it ends now.
    pub outcome: Outcome,
}

impl Scrape {
    /// Starts now.
    pub fn start(metrics: Arc<Metrics>) -> Self {
        Scrape { metrics, start: Instant::now(), outcome: Outcome::Abandoned }
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.metrics.count(self.outcome);
        self.metrics.duration.observe(self.start.elapsed().as_secs_f64());
    }
}
