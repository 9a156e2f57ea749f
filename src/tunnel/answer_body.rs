//! The body of an answer on its way to Prometheus, within bounds of time and size.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use hyper::StatusCode;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::coop::unconstrained;
use tokio::time::{Sleep, sleep_until};

use crate::net::{Deadline, ScrapeError, ScrapeReason};
use crate::tunnel::exchange::Exchange;
use crate::tunnel::kept_tunnels::KeptTunnels;
use crate::tunnel::metrics::{Outcome, Scrape};

/// The largest answer of an exporter, in bytes as they are sent. A `node_exporter` answers with 60 KB.
const MAX_ANSWER: usize = 64 << 20;

/// A body that passes. Its tunnel is kept once the whole body has passed.
pub struct AnswerBody {
    status: StatusCode,
    /// None once the body has passed, or has failed.
    exchange: Option<Exchange>,
    kept: Arc<KeptTunnels>,
    deadline: Pin<Box<Sleep>>,
    /// Bytes that may still come.
    left: usize,
    scrape: Scrape,
    /// Ends the body at the next poll.
    failure: Option<ScrapeError>,
    _place: OwnedSemaphorePermit,
}

impl AnswerBody {
    pub fn new(
        status: StatusCode, exchange: Exchange, kept: Arc<KeptTunnels>, deadline: Deadline, scrape: Scrape,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let mut body = AnswerBody {
            status,
            exchange: Some(exchange),
            kept,
            deadline: Box::pin(sleep_until(deadline.at)),
            left: MAX_ANSWER,
            scrape,
            failure: None,
            _place: place,
        };
        body.end_if_passed();
        body
    }

    /// Ends if the whole body has passed.
    fn end_if_passed(&mut self) {
        if self.exchange.as_ref().is_some_and(Exchange::is_end) {
            self.end();
        }
    }

    fn end(&mut self) {
        self.scrape.outcome = Outcome::Passed(self.status);
        let Some(exchange) = self.exchange.take() else { return };
        // It ends at once, unless the target has answered before it has read the whole request: then the tunnel closes.
        let end = pin!(unconstrained(exchange.end()));
        if let Poll::Ready(Some(tunnel)) = end.poll(&mut Context::from_waker(Waker::noop())) {
            self.kept.keep(self.scrape.target.address.clone(), tunnel);
        }
    }

    /// Fails at the next poll: before that, the server sends what has passed so far.
    fn fail(&mut self, error: ScrapeError, cx: &mut Context) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.scrape.outcome = Outcome::Failed(error.reason);
        self.exchange = None;
        self.failure = Some(error);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Some(Err(io::Error::other(failure))));
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            self.kept.close_device(self.scrape.target.device());
            return self.fail(ScrapeError::new(ScrapeReason::Timeout, "the answer takes too long"), cx);
        }
        let Some(exchange) = &mut self.exchange else { return Poll::Ready(None) };
        match ready!(exchange.poll_frame(cx)) {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(left) = self.left.checked_sub(length) else {
                    return self.fail(ScrapeError::new(ScrapeReason::TooLarge, "the answer is too large"), cx);
                };
                self.left = left;
                self.end_if_passed();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => self.fail(error, cx),
            None => {
                self.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.exchange.is_none() && self.failure.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.exchange.as_ref().map_or_else(|| SizeHint::with_exact(0), Exchange::size_hint)
    }
}
