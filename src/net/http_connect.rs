//! The handshake with an HTTP proxy: `CONNECT`, and the head of its answer.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest head of a proxy's answer, in bytes; the head of balena's proxy has 84.
const MAX_HEAD: usize = 8 << 10;
/// The most headers in a proxy's answer.
const MAX_HEADERS: usize = 100;

/// Why a proxy has no answer, as the end of "the proxy …".
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// It ends the connection, whichever way the operating system reports it.
    #[error("closes the connection without an answer")]
    Closed,
    /// The connection fails.
    #[error("breaks the connection: {0}")]
    Broken(io::Error),
    /// The head of its answer has no end.
    #[error("sends a head of more than {} KiB", MAX_HEAD >> 10)]
    TooLarge,
    /// It speaks something else.
    #[error("sends an answer that is not HTTP: {0}")]
    NotHttp(#[from] httparse::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        if is_closed(&error) { HandshakeError::Closed } else { HandshakeError::Broken(error) }
    }
}

/// Asks a proxy for a tunnel to `host:port`, and returns the status of its answer.
pub async fn connect(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin), authority: &str, authorization: Option<&str>,
) -> Result<u16, HandshakeError> {
    let authorization = authorization.map_or_else(String::new, |value| format!("Proxy-Authorization: {value}\r\n"));
    let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{authorization}\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::with_capacity(128);
    loop {
        // byte by byte, since the device's bytes follow the head
        head.push(stream.read_u8().await?);
        if head.ends_with(b"\n")
            && let Some(status) = status(&head)?
        {
            return Ok(status);
        }
        if head.len() == MAX_HEAD {
            return Err(HandshakeError::TooLarge);
        }
    }
}

/// The status of an answer whose head is complete.
fn status(head: &[u8]) -> Result<Option<u16>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let parsed = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true)
        .parse_response(&mut answer, head)?;
    Ok(answer.code.filter(|_| parsed.is_complete()))
}

/// Whether the other side closed the connection.
pub fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}
