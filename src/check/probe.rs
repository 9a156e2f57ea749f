//! A target is tried as Prometheus would scrape it, within bounds of time and size. Its samples are counted.

use std::io::{self, Write};
use std::str;
use std::sync::Arc;
use std::time::Duration;

use flate2::write::MultiGzDecoder;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderName, LOCATION, USER_AGENT};
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use reqwest::Url;
use tokio::time::{Instant, timeout};

use crate::net;
use crate::net::scrape_client::{broken, client, send};
use crate::net::{Connector, Deadline, ScrapeError, ScrapeReason, TIMEOUT_SHARE, Vpn, check_destination};

/// Prometheus' default `scrape_timeout`.
pub const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// As many redirects as Go's HTTP client follows, which Prometheus uses.
const MAX_REDIRECTS: usize = 10;
/// The largest answer, unpacked, in bytes. A `node_exporter` answers with 60 KB.
const MAX_ANSWER: usize = 16 << 20;
/// The longest line of an answer, in bytes: each target that is tried keeps one.
const MAX_LINE: usize = 64 << 10;
/// The `Accept` header of Prometheus 2.42.
const FORMATS: &str = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
    text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

pub struct Prober {
    pub connector: Connector,
    /// The way to all targets, if it is not the direct one.
    pub vpn: Option<Vpn>,
    /// Whether the targets are in the LAN, where no proxy is.
    pub is_lan: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct ProbeSuccess {
    pub samples: usize,
    /// Whether it is of a `node_exporter` before 0.16, whose names the dashboards do not know.
    pub outdated: bool,
    /// Whether another path of the target answers, to which it redirects.
    pub redirected: bool,
    /// From the first step to the last byte.
    pub duration: Duration,
}

impl Prober {
    /// Tries a target within the time-out of its scrape.
    pub async fn probe(&self, url: &str, limit: Duration) -> Result<ProbeSuccess, ScrapeError> {
        let start = Instant::now();
        let late = |_| ScrapeError::new(ScrapeReason::Timeout, format!("timed out after {} s", limit.as_secs_f64()));
        let (metrics, redirected) = timeout(limit, self.follow(url, limit)).await.map_err(late)??;
        let outdated = metrics.old_cpu && !metrics.new_cpu;
        Ok(ProbeSuccess { samples: metrics.samples, outdated, redirected, duration: start.elapsed() })
    }

    /// Follows redirects as Prometheus does, but only within the target: an answer of a device must not choose where a
    /// request goes. Returns the samples, and whether it was redirected.
    async fn follow(&self, url: &str, limit: Duration) -> Result<(SampleCounter, bool), ScrapeError> {
        let no_url = |what: &str| ScrapeError::new(ScrapeReason::Http, format!("leads to {what:?}, which is no URL"));
        let mut url = Url::parse(url).map_err(|_| no_url(url))?;
        let target = host_port(&url);
        check_destination(&target, Some(()))?;
        for redirects in 0..=MAX_REDIRECTS {
            let answer = self.get(&url, limit).await?;
            let location = text_of(&answer, &LOCATION).filter(|_| answer.status().is_redirection());
            let Some(location) = location else { return Ok((count(answer).await?, redirects > 0)) };
            url = url.join(location).ok().filter(Url::has_host).ok_or_else(|| no_url(location))?;
            let to = host_port(&url);
            if check_destination(&to, (to == target).then_some(())).is_err() {
                let message = format!("redirects to {to}, away from the target: a scrape does not follow");
                let status = Some(answer.status().as_u16());
                return Err(ScrapeError { status, ..ScrapeError::new(ScrapeReason::Redirect, message) });
            }
        }
        Err(ScrapeError::new(ScrapeReason::Http, "redirects without end"))
    }

    async fn get(&self, url: &Url, limit: Duration) -> Result<Response<Incoming>, ScrapeError> {
        let no_url = || ScrapeError::new(ScrapeReason::Http, format!("{url} is no URL"));
        let (host, authority) = (url.host_str().unwrap_or_default(), host_port(url));
        let uri: Uri = url.as_str().parse().map_err(|_| no_url())?;
        let deadline = Deadline::after(limit.mul_f64(TIMEOUT_SHARE));
        let stream = match &self.vpn {
            // Prometheus reaches a target without a proxy; a public URL may be outside the network
            None if url.scheme() == "http" || self.is_lan => self.connector.open_directly(&uri, deadline).await?,
            None => self.connector.open(&uri, deadline).await?,
            Some(vpn) => {
                let stream = vpn.open(&authority, deadline).await?;
                if url.scheme() == "https" { self.connector.secure(stream, host).await? } else { stream }
            }
        };
        let request = Request::get(uri.path_and_query().map_or("/", PathAndQuery::as_str))
            .header(HOST, authority)
            .header(USER_AGENT, net::USER_AGENT)
            .header(ACCEPT, FORMATS)
            .header(ACCEPT_ENCODING, "gzip")
            .header("X-Prometheus-Scrape-Timeout-Seconds", limit.as_secs_f64().to_string())
            .body(Empty::<Bytes>::new())
            .map_err(|_| no_url())?;
        let (mut sender, connection) =
            client().handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        // it ends with the answer, or when the probe ends
        tokio::spawn(connection);
        send(&mut sender, request, &Arc::default()).await
    }
}

/// The host and port of a URL, as `host:port`.
fn host_port(url: &Url) -> String {
    format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(80))
}

