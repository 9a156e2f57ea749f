//! All tests that can run beside each other, as one program: it links once after a change. Tests that need a quiet machine
//! or Docker are programs beside this one: `tests/*.rs`.

mod alerts;
mod check;
mod dashboards;
mod demo;
mod disk;
mod faults;
mod faults_doc;
mod history;
mod lock;
mod mapping;
mod options;
mod prometheus;
mod properties;
mod readme;
mod recordings;
mod refresh;
mod shards;
mod status;
mod status_prometheus;
#[path = "../support/mod.rs"]
mod support;
mod tunnel;
mod vpn_recordings;
