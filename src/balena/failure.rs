//! Why a refresh failed.

use std::fmt::Display;
use std::time::Duration;

use thiserror::Error;

use crate::word_enum::words;

words! {
    Reason {
    /// No connection.
    Connect = "connect",
    /// The server's certificate is not trusted.
    Tls = "tls",
    /// No whole answer in time.
    Timeout = "timeout",
    /// The answer broke off, or it is not HTTP.
    BrokenAnswer = "broken_answer",
    /// The answer does not hold what was asked for.
    BadAnswer = "bad_answer",
    /// 3xx, which is not followed: it could carry the key to another host.
    Redirect = "redirect",
    BadRequest = "bad_request",
    Unauthorized = "unauthorized",
    Forbidden = "forbidden",
    NotFound = "not_found",
    RateLimited = "rate_limited",
    /// 5xx, and every other status.
    ServerError = "server_error",
    /// The target file cannot be written.
    Write = "write",
    }
}

impl Reason {
    /// What a status means, and what to do next.
    pub fn of_status(status: u16) -> (Reason, &'static str) {
        match status {
            301..=303 | 307 | 308 => (Reason::Redirect, "set --api-url (API_URL) to where it leads, if that is right"),
            400 => (Reason::BadRequest, "the API cannot read the request; please report it"),
            401 => (
                Reason::Unauthorized,
                "the API key is wrong, expired or of another kind: check API_KEY (the API also answers this while its database \
                 is down)",
            ),
            403 => (Reason::Forbidden, "the API key may not do this: check API_KEY"),
            404 => (Reason::NotFound, "this server has no API v7: is it too old, or --api-url (API_URL) wrong?"),
            414 | 431 => {
                (Reason::BadRequest, "the choice of fleets and tags is too long for a URL: name fewer, or fleets by id")
            }
            429 => (Reason::RateLimited, "the API limits requests; a longer --refresh (REFRESH_RATE) helps"),
            500 => (Reason::ServerError, "the API is in trouble, or too old for a field that is asked for"),
            501..=599 => (Reason::ServerError, "the API is in trouble"),
            _ => (
                Reason::ServerError,
                "balena's API does not send this status: is --api-url (API_URL) right, or does a proxy answer?",
            ),
        }
    }
}

/// A refresh that failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Failure {
    pub reason: Reason,
    /// What was being done, to what, and what to do next: one line for the user.
    pub message: String,
    /// The chain of causes; empty if the message says all.
    pub causes: String,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// The server's `Retry-After`.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure without an answer or further causes.
    pub fn new(reason: Reason, message: impl Display) -> Self {
        Failure { reason, message: message.to_string(), causes: String::new(), status: None, retry_after: None }
    }

    /// Whether the API may refuse what this request asks for, so that another one can succeed: it is too old for a field, for
    /// which it answers 400, 404 or 500, or the key may not read it.
    pub fn is_of_this_request(&self) -> bool {
        use Reason::{BadAnswer, BadRequest, Forbidden, NotFound, Unauthorized};
        matches!(self.reason, Unauthorized | Forbidden | NotFound | BadRequest | BadAnswer) || self.status == Some(500)
    }
}
