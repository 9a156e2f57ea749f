//! The relay for https targets: bytes between Prometheus and the device, which the tunnel does not read.
//!
//! Prometheus keeps its connection to an https target. So a relay has a place among the scrapes only while it works: from the
//! first byte of Prometheus until the device has answered.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::net::{Duplex, Stream};
use crate::tunnel::kept_tunnels::{IDLE_TIMEOUT, KeptTunnels};

const BUFFER: usize = 16 << 10;

pub struct Relay {
    kept: Arc<KeptTunnels>,
    scrapes: Arc<Semaphore>,
    /// How long the device has to answer.
    timeout: Duration,
    /// The place among the tunnels; while the relay idles, the kept tunnels have it.
    tunnel: Option<OwnedSemaphorePermit>,
    /// The place among the scrapes, while the relay works.
    scrape: Option<OwnedSemaphorePermit>,
    /// The relay's number among those that idle.
    number: u64,
    /// A tunnel has got the place of the idle relay.
    lost: Arc<Notify>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Prometheus or the device closed its connection, or both were silent for long; or an idle relay gave way to a tunnel.
    Closed,
    Busy,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        End::Closed
    }
}

/// Bytes of one side.
enum Received {
    OfPrometheus(Vec<u8>),
    OfDevice(Vec<u8>),
}

impl Relay {
    /// A relay that works: Prometheus has just asked for it.
    pub fn new(
        kept: Arc<KeptTunnels>, tunnel: OwnedSemaphorePermit, scrapes: Arc<Semaphore>, scrape: OwnedSemaphorePermit,
        timeout: Duration,
    ) -> Self {
        Relay { kept, scrapes, timeout, tunnel: Some(tunnel), scrape: Some(scrape), number: 0, lost: Arc::default() }
    }

    /// Relays until either side ends, or until both send nothing for `IDLE_TIMEOUT`. It closes both sides at once: a half-closed
    /// tunnel loses the answer.
    pub async fn run(mut self, mut prometheus: impl Duplex, mut device: Stream) -> End {
        loop {
            if let Err(end) = self.pass(&mut prometheus, &mut device).await {
                return end;
            }
        }
    }

    /// Passes what comes next. Nothing is read meanwhile: a request is small, and its answer comes after it.
    async fn pass(&mut self, prometheus: &mut impl Duplex, device: &mut Stream) -> Result<(), End> {
        let is_idle = self.scrape.is_none();
        let limit = if is_idle { IDLE_TIMEOUT } else { self.timeout };
        match timeout(limit, self.next(prometheus, device)).await {
            Ok(bytes) => match bytes? {
                Received::OfPrometheus(request) => {
                    self.work()?;
                    write(device, &request).await?;
                }
                Received::OfDevice(answer) => {
                    write(prometheus, &answer).await?;
                    self.idle();
                }
            },
            Err(_) if is_idle => return Err(End::Closed),
            // Without an answer for so long, there is nobody to wait for: with HTTP/2, Prometheus' own frames come last.
            Err(_) => self.idle(),
        }
        Ok(())
    }

    async fn next(&self, prometheus: &mut impl Duplex, device: &mut Stream) -> Result<Received, End> {
        let mut lost = pin!(self.lost.notified());
        poll_fn(|cx| {
            if let Poll::Ready(request) = poll_read(prometheus, cx) {
                return Poll::Ready(Ok(Received::OfPrometheus(request?)));
            }
            if let Poll::Ready(answer) = poll_read(device, cx) {
                return Poll::Ready(Ok(Received::OfDevice(answer?)));
            }
            lost.as_mut().poll(cx).map(|()| Err(End::Closed))
        })
        .await
    }

    /// Takes the places that it needs for a scrape, if it does not have them.
    fn work(&mut self) -> Result<(), End> {
        if self.scrape.is_none() {
            self.tunnel = Some(self.kept.relay_works(self.number).ok_or(End::Closed)?);
            self.scrape = Some(self.scrapes.clone().try_acquire_owned().map_err(|_| End::Busy)?);
        }
        Ok(())
    }

    fn idle(&mut self) {
        self.scrape = None;
        if let Some(tunnel) = self.tunnel.take() {
            self.number = self.kept.relay_idles(tunnel, self.lost.clone());
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.kept.relay_works(self.number);
    }
}

/// Reads what there is. Without bytes it holds no memory for them: most relays idle.
fn poll_read(from: &mut (impl AsyncRead + Unpin), cx: &mut Context) -> Poll<io::Result<Vec<u8>>> {
    let mut bytes = Vec::with_capacity(BUFFER);
    let length = ready!(pin!(from.read_buf(&mut bytes)).poll(cx))?;
    Poll::Ready(if length == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) })
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let written = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    timeout(IDLE_TIMEOUT, written).await?
}
