//! The API client: conditional requests with bounds in size and time, and what each answer means.

use std::error::Error;
use std::io::Read;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::blocking::{Client, Response};
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{Certificate, StatusCode, Url};
use rustls::pki_types::CertificateDer;

use crate::balena::failure::Failure;
use crate::balena::key::ApiKey;
use crate::balena::query::Query;
use crate::discovery::inventory::{Answer, Source};
use crate::net::proxy::Proxies;
use crate::net::threads::{NoThread, Resolver};

/// The largest answer, unpacked, in bytes. 5,030 devices came in 4.9 MB from a real server.
const LARGEST_ANSWER: u64 = 64 << 20;
/// The share of the time-out that connecting may take.
const CONNECT_SHARE: f64 = 2.0 / 3.0;
/// The longest that a `Retry-After` is followed.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// How the API is reached.
#[derive(Clone, Debug)]
pub struct Api {
    /// Base URL without a trailing slash.
    pub url: String,
    /// The key, and where it came from.
    pub key: ApiKey,
    /// The file that held it, if it was one.
    pub key_file: Option<PathBuf>,
    /// The proxies of the environment.
    pub proxies: Proxies,
    /// Roots beside the platform's.
    pub roots: Vec<CertificateDer<'static>>,
    /// For a whole answer, its body included.
    pub timeout: Duration,
}

/// A client of the balena API, version 7.
#[derive(Clone)]
pub struct Balena {
    http: Client,
    /// How it is reached.
    pub api: Api,
    query: Query,
}

impl Balena {
    /// Makes a client; no request is sent. An error means that the platform's root certificates cannot be used.
    pub fn new(api: Api, query: Query) -> Result<Self, String> {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is there already
        let http = Client::builder()
            .user_agent(concat!("baletheus/", env!("CARGO_PKG_VERSION")))
            // a redirect must not carry the key to another host
            .redirect(Policy::none())
            // the server closes idle connections after 5 s
            .pool_idle_timeout(Duration::from_secs(4))
            .pool_max_idle_per_host(1)
            // divided among the addresses of a name, and for the whole connection with TLS: it leaves time for the last one
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
        Ok(Balena { http, api, query })
    }

    /// Asks for this much of up to `top` devices with ids above `after`.
    pub fn ask(&mut self, what: &str, after: u64, top: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.get(&self.query.ask(what, after, top), etag, self.api.timeout)
    }

    /// Asks for a path, unless what is there still has this `ETag`.
    pub fn get(&mut self, path: &str, etag: Option<&str>, timeout: Duration) -> Result<Answer, Failure> {
        let mut response = self.send(path, etag, timeout)?;
        if response.status() == StatusCode::UNAUTHORIZED && self.reread_key() {
            response = self.send(path, etag, timeout)?;
        }
        let new_etag = text_of(response.headers(), &ETAG);
        match response.status() {
            StatusCode::NOT_MODIFIED if etag.is_some() => Ok(Answer::Unchanged),
            StatusCode::OK => Ok(match self.body(response)? {
                Some(body) => Answer::Devices(new_etag, body),
                None => Answer::TooLarge(new_etag),
            }),
            _ => Err(self.refused(response)),
        }
    }

    fn send(&self, path: &str, etag: Option<&str>, timeout: Duration) -> Result<Response, Failure> {
        let url = Url::parse(&format!("{}{path}", self.api.url)).map_err(|error| Failure::new("bad_answer", error))?;
        let mut key = HeaderValue::from_str(&format!("Bearer {}", self.api.key.secret())).expect("keys are checked");
        key.set_sensitive(true);
        // The time-out of a request, unlike the client's, bounds the whole answer and not each read of it.
        let mut request = self.http.get(url).header(AUTHORIZATION, key).timeout(timeout);
        if let Some(etag) = etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        request.send().map_err(|error| self.broken(error))
    }

    /// The body, or nothing if it is too large.
    fn body(&self, response: Response) -> Result<Option<Vec<u8>>, Failure> {
        let mut body = Vec::new();
        match response.take(LARGEST_ANSWER + 1).read_to_end(&mut body) {
            Ok(_) => Ok((body.len() as u64 <= LARGEST_ANSWER).then_some(body)),
            Err(error) => Err(match error.downcast::<reqwest::Error>() {
                Ok(error) => self.broken(error),
                Err(error) => {
                    Failure::new("broken_answer", format!("the answer of {} broke off: {error}", self.api.url))
                }
            }),
        }
    }

    /// A rotated secret needs no restart.
    fn reread_key(&mut self) -> bool {
        let Some(Ok(key)) = self.api.key_file.as_deref().map(ApiKey::read) else { return false };
        let is_new = key != self.api.key;
        self.api.key = key;
        is_new
    }

