//! The routes of the status endpoint: `/metrics`, `/-/healthy`, `/-/ready`, `/targets` and a page for people.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::header::{ALLOW, HeaderMap, HeaderValue, REFRESH};
use hyper::{Method, Request, Response, StatusCode};

use super::page::view::{self, View};
use super::page::wanted::Wanted;
use super::page::{self, Page};
use super::series::{Series, Targets, Text};
use super::stream::{self, Answer, whole};
use super::{Shown, Status, Trouble, guard};
use crate::net::server::{self, Limits, METRICS, TEXT, WhenFull};

/// The most connections. One more closes the oldest, which is idle or slow.
const MAX_CONNECTIONS: usize = 32;
/// The limit for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The limit for a whole request and its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest head of a request, in bytes.
const MAX_HEAD_SIZE: usize = 16 << 10;

/// The state of the devices is old after three intervals, each of which counts as at least this long.
const MIN_STATE_AGE: Duration = Duration::from_secs(20);

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, status: Arc<Status>) -> io::Result<Infallible> {
    let limits = Limits {
        connections: MAX_CONNECTIONS,
        when_full: WhenFull::CloseOldest,
        head_timeout: HEAD_TIMEOUT,
        max_head: MAX_HEAD_SIZE,
        single: Some(ANSWER_TIMEOUT),
    };
    let handler = move |request: Request<_>| {
        let mut answer = status.answer(&request);
        guard::protect(&mut answer);
        async { answer }
    };
    server::serve(listener, limits, handler, |_| ()).await
}

impl Status {
    fn answer<B>(&self, request: &Request<B>) -> Response<Answer> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = whole(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        if let Err(refused) = self.guard.check(request) {
            let (status, text) = refused.answer();
            return whole(status, TEXT, text);
        }
        let shown = self.shown().clone();
        let headers = request.headers();
        match request.uri().path() {
            "/metrics" => {
                let own = self.metrics.text(&self.requests);
                let list = shown.list.unwrap_or_default();
                stream::answer(headers, &self.packing, METRICS, Series::new(own, list, shown.watched))
            }
            "/-/healthy" => match self.liveness.overdue() {
                None => whole(StatusCode::OK, TEXT, "healthy\n"),
                Some(late) => {
                    let text =
                        format!("discovery hangs: it is {} s late; restart it and look at its log\n", late.as_secs());
                    whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            "/-/ready" => match shown.readiness() {
                Ok(text) => whole(StatusCode::OK, TEXT, text),
                Err(why) => whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, why),
            },
            "/targets" => self.targets(headers, shown),
            "/" => {
                let wanted = Wanted::of(request.uri());
                let stays = wanted.stays;
                let page = Page::new(self.view(shown, wanted));
                let mut answer = stream::answer(headers, &self.packing, "text/html; charset=utf-8", page);
                if !stays {
                    answer.headers_mut().insert(REFRESH, HeaderValue::from_static(page::REFRESH));
                }
                answer
            }
            "/style.css" => whole(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            _ => whole(StatusCode::NOT_FOUND, TEXT, "there are /metrics, /-/healthy, /-/ready, /targets and /\n"),
        }
    }

    fn targets(&self, headers: &HeaderMap, shown: Shown) -> Response<Answer> {
        const KIND: &str = "application/json";
        match (shown.readiness(), shown.list, shown.stored) {
            (_, Some(list), _) => stream::answer(headers, &self.packing, KIND, Targets::new(list)),
            (_, None, Some(stored)) => stream::answer(headers, &self.packing, KIND, Text(stored.text)),
            (why, None, None) => whole(StatusCode::SERVICE_UNAVAILABLE, TEXT, why.err().unwrap_or_default()),
        }
    }

    fn view(&self, shown: Shown, wanted: Wanted) -> View {
        let now = SystemTime::now();
        let since = |time: SystemTime| view::about(now.duration_since(time).unwrap_or_default());
        let state = match (&shown.trouble, self.liveness.overdue(), &shown.list) {
            (_, Some(_), _) => "stuck",
            (Some(_), _, _) => "failing",
            (None, None, None) => "starting",
            (None, None, Some(_)) => "well",
        };
        let mut problems = Vec::new();
        if let Some(late) = self.liveness.overdue() {
            problems
                .push(format!("Discovery hangs: it is {} late. Restart it and look at its log.", view::about(late)));
        }
        if let Some(trouble) = &shown.trouble {
            let what = match trouble {
                Trouble::Failed(_) => "The last refresh failed",
                Trouble::HeldBack => "The new list is held back",
            };
            problems.push(format!("{what}: {}", trouble.why()));
        }
        match &shown.list {
            None if shown.stored.is_some() => problems.push(
                "There is no new list since the start: /targets has the list that the target file had then.".into(),
            ),
            None => problems.push("There is no list yet, and /targets answers 503.".into()),
            Some(list) if list.entries().next().is_none() => {
                problems.push("The API lists no device for this key and these options.".into());
            }
            Some(_) => {}
        }
        let read = shown.states_read.unwrap_or(self.started);
        if now.duration_since(read).is_ok_and(|age| age > 3 * self.device_refresh.max(MIN_STATE_AGE)) {
            let age = since(read);
            problems.push(format!("The state of the devices was read {age} ago for the last time: the log says why."));
        }
        let (refreshed, list) = (shown.refreshed, shown.list.unwrap_or_default());
        View { state, problems, refreshed, list, states: shown.watched.states, wanted, now }
    }
}
