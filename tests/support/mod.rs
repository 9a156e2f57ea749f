//! What tests, the demo and the benchmarks share: a simulated balenaCloud and VPN, and real programs around the sidecar.
//!
//! `tests/it` declares all of it. Each other program declares the modules that it uses, as public ones, since it uses a part
//! of each.

pub mod alerts;
pub mod binary;
pub mod cloud;
pub mod doc;
pub mod executable;
pub mod exporter;
pub mod fakes;
pub mod fleet;
pub mod grafana;
pub mod limited;
pub mod moments;
pub mod node_exporter;
pub mod odata;
pub mod page;
pub mod port;
pub mod prometheus;
pub mod raspberry;
pub mod recording;
pub mod rules;
pub mod scenarios;
pub mod sidecar;
pub mod status;
pub mod tls;
pub mod tools;
pub mod vpn;
