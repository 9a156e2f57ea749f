//! The network: connections to targets, balena's VPN proxy, and the servers of the program.

pub(crate) mod cannot_start;
pub mod connector;
pub mod env_proxies;
pub(crate) mod guard;
mod http_connect;
pub(crate) mod scrape;
pub mod scrape_error;
pub(crate) mod server;
pub(crate) mod threads;
pub(crate) mod traffic;
pub(crate) mod vpn;

/// What the program calls itself in its requests.
pub(crate) const USER_AGENT: &str = concat!("baletheus/", env!("CARGO_PKG_VERSION"));

/// The share of the time for an answer that may pass in connecting. It is divided evenly among the addresses of a name, so the
/// last of four has a third of the time left for TLS and for the answer.
pub(crate) const CONNECT_SHARE: f64 = 2.0 / 3.0;

/// The port of a URL that names none.
pub(crate) fn default_port(scheme: &str) -> u16 {
    if scheme == "https" { 443 } else { 80 }
}
