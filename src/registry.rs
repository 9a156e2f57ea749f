//! What the metrics of both services have in common: their registry, and their text.

use prometheus::core::Collector;
use prometheus::{IntGaugeVec, Opts, Registry, Result, TextEncoder};

/// The content type of metrics, without which Prometheus 3 fails the scrape.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A registry with the metrics that both services have: the version and the process's own.
pub fn new() -> Result<Registry> {
    let registry = Registry::new();
    let build = Opts::new("baletheus_build_info", "Version of baletheus.");
    let build = register(&registry, IntGaugeVec::new(build, &["version"]))?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(registry)
}

/// Adds a metric.
pub fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: Result<M>) -> Result<M> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// All metrics, in Prometheus' text format.
pub fn text(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap_or_default()
}
