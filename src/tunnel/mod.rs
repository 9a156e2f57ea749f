//! `baletheus tunnel`: the proxy by which Prometheus scrapes any device through balena's VPN, as its `proxy_url`.
//!
//! For plain targets Prometheus sends `GET http://<uuid>.balena:<port>/<path>`, which balena's own proxy does not take:
//! the tunnel sends it as a request within a connection through balena's proxy. For https targets Prometheus sends
//! `CONNECT` itself, and the tunnel relays bytes. It goes only to the targets of the target file.

mod allowed_targets;
mod answer_body;
mod capacity;
mod exchange;
mod failures;
mod kept_tunnels;
mod metrics;
mod offline;
mod proxy;
mod relay;
mod target_list;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use rustls::pki_types::CertificateDer;

use crate::key_renewal::KeySource;
use crate::logging;
use crate::memory;
use crate::net::{CannotStart, Connector, EnvProxies, Guard, Vpn, server};
use crate::signals;
use crate::systemd;
use crate::tunnel::allowed_targets::AllowedTargets;
use crate::tunnel::capacity::Places;
use crate::tunnel::kept_tunnels::Transport;
use crate::tunnel::metrics::TunnelMetrics;
use crate::tunnel::proxy::Proxy;

pub struct Settings {
    /// The API key, which balena's VPN proxy asks for.
    pub key: KeySource,
    pub proxies: EnvProxies,
    /// Root certificates beside the platform's.
    pub roots: Vec<CertificateDer<'static>>,
    /// balena's VPN proxy.
    pub url: Uri,
    pub sd_file: PathBuf,
    /// Addresses to listen on; the first that is free is used.
    pub listen: Vec<SocketAddr>,
    /// Who may ask for the tunnel's own pages.
    pub guard: Guard,
    pub log: logging::Settings,
}

/// Runs the tunnel until a signal ends it.
pub fn run(settings: Settings) -> Result<Infallible, CannotStart> {
    logging::init(&settings.log, &settings.key);
    memory::keep_some();
    let metrics = Arc::new(TunnelMetrics::new()?);
    let mut connector = Connector::new(settings.roots, settings.proxies)?;
    connector.traffic = Some(metrics.traffic.clone());
    let listener = server::listen(&settings.listen, "TUNNEL_LISTEN_ADDRESS")?;
    let address = listener.local_addr()?;
    let places = Places::of_this_process();
    let started = format!(
        "baletheus {}: tunnel on http://{address} to the targets of {}, through {}, {} at once",
        env!("CARGO_PKG_VERSION"),
        settings.sd_file.display(),
        settings.url,
        places.tunnels
    );
    log::debug!("{} scrapes at once", places.scrapes);
    let vpn = Vpn::new(connector, settings.url, settings.key);
    let transport = Transport::new(vpn, places.tunnels, metrics.clone());
    let allowed = AllowedTargets::new(settings.sd_file, metrics.clone());
    let proxy = Proxy::new(transport, allowed, metrics, settings.guard, places.scrapes);
    // SIGHUP asks for nothing: the tunnel reads the target file again by itself.
    signals::handle(Duration::ZERO, 0, |_| ())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    log::info!("{started}");
    systemd::ready();
    Ok(runtime.block_on(proxy.serve(listener, places.connections))?)
}
