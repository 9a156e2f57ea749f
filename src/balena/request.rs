//! One request: it is sent with the key, its answer is read within bounds, and a failure is explained.

use std::io::Read;
use std::time::{Duration, SystemTime};

use reqwest::blocking::Response;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use reqwest::{StatusCode, Url};

use super::client::Client;
use super::failure::{Failure, Reason};
use crate::backoff;
use crate::net::connector::trust_hint;
use crate::net::threads::NoThread;
use crate::secret::Secret;
use crate::text::causes;

/// Bytes of an error's body that are read for the message.
const EXCERPT_SIZE: u64 = 800;

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

impl Client {
    /// Sends a request, and reads its answer within this time.
    pub(super) fn exchange(
        &self, key: &Secret, path: &str, etag: Option<&str>, limit: Duration,
    ) -> Result<Answer, Failure> {
        let response = self.send(key, path, etag, limit)?;
        let new_etag = text_of(response.headers(), &ETAG);
        match response.status() {
            StatusCode::NOT_MODIFIED if etag.is_some() => Ok(Answer::Unchanged),
            StatusCode::OK => Ok(match self.body(response, limit)? {
                Some(body) => {
                    let room = self.max_answer / (body.len() as u64).max(1);
                    Answer::Body { etag: new_etag, body, room: usize::try_from(room).unwrap_or(usize::MAX) }
                }
                None => Answer::TooLarge { etag: new_etag },
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
        // The time-out of a request, unlike the client's, bounds the whole answer and not each read of it.
        let mut request = self.http.get(url).header(AUTHORIZATION, bearer).timeout(limit);
        if let Some(etag) = etag {
            request = request.header(IF_NONE_MATCH, etag);
        }
        request.send().map_err(|error| self.broken(error, limit))
    }

    /// The body, or none if it is too large.
    fn body(&self, response: Response, limit: Duration) -> Result<Option<Vec<u8>>, Failure> {
        let mut body = Vec::new();
        match response.take(self.max_answer + 1).read_to_end(&mut body) {
            Ok(_) => Ok((body.len() as u64 <= self.max_answer).then_some(body)),
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
    fn refused(&self, key: &Secret, response: Response) -> Failure {
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
/// enough of the answer is read that the key is never cut in two. An answer about the key, and the query of a redirect, are not shown:
/// they may have the key in another form.
fn excerpt(key: &Secret, response: Response) -> String {
    if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return String::new();
    }
    let location = text_of(response.headers(), &LOCATION);
    let location = location.map(|location| format!("to {}", location.split(['?', '#']).next().unwrap_or_default()));
    let is_html = text_of(response.headers(), &CONTENT_TYPE).is_some_and(|kind| kind.contains("html"));
    let mut body = Vec::new();
    let read = response.take(EXCERPT_SIZE + key.reveal().len() as u64).read_to_end(&mut body);
    let body = if is_html || read.is_err() { "".into() } else { String::from_utf8_lossy(&body) };
    let text = location.as_deref().unwrap_or(&body).split(key.reveal()).next().unwrap_or_default();
    let text: String = text.chars().take(200).collect();
    if text.trim().is_empty() { String::new() } else { format!(", {}", text.trim()) }
}

fn text_of(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
