//! The dashboards and the alerts ask for what is there: each query of each panel, variable, annotation and alert runs on a
//! real Prometheus, which scrapes a simulated fleet, the real sidecar and a real node_exporter, and returns data. Where nothing
//! is known, no panel shows that all is well.

mod answers;
mod data;
mod expected;
mod shape;
mod sights;
mod stack;
mod states;
