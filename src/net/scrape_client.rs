//! The HTTP client of scrapes, which the tunnel and `check` share: it reads answers as Go's client does, knows where a scrape may
//! go, and when its answer has to be complete.

use std::error::Error;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::ext::on_informational;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response};
use tokio::sync::Notify;
use tokio::task::coop::poll_proceed;
use tokio::time::{Instant, timeout_at};

use crate::net::scrape_error::{ScrapeError, ScrapeReason};

/// What the program calls itself in its requests.
pub const USER_AGENT: &str = concat!("baletheus/", env!("CARGO_PKG_VERSION"));
/// The time-out for reaching a device, where the scrape names none: below Prometheus' default of 10 s, so that there is
/// time to answer with the reason. balena's VPN proxy answers only after 134 s if a device swallows packets.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(9);
/// The share of a scrape's time-out within which the device has to answer: the rest is for answering with the reason.
pub const TIMEOUT_SHARE: f64 = 0.9;
/// The largest head of a request or an answer, in bytes.
pub const MAX_HEAD: usize = 64 << 10;
/// The most headers of an answer. Memory for all of them is reserved while a head is parsed.
const MAX_HEADERS: usize = 1024;
/// The most informational answers (1xx) before the answer, as in Go's HTTP client.
const MAX_INFORMATIONAL: usize = 5;
/// The longest `Content-Type` of an answer, in bytes. Prometheus logs one that it does not know at each scrape, whole.
const MAX_CONTENT_TYPE: usize = 256;
/// SSH of the host OS, which the API key opens as well.
const SSH_PORT: u64 = 22222;

/// Decides whether a scrape may connect to `host:port`: it has to be a target, and never SSH of the host OS.
pub fn check_destination<T>(host_port: &str, target: Option<T>) -> Result<T, ScrapeError> {
    let refused = |why: String| ScrapeError::new(ScrapeReason::NotTarget, format!("refused: {why}"));
    let port = host_port.rsplit(':').next().and_then(|port| port.parse().ok());
    if port == Some(SSH_PORT) {
        return Err(refused("port 22222 is the SSH of the host".into()));
    }
    target.ok_or_else(|| refused(format!("{host_port} is no target in the target file")))
}

/// Why an exchange over a connection failed. The same failure has the same text, whichever way hyper reports it.
pub fn broken(error: &hyper::Error) -> ScrapeError {
    if error.is_parse_too_large() {
        ScrapeError::new(
            ScrapeReason::TooLarge,
            format!("the head of the answer is larger than {} KiB", MAX_HEAD >> 10),
        )
    } else if error.is_parse() {
        not_http(&error.to_string())
    } else if let Some(cause) = error.source().and_then(|cause| cause.downcast_ref::<io::Error>())
        && matches!(cause.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidData)
    {
        not_http(&cause.to_string()) // a body that is invalid
    } else {
        ScrapeError::new(ScrapeReason::BrokeOff, "broke off: the connection closes before the answer is complete")
    }
}

/// Reads answers as Go's HTTP client does, which Prometheus uses: any number of headers, a blank before the colon, lines
/// that are continued, and names that are invalid.
pub fn client() -> http1::Builder {
    let mut http = http1::Builder::new();
    http.read_buf_exact_size(Some(MAX_HEAD)) // the bound of a head, too
        .max_headers(MAX_HEADERS)
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true);
    http
}

/// Sends a request, and waits for the head of its answer. Counts informational answers.
pub async fn send(
    sender: &mut http1::SendRequest<Empty<Bytes>>, mut request: Request<Empty<Bytes>>, informational: &Arc<AtomicUsize>,
) -> Result<Response<Incoming>, ScrapeError> {
    let (too_many, seen) = (Arc::new(Notify::new()), informational.clone());
    let notify = too_many.clone();
    on_informational(&mut request, move |_| {
        // hyper reads the next one at once, as long as bytes come. Each counts like a read, so that other scrapes go on.
        if let Poll::Ready(proceeds) = poll_proceed(&mut Context::from_waker(Waker::noop())) {
            proceeds.made_progress();
        }
        if seen.fetch_add(1, Ordering::Relaxed) == MAX_INFORMATIONAL {
            notify.notify_one();
        }
    });
    let (mut answer, mut too_many) = (pin!(sender.send_request(request)), pin!(too_many.notified()));
    let answer = poll_fn(|cx| match too_many.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(Err(not_http(&format!("more than {MAX_INFORMATIONAL} informational answers")))),
        Poll::Pending => answer.as_mut().poll(cx).map_err(|error| broken(&error)),
    });
    let answer = answer.await?;
    check_head(&answer)?;
    Ok(answer)
}

/// Refuses what Go's HTTP client refuses, and a `Content-Type` that would fill Prometheus' log.
fn check_head<B>(answer: &Response<B>) -> Result<(), ScrapeError> {
    if answer.status().is_informational() {
        return Err(not_http(&format!("{} was not asked for", answer.status())));
    }
    // hyper has compared the lengths if there are several, but it takes a list in one header, too.
    let is_number = |length: &HeaderValue| length.as_bytes().iter().all(u8::is_ascii_digit);
    if !answer.headers().get_all(CONTENT_LENGTH).iter().all(is_number) {
        return Err(not_http("Content-Length is not a number"));
    }
    if answer.headers().get_all(CONTENT_TYPE).iter().any(|kind| kind.len() > MAX_CONTENT_TYPE) {
        let message = format!("the Content-Type of the answer is longer than {MAX_CONTENT_TYPE} bytes");
        return Err(ScrapeError::new(ScrapeReason::TooLarge, message));
    }
    Ok(())
}

/// The failure of a target that speaks something else.
pub fn not_http(what: &str) -> ScrapeError {
    ScrapeError::new(ScrapeReason::NotHttp, format!("not HTTP: {what}"))
}

/// When an answer has to be complete.
#[derive(Clone, Copy)]
pub struct Deadline {
    timeout: Duration,
    /// The moment at which the time-out ends.
    pub at: Instant,
}

impl Deadline {
    /// The end of a time-out that starts now.
    pub fn after(timeout: Duration) -> Self {
        Deadline { timeout, at: Instant::now() + timeout }
    }

    pub fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub async fn wait<T>(self, answer: impl Future<Output = T>) -> Result<T, ScrapeError> {
        let missed = |_| format!("no answer in {} s", self.timeout.as_secs_f64());
        timeout_at(self.at, answer).await.map_err(|late| ScrapeError::new(ScrapeReason::Timeout, missed(late)))
    }
}
