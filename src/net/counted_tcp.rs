//! Connections that are counted, and that read ahead.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use prometheus::{Gauge, IntCounter};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// How much is read from the system at once, in bytes. rustls asks for 4 KiB at a time, each of which would be a system call.
const READ_AHEAD: usize = 64 << 10;

/// Counters for connections. The bytes are those within TCP, so they include TLS.
#[derive(Clone)]
pub struct Traffic {
    pub open: Gauge,
    pub sent: IntCounter,
    pub received: IntCounter,
}

pub struct Counted {
    tcp: TcpStream,
    traffic: Traffic,
    /// What was read from the system last. It has no memory while the connection idles.
    ahead: Vec<u8>,
    /// How many of these bytes were taken.
    taken: usize,
}

impl Counted {
    pub fn new(tcp: TcpStream, traffic: Traffic) -> Self {
        traffic.open.inc();
        Counted { tcp, traffic, ahead: Vec::new(), taken: 0 }
    }

    fn read_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.tcp.poll_read_ready(cx))?; // no memory is reserved before
        self.ahead.reserve_exact(READ_AHEAD);
        let read = pin!(self.tcp.read_buf(&mut self.ahead)).poll(cx);
        if let Poll::Ready(Ok(length)) = read {
            self.traffic.received.inc_by(length as u64);
        } else {
            self.ahead = Vec::new();
        }
        read.map_ok(|_| ())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.traffic.open.dec();
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            ready!(self.read_ahead(cx))?;
        }
        let left = &self.ahead[self.taken..];
        let length = left.len().min(into.remaining());
        into.put_slice(&left[..length]);
        self.taken += length;
        if self.taken == self.ahead.len() {
            (self.ahead, self.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        self.traffic.sent.inc_by(written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
