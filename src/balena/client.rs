//! The client of the API: what it is asked with, and the counts of its requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::IntCounterVec;

use super::failure::{Failure, Reason};
use super::http::ApiConnection;
use super::query::{Query, Request};
use super::source::{Api, Fetched, Source};
use crate::liveness::Liveness;
use crate::net::CannotStart;

/// The status of a request without an answer, as it is counted.
pub const NO_ANSWER: &str = "none";
/// The most time for a question about the key, which must not hold up a refresh for long.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the balena API, version 7. Clones share the connection, the key and the counts.
#[derive(Clone)]
pub struct Client {
    connection: ApiConnection,
    query: Query,
    /// Counts its requests by the status of their answer; [`NO_ANSWER`] is that of those without one.
    pub requests: Option<IntCounterVec>,
    /// To which it announces the end of each request.
    pub liveness: Option<Arc<Liveness>>,
}

impl Client {
    /// Makes a client and sends no request.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used, or a thread cannot be started.
    pub fn new(api: Api, query: Query) -> Result<Self, CannotStart> {
        Ok(Client { connection: ApiConnection::new(api)?, query, requests: None, liveness: None })
    }

    /// Asks for a path. No failure shows a key, which the answer may hold.
    fn get_within(&self, path: &str, etag: Option<&str>, limit: Duration) -> Result<Fetched, Failure> {
        let hidden = |text: &str| self.connection.api.key.hidden_in(text);
        self.get_with_keys(path, etag, limit).map_err(|failure| Failure {
            message: hidden(&failure.message),
            causes: hidden(&failure.causes),
            ..failure
        })
    }

    /// Asks with one key and then with the next if the first is refused. The limit bounds both tries.
    fn get_with_keys(&self, path: &str, etag: Option<&str>, limit: Duration) -> Result<Fetched, Failure> {
        let end = Instant::now() + limit;
        if let Some(liveness) = &self.liveness {
            liveness.expect(end);
        }
        let key = self.connection.api.key.current();
        let answer = self.counted(|| self.connection.exchange(&key, path, etag, limit));
        match answer {
            Err(failure) if failure.reason == Reason::Unauthorized => match self.connection.api.key.renew(&key) {
                Ok(key) => {
                    let left = end.saturating_duration_since(Instant::now());
                    self.counted(|| self.connection.exchange(&key, path, etag, left))
                }
                Err(None) => Err(failure),
                Err(Some(trouble)) => Err(Failure { message: format!("{}; {trouble}", failure.message), ..failure }),
            },
            answer => answer,
        }
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
        &self.connection.api.url
    }

    fn get(&mut self, request: Request, etag: Option<&str>) -> Result<Fetched, Failure> {
        self.get_within(&self.query.path(request), etag, self.connection.api.timeout)
    }

    fn ask(&mut self, request: Request, spent: Duration) -> Result<Fetched, Failure> {
        let limit = QUESTION_TIMEOUT.min(self.connection.api.timeout.saturating_sub(spent));
        self.get_within(&self.query.path(request), None, limit)
    }
}
