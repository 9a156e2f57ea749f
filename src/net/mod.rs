//! The network: connections to targets, balena's VPN proxy, and the servers of the program.

pub(crate) mod access;
mod cannot_start;
mod connector;
mod counted_tcp;
mod env_proxies;
mod http_connect;
pub(crate) mod scrape_client;
mod scrape_error;
pub(crate) mod server;
pub(crate) mod threads;
mod vpn;

pub(crate) use access::Guard;
pub(crate) use cannot_start::CannotStart;
pub use connector::Stream;
pub(crate) use connector::{CONNECT_SHARE, Connector, Duplex, is_untrusted, no_client, trust_hint};
pub(crate) use counted_tcp::Traffic;
pub use env_proxies::{EnvProxies, EnvProxy};
pub(crate) use scrape_client::{DEFAULT_TIMEOUT, Deadline, MAX_HEAD, TIMEOUT_SHARE, USER_AGENT, check_destination};
pub use scrape_error::{ScrapeError, ScrapeReason};
pub(crate) use threads::{NoThread, Resolver};
pub(crate) use vpn::{Vpn, unreachable_hint};
