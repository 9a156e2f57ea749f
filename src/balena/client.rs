//! The client of the API: what it is asked with, and the counts of its requests.

use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use prometheus::IntCounterVec;
use reqwest::Certificate;
use reqwest::blocking::{Client as Http, ClientBuilder as Builder};
use reqwest::redirect::Policy;
use rustls::pki_types::CertificateDer;
use serde::Deserialize;

use super::answer;
use super::failure::{Failure, Reason};
use super::query::{Query, Request};
use super::source::{Actor, Fetched, Source};
use crate::key::KeySource;
use crate::liveness::Liveness;
use crate::net::cannot_start::CannotStart;
use crate::net::connector::no_client;
use crate::net::proxy::{Proxies, Proxy};
use crate::net::threads::Resolver;
use crate::net::{CONNECT_SHARE, USER_AGENT};

/// The status of a request without an answer, as it is counted.
pub const NO_ANSWER: &str = "none";
/// The most time for the question whose key it is, which must not hold up a refresh for long.
const WHOAMI_TIMEOUT: Duration = Duration::from_secs(10);

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

impl Api {
    /// The proxy on the way to it.
    pub fn proxy(&self) -> Option<Proxy> {
        self.proxies.find(&self.url.parse().ok()?)
    }
}

/// A client of the balena API, version 7. Clones share the connection, the key and the counts.
#[derive(Clone)]
pub struct Client {
    pub(super) http: Http,
    pub(super) api: Api,
    /// The largest answer, unpacked, in bytes.
    pub(super) max_answer: u64,
    query: Query,
    requests: Option<IntCounterVec>,
    liveness: Option<Arc<Liveness>>,
    /// Whether a cache that answers in the API's place was reported.
    pub(super) warned_of_age: Arc<Once>,
}

impl Client {
    /// Makes a client and sends no request.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used, or a thread cannot be started.
    pub fn new(api: Api, query: Query) -> Result<Self, CannotStart> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is installed already
        // All requests go to one host, so its proxy is found once.
        let proxy = api
            .proxy()
            .as_ref()
            .map(Proxy::for_reqwest)
            .transpose()
            .map_err(|error| no_client(&error.without_url()))?;
        let http = proxy
            .into_iter()
            .fold(Http::builder().no_proxy(), Builder::proxy)
            .user_agent(USER_AGENT)
            // A redirect must not carry the key to another host.
            .redirect(Policy::none())
            // The server closes idle connections after 5 s.
            .pool_idle_timeout(Duration::from_secs(4))
            // One for discovery and one for the state of the devices, which ask at the same time.
            .pool_max_idle_per_host(2)
            // reqwest divides this among the addresses of a name, and bounds the whole connection with TLS by it: the last address
            // still has its time.
            .connect_timeout(api.timeout.mul_f64(CONNECT_SHARE))
            .dns_resolver(Arc::new(Resolver::new()))
            .tls_certs_merge(api.roots.iter().filter_map(|root| Certificate::from_der(root).ok()))
            .build()
            .map_err(|error| no_client(&error))?;
        Ok(Client {
            http,
            api,
            query,
            requests: None,
            liveness: None,
            max_answer: answer::max_size(),
            warned_of_age: Arc::new(Once::new()),
        })
    }

    /// The API's base URL.
    pub fn url(&self) -> &str {
        &self.api.url
    }

    /// The time-out of a request.
    pub fn timeout(&self) -> Duration {
        self.api.timeout
    }

    /// Counts its requests from now on, by the status of their answer; [`NO_ANSWER`] is that of those without one.
    pub fn count_requests(&mut self, counter: IntCounterVec) {
        self.requests = Some(counter);
    }

    /// Announces the end of each request from now on. Clones that were made before do not.
    pub fn announce(&mut self, liveness: Arc<Liveness>) {
        self.liveness = Some(liveness);
    }

    /// Asks for a path, with one key and then with the next if the first is refused. The limit bounds both tries.
    fn get_within(&self, path: &str, etag: Option<&str>, limit: Duration) -> Result<Fetched, Failure> {
        let end = Instant::now() + limit;
        if let Some(liveness) = &self.liveness {
            liveness.expect(end);
        }
        let key = self.api.key.current();
        let answer = self.counted(|| self.exchange(&key, path, etag, limit));
        match answer {
            Err(Failure { reason: Reason::Unauthorized, .. }) if self.api.key.renew(&key) => {
                let left = end.saturating_duration_since(Instant::now());
                self.counted(|| self.exchange(&self.api.key.current(), path, etag, left))
            }
            Err(failure) if failure.reason == Reason::Unauthorized => Err(self.with_key_file(failure)),
            answer => answer,
        }
    }

    /// The failure of a refused key, with what is wrong with the key's file now, if anything is.
    fn with_key_file(&self, failure: Failure) -> Failure {
        let Some(trouble) = self.api.key.trouble() else { return failure };
        Failure { message: format!("{}; {trouble}", failure.message), ..failure }
    }

    fn counted(&self, request: impl FnOnce() -> Result<Fetched, Failure>) -> Result<Fetched, Failure> {
        let answer = request();
        let status = match &answer {
            Ok(Fetched::Unchanged) => Some(304),
            Ok(Fetched::Body { .. } | Fetched::TooLarge { .. }) => Some(200),
            Err(failure) => failure.status,
        };
        if let Some(requests) = &self.requests {
            requests.with_label_values(&[&status.map_or(NO_ANSWER.into(), |status| status.to_string())]).inc();
        }
        answer
    }
}

impl Source for Client {
    fn name(&self) -> &str {
        self.url()
    }

    fn get(&mut self, request: Request, etag: Option<&str>) -> Result<Fetched, Failure> {
        self.get_within(&self.query.path(request), etag, self.timeout())
    }

    fn owner(&mut self, spent: Duration) -> Result<Actor, Failure> {
        #[derive(Deserialize)]
        struct Whoami {
            #[serde(rename = "actorType")]
            actor: Actor,
        }
        let limit = WHOAMI_TIMEOUT.min(self.timeout().saturating_sub(spent));
        let answer = self.get_within("/actor/v1/whoami", None, limit)?;
        let Fetched::Body { body, .. } = answer else { return Ok(Actor::Unknown) };
        Ok(serde_json::from_slice(&body).map_or(Actor::Unknown, |Whoami { actor }| actor))
    }
}
