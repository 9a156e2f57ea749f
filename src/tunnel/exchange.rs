//! A request and its answer within a tunnel.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::net::connector::Stream;
use crate::net::refused::Refused;
use crate::net::scrape::{broken, client, send};
use crate::tunnel::pool::Tunnel;

/// A request and its answer in a tunnel, which closes when this is dropped.
pub struct Exchange {
    sender: SendRequest<Empty<Bytes>>,
    /// Moves the bytes, and returns the connection at its end.
    connection: JoinSet<Option<Stream>>,
    place: OwnedSemaphorePermit,
    until: Instant,
}

impl Exchange {
    /// Sends a request, and waits for the head of its answer and the first bytes of its body: an answer that breaks there
    /// fails the scrape with its reason.
    pub async fn start(
        tunnel: Tunnel, request: Request<Empty<Bytes>>,
    ) -> Result<(Self, Response<AnswerBody>), Refused> {
        let Tunnel { stream, place, until } = tunnel;
        let (mut sender, mut http) = client().handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            // the request fails with the same error
            poll_fn(|cx| http.poll_without_shutdown(cx)).await.ok()?;
            let parts = http.into_parts();
            parts.read_buf.is_empty().then(|| parts.io.into_inner())
        });
        let (head, mut rest) = send(&mut sender, request).await?.into_parts();
        let first = if rest.is_end_stream() { None } else { rest.frame().await };
        let first = first.transpose().map_err(|error| broken(&error))?;
        let answer = Response::from_parts(head, AnswerBody { first, rest });
        Ok((Exchange { sender, connection, place, until }, answer))
    }

    /// The tunnel, if it can take another request.
    pub async fn end(mut self) -> Option<Tunnel> {
        self.sender.ready().await.ok()?;
        drop(self.sender);
        let stream = self.connection.join_next().await?.ok()??;
        Some(Tunnel { stream, place: self.place, until: self.until })
    }
}

/// A body whose first frame has been read.
pub struct AnswerBody {
    first: Option<Frame<Bytes>>,
    rest: Incoming,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(first))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        self.rest.size_hint().exact().map_or_else(SizeHint::new, |rest| SizeHint::with_exact(first + rest))
    }
}
