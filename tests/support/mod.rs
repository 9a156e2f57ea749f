//! What the tests and the demo have in common: a simulated balenaCloud, and real programs around the sidecar.
#![allow(dead_code)] // each test uses some of it

pub mod alerts;
pub mod cloud;
pub mod doc;
pub mod exporter;
pub mod fleet;
pub mod grafana;
pub mod moments;
pub mod node_exporter;
pub mod odata;
pub mod page;
pub mod prometheus;
pub mod recording;
pub mod rules;
pub mod sidecar;
pub mod tls;
pub mod tools;
pub mod vpn;
