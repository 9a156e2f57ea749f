//! The binary under test, as Cargo built it for this test or benchmark.

use super::cloud::Cloud;
use super::sidecar::Sidecar;

pub const BINARY: &str = env!("CARGO_BIN_EXE_baletheus");

/// A sidecar of this cloud that refreshes every second, without the request for labels of services: most tests look at the
/// requests for devices. `tests/it/services.rs` and the demo have both.
pub fn sidecar(cloud: &Cloud) -> Sidecar {
    Sidecar::of(BINARY, cloud).env("SERVICE_LABELS", "false")
}
