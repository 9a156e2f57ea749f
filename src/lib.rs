//! Baletheus finds every device of a balena fleet and keeps Prometheus' target file up to date.
//!
//! The road of a device: **API → device → targets → file**.
//!
//! 1. [`balena`] asks the API for a page of devices and knows what each answer means.
//! 2. [`discovery`] keeps the pages, maps each device to target groups, replaces the target file when the list changes, and
//!    waits for the next refresh.
//!
//! `device_state` asks what the API knows of devices beside the list, and `status` serves it over HTTP, with the list and the program's
//! own metrics. Two more commands: `tunnel` is Prometheus' proxy to devices in balena's VPN, and `check` tries each target and
//! reports why one does not answer. [`net`] has the connections that they share.
//!
//! [`cli`] is the front door: [`config`] reads the options of each command, and the command runs.

#![warn(clippy::pedantic)]
#![allow(clippy::must_use_candidate, clippy::missing_errors_doc)] // where the type of the error says it all

mod backoff;
pub mod balena;
pub mod check;
pub mod cli;
pub mod config;
mod device_state;
pub mod discovery;
mod early_messages;
pub mod key_renewal;
pub mod liveness;
pub mod log_queue;
mod logging;
mod memory;
mod metrics_registry;
pub mod net;
pub mod secret;
mod signals;
mod status;
mod systemd;
mod text;
mod tunnel;
mod values;
mod word_enum;
