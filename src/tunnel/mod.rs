//! `baletheus tunnel`: the proxy by which Prometheus scrapes any device through balena's VPN, as its `proxy_url`.
//!
//! For plain targets Prometheus sends `GET http://<uuid>.balena:<port>/<path>`, which balena's own proxy does not take:
//! the tunnel sends it as a request within a connection through balena's proxy. For https targets Prometheus sends
//! `CONNECT` itself, and the tunnel relays bytes. It goes only to the targets of the target file.

mod allowed_targets;
mod exchange;
mod metrics;
mod pool;
mod proxy;
mod relay;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::Url;
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::pki_types::CertificateDer;

use crate::balena::key::KeySource;
use crate::logging::{self, cannot_start};
use crate::net::connector::Connector;
use crate::net::server;
use crate::net::vpn::Vpn;
use crate::signals;
use crate::systemd;
use crate::tunnel::allowed_targets::AllowedTargets;
use crate::tunnel::metrics::Metrics;
use crate::tunnel::pool::Pool;
use crate::tunnel::proxy::Proxy;

/// The most tunnels at once, unless the limit for open files sets a lower number.
const MAX_TUNNELS: usize = 30_000;
/// File descriptors a tunnel may take: itself and its scrape, or the two ends of a relayed pair and the next scrape.
const FILES_PER_TUNNEL: usize = 3;
/// File descriptors for everything else, the spare connections among them.
const OTHER_FILES: usize = 64;
/// Threads that look up names. Several, so that a look-up that hangs does not block the others.
const MAX_LOOK_UPS: usize = 16;

/// The checked settings of the tunnel.
pub struct Settings {
    /// The API key, which balena's VPN proxy asks for.
    pub key: KeySource,
    /// Root certificates beside the platform's.
    pub roots: Vec<CertificateDer<'static>>,
    /// balena's VPN proxy.
    pub url: Url,
    /// Path of the target file.
    pub sd_file: PathBuf,
    /// Addresses to listen on; the first that is free is used.
    pub listen: Vec<SocketAddr>,
    /// The log.
    pub log: logging::Settings,
    /// Settings that are allowed but look like mistakes, for the log.
    pub warnings: Vec<String>,
}

/// Runs the tunnel until a signal ends it.
pub fn run(settings: Settings) -> ExitCode {
    logging::init(&settings.log);
    match start(settings) {
        Ok(never) => match never {},
        Err(error) => cannot_start(&error),
    }
}

fn start(settings: Settings) -> Result<Infallible, String> {
    for warning in &settings.warnings {
        log::warn!("{warning}");
    }
    let metrics = Metrics::new().map_err(|error| format!("metrics: {error}"))?;
    let mut connector = Connector::new(settings.roots).map_err(|error| format!("TLS: {error}"))?;
    connector.traffic = Some(metrics.traffic.clone());
    let url = settings.url.as_str().parse().map_err(|_| "TUNNEL_URL is invalid")?;
    let listener = server::listen(&settings.listen)
        .map_err(|error| format!("{error}; set another --listen (TUNNEL_LISTEN_ADDRESS)"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let places = (open_files().saturating_sub(OTHER_FILES) / FILES_PER_TUNNEL).clamp(1, MAX_TUNNELS);
    let (version, url_text, list) = (env!("CARGO_PKG_VERSION"), &settings.url, settings.sd_file.display());
    log::info!(
        "baletheus {version}: tunnel on http://{address} to the targets of {list}, through {url_text}, {places} at once"
    );
    let vpn = Vpn::new(connector, url, settings.key);
    let allowed = AllowedTargets::new(settings.sd_file, metrics.targets.clone());
    let proxy = Proxy::new(vpn, allowed, Pool::new(places), metrics);
    // SIGHUP asks for nothing: the tunnel reads the target file again by itself.
    signals::handle(Duration::ZERO, 0, |_| ())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(MAX_LOOK_UPS).build();
    systemd::ready();
    let served = runtime.and_then(|runtime| {
        runtime.block_on(async {
            if let Some(interval) = systemd::watchdog_interval() {
                // On the thread of the proxy: if that hangs, systemd hears nothing.
                tokio::spawn(async move {
                    loop {
                        systemd::alive();
                        tokio::time::sleep(interval).await;
                    }
                });
            }
            proxy.serve(listener, places).await
        })
    });
    served.map_err(|error| error.to_string())
}

/// The limit for open files, raised as far as the process may.
fn open_files() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit); // if that fails, the limit does not change
    getrlimit(Resource::Nofile).current.and_then(|files| files.try_into().ok()).unwrap_or(usize::MAX)
}
