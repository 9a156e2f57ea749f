//! The API client: what can be asked, and the bounds in size and time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Certificate;
use reqwest::blocking::Client as Http;
use reqwest::redirect::Policy;
use rustls::pki_types::CertificateDer;
use serde::Deserialize;

use super::failure::Failure;
use super::query::{self, Query};
use super::request::chain;
use crate::key::KeySource;
use crate::memory;
use crate::net::proxy::Proxies;
use crate::net::threads::{NoThread, Resolver};

/// The largest answer, unpacked, in bytes, where memory sets no lower bound. 5,030 devices came in 4.9 MB from a real server.
const MAX_ANSWER_SIZE: u64 = 64 << 20;
/// The share of the time-out that connecting may take.
const CONNECT_SHARE: f64 = 2.0 / 3.0;
/// The lowest bound of an answer, in bytes.
const MIN_ANSWER_SIZE: u64 = 1 << 20;
/// An answer may take this part of the memory limit: two can be there at once, each beside what is made from it.
const ANSWERS_IN_MEMORY: u64 = 8;
/// `whoami` must not delay the first list for long.
const WHOAMI_TIMEOUT: Duration = Duration::from_secs(10);
/// It takes at most this share of the time-out, and the first page has the rest.
const WHOAMI_SHARE: u32 = 4;

/// How the API is reached.
#[derive(Clone, Debug)]
pub struct Api {
    /// Base URL without a trailing slash.
    pub url: String,
    /// The key.
    pub key: KeySource,
    /// The proxies of the environment.
    pub proxies: Proxies,
    /// Root certificates beside the platform's.
    pub roots: Vec<CertificateDer<'static>>,
    /// For a whole answer with its body.
    pub timeout: Duration,
}

/// What the API answers to a conditional request.
#[derive(Debug)]
pub enum Answer {
    /// The content still has the `ETag` of the request.
    Unchanged,
    /// 200.
    Body {
        /// The `ETag` for the next request.
        etag: Option<String>,
        /// `{"d": [ … ]}`, where nothing is wrong.
        body: Vec<u8>,
    },
    /// The body is larger than an answer may be.
    TooLarge {
        /// The `ETag` for the next request.
        etag: Option<String>,
    },
}

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
    pub(super) http: Http,
    pub(super) api: Api,
    query: Query,
    pub(super) requests: Requests,
    /// For a whole answer: the time-out, unless less is left.
    limit: Duration,
    /// The largest answer, unpacked, in bytes.
    pub(super) max_answer: u64,
}

/// How many requests had which status; none counts those without an answer. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<Mutex<BTreeMap<Option<u16>, u64>>>);

impl Requests {
    /// The counts so far.
    pub fn counts(&self) -> BTreeMap<Option<u16>, u64> {
        self.lock().clone()
    }

    pub(super) fn count(&self, status: Option<u16>) {
        *self.lock().entry(status).or_default() += 1;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Option<u16>, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Makes a client and sends no request.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used, or a thread cannot be started. The text is for the user.
    pub fn new(api: Api, query: Query) -> Result<Self, String> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is installed already
        let http = Http::builder()
            .user_agent(concat!("baletheus/", env!("CARGO_PKG_VERSION")))
            // A redirect must not carry the key to another host.
            .redirect(Policy::none())
            // The server closes idle connections after 5 s.
            .pool_idle_timeout(Duration::from_secs(4))
            .pool_max_idle_per_host(1)
            // reqwest divides this among the addresses of a name, and bounds the whole connection with TLS by it: the last address
            // still has its time.
            .connect_timeout(api.timeout.mul_f64(CONNECT_SHARE))
            .no_proxy()
            .proxy(api.proxies.for_reqwest())
            .dns_resolver(Arc::new(Resolver::new()))
            .tls_certs_merge(api.roots.iter().filter_map(|root| Certificate::from_der(root).ok()))
            .build()
            .map_err(|error| {
                let tls = || format!("TLS: {}; is the package ca-certificates installed?", chain(&error).join(": "));
                NoThread::in_start(&error).unwrap_or_else(tls)
            })?;
        let max_answer = memory::limit()
            .map_or(MAX_ANSWER_SIZE, |limit| (limit / ANSWERS_IN_MEMORY).clamp(MIN_ANSWER_SIZE, MAX_ANSWER_SIZE));
        let limit = api.timeout;
        Ok(Client { http, api, query, requests: Requests::default(), limit, max_answer })
    }

    /// The API's base URL.
    pub fn url(&self) -> &str {
        &self.api.url
    }

    /// The time-out of a request.
    pub fn timeout(&self) -> Duration {
        self.api.timeout
    }

    /// The same client with less time for an answer.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Client { limit, ..self.clone() }
    }

    /// The counts of its requests.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
    }

    /// Asks for what discovery needs of up to `limit` devices with ids above `after`.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn page(&self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.get(&self.query.page(after, limit), etag, self.limit)
    }

    /// Asks for this much of up to `limit` of the same devices with ids above `after`.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn ask(&self, what: &str, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.get(&self.query.ask(what, after, limit), etag, self.limit)
    }

    /// Asks for up to `limit` releases that devices of the selected fleets run, with ids above `after`, and the labels of their
    /// services.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn releases(&self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.get(&self.query.releases(after, limit), etag, self.api.timeout)
    }

    /// Asks for the releases with these ids.
    ///
    /// # Errors
    /// There is no usable answer.
    pub fn releases_by_id(&self, ids: &[u64]) -> Result<Answer, Failure> {
        self.get(&query::releases_by_id(ids), None, self.api.timeout)
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
        let answer = self.get("/actor/v1/whoami", None, WHOAMI_TIMEOUT.min(self.api.timeout / WHOAMI_SHARE))?;
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
