//! The network: ways out, and what listens.

pub mod connector;
pub mod server;
