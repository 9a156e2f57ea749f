//! One HTTP request with the key and `If-None-Match`, and its answer: read within a bound of time and size, or a failure that is
//! explained.

use std::error::Error;
use std::io::{self, Read};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant, SystemTime};

use flate2::read::MultiGzDecoder;
use reqwest::blocking::{Client, ClientBuilder, RequestBuilder, Response};
use reqwest::header::{
    ACCEPT_ENCODING, AGE, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, DATE, ETAG, HeaderMap,
    HeaderName, HeaderValue, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{Certificate, StatusCode, Url};
use tokio::runtime::Builder;

use super::failure::{Failure, Reason};
use super::source::{Api, Fetched};
use crate::backoff;
use crate::memory;
use crate::net::{
    CONNECT_SHARE, CannotStart, Connector, Deadline, EnvProxy, NoThread, Resolver, ScrapeError, ScrapeReason,
    USER_AGENT, no_client, trust_hint,
};
use crate::secret::Secret;
use crate::text::causes;

/// The largest answer, unpacked, in bytes, where memory sets no lower bound. 5,030 devices came in 4.9 MB from a real server.
const MAX_SIZE: u64 = 64 << 20;
/// The lowest bound of an answer, in bytes.
const MIN_SIZE: u64 = 1 << 20;
/// An answer may take this part of the memory limit: two can be there at once, each beside what is made from it.
const ANSWERS_IN_MEMORY: u64 = 8;
/// Bytes of an error's body that are read for the message.
const EXCERPT_SIZE: u64 = 800;
/// The cause that reqwest gives where a proxy refuses to connect to a host.
const PROXY_REFUSES: &str = "tunnel error: unsuccessful";
/// The limit for asking the proxy for the status with which it refuses.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer that a cache has kept for longer, in seconds, is not the state of now.
const MAX_AGE: u64 = 3600;

/// Sends requests, and reads their answers. Clones share what it keeps.
#[derive(Clone)]
pub struct ApiConnection {
    http: Client,
    pub api: Api,
    /// The largest answer, unpacked, in bytes.
    max_size: u64,
    /// Whether a cache that answers in the API's place was reported.
    warned_of_age: Arc<Once>,
}

impl ApiConnection {
    /// Sends no request.
    pub fn new(api: Api) -> Result<Self, CannotStart> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is installed already
        // All requests go to one host, so its proxy is found once.
        let proxy = api
            .proxy()
            .as_ref()
            .map(EnvProxy::for_reqwest)
            .transpose()
            .map_err(|error| no_client(&error.without_url()))?;
        let http = proxy
            .into_iter()
            .fold(Client::builder().no_proxy(), ClientBuilder::proxy)
            .user_agent(USER_AGENT)
            // A redirect must not carry the key to another host.
            .redirect(Policy::none())
            // The server closes idle connections after 5 s.
            .pool_idle_timeout(Duration::from_secs(4))
            // One for discovery and one for the state of the devices, which ask at the same time.
            .pool_max_idle_per_host(2)
            // reqwest divides this among the addresses of a name, and bounds the whole connection with TLS by it: the last
            // address still has its time.
            .connect_timeout(api.timeout.mul_f64(CONNECT_SHARE))
            .dns_resolver(Arc::new(Resolver::new()))
            .tls_certs_merge(api.roots.iter().filter_map(|root| Certificate::from_der(root).ok()))
            .build()
            .map_err(|error| no_client(&error))?;
        let max_size = memory::bound(ANSWERS_IN_MEMORY, MIN_SIZE, MAX_SIZE);
        Ok(ApiConnection { http, api, max_size, warned_of_age: Arc::new(Once::new()) })
    }

    /// Sends a request, and reads its answer within this time.
    pub fn exchange(&self, key: &Secret, path: &str, etag: Option<&str>, limit: Duration) -> Result<Fetched, Failure> {
        let response = self.send(key, path, etag, limit)?;
        let new_etag = header(response.headers(), &ETAG);
        self.warn_about_age(response.headers());
        match response.status() {
            StatusCode::NOT_MODIFIED if etag.is_some() => Ok(Fetched::Unchanged),
            StatusCode::OK => Ok(match self.body(response, limit)? {
                Some(body) => {
                    let room = self.max_size / (body.len() as u64).max(1);
                    Fetched::Body { etag: new_etag, body, room: usize::try_from(room).unwrap_or(usize::MAX) }
                }
                None => Fetched::TooLarge { etag: new_etag },
            }),
            _ => Err(self.refused(key, response)),
        }
    }

    fn send(&self, key: &Secret, path: &str, etag: Option<&str>, limit: Duration) -> Result<Response, Failure> {
        let url = Url::parse(&format!("{}{path}", self.api.url))
            .map_err(|error| Failure::new(Reason::BadAnswer, format!("cannot ask {}: {error}", self.api.url)))?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", key.reveal()))
            .map_err(|_| Failure::new(Reason::Unauthorized, "the API key cannot be sent: check API_KEY"))?;
        bearer.set_sensitive(true);
        let mut request = self.http.get(url).header(AUTHORIZATION, bearer);
        request = request.header(ACCEPT_ENCODING, "gzip").header(CACHE_CONTROL, "no-cache");
        if let Some(etag) = etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        let end = Instant::now() + limit;
        // The time-out of a request, unlike the client's, bounds the whole answer and not each read of it.
        let attempt = |request: RequestBuilder| request.timeout(end.saturating_duration_since(Instant::now())).send();
        let again = request.try_clone();
        let mut sent = attempt(request);
        // The server may have closed a kept connection while this request was on its way.
        if let (Err(error), Some(again)) = (&sent, again)
            && has_broken(error)
        {
            log::debug!("the connection to {} broke, and the request is sent again: {error}", self.api.url);
            sent = attempt(again);
        }
        sent.map_err(|error| self.broken(error, limit))
    }

    /// A cache between here and the API may hide what changes there.
    fn warn_about_age(&self, headers: &HeaderMap) {
        let age = header(headers, &AGE).and_then(|age| age.trim().parse().ok()).unwrap_or_default();
        if age > MAX_AGE {
            self.warned_of_age.call_once(|| {
                let age = humantime::format_duration(Duration::from_secs(age));
                let url = &self.api.url;
                log::warn!("{url} is answered by a cache, from {age} ago (Age): let the cache pass these requests on");
            });
        }
    }

    /// The body, or none if it is too large.
    fn body(&self, response: Response, limit: Duration) -> Result<Option<Vec<u8>>, Failure> {
        let mut body = Vec::new();
        let unpacked = unpacked(response).map_err(|coding| {
            let coding: String = coding.chars().take(40).collect();
            let why = format!("answers in the coding {coding:?}, which was not asked for: does a proxy change it?");
            Failure::new(Reason::BadAnswer, format!("{} {why}", self.api.url))
        })?;
        match unpacked.take(self.max_size + 1).read_to_end(&mut body) {
            Ok(_) => Ok((body.len() as u64 <= self.max_size).then_some(body)),
            Err(error) => Err(match error.downcast::<reqwest::Error>() {
                Ok(error) => self.broken(error, limit),
                Err(error) => {
                    Failure::new(Reason::BrokenAnswer, format!("the answer of {} broke off: {error}", self.api.url))
                }
            }),
        }
    }

    /// The failure of a request that has no answer, or a part of one.
    fn broken(&self, error: reqwest::Error, limit: Duration) -> Failure {
        let error = error.without_url();
        let chain: Vec<_> = causes(&error).map(ToString::to_string).collect();
        let (url, cause) = (&self.api.url, chain.last().map_or("", String::as_str));
        let (reason, message) = if error.is_timeout() {
            let limit =
                humantime::format_duration(Duration::from_millis(limit.as_millis().try_into().unwrap_or(u64::MAX)));
            (Reason::Timeout, format!("no whole answer from {url}{} within {limit}", self.through()))
        } else if cause.contains("certificate") {
            (Reason::Tls, format!("cannot trust {url}: {cause}; {}", trust_hint(cause)))
        } else if let Some(no_thread) = NoThread::find(&error) {
            (Reason::Connect, format!("cannot reach {url}: {no_thread}"))
        } else if error.is_builder() {
            let (reason, hint) = Reason::of_status(StatusCode::URI_TOO_LONG.as_u16());
            (reason, format!("cannot ask {url}: {hint}"))
        } else if cause.contains("InvalidContentType") || cause == "tls handshake eof" {
            (Reason::Tls, format!("cannot reach {url}{}: {cause}; is https spoken on this port?", self.through()))
        } else if cause == PROXY_REFUSES
            && let Some(refusal) = self.proxy_refusal()
        {
            (
                Reason::Connect,
                format!("cannot reach {url}: {refusal}; does it allow this host? NO_PROXY excludes one from it"),
            )
        } else if error.is_connect() {
            (Reason::Connect, format!("cannot reach {url}{}: {cause}", self.through()))
        } else if cause.contains("invalid HTTP version") && url.starts_with("http:") {
            (Reason::BrokenAnswer, format!("the answer of {url} is not HTTP; does it want https?"))
        } else {
            (Reason::BrokenAnswer, format!("the answer of {url} broke off: {cause}"))
        };
        Failure { causes: chain.join(": "), ..Failure::new(reason, message) }
    }

    /// What the proxy answers: it is asked once more, since reqwest does not say it.
    fn proxy_refusal(&self) -> Option<ScrapeError> {
        let connector = Connector::new(self.api.roots.clone(), self.api.proxies.clone()).ok()?;
        let runtime = Builder::new_current_thread().enable_all().build().ok()?;
        let url = self.api.url.parse().ok()?;
        let deadline = Deadline::after(REFUSAL_TIMEOUT.min(self.api.timeout));
        let opened = runtime.block_on(deadline.wait(connector.open(&url, deadline)));
        opened.flatten().err().filter(|error| error.reason == ScrapeReason::Proxy)
    }

    /// Names the proxy on the way to the API, if there is one.
    fn through(&self) -> String {
        self.api.proxy().map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"))
    }

    /// An answer that is not the one asked for.
    fn refused(&self, key: &Secret, response: Response) -> Failure {
        let (status, url) = (response.status(), &self.api.url);
        let (reason, mut hint) = Reason::of_status(status.as_u16());
        if reason == Reason::Forbidden && is_html(response.headers()) {
            hint = "a web firewall or a proxy answers, not balena's API: let it pass these requests";
        }
        let value = |name| header(response.headers(), name);
        let retry_after = value(&RETRY_AFTER)
            .and_then(|wait| backoff::retry_after(&wait, value(&DATE).as_deref(), SystemTime::now()));
        let message = format!("{url} answers {status}{}: {hint}", excerpt(key, response));
        Failure { retry_after, status: Some(status.as_u16()), ..Failure::new(reason, message) }
    }
}

