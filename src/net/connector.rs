//! Ways to a target: TCP, TLS, and balena's VPN proxy.
//!
//! What is said here of that proxy was recorded from balena's own open-balena-vpn 12.3.105 (`tests/recordings/vpn`).

use std::error::Error;
use std::io;
use std::iter;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use hyper::Uri;
use hyper::service::Service;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::service::TowerToHyperService;
use prometheus::{IntCounter, IntGauge};
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls_platform_verifier::Verifier;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use crate::balena::key::ApiKey;

/// For the whole way to a device, where nothing else is known: below Prometheus' time-out of 10 s, so that there is time
/// to say so. A device that swallows packets makes the proxy say nothing for 134 s.
pub const PATIENCE: Duration = Duration::from_secs(9);
/// The largest head of a proxy's answer, in bytes; balena's has 84.
const LARGEST_HEAD: usize = 8 << 10;

/// What bytes go through in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection, of whatever is in it.
pub type Stream = Box<dyn Duplex>;

/// Why there is no connection, or no use in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// One word for it, for metrics and machines.
    pub reason: &'static str,
    /// The status of the answer that refused, if there was one.
    pub status: Option<u16>,
    /// For people; short enough for a status line.
    pub message: String,
}

impl Refused {
    /// Refused without a status.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Refused { reason, status: None, message: message.into() }
    }
}

/// When an answer has to be there.
#[derive(Clone, Copy)]
pub struct Deadline {
    within: Duration,
    /// The moment.
    pub at: Instant,
}

impl Deadline {
    /// So long from now.
    pub fn within(within: Duration) -> Self {
        Deadline { within, at: Instant::now() + within }
    }

    /// What comes in time.
    pub async fn wait<T>(self, answer: impl Future<Output = T>) -> Result<T, Refused> {
        let late = |_| Refused::new("timeout", format!("no answer in {} s", self.within.as_secs_f64()));
        timeout_at(self.at, answer).await.map_err(late)
    }
}

/// What connections cost, counted as they do: bytes within TCP, those of TLS among them.
#[derive(Clone)]
pub struct Traffic {
    /// Connections that are open.
    pub open: IntGauge,
    /// Bytes sent.
    pub sent: IntCounter,
    /// Bytes received.
    pub received: IntCounter,
}

/// A connection that is counted while it is open.
struct Counted(TcpStream, Traffic);

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.open.dec();
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, into))?;
        self.1.received.inc_by((into.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.0).poll_write(cx, bytes))?;
        self.1.sent.inc_by(written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Opens connections.
#[derive(Clone)]
pub struct Connector {
    tcp: TowerToHyperService<HttpConnector>,
    tls: TlsConnector,
    proxies: Arc<Matcher>,
    /// Counts what it opens, if anyone wants to know.
    pub traffic: Option<Traffic>,
}

impl Connector {
    /// Trusts the platform's roots and these.
    pub fn new(roots: Vec<CertificateDer<'static>>) -> Result<Self, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(Verifier::new_with_extra_roots(roots, provider.clone())?);
        // No ALPN: the VPN proxy must not be offered h2, and HTTP/1.1 is what comes without.
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // A kept tunnel may idle for minutes, in which a NAT or a load balancer on the way forgets it without a word. This
        // goes no further than to balena's proxy: it costs the device's own link nothing.
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(15)));
        tcp.set_keepalive_retries(Some(3));
        let proxies = Arc::new(Matcher::from_env());
        let (tcp, tls) = (TowerToHyperService::new(tcp), TlsConnector::from(Arc::new(tls)));
        Ok(Connector { tcp, tls, proxies, traffic: None })
    }

    /// Connects to the host and port of a URL, with TLS where it is https, and then by way of the proxy that
    /// `HTTPS_PROXY` names; `NO_PROXY` is honoured.
    pub async fn open(&self, url: &Uri) -> Result<Stream, Refused> {
        let host = url.host().unwrap_or_default();
        if url.scheme_str() != Some("https") {
            return self.tcp(url).await;
        }
        let stream = match self.proxies.intercept(url) {
            None => self.tcp(url).await?,
            Some(proxy) => {
                let mut stream = self.tcp(proxy.uri()).await?;
                let authority = format!("{host}:{}", url.port_u16().unwrap_or(443));
                let authorization = proxy.basic_auth().and_then(|value| value.to_str().ok());
                match connect(&mut stream, &authority, authorization).await {
                    Ok(200) => stream,
                    Ok(status) => {
                        let message = format!("the proxy that HTTPS_PROXY names answers {status}");
                        return Err(Refused { status: Some(status), ..Refused::new("proxy", message) });
                    }
                    Err(error) => {
                        return Err(Refused::new("proxy", format!("the proxy that HTTPS_PROXY names: {error}")));
                    }
                }
            }
        };
        self.secure(stream, host).await
    }

    /// TLS within a connection.
    pub async fn secure(&self, stream: Stream, host: &str) -> Result<Stream, Refused> {
        let refused = |error: &dyn Error| Refused::new("tls", format!("TLS: {error}"));
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(|error| refused(&error))?;
        Ok(Box::new(self.tls.connect(name, stream).await.map_err(|error| refused(&error))?))
    }

    async fn tcp(&self, url: &Uri) -> Result<Stream, Refused> {
        let stream = self.tcp.call(url.clone()).await.map_err(|error| no_connection(&error))?.into_inner();
        let Some(traffic) = self.traffic.clone() else { return Ok(Box::new(stream)) };
        traffic.open.inc();
        Ok(Box::new(Counted(stream, traffic)))
    }
}

