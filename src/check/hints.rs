//! What to do about a target that does not answer, or a device without one.

use crate::discovery::left_out::LeftOutReason;
use crate::net::{ScrapeError, ScrapeReason, is_untrusted, unreachable_hint};

const NO_EXPORTER: &str = "declare it with the label prometheus.io.port of a service in the fleet's docker-compose.yml, or \
    set --exporter (EXPORTERS), such as node:9100";
const OWN_LOG: &str = "the exporter's own log may tell more";
/// What to do about a device that is offline.
pub const OFFLINE: &str = "offline devices do not count as failures; check its power and network";

/// What to do about an old `node_exporter`.
pub const OUTDATED: &str =
    "this node_exporter is older than 0.16, and the dashboards do not know its names, such as node_cpu: update it";

/// What to do about an exporter that redirects within the target.
pub const REDIRECTED: &str = "it redirects, and the jobs of prometheus.yml follow no redirect: name the path that answers \
    (--exporter NAME:PORT/PATH)";

/// What to do about a device that is left out.
pub fn left_out(reason: LeftOutReason) -> &'static str {
    match reason {
        LeftOutReason::NotTagged => "change its tag, or --tag (DEVICE_TAG)",
        LeftOutReason::SwitchedOff => "remove the tag, or set it to true",
        LeftOutReason::Offline => OFFLINE,
        LeftOutReason::LanAddressTaken => "check its power and network; --address vpn needs no address",
        LeftOutReason::NoPublicUrl => {
            "switch on its public device URL in balenaCloud's dashboard, or use --address vpn"
        }
        LeftOutReason::NoLanAddress => "does its supervisor run? --address vpn needs no address",
        LeftOutReason::LanAddressRefused => {
            "if devices are in that network, name it with --lan-network (LAN_NETWORKS), or use --address vpn"
        }
        LeftOutReason::NoExporter => NO_EXPORTER,
        LeftOutReason::Broken | LeftOutReason::NoId | LeftOutReason::BadUuid => {
            "the API's record of it is odd: please report it"
        }
    }
}

/// What to do about a target that does not answer.
pub fn scrape(refused: &ScrapeError) -> &'static str {
    match refused.reason {
        ScrapeReason::NoTunnel | ScrapeReason::BadTunnel => unreachable_hint(refused),
        ScrapeReason::NoAccess => "try again in a minute; then see whether the key may reach this device",
        ScrapeReason::NotConnected => "restart it, or wait: it has lost balena's VPN",
        ScrapeReason::PortClosed | ScrapeReason::ConnectionRefused => {
            "does the exporter run, on this port, with host network or the port published?"
        }
        ScrapeReason::NoDevice => "is --tunnel-url (TUNNEL_URL) the proxy of this balena?",
        ScrapeReason::NoSuchHost => "is --public-domain (PUBLIC_URL_DOMAIN) right, and DNS here?",
        ScrapeReason::NoRoute => "is this machine in the device's network? --address vpn works from anywhere",
        ScrapeReason::NoConnection => "try again: it is this machine or its network that fails",
        ScrapeReason::Timeout => "is the device alive? does its exporter hang, or a firewall drop packets?",
        ScrapeReason::Tls if is_untrusted(&refused.message) => {
            "is the clock here right? An exporter with its own certificate needs --ca-file (CA_FILE) here, and tls_config \
             with ca_file or insecure_skip_verify in Prometheus"
        }
        ScrapeReason::Tls => "does the exporter speak https on this port? Its scheme (prometheus.io/scheme) says so",
        ScrapeReason::Proxy => "does the proxy allow it? NO_PROXY excludes a host from it",
        ScrapeReason::Http if refused.status == Some(401) => {
            "it wants a password or a token: give it to Prometheus (basic_auth or authorization), or let it allow /metrics"
        }
        ScrapeReason::Http if matches!(refused.status, Some(400 | 403 | 421)) => {
            "does it want a password or a token, or allow only some hosts? Its list needs the host and port of this \
             address, <uuid>.balena:<port> through the tunnel"
        }
        ScrapeReason::Http if refused.status.is_some_and(|status| status >= 500) => OWN_LOG,
        ScrapeReason::Http | ScrapeReason::NotMetrics => {
            "is the path right (--exporter NAME:PORT/PATH)? is it the exporter that listens there?"
        }
        ScrapeReason::Redirect => "name the port and path that answer (--exporter NAME:PORT/PATH)",
        ScrapeReason::NotTarget => {
            "discovery and tunnel need the same --sd-file (SD_FILE_PATH); https needs the tag or label prometheus.io/scheme; \
             port 22222 is never scraped"
        }
        ScrapeReason::NotHttp => "does it want https (tag prometheus.io/scheme)? is it the exporter's port?",
        ScrapeReason::BrokeOff | ScrapeReason::TooLarge => OWN_LOG,
        ScrapeReason::Busy => "raise the tunnel's limit for open files (ulimit -n) or for memory",
        ScrapeReason::BadRequest => {
            "is proxy_url in the scrape config http://, and does the job have few http_headers?"
        }
    }
}
