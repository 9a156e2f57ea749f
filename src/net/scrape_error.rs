//! Why a target cannot be scraped: the reasons that the tunnel and `check` share.

use thiserror::Error;

use crate::word_enum::words;

words! {
    /// The kind of a failed scrape.
    ScrapeReason {
    /// No answer in time.
    Timeout = "timeout",
    /// Nothing listens on the port.
    ConnectionRefused = "refused",
    /// No network leads to the address.
    NoRoute = "no_route",
    /// The host's name does not resolve.
    NoSuchHost = "no_such_host",
    /// Any other failure to connect.
    NoConnection = "no_connection",
    /// TLS fails, most often because of the certificate.
    Tls = "tls",
    /// The proxy that the environment names does not connect.
    Proxy = "proxy",
    /// balena's VPN proxy cannot be reached.
    NoTunnel = "no_tunnel",
    /// The tunnel's URL leads to something else than balena's VPN proxy.
    BadTunnel = "bad_tunnel",
    /// balena's VPN proxy answers 407.
    NoAccess = "no_access",
    /// The device is not connected to the VPN.
    NotConnected = "not_connected",
    /// The device's port is closed, or the device does not answer.
    PortClosed = "port_closed",
    /// balena's VPN proxy does not take the name for a device.
    NoDevice = "no_device",
    /// The answer is not HTTP.
    NotHttp = "not_http",
    /// The connection closes before the whole answer is there.
    BrokeOff = "broke_off",
    /// The answer is larger than the tunnel passes.
    TooLarge = "too_large",
    /// The tunnel or `check` does not go there.
    NotTarget = "not_target",
    /// All places of the tunnel are in use.
    Busy = "busy",
    /// A request to the tunnel is not HTTP, or its head is too large.
    BadRequest = "bad_request",
    /// The exporter answers with an HTTP error, or redirects in a circle.
    Http = "http",
    /// The exporter redirects away from the target.
    Redirect = "redirect",
    /// The answer holds no metrics.
    NotMetrics = "not_metrics",
    }
}

impl ScrapeReason {
    /// Whether only `check` has it, which also connects without the VPN and looks into the answer.
    pub fn is_of_check(self) -> bool {
        use ScrapeReason as R;
        let direct = [R::ConnectionRefused, R::NoRoute, R::NoSuchHost, R::NoConnection, R::Tls, R::Proxy];
        direct.contains(&self) || [R::Http, R::Redirect, R::NotMetrics].contains(&self)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct ScrapeError {
    /// The reason, for programs.
    pub reason: ScrapeReason,
    /// The status of the answer that refused, if there was one.
    pub status: Option<u16>,
    /// The reason, for people; short enough for a status line.
    pub message: String,
}

impl ScrapeError {
    pub fn new(reason: ScrapeReason, message: impl Into<String>) -> Self {
        ScrapeError { reason, status: None, message: message.into() }
    }
}
