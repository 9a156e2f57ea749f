//! The binary under test, as Cargo built it for this test or benchmark.

use super::cloud::Cloud;
use super::sidecar::Sidecar;

pub const BINARY: &str = env!("CARGO_BIN_EXE_baletheus");

/// A sidecar of this cloud that refreshes every second.
pub fn sidecar(cloud: &Cloud) -> Sidecar {
    Sidecar::of(BINARY, cloud)
}
