//! One request: it is sent with the key, its answer is read within bounds, and a failure is explained.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use reqwest::blocking::{Client as Http, ClientBuilder as Builder, Response};
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{Certificate, StatusCode, Url};
use rustls::pki_types::CertificateDer;

use super::failure::{Failure, Reason};
use crate::backoff;
use crate::cannot_start::CannotStart;
use crate::key::{ApiKey, KeySource};
use crate::memory;
use crate::net::connector::{no_client, trust_hint};
use crate::net::proxy::{Proxies, Proxy};
use crate::net::threads::{NoThread, Resolver};
use crate::net::{CONNECT_SHARE, USER_AGENT};
use crate::text::causes;

/// The largest answer, unpacked, in bytes, where memory sets no lower bound. 5,030 devices came in 4.9 MB from a real server.
const MAX_ANSWER_SIZE: u64 = 64 << 20;
/// The lowest bound of an answer, in bytes.
const MIN_ANSWER_SIZE: u64 = 1 << 20;
/// An answer may take this part of the memory limit: two can be there at once, each beside what is made from it.
const ANSWERS_IN_MEMORY: u64 = 8;
/// Bytes of an error's body that are read for the message.
const EXCERPT_SIZE: u64 = 800;

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
    fn proxy(&self) -> Option<&Proxy> {
        let url = Url::parse(&self.url).ok()?;
        self.proxies.find(url.scheme(), url.host_str()?, url.port())
    }
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

/// The number of requests by the status of their answer, with none for those without an answer. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<Mutex<BTreeMap<Option<u16>, u64>>>);

impl Requests {
    /// The counts so far.
    pub fn counts(&self) -> BTreeMap<Option<u16>, u64> {
        self.lock().clone()
    }