/// The beginning of a text answer, or the place that a redirect leads to. If the server echoes the key, the excerpt ends before
/// it: enough of the answer is read that the key is never cut in two. An answer about the key is not shown, since it may have the
/// key in another form.
fn excerpt(key: &Secret, response: Response) -> String {
    if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return String::new();
    }
    let location = header(response.headers(), &LOCATION);
    let location = location.map(|location| format!("to {}", without_secrets(&location)));
    let is_html = is_html(response.headers());
    let mut body = Vec::new();
    let most = EXCERPT_SIZE + key.reveal().len() as u64;
    let is_read = unpacked(response).is_ok_and(|unpacked| unpacked.take(most).read_to_end(&mut body).is_ok());
    let body = if is_html || !is_read { "".into() } else { String::from_utf8_lossy(&body) };
    let text = location.as_deref().unwrap_or(&body).split(key.reveal()).next().unwrap_or_default();
    let text: String = text.chars().take(200).collect();
    if text.trim().is_empty() { String::new() } else { format!(", {}", text.trim()) }
}

/// Where a redirect leads, without its user, password and query: they may be secrets.
fn without_secrets(location: &str) -> String {
    let place = location.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = place.split_once("//") else { return place.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!("{scheme}//{host}{path}")
}

/// Whether a connection broke before an answer began, as an idle one does that the server closes.
fn has_broken(error: &reqwest::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let is_closed = |error: &(dyn Error + 'static)| {
        let http = error.downcast_ref::<hyper::Error>();
        let system = error.downcast_ref::<io::Error>().map(io::Error::kind);
        http.is_some_and(|error| error.is_incomplete_message() || error.is_canceled())
            || matches!(system, Some(BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof))
    };
    !error.is_connect() && !error.is_timeout() && causes(error).any(is_closed)
}

/// The body without its coding.
///
/// # Errors
/// The coding is unknown; it is given back.
fn unpacked(response: Response) -> Result<Box<dyn Read>, String> {
    let coding = header(response.headers(), &CONTENT_ENCODING).unwrap_or_default();
    match coding.trim().to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(Box::new(response)),
        "gzip" | "x-gzip" => Ok(Box::new(MultiGzDecoder::new(response))),
        _ => Err(coding),
    }
}

fn is_html(headers: &HeaderMap) -> bool {
    header(headers, &CONTENT_TYPE).is_some_and(|kind| kind.contains("html"))
}

fn header(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
