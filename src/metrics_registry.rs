//! The metrics of a service: how they are declared, and their text.

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Result, TextEncoder};

/// The content type of metrics, without which Prometheus 3 fails the scrape.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of a service. Each is declared with its name and its text.
pub struct Registry(prometheus::Registry);

impl Registry {
    /// The metrics that every service has: the version and the process's own.
    pub fn new() -> Result<Self> {
        let registry = Registry(prometheus::Registry::new());
        let build = registry.gauges("baletheus_build_info", "Version of baletheus.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        #[cfg(target_os = "linux")]
        registry.0.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(registry)
    }

    fn add<M: Collector + Clone + 'static>(&self, metric: Result<M>) -> Result<M> {
        let metric = metric?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub fn counter(&self, name: &str, about: &str) -> Result<IntCounter> {
        self.add(IntCounter::new(name, about))
    }

    /// A counter for each value of a label.
    pub fn counters(&self, name: &str, about: &str, label: &str) -> Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, about), &[label]))
    }

    pub fn gauge(&self, name: &str, about: &str) -> Result<Gauge> {
        self.add(Gauge::new(name, about))
    }

    /// A gauge for each set of values of these labels.
    pub fn gauges(&self, name: &str, about: &str, labels: &[&str]) -> Result<GaugeVec> {
        self.add(GaugeVec::new(Opts::new(name, about), labels))
    }

    /// A histogram with these upper bounds.
    pub fn histogram(&self, name: &str, about: &str, buckets: &[f64]) -> Result<Histogram> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, about).buckets(buckets.to_vec())))
    }

    /// All metrics, in Prometheus' text format.
    pub fn text(&self) -> String {
        TextEncoder::new().encode_to_string(&self.0.gather()).unwrap_or_default()
    }
}
