//! The relay for https targets: bytes between Prometheus and the device, which the tunnel does not read.
//!
//! Prometheus keeps its connection to an https target. So a relay has a place among the scrapes only while it works: from the
//! first byte of Prometheus until the device has answered.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::net::connector::Stream;
use crate::tunnel::kept_tunnels::{IDLE_TIMEOUT, KeptTunnels};

/// The most bytes in flight in each direction.
const BUFFER: usize = 16 << 10;

/// A relay with its places.
pub struct Relay {
    kept: Arc<KeptTunnels>,
    scrapes: Arc<Semaphore>,
    /// How long the device has to answer.
    timeout: Duration,
    places: Mutex<Places>,
    /// A tunnel has got the place of the idle relay.
    lost: Arc<Notify>,
}

struct Places {
    /// Among the tunnels; while the relay idles, the kept tunnels have it.
    tunnel: Option<OwnedSemaphorePermit>,
    /// Among the scrapes, while the relay works.
    scrape: Option<OwnedSemaphorePermit>,
    /// The relay's number among those that idle.
    number: u64,
}

/// Why a relay ends.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Prometheus or the device closed its connection, or both were silent for long; or an idle relay gave way to a tunnel.
    Closed,
    /// There was no place for a scrape.
    Busy,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        End::Closed
    }
}

impl From<Elapsed> for End {
    fn from(_: Elapsed) -> Self {
        End::Closed
    }
}

impl Relay {
    /// A relay that works: Prometheus has just asked for it.
    pub fn new(
        kept: Arc<KeptTunnels>, tunnel: OwnedSemaphorePermit, scrapes: Arc<Semaphore>, scrape: OwnedSemaphorePermit,
        timeout: Duration,
    ) -> Self {
        let places = Mutex::new(Places { tunnel: Some(tunnel), scrape: Some(scrape), number: 0 });
        Relay { kept, scrapes, timeout, places, lost: Arc::default() }
    }

    /// Relays until either side ends, or until one of them sends nothing for `IDLE_TIMEOUT`. It closes both sides at once: a
    /// half-closed tunnel loses the answer.
    pub async fn run(self, prometheus: impl AsyncRead + AsyncWrite, device: Stream) -> End {
        let (from_prometheus, to_prometheus) = split(prometheus);
        let (from_device, to_device) = split(device);
        let mut requests = pin!(self.requests(from_prometheus, to_device));
        let mut answers = pin!(self.answers(from_device, to_prometheus));
        let mut lost = pin!(self.lost.notified());
        poll_fn(|cx| {
            if let Poll::Ready(Err(end)) = requests.as_mut().poll(cx) {
                return Poll::Ready(end);
            }
            if let Poll::Ready(Err(end)) = answers.as_mut().poll(cx) {
                return Poll::Ready(end);
            }
            lost.as_mut().poll(cx).map(|()| End::Closed)
        })
        .await
    }

    async fn requests(
        &self, mut from: ReadHalf<impl AsyncRead>, mut to: WriteHalf<impl AsyncWrite>,
    ) -> Result<Infallible, End> {
        loop {
            // Without an answer for so long, there is nobody to wait for: with HTTP/2, Prometheus' own frames come last.
            let bytes = if let Ok(bytes) = timeout(self.timeout, read(&mut from)).await {
                bytes?
            } else {
                self.idles();
                timeout(IDLE_TIMEOUT, read(&mut from)).await??
            };
            self.works()?;
            write(&mut to, &bytes).await?;
        }
    }

    async fn answers(
        &self, mut from: ReadHalf<impl AsyncRead>, mut to: WriteHalf<impl AsyncWrite>,
    ) -> Result<Infallible, End> {
        loop {
            let bytes = timeout(IDLE_TIMEOUT, read(&mut from)).await??;
            write(&mut to, &bytes).await?;
            self.idles();
        }
    }

    /// Takes the places that it needs for a scrape, if it does not have them.
    fn works(&self) -> Result<(), End> {
        let mut places = self.places.lock();
        if places.scrape.is_none() {
            places.tunnel = Some(self.kept.relay_works(places.number).ok_or(End::Closed)?);
            places.scrape = Some(self.scrapes.clone().try_acquire_owned().map_err(|_| End::Busy)?);
        }
        Ok(())
    }

    fn idles(&self) {
        let mut places = self.places.lock();
        places.scrape = None;
        if let Some(tunnel) = places.tunnel.take() {
            places.number = self.kept.relay_idles(tunnel, self.lost.clone());
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let number = self.places.lock().number;
        self.kept.relay_works(number);
    }
}

/// Reads what there is. Without bytes it holds no memory for them: most relays idle.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    poll_fn(|cx| {
        let mut bytes = Vec::with_capacity(BUFFER);
        let length = ready!(pin!(from.read_buf(&mut bytes)).poll(cx))?;
        Poll::Ready(if length == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) })
    })
    .await
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), End> {
    let written = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    Ok(timeout(IDLE_TIMEOUT, written).await??)
}