    /// A request without an answer, or with half of one.
    fn broken(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        let chain = chain(&error);
        let (url, cause) = (&self.api.url, chain.last().map_or("", String::as_str));
        let (reason, message) = if error.is_timeout() {
            let within = humantime::format_duration(self.api.timeout);
            ("timeout", format!("no whole answer from {url}{} within {within}", self.through()))
        } else if cause.contains("certificate") {
            let hint = "is this device's clock right? does it need --ca-file (BALENA_CA_FILE)?";
            ("tls", format!("cannot trust {url}: {cause}; {hint}"))
        } else if let Some(no_thread) = NoThread::find(&error) {
            ("connect", format!("cannot reach {url}: {no_thread}"))
        } else if error.is_connect() {
            ("connect", format!("cannot reach {url}{}: {cause}", self.through()))
        } else {
            ("broken_answer", format!("the answer of {url} broke off: {cause}"))
        };
        Failure { detail: chain.join(": "), ..Failure::new(reason, message) }
    }

    /// Names the proxy, if there is one on the way to the API.
    fn through(&self) -> String {
        let url = Url::parse(&self.api.url).ok();
        let proxy = url.as_ref().and_then(|url| self.api.proxies.find(url.scheme(), url.host_str()?, url.port()));
        proxy.map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"))
    }

    /// An answer that is not the one asked for.
    fn refused(&self, response: Response) -> Failure {
        let (status, url) = (response.status(), &self.api.url);
        let headers = response.headers().clone();
        let (reason, hint) = match status.as_u16() {
            301..=303 | 307 | 308 => ("redirect", "set --api-url (BALENA_API_URL) to where it leads, if that is right"),
            400 => ("bad_request", "the API cannot read the request; please report it"),
            401 => ("unauthorized", "check API_KEY; or the API's database is down, which it tells in the same way"),
            403 => ("forbidden", "the API key may not do this: check API_KEY"),
            404 => ("not_found", "this server has no API v7: is it too old, or --api-url (BALENA_API_URL) wrong?"),
            414 | 431 => {
                ("bad_request", "the choice of fleets and tags is too long for a URL: name fewer, or fleets by id")
            }
            429 => ("rate_limited", "the API asks for patience; a longer --refresh (REFRESH_RATE) helps"),
            500 => ("server_error", "the API is in trouble, or too old for a field that is asked for"),
            _ => ("server_error", "the API is in trouble"),
        };
        let retry_after = retry_after(&headers);
        let said = self.excerpt(response);
        Failure {
            retry_after,
            code: Some(status.as_u16()),
            ..Failure::new(reason, format!("{url} answers {status}{said}: {hint}"))
        }
    }

    /// What the answer says of itself: up to the key, if it is echoed, and never so far that it may be cut in two.
    fn excerpt(&self, response: Response) -> String {
        let location = text_of(response.headers(), &LOCATION).map(|location| format!("to {location}"));
        let html = text_of(response.headers(), &CONTENT_TYPE).is_some_and(|kind| kind.contains("html"));
        let mut body = Vec::new();
        let read = response.take(800 + self.api.key.secret().len() as u64).read_to_end(&mut body);
        let said = if html || read.is_err() { "".into() } else { String::from_utf8_lossy(&body) };
        let said = location.as_deref().unwrap_or(&said).split(self.api.key.secret()).next().unwrap_or_default();
        let said: String = said.chars().take(200).collect();
        if said.trim().is_empty() { String::new() } else { format!(", {}", said.trim()) }
    }
}

impl Source for Balena {
    fn name(&self) -> &str {
        &self.api.url
    }

    fn page(&mut self, after: u64, top: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.get(&self.query.page(after, top), etag, self.api.timeout)
    }

    fn identity(&mut self, after: u64) -> Result<Answer, Failure> {
        self.ask("$select=id,uuid,device_name", after, 1, None)
    }
}

/// An error and its causes.
fn chain(error: &dyn Error) -> Vec<String> {
    iter::successors(Some(error), |error: &&dyn Error| (*error).source()).map(ToString::to_string).collect()
}

fn text_of(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Seconds, or a date, which is taken against the answer's own: this device's clock may be wrong.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = text_of(headers, &RETRY_AFTER).filter(|text| !text.is_empty())?;
    let wait = if text.bytes().all(|b| b.is_ascii_digit()) {
        text.parse().map_or(LONGEST_RETRY_AFTER, Duration::from_secs)
    } else {
        let date = text_of(headers, &DATE).and_then(|date| httpdate::parse_http_date(&date).ok());
        httpdate::parse_http_date(&text).ok()?.duration_since(date.unwrap_or_else(SystemTime::now)).ok()?
    };
    Some(wait.min(LONGEST_RETRY_AFTER)).filter(|wait| !wait.is_zero())
}
