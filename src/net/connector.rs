//! Connections to a target: TCP, TLS, and the proxies that the environment names.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use hyper::service::Service;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::service::TowerToHyperService;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls_platform_verifier::Verifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::net::cannot_start::CannotStart;
use crate::net::counted_tcp::{Counted, Traffic};
use crate::net::env_proxies::{EnvProxies, EnvProxy};
use crate::net::http_connect::{connect, is_closed};
use crate::net::scrape_client::Deadline;
use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::threads::{NoThread, Resolver};
use crate::text::causes;

/// The share of the time for an answer that may pass in connecting. It is divided evenly among the addresses of a name, so the
/// last of four has a third of the time left for TLS and for the answer.
pub const CONNECT_SHARE: f64 = 2.0 / 3.0;

/// Something that bytes go through in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection, with or without TLS.
pub type Stream = Box<dyn Duplex>;

#[derive(Clone)]
pub struct Connector {
    tcp: HttpConnector<Resolver>,
    tls: TlsConnector,
    proxies: EnvProxies,
    /// Counts the connections, if set.
    pub traffic: Option<Traffic>,
}

impl Connector {
    /// Trusts the platform's root certificates and `roots`.
    ///
    /// # Errors
    /// The platform's root certificates cannot be used.
    pub fn new(roots: Vec<CertificateDer<'static>>, proxies: EnvProxies) -> Result<Self, CannotStart> {
        let tls = tls(roots).map_err(|error| no_tls(&error))?;
        let mut tcp = HttpConnector::new_with_resolver(Resolver::new());
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // A kept tunnel idles for minutes, in which a NAT or a load balancer may forget it silently. Keep-alive packets go
        // to balena's proxy only: they cost nothing on the device's link.
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(15)));
        tcp.set_keepalive_retries(Some(3));
        Ok(Connector { tcp, tls, proxies, traffic: None })
    }

    /// The proxy that connections to this URL go through.
    pub fn proxy_for(&self, url: &Uri) -> Option<EnvProxy> {
        self.proxies.find(url)
    }

    /// Connects to the host and port of a URL, with TLS if it is https, and through the proxy that the environment names.
    pub async fn open(&self, url: &Uri, deadline: Deadline) -> Result<Stream, ScrapeError> {
        let stream = match self.proxy_for(url) {
            None => self.tcp(url, deadline).await?,
            Some(proxy) => self.through(&proxy, url, deadline).await?,
        };
        self.secure_if_https(stream, url).await
    }

    /// Connects to the host and port of a URL without any proxy.
    pub async fn open_directly(&self, url: &Uri, deadline: Deadline) -> Result<Stream, ScrapeError> {
        self.secure_if_https(self.tcp(url, deadline).await?, url).await
    }

    async fn secure_if_https(&self, stream: Stream, url: &Uri) -> Result<Stream, ScrapeError> {
        match url.host() {
            Some(host) if url.scheme_str() == Some("https") => self.secure(stream, host).await,
            _ => Ok(stream),
        }
    }

    async fn through(&self, proxy: &EnvProxy, url: &Uri, deadline: Deadline) -> Result<Stream, ScrapeError> {
        let refused = |why: &str| ScrapeError::new(ScrapeReason::Proxy, format!("the proxy {proxy} {why}"));
        let unreachable = |error: ScrapeError| refused(&format!("is not reachable: {error}"));
        let stream = self.tcp(proxy.uri(), deadline).await.map_err(unreachable)?;
        let mut stream = self.secure_if_https(stream, proxy.uri()).await.map_err(unreachable)?;
        let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
        let port = url.port_u16().unwrap_or(default);
        let authority = format!("{}:{port}", url.host().unwrap_or_default());
        match connect(&mut stream, &authority, proxy.authorization()).await {
            Ok(200) => Ok(stream),
            Ok(status) => Err(ScrapeError { status: Some(status), ..refused(&format!("answers {status}")) }),
            Err(why) => Err(refused(&why.to_string())),
        }
    }

    pub async fn secure(&self, stream: Stream, host: &str) -> Result<Stream, ScrapeError> {
        let refused = |why: &str| ScrapeError::new(ScrapeReason::Tls, format!("TLS: {why}"));
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|error| refused(&error.to_string()))?;
        let secured = self.tls.connect(name, stream).await;
        let closed = "the connection closes during the handshake".to_owned();
        let why = |error: io::Error| if is_closed(&error) { closed } else { error.to_string() };
        Ok(Box::new(secured.map_err(|error| refused(&why(error)))?))
    }

    async fn tcp(&self, url: &Uri, deadline: Deadline) -> Result<Stream, ScrapeError> {
        let mut tcp = self.tcp.clone();
        tcp.set_connect_timeout(Some(deadline.left().mul_f64(CONNECT_SHARE)));
        let connected = TowerToHyperService::new(tcp).call(url.clone()).await;
        let stream = connected.map_err(|error| no_connection(&error))?.into_inner();
        let Some(traffic) = self.traffic.clone() else { return Ok(Box::new(stream)) };
        Ok(Box::new(Counted::new(stream, traffic)))
    }
}

fn tls(roots: Vec<CertificateDer<'static>>) -> Result<TlsConnector, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Verifier::new_with_extra_roots(roots, provider.clone())?);
    // Without ALPN a server speaks HTTP/1.1, and balena's VPN proxy knows nothing else.
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Why no connection of a program can use TLS, and what to do.
fn no_tls(error: &(dyn Error + 'static)) -> CannotStart {
    let causes: Vec<_> = causes(error).map(ToString::to_string).collect();
    CannotStart::Tls(format!("TLS: {}; is the package ca-certificates installed?", causes.join(": ")))
}

pub fn no_client(error: &reqwest::Error) -> CannotStart {
    NoThread::in_start(error).map_or_else(|| no_tls(error), CannotStart::Thread)
}

fn no_connection(error: &(dyn Error + 'static)) -> ScrapeError {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    if let Some(no_thread) = NoThread::find(error) {
        return ScrapeError::new(ScrapeReason::NoConnection, no_thread);
    }
    let Some(cause) = causes(error).filter_map(|error| error.downcast_ref::<io::Error>()).last() else {
        return ScrapeError::new(ScrapeReason::NoConnection, error.to_string());
    };
    match cause.kind() {
        ConnectionRefused => ScrapeError::new(ScrapeReason::ConnectionRefused, "connection refused"),
        HostUnreachable | NetworkUnreachable => ScrapeError::new(ScrapeReason::NoRoute, "no route to it"),
        TimedOut => ScrapeError::new(ScrapeReason::Timeout, "timed out"),
        _ if cause.raw_os_error().is_none() => {
            ScrapeError::new(ScrapeReason::NoSuchHost, format!("no such host: {cause}"))
        }
        _ => ScrapeError::new(ScrapeReason::NoConnection, cause.to_string()),
    }
}

/// Whether an error is about a certificate that is not trusted: rustls begins each of these with the same words.
pub fn is_untrusted(cause: &str) -> bool {
    cause.contains("invalid peer certificate")
}

/// What to do about a certificate that is not trusted, by the text of rustls.
pub fn trust_hint(cause: &str) -> &'static str {
    if cause.contains("CaUsedAsEndEntity") {
        "the server shows the certificate of a CA itself, which --ca-file (CA_FILE) cannot help: give the server a \
         certificate that this CA has signed, without CA:TRUE"
    } else if cause.contains("not valid for name") || cause.contains("NotValidForName") {
        "the certificate is for another host: is the name in the URL right?"
    } else {
        "is this device's clock right? does it need --ca-file (CA_FILE)?"
    }
}