    fn count(&self, status: Option<u16>) {
        *self.lock().entry(status).or_default() += 1;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Option<u16>, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends requests. Clones share the connection, the key and the counts.
#[derive(Clone)]
pub struct Sender {
    http: Http,
    /// How the API is reached.
    pub api: Api,
    /// The counts of its requests.
    pub requests: Requests,
    /// The largest answer, unpacked, in bytes.
    max_answer: u64,
}

impl Sender {
    /// Sends no request yet.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used, or a thread cannot be started.
    pub fn new(api: Api) -> Result<Self, CannotStart> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is installed already
        // All requests go to one host, so its proxy is found once.
        let proxy = api.proxy().map(Proxy::for_reqwest).transpose().map_err(|error| no_client(&error.without_url()))?;
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
        let max_answer = memory::limit()
            .map_or(MAX_ANSWER_SIZE, |limit| (limit / ANSWERS_IN_MEMORY).clamp(MIN_ANSWER_SIZE, MAX_ANSWER_SIZE));
        Ok(Sender { http, api, requests: Requests::default(), max_answer })
    }

    /// Asks for a path, with one key and then with the next if the first is refused. The time-out bounds both tries.
    pub fn get(&self, path: &str, etag: Option<&str>, timeout: Duration) -> Result<Answer, Failure> {
        let end = Instant::now() + timeout;
        let key = self.api.key.current();
        let answer = self.counted(|| self.try_with(&key, path, etag, timeout));
        match answer {
            Err(Failure { reason: Reason::Unauthorized, .. }) if self.api.key.renew(&key) => {
                let left = end.saturating_duration_since(Instant::now());
                self.counted(|| self.try_with(&self.api.key.current(), path, etag, left))
            }
            answer => answer,
        }
    }

    fn counted(&self, request: impl FnOnce() -> Result<Answer, Failure>) -> Result<Answer, Failure> {
        let answer = request();
        let status = match &answer {
            Ok(Answer::Unchanged) => Some(304),
            Ok(Answer::Body { .. } | Answer::TooLarge { .. }) => Some(200),
            Err(failure) => failure.status,
        };
        self.requests.count(status);
        answer
    }

    fn try_with(&self, key: &ApiKey, path: &str, etag: Option<&str>, timeout: Duration) -> Result<Answer, Failure> {
        let response = self.send(key, path, etag, timeout)?;
        let new_etag = text_of(response.headers(), &ETAG);
        match response.status() {
            StatusCode::NOT_MODIFIED if etag.is_some() => Ok(Answer::Unchanged),
            StatusCode::OK => Ok(match self.body(response)? {
                Some(body) => {
                    let room = self.max_answer / (body.len() as u64).max(1);
                    Answer::Body { etag: new_etag, body, room: usize::try_from(room).unwrap_or(usize::MAX) }
                }
                None => Answer::TooLarge { etag: new_etag },
            }),
            _ => Err(self.refused(key, response)),
        }
    }

    fn send(&self, key: &ApiKey, path: &str, etag: Option<&str>, timeout: Duration) -> Result<Response, Failure> {
        let url = Url::parse(&format!("{}{path}", self.api.url))
            .map_err(|error| Failure::new(Reason::BadAnswer, format!("cannot ask {}: {error}", self.api.url)))?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", key.secret()))
            .map_err(|_| Failure::new(Reason::Unauthorized, "the API key cannot be sent: check API_KEY"))?;
        bearer.set_sensitive(true);
        // The time-out of a request, unlike the client's, bounds the whole answer and not each read of it.
        let mut request = self.http.get(url).header(AUTHORIZATION, bearer).timeout(timeout);
        if let Some(etag) = etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        request.send().map_err(|error| self.broken(error))
    }

    /// The body, or none if it is too large.
    fn body(&self, response: Response) -> Result<Option<Vec<u8>>, Failure> {
        let mut body = Vec::new();
        match response.take(self.max_answer + 1).read_to_end(&mut body) {
            Ok(_) => Ok((body.len() as u64 <= self.max_answer).then_some(body)),
            Err(error) => Err(match error.downcast::<reqwest::Error>() {
                Ok(error) => self.broken(error),
                Err(error) => {
                    Failure::new(Reason::BrokenAnswer, format!("the answer of {} broke off: {error}", self.api.url))
                }
            }),
        }
    }

    /// The failure of a request that has no answer, or a part of one.
    fn broken(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        let chain = chain(&error);
        let (url, cause) = (&self.api.url, chain.last().map_or("", String::as_str));
        let (reason, message) = if error.is_timeout() {
            let timeout = humantime::format_duration(self.api.timeout);
            (Reason::Timeout, format!("no whole answer from {url}{} within {timeout}", self.through()))
        } else if cause.contains("certificate") {
            (Reason::Tls, format!("cannot trust {url}: {cause}; {}", trust_hint(cause)))
        } else if let Some(no_thread) = NoThread::find(&error) {
            (Reason::Connect, format!("cannot reach {url}: {no_thread}"))
        } else if error.is_connect() {
            (Reason::Connect, format!("cannot reach {url}{}: {cause}", self.through()))
        } else {
            (Reason::BrokenAnswer, format!("the answer of {url} broke off: {cause}"))
        };
        Failure { causes: chain.join(": "), ..Failure::new(reason, message) }
    }

    /// Names the proxy on the way to the API, if there is one.
    fn through(&self) -> String {
        self.api.proxy().map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"))
    }

    /// An answer that is not the one asked for.
    fn refused(&self, key: &ApiKey, response: Response) -> Failure {
        let (status, url) = (response.status(), &self.api.url);
        let (reason, hint) = Reason::of_status(status.as_u16());
        let header = |name| text_of(response.headers(), name);
        let retry_after = header(&RETRY_AFTER)
            .and_then(|value| backoff::retry_after(&value, header(&DATE).as_deref(), SystemTime::now()));
        let message = format!("{url} answers {status}{}: {hint}", excerpt(key, response));
        Failure { retry_after, status: Some(status.as_u16()), ..Failure::new(reason, message) }
    }
}

/// The beginning of a text answer, or the place that a redirect leads to. If the server echoes the key, the excerpt ends before it:
/// enough of the answer is read that the key is never cut in two.
fn excerpt(key: &ApiKey, response: Response) -> String {
    let location = text_of(response.headers(), &LOCATION).map(|location| format!("to {location}"));
    let is_html = text_of(response.headers(), &CONTENT_TYPE).is_some_and(|kind| kind.contains("html"));
    let mut body = Vec::new();
    let read = response.take(EXCERPT_SIZE + key.secret().len() as u64).read_to_end(&mut body);
    let body = if is_html || read.is_err() { "".into() } else { String::from_utf8_lossy(&body) };
    let text = location.as_deref().unwrap_or(&body).split(key.secret()).next().unwrap_or_default();
    let text: String = text.chars().take(200).collect();
    if text.trim().is_empty() { String::new() } else { format!(", {}", text.trim()) }
}

/// An error and its causes.
fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    causes(error).map(ToString::to_string).collect()
}

fn text_of(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
