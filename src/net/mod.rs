//! The network: connections to targets, balena's VPN proxy, and the servers of the program.

mod connections;
pub mod connector;
mod http_connect;
pub(crate) mod interfaces;
pub mod proxy;
mod records;
pub(crate) mod scrape;
pub(crate) mod scrape_error;
pub mod server;
pub(crate) mod threads;
pub(crate) mod traffic;
pub(crate) mod vpn;
