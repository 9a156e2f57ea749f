//! The relay for https targets: bytes between Prometheus and the device, which the tunnel does not read.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::net::connector::Stream;
use crate::tunnel::pool::IDLE_TIMEOUT;

/// Bytes in flight in each direction.
const BUFFER: usize = 16 << 10;

/// Relays until either side ends, or until one of them sends nothing for `IDLE_TIMEOUT`. It closes both sides at once: a
/// half-closed tunnel loses the answer.
pub async fn relay(prometheus: impl AsyncRead + AsyncWrite + Send + 'static, device: Stream) {
    let (from_prometheus, to_prometheus) = tokio::io::split(prometheus);
    let (from_device, to_device) = tokio::io::split(device);
    let mut directions = JoinSet::new();
    directions.spawn(copy(from_prometheus, to_device));
    directions.spawn(copy(from_device, to_prometheus));
    directions.join_next().await;
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = timeout(IDLE_TIMEOUT, from.read(&mut buffer)).await??;
        if length == 0 {
            return Ok(());
        }
        timeout(IDLE_TIMEOUT, to.write_all(&buffer[..length])).await??;
        timeout(IDLE_TIMEOUT, to.flush()).await??;
    }
}
