//! Baletheus finds every device of a balena fleet and keeps Prometheus' list of targets true.
//!
//! The road that a device takes:
//!
//! 1. [`balena`] asks the API for a page of devices, and knows what each answer means.
//! 2. [`device`] reads the page: each device typed, a broken one apart from its neighbours.
//! 3. [`target`] maps a device to target groups by the rules of the [`config`] and the [`tag`]s of
//!    the device: pure functions, every label declared once.
//! 4. [`inventory`] keeps the pages, so that what did not change costs nothing.
//! 5. [`registry`] replaces the target file, atomically, durably, and only when the list changed.
//! 6. [`discovery`] is the loop around it: fetch, map, write, wait. It knows nothing of HTTP, files
//!    or clocks; [`sidecar`] hands them in.
//!
//! Beside it, [`check`] walks the same road and then tries each target: [`connect`] opens the way, [`scrape`] asks for
//! the metrics.
//!
//! The other service, [`tunnel`], is Prometheus' own way to those of the targets that stand behind balena's VPN.

#![warn(missing_docs, clippy::pedantic)]
#![allow(clippy::must_use_candidate, clippy::missing_errors_doc)] // errors are told in the text

pub mod balena;
pub mod check;
pub mod cli;
pub mod config;
pub mod discovery;
pub mod logging;
pub mod net;
pub mod status;
pub mod tunnel;
