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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::net::server::reply;

/// The size of a piece, in bytes. The last part of a piece may exceed it.
const PIECE_SIZE: usize = 64 << 10;
/// Answers that are packed at once. Each takes about 300 KiB, so that further ones go out as plain text.
pub const MAX_PACKED: usize = 4;

/// The body of an answer: whole, or in pieces.
pub type Content = Either<Full<Bytes>, Pieces>;

/// What makes an answer, part by part: appends the next one, which may be empty. False at the end.
pub type Parts = Box<dyn FnMut(&mut Vec<u8>) -> bool + Send>;

/// A body that is made piece by piece.
pub struct Pieces {
    parts: Option<Parts>,
    gzip: Option<(GzEncoder<Vec<u8>>, OwnedSemaphorePermit)>,
}

/// An answer of these parts, with gzip if the client accepts it. `packing` has a permit for each of [`MAX_PACKED`] answers.
pub fn answer(headers: &HeaderMap, packing: &Arc<Semaphore>, kind: &'static str, parts: Parts) -> Response<Content> {
    let permit = if accepts_gzip(headers) { packing.clone().try_acquire_owned().ok() } else { None };
    let gzip = permit.map(|permit| (GzEncoder::new(Vec::new(), Compression::fast()), permit));
    let packs = gzip.is_some();
    let mut answer = reply::<Content>(StatusCode::OK, kind, Either::Right(Pieces { parts: Some(parts), gzip }));
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
        while let Some(parts) = &mut self.parts {
            if !parts(&mut text) {
                self.parts = None;
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
        if self.parts.is_none()
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
