//! What the HTTP endpoints of both services have in common.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use hyper::body::Body;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use prometheus::core::Collector;
use prometheus::{IntGaugeVec, Opts, Registry, TextEncoder};

/// The type of text for people.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// The type of metrics, which Prometheus 3 insists on.
pub const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Reads `host:port`, or `:port` for all interfaces: the first address that can be had counts.
pub fn addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    // where there is no IPv6, the second
    let all = text.strip_prefix(':').map(|port| ["[::]", "0.0.0.0"].map(|host| format!("{host}:{port}")));
    let found: Result<Vec<_>, _> = match &all {
        Some(all) => all.iter().map(|text| text.parse()).collect(),
        None => return text.to_socket_addrs().map(Iterator::collect).map_err(|_| "not host:port or :port".into()),
    };
    found.map_err(|_| "not host:port or :port".into())
}

/// Listens at the first of these addresses that can be had, for use with tokio; the error is for the user.
pub fn listen(addresses: &[SocketAddr]) -> Result<TcpListener, String> {
    let start = || -> io::Result<TcpListener> {
        let listener = TcpListener::bind(addresses)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    start().map_err(|error| format!("cannot listen on {addresses:?}: {error}"))
}

/// An answer of this type.
pub fn reply<B: Body>(status: StatusCode, kind: &'static str, body: impl Into<B>) -> Response<B> {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// Metrics of any process of ours; its own come to them.
pub fn registry() -> prometheus::Result<Registry> {
    let registry = Registry::new();
    let build = Opts::new("baletheus_build_info", "Version of baletheus.");
    let build = register(&registry, IntGaugeVec::new(build, &["version"]))?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(registry)
}

/// Adds a metric.
pub fn register<M: Collector + Clone + 'static>(
    registry: &Registry, metric: prometheus::Result<M>,
) -> prometheus::Result<M> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// All of them, as Prometheus reads them.
pub fn metrics(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap_or_default()
}
