//! `baletheus tunnel`: the proxy by which Prometheus scrapes any device through balena's VPN, as its `proxy_url`.
//!
//! For plain targets Prometheus sends `GET http://<uuid>.balena:<port>/<path>`, which balena's own proxy does not take:
//! the tunnel sends it as a request within a connection through balena's proxy. For https targets Prometheus sends
//! `CONNECT` itself, and the tunnel relays bytes. It goes only to the targets of the target file.

mod allowed_targets;
mod exchange;
mod limits;
mod metrics;
mod outage;
mod passing;
mod pool;
mod proxy;
mod relay;
mod tunnels;

use std::convert::Infallible;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::thread;

use clap::{ArgMatches, Command};
use reqwest::Url;
use rustls::pki_types::CertificateDer;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::config;
use crate::config::options::{self, Values};
use crate::logging::{self, cannot_start, misconfigured};
use crate::net::connector::Connector;
use crate::net::proxy::Proxies;
use crate::net::server::{self, addresses};
use crate::net::vpn::{KeySource, Vpn};
use crate::tunnel::allowed_targets::AllowedTargets;
use crate::tunnel::limits::Places;
use crate::tunnel::metrics::Metrics;
use crate::tunnel::pool::Pool;
use crate::tunnel::proxy::Proxy;
use crate::tunnel::tunnels::Tunnels;

/// Names of the options that the tunnel takes.
const OPTIONS: &[&str] =
    &["TUNNEL_LISTEN_ADDRESS", "tunnel-url", "sd-file", "api-key-file", "ca-file", "log-level", "log-format"];

/// The command line of `baletheus tunnel`.
pub fn command() -> Command {
    Command::new("tunnel")
        .about("The way to vpn targets: a proxy that Prometheus has as its proxy_url")
        .after_help(
            "API_KEY is taken as by discovery, and so is RUST_LOG. It goes only to targets in the target file.\n\
             Exit codes: 0 ended by a signal, 2 configuration.\n",
        )
        .next_line_help(true)
        .args(OPTIONS.iter().map(|name| options::arg(options::option(name))))
}

/// The checked settings of the tunnel.
pub struct Settings {
    /// The API key, which balena's VPN proxy asks for.
    pub keys: KeySource,
    /// The proxies of the environment.
    pub proxies: Proxies,
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

/// Reads the options of the tunnel: to become a part of `config`.
pub fn read_settings(matches: ArgMatches, var: &dyn Fn(&str) -> Option<OsString>) -> Result<Settings, Vec<String>> {
    let mut from = Values { matches, var, errors: Vec::new() };
    let (key, key_file) = config::key(&mut from);
    let url = from.one("tunnel-url", config::api_url);
    let (proxies, mut warnings) = Proxies::from_env(var);
    warnings.extend(config::unencrypted(&url));
    let settings = Settings {
        proxies,
        keys: KeySource::new(key, key_file),
        roots: from.list("ca-file", config::certificates),
        warnings,
        url,
        sd_file: from.one("sd-file", config::file_path),
        listen: from.list("TUNNEL_LISTEN_ADDRESS", addresses),
        log: logging::Settings::read(&mut from),
    };
    if from.errors.is_empty() { Ok(settings) } else { Err(from.errors) }
}

/// Runs the tunnel until a signal ends it.
pub fn run(matches: ArgMatches, var: &dyn Fn(&str) -> Option<OsString>) -> ExitCode {
    let settings = match read_settings(matches, var) {
        Ok(settings) => settings,
        Err(errors) => return misconfigured(&errors),
    };
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
    let mut connector = Connector::new(settings.roots, settings.proxies).map_err(|error| format!("TLS: {error}"))?;
    connector.traffic = Some(metrics.traffic.clone());
    let url = settings.url.as_str().parse().map_err(|_| "TUNNEL_URL is invalid")?;
    let listener = server::listen(&settings.listen)
        .map_err(|error| format!("{error}; set another --listen (TUNNEL_LISTEN_ADDRESS)"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let places = Places::of_this_process();
    let (version, url_text, list) = (env!("CARGO_PKG_VERSION"), &settings.url, settings.sd_file.display());
    log::info!(
        "baletheus {version}: tunnel on http://{address} to the targets of {list}, through {url_text}, {} at once",
        places.tunnels
    );
    log::debug!("{} scrapes at once", places.scrapes);
    let vpn = Vpn::new(connector, url, settings.keys);
    let tunnels = Tunnels::new(vpn, Pool::new(places.tunnels), metrics.handshakes.clone());
    let allowed = AllowedTargets::new(settings.sd_file, metrics.targets.clone()).map_err(|error| error.to_string())?;
    let proxy = Proxy::new(tunnels, allowed, metrics, places.scrapes);
    stop_on_signals()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| runtime.block_on(proxy.serve(listener, places.connections)));
    served.map_err(|error| error.to_string())
}

/// Ends the process at SIGTERM and SIGINT. SIGHUP is ignored: the tunnel reads the target file again by itself.
fn stop_on_signals() -> Result<(), String> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("signals: {error}"))?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().find(|signal| *signal != SIGHUP) {
            log::info!("stopped by {}", signal_name(signal).unwrap_or("a signal"));
            process::exit(0);
        }
    });
    Ok(())
}
