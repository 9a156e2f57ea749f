//! The API client: what can be asked.

use std::time::Duration;

use serde::Deserialize;

use super::failure::Failure;
use super::query::{self, Query};
use super::request::{Answer, Api, Requests, Sender};
use crate::cannot_start::CannotStart;

/// The limit for `whoami`, which must not delay the first list for long.
const WHOAMI_TIMEOUT: Duration = Duration::from_secs(10);
/// `whoami` takes at most the time-out divided by this. The first page has the rest.
const WHOAMI_DIVISOR: u32 = 4;

/// Whose key it is, by `GET /actor/v1/whoami`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A user's, as a named API key is.
    User,
    /// A device's own: it shows that device only, or nothing.
    Device,
    /// A provisioning key, which cannot read devices.
    Application,
    /// Anything else.
    Unknown,
}

/// A client of the balena API, version 7. Clones share the connection, the key and the counts.
#[derive(Clone)]
pub struct Client {
    sender: Sender,
    query: Query,
    /// For a whole answer: the time-out, or what is left of it.
    limit: Duration,
}

impl Client {
    /// Makes a client and sends no request.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used, or a thread cannot be started.
    pub fn new(api: Api, query: Query) -> Result<Self, CannotStart> {
        let limit = api.timeout;
        Ok(Client { sender: Sender::new(api)?, query, limit })
    }

    /// The API's base URL.
    pub fn url(&self) -> &str {
        &self.sender.api.url
    }

    /// The time-out of a request.
    pub fn timeout(&self) -> Duration {
        self.sender.api.timeout
    }

    /// The same client with less time for an answer.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Client { limit, ..self.clone() }
    }

    /// The counts of its requests.
    pub fn requests(&self) -> Requests {
        self.sender.requests.clone()
    }

    /// Asks for what discovery needs of up to `limit` devices with ids above `after`.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn page(&self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.sender.get(&self.query.page(after, limit), etag, self.limit)
    }

    /// Asks for `what`, a `$select` with or without an `$expand`, of up to `limit` of the same devices with ids above `after`.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn ask(&self, what: &str, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.sender.get(&self.query.ask(what, after, limit), etag, self.limit)
    }

    /// Asks for up to `limit` releases that devices of the selected fleets run, with ids above `after`, and the labels of their
    /// services.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn releases(&self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.sender.get(&self.query.releases(after, limit), etag, self.sender.api.timeout)
    }

    /// Asks for the releases with these ids.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn releases_by_id(&self, ids: &[u64]) -> Result<Answer, Failure> {
        self.sender.get(&query::releases_by_id(ids), None, self.sender.api.timeout)
    }

    /// Asks whose key it is.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn whoami(&self) -> Result<Actor, Failure> {
        #[derive(Deserialize)]
        struct Whoami {
            #[serde(rename = "actorType")]
            kind: String,
        }
        let limit = WHOAMI_TIMEOUT.min(self.timeout() / WHOAMI_DIVISOR);
        let answer = self.sender.get("/actor/v1/whoami", None, limit)?;
        let Answer::Body { body, .. } = answer else { return Ok(Actor::Unknown) };
        let kind = serde_json::from_slice(&body).map_or(String::new(), |Whoami { kind }| kind);
        Ok(match kind.as_str() {
            "user" => Actor::User,
            "device" => Actor::Device,
            "application" => Actor::Application,
            _ => Actor::Unknown,
        })
    }
}
