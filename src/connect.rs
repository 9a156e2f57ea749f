//! Ways to a target: TCP, TLS, and balena's VPN proxy.
//!
//! What is said here of that proxy was recorded from balena's own open-balena-vpn 12.3.105 (`tests/recordings/vpn`).

use std::error::Error;
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use hyper::Uri;
use hyper::service::Service;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::service::TowerToHyperService;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls_platform_verifier::Verifier;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use crate::key::ApiKey;

/// For the whole way to a device: below Prometheus' time-out of 10 s, so that there is time to say so. A device that
/// swallows packets makes the proxy say nothing for 134 s [recorded].
const DEADLINE: Duration = Duration::from_secs(9);
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

/// Opens connections.
#[derive(Clone)]
pub struct Connector {
    tcp: TowerToHyperService<HttpConnector>,
    tls: TlsConnector,
    proxies: Arc<Matcher>,
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
        let proxies = Arc::new(Matcher::from_env());
        Ok(Connector { tcp: TowerToHyperService::new(tcp), tls: TlsConnector::from(Arc::new(tls)), proxies })
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
        let stream = self.tcp.call(url.clone()).await.map_err(|error| no_connection(&error))?;
        Ok(Box::new(stream.into_inner()))
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
    authorization: String,
}

impl Tunnel {
    /// Through the proxy at this URL, with this key; the proxy ignores the user's name.
    pub fn new(connector: Connector, url: Uri, key: &ApiKey) -> Self {
        let user = BASE64_STANDARD.encode(format!("baletheus:{}", key.secret()));
        // in lower case the word is not understood
        Tunnel { connector, url, authorization: format!("Basic {user}") }
    }

    /// Opens a tunnel to `<uuid>.balena:<port>`, within a deadline of its own.
    pub async fn open(&self, authority: &str) -> Result<Stream, Refused> {
        let deadline = Instant::now() + DEADLINE;
        let late = format!("no answer in {} s", DEADLINE.as_secs());
        let lost = |cause: &str| Refused::new("no_tunnel", format!("tunnel host not reachable: {cause}"));
        let opened = timeout_at(deadline, self.connector.open(&self.url)).await.map_err(|_| lost(&late))?;
        let mut stream = opened.map_err(|refused| lost(&refused.message))?;
        match timeout_at(deadline, connect(&mut stream, authority, Some(&self.authorization))).await {
            Ok(Ok(200)) => Ok(stream),
            Ok(Ok(status)) => Err(refusal(status, authority)),
            Ok(Err(error)) => Err(Refused::new("no_tunnel", format!("tunnel host: {error}"))),
            Err(_) => Err(Refused::new("timeout", late)),
        }
    }
}

/// What the proxy means by a status [recorded].
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
        _ => ("no_tunnel", "the tunnel host is no VPN proxy of balena's".into()),
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
