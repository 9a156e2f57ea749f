//! The binary under test: the one that Cargo built for this test or benchmark, or the one that `BALETHEUS_BINARY` names.
//!
//! The variable runs the same tests against any other build: a release binary, one in an image, one of another processor under
//! an emulator (`scripts/check/arm`).

use std::env;
use std::path::absolute;

use super::cloud::Cloud;
use super::sidecar::Sidecar;

/// The absolute path of the binary under test. The tests run it in other folders than their own.
pub fn path() -> String {
    let Some(path) = env::var_os("BALETHEUS_BINARY") else { return env!("CARGO_BIN_EXE_baletheus").to_owned() };
    let path = absolute(path).expect("BALETHEUS_BINARY is a path");
    path.into_os_string().into_string().expect("BALETHEUS_BINARY is UTF-8")
}

/// A sidecar of this cloud that refreshes every second, and else has the defaults of users.
pub fn sidecar(cloud: &Cloud) -> Sidecar {
    Sidecar::of(path(), cloud)
}
