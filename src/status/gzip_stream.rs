//! An answer in pieces, with gzip: it is made from what is kept while the client reads, so that a slow or large answer takes no
//! more memory than a piece. What it is made from is fixed when it begins, so that it shows one moment.

use std::convert::Infallible;
use std::io::Write;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::{Either, Full};
use hyper::body::{Body, Bytes, Frame};
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, VARY};
use hyper::{Response, StatusCode};

use crate::net::server::reply;

/// The size of a piece, in bytes. The last part of a piece may exceed it.
const PIECE_SIZE: usize = 64 << 10;
/// Answers that are packed at once. Each takes about 300 KiB, so that further ones go out as plain text.
const MAX_PACKED: usize = 4;

/// The body of an answer: whole, or in pieces.
pub type Content = Either<Full<Bytes>, Pieces>;

/// What makes an answer, part by part.
pub trait Parts: Send {
    /// Appends the next part, which may be empty. False at the end.
    fn append(&mut self, out: &mut Vec<u8>) -> bool;
}

/// Counts the answers that are being packed.
#[derive(Clone, Default)]
pub struct Packing(Arc<()>);

/// A body that is made piece by piece.
pub struct Pieces {
    source: Option<Box<dyn Parts>>,
    gzip: Option<(GzEncoder<Vec<u8>>, Packing)>,
}

/// An answer from this source, with gzip if the client accepts it.
pub fn answer(
    headers: &HeaderMap, packing: &Packing, kind: &'static str, source: impl Parts + 'static,
) -> Response<Content> {
    let packs = accepts_gzip(headers) && Arc::strong_count(&packing.0) <= MAX_PACKED;
    let gzip = packs.then(|| (GzEncoder::new(Vec::new(), Compression::fast()), packing.clone()));
    let stream = Pieces { source: Some(Box::new(source)), gzip };
    let mut answer = reply::<Content>(StatusCode::OK, kind, Either::Right(stream));
    answer.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    if packs {
        answer.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    answer
}

/// A short answer.
pub fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Content> {
    reply::<Content>(status, kind, Either::Left(Full::new(body.into())))
}

/// Whether gzip is named, and not with a quality of 0.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|coding| {
        let (name, quality) = coding.split_once(';').unwrap_or((coding, ""));
        let quality = quality.trim().strip_prefix("q=").and_then(|quality| quality.parse().ok());
        name.trim().eq_ignore_ascii_case("gzip") && quality != Some(0.0)
    })
}

impl Pieces {
    /// The next piece, or none at the end.
    fn piece(&mut self) -> Option<Vec<u8>> {
        let mut text = Vec::with_capacity(PIECE_SIZE + 1024);
        while let Some(source) = &mut self.source {
            if !source.append(&mut text) {
                self.source = None;
            } else if text.len() < PIECE_SIZE {
                continue;
            }
            let Some((encoder, _)) = &mut self.gzip else { break };
            let _ = encoder.write_all(&text); // into memory: cannot fail
            text.clear();
            if encoder.get_ref().len() >= PIECE_SIZE {
                text = mem::take(encoder.get_mut());
                break;
            }
        }
        if self.source.is_none()
            && let Some((encoder, _)) = self.gzip.take()
        {
            text.extend(encoder.finish().unwrap_or_default());
        }
        (!text.is_empty()).then_some(text)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.piece().map(|piece| Ok(Frame::data(piece.into()))))
    }
}