fn no_connection(error: &(dyn Error + 'static)) -> Refused {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    let causes = iter::successors(Some(error), |error| (*error).source());
    let Some(cause) = causes.filter_map(|error| error.downcast_ref::<io::Error>()).last() else {
        return Refused::new("no_connection", error.to_string());
    };
    match cause.kind() {
        ConnectionRefused => Refused::new("refused", "connection refused"),
        HostUnreachable | NetworkUnreachable => Refused::new("no_route", "no route to it"),
        TimedOut => Refused::new("timeout", "timed out"),
        _ if cause.raw_os_error().is_none() => Refused::new("no_such_host", format!("no such host: {cause}")),
        _ => Refused::new("no_connection", cause.to_string()),
    }
}

/// balena's VPN proxy: the way to any port of any device that the key may reach, as `<uuid>.balena:<port>`.
///
/// - Access is checked at `CONNECT` only. A tunnel may idle (320 s tried) and take several requests; one that timed out
///   must not be used again.
/// - Never half-close: `SHUT_WR` destroys the tunnel and loses the answer.
/// - After an error answer the proxy only half-closes: the connection is dropped here.
pub struct Tunnel {
    connector: Connector,
    url: Uri,
    key: Mutex<ApiKey>,
    key_file: Option<PathBuf>,
}

impl Tunnel {
    /// Through the proxy at this URL, with this key; where it came from a file, that is read again when the key is
    /// refused.
    pub fn new(connector: Connector, url: Uri, key: ApiKey, key_file: Option<PathBuf>) -> Self {
        Tunnel { connector, url, key: Mutex::new(key), key_file }
    }

    /// Opens a tunnel to `<uuid>.balena:<port>`.
    pub async fn open(&self, authority: &str, deadline: Deadline) -> Result<Stream, Refused> {
        let key = self.key();
        match self.ask(authority, &key, deadline).await {
            Err(refused) if refused.status == Some(407) && self.has_another_key(&key).await => {
                self.ask(authority, &self.key(), deadline).await
            }
            answer => answer,
        }
    }

    async fn ask(&self, authority: &str, key: &ApiKey, deadline: Deadline) -> Result<Stream, Refused> {
        let lost =
            |refused: Refused| Refused::new("no_tunnel", format!("tunnel host not reachable: {}", refused.message));
        let mut stream = deadline.wait(self.connector.open(&self.url)).await.flatten().map_err(lost)?;
        // the proxy ignores the user's name; in lower case the first word is not understood
        let user = format!("Basic {}", BASE64_STANDARD.encode(format!("baletheus:{}", key.secret())));
        match deadline.wait(connect(&mut stream, authority, Some(&user))).await? {
            Ok(200) => Ok(stream),
            Ok(status) => Err(refusal(status, authority)),
            Err(error) => Err(Refused::new("bad_tunnel", format!("tunnel host: {error}"))),
        }
    }

    fn key(&self) -> ApiKey {
        self.key.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is another key than this one by now: the file is read again, unless another scrape did that.
    async fn has_another_key(&self, used: &ApiKey) -> bool {
        if let Some(file) = self.key_file.clone().filter(|_| self.key() == *used)
            && let Ok(Some(Ok(key))) = spawn_blocking(move || file.is_file().then(|| ApiKey::read(&file))).await
        {
            *self.key.lock().unwrap_or_else(PoisonError::into_inner) = key;
        }
        self.key() != *used
    }
}

/// What the proxy means by a status.
fn refusal(status: u16, authority: &str) -> Refused {
    let (reason, message) = match status {
        // the same for all of these; it may pass by itself
        407 => ("no_access", "refused: no access, unknown device, or balena's API busy".into()),
        503 => ("not_connected", "device not connected to the VPN".into()),
        500 => {
            let port = authority.rsplit(':').next().unwrap_or_default();
            ("port_closed", format!("port {port} closed or device unreachable"))
        }
        403 => ("no_device", "refused: not the name of a device".into()),
        _ => ("bad_tunnel", "the tunnel host is no VPN proxy of balena's".into()),
    };
    Refused { status: Some(status), ..Refused::new(reason, message) }
}

/// Asks a proxy for a tunnel, and gives the status of its answer. It is always HTTP/1.0 from balena's.
async fn connect(stream: &mut Stream, authority: &str, authorization: Option<&str>) -> io::Result<u16> {
    let authorization = authorization.map_or_else(String::new, |value| format!("Proxy-Authorization: {value}\r\n"));
    let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{authorization}\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::with_capacity(128);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == LARGEST_HEAD {
            return Err(io::Error::other("its answer is too long"));
        }
        // byte by byte, since what comes after the head is the device's
        head.push(stream.read_u8().await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("closes the connection without an answer"),
            _ => error,
        })?);
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut answer = httparse::Response::new(&mut headers);
    let parsed = answer.parse(&head).map_err(|error| io::Error::other(format!("its answer is not HTTP: {error}")))?;
    answer.code.filter(|_| parsed.is_complete()).ok_or_else(|| io::Error::other("its answer is not HTTP"))
}
