//! The tests that can run in parallel, as one program, so that a change links one program instead of twenty.
//! The tests that need a quiet machine or Docker are programs by themselves: `tests/*.rs`.

mod alerts;
mod check;
mod dashboards;
mod demo;
mod discovery_loop;
mod disk;
mod docs;
mod entrypoints;
mod example_exporter;
mod faults;
mod faults_doc;
mod hints;
mod history;
mod hostile_names;
mod installs;
mod lan;
mod lock;
mod log_queue;
mod mapping;
mod network;
mod operating_system;
mod options;
mod own_tags;
mod page;
mod prometheus;
mod properties;
mod quiet;
mod readme;
mod recordings;
mod refresh;
mod retry_after;
mod rule_recipes;
mod services;
mod shards;
mod shipping;
mod status;
mod status_prometheus;
mod status_security;
mod stored;
#[path = "../support/mod.rs"]
pub mod support;
mod tunnel;
mod tunnel_comparison;
mod tunnel_limits;
mod typing_mistakes;
mod vpn_recordings;
