//! A request and its answer within a tunnel.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http_body_util::Empty;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep_until};

use crate::net::connector::Stream;
use crate::net::refused::{Reason, Refused};
use crate::net::scrape::{Deadline, broken};
use crate::tunnel::metrics::{Outcome, Scrape};
use crate::tunnel::pool::{Pool, Tunnel};

/// Bytes of an answer in flight, and the largest head of an answer.
const BUFFER: usize = 16 << 10;
/// The largest answer of an exporter, in bytes as they are sent. A `node_exporter` answers with 60 KB.
const MAX_ANSWER: usize = 64 << 20;

/// A request and its answer in a tunnel, which closes when this is dropped.
pub struct Exchange {
    sender: http1::SendRequest<Empty<Bytes>>,
    /// Moves the bytes, and returns the connection at its end.
    connection: JoinSet<Option<Stream>>,
    place: OwnedSemaphorePermit,
}

impl Exchange {
    /// Sends a request and waits for the head of its answer.
    pub async fn start(tunnel: Tunnel, request: Request<Empty<Bytes>>) -> Result<(Self, Response<Incoming>), Refused> {
        let mut http = http1::Builder::new();
        http.read_buf_exact_size(Some(BUFFER));
        let io = TokioIo::new(tunnel.stream);
        let (mut sender, mut http) = http.handshake(io).await.map_err(|error| broken(&error))?;
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            // the request fails with the same error
            poll_fn(|cx| http.poll_without_shutdown(cx)).await.ok()?;
            let parts = http.into_parts();
            parts.read_buf.is_empty().then(|| parts.io.into_inner())
        });
        let answer = sender.send_request(request).await.map_err(|error| broken(&error))?;
        if answer.status().is_informational() {
            let message = format!("not HTTP: {} was not asked for", answer.status());
            return Err(Refused::new(Reason::NotHttp, message));
        }
        Ok((Exchange { sender, connection, place: tunnel.place }, answer))
    }

    /// The tunnel, if it can take another request.
    async fn end(mut self) -> Option<Tunnel> {
        self.sender.ready().await.ok()?;
        drop(self.sender);
        let stream = self.connection.join_next().await?.ok()??;
        Some(Tunnel { stream, place: self.place })
    }
}

/// The body of an answer on its way to Prometheus. Its tunnel is kept once the whole body has passed.
pub struct Passing {
    body: Incoming,
    tunnel: Option<(Arc<str>, Exchange)>,
    pool: Arc<Pool>,
    deadline: Pin<Box<Sleep>>,
    /// Bytes that may still come.
    left: usize,
    scrape: Scrape,
}

impl Passing {
    /// Passes the body of a target's answer.
    pub fn new(
        target: String, exchange: Exchange, body: Incoming, pool: Arc<Pool>, deadline: Deadline, scrape: Scrape,
    ) -> Self {
        let tunnel = Some((target.into(), exchange));
        let deadline = Box::pin(sleep_until(deadline.at));
        let mut passing = Passing { body, tunnel, pool, deadline, left: MAX_ANSWER, scrape };
        if passing.body.is_end_stream() {
            passing.end();
        }
        passing
    }

    fn end(&mut self) {
        self.scrape.outcome = Outcome::Passed;
        if let Some((target, exchange)) = self.tunnel.take() {
            let pool = self.pool.clone();
            tokio::spawn(async move {
                if let Some(tunnel) = exchange.end().await {
                    pool.keep(target, tunnel);
                }
            });
        }
    }

    fn fail(&mut self, reason: Reason, why: &str) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.scrape.outcome = Outcome::Refused(reason);
        self.tunnel = None;
        Poll::Ready(Some(Err(io::Error::other(why))))
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return self.fail(Reason::Timeout, "the answer takes too long");
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(left) = self.left.checked_sub(length) else {
                    return self.fail(Reason::TooLarge, "the answer is too large");
                };
                self.left = left;
                if self.body.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => self.fail(Reason::BrokeOff, &error.to_string()),
            None => {
                self.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
