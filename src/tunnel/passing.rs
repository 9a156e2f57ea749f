//! The body of an answer on its way to Prometheus, within bounds of time and size.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Sleep, sleep_until};

use crate::net::refused::{Reason, Refused};
use crate::net::scrape::{Deadline, broken};
use crate::tunnel::exchange::{AnswerBody, Exchange};
use crate::tunnel::metrics::{Outcome, Scrape};
use crate::tunnel::pool::Pool;

/// The largest answer of an exporter, in bytes as they are sent. A `node_exporter` answers with 60 KB.
const MAX_ANSWER: usize = 64 << 20;

/// A body that passes. Its tunnel is kept once the whole body has passed.
pub struct Passing {
    body: AnswerBody,
    tunnel: Option<(Arc<str>, Exchange)>,
    pool: Arc<Pool>,
    deadline: Pin<Box<Sleep>>,
    /// Bytes that may still come.
    left: usize,
    scrape: Scrape,
    failure: Option<Refused>,
    /// The place among the scrapes at once.
    _place: OwnedSemaphorePermit,
}

impl Passing {
    /// Passes the body of a target's answer.
    pub fn new(
        tunnel: (Arc<str>, Exchange), body: AnswerBody, pool: Arc<Pool>, deadline: Deadline, scrape: Scrape,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let deadline = Box::pin(sleep_until(deadline.at));
        let (tunnel, left, failure) = (Some(tunnel), MAX_ANSWER, None);
        let mut passing = Passing { body, tunnel, pool, deadline, left, scrape, failure, _place: place };
        if passing.is_end_stream() {
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

    /// Fails at the next poll: before that, the server sends what has passed so far.
    fn fail(&mut self, refused: Refused, cx: &mut Context) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.scrape.outcome = Outcome::Refused(refused.reason);
        self.tunnel = None;
        self.failure = Some(refused);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Some(Err(io::Error::other(failure))));
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            return self.fail(Refused::new(Reason::Timeout, "the answer takes too long"), cx);
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(left) = self.left.checked_sub(length) else {
                    return self.fail(Refused::new(Reason::TooLarge, "the answer is too large"), cx);
                };
                self.left = left;
                if self.is_end_stream() {
                    self.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => self.fail(broken(&error), cx),
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