fn text_of<'a, B>(answer: &'a Response<B>, name: &HeaderName) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

/// Reads an answer to its end and counts its samples.
async fn count(answer: Response<Incoming>) -> Result<SampleCounter, ScrapeError> {
    if answer.status() != StatusCode::OK {
        let message = format!("HTTP {}", answer.status());
        return Err(ScrapeError {
            status: Some(answer.status().as_u16()),
            ..ScrapeError::new(ScrapeReason::Http, message)
        });
    }
    // Prometheus 3 fails a scrape with another type or without one
    let format = text_of(&answer, &CONTENT_TYPE).unwrap_or_default();
    let mut parts = format.split(';').map(|part| part.trim().to_ascii_lowercase());
    let format = parts.next().unwrap_or_default();
    if parts.any(|part| !part.is_empty() && !part.contains('=')) {
        let message = "a Content-Type with a parameter without a value, which Prometheus 3 refuses";
        return Err(ScrapeError::new(ScrapeReason::NotMetrics, message));
    }
    let open_metrics = match &*format {
        "text/plain" => false,
        "application/openmetrics-text" => true,
        "" => return Err(ScrapeError::new(ScrapeReason::NotMetrics, "no Content-Type, which Prometheus 3 insists on")),
        other => return Err(ScrapeError::new(ScrapeReason::NotMetrics, format!("not metrics, but {other}"))),
    };
    let mut metrics = SampleCounter::default();
    let packed = text_of(&answer, &CONTENT_ENCODING) == Some("gzip");
    if packed {
        let mut unpacked = MultiGzDecoder::new(&mut metrics);
        pour(answer.into_body(), &mut unpacked).await?;
        // The checksum and the length at the end count, too.
        unpacked.try_finish().map_err(not_metrics)?;
    } else {
        pour(answer.into_body(), &mut metrics).await?;
    }
    metrics.end_line().map_err(not_metrics)?; // the last line may lack its line feed
    if open_metrics && metrics.last != b"# EOF" {
        return Err(ScrapeError::new(ScrapeReason::NotMetrics, "OpenMetrics without # EOF at its end"));
    }
    Ok(metrics)
}

/// Reads a body to its end.
async fn pour(mut body: Incoming, sink: &mut (impl Write + Send)) -> Result<(), ScrapeError> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        frame.data_ref().map_or(Ok(()), |data| sink.write_all(data)).map_err(not_metrics)?;
    }
    sink.flush().map_err(not_metrics)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn not_metrics(error: io::Error) -> ScrapeError {
    ScrapeError::new(ScrapeReason::NotMetrics, error.to_string())
}

/// Counts samples as the bytes arrive, and keeps one line.
#[derive(Default)]
struct SampleCounter {
    bytes: usize,
    samples: usize,
    /// Whether there is a `node_cpu`, the name before `node_exporter` 0.16.
    old_cpu: bool,
    /// Whether there is a `node_cpu_seconds_total`.
    new_cpu: bool,
    lines: u64,
    /// The current line so far.
    line: Vec<u8>,
    /// The last line that is not empty, if it is a comment.
    last: Vec<u8>,
}

impl SampleCounter {
    /// Judges a complete line.
    fn end_line(&mut self) -> io::Result<()> {
        self.lines += 1;
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        if line.ends_with(b"\r") {
            let why = format!("not metrics: line {} ends with a carriage return, which Prometheus refuses", self.lines);
            return Err(io::Error::other(why));
        }
        let line = line.trim_ascii();
        if line.starts_with(b"#") {
            self.last = line.to_vec();
        } else if is_sample(line) {
            self.samples += 1;
            let name = line.split(|byte| matches!(byte, b'{' | b' ' | b'\t')).next();
            self.old_cpu |= name == Some(b"node_cpu");
            self.new_cpu |= name == Some(b"node_cpu_seconds_total");
            self.last.clear();
        } else if !line.is_empty() {
            let shown: String = String::from_utf8_lossy(line).chars().take(40).collect();
            return Err(io::Error::other(format!("not metrics: line {} is {shown:?}", self.lines)));
        }
        self.line.clear();
        Ok(())
    }
}

impl Write for SampleCounter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len();
        if self.bytes > MAX_ANSWER {
            return Err(io::Error::other(format!("not metrics: more than {} MiB", MAX_ANSWER >> 20)));
        }
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > MAX_LINE {
                return Err(io::Error::other(format!("not metrics: a line of more than {} KiB", MAX_LINE >> 10)));
            }
            if part.ends_with(b"\n") {
                self.end_line()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a line is a sample: `name{label="value"} 1.5`, with or without labels and a timestamp. Labels are not judged.
fn is_sample(line: &[u8]) -> bool {
    let Ok(line) = str::from_utf8(line) else { return false };
    // Since Prometheus 3, the name may be among the labels.
    let (name, rest) = line.split_at(line.find(['{', ' ', '\t']).unwrap_or(line.len()));
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte));
    // An exemplar has labels and a value as well, which are the last ones then.
    let rest = rest.rsplit_once('}').map_or(rest, |(_, rest)| rest);
    let mut numbers = rest.split_ascii_whitespace().map(|text| text.parse::<f64>().is_ok());
    let is_value = numbers.next() == Some(true) && numbers.next() != Some(false) && numbers.next().is_none();
    is_name && !name.starts_with(|c: char| c.is_ascii_digit()) && is_value
}
