//! TLS records, read several at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A TLS connection whose reads return all records that have come, as far as there is room. rustls returns one at a time,
/// and each would go to Prometheus in its own system call.
pub struct Records<S> {
    tls: S,
    /// An error that came after bytes were read in the same call. The next read returns it.
    failure: Option<io::Error>,
}

impl<S> Records<S> {
    /// Reads this connection.
    pub fn of(tls: S) -> Self {
        Records { tls, failure: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Records<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Err(failure));
        }
        ready!(Pin::new(&mut self.tls).poll_read(cx, into))?;
        let mut end = 0;
        while into.remaining() > 0 && into.filled().len() > end {
            end = into.filled().len();
            match Pin::new(&mut self.tls).poll_read(cx, into) {
                Poll::Ready(read) => self.failure = read.err(),
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Records<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
