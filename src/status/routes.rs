//! The routes of the status endpoint: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a page for people.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{ALLOW, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::gzip_stream::{self, Content, whole};
use super::{Shown, Status, exposition, page};
use crate::liveness::THAW;
use crate::metrics_registry;
use crate::net::access;
use crate::net::server::{self, Limits, TEXT};

/// The most connections. One more closes the oldest, which is idle or slow.
const MAX_CONNECTIONS: usize = 32;
/// The limit for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The limit for a whole request and its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest head of a request, in bytes.
const MAX_HEAD_SIZE: usize = 16 << 10;

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, status: Arc<Status>) -> io::Result<Infallible> {
    let limits = Limits {
        connections: MAX_CONNECTIONS,
        head_timeout: HEAD_TIMEOUT,
        max_head: MAX_HEAD_SIZE,
        single: Some(ANSWER_TIMEOUT),
    };
    let handler = move |request: Request<_>| {
        let status = status.clone();
        async move {
            if request.uri().path() == "/-/healthy" && status.liveness.late().is_some() {
                tokio::time::sleep(THAW).await;
            }
            let mut answer = status.answer(&request);
            access::protect(&mut answer);
            answer
        }
    };
    server::serve(listener, limits, handler, |_| ()).await
}

impl Status {
    fn answer<B>(&self, request: &Request<B>) -> Response<Content> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = whole(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        if let Err((status, text)) = self.settings.guard.check(request) {
            return whole(status, TEXT, text);
        }
        let shown = self.shown.lock().clone();
        let headers = request.headers();
        match request.uri().path() {
            "/metrics" => {
                let list = shown.list.unwrap_or_default();
                let metrics = exposition::metrics(self.metrics.text(), list, shown.known);
                gzip_stream::answer(headers, &self.packing, metrics_registry::CONTENT_TYPE, metrics)
            }
            "/-/healthy" => match self.liveness.late() {
                None => whole(StatusCode::OK, TEXT, "healthy\n"),
                Some(late) => {
                    let text =
                        format!("discovery hangs: it is {} s late; restart it and look at its log\n", late.as_secs());
                    whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            "/-/ready" => {
                let (status, text) = shown.readiness();
                whole(status, TEXT, text)
            }
            "/targets" => self.targets(headers, shown),
            "/" => {
                let page = exposition::text(self.page(&shown).into());
                gzip_stream::answer(headers, &self.packing, "text/html; charset=utf-8", page)
            }
            "/style.css" => whole(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            _ => whole(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /-/healthy, /-/ready, /targets and /\n"),
        }
    }

    fn targets(&self, headers: &HeaderMap, shown: Shown) -> Response<Content> {
        const KIND: &str = "application/json";
        let (status, why) = shown.readiness();
        match (shown.published, shown.stored) {
            (Some(list), _) => gzip_stream::answer(headers, &self.packing, KIND, exposition::targets(list)),
            (None, Some(stored)) => gzip_stream::answer(headers, &self.packing, KIND, exposition::text(stored.text)),
            (None, None) => whole(status, TEXT, why),
        }
    }
}
