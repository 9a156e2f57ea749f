//! What answers requests, how the API is reached, and what its answers are.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde::Deserialize;

use super::failure::Failure;
use super::query::Request;
use crate::key_renewal::KeySource;
use crate::net::{EnvProxies, EnvProxy};

/// The API of balenaCloud.
pub const BALENA_CLOUD: &str = "https://api.balena-cloud.com";

#[derive(Clone, Debug)]
pub struct Api {
    /// Base URL without a trailing slash.
    pub url: String,
    pub key: KeySource,
    pub proxies: EnvProxies,
    /// Root certificates beside the platform's.
    pub roots: Vec<CertificateDer<'static>>,
    /// For a whole answer with its body.
    pub timeout: Duration,
}

impl Api {
    pub fn proxy(&self) -> Option<EnvProxy> {
        self.proxies.find(&self.url.parse().ok()?)
    }
}

/// What the API answers to a conditional request.
#[derive(Debug)]
pub enum Fetched {
    /// The content still has the `ETag` of the request.
    Unchanged,
    Body {
        /// The `ETag` for the next request.
        etag: Option<String>,
        /// `{"d": [ … ]}`, as far as the API keeps to its form.
        body: Vec<u8>,
        /// How many times this body would fit into the largest answer.
        room: usize,
    },
    /// The body is larger than an answer may be.
    TooLarge {
        /// The `ETag` for the next request.
        etag: Option<String>,
    },
}

/// Answers requests: the API, or what takes its place in a test.
pub trait Source {
    fn name(&self) -> &str;

    /// Asks, unless the answer still has this `ETag`.
    fn get(&mut self, request: Request, etag: Option<&str>) -> Result<Fetched, Failure>;

    /// Asks about the key, within what is left of the time-out: `spent` of it is gone already.
    fn ask(&mut self, request: Request, spent: Duration) -> Result<Fetched, Failure>;
}

/// Whose key it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// A user's, as a named API key is.
    User,
    /// A device's own: it shows that device only, or nothing.
    Device,
    /// A provisioning key, which cannot read devices.
    Application,
    #[serde(other)]
    Unknown,
}
