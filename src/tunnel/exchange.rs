//! A tunnel, and a request and its answer within it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{Connection, SendRequest};
use hyper::http::response::Parts;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::net::scrape_client::{broken, client, not_http, send};
use crate::net::{ScrapeError, ScrapeReason, Stream};

/// The greatest age of a tunnel, after which a scrape opens a new one: so a revoked key is noticed, and tunnels follow when
/// balena moves a device to another VPN host.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// A tunnel's greatest age is less than [`MAX_AGE`] by up to this share of it, so that tunnels do not all end at once.
const AGE_SPREAD: f64 = 0.25;

/// The start of every answer.
const HTTP: &[u8] = b"HTTP/";

/// A tunnel and its place. A kept tunnel has no HTTP state, which would take several times its memory.
pub struct Tunnel {
    /// The connection, in which no byte is in flight.
    pub stream: Stream,
    /// The place, which is free again when this is dropped.
    pub place: OwnedSemaphorePermit,
    /// The end of its greatest age.
    pub until: Instant,
}

impl Tunnel {
    /// A tunnel that has just been opened.
    pub fn new(stream: Stream, place: OwnedSemaphorePermit) -> Self {
        let age = MAX_AGE.mul_f64(1.0 - AGE_SPREAD * fastrand::f64());
        Tunnel { stream, place, until: Instant::now() + age }
    }

    /// Whether nothing came while nothing was asked: neither its end nor bytes, which would be taken for the next answer.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        let stream = Pin::new(&mut self.stream);
        stream.poll_read(&mut Context::from_waker(Waker::noop()), &mut ReadBuf::new(&mut byte)).is_pending()
    }
}

/// A request whose answer has begun, and the body of this answer. The tunnel closes when this is dropped.
pub struct Exchange {
    http: Http,
    sender: SendRequest<Empty<Bytes>>,
    /// The first part of the body, which has been read.
    first: Option<Frame<Bytes>>,
    rest: Incoming,
    place: OwnedSemaphorePermit,
    until: Instant,
}

/// A connection that reads and writes whenever something is polled that depends on it, so that it needs no separate task.
struct Http {
    connection: Connection<TokioIo<Stream>, Empty<Bytes>>,
    /// None while the connection is open; then whether it ended without an error.
    ended: Option<bool>,
}

impl Http {
    /// Reads and writes what can be read and written now.
    fn advance(&mut self, cx: &mut Context<'_>) {
        if self.ended.is_none()
            && let Poll::Ready(end) = self.connection.poll_without_shutdown(cx)
        {
            self.ended = Some(end.is_ok()); // what depends on the connection gets the same error
        }
    }

    /// Polls `something` that depends on the connection. If it is not ready, the connection reads and writes first.
    fn poll<T>(&mut self, cx: &mut Context<'_>, mut something: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let first = something(cx);
        if first.is_ready() {
            return first;
        }
        self.advance(cx);
        something(cx)
    }

    async fn wait<T>(&mut self, something: impl Future<Output = T>) -> T {
        let mut something = pin!(something);
        poll_fn(|cx| self.poll(cx, |cx| something.as_mut().poll(cx))).await
    }
}

pub struct NoAnswer {
    pub error: ScrapeError,
    /// Whether the connection ended before the first byte of the answer.
    pub is_closed: bool,
}

impl Exchange {
    /// Sends a request, and waits for the head of its answer and the first bytes of its body: an answer that breaks there
    /// fails the scrape with its reason.
    pub async fn start(tunnel: Tunnel, request: Request<Empty<Bytes>>) -> Result<(Parts, Self), NoAnswer> {
        let Tunnel { stream, place, until } = tunnel;
        let failed = |error| NoAnswer { error, is_closed: false };
        let connected = client().handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = connected.map_err(|error| failed(broken(&error)))?;
        let mut http = Http { connection, ended: None };
        let informational = Arc::default();
        let answer = match http.wait(send(&mut sender, request, &informational)).await {
            Ok(answer) => answer,
            Err(error) => {
                let begun = http.connection.into_parts().read_buf;
                // A server that speaks first may have spoken before the request was sent.
                let is_http = HTTP.starts_with(&begun[..begun.len().min(HTTP.len())]);
                let has_begun = informational.load(Ordering::Relaxed) > 0 || !begun.is_empty();
                let is_broken = error.reason == ScrapeReason::BrokeOff;
                let is_closed = is_broken && !has_begun;
                let error = if is_broken && !is_http { not_http("invalid HTTP version parsed") } else { error };
                return Err(NoAnswer { error, is_closed });
            }
        };
        let (head, rest) = answer.into_parts();
        let mut exchange = Exchange { http, sender, first: None, rest, place, until };
        if !exchange.is_end() {
            exchange.first = poll_fn(|cx| exchange.poll_frame(cx)).await.transpose().map_err(failed)?;
        }
        Ok((head, exchange))
    }

    /// The tunnel, if it can take another request.
    pub async fn end(self) -> Option<Tunnel> {
        let Exchange { mut http, mut sender, place, until, .. } = self;
        http.wait(sender.ready()).await.ok()?;
        drop(sender);
        let ended = poll_fn(|cx| {
            http.advance(cx);
            http.ended.map_or(Poll::Pending, Poll::Ready)
        });
        let parts = ended.await.then(|| http.connection.into_parts())?;
        parts.read_buf.is_empty().then(|| Tunnel { stream: parts.io.into_inner(), place, until })
    }

    pub fn poll_frame(&mut self, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, ScrapeError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let Exchange { http, rest, .. } = self;
        http.poll(cx, |cx| Pin::new(&mut *rest).poll_frame(cx)).map_err(|error| broken(&error))
    }

    pub fn is_end(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    /// The length of what is left of the body, if it is known.
    pub fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        self.rest.size_hint().exact().map_or_else(SizeHint::new, |rest| SizeHint::with_exact(first + rest))
    }
}
