//! Connections to a target: TCP, TLS, and the proxy that `HTTPS_PROXY` names.

use std::error::Error;
use std::io;
use std::iter;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

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
use tokio_rustls::TlsConnector;

use crate::net::refused::{Reason, Refused};

/// The largest head of a proxy's answer, in bytes; the head of balena's proxy has 84.
const MAX_PROXY_HEAD: usize = 8 << 10;
/// The most headers in a proxy's answer.
const MAX_PROXY_HEADERS: usize = 32;

/// Something that bytes go through in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection, with or without TLS.
pub type Stream = Box<dyn Duplex>;

/// Counters for connections. The bytes are those within TCP, so they include TLS.
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
    /// Counts the connections, if set.
    pub traffic: Option<Traffic>,
}

impl Connector {
    /// Trusts the platform's root certificates and these.
    pub fn new(roots: Vec<CertificateDer<'static>>) -> Result<Self, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(Verifier::new_with_extra_roots(roots, provider.clone())?);
        // Without ALPN a server speaks HTTP/1.1, and balena's VPN proxy knows nothing else.
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // A kept tunnel idles for minutes, in which a NAT or a load balancer may forget it silently. Keep-alive packets go
        // to balena's proxy only: they cost nothing on the device's link.
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(15)));
        tcp.set_keepalive_retries(Some(3));
        let proxies = Arc::new(Matcher::from_env());
        let (tcp, tls) = (TowerToHyperService::new(tcp), TlsConnector::from(Arc::new(tls)));
        Ok(Connector { tcp, tls, proxies, traffic: None })
    }

    /// Connects to the host and port of a URL. An https URL gets TLS, through the proxy that `HTTPS_PROXY` names unless
    /// `NO_PROXY` excludes the host.
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
                        return Err(Refused { status: Some(status), ..Refused::new(Reason::Proxy, message) });
                    }
                    Err(error) => {
                        return Err(Refused::new(Reason::Proxy, format!("the proxy that HTTPS_PROXY names: {error}")));
                    }
                }
            }
        };
        self.secure(stream, host).await
    }

    /// Starts TLS within a connection.
    pub async fn secure(&self, stream: Stream, host: &str) -> Result<Stream, Refused> {
        let refused = |error: &dyn Error| Refused::new(Reason::Tls, format!("TLS: {error}"));
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
        return Refused::new(Reason::NoConnection, error.to_string());
    };
    match cause.kind() {
        ConnectionRefused => Refused::new(Reason::ConnectionRefused, "connection refused"),
        HostUnreachable | NetworkUnreachable => Refused::new(Reason::NoRoute, "no route to it"),
        TimedOut => Refused::new(Reason::Timeout, "timed out"),
        _ if cause.raw_os_error().is_none() => Refused::new(Reason::NoSuchHost, format!("no such host: {cause}")),
        _ => Refused::new(Reason::NoConnection, cause.to_string()),
    }
}

/// Asks a proxy for a tunnel, and returns the status of its answer.
pub(crate) async fn connect(stream: &mut Stream, authority: &str, authorization: Option<&str>) -> io::Result<u16> {
    let authorization = authorization.map_or_else(String::new, |value| format!("Proxy-Authorization: {value}\r\n"));
    let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{authorization}\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::with_capacity(128);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MAX_PROXY_HEAD {
            return Err(io::Error::other("its answer is too long"));
        }
        // byte by byte, since the device's bytes follow the head
        head.push(stream.read_u8().await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("closes the connection without an answer"),
            _ => error,
        })?);
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_PROXY_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let parsed = answer.parse(&head).map_err(|error| io::Error::other(format!("its answer is not HTTP: {error}")))?;
    answer.code.filter(|_| parsed.is_complete()).ok_or_else(|| io::Error::other("its answer is not HTTP"))
}
